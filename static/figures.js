// SPDX-License-Identifier: Apache-2.0
// The figures: what the cards say and what the charts draw. Pure. "Now" is the last ten seconds, "so far" cumulative.

import { NONE, count, known, natural, number, phrase, quantity, scaleOf, share, spoken } from "./format.js";
import { verdict } from "./direction.js";
import { RATE_LEAST_SEC, latest, rates, shareOfTime, windows } from "./series.js";
import { absentWords, emptyWords, sumOf } from "./situation.js";
import { judged, keeps, levelWords } from "./slo.js";

const LATENCIES = [
  ["time_to_first_token", "Time to first token"], ["inter_token_latency", "Inter-token latency"],
  ["request_latency", "Request latency"],
];
const BASE_TAGS = [
  ...LATENCIES.map(([tag]) => tag), "output_token_throughput", "request_throughput", "output_sequence_length",
];
const BASE_STATS = [
  "count", "sum", "avg", "std", "p50", "p99", "current", "value", "sent", "completed", "errors", "in_flight",
];
const PALETTE = ["--d1", "--d4", "--d5", "--d3", "--d2", "--d6", "--d7", "--d8"];

// Series

/** When the requests that AIPerf's metrics count began: with the profiling. */
const counting = (s) => s.counted[0]?.start ?? s.zero;
/** Computed once for the points, the beginning and the end as they are. */
const once = (s, key, compute) => s.history.once(`${key} ${counting(s)} ${s.end}`, compute);

/** Of what was counted after the end only the last stands, at the end: nothing happened later. */
function untilEnd(s, points) {
  if (s.end === null || !points.length || points.at(-1).t < s.end) return points;
  return [...points.filter(({ t }) => t < s.end), { ...points.at(-1), t: s.end }];
}

/** The same of a series. */
function seriesUntilEnd(s, { t, v }) {
  const points = untilEnd(s, t.map((at, i) => ({ t: at, v: v[i] })));
  return { t: points.map((point) => point.t), v: points.map((point) => point.v) };
}

const windowsOf = (s, tag) => once(s, `now ${tag}`, () => windows(untilEnd(s, s.history.moments(tag)), counting(s)));

/** Mean of what was measured in the last ten seconds before each point. */
export function meanNow(s, tag) {
  return once(s, `mean ${tag}`, () => {
    const all = windowsOf(s, tag);
    return { t: all.map(({ t }) => t), v: all.map(({ mean }) => mean) };
  });
}

/** Tokens of the requests that finished, per second. */
export function tokensNow(s) {
  return once(s, "tokens", () => {
    const all = windowsOf(s, "output_sequence_length");
    return { t: all.map(({ t }) => t), v: all.map(({ sum, sec }) => (sec > RATE_LEAST_SEC ? sum / sec : null)) };
  });
}

/** What a phase counted, until the run ended. */
const ofPhase = (s, name, stat) => seriesUntilEnd(s, s.history.get(`phase:${name}`, stat));

/** Requests that succeeded. */
function successes(s, name) {
  const [completed, errors] = [ofPhase(s, name, "completed"), ofPhase(s, name, "errors")];
  return { t: completed.t, v: completed.v.map((value, i) => value - (errors.v[i] ?? 0)) };
}

/** `of(phase's name)` over the whole run, with a gap between two phases; a count may be turned into a rate. */
function ofPhases(s, key, of, rated = false) {
  return once(s, `phases ${key} ${rated}`, () => {
    const out = { t: [], v: [] };
    const all = s.history.phases();
    all.forEach(({ name, start }, at) => {
      const until = all[at + 1]?.start ?? Infinity;
      const own = s.phases.find((phase) => phase.name === name)?.start ?? start;
      const { t, v, sec } = rated ? perSecond(of(s, name), Math.min(own, start)) : of(s, name);
      if (out.t.length && t.length) {
        out.t.push(out.t.at(-1) + 1e-3, t[0] - 1e-3);
        out.v.push(null, null);
      }
      for (let i = 0; i < t.length && t[i] < until; i++) {
        out.t.push(t[i]);
        out.v.push(v[i]);
      }
      out.sec = sec;
    });
    return out;
  });
}

/** Failed requests since the profiling began, over all of its phases; those of a warm-up by themselves. */
function errorsSoFar(s) {
  return ofPhases(s, "errors so far", (run, name) => {
    const { t, v } = ofPhase(run, name, "errors");
    const at = run.counted.findIndex((phase) => phase.name === name);
    const before = sumOf(run.counted.slice(0, Math.max(0, at)), "errors");
    return { t, v: v.map((value) => value + before) };
  });
}
const errorsPerSecond = (s) => ofPhases(s, "errors", (run, name) => ofPhase(run, name, "errors"), true);

/** {t, v, sec}: `sec` is what the last value covers. */
function perSecond(series, begin) {
  const all = rates(series, begin);
  return { t: all.map(({ t }) => t), v: all.map(({ value }) => value), sec: all.at(-1)?.sec };
}

/** Successes per second: by the metrics, else as the phases count them. */
function requestsNow(s) {
  const counted = s.history.get("request_latency", "count");
  if (!counted.t.length) return ofPhases(s, "successes", successes, true);
  return once(s, "requests", () => perSecond(seriesUntilEnd(s, counted), counting(s)));
}

/** A cumulative statistic; when the run is over it ends with AIPerf's final value. */
function soFar(s, tag, stat) {
  const series = s.history.get(tag, stat);
  const final = s.final ? s.rows.get(tag)?.[stat] : null;
  if (!known(final) || s.end === null || !series.t.length) return series;
  const keep = series.t.findLastIndex((at) => at < s.end) + 1;
  return { t: [...series.t.slice(0, keep), s.end], v: [...series.v.slice(0, keep), final] };
}

// Cards

/** The six cards. */
export function cards(s) {
  return [
    tokensCard(s), requestsCard(s), ...LATENCIES.map(([tag, title]) => latencyCard(s, tag, title)), errorsCard(s),
  ];
}

/** "last 10 s"; metrics that come more seldom cover more. */
const word = (sec) => `last ${spoken(Math.max(1, Math.round(sec)))}`;
const NO_FIGURE = { text: NONE, unit: "" };

function card(
  s, id, title, tag, { figure, spread = "", kind = "", beside = [], note = "", spark, tone = "", change },
) {
  const empty = figure.text === NONE;
  return {
    id, title, figure, spread: empty ? "" : spread, kind: empty ? "" : kind, beside, tone, spark, change,
    note: note || (empty ? cardEmpty(s, tag) : ""),
  };
}

const cardEmpty = (s, tag) => emptyWords(s, tag).split("\n")[0].replace(/\.$/, "");

function latencyCard(s, tag, title) {
  const row = s.rows.get(tag);
  const unit = row?.unit ?? s.history.index[tag]?.unit ?? "ms";
  const id = { time_to_first_token: "ttft", inter_token_latency: "itl", request_latency: "latency" }[tag];
  const asked = (s.run.levels ?? []).filter((level) => level.tag === tag && !MEANS.includes(level.stat));
  const beside = [...new Set(["p50", "p99", ...asked.map(({ stat }) => stat)])]
    .filter((stat) => known(row?.[stat]))
    .map((stat) => ({ label: stat, text: phrase(row[stat], unit, 3), tone: levelTone(s, tag, [stat], row[stat]) }));
  const spark = [{ ...meanNow(s, tag), colour: "--d1", fill: true }];
  const rest = { beside, spark, change: changeOf(tag, row, s.run.baselines?.[0]) };
  const last = windowsOf(s, tag).at(-1);
  if (s.ended || s.report || !last) {
    // Without a last window it has only just begun: no point has come yet.
    return card(s, id, title, tag, {
      figure: quantity(row?.avg, unit, 3), spread: spreadOf(row?.avg, row?.std, unit),
      kind: `mean, ${s.ended ? "whole run" : "so far"}`, ...rest, tone: levelTone(s, tag, MEANS, row?.avg),
    });
  }
  if (last.n === 0) {
    return card(s, id, title, tag, { figure: NO_FIGURE, ...rest, note: `none finished in the ${word(last.sec)}` });
  }
  return card(s, id, title, tag, {
    figure: quantity(last.mean, unit, 3), spread: spreadOf(last.mean, last.std, unit),
    kind: `mean, ${word(last.sec)}`, ...rest, tone: levelTone(s, tag, MEANS, last.mean),
  });
}

/** In the unit of the mean that stands before it. */
const spreadOf = (mean, std, unit) => (known(std) ? `± ${number(std * scaleOf(mean, unit)[0], 2)}` : "");

function tokensCard(s) {
  const tag = "output_token_throughput";
  const row = s.rows.get(tag);
  const now = tokensNow(s);
  const total = { label: s.ended ? "" : "so far", text: phrase(row?.avg, "tokens/sec") };
  const sec = windowsOf(s, "output_sequence_length").at(-1)?.sec;
  return rateCard(s, "tps", "Output tokens/s", tag, row, now, sec, "tokens/sec", total);
}

function requestsCard(s) {
  const tag = "request_throughput";
  const row = s.rows.get(tag);
  const now = requestsNow(s);
  const phase = s.counted.at(-1) ?? s.current;
  const own = row?.avg ?? (phase ? rateSoFar(s, phase) : undefined);
  const total = { label: "so far", text: phrase(own, "requests/sec", 3) };
  return rateCard(s, "rps", "Requests/s", tag, row ?? { avg: own }, now, now.sec, "requests/sec", total);
}

/** Successes per second since the phase began: count and time of one moment. */
function rateSoFar(s, { name, start, completed, errors, elapsed }) {
  const { t, v } = successes(s, name);
  const begin = start !== null && Math.abs(start - t[0]) < 10 ? start : t[0];
  if (s.end === null && t.at(-1) > begin) return v.at(-1) / (t.at(-1) - begin);
  return completed && elapsed ? (completed - errors) / elapsed : undefined;
}

function rateCard(s, id, title, tag, row, now, sec, unit, total) {
  const spark = [{ ...now, colour: id === "tps" ? "--d1" : "--d4", fill: true }];
  const change = changeOf(tag, row, s.run.baselines?.[0]);
  if (s.ended || s.report) {
    return card(s, id, title, tag, {
      figure: quantity(row?.avg, unit), kind: s.ended ? "whole run" : "so far", spark, change,
      tone: levelTone(s, tag, MEANS, row?.avg),
    });
  }
  const value = hasBegun(s) ? latest(now) : null;
  const beside = total.text === NONE ? [] : [total];
  if (!(hasBegun(s) && now.v.some((one) => one > 0)) && row?.avg > 0) {
    // It has only just begun: no point has a request yet.
    return card(s, id, title, tag, { figure: quantity(row.avg, unit, 3), kind: "so far", spark, change });
  }
  return card(s, id, title, tag, {
    figure: quantity(value, unit, 3), kind: known(value) ? word(sec ?? 10) : "", beside, spark, change,
    tone: levelTone(s, tag, MEANS, value),
  });
}

function errorsCard(s) {
  const { shown } = s;
  const [completed, errors] = [sumOf(shown, "completed"), sumOf(shown, "errors")];
  const spark = [{ ...errorsPerSecond(s), colour: "--d3", fill: true }];
  const rest = { spark, tone: errors > 0 ? "bad" : "" };
  if (!shown.length) return card(s, "errors", "Errors", "request_error_rate", { figure: NO_FIGURE, ...rest });
  const whole = {
    label: s.ended ? "of" : "so far",
    text: s.ended ? `${count(completed)} requests` : `${count(errors)} of ${count(completed)}`,
  };
  if (s.ended || s.report) {
    return card(s, "errors", "Errors", "request_error_rate", {
      figure: { text: count(errors), unit: share(errors, completed) }, kind: s.ended ? "whole run" : "so far",
      beside: [whole], ...rest,
    });
  }
  const last = errorsNow(s);
  if (!last) {
    const all = { figure: { text: count(errors), unit: "" }, kind: "so far" };
    return card(s, "errors", "Errors", "request_error_rate", { ...all, beside: [{ ...whole, label: "" }], ...rest });
  }
  return card(s, "errors", "Errors", "request_error_rate", {
    figure: { text: share(last.errors, last.completed), unit: "" }, kind: word(last.sec),
    beside: [{ ...whole, tone: rest.tone }], spark, tone: last.errors > 0 ? "bad" : "",
  });
}

/** Errors and completions of the last ten seconds, in the present phase. */
function errorsNow(s) {
  const name = s.history.phases().at(-1)?.name;
  if (!name || !hasBegun(s)) return null;
  const begin = s.phases.find((phase) => phase.name === name)?.start ?? 0;
  const completed = rates(ofPhase(s, name, "completed"), begin).at(-1);
  const errors = rates(ofPhase(s, name, "errors"), begin).at(-1);
  return completed && errors && completed.n > 0
    ? { completed: completed.n, errors: errors.n, sec: completed.sec }
    : null;
}

/** Whether the present phase has points: those of the phase before are no "now". */
const hasBegun = ({ current, history }) => !current || history.phases().some(({ name }) => name === current.name);

/** The change of a mean against a baseline's, or null: {change, text, verdict, name}. */
export function changeOf(tag, row, base) {
  const [mine, theirs] = [row?.avg, base?.rows.get(tag)?.avg];
  if (!known(mine) || !known(theirs) || theirs === 0) return null;
  const change = mine / theirs - 1;
  const unit = row.unit ?? base.rows.get(tag).unit;
  return { change, text: changeText(change), verdict: verdict(tag, unit, change), name: base.name };
}

function changeText(change) {
  const value = 100 * change;
  const digits = Math.abs(value) < 10 ? 1 : 0;
  return `${value > 0 ? "+" : value < 0 ? "−" : "±"}${Math.abs(value).toFixed(digits)} %`;
}

/** "good" or "bad" of a figure by the levels of its metric and statistic, "" without one. */
function levelTone(s, tag, stats, value) {
  const mine = (s.run.levels ?? []).filter((level) => level.tag === tag && stats.includes(level.stat));
  if (!mine.length || !known(value)) return "";
  return mine.every((level) => keeps(level, value)) ? "good" : "bad";
}
const MEANS = ["avg", "each"];

// Service levels

/** Every level with what became of it: [{text, own, tone, words}]. */
export function levels(s) {
  return (s.run.levels ?? []).map((level) => {
    const series = levelSeries(s, level);
    const bad = shareOfTime(series, (value) => !keeps(level, value));
    const value = s.rows.get(level.tag)?.[level.stat === "each" ? "avg" : level.stat];
    const good = s.rows.get("good_request_fraction")?.avg;
    return { level, text: level.text, own: level.own, ...judged(level, value, bad, good) };
  });
}

/** What a level is held against over time: means and rates of the last ten seconds, percentiles so far. */
function levelSeries(s, { tag, stat }) {
  if (tag === "output_token_throughput") return tokensNow(s);
  if (tag === "request_throughput") return requestsNow(s);
  if (stat === "avg" || stat === "each") return meanNow(s, tag);
  return s.history.get(tag, stat);
}

// Charts

/** What each chart draws: [{id, title, picker, lines, limits, empty}]. A chart with `absent` is not drawn at all. */
export function charts(s) {
  const { choice } = s.run;
  return [
    ...LATENCIES.map(([tag], at) => latencyChart(s, `latency${at + 1}`, choice[`latency${at + 1}`] ?? tag)),
    tokensChart(s), requestsChart(s), flightChart(s), gpuChart(s), serverChart(s),
  ];
}

/** Lines that have points; else why there are none. */
function chart(s, id, title, lines, { tag, picker = null, limits = [], absent = null, wide = false } = {}) {
  const drawn = lines.filter(({ series }) => series.t.length > 0);
  const empty = drawn.length ? "" : (absent ?? emptyWords(s, tag));
  return {
    id, title, picker, lines: drawn, limits: drawn.length ? limits : [], empty, wide,
    absent: absent !== null && !drawn.length,
  };
}

const NOW_TEXT = "10 s";
const lineIn = (unit) => (label, colour, series, more) => ({ label, unit, scale: unit, colour, series, ...more });

function latencyChart(s, id, tag) {
  const { unit = "ms", header } = s.history.index[tag] ?? {};
  const title = LATENCIES.find(([name]) => name === tag)?.[1] ?? header ?? tag;
  const line = lineIn(unit);
  const lines = [
    line("p99 so far", "--d3", soFar(s, tag, "p99"), {
      width: 1, dash: [6, 3], title: "99th percentile since profiling began",
    }),
    line("p50 so far", "--d4", soFar(s, tag, "p50"), {
      width: 1, dash: [2, 2], title: "Median since profiling began",
    }),
    line("mean now", "--d1", meanNow(s, tag), {
      width: 2, band: true, title: `Mean of the requests that finished in the last ${NOW_TEXT}`,
    }),
    ...ghosts(s, line, (base) => base.meanNow(tag)),
  ];
  const options = Object.entries(s.history.index)
    .filter(([name, { group, stats = [] }]) => group === "metrics" && stats.includes("p50") && name !== tag)
    .map(([value, one]) => ({ value, text: one.header ?? value }));
  const known = LATENCIES.filter(([value]) => value !== tag && !options.some((one) => one.value === value)).map(
    ([value, text]) => ({ value, text }),
  );
  const all = [{ value: tag, text: title }, ...options, ...known].sort((a, b) => a.text.localeCompare(b.text));
  return chart(s, id, title, lines, {
    tag, picker: { label: `Metric of chart ${id.slice(-1)}`, options: all, value: tag },
    limits: limitsOf(s, tag, unit),
  });
}

/** The lines of the baselines, moved so that all first phases begin together. */
function ghosts(s, line, of) {
  return (s.run.baselines ?? []).slice(0, 3).map((base) => {
    const { t, v } = of(base);
    const by = s.zero - base.zero;
    const look = { width: 1.2, dash: [1, 3], title: `The same of ${base.name}` };
    return line(base.name, "--axis", { t: t.map((at) => at + by), v }, look);
  });
}

function tokensChart(s) {
  const [tag, unit] = ["output_token_throughput", "tokens/sec"];
  const line = lineIn(unit);
  const lines = [
    line("so far", "--d4", soFar(s, tag, "avg"), {
      width: 1, dash: [2, 2], title: "Output tokens per second since profiling began",
    }),
    line("now", "--d1", tokensNow(s), {
      width: 2, band: true,
      title: `Output tokens of the requests that finished in the last ${NOW_TEXT}, per second`,
    }),
    ...ghosts(s, line, (base) => base.tokensNow()),
  ];
  return chart(s, "tokens", "Output tokens/s", lines, { tag, limits: limitsOf(s, tag, unit) });
}

const limitsOf = (s, tag, scale) =>
  (s.run.levels ?? [])
    .filter((level) => level.tag === tag)
    .map((level) => ({ value: level.limit, label: levelWords(level), scale }));

function requestsChart(s) {
  const [tag, unit] = ["request_throughput", "requests/sec"];
  const line = lineIn(unit);
  return chart(
    s, "requests", "Requests/s",
    [
      line("so far", "--d4", soFar(s, tag, "avg"), {
        width: 1, dash: [2, 2], title: "Successful requests per second since profiling began",
      }),
      line("now", "--d1", requestsNow(s), {
        width: 2, band: true, title: `Requests that succeeded in the last ${NOW_TEXT}, per second`,
      }),
      line("errors now", "--d3", errorsPerSecond(s), {
        width: 1.5, dash: [6, 3], title: `Requests that failed in the last ${NOW_TEXT}, per second`,
      }),
    ],
    { tag, limits: limitsOf(s, tag, unit) },
  );
}

function flightChart(s) {
  return chart(s, "flight", "In flight, errors", [
    {
      label: "in flight", unit: "requests", scale: "requests", colour: "--d1", width: 1.5, series: inFlight(s),
      band: true, whole: true, title: "Requests sent and not finished",
    },
    {
      label: "errors so far", unit: "errors", scale: "errors", colour: "--d3", width: 1.5, dash: [6, 3], whole: true,
      series: errorsSoFar(s), title: "Failed requests since profiling began",
    },
  ]);
}

/** Requests sent and not finished, from when AIPerf has told of any; none is left when the run has ended. */
function inFlight(s) {
  const { t, v } = ofPhases(s, "in_flight", (run, name) => {
    const { t, v } = ofPhase(run, name, "in_flight");
    const told = Math.max(0, v.findIndex((value) => value > 0));
    return { t: t.slice(told), v: v.slice(told) };
  });
  if (s.end === null || !t.length || v.at(-1) === 0) return { t, v };
  const keep = t.at(-1) < s.end ? t.length : -1;
  return { t: [...t.slice(0, keep), s.end], v: [...v.slice(0, keep), 0] };
}

// GPUs

/** The measures people look for first, in that order. */
const MEASURES = ["Power Usage", "Utilization", "Memory Used", "Temperature", "SM Utilization", "Memory Utilization"];
export const measureRank = (name) => (MEASURES.includes(name) ? MEASURES.indexOf(name) : MEASURES.length);

/** "NVIDIA GPU Power Usage | 127.0.0.1:19400 | GPU 0 | NVIDIA H200" in parts. */
export function gpuParts(header, tag) {
  const [measure = tag, source = "", gpu = "", model = ""] = String(header ?? tag).split(" | ");
  const own = measure.replace(/^(nvidia|amd) (gpu )?/i, "");
  // The results write them small: "nvidia sm utilization".
  return { measure: own.replace(/\b(sm\b|[a-z])/g, (text) => text.toUpperCase()), source, gpu: gpu || tag, model };
}

function gpuSeries(s) {
  return Object.entries(s.history.index)
    .filter(([, { group }]) => group === "telemetry")
    .map(([tag, { header, unit }]) => ({ tag, unit, ...gpuParts(header, tag) }));
}

const measuresOf = (all) =>
  [...new Set(all.map(({ measure }) => measure))].sort(
    (a, b) => measureRank(a) - measureRank(b) || natural.compare(a, b),
  );

function chosenGPUs(s) {
  const all = gpuSeries(s);
  const measures = measuresOf(all);
  const measure = measures.includes(s.run.choice.gpu) ? s.run.choice.gpu : measures[0];
  const chosen = all
    .filter((one) => one.measure === measure)
    .sort((a, b) => natural.compare(a.source, b.source) || natural.compare(a.gpu, b.gpu));
  return { measures, measure, chosen };
}

function gpuChart(s) {
  const { measures, measure, chosen } = chosenGPUs(s);
  const nodes = [...new Set(chosen.map(({ source }) => source))];
  const seen = new Map();
  const lines = chosen.map(({ tag, unit, gpu, model, source }) => {
    const node = nodes.indexOf(source);
    const at = seen.get(node) ?? 0;
    seen.set(node, at + 1);
    const current = s.history.get(tag, "current");
    return {
      label: nodes.length > 1 ? `${nodeName(source, nodes)} · ${gpu.replace(/^GPU /, "")}` : gpu, unit,
      scale: unit ?? "", colour: PALETTE[at % PALETTE.length],
      dash: [undefined, [6, 3], [2, 2], [8, 2, 2, 2]][node % 4], width: 1.3,
      series: current.t.length ? current : s.history.get(tag, "avg"), title: `${gpu}, ${model}, ${source}`,
    };
  });
  const picker = measures.length
    ? { label: "GPU measure", value: measure, options: measures.map((value) => ({ value, text: value })) }
    : null;
  return chart(s, "gpu", measure ? `GPU: ${measure}` : "GPU", lines, {
    picker, wide: lines.length > 8,
    absent: isThere(s.run.metrics?.telemetry, chosen)
      ? "Loading…"
      : absentWords(s, "No GPU telemetry", " (AIPerf: --gpu-telemetry)."),
  });
}

/** Whether the newest message or the index has any, though their points may not have come yet. */
const isThere = (told, indexed) => indexed.length > 0 || Object.keys(told ?? {}).length > 0;

/** A node by what tells it from the others: host, port, or both. */
function nodeName(source, all) {
  const parts = (one) => one.replace(/^\w+:\/\//, "").replace(/\/.*$/, "");
  const [host, port] = parts(source).split(/:(?=\d+$)/);
  const hosts = new Set(all.map((one) => parts(one).split(/:(?=\d+$)/)[0]));
  return hosts.size === all.length ? host : hosts.size === 1 && port ? `:${port}` : parts(source);
}

// The inference server

// Rows of the inference server that AIPerf mixes into its own metrics, the telling ones first.
const SERVER_ROWS = [
  "kv_cache_usage_pct", "num_running", "num_waiting", "num_preemptions", "prefix_cache_hit_rate",
  "unique_input_tokens_srv", "input_token_throughput_srv", "output_token_throughput_srv",
];
const SERVER_FIRST = /kv_cache_usage|num_requests_running|num_requests_waiting|gpu_cache_usage/;
const SERVER_STATS = [
  "current", "value", "avg", "rate", "p50", "p50_estimate", "p99", "p99_estimate", "count_rate", "total", "count",
];

function serverOptions(s) {
  const endpoints = Object.keys(s.run.server?.endpoint_summaries ?? {});
  const out = [];
  for (const [tag, { group, header, unit, stats = [] }] of Object.entries(s.history.index)) {
    const own = SERVER_ROWS.indexOf(tag);
    if (group !== "server" && own < 0) continue;
    const drawn =
      own >= 0 ? [stats.includes("current") ? "current" : "avg"] : SERVER_STATS.filter((stat) => stats.includes(stat));
    for (const stat of drawn) {
      const name = own >= 0 ? (header ?? tag) : serverName(tag, endpoints);
      const rank = own >= 0 ? own : SERVER_FIRST.test(tag) ? 50 : 100 + SERVER_STATS.indexOf(stat);
      out.push({
        value: `${tag}\n${stat}`, tag, stat, unit: unit ?? "", rank,
        text: own >= 0 ? name : `${name} · ${stat.replace("_estimate", "")}`, name,
      });
    }
  }
  return out.sort((a, b) => a.rank - b.rank || natural.compare(a.text, b.text));
}

/** `server:HOST:PORT:vllm:name{engine="0"}` without the endpoint, which is named only when there are several. */
function serverName(tag, endpoints) {
  const rest = tag.slice("server:".length);
  const endpoint = endpoints.find((one) => rest.startsWith(`${one}:`));
  const own = endpoint ? rest.slice(endpoint.length + 1) : rest;
  return endpoints.length > 1 && endpoint ? `${own} @ ${endpoint}` : own;
}

const chosenServer = (s, options) => options.find(({ value }) => value === s.run.choice.server) ?? options[0];

function serverChart(s) {
  const options = serverOptions(s);
  const chosen = chosenServer(s, options);
  const lines = chosen
    ? [
        {
          label: chosen.stat, unit: chosen.unit, scale: chosen.unit || "value", colour: "--d5", width: 1.5,
          series: s.history.get(chosen.tag, chosen.stat), title: chosen.tag,
        },
      ]
    : [];
  const picker = chosen ? { label: "Inference-server series", value: chosen.value, options } : null;
  return chart(s, "server", chosen ? `Server: ${chosen.name}` : "Inference server", lines, {
    picker,
    absent: isThere(s.run.server?.endpoint_summaries, options)
      ? "Loading…"
      : absentWords(s, "No inference-server metrics", " (AIPerf: --server-metrics)."),
  });
}

/** The tags and statistics that the charts and cards of this moment are made of. */
export function wanted(s) {
  const tags = new Set([...BASE_TAGS, ...Object.keys(s.history.index).filter((tag) => tag.startsWith("phase:"))]);
  const stats = new Set(BASE_STATS);
  for (const at of [1, 2, 3]) if (s.run.choice[`latency${at}`]) tags.add(s.run.choice[`latency${at}`]);
  for (const { tag } of chosenGPUs(s).chosen) tags.add(tag);
  const server = chosenServer(s, serverOptions(s));
  if (server) {
    tags.add(server.tag);
    stats.add(server.stat);
  }
  for (const level of s.run.levels ?? []) {
    tags.add(level.tag);
    if (level.stat !== "each") stats.add(level.stat);
  }
  return { tags: [...tags].filter((tag) => Object.hasOwn(s.history.index, tag)), stats: [...stats] };
}

/** The axis of time that all charts share, in seconds since the first phase began. */
export function axis(s) {
  const last = s.end ?? Math.max(s.history.last / 1e9, s.zero);
  const end = Math.max(1, last - s.zero);
  const phases = s.phases
    .filter(({ start }) => start !== null)
    .map((phase) => {
      const sampled = s.history.phases().find(({ name }) => name === phase.name)?.start;
      const own = Math.abs((sampled ?? phase.start) - phase.start) < 10 ? phase.start : sampled;
      const stop = phase.ended && phase.end !== null ? phase.end - phase.start + own : null;
      return { name: phase.name, start: own - s.zero, end: stop === null ? null : stop - s.zero };
    });
  const before = s.history.origin === null ? 0 : Math.max(0, s.zero - s.history.origin);
  // What came before is a thin strip, however long it took.
  return { zero: s.zero, end, phases, strip: before > 1 && phases.length ? 0.02 : 0 };
}
