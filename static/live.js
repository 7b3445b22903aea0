// SPDX-License-Identifier: Apache-2.0
// The live run: gathers the server's answers into one stamped snapshot, which is replaced as a whole.
//
// The WebSocket says when something is new and carries metrics; what is asked for then is asked together, and the
// snapshot is handed on when all of it is there, so that a figure, a legend and a curve of one moment agree.

import { AnswerError, Feed, getJSON, parsed } from "./api.js";
import { eventOf } from "./events.js";
import { known } from "./format.js";
import { History } from "./series.js";
import { ENDS } from "./situation.js";
import { view } from "./view.js";

const GATHER_EVERY_MS = 1000;
const SOON_MS = 60;
const SOCKET_MS = 1500; // to wait for it at the start, unless it fails: a slow line needs four round trips
const STATUS_EVERY_MS = 5000;
const POLL_EVERY_MS = 2000; // without a WebSocket
const POINTS = 720; // of what went before the page came: every fifth second of an hour
const POINTS_FOLLOWED = 7200;
const URL_CHARS_MAX = 3000;
const HEARD_MAX = 500;
const STREAM_TYPES = [
  "realtime_metrics", "realtime_telemetry_metrics", "realtime_server_metrics", "credit_phase_start",
  "credit_phase_progress", "credit_phase_sending_complete", "credit_phase_complete", "processing_stats",
  "all_records_received", "system_state_changed", "results_exported", "benchmark_complete", "service_error",
  "dataset_configuration_failed", "command", "command_response", "credits_complete",
];

const PATHS = {
  status: "api/status", progress: "api/progress", metrics: "api/metrics", index: "api/history",
  workers: "api/workers", server: "api/server-metrics", config: "api/config", runs: "api/runs",
  results: "api/results",
};
const CONFIGURATION = ["config", "runs", "results"];
const ALL = ["status", "progress", "metrics", "index", "history", "server", ...CONFIGURATION];
/** Which answers a message makes old; any other makes all of them old, at once. */
const TOUCHES = {
  realtime_metrics: ["history"], realtime_telemetry_metrics: ["history"], realtime_server_metrics: ["history"],
  credit_phase_progress: ["history"], processing_stats: ["history"], credit_phase_sending_complete: ["progress"],
};
const CARRIED = new Set(["realtime_metrics", "realtime_telemetry_metrics", "realtime_server_metrics"]);

export class Live {
  /** `onView(view, snapshot, why)` is called with each new snapshot; `why` may be "tick" or "new run". */
  constructor({ onView, onToken, choice, levels }) {
    Object.assign(this, { onView, onToken });
    this.due = new Set(ALL);
    this.pending = new Map(); // message type -> newest text, parsed when it is shown
    this.unstamped = []; // events that wait for the time of the bus
    this.watchWorkers = false; // somebody looks at the workers
    this.page = { choice, levels, baselines: [], line: { open: false, polling: false, retryAt: 0, lostAt: 0 } };
    this.clear();
  }

  clear() {
    this.answers = {
      status: null, progress: null, metrics: null, workers: null, server: null, config: null, results: null,
      runs: null,
    };
    this.history = new History();
    this.followed = new Map(); // tag -> the newest point of the answer that brought it last, in ns
    this.heard = [];
    this.loaded = false;
    this.pending.clear();
  }

  snapshot() {
    return {
      ...this.answers, ...this.page, history: this.history, heard: this.heard, loaded: this.loaded, report: false,
      now: Date.now(), statusAt: this.statusAt, newRoundAt: this.newRoundAt,
    };
  }

  /** Hands the present snapshot on. */
  show(why = "") {
    const snapshot = this.snapshot();
    this.onView(view(snapshot), snapshot, why);
  }

  start() {
    this.feed = new Feed({
      types: STREAM_TYPES,
      snapshot: false, // the answers have it, and with its time
      onMessage: (type, text) => this.receive(type, text), onControl: (object) => this.control(object),
      onState: (state, retryAt) => this.lineChanged(state, retryAt),
    });
    addEventListener("visibilitychange", () => {
      if (!document.hidden) this.soon(0);
    });
    setInterval(() => this.tick(), GATHER_EVERY_MS);
    this.soon(SOCKET_MS); // the WebSocket first, so that nothing is missed and nothing asked twice
  }

  // What is heard

  receive(type, text) {
    if (CARRIED.has(type)) this.pending.set(type, text);
    for (const what of TOUCHES[type] ?? ALL) this.due.add(what);
    if (TOUCHES[type]) {
      this.soon(Math.max(SOON_MS, (this.gatheredAt ?? 0) + GATHER_EVERY_MS - performance.now()));
      return;
    }
    const message = parsed(text);
    if (message === undefined) return;
    const event = eventOf(type, message);
    if (event) this.unstamped.push(event);
    this.soon(SOON_MS, true);
  }

  control(message) {
    if (message.type === "skipped") {
      const counts = Object.entries(message.counts ?? {})
        .map(([type, n]) => `${n} × ${type}`)
        .join(", ");
      this.hear("line", "skipped", `This page was too slow for ${counts}; the newest are shown.`);
    } else if (message.type === "error") {
      this.hear("error", "server", String(message.message));
    }
  }

  hear(kind, what, text) {
    this.unstamped.push({ kind, what, text });
    this.soon(SOON_MS);
  }

  lineChanged(state, retryAt) {
    const was = this.page.line;
    if (state === "open") {
      this.page.line = { open: true, polling: false, retryAt: 0, lostAt: 0 };
      // A server that was started again does not have the last row any more: it is full as it is.
      for (const tag of this.followed.keys())
        this.followed.set(tag, Math.max(this.followed.get(tag), this.history.last));
      if (was.lostAt && this.loaded) this.hear("line", "reconnected", "Connected again; the gap is filled.");
      for (const what of was.lostAt || !this.loaded ? ALL : ["status", "progress", "history"]) this.due.add(what);
      this.soon(0, true);
    } else {
      this.page.line = { open: false, polling: was.polling, retryAt, lostAt: was.lostAt || Date.now() };
      if (!this.loaded) this.soon(0);
      if (was.open) {
        this.unstamped.push({ kind: "line", what: "lost", text: "The connection to the server was lost." });
        this.stamp();
      }
    }
    this.show();
  }

  // What is asked

  /** Each second: the clock goes on, and what time alone makes old is asked again. Nobody looks: nothing is asked. */
  tick() {
    if (document.hidden) return;
    const now = performance.now();
    const { status } = this.answers;
    const ended = status && ENDS.has(status.state);
    if (now - (this.askedAt ?? -Infinity) > (ended ? 3 : 1) * STATUS_EVERY_MS) {
      this.due.add("status");
      if (!ended) this.due.add("progress");
    }
    if (this.watchWorkers && now - (this.workersAt ?? -Infinity) > POLL_EVERY_MS) this.due.add("workers");
    const polling = !this.page.line.open && now - (this.gatheredAt ?? -Infinity) > POLL_EVERY_MS;
    if (polling) for (const what of ["status", "progress", "metrics", "server", "history"]) this.due.add(what);
    if (this.due.size && !this.timer) this.soon(0);
    this.show("tick");
  }

  soon(ms, sooner = false) {
    if (document.hidden && !sooner) return;
    const at = performance.now() + ms;
    if (this.timer && this.timerAt <= at) return;
    clearTimeout(this.timer);
    this.timerAt = at;
    this.timer = setTimeout(() => {
      this.timer = 0;
      this.gather();
    }, ms);
  }

  async gather() {
    if (this.busy) {
      this.again = true;
      return;
    }
    if (!this.due.size) return;
    this.busy = true;
    const due = this.due;
    this.due = new Set();
    try {
      await this.ask(due);
      this.gatheredAt = performance.now();
      if (!this.page.line.open) this.page.line = { ...this.page.line, polling: true };
    } catch (error) {
      for (const what of due) this.due.add(what);
      if (error instanceof AnswerError && error.status === 401) this.onToken();
      else if (!this.page.line.open) {
        this.page.line = { ...this.page.line, polling: false, lostAt: this.page.line.lostAt || Date.now() };
      }
    } finally {
      this.busy = false;
    }
    this.show();
    if (this.again) {
      this.again = false;
      this.soon(SOON_MS, true);
    }
  }

  async ask(due) {
    const began = this.history;
    if (due.has("index")) due.add("history");
    const wanted = [...due].filter((what) => PATHS[what]);
    const answers = await Promise.all(wanted.map((what) => this.answer(what)));
    const found = Object.fromEntries(wanted.map((what, at) => [what, answers[at]]));
    if ((found.status && this.isNewRun(found.status)) || (found.progress && this.hasMoved(found.progress))) {
      this.newRun(found.status);
      return;
    }
    if (began !== this.history) return;
    const turned = found.status && found.status.state !== this.answers.status?.state;
    this.settle(found);
    if (turned) for (const what of ALL) if (!due.has(what)) this.due.add(what); // also where no message told of it
    if (due.has("history")) await this.follow();
    this.loaded = true;
    this.stamp();
  }

  /** An answer; one of those that need not be there is null when it is not. */
  async answer(what) {
    try {
      return await getJSON(PATHS[what]);
    } catch (error) {
      if (error instanceof AnswerError && error.status === 404 && CONFIGURATION.includes(what)) return null;
      throw error;
    }
  }

  settle(found) {
    for (const [what, answer] of Object.entries(found)) {
      if (what === "index") this.history.setIndex(answer);
      else if (what === "results") this.answers.results = answer && { ...answer, results: undefined };
      else if (!this.isForgotten(what, answer)) this.answers[what] = answer;
    }
    if (found.status) this.statusAt = Date.now();
    if (found.status || found.progress) this.askedAt = performance.now();
    if (found.index) this.indexAt = performance.now();
    if (found.workers) this.workersAt = performance.now();
    this.settleMessages();
  }

  /** A server that was started again in the middle has not heard of the phases yet: what is known stays. */
  isForgotten(what, answer) {
    const has = (progress) => Object.keys(progress?.phases ?? {}).length > 0;
    return what === "progress" && has(this.answers.progress) && !has(answer);
  }

  /** What came since the last look; the newest of each type is all that counts. */
  settleMessages() {
    const before = this.answers.metrics ?? {};
    for (const [type, text] of this.pending) {
      const message = parsed(text);
      if (message === undefined) continue;
      if (type === "realtime_server_metrics") this.answers.server = message;
      else if (type === "realtime_telemetry_metrics" && !before.final) {
        this.answers.metrics = { ...this.answers.metrics, telemetry: byTag(message.metrics) };
      } else if (type === "realtime_metrics" && !before.final) {
        this.answers.metrics = { ...this.answers.metrics, metrics: byTag(message.metrics) };
      }
    }
    this.pending.clear();
    const { metrics, telemetry } = this.answers.metrics ?? {};
    const phases = Object.keys(this.answers.progress?.phases ?? {}).map((name) => `phase:${name}`);
    const served = Object.keys(this.answers.server?.endpoint_summaries ?? {}).length > 0;
    const listed = Object.keys(this.history.index).some((tag) => tag.startsWith("server:"));
    const server = served && !listed ? ["server:"] : []; // what they are called there is the server's affair
    const tags = [...phases, ...Object.keys(metrics ?? {}), ...Object.keys(telemetry ?? {}), ...server];
    const unknown = tags.filter((tag) => !Object.hasOwn(this.history.index, tag)).join();
    const now = performance.now();
    if (unknown !== this.unknown) Object.assign(this, { unknown, unknownAt: now });
    const pause = now - this.unknownAt < STATUS_EVERY_MS ? GATHER_EVERY_MS : STATUS_EVERY_MS;
    if (unknown && now - this.indexAt > pause) this.due.add("index");
  }

  /** What is new of every series that is drawn: one request, and one more for what is drawn for the first time. */
  async follow() {
    const { tags, stats } = view(this.snapshot()).wanted;
    const key = (tag) => `${tag}\n${stats.join()}`;
    const fresh = tags.filter((tag) => !this.followed.has(key(tag)));
    const following = tags.filter((tag) => this.followed.has(key(tag)));
    for (const some of [...batches(following), ...batches(fresh)]) await this.fetchSeries(some, stats, key);
  }

  async fetchSeries(tags, stats, key) {
    const { history } = this;
    const since = Math.min(...tags.map((tag) => this.followed.get(key(tag)) ?? 0));
    const points = String(since ? POINTS_FOLLOWED : POINTS);
    const query = new URLSearchParams({ tag: tags.join(","), stat: stats.join(","), points });
    if (since) query.set("since", String(since));
    const answer = await getJSON(`api/history?${query}`).catch((error) => {
      if (error.status !== 404) throw error;
      this.due.add("index"); // the server began anew since the index was read
      return null;
    });
    if (!answer || history !== this.history) return;
    history.add(answer, since);
    const newest = answer.times?.at(-2) ?? since; // the last row is not full yet
    for (const tag of tags) this.followed.set(key(tag), newest);
  }

  /** Events that were heard get the time of the bus, as the newest status has it. */
  stamp() {
    const at = this.busNow();
    for (const event of this.unstamped) this.heard.push({ ...event, at });
    this.unstamped = [];
    if (this.heard.length > HEARD_MAX) this.heard.splice(0, this.heard.length - HEARD_MAX);
  }

  busNow() {
    const { status } = this.answers;
    if (!known(status?.started_ns) || !known(status?.elapsed_sec)) return Date.now();
    return status.started_ns / 1e6 + status.elapsed_sec * 1000;
  }

  // A new run

  isNewRun(status) {
    const before = this.answers.status;
    if (!before) return false;
    if (before.benchmark_id && status.benchmark_id && before.benchmark_id !== status.benchmark_id) return true;
    if (known(status.run) && known(before.run)) {
      if (status.run < before.run) this.resumed = true; // the server was started again, and counts anew
      if (status.run <= before.run) return false;
      const { resumed } = this;
      this.resumed = false;
      return !resumed && before.run > 0;
    }
    const again = known(before.started_ns) && known(status.started_ns) && status.started_ns > before.started_ns + 2e9;
    const back = status.elapsed_sec < before.elapsed_sec - 1 && ["replay", "demo"].includes(status.source?.kind);
    return (
      (again && (before.stale || ENDS.has(before.state))) ||
      back ||
      (ENDS.has(before.state) && ["initializing", "configuring", "ready"].includes(status.state))
    );
  }

  /** A phase that is known has begun anew: so has the run. */
  hasMoved({ phases = {} }) {
    const before = this.answers.progress?.phases ?? {};
    return Object.entries(phases).some(
      ([name, { start_ns: start }]) => start && before[name]?.start_ns && before[name].start_ns !== start,
    );
  }

  newRun(status) {
    const { heard } = this;
    this.clear();
    const began = (status?.started_ns ?? Infinity) / 1e6;
    this.heard = heard.filter(({ kind, at }) => kind === "line" || at >= began);
    this.newRoundAt = Date.now();
    this.due = new Set(ALL);
    this.show("new run");
    this.soon(0, true);
  }
}

const byTag = (rows) => Object.fromEntries((Array.isArray(rows) ? rows : []).map(({ tag, ...row }) => [tag, row]));

/** Tags in lists that fit into a request line: those of many GPUs or server metrics are long. */
function batches(tags) {
  const out = [];
  let length = Infinity;
  for (const tag of tags) {
    length += encodeURIComponent(tag).length + 3;
    if (length > URL_CHARS_MAX) {
      out.push([]);
      length = encodeURIComponent(tag).length + 3;
    }
    out.at(-1).push(tag);
  }
  return out;
}
