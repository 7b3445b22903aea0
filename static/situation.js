// SPDX-License-Identifier: Apache-2.0
// What there is to say about the state of a run: one reading of the answers, from which every sentence follows. Pure.

import { NONE, clock, count, isolated, known, number, percent, spoken, timeOfDay } from "./format.js";

const STATES = {
  waiting: ["Waiting", "wait"], initializing: ["Initializing", "run"], configuring: ["Configuring", "run"],
  ready: ["Ready", "run"], profiling: ["Profiling", "run"], processing: ["Processing results", "run"],
  stopping: ["Stopping", "warn"], shutdown: ["Shutting down", "wait"], complete: ["Complete", "good"],
  cancelled: ["Cancelled", "warn"], failed: ["Failed", "bad"],
};
export const ENDS = new Set(["complete", "cancelled", "failed"]);
const SILENT_SEC = 10; // after which the server calls a run stale, and counts its time no further
const METRICS_LATE_SEC = 10; // live metrics that have not come by then may never do
const SWITCH_ON = "AIPERF_UI_REALTIME_METRICS_ENABLED=true";
const WITHOUT_METRICS =
  `no live metrics yet. AIPerf sends them when asked to: ${SWITCH_ON} (0.5 and later), or its dashboard UI.`;

/** One phase of /api/progress in names of our own. */
function phaseOf(name, phase, history) {
  const total = phase.total ?? phase.total_expected_requests ?? null;
  const startNs = phase.start_ns ?? null;
  const endNs = phase.end_ns ?? phase.requests_end_ns ?? null;
  const duration = phase.expected_duration_sec ?? null;
  const seen = (stat) => history.get(`phase:${name}`, stat).v.at(-1) ?? 0;
  const completed = Math.max(phase.completed ?? phase.requests_completed ?? 0, seen("completed"));
  const elapsed = known(phase.elapsed_sec)
    ? phase.elapsed_sec
    : known(phase.elapsed_ns)
      ? phase.elapsed_ns / 1e9
      : startNs !== null && endNs !== null
        ? (endNs - startNs) / 1e9
        : null;
  const share = total ? (100 * completed) / total : duration && elapsed !== null ? (100 * elapsed) / duration : 0;
  return {
    name, total, completed, duration, elapsed,
    warmup: String(phase.phase_kind ?? phase.phase ?? name).startsWith("warm"),
    start: startNs === null ? null : startNs / 1e9, end: endNs === null ? null : endNs / 1e9,
    errors: Math.max(phase.errors ?? phase.request_errors ?? 0, seen("errors")),
    percent: Math.max(0, Math.min(100, Math.max(phase.percent_complete ?? 0, share))),
    ended: endNs !== null || phase.complete === true,
  };
}

/** The answers of one moment, read once: what all else is derived from. */
export function situation(run) {
  const { status, progress, metrics, history, line } = run;
  const state = status?.state ?? "";
  const replay = ["replay", "demo"].includes(status?.source?.kind);
  const phases = Object.entries(progress?.phases ?? {})
    .map(([name, phase]) => phaseOf(name, phase, history))
    .sort((a, b) => (a.start ?? 0) - (b.start ?? 0));
  const ended = ENDS.has(state);
  const going = Boolean(status) && !ended && state !== "waiting";
  const told = known(status?.started_ns) && known(status?.elapsed_sec);
  const busNow = told ? status.started_ns / 1e9 + status.elapsed_sec : history.last / 1e9 || null;
  const silent = Math.min(status?.source?.last_message_age_sec ?? 0, SILENT_SEC);
  const rows = new Map(Object.entries(metrics?.metrics ?? {}));
  const current = phases.at(-1) ?? null;
  const counted = phases.filter(({ warmup }) => !warmup);
  return {
    run, status, state, phases, ended, going, rows, history, busNow, current, counted,
    heardAt: busNow && busNow - silent, shown: counted.length ? counted : phases, loaded: run.loaded === true,
    report: run.report === true, lost: Boolean(line) && !line.open && !line.polling && line.lostAt > 0,
    replay, stale: going && (status.stale === true || (replay && status.source.connected === false)),
    final: metrics?.final === true, warming: Boolean(current?.warmup) && !ended, zero: zeroOf(phases, history),
    end: ended ? endOf(phases, history) : null,
  };
}

/** What phases counted, together. */
export const sumOf = (phases, field) => phases.reduce((all, phase) => all + (phase[field] ?? 0), 0);

/** Where the axis of time begins: with the first phase. */
function zeroOf(phases, history) {
  const sampled = history.phases()[0]?.start ?? null;
  const own = phases[0]?.start ?? null;
  // The benchmark's own start is exact if its clock is the server's; else the first sample has to do.
  if (own !== null && (sampled === null || Math.abs(sampled - own) < 10)) return own;
  return sampled ?? own ?? history.origin ?? 0;
}

/** When the last phase ended; one that was never said to end did so with the last that was heard. */
function endOf(phases, history) {
  return phases.at(-1)?.end ?? (history.last / 1e9 || null);
}

// The words

/** [name, tone, detail] of the state. */
export function stateWords(s) {
  const { status, state, run } = s;
  if (!status) return s.lost ? ["No answer", "bad", "trying again"] : ["Connecting", "wait", "asking the server"];
  const [name, tone] =
    s.warming && ["configuring", "ready", "profiling"].includes(state)
      ? ["Warming up", "run"]
      : (STATES[state] ?? [state, "run"]);
  if (s.lost) return ["Connection lost", "bad", `was ${name.toLowerCase()} at ${timeOfDay(run.line.lostAt)}`];
  if (s.stale && s.replay && !status.source?.connected) return ["Recording ended", "warn", "before the run did"];
  if (s.stale) return ["Stale", "warn", `silent for ${spoken(status.source?.last_message_age_sec)}`];
  return [name, tone, detail(s)];
}

function detail(s) {
  if (s.state === "waiting") return "nothing heard yet";
  const ofRuns = runWords(s.run);
  const before = ofRuns ? `${ofRuns} · ` : "";
  if (s.state === "failed" && !s.phases.length) return `${before}not one request was sent`;
  if (!s.loaded) return `${before}loading`;
  if (!s.phases.length) return `${before}no requests yet`;
  const { shown } = s;
  const total = shown.every((phase) => phase.total)
    ? Math.max(sumOf(shown, "total"), s.run.progress?.total ?? 0)
    : null;
  const completed = Math.max(sumOf(shown, "completed"), s.counted.length ? (s.run.progress?.completed ?? 0) : 0);
  return before + (total ? `${count(completed)} of ${count(total)} requests` : `${count(completed)} requests`);
}

/** This run in the list of runs, or undefined. */
export const entryOf = ({ status, runs }) => (runs?.runs ?? []).find(({ n }) => n === status?.run);

/** "run 2 of 3", or what the run is called; nothing where there is but one. */
function runWords(run) {
  const { status } = run;
  const entry = entryOf(run);
  const label = entry?.label ?? status?.label ?? "";
  if (label && label !== `run ${status.run}`) return isolated(label);
  if (known(entry?.of) && entry.of > 1) return `run ${status.run} of ${entry.of}`;
  return known(status?.run) && status.run > 1 ? `run ${status.run}` : "";
}

/** [tone, text] of the line to the server and from it to the bus. */
export function connectionWords(s) {
  const { line, now } = s.run;
  const { status } = s;
  if (s.report) return ["", "Report"];
  if (!line.open && !line.polling) {
    if (!line.lostAt) return ["wait", "Connecting"];
    return ["bad", `Reconnecting in ${Math.max(0, Math.ceil((line.retryAt - now) / 1000))} s`];
  }
  if (s.replay && status && !status.source?.connected) return ["wait", "Recording ended"];
  if (status?.state === "waiting") return ["wait", status.source?.connected ? "Listening" : "Waiting for the bus"];
  if (s.going && status.source && !status.source.connected) return ["warn", "Bus not connected"];
  if (s.stale) return ["warn", "Silent"];
  return line.open ? ["good", "Connected"] : ["warn", "Connected, polling"];
}

/** [tone, text] of the one line under the state; what stands elsewhere is not said again. */
export function noticeWords(s, overlay) {
  const { status, state, run } = s;
  if (s.lost && status) {
    return [
      "bad",
      `The connection to the server was lost at ${timeOfDay(run.line.lostAt)}; trying again. ` +
        "The figures are from then.",
    ];
  }
  if (!status || overlay) return ["", ""];
  const reason = status.error ? isolated(errorText(status.error).replace(/\.+$/, "")) : "";
  if (state === "failed") return ["bad", `Failed: ${reason || "the benchmark ended before it sent a request."}`];
  if (state === "cancelled") {
    return ["warn", `Cancelled${reason && `: ${reason}`}. The figures cover what was completed.`];
  }
  if (s.stale && s.replay && !status.source?.connected) {
    return [
      "warn", "The recording ends here, without the end of its run: the benchmark was killed, or recording was.",
    ];
  }
  if (s.stale) {
    return [
      "warn",
      `Nothing heard for ${spoken(status.source?.last_message_age_sec)}: the benchmark was killed, ` +
        "or the network between it and this server is gone.",
    ];
  }
  if (known(run.newRoundAt) && run.now - run.newRoundAt < 15_000) {
    return ["", s.replay ? "The recording has begun again; this is its next round." : "A new run has begun."];
  }
  if (state === "complete") {
    return [
      "",
      s.final ? "Final results: the figures are AIPerf's own, over the whole profiling." : "The run is complete.",
    ];
  }
  if (s.going && status.source && !status.source.connected && !s.replay) {
    return ["warn", `Not connected to ${status.source.address}; trying again.`];
  }
  if (noLiveMetrics(s)) return ["", `Progress only: ${WITHOUT_METRICS}`];
  return ["", ""];
}

/** Profiling goes on, and metrics have not come when they should have. */
function noLiveMetrics(s) {
  const began = s.counted.at(-1);
  return (
    s.loaded && s.going && began && !s.rows.size && began.completed > 0 && (began.elapsed ?? 0) > METRICS_LATE_SEC
  );
}

/** Why there is no figure of requests, or none of a metric: the one place that says it. */
export function emptyWords(s, tag) {
  if (!s.loaded) return s.lost ? "No answer from the server." : "Loading…";
  if (s.state === "waiting") return "Nothing heard yet.";
  if (!s.ended && (tag ? s.rows.has(tag) : s.phases.length)) return "The first points are on their way.";
  if (s.rows.size && s.ended && s.counted.every(({ completed, errors }) => errors >= completed)) {
    return "No request succeeded.";
  }
  if (s.rows.has(tag)) return "No figures over time, only those of the whole run.";
  if (s.rows.size) return "Not reported for this run.";
  if (s.ended) return s.phases.length ? "No metrics were published." : "No request was sent.";
  if (!s.phases.length) return "Waiting for the first requests.";
  if (s.warming) return "Warming up: metrics begin with profiling.";
  return noLiveMetrics(s) ? `No live metrics.\nStart AIPerf with ${SWITCH_ON}.` : "Waiting for the first metrics.";
}

/** Why a panel or table of something that need not be there is empty; early in a run it may still come. */
export function absentWords(s, what, how) {
  if (!s.loaded) return "Loading…";
  if (s.state === "waiting") return "Nothing heard yet.";
  const early = s.going && !s.stale && !(s.counted.at(-1)?.elapsed > METRICS_LATE_SEC);
  return `${what}${early ? " yet." : how}`;
}

/** What stands in place of figures and charts while there are none, or null. */
export function overlayOf(s) {
  const { status, state } = s;
  if (s.report) return null;
  if (!status) return s.lost ? { kind: "unreachable", heading: "No answer from the server" } : null;
  if (s.phases.length || s.rows.size || s.history.last || s.lost) return null;
  const { kind = "", address = "", connected = false } = status.source ?? {};
  if (state === "failed") {
    return {
      kind: "failed", heading: "The benchmark failed before its first request",
      error: status.error ? errorText(status.error) : "AIPerf gave no reason on the bus; its log has it.",
    };
  }
  if (state !== "waiting") return null;
  return { kind: "waiting", heading: "Nothing heard yet", source: kind, address: String(address), connected };
}

/** The phases as bars: [{name, label, amount, percent, tone, warmup}]. */
export function bars(s) {
  return s.phases.map((phase) => ({
    name: phase.name, label: phaseTitle(phase.name),
    amount: phase.total
      ? `${count(phase.completed)} / ${count(phase.total)}`
      : phase.duration
        ? `${clock(phase.elapsed ?? 0)} / ${clock(phase.duration)}`
        : `${count(phase.completed)}`,
    percent: phase.percent, right: percent(phase.percent), warmup: phase.warmup, tone: barTone(s, phase),
  }));
}

function barTone(s, phase) {
  if (phase !== s.current) return "done";
  if (s.state === "failed") return "bad";
  return s.state === "cancelled" || s.state === "stopping" || s.stale
    ? "warn"
    : phase.ended || s.ended
      ? "done"
      : "run";
}

export const phaseTitle = (name) => (name === "warmup" ? "Warm-up" : name.charAt(0).toUpperCase() + name.slice(1));

/** What is known of the run: [[label, text]], without what is not. */
export function facts(s) {
  const { metrics, config, now } = s.run;
  const { model, endpoint_type: endpoint, streaming, aiperf_version: version } = metrics ?? {};
  const out = [];
  const say = (label, text) => {
    if (text) out.push([label, String(text)]);
  };
  if (!overlayOf(s)) {
    out.push(["Elapsed", s.phases.length ? clock(elapsedOf(s, now)) : NONE]);
    if (s.ended && s.end !== null) out.push(["Ended", timeOfDay(s.end * 1000)]);
    else out.push(["Remaining", s.going && !s.warming ? clock(remainingOf(s, now)) : NONE]);
  }
  say("Load", loadText(metrics ?? {}, s.current));
  say("Endpoint", endpoint && (streaming === true ? `${endpoint}, streaming` : endpoint));
  say("Model", model ?? config?.model ?? config?.model_names);
  say("AIPerf", version);
  return out;
}

export function loadText({ concurrency, request_rate: rate }, phase) {
  const parts = [];
  if (rate !== undefined && rate !== null) parts.push(known(rate) ? `${number(rate)} req/s` : String(rate));
  if (concurrency !== undefined && concurrency !== null) {
    parts.push(`${parts.length ? "≤ " : ""}${known(concurrency) ? count(concurrency) : concurrency} concurrent`);
  }
  if (!parts.length && phase?.duration) parts.push(`for ${spoken(phase.duration)}`);
  return parts.join(", ");
}

/** Seconds of the run since the status was asked: by the clock of this page, or by the points of a recording. */
function sinceAsked(s, now) {
  const ticking = s.going && !s.stale && !s.lost && !s.replay && !s.report && known(s.run.statusAt);
  return ticking ? (now - s.run.statusAt) / 1000 : Math.max(0, s.history.last / 1e9 - s.busNow);
}

/** Seconds since the first phase began. */
function elapsedOf(s, now) {
  if (!s.phases.length) return null;
  if (s.ended && s.end !== null) return s.end - s.zero;
  if (s.busNow === null) return null;
  if (s.stale) return Math.max(0, s.heardAt - s.zero);
  return Math.max(0, s.busNow + sinceAsked(s, now) - s.zero, s.history.last / 1e9 - s.zero);
}

function remainingOf(s, now) {
  const eta = s.run.progress?.eta_sec;
  return s.stale || s.lost || !known(eta) ? null : Math.max(0, eta - sinceAsked(s, now));
}

export function originWords(s) {
  const { kind, address } = s.status?.source ?? {};
  if (kind === "demo") return "Demo: a recorded run";
  return kind === "replay"
    ? `Replay: ${String(address ?? "")
        .split(/[\\/]/)
        .pop()}`
    : "";
}

/** An error as the bus has it: text, or an object with type and message. */
export function errorText(error) {
  if (error && typeof error === "object") {
    const text = error.message ?? error.details ?? error.cause;
    const words = typeof text === "string" ? text : text && JSON.stringify(text);
    return [error.type, words].filter(Boolean).join(": ") || JSON.stringify(error);
  }
  return String(error);
}
