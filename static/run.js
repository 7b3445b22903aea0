// SPDX-License-Identifier: Apache-2.0
// What the page knows about the run: the server's answers, and the messages that say when to ask again.
//
// The server reduces every version of the bus to one state; the page does not do that a second time. Messages carry the
// present metrics; everything that is counted, timed or concluded comes from /api/*, so that the page says what they say.

import { AnswerError, Feed, getJSON } from "./api.js";
import { RunHistory } from "./history.js";
import { known } from "./format.js";

const STATUS_EVERY_MS = 2000;
const STREAM_TYPES = ["realtime_metrics", "realtime_telemetry_metrics", "realtime_server_metrics",
  "credit_phase_start", "credit_phase_progress", "credit_phase_sending_complete", "credit_phase_complete",
  "worker_status_summary", "processing_stats", "all_records_received", "system_state_changed", "process_records_result",
  "process_all_results", "results_exported", "benchmark_complete", "service_error", "dataset_configuration_failed",
  "command", "command_response", "credits_complete"];

/** Which answers a message makes old. */
const TOUCHES = {
  realtime_metrics: ["history"],
  realtime_telemetry_metrics: ["history"],
  realtime_server_metrics: ["history", "server"],
  credit_phase_progress: ["progress", "history"],
  credit_phase_start: ["progress", "history", "status", "info", "index"],
  credit_phase_sending_complete: ["progress"],
  credit_phase_complete: ["progress", "history", "status"],
  worker_status_summary: ["workers"],
  processing_stats: ["progress"],
};
const ALL = ["status", "progress", "info", "server", "workers", "index", "history"];

export const ENDED = new Set(["complete", "cancelled", "failed"]);
const BEFORE_PHASES = new Set(["initializing", "configuring", "ready"]);

/** One phase of /api/progress in names of our own. */
export function phaseView(name, phase) {
  const total = phase.total ?? phase.total_expected_requests ?? null;
  const completed = phase.completed ?? phase.requests_completed ?? 0;
  const startNs = phase.start_ns ?? null;
  const endNs = phase.end_ns ?? phase.requests_end_ns ?? null;
  const duration = phase.expected_duration_sec ?? null;
  const elapsed = known(phase.elapsed_sec) ? phase.elapsed_sec : known(phase.elapsed_ns) ? phase.elapsed_ns / 1e9
    : startNs !== null && endNs !== null ? (endNs - startNs) / 1e9 : null;
  const byRequests = total ? (100 * completed) / total : null;
  const byDuration = duration && elapsed !== null ? Math.min(100, (100 * elapsed) / duration) : null;
  return {
    name,
    warmup: (phase.phase_kind ?? phase.phase ?? name).startsWith("warm"),
    total, completed, startNs, endNs, duration, elapsed,
    sent: phase.sent ?? phase.requests_sent ?? null,
    errors: phase.errors ?? phase.request_errors ?? 0,
    cancelled: phase.cancelled ?? phase.requests_cancelled ?? 0,
    percent: Math.max(0, Math.min(100, phase.percent_complete ?? byRequests ?? byDuration ?? 0)),
    ended: endNs !== null || phase.complete === true,
  };
}

export class Run {
  /**
   * `onChange(what)` is called with a Set of what is new: status, progress, metrics, telemetry, server, workers,
   * history, line, reset. `onEvent(event)` gets entries for the event log.
   */
  constructor({ onChange, onEvent, onToken }) {
    Object.assign(this, { onChange, onEvent, onToken });
    this.history = new RunHistory();
    this.line = { open: false, polling: false, retryAt: 0, lostAt: 0 };
    this.due = new Set(ALL);
    this.pending = new Map(); // state message type -> newest text, parsed when it is shown
    this.watchWorkers = false; // somebody looks at the workers
    this.clear();
  }

  clear() {
    this.progress = null;
    this.info = null; // /api/metrics without its rows
    this.rows = new Map();
    this.telemetry = new Map();
    this.server = null;
    this.workers = null;
    this.final = false;
    this.pending.clear();
  }

  start() {
    this.feed = new Feed({
      types: STREAM_TYPES,
      onMessage: (type, text) => this.receive(type, text),
      onControl: (object) => this.control(object),
      onState: (state, retryAt) => this.lineChanged(state, retryAt),
    });
    addEventListener("visibilitychange", () => { if (!document.hidden) this.cycle(); });
    setInterval(() => this.cycle(), 1000);
    this.cycle();
  }

  // Messages

  receive(type, text) {
    if (type === "realtime_metrics" || type === "realtime_telemetry_metrics" || type === "realtime_server_metrics") {
      this.pending.set(type, text);
      this.tell("pending");
    } else if (type !== "worker_status_summary" && type !== "processing_stats" && type !== "credit_phase_progress") {
      this.log(type, text);
    }
    const first = !this.due.has("status") && !TOUCHES[type];
    for (const what of TOUCHES[type] ?? ALL) this.due.add(what);
    if (first || type === "credit_phase_start" || type === "credit_phase_complete") this.soon();
  }

  /** Parses what came since the last look; the newest of each type is all that counts. */
  settle() {
    for (const [type, text] of this.pending) {
      let message;
      try { message = JSON.parse(text); } catch { continue; }
      if (type === "realtime_server_metrics") {
        this.server = message;
      } else if (type === "realtime_telemetry_metrics") {
        this.telemetry = byTag(message.metrics);
      } else if (!this.final) {
        this.rows = byTag(message.metrics);
        if ([...this.rows.keys()].some((tag) => !Object.hasOwn(this.history.index, tag))) this.due.add("index");
      }
    }
    this.pending.clear();
  }

  control(message) {
    if (message.type === "skipped") {
      const counts = Object.entries(message.counts ?? {}).map(([type, n]) => `${n} × ${type}`).join(", ");
      this.onEvent({ at: Date.now(), kind: "line", what: "skipped", text: `This page was too slow for ${counts}; the newest are shown.` });
    } else if (message.type === "error") {
      this.onEvent({ at: Date.now(), kind: "error", what: "server", text: String(message.message) });
    }
  }

  log(type, text) {
    let message;
    try { message = JSON.parse(text); } catch { return; }
    const event = describe(type, message, this.busNow());
    if (event) this.onEvent(event);
  }

  /** The time on the bus in ms: the wall clock for a live one, the recorded time in a replay. */
  busNow() {
    const { started_ns: started, elapsed_sec: elapsed, source } = this.status ?? {};
    const recorded = source?.kind === "replay" || source?.kind === "demo";
    return recorded && known(started) && known(elapsed) ? started / 1e6 + elapsed * 1000 : Date.now();
  }

  // The line

  lineChanged(state, retryAt) {
    const was = this.line;
    if (state === "open") {
      this.line = { open: true, polling: false, retryAt: 0, lostAt: 0 };
      if (was.lostAt) this.onEvent({ at: Date.now(), kind: "line", what: "reconnected", text: "Connected again; the gap is filled from the history." });
      for (const what of ALL) this.due.add(what);
      this.soon();
    } else {
      this.line = { open: false, polling: false, retryAt, lostAt: was.lostAt || Date.now() };
      if (was.open) this.onEvent({ at: Date.now(), kind: "line", what: "lost", text: "The connection to the server was lost." });
    }
    this.tell("line");
  }

  // The answers

  /** Asks again without waiting for the next full second. */
  soon() {
    clearTimeout(this.soonTimer);
    this.soonTimer = setTimeout(() => this.cycle(), 60);
  }

  async cycle() {
    if (this.busy) {
      this.again = true;
      return;
    }
    this.busy = true;
    try {
      await this.ask();
      if (!this.line.open && !this.line.polling) {
        this.line.polling = true; // it answers, but the WebSocket does not come through
        this.tell("line");
      }
    } catch (error) {
      if (error instanceof AnswerError && error.status === 401) this.onToken();
      else if (!this.line.open && this.line.polling) {
        this.line.polling = false;
        this.tell("line");
      }
    } finally {
      this.busy = false;
      if (this.again) {
        this.again = false;
        this.soon();
      }
    }
  }

  async ask() {
    const now = Date.now();
    if (now - (this.statusAt ?? 0) >= STATUS_EVERY_MS) this.due.add("status");
    if (!this.line.open) for (const what of ALL) this.due.add(what);
    const due = this.due;
    this.due = new Set();
    try {
      await Promise.all([
        due.has("status") && getJSON("api/status").then((answer) => this.takeStatus(answer)),
        due.has("progress") && getJSON("api/progress").then((answer) => this.takeProgress(answer)),
        due.has("info") && getJSON("api/metrics").then((answer) => this.takeMetrics(answer)),
        due.has("server") && !this.server && getJSON("api/server-metrics").then((answer) => {
          this.server = answer;
          this.tell("server");
        }),
        due.has("workers") && (this.watchWorkers || !this.workers) && getJSON("api/workers").then((answer) => {
          this.workers = answer;
          this.tell("workers");
        }),
      ]);
      if (due.has("index") || !Object.keys(this.history.index).length) {
        await this.history.refreshIndex();
        this.tell("index");
      }
      if (due.has("history") && (await this.history.poll())) this.tell("history");
    } catch (error) {
      for (const what of due) this.due.add(what);
      throw error;
    }
  }

  tell(...what) {
    this.onChange(new Set(what));
  }

  takeStatus(status) {
    const before = this.status;
    this.status = status;
    this.statusAt = Date.now();
    const replayed = (status.source?.kind === "replay" || status.source?.kind === "demo") && before
      && (status.source.messages < before.source?.messages || status.elapsed_sec < before.elapsed_sec - 1);
    const another = before?.benchmark_id && status.benchmark_id && before.benchmark_id !== status.benchmark_id;
    const began = BEFORE_PHASES.has(status.state) && before && ENDED.has(before.state);
    if (another || replayed || began) this.newRun();
    if (before?.state !== status.state) {
      for (const what of ["progress", "info", "index", "history"]) this.due.add(what);
      if (before) this.soon();
      this.onEvent({ key: `state ${status.started_ns} ${status.state}`, at: this.busNow(), kind: status.state === "failed" ? "error" : "state",
        what: "state", text: (status.error ? `${status.state}: ${errorText(status.error)}` : status.state) + (before ? "" : ", as this page was opened") });
    }
    if (before && before.stale !== status.stale && status.stale) {
      this.onEvent({ at: this.busNow(), kind: "error", what: "stale", text: "Nothing heard for 10 s." });
    }
    this.tell("status");
  }

  takeProgress(progress) {
    const before = this.progress?.phases ?? {};
    const phases = progress.phases ?? {};
    const moved = Object.entries(phases).some(([name, phase]) => before[name]?.start_ns && phase.start_ns && before[name].start_ns !== phase.start_ns);
    const gone = BEFORE_PHASES.has(progress.system_state) && !Object.keys(phases).length && Object.keys(before).length > 0;
    if (moved || gone) this.newRun();
    // A server that was started again has not heard of the phases yet: what we have stays.
    if (!Object.keys(phases).length && Object.keys(before).length && !gone) return;
    this.progress = progress;
    for (const [name, phase] of Object.entries(phases)) this.logPhase(phaseView(name, phase));
    this.tell("progress");
  }

  logPhase({ name, startNs, endNs, total, duration, completed, errors }) {
    const goal = total ? `${total.toLocaleString("en-US")} requests` : duration ? `${duration} s` : "";
    if (startNs) this.onEvent({ key: `phase ${name} ${startNs}`, at: startNs / 1e6, kind: "phase", what: "phase", text: `${name} started${goal && `: ${goal}`}` });
    if (endNs) this.onEvent({ key: `phase ${name} ${startNs} end`, at: endNs / 1e6, kind: "phase", what: "phase", text: `${name} complete: ${completed.toLocaleString("en-US")} requests, ${errors} errors` });
  }

  takeMetrics(answer) {
    const { metrics, telemetry, ...info } = answer;
    this.info = info;
    this.final = info.final === true;
    const rows = new Map(Object.entries(metrics ?? {}));
    if (rows.size || !this.rows.size) this.rows = rows;
    const gpus = new Map(Object.entries(telemetry ?? {}));
    if (gpus.size || !this.telemetry.size) this.telemetry = gpus;
    if (this.final) this.pending.delete("realtime_metrics");
    this.tell("metrics", "telemetry");
  }

  newRun() {
    this.clear();
    this.history.reset();
    for (const what of ALL) this.due.add(what);
    this.tell("reset");
    this.onEvent({ at: this.busNow(), kind: "state", what: "new run", text: "A new run has begun." });
    this.soon();
  }
}

const byTag = (rows) => new Map((Array.isArray(rows) ? rows : []).map(({ tag, ...row }) => [tag, row]));

/** An error as the bus has it: text, or an object with type and message. */
export function errorText(error) {
  if (error && typeof error === "object") {
    const text = error.message ?? error.details ?? error.cause;
    return [error.type, typeof text === "string" ? text : text && JSON.stringify(text)].filter(Boolean).join(": ") || JSON.stringify(error);
  }
  return String(error);
}

/** An entry of the event log for a bus message, or nothing. */
function describe(type, message, at) {
  switch (type) {
    case "dataset_configuration_failed":
    case "service_error":
      return { key: `${type} ${text(message.error)}`, at, kind: "error", what: type === "service_error" ? `error` : "dataset", text: errorText(message.error ?? message) };
    case "command_response":
      return message.status === "failure" ? { key: `response ${text(message.error)}`, at, kind: "error", what: "command", text: errorText(message.error) } : null;
    case "command":
      return { key: `command ${message.command_id ?? message.command}`, at, kind: "state", what: "command", text: String(message.command) };
    case "results_exported":
    case "credits_complete":
    case "all_records_received":
    case "process_all_results":
      return { key: `${type} ${at - (at % 60_000)}`, at, kind: "state", what: "run", text: type.replaceAll("_", " ") };
    case "benchmark_complete":
      return { key: `${type} ${at - (at % 60_000)}`, at, kind: "state", what: "run", text: message.was_cancelled ? "benchmark complete, cancelled" : "benchmark complete" };
    default:
      return null;
  }
}

const text = (value) => JSON.stringify(value) ?? "";
