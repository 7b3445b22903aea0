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

import asyncio
import glob
import json
import math
import os
import re
import shlex
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
#   ├── CommandError          the command behind `--` cannot be started                   exit code 126 or 127
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


class CommandError(AIPerfAPIError):
    """The command behind `--` cannot be started; `exit_code` is 127 (not found) or 126, as a shell has it."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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


# == 9 == Prometheus text ==============================================================================================


# == 10 == Benchmark state =============================================================================================


# == 11 == Sources =====================================================================================================


# -- A child and its bus -----------------------------------------------------------------------------------------------
#
# `-- COMMAND` runs a benchmark under our eyes.  What it is decides where its bus is:
#
#   aiperf profile    gets a private IPC directory and live metrics, unless its command line or its configuration
#                     file chooses a bus: that one is followed, and nothing about it is changed
#   anything else     finds an address to publish to in AIPERF_API_ZMQ_ADDRESS; we bind it
#
# The plan is made by pure functions on the words of the command line; only then does a process start.  A command line
# holds credentials, so nothing of it is shown that has not gone through `redact_command`.

CHILD_ADDRESS_VARIABLE = "AIPERF_API_ZMQ_ADDRESS"
_AIPERF_EVENT_BUS_PORT = 5664  # TCP port of the event bus proxy's subscriber side, in every version
_AIPERF_EVENT_BUS_PORT_VARIABLE = "AIPERF_ZMQ_EVENT_BUS_PROXY_BACKEND_PORT"  # moves it, since 0.13
_AIPERF_IPC_PATH = "/tmp/aiperf"  # where a configuration file puts the sockets if it says `type: ipc` and no path
_AIPERF_EXPORT = "profile_export_aiperf.json"
_ARTIFACT_BYTES_MAX = 16 * 1024 * 1024  # an export file larger than this is not read for its configuration
_CHILD_CONFIG_BYTES_MAX = 1024 * 1024  # a configuration file larger than this is not searched for its bus
_IPC_ADDRESS_BYTES_MAX = 100  # sockaddr_un holds 104 bytes on macOS and BSD, 108 on Linux, with the final NUL
_COMMAND_NOT_FOUND, _COMMAND_NOT_EXECUTABLE = 127, 126  # POSIX.1-2017 XCU 2.8.2
_SIGNALS_BEFORE_KILL = 2  # signals that the child may answer in its own way; the next one is SIGKILL
_LIVE_METRICS = {  # both since AIPerf 0.5; without them a run without dashboard publishes no live metrics
    "AIPERF_UI_REALTIME_METRICS_ENABLED": "true",
    "AIPERF_UI_REALTIME_METRICS_INTERVAL": "1",  # s, the least that 0.5 and 0.6 accept
}
# Ours by contract, read by AIPerf too: left in the child's environment, its own API would want our port.
_OUR_VARIABLES = ("AIPERF_API_SERVER_HOST", "AIPERF_API_SERVER_PORT", "AIPERF_API_TOKEN")
# Programs that run the rest of their command line in this environment and on this machine.
_WRAPPERS = frozenset(
    "chrt conda env exec hatch ionice nice nohup numactl pdm pipenv pixi poetry prlimit rye setarch setpriv"
    " stdbuf strace taskset time timeout unbuffer uv uvx xvfb-run".split()
)
_PYTHON_NAME = re.compile(r"(?:python|pypy)[\d.]*")

# Where AIPerf's flags stand in its configuration, with all their spellings of 0.3 to 0.13.
_AIPERF_FLAGS_TABLE = """
endpoint.model_names               list    --model-names --model -m
endpoint.model_selection_strategy  text    --model-selection-strategy
endpoint.type                      text    --endpoint-type
endpoint.custom_endpoint           text    --custom-endpoint --endpoint
endpoint.streaming                 switch  --streaming
endpoint.urls                      list    --url -u
endpoint.url_strategy              text    --url-strategy
endpoint.timeout_seconds           number  --request-timeout-seconds
endpoint.api_key                   text    --api-key
endpoint.transport                 text    --transport --transport-type
endpoint.use_server_token_count    switch  --use-server-token-count
loadgen.concurrency                number  --concurrency
loadgen.prefill_concurrency        number  --prefill-concurrency
loadgen.request_rate               number  --request-rate
loadgen.arrival_pattern            text    --arrival-pattern --request-rate-mode
loadgen.arrival_smoothness         number  --arrival-smoothness --vllm-burstiness
loadgen.request_count              number  --request-count --num-requests
loadgen.benchmark_duration         number  --benchmark-duration
loadgen.benchmark_grace_period     number  --benchmark-grace-period
loadgen.concurrency_ramp_duration  number  --concurrency-ramp-duration
loadgen.request_rate_ramp_duration number  --request-rate-ramp-duration
loadgen.request_cancellation_rate  number  --request-cancellation-rate
loadgen.request_cancellation_delay number  --request-cancellation-delay
loadgen.user_centric_rate          number  --user-centric-rate
loadgen.num_users                  number  --num-users
loadgen.warmup_request_count       number  --warmup-request-count --num-warmup-requests
loadgen.warmup_duration            number  --warmup-duration
loadgen.warmup_concurrency         number  --warmup-concurrency
loadgen.warmup_request_rate        number  --warmup-request-rate
loadgen.num_warmup_sessions        number  --num-warmup-sessions
input.file                         text    --input-file
input.public_dataset               text    --public-dataset
input.custom_dataset_type          text    --custom-dataset-type
input.fixed_schedule               switch  --fixed-schedule
input.random_seed                  number  --random-seed
input.goodput                      text    --goodput
input.conversation.num             number  --conversation-num --num-conversations --num-sessions
input.conversation.num_dataset_entries number --num-dataset-entries --num-prompts
input.conversation.turn.mean       number  --conversation-turn-mean --session-turns-mean
input.prompt.input_tokens.mean     number  --prompt-input-tokens-mean --synthetic-input-tokens-mean --isl
input.prompt.input_tokens.stddev   number  --prompt-input-tokens-stddev --synthetic-input-tokens-stddev --isl-stddev
input.prompt.output_tokens.mean    number  --prompt-output-tokens-mean --output-tokens-mean --osl
input.prompt.output_tokens.stddev  number  --prompt-output-tokens-stddev --output-tokens-stddev --osl-stddev
output.artifact_directory          text    --output-artifact-dir --artifact-dir
output.profile_export_prefix       text    --profile-export-prefix --profile-export-file
tokenizer.name                     text    --tokenizer
tokenizer.revision                 text    --tokenizer-revision
tokenizer.trust_remote_code        switch  --tokenizer-trust-remote-code
service.ui_type                    text    --ui-type --ui
service.workers_max                number  --workers-max --max-workers
service.zmq_host                   text    --zmq-host
service.zmq_ipc_path               text    --zmq-ipc-path
service.zmq_dual_bind              switch  --zmq-dual-bind
config_file                        text    --config -f
"""
_AIPERF_FLAGS = {
    flag: (path, kind) for path, kind, *flags in map(str.split, _AIPERF_FLAGS_TABLE.split("\n")[1:-1]) for flag in flags
}


class ChildPlan(NamedTuple):
    """How a command is run and where its bus is; made by `child_plan`."""

    argv: tuple[str, ...]  # the command to run, with what had to be added
    environ: dict[str, str]  # its whole environment
    address: str  # ZMQ endpoint to listen at; "" when the command's bus could not be found out
    bind: bool  # whether we bind that endpoint and the child connects, or the other way round
    is_aiperf: bool  # whether it is an `aiperf profile`
    artifact_dir: str  # where it was told to write its export; "" = it decides
    notes: tuple[str, ...]  # lines for the log


def child_plan(
    argv: Sequence[str],
    environ: Mapping[str, str],
    ipc_dir: str,
    *,
    version: str = "",
    read: Callable[[str], str] | None = None,
) -> ChildPlan:
    """Decide how to run a command so that its event bus can be heard. Starts nothing.

    Args:
        argv: the command line behind `--`, not empty.
        environ: the environment that the child would inherit.
        ipc_dir: an empty private directory, for the child's sockets if it has not chosen a bus itself.
        version: the version of the child's AIPerf if it is known (`aiperf_version`); for the notes only.
        read: reads the text of the child's configuration file; OSError and ValueError are noted, not raised.
    """
    start = _find_profile(argv)
    inherited = {name: value for name, value in environ.items() if name not in _OUR_VARIABLES}
    if start is None:
        address = "ipc://" + os.path.join(ipc_dir, "bus.ipc")
        inherited[CHILD_ADDRESS_VARIABLE] = address
        return ChildPlan(tuple(argv), inherited, address, True, False, "", ())
    flags = dict(_read_flags(argv[start:]))
    address, note = _chosen_bus(flags, environ, read or _read_config_text)
    added = () if address or note else ("--zmq-ipc-path", ipc_dir)
    notes = [note] if note else []
    if _publishes_no_live_metrics(version, flags):
        notes.append(
            f"AIPerf {version} publishes live metrics only with --ui dashboard; progress, workers and the final"
            " results come all the same"
        )
    return ChildPlan(
        (*argv, *added),
        {**_LIVE_METRICS, **inherited},
        address or ("" if note else _ipc_address(ipc_dir)),
        False,
        True,
        str(flags.get("output.artifact_directory", "")),
        tuple(notes),
    )


def _find_profile(argv: Sequence[str]) -> int | None:
    """Where the flags of an `aiperf profile` begin in a command line, behind wrappers; None if it is none."""
    for index, word in enumerate(argv[:-1]):
        name = os.path.basename(word)
        module = name == "aiperf" and index >= 2 and argv[index - 1] == "-m"
        if name in ("aiperf", "aiperf.exe") and argv[index + 1] == "profile":
            return index + 2 if module or index == 0 or _is_wrapper(argv[0]) else None
    return None


def _is_wrapper(word: str) -> bool:
    name = os.path.basename(word)
    return name in _WRAPPERS or _PYTHON_NAME.fullmatch(name) is not None


def _publishes_no_live_metrics(version: str, flags: Mapping[str, JSONValue]) -> bool:
    return version.startswith(("0.3.", "0.4.")) and flags.get("service.ui_type", "dashboard") != "dashboard"


def _ipc_address(directory: str) -> str:
    return "ipc://" + os.path.join(directory, "event_bus_proxy_backend.ipc")


def _tcp_address(host: str, port: JSONValue) -> str:
    # A host to bind is not always a host to connect to.
    return f"tcp://{'127.0.0.1' if host in ('0.0.0.0', '*') else host}:{port}"


def _chosen_bus(
    flags: Mapping[str, JSONValue], environ: Mapping[str, str], read: Callable[[str], str]
) -> tuple[str, str]:
    """(address, note) of the bus that a command line chooses; ("", "") if it chooses none.

    A note without an address: there is a choice, but it cannot be told from here.
    """
    port = environ.get(_AIPERF_EVENT_BUS_PORT_VARIABLE) or str(_AIPERF_EVENT_BUS_PORT)
    # In AIPerf's own order of precedence.
    if "service.zmq_ipc_path" in flags:
        return _ipc_address(str(flags["service.zmq_ipc_path"])), ""
    if "service.zmq_host" in flags:
        return _tcp_address(str(flags["service.zmq_host"]), port), ""
    if flags.get("service.zmq_dual_bind"):
        return _ipc_address(_AIPERF_IPC_PATH), ""
    if "config_file" not in flags:
        return "", ""
    path = str(flags["config_file"])
    try:
        communication = bus_of_config(read(path))
    except (OSError, ValueError) as error:
        return "", f"the event bus of {path} could not be told ({error}): nothing will be seen of this run"
    return _address_of_communication(communication, environ, port), ""


def _address_of_communication(communication: Mapping[str, str], environ: Mapping[str, str], port: str) -> str:
    """The subscriber endpoint of a `runtime.communication` section; "" for an empty one."""
    values = {name: _substitute(value, environ) for name, value in communication.items()}
    kind = values.get("type", "")
    if kind == "tcp":
        return _tcp_address(values.get("host", "127.0.0.1"), values.get("event_bus_proxy.backend_port", port))
    if kind == "ipc":
        return _ipc_address(values.get("path", _AIPERF_IPC_PATH))
    return _ipc_address(values.get("ipc_path", _AIPERF_IPC_PATH)) if kind == "dual" else ""


def _substitute(value: str, environ: Mapping[str, str]) -> str:
    """`${NAME}` and `${NAME:default}` as AIPerf's configuration files have them."""
    return re.sub(r"\$\{(\w+)(?::([^}]*))?\}", lambda match: environ.get(match[1], match[2] or ""), value)


def _read_config_text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read(_CHILD_CONFIG_BYTES_MAX)


def aiperf_version(command: str, search_path: str | None = None) -> str:
    """The version of the AIPerf behind a command name, read from its installation; "" if it cannot be told.

    Args:
        command: the name or path of an `aiperf` console script. Its first line names the interpreter, next to which
            the package's metadata directory carries the version: no process is started to ask.
        search_path: the PATH to look it up in; None is that of this process.
    """
    try:
        with open(shutil.which(command, path=search_path) or command, "rb") as file:
            first = file.readline(_IPC_ADDRESS_BYTES_MAX * 4).decode().strip()
    except (OSError, ValueError):
        return ""
    root = os.path.dirname(os.path.dirname(first[2:].strip()))
    found = glob.glob(os.path.join(glob.escape(root), "lib", "python3*", "site-packages", "aiperf-*.dist-info"))
    return os.path.basename(found[0])[len("aiperf-") : -len(".dist-info")] if first.startswith("#!") and found else ""


# Just enough YAML to find one section of block mappings: AIPerf's configuration files are YAML, and a parser for all of
# it would be a dependency.  What this cannot read with certainty it refuses.

_YAML_KEY = re.compile(r"""(?P<key>"[^"]*"|'[^']*'|[^\s"'#\[\]{}&*!|>%@`,?-][^:#]*?)\s*:(?:\s+(?P<value>.*))?""")
_YAML_PROPERTIES = re.compile(r"\A(?:[&!]\S*\s*)+")  # an anchor or a tag before a value
_BUS_SECTIONS = (("benchmark", "runtime", "communication"), ("runtime", "communication"))


def bus_of_config(text: str) -> dict[str, str]:
    """The `runtime.communication` section of an AIPerf configuration file, as flat text; {} if there is none.

    Args:
        text: JSON, or YAML in block style. Keys may be in camelCase or snake_case, and come back in snake_case;
            nested ones are joined by a dot (`event_bus_proxy.backend_port`).

    Raises:
        ValueError: the section may be there in a form that is not understood (aliases, merges, templates).
    """
    scalars = _json_scalars(text) if text.lstrip().startswith("{") else dict(_yaml_scalars(text))
    section: dict[str, str] = {}
    for path, value in scalars.items():
        for prefix in _BUS_SECTIONS:
            place = path[:-1] if path[-1] == "<<" else path  # a merge may bring in whatever stands beside it
            if place[: len(prefix)] == prefix[: len(place)]:
                _refuse_unreadable(path, value)
            if path[: len(prefix)] == prefix and len(path) > len(prefix):
                section[".".join(path[len(prefix) :])] = value
    return section


def _refuse_unreadable(path: tuple[str, ...], value: str) -> None:
    if value.startswith(("*", "{", "[")) or "{{" in value or "{%" in value:
        raise ValueError(f"{'.'.join(path)} is not plain text")


def _json_scalars(text: str) -> dict[tuple[str, ...], str]:
    try:
        return dict(_flatten(json_load(text.encode()), ()))
    except JSONError as error:
        raise ValueError(str(error)) from error


def _flatten(value: JSONValue, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, (*path, _snake_case(str(key))))
    else:
        yield path, str(value)


def _snake_case(key: str) -> str:
    return _CAMEL_HUMP.sub("_", key).lower()


def _yaml_scalars(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path of keys, text of the value) of every entry of a block mapping, in order; lists are passed over."""
    stack: list[tuple[int, str]] = []  # (indent, key) of the mappings that are open
    block = -1  # indent of the key of an open block scalar, -1 = none
    for line in text.splitlines():
        content = _without_comment(line).strip()
        indent = len(line) - len(line.lstrip(" "))
        if not content or content in ("---", "...") or content.startswith("%") or (0 <= block < indent):
            continue
        block = -1
        while stack and stack[-1][0] >= indent:
            stack.pop()
        match = _YAML_KEY.fullmatch(content)
        if match is None:
            stack.append((indent, "-"))  # a list item or a continued scalar: nothing below it is a mapping of ours
            continue
        stack.append((indent, _snake_case(match["key"].strip("\"'"))))
        value = _YAML_PROPERTIES.sub("", match["value"] or "")
        if value[:1] in ("|", ">"):
            block = indent
        elif value:
            path = tuple(key for _, key in stack)
            yield from _yaml_value(path, value)


def _yaml_value(path: tuple[str, ...], value: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The entries of a value: itself, or those of a flow mapping without nesting (`{type: ipc, path: /run/x}`)."""
    if re.fullmatch(r"\{[^{}\[\]\"'&*]*\}", value):
        for part in value[1:-1].split(","):
            key, _, item = part.partition(":")
            if key.strip():
                yield (*path, _snake_case(key.strip())), item.strip()
    else:
        yield path, value[1:-1] if value[:1] in "\"'" and value[-1:] == value[:1] else value


def _without_comment(line: str) -> str:
    """The line without `# ...`, which begins a comment at the start and after white space, outside of quotes."""
    quote = ""
    for index, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and line[:index].rstrip()[-1:] in ("", ":", "-", "{", ","):
            quote = character
        elif character == "#" and (index == 0 or line[index - 1] in " \t"):
            return line[:index]
    return line


# Reading a command line: configuration and secrets.


def config_from_argv(argv: Sequence[str]) -> dict[str, JSONValue]:
    """The benchmark's configuration as its command line tells it, nested as AIPerf nests it, without credentials.

    `{"endpoint": {"model_names": [...], "type", "streaming", "urls": [...]}, "loadgen": {...}, ..., "command": [...]}`.
    AIPerf's defaults for type and streaming stand in where neither a flag nor a configuration file speaks. Of a
    command that is not an `aiperf profile`, only the words are known.
    """
    config: dict[str, JSONValue] = {}
    start = _find_profile(argv)
    if start is not None:
        flags = dict(_read_flags(argv[start:]))
        if "config_file" not in flags:
            flags = {"endpoint.type": "chat", "endpoint.streaming": False, **flags}
        for path, value in flags.items():
            *sections, name = path.split(".")
            section = config
            for key in sections:
                section = section.setdefault(key, {})
            section[name] = value
    config = redact(_scrub_strings(config, ()))
    config["command"] = redact_command(argv)
    return config


def _read_flags(words: Sequence[str]) -> Iterator[tuple[str, JSONValue]]:
    """(configuration path, value) of every flag that the table knows; of a list, all so far."""
    lists: dict[str, list[str]] = {}
    for index, word in enumerate(words):
        flag, equals, value = _split_flag(word)
        path, kind = _AIPERF_FLAGS.get(flag, ("", ""))
        if kind == "switch":
            yield path, value.lower() not in ("false", "no", "0", "n", "f")
            continue
        if not equals:
            value = words[index + 1] if index + 1 < len(words) else ""
        if kind == "list":
            lists.setdefault(path, []).extend(item.strip() for item in value.split(",") if item.strip())
            yield path, lists[path]
        elif kind:
            yield path, _number(value) if kind == "number" else value


def _split_flag(word: str) -> tuple[str, str, str]:
    """(flag, "=" or "", value): `--flag=v`, `--flag_name`, `-mv` and `-m=v`, as AIPerf's parser takes them."""
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        return name.replace("_", "-"), equals, value
    if word.startswith("-") and len(word) > 2:
        return word[:2], "=", word[2:].lstrip("=")
    return word, "", ""


def _number(text: str) -> JSONValue:
    """A finite number as int or float; any other text as it is (`1,2,4` is a sweep, `inf` no JSON)."""
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    return float(text) if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?", text) else text


def secrets_from_argv(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The literal credentials of a command line and an environment, sorted, to be scrubbed wherever they turn up."""
    found: set[str] = set()
    redact_command(argv, found)
    for name, value in environ.items():
        if _is_headers_key(name.lower()) or is_credential_key(name):
            _redact_credential_text(value, found)
    return sorted(found - {"", REDACTED})


def _redact_credential_text(text: str, found: set[str]) -> None:
    try:
        value = json_load(text.encode("utf-8", "replace"))
    except JSONError:
        value = text
    _hide(value if isinstance(value, (dict, list)) else text, found)


def redact_command(words: Sequence[str], found: set[str] | None = None) -> list[str]:
    """A command line with `***` for every credential; `found` takes the secrets that were met.

    Hidden are the values of flags and variables whose names say so (`--api-key K`, `--api-key=K`, `HF_TOKEN=K`), of
    all headers (`-H "Name: value"`, also as JSON), of such members in JSON and `key:value` words, of user information
    and such parameters in URLs, and the same inside words that are command lines themselves (`sh -c "..."`).
    """
    clean, expected = [], ""
    for word in words:
        text, expected = _redact_word(word, expected, set() if found is None else found)
        clean.append(text)
    return clean


def _redact_word(word: str, expected: str, found: set[str]) -> tuple[str, str]:
    """(the word, redacted; what the next word is expected to be: "secret", "header" or "")."""
    if expected == "secret" and not word.startswith("--"):
        return str(_hide(word, found)), ""
    if expected == "header" and not word.startswith("-"):
        return _redact_header_word(word, found), "header"
    if not word.startswith("-"):
        return _redact_plain_word(word, found), ""
    flag, equals, value = _split_flag(word)
    if flag == "-H" or flag in ("--header", "--headers"):
        kind = "header"
    else:
        kind = "secret" if is_credential_key(flag.lstrip("-")) else ""
    if not equals:
        return word, kind
    prefix = word[: len(word) - len(value)]
    if kind == "secret":
        return prefix + str(_hide(value, found)), ""
    return prefix + (_redact_header_word(value, found) if kind else _redact_plain_word(value, found)), kind


def _redact_header_word(word: str, found: set[str]) -> str:
    """`Name: value` or {"Name": "value"} with the values hidden; those that are surely secret are remembered."""
    if word.lstrip().startswith("{"):
        try:
            headers = json_load(word.encode("utf-8", "replace"))
        except JSONError:
            return str(_hide(word, found))
        for name, value in headers.items():
            _remember_header(name, str(value), found)
        return json.dumps({name: REDACTED for name in headers})
    name, colon, value = word.partition(":")
    if not colon:
        return str(_hide(word, found))
    _remember_header(name, value.strip(), found)
    return name + ":" + " " * (len(value) - len(value.lstrip())) + REDACTED


def _remember_header(name: str, value: str, found: set[str]) -> None:
    # Remembering `application/json` would hide it all over the bus: an innocent name needs a value that looks random.
    random = re.fullmatch(r"\S{16,}", value) and re.search(r"[0-9]", value) and re.search(r"[A-Za-z]", value)
    if value and (is_credential_key(name) or random or value.lower().startswith(("bearer ", "basic "))):
        found.add(value)


def _redact_plain_word(word: str, found: set[str]) -> str:
    if word[:1] in ("{", "["):
        try:
            value = json_load(word.encode("utf-8", "replace"))
        except JSONError:
            return _redact_urls(word, found)
        clean = redact(value, found)
        return word if clean == value else json.dumps(clean)
    assigned = re.fullmatch(r"([\w.-]+)([:=])(.+)", word, re.DOTALL)
    if assigned and is_credential_key(assigned[1]):
        _redact_script(word, found)  # `sh -c "HF_TOKEN=... run"`: the token alone is to be known too
        return assigned[1] + assigned[2] + str(_hide(assigned[3], found))
    if any(character.isspace() for character in word):
        return _redact_script(word, found)
    return _redact_urls(word, found)


def _redact_script(word: str, found: set[str]) -> str:
    """A word that may be a command line of its own: what is secret in it as such is replaced by value."""
    inside: set[str] = set()
    try:
        parts = shlex.split(word)
    except ValueError:  # an open quote: then it is text
        parts = word.split()
    if len(parts) > 1:
        redact_command(parts, inside)
    found |= inside
    for secret in sorted(inside, key=len, reverse=True):
        word = word.replace(secret, REDACTED)
    return _redact_urls(word, found)


_URL_PASSWORD = re.compile(r"(?:(?<=//)|(?<![^\s=]))([^\s/@:]*:)([^\s/@]+)(?=@)")
_URL_PARAMETER = re.compile(r"(?<=[?&])([\w.-]+)=([^&#\s]*)")


def _redact_urls(text: str, found: set[str]) -> str:
    def password(match: re.Match[str]) -> str:
        return match[1] + str(_hide(match[2], found))

    def parameter(match: re.Match[str]) -> str:
        return match[1] + "=" + (str(_hide(match[2], found)) if is_credential_key(match[1]) else match[2])

    return scrub_text(_URL_PARAMETER.sub(parameter, _URL_PASSWORD.sub(password, text)))


def load_artifact_config(directory: str, since_sec: float = 0.0) -> dict[str, JSONValue]:
    """The `input_config` of the export that AIPerf wrote to an artifact directory; {} while there is none.

    Args:
        directory: the artifact directory.
        since_sec: seconds since the epoch; an export older than this is of an earlier run and does not count.

    The caller redacts: what AIPerf hides in its exports differs from version to version.
    """
    paths = [os.path.join(directory, _AIPERF_EXPORT)]
    paths += sorted(glob.glob(os.path.join(glob.escape(directory), "*_aiperf.json")))
    for path in paths:
        try:
            status = os.stat(path)
            if status.st_mtime < since_sec or status.st_size > _ARTIFACT_BYTES_MAX:
                continue
            with open(path, "rb") as file:
                export = json_load(file.read())
        except (OSError, JSONError):
            continue
        if isinstance(export, dict) and isinstance(export.get("input_config"), dict):
            return _with_flat_names(export["input_config"])
    return {}


def _with_flat_names(config: dict[str, JSONValue]) -> dict[str, JSONValue]:
    """A configuration of AIPerf 0.13 (models, phases) with the names that earlier ones have beside its own."""
    models, phases = config.get("models"), config.get("phases")
    config = {**config, "endpoint": dict(config.get("endpoint") or {})}
    if isinstance(models, dict) and "model_names" not in config["endpoint"]:
        items = models.get("items") or []
        config["endpoint"]["model_names"] = [item.get("name") for item in items if isinstance(item, dict)]
    if isinstance(phases, list) and "loadgen" not in config:
        profiling = [phase for phase in phases if isinstance(phase, dict) and phase.get("kind") != "warmup"]
        names = {"concurrency": "concurrency", "rate": "request_rate", "requests": "request_count"}
        names["duration"] = "benchmark_duration"
        if profiling:
            config["loadgen"] = {new: profiling[-1][old] for old, new in names.items() if old in profiling[-1]}
    return config


# The process.


def make_ipc_directory() -> str:
    """A new directory that only this user can enter (mode 0700), with a path short enough for a Unix socket."""
    directory = tempfile.mkdtemp(prefix="aiperf-api-")
    if len(os.fsencode(_ipc_address(directory))) <= _IPC_ADDRESS_BYTES_MAX:
        return directory
    os.rmdir(directory)
    return tempfile.mkdtemp(prefix="aiperf-api-", dir="/tmp")


class ChildProcess:
    """A command that runs on our terminal: it keeps stdin, stdout, stderr and the process group.

    Because of the shared group, Ctrl-C reaches it without us. A SIGINT that was sent to us alone (`kill -INT`, or no
    terminal at all) is passed on; so is every SIGTERM. The child answers the first two signals in its own way (AIPerf:
    finish and export, then quit at once); a third one kills it.

    Args:
        argv: the command line.
        environ: its whole environment.
    """

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        self.argv = tuple(argv)
        self.environ = dict(environ)
        self.signals = 0  # how many ending signals have come while it ran
        self._process: asyncio.subprocess.Process | None = None  # None until it is started

    @property
    def pid(self) -> int | None:
        """The process id; None before the start."""
        return None if self._process is None else self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code as a shell has it, 128+n for signal n; None while it runs or before the start."""
        code = None if self._process is None else self._process.returncode
        return code if code is None or code >= 0 else 128 - code

    @property
    def exit_text(self) -> str:
        """How it ended, for people: `exit status 3`, `killed by SIGKILL`; "" while it runs."""
        code = self.exit_code
        if code is None or self._process is None or self._process.returncode is None:
            return ""
        if self._process.returncode >= 0:
            return f"exit status {code}"
        try:
            return "killed by " + signal.Signals(-self._process.returncode).name
        except ValueError:
            return f"killed by signal {-self._process.returncode}"

    async def start(self) -> None:
        """Start it; raises CommandError if it is not found (127) or cannot be executed (126)."""
        try:
            self._process = await asyncio.create_subprocess_exec(*self.argv, env=self.environ)
        except FileNotFoundError:
            raise CommandError(_COMMAND_NOT_FOUND, f"{self.argv[0]}: command not found") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CommandError(_COMMAND_NOT_EXECUTABLE, f"{self.argv[0]}: {reason.lower()}") from None

    async def wait(self) -> int:
        """Wait for its end; returns `exit_code`."""
        assert self._process is not None
        await self._process.wait()
        return self.exit_code or 0

    def pass_on(self, number: int) -> None:
        """Hand on a signal that this process got, unless the child got it too."""
        if self._process is None or self._process.returncode is not None:
            return
        self.signals += 1
        if self.signals > _SIGNALS_BEFORE_KILL:
            number = signal.SIGKILL
        elif number == signal.SIGINT and self._hears_terminal():
            return
        try:
            self._process.send_signal(number)
        except ProcessLookupError:  # it ended a moment ago
            pass

    def _hears_terminal(self) -> bool:
        """Whether Ctrl-C on the controlling terminal signals the child: its process group is in the foreground."""
        try:
            terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
        except OSError:  # ENXIO: no controlling terminal
            return False
        try:
            return self.pid is not None and os.tcgetpgrp(terminal) == os.getpgid(self.pid)
        except OSError:
            return False
        finally:
            os.close(terminal)


def hide_in_process_title(secrets: Sequence[str]) -> bool:
    """Overwrite the given secrets in this process's command line, as `ps` shows it; whether it could be done.

    A child's command line stands in ours, credentials included, and every user of the machine can read it. The
    kernel shows the memory that the arguments were laid in (proc(5), fields arg_start and arg_end of
    /proc/self/stat), so replacing them there, in place and by the same number of bytes, replaces them in `ps`.
    Linux only, and only if what stands there is what the kernel says. The child's own command line is the child's.
    """
    literals = [os.fsencode(secret) for secret in sorted(secrets, key=len, reverse=True) if secret]
    try:
        with open("/proc/self/cmdline", "rb") as file:
            shown = file.read()
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # fields 48 and 49; what is left of ")" holds the first two
    except (OSError, ValueError, IndexError):
        return False
    hidden = shown
    for literal in literals:
        hidden = hidden.replace(literal, b"*" * len(literal))
    if hidden == shown:
        return True
    import ctypes  # here: only a child with credentials needs it, and it is slow to load

    if start == 0 or end - start != len(shown) or ctypes.string_at(start, len(shown)) != shown:
        return False
    ctypes.memmove(start, hidden, len(hidden))
    return True


# == 12 == Hub =========================================================================================================


# == 13 == Connection ==================================================================================================


# == 14 == Endpoints and service =======================================================================================


# == 15 == Command line ================================================================================================
