// SPDX-License-Identifier: Apache-2.0
// The dashboard: puts what the run knows on the page. Drawing is paced: figures twice a second, charts and tables once.

import { setToken } from "./api.js";
import { Panel, sparkline, timeline } from "./charts.js";
import { byId, download, h, setAttribute, setChildren, setText, snippet } from "./dom.js";
import { join, latest } from "./history.js";
import { NONE, clock, count, known, number, percent, phrase, quantity, share, spoken, timeOfDay } from "./format.js";
import { ENDED, Run, errorText, phaseView } from "./run.js";
import { StreamPanel } from "./stream.js";
import { EventLog, GPUTable, MEASURES, MetricsTable, ServerTable, WorkersTable, gpuHeader, present } from "./tables.js";

const FIGURES_EVERY_MS = 500;
const CHARTS_EVERY_MS = 1000;
const TABLES_EVERY_MS = 1000;
const DRAWINGS_APART_MS = 40;

const STATES = {
  waiting: ["Waiting", "wait"],
  initializing: ["Initializing", "run"],
  configuring: ["Configuring", "run"],
  ready: ["Ready", "run"],
  profiling: ["Profiling", "run"],
  processing: ["Processing results", "run"],
  stopping: ["Stopping", "warn"],
  shutdown: ["Shutting down", "wait"],
  complete: ["Complete", "good"],
  cancelled: ["Cancelled", "warn"],
  failed: ["Failed", "bad"],
};

const log = new EventLog(byId("pane-events"));
const run = new Run({ onChange: changed, onEvent: (event) => { log.add(event); countTab("events", log.events.length); }, onToken: askToken });
const { history } = run;
globalThis.aiperf = { run, timeline }; // for the console

// What the page draws from the history

const LATENCIES = ["request_latency", "time_to_first_token", "inter_token_latency"];
history.want([...LATENCIES, "output_token_throughput", "request_throughput", "output_sequence_length", "request_count"]);

/** Tokens of the requests that finished between two messages, per second. */
const tokensNow = () => history.once("tokens now", () => history.rate(history.sum("output_sequence_length")));

/** Requests that finished per second: successes by the metrics, else everything that the phases count. */
function requestsNow() {
  const counted = history.get("request_latency", "count");
  return counted.t.length ? history.once("requests now", () => history.rate(counted)) : phaseRate("completed");
}

const ofPhases = (stat) => history.once(`phases ${stat}`, () => history.ofPhases(stat));
const phaseRate = (stat) => history.once(`phases ${stat} now`, () => history.ofPhases(stat, (series) => history.rate(series)));

/** Series on the axis of the charts. */
function shifted(all) {
  const [t, ...columns] = join(all);
  return [Array.from(t, (at) => at - timeline.zero), ...columns];
}

/** Where the phases lie, in seconds since the epoch of the bus; the first one is zero on the axis, as in "Elapsed". */
function placePhases() {
  const answers = run.progress?.phases ?? {};
  const placed = history.phases().map(({ name, start: sampled }) => {
    const { startNs, elapsed, ended } = phaseView(name, answers[name] ?? {});
    // The benchmark's own start is exact if its clock is the server's; else the first sample has to do.
    const own = startNs / 1e9;
    const start = startNs && sampled - own >= 0 && sampled - own < 10 ? own : sampled;
    return { name, start, end: start + (elapsed ?? 0), ended };
  });
  timeline.zero = placed[0]?.start ?? history.origin ?? 0;
  timeline.begin = Math.min(0, (history.origin ?? timeline.zero) - timeline.zero);
  timeline.end = history.last / 1e9 - timeline.zero;
  timeline.phases = placed.map(({ start, end, ...rest }) => ({ ...rest, start: start - timeline.zero, end: end - timeline.zero }));
}

/** The lines that have points, ready for a panel; or the reason for an empty one. */
function plotted(lines, reason) {
  const some = lines.filter(({ series }) => series.t.length > 0);
  if (!some.length) return reason();
  return { data: shifted(some.map(({ series }) => series)), lines: some.map(({ series, ...line }) => line) };
}

const running = () => run.status && !ENDED.has(run.status.state) && run.status.state !== "waiting";
const hasProgress = () => run.progress && Object.keys(run.progress.phases ?? {}).length > 0;

function noMetrics() {
  if (!running() && !hasProgress()) return "No data yet.";
  if (run.rows.size) return "Not reported for this run.";
  return hasProgress() ? "No live metrics on the bus.\nStart AIPerf with AIPERF_UI_REALTIME_METRICS_ENABLED=true." : "Waiting for the first requests.";
}

function picker(label, options, change) {
  const select = h("select", { "aria-label": label });
  select.addEventListener("change", () => change(select.value));
  select.setOptions = (list, chosen) => {
    const wanted = list.map(({ value, text }) => `${value}\n${text}`).join("\n\n");
    if (select.wanted !== wanted) {
      select.wanted = wanted;
      select.replaceChildren(...list.map(({ value, text }) => h("option", { value }, text)));
    }
    if (select.value !== chosen) select.value = chosen;
  };
  select.setOptions(options, options[0]?.value);
  return select;
}

function latencyPanel(first) {
  let tag = first;
  const select = picker("Latency metric", LATENCY_NAMES.map(([value, text]) => ({ value, text })), (value) => {
    tag = value;
    history.want([tag]);
    run.due.add("history");
    run.soon();
    panel.update();
  });
  select.value = first;
  const panel = new Panel({
    title: "Latency",
    controls: [select],
    lines: () => {
      const unit = history.index[tag]?.unit ?? "ms";
      const line = (label, colour, series, extra = {}) => ({ label, colour, series, unit, scale: unit, ...extra });
      return plotted([
        line("p50", "--d1", history.get(tag, "p50"), { title: "Median since the phase began" }),
        line("p90", "--d2", history.get(tag, "p90"), { title: "90th percentile since the phase began" }),
        line("p99", "--d3", history.get(tag, "p99"), { title: "99th percentile since the phase began" }),
        line("mean now", "--d4", history.meanNow(tag), { dash: [3, 3], width: 1.2, title: "Mean of the requests that finished between two messages: Δsum / Δcount" }),
      ], noMetrics);
    },
  });
  panel.offer = (tags) => select.setOptions(tags, tag);
  return panel;
}

const LATENCY_NAMES = [["request_latency", "Request latency"], ["time_to_first_token", "Time to first token"], ["inter_token_latency", "Inter-token latency"]];
const latencyPanels = [latencyPanel("request_latency"), latencyPanel("time_to_first_token")];

const throughput = new Panel({
  title: "Throughput",
  lines: () => plotted([
    { label: "tokens", unit: "tokens/sec", scale: "tokens/sec", colour: "--d1", series: history.get("output_token_throughput", "avg"), title: "Output tokens per second since the phase began" },
    { label: "tokens now", unit: "tokens/sec", scale: "tokens/sec", colour: "--d1", dash: [3, 3], width: 1.2, series: tokensNow(), title: "Output tokens of the requests that finished between two messages, per second" },
    { label: "requests", unit: "requests/sec", scale: "requests/sec", colour: "--d4", series: history.get("request_throughput", "avg"), title: "Requests per second since the phase began" },
    { label: "requests now", unit: "requests/sec", scale: "requests/sec", colour: "--d4", dash: [3, 3], width: 1.2, series: requestsNow(), title: "Requests that finished between two messages, per second" },
  ], noMetrics),
});

const load = new Panel({
  title: "In flight and errors",
  lines: () => plotted([
    { label: "in flight", unit: "requests", scale: "requests", colour: "--d5", series: ofPhases("in_flight"), title: "Requests sent and not finished" },
    { label: "errors", unit: "count", scale: "errors", colour: "--d3", series: ofPhases("errors"), title: "Failed requests since the phase began" },
    { label: "errors now", unit: "requests/sec", scale: "errors", colour: "--d3", dash: [3, 3], width: 1.2, series: phaseRate("errors"), title: "Requests that failed between two messages, per second" },
  ], () => "No requests yet."),
});

const PALETTE = ["--d1", "--d4", "--d5", "--d3", "--d2", "--d6", "--d7", "--d8"];

function gpuPanel() {
  let [measure] = MEASURES;
  const select = picker("GPU measure", [], (value) => {
    measure = value;
    want();
    panel.update();
  });
  const chosen = () => Object.entries(history.index)
    .filter(([tag, { group, header }]) => group === "telemetry" && gpuHeader(header, tag).measure === measure);
  const want = () => {
    history.want(chosen().map(([tag]) => tag));
    run.due.add("history");
    run.soon();
  };
  const panel = new Panel({
    title: "GPU",
    controls: [select],
    lines: () => plotted(chosen().map(([tag, { header, unit }], at) => {
      const { gpu, model, source } = gpuHeader(header, tag);
      const current = history.get(tag, "current");
      return { label: gpu, unit, scale: unit ?? "", colour: PALETTE[at % PALETTE.length], dash: at < PALETTE.length ? undefined : [6, 3],
        title: `${gpu}, ${model}, ${source}`, series: current.t.length ? current : history.get(tag, "avg") };
    }), () => "No GPU telemetry on the bus.\nAIPerf collects it from a DCGM exporter: --gpu-telemetry."),
  });
  panel.indexed = () => {
    const measures = new Set();
    for (const [tag, { group, header }] of Object.entries(history.index)) if (group === "telemetry") measures.add(gpuHeader(header, tag).measure);
    const place = (name) => (MEASURES.includes(name) ? MEASURES.indexOf(name) : MEASURES.length);
    const sorted = [...measures].sort((a, b) => place(a) - place(b) || a.localeCompare(b));
    select.hidden = !sorted.length;
    if (sorted.length && !measures.has(measure)) [measure] = sorted;
    select.setOptions(sorted.map((value) => ({ value, text: value })), measure);
    if (sorted.length) want();
  };
  return panel;
}

// Rows of the inference server that AIPerf mixes into its own metrics.
const SERVER_ROWS = ["kv_cache_usage_pct", "num_running", "num_waiting", "num_preemptions", "prefix_cache_hit_rate",
  "unique_input_tokens_srv", "input_token_throughput_srv", "output_token_throughput_srv"];
// The statistics of a server metric worth drawing, the telling ones first.
const SERVER_STATS = ["current", "value", "avg", "rate", "p50", "p50_estimate", "p99", "p99_estimate", "count_rate", "total", "count"];

/** "server:HOST:PORT:vllm:name{engine="0"}" in parts; the endpoint is named only when there are several. */
function serverSeries(tag) {
  const rest = tag.slice("server:".length);
  const endpoints = Object.keys(run.server?.endpoint_summaries ?? {});
  const endpoint = endpoints.find((one) => rest.startsWith(`${one}:`));
  const own = endpoint ? rest.slice(endpoint.length + 1) : rest;
  return { metric: own.replace(/\{.*$/s, ""), short: endpoints.length > 1 ? `${own} @ ${endpoint}` : own };
}

function serverPanel() {
  let chosen = "";
  const select = picker("Inference-server series", [], (value) => {
    chosen = value;
    want();
    panel.update();
  });
  const [tagOf, statOf] = [() => chosen.split("\n")[0], () => chosen.split("\n")[1]];
  const want = () => {
    history.want([tagOf()]);
    run.due.add("history");
    run.soon();
  };
  const panel = new Panel({
    title: "Inference server",
    controls: [select],
    lines: () => {
      const tag = tagOf();
      const { unit = "", header = tag } = history.index[tag] ?? {};
      const series = history.get(tag, statOf());
      const name = tag.startsWith("server:") ? serverSeries(tag).metric : header;
      return plotted([{ label: `${name}${statOf() === "current" ? "" : ` ${statOf()}`}`, unit, scale: unit, colour: "--d5", series, title: tag }],
        () => (chosen ? "Loading." : "No inference-server metrics on the bus.\nAIPerf reads them from the server's /metrics."));
    },
  });
  panel.indexed = () => {
    const options = [];
    for (const [tag, { group, header, stats = [] }] of Object.entries(history.index)) {
      const own = SERVER_ROWS.includes(tag);
      if (group !== "server" && !own) continue;
      const drawn = own ? [stats.includes("current") ? "current" : "avg"] : SERVER_STATS.filter((stat) => stats.includes(stat));
      for (const stat of drawn) options.push({ value: `${tag}\n${stat}`, text: own ? header : `${serverSeries(tag).short} · ${stat.replace("_estimate", "")}`, own });
    }
    options.sort((a, b) => b.own - a.own || a.text.localeCompare(b.text));
    select.hidden = !options.length;
    if (!options.length) return;
    if (!options.some(({ value }) => value === chosen)) {
      chosen = (options.find(({ value }) => value.startsWith("kv_cache_usage_pct")) ?? options[0]).value;
      want();
    }
    select.setOptions(options, chosen);
  };
  return panel;
}

const gpus = gpuPanel();
const server = serverPanel();
const panels = [latencyPanels[0], latencyPanels[1], throughput, load, gpus, server];
byId("charts").append(...panels.map(({ element }) => element));

/** New series may have come: the choices follow. */
function indexed() {
  history.want(Object.keys(history.index).filter((tag) => tag.startsWith("phase:")));
  const names = new Map(LATENCY_NAMES);
  const others = Object.entries(history.index)
    .filter(([tag, { group, stats = [] }]) => group === "metrics" && stats.includes("p50") && !names.has(tag))
    .map(([tag, { header }]) => [tag, header ?? tag]).sort((a, b) => a[1].localeCompare(b[1]));
  const all = [...LATENCY_NAMES, ...others].map(([value, text]) => ({ value, text }));
  for (const panel of latencyPanels) panel.offer(all);
  gpus.indexed();
  server.indexed();
  run.due.add("history");
  run.soon();
}

/** One drawing at a time, with room for other things between: none of them is worth a dropped frame. */
const queue = [];
function drawCharts() {
  placePhases();
  followRange();
  if (!queue.length) requestAnimationFrame(drawNext);
  queue.splice(0, queue.length, ...sparkDrawers, ...panels.map((panel) => () => panel.update()));
}

function drawNext() {
  queue.shift()?.();
  if (queue.length) setTimeout(() => requestAnimationFrame(drawNext), DRAWINGS_APART_MS);
}

// The time range

let range = "all";
for (const button of byId("ranges").children) {
  button.addEventListener("click", () => {
    range = button.dataset.range;
    if (range === "all") timeline.setZoom(null);
    else followRange(true);
    showRange();
  });
}
timeline.onZoom = () => {
  if (!timeline.following) range = timeline.zoom ? "" : "all";
  showRange();
};
function followRange(now = false) {
  if (!known(+range) || range === "") return;
  timeline.following = true;
  const begin = Math.max(timeline.begin, timeline.end - range);
  const zoom = [begin, Math.max(timeline.end, begin + +range)];
  if (now) timeline.setZoom(zoom);
  else timeline.zoom = zoom;
  timeline.following = false;
}
function showRange() {
  for (const button of byId("ranges").children) {
    setAttribute(button, "aria-pressed", String(button.dataset.range === range));
    // After a zoom by hand the first button is the way back.
    if (button.dataset.range === "all") setText(button, range === "" ? "Reset zoom" : "All");
  }
}

// Cards

class Card {
  constructor(id) {
    this.element = byId(`card-${id}`);
    this.values = [...this.element.querySelectorAll("[data-value]")];
    this.units = [...this.element.querySelectorAll("[data-unit]")];
    this.kind = this.element.querySelector("[data-kind]");
    this.now = this.element.querySelector("[data-now]");
    this.canvas = this.element.querySelector("canvas");
  }

  /** `shown`: [{text, unit}] in the order of the figures. */
  show(shown, kind, now) {
    shown.forEach(({ text, unit }, at) => {
      setText(this.values[at], text);
      setAttribute(this.values[at], "data-none", text === NONE ? "" : null);
      // A unit that the next figure repeats stands once.
      setText(this.units[at], text === NONE || unit === shown[at + 1]?.unit ? "" : unit);
    });
    setText(this.kind, kind);
    if (kind === "final") this.kind.dataset.final = ""; else delete this.kind.dataset.final;
    setText(this.now, now);
  }
}

const cards = Object.fromEntries(["tps", "rps", "ttft", "itl", "latency", "errors"].map((id) => [id, new Card(id)]));

function showCards() {
  const kind = run.final ? "final" : run.rows.size ? "cumulative" : "";
  const ended = !run.status || ENDED.has(run.status.state);
  const now = (series, unit, what = "") => {
    const value = latest(series);
    return known(value) && !ended ? `now ${phrase(value, unit, 3)}${what}` : "";
  };
  const missing = (tag) => (run.rows.size && !run.rows.has(tag) ? "not reported for this run" : "");

  const tps = run.rows.get("output_token_throughput");
  cards.tps.show([quantity(tps?.avg, "tokens/sec")], kind, now(tokensNow(), "tokens/sec") || missing("output_token_throughput"));

  const rps = run.rows.get("request_throughput");
  if (rps || run.rows.size) cards.rps.show([quantity(rps?.avg, "requests/sec")], kind, now(requestsNow(), "requests/sec"));
  else {
    const phase = currentPhase();
    const rate = phase?.completed && phase.elapsed ? phase.completed / phase.elapsed : undefined;
    cards.rps.show([quantity(rate, "requests/sec")], known(rate) ? "from progress" : "", now(requestsNow(), "requests/sec"));
  }

  for (const [id, tag] of [["ttft", "time_to_first_token"], ["itl", "inter_token_latency"], ["latency", "request_latency"]]) {
    const row = run.rows.get(tag) ?? {};
    cards[id].show([quantity(row.p50, row.unit, 3), quantity(row.p99, row.unit, 3)], kind, now(history.meanNow(tag), row.unit ?? "ms", " mean") || missing(tag));
  }

  const { completed, errors } = run.progress ?? {};
  const counted = hasProgress();
  cards.errors.show([{ text: counted ? count(errors) : NONE, unit: counted && completed ? share(errors, completed) : "" }], counted ? "of completed" : "",
    counted && completed ? [`of ${count(completed)} completed`, now(phaseRate("errors"), "requests/sec").replace("req/s", "/s")].filter(Boolean).join(" · ") : "");
  setAttribute(cards.errors.element, "data-tone", errors > 0 ? "bad" : "good");
}

/** What draws the sparkline of each card. */
const sparkDrawers = [
  () => spark("tps", { ...either(tokensNow(), history.get("output_token_throughput", "avg")), colour: "--d1", fill: true }),
  () => spark("rps", { ...either(requestsNow(), history.get("request_throughput", "avg")), colour: "--d4", fill: true }),
  ...[["ttft", "time_to_first_token"], ["itl", "inter_token_latency"], ["latency", "request_latency"]].map(([id, tag]) => () =>
    spark(id, { ...history.get(tag, "p99"), colour: "--d3" }, { ...history.get(tag, "p50"), colour: "--d1", fill: true })),
  () => spark("errors", { ...ofPhases("errors"), colour: "--d3", fill: true }),
];
const spark = (id, ...series) => sparkline(cards[id].canvas, series, timeline.zero, Math.max(history.last / 1e9, timeline.zero + 1));
const sparks = () => sparkDrawers.forEach((draw) => draw());
const either = (first, second) => (first.t.length > 1 ? first : second);
addEventListener("themechange", sparks);
addEventListener("resize", sparks);

// The run

const views = () => Object.entries(run.progress?.phases ?? {}).map(([name, phase]) => phaseView(name, phase)).sort((a, b) => (a.startNs ?? 0) - (b.startNs ?? 0));
const currentPhase = () => views().at(-1);

function stateWords() {
  const { state = "waiting", stale } = run.status ?? {};
  if (!run.status) return ["Connecting", "wait"];
  if (stale && running()) return ["Stale", "warn"];
  // AIPerf says "profiling" a moment after the warm-up has begun.
  if (["configuring", "ready", "profiling"].includes(state) && run.progress?.warmup && hasProgress()) return ["Warming up", "run"];
  return STATES[state] ?? [state, "run"];
}

function stateDetail() {
  const { state, source, stale } = run.status ?? {};
  if (!run.status) return "\u00a0";
  if (stale && running()) return `silent for ${spoken(source?.last_message_age_sec)}`;
  if (state === "waiting") return "nothing heard yet";
  if (state === "failed" && !hasProgress()) return "not one request was sent";
  const { total, completed } = run.progress ?? {};
  if (!hasProgress()) return "no requests yet";
  return total ? `${count(completed)} of ${count(total)} requests` : `${count(completed)} requests`;
}

/** Seconds since the run began, going on between two answers while a live run goes on. */
function elapsed() {
  const { elapsed_sec: seconds, source, stale } = run.status ?? {};
  if (!known(seconds)) return NONE;
  const live = running() && !stale && run.line.open && source?.kind !== "replay" && source?.kind !== "demo";
  return clock(seconds + (live ? (Date.now() - run.statusAt) / 1000 : 0));
}

function loadText() {
  const { concurrency, request_rate: rate } = run.info ?? {};
  const parts = [];
  if (rate !== undefined && rate !== null) parts.push(known(rate) ? `${number(rate)} req/s` : String(rate));
  if (concurrency !== undefined && concurrency !== null) parts.push(`${parts.length ? "≤ " : ""}${known(concurrency) ? count(concurrency) : concurrency} concurrent`);
  return parts.join(", ") || NONE;
}

function showRun() {
  const [name, tone] = stateWords();
  setText(byId("state-name"), name);
  setText(byId("state-detail"), stateDetail());
  setAttribute(byId("state"), "data-tone", tone);
  const { model, endpoint_type: endpoint, streaming } = run.info ?? {};
  fact("model", model);
  fact("endpoint", endpoint && (streaming === true ? `${endpoint}, streaming` : endpoint));
  fact("load", loadText());
  fact("elapsed", elapsed());
  const { eta_sec: eta } = run.progress ?? {};
  fact("eta", running() && known(eta) ? clock(eta) : NONE);
  showPhases();
  showOrigin();
  announce(name);
  const share = run.progress?.percent_complete;
  const title = running() && !run.status.stale && hasProgress() && known(share) ? `${percent(share)} · AIPerf` : run.status ? `${name} · AIPerf` : "AIPerf";
  if (document.title !== title) document.title = title;
}

function fact(id, value) {
  const text = value === undefined || value === null || value === "" ? NONE : String(value);
  const element = byId(`fact-${id}`);
  setText(element, text);
  setAttribute(element, "title", text === NONE ? null : text);
}

const phaseElements = new Map();
function showPhases() {
  const shown = views();
  const wanted = (shown.length ? shown : [{ name: "", percent: 0 }]).map((view) => {
    let parts = phaseElements.get(view.name);
    if (!parts) {
      const fill = h("div", { class: "fill" });
      const track = h("div", { class: "track", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" }, fill);
      const [label, middle, right] = [h("span"), h("span"), h("span")];
      const box = h("div", { class: "phase" }, track, h("p", {}, label, middle, right));
      phaseElements.set(view.name, (parts = { fill, track, label, middle, right, box }));
    }
    showPhase(parts, view, shown.length > 1);
    return parts.box;
  });
  setChildren(byId("phases"), wanted);
}

function showPhase({ fill, track, label, middle, right, box }, view, several) {
  fill.style.transform = `scaleX(${view.percent / 100})`;
  setAttribute(track, "aria-valuenow", String(Math.floor(view.percent)));
  setAttribute(track, "aria-label", view.name ? `${title(view.name)} progress` : "Progress");
  box.classList.toggle("short", several && view.warmup === true);
  setText(label, view.name ? title(view.name) : "");
  const amount = view.total ? `${count(view.completed)} / ${count(view.total)}` : view.duration ? `${clock(view.elapsed ?? 0)} / ${clock(view.duration)}` : "";
  setText(middle, amount);
  setText(right, view.name ? percent(view.percent) : "");
}

const title = (name) => (name === "warmup" ? "Warm-up" : name.charAt(0).toUpperCase() + name.slice(1));

function showOrigin() {
  const { kind, address } = run.status?.source ?? {};
  const text = { demo: "Demo: a recorded run", replay: `Replay: ${String(address ?? "").split(/[\\/]/).pop()}` }[kind] ?? "";
  const element = byId("origin");
  setText(element, text);
  element.hidden = !text;
}

let announced = "";
function announce(name) {
  const text = run.line.lostAt && !run.line.polling ? "Connection to the server lost" : name;
  if (text === announced) return;
  announced = text;
  setText(byId("announce"), text);
}

// The line and the notice

function showLine() {
  const { open, polling, retryAt, lostAt } = run.line;
  const { source } = run.status ?? {};
  let [tone, text] = ["wait", "Connecting"];
  if (open && source && !source.connected && running()) [tone, text] = ["warn", "Bus not connected"];
  else if (open && run.status?.stale && running()) [tone, text] = ["warn", "Stale"];
  else if (open) [tone, text] = ["good", "Connected"];
  else if (polling) [tone, text] = ["warn", "Connected, polling"];
  else if (lostAt && run.status) [tone, text] = ["bad", `Reconnecting in ${Math.max(0, Math.ceil((retryAt - Date.now()) / 1000))} s`];
  setText(byId("connection").lastElementChild, text);
  setAttribute(byId("connection"), "data-tone", tone);
}

function notice() {
  const { state, error, stale, source } = run.status ?? {};
  if (!run.line.open && !run.line.polling && run.line.lostAt) {
    return run.status ? ["bad", `Connection to the server lost at ${timeOfDay(run.line.lostAt)}. What you see is from then; trying again.`]
      : ["bad", "No answer from the server; trying again."];
  }
  if (state === "waiting" && !hasProgress()) return ["", source?.address ? `Nothing heard yet from ${source.address}; below is how to start AIPerf for it.` : "Nothing heard yet."];
  if (state === "failed") return ["bad", `Failed: ${error ? errorText(error) : "the benchmark ended before it sent a request."}`];
  if (stale && running()) return ["warn", `Nothing heard for ${spoken(source?.last_message_age_sec)}: the benchmark was killed, or the network between it and this server is gone.`];
  if (state === "cancelled") return ["warn", `Cancelled${error ? `: ${errorText(error)}` : ""}. ${run.final ? "Final results cover what was completed." : "The results cover what was completed."}`];
  if (state === "complete") return ["", run.final ? "Final results: the figures are AIPerf's own, over the whole profiling phase." : "The run is complete."];
  if (source && !source.connected && state !== "waiting") return ["warn", `Not connected to ${source.address}.`];
  if (running() && !run.rows.size && currentPhase()?.completed > 0 && !currentPhase().warmup) {
    return ["warn", "Progress only: AIPerf publishes live metrics when asked to. Start it with AIPERF_UI_REALTIME_METRICS_ENABLED=true (0.5 and later) or with its dashboard UI."];
  }
  return ["", ""];
}

function showNotice() {
  const [tone, text] = notice();
  setText(byId("notice"), text);
  setAttribute(byId("notice"), "data-tone", tone || null);
}

// Nothing to draw: say why, over the place of the charts

let overlaid = "";
function showOverlay() {
  const { state, source, error } = run.status ?? {};
  const empty = !hasProgress() && !run.rows.size;
  let what = "";
  if (run.status && empty && state === "waiting") what = `waiting ${source?.kind} ${source?.address} ${source?.connected}`;
  else if (run.status && empty && state === "failed") what = `failed ${JSON.stringify(error)}`;
  else if (!run.status && run.line.lostAt && !run.line.polling) what = "unreachable";
  if (what === overlaid) return;
  overlaid = what;
  const overlay = byId("overlay");
  overlay.hidden = !what;
  byId("charts").inert = Boolean(what);
  overlay.replaceChildren(...(what ? [h("div", {}, ...overlayContent(what.split(" ")[0], source ?? {}, error))] : []));
}

function overlayContent(what, { kind, address, connected }, error) {
  if (what === "unreachable") return [h("h2", {}, "No answer from the server"), h("p", {}, "It is not there, or not yet. This page keeps trying.")];
  if (what === "failed") {
    return [h("h2", {}, "The benchmark failed before the first request"),
      h("pre", { class: "error", tabindex: "0", "aria-label": "Error" }, error ? errorText(error) : "AIPerf gave no reason on the bus; its log has it.")];
  }
  const line = "AIPERF_UI_REALTIME_METRICS_ENABLED=true aiperf profile";
  const rest = " --model MODEL --url URL --streaming";
  const heading = h("h2", {}, "Nothing heard yet");
  const tail = h("p", {}, "The variable makes AIPerf publish live metrics; without it there is still progress. This page fills itself as soon as something comes.");
  const ear = (text) => h("p", {}, `${text} `, h("strong", {}, String(address)), connected ? "." : ": not connected yet, trying on.");
  switch (kind) {
    case "tcp":
    case "zmq": {
      const host = /^tcp:\/\/(.+):\d+$/.exec(address)?.[1] ?? "127.0.0.1";
      return [heading, ear("Listening on"), h("p", {}, "Start AIPerf with its bus on TCP:"), snippet(`${line} --zmq-host ${host}${rest}`, "command to start AIPerf"), tail];
    }
    case "ipc": {
      const folder = /^ipc:\/\/(.*)\/[^/]*$/.exec(address)?.[1] ?? "DIR";
      return [heading, ear("Listening on"), h("p", {}, "Start AIPerf with its bus in that folder:"), snippet(`${line} --zmq-ipc-path ${folder}${rest}`, "command to start AIPerf"), tail];
    }
    case "bind":
      return [heading, ear("Bound to"), h("p", {}, "Connect a ZMQ PUB socket to it and send two frames a message: the topic (message type and $) and the JSON.")];
    case "child":
      return [heading, h("p", {}, "The benchmark was started by this server and has not spoken yet. Its own output is in the terminal.")];
    case "replay":
    case "demo":
      return [heading, h("p", {}, "The recording has not said anything yet.")];
    default:
      return [heading, h("p", {}, "No bus is attached: messages come from the program that runs this server.")];
  }
}

// Tables

const noneYet = (what) => () => (run.status?.state === "waiting" || !run.status ? "Nothing heard yet." : what);
const metricsTable = new MetricsTable(byId("pane-metrics"), { empty: () => noMetrics() });
const gpuTable = new GPUTable(byId("pane-gpus"), { empty: noneYet("No GPU telemetry on the bus. AIPerf collects it from a DCGM exporter: --gpu-telemetry.") });
const serverTable = new ServerTable(byId("pane-server"), { empty: noneYet("No inference-server metrics on the bus. AIPerf reads them from the server's Prometheus endpoint; see its --server-metrics.") });
const workersTable = new WorkersTable(byId("pane-workers"), { empty: noneYet("No worker has reported yet.") });
const streamPanel = new StreamPanel(byId("pane-stream"));

const countTab = (id, n) => setText(byId(`count-${id}`), n ? n.toLocaleString("en-US") : "");

const fillers = {
  metrics: () => metricsTable.update(run.rows),
  gpus: () => gpuTable.update(run.telemetry),
  server: () => serverTable.update(run.server),
  workers: () => workersTable.update(run.workers),
};

// A table out of sight is filled when it comes into sight; only its first rows and the last ones do not wait for that.
const inSight = new Set();
const sight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) inSight.delete(target.id);
    else if (!inSight.has(target.id)) {
      inSight.add(target.id);
      fill(true);
    }
  }
});
for (const pane of document.querySelectorAll(".pane")) sight.observe(pane);

let fillTimer = 0;
let filledAt = -Infinity;
let filled = ""; // what there was to show when it was filled last
/** Fills the open table: once a second while it is in sight. */
function fill(now = false) {
  const what = [tab, run.status?.state, run.final, run.rows.size, run.telemetry.size,
    Object.keys(run.workers?.worker_statuses ?? {}).length, Object.keys(run.server?.endpoint_summaries ?? {}).length].join();
  const wait = filledAt + TABLES_EVERY_MS - performance.now();
  if (!now && what === filled && (wait > 0 || !inSight.has(`pane-${tab}`))) {
    // What has come since the last time is not forgotten, only late.
    if (inSight.has(`pane-${tab}`)) fillTimer ||= setTimeout(() => { fillTimer = 0; fill(); }, wait + 10);
    return;
  }
  clearTimeout(fillTimer);
  fillTimer = 0;
  filled = what;
  filledAt = performance.now();
  fillers[tab]?.();
}

/** Counts for the tabs that are closed; the open one counts itself. */
function counts() {
  countTab("metrics", run.rows.size);
  countTab("gpus", new Set([...run.telemetry].map(([tag, { header }]) => `${gpuHeader(header, tag).source} ${gpuHeader(header, tag).gpu}`)).size);
  countTab("workers", Object.keys(run.workers?.worker_statuses ?? {}).length);
  let series = 0;
  for (const { metrics = {} } of Object.values(run.server?.endpoint_summaries ?? {})) for (const one of Object.values(metrics)) series += one.series?.length ?? 0;
  countTab("server", series);
}

let tab = "metrics";
const tabs = [...document.querySelectorAll("[role=tab]")];
const tabName = (button) => button.id.slice(4);

function selectTab(name, focus = false) {
  tab = name;
  for (const button of tabs) {
    const mine = tabName(button) === name;
    setAttribute(button, "aria-selected", String(mine));
    setAttribute(button, "tabindex", mine ? null : "-1");
    byId(`pane-${tabName(button)}`).hidden = !mine;
    if (mine && focus) button.focus();
  }
  run.watchWorkers = name === "workers";
  if (run.watchWorkers) run.due.add("workers");
  if (name === "stream") streamPanel.open();
  fill(true);
}

for (const button of tabs) {
  button.addEventListener("click", () => selectTab(tabName(button)));
  button.addEventListener("keydown", (event) => {
    const at = tabs.indexOf(button);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    selectTab(tabName(tabs[(to + tabs.length) % tabs.length]), true);
  });
}

// Downloads and the token

byId("download-json").addEventListener("click", () => {
  const all = { ...run.info, status: run.status, progress: run.progress, metrics: Object.fromEntries(run.rows), telemetry: Object.fromEntries(run.telemetry), server_metrics: run.server };
  download(`aiperf-${fileName()}.json`, "application/json", JSON.stringify(all, null, 2));
});
byId("download-csv").addEventListener("click", () => {
  metricsTable.update(run.rows);
  download(`aiperf-${fileName()}.csv`, "text/csv", metricsTable.csv());
});
const fileName = () => [run.status?.benchmark_id ?? "run", run.final ? "final" : "so-far"].join("-").replace(/[^\w.-]+/g, "_");

function askToken() {
  const dialog = byId("token-dialog");
  if (dialog.open) return;
  dialog.showModal();
  byId("token-form").onsubmit = () => {
    setToken(byId("token-input").value);
    location.reload();
  };
}

// Pace

let figuresTimer = 0;
let chartsTimer = 0;
let figuresAt = 0;
let chartsAt = 0;

function changed(what) {
  if (what.has("reset")) {
    log.clear();
    timeline.setZoom(null);
    drawCharts();
  }
  if (what.has("index")) indexed();
  if (what.has("history") && !chartsTimer) {
    chartsTimer = setTimeout(() => {
      chartsTimer = 0;
      chartsAt = performance.now();
      drawCharts();
    }, Math.max(0, CHARTS_EVERY_MS - (performance.now() - chartsAt)));
  }
  if (!figuresTimer) figuresTimer = setTimeout(show, Math.max(0, FIGURES_EVERY_MS - (performance.now() - figuresAt)));
}

function show() {
  clearTimeout(figuresTimer);
  figuresTimer = 0;
  figuresAt = performance.now();
  run.settle();
  showRun();
  showLine();
  showNotice();
  showOverlay();
  showCards();
  counts();
  requestAnimationFrame(() => fill());
}

setInterval(() => { showLine(); if (run.status) fact("elapsed", elapsed()); }, 1000);
show();
run.start();
