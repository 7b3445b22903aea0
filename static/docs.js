// SPDX-License-Identifier: Apache-2.0
// The documentation page, made from openapi.json and asyncapi.json.

import { AnswerError, Feed, getJSON, request, root } from "./api.js";
import { byId, copyButton, h, setText, snippet } from "./dom.js";
import { bytes, clock, count, percent } from "./format.js";
import { AUTH, quoted, websocatLine } from "./stream.js";

const SHOWN_CHARACTERS = 20_000;
const STREAM_LINES = 200;
const REFRESH_MS = 2_000;
const FIRST_TYPES = ["realtime_metrics", "credit_phase_progress"]; // of the WebSocket's try-out
const TITLES = { everyday: "Every day", streams: "Streams", more: "The rest" };

const anchor = (path) => `endpoint-${path.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "start"}`;

// One endpoint: a line, and below it, once it is opened, its parameters, the line for a shell, and an answer.

class Endpoint {
  constructor(path, operation, parameters) {
    this.path = path;
    this.media = Object.keys(operation.responses[200]?.content ?? {});
    this.socket = Boolean(operation.responses[101]);
    this.streaming = this.media.some((type) => /event-stream|ndjson/.test(type));
    this.page = this.media[0] === "text/html" && this.media.length === 1;
    this.inputs = new Map();
    this.curl = snippet("", `${this.socket ? "websocat" : "curl"} line for ${path}`);
    this.result = h("span", { class: "result", role: "status" });
    this.answer = h("pre", { class: "answer", hidden: true, tabindex: "0", "aria-label": `Answer of ${path}` });
    const id = anchor(path);
    this.body = h("div", { class: "body", id: `${id}-body`, hidden: true }, this.fields(parameters), this.curl, this.result, this.answer);
    this.element = h("article", { class: "endpoint", id, "aria-label": path },
      h("header", {}, h("h3", {}, h("a", { href: `#${id}` }, path)), h("span", { class: "summary" }, operation.summary ?? ""), this.tools()),
      this.body);
    this.changed();
  }

  /** What there is to click; a page is opened, anything else is tried. */
  tools() {
    if (this.page) return h("div", { class: "tools" }, h("a", { class: "button quiet", href: `.${this.path}` }, "Open"));
    this.more = h("button", { class: "button quiet", type: "button", "aria-label": `Details: ${this.path}`, "aria-controls": this.body.id }, "Details");
    this.more.addEventListener("click", () => this.open(this.body.hidden));
    this.button = h("button", { class: "button quiet", type: "button" }, "Try it");
    this.button.addEventListener("click", () => (this.stop ? this.stop() : this.run()));
    this.name("Try it");
    this.open(false);
    const line = this.socket ? "websocat" : "curl";
    return h("div", { class: "tools" }, copyButton(() => this.line, `Copy ${line}`, `Copy ${line}: ${this.path}`), this.more, this.button);
  }

  open(opened) {
    this.body.hidden = !opened;
    this.more?.setAttribute("aria-expanded", String(opened));
  }

  fields(parameters) {
    const shown = parameters.filter(({ name }) => name !== "pretty");
    if (!shown.length) return null;
    return h("div", { class: "params" }, ...shown.map(({ name, in: place, description, example = "" }) => {
      const filled = place === "path" || ["tag", "stat", "types"].includes(name); // so that the first try shows something
      const input = h("input", { type: "text", value: filled ? example : "", placeholder: example && `such as ${example}`, spellcheck: "false", autocomplete: "off" });
      input.addEventListener("input", () => this.changed());
      this.inputs.set(name, input);
      return h("label", {}, h("code", {}, name), input, h("span", { class: "hint" }, description ?? ""));
    }));
  }

  /** The address asked for, by the parameters as they stand. */
  url() {
    let path = this.path;
    const words = [];
    for (const [name, { value }] of this.inputs) {
      if (path.includes(`{${name}}`)) path = path.replace(`{${name}}`, value.split("/").map(encodeURIComponent).join("/"));
      else if (value !== "") words.push(`${name}=${encodeURIComponent(value).replaceAll("%2C", ",").replaceAll("%3A", ":")}`);
    }
    const url = new URL(`.${path}`, root);
    url.search = words.join("&");
    return url;
  }

  changed() {
    this.line = this.socket ? websocatLine(FIRST_TYPES) : `curl -s${this.streaming ? "N" : ""}${AUTH} ${quoted(this.url().href)}`;
    this.curl.setLine(this.line);
  }

  async run() {
    this.open(true);
    setText(this.result, "Asking.");
    this.answer.hidden = false;
    this.answer.textContent = "";
    if (this.socket) return this.runSocket();
    const giveUp = new AbortController();
    this.running(() => giveUp.abort());
    const began = performance.now();
    try {
      const url = this.url();
      if (this.media.includes("application/json")) url.search += `${url.search ? "&" : "?"}pretty`; // a person looks at it
      const answer = await request(url.href, { signal: giveUp.signal });
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
      types: FIRST_TYPES,
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
    this.button.setAttribute("aria-label", `${text}: ${this.path}`);
  }
}

// Sections

const section = (id, title, ...children) => h("section", { "aria-labelledby": id }, h("h2", { id }, title), ...children);

function endpointSections({ paths, tags, components }) {
  const named = (parameter) => (parameter.$ref ? components.parameters[parameter.$ref.split("/").pop()] : parameter);
  return tags.map(({ name, description }) => section(name, TITLES[name] ?? name, h("p", {}, description),
    h("div", { class: "endpoints" }, ...Object.entries(paths).filter(([, { get }]) => get.tags.includes(name))
      .map(([path, { get, parameters = [] }]) => new Endpoint(path, get, parameters.map(named)).element))));
}

function messages({ "x-message-types": { builtin, known } }) {
  return h("details", { class: "types" }, h("summary", {}, "Message types"),
    h("p", { class: "muted" }, "Any other type of the bus can be subscribed to as well; ", h("code", {}, "*"), " is all of them. A name that AIPerf does not know comes back under ", h("code", {}, "unknown"), "."),
    h("div", { class: "names" }, ...[...new Set([...builtin, ...known])]
      .map((name) => h("code", builtin.includes(name) ? { class: "builtin", title: "built in" } : {}, name))));
}

async function write() {
  const [openapi, asyncapi] = await Promise.all([getJSON("openapi.json"), getJSON("asyncapi.json")]);
  setText(byId("version"), `version ${openapi.info.version}`);
  const sections = endpointSections(openapi);
  sections[0].querySelector("p").append(" JSON is compact; ", h("code", {}, "?pretty"), " indents it. Errors are ", h("code", {}, '{"error": "…"}'), " with the right status.");
  sections[1].append(messages(asyncapi));
  byId("generated").replaceChildren(...sections);
  if (location.hash.length > 1) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

// The run, in a line

const TONES = { complete: "good", failed: "bad", cancelled: "warn", waiting: "warn" };

function runLine(status, progress, { model, endpoint_type: type }) {
  const { total, completed, errors, percent_complete: done, eta_sec: eta } = progress;
  const words = [h("strong", { "data-tone": status.stale ? "bad" : TONES[status.state] ?? null }, status.stale ? `${status.state}, silent` : status.state)];
  if (status.label !== "run 1") words.push(h("span", {}, status.label));
  if (status.error) words.push(h("span", {}, status.error));
  if (status.state !== "waiting") {
    words.push(h("span", {}, percent(done)), h("span", {}, `${count(completed)}${total ? ` of ${count(total)}` : ""} requests, ${count(errors)} errors`));
    if (eta > 0) words.push(h("span", {}, `${clock(eta)} left`));
  }
  if (model) words.push(h("span", {}, [model, type].filter(Boolean).join(", ")));
  words.push(h("span", { class: "muted" }, `${status.source.kind}: ${status.source.address}${status.source.connected ? "" : ", not connected"}`));
  return words;
}

let identity = { of: "" }; // what /api/metrics says of the run, asked for again when its state is another

async function refresh() {
  try {
    if (!document.hidden) {
      const [status, progress] = await Promise.all(["api/status", "api/progress"].map(getJSON));
      const of = `${status.run} ${status.benchmark_id} ${status.state}`;
      if (identity.of !== of) identity = { ...(await getJSON("api/metrics")), of };
      byId("run").replaceChildren(...runLine(status, progress, identity));
    }
  } catch (error) {
    byId("run").replaceChildren(h("strong", { "data-tone": "bad" }, `The server does not answer: ${error.message}`));
  }
  setTimeout(refresh, REFRESH_MS);
}

try {
  await write();
} catch (error) {
  const problem = byId("problem");
  const why = error instanceof AnswerError && error.status === 401 ? "the server asks for a token: open this page as ./?token=…" : error.message;
  problem.textContent = `The endpoints could not be read from openapi.json and asyncapi.json: ${why}. The guides below and /api may still answer.`;
  problem.hidden = false;
}
refresh();
