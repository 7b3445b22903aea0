// SPDX-License-Identifier: Apache-2.0
// The time series of the run, as the server sampled them: asked for once in full, then followed with `since`.
//
// All charts live from /api/history alone. Its times are the server's, so a page that comes late, reloads, lost the
// line for a minute or watches a recording draws the same picture as one that was there from the start.

import { getJSON } from "./api.js";
import { known } from "./format.js";

const MAX_POINTS = 7200; // as the server: past it every second point goes
const STATS = ["p50", "p90", "p99", "avg", "count", "sum", "current",
  "sent", "completed", "errors", "cancelled", "in_flight"];

/** One statistic of one tag: `t` in seconds since the epoch, `v` beside it. */
class Series {
  constructor() {
    this.t = [];
    this.v = [];
  }

  /** Adds what is newer than the last point; returns whether anything was. */
  add(points) {
    let last = this.t.length ? this.t[this.t.length - 1] : -Infinity;
    const before = this.t.length;
    for (const [ns, value] of points) {
      const t = ns / 1e9;
      if (t <= last || !known(value)) continue;
      this.t.push(t);
      this.v.push(value);
      last = t;
    }
    if (this.t.length > MAX_POINTS) this.thin();
    return this.t.length !== before;
  }

  /** Drops every second point, never the last. */
  thin() {
    const odd = (this.t.length - 1) % 2;
    const keep = (_, index) => index % 2 === odd;
    this.t = this.t.filter(keep);
    this.v = this.v.filter(keep);
  }
}

const NOTHING = { t: [], v: [] };

export class RunHistory {
  constructor() {
    this.wanted = new Set(); // tags somebody draws
    this.onlyStats = new Map(); // server tags: the one or two statistics somebody draws
    this.reset();
  }

  /** Forgets the run, not what is wanted. */
  reset() {
    this.index = {}; // tag -> {unit, header, group, stats}
    // tag -> the newest point, in ns, of the answer that brought it last: an answer is of one moment, so nothing of its
    // tags up to there can be missing, while another answer's newest point says nothing about them
    this.followed = new Map();
    this.series = new Map(); // tag -> stat -> Series
    this.origin = null; // seconds since the epoch at which the run began
    this.last = 0; // the newest point of all, in ns as the server wrote it
    this.generation = (this.generation ?? 0) + 1;
    this.derived = new Map(); // what was computed from the points as they are
  }

  /** `compute()`, once for the points as they are: the same curve is a chart, a sparkline and a figure. */
  once(key, compute) {
    if (!this.derived.has(key)) this.derived.set(key, compute());
    return this.derived.get(key);
  }

  want(tags) {
    for (const tag of tags) this.wanted.add(tag);
  }

  /** What /api/history has. Called at load, at phase changes and when a new tag shows up. */
  async refreshIndex() {
    const generation = this.generation;
    const answer = await getJSON("api/history");
    if (generation !== this.generation) return;
    this.index = answer.tags ?? {};
    if (known(answer.start_ns)) {
      const start = answer.start_ns / 1e9;
      // A server that was restarted mid-run began later than the run.
      this.origin = this.origin === null ? start : Math.min(this.origin, start);
    }
  }

  /** Gets what is new for every wanted tag; returns whether anything was. */
  async poll() {
    const have = [...this.wanted].filter((tag) => Object.hasOwn(this.index, tag));
    const fresh = have.filter((tag) => !this.followed.has(tag));
    const following = have.filter((tag) => this.followed.has(tag));
    let changed = false;
    for (const some of [...batches(following), ...batches(fresh)]) changed = (await this.fetch(some)) || changed;
    return changed;
  }

  async fetch(tags) {
    const since = Math.min(...tags.map((tag) => this.followed.get(tag) ?? 0));
    const generation = this.generation;
    const query = new URLSearchParams();
    for (const tag of tags) query.append("tag", tag);
    query.append("stat", this.statsFor(tags).join(","));
    if (since) query.append("since", String(since));
    const answer = await getJSON(`api/history?${query}`).catch((error) => {
      if (error.status !== 404) throw error;
      this.index = {}; // the server began anew since the index was read: read it again
      return { series: [] };
    });
    if (generation !== this.generation) return false;
    let changed = false;
    // One tag with one statistic comes without the list around it.
    let newest = since;
    for (const one of answer.series ?? [answer]) {
      changed = this.take(one) || changed;
      if (one.points?.length) newest = Math.max(newest, one.points[one.points.length - 1][0]);
    }
    for (const tag of tags) this.followed.set(tag, newest);
    this.last = Math.max(this.last, newest);
    if (changed) this.derived.clear();
    return changed;
  }

  /** The statistics that are drawn; for server metrics whatever they have, since theirs have other names. */
  statsFor(tags) {
    const own = tags.filter((tag) => tag.startsWith("server:")).flatMap((tag) => this.index[tag]?.stats ?? []);
    return [...new Set([...STATS, ...own])];
  }

  take({ tag, stat, points }) {
    if (!points?.length) return false;
    let stats = this.series.get(tag);
    if (!stats) this.series.set(tag, (stats = new Map()));
    let series = stats.get(stat);
    if (!series) stats.set(stat, (series = new Series()));
    return series.add(points);
  }

  get(tag, stat) {
    return this.series.get(tag)?.get(stat) ?? NOTHING;
  }

  /** The whole of a metric's statistic that AIPerf leaves out before 0.7: sum = avg × count. */
  sum(tag) {
    const sum = this.get(tag, "sum");
    if (sum.t.length) return sum;
    return this.once(`sum ${tag}`, () => combine(this.get(tag, "avg"), this.get(tag, "count"), (avg, count) => avg * count));
  }

  /** Δcount/Δt: what was finished per second between two messages. */
  rate(series) {
    return differences(series, (dv, dt) => dv / dt);
  }

  /** Δsum/Δcount: the mean of the requests that finished between two messages; nothing finished, no value. */
  meanNow(tag) {
    return this.once(`mean ${tag}`, () => this.meanOf(this.sum(tag), this.get(tag, "count")));
  }

  meanOf(sum, count) {
    const [t, sums, counts] = join([sum, count]);
    const out = { t: [], v: [] };
    let before = -1;
    for (let i = 0; i < t.length; i++) {
      if (sums[i] === null || counts[i] === null) continue;
      if (before >= 0 && counts[i] >= counts[before]) {
        const done = counts[i] - counts[before];
        out.t.push(t[i]);
        out.v.push(done > 0 ? (sums[i] - sums[before]) / done : null);
      }
      before = i;
    }
    return out;
  }

  /** The phases that have points, in the order they began: [{name, start}], in seconds since the epoch. */
  phases() {
    const out = [];
    for (const [tag, stats] of this.series) {
      const [start] = tag.startsWith("phase:") ? (stats.get("sent") ?? NOTHING).t : [];
      if (start !== undefined) out.push({ name: tag.slice(6), start });
    }
    return out.sort((a, b) => a.start - b.start);
  }

  /** A count of the phases over the whole run: each from its start to the start of the next. */
  ofPhases(stat, of = (series) => series) {
    const all = this.phases();
    const out = { t: [], v: [] };
    all.forEach(({ name }, at) => {
      const until = all[at + 1]?.start ?? Infinity;
      const { t, v } = of(this.get(`phase:${name}`, stat));
      for (let i = 0; i < t.length && t[i] < until; i++) {
        out.t.push(t[i]);
        out.v.push(v[i]);
      }
    });
    return out;
  }
}

/** Tags in lists that fit into a request line: those of many GPUs, or of server metrics with their labels, are long. */
function batches(tags) {
  const out = [];
  let length = Infinity;
  for (const tag of tags) {
    length += encodeURIComponent(tag).length + 5;
    if (length > 2500) {
      out.push([]);
      length = encodeURIComponent(tag).length + 5;
    }
    out[out.length - 1].push(tag);
  }
  return out;
}

/** Point-wise differences; a value that falls (a new phase counts from zero) begins anew. */
function differences({ t, v }, of) {
  const out = { t: [], v: [] };
  for (let i = 1; i < t.length; i++) {
    if (v[i] < v[i - 1]) continue;
    out.t.push(t[i]);
    out.v.push(of(v[i] - v[i - 1], t[i] - t[i - 1]));
  }
  return out;
}

function combine(a, b, of) {
  const [t, va, vb] = join([a, b]);
  const out = { t: [], v: [] };
  t.forEach((at, i) => {
    if (va[i] === null || vb[i] === null) return;
    out.t.push(at);
    out.v.push(of(va[i], vb[i]));
  });
  return out;
}

/** Several series over one time column; null where a series has no point. */
export function join(all) {
  const longest = all.reduce((best, one) => (one.t.length > best.t.length ? one : best), NOTHING);
  const n = longest.t.length;
  if (all.every(({ t }) => t.length === n && t[0] === longest.t[0] && t[n - 1] === longest.t[n - 1])) {
    return [longest.t, ...all.map(({ v }) => v)];
  }
  const times = Float64Array.from(new Set(all.flatMap(({ t }) => t))).sort();
  const columns = all.map(({ t, v }) => {
    const column = new Array(times.length).fill(null);
    for (let i = 0, at = 0; i < t.length; i++) {
      while (times[at] < t[i]) at++;
      column[at] = v[i];
    }
    return column;
  });
  return [times, ...columns];
}

/** The last value of a series. */
export function latest({ v }) {
  for (let i = v.length - 1; i >= 0; i--) if (v[i] !== null) return v[i];
  return null;
}
