// SPDX-License-Identifier: Apache-2.0
// view(run): everything that the page says about one moment of a run. Pure; drawing reads it and nothing else.
//
// `run` is one stamped snapshot: {now, loaded, report, line, status, statusAt, progress, metrics, workers, server,
// config, results, runs, history, heard, newRoundAt, choice, levels, baselines}. An answer that has not come is null.

import { COMPARED, comparedRuns, tradeoff } from "./compare.js";
import { eventsOf } from "./events.js";
import { axis, cards, charts, gpuParts, levels, wanted } from "./figures.js";
import { clock, count, known, percent, phrase, spoken } from "./format.js";
import { absentWords, bars, connectionWords, emptyWords, errorText, facts } from "./situation.js";
import { noticeWords, originWords, overlayOf, situation, stateWords, sumOf } from "./situation.js";

export function view(run) {
  const s = situation(run);
  const [name, tone, detail] = stateWords(s);
  const overlay = overlayOf(s);
  const [noticeTone, notice] = noticeWords(s, overlay);
  const [lineTone, line] = connectionWords(s);
  const said = {
    state: { name, tone, detail }, title: titleOf(s, name),
    announce: s.lost && s.status ? "Connection to the server lost" : name,
    connection: { tone: lineTone, text: line }, notice: { tone: noticeTone, text: notice }, origin: originWords(s),
    overlay, dim: s.lost || s.stale, hasData: s.rows.size > 0 || s.phases.length > 0, final: s.final,
    facts: facts(s), bars: bars(s), axis: axis(s),
  };
  // What takes longer is made when it is asked for: each second only the clock goes on.
  const made = new Map();
  for (const [part, make] of Object.entries(PARTS)) {
    Object.defineProperty(said, part, {
      enumerable: true,
      get: () => {
        if (!made.has(part)) made.set(part, make(s));
        return made.get(part);
      },
    });
  }
  return said;
}

const PARTS = { cards, charts, levels, tables, wanted, verdict: verdictOf };

function titleOf(s, name) {
  const share = s.run.progress?.percent_complete;
  if (!s.status) return "AIPerf";
  const going = s.going && !s.stale && !s.lost && s.phases.length && known(share);
  return `${going ? percent(share) : name} · AIPerf`;
}

// Tables: what each holds, how many, and why it is empty

function tables(s) {
  const { run } = s;
  const gpus = new Set(
    Object.entries(run.metrics?.telemetry ?? {}).map(([tag, { header }]) => {
      const { source, gpu } = gpuParts(header, tag);
      return `${source} ${gpu}`;
    }),
  );
  let series = 0;
  for (const { metrics = {} } of Object.values(run.server?.endpoint_summaries ?? {})) {
    for (const one of Object.values(metrics)) series += one.series?.length ?? 0;
  }
  const compared = comparedRuns(s);
  const events = eventsOf(s);
  return {
    metrics: { count: s.rows.size, rows: s.rows, empty: emptyWords(s), base: run.baselines?.[0] ?? null },
    gpus: {
      count: gpus.size, rows: new Map(Object.entries(run.metrics?.telemetry ?? {})),
      empty: absentWords(
        s, "No GPU telemetry on the bus", ". AIPerf collects it from a DCGM exporter: --gpu-telemetry.",
      ),
    },
    server: {
      count: series, rows: run.server,
      empty: absentWords(
        s, "No inference-server metrics on the bus",
        ". AIPerf reads them from the server's Prometheus endpoint; see its --server-metrics.",
      ),
    },
    workers: {
      count: Object.keys(run.workers?.worker_statuses ?? {}).length, rows: run.workers,
      empty: absentWords(s, "No worker has reported", " yet."),
    },
    errors: {
      count: run.results?.error_summary?.errors?.length ?? 0, rows: run.results?.error_summary?.errors ?? [],
      more: run.results?.error_summary?.more ?? 0, empty: errorsEmpty(s),
    },
    runs: {
      count: compared.length > 1 ? compared.length : 0, rows: compared,
      columns: COMPARED.filter(([tag, stat]) => compared.some(({ rows }) => known(rows.get(tag)?.[stat]))),
      points: tradeoff(compared), empty: absentWords(s, "No run", " yet."),
    },
    events: { count: events.length, rows: events },
  };
}

/** AIPerf sums errors up by type in its results alone. */
function errorsEmpty(s) {
  if (!s.loaded) return "Loading…";
  const failed = s.phases.some(({ errors }) => errors > 0);
  if (!failed) return s.phases.length ? "No request has failed." : "No request yet.";
  return s.ended ? "AIPerf's results do not say what failed." : "AIPerf says what failed when the run is over.";
}

// The verdict of a report: what was measured, whether it was met, what went wrong

/** [{tone, text}], the first sentence the most important. */
function verdictOf(s) {
  if (!s.status) return [];
  const out = [];
  const say = (tone, text) => out.push({ tone, text });
  const { shown } = s;
  const [completed, errors] = [sumOf(shown, "completed"), sumOf(shown, "errors")];
  const took = shown[0]?.start && s.end ? ` in ${spoken(s.end - shown[0].start)}` : "";
  const reason = s.status.error ? `: ${errorText(s.status.error)}` : "";
  const ending = {
    complete: ["good", "The run is complete"], cancelled: ["warn", "The run was cancelled"],
    failed: ["bad", "The run failed"],
  }[s.state] ?? ["warn", "The run was not over when this was written"];
  say(ending[0], `${ending[1]}${reason}${completed ? `: ${count(completed)} requests${took}` : ""}.`);
  const measured = facts(s).filter(([label]) => ["Model", "Endpoint", "Load"].includes(label));
  const told = measured.map(([label, text]) => `${label.toLowerCase()} ${text}`);
  if (told.length) say("", `Measured: ${told.join("; ")}.`);
  if (completed) {
    const value = (tag, stat) => s.rows.get(tag)?.[stat];
    const rates = [["output_token_throughput", "output tokens/s"], ["request_throughput", "requests/s"]]
      .filter(([tag]) => known(value(tag, "avg")))
      .map(([tag, words]) => `${phrase(value(tag, "avg"), "")} ${words}`);
    const [p50, p99] = ["p50", "p99"].map((stat) => value("request_latency", stat));
    const latency = known(p99) ? `Request latency: ${phrase(p50, "ms", 3)} (p50), ${phrase(p99, "ms", 3)} (p99).` : "";
    const words = [rates.length ? `It did ${rates.join(" and ")}.` : "", latency].filter(Boolean).join(" ");
    if (words) say("", words);
  }
  for (const { text, tone, words } of levels(s)) say(tone, `${text}: ${words}.`);
  if (!(s.run.levels ?? []).length) say("", "No service levels were set.");
  if (errors) {
    const [top] = s.run.results?.error_summary?.errors ?? [];
    const most = top ? `; most often ${[top.code, top.type].filter(Boolean).join(" ")} (${count(top.count)})` : "";
    say("bad", `${count(errors)} of ${count(completed)} requests failed${most}.`);
    for (const { what, at, text } of eventsOf(s).reverse())
      if (what === "errors") say("bad", `${text}, from ${clock(at / 1000 - s.zero)} on.`);
  } else if (completed) say("good", "No request failed.");
  return out;
}
