// SPDX-License-Identifier: Apache-2.0
// Reports of other runs beside this one. Pure: a report's text in, figures and series out.

import { meanNow, tokensNow } from "./figures.js";
import { known } from "./format.js";
import { History } from "./series.js";
import { entryOf, loadText, situation } from "./situation.js";

const BLOB = /<script type="application\/json" id="run">([\s\S]*?)<\/script>/;

/** The data of a report file (HTML, or the JSON that it holds); throws an Error that says what is wrong. */
export function readReport(text) {
  const inner = BLOB.exec(text)?.[1] ?? text;
  let blob;
  try {
    blob = JSON.parse(inner);
  } catch {
    throw new Error("This is not a report of aiperf-api.");
  }
  if (blob?.kind !== "aiperf-report") throw new Error("This is not a report of aiperf-api.");
  if (!(blob.format <= 1)) throw new Error("This report is of a newer aiperf-api.");
  return blob;
}

/** A report's answers as a snapshot for view(). */
export function snapshotOf(blob) {
  const history = new History();
  if (known(blob.status?.started_ns)) history.origin = blob.status.started_ns / 1e9;
  for (const answer of blob.histories ?? []) history.add(answer);
  return {
    loaded: true, report: true, line: { open: true }, now: (blob.generated_ns ?? 0) / 1e6, status: blob.status,
    progress: blob.progress, metrics: blob.metrics, workers: blob.workers, server: blob.server_metrics,
    config: blob.config, results: blob.results, runs: blob.runs, history, heard: [], choice: {}, levels: [],
    baselines: [],
  };
}

/** What a run is called in a comparison. */
export function runLabel(blob, fallback) {
  const entry = entryOf(blob);
  const load = loadText(blob.metrics ?? {}, null);
  const label = blob.status?.run > 1 ? entry?.label : "";
  return label || load || blob.status?.benchmark_id || fallback;
}

/** A report as a baseline: its figures, and its curves with the time at which its first phase began. */
export function baselineOf(blob, name) {
  const s = situation(snapshotOf(blob));
  return { name, blob, zero: s.zero, rows: s.rows, meanNow: (tag) => meanNow(s, tag), tokensNow: () => tokensNow(s) };
}

/** The columns of a comparison: [tag, statistic, heading]. */
export const COMPARED = [
  ["output_token_throughput", "avg", "Tokens/s"], ["request_throughput", "avg", "Requests/s"],
  ["time_to_first_token", "p50", "TTFT p50"], ["time_to_first_token", "p99", "TTFT p99"],
  ["inter_token_latency", "p50", "ITL p50"], ["inter_token_latency", "p99", "ITL p99"],
  ["request_latency", "p50", "Latency p50"], ["request_latency", "p99", "Latency p99"],
  ["goodput", "avg", "Goodput"],
];

/** One line a run, this server's and the baselines': [{key, name, state, load, requests, errors, rows}]. */
export function comparedRuns(s) {
  const { runs, baselines = [], status } = s.run;
  const out = [];
  for (const base of baselines) {
    const { progress, status: theirs, metrics } = base.blob;
    out.push({
      key: `file ${base.name}`, name: base.name, state: theirs?.state ?? "", load: loadText(metrics ?? {}, null),
      requests: progress?.completed, errors: progress?.errors, rows: base.rows,
    });
  }
  for (const one of runs?.runs ?? []) {
    const mine = one.n === status?.run;
    out.push({
      key: `run ${one.n}`, name: one.label || `run ${one.n}`, state: one.state ?? "", load: loadText(one, null),
      requests: one.requests, errors: one.errors,
      rows: mine && s.rows.size ? s.rows : new Map(Object.entries(one.metrics ?? {})), mine,
    });
  }
  if (!out.some(({ mine }) => mine) && s.phases.length) {
    out.push({
      key: "this", name: "this run", state: s.state, load: loadText(s.run.metrics ?? {}, s.current),
      requests: s.run.progress?.completed, errors: s.run.progress?.errors, rows: s.rows, mine: true,
    });
  }
  return out;
}

/** Throughput against p99 latency: the points of a plot, by throughput. */
export function tradeoff(compared) {
  return compared
    .map((one) => ({
      name: one.name, mine: one.mine === true,
      x: one.rows.get("output_token_throughput")?.avg ?? one.rows.get("request_throughput")?.avg,
      y: one.rows.get("request_latency")?.p99,
    }))
    .filter(({ x, y }) => known(x) && known(y))
    .sort((a, b) => a.x - b.x);
}
