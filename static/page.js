// SPDX-License-Identifier: Apache-2.0
// The head of the page, its cards and its sentences, as view() has them. Dashboard and report share it.

import { Charts, sparkline, timeline } from "./charts.js";
import { byId, h, setAttribute, setChildren, setText, snippet } from "./dom.js";
import { NONE } from "./format.js";
import { parseLevel } from "./slo.js";
import { CompareTable, ErrorTable, EventLog, GPUTable, MetricsTable, ServerTable, WorkersTable } from "./tables.js";

/** State, facts and bars. */
export class RunHead {
  constructor(root) {
    this.mark = h("i", { "aria-hidden": "true" });
    [this.name, this.detail] = [h("strong"), h("span")];
    this.state = h("div", { class: "state", id: "state" }, this.mark, h("div", {}, this.name, this.detail));
    this.facts = h("dl", { class: "facts" });
    this.bars = h("div", { class: "phases", id: "phases" });
    this.notice = h("p", { class: "notice", id: "notice" });
    this.name.id = "state-name";
    this.detail.id = "state-detail";
    this.known = new Map(); // fact or bar -> its elements
    root.querySelector("[data-head]").replaceWith(this.state, this.facts);
    root.append(this.bars, this.notice);
  }

  show(view) {
    setText(this.name, view.state.name);
    setText(this.detail, view.state.detail);
    setAttribute(this.state, "data-tone", view.state.tone);
    setChildren(this.facts, view.facts.map(([label, text]) => this.fact(label, text)));
    const several = view.bars.length > 1;
    const bars = view.bars.length ? view.bars : [{ name: "", label: "", amount: "", right: "", percent: 0, tone: "" }];
    setChildren(this.bars, bars.map((bar) => this.bar(bar, several)));
    setText(this.notice, view.notice.text);
    setAttribute(this.notice, "data-tone", view.notice.tone || null);
  }

  fact(label, text) {
    let parts = this.known.get(label);
    if (!parts) {
      parts = { value: h("dd"), box: null };
      parts.box = h("div", { class: label === "Model" ? "wide" : null }, h("dt", {}, label), parts.value);
      this.known.set(label, parts);
    }
    setText(parts.value, text);
    setAttribute(parts.value, "title", text === NONE ? null : text);
    return parts.box;
  }

  bar({ name, label, amount, right, percent, warmup, tone }, several) {
    let parts = this.known.get(`bar ${name}`);
    if (!parts) {
      const fill = h("div", { class: "fill" });
      const track = h(
        "div", { class: "track", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" }, fill,
      );
      const texts = [h("span"), h("span"), h("span")];
      parts = { fill, track, texts, box: h("div", { class: "phase" }, track, h("p", {}, ...texts)) };
      this.known.set(`bar ${name}`, parts);
    }
    parts.fill.style.transform = `scaleX(${percent / 100})`;
    setAttribute(parts.track, "aria-valuenow", String(Math.floor(percent)));
    setAttribute(parts.track, "aria-label", label ? `${label} progress` : "Progress");
    setAttribute(parts.box, "data-tone", tone || null);
    parts.box.classList.toggle("short", several && warmup === true);
    [label, amount, right].forEach((text, at) => setText(parts.texts[at], text));
    return parts.box;
  }
}

/** The six figures. */
export class Cards {
  constructor(root) {
    this.root = root;
    this.known = new Map();
    for (const type of ["themechange", "resize"]) addEventListener(type, () => this.draw());
  }

  show(view) {
    this.view = view;
    setChildren(this.root, view.cards.map((card) => this.card(card)));
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.draw();
    });
  }

  card(card) {
    let parts = this.known.get(card.id);
    if (!parts) this.known.set(card.id, (parts = this.build(card)));
    const { element, kind, value, unit, spread, beside, canvas } = parts;
    setAttribute(element, "data-tone", card.tone || null);
    setText(kind, card.kind);
    setText(value, card.figure.text);
    setAttribute(value, "data-none", card.figure.text === NONE ? "" : null);
    setText(unit, card.figure.text === NONE ? "" : [card.spread, card.figure.unit].filter(Boolean).join(" "));
    spread.hidden = !card.change;
    if (card.change) {
      setText(spread, card.change.text);
      setAttribute(spread, "data-verdict", card.change.verdict);
      setAttribute(
        spread, "title", `against ${card.change.name}${card.change.verdict ? `: ${card.change.verdict}` : ""}`,
      );
    }
    const texts = card.beside.map(({ label, text, tone }) => [label, text, null, tone]);
    if (card.note) texts.unshift(["", card.note, "note"]);
    setChildren(
      beside,
      texts.map(([label, text, kind, tone], at) => {
        const span = beside.children[at] ?? h("span", {}, h("small"), h("b"));
        setText(span.firstChild, label);
        setText(span.lastChild, text);
        setAttribute(span, "class", kind ?? null);
        setAttribute(span, "data-tone", tone || null);
        return span;
      }),
    );
    parts.spark = card.spark;
    return element;
  }

  build({ id, title }) {
    const [kind, value, unit] = [
      h("span", { class: "kind" }), h("b", { class: "value" }), h("small", { class: "unit" }),
    ];
    const [spread, beside] = [h("span", { class: "change", hidden: true }), h("p", { class: "beside" })];
    const canvas = h("canvas", { "aria-hidden": "true" });
    const element = h(
      "article", { class: "card", id: `card-${id}`, "aria-labelledby": `card-${id}-title` },
      h("header", {}, h("h2", { id: `card-${id}-title` }, title), kind),
      h("p", { class: "figure" }, value, " ", unit, spread), beside, canvas,
    );
    return { element, kind, value, unit, spread, beside, canvas, spark: [] };
  }

  draw() {
    if (!this.view) return;
    const { zero, end } = this.view.axis;
    for (const { canvas, spark } of this.known.values()) sparkline(canvas, spark, zero, zero + end);
  }
}

/** What stands in the place of everything while there is nothing. */
export class Overlay {
  constructor(element) {
    Object.assign(this, { element, shown: "" });
  }

  show({ overlay }) {
    const what = overlay ? JSON.stringify(overlay) : "";
    if (what === this.shown) return;
    this.shown = what;
    this.element.hidden = !what;
    this.element.replaceChildren(
      ...(overlay ? [h("div", {}, h("h2", {}, overlay.heading), ...overlayBody(overlay))] : []),
    );
  }
}

function overlayBody({ kind, error, source, address, connected }) {
  if (kind === "unreachable") return [h("p", {}, "It is not there, or not yet. This page keeps trying.")];
  if (kind === "failed") return [h("pre", { class: "error", tabindex: "0", "aria-label": "Error" }, error)];
  const line = "AIPERF_UI_REALTIME_METRICS_ENABLED=true aiperf profile";
  const rest = " --model MODEL --url URL --streaming";
  const ear = (words) =>
    h("p", {}, `${words} `, h("strong", {}, address), connected ? "." : ": not connected yet, trying on.");
  const start = (words, flag) => [
    ear("Listening on"), h("p", {}, words), snippet(`${line}${flag}${rest}`, "command to start AIPerf"),
    h(
      "p", { class: "muted" },
      "The variable makes AIPerf publish live metrics; without it there is still progress. " +
        "This page fills itself as soon as something comes.",
    ),
  ];
  switch (source) {
    case "tcp":
    case "zmq":
      return start(
        "Start AIPerf with its bus on TCP:", ` --zmq-host ${/^tcp:\/\/(.+):\d+$/.exec(address)?.[1] ?? "127.0.0.1"}`,
      );
    case "ipc":
      return start(
        "Start AIPerf with its bus in that folder:",
        ` --zmq-ipc-path ${/^ipc:\/\/(.*)\/[^/]*$/.exec(address)?.[1] ?? "DIR"}`,
      );
    case "bind":
      return [
        ear("Bound to"),
        h(
          "p", {},
          "Connect a ZMQ PUB socket to it and send two frames a message: the topic (message type and $) and the JSON.",
        ),
      ];
    case "child":
      return [
        h(
          "p", {},
          "The benchmark was started by this server and has not spoken yet. Its own output is in the terminal.",
        ),
      ];
    case "replay":
    case "demo":
      return [h("p", {}, "The recording has not said anything yet.")];
    default:
      return [h("p", {}, "No bus is attached: messages come from the program that runs this server.")];
  }
}

/** The service levels: what was asked, and what became of it. */
export class Levels {
  constructor(list, { onRemove }) {
    Object.assign(this, { list, onRemove });
    this.shown = "";
  }

  show({ levels }) {
    const what = JSON.stringify(levels.map(({ text, tone, words }) => [text, tone, words]));
    if (what === this.shown) return;
    this.shown = what;
    setChildren(
      this.list,
      levels.map(({ text, tone, words, own, level }) => {
        const remove = h("button", { class: "button quiet", type: "button", "aria-label": `Remove ${text}` }, "×");
        remove.addEventListener("click", () => this.onRemove?.(level));
        return h(
          "li", { "data-tone": tone || null }, h("i", { "aria-hidden": "true" }), h("strong", {}, text),
          h("span", {}, own ? `${words} (the run's own goodput)` : words), this.onRemove && !own ? remove : null,
        );
      }),
    );
  }
}

/** Paper is white: every chart is drawn for it, in sight or not, and again for the screen afterwards. */
export function forPaper(cards) {
  const { dataset } = document.documentElement;
  let screen = dataset.theme;
  const toPaper = (paper) => {
    if (paper) screen = dataset.theme;
    dataset.theme = paper ? "light" : screen;
    dispatchEvent(new Event("themechange"));
    for (const panel of timeline.panels) panel.forPaper();
    cards.draw();
  };
  addEventListener("beforeprint", () => toPaper(true));
  addEventListener("afterprint", () => toPaper(false));
}

/** The form that adds a service level. */
export function levelForm(onLevel) {
  const input = byId("level-input");
  byId("level-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const level = parseLevel(input.value);
    setText(byId("level-problem"), level.problem ?? "");
    setAttribute(input, "aria-invalid", level.problem ? "true" : null);
    if (level.problem) return;
    input.value = "";
    onLevel(level);
  });
}

/** The buttons that choose a range of time; a range that is longer than the run is not offered. */
export function rangeButtons(box, onRange = () => {}) {
  const buttons = [...box.children];
  const show = () => {
    for (const button of buttons) {
      const all = button.dataset.range === "all";
      const seconds = Number(button.dataset.range);
      const pressed = timeline.zoom ? false : all ? !timeline.follow : timeline.follow === seconds;
      setAttribute(button, "aria-pressed", String(pressed));
      if (all) setText(button, timeline.zoom ? "Reset zoom" : "All");
      else button.hidden = seconds >= timeline.end;
    }
  };
  for (const button of buttons) {
    const seconds = button.dataset.range === "all" ? null : Number(button.dataset.range);
    button.addEventListener("click", () => timeline.setFollow(seconds));
  }
  timeline.onZoom = () => {
    show();
    onRange();
  };
  return show;
}

/** The tables that both pages have, each filled from its part of the view. */
export function tablesOf(pane) {
  return {
    metrics: new MetricsTable(pane("metrics")), gpus: new GPUTable(pane("gpus")),
    server: new ServerTable(pane("server")), workers: new WorkersTable(pane("workers")),
    runs: new CompareTable(pane("runs")), errors: new ErrorTable(pane("errors")),
    events: new EventLog(pane("events")),
  };
}

/** The charts in their place on the page. */
export const chartsOf = (options) => new Charts(byId("charts"), byId("charts-note"), options);
