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

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

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


# == 9 == Prometheus text ==============================================================================================


# == 10 == Benchmark state =============================================================================================


# == 11 == Sources =====================================================================================================


# == 12 == Hub =========================================================================================================


# == 13 == Connection ==================================================================================================


# == 14 == Endpoints and service =======================================================================================


# == 15 == Command line ================================================================================================
