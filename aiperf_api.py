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
import json
import math
import os
import random
import re
import socket
import stat
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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

# The bus.  What libzmq does where nothing is configured is the precedent, except that libzmq bounds no message.
BUS_FRAME_MAX = 256 * 1024 * 1024  # bytes of one frame, and of all frames of a message; beyond: error and reconnect
BUS_PARTS_MAX = 64  # frames of one message (the bus sends 2); beyond: error and reconnect
BUS_COMMAND_MAX = 64 * 1024  # bytes of one ZMTP command (READY is the longest, about 50); beyond: error and reconnect
BUS_BATCH_MAX = 256  # messages handed over in one turn of the loop; the rest waits for the next turn
BUS_PEERS_MAX = 1024  # publishers connected to a bound source; a further one is cut off
BUS_SEND_MAX = 1024 * 1024  # bytes that a peer has left unread before it is cut off
BUS_CONNECT_SEC = 10.0  # for the name and the connection; then the next attempt
BUS_HANDSHAKE_SEC = 30.0  # from connection to READY (ZMQ_HANDSHAKE_IVL); then error and reconnect
BUS_HEARTBEAT_SEC = 10.0  # of silence before a PING
BUS_HEARTBEAT_MISSES = 3  # PINGs in a row that nothing followed; then error and reconnect
BUS_RETRY_MIN_SEC = 0.1  # before the first reconnect (ZMQ_RECONNECT_IVL); doubled each time, a quarter of jitter
BUS_RETRY_MAX_SEC = 2.0  # between reconnects at most
BUS_PROVEN_SEC = 2.0  # a connection that lasted so long starts the back-off and the log lines afresh
BUS_IPC_PATH_MAX = 107 if sys.platform.startswith("linux") else 103  # bytes of an ipc:// path: sun_path less its NUL


# == 2 == Errors =======================================================================================================
#
#   AIPerfAPIError            everything this module raises on purpose
#   ├── UsageError            the command line or an argument of APIService is wrong      exit code 2
#   ├── StartError            the machine says no: port in use, file unreadable           exit code 1
#   ├── JSONError             bytes that are not JSON
#   ├── BusMessageError       a bus message that cannot be used                           counted, logged once a kind
#   ├── ZMTPError             a bus peer that does not speak ZMTP as we do      reconnect, logged once a kind
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


class ZMTPError(AIPerfAPIError):
    """A peer on the bus that broke the protocol, or speaks a form of it that is not spoken here.

    Args:
        kind: a short, fixed word for logging each kind once (`not_zmtp`, `mechanism`, `malformed`, ...).
        message: what the peer did, in one line, its bytes quoted safely.
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

Batch = list[list[bytes]]  # messages, each a list of frames as they came off the wire (normally topic, payload)


class Source:
    """Where bus messages come from."""

    kind: str = "none"
    address: str = ""
    backend: str = ""
    connected: bool = False

    def start(self, deliver: Callable[[Batch], None], notify: Callable[[str], None]) -> None:
        """Begin, inside the running loop; `notify` takes a line that is worth logging."""
        raise NotImplementedError

    def subscribe(self, prefix: bytes) -> None:
        raise NotImplementedError

    def unsubscribe(self, prefix: bytes) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        raise NotImplementedError

    def now_ns(self) -> int:
        """The bus clock: nanoseconds since the epoch."""
        return time.time_ns()


# -- ZMTP: the bus without pyzmq ---------------------------------------------------------------------------------------
#
# A SUB socket in the standard library: https://rfc.zeromq.org/spec/23/ (ZMTP 3.0) and 37 (ZMTP 3.1), and where those
# leave a choice, what libzmq does on the wire:
#
#   - A peer of 3.1 (libzmq 4.3.3 and later) gets SUBSCRIBE and CANCEL commands, one of 3.0 gets messages that begin
#     with 1 or 0.  4.1 and 4.2 drop the commands.
#   - PING goes to peers of 3.1 only: 4.1 hands a PING on as if it were a message.  Those that PING get their PONG.
#   - A command may stand between the parts of a message: libzmq sends its PING when the timer says so.
#   - Older peers (ZMTP 1 and 2: libzmq 2 and 3), to which libzmq would stoop, are refused.

_MORE, _LONG, _COMMAND = 1, 2, 4  # the bits of a frame's first byte (23/ZMTP "Framing"); the others must be zero
_MECHANISM = b"NULL".ljust(20, b"\0")
_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + _MECHANISM + bytes(32)  # signature, 3.1, NULL, client, filler
_READ_LENGTH = struct.Struct(">Q").unpack_from


def _encode_frame(flags: int, body: bytes) -> bytes:
    if len(body) > 255:
        return struct.pack(">BQ", flags | _LONG, len(body)) + body
    return bytes((flags, len(body))) + body


def _encode_command(name: bytes, body: bytes = b"") -> bytes:
    return _encode_frame(_COMMAND, bytes((len(name),)) + name + body)


def _parse_command(body: bytes) -> tuple[bytes, bytes]:
    """Take a command apart into its name and its data."""
    name = body[1 : 1 + body[0]] if body else b""
    if not name or len(name) != body[0]:
        raise ZMTPError("malformed", f"a command that does not hold its own name: {body[:40]!r}")
    return name, body[1 + len(name) :]


def _parse_metadata(data: bytes) -> dict[str, bytes]:
    """Read the properties of READY; names come out in lower case (23/ZMTP: they are case-insensitive)."""
    properties: dict[str, bytes] = {}
    pos = 0
    while pos < len(data):
        name_end = pos + 1 + data[pos]
        start = name_end + 4
        end = start + int.from_bytes(data[name_end:start], "big")
        if name_end == pos + 1 or start > len(data) or end > len(data):
            raise ZMTPError("malformed", f"READY with metadata that ends too early: {data[pos : pos + 40]!r}")
        properties[data[pos + 1 : name_end].decode("latin-1").lower()] = data[start:end]
        pos = end
    return properties


class ZMTPSubscriber:
    """The subscriber's side of one ZMTP connection: bytes in, messages and bytes to send out (sans-IO).

    Write `take_output()` first (our greeting) and after every `feed()`.  Send subscriptions once `ready` is true.
    """

    def __init__(self) -> None:
        # connection
        self.minor: int | None = None  # of the version that both sides speak: 0 or 1; None before the greeting
        self.metadata: dict[str, bytes] = {}  # what READY said, names in lower case
        self.ready = False  # the handshake is over: messages may come, subscriptions may go
        self.error: ZMTPError | None = None  # why nothing more will come out
        # unread input: the head of a frame, or a frame as far as it has come (it grows with what really arrives)
        self._held = bytearray()
        self._need = 0  # bytes that _held must reach before reading on is of use
        # message under way
        self._parts: list[bytes] = []
        self._room = BUS_FRAME_MAX  # bytes that its further frames may have
        # output
        self._output: list[bytes] = [_GREETING]
        self._ttl_sec = 0.0

    @property
    def socket_type(self) -> str:
        """The peer's socket type, `PUB` or `XPUB`; empty before READY."""
        return self.metadata.get("socket-type", b"").decode("latin-1")

    def feed(self, data: bytes) -> Batch:
        """Take bytes from the peer and return the messages that they complete.

        Never raises: a fault sets `error`, the messages before it are still returned, and from then on nothing is.
        How the bytes are cut into calls makes no difference.
        """
        messages: Batch = []
        if self.error is not None:
            return messages
        held = self._held
        if held:
            if len(held) + len(data) < self._need:
                held += data
                return messages
            data = b"".join((held, data))
            self._held = held = bytearray()  # the old one is freed before a large frame is cut out of `data`
        try:
            start = 0 if self.minor is not None else self._read_greeting(data)
            if self.minor is not None:
                self._read_frames(data, start, messages)
        except ZMTPError as error:
            self.error = error
            self._held, self._parts = bytearray(), []
        return messages

    def take_output(self) -> bytes:
        """Return what is to be written to the peer now, and forget it."""
        if not self._output:
            return b""
        output = b"".join(self._output)
        self._output.clear()
        return output

    def take_ttl(self) -> float:
        """Return the seconds of silence after which the peer's latest PING wants to be given up, else 0; forget it."""
        ttl, self._ttl_sec = self._ttl_sec, 0.0
        return ttl

    def encode_subscription(self, prefix: bytes, wanted: bool = True) -> bytes:
        """Encode a subscription, or its end, in the form that this peer reads; only when `ready`."""
        if self.minor:
            return _encode_command(b"SUBSCRIBE" if wanted else b"CANCEL", prefix)
        return _encode_frame(0, (b"\x01" if wanted else b"\x00") + prefix)

    def encode_ping(self) -> bytes:
        """Encode a heartbeat, or nothing where the peer would not know it; only when `ready`.

        Its TTL is 0, "no limit": we PING only when nothing comes in, so silence on our side means nothing.
        """
        return _encode_command(b"PING", b"\0\0") if self.minor else b""

    def _read_greeting(self, data: bytes) -> int:
        """Check a greeting as far as it has come; return where the frames begin, or hold what there is."""
        if data[:1] not in (b"", b"\xff"):
            raise ZMTPError("not_zmtp", f"it does not speak ZMTP: it began with {data[:20]!r}")
        if len(data) > 9 and not data[9] & 1:
            raise ZMTPError("old_zmtp", "it speaks ZMTP 1 (libzmq 2); at least ZMTP 3.0 is needed (libzmq 4)")
        if len(data) > 10 and data[10] < 3:
            raise ZMTPError("old_zmtp", "it speaks ZMTP 2 (libzmq 3); at least ZMTP 3.0 is needed (libzmq 4)")
        mechanism = data[12:32]
        if mechanism != _MECHANISM[: len(mechanism)]:
            name = bytes(mechanism).rstrip(b"\0")
            raise ZMTPError("mechanism", f"it wants the security mechanism {name!r}; only NULL is spoken here")
        if len(data) < len(_GREETING):
            self._held = bytearray(data)
            return len(data)
        self.minor = 1 if data[10] > 3 or data[11] else 0
        self._output.append(_encode_command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", 3) + b"SUB"))
        return len(_GREETING)

    def _read_frames(self, data: bytes, pos: int, messages: Batch) -> None:
        """Read all whole frames from `pos` on, and hold the rest.  The loop that the speed of the source hangs on."""
        size, parts, room, ready = len(data), self._parts, self._room, self.ready
        while pos < size:
            flags = data[pos]
            if flags > 3 and flags not in (_COMMAND, _COMMAND | _LONG):
                raise ZMTPError("malformed", f"a frame with the flags 0x{flags:02x}")
            start = pos + (9 if flags & _LONG else 2)
            if start > size:
                self._need = start - pos
                break
            length: int = _READ_LENGTH(data, pos + 1)[0] if flags & _LONG else data[pos + 1]
            if length > room or (flags > 3 and length > BUS_COMMAND_MAX):
                raise ZMTPError("too_large", f"a {'command' if flags > 3 else 'message'} of {length:,} bytes or more")
            end = start + length
            if end > size:
                self._need = end - pos
                break
            frame = data[start:end]
            pos = end
            if flags > 3:
                self._take_command(frame)
                ready = self.ready
            elif not ready:
                raise ZMTPError("malformed", "a message before READY")
            elif flags & _MORE:
                parts.append(frame)
                room -= length
                if len(parts) >= BUS_PARTS_MAX:
                    raise ZMTPError("too_large", f"a message of more than {BUS_PARTS_MAX} frames")
            else:
                parts.append(frame)
                messages.append(parts)
                parts, room = [], BUS_FRAME_MAX
        self._parts, self._room = parts, room
        if pos < size:
            self._held += memoryview(data)[pos:]

    def _take_command(self, body: bytes) -> None:
        name, data = _parse_command(body)
        if name == b"ERROR":  # the peer refuses us; a length byte stands before its reason
            raise ZMTPError("refused", f"it refuses the connection: {data[1:101]!r}")
        if not self.ready:
            self._take_ready(name, data)
        elif name == b"PING":
            if len(data) < 2:
                raise ZMTPError("malformed", "a PING without its TTL")
            self._ttl_sec = int.from_bytes(data[:2], "big") / 10  # tenths of a second on the wire
            self._output.append(_encode_command(b"PONG", data[2:18]))  # 37/ZMTP: a context has 16 bytes at most
        # Other commands are let pass, as libzmq does: PONG has done its work by arriving.

    def _take_ready(self, name: bytes, data: bytes) -> None:
        if name != b"READY":
            raise ZMTPError("malformed", f"the command {name[:40]!r} in place of READY")
        self.metadata = _parse_metadata(data)
        if self.socket_type not in ("PUB", "XPUB"):
            kind = self.metadata.get("socket-type", b"")[:40]
            raise ZMTPError("socket_type", f"it is a socket of type {kind!r}; a subscriber needs PUB or XPUB")
        self.ready = True


class Endpoint(NamedTuple):
    """A ZMQ endpoint, taken apart."""

    host: str  # of tcp://, without brackets; empty for every interface (bind only)
    port: int  # of tcp://; 0 for any free one (bind only)
    path: str  # of ipc://; begins with NUL for an abstract name; empty for tcp://


def parse_endpoint(text: str, *, bind: bool = False) -> Endpoint:
    """Take a ZMQ endpoint apart: `tcp://HOST:PORT`, `tcp://[IPV6]:PORT`, `ipc://PATH`, `ipc://@NAME`.

    Args:
        bind: whether to listen there: then HOST may be `*`, and PORT `*` or 0.

    Raises:
        UsageError: it is none of these; the message says what is wrong with it.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("tcp", "ipc"):
        raise UsageError(f"not a bus address: {text!r} (tcp://HOST:PORT or ipc://PATH)")
    if not rest or re.search(r"[\x00-\x20\x7f]" if scheme == "tcp" else r"\x00", rest):
        raise UsageError(f"not a bus address: {text!r} ({'a blank or control character' if rest else 'nothing'} in it)")
    return _parse_ipc(text, rest) if scheme == "ipc" else _parse_tcp(text, rest, bind)


def _parse_ipc(text: str, path: str) -> Endpoint:
    if not hasattr(socket, "AF_UNIX"):
        raise UsageError(f"no ipc:// on this system: {text!r}")
    if path in ("@", "*"):
        raise UsageError(f"not a bus address: {text!r} (a path, or a name after @, is needed)")
    size = len(os.fsencode(path))
    if size > BUS_IPC_PATH_MAX:  # libzmq counts the @ of an abstract name too
        raise UsageError(
            f"the path of {text!r} is {size} bytes long; the system's limit for a socket is {BUS_IPC_PATH_MAX}"
        )
    return Endpoint("", 0, "\0" + path[1:] if path[0] == "@" else path)


def _may_be_ipv6(name: str, bracketed: bool) -> bool:
    """Whether a host is IPv6 if it looks like it; libzmq takes that without brackets too."""
    if not bracketed and ":" not in name:
        return True
    try:
        socket.inet_pton(socket.AF_INET6, name.partition("%")[0])
    except OSError:
        return False
    return True


def _parse_tcp(text: str, rest: str, bind: bool) -> Endpoint:
    host, _, port = rest.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    name = host[1:-1] if bracketed else host
    wanted = "a port from 1 to 65535, * for any" if bind else "a port from 1 to 65535"
    if bind and port == "*":
        port = "0"
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535 or not (int(port) or bind):
        raise UsageError(f"not a bus address: {text!r} ({wanted} is needed)")
    if re.search(r"[\[\]/;@]", name) or not name or (name == "*" and not bind) or not _may_be_ipv6(name, bracketed):
        raise UsageError(f"not a bus address: {text!r} (a host name, an IPv4 address or an [IPv6] address is needed)")
    return Endpoint("" if name == "*" else name, int(port), "")


def _listen(endpoint: Endpoint) -> socket.socket:
    """Open a listening socket, as libzmq's bind does; raises OSError."""
    if endpoint.path:
        return _listen_ipc(endpoint.path)
    if not endpoint.host:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", endpoint.port), family=family, dualstack_ipv6=dual)
    found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return socket.create_server(found[0][4], family=found[0][0])


def _listen_ipc(path: str) -> socket.socket:
    """Listen on a path.  A socket left over there is removed, as libzmq does, but not one that somebody serves."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path[0] != "\0" and os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path):
                    os.unlink(path)
        listener.bind(path)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _keep_alive(sock: Any) -> None:
    """Let the system notice that the host of a peer has gone: the only means with a peer of ZMTP 3.0."""
    for level, name, value in (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 30),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 10),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    ):
        if hasattr(socket, name):
            sock.setsockopt(level, getattr(socket, name), value)


class _BusPeer(asyncio.Protocol):
    """One connection of a BuiltinBusSource: what comes in goes through the codec to the source, turn by turn.

    Nothing is buffered beyond one read: while messages wait for the next turn of the loop, reading is paused, and TCP
    slows the publisher down.
    """

    def __init__(self, source: BuiltinBusSource) -> None:
        self._source = source
        self._loop = asyncio.get_running_loop()
        self.codec = ZMTPSubscriber()
        self.gone: asyncio.Future[None] = self._loop.create_future()  # done when the connection is over
        self._transport: Any = None
        self._backlog: Batch = []  # messages for the next turns; while it holds any, reading is paused
        self._deadline: asyncio.TimerHandle | None = None  # of the handshake, then of the next heartbeat
        self._ttl: asyncio.TimerHandle | None = None  # when the peer's own PING gives it up
        self._proof: asyncio.TimerHandle | None = None  # when the connection has lasted BUS_PROVEN_SEC
        self._heard = False  # whether bytes came since the last heartbeat
        self._misses = 0  # heartbeats in a row before which no byte came
        self.at_fault = False  # whether the connection ends because of what the peer did

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != getattr(socket, "AF_UNIX", None):
            _keep_alive(sock)
            # A connect to a free port of the own host can meet itself (TCP's simultaneous open), and would then keep
            # that port from the publisher whom we wait for.
            if transport.get_extra_info("sockname") == transport.get_extra_info("peername"):
                self._transport.abort()
                return
        if not self._source.peer_made(self):
            self._transport.abort()
            return
        self._deadline = self._loop.call_later(BUS_HANDSHAKE_SEC, self._give_up_handshake)
        self.send(self.codec.take_output())

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._ttl is not None:
            self._ttl.cancel()
            self._ttl = None
        codec = self.codec
        was_ready = codec.ready
        messages = codec.feed(data)
        if codec.ready and not was_ready:
            self._become_ready()
        self.send(codec.take_output())
        if messages:
            if len(messages) <= BUS_BATCH_MAX and not self._backlog:
                self._source.take(messages)
            else:
                self._start_backlog(messages)
        if codec.error is not None:
            self.fail(codec.error)
        elif ttl := codec.take_ttl():
            silent = ZMTPError("silent", f"silent for {ttl:g} s, the time its PING names")
            self._ttl = self._loop.call_later(ttl, self.fail, silent)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._ttl, self._proof):
            if timer is not None:
                timer.cancel()
        if not self.gone.done():
            self.gone.set_result(None)
        self._source.peer_lost(self, exc)

    def send(self, data: bytes) -> None:
        """Write to the peer; one that does not read what it is sent is cut off."""
        if data and not self._transport.is_closing():
            self._transport.write(data)
            if self._transport.get_write_buffer_size() > BUS_SEND_MAX:
                self.fail(ZMTPError("not_reading", "it does not read what it is sent"))

    def fail(self, error: ZMTPError) -> None:
        """End the connection because of the peer."""
        if not self._transport.is_closing():
            self.at_fault = True
            self._source.peer_failed(error)
            self._transport.abort()

    def abort(self) -> None:
        """End the connection at once and say nothing."""
        self._backlog.clear()
        self._transport.abort()

    def _become_ready(self) -> None:
        assert self._deadline is not None
        self._deadline.cancel()
        self._deadline = self._loop.call_later(BUS_HEARTBEAT_SEC, self._beat)
        self._proof = self._loop.call_later(BUS_PROVEN_SEC, self._source.peer_proven, self)
        output = [self.codec.take_output()]  # our READY stands before the subscriptions
        output += map(self.codec.encode_subscription, self._source.prefixes)
        self.send(b"".join(output))
        self._source.peer_ready(self)

    def _start_backlog(self, messages: Batch) -> None:
        if not self._backlog:
            self._transport.pause_reading()
            self._loop.call_soon(self._work_off)
        self._backlog += messages

    def _work_off(self) -> None:
        batch = self._backlog[:BUS_BATCH_MAX]
        del self._backlog[:BUS_BATCH_MAX]
        if self._backlog:
            self._loop.call_soon(self._work_off)
        else:
            self._transport.resume_reading()
        self._source.take(batch)

    def _give_up_handshake(self) -> None:
        self.fail(ZMTPError("silent", f"it did not finish the handshake in {BUS_HANDSHAKE_SEC:g} s"))

    def _beat(self) -> None:
        """Send a PING when nothing came; counted in beats, not on the clock, so that our own pauses harm nobody."""
        self._misses = 0 if self._heard or not self.codec.minor else self._misses + 1
        if self._misses > BUS_HEARTBEAT_MISSES:
            self.fail(ZMTPError("silent", f"it left {BUS_HEARTBEAT_MISSES} PINGs without an answer"))
            return
        if not self._heard:
            self.send(self.codec.encode_ping())
        self._heard = False
        self._deadline = self._loop.call_later(BUS_HEARTBEAT_SEC, self._beat)


class BuiltinBusSource(Source):
    """A ZMQ SUB socket in the standard library: connected to one publisher or proxy, or bound for any number of them.

    Args:
        address: a ZMQ endpoint, see `parse_endpoint`.  Once bound, the attribute `address` names the real port.
        kind: what the source calls itself in answers.
        bind: listen there, so that publishers connect to us.

    Raises:
        UsageError: the address is not one.
    """

    backend = "builtin"

    def __init__(self, address: str, kind: str = "zmq", *, bind: bool = False) -> None:
        # source
        self.address = address
        self.kind = kind
        self._endpoint = parse_endpoint(address, bind=bind)
        self._bind = bind
        self._subscriptions: Counter[bytes] = Counter()  # prefix -> how often subscribed, as a SUB socket counts
        self.prefixes: tuple[bytes, ...] = ()  # those subscribed at all: told to every peer, and filtered by
        # run
        self._deliver: Callable[[Batch], None] = lambda batch: None
        self._notify: Callable[[str], None] = lambda line: None
        self._task: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self._server: asyncio.AbstractServer | None = None
        self._file: tuple[str, int] | None = None  # path and inode of the socket that we bound
        self._stopped = False
        # connections
        self._peers: set[_BusPeer] = set()
        self._ready: set[_BusPeer] = set()  # those whose handshake is over
        self._retry_sec = BUS_RETRY_MIN_SEC
        self._said: set[str] = set()  # kinds of line that are not to be said again
        self._said_up = False  # whether the last word on the connection was that it stands

    def start(self, deliver: Callable[[Batch], None], notify: Callable[[str], None]) -> None:
        """Connect, again and again, or bind.  Call it inside the running loop.

        Args:
            deliver: called with messages in their order, at most BUS_BATCH_MAX in one turn of the loop.
            notify: called with a line that is worth logging; each kind of trouble is told once.

        Raises:
            StartError: the address cannot be bound.
        """
        self._deliver, self._notify = deliver, notify
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._serve(self._open_listener()) if self._bind else self._keep_connected())

    def subscribe(self, prefix: bytes) -> None:
        """Ask for the messages whose topic begins with `prefix`; asked twice, it must be ended twice."""
        self._subscriptions[prefix] += 1
        if self._subscriptions[prefix] == 1:
            self._change(prefix, True)

    def unsubscribe(self, prefix: bytes) -> None:
        """End a subscription; one that is not there is let pass.  Messages on their way are dropped here."""
        if prefix in self._subscriptions:
            self._subscriptions[prefix] -= 1
            if not self._subscriptions[prefix]:
                del self._subscriptions[prefix]
                self._change(prefix, False)

    async def stop(self) -> None:
        """Close everything; nothing is delivered afterwards."""
        self._stopped = True
        for peer in list(self._peers):
            peer.abort()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._server is not None:
            self._server.close()
        elif self._listener is not None:
            self._listener.close()
        self._remove_file()
        await asyncio.sleep(0)  # lets the transports close their sockets

    # What a peer reports.

    def peer_made(self, peer: _BusPeer) -> bool:
        """Take a new connection in; false when it must not be."""
        if self._stopped or len(self._peers) >= BUS_PEERS_MAX:
            return False
        self._peers.add(peer)
        return True

    def peer_ready(self, peer: _BusPeer) -> None:
        """The handshake is over."""
        self._ready.add(peer)
        self.connected = True
        if len(self._ready) == 1:
            self._say_up(peer)

    def peer_proven(self, peer: _BusPeer) -> None:
        """The connection lasts: the next loss is news, and is followed by a quick attempt again."""
        self._retry_sec = BUS_RETRY_MIN_SEC
        self._said -= {"up", "down", "hung_up"}
        if not self._said_up:
            self._say_up(peer)

    def peer_failed(self, error: ZMTPError) -> None:
        """The peer is at fault; its connection is about to be lost."""
        retry = "" if self._bind else "; connecting again"
        self._say(error.kind, f"{'a peer' if self._bind else 'the peer'} at {self.address}: {error}{retry}")

    def peer_lost(self, peer: _BusPeer, exc: Exception | None) -> None:
        """The connection is over."""
        if peer in self._peers and peer not in self._ready and not peer.at_fault and not self._stopped:
            # libzmq hangs up without a word on a socket type or a mechanism that does not suit it.
            why = "it hung up during the handshake; is it a PUB or XPUB socket without security?"
            self.peer_failed(ZMTPError("hung_up", why))
        self._peers.discard(peer)
        if peer in self._ready:
            self._ready.discard(peer)
            self.connected = bool(self._ready)
            if not self.connected and not self._stopped:
                what = "the last publisher at {} left" if self._bind else "the bus at {} is gone"
                self._say_down(what, exc, "waiting for the next" if self._bind else "trying until it is back")

    def take(self, messages: Batch) -> None:
        """Deliver what is subscribed: as a SUB socket does, for a publisher learns of an unsubscription later."""
        prefixes = self.prefixes
        if b"" not in prefixes:
            messages = [message for message in messages if message[0].startswith(prefixes)]
        if messages and not self._stopped:
            self._deliver(messages)

    # Inside.

    def _change(self, prefix: bytes, wanted: bool) -> None:
        self.prefixes = tuple(self._subscriptions)
        for peer in list(self._ready):
            peer.send(peer.codec.encode_subscription(prefix, wanted))

    def _say(self, kind: str, line: str) -> None:
        if kind not in self._said and not self._stopped:
            self._said.add(kind)
            self._notify(line)

    def _say_up(self, peer: _BusPeer) -> None:
        if "up" not in self._said:
            self._said_up = True
            how = f"ZMTP 3.{peer.codec.minor}, {peer.codec.socket_type}"
            self._say("up", f"{'a publisher connected to' if self._bind else 'connected to'} {self.address} ({how})")

    def _say_down(self, what: str, why: BaseException | None, then: str) -> None:
        if "down" not in self._said:
            self._said_up = False
            reason = f" ({str(why) or type(why).__name__})" if why else ""
            self._say("down", f"{what.format(self.address)}{reason}; {then}")

    async def _keep_connected(self) -> None:
        while True:
            try:
                peer = await asyncio.wait_for(self._connect(), BUS_CONNECT_SEC)
            except (OSError, UnicodeError, asyncio.TimeoutError) as error:  # UnicodeError: a name that IDNA refuses
                self._say_down("no bus at {} yet", error, "trying until there is one")
            else:
                await peer.gone
            if self._stopped:  # wait_for() before Python 3.12 may swallow a cancellation (bpo-37658)
                return
            await asyncio.sleep(self._retry_sec * random.uniform(0.75, 1.25))
            self._retry_sec = min(self._retry_sec * 2, BUS_RETRY_MAX_SEC)

    async def _connect(self) -> _BusPeer:
        loop, (host, port, path) = asyncio.get_running_loop(), self._endpoint
        if path:
            return (await loop.create_unix_connection(lambda: _BusPeer(self), path))[1]
        # All addresses of a name are tried, 0.25 s apart (RFC 8305), so `localhost` may mean ::1 as well as 127.0.0.1.
        delay = 0.25 if re.search("[a-z]", host, re.I) and ":" not in host else None
        return (await loop.create_connection(lambda: _BusPeer(self), host, port, happy_eyeballs_delay=delay))[1]

    def _open_listener(self) -> socket.socket:
        host, _, path = self._endpoint
        try:
            listener = self._listener = _listen(self._endpoint)
        except (OSError, UnicodeError) as error:
            raise StartError(f"cannot bind {self.address}: {error}") from error
        if not path:
            shown = f"[{host}]" if ":" in host else host or "*"
            self.address = f"tcp://{shown}:{listener.getsockname()[1]}"
        elif path[0] != "\0":
            self._file = path, os.stat(path).st_ino
        return listener

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        if self._endpoint.path:
            self._server = await loop.create_unix_server(lambda: _BusPeer(self), sock=listener)
        else:
            self._server = await loop.create_server(lambda: _BusPeer(self), sock=listener)

    def _remove_file(self) -> None:
        """Remove the socket's file, unless somebody else has put theirs in its place."""
        if self._file is not None:
            path, inode = self._file
            self._file = None
            try:
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
            except OSError:
                pass  # gone already: Python 3.13 removes it with the server


# == 12 == Hub =========================================================================================================


# == 13 == Connection ==================================================================================================


# == 14 == Endpoints and service =======================================================================================


# == 15 == Command line ================================================================================================
