// SPDX-License-Identifier: Apache-2.0
// The pure half of the pages, without a browser: node --test .ci/view.test.mjs

import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { test } from "node:test";

import { readAddress, writeAddress } from "../static/address.js";
import { baselineOf, readReport, snapshotOf, tradeoff } from "../static/compare.js";
import { better, verdict } from "../static/direction.js";
import { eventOf } from "../static/events.js";
import { quantity } from "../static/format.js";
import { History, fitted, join, rates, shareOfTime, windows } from "../static/series.js";
import { goodputLevels, parseLevel } from "../static/slo.js";
import { view } from "../static/view.js";

// Of these two only what needs no document is tested: the axis of time, and what is asked for.
Object.assign(globalThis, { addEventListener: () => {}, location: { href: "http://127.0.0.1/dashboard" } });
const { timeline } = await import("../static/charts.js");
const { Live } = await import("../static/live.js");

const STATIC = new URL("../static/", import.meta.url);
const START = 1_800_000_000; // of the warm-up, in seconds; the profiling begins 10 s later
const ns = (seconds) => Math.round(seconds * 1000) * 1e6;

/** A run told by figures: `latency(second)` in ms, 40 requests a second, for `seconds` of profiling. */
function made({ seconds = 30, latency = () => 270, every = 1, errors = () => 0, state = "profiling", ...more } = {}) {
  const history = new History();
  const begin = START + 10;
  const [times, count, sum, avg, std, sent, completed, failed] = [[], [], [], [], [], [], [], []];
  let [n, total, square, bad] = [0, 0, 0, 0];
  for (let second = 1; second <= seconds; second++) {
    const value = latency(second);
    n += 40;
    total += 40 * value;
    square += 40 * (value ** 2 + 10 ** 2); // a deviation of 10 within each second
    bad += errors(second);
    if (second % every) continue;
    times.push(ns(begin + second));
    count.push(n);
    sum.push(total);
    avg.push(total / n);
    std.push(Math.sqrt(square / n - (total / n) ** 2));
    sent.push(n + bad + 12);
    completed.push(n + bad);
    failed.push(bad);
  }
  const of = (tag, unit) => (stat, values) => ({ tag, stat, unit, header: tag, values });
  const [metric, phase] = [of("request_latency", "ms"), of("phase:profiling", "requests")];
  history.setIndex({
    start_ns: ns(START - 30),
    tags: {
      request_latency: { unit: "ms", header: "Request Latency", group: "metrics", stats: ["avg", "p50", "p99"] },
      "phase:profiling": { unit: "requests", group: "phases", stats: ["sent", "completed"] },
    },
  });
  history.add({
    interval_sec: 1, times,
    series: [
      metric("count", count), metric("sum", sum), metric("avg", avg), metric("std", std), metric("p50", avg),
      metric("p99", avg.map((value) => value + 60)),
      phase("sent", sent), phase("completed", completed), phase("errors", failed),
      phase("in_flight", sent.map(() => 12)),
    ],
  });
  const over = ["complete", "cancelled"].includes(state);
  const now = START + 10 + seconds;
  const row = {
    header: "Request Latency", unit: "ms", avg: total / n, p50: total / n, p99: total / n + 60, std: 10, count: n,
    sum: total,
  };
  const phases = {
    warmup: {
      phase: "warmup", start_ns: ns(START), end_ns: ns(START + 9), requests_completed: 20,
      total_expected_requests: 20, request_errors: 1, percent_complete: 100, elapsed_ns: 9e9,
    },
    profiling: {
      phase: "profiling", start_ns: ns(begin), end_ns: over ? ns(now) : null, requests_completed: n + bad,
      total_expected_requests: 2 * n, request_errors: bad, elapsed_ns: seconds * 1e9,
    },
  };
  return {
    now: now * 1000, statusAt: now * 1000, loaded: true, report: false, newRoundAt: undefined,
    line: { open: true, polling: false, retryAt: 0, lostAt: 0 },
    status: {
      state, stale: false, error: null, started_ns: ns(START), elapsed_sec: now - START, benchmark_id: "b1", run: 1,
      source: { kind: "tcp", address: "tcp://127.0.0.1:5664", connected: true, last_message_age_sec: 0.1 },
    },
    progress: { total: 2 * n, completed: n + bad, errors: bad, percent_complete: 50, eta_sec: 30, phases },
    metrics: { model: "m", concurrency: 12, final: over, metrics: { request_latency: row }, telemetry: {} },
    workers: null, server: null, config: {}, results: null, runs: null, history, heard: [], choice: {}, levels: [],
    baselines: [], ...more,
  };
}

const card = (run, id) => view(run).cards.find((one) => one.id === id);
const chart = (run, id) => view(run).charts.find((one) => one.id === id);
const empty = (more = {}) =>
  made({
    seconds: 0, progress: { phases: {} }, history: new History(), metrics: { metrics: {}, telemetry: {} }, ...more,
  });

test("differences of count, sum and std are the exact mean and deviation of a window", () => {
  const values = Array.from({ length: 600 }, (_, i) => 100 + ((i * 7919) % 97));
  const moments = [];
  for (let at = 20; at <= 600; at += 20) {
    const some = values.slice(0, at);
    const mean = some.reduce((a, b) => a + b) / at;
    moments.push({ t: at / 20, n: at, sum: mean * at, square: some.reduce((a, b) => a + b * b, 0) });
  }
  const last = windows(moments, 0).at(-1);
  const window = values.slice(400); // ten seconds of twenty
  const mean = window.reduce((a, b) => a + b) / window.length;
  assert.equal(last.n, 200);
  assert.ok(Math.abs(last.mean - mean) < 1e-9);
  assert.ok(Math.abs(last.std - Math.sqrt(window.reduce((a, b) => a + (b - mean) ** 2, 0) / 200)) < 1e-6);
});

test("windows of rare messages reach from one to the next, and a count that falls begins anew", () => {
  const rare = windows([{ t: 30, n: 10, sum: 100, square: null }, { t: 60, n: 30, sum: 500, square: null }], 0);
  assert.deepEqual(rare.map(({ mean, sec }) => [mean, sec]), [[10, 30], [20, 30]]);
  const anew = rates({ t: [1, 2, 3, 4], v: [10, 20, 5, 15] }, 0);
  assert.deepEqual(anew.map(({ value }) => value), [10, 10, 10]);
  assert.equal(windows([{ t: 1, n: 5, sum: 5, square: null }, { t: 2, n: 5, sum: 5, square: null }], 1)[0].mean, null);
});

test("more points than pixels are bins with their extremes, and a gap stays a gap", () => {
  const t = Array.from({ length: 1000 }, (_, i) => i);
  const { columns: [mean], low: [low], high: [high] } = fitted([{ t, v: t.map((i) => i % 10) }], 0, 1000, 100);
  assert.deepEqual([mean[0], low[0], high[0]], [4.5, 0, 9]);
  const [times, a, b] = join([{ t: [1, 2, 3], v: [1, null, 3] }, { t: [2], v: [5] }]);
  assert.deepEqual([times, a, b], [[1, 2, 3], [1, null, 3], [undefined, 5, undefined]]);
  assert.equal(shareOfTime({ t: [0, 1, 2, 4], v: [9, 1, 9, 1] }, (value) => value > 5), 0.25);
});

test("a slow spell late in an hour stands in the card, the sparkline and the chart", () => {
  const run = made({ seconds: 2600, latency: (second) => (second > 2400 ? 405 : 270) });
  const { figure, kind, beside } = card(run, "latency");
  assert.deepEqual([figure.text, kind], ["405", "mean, last 10 s"]);
  assert.equal(beside[0].label, "p50");
  const now = chart(run, "latency3").lines.find(({ label }) => label === "mean now").series;
  assert.ok(Math.abs(now.v.at(-1) - 405) < 1e-6);
  assert.ok(Math.abs(card(run, "latency").spark[0].v.at(-1) - 405) < 1e-6);
});

test("card, legend and curve of one moment say the same", () => {
  const run = made({ seconds: 45, latency: (second) => 200 + second });
  const seen = view(run);
  const curve = seen.charts.find(({ id }) => id === "latency3").lines.find(({ label }) => label === "mean now").series;
  assert.equal(seen.cards.find(({ id }) => id === "latency").figure.text, curve.v.at(-1).toFixed(0));
});

test("now ends with the run, and the final figure is the curve's last", () => {
  const run = made({ state: "complete" });
  const { figure, kind } = card(run, "latency");
  assert.deepEqual([figure.text, kind], ["270", "mean, whole run"]);
  run.metrics.metrics.request_latency.p50 = 271.5;
  assert.equal(
    chart(run, "latency3")
      .lines.find(({ label }) => label === "p50 so far")
      .series.v.at(-1),
    271.5,
  );
  assert.equal(
    chart(run, "flight")
      .lines.find(({ label }) => label === "in flight")
      .series.v.at(-1),
    0,
  );
});

test("warm-up and profiling are two lines, on an axis that begins with the first phase", () => {
  const run = made({ seconds: 5, errors: () => 1 });
  run.history.add({
    times: [ns(START + 1), ns(START + 5)],
    series: [
      { tag: "phase:warmup", stat: "sent", values: [5, 20] },
      { tag: "phase:warmup", stat: "errors", values: [0, 1] },
    ],
  });
  const { v } = chart(run, "flight").lines.find(({ label }) => label === "errors so far").series;
  assert.deepEqual(v, [0, 1, null, null, 1, 2, 3, 4, 5]);
  const { zero, strip, phases } = view(run).axis;
  assert.deepEqual([zero, strip, phases.map(({ start }) => start)], [START, 0.02, [0, 10]]);
});

test("the rate of a warm-up is not that of the profiling that has just begun", () => {
  const run = made({ seconds: 1, history: new History(), metrics: { metrics: {} } });
  const told = (phase) =>
    run.history.add({
      times: [2, 4, 6].map((at) => ns(START + at)),
      series: ["sent", "completed"].map((stat) => ({ tag: `phase:${phase}`, stat, values: [10, 30, 50] })),
    });
  told("warmup");
  assert.deepEqual(["rps", "errors"].map((id) => card(run, id).kind), ["so far", "so far"]);
  told("profiling");
  assert.match(card(run, "rps").kind, /^last/);
});

test("loading is not absence, and waiting is not green", () => {
  const loading = view(empty({ loaded: false }));
  assert.ok(loading.charts.every(({ empty: words }) => words === "Loading…"));
  for (const { empty: words } of ["metrics", "gpus", "server", "workers"].map((name) => loading.tables[name]))
    assert.equal(words, "Loading…");
  const waiting = view(
    empty({ status: { state: "waiting", source: { kind: "tcp", address: "tcp://h:5664", connected: false } } }),
  );
  assert.deepEqual(waiting.state, { name: "Waiting", tone: "wait", detail: "nothing heard yet" });
  assert.deepEqual(waiting.connection, { tone: "wait", text: "Waiting for the bus" });
  assert.equal(waiting.overlay.kind, "waiting");
  assert.equal(waiting.notice.text, "");
});

test("what has been told of is loading, and what may still come is not absent", () => {
  const header = "NVIDIA GPU Power Usage | h:9400 | GPU 0 | H200";
  const telemetry = { gpu0_power: { header, unit: "W", current: 1 } };
  const told = made({ seconds: 60 });
  Object.assign(told, { history: new History(), metrics: { ...told.metrics, telemetry } });
  const words = Object.fromEntries(view(told).charts.map(({ id, empty: said }) => [id, said]));
  assert.equal(words.gpu, "Loading…");
  assert.equal(words.flight, "The first points are on their way.");
  assert.equal(words.server, "No inference-server metrics (AIPerf: --server-metrics).");
  const { figure, kind } = card(told, "latency");
  assert.deepEqual([figure.text, kind], ["270", "mean, so far"]);
  assert.equal(chart(made({ seconds: 3 }), "gpu").empty, "No GPU telemetry yet.");
  assert.match(chart(made({ seconds: 3, state: "complete" }), "gpu").empty, /--gpu-telemetry/);
  told.status.state = "complete"; // metrics came with the results alone
  assert.match(chart(told, "latency3").empty, /^No figures over time/);
});

test("the index is asked for again soon after a message tells of something new, then seldom", () => {
  const live = new Live({ onView: () => {}, choice: {}, levels: [] });
  const due = (ago) => {
    Object.assign(live, { due: new Set(), indexAt: performance.now() - ago });
    live.settleMessages();
    return live.due.has("index");
  };
  live.answers.metrics = { metrics: { new_metric: {} } };
  assert.deepEqual([due(500), due(1500)], [false, true]);
  live.unknownAt -= 6000; // the server does not keep it
  assert.deepEqual([due(1500), due(6000)], [false, true]);
  live.answers = { server: { endpoint_summaries: { "h:8000": {} } } };
  assert.equal(due(1500), true);
});

test("a warm-up is no lack of metrics; a profiling without them is, after a while", () => {
  const warm = made();
  delete warm.progress.phases.profiling;
  Object.assign(warm, { metrics: { metrics: {} }, history: new History() });
  warm.progress.warmup = true;
  assert.equal(view(warm).state.name, "Warming up");
  assert.match(chart(warm, "latency1").empty, /^Warming up/);
  const early = made({ seconds: 3, metrics: { metrics: {} }, history: new History() });
  assert.equal(view(early).notice.text, "");
  const late = made({ seconds: 60, metrics: { metrics: {} }, history: new History() });
  assert.match(view(late).notice.text, /AIPERF_UI_REALTIME_METRICS_ENABLED=true/);
  assert.match(view(late).charts[0].empty, /No live metrics/);
});

test("lost and stale are dimmed, say since when, and promise no end", () => {
  const lost = made({ line: { open: false, polling: false, retryAt: 0, lostAt: 1 } });
  const stale = made();
  stale.status = { ...stale.status, stale: true, source: { ...stale.status.source, last_message_age_sec: 12 } };
  for (const [run, name, tone] of [[lost, "Connection lost", "bad"], [stale, "Stale", "warn"]]) {
    const seen = view(run);
    assert.deepEqual([seen.state.name, seen.state.tone, seen.dim], [name, tone, true]);
    assert.ok(seen.facts.every(([label, text]) => label !== "Remaining" || text === "—"));
  }
  assert.match(view(stale).notice.text, /^Nothing heard for 12 s/);
  for (const age of [12, 3600]) {
    stale.status.source.last_message_age_sec = age; // the elapsed time stands still after ten seconds of silence
    assert.equal(view(stale).facts[0][1], "0:19"); // of an axis that begins with the first sample
    assert.equal(view(stale).tables.events.rows.find(({ what }) => what === "silence").at / 1000 - START, 30);
  }
});

test("a recording that has ended is not a bus that is lost", () => {
  const source = { kind: "replay", address: "/data/run.jsonl.gz", connected: false };
  const over = made({ state: "complete" });
  over.status = { ...over.status, source };
  assert.deepEqual(view(over).connection, { tone: "wait", text: "Recording ended" });
  assert.match(view(over).notice.text, /^Final results/);
  assert.equal(view(over).origin, "Replay: run.jsonl.gz");
  const cut = made();
  cut.status = { ...cut.status, source }; // silent for less than what makes a bus stale
  assert.equal(view(cut).state.name, "Recording ended");
  const again = made({ newRoundAt: 0 });
  Object.assign(again, {
    newRoundAt: again.now - 1000, status: { ...again.status, source: { ...source, connected: true } },
  });
  assert.match(view(again).notice.text, /begun again/);
});

test("between two answers the time of a recording goes on with its points", () => {
  const run = made();
  Object.assign(run.status, { source: { kind: "demo", connected: true }, elapsed_sec: 36 });
  assert.deepEqual(view(run).facts.slice(0, 2), [["Elapsed", "0:29"], ["Remaining", "0:26"]]);
});

test("cancelled is amber, a failure is told once", () => {
  const cancelled = view(made({ state: "cancelled" }));
  assert.deepEqual(
    [cancelled.state.tone, cancelled.notice.tone, cancelled.bars.at(-1).tone], ["warn", "warn", "warn"],
  );
  const failed = view(
    empty({ status: { state: "failed", error: { type: "TokenizerError", message: "no such" }, source: {} } }),
  );
  assert.deepEqual([failed.overlay.error, failed.notice.text], ["TokenizerError: no such", ""]);
  const later = made();
  later.status = { ...later.status, state: "failed", error: "all requests failed" };
  assert.deepEqual([view(later).overlay, view(later).notice.text], [null, "Failed: all requests failed"]);
});

test("events carry the bus's time, for who opens late as well", () => {
  const run = made({ state: "complete", errors: (second) => (second > 10 && second <= 20 ? 2 : 0) });
  run.runs = { runs: [{ n: 1, state: "complete", ended_ns: ns(START + 41) }] };
  run.now += 3_600_000;
  const said = view(run).tables.events.rows.map(({ at, text }) => [at / 1000 - START, text]);
  assert.deepEqual(said.find(([, text]) => text === "complete"), [41, "complete"]);
  assert.ok(said.some(([at, text]) => at === 10 && text.startsWith("Profiling started")));
  assert.ok(said.some(([at, text]) => at > 19 && at < 22 && /^20 requests failed within 10 s/.test(text)));
  assert.equal(eventOf("realtime_metrics", {}), null);
  assert.equal(eventOf("system_state_changed", { state: "ready" }).text, "ready");
});

test("a spell of errors is told by itself, not with the few that fail all the time", () => {
  const spells = (run) => view(run).tables.events.rows.filter(({ what }) => what === "errors").map(({ text }) => text);
  const spike = (second) => (second > 1800 && second <= 1860 ? 6 : Number(second % 20 === 10));
  for (const every of [1, 5]) {
    const run = made({ seconds: 3600, errors: spike, every });
    assert.deepEqual(spells(run), ["360 requests failed within 1 min 0 s"]);
    assert.match(view(run).verdict.at(-1).text, /^360 requests failed within 1 min 0 s, from \d+:\d\d on\.$/);
  }
  for (const often of [1, 3]) {
    assert.deepEqual(spells(made({ seconds: 600, errors: (second) => Number(second % often === 0) })), []);
  }
});

test("several runs are named", () => {
  const run = made({ state: "complete" });
  run.status.run = 2;
  run.runs = {
    runs: [
      { n: 1, label: "run 1 of 3", state: "complete", metrics: { output_token_throughput: { avg: 1 } } },
      { n: 2, label: "run 2 of 3", state: "complete", metrics: {} },
    ],
  };
  const seen = view(run);
  assert.match(seen.state.detail, /^run 2 of 3 · /);
  assert.deepEqual(
    seen.tables.runs.rows.map(({ name, mine }) => [name, mine]), [["run 1 of 3", false], ["run 2 of 3", true]],
  );
});

test("service levels: as typed, as the goodput has them, and what became of them", () => {
  assert.deepEqual(parseLevel("TTFT p99 < 0.2 s"), {
    tag: "time_to_first_token", stat: "p99", larger: false, limit: 200, unit: "ms", own: false,
    text: "time_to_first_token p99 < 200 ms",
  });
  assert.equal(parseLevel("output_token_throughput >= 1000").stat, "avg");
  assert.ok(parseLevel("nonsense").problem);
  assert.ok(parseLevel("ttft p42 < 1").problem);
  for (const given of [
    "time_to_first_token:200 inter_token_latency:20", { time_to_first_token: 200, inter_token_latency: 20 },
  ]) {
    assert.deepEqual(
      goodputLevels({ input: { goodput: given } }).map(({ tag, limit }) => [tag, limit]),
      [["time_to_first_token", 200], ["inter_token_latency", 20]],
    );
  }
  const levels = [parseLevel("request_latency avg < 300 ms"), parseLevel("request_latency p99 < 300 ms")];
  const run = made({ seconds: 100, latency: (second) => (second > 50 ? 320 : 200), levels });
  const [mean, p99] = view(run).levels;
  assert.deepEqual([mean.tone, p99.tone], ["good", "bad"]);
  assert.match(mean.words, /^met: avg 260 ms, violated 4\d(\.\d)? % of the time$/);
  assert.equal(card(run, "latency").tone, "bad"); // now
  assert.equal(chart(run, "latency3").limits.length, 2);
});

test("a report read back draws the same figures, and is a baseline for the next run", () => {
  const run = made({ state: "complete", seconds: 60 });
  const series = [...run.history.series].map(([key, { v }]) => ({
    tag: key.split("\n")[0], stat: key.split("\n")[1], unit: "ms", values: v,
  }));
  const times = run.history.get("request_latency", "count").t.map(ns);
  const blob = {
    kind: "aiperf-report", format: 1, generated_ns: ns(START + 100), status: run.status, progress: run.progress,
    metrics: run.metrics, config: { a: "<\\u003c/script>" }, results: { error_summary: { errors: [] } },
    histories: [{ times, series }, null],
  };
  const json = JSON.stringify(blob).replaceAll("<", "\\u003c");
  const html = `<html><script type="application/json" id="run">${json}</script></html>`;
  const read = readReport(html);
  assert.deepEqual(read, blob);
  const seen = view(snapshotOf(read));
  assert.equal(seen.cards.find(({ id }) => id === "latency").figure.text, "270");
  assert.match(seen.verdict[0].text, /^The run is complete: 2,400 requests in 1 min 0 s/);
  assert.match(seen.verdict[1].text, /^Measured: /);
  const next = made({ latency: () => 297, baselines: [baselineOf(read, "before")] });
  const { change, ...said } = card(next, "latency").change;
  assert.deepEqual(said, { text: "+10 %", verdict: "worse", name: "before" });
  assert.ok(Math.abs(change - 0.1) < 1e-9);
  const ghost = chart(next, "latency3").lines.find(({ label }) => label === "before");
  assert.equal(ghost.series.t.length, 60);
  assert.throws(() => readReport("<html></html>"), /not a report/);
  assert.equal(tradeoff(view(next).tables.runs.rows).length, 0);
});

test("a deviation stands in the unit of the mean before it", () => {
  for (const [factor, unit, mean, spread] of [
    [1, "ms", "270", "± 10"], [1e-4, "µs", "27", "± 1"], [1e3, "s", "270", "± 10"],
  ]) {
    const run = made({ state: "complete" });
    const row = run.metrics.metrics.request_latency;
    Object.assign(row, { avg: 270 * factor, std: 10 * factor });
    const { figure, spread: shown } = card(run, "latency");
    assert.deepEqual([figure, shown], [{ text: mean, unit }, spread]);
  }
  assert.deepEqual(quantity(0.043, "ms"), { text: "43", unit: "µs" });
  assert.deepEqual(quantity(undefined, "ms"), { text: "—", unit: "ms" });
});

test("fingers that move little by little zoom, also from a whole run that was configured before", () => {
  Object.assign(timeline, { end: 100, strip: 0.02, zoom: null, follow: null });
  assert.deepEqual(timeline.range(), [-2, 100]);
  for (let move = 0; move < 40; move++) timeline.scaleZoom(50, 0.99);
  const [from, to] = timeline.zoom;
  assert.ok(Math.abs(to - from - 100 * 0.99 ** 40) < 1e-6 && from > 0 && to < 100);
  for (let move = 0; move < 50; move++) timeline.scaleZoom(50, 1 / 0.99);
  assert.equal(timeline.zoom, null);
});

test("a state that is another, without a message that told of it, makes all answers old", async () => {
  const live = new Live({ onView: () => {}, choice: {}, levels: [] });
  const states = ["profiling", "profiling", "complete", "complete"];
  live.answer = (what) => Promise.resolve(what === "status" ? { state: states.shift(), run: 1 } : {});
  live.follow = () => Promise.resolve();
  const gather = async () => {
    const due = live.due;
    live.due = new Set();
    await live.ask(due);
    return [...live.due];
  };
  await gather();
  live.due = new Set(["status", "progress", "metrics", "history"]);
  assert.deepEqual(await gather(), []);
  live.due = new Set(["status", "progress", "metrics", "history"]);
  assert.deepEqual(await gather(), ["index", "server", "config", "runs", "results"]);
  assert.deepEqual(await gather(), []);
});

test("the address keeps what a link shall show", () => {
  const search = writeAddress({
    choice: { latency1: "request_latency" }, levels: [parseLevel("ttft p99 < 200 ms")], zoom: [10, 20.5],
    follow: null, tab: "gpus", kiosk: true,
  });
  const read = readAddress(search);
  assert.deepEqual(
    [read.choice, read.zoom, read.tab, read.kiosk], [{ latency1: "request_latency" }, [10, 20.5], "gpus", true],
  );
  assert.equal(read.levels[0].text, "time_to_first_token p99 < 200 ms");
  assert.equal(writeAddress({ choice: {}, levels: [], zoom: null, follow: null, tab: "metrics", kiosk: false }), "");
});

test("what is better is said in one place", () => {
  assert.deepEqual(
    ["request_latency", "output_token_throughput", "error_request_count", "benchmark_duration"].map((tag) =>
      better(tag, tag.includes("latency") ? "ms" : ""),
    ),
    ["smaller", "larger", "smaller", ""],
  );
  assert.deepEqual(
    [verdict("request_latency", "ms", 0.1), verdict("goodput", "", 0.1), verdict("goodput", "", 0.001)],
    ["worse", "better", ""],
  );
});

// The report's way to be put together: imports of one line, exports in front, no name twice

test("the modules can be joined into one script by taking out their seams", () => {
  const page = readFileSync(new URL("report.html", STATIC), "utf8");
  const markers = [...page.matchAll(/<!-- inline: ([\w./ -]+) -->/g)].map(([, names]) => names.split(" "));
  const joined = markers
    .at(-1)
    .map((name) => {
      const text = readFileSync(new URL(name, STATIC), "utf8");
      assert.doesNotMatch(text, /<\/script|<!--/, name);
      for (const line of text.match(/^(import|export) .*$/gm) ?? []) {
        assert.match(
          line, /^import .* from "\.\/[\w.]+\.js";$|^export (const|class|function|async function) /,
          `${name}: ${line}`,
        );
        const from = /from "\.\/([\w.]+)"/.exec(line)?.[1];
        if (from) assert.ok(markers.at(-1).includes(from), `${name} needs ${from}`);
      }
      return text.replace(/^import [^\n]*\n|^export /gm, "");
    })
    .join("\n");
  // Two of a name, or a seam that is left, is a syntax error.
  assert.doesNotThrow(() => new Function(`"use strict"; { ${joined} }`));
  for (const name of markers[0])
    assert.doesNotMatch(readFileSync(new URL(name, STATIC), "utf8"), /<\/style|@import|url\(/, name);
});

test("names that are written from right to left turn no sentence of ours around", () => {
  const run = made({ state: "cancelled" });
  run.status.error = "\u202eevil.";
  assert.equal(view(run).notice.text, "Cancelled: \u2068\u202eevil\u2069. The figures cover what was completed.");
  run.runs = { runs: [{ n: run.status.run, label: "\u05d0\u05d1" }] };
  assert.match(view(run).state.detail, /^\u2068\u05d0\u05d1\u2069 · 1,200 of/);
});

test("nothing is counted after the end: what is told then is of then", () => {
  const run = made({ seconds: 30, latency: () => 270, state: "complete" });
  const later = (tag, stats) => Object.entries(stats).map(([stat, value]) => ({ tag, stat, values: [value] }));
  const told = { count: 1240, sum: 1240 * 270, avg: 270, std: 10 };
  run.history.add({
    times: [ns(START + 70)],
    series: [
      ...later("request_latency", told),
      ...later("phase:profiling", { sent: 1240, completed: 1240, errors: 0, in_flight: 12 }),
    ],
  });
  const seen = view(run);
  const line = (chart, label) =>
    seen.charts.find(({ id }) => id === chart).lines.find((one) => one.label === label).series;
  assert.equal(line("requests", "now").t.at(-1), START + 40);
  assert.ok(line("requests", "now").v.at(-1) > 39, "a rate over the time in which something happened");
  assert.equal(line("flight", "in flight").v.at(-1), 0);
});

test("where every request fails none is counted as throughput", () => {
  const run = made({ errors: () => 10 });
  run.history = ((all) => {
    const none = new History();
    none.add(all);
    return none;
  })({
    times: [1, 2, 3].map((at) => ns(START + 10 + at)),
    series: ["sent", "completed", "errors"].map((stat) => ({ tag: "phase:profiling", stat, values: [40, 80, 120] })),
  });
  run.metrics = { metrics: {} };
  run.progress.phases.profiling = { ...run.progress.phases.profiling, requests_completed: 120, request_errors: 120 };
  const requests = view(run).charts.find(({ id }) => id === "requests").lines;
  assert.deepEqual(requests.map(({ label, series }) => [label, series.v.at(-1)]), [["now", 0], ["errors now", 40]]);
});

test("the newest row of the server moves on until it is full, and is drawn once", () => {
  const history = new History();
  const row = (...pairs) => ({
    times: pairs.map(([at]) => ns(START + at)), series: [{ tag: "a", stat: "avg", values: pairs.map(([, v]) => v) }],
  });
  history.add(row([1, 10], [2, 20]));
  history.add(row([2.6, 21], [3, 30]), ns(START + 1));
  assert.deepEqual(history.get("a", "avg"), { t: [1, 2.6, 3].map((at) => START + at), v: [10, 21, 30] });
});

test("protanopes and deuteranopes tell neighbouring lines apart, in both themes", () => {
  // Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB; differences as CIEDE2000.
  const seenBy = {
    protan: [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    deutan: [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
  };
  const [light, dark] = readFileSync(new URL("base.css", STATIC), "utf8")
    .split(':root[data-theme="dark"]')
    .map((block) =>
      Object.fromEntries([...block.matchAll(/--([\w-]+): #([0-9a-f]{6});/g)].map(([, name, hex]) => [name, hex])),
    );
  const palette = /PALETTE = \[([^\]]+)\]/.exec(readFileSync(new URL("figures.js", STATIC), "utf8"))[1].match(/d\d/g);
  const pairs = [
    ...palette.slice(1).map((name, at) => [palette[at], name]), ["d1", "d3"], ["d1", "d4"], ["d3", "d4"],
    ["d1", "axis"], ["d3", "axis"], ["d4", "axis"],
  ];
  for (const colours of [light, dark])
    for (const [who, matrix] of Object.entries(seenBy))
      for (const [a, b] of pairs) {
        const difference = deltaE(...[a, b].map((name) => lab(colours[name], matrix)));
        assert.ok(
          difference >= 10,
          `${who}, ${colours === dark ? "dark" : "light"}: ${a} and ${b} differ by ${difference.toFixed(1)}`,
        );
      }
});

/** CIE L*a*b* of a colour as somebody sees it. */
function lab(hex, matrix) {
  const linear = [0, 2, 4]
    .map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  const [r, g, b] = matrix.map((row) =>
    Math.min(1, Math.max(0, row.reduce((sum, one, at) => sum + one * linear[at], 0))),
  );
  const [x, y, z] = [
    (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047, 0.2126 * r + 0.7152 * g + 0.0722 * b,
    (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883,
  ].map((value) => (value > 0.008856 ? Math.cbrt(value) : 7.787 * value + 16 / 116));
  return [116 * y - 16, 500 * (x - y), 200 * (y - z)];
}

/** CIEDE2000. */
function deltaE([l1, a1, b1], [l2, a2, b2]) {
  const rad = Math.PI / 180;
  const seventh = (value) => Math.sqrt(value ** 7 / (value ** 7 + 25 ** 7));
  const g = 1.5 - 0.5 * seventh((Math.hypot(a1, b1) + Math.hypot(a2, b2)) / 2);
  const [c1, c2] = [Math.hypot(a1 * g, b1), Math.hypot(a2 * g, b2)];
  const [h1, h2] = [[a1, b1], [a2, b2]].map(([a, b]) => (Math.atan2(b, a * g) / rad + 360) % 360);
  const turn = c1 * c2 === 0 ? 0 : ((h2 - h1 + 540) % 360) - 180;
  const [l, c, h] = [(l1 + l2) / 2, (c1 + c2) / 2, (h1 + turn / 2 + 360) % 360];
  const t =
    1 -
    0.17 * Math.cos((h - 30) * rad) +
    0.24 * Math.cos(2 * h * rad) +
    0.32 * Math.cos((3 * h + 6) * rad) -
    0.2 * Math.cos((4 * h - 63) * rad);
  const light = (l2 - l1) / (1 + (0.015 * (l - 50) ** 2) / Math.sqrt(20 + (l - 50) ** 2));
  const chroma = (c2 - c1) / (1 + 0.045 * c);
  const hue = (2 * Math.sqrt(c1 * c2) * Math.sin((turn / 2) * rad)) / (1 + 0.015 * c * t);
  const rotation = -Math.sin(60 * rad * Math.exp(-(((h - 275) / 25) ** 2))) * 2 * seventh(c);
  return Math.sqrt(light ** 2 + chroma ** 2 + hue ** 2 + rotation * chroma * hue);
}

test("lines of the pages stay under 120 characters", () => {
  const long = readdirSync(STATIC)
    .filter((name) => /\.(js|css)$/.test(name) && !name.startsWith("docs."))
    .flatMap((name) =>
      readFileSync(new URL(name, STATIC), "utf8")
        .split("\n")
        .map((line, at) => [`${name}:${at + 1}`, line.length]),
    )
    .filter(([, length]) => length >= 120);
  assert.deepEqual(long, []);
});
