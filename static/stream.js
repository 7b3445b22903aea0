// SPDX-License-Identifier: Apache-2.0
// The raw stream: bus messages as they come, over a socket of its own, and the lines that do the same in a shell.

import { Feed, getJSON, hasToken, root, socketURL } from "./api.js";
import { h, setText, snippet } from "./dom.js";

const TYPES = [
  "realtime_metrics", "realtime_telemetry_metrics", "realtime_server_metrics", "credit_phase_start",
  "credit_phase_progress", "credit_phase_complete", "worker_status_summary", "worker_health", "processing_stats",
  "all_records_received", "system_state_changed", "process_all_results", "process_records_result",
  "results_exported", "benchmark_complete", "heartbeat",
];
const MAX_LINES = 200;
const MAX_LENGTH = 4000;

/** What a shell needs around a word. */
export const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

/** What curl sends the token with, where there is one. */
export const AUTH = hasToken() ? ' -H "Authorization: Bearer $AIPERF_API_TOKEN"' : "";

/** The same subscription from a terminal. */
export function websocatLine(types) {
  const asked = JSON.stringify({ type: "subscribe", message_types: types });
  return `echo ${quoted(asked)} | websocat -n${AUTH.replace("-H ", "-H=")} ${quoted(socketURL().href)}`;
}

function curlLine(types) {
  const query = types.includes("*") ? "" : `?types=${types.map(encodeURIComponent).join(",")}`;
  return `curl -N${AUTH} ${quoted(new URL("api/stream", root).href + query)}`;
}

const shortened = (text) =>
  text.length > MAX_LENGTH ? `${text.slice(0, MAX_LENGTH)} … (${text.length} characters)` : text;

export class StreamPanel {
  constructor(pane) {
    this.feed = null;
    this.paused = false;
    this.held = []; // [type, text] that came since the last frame
    this.count = 0;
    this.boxes = new Map();
    this.list = h("div", { class: "types" });
    this.addTypes(["*", ...TYPES]);
    this.messages = h("div", {
      class: "messages", tabindex: "0", role: "log", "aria-live": "off", "aria-label": "Messages",
    });
    this.tally = h("span", { class: "muted" });
    this.pauseButton = h("button", { class: "button", type: "button", "aria-pressed": "false" }, "Pause");
    this.pauseButton.addEventListener("click", () => this.pause(!this.paused));
    const clear = h("button", { class: "button", type: "button" }, "Clear");
    clear.addEventListener("click", () => {
      this.messages.replaceChildren();
      this.count = 0;
      this.tell();
    });
    this.websocat = snippet("", "websocat line");
    this.curl = snippet("", "curl line");
    pane.append(
      h(
        "div", { class: "stream" }, h("fieldset", {}, h("legend", {}, "Message types"), this.list),
        h(
          "div", { class: "right" }, h("div", { class: "tools" }, this.pauseButton, clear, this.tally),
          this.messages, this.websocat, this.curl,
        ),
      ),
    );
    this.lines();
    this.tell();
  }

  addTypes(types) {
    for (const type of types) {
      if (this.boxes.has(type)) continue;
      const box = h("input", { type: "checkbox" });
      box.addEventListener("change", () => this.subscribe());
      this.boxes.set(type, box);
      this.list.append(h("label", {}, box, h("span", { class: "mono" }, type === "*" ? "* (everything)" : type)));
    }
  }

  /** The tab was opened: the names that AIPerf knows stand in the description of the messages. */
  async open() {
    if (this.opened) return;
    this.opened = true;
    const described = await getJSON("asyncapi.json").catch(() => null);
    const { builtin = [], known = [] } = described?.["x-message-types"] ?? {};
    this.addTypes([...builtin, ...known]);
  }

  chosen() {
    return [...this.boxes].filter(([, box]) => box.checked).map(([type]) => type);
  }

  lines() {
    const chosen = this.chosen();
    const types = chosen.length ? chosen : ["realtime_metrics"];
    this.websocat.setLine(websocatLine(types));
    this.curl.setLine(curlLine(types));
  }

  subscribe() {
    this.feed?.stop();
    this.feed = null;
    const types = this.chosen();
    this.lines();
    if (types.length) {
      this.feed = new Feed({
        types, onMessage: (type, text) => this.hold(text),
        onControl: (object) => {
          if (object.type !== "subscribed") this.hold(JSON.stringify(object));
        },
      });
    }
    this.tell();
  }

  pause(paused) {
    this.paused = paused;
    this.pauseButton.setAttribute("aria-pressed", String(paused));
    this.pauseButton.textContent = paused ? "Resume" : "Pause";
    this.tell();
  }

  hold(text) {
    this.count++;
    if (!this.paused) this.held.push(text);
    if (this.held.length > MAX_LINES) this.held.shift();
    this.frame ??= requestAnimationFrame(() => this.flush());
  }

  flush() {
    this.frame = undefined;
    const box = this.messages;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
    box.append(...this.held.splice(0).map((text) => h("div", {}, shortened(text))));
    while (box.childElementCount > MAX_LINES) box.firstChild.remove();
    if (atEnd) box.scrollTop = box.scrollHeight;
    this.tell();
  }

  tell() {
    const types = this.chosen().length;
    setText(
      this.tally,
      types
        ? `${this.count.toLocaleString("en-US")} messages${this.paused ? ", paused" : ""}`
        : "Choose a type to watch it.",
    );
  }
}
