// SPDX-License-Identifier: Apache-2.0
// Service levels: "time_to_first_token p99 < 200 ms", typed, in the address, or the run's own goodput.

import { known, number, unitLabel } from "./format.js";

const SHORT = {
  ttft: "time_to_first_token", itl: "inter_token_latency", tpot: "inter_token_latency", latency: "request_latency",
  e2e: "request_latency", tps: "output_token_throughput", rps: "request_throughput", errors: "request_error_rate",
};
const MS = { us: 0.001, µs: 0.001, ms: 1, s: 1000, sec: 1000, min: 60_000 };
const LEVEL =
  /^\s*([\w -]+?)\s*(?:\b(avg|mean|min|max|p\d{1,2}))?\s*(<=|>=|<|>|≤|≥)\s*(\d+(?:\.\d+)?)\s*([^\s\d]\S*)?\s*$/i;
const STATS = new Set(["avg", "min", "max", "p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99"]);
const AVERAGED = new Set(["output_token_throughput", "request_throughput", "request_error_rate", "goodput"]);

/** {tag, stat, larger, limit, unit, text} of a line as people write it, or {problem}. */
export function parseLevel(text) {
  const found = LEVEL.exec(text);
  if (!found) return { problem: "Write it as: time_to_first_token p99 < 200 ms" };
  const name = found[1].trim().toLowerCase().replace(/[ -]+/g, "_");
  const tag = SHORT[name] ?? name;
  const stat = (found[2] ?? (AVERAGED.has(tag) ? "avg" : "p99")).toLowerCase().replace("mean", "avg");
  if (!STATS.has(stat)) return { problem: `There is no ${stat}; AIPerf gives avg, min, max, p1 to p99.` };
  const larger = found[3].startsWith(">") || found[3] === "≥";
  const unit = found[5] ?? "";
  const factor = MS[unit.toLowerCase()];
  return levelOf(tag, stat, larger, Number(found[4]) * (factor ?? 1), factor ? "ms" : unit);
}

function levelOf(tag, stat, larger, limit, unit, own = false) {
  const text = `${tag} ${stat} ${larger ? ">" : "<"} ${+limit.toPrecision(12)}${unit ? ` ${unit}` : ""}`;
  return { tag, stat, larger, limit, unit, own, text };
}

/** The thresholds that the run itself was given for its goodput. They hold for each request. */
export function goodputLevels(config) {
  const given = find(config, "goodput") ?? find(config, "slos");
  const pairs =
    typeof given === "string"
      ? given
          .trim()
          .split(/[\s,]+/)
          .map((pair) => pair.split(/[:=]/))
      : Array.isArray(given)
        ? given.flatMap((one) => (typeof one === "string" ? [one.split(/[:=]/)] : Object.entries(one)))
        : Object.entries(given ?? {});
  return pairs
    .map(([tag, value]) => [tag, Number(value?.threshold ?? value)])
    .filter(([tag, limit]) => tag && Number.isFinite(limit))
    .map(([tag, limit]) => {
      const larger = /throughput/.test(tag);
      return {
        ...levelOf(tag, "avg", larger, limit, larger ? "" : "ms", true), stat: "each",
        text: `${tag} ${larger ? ">" : "<"} ${limit}${larger ? "" : " ms"} (each request)`,
      };
    });
}

function find(value, key, depth = 0) {
  if (!value || typeof value !== "object" || depth > 6) return undefined;
  if (value[key] !== undefined && value[key] !== null) return value[key];
  for (const inner of Object.values(value)) {
    const found = find(inner, key, depth + 1);
    if (found !== undefined) return found;
  }
  return undefined;
}

/** Whether a value keeps the level. */
export const keeps = ({ larger, limit }, value) => (larger ? value >= limit : value < limit);

export const levelWords = ({ stat, larger, limit, unit }) =>
  `${stat === "each" ? "each" : stat} ${larger ? "≥" : "<"} ${number(limit)}${unit ? ` ${unitLabel(unit)}` : ""}`;

/** Met, violated or not measured: {tone, words}. `share` is the part of the time (0 to 1) in which it was violated. */
export function judged(level, value, share, goodFraction) {
  const time = known(share) ? `violated ${percentOf(share)} of the time` : "";
  if (level.stat === "each") {
    if (known(goodFraction)) {
      const words = `${percentOf(goodFraction)} of the requests kept all thresholds`;
      return { tone: goodFraction >= 0.99 ? "good" : "bad", words };
    }
    return { tone: "", words: time || "not measured yet" };
  }
  if (!known(value)) return { tone: "", words: "not measured" };
  const met = keeps(level, value);
  const figure = `${level.stat} ${number(value)}${level.unit ? ` ${unitLabel(level.unit)}` : ""}`;
  return {
    tone: met ? "good" : "bad", words: [`${met ? "met" : "not met"}: ${figure}`, time].filter(Boolean).join(", "),
  };
}

function percentOf(share) {
  const value = 100 * share;
  return value > 0 && value < 0.1 ? "< 0.1 %" : value < 100 && value > 99.9 ? "> 99.9 %" : `${+value.toFixed(1)} %`;
}
