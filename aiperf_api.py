#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Everything worth knowing about a running AIPerf benchmark, on one port.

AIPerf is many processes that talk over a ZMQ event bus.  This one file listens to that bus and serves

    /            what there is, with lines to copy         /dashboard   the run, live
    /metrics     Prometheus text                           /api/...     JSON
    /ws          the bus as a WebSocket                    /api/stream  the bus for `curl -N`

Three commands to try:

    python3 aiperf_api.py --api-port 9090 --demo
    python3 aiperf_api.py --api-port 9090 --zmq-host 127.0.0.1
    python3 aiperf_api.py --api-port 9090 -- aiperf profile --model ... --url ... --streaming

What it deliberately does not do: HTTP/2, request bodies, Range requests, permessage-deflate, writing to the bus
that it watches.

The rooms, in order (`grep -n '^# ==' aiperf_api.py`); a name is used in its own room or further down, never above:

     0  Head                       6  Router                    12  Hub
     1  Constants and limits       7  Static files              13  Connection
     2  Errors                     8  Metric catalogue          14  Endpoints and service
     3  JSON                       9  Prometheus text           15  Command line
     4  WebSocket codec           10  Benchmark state
     5  HTTP messages             11  Sources

Rooms 3 to 10 are pure: bytes and values in, bytes and values out; no loop, no socket, no clock.
"""

from __future__ import annotations

import enum
import json
import math
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Callable, NamedTuple, Optional

try:
    import orjson
except ImportError:  # room 3 does the same with the standard library
    orjson = None  # type: ignore[assignment]

try:
    import zmq
except ImportError:  # room 11 has a subscriber of its own
    zmq = None  # type: ignore[assignment]

__version__ = "1.0.0"
__all__ = ["APIService", "__version__", "main"]


# == 1 == Constants and limits =========================================================================================


# == 2 == Errors =======================================================================================================
#
#   AIPerfAPIError            everything this module raises on purpose
#   ├── UsageError            the command line or an argument of APIService is wrong      exit code 2
#   ├── StartError            the machine says no: port in use, file unreadable           exit code 1
#   ├── JSONError             bytes that are not JSON
#   ├── BusMessageError       a bus message that cannot be used                           counted, logged once a kind
#   ├── HTTPError             carries the HTTP status of its answer
#   └── WebSocketError        carries the close code of its answer


class AIPerfAPIError(Exception):
    """Base of all errors that this module raises on purpose."""


class UsageError(AIPerfAPIError):
    """The caller asked for something that cannot be; the message is for the user, the exit code is 2."""


class StartError(AIPerfAPIError):
    """The machine cannot do it (a port in use, a file that cannot be read); the exit code is 1."""


class JSONError(AIPerfAPIError):
    """Bytes that are not one JSON document in UTF-8."""


class BusMessageError(AIPerfAPIError):
    """A bus message that cannot be used.

    Args:
        kind: a short, fixed word for the counters and for logging each kind once (`not_json`, `too_large`, ...).
        message: what was wrong, in one line.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class HTTPError(AIPerfAPIError):
    """A request that gets an error answer.

    Args:
        status: the HTTP status code of the answer.
        message: the text of `{"error": ...}`; safe to show to the client.
        headers: further response headers, such as ("Allow", "GET, HEAD").
        close: whether the connection must end after the answer (RFC 9112 section 9.6): true for every fault of
            framing, because what follows the fault cannot be told apart from a body.
    """

    def __init__(
        self, status: int, message: str, headers: tuple[tuple[str, str], ...] = (), *, close: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers
        self.close = close


class WebSocketError(AIPerfAPIError):
    """A violation of RFC 6455 by the peer; `close_code` is what it is told (section 7.4.1)."""

    def __init__(self, close_code: int, reason: str) -> None:
        super().__init__(reason)
        self.close_code = close_code
        self.reason = reason


# == 3 == JSON =========================================================================================================
#
# One contract over orjson (fast, may be missing) and json (always there):
#
#   reading   UTF-8 bytes, RFC 8259 only: no NaN or Infinity, no number that overflows a double, no lone surrogate, no
#             byte order mark.  Integers beyond 64 bits become floats, as orjson has it.
#   writing   compact UTF-8 bytes; NaN and infinities are null; keys may be str, int, float, bool or None; integers of
#             any size keep their digits; lone surrogates become U+FFFD.

JSONValue = Any  # str | int | float | bool | None | list | dict, nested

_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _read_int(digits: str) -> int | float:
    """An integer of a JSON text: exact within 64 bits, else the nearest double, as orjson reads it."""
    if len(digits) <= 18:  # always within 64 bits
        return int(digits)
    number = int(digits) if len(digits) <= 20 else float(digits)
    return number if _INT64_MIN <= number <= _UINT64_MAX and isinstance(number, int) else _read_float(digits)


def _read_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"number out of range: {digits[:40]}")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")  # RFC 8259 section 6


_READER = json.JSONDecoder(parse_int=_read_int, parse_float=_read_float, parse_constant=_refuse_constant)


def _load_with_json(data: bytes) -> JSONValue:
    """What `orjson.loads` does, with the standard library alone."""
    text = data.decode("utf-8")
    value = _READER.decode(text)
    if "\\u" in text or "\\U" in text:  # only an escape can smuggle in a lone surrogate: UTF-8 itself has none
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _load_with_orjson(data: bytes) -> JSONValue:
    return orjson.loads(data)


def _dump_with_json(value: JSONValue, pretty: bool) -> bytes:
    """What `orjson.dumps` does, with the standard library alone, and what it refuses: huge integers, lone surrogates."""
    separators = (",", ": ") if pretty else (",", ":")
    indent = 2 if pretty else None
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators, indent=indent)
        return text.encode("utf-8")
    except ValueError:  # a NaN, an infinity, or (UnicodeEncodeError) a lone surrogate: rare, so cleaned only then
        text = json.dumps(_clean(value), ensure_ascii=False, allow_nan=False, separators=separators, indent=indent)
        return text.encode("utf-8")


def _dump_with_orjson(value: JSONValue, pretty: bool) -> bytes:
    try:
        return orjson.dumps(value, option=_ORJSON_PRETTY if pretty else _ORJSON_COMPACT)
    except TypeError:  # integers beyond 64 bits, lone surrogates, nesting over 254: json knows how
        return _dump_with_json(value, pretty)


def _clean(value: JSONValue) -> JSONValue:
    """A copy in which NaN and infinities are None and lone surrogates are U+FFFD, keys included."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _LONE_SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value


if orjson is not None:
    _ORJSON_COMPACT = orjson.OPT_NON_STR_KEYS
    _ORJSON_PRETTY = orjson.OPT_NON_STR_KEYS | orjson.OPT_INDENT_2
    _load, _dump = _load_with_orjson, _dump_with_orjson
else:
    _load, _dump = _load_with_json, _dump_with_json


def json_load(data: bytes) -> JSONValue:
    """The value of one JSON text.

    Raises:
        JSONError: the bytes are not UTF-8, not JSON, or nested too deep to read.
    """
    try:
        return _load(data)
    except (ValueError, RecursionError) as error:  # both decoders' errors are ValueErrors, UnicodeDecodeError too
        raise JSONError(str(error) or type(error).__name__) from None


def json_bytes(value: JSONValue, *, pretty: bool = False) -> bytes:
    """The JSON text of a value, in UTF-8: one line, or indented by two for people who read it in a terminal.

    Raises:
        TypeError: the value holds something that JSON has no form for.
    """
    return _dump(value, pretty)


# -- Secrets: what must never leave this process -----------------------------------------------------------------------
#
# Every bus message, configuration and log line passes here at the door, so that nothing further down (state, hub,
# recorder, answers) ever sees a credential.  Two nets: by key, wherever an object has a key that names a credential; by
# value, for the literal secrets that are known (from the child's command line, or met under such a key before).

REDACTED = "***"
_SECRET_LENGTH_MIN = 6  # characters: a shorter literal would hit innocent text all over a message
_CREDENTIAL_KEY = re.compile(  # of a key in snake_case: api_key, x_api_key, hf_token, aws_secret_access_key, ...
    r"(?:.*_)?(?:api_?keys?|access_key|private_key|secret_key|authorization|auth|bearer|token|password|passwd|cookie"
    r"|secrets?|credentials?)"
)
_HEADERS_KEY = re.compile(r"(?:.*_)?headers")
_CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Ends of such keys, lower-cased: a payload with none of them, and without an escape that could hide one, needs no parsing.
_CREDENTIAL_HINTS = tuple(
    hint.encode() + b'"'
    for hint in ("key", "keys", "authorization", "auth", "bearer", "token", "password", "passwd", "cookie", "secret")
    + ("secrets", "credential", "credentials", "headers")
) + (b"bearer ", b"\\u00")
_URL_USERINFO = re.compile(r'(://)[^/\s"@]+@')  # RFC 3986 section 3.2.1
_BEARER_VALUE = re.compile(r"(bearer +)[\w.~+/=-]+", re.IGNORECASE)  # RFC 6750 section 2.1


def is_credential_key(key: str) -> bool:
    """Whether a value under this key is a secret, whatever the spelling: api_key, apiKey, X-API-Key, HF_TOKEN."""
    snake = _CAMEL_HUMP.sub("_", key).lower().replace("-", "_").replace(".", "_").replace(" ", "_")
    return _CREDENTIAL_KEY.fullmatch(snake) is not None


def _is_headers_key(key: str) -> bool:
    return _HEADERS_KEY.fullmatch(_CAMEL_HUMP.sub("_", key).lower().replace("-", "_")) is not None


def redact(value: JSONValue, found: set[str] | None = None) -> JSONValue:
    """A copy of a JSON value with `***` for every credential; equal to the original where there is none.

    Args:
        value: any JSON value.
        found: takes the secrets that were met, so that they can be scrubbed where they stand without their key.
    """
    if isinstance(value, dict):
        return {key: _redact_member(str(key), item, found) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, found) for item in value]
    return value


def _redact_member(key: str, value: JSONValue, found: set[str] | None) -> JSONValue:
    if is_credential_key(key):
        return _hide(value, found)
    if _is_headers_key(key) and isinstance(value, (dict, list, tuple)):
        return _redact_headers(value, found)
    return redact(value, found)


def _hide(value: JSONValue, found: set[str] | None) -> JSONValue:
    """`***` for every string and number below; null, true and false tell nothing and stay, as do empty strings."""
    if isinstance(value, dict):
        return {key: _hide(item, found) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hide(item, found) for item in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if found is not None and isinstance(value, str) and value != REDACTED:
        found.add(value)
    return REDACTED


def _redact_headers(headers: JSONValue, found: set[str] | None) -> JSONValue:
    """Header values hidden, names kept: {"Name": "value"}, [["Name", "value"], ...] or ["Name: value", ...]."""
    if isinstance(headers, dict):
        return {name: _hide(value, found) for name, value in headers.items()}
    return [_redact_header(header, found) for header in headers]


def _redact_header(header: JSONValue, found: set[str] | None) -> JSONValue:
    if isinstance(header, (list, tuple)) and header:
        return [header[0], *(_hide(value, found) for value in header[1:])]
    if isinstance(header, str) and ":" in header:
        name, _, value = header.partition(":")
        return name + ": " + str(_hide(value.strip(), found))
    return _hide(header, found)


def scrub_text(text: str, secrets: Iterable[str] = ()) -> str:
    """A text without the known secrets, without user information in URLs, and without bearer tokens."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return _BEARER_VALUE.sub(r"\1***", _URL_USERINFO.sub(r"\1***@", text))


def _scrub_strings(value: JSONValue, secrets: Sequence[str]) -> JSONValue:
    """A copy in which every string, keys included, is scrubbed by value; numbers are never touched."""
    if isinstance(value, str):
        return scrub_text(value, secrets)
    if isinstance(value, dict):
        return {scrub_text(str(key), secrets): _scrub_strings(item, secrets) for key, item in value.items()}
    if isinstance(value, list):
        return [_scrub_strings(item, secrets) for item in value]
    return value


def secret_forms(secrets: Iterable[str]) -> tuple[str, ...]:
    """The literals to look for: a secret as it is, and what stands behind its scheme (`Bearer sk-...`), longest first."""
    forms = {form for secret in secrets for form in (secret, secret.rpartition(" ")[2])}
    return tuple(
        sorted((form for form in forms if len(form) >= _SECRET_LENGTH_MIN), key=lambda form: (-len(form), form))
    )


def _may_hold_secret(payload: bytes, secrets: Sequence[str]) -> bool:
    lowered = payload.lower()
    return (
        any(hint in lowered for hint in _CREDENTIAL_HINTS)
        or (b"@" in payload and b"://" in payload)
        or any(json.dumps(secret)[1:-1].lower().encode() in lowered for secret in secrets)
    )


def scrub_json(payload: bytes, secrets: Sequence[str] = (), found: set[str] | None = None) -> bytes:
    """A JSON text without credentials; the same object if it has none, so that its bytes go on unchanged.

    Args:
        payload: the JSON text. What is not JSON comes back as it is: it goes nowhere, its reader refuses it.
        secrets: literals known to be secret (`secret_forms`).
        found: takes the secrets that were met under a credential key.
    """
    if not _may_hold_secret(payload, secrets):
        return payload
    try:
        value = json_load(payload)
        clean = _scrub_strings(redact(value, found), secrets)
    except (JSONError, RecursionError):
        return payload
    return payload if clean == value else json_bytes(clean)


# == 4 == WebSocket codec ==============================================================================================


# == 5 == HTTP messages ================================================================================================


# == 6 == Router =======================================================================================================


# == 7 == Static files =================================================================================================


# == 8 == Metric catalogue =============================================================================================
#
# AIPerf up to 0.6 publishes every metric in the unit it is measured in; later versions publish the visible ones in the
# unit that people read. Both come out as the latter. The table is AIPerf 0.13's own registry, a metric a line:
#
#     tag|header|unit, or unit>display unit|+ larger is better, - smaller is; h hidden from people


class Metric(NamedTuple):
    """One metric that AIPerf knows by name."""

    tag: str  # AIPerf's name, such as "request_latency"
    header: str  # the name that people read
    unit: str  # the unit it is measured in, on the bus up to 0.6
    display_unit: str  # the unit that people read
    larger_is_better: bool  # the direction in which an improvement goes
    hidden: bool  # whether AIPerf keeps it from people


_CATALOGUE_TEXT = """\
amd_average_gpu_power|Average GPU Power|W|-
amd_energy_delay_product|Energy Delay Product|J*s|-
amd_energy_per_output_token|Energy per Output Token|mJ/token|-
amd_energy_per_request|Energy per Request|joules/request|-
amd_energy_per_total_token|Energy per Total Token|mJ/token|-
amd_energy_per_user|Energy per User|joules/user|-
amd_goodput_per_watt|Goodput per Watt|good-req/s/W|+
amd_output_tokens_per_joule|Output Tokens per Joule|tokens/J|+
amd_output_tps_per_watt|Output Tokens per Second per Watt|tokens/sec/W|+
amd_performance_per_watt|Performance per Watt|requests/sec/W|+
amd_total_gpu_energy|Total GPU Energy|J|-
amd_total_gpu_power|Total GPU Power|W|-
audio_duration|Audio Duration|sec|-
benchmark_duration|Benchmark Duration|ns>sec|-
completed_request_count|Completed Requests (Success + Error)|requests|-
context_overflow_count|Context Overflow Count|requests|-
credit_drop_latency|Credit Drop Latency|ns>ms|-h
decode_duration|Decode Duration|ns>ms|-
e2e_output_token_throughput|E2E Output Token Throughput|tokens/sec/user|+
error_isl|Error Input Sequence Length|tokens|+
error_request_count|Error Request Count|requests|-
good_request_count|Good Request Count|requests|-
good_request_fraction|GoodRequestFraction|ratio|+
goodput|Goodput|requests/sec|-
http_req_blocked|HTTP Blocked|ns>ms|-
http_req_chunks_received|HTTP Chunks Received|count|-
http_req_chunks_sent|HTTP Chunks Sent|count|-
http_req_connecting|HTTP Connecting|ns>ms|-
http_req_connection_overhead|HTTP Connection Overhead|ns>ms|-
http_req_connection_reused|HTTP Connection Reused|ratio|-
http_req_data_received|HTTP Data Received|B>KB|-
http_req_data_sent|HTTP Data Sent|B>KB|-
http_req_dns_lookup|HTTP DNS Lookup|ns>ms|-
http_req_duration|HTTP Duration (excl. conn)|ns>ms|-
http_req_receiving|HTTP Receiving|ns>ms|-
http_req_sending|HTTP Sending|ns>ms|-
http_req_total|HTTP Total Time|ns>ms|-
http_req_waiting|HTTP Waiting (TTFB)|ns>ms|-
image_latency|Image Latency|ms/image|-
image_throughput|Image Throughput|images/sec|-
input_sequence_length|Input Sequence Length|tokens|+
input_token_throughput|Input Token Throughput|tokens/sec|+
inter_chunk_latency|Inter Chunk Latency|ns>ms|-
inter_token_latency|Inter Token Latency|ns>ms|-
max_response_timestamp|Maximum Response Timestamp|ns|-h
min_request_timestamp|Minimum Request Timestamp|ns|-h
network_adjusted_request_latency|Network-Adjusted Request Latency|ns>ms|-
network_adjusted_time_to_first_output_token|Network-Adjusted Time to First Output Token|ns>ms|-
network_adjusted_time_to_first_token|Network-Adjusted Time to First Token|ns>ms|-
network_rtt|Network RTT|ns>ms|-
num_images|Number of Images|images|-
nvidia_average_gpu_power|Average GPU Power|W|-
nvidia_energy_delay_product|Energy Delay Product|J*s|-
nvidia_energy_per_output_token|Energy per Output Token|mJ/token|-
nvidia_energy_per_request|Energy per Request|joules/request|-
nvidia_energy_per_total_token|Energy per Total Token|mJ/token|-
nvidia_energy_per_user|Energy per User|joules/user|-
nvidia_goodput_per_watt|Goodput per Watt|good-req/s/W|+
nvidia_output_tokens_per_joule|Output Tokens per Joule|tokens/J|+
nvidia_output_tps_per_watt|Output Tokens per Second per Watt|tokens/sec/W|+
nvidia_performance_per_watt|Performance per Watt|requests/sec/W|+
nvidia_total_gpu_energy|Total GPU Energy|J|-
nvidia_total_gpu_power|Total GPU Power|W|-
osl_mismatch_count|OSL Mismatch Count|requests|-
osl_mismatch_diff_pct|OSL Mismatch Diff %|%|-
output_sequence_length|Output Sequence Length|tokens|+
output_token_count|Output Token Count|tokens|+
output_token_throughput|Output Token Throughput|tokens/sec|+
output_token_throughput_per_user|Output Token Throughput Per User|tokens/sec/user|+
overall_thinking_efficiency|Overall Thinking Efficiency|ratio|-h
overall_usage_prompt_cache_read_pct|Overall Usage Prompt Cache Read %|%|+
prefill_throughput_per_user|Prefill Throughput Per User|tokens/sec/user|+
reasoning_token_count|Reasoning Token Count|tokens|+
replay_sched_degraded|Replay Schedule Degraded|count|-
replay_sched_lag_p50|Replay Schedule Lag p50|ms|-
replay_sched_lag_p90|Replay Schedule Lag p90|ms|-
replay_sched_lag_p99|Replay Schedule Lag p99|ms|-
replay_send_schedule_offset|Replay Send Schedule Offset|ns|-h
request_count|Request Count|requests|+
request_error_rate|Request Error Rate|%|-
request_latency|Request Latency|ns>ms|-
request_throughput|Request Throughput|requests/sec|+
requested_osl|Requested OSL|tokens|-h
rtfx|Inverse Real-Time Factor (RTFx)|ratio|+
spec_decode_acceptance_length|Acceptance Length|ratio|+
spec_decode_accepted_draft_tokens|Accepted Draft Tokens|tokens|-
spec_decode_accepted_per_verified|Accepted per Verified|ratio|+
spec_decode_draft_acceptance_rate|Draft Acceptance Rate|%|+
spec_decode_draft_tokens|Draft Tokens|tokens|-
spec_decode_overall_draft_acceptance_rate|Overall Draft Acceptance Rate|%|+
spec_decode_steps|Spec Decode Steps|count|-
spec_decode_token_weighted_acceptance_length|Token-Weighted Acceptance Length|ratio|+
stream_prefill_latency|Stream Prefill Latency|ns>ms|-h
stream_setup_latency|Stream Setup Latency|ns>ms|-h
thinking_efficiency|Thinking Efficiency|ratio|-h
time_to_first_output_token|Time to First Output Token|ns>ms|-
time_to_first_token|Time to First Token|ns>ms|-
time_to_second_token|Time to Second Token|ns>ms|-
total_accepted_draft_tokens|Total Accepted Draft Tokens|tokens|-
total_draft_tokens|Total Draft Tokens|tokens|-
total_error_isl|Total Error Input Sequence Length|tokens|+
total_isl|Total Input Sequence Length|tokens|+
total_osl|Total Output Sequence Length|tokens|+
total_output_tokens|Total Output Tokens|tokens|+
total_reasoning_tokens|Total Reasoning Tokens|tokens|+
total_spec_decode_steps|Total Spec Decode Steps|count|-
total_token_throughput|Total Token Throughput|tokens/sec|+
total_usage_accepted_prediction_tokens|Total Usage Accepted Prediction Tokens|tokens|+
total_usage_completion_audio_tokens|Total Usage Completion Audio Tokens|tokens|+
total_usage_completion_tokens|Total Usage Completion Tokens|tokens|+
total_usage_prompt_audio_seconds|Total Usage Prompt Audio Seconds|sec|+
total_usage_prompt_audio_tokens|Total Usage Prompt Audio Tokens|tokens|+
total_usage_prompt_cache_miss_tokens|Total Usage Prompt Cache Miss Tokens|tokens|-
total_usage_prompt_cache_read_tokens|Total Usage Prompt Cache Read Tokens|tokens|+
total_usage_prompt_cache_write_tokens|Total Usage Prompt Cache Write Tokens|tokens|-
total_usage_prompt_tokens|Total Usage Prompt Tokens|tokens|+
total_usage_reasoning_tokens|Total Usage Reasoning Tokens|tokens|+
total_usage_rejected_prediction_tokens|Total Usage Rejected Prediction Tokens|tokens|-
total_usage_tool_use_prompt_tokens|Total Usage Tool Use Prompt Tokens|tokens|-
total_usage_total_tokens|Total Usage Total Tokens|tokens|+
usage_accepted_prediction_tokens|Usage Accepted Prediction Tokens|tokens|+
usage_completion_audio_tokens|Usage Completion Audio Tokens|tokens|+
usage_completion_tokens|Usage Completion Tokens|tokens|+
usage_completion_tokens_diff_pct|Usage Completion Diff %|%|-
usage_discrepancy_count|Usage Discrepancy Count|requests|-
usage_prompt_audio_seconds|Usage Prompt Audio Seconds|sec|+
usage_prompt_audio_tokens|Usage Prompt Audio Tokens|tokens|+
usage_prompt_cache_miss_tokens|Usage Prompt Cache Miss Tokens|tokens|-
usage_prompt_cache_read_tokens|Usage Prompt Cache Read Tokens|tokens|+
usage_prompt_cache_write_tokens|Usage Prompt Cache Write Tokens|tokens|-
usage_prompt_tokens|Usage Prompt Tokens|tokens|+
usage_prompt_tokens_diff_pct|Usage Prompt Diff %|%|-
usage_reasoning_tokens|Usage Reasoning Tokens|tokens|+
usage_reasoning_tokens_diff_pct|Usage Reasoning Diff %|%|-
usage_rejected_prediction_tokens|Usage Rejected Prediction Tokens|tokens|-
usage_tool_use_prompt_tokens|Usage Tool Use Prompt Tokens|tokens|-
usage_total_tokens|Usage Total Tokens|tokens|+
video_inference_time|Video Inference Time|sec>ms|-
video_peak_memory|Video Peak Memory|MB|-
"""


def _catalogue(text: str) -> Iterator[tuple[str, Metric]]:
    """Yield (tag, metric) for each line of the table."""
    for line in text.splitlines():
        tag, header, units, flags = line.split("|")
        unit, _, display_unit = units.partition(">")
        yield tag, Metric(tag, header, unit, display_unit or unit, "+" in flags, "h" in flags)


CATALOGUE: Mapping[str, Metric] = MappingProxyType(dict(_catalogue(_CATALOGUE_TEXT)))

# Percentile fields of a row, and the quantile that Prometheus calls them by.
QUANTILES: Mapping[str, str] = MappingProxyType(
    dict(p1="0.01", p5="0.05", p10="0.1", p25="0.25", p50="0.5", p75="0.75", p90="0.9", p95="0.95", p99="0.99")
)
# What a row may say in figures of its unit, `count` aside, which is a number of samples.
STATISTICS = frozenset(("avg", "min", "max", "std", "sum", "current", *QUANTILES))
# Fields that AIPerf uses between its own processes.
INTERNAL_FIELDS = frozenset({"console_group"})
# (unit, display unit) -> the (factor, divisor) that leads from one to the other. Two figures, because dividing by a
# million is exact where multiplying by a millionth is not.
_CONVERSIONS: Mapping[tuple[str, str], tuple[float, float]] = MappingProxyType(
    {("ns", "ms"): (1, 1e6), ("ns", "sec"): (1, 1e9), ("B", "KB"): (1, 1024), ("sec", "ms"): (1000, 1)}
)


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def text_or(value: Any, default: str) -> str:
    """Return a value if it is a string with something in it, else the default."""
    return value if isinstance(value, str) and value else default


def _conversion(tag: str, unit: Any) -> Optional[tuple[float, float, str]]:
    """Return (factor, divisor, display unit) where a unit on the bus is not the one people read, else None."""
    metric = CATALOGUE.get(tag)
    if metric is None or unit != metric.unit or unit == metric.display_unit:
        return None
    return (*_CONVERSIONS[metric.unit, metric.display_unit], metric.display_unit)


def _tag_of(row: Any) -> str:
    """Return a row's tag; "" for what is no row, or one that people do not see."""
    tag = text_or(row.get("tag"), "") if isinstance(row, dict) else ""
    return "" if tag in CATALOGUE and CATALOGUE[tag].hidden else tag


def _is_shown(key: str, value: Any) -> bool:
    """Tell whether a field of a row is for clients: not internal, not null, and a number where one belongs."""
    if value is None or key in INTERNAL_FIELDS:
        return False
    if key in STATISTICS or key == "count":
        return is_number(value)
    return not isinstance(value, float) or math.isfinite(value)


def display_row(row: Any) -> Optional[dict[str, Any]]:
    """Return one row of a metrics message as people read it, in the order of its fields; None when it is not for them.

    Statistics are in display units, nulls and infinities are left out, fields that AIPerf may add later are kept.
    """
    tag = _tag_of(row)
    if not tag:
        return None
    shown = {key: value for key, value in row.items() if _is_shown(key, value)}
    conversion = _conversion(tag, shown.get("unit"))
    if conversion is not None:
        factor, divisor, shown["unit"] = conversion
        shown.update((key, shown[key] * factor / divisor) for key in STATISTICS & shown.keys())
    return shown


def display_rows(rows: Any) -> dict[str, dict[str, Any]]:
    """Return the rows of a metrics message by tag, in the order they came; the last of two with one tag stays."""
    shown = filter(None, map(display_row, rows if isinstance(rows, list) else ()))
    return {row.pop("tag"): row for row in shown}


def row_needs_change(row: Any) -> bool:
    """Tell whether a row differs from what clients are to see of it."""
    tag = _tag_of(row)
    return not tag or not all(map(_is_shown, row, row.values())) or _conversion(tag, row.get("unit")) is not None


def forwardable_realtime_metrics(payload: bytes) -> bytes:
    """Return a realtime_metrics message as clients get it: the very same object where nothing needs a change.

    Raises:
        BusMessageError: the payload is not JSON, or not an object.
    """
    message = read_message(payload)
    rows = message.get("metrics")
    if not isinstance(rows, list) or not any(map(row_needs_change, rows)):
        return payload
    return json_bytes({**message, "metrics": [row for row in map(display_row, rows) if row is not None]})


def read_message(payload: bytes) -> dict[str, Any]:
    """Return the JSON object of a bus message.

    Raises:
        BusMessageError: `not_json` or `not_object`.
    """
    try:
        message = json_load(payload)
    except JSONError as error:
        raise BusMessageError("not_json", f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise BusMessageError("not_object", f"a {type(message).__name__} instead of an object")
    return message


# == 9 == Prometheus text ==============================================================================================
#
# Families of samples -> bytes, in the text format 0.0.4 and in OpenMetrics 1.0.0. Names and labels of the benchmark's
# metrics are those of AIPerf's own exporter, so that dashboards made for one work with the other.

CONTENT_TYPE_TEXT_0_0_4 = "text/plain; version=0.0.4; charset=utf-8"
CONTENT_TYPE_OPENMETRICS_1_0_0 = "application/openmetrics-text; version=1.0.0; charset=utf-8"

Labels = tuple[tuple[str, str], ...]  # (name, value) pairs in the order they are written


class Sample(NamedTuple):
    """One line of the exposition."""

    suffix: str  # what stands behind the family's name: "", "_sum", "_count", "_total" or "_info"
    labels: Labels
    value: float


class Family(NamedTuple):
    """Samples of one name, type and unit."""

    name: str  # without `_total` and `_info`, as OpenMetrics has it
    kind: str  # "gauge", "counter", "summary" or "info"
    help: str
    unit: str  # the end of the name, "" when it has none
    samples: list[Sample]


# What each type of family puts behind its name: names that no other family may have.
_SUFFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    dict(gauge=(), counter=("_total", "_created"), summary=("_sum", "_count", "_created"), info=("_info",))
)
# Statistics that are gauges of their own, with AIPerf's words for them; the last two only without percentiles.
_GAUGES: Mapping[str, str] = MappingProxyType(
    {
        "avg": "average",
        "min": "minimum",
        "max": "maximum",
        "std": "standard deviation",
        "current": "current value",
        "count": "observation count",
        "sum": "observation sum",
    }
)
_NOT_IN_A_NAME = re.compile("[^a-zA-Z0-9_]")
# Control characters (a line feed aside, which is escaped) would let a name on the bus drive the terminal behind curl.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def metric_name(text: str) -> str:
    """Return text as a part of a metric name: lower case, and `_` for what may not stand in one."""
    name = _NOT_IN_A_NAME.sub("_", text.lower())
    return f"_{name}" if name[:1].isdigit() else name


def unit_name(unit: str) -> str:
    """Return a unit as the end of a metric name, by AIPerf's rules in AIPerf's order: `tokens/sec/user` -> `tps_per_user`."""
    unit = unit.replace("%", "percent").replace("/", "_per_").replace("tokens_per_sec", "tps").replace("__", "_")
    return metric_name(unit)


def _escape(text: str) -> str:
    return _CONTROL.sub(" ", text).replace("\\", "\\\\").replace("\n", "\\n")


def _labels_text(labels: Labels) -> str:
    escaped = ((name, _escape(value).replace('"', '\\"')) for name, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}" if labels else ""


def _value_text(value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return str(value)


def _sample_lines(families: Iterable[Family], head: Callable[[Family], str]) -> Iterator[str]:
    """Yield what `head` says of each family, and its samples; label sets repeat, so each is escaped once."""
    known: dict[Labels, str] = {}
    for family in families:
        yield head(family)
        for suffix, labels, value in family.samples:
            text = known.get(labels)
            if text is None:
                text = known[labels] = _labels_text(labels)
            yield f"{family.name}{suffix}{text} {_value_text(value)}\n"


def _text_head(family: Family) -> str:
    """Return HELP and TYPE for 0.0.4, where a counter's name has its `_total`, and an info metric is a gauge."""
    suffix, kind = {"counter": ("_total", "counter"), "info": ("_info", "gauge")}.get(family.kind, ("", family.kind))
    return f"# HELP {family.name}{suffix} {_escape(family.help)}\n# TYPE {family.name}{suffix} {kind}\n"


def _openmetrics_head(family: Family) -> str:
    """Return TYPE, UNIT and HELP; a unit must be the end of the name (OpenMetrics 1.0.0, "Unit")."""
    unit = f"# UNIT {family.name} {family.unit}\n" if family.unit and family.name.endswith(f"_{family.unit}") else ""
    text = _escape(family.help).replace('"', '\\"')
    return f"# TYPE {family.name} {family.kind}\n{unit}# HELP {family.name} {text}\n"


def render_text(families: Iterable[Family]) -> bytes:
    """Return the exposition in Prometheus text format 0.0.4."""
    return "".join(_sample_lines(families, _text_head)).encode("utf-8", "replace")


def render_openmetrics(families: Iterable[Family]) -> bytes:
    """Return the exposition in OpenMetrics 1.0.0."""
    return ("".join(_sample_lines(families, _openmetrics_head)) + "# EOF\n").encode("utf-8", "replace")


def unique_families(families: Iterable[Family]) -> list[Family]:
    """Return the families without empty ones, and without those whose names an earlier one already uses.

    A bus may carry two tags that are one name after cleaning; a scrape with a name twice would be refused as a whole.
    """
    taken: set[str] = set()
    kept = []
    for family in families:
        names = {family.name, *(family.name + suffix for suffix in _SUFFIXES[family.kind])}
        if family.samples and taken.isdisjoint(names):
            taken |= names
            kept.append(family)
    return kept


class FamilySet:
    """Families under construction, each series in them once."""

    def __init__(self) -> None:
        self.families: dict[str, Family] = {}
        self._series: set[tuple[str, str, Labels]] = set()

    def add(self, head: tuple[str, str, str, str], labels: Labels, value: Any, suffix: str = "") -> None:
        """Add a sample to the family (name, kind, help, unit); not twice, and nothing that is not a number.

        A counter cannot be negative, and a family cannot be of two kinds: such a sample is left out as well.
        """
        family = self.families.get(head[0])
        if family is None:
            family = self.families[head[0]] = Family(*head, [])
        series = (head[0], suffix, labels)
        if not is_number(value) or series in self._series or (head[1] == "counter" and value < 0):
            return
        if family.kind == head[1]:
            self._series.add(series)
            family.samples.append(Sample(suffix, labels, value))

    def add_row(self, base: str, row: Mapping[str, Any], labels: Labels, title: str, unit: str) -> None:
        """Add a row of statistics: percentiles as a summary with sum and count, everything else as gauges."""
        ending = unit_name(unit)
        suffix, words = (f"_{ending}" if unit else ""), f" (in {unit})"
        quantiles = [(QUANTILES[field], row[field]) for field in QUANTILES if field in row]
        head = (base + suffix, "summary", title + words, ending)
        for quantile, value in quantiles:
            self.add(head, (*labels, ("quantile", quantile)), value)
        for stat, phrase in _GAUGES.items():
            if stat in row and quantiles and stat in ("count", "sum"):
                self.add(head, labels, row[stat], f"_{stat}")
            elif stat in row:
                self.add((f"{base}_{stat}{suffix}", "gauge", f"{title} {phrase}{words}", ending), labels, row[stat])


def metric_families(metrics: Mapping[str, Mapping[str, Any]], labels: Labels = ()) -> list[Family]:
    """Return the families of a benchmark's metrics.

    Args:
        metrics: rows by tag, in display units.
        labels: what stands on every sample: the benchmark's identity.
    """
    found = FamilySet()
    bases = set()
    for tag, row in metrics.items():
        base, unit = f"aiperf_{metric_name(tag)}", text_or(row.get("unit"), "")
        if (base, unit_name(unit)) not in bases:  # two tags that clean to one name would mix their statistics
            bases.add((base, unit_name(unit)))
            found.add_row(base, row, labels, text_or(row.get("header"), tag), unit)
    return list(found.families.values())


# -- GPU telemetry: AIPerf puts the source, the GPU and its uuid into the tag; here they are labels -------------------

_GPU_TAG = re.compile(r"(?P<metric>.+?)_dcgm_(?P<source>.+)_gpu(?P<gpu>\d+)_(?P<uuid>.+)", re.DOTALL)
_GPU_VENDOR = re.compile("(nvidia|amd)[_ ]", re.IGNORECASE)


class GPUSeries(NamedTuple):
    """What the tag and the header of a telemetry row say."""

    metric: str  # such as "power_usage", the same for every vendor
    title: str  # the name that people read, without the vendor
    labels: Labels  # source, gpu (its index), gpu_name, uuid (as far as AIPerf gives it)


def gpu_series(tag: str, header: str) -> GPUSeries:
    """Read a telemetry row's tag `METRIC_dcgm_SOURCE_gpuINDEX_UUID` and header `TITLE | SOURCE | GPU INDEX | NAME`."""
    title, source, gpu, gpu_name = (*header.split(" | ", 3), "", "", "", "")[:4]
    found = _GPU_TAG.fullmatch(tag)
    metric, uuid = (found["metric"], found["uuid"]) if found else (tag, "")
    source = source or (found["source"] if found else "")
    gpu = found["gpu"] if found else gpu.replace("GPU ", "")
    metric = _GPU_VENDOR.sub("", metric, 1)
    metric = metric[4:] if metric.startswith("gpu_") else metric
    labels = (("source", source), ("gpu", gpu), ("gpu_name", gpu_name), ("uuid", uuid))
    return GPUSeries(metric, _GPU_VENDOR.sub("", title, 1), labels)


def telemetry_families(telemetry: Mapping[str, Mapping[str, Any]], labels: Labels = ()) -> list[Family]:
    """Return the families `aiperf_gpu_*` of telemetry rows by tag, each with the labels of its GPU."""
    found = FamilySet()
    for tag, row in telemetry.items():
        series = gpu_series(tag, text_or(row.get("header"), tag))
        unit = text_or(row.get("unit"), "").replace("°C", "celsius")
        found.add_row(f"aiperf_gpu_{metric_name(series.metric)}", row, (*labels, *series.labels), series.title, unit)
    return list(found.families.values())


# -- Inference-server metrics: the server's own names and labels, prefixed -------------------------------------------

_SERVER_UNIT = re.compile("_(seconds|milliseconds|bytes|ratio|percent|tokens|celsius|watts|joules)$")


class ServerSeries(NamedTuple):
    """One series of an inference server's metrics, as realtime_server_metrics has it."""

    endpoint: str  # host:port
    name: str  # the server's own, such as "vllm:num_requests_running"
    kind: str  # "gauge", "counter", "histogram", ...
    title: str
    labels: Labels  # the server's own, by name
    stats: Mapping[str, Any]


def _own_labels(labels: Any) -> Labels:
    found = labels.items() if isinstance(labels, dict) else ()
    return tuple(sorted((name, value if isinstance(value, str) else str(value)) for name, value in found))


def server_series(summaries: Any) -> Iterator[ServerSeries]:
    """Yield every well-formed series in the `endpoint_summaries` of a message."""
    for endpoint, summary in _items(summaries):
        for name, metric in _items(summary.get("metrics")):
            series = metric.get("series")
            kind, title = text_or(metric.get("type"), "gauge"), text_or(metric.get("description"), name)
            for one in series if isinstance(series, list) else ():
                if isinstance(one, dict) and isinstance(one.get("stats"), dict):
                    yield ServerSeries(endpoint, name, kind, title, _own_labels(one.get("labels")), one["stats"])


def _items(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (key, object) pairs of an object of objects; nothing for what is none."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if isinstance(inner, dict):
            yield key, inner


def _prefixed_labels(first: Labels, own: Labels) -> Labels:
    """Join our labels and a server's; its own are renamed where they clash, as Prometheus does when it scrapes."""
    joined = dict(first)
    reserved = {*joined, "quantile", "le"}
    for name, value in own:
        name = _NOT_IN_A_NAME.sub("_", name)
        clash = name in reserved or name.startswith("__") or not name or name[0].isdigit()
        joined.setdefault(f"exported_{name}" if clash else name, value)
    return tuple(joined.items())


def _add_server_series(found: FamilySet, series: ServerSeries, labels: Labels) -> None:
    base, unit = f"aiperf_server_{metric_name(series.name)}", _SERVER_UNIT.search(series.name)
    ending = unit[1] if unit else ""
    stem = base[: -len(unit[0])] if unit else base
    summary = (base, "summary", series.title, ending)
    stats = {name.replace("_estimate", ""): value for name, value in series.stats.items()}
    summarised = series.kind == "histogram" or not QUANTILES.keys().isdisjoint(stats)
    for stat, value in stats.items():
        if stat in QUANTILES:
            found.add(summary, (*labels, ("quantile", QUANTILES[stat])), value)
        elif stat in ("sum", "count") and summarised:
            found.add(summary, labels, value, f"_{stat}")
        elif stat == "total" and series.kind == "counter":
            found.add((base, "counter", series.title, ending), labels, value, "_total")
        elif stat in _GAUGES and stat != "count":  # these have the metric's own unit
            name = f"{stem}_{stat}_{ending}" if ending else f"{base}_{stat}"
            found.add((name, "gauge", f"{series.title} ({_GAUGES[stat]})", ending), labels, value)
        else:
            name = f"{base}_{metric_name(stat)}"
            found.add((name, "gauge", f"{series.title} ({stat.replace('_', ' ')})", ""), labels, value)


def server_families(summaries: Any, labels: Labels = ()) -> list[Family]:
    """Return the families `aiperf_server_*` of `endpoint_summaries`, with the endpoint and the server's own labels."""
    found = FamilySet()
    for series in server_series(summaries):
        own = _prefixed_labels((*labels, ("endpoint", series.endpoint)), series.labels)
        _add_server_series(found, series, own)
    return list(found.families.values())


# == 10 == Benchmark state =============================================================================================


# == 11 == Sources =====================================================================================================


# == 12 == Hub =========================================================================================================


# == 13 == Connection ==================================================================================================


# == 14 == Endpoints and service =======================================================================================


# == 15 == Command line ================================================================================================
