// SPDX-License-Identifier: Apache-2.0
// The documentation page, written from /api/docs: the tables the server routes and parses with.

import { AnswerError, Feed, getJSON, hasToken, request, root, socketURL } from "./api.js";
import { byId, h, setText, snippet } from "./dom.js";
import { bytes } from "./format.js";
import { quoted } from "./stream.js";

const SHOWN_CHARACTERS = 20_000;
const STREAM_LINES = 200;
const FILLED_IN = new Set(["tag", "stat", "types"]); // parameters whose example makes the first try worth looking at

const AUTH = hasToken() ? ' -H "Authorization: Bearer $AIPERF_API_TOKEN"' : "";
const WS_AUTH = hasToken() ? ' -H="Authorization: Bearer $AIPERF_API_TOKEN"' : "";
const anchor = (text) => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "start";

/** A path of the route table, relative to this page. */
const relative = (path) => `./${path.replace(/^\//, "")}`;

// One endpoint

class Endpoint {
  constructor(route) {
    this.route = route;
    const { media } = route;
    this.socket = route.websocket;
    this.streaming = media.some((type) => /event-stream|ndjson/.test(type));
    this.page = media.some((type) => type.startsWith("text/html"));
    this.inputs = new Map();
    this.curl = snippet("", `${this.socket ? "websocat" : "curl"} line for ${route.path}`);
    this.element = h("article", { class: "endpoint", id: anchor(`endpoint ${route.path}`), "aria-label": route.path },
      h("header", {}, h("h3", {}, h("a", { href: `#${anchor(`endpoint ${route.path}`)}` }, route.path)),
        h("span", { class: "summary" }, route.summary ?? ""), h("span", { class: "media" }, media.join(", "))),
      h("div", { class: "body" }, route.description ? h("p", {}, route.description) : null, this.parameters(), this.page ? null : this.curl, ...this.tryIt()));
    this.changed();
  }

  parameters() {
    const { params = [] } = this.route;
    if (!params.length) return null;
    return h("div", { class: "params" }, ...params.map(({ name, description, example }) => {
      const flag = name === "pretty";
      const input = h("input", flag ? { type: "checkbox" }
        : { type: "text", value: FILLED_IN.has(name) ? example : "", placeholder: example, spellcheck: "false", autocomplete: "off" });
      if (flag) input.checked = true; // a person looks at the answer
      input.addEventListener("input", () => this.changed());
      this.inputs.set(name, input);
      return h("label", {}, h("code", {}, name), input, h("span", { class: "hint" }, description ?? ""));
    }));
  }

  /** The address asked for, by the parameters as they stand. */
  url() {
    const url = new URL(relative(this.route.path), root);
    const words = [...this.inputs].flatMap(([name, input]) => {
      if (input.type === "checkbox") return input.checked ? [name] : [];
      return input.value === "" ? [] : [`${name}=${encodeURIComponent(input.value).replaceAll("%2C", ",").replaceAll("%3A", ":")}`];
    });
    url.search = words.length ? `?${words.join("&")}` : "";
    return url;
  }

  changed() {
    this.curl.setLine(this.socket ? websocatLine(["realtime_metrics", "credit_phase_progress"])
      : `curl -s${this.streaming ? "N" : ""}${AUTH} ${quoted(this.url().href)}`);
  }

  tryIt() {
    if (this.page) return [h("div", { class: "try" }, h("a", { class: "button", href: relative(this.route.path) }, "Open"))];
    this.button = h("button", { class: "button", type: "button", "aria-label": `Try it: ${this.route.path}` }, "Try it");
    this.result = h("span", { class: "result", role: "status" });
    this.answer = h("pre", { class: "answer", hidden: true, tabindex: "0", "aria-label": `Answer of ${this.route.path}` });
    this.button.addEventListener("click", () => (this.stop ? this.stop() : this.run()));
    return [h("div", { class: "try" }, this.button, this.result), this.answer];
  }

  async run() {
    setText(this.result, "Asking.");
    this.answer.hidden = false;
    this.answer.textContent = "";
    if (this.socket) return this.runSocket();
    const giveUp = new AbortController();
    this.running(() => giveUp.abort());
    const began = performance.now();
    try {
      const answer = await request(this.url().href, { signal: giveUp.signal });
      const line = `${answer.status} ${answer.statusText} · ${answer.headers.get("content-type") ?? ""}`;
      if (this.streaming && answer.ok) await this.follow(answer, line);
      else {
        const text = await answer.text();
        setText(this.result, `${line} · ${bytes(new Blob([text]).size)} in ${Math.max(1, Math.round(performance.now() - began))} ms`);
        this.answer.textContent = text.length > SHOWN_CHARACTERS ? `${text.slice(0, SHOWN_CHARACTERS)}\n… ${text.length - SHOWN_CHARACTERS} more characters` : text;
      }
    } catch (error) {
      setText(this.result, error.name === "AbortError" ? "Stopped." : `No answer: ${error.message}`);
    } finally {
      this.idle();
    }
  }

  async follow(answer, line) {
    setText(this.result, `${line} · following`);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      this.add(value);
    }
    setText(this.result, `${line} · the stream ended`);
  }

  runSocket() {
    const feed = new Feed({
      types: ["realtime_metrics", "credit_phase_progress"],
      onMessage: (type, text) => this.add(`${text}\n`),
      onControl: (object) => this.add(`${JSON.stringify(object)}\n`),
      onState: (state) => setText(this.result, state === "open" ? "Subscribed." : "Connecting."),
    });
    this.running(() => {
      feed.stop();
      setText(this.result, "Stopped.");
      this.idle();
    });
  }

  add(text) {
    this.answer.append(text.length > 4000 ? `${text.slice(0, 4000)} …\n` : text);
    while (this.answer.childNodes.length > STREAM_LINES) this.answer.firstChild.remove();
    this.answer.scrollTop = this.answer.scrollHeight;
  }

  running(stop) {
    this.stop = stop;
    if (this.streaming || this.socket) this.name("Stop");
  }

  idle() {
    this.stop = null;
    this.name("Try it");
  }

  name(text) {
    setText(this.button, text);
    this.button.setAttribute("aria-label", `${text}: ${this.route.path}`);
  }
}

// Sections

const section = (id, title, ...children) => h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title), ...children);

function table(caption, head, rows) {
  return h("div", { class: "table", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {}, h("thead", {}, h("tr", {}, ...head.map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, ...rows.map((cells) => h("tr", {}, ...cells.map((cell) => h("td", {}, cell)))))));
}

const code = (text) => (text === null || text === undefined || text === "" ? "" : h("code", {}, String(text)));

function websocatLine(types, more = {}) {
  return `echo ${quoted(JSON.stringify({ type: "subscribe", message_types: types, ...more }))} | websocat -n${WS_AUTH} ${quoted(socketURL().href)}`;
}

function webSocketSection({ message_types: types = {} }) {
  return section("websocket", "WebSocket",
    h("p", {}, "Subscribe, and the last message of each type comes at once, then every one as it comes off the bus. Each line can be pasted as it is."),
    h("h3", {}, "Watch the metrics"), snippet(websocatLine(["realtime_metrics"]), "websocat line for metrics"),
    h("h3", {}, "Everything on the bus"), snippet(websocatLine(["*"]).replace("websocat -n", "websocat -n -B 4194304"), "websocat line for everything"),
    h("h3", {}, "Only what is new, without the present state"), snippet(websocatLine(["credit_phase_progress"], { snapshot: false }), "websocat line without snapshot"),
    h("h3", {}, "By hand"), snippet(`websocat${WS_AUTH} ${quoted(socketURL().href)}`, "websocat line by hand"),
    h("h3", {}, "What one may say, and what comes back"),
    table("WebSocket messages", ["You say", "You get"], [
      [code('{"type":"subscribe","message_types":["realtime_metrics"]}'), code('{"type":"subscribed","message_types":["realtime_metrics"]}')],
      [code('{"type":"unsubscribe","message_types":["realtime_metrics"]}'), code('{"type":"unsubscribed","message_types":["realtime_metrics"]}')],
      [code('{"type":"ping"}'), code('{"type":"pong"}')],
      ["anything else", code('{"type":"error","message":"…"}')],
      ["reading too slowly", h("span", {}, code('{"type":"skipped","counts":{…}}'), " state messages are skipped, the newest is sent when there is room")],
    ]),
    h("h3", {}, "Message types"),
    h("p", {}, "The built-in ones are marked; any other type of the bus can be subscribed to as well. A name that AIPerf does not know comes back under ", h("code", {}, "unknown"), "."),
    h("div", { class: "names" }, ...[...new Set([...(types.builtin ?? []), ...(types.known ?? [])])]
      .map((name) => h("code", (types.builtin ?? []).includes(name) ? { class: "builtin", title: "built in" } : {}, name))));
}

function prometheusSection() {
  const lines = ["scrape_configs:", "  - job_name: aiperf", "    scrape_interval: 5s"];
  if (root.protocol === "https:") lines.push("    scheme: https");
  if (root.pathname !== "/") lines.push(`    metrics_path: ${root.pathname}metrics`);
  if (hasToken()) lines.push("    authorization:", "      credentials_file: /etc/prometheus/aiperf-token");
  lines.push("    static_configs:", `      - targets: ["${root.host || location.host}"]`);
  return section("prometheus", "Prometheus",
    h("p", {}, "Names and units are those of AIPerf's own exporter; the identity of the run stands on every sample."),
    snippet(lines.join("\n"), "Prometheus scrape configuration"),
    h("h3", {}, "OpenMetrics"), snippet(`curl -s${AUTH} -H 'Accept: application/openmetrics-text; version=1.0.0' ${quoted(new URL("metrics", root).href)}`, "curl line for OpenMetrics"));
}

function optionRow({ flag, metavar, default: preset, env, help }) {
  return [h("code", {}, metavar ? `${flag} ${metavar}` : flag), code(env), code(preset), help];
}

function limitRow({ name, value, unit, meaning }) {
  return [name, unit === "bytes" ? bytes(value) : `${Number(value).toLocaleString("en-US")} ${unit}`, meaning];
}

function write(docs) {
  setText(byId("version"), docs.version ? `version ${docs.version}` : "");
  const endpoints = (docs.routes ?? []).map((route) => new Endpoint(route));
  const sections = [
    section("endpoints", "Endpoints", h("p", {}, "GET and HEAD. JSON is compact; ", h("code", {}, "?pretty"), " indents it. Errors are ", h("code", {}, '{"error": "…"}'), " with the right status."),
      ...endpoints.map(({ element }) => element)),
    webSocketSection(docs),
    prometheusSection(),
    section("options", "Options", h("p", {}, "Every option has an environment variable; the flag beats it."),
      table("Options", ["Option", "Variable", "Default", "Meaning"], (docs.options ?? []).map(optionRow))),
    section("limits", "Limits", h("p", {}, "What the server takes, and what happens past it."),
      table("Limits", ["Limit", "Value", "Past it"], (docs.limits ?? []).map(limitRow))),
  ];
  byId("generated").replaceChildren(...sections);
  contents(docs, sections);
  if (location.hash.length > 1) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

function contents({ routes = [] }, sections) {
  byId("contents").replaceChildren(...sections.flatMap((one) => {
    const links = [h("a", { class: "group", href: `#${one.id}` }, one.querySelector("h2").textContent)];
    if (one.id === "endpoints") links.push(...routes.map(({ path }) => h("a", { class: "mono", href: `#${anchor(`endpoint ${path}`)}` }, path)));
    return links;
  }));
}

try {
  write(await getJSON("api/docs"));
} catch (error) {
  const problem = byId("problem");
  const why = error instanceof AnswerError && error.status === 401 ? "the server asks for a token: open this page as ./?token=…" : error.message;
  problem.textContent = `The endpoints could not be read from api/docs: ${why}. openapi.json and the links above may still answer.`;
  problem.hidden = false;
}
