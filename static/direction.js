// SPDX-License-Identifier: Apache-2.0
// Which way is better, as AIPerf's own metric registry has it. The one list: cards, tables, comparisons ask here.

const LARGER = new Set(
  `
  amd_goodput_per_watt amd_output_tokens_per_joule amd_output_tps_per_watt amd_performance_per_watt
  e2e_output_token_throughput error_isl good_request_fraction input_sequence_length input_token_throughput
  nvidia_goodput_per_watt nvidia_output_tokens_per_joule nvidia_output_tps_per_watt nvidia_performance_per_watt
  output_sequence_length output_token_count output_token_throughput output_token_throughput_per_user
  overall_usage_prompt_cache_read_pct prefill_throughput_per_user reasoning_token_count request_count
  request_throughput rtfx spec_decode_acceptance_length spec_decode_accepted_per_verified
  spec_decode_draft_acceptance_rate spec_decode_overall_draft_acceptance_rate
  spec_decode_token_weighted_acceptance_length total_error_isl total_isl total_osl total_output_tokens
  total_reasoning_tokens total_token_throughput total_usage_accepted_prediction_tokens
  total_usage_completion_audio_tokens total_usage_completion_tokens total_usage_prompt_audio_seconds
  total_usage_prompt_audio_tokens total_usage_prompt_cache_read_tokens total_usage_prompt_tokens
  total_usage_reasoning_tokens total_usage_total_tokens usage_accepted_prediction_tokens
  usage_completion_audio_tokens usage_completion_tokens usage_prompt_audio_seconds usage_prompt_audio_tokens
  usage_prompt_cache_read_tokens usage_prompt_tokens usage_reasoning_tokens usage_total_tokens
`
    .trim()
    .split(/\s+/),
);
const TIMES = ["ms", "sec", "s", "us", "ns"];
const FAILURE = /(^|_)(error|errors|overflow|preemptions|discrepancy)(_|$)/;

/** "larger" as AIPerf flags it; "smaller" for times and failures, which are never flagged; "" where it is taste. */
export function better(tag, unit) {
  if (LARGER.has(tag) || tag.endsWith("goodput")) return "larger";
  const smaller = TIMES.includes(unit) && !tag.includes("duration");
  return smaller || FAILURE.test(tag) ? "smaller" : "";
}

/** "better", "worse" or "" for a change (0.1 is 10 % more); what is less than half a percent is neither. */
export function verdict(tag, unit, change) {
  const way = better(tag, unit);
  if (!way || Math.abs(change) < 0.005) return "";
  return change > 0 === (way === "larger") ? "better" : "worse";
}
