// SPDX-License-Identifier: Apache-2.0
// Time series of a run as the server sampled them, and what follows from them. Pure: no network, no document.
//
// A series is {t, v}: seconds since the epoch of the bus, and values beside them. A null value is a gap that is meant.

import { known } from "./format.js";

const POINTS_MAX = 7200; // as the server's: past it every second point goes
const NOW_SEC = 10; // what "now" covers, when messages come more often than that
export const RATE_LEAST_SEC = 0.2; // over less than that a rate says nothing
const NOTHING = { t: [], v: [] };

/** All series of one run, put together from answers of /api/history. */
export class History {
  constructor() {
    this.index = {}; // tag -> {unit, header, group, stats}
    this.series = new Map(); // "tag\nstat" -> {t, v}
    this.origin = null; // seconds since the epoch at which the run began
    this.last = 0; // the newest point of all, in ns as the server wrote it
    this.derived = new Map();
  }

  /** What there is: the answer of /api/history without a tag. */
  setIndex(answer) {
    this.index = answer.tags ?? {};
    const start = known(answer.start_ns) ? answer.start_ns / 1e9 : null;
    // A server that was restarted in the middle began later than the run.
    if (start !== null) this.origin = this.origin === null ? start : Math.min(this.origin, start);
  }

  /**
   * Adds an answer: one time axis, a column of values for each series. What is known of later than `since` (in ns;
   * else of the answer's time) goes: the server's newest row moves on until it is full.
   */
  add(answer, since = 0) {
    const times = answer?.times ?? [];
    if (!times.length) return;
    const from = since ? since / 1e9 + 1e-6 : times[0] / 1e9 - 1e-6; // a double of today has a grain of 0.24 µs
    let changed = false;
    for (const { tag, stat, unit, header, values } of answer.series ?? []) {
      const key = `${tag}\n${stat}`;
      const series = this.series.get(key) ?? { t: [], v: [] };
      series.t.length = series.v.length = firstAfter(series.t, from);
      const before = series.t.at(-1) ?? -Infinity;
      values.forEach((value, at) => {
        const t = times[at] / 1e9;
        if (t <= before || !known(value)) return;
        series.t.push(t);
        series.v.push(value);
        changed = true;
      });
      if (series.t.length > POINTS_MAX) thin(series);
      this.series.set(key, series);
      this.index[tag] ??= { unit, header, group: groupOf(tag), stats: [] };
      if (!this.index[tag].stats.includes(stat)) this.index[tag].stats.push(stat);
    }
    this.last = Math.max(this.last, times.at(-1));
    if (changed) this.derived.clear();
  }

  get(tag, stat) {
    return this.series.get(`${tag}\n${stat}`) ?? NOTHING;
  }

  /** `compute()`, once for the points as they are: the same curve is a chart, a sparkline and a figure. */
  once(key, compute) {
    if (!this.derived.has(key)) this.derived.set(key, compute());
    return this.derived.get(key);
  }

  /** Count, sum and sum of squares of a metric over time, [{t, n, sum, square}]: what AIPerf's figures add up to. */
  moments(tag) {
    return this.once(`moments ${tag}`, () => {
      const [t, counts, sums, means, deviations] = join(
        ["count", "sum", "avg", "std"].map((stat) => this.get(tag, stat)),
      );
      const out = [];
      t.forEach((at, i) => {
        const n = counts[i];
        const mean = known(means[i]) ? means[i] : sums[i] / n;
        const sum = known(sums[i]) ? sums[i] : mean * n; // versions before 0.7 leave the sum out
        if (!known(n) || !known(sum)) return;
        const square = known(deviations[i]) ? n * (deviations[i] ** 2 + mean ** 2) : null;
        out.push({ t: at, n, sum, square });
      });
      return out;
    });
  }

  /** The phases that have points, in the order they began: [{name, start}]. */
  phases() {
    return this.once("phases", () => {
      const out = [];
      for (const [key, { t }] of this.series) {
        const [tag, stat] = key.split("\n");
        if (tag.startsWith("phase:") && stat === "sent" && t.length) out.push({ name: tag.slice(6), start: t[0] });
      }
      return out.sort((a, b) => a.start - b.start);
    });
  }
}

function groupOf(tag) {
  if (tag.startsWith("phase:")) return "phases";
  if (tag.startsWith("server:")) return "server";
  return /_(gpu\d|GPU-|MIG-)/.test(tag) ? "telemetry" : "metrics";
}

/** Drops every second point, never the last. */
function thin(series) {
  const odd = (series.t.length - 1) % 2;
  const keep = (_, index) => index % 2 === odd;
  series.t = series.t.filter(keep);
  series.v = series.v.filter(keep);
}

/**
 * Mean and deviation of what was measured in the last `span` seconds before each point: exact, from the differences of
 * count, sum and sum of squares. Where points are further apart than that, since the point before.
 * [{t, n, mean, std, sum, sec}]
 */
export function windows(moments, begin, span = NOW_SEC) {
  const first = moments[0];
  const zero = first && begin < first.t ? [{ t: begin, n: 0, sum: 0, square: 0 }] : [];
  const all = [...zero, ...moments];
  const out = [];
  let from = 0;
  for (let i = 1; i < all.length; i++) {
    if (all[i].n < all[i - 1].n) from = i; // counted from zero again
    while (from < i - 1 && all[i].t - all[from + 1].t >= span - 0.5) from++;
    if (from === i) continue;
    const n = all[i].n - all[from].n;
    const sec = all[i].t - all[from].t;
    if (n <= 0) {
      out.push({ t: all[i].t, n: 0, mean: null, std: null, sum: 0, sec });
      continue;
    }
    const sum = all[i].sum - all[from].sum;
    const mean = sum / n;
    const [high, low] = [all[i].square, all[from].square];
    const std = known(high) && known(low) ? Math.sqrt(Math.max(0, (high - low) / n - mean ** 2)) : null;
    out.push({ t: all[i].t, n, mean, std, sum, sec });
  }
  return out;
}

/** Δvalue/Δt over the last `span` seconds before each point of a count that was zero at `begin`. */
export function rates({ t, v }, begin, span = NOW_SEC) {
  return windows(
    t.map((at, i) => ({ t: at, n: v[i], sum: 0, square: null })), begin, span,
  ).map(({ t: at, n, sec }) => ({ t: at, value: sec > RATE_LEAST_SEC ? n / sec : null, n, sec }));
}

/** Several series over one time column; `undefined` where a series has no point (uPlot draws over it). */
export function join(all) {
  const longest = all.reduce((best, one) => (one.t.length > best.t.length ? one : best), NOTHING);
  const n = longest.t.length;
  if (all.every(({ t }) => t.length === n && t[0] === longest.t[0] && t[n - 1] === longest.t[n - 1])) {
    return [longest.t, ...all.map(({ v }) => v)];
  }
  const times = Float64Array.from(new Set(all.flatMap(({ t }) => Array.from(t)))).sort();
  const columns = all.map(({ t, v }) => {
    const column = new Array(times.length).fill(undefined);
    for (let i = 0, at = 0; i < t.length; i++) {
      while (times[at] < t[i]) at++;
      column[at] = v[i];
    }
    return column;
  });
  return [Array.from(times), ...columns];
}

/**
 * The same, made to fit: when the range holds more points than `bins`, each bin's mean, with its smallest and largest
 * value beside it. {t, columns: [[…]…], low, high: null or [[…]…]}
 */
export function fitted(all, from, to, bins) {
  const inside = Math.max(0, ...all.map(({ t }) => firstAfter(t, to) - firstAfter(t, from)));
  if (inside <= bins) {
    const [t, ...columns] = join(all);
    return { t, columns, low: null, high: null };
  }
  const width = (to - from) / bins;
  const t = Array.from({ length: bins }, (_, at) => from + (at + 0.5) * width);
  const empty = () => all.map(() => new Array(bins).fill(undefined));
  const [columns, low, high] = [empty(), empty(), empty()];
  all.forEach((series, at) => {
    const counts = new Uint32Array(bins);
    const end = Math.min(series.t.length, firstAfter(series.t, to));
    for (let i = firstAfter(series.t, from); i < end; i++) {
      const bin = Math.min(bins - 1, Math.floor((series.t[i] - from) / width));
      const value = series.v[i];
      if (!known(value)) {
        if (columns[at][bin] === undefined) columns[at][bin] = null;
        continue;
      }
      const before = counts[bin] ? columns[at][bin] : 0;
      columns[at][bin] = before + (value - before) / ++counts[bin];
      low[at][bin] = Math.min(low[at][bin] ?? value, value);
      high[at][bin] = Math.max(high[at][bin] ?? value, value);
    }
  });
  return { t, columns, low, high };
}

/** The place of the first time later than or at `at`. */
export function firstAfter(t, at) {
  let [low, high] = [0, t.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (t[middle] < at) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The last value of a series. */
export function latest({ v }) {
  for (let i = v.length - 1; i >= 0; i--) if (known(v[i])) return v[i];
  return null;
}

/** The share of time, 0 to 1, in which `bad(value)` holds: each value stands since the one before. */
export function shareOfTime({ t, v }, bad) {
  let [all, some] = [0, 0];
  for (let i = 1; i < t.length; i++) {
    if (!known(v[i])) continue;
    all += t[i] - t[i - 1];
    if (bad(v[i])) some += t[i] - t[i - 1];
  }
  return all > 0 ? some / all : null;
}
