// SPDX-License-Identifier: Apache-2.0
// The event log, in the bus's own time: what the answers date, and what a page that was open heard besides. Pure.

import { count, known, spoken } from "./format.js";
import { entryOf, errorText, phaseTitle } from "./situation.js";

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
  for (const spell of slowSpells(s)) out.push(spell);
  return out;
}

/** Spells of errors in the history: what went wrong when, for who looks later. */
function slowSpells(s) {
  const out = [];
  for (const { name } of s.phases) {
    const { t, v } = s.history.get(`phase:${name}`, "errors");
    let from = null;
    for (let i = 1; i < t.length; i++) {
      const failing = v[i] > v[i - 1];
      if (failing && from === null) from = i - 1;
      const over =
        from !== null && !failing && (t[i] - t[i - 1] > 30 || !v.slice(i, i + 5).some((value) => value > v[i - 1]));
      if (from === null || !(over || i === t.length - 1)) continue;
      const last = failing ? i : i - 1;
      const n = v[last] - v[from];
      if (n >= 5) {
        out.push({
          key: `errors ${name} ${t[from]}`, at: t[from + 1] * 1000, kind: "error", what: "errors",
          text: `${count(n)} requests failed within ${spoken(Math.max(1, t[last] - t[from]))}`,
        });
      }
      from = null;
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
