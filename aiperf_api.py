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
QUANTILES: Mapping[str, str] = MappingProxyType({f"p{p}": f"{p / 100}" for p in (1, 5, 10, 25, 50, 75, 90, 95, 99)})
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
    {"gauge": (), "counter": ("_total", "_created"), "summary": ("_sum", "_count", "_created"), "info": ("_info",)}
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
    """Return a unit as the end of a metric name, by AIPerf's rules in order: `tokens/sec/user` is `tps_per_user`."""
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
    for original, value in own:
        name = _NOT_IN_A_NAME.sub("_", original)
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
#
# A reducer: bus messages go in one after the other, answers come out at any moment. Time comes in as an argument, as
# the bus clock at reception: the wall clock of a live bus, the recorded time of a replay. Benchmark and server may
# differ in their clocks, so what a message says of its own time is used to find the difference.
#
#   BenchmarkState   what outlives a run: configuration from outside, the run at hand
#   └── Run          one benchmark; a new one starts from an empty Run
#       ├── Phase    warm-up or profiling: what was sent, done, failed
#       ├── Worker   status, tasks, records, health
#       ├── Latest   the last message of a type that comes often, parsed when somebody asks
#       └── History  bounded series of figures over time

STALE_AFTER_NS = 10_000_000_000  # silence after which a running benchmark counts as gone (AIPerf's own STALE_TIME)
EAGER_PARSE_NS = 100_000_000  # pace up to which each metrics message is parsed (and so judged) as it arrives
HISTORY_INTERVAL_NS = 1_000_000_000  # closest two points of a series stand, in bus time
HISTORY_MAX_POINTS = 7_200  # two hours at one a second; then every second point goes, and the interval doubles
HISTORY_MAX_SERIES = 2_048  # series of one group; what appears past it has no history (at most 118 MB in all a group)
MAX_WORKERS = 4_096  # workers and worker groups that are told apart; AIPerf caps a node at 32
MAX_PHASES = 64  # phases of one run that are told apart

# AIPerf's states in the order a run goes through them, after `waiting`: nothing was heard yet.
STATES = ("waiting", "initializing", "configuring", "ready", "profiling", "processing", "stopping", "shutdown")
ENDS = ("complete", "cancelled", "failed")
WORKER_STATUSES = ("healthy", "high_load", "error", "idle", "stale")
ACTIVE_WORKER_STATUSES = frozenset({"healthy", "high_load", "error"})  # has requests, or had a failed one just now

PHASE_MESSAGE_TYPES = frozenset(
    {"credit_phase_start", "credit_phase_progress", "credit_phase_sending_complete", "credit_phase_complete"}
)
# What may be large and frequent: kept as bytes until somebody asks.
METRICS_MESSAGE_TYPES = frozenset({"realtime_metrics", "realtime_telemetry_metrics", "realtime_server_metrics"})
# What only a benchmark under load sends: after it, silence was no end.
_SIGNS_OF_LOAD = frozenset({*PHASE_MESSAGE_TYPES, *METRICS_MESSAGE_TYPES, "processing_stats"})
# What the reducer itself has to hear.
CORE_MESSAGE_TYPES = frozenset(
    {
        *PHASE_MESSAGE_TYPES,
        *METRICS_MESSAGE_TYPES,
        "all_records_received",
        "benchmark_complete",
        "command",
        "command_response",
        "credit_phases_configured",
        "credits_complete",
        "dataset_configuration_failed",
        "dataset_configured_notification",
        "error",
        "process_all_results",
        "process_records_result",
        "process_server_metrics_result",
        "process_telemetry_result",
        "processing_stats",
        "results_exported",
        "service_error",
        "system_state_changed",
        "worker_group_stats",
        "worker_health",
        "worker_startup_state",
        "worker_status_summary",
    }
)
# Their topics. `command` has targeted ones too; of the responses only the controller's matter, a failed configuration.
CORE_TOPICS = (
    *sorted(f"{name}$".encode() for name in CORE_MESSAGE_TYPES - {"command_response"}),
    b"command.",
    b"command_response.system_controller$",
)
# Types whose latest message replaces the one before; what is kept per worker or group is not among them.
STATE_MESSAGE_TYPES = frozenset(
    {*METRICS_MESSAGE_TYPES, "credit_phase_progress", "processing_stats", "worker_status_summary"}
)
BUILTIN_MESSAGE_TYPES = frozenset(
    {
        "all_records_received",
        "credit_phase_complete",
        "credit_phase_progress",
        "credit_phase_start",
        "processing_stats",
        "realtime_metrics",
        "realtime_telemetry_metrics",
        "worker_status_summary",
    }
)
# Every type that some AIPerf from 0.3 to 0.13 has; another one is accepted, but may be a typo.
KNOWN_MESSAGE_TYPES = frozenset(
    {
        *CORE_MESSAGE_TYPES,
        "connection_probe",
        "conversation_request",
        "conversation_response",
        "conversation_turn_request",
        "conversation_turn_response",
        "credit_drop",
        "credit_return",
        "dataset_config_status_request",
        "dataset_config_status_response",
        "dataset_downloaded_notification",
        "dataset_timing_request",
        "dataset_timing_response",
        "heartbeat",
        "inference_results",
        "metric_records",
        "network_latency_record",
        "notification",
        "parsed_inference_results",
        "phase_baseline_request",
        "process_accuracy_result",
        "profile_progress",
        "profile_results",
        "records",
        "registration",
        "server_metrics_record",
        "server_metrics_status",
        "status",
        "sweep_begin",
        "sweep_configure",
        "sweep_end",
        "sweep_progress",
        "telemetry_records",
        "telemetry_status",
        "worker_pod_state",
    }
)


class Change(enum.IntFlag):
    """What a message changed, for those who keep something made from the state."""

    NONE = 0
    STATUS = 1  # state, phase, error
    PROGRESS = 2  # phases, processing figures
    METRICS = 4  # the benchmark's metrics
    TELEMETRY = 8  # GPU telemetry
    SERVER_METRICS = 16  # inference-server metrics
    WORKERS = 32
    RESULTS = 64  # the final results
    CONFIG = 128  # configuration and identity
    NEW_RUN = 256  # a new run began: everything above is from empty
    ENDED = 512  # the run's end became known


# -- Reading values: whatever stands in a field, these return something usable ---------------------------------------


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: Any) -> Optional[int]:
    """Return a number that counts something (also a time in ns), or None; whole floats count too."""
    return int(value) if is_number(value) and 0 <= value < 2**63 else None


def _positive(value: Any) -> Optional[float]:
    return value if is_number(value) and value > 0 else None


def _text(value: Any) -> Optional[str]:
    return text_or(value, "") or None


def _error_text(error: Any) -> Optional[str]:
    """Return an error field as one line: a text, or AIPerf's {type, message}."""
    if not isinstance(error, dict):
        return _text(error)
    kind, message = text_or(error.get("type"), ""), text_or(error.get("message"), "")
    return message if message.startswith(kind) else f"{kind}: {message}" if message else _text(kind)


# -- Phases ----------------------------------------------------------------------------------------------------------

# 0.3's flat phase messages -> the fields of `stats` in 0.6 and later.
_FLAT_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "sent": "requests_sent",
        "completed": "requests_completed",
        "final_request_count": "final_requests_completed",
        "end_ns": "requests_end_ns",
    }
)
_ENVELOPE_FIELDS = frozenset({"message_type", "service_id", "request_ns", "request_id"})
# Figures of the records (processing_stats), 0.3's name first.
_SUCCESS_FIELDS = ("processed", "success_records")
_ERROR_FIELDS = ("errors", "error_records")


def phase_stats(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `stats` of a credit_phase_* message of any version, with `phase_name`.

    Raises:
        BusMessageError: `bad_shape`: the message names no phase.
    """
    stats = message.get("stats")
    if not isinstance(stats, dict):
        flat = ((key, value) for key, value in message.items() if key not in _ENVELOPE_FIELDS)
        stats = {_FLAT_FIELDS.get(key, key): value for key, value in flat}
    name = _text(stats.get("phase_name")) or _text(stats.get("phase"))
    if name is None:
        raise BusMessageError("bad_shape", "a phase message without a phase")
    return {**stats, "phase_name": name}


class Phase:
    """One phase of a run."""

    def __init__(self, stats: Mapping[str, Any], now_ns: int) -> None:
        self.name: str = stats["phase_name"]  # as AIPerf's user named it, else its kind
        self.kind = _text(stats.get("phase_kind")) or _text(stats.get("phase")) or self.name  # warmup or profiling
        self.first_ns = now_ns  # bus clock, ns: when it was first heard of
        self.start_ns: Optional[int] = None  # benchmark's clock, ns
        self.end_ns: Optional[int] = None  # benchmark's clock, ns: all requests answered
        self.expected: Optional[int] = None  # requests
        self.duration_sec: Optional[float] = None  # seconds, for a run by duration
        self.sessions: Optional[int] = None  # expected sessions, for a run by sessions
        self.sessions_done = 0  # sessions
        self.sent = 0  # requests
        self.completed = 0  # requests that were answered, failed ones included
        self.cancelled = 0  # requests
        self.errors = 0  # requests that failed, by the credit counters (always 0 in 0.6 to 0.8)
        self.success_records = 0  # records, each of one answered request
        self.error_records = 0  # records, each of one failed request
        self.took_ns: Optional[int] = None  # ns: how long it took, once credit_phase_complete was heard
        self.extra: dict[str, Any] = {}  # further fields as AIPerf sends them, by name

    @property
    def is_warmup(self) -> bool:
        return self.kind == "warmup"

    @property
    def has_begun(self) -> bool:
        return self.start_ns is not None or self.sent > 0 or self.done > 0

    @property
    def done(self) -> int:
        """Return the requests that were answered, by whichever counter is ahead."""
        return max(self.completed, self.success_records + self.error_records)

    @property
    def failed(self) -> int:
        return max(self.errors, self.error_records)

    def update(self, stats: Mapping[str, Any]) -> None:
        """Take over counters (they never go back in a phase), times and targets; keep what else there is."""
        read = {key: number for key, value in stats.items() if (number := _count(value)) is not None}
        for field, names in _PHASE_COUNTERS.items():
            setattr(self, field, max(getattr(self, field), *(read.get(name, 0) for name in names)))
        self.start_ns = read.get("start_ns", self.start_ns)
        self.end_ns = read.get("requests_end_ns", self.end_ns)
        self.expected = read.get("total_expected_requests") or self.expected
        self.sessions = read.get("expected_num_sessions") or self.sessions
        self.duration_sec = _positive(stats.get("expected_duration_sec")) or self.duration_sec
        self.extra.update((key, stats[key]) for key in stats if key not in _PHASE_FIELDS and stats[key] is not None)

    @property
    def is_complete(self) -> bool:
        return self.took_ns is not None

    def complete(self, took_ns: int) -> None:
        """Take note that the phase is over, after `took_ns` (kept, should it not say when it began or ended)."""
        self.took_ns = took_ns

    def elapsed_ns(self, benchmark_ns: Optional[int], now_ns: int) -> int:
        """Return how long the phase took, or takes by now (in the benchmark's clock, or, while unknown, in ours)."""
        if not self.has_begun:
            return 0
        if self.start_ns is not None and self.end_ns is not None:
            return max(0, self.end_ns - self.start_ns)
        if self.took_ns is not None:
            return self.took_ns
        if self.start_ns is not None and benchmark_ns is not None:
            return max(0, benchmark_ns - self.start_ns)
        return max(0, now_ns - self.first_ns)

    def percent(self, elapsed_ns: int) -> float:
        """Return how far the phase is, 0 to 100: the target that is reached first counts, as in AIPerf."""
        if self.is_complete:
            return 100.0
        shares = (
            self.done / self.expected if self.expected else 0.0,
            elapsed_ns / 1e9 / self.duration_sec if self.duration_sec and self.start_ns is not None else 0.0,
            self.sessions_done / self.sessions if self.sessions else 0.0,
        )
        return min(100.0, 100.0 * max(shares))

    def eta_sec(self, elapsed_ns: int) -> Optional[float]:
        """Return the seconds left at the pace so far; None when there is no pace or no target."""
        percent = self.percent(elapsed_ns)
        if self.is_complete or percent >= 100:
            return 0.0
        return elapsed_ns / 1e9 * (100 - percent) / percent if percent > 0 else self.duration_sec

    def answer(self, elapsed_ns: int, eta_sec: Optional[float]) -> dict[str, Any]:
        """Return the phase as /api/progress has it: AIPerf's names, with what can be computed from them."""
        return {
            **self.extra,
            "phase": self.kind,
            "phase_name": self.name,
            "start_ns": self.start_ns,
            "requests_end_ns": self.end_ns,
            "total_expected_requests": self.expected,
            "expected_duration_sec": self.duration_sec,
            "requests_sent": max(self.sent, self.done),
            "requests_completed": self.done,
            "requests_cancelled": self.cancelled,
            "request_errors": self.failed,
            "requests_in_flight": self.in_flight,
            "success_records": self.success_records,
            "error_records": self.error_records,
            "complete": self.is_complete,
            "elapsed_ns": elapsed_ns,
            "percent_complete": self.percent(elapsed_ns),
            "eta_sec": eta_sec,
            "requests_per_second": self.done / elapsed_ns * 1e9 if elapsed_ns else None,
        }

    @property
    def in_flight(self) -> int:
        return 0 if self.is_complete else max(0, self.sent - self.done - self.cancelled)

    def history_row(self) -> dict[str, Any]:
        return {
            "unit": "requests",
            "header": f"Requests of phase {self.name}",
            "sent": max(self.sent, self.done),
            "completed": self.done,
            "errors": self.failed,
            "cancelled": self.cancelled,
            "in_flight": self.in_flight,
        }


# Counters of a Phase, and the fields of `stats` that feed them.
_PHASE_COUNTERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sent": ("requests_sent", "final_requests_sent"),
        "completed": ("requests_completed", "final_requests_completed"),
        "cancelled": ("requests_cancelled", "final_requests_cancelled"),
        "errors": ("request_errors", "final_request_errors"),
        "sessions_done": ("completed_sessions", "final_completed_sessions"),
        "success_records": _SUCCESS_FIELDS,
        "error_records": _ERROR_FIELDS,
    }
)
_PHASE_FIELDS = frozenset(
    {
        *(
            name
            for names in _PHASE_COUNTERS.values()
            for name in names
            if not name.startswith(("final_", "completed_"))
        ),
        *("phase", "phase_name", "start_ns", "requests_end_ns", "total_expected_requests", "expected_duration_sec"),
    }
)


# -- Workers ---------------------------------------------------------------------------------------------------------


class Worker:
    """What is known of one worker."""

    def __init__(self) -> None:
        self.status = "idle"  # one of WORKER_STATUSES, as AIPerf's worker manager judges it
        self.startup_state: Optional[str] = None  # "starting", "ready", ... (0.13)
        self.tasks: dict[str, Any] = {"total": 0, "completed": 0, "failed": 0}  # requests, over all phases
        self.records: dict[str, Any] = {"success_records": 0, "error_records": 0}  # records, over all phases
        self.health: Optional[dict[str, Any]] = None  # cpu_usage in percent, memory_usage in bytes, uptime in s, ...
        self.last_update_ns: Optional[int] = None  # bus clock, ns

    def update(
        self, now_ns: int, *, status: Any = None, startup: Any = None, tasks: Any = None, health: Any = None
    ) -> None:
        """Take over what is given and usable."""
        self.status = _text(status) or self.status
        self.startup_state = _text(startup) or self.startup_state
        self.tasks.update((key, value) for key, value in _object(tasks).items() if value is not None)
        self.health = _object(health) or self.health
        self.last_update_ns = now_ns

    def update_records(self, stats: Mapping[str, Any]) -> None:
        """Take over the worker's part of processing_stats, by either generation's names."""
        for field, names in (("success_records", _SUCCESS_FIELDS), ("error_records", _ERROR_FIELDS)):
            found = [number for name in names if (number := _count(stats.get(name))) is not None]
            self.records[field] = found[0] if found else self.records[field]

    def answer(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "startup_state": self.startup_state,
            "task_stats": self.tasks,
            "processing_stats": self.records,
            "health": self.health,
            "last_update_ns": self.last_update_ns,
        }


# -- Metrics, parsed late --------------------------------------------------------------------------------------------


class Latest:
    """The last message of a type that comes often, with what was last read from one."""

    def __init__(self, read: Callable[[bytes], dict[str, Any]]) -> None:
        self._read = read  # payload -> value; raises BusMessageError
        self._pending: Optional[bytes] = None  # the payload that nobody has asked for yet
        self._value: dict[str, Any] = {}  # what the last good payload said
        self.read_ns: Optional[int] = None  # bus clock, ns: when a payload was last read on arrival
        self.late_errors = 0  # payloads that proved bad when they were read late

    def offer(self, payload: bytes, now_ns: int) -> bool:
        """Take a payload; read it now if none was read for a while, which is what the answer tells.

        Raises:
            BusMessageError: it was read now, and is bad; what was known stays.
        """
        if self.read_ns is not None and 0 <= now_ns - self.read_ns < EAGER_PARSE_NS:
            self._pending = payload
            return False
        self.set(self._read(payload))
        self.read_ns = now_ns
        return True

    def set(self, value: dict[str, Any]) -> None:
        self._value, self._pending = value, None

    def get(self) -> dict[str, Any]:
        """Return the value of the last good payload."""
        payload, self._pending = self._pending, None
        if payload is not None:
            try:
                self._value = self._read(payload)
            except BusMessageError:
                self.late_errors += 1
        return self._value


def _read_rows(payload: bytes) -> dict[str, Any]:
    """Return the rows of a message by tag, in display units."""
    rows = read_message(payload).get("metrics")
    if not isinstance(rows, list):
        raise BusMessageError("bad_shape", "a metrics message without a list of metrics")
    return display_rows(rows)


def _read_server_metrics(payload: bytes) -> dict[str, Any]:
    """Return a realtime_server_metrics message without its envelope and nulls."""
    message = read_message(payload)
    if not isinstance(message.get("endpoint_summaries"), dict):
        raise BusMessageError("bad_shape", "server metrics without endpoint_summaries")
    return _without_envelope(message)


def _without_envelope(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in _ENVELOPE_FIELDS and value is not None}


def _telemetry_rows(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the final telemetry summary as rows with the tags that the real-time messages use."""
    rows = {}
    for endpoint, found in _items(summary.get("endpoints")):
        source = "_".join(re.split("[:/.]", endpoint))
        for _, gpu in _items(found.get("gpus")):
            index, name, uuid = (gpu.get(key) for key in ("gpu_index", "gpu_name", "gpu_uuid"))
            ending = f"_dcgm_{source}_gpu{_count(index) or 0}_{text_or(uuid, '')[:12]}"
            for metric, row in _items(gpu.get("metrics")):
                title = text_or(row.get("display_name"), metric.replace("_", " "))
                header = f"{title} | {endpoint} | GPU {_count(index) or 0} | {text_or(name, '')}"
                rows.update(display_rows([{**row, "tag": metric + ending, "header": header}]))
    return rows


# -- History ---------------------------------------------------------------------------------------------------------


class SeriesGroup:
    """Series that are sampled together: one column of times, one of values for each (tag, statistic)."""

    def __init__(self) -> None:
        self.interval_ns = HISTORY_INTERVAL_NS  # bus time between two points
        self.times = array("q")  # bus clock, ns, rising
        self.columns: dict[tuple[str, str], array[float]] = {}  # values in the metric's unit; NaN where there was none
        self.about: dict[str, tuple[str, str]] = {}  # tag -> (unit, header)
        self._due_ns: Optional[int] = None  # bus clock, ns: when the next point may be taken

    def is_due(self, now_ns: int) -> bool:
        return self._due_ns is None or now_ns >= self._due_ns

    def sample(self, now_ns: int, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Append one point; when none is due, put it in the place of the last (the end of a phase must show)."""
        if self.times and now_ns <= self.times[-1]:
            return  # the clock stands still or was set back: the times must rise
        if self.is_due(now_ns):
            grid_ns = self._due_ns if self._due_ns is not None else now_ns
            # On a grid, so that messages that come a little early now and then do not halve the pace.
            self._due_ns = max(grid_ns + self.interval_ns, now_ns + self.interval_ns // 2)
            self.times.append(now_ns)
            for column in self.columns.values():
                column.append(math.nan)
        else:
            self.times[-1] = now_ns
        for tag, row in rows.items():
            self._set_last(tag, row)
        if len(self.times) >= HISTORY_MAX_POINTS:
            self._thin()

    def _set_last(self, tag: str, row: Mapping[str, Any]) -> None:
        self.about[tag] = (text_or(row.get("unit"), ""), text_or(row.get("header"), tag))
        for stat, value in row.items():
            if not is_number(value):
                continue
            column = self.columns.get((tag, stat))
            if column is None and len(self.columns) < HISTORY_MAX_SERIES:
                column = self.columns[tag, stat] = array("d", [math.nan]) * len(self.times)
            if column is not None:
                column[-1] = value

    def _thin(self) -> None:
        """Drop every second point. Where messages come less often than points may be taken, their pace counts."""
        pace_ns = (self.times[-1] - self.times[0]) // (len(self.times) - 1)
        self.interval_ns = 2 * (pace_ns if pace_ns > 1.5 * self.interval_ns else self.interval_ns)
        self.times = self.times[::2]
        for key, column in self.columns.items():
            self.columns[key] = column[::2]
        self._due_ns = self.times[-1] + self.interval_ns

    def points(self, tag: str, stat: str, since_ns: Optional[int]) -> list[list[float]]:
        """Return [time, value] pairs later than `since_ns`; points without a value are left out."""
        start = 0 if since_ns is None else bisect_right(self.times, since_ns)
        column = self.columns.get((tag, stat), array("d"))
        return [[t, v] for t, v in zip(self.times[start:], column[start:]) if not math.isnan(v)]

    def stats_of(self, tag: str) -> list[str]:
        return [stat for found, stat in self.columns if found == tag]


class History:
    """The time series of a run."""

    def __init__(self) -> None:
        # by name: "metrics" and "telemetry" (by AIPerf's tags), "server" (server:...) and "phase" (phase:NAME)
        self.groups = {name: SeriesGroup() for name in ("metrics", "telemetry", "server", "phase")}

    def group_of(self, tag: str) -> Optional[str]:
        return next((name for name, group in self.groups.items() if tag in group.about), None)

    def overview(self, start_ns: Optional[int]) -> dict[str, Any]:
        """Return what there is, by tag."""
        tags: dict[str, Any] = {}
        for name, group in self.groups.items():
            for tag, (unit, header) in group.about.items():
                tags[tag] = {"unit": unit, "header": header, "group": name, "stats": []}
            for tag, stat in group.columns:
                tags[tag]["stats"].append(stat)
        groups = self.groups.values()
        return {
            "start_ns": start_ns,
            "interval_sec": max(group.interval_ns for group in groups) / 1e9,
            "points": max(len(group.times) for group in groups),
            "tags": tags,
        }

    def series(self, tag: str, stats: Sequence[str], since_ns: Optional[int]) -> list[dict[str, Any]]:
        """Return the series of a tag that has a group: one for each of its statistics, or of those asked for."""
        group = self.groups[self.group_of(tag) or "metrics"]
        unit, header = group.about[tag]
        wanted = [stat for stat in group.stats_of(tag) if not stats or stat in stats]
        return [
            {
                "tag": tag,
                "stat": stat,
                "unit": "" if stat == "count" else unit,
                "header": header,
                "interval_sec": group.interval_ns / 1e9,
                "points": group.points(tag, stat, since_ns),
            }
            for stat in wanted
        ]


def _server_rows(message: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return server metrics as rows by tag: `server:ENDPOINT:METRIC{label="value"}`."""
    rows = {}
    for series in server_series(message.get("endpoint_summaries")):
        labels = ",".join(f'{name}="{value}"' for name, value in series.labels)
        tag = (
            f"server:{series.endpoint}:{series.name}{{{labels}}}"
            if labels
            else f"server:{series.endpoint}:{series.name}"
        )
        rows[tag] = {"unit": "", **series.stats, "header": series.title}
    return rows


# -- Configuration ---------------------------------------------------------------------------------------------------

CONFIG_ORIGINS = ("file", "command", "bus", "phases")  # the first that says something counts
_CONFIG_WRAPPERS = ("input_config", "config", "user_config", "benchmark", "benchmark_config", "cfg")
_IDENTITY_FIELDS = ("benchmark_id", "model", "endpoint_type", "streaming", "concurrency", "request_rate")


def _plain_keys(value: Any) -> dict[str, Any]:
    """Return an object with keys that compare: `modelNames`, `model-names` and `model_names` become `modelnames`."""
    return {re.sub("[-_]", "", key).lower(): inner for key, inner in _object(value).items() if inner is not None}


def _config_sections(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a configuration's own level, and those of what it may be wrapped in."""
    sections = [config, *(_object(config.get(key)) for key in _CONFIG_WRAPPERS)]
    return [_plain_keys(section) for section in sections if section]


def _first_profiling_phase(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the phase that AIPerf takes concurrency and rate from: the first that profiles."""
    phases = section.get("phases")
    named = [{"name": name, **_object(phase)} for name, phase in phases.items()] if isinstance(phases, dict) else phases
    found = [_plain_keys(phase) for phase in _list(named)]
    kinds = [text_or(phase.get("phasekind", phase.get("phase")), text_or(phase.get("name"), "")) for phase in found]
    return next((phase for phase, kind in zip(found, kinds) if phase and kind != "warmup"), {})


def _model_names(value: Any) -> Optional[str]:
    """Return model names joined as AIPerf's exporter joins them; they come as text, list, or objects with a name."""
    if isinstance(value, dict):
        value = value.get("names") or value.get("items") or value.get("name")
    if isinstance(value, list):
        names = (one.get("name") if isinstance(one, dict) else one for one in value)
        return _text(",".join(sorted({name for name in names if isinstance(name, str)})))
    return _text(value)


def _truth(value: Any) -> Optional[bool]:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def _number_in(value: Any) -> Optional[float]:
    """Return a positive number, also one written as text (command lines and YAML have such)."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,15}(\.\d{1,15})?", value, re.ASCII):
        value = float(value)
    return _positive(value)


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of the benchmark's identity, as far as it does.

    Knows the nesting of AIPerf 0.3 to 0.13, flat keys as on the command line, and any spelling of the keys.
    """
    found: dict[str, Any] = {}
    for section in _config_sections(config):
        endpoint, loadgen = _plain_keys(section.get("endpoint")), _plain_keys(section.get("loadgen"))
        load = {**_first_profiling_phase(section), **loadgen}
        values = {
            "benchmark_id": _text(section.get("benchmarkid")),
            "model": _first(_model_names, endpoint, section, keys=("modelnames", "models", "modelname", "model")),
            "endpoint_type": _text(endpoint.get("type")) or _first(_text, endpoint, section, keys=("endpointtype",)),
            "streaming": _first(_truth, endpoint, section, keys=("streaming",)),
            "concurrency": _first(_number_in, load, section, keys=("concurrency",)),
            "request_rate": _first(_number_in, load, section, keys=("requestrate", "rate")),
        }
        found = {**{field: value for field, value in values.items() if value is not None}, **found}
    if "concurrency" in found:
        found["concurrency"] = max(1, int(found["concurrency"]))
    return found


def _first(read: Callable[[Any], Any], *sections: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return what `read` first makes of one of the keys in one of the sections."""
    values = (read(section.get(key)) for section in sections for key in keys)
    return next((value for value in values if value is not None), None)


# -- One run ---------------------------------------------------------------------------------------------------------


class Run:
    """What is known of one benchmark, from the first message to the end."""

    def __init__(self) -> None:
        # Time: bus clock, ns, but for `skew_ns`
        self.first_ns: Optional[int] = None  # first message
        self.last_ns: Optional[int] = None  # latest message
        self.end_ns: Optional[int] = None  # when the end became known
        self.skew_ns: Optional[int] = None  # bus clock minus the benchmark's clock
        # Life
        self.state = "waiting"  # one of STATES, as far as it was announced or follows from what happens
        self.end: Optional[str] = None  # one of ENDS
        self.error: Optional[str] = None  # what went wrong, in a line
        self.fell_silent = False  # it was silent for so long that a registration is another run's
        self.announces_states = False  # system_state_changed was heard (0.13)
        self.failed_to_configure = False  # a service or the data set could not be configured
        self.stopped_early = False  # AIPerf began to stop while requests were due
        self.was_cancelled = False  # a command or a result says so
        self.is_shut_down = False  # the state or the command `shutdown` was heard
        self.is_exported = False  # results_exported was heard
        self.is_complete = False  # benchmark_complete was heard
        self.child_exit: Optional[str] = None  # how the child ended; "" when it ended well
        # Identity
        self.benchmark_id: Optional[str] = None  # from the data set's notification, or the server metrics
        self.profile_id: Optional[str] = None  # as messages carry it, if they do
        self.config: dict[str, Any] = {}  # what profile_configure carried (up to 0.6)
        self.phase_configs: dict[str, dict[str, Any]] = {}  # credit_phase_start.config by phase
        # Progress
        self.phases: dict[str, Phase] = {}  # by name, in order of appearance
        self.phase: Optional[str] = None  # name of the latest that began
        self.percent_floor = 0.0  # percent, 0 to 100: the highest that was ever answered
        # Workers
        self.workers: dict[str, Worker] = {}  # by service id
        self.worker_groups: dict[str, dict[str, Any]] = {}  # by group id, as worker_group_stats has them
        # Metrics
        self.metrics = Latest(_read_rows)  # rows by tag, in display units
        self.telemetry = Latest(_read_rows)  # rows by tag
        self.server_metrics = Latest(_read_server_metrics)  # realtime_server_metrics without its envelope
        self.history = History()  # figures over time
        # Results
        self.final_rows: dict[str, dict[str, Any]] = {}  # the final metrics by tag, in display units
        self.results: Optional[dict[str, Any]] = None  # AIPerf's results object, its records in display units
        self.has_last_results = False  # no further results will come

    # Time

    def set_clock(self, benchmark_ns: Any, now_ns: int) -> None:
        """Learn the difference of the clocks from a message that says when it was sent."""
        sent_ns = _count(benchmark_ns)
        if sent_ns:
            self.skew_ns = now_ns - sent_ns

    def until(self, now_ns: int) -> int:
        """Return the moment up to which the run's time counts, in bus time: its end, or its falling silent."""
        last_ns = now_ns if self.last_ns is None else self.last_ns
        return self.end_ns if self.end_ns is not None else min(now_ns, last_ns + STALE_AFTER_NS)

    def elapsed(self, phase: Phase, now_ns: int) -> int:
        """Return the time in ns that a phase takes by now."""
        until_ns = self.until(now_ns)
        return phase.elapsed_ns(None if self.skew_ns is None else until_ns - self.skew_ns, until_ns)

    def is_stale(self, now_ns: int) -> bool:
        return self.end is None and self.last_ns is not None and now_ns - self.last_ns >= STALE_AFTER_NS

    # Life

    def advance(self, state: str) -> Change:
        """Move on to a state that follows from what happens; never back."""
        if self.state not in STATES or STATES.index(state) <= STATES.index(self.state):
            return Change.NONE
        self.state = state
        return Change.STATUS

    @property
    def has_gone_far(self) -> bool:
        """Tell whether the run is past its configuration."""
        begun = any(phase.has_begun for phase in self.phases.values())
        early = self.state in STATES[: STATES.index("configuring") + 1]
        return begun or not early or self.end is not None or self.results is not None

    @property
    def did_anything(self) -> bool:
        counted = any(phase.sent or phase.done for phase in self.phases.values())
        return counted or bool(self.final_rows) or bool(self.metrics.get())

    def judge(self) -> Optional[str]:
        """Return the end that follows from what is known; None while the run goes on.

        The end may go missing on the bus, so each sign of it counts; a better one that comes later corrects it.
        """
        over = self.has_last_results or self.is_shut_down or self.is_exported or self.is_complete
        if not over and self.child_exit is None:
            return "failed" if self.failed_to_configure else None
        if self.was_cancelled:
            return "cancelled"
        if self.results is not None or self.is_exported:
            return "complete" if self.did_anything or self.is_exported else "failed"
        if self.failed_to_configure or self.error:
            return "failed"
        if self.is_complete or self.child_exit == "":
            return "complete" if self.did_anything else "failed"
        return "cancelled" if self.stopped_early and not self.child_exit else "failed"

    def settle(self, now_ns: int) -> Change:
        """Take over the end that follows from what is known."""
        end = self.judge()
        if end == self.end:
            return Change.NONE
        ended = Change.ENDED if self.end is None else Change.NONE
        self.end, self.end_ns = end, self.end_ns if self.end_ns is not None else now_ns
        if end == "failed" and not self.error:
            anything = "ended without results" if self.did_anything else "ended before a request was sent"
            self.error = self.child_exit or anything
        return ended | Change.STATUS | Change.PROGRESS | Change.RESULTS

    def fail(self, error: Any) -> Change:
        self.error = self.error or _error_text(error) or "unknown error"
        return Change.STATUS

    # Messages: each takes over what is there and usable, and tells what changed. None raises.

    def on_state(self, message: dict[str, Any], now_ns: int) -> Change:
        self.announces_states = True
        self.state = message["state"]
        self.is_shut_down = self.is_shut_down or self.state == "shutdown"
        if self.state == "stopping":
            self._stop_early()
        return Change.STATUS

    def _stop_early(self) -> None:
        profiling = [phase for phase in self.phases.values() if not phase.is_warmup]
        unfinished = not profiling or not all(phase.is_complete for phase in profiling)
        self.stopped_early = self.stopped_early or (bool(self.phases) and unfinished and self.results is None)

    def on_command(self, message: dict[str, Any], now_ns: int) -> Change:
        """Follow the controller's commands, from which the state follows before 0.13."""
        command = message["command"]
        if command == "profile_configure":
            self.config = _object(message.get("config")) or self.config
            return Change.CONFIG | self.advance("configuring")
        if command == "profile_start":
            return self.advance("profiling")
        if command == "profile_complete":
            return self.advance("processing")
        if command == "profile_cancel":
            self.was_cancelled = True
            return self.advance("stopping")
        if command == "shutdown":
            self.is_shut_down = True
            return self.advance("shutdown")
        return Change.NONE

    def on_command_response(self, message: dict[str, Any], now_ns: int) -> Change:
        """Notice a service that could not do what the run cannot do without."""
        if message.get("status") != "failure" or message["command"] not in ("profile_configure", "profile_start"):
            return Change.NONE
        self.failed_to_configure = True
        return self.fail(message.get("error"))

    def on_configuration_failed(self, message: dict[str, Any], now_ns: int) -> Change:
        self.failed_to_configure = True
        return self.fail(message.get("error"))

    def on_error(self, message: dict[str, Any], now_ns: int) -> Change:
        return self.fail(message.get("error"))

    def on_dataset(self, message: dict[str, Any], now_ns: int) -> Change:
        """Learn the benchmark's id; before 0.13 the data set is the last thing to get ready."""
        self.benchmark_id = _text(message.get("benchmark_generation")) or self.benchmark_id
        return Change.CONFIG | (Change.NONE if self.announces_states else self.advance("ready"))

    def on_phases_configured(self, message: dict[str, Any], now_ns: int) -> Change:
        """Learn of the phases to come, so that the first is not taken for the whole."""
        for config in map(_object, _list(message.get("configs"))):
            name = _text(config.get("phase_name")) or _text(config.get("phase"))
            phase = self._phase({**config, "phase_name": name}, now_ns) if name else None
            if phase is not None:
                phase.expected = _count(config.get("total_expected_requests")) or phase.expected
                phase.duration_sec = _positive(config.get("expected_duration_sec")) or phase.duration_sec
        return Change.PROGRESS

    def _phase(self, stats: Mapping[str, Any], now_ns: int) -> Optional[Phase]:
        """Return the phase of that name, a new one if need be; None past the limit."""
        name = stats["phase_name"]
        if name not in self.phases and len(self.phases) < MAX_PHASES:
            self.phases[name] = Phase(stats, now_ns)
        return self.phases.get(name)

    def on_phase(self, message: dict[str, Any], now_ns: int) -> Change:
        """Follow a credit_phase_* message."""
        stats, kind = phase_stats(message), message["message_type"]
        phase = self._phase(stats, now_ns)
        if phase is None:
            return Change.NONE
        phase.update(stats)
        config = _object(message.get("config"))
        if config:
            self.phase_configs[phase.name] = config
        if kind != "credit_phase_progress":  # progress does not say when it was sent
            self.set_clock(stats.get(_PHASE_CLOCKS[kind]), now_ns)
        if kind == "credit_phase_complete":
            phase.complete(self.elapsed(phase, now_ns))
        else:
            self.phase = phase.name
        self._sample_phases(now_ns, at_once=phase.is_complete)
        moved = Change.NONE if self.announces_states else self.advance("profiling")
        return moved | Change.PROGRESS | Change.STATUS | (Change.CONFIG if config else Change.NONE)

    def _sample_phases(self, now_ns: int, *, at_once: bool = False) -> None:
        group = self.history.groups["phase"]
        if at_once or group.is_due(now_ns):
            begun = (phase for phase in self.phases.values() if phase.has_begun)
            group.sample(now_ns, {f"phase:{phase.name}": phase.history_row() for phase in begun})

    def on_records(self, message: dict[str, Any], now_ns: int) -> Change:
        """Follow processing_stats, and its last words in all_records_received."""
        self.set_clock(message.get("request_ns"), now_ns)
        for worker_id, stats in _items(message.get("worker_stats")):
            worker = self._worker(worker_id)
            if worker is not None:
                worker.update_records(stats)
        stats = _object(message.get("processing_stats")) or _object(message.get("final_processing_stats"))
        phase = self._phase_of_records(stats, now_ns) if stats else None
        if phase is not None and phase.start_ns in (None, stats.get("start_ns", phase.start_ns)):
            phase.update(stats)
            self._sample_phases(now_ns)
        moved = self.advance("processing") if "final_processing_stats" in message else Change.NONE
        return moved | Change.PROGRESS | Change.WORKERS

    def _phase_of_records(self, stats: Mapping[str, Any], now_ns: int) -> Optional[Phase]:
        """Return the phase whose records are counted; before 0.5 they are those of the profiling, unnamed."""
        name = _text(stats.get("phase_name")) or _text(stats.get("phase")) or "profiling"
        return self._phase({**stats, "phase_name": name}, now_ns)

    def on_credits_complete(self, message: dict[str, Any], now_ns: int) -> Change:
        return self.advance("processing")

    def _worker(self, worker_id: str) -> Optional[Worker]:
        if worker_id not in self.workers and len(self.workers) < MAX_WORKERS:
            self.workers[worker_id] = Worker()
        return self.workers.get(worker_id)

    def _update_workers(self, now_ns: int, **columns: Any) -> Change:
        """Take over columns by worker id: status=, startup=, tasks=, health=."""
        for name, column in columns.items():
            for worker_id, value in _object(column).items():
                worker = self._worker(worker_id)
                if worker is not None:
                    worker.update(now_ns, **{name: value})
        return Change.WORKERS

    def on_worker_statuses(self, message: dict[str, Any], now_ns: int) -> Change:
        startup = message.get("worker_startup_states")
        return self._update_workers(now_ns, status=message["worker_statuses"], startup=startup)

    def on_worker_health(self, message: dict[str, Any], now_ns: int) -> Change:
        worker_id = message["service_id"]
        health, tasks = {worker_id: message.get("health")}, {worker_id: message.get("task_stats")}
        return self._update_workers(now_ns, health=health, tasks=tasks)

    def on_worker_startup(self, message: dict[str, Any], now_ns: int) -> Change:
        self.set_clock(message.get("request_ns"), now_ns)
        return self._update_workers(now_ns, startup={message["service_id"]: message.get("startup_state")})

    def on_worker_group(self, message: dict[str, Any], now_ns: int) -> Change:
        """Take over a group's own figures, and those of its workers."""
        group_id = message["group_id"]
        if group_id in self.worker_groups or len(self.worker_groups) < MAX_WORKERS:
            self.worker_groups[group_id] = _without_envelope(message)
        return self._update_workers(
            now_ns,
            status=message.get("worker_statuses"),
            startup=message.get("worker_startup_states"),
            tasks=message.get("worker_task_stats"),
            health=message.get("worker_health"),
        )

    def on_results(self, message: dict[str, Any], now_ns: int) -> Change:
        """Take over final results: process_all_results (0.12 and later), else process_records_result."""
        is_last = message["message_type"] == "process_all_results"
        if self.has_last_results and not is_last:
            return Change.NONE
        wrapped = message["results"]
        inner = _object(wrapped.get("results")) or wrapped
        self.final_rows = display_rows(inner.get("records")) or self.final_rows
        shown = {key: _display_list(inner[key]) for key in ("records", "warmup_records") if key in inner}
        self.results = {**wrapped, "results": {**inner, **shown}} if inner is not wrapped else {**inner, **shown}
        self.was_cancelled = self.was_cancelled or inner.get("was_cancelled") is True
        self.has_last_results = is_last or not self.announces_states
        self._count_results(inner, now_ns)
        return Change.METRICS | Change.RESULTS | Change.PROGRESS | self.advance("processing")

    def _count_results(self, inner: Mapping[str, Any], now_ns: int) -> None:
        """Complete the figures of the profiling phase from the results, where there is just one.

        After a cancel they count what no phase message did; who came late has heard no phase message at all.
        """
        profiling = [phase for phase in self.phases.values() if not phase.is_warmup]
        phase = profiling[0] if profiling else self._phase({"phase_name": "profiling"}, now_ns)
        if phase is None or len(profiling) > 1:
            return
        counts = {"success_records": "successful_request_count", "error_records": "error_request_count"}
        phase.update({field: inner.get(name) for field, name in counts.items()})
        phase.start_ns = phase.start_ns if phase.start_ns is not None else _count(inner.get("start_ns"))
        phase.end_ns = phase.end_ns if phase.end_ns is not None else _count(inner.get("end_ns"))

    def on_server_results(self, message: dict[str, Any], now_ns: int) -> Change:
        """Take over the final server metrics, which cover the profiling alone, and the benchmark's id."""
        results = _object(message["server_metrics_result"].get("results"))
        self.benchmark_id = self.benchmark_id or _text(results.get("benchmark_id"))
        summaries = _object(results.get("endpoint_summaries"))
        if summaries:
            self.server_metrics.set({**self.server_metrics.get(), "endpoint_summaries": summaries, "final": True})
        return Change.SERVER_METRICS | Change.CONFIG

    def on_telemetry_results(self, message: dict[str, Any], now_ns: int) -> Change:
        """Take over the final GPU telemetry where none came in real time."""
        rows = _telemetry_rows(_object(message["telemetry_result"].get("results")))
        if rows and not self.telemetry.get():
            self.telemetry.set(rows)
        return Change.TELEMETRY

    def on_exported(self, message: dict[str, Any], now_ns: int) -> Change:
        self.is_exported = True
        self.was_cancelled = self.was_cancelled or message.get("was_cancelled") is True
        return Change.PROGRESS

    def on_complete(self, message: dict[str, Any], now_ns: int) -> Change:
        self.is_complete = True
        self.was_cancelled = self.was_cancelled or message.get("was_cancelled") is True
        return Change.PROGRESS

    def take_metrics(self, message_type: str, payload: bytes, now_ns: int) -> Change:
        """Keep a metrics message for those who ask; read it now when a point of its history is due.

        Raises:
            BusMessageError: it was read now, and is bad.
        """
        latest, group, change = {
            "realtime_metrics": (self.metrics, "metrics", Change.METRICS),
            "realtime_telemetry_metrics": (self.telemetry, "telemetry", Change.TELEMETRY),
            "realtime_server_metrics": (self.server_metrics, "server", Change.SERVER_METRICS),
        }[message_type]
        if latest.offer(payload, now_ns) and self.history.groups[group].is_due(now_ns):
            rows = latest.get()
            self.history.groups[group].sample(now_ns, _server_rows(rows) if group == "server" else rows)
        return change

    # Answers

    def main_phases(self) -> list[Phase]:
        """Return the phases that the top-level figures are of: profiling once it has begun, the warm-up before."""
        profiling = [phase for phase in self.phases.values() if not phase.is_warmup]
        warmup = [phase for phase in self.phases.values() if phase.is_warmup and phase.has_begun]
        return profiling if any(phase.has_begun for phase in profiling) or not warmup else warmup

    def percent(self, now_ns: int) -> float:
        """Return how far the profiling is, 0 to 100: a warm-up at 100 % followed by 0 % would be going back."""
        profiling = [phase for phase in self.phases.values() if not phase.is_warmup]
        percents = [phase.percent(self.elapsed(phase, now_ns)) for phase in profiling]
        weights = _weights(profiling)
        total = sum(weights)
        shares = sum(percent * weight for percent, weight in zip(percents, weights))
        now = 100.0 if self.end == "complete" else shares / total if total else 0.0
        # Figures may be corrected downwards, and clocks too: what was once answered is not taken back.
        self.percent_floor = min(100.0, max(self.percent_floor, now))
        return self.percent_floor

    def eta_sec(self, phases: Sequence[Phase], now_ns: int) -> Optional[float]:
        """Return the seconds that phases still take; None when nobody can tell."""
        if all(phase.is_complete for phase in phases) or self.end == "complete":
            return 0.0 if phases else None
        if self.end is not None or self.is_stale(now_ns):
            return None
        left = [phase.eta_sec(self.elapsed(phase, now_ns)) for phase in phases]
        return None if None in left else sum(filter(None, left))

    def progress(self, now_ns: int) -> dict[str, Any]:
        main = self.main_phases()
        expected = [phase.expected for phase in main]
        starts = [phase.start_ns for phase in main if phase.start_ns is not None]
        return {
            "total": sum(filter(None, expected)) if expected and None not in expected else None,
            "completed": sum(phase.done for phase in main),
            "errors": sum(phase.failed for phase in main),
            "cancelled": sum(phase.cancelled for phase in main),
            "warmup": bool(main) and main[0].is_warmup,
            "start_ns": min(starts, default=None),
            "elapsed_ns": sum(self.elapsed(phase, now_ns) for phase in main),
            "percent_complete": self.percent(now_ns),
            "eta_sec": self.eta_sec(main, now_ns),
            "phases": {
                name: phase.answer(self.elapsed(phase, now_ns), self.eta_sec([phase], now_ns))
                for name, phase in self.phases.items()
            },
            "results_exported": self.is_exported,
            "system_state": self.state,
        }

    def elapsed_sec(self, now_ns: int) -> Optional[float]:
        """Return the seconds since the first phase began, else since the first message; None before any."""
        if any(phase.has_begun for phase in self.phases.values()):
            return sum(self.elapsed(phase, now_ns) for phase in self.phases.values()) / 1e9
        return None if self.first_ns is None else max(0, self.until(now_ns) - self.first_ns) / 1e9

    def started_ns(self) -> Optional[int]:
        starts = [phase.start_ns for phase in self.phases.values() if phase.start_ns is not None]
        return min(starts, default=self.first_ns)


def _weights(phases: Sequence[Phase]) -> list[float]:
    """Return what part each phase is of the whole: by requests or by duration where all have a target, else alike."""
    for targets in ([phase.expected for phase in phases], [phase.duration_sec for phase in phases]):
        if all(targets):
            return [target for target in targets if target]
    return [1.0 for _ in phases]


def _display_list(rows: Any) -> Any:
    """Return a list of rows in display units, hidden ones left out; anything else as it is."""
    return [row for row in map(display_row, rows) if row is not None] if isinstance(rows, list) else rows


# The field of `stats` that says when a message was sent.
_PHASE_CLOCKS: Mapping[str, str] = MappingProxyType(
    {
        "credit_phase_start": "start_ns",
        "credit_phase_sending_complete": "sent_end_ns",
        "credit_phase_complete": "requests_end_ns",
    }
)
# Message type -> (what takes it, the field without which it cannot be used, that field's type)
_HANDLERS: Mapping[str, tuple[Callable[[Run, dict[str, Any], int], Change], str, type]] = MappingProxyType(
    {
        **dict.fromkeys(PHASE_MESSAGE_TYPES, (Run.on_phase, "", object)),
        "all_records_received": (Run.on_records, "", object),
        "benchmark_complete": (Run.on_complete, "", object),
        "command": (Run.on_command, "command", str),
        "command_response": (Run.on_command_response, "command", str),
        "credit_phases_configured": (Run.on_phases_configured, "configs", list),
        "credits_complete": (Run.on_credits_complete, "", object),
        "dataset_configuration_failed": (Run.on_configuration_failed, "", object),
        "dataset_configured_notification": (Run.on_dataset, "", object),
        "error": (Run.on_error, "error", object),
        "process_all_results": (Run.on_results, "results", dict),
        "process_records_result": (Run.on_results, "results", dict),
        "process_server_metrics_result": (Run.on_server_results, "server_metrics_result", dict),
        "process_telemetry_result": (Run.on_telemetry_results, "telemetry_result", dict),
        "processing_stats": (Run.on_records, "processing_stats", dict),
        "results_exported": (Run.on_exported, "", object),
        "service_error": (Run.on_error, "error", object),
        "system_state_changed": (Run.on_state, "state", str),
        "worker_group_stats": (Run.on_worker_group, "group_id", str),
        "worker_health": (Run.on_worker_health, "service_id", str),
        "worker_startup_state": (Run.on_worker_startup, "service_id", str),
        "worker_status_summary": (Run.on_worker_statuses, "worker_statuses", dict),
    }
)


def _read_known(message_type: str, payload: bytes) -> dict[str, Any]:
    """Return a message that its handler can take without raising.

    Raises:
        BusMessageError: `not_json`, `not_object` or `bad_shape`.
    """
    message = read_message(payload)
    field, wanted = _HANDLERS[message_type][1:]
    value = message.get(field)
    if field and (not isinstance(value, wanted) or value in (None, "")):
        raise BusMessageError("bad_shape", f"{message_type} without a usable {field}")
    message["message_type"] = message_type  # the topic decides
    if message_type in PHASE_MESSAGE_TYPES:
        phase_stats(message)
    return message


# -- The state -------------------------------------------------------------------------------------------------------


class BenchmarkState:
    """What is known of the benchmark: a reducer over bus messages, and the answers made from it.

    Every `now_ns` is the bus clock, in ns. No message makes it raise anything but BusMessageError, and then nothing has
    changed. Payloads must be free of credentials already: what comes in may come out.
    """

    def __init__(self) -> None:
        self._configs: dict[str, dict[str, Any]] = {}  # given from outside, by origin ("file", "command")
        self._run = Run()  # the run at hand
        self._late_errors_before = 0  # messages of earlier runs that proved bad when they were read late

    @property
    def last_message_ns(self) -> Optional[int]:
        """The bus clock at the latest message of this run; None before any."""
        return self._run.last_ns

    @property
    def end(self) -> Optional[str]:
        """How the run ended: "complete", "cancelled" or "failed"; None while it goes on."""
        return self._run.end

    @property
    def late_errors(self) -> int:
        """Count the metrics messages that proved bad after `apply` had taken them."""
        run = self._run
        latest = (run.metrics, run.telemetry, run.server_metrics)
        return self._late_errors_before + sum(one.late_errors for one in latest)

    def apply(self, message_type: str, payload: bytes, now_ns: int) -> Change:
        """Take one bus message.

        Args:
            message_type: from the topic, without target and `$`.
            payload: the JSON object as it came, without credentials.
            now_ns: bus clock at reception.

        Raises:
            BusMessageError: it cannot be used; the state is as before. A metrics message that arrives within 100 ms
                of the one before is judged when somebody asks for it; if it is bad, `late_errors` grows.
        """
        self._run.fell_silent = self._run.fell_silent or self._run.is_stale(now_ns)
        if message_type in METRICS_MESSAGE_TYPES:
            change = self._run.take_metrics(message_type, payload, now_ns)
        elif message_type in _HANDLERS:
            change = self._apply_known(message_type, _read_known(message_type, payload), now_ns)
        else:
            change = Change.NONE
        run = self._run
        if run.first_ns is None:
            run.first_ns = now_ns
            change |= run.advance("initializing")
        if message_type in _SIGNS_OF_LOAD:
            run.fell_silent = False
        run.last_ns = now_ns
        return change

    def _apply_known(self, message_type: str, message: dict[str, Any], now_ns: int) -> Change:
        change = Change.NONE
        if self._begins_run(message_type, message):
            self._late_errors_before = self.late_errors
            self._run = Run()
            change = ~Change.ENDED & _ALL_CHANGES
        run = self._run
        run.profile_id = _text(message.get("profile_id")) or run.profile_id
        change |= _HANDLERS[message_type][0](run, message, now_ns)
        return change | run.settle(now_ns)

    def _begins_run(self, message_type: str, message: dict[str, Any]) -> bool:
        """Tell whether a message can only come from another run than the one at hand."""
        run = self._run
        is_over = run.end is not None or run.fell_silent
        if message_type == "system_state_changed":
            state = message["state"]
            early = state in ("initializing", "configuring") and (run.has_gone_far or is_over)
            return early or (run.end is not None and state in ("ready", "profiling"))
        if message_type == "command":
            command = message["command"]
            restart = command == "profile_configure" and run.has_gone_far
            return restart or (is_over and command in ("profile_configure", "register_service", "spawn_workers"))
        if message_type == "worker_startup_state":
            return is_over and message.get("startup_state") == "starting"
        return message_type in PHASE_MESSAGE_TYPES and self._is_foreign_phase(message_type, message)

    def _is_foreign_phase(self, message_type: str, message: dict[str, Any]) -> bool:
        """Tell whether a phase began at another time than the one of that name, or begins after the end."""
        stats = phase_stats(message)
        known, start_ns = self._run.phases.get(stats["phase_name"]), _count(stats.get("start_ns"))
        if known is not None and known.start_ns is not None and start_ns is not None and start_ns != known.start_ns:
            return True
        begins = message_type == "credit_phase_start"
        again = begins and known is not None and known.is_complete
        return again or (self._run.end is not None and (begins or known is None))

    def end_child(self, exit_status_text: Optional[str], now_ns: int) -> Change:
        """Take note that the benchmark's process has ended.

        Args:
            exit_status_text: how, for people, such as "exit status 1"; None or "" when it ended well.
        """
        run = self._run
        run.child_exit = exit_status_text or ""
        if run.first_ns is None:
            run.first_ns = now_ns
        return run.settle(now_ns)

    def configure(self, config: Mapping[str, Any], origin: str) -> Change:
        """Take a configuration from outside; it outlives the run.

        Args:
            config: AIPerf's configuration in any spelling, without credentials.
            origin: "file" or "command"; the former counts before the latter, and both before what the bus says.
        """
        if origin not in CONFIG_ORIGINS:
            raise ValueError(f"unknown origin of a configuration: {origin}")
        self._configs[origin] = dict(config)
        return Change.CONFIG | Change.METRICS

    def is_stale(self, now_ns: int) -> bool:
        """Tell whether a running benchmark has been silent for 10 s."""
        return self._run.is_stale(now_ns)

    # Answers: each the body of an endpoint, or a part of it. They are to be read, not to be changed.

    def status(self, now_ns: int) -> dict[str, Any]:
        run = self._run
        return {
            "state": run.end or run.state,
            "phase": run.phase,
            "benchmark_id": self._identity().get("benchmark_id"),
            "profile_id": run.profile_id,
            "error": run.error if run.end in (None, "failed") else None,
            "stale": run.is_stale(now_ns),
            "started_ns": run.started_ns(),
            "elapsed_sec": run.elapsed_sec(now_ns),
        }

    def progress(self, now_ns: int) -> dict[str, Any]:
        return self._run.progress(now_ns)

    def metric_rows(self) -> dict[str, dict[str, Any]]:
        """Return the benchmark's metrics by tag, in display units: the final ones once there are."""
        return self._run.final_rows or self._run.metrics.get()

    def telemetry_rows(self) -> dict[str, dict[str, Any]]:
        """Return GPU telemetry by tag."""
        return self._run.telemetry.get()

    def metrics(self) -> dict[str, Any]:
        identity = self._identity()
        return {
            "aiperf_version": self._config_value("aiperfversion"),
            **{field: identity.get(field) for field in _IDENTITY_FIELDS},
            "final": bool(self._run.final_rows),
            "metrics": self.metric_rows(),
            "telemetry": self.telemetry_rows(),
        }

    def workers(self) -> dict[str, Any]:
        workers = self._run.workers
        return {
            "total_workers": len(workers),
            "active_workers": sum(worker.status in ACTIVE_WORKER_STATUSES for worker in workers.values()),
            "worker_statuses": {worker_id: worker.status for worker_id, worker in workers.items()},
            "workers": {worker_id: worker.answer() for worker_id, worker in workers.items()},
            "worker_groups": self._run.worker_groups,
        }

    def server_metrics(self) -> dict[str, Any]:
        found = self._run.server_metrics.get()
        return found or {"endpoint_summaries": {}, "message": "No server metrics available yet"}

    def results(self) -> dict[str, Any]:
        """Return how the run ended, with AIPerf's results. "running" while no end is known, also before the start."""
        return {"status": self._run.end or "running", "results": self._run.results}

    def config_answer(self) -> dict[str, Any]:
        """Return the configuration of the first origin that has one; {} when none has."""
        return next(iter(self._known_configs()), {})

    def _known_configs(self) -> list[dict[str, Any]]:
        """Return all configurations, the one that counts most first."""
        phases = {"phases": self._run.phase_configs} if self._run.phase_configs else {}
        found = {**self._configs, "bus": self._run.config or self._configs.get("bus", {}), "phases": phases}
        return [found[origin] for origin in CONFIG_ORIGINS if found.get(origin)]

    def _config_value(self, key: str) -> Optional[str]:
        sections = (section for config in self._known_configs() for section in _config_sections(config))
        return next((text for section in sections if (text := _text(section.get(key)))), None)

    def _identity(self) -> dict[str, Any]:
        """Return the identity field by field, each from the first origin that tells it."""
        found: dict[str, Any] = {}
        for config in reversed(self._known_configs()):
            found.update(identity_of(config))
        if self._run.benchmark_id:
            found["benchmark_id"] = self._run.benchmark_id
        return found

    def labels(self) -> dict[str, str]:
        """Return the identity as labels for Prometheus, as far as it is known, written as AIPerf's exporter does."""
        identity = self._identity()
        shown = {field: identity[field] for field in _IDENTITY_FIELDS if field in identity}
        if "streaming" in shown:
            shown["streaming"] = str(shown["streaming"]).lower()
        if "request_rate" in shown:
            shown["request_rate"] = float(shown["request_rate"])
        return {field: str(value) for field, value in shown.items()}

    def history(
        self, tags: Sequence[str] = (), stats: Sequence[str] = (), since_ns: Optional[int] = None
    ) -> Optional[dict[str, Any]]:
        """Return time series of this run.

        Args:
            tags: without one, the answer is what there is.
            stats: without one, all of each tag.
            since_ns: only points later than this, in bus time.

        Returns:
            One tag and one statistic: that series. More: `{"interval_sec", "series": [...]}`. None when a tag is
            unknown, or has none of the statistics.
        """
        history = self._run.history
        if not tags:
            return history.overview(self._run.first_ns)
        series = [history.series(tag, stats, since_ns) if history.group_of(tag) else [] for tag in tags]
        if not all(series):
            return None
        if len(tags) == 1 and len(stats) == 1:
            return series[0][0]
        found = [one for of_tag in series for one in of_tag]
        return {"interval_sec": max(one["interval_sec"] for one in found), "series": found}


_ALL_CHANGES = Change(1023)


# -- The state as families of samples --------------------------------------------------------------------------------

_PHASE_FAMILIES = (
    ("counter", "sent", "requests_sent", "Requests sent"),
    ("counter", "completed", "requests_completed", "Requests answered, failed ones included"),
    ("counter", "errors", "request_errors", "Requests that failed"),
    ("counter", "cancelled", "requests_cancelled", "Requests cancelled"),
    ("gauge", "expected", "total_expected_requests", "Requests the phase will send"),
)
_WORKER_FAMILIES = (
    ("gauge", "worker_cpu_percent", "health", "cpu_usage", "CPU usage of the worker", "percent"),
    ("gauge", "worker_memory_bytes", "health", "memory_usage", "Resident memory of the worker", "bytes"),
    ("gauge", "worker_threads", "health", "num_threads", "Threads of the worker", ""),
    ("counter", "worker_tasks", "task_stats", "total", "Requests given to the worker", ""),
    ("counter", "worker_tasks_completed", "task_stats", "completed", "Requests the worker completed", ""),
    ("counter", "worker_tasks_failed", "task_stats", "failed", "Requests the worker saw fail", ""),
)


def _add_status(found: FamilySet, status: Mapping[str, Any]) -> None:
    """Add what is there before anything is known, and therefore has no identity labels."""
    for state in dict.fromkeys((*STATES, *ENDS, status["state"])):
        head = ("aiperf_benchmark_state", "gauge", "State of the benchmark: 1 for the one it is in", "")
        found.add(head, (("state", state),), int(state == status["state"]))
    head = ("aiperf_benchmark_stale", "gauge", "Whether a running benchmark has fallen silent", "")
    found.add(head, (), int(status["stale"]))


def _add_progress(found: FamilySet, progress: Mapping[str, Any], labels: Labels) -> None:
    for kind, name, field, text in _PHASE_FAMILIES:
        for phase, figures in progress["phases"].items():
            head = (f"aiperf_phase_requests_{name}", kind, f"{text}, by phase", "")
            own = (*labels, ("phase", phase))
            found.add(head, own, figures[field], "_total" if kind == "counter" else "")
    ratio = progress["percent_complete"] / 100
    found.add(("aiperf_progress_ratio", "gauge", "How far the profiling is, 0 to 1", "ratio"), labels, ratio)
    elapsed = ("aiperf_elapsed_seconds", "gauge", "Time the profiling, or the warm-up before it, has taken", "seconds")
    found.add(elapsed, labels, progress["elapsed_ns"] / 1e9)
    eta = ("aiperf_eta_seconds", "gauge", "Time left at the pace so far", "seconds")
    found.add(eta, labels, progress["eta_sec"])


def _add_workers(found: FamilySet, workers: Mapping[str, Any], labels: Labels) -> None:
    statuses = list(workers["worker_statuses"].values())
    for status in dict.fromkeys((*WORKER_STATUSES, *statuses)):
        own = (*labels, ("status", status))
        found.add(("aiperf_workers", "gauge", "Workers by status", ""), own, statuses.count(status))
    for kind, name, part, field, text, unit in _WORKER_FAMILIES:
        for worker_id, worker in workers["workers"].items():
            own = (*labels, ("worker", worker_id))
            value = _object(worker[part]).get(field)
            found.add((f"aiperf_{name}", kind, text, unit), own, value, "_total" if kind == "counter" else "")


def state_families(state: BenchmarkState, now_ns: int) -> list[Family]:
    """Return everything the state tells Prometheus: the benchmark's metrics first, whose names nobody may take."""
    labels: Labels = tuple(state.labels().items())
    found = FamilySet()
    if labels:
        found.add(("aiperf", "info", "AIPerf benchmark information", ""), labels, 1, "_info")
    own = FamilySet()
    _add_status(own, state.status(now_ns))
    _add_progress(own, state.progress(now_ns), labels)
    _add_workers(own, state.workers(), labels)
    return unique_families(
        [
            *found.families.values(),
            *metric_families(state.metric_rows(), labels),
            *own.families.values(),
            *telemetry_families(state.telemetry_rows(), labels),
            *server_families(state.server_metrics()["endpoint_summaries"], labels),
        ]
    )


# == 11 == Sources =====================================================================================================


# == 12 == Hub =========================================================================================================


# == 13 == Connection ==================================================================================================


# == 14 == Endpoints and service =======================================================================================


# == 15 == Command line ================================================================================================
