// SPDX-License-Identifier: Apache-2.0
// The event log, in the bus's own time: what the answers date, and what a page that was open heard besides. Pure.

import { count, known, spoken } from "./format.js";
import { entryOf, errorText, phaseTitle } from "./situation.js";

const SPELL_GAP_SEC = 30;
const SPELL_LEAST = 5;

/** All events, newest first: [{key, at, kind, what, text}], `at` in ms of the bus. */
export function eventsOf(s) {
  const all = [...dated(s), ...(s.run.heard ?? [])];
  const seen = new Set();
  return all
    .filter(({ key, at }) => known(at) && (key === undefined || (!seen.has(key) && seen.add(key))))
    .sort((a, b) => b.at - a.at);
}

/** What is known with its time whenever the page was opened. */
function dated(s) {
  const { status, run } = s;
  const out = [];
  const say = (key, at, kind, what, text) => {
    if (at) out.push({ key, at: at * 1000, kind, what, text });
  };
  const began = s.history.origin;
  if (began && (s.phases.length === 0 || began < s.zero - 0.5))
    say("began", began, "state", "run", "first message of the run");
  for (const phase of s.phases) {
    const goal = phase.total
      ? `: ${count(phase.total)} requests`
      : phase.duration
        ? `: ${spoken(phase.duration)}`
        : "";
    say(`phase ${phase.name}`, phase.start, "phase", "phase", `${phaseTitle(phase.name)} started${goal}`);
    const failed = phase.errors ? `, ${count(phase.errors)} failed` : "";
    say(
      `phase ${phase.name} end`, phase.end, "phase", "phase",
      `${phaseTitle(phase.name)} over: ${count(phase.completed)} requests${failed}`,
    );
  }
  const entry = entryOf(run);
  const end = known(entry?.ended_ns) ? entry.ended_ns / 1e9 : s.ended ? Math.max(s.busNow ?? 0, s.end ?? 0) : 0;
  if (s.ended) {
    const why = status.error ? `: ${errorText(status.error)}` : "";
    say(`end ${s.state}`, end, s.state === "failed" ? "error" : "state", "state", s.state + why);
  }
  if (s.stale) say("stale", s.heardAt, "error", "silence", "the last message before the silence");
  for (const spell of errorSpells(s)) out.push(spell);
  return out;
}

/** Spells in which more than twice as many failed as usual in the phase: what went wrong when, for who looks later. */
function errorSpells(s) {
  const out = [];
  for (const { name } of s.phases) {
    const { t, v } = s.history.get(`phase:${name}`, "errors");
    const done = s.history.get(`phase:${name}`, "completed").v;
    const share = Math.min(0.5, (2 * v.at(-1)) / done.at(-1));
    let [from, last, sum, most] = [0, 0, 0, 0]; // failures above that share, summed from where there were none
    for (let i = 1; i < t.length; i++) {
      sum += v[i] - v[i - 1] - share * (done[i] - done[i - 1]);
      if (sum > most) [most, last] = [sum, i];
      if (sum > 0 && t[i] - t[last] < SPELL_GAP_SEC && i < t.length - 1) continue;
      if (most >= SPELL_LEAST) {
        out.push({
          key: `errors ${name} ${t[from]}`, at: t[from + 1] * 1000, kind: "error", what: "errors",
          text: `${count(v[last] - v[from])} requests failed within ${spoken(Math.max(1, t[last] - t[from]))}`,
        });
      }
      [from, last, sum, most] = [i, i, 0, 0];
    }
  }
  return out;
}

/** What to write of a bus message that the page heard, or null: {kind, what, text, key}. */
export function eventOf(type, message) {
  const said = (kind, what, text, key = `${type} ${text}`) => ({ kind, what, text, key });
  switch (type) {
    case "system_state_changed":
      return said("state", "state", String(message.state));
    case "dataset_configuration_failed":
      return said("error", "data set", errorText(message.error ?? message));
    case "service_error":
      return said("error", "error", errorText(message.error ?? message), `error ${JSON.stringify(message.error)}`);
    case "command_response":
      return message.status === "failure" ? said("error", "command", errorText(message.error)) : null;
    case "command":
      return said("state", "command", String(message.command), `command ${message.command_id ?? message.command}`);
    case "benchmark_complete":
      return said("state", "run", message.was_cancelled ? "benchmark complete, cancelled" : "benchmark complete");
    case "results_exported":
    case "credits_complete":
    case "all_records_received":
      return said("state", "run", type.replaceAll("_", " "));
    default:
      return null;
  }
}
