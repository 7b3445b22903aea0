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

and three that ask such a server: `aiperf_api.py get status`, `watch realtime_metrics`, `top`.

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

import argparse
import asyncio
import base64
import codecs
import collections
import contextlib
import difflib
import enum
import glob
import hashlib
import hmac
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from stat import S_ISSOCK
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, Optional, Protocol, Union, cast
from urllib.parse import quote, unquote_to_bytes, urlencode, urlsplit

try:
    import orjson
except ImportError:  # room 3 does the same with the standard library
    orjson = None  # type: ignore[assignment]

try:
    import zmq
except ImportError:  # room 11 has a subscriber of its own
    zmq = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import http.client
    import ssl

__version__ = "1.0.0"
__all__ = ["APIService", "__version__", "main"]


# == 1 == Constants and limits =========================================================================================
#
# Each limit: its unit in the name, a precedent, and what the peer sees past it.

# HTTP requests
HTTP_HEAD_BYTES_MAX = 16 * 1024  # request line and headers; nginx 8-32 KiB, Apache 8 KiB a line, node 16 KiB; 431
HTTP_HEADERS_MAX = 64  # header lines; Apache 100, websockets 128, ours are read by eye; 431
HTTP_TARGET_BYTES_MAX = 4 * 1024  # as sent, still percent-encoded; Apache 8190, uvicorn 64 KiB in all; 414
HTTP_REQUEST_LINE_BYTES_MAX = HTTP_TARGET_BYTES_MAX + 64  # the target, a method and " HTTP/1.1"; 414
HTTP_LEADING_CRLF_MAX = 4  # empty lines skipped before a request line; RFC 9112 2.2 asks for at least one; 400
HTTP_CONTENT_LENGTH_DIGITS_MAX = 15  # h11 20; any length above 0 is refused anyway; 400
HTTP_PIPELINED_MAX = 32  # requests of one connection that are answered before others have their turn
HTTP_QUERY_FIELDS_MAX = 64  # parts between "&"; CPython's max_num_fields is off by default; 400
HTTP_ACCEPT_MEMBERS_MAX = 32  # media types of one Accept header, codings of one Accept-Encoding; the rest are ignored
HTTP_MEMO_HEADS_MAX = 64  # request heads remembered by one memo; the oldest is forgotten, nobody sees it
HTTP_MEMO_HEAD_BYTES_MAX = 1024  # longer heads are parsed each time; curl sends 80, Prometheus 300, Chromium 700
HTTP_SUGGEST_PATH_CHARS_MAX = 64  # an unknown path longer than this gets a 404 without "did you mean" (difflib is slow)

HTTP_HEAD_TIMEOUT_SEC = 10  # for a whole head, from its first byte; nginx 60, Apache 20-40; 408
HTTP_IDLE_TIMEOUT_SEC = 75  # of a kept-alive connection; nginx 75, uvicorn 5; closed
HTTP_CONNECTIONS_MAX = 512  # beside the WebSocket limit, half-open ones included; nginx worker_connections 512; 503
HTTP_GZIP_BYTES_MIN = 1024  # a smaller body is sent as it is; nginx gzip_min_length 20, client_python none
LINGER_TIMEOUT_SEC = 2  # for the peer to end its side after our last words; nginx lingering_timeout 5
CONNECTION_BUFFER_BYTES = 4 * 1024  # in a transport before it counts as full (a copy; the hub shares); asyncio 64 KiB
CONNECTION_READ_BYTES = 16 * 1024  # taken in one read, before others have their turn; asyncio 256 KiB, nginx 4 KiB
CONNECTION_UNSENT_BYTES = 16 * 1024  # in the kernel, behind what the peer's window takes; Linux: megabytes
HTTP_REFUSED_MAX = 64  # connections above the limit that are being told so; a further one is reset without a word
DESCRIPTORS_SPARE = 64  # file descriptors for everything but connections: the bus, files, a child
LISTEN_BACKLOG = 1024  # connections waiting to be accepted; nginx 511; the peer's SYN is retried, a second later
ACCEPT_MAX = 128  # connections accepted in one turn of the loop, before others have theirs; asyncio 100

# WebSocket, from the client to us
WS_MESSAGE_BYTES_MAX = 64 * 1024  # one message over all its fragments; websockets 1 MiB, websocat 64 KiB; Close 1009
WS_CONTROL_BYTES_MAX = 125  # payload of a Close, Ping or Pong; RFC 6455 5.5; Close 1002
WS_CLOSE_REASON_BYTES_MAX = 123  # what 125 leaves beside the code; a longer reason of ours is cut on a character
WS_FRAGMENTS_MAX = 1024  # fragments of one message; an empty one costs the peer 6 bytes and us more; Close 1008
WS_FRAGMENT_BYTES_MEAN = 64  # above 64 KiB the cap grows: one fragment for each 64 bytes that a message may have
WS_CONNECTIONS_MAX = 1000  # WebSockets and streams, unless --ws-max-connections says otherwise; 503 before the upgrade
WS_PING_INTERVAL_SEC = 20  # keepalive; websockets 20
WS_SILENCE_TIMEOUT_SEC = 40  # without a byte either way; websockets 20 behind a ping; cut off
WS_PINGS_PER_READ_MAX = 10  # answered one by one (Autobahn's case 2.10 sends ten); of more, only the last
CLIENT_TYPES_MAX = 256  # message types of one client; an error answer

# WebSocket and streams, from us to the client
CLIENT_WRITE_BYTES_MAX = 64 * 1024  # joined into one write; a longer message goes alone
CLIENT_WRITE_MESSAGES_MAX = 256  # joined into one write
CLIENT_SOFT_MARK_BYTES = 4 * 1024 * 1024  # behind by more, a client gets only the newest of each state message
CLIENT_HOLD_BYTES = 256 * 1024  # many clients behind by more, though they read: the bus waits a moment
CLIENT_HOLD_PART = 0.05  # of all clients is many ...
CLIENT_HOLD_CLIENTS_MIN = 8  # ... but fewer than these are a few
CLIENT_HOLD_SEC_MAX = 2  # in one go; then the bus is drained and the slow-client rules say who misses what
CLIENT_HOLD_FEW_BYTES = 2 * 1024 * 1024  # a few behind by more, though they read: TCP may have lost a packet of theirs
CLIENT_HOLD_FEW_SEC = 0.5  # what the bus waits for a few, all in all, ...
CLIENT_HOLD_FEW_EVERY_SEC = 60  # ... in such a time: so that they cannot slow down the many
CLIENT_HOLD_SEC = 1  # a client that has taken nothing for longer does not read, and nothing waits for it
CLIENT_SOFT_MARK_SEC = 5  # behind for longer, the same
CLIENT_QUEUE_EVENTS_MAX = 1000  # events that wait for a slow client; further ones are left out, and it is told
CLIENT_QUEUE_BYTES_MAX = 6 * 1024 * 1024  # behind by more, events are left out as well
CLIENT_HARD_MARK_BYTES = 16 * 1024 * 1024  # behind by more (one huge message, answers nobody reads), it is cut off
CLIENT_STALL_SEC = 30  # bytes wait and none moves: cut off; nginx send_timeout 60
STREAM_COMMENT_INTERVAL_SEC = 15  # ": keepalive" to an event stream; HTML standard, 9.2.7: "every 15 seconds or so"
STREAM_RETRY_MS = 2000  # told to an event stream: when to come back
RETAINED_TYPES_MAX = 256  # last messages kept for clients that come later
RETAINED_BYTES_MAX = 16 * 1024 * 1024  # of these together
RESUME_MESSAGES_MAX = 2000  # kept for streams that come back with Last-Event-ID; else they begin with a snapshot
RESUME_BYTES_MAX = 4 * 1024 * 1024  # of these together
RESUME_HOLD_SEC = 30  # the bus still brings what a stream took that has gone: it may resume, and then misses nothing

# The bus
BUS_MESSAGE_BYTES_MAX = 16 * 1024 * 1024  # a longer message is counted and dropped; AIPerf's longest are 0.3 MB
BUS_TYPES_MAX = 256  # message types and topics that are told apart; the names come from outside
ROW_SHAPES_MAX = 4096  # shapes of rows of metrics that are remembered; then all are forgotten
ROW_SHAPE_CHARS_MAX = 2000  # of one; a longer one is worked out each time
BUS_TURN_MESSAGES_MAX = 256  # taken in one poll turn, before clients and requests have theirs
BUS_TURN_BYTES_MAX = 512 * 1024  # the same in bytes
BUS_QUEUE_MESSAGES_MAX = 200  # ZMQ_RCVHWM, of any size each; libzmq 1000; beyond it TCP and the bus keep them
# AIPerf's proxy is up for 0.6 s only before a run tells its configuration, once; a slower attempt would miss that.
BUS_RETRY_MIN_SEC = 0.1  # before the first reconnect (ZMQ_RECONNECT_IVL, as libzmq), give or take some jitter
BUS_RETRY_MAX_SEC = 0.2  # before all further ones (ZMQ_RECONNECT_IVL_MAX; libzmq: no growth)
BUS_HEARTBEAT_INTERVAL_MS, BUS_HEARTBEAT_TIMEOUT_MS = 5000, 15000  # ZMTP pings; libzmq none
BUS_CONNECT_SEC = 10.0  # for the name and the connection; then the next attempt
BUS_HOLD_SEC = 0.005  # between looks whether the clients have caught up
BUS_POLL_INTERVAL_SEC = 0.02  # where the loop cannot watch a descriptor (Windows)
REPLAY_PAUSE_SEC = 5  # between two rounds of a looped replay, so that the end can be looked at
SECRETS_MAX = 64  # literals that are scrubbed wherever they turn up

# The bus without pyzmq.  What libzmq does where nothing is configured is the precedent; it bounds no message, though.
BUS_FRAME_MAX = 256 * 1024 * 1024  # bytes of a frame, and of all frames of a message; beyond: reconnect; pyzmq's, too
BUS_PARTS_MAX = 64  # frames of one message (the bus sends 2); beyond: error and reconnect
BUS_COMMAND_MAX = 64 * 1024  # bytes of one ZMTP command (READY is the longest, about 50); beyond: error and reconnect
BUS_BATCH_MAX = 256  # messages handed over in one turn of the loop; the rest waits for the next turn
BUS_PEERS_MAX = 1024  # publishers connected to a bound source; a further one is cut off
BUS_SEND_MAX = 1024 * 1024  # bytes that a peer has left unread before it is cut off
BUS_HANDSHAKE_SEC = 30.0  # from connection to READY (ZMQ_HANDSHAKE_IVL); then error and reconnect
BUS_HEARTBEAT_SEC = 10.0  # of silence before a PING
BUS_HEARTBEAT_MISSES = 3  # PINGs in a row that nothing followed; then error and reconnect
BUS_PROVEN_SEC = 2.0  # a connection that lasted so long starts the back-off and the log lines afresh
BUS_IPC_PATH_MAX = 107 if sys.platform.startswith("linux") else 103  # bytes of an ipc:// path: sun_path less its NUL

# After the end of a child
LINGER_SEC = 5  # the last state is served for so long, unless --linger says otherwise

# The end of a child: what its bus still has to say is waited for
BUS_SETTLE_QUIET_SEC = 0.2  # without a message: then it has said everything
BUS_SETTLE_TIMEOUT_SEC = 3  # at most, for a bus that outlives its benchmark

# Log lines that wait while a child has the terminal
LOG_LINES_HELD_MAX = 1000  # older ones are left out, and counted

# The client commands
CLIENT_TIMEOUT_SEC = 10  # for an answer; curl has no limit
CLIENT_SILENCE_SEC = 40  # of a stream, which has a comment every 15 s; then another attempt
CLIENT_RETRY_MIN_SEC, CLIENT_RETRY_MAX_SEC = 0.5, 10  # between attempts, doubling
CLIENT_ERROR_BYTES_MAX = 4096  # read of an error answer, for its one line

# Stopping
STOP_TIMEOUT_SEC = 2  # in all, from the signal to the exit

# Log lines
LOG_LINE_CHARS_MAX = 1000  # of a line about the bus
LOG_QUOTE_CHARS_MAX = 200  # a quoted string of a peer; websockets 75; cut with "..."


# == 2 == Errors =======================================================================================================
#
#   AIPerfAPIError            everything this module raises on purpose
#   ├── UsageError            the command line or an argument of APIService is wrong      exit code 2
#   ├── StartError            the machine says no: port in use, address not ours          exit code 1
#   ├── AskError              a server that `get`, `watch` or `top` asked says no          exit code 1
#   ├── CommandError          the command behind `--` cannot be started                   exit code 126 or 127
#   ├── JSONError             bytes that are not JSON
#   ├── BusMessageError       a bus message that cannot be used                           counted, logged once a kind
#   ├── ClientMessageError    a WebSocket message that cannot be obeyed                   an error answer
#   ├── ZMTPError             a bus peer that does not speak ZMTP as we do      reconnect, logged once a kind
#   ├── HTTPError             carries the HTTP status of its answer
#   └── WebSocketError        carries the close code of its answer


class AIPerfAPIError(Exception):
    """Base of all errors that this module raises on purpose."""


class UsageError(AIPerfAPIError):
    """The caller asked for something that cannot be; the message is for the user, the exit code is 2."""


class StartError(AIPerfAPIError):
    """The machine cannot do it (a port in use, an address that cannot be bound); the exit code is 1."""


class AskError(AIPerfAPIError):
    """A server that a client command asked cannot be reached, or says no; the exit code is 1.

    Args:
        message: for the user, in one line.
        status: of its answer; 0 if there was none.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_final(self) -> bool:
        """Whether asking again would bring the same answer."""
        return 400 <= self.status < 500


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


class ClientMessageError(AIPerfAPIError):
    """A WebSocket message that cannot be obeyed; the client is told, the connection stays."""


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
    """What `orjson.dumps` does with the standard library alone, and what it refuses: huge integers, lone surrogates."""
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
        return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS | (orjson.OPT_INDENT_2 if pretty else 0))
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


_load = _load_with_json if orjson is None else _load_with_orjson
_dump = _dump_with_json if orjson is None else _dump_with_orjson


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
# Every bus message and configuration passes here at the door (metrics that no client takes: when somebody reads them),
# so that nothing further down (state, hub, recorder, answers) ever shows a credential.  Two nets: by key, wherever an
# object has a key that names a credential; by value, for the literal secrets that are known (from the child's command
# line, or met under such a key before).

REDACTED = "***"
_SECRET_LENGTH_MIN = 6  # characters: a shorter literal would hit innocent text all over a message
_CREDENTIAL_KEY = re.compile(  # of a key in snake_case: api_key, x_api_key, hf_token, aws_secret_access_key, ...
    r"(?:.*_)?(?:api_?keys?|access_key|private_key|secret_key|authorization|auth|bearer|password|passwd|cookie|secrets?"
    r"|credentials?|(?<!first_)(?<!last_)(?<!per_)(?<!output_)(?<!input_)(?<!prompt_)(?<!each_)(?<!next_)token)"
)
_HEADERS_KEY = re.compile(r"(?:.*_)?headers")
_CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Ends of such keys, lower-cased, by what they begin with: a payload with none of them, nor an escape that could hide
# one, needs no parsing.
_CREDENTIAL_HINTS: Mapping[bytes, tuple[bytes, ...]] = MappingProxyType(
    {
        b"key": (b'key"', b'keys"'),
        b"auth": (b'auth"', b'authorization"'),
        b"bearer": (b'bearer"',),
        b"token": (b'token"',),
        b"passw": (b'password"', b'passwd"'),
        b"cookie": (b'cookie"',),
        b"secret": (b'secret"', b'secrets"'),
        b"credential": (b'credential"', b'credentials"'),
        b"headers": (b'headers"',),
    }
)
_LOWER_CASE = bytes(range(256)).lower()
_IN_NO_HINT = b"0123456789.+-_([{fgjmqvxFGJMQVX"  # half of a metrics message, which is looked through without them
_URL_USERINFO = re.compile(r'(://)[^/\s"@]+@')  # RFC 3986 section 3.2.1
_URL_PARAMETER = re.compile(r"(?<=[?&])([\w.-]+)=([^&#\s]*)")  # `?api-key=...`, as some gateways want it
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


def _scrub_parameter(match: re.Match[str]) -> str:
    return f"{match[1]}={REDACTED}" if match[2] and is_credential_key(match[1]) else match[0]


def scrub_text(text: str, secrets: Iterable[str] = ()) -> str:
    """A text without the known secrets, without user information and credentials in URLs, and without bearer tokens."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    if "=" in text:
        text = _URL_PARAMETER.sub(_scrub_parameter, text)
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
    """The literals to look for: a secret as it is, and what stands behind its scheme (`Bearer x`), longest first."""
    forms = {form for secret in secrets for form in (secret, secret.rpartition(" ")[2])}
    return tuple(
        sorted((form for form in forms if len(form) >= _SECRET_LENGTH_MIN), key=lambda form: (-len(form), form))
    )


def _escaped_forms(secret: str) -> tuple[bytes, bytes]:
    """How a string may stand in a JSON text: with and without its non-ASCII characters escaped."""
    return json.dumps(secret)[1:-1].encode(), json.dumps(secret, ensure_ascii=False)[1:-1].encode("utf-8", "replace")


def _ends_key(hint: bytes, text: bytes) -> bool:
    """Whether a hint may end a key somewhere: behind a key there is a colon or white space, behind a value (the header
    "Time to First Token" of every realtime_metrics) there is neither."""
    end = text.find(hint) + len(hint)
    while end >= len(hint):
        if text[end : end + 1] in b": \t\r\n":
            return True
        end = text.find(hint, end) + len(hint)
    return False


def _may_hold_secret(payload: bytes, secrets: Sequence[str]) -> bool:
    """A quick look, at a hundredth of the cost of parsing; wrong only on the side of caution."""
    thinned = payload.translate(_LOWER_CASE, _IN_NO_HINT)
    roots = [root for root in _CREDENTIAL_HINTS if root in thinned]
    return (
        any(_ends_key(end, thinned) for root in roots for end in _CREDENTIAL_HINTS[root])
        or (b"bearer" in roots and b"bearer " in thinned)
        or (b"\\" in payload and b"\\u00" in payload.lower())
        or (b"@" in payload and (b"://" in payload or rb":\/" in payload))
        or (b"=" in payload and b"?" in payload)
        or any(form in payload for secret in secrets for form in _escaped_forms(secret))
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
    met = set() if found is None else found  # a secret may stand a second time, without its key
    try:
        value = json_load(payload)
        redacted = redact(value, met)
        clean = _scrub_strings(redacted, (*secret_forms(met), *secrets))
    except JSONError:
        return payload
    except RecursionError:  # nested too deep to be looked through: nobody gets it, no reader takes an empty text
        return b""
    return payload if clean == value else json_bytes(clean)


# What must not be logged: the token in a query (its name may be percent-encoded), in a header, in a subprotocol
_SECRET_IN_TEXT = re.compile(
    r"([?&](?:t|%74)(?:o|%6f)(?:k|%6b)(?:e|%65)(?:n|%6e)=|aiperf\.token\.|bearer +)[^\s&]+", re.IGNORECASE
)


def printable(text: str | bytes, limit: int = LOG_QUOTE_CHARS_MAX) -> str:
    """A peer's string for a log line: one line of ASCII, at most `limit` characters and "...", tokens as `***`."""
    raw = text.decode("latin-1") if isinstance(text, bytes) else text
    shown = _SECRET_IN_TEXT.sub(r"\1***", raw[: 4 * limit]).encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= limit and len(raw) <= 4 * limit else shown[:limit] + "..."


# == 4 == WebSocket codec ==============================================================================================
#
# RFC 6455 as a server needs it, without a socket: bytes in, events out, and frames as bytes.
#
# What is not here, on purpose: extensions (RSV bits are refused, so permessage-deflate never runs), masking of our own
# frames (5.1: a server must not), fragmenting our own messages (one frame may be as long as the message).
#
# A fault is found at the byte that commits it, not when its frame is complete: what a peer declares is checked before
# a byte of it is kept, and text is checked while its frame is still arriving.  After a fault or a Close nothing more is
# looked at (7.1.7), so no later byte can be taken for a message.

OP_CONT, OP_TEXT, OP_BINARY = 0x0, 0x1, 0x2
OP_CLOSE, OP_PING, OP_PONG = 0x8, 0x9, 0xA

# RFC 6455 7.4.1 and the IANA registry.  1004, 1005, 1006 and 1015 are never on the wire, so they have no name here.
CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001
CLOSE_PROTOCOL_ERROR = 1002
CLOSE_UNSUPPORTED_DATA = 1003
CLOSE_INVALID_DATA = 1007
CLOSE_POLICY_VIOLATION = 1008
CLOSE_MESSAGE_TOO_BIG = 1009
CLOSE_INTERNAL_ERROR = 1011
CLOSE_TRY_AGAIN_LATER = 1013

_CLOSE_CODES_OF_THE_PROTOCOL = frozenset((1000, 1001, 1002, 1003, *range(1007, 1015)))
_ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3


@dataclass
class TextMessage:
    """A whole text message, of one frame or many."""

    __slots__ = ("text",)
    text: str


@dataclass
class BinaryMessage:
    """A whole binary message, of one frame or many."""

    __slots__ = ("data",)
    data: bytes


@dataclass
class Ping:
    """To be answered by a Pong with the same data (RFC 6455 5.5.2)."""

    __slots__ = ("data",)
    data: bytes


@dataclass
class Pong:
    """An answer to a Ping, or unasked for (RFC 6455 5.5.3)."""

    __slots__ = ("data",)
    data: bytes


@dataclass
class Close:
    """The peer closes.  `code` is None when it gave none; echo `payload`, for it is what was sent, byte for byte."""

    __slots__ = ("code", "payload", "reason")
    code: int | None
    reason: str
    payload: bytes


@dataclass
class Failure:
    """The peer broke the protocol: send a Close with `code` and `reason`, then drop the connection (7.1.7)."""

    __slots__ = ("code", "reason")
    code: int
    reason: str


Event = Union[TextMessage, BinaryMessage, Ping, Pong, Close, Failure]


def websocket_accept(key: str) -> str:
    """`Sec-WebSocket-Accept` for a `Sec-WebSocket-Key` (RFC 6455 4.2.2, step 5.4)."""
    return base64.b64encode(hashlib.sha1(key.encode("ascii") + _ACCEPT_GUID).digest()).decode("ascii")


def encode_frame(opcode: int, payload: bytes, fin: bool = True) -> bytes:
    """One unmasked frame, as a server sends it.  The same bytes serve every client (RFC 6455 5.2)."""
    first, size = (0x80 | opcode) if fin else opcode, len(payload)
    if size <= 125:
        return bytes((first, size)) + payload
    if size <= 0xFFFF:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


def encode_close(code: int, reason: str = "") -> bytes:
    """A whole Close frame; a reason over 123 bytes of UTF-8 is cut on a character (RFC 6455 5.5.1)."""
    raw = reason.encode("utf-8", "replace")
    if len(raw) > WS_CLOSE_REASON_BYTES_MAX:
        raw = raw[:WS_CLOSE_REASON_BYTES_MAX].decode("utf-8", "ignore").encode("utf-8")
    return encode_frame(OP_CLOSE, struct.pack("!H", code) + raw)


def _unmask(data: bytes, mask: bytes) -> bytes:
    """RFC 6455 5.3, as one XOR of two long integers: linear, and no loop in Python."""
    size = len(data)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")


def _read_close(payload: bytes) -> Close:
    """The event of a Close frame's payload; raises WebSocketError."""
    if not payload:
        return Close(None, "", payload)
    # 5.5.1: "If there is a body, the first two bytes of the body MUST be a 2-byte unsigned integer".
    if len(payload) == 1:
        raise WebSocketError(CLOSE_PROTOCOL_ERROR, "close payload of one byte")
    code = int.from_bytes(payload[:2], "big")
    # 7.4.2: below 1000 unused, 1000-2999 only as registered, 3000-4999 free, above that undefined.
    if code not in _CLOSE_CODES_OF_THE_PROTOCOL and not 3000 <= code <= 4999:
        raise WebSocketError(CLOSE_PROTOCOL_ERROR, f"close code {code} is not allowed")
    try:
        return Close(code, payload[2:].decode("utf-8"), payload)
    except UnicodeDecodeError:
        raise WebSocketError(CLOSE_INVALID_DATA, "close reason is not UTF-8") from None


class FrameParser:
    """Reads the frames of one client.

    Args:
        max_message: bytes that one message may have over all its fragments; past it, Failure 1009.

    Holds at most `max_message` bytes of a message, one control payload and one incomplete head.
    """

    __slots__ = (
        "_control",
        "_done",
        "_fin",
        "_fragments",
        "_head",
        "_kind",
        "_left",
        "_mask",
        "_max_fragments",
        "_max_message",
        "_message",
        "_opcode",
        "_utf8_tail",
    )

    def __init__(self, max_message: int = WS_MESSAGE_BYTES_MAX) -> None:
        # Limits
        self._max_message = max_message  # bytes
        self._max_fragments = max(WS_FRAGMENTS_MAX, max_message // WS_FRAGMENT_BYTES_MEAN)  # data frames of a message
        # The connection
        self._done = False  # a Close or a fault was seen: nothing more is read
        self._head = b""  # an incomplete frame head: 0-13 bytes
        # The frame
        self._opcode = 0
        self._fin = True
        self._mask = b""  # 4 bytes, turned so that the next payload byte meets its first
        self._left = -1  # payload bytes to come; -1 while the head is being read
        self._control = b""  # payload so far of a control frame: 0-125 bytes
        # The message
        self._kind = 0  # OP_TEXT or OP_BINARY; 0 between messages
        self._fragments = 0  # data frames begun, this message
        self._message = bytearray()  # payload so far, unmasked
        self._utf8_tail = b""  # bytes at the end of it that begin a character: 0-3 bytes

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes, in order.  Never raises; [] for ever after a Close or a Failure."""
        events: list[Event] = []
        try:
            self._read(data, events)
        except WebSocketError as error:
            events.append(Failure(error.close_code, error.reason))
            self._stop()
        return events

    def _stop(self) -> None:
        """Forget what was held and read no more (7.1.7)."""
        self._done = True
        self._head = self._control = b""
        self._message = bytearray()

    def _read(self, data: bytes, events: list[Event]) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        at, end = 0, len(data)
        while not self._done:
            if self._left < 0:
                body = self._read_head(data, at)
                if body < 0:
                    self._head = data[at:]
                    return
                at = body
            stop = min(at + self._left, end)
            if at < stop:
                self._take_payload(data[at:stop])
                at = stop
            if self._left:
                return
            self._end_frame(events)

    def _read_head(self, data: bytes, at: int) -> int:
        """Read a frame head (5.2) at `at`; where its payload begins, or -1 if bytes are missing.

        Changes nothing until the head is complete, so an incomplete one is simply read again with more bytes.
        """
        have = len(data) - at
        if not have:
            return -1
        first = data[at]
        self._check_first_byte(first)
        if have < 2:
            return -1
        second = data[at + 1]
        # 5.1: "The server MUST close the connection upon receiving a frame that is not masked."
        if second < 0x80:
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, "frame is not masked")
        length, key = second & 0x7F, at + 2
        # 5.5: "All control frames MUST have a payload length of 125 bytes or less".
        if length > WS_CONTROL_BYTES_MAX:
            if first & 0x08:
                raise WebSocketError(CLOSE_PROTOCOL_ERROR, "control frame over 125 bytes")
            key += 2 if length == 126 else 8
            length = self._long_length(data[at + 2 : key], key - at - 2)
        if length < 0:
            return -1
        # 10.4: an implementation-specific limit "after reassembly", on what is declared, before it is kept.
        if not first & 0x08 and len(self._message) + length > self._max_message:
            raise WebSocketError(CLOSE_MESSAGE_TOO_BIG, f"message over {self._max_message} bytes")
        if len(data) < key + 4:
            return -1
        self._begin_frame(first, length, data[key : key + 4])
        return key + 4

    def _check_first_byte(self, first: int) -> None:
        # 5.2: RSV1-3 "MUST be 0 unless an extension is negotiated": none ever is.
        if first & 0x70:
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, "reserved bits are set")
        opcode = first & 0x0F
        if opcode in (OP_TEXT, OP_BINARY):
            # 5.4: fragments of one message may not be interleaved with those of another.
            if self._kind:
                raise WebSocketError(CLOSE_PROTOCOL_ERROR, "new message inside a fragmented one")
        elif opcode == OP_CONT:
            self._check_continuation()
        elif opcode not in (OP_CLOSE, OP_PING, OP_PONG):
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, f"reserved opcode {opcode}")
        elif first < 0x80:  # 5.5: control frames "MUST NOT be fragmented"
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, "fragmented control frame")

    def _check_continuation(self) -> None:
        if not self._kind:
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, "continuation without a message")
        if self._fragments >= self._max_fragments:
            raise WebSocketError(CLOSE_POLICY_VIOLATION, f"message in over {self._max_fragments} fragments")

    @staticmethod
    def _long_length(field: bytes, size: int) -> int:
        """The value of an extended length field of `size` bytes, or -1 if some are missing."""
        # 5.2: "the most significant bit MUST be 0"
        if size == 8 and field[:1] >= b"\x80":
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, "frame length with the top bit set")
        if len(field) < size:
            return -1
        length = int.from_bytes(field, "big")
        # 5.2: "the minimal number of bytes MUST be used to encode the length"
        if length <= (125 if size == 2 else 0xFFFF):
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, "frame length in too many bytes")
        return length

    def _begin_frame(self, first: int, length: int, mask: bytes) -> None:
        self._opcode = opcode = first & 0x0F
        self._fin = first >= 0x80
        self._left = length
        self._mask = mask
        if not opcode & 0x08:
            self._fragments += 1
            self._kind = opcode or self._kind

    def _take_payload(self, masked: bytes) -> None:
        piece = _unmask(masked, self._mask)
        self._left -= len(piece)
        turn = len(piece) % 4
        self._mask = self._mask[turn:] + self._mask[:turn]
        if self._opcode & 0x08:
            self._control += piece
            return
        self._message += piece
        if self._kind == OP_TEXT and (self._utf8_tail or not piece.isascii()):
            self._check_text(piece)

    def _check_text(self, piece: bytes) -> None:
        """8.1: invalid UTF-8 fails the connection; here at once, not at the end of the message."""
        piece = self._utf8_tail + piece
        try:
            tail = piece[codecs.utf_8_decode(piece, "strict", False)[1] :]
        except UnicodeDecodeError:
            raise WebSocketError(CLOSE_INVALID_DATA, "text is not UTF-8") from None
        # CPython holds back half a surrogate (ED A0..BF) for its error handler "surrogatepass"; it can never be valid.
        if len(tail) == 2 and tail[0] == 0xED and tail[1] >= 0xA0:
            raise WebSocketError(CLOSE_INVALID_DATA, "text is not UTF-8")
        self._utf8_tail = tail

    def _end_frame(self, events: list[Event]) -> None:
        self._left = -1
        if self._opcode & 0x08:
            payload, self._control = self._control, b""
            self._end_control(payload, events)
        elif self._fin:
            self._end_message(events)

    def _end_control(self, payload: bytes, events: list[Event]) -> None:
        if self._opcode == OP_PING:
            events.append(Ping(payload))
        elif self._opcode == OP_PONG:
            events.append(Pong(payload))
        else:
            events.append(_read_close(payload))
            # 5.5.1: nothing may follow a Close, so nothing after it is read.
            self._stop()

    def _end_message(self, events: list[Event]) -> None:
        if self._utf8_tail:
            raise WebSocketError(CLOSE_INVALID_DATA, "text ends inside a character")
        message, self._message = self._message, bytearray()
        # decode() cannot fail: _check_text has seen every byte that is not ASCII.
        events.append(TextMessage(message.decode("utf-8")) if self._kind == OP_TEXT else BinaryMessage(bytes(message)))
        self._kind = self._fragments = 0


# == 5 == HTTP messages ================================================================================================
#
# HTTP/1.1 (RFC 9110, RFC 9112) as strict as h11, without a socket.
#
# What is not here, on purpose, and what a client sees instead:
#
#   request bodies      Content-Length above 0: 413.  Transfer-Encoding: 501, and 400 with a Content-Length beside it
#   HTTP/1.0 keep-alive one answer, then the connection ends
#   HTTP/2, HTTP/0.9    505; 400
#   obs-fold, bare LF   400
#   CONNECT             400 (authority-form); absolute-form is understood
#   Range, TRACE        ignored; 405
#
# Every fault of a head ends the connection after its answer: what follows a fault cannot be told from a body, and
# guessing is how requests are smuggled.

HeaderList = Sequence[tuple[str, str]]

# RFC 9110 5.6.2: token = 1*tchar
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# RFC 9112 3: request-line = method SP request-target SP HTTP-version; the target in visible ASCII (RFC 3986 2)
_REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
# RFC 9112 5: field-line = field-name ":" OWS field-value OWS; RFC 9110 5.5: field-value of VCHAR, obs-text, SP, HTAB
_FIELD_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t\x20-\x7e\x80-\xff]*)")
_FIELD_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
# RFC 9112 3.2.1: origin-form = absolute-path [ "?" query ]; a fragment ("#") is never sent (RFC 9110 7.1)
_ORIGIN_FORM = re.compile(rb"(/[^?#]*)(?:\?([^#]*))?")
# RFC 9112 3.2.2: absolute-form = absolute-URI; the authority without userinfo (RFC 9110 4.2.4)
_ABSOLUTE_FORM = re.compile(rb"(?i:https?)://([^/?#]+)(/[^?#]*)?(?:\?([^#]*))?")
# RFC 9110 7.2: Host = uri-host [ ":" port ]; names as DNS and containers have them, addresses as IP-literal
# (RFC 3986 3.2.2)
_HOST = re.compile(r"(?:([A-Za-z0-9._~-]*)|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{0,5}))?")
# RFC 9110 8.6: Content-Length = 1*DIGIT
_CONTENT_LENGTH = re.compile(rf"[0-9]{{1,{HTTP_CONTENT_LENGTH_DIGITS_MAX}}}")
# RFC 3986 2.1: pct-encoded = "%" HEXDIG HEXDIG
_BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
# RFC 9110 12.4.2: qvalue
_QVALUE = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")
# RFC 9110 8.8.3: entity-tag, its opaque part
_ENTITY_TAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')
# RFC 6455 4.1: base64 of 16 bytes; its last digit holds 2 bits of data and 4 zeros
_WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{21}[AQgw]==")

# Headers of which a second one is a fault: "last wins" in one program and "first wins" in another is how they disagree.
# A second of any other header is joined to the first with ", " (RFC 9110 5.3).
_SINGLE_HEADERS = frozenset(
    (
        "authorization",
        "content-length",
        "host",
        "if-modified-since",
        "origin",
        "sec-websocket-key",
        "sec-websocket-version",
        "transfer-encoding",
    )
)

_REASONS: Mapping[int, str] = MappingProxyType({
    101: "Switching Protocols", 200: "OK", 204: "No Content", 304: "Not Modified", 400: "Bad Request",
    401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    413: "Content Too Large", 414: "URI Too Long", 417: "Expectation Failed", 421: "Misdirected Request",
    426: "Upgrade Required", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented", 503: "Service Unavailable", 505: "HTTP Version Not Supported",
})  # fmt: skip

# For pages: everything from here and nothing inline, so that a metric's name can never become a script.
_PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_PAGE_HEADERS = (
    ("Content-Security-Policy", _PAGE_POLICY),
    ("Referrer-Policy", "no-referrer"),  # the address may hold ?token=
)


# -- Reading requests


class Request(NamedTuple):
    """One request.  Immutable and free of connection state, so that equal heads may share one."""

    method: str  # as sent: methods are case-sensitive
    target: str  # as sent, still percent-encoded; for logs, through printable()
    path: str  # percent-decoded once; begins with "/", or is "*" for OPTIONS *
    query: tuple[tuple[str, str], ...]  # decoded names and values, in order; "" where there is no "="
    headers: Mapping[str, str]  # names in lower case, values as latin-1
    version: tuple[int, int]  # (1, 0) or (1, 1)
    keep_alive: bool  # a next request may follow on the connection; never behind one that asks for an upgrade
    wants_upgrade: bool  # asks for a WebSocket; check_upgrade() says whether rightly

    def arg(self, name: str, default: str | None = None) -> str | None:
        """The first value of a query argument; `?pretty` has the value ""."""
        if not self.query:
            return default
        return next((value for key, value in self.query if key == name), default)

    def args(self, name: str) -> list[str]:
        """All values of a query argument, in order."""
        return [value for key, value in self.query if key == name]


def _bad(message: str, status: int = 400) -> HTTPError:
    """A fault of the head."""
    return HTTPError(status, message, close=True)


def _percent_decode(raw: bytes) -> str:
    """Decode once, strictly: "%zz", bytes that are not UTF-8, and NUL are 400."""
    if b"%" in raw:
        if _BAD_PERCENT.search(raw):
            raise _bad("bad percent-encoding in the target")
        raw = unquote_to_bytes(raw)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad("the target is not UTF-8") from None
    if "\0" in text:
        raise _bad("NUL in the target")
    return text


def _parse_query(raw: bytes) -> tuple[tuple[str, str], ...]:
    """Only "&" separates, never ";": proxies that cache know only "&" (CVE-2020-28473)."""
    if not raw:
        return ()
    fields = raw.split(b"&", HTTP_QUERY_FIELDS_MAX)
    if len(fields) > HTTP_QUERY_FIELDS_MAX:
        raise _bad(f"over {HTTP_QUERY_FIELDS_MAX} query arguments")
    pairs = (field.replace(b"+", b" ").partition(b"=") for field in fields if field)
    return tuple((_percent_decode(name), _percent_decode(value)) for name, _, value in pairs)


class _RequestLine(NamedTuple):
    method: str
    target: str
    path: str
    query: tuple[tuple[str, str], ...]
    authority: str | None  # of an absolute-form target: it replaces Host
    version: tuple[int, int]


def _parse_request_line(line: bytes) -> _RequestLine:
    """RFC 9112 section 3; raises HTTPError 400, 414 or 505."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise _bad("malformed request line")
    method, target, major, minor = match.groups()
    # 505 also for "PRI * HTTP/2.0", the preface of HTTP/2 (RFC 9113 3.4).
    if major != b"1":
        raise _bad("HTTP/1.1 is spoken here", 505)
    if len(target) > HTTP_TARGET_BYTES_MAX:
        raise _bad(f"target over {HTTP_TARGET_BYTES_MAX} bytes", 414)
    path, query, authority = _parse_target(method, target)
    # RFC 9110 2.5: a higher minor version is answered as the highest that we know.
    version = (1, 0) if minor == b"0" else (1, 1)
    return _RequestLine(method.decode("ascii"), target.decode("ascii"), path, query, authority, version)


def _parse_target(method: bytes, target: bytes) -> tuple[str, tuple[tuple[str, str], ...], str | None]:
    """Path, query and authority of a request target (RFC 9112 3.2).  ".." and "//" stay as they are: nothing is built
    from a path, it is only looked up."""
    match = _ORIGIN_FORM.fullmatch(target)
    if match:
        return _percent_decode(match[1]), _parse_query(match[2]), None
    match = _ABSOLUTE_FORM.fullmatch(target)
    if match:
        authority = match[1].decode("ascii")
        split_host(authority)
        return _percent_decode(match[2] or b"/"), _parse_query(match[3]), authority
    # 3.2.4: asterisk-form "is only used for a server-wide OPTIONS request".
    if target == b"*" and method == b"OPTIONS":
        return "*", (), None
    # 3.2.3: authority-form is only for CONNECT, which asks for a proxy.
    raise _bad("the target must be a path or an http(s) URL")


def split_host(host: str) -> tuple[str, str]:
    """Name or address in lower case (an IPv6 address without its brackets) and port ("" if none); raises HTTPError 400.

    >>> split_host("[::1]:8080")
    ('::1', '8080')
    """
    match = _HOST.fullmatch(host)
    if match is None:
        raise _bad("malformed Host")
    return (match[1] or match[2] or "").lower(), match[3] or ""


def _tokens(header: str | None) -> list[str]:
    """The members of a comma-separated list in lower case (RFC 9110 5.6.1); empty ones do not count."""
    return [item for item in (part.strip(" \t").lower() for part in header.split(",")) if item] if header else []


def _join_headers(fields: list[tuple[str, str]]) -> dict[str, str]:
    """Repeated headers joined; HTTPError 400 for a second of those that must stand alone."""
    headers: dict[str, str] = {}
    for name, value in fields:
        if name not in headers:
            headers[name] = value
        elif name in _SINGLE_HEADERS:
            raise _bad(f"two {name} headers")
        else:
            headers[name] += ("; " if name == "cookie" else ", ") + value
    return headers


def _refuse_body(headers: Mapping[str, str], version: tuple[int, int]) -> None:
    """The one decision on where a body ends (RFC 9112 section 6.3): there is none, or the request is refused."""
    length = headers.get("content-length")
    if length is not None and not _CONTENT_LENGTH.fullmatch(length):
        raise _bad("malformed Content-Length")
    if "transfer-encoding" in headers:
        # 6.1: with a Content-Length, or from HTTP/1.0, it "ought to be handled as an error": both are smuggling.
        if length is not None or version == (1, 0):
            raise _bad("Transfer-Encoding beside Content-Length or in HTTP/1.0")
        raise _bad("request bodies are not read here", 501)
    if length is not None and int(length):
        raise _bad("request bodies are not read here", 413)


def _check_expect(headers: Mapping[str, str], version: tuple[int, int]) -> None:
    """RFC 9110 10.1.1.  `100-continue` needs no 100 here: there is no body to wait for."""
    expect = headers.get("expect")
    if expect is not None and version != (1, 0) and expect.lower() != "100-continue":
        raise _bad("unknown expectation", 417)


def _build_request(line: _RequestLine, fields: list[tuple[str, str]]) -> Request:
    """The checks that need the whole head; raises HTTPError."""
    headers = _join_headers(fields)
    # RFC 9112 3.2: 400 for any HTTP/1.1 request that lacks Host, or has a malformed one.
    if "host" in headers:
        split_host(headers["host"])
    elif line.version == (1, 1):
        raise _bad("no Host header")
    _refuse_body(headers, line.version)
    _check_expect(headers, line.version)
    if line.authority is not None:
        # RFC 9112 3.2.2: "MUST ignore the received Host header field (if any) and instead replace it".
        headers["host"] = line.authority
    connection = _tokens(headers.get("connection"))
    # RFC 9110 7.8: Upgrade is ignored in HTTP/1.0; 7.6.1: and without "upgrade" in Connection.
    upgrade = line.version == (1, 1) and "upgrade" in connection and "websocket" in _tokens(headers.get("upgrade"))
    return Request(
        method=line.method,
        target=line.target,
        path=line.path,
        query=line.query,
        headers=MappingProxyType(headers),
        version=line.version,
        keep_alive=line.version == (1, 1) and "close" not in connection and not upgrade,
        wants_upgrade=upgrade,
    )


class RequestParser:
    """Reads the requests of one connection.

    Args:
        memo: heads already parsed, to share between connections; a keep-alive client repeats its head byte for byte,
            so a scrape costs a dict lookup.  Bounded by HTTP_MEMO_HEADS_MAX.

    What it answers depends on the bytes alone, not on how they were cut: each line is judged when its LF is there,
    and limits on bytes are judged by position.  Between requests it holds what feed() gave it, unread.
    """

    __slots__ = ("_buffer", "_deaf", "_done", "_fields", "_line", "_line_at", "_memo", "_scanned", "_skipped")

    def __init__(self, memo: dict[bytes, Request] | None = None) -> None:
        # The connection
        self._memo = {} if memo is None else memo
        self._buffer = bytearray()  # unread bytes; the head being read stands at its front
        self._done = False  # after a fault or the last request: nothing more is parsed
        self._deaf = False  # and, but for an upgrade, nothing more is kept
        # The head
        self._start_head()

    def _start_head(self) -> None:
        self._line: _RequestLine | None = None
        self._fields: list[tuple[str, str]] = []
        self._line_at = 0  # where the line being read begins, in bytes from the head's first
        self._scanned = 0  # bytes known to hold no further LF
        self._skipped = 0  # empty lines before the request line

    @property
    def started(self) -> bool:
        """Whether bytes of a next request are there."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes off the wire."""
        if not self._deaf:
            self._buffer += data

    def take_rest(self) -> bytes:
        """Hand over the unread bytes, such as frames that came right behind an upgrade."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def recall(self, data: bytes) -> Request | None:
        """The request that these bytes are, if just a head seen before, and nothing else waits to be read: what
        a keep-alive client sends.  They must not be fed then."""
        if self._buffer or self._skipped or self._done:
            return None
        request = self._memo.get(data)
        return request if request is not None and request.keep_alive else None

    def next_request(self) -> Request | None:
        """The next request, or None until there are more bytes.

        Raises HTTPError (with close=True) for a fault.  After that, and after a request that is not keep_alive, it
        answers None for ever (RFC 9112 9.6).
        """
        if self._done:
            return None
        try:
            request = self._advance()
        except HTTPError:
            self._end(deaf=True)
            raise
        if request is not None and not request.keep_alive:
            self._end(deaf=not request.wants_upgrade)
        return request

    def _end(self, *, deaf: bool) -> None:
        self._done, self._deaf = True, deaf
        if deaf:
            self._buffer.clear()

    def _advance(self) -> Request | None:
        buffer = self._buffer
        while True:
            if self._line is None:
                self._check_first_byte()
            lf = buffer.find(b"\n", self._scanned)
            self._check_size(lf)
            if lf < 0:
                self._scanned = len(buffer)
                return None
            request = self._recall() if self._line is None else None
            if request is not None:
                return request
            # RFC 9112 2.2 lets a bare LF end a line; those that differ about it can be played against each other.
            if not buffer.startswith(b"\r", max(lf - 1, self._line_at), lf):
                raise _bad("line ends without CR")
            line = bytes(buffer[self._line_at : lf - 1])
            self._line_at = self._scanned = lf + 1
            if not self._take_line(line):
                return self._finish()

    def _check_first_byte(self) -> None:
        """Refuse at once what can never become a request line, rather than at the deadline."""
        if not self._buffer:
            return
        first = self._buffer[0]
        if first == 0x16:  # a TLS record of type handshake (RFC 8446 5.1)
            raise _bad("this port speaks plain HTTP, not TLS")
        if first != 0x0D and not 0x21 <= first <= 0x7E:
            raise _bad("malformed request line")

    def _check_size(self, lf: int) -> None:
        """Limits on the line that ends at `lf`, or on as much of it as there is."""
        end = lf if lf >= 0 else len(self._buffer)
        if self._line is None and end > HTTP_REQUEST_LINE_BYTES_MAX + 1:
            raise _bad(f"request line over {HTTP_REQUEST_LINE_BYTES_MAX} bytes", 414)
        if end >= HTTP_HEAD_BYTES_MAX:
            raise _bad(f"request head over {HTTP_HEAD_BYTES_MAX} bytes", 431)

    def _recall(self) -> Request | None:
        """The request of a head seen before, taken off the buffer."""
        end = self._buffer.find(b"\r\n\r\n", 0, HTTP_MEMO_HEAD_BYTES_MAX) + 4
        request = self._memo.get(bytes(self._buffer[:end])) if end > 3 else None
        if request is not None:
            del self._buffer[:end]
            self._start_head()
        return request

    def _take_line(self, line: bytes) -> bool:
        """Take one line without its CRLF; False for the empty line that ends the head."""
        if self._line is None:
            if line:
                self._line = _parse_request_line(line)
            else:
                self._skip_empty_line()
            return True
        if not line:
            return False
        if len(self._fields) >= HTTP_HEADERS_MAX:
            raise _bad(f"over {HTTP_HEADERS_MAX} headers", 431)
        # Refuses control characters, a space before the colon (5.1) and obs-fold (5.2), each a way to smuggle.
        match = _FIELD_LINE.fullmatch(line)
        if match is None:
            raise _bad("malformed header line")
        self._fields.append((match[1].decode("ascii").lower(), match[2].strip(b" \t").decode("latin-1")))
        return True

    def _skip_empty_line(self) -> None:
        """RFC 9112 2.2: a server "SHOULD ignore at least one empty line (CRLF) received prior to the request-line"."""
        if self._skipped >= HTTP_LEADING_CRLF_MAX:
            raise _bad("empty lines before the request line")
        self._skipped += 1
        del self._buffer[: self._line_at]
        self._line_at = self._scanned = 0

    def _finish(self) -> Request:
        """The head is complete: take it off the buffer and remember it."""
        assert self._line is not None  # _take_line() ends a head only behind a request line
        request = _build_request(self._line, self._fields)
        # An upgrade carries a random key: it will not come again.
        if self._line_at <= HTTP_MEMO_HEAD_BYTES_MAX and not request.wants_upgrade:
            if len(self._memo) >= HTTP_MEMO_HEADS_MAX:
                del self._memo[next(iter(self._memo))]
            self._memo[bytes(self._buffer[: self._line_at])] = request
        del self._buffer[: self._line_at]
        self._start_head()
        return request


# -- Checks of a request


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def check_host(host: str | None, *, allowed: frozenset[str], bound_to_loopback: bool) -> None:
    """Refuse a foreign Host with 421: a page that rebinds its DNS name to us still sends its own name.

    Args:
        host: the header, or None (HTTP/1.0 only: the parser refuses HTTP/1.1 without it).
        allowed: names in lower case, with or without a port.
        bound_to_loopback: an IP address, "localhost" and the allowed names pass; bound wider, every name passes unless
            there is a list, and then only the list does.
    """
    if host is None or (not bound_to_loopback and not allowed):
        return
    name = split_host(host)[0]
    if name in allowed or host.lower() in allowed:
        return
    # Exact names and strict addresses: "localhost.evil", "localhost6" and "127.1" are names like any other.
    if bound_to_loopback and (name == "localhost" or _is_ip_address(name)):
        return
    raise HTTPError(421, "this Host is not served here; see --allow-host")


def check_origin(origin: str | None, *, host: str | None, allowed: frozenset[str]) -> None:
    """Refuse a browser's foreign Origin with 403 (RFC 6455 10.2): CORS does not cover WebSockets.

    Args:
        origin: the header, or None (curl, websocat): fine.
        host: the Host header, already checked; an Origin of the same host and port is our own.  The scheme is not
            compared, because a proxy may end TLS before us.
        allowed: origins in lower case as browsers send them, or "*" for any.
    """
    if origin is None or "*" in allowed or origin.lower() in allowed:
        return
    scheme, _, authority = origin.lower().partition("://")
    # "null" (a sandboxed frame, a file) has no authority and is foreign like any other.
    if scheme in ("http", "https") and authority and host is not None and authority == host.lower():
        return
    raise HTTPError(403, "this Origin is not allowed here; see --cors-origin")


def check_upgrade(request: Request) -> str:
    """The Sec-WebSocket-Key of a right opening handshake (RFC 6455 4.2.1); raises HTTPError 400, 405 or 426."""
    if request.method != "GET":
        raise HTTPError(405, "a WebSocket is opened by GET", (("Allow", "GET"),))
    if not request.wants_upgrade:
        hint = "a WebSocket is spoken here: websocat ws://HOST:PORT/ws; for curl there is curl -N .../api/stream"
        raise HTTPError(426, hint, (("Upgrade", "websocket"), ("Connection", "Upgrade")))
    # 4.4: "MUST abort … and send an appropriate HTTP error code (such as 426) and a |Sec-WebSocket-Version| header"
    if request.headers.get("sec-websocket-version") != "13":
        raise HTTPError(426, "only WebSocket version 13", (("Sec-WebSocket-Version", "13"),), close=True)
    key = request.headers.get("sec-websocket-key", "")
    if not _WEBSOCKET_KEY.fullmatch(key):
        raise _bad("Sec-WebSocket-Key is not the base64 of 16 bytes")
    return key


def subprotocols(request: Request) -> list[str]:
    """The subprotocols that the client offers, in order; HTTPError 400 for one that is no token (RFC 6455 4.1)."""
    offered = [item.strip(" \t") for item in request.headers.get("sec-websocket-protocol", "").split(",")]
    names = [name for name in offered if name]
    if not all(_TOKEN.fullmatch(name.encode("latin-1")) for name in names):
        raise _bad("malformed Sec-WebSocket-Protocol")
    return names


def choose_subprotocol(request: Request) -> str | None:
    """The offered subprotocol to echo, or None.  A browser drops the connection when it offered some and gets none
    (RFC 6455 4.1); one that carries no token is preferred, so that the token need not travel back."""
    ours = [name for name in subprotocols(request) if name.startswith("aiperf.")]
    return next((name for name in ours if not name.startswith("aiperf.token.")), ours[0] if ours else None)


TOKEN_COOKIE = "aiperf_api"


def page_cookie(token: bytes) -> str:
    """What stands in for the token in a browser's cookie: enough for us, and useless for whoever else gets to see it
    (cookies are not kept apart by port, RFC 6265 8.5)."""
    return hmac.new(token, b"aiperf-api page cookie", "sha256").hexdigest()


def has_page_token(request: Request, token: bytes) -> bool:
    """Whether the request presents the token as `?token=`, as a person does who opens a page."""
    return any(hmac.compare_digest(value.encode("utf-8"), token) for value in request.args("token"))


def check_token(request: Request, token: bytes) -> None:
    """Refuse with 401 a request that presents the token in none of the ways that clients can.

    `Authorization: Bearer` is for tools.  Browsers, which can set headers neither on a WebSocket nor on what a page
    loads, have `?token=`, the subprotocol `aiperf.token.<token>`, and the cookie that a page opened with it sets.
    """
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    given = [credentials.strip(" ").encode("latin-1")] if scheme.lower() == "bearer" else []
    given += [value.encode("utf-8") for value in request.args("token")]
    prefix = "aiperf.token."
    given += [name[len(prefix) :].encode("latin-1") for name in subprotocols(request) if name.startswith(prefix)]
    cookies = [pair.strip(" ").partition("=") for pair in request.headers.get("cookie", "").split(";")]
    shown = [value.encode("latin-1") for name, _, value in cookies if name == TOKEN_COOKIE]
    # Constant time, on bytes (str with non-ASCII raises), and never stopping at the first that fits.
    fits = [hmac.compare_digest(candidate, token) for candidate in given]
    fits += [hmac.compare_digest(candidate, page_cookie(token).encode()) for candidate in shown]
    if not sum(fits):
        hint = "a token is needed: -H 'Authorization: Bearer TOKEN', or ?token=TOKEN"
        raise HTTPError(401, hint, (("WWW-Authenticate", 'Bearer realm="aiperf-api"'),))


# -- Negotiation


def _weighted(header: str) -> list[tuple[str, dict[str, str], float]]:
    """(value, parameters, q) of each member of an Accept or Accept-Encoding header; malformed ones are left out.

    Commas and semicolons inside quoted parameters are not expected: such a member is misread and then fits nothing.
    """
    members = []
    for item in header.lower().split(",", HTTP_ACCEPT_MEMBERS_MAX)[:HTTP_ACCEPT_MEMBERS_MAX]:
        value, *rest = (part.strip(" \t") for part in item.split(";"))
        params = {name.strip(" \t"): text.strip(' \t"') for name, _, text in (part.partition("=") for part in rest)}
        q = params.pop("q", "1")
        if value and _QVALUE.fullmatch(q):
            members.append((value, params, float(q)))
    return members


def _fit(offer: str, ranges: list[tuple[str, dict[str, str], float]]) -> float:
    """The q of the most specific media range that covers an offered media type; 0 if none does (RFC 9110 12.5.1)."""
    [(kind, params, _)] = _weighted(offer)
    best, best_q = -1, 0.0
    for value, wanted, q in ranges:
        # A parameter that the offer does not have does not exclude it: Prometheus adds `escaping=…` to each range.
        if any(params.get(name, text) != text for name, text in wanted.items()):
            continue
        rank = {"*/*": 0, kind.partition("/")[0] + "/*": 1, kind: 2 + len(wanted)}.get(value, -1)
        if rank > best:
            best, best_q = rank, q
    return best_q


def accepts(header: str | None, offered: Sequence[str]) -> str | None:
    """The offered media type that an Accept header likes best, the earlier of equals; None if it takes none of them.

    >>> accepts("text/*;q=0.5, application/json", ["text/plain; charset=utf-8", "application/json"])
    'application/json'
    """
    if not header:
        return offered[0]
    ranges = _weighted(header)
    weights = [_fit(offer, ranges) for offer in offered]
    best = max(weights)
    return offered[weights.index(best)] if best else None


def accepts_gzip(header: str | None) -> bool:
    """Whether an Accept-Encoding header takes gzip (RFC 9110 12.5.3)."""
    if not header:
        return False
    codings = {value: q for value, _, q in _weighted(header)}
    return codings.get("gzip", codings.get("x-gzip", codings.get("*", 0.0))) > 0


def etag_matches(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names `etag`, by weak comparison (RFC 9110 13.1.2): the answer is then 304.

    Args:
        etag: with its quotes, and `W/` if it is weak.
    """
    if not header or not etag:
        return False
    return header.strip() == "*" or etag[etag.index('"') :] in _ENTITY_TAG.findall(header)


# -- Writing responses


# The head of nearly every answer, as _fixed_head() makes it; to make it anew took longer than the answer itself.
_JSON_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    b"X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"
)


def _header_bytes(headers: HeaderList) -> bytes:
    """Header lines; ValueError for what would split a response (CVE-2016-9964, CVE-2020-7695)."""
    lines = []
    for name, value in headers:
        raw_name, raw_value = name.encode("latin-1"), value.encode("latin-1")
        if not _TOKEN.fullmatch(raw_name) or not _FIELD_VALUE.fullmatch(raw_value):
            raise ValueError(f"not a header: {printable(name)}: {printable(value)}")
        lines.append(b"%b: %b\r\n" % (raw_name, raw_value))
    return b"".join(lines)


class Response:
    """One answer, made once and sent to any number of requests: what does not differ between them is already bytes.

    Args:
        status: of the table of reasons.
        body: None for a stream that ends with the connection; encode() then gives the head alone.
        content_type: with its charset; `text/html` gets the headers of a page.
        headers: further ones; ValueError for CR, LF or NUL in them.  Without a Cache-Control it is `no-store`.

    A body of HTTP_GZIP_BYTES_MIN or more goes out compressed to clients that take it; an ETag beside it must be weak
    (`W/"…"`), because one tag then stands for both forms.
    """

    __slots__ = (
        "_gzip_body",
        "_gzip_head",
        "_head",
        "_sent",
        "_sent_as",
        "body",
        "headers",
        "is_compressible",
        "status",
    )

    def __init__(
        self,
        status: int = 200,
        body: bytes | None = b"",
        content_type: str = "application/json",
        headers: HeaderList = (),
    ) -> None:
        self.status = status
        self.body = body
        self.headers = tuple(headers)
        self.is_compressible = body is not None and status == 200 and len(body) >= HTTP_GZIP_BYTES_MIN
        plain = status == 200 and content_type == "application/json" and not headers and not self.is_compressible
        self._head = _JSON_HEAD if plain else self._fixed_head(content_type)
        self._gzip_head, self._gzip_body = b"", b""  # made when a client first takes it
        self._sent_as, self._sent = (
            (b"", False),
            b"",
        )  # date and coding of the last answer, and its bytes: all of a second

    def _fixed_head(self, content_type: str) -> bytes:
        names = {name.lower() for name, _ in self.headers}
        added = [("Content-Type", content_type)] if self.status not in (204, 304) else []
        added.append(("X-Content-Type-Options", "nosniff"))
        if "cache-control" not in names:
            added.append(("Cache-Control", "no-store"))
        if self.is_compressible:
            added.append(("Vary", "Accept-Encoding"))
        if content_type.startswith("text/html"):
            added.extend(_PAGE_HEADERS)
        status_line = f"HTTP/1.1 {self.status} {_REASONS[self.status]}\r\n".encode("ascii")
        return status_line + _header_bytes((*added, *self.headers))

    def _compress(self) -> None:
        """RFC 1952, once for all requests; level 6 gives a tenth of the bytes for a few milliseconds."""
        packer = zlib.compressobj(6, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        self._gzip_body = packer.compress(self.body or b"") + packer.flush()
        self._gzip_head = self._head + b"Content-Encoding: gzip\r\n"

    def encode(
        self, *, date: bytes, head_only: bool = False, close: bool = False, gzip: bool = False, extra: HeaderList = ()
    ) -> bytes:
        """The bytes of the answer.

        Args:
            date: IMF-fixdate (RFC 9110 5.6.7), such as b"Mon, 23 Nov 2026 00:00:00 GMT".
            head_only: the request is a HEAD: same head, no body.
            close: the connection ends after this answer; implied by a body of None.
            gzip: the client takes gzip (accepts_gzip); used if the body is worth it.
            extra: headers of this one answer, such as CORS.
        """
        usual = not (head_only or close or extra)
        if usual and self._sent_as == (date, gzip):
            return self._sent
        head, body = self._head, self.body
        if gzip and self.is_compressible:
            if not self._gzip_body:
                self._compress()
            head, body = self._gzip_head, self._gzip_body
        # RFC 9110 8.6: no Content-Length with 204; with 304 it would have to be that of the 200.
        has_length = body is not None and self.status not in (204, 304)
        length = b"Content-Length: %d\r\n" % len(body or b"") if has_length else b""
        end = b"\r\n" + _header_bytes(extra) if extra else b"\r\n"
        if close or body is None:
            end += b"Connection: close\r\n"
        sent = b"".join((head, length, b"Date: ", date, end, b"\r\n", b"" if head_only or body is None else body))
        if usual:
            self._sent_as, self._sent = (date, gzip), sent
        return sent


def json_response(value: JSONValue, status: int = 200, pretty: bool = False, headers: HeaderList = ()) -> Response:
    """A JSON answer; `pretty` indents it for people and ends it with a newline for their terminals."""
    body = json_bytes(value, pretty=pretty)
    return Response(status, body + b"\n" if pretty else body, headers=headers)


def error_response(error: HTTPError, pretty: bool = False) -> Response:
    """`{"error": …}` with the status and headers of the error."""
    return json_response({"error": error.message}, error.status, pretty, error.headers)


def not_modified(response: Response) -> Response:
    """The 304 for a response whose ETag the client already has (RFC 9110 15.4.5)."""
    kept = [pair for pair in response.headers if pair[0].lower() in ("cache-control", "etag", "vary")]
    if response.is_compressible:
        kept.append(("Vary", "Accept-Encoding"))
    return Response(304, b"", "", kept)


def upgrade_response(key: str, subprotocol: str | None = None) -> bytes:
    """The 101 that opens a WebSocket (RFC 6455 4.2.2).  No Sec-WebSocket-Extensions: every offer is declined."""
    headers = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", websocket_accept(key))]
    if subprotocol is not None:
        headers.append(("Sec-WebSocket-Protocol", subprotocol))
    return b"HTTP/1.1 101 Switching Protocols\r\n" + _header_bytes(headers) + b"\r\n"


# == 6 == Router =======================================================================================================
#
# A dict of exact paths.  No patterns, no redirects: "//host" and "/metrics/" are simply unknown, so no Location header
# is ever made from a request (CVE-2021-28861).


@dataclass(frozen=True)
class Param:
    """A query argument, as the documentation shows it."""

    name: str
    summary: str
    example: str = ""
    required: bool = False
    pattern: str = ""  # regular expression of JSON Schema that the value fits; "": any text
    words: tuple[str, ...] = ()  # the only values there are; empty: any
    place: str = "query"  # or "path"


@dataclass(frozen=True)
class Route:
    """One endpoint: how it is found, who answers, and what the documentation says of it."""

    path: str  # exact
    name: str  # a word, unique; operationId in OpenAPI
    summary: str  # one sentence
    handler: Any = None  # Callable[[service, Request], Response]; called in room 13, never here
    methods: tuple[str, ...] = ("GET", "HEAD")
    params: tuple[Param, ...] = ()
    media_types: tuple[str, ...] = ("application/json",)  # the first is what a client gets that does not say
    example: Any = None  # an answer, as a value for JSON or as text
    shape: str = ""  # of a JSON answer, as type_schema() reads it
    errors: tuple[int, ...] = ()  # statuses of its own, beside those that any request may meet
    needs_token: bool = True  # false for health checks
    websocket: bool = False


class Router:
    """The table of routes; ValueError if two share a path or a name."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        self._by_path = {route.path: route for route in self.routes}
        if len({route.name for route in self.routes}) != len(self.routes) or len(self._by_path) != len(self.routes):
            raise ValueError("two routes share a path or a name")

    def match(self, method: str, path: str) -> Route:
        """The route of a request; raises HTTPError 404, or 405 with Allow."""
        route = self._by_path.get(path)
        if route is None:
            raise HTTPError(404, self._not_found(path))
        if method not in route.methods:
            # RFC 9110 15.5.6: "MUST generate an Allow header field"
            methods = ", ".join(route.methods)
            raise HTTPError(405, f"method not allowed; {route.path} takes {methods}", (("Allow", methods),))
        return route

    def _not_found(self, path: str) -> str:
        """What to tell the client.  Of the request only a path comes back that needs no escaping anywhere: neither in
        HTML nor in a terminal nor in a shell."""
        if not _PLAIN_PATH.fullmatch(path):
            return "unknown path; GET /api lists what there is"
        near = difflib.get_close_matches(path, self._by_path, n=1)
        return f"unknown path {path}; " + (f"did you mean {near[0]}?" if near else "GET /api lists what there is")

    def openapi(self, info: Mapping[str, str], shapes: Mapping[str, Any], *, secured: bool) -> dict[str, Any]:
        """The table as an OpenAPI 3.1 document, ready for json_bytes.

        Args:
            info: title, version and description.
            shapes: the schemas that the shapes of the routes name, from read_shapes().
            secured: whether a token is asked for.
        """
        own = {status for route in self.routes for status in route.errors}
        errors = {str(status): _error_answer(status) for status in sorted({*_ANY_ERRORS, *own, 401})}
        components: dict[str, Any] = {"schemas": shapes, "responses": errors}
        if secured:
            components["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "query": {"type": "apiKey", "in": "query", "name": "token"},
            }
        return {
            "openapi": "3.1.0",
            "info": info,
            "servers": [{"url": "./", "description": "where this document was found, whatever stands before it"}],
            "paths": {route.path: _path_item(route, secured) for route in self.routes},
            "components": components,
        }


# A path that may be quoted back; longer ones get no "did you mean" either (difflib is slow).
_PLAIN_PATH = re.compile(rf"/[A-Za-z0-9/_.-]{{0,{HTTP_SUGGEST_PATH_CHARS_MAX}}}")

# -- Descriptions for machines

_ANY_ERRORS = (400, 405, 421, 503)  # what any request may meet
_ERROR_TEXTS: Mapping[int, str] = MappingProxyType(
    {
        400: "The request is malformed, or an argument has a value that it cannot have",
        401: "The token is missing or wrong",
        403: "The Origin is another site's",
        404: "There is nothing of that name",
        405: "The method is not one of this path",
        421: "The Host is not served here",
        426: "Only as a WebSocket",
        503: "Too many connections; come back later",
    }
)
_PLAIN_TYPES = frozenset(("boolean", "integer", "number", "object", "string"))
_SHAPE_LINE = re.compile(r"([A-Z]\w+)(\+?) +(.+)")
_FIELD_LINE_OF_SHAPE = re.compile(r"  (\w+)(~?) +(\S+)(?: +(.+))?")


def type_schema(text: str) -> dict[str, Any]:
    """JSON Schema of a type as tables write it: `integer`; `Name` of a shape; `any`; `=word` (that word); `a|b` (one of
    the words); `T[]`; `T{}`, a map from names to T; `T?`, T or null; `T,U`, either.

    >>> type_schema("number?[]")
    {'type': 'array', 'items': {'type': ['number', 'null']}}
    """
    if "," in text:
        return {"anyOf": [type_schema(part) for part in text.split(",")]}
    if text.endswith("?"):
        schema = type_schema(text[:-1])
        null = {"type": [schema["type"], "null"]} if "type" in schema else None
        return {**schema, **null} if null else {"anyOf": [schema, {"type": "null"}]}
    if text.endswith("[]"):
        return {"type": "array", "items": type_schema(text[:-2])}
    if text.endswith("{}"):
        return {"type": "object", "additionalProperties": type_schema(text[:-2])}
    if text.startswith("="):
        return {"const": text[1:]}
    if "|" in text:
        return {"enum": text.split("|")}
    if text == "any":
        return {}
    return {"type": text} if text in _PLAIN_TYPES else {"$ref": f"#/components/schemas/{text}"}


def read_shapes(text: str) -> dict[str, dict[str, Any]]:
    """JSON Schemas of a table: a shape a paragraph, a field a line.

    `Name  description` begins a shape, `Name+` one that may have further fields.  Its lines are `  field  type
    description`; `field~` may be missing.
    """
    shapes: dict[str, dict[str, Any]] = {}
    shape: dict[str, Any] = {}
    for line in text.strip().splitlines():
        head, field = _SHAPE_LINE.fullmatch(line), _FIELD_LINE_OF_SHAPE.fullmatch(line)
        if head:
            shape = {"type": "object", "description": head[3], "properties": {}, "required": []}
            shapes[head[1]] = shape if head[2] else {**shape, "additionalProperties": False}
        elif field:
            name, may_miss, kind, words = field.groups()
            schema = type_schema(kind)
            shape["properties"][name] = {**schema, "description": words} if words else schema
            shape["required"] += [] if may_miss else [name]
        else:
            raise ValueError(f"neither a shape nor a field: {line}")
    return shapes


def _path_item(route: Route, secured: bool) -> dict[str, Any]:
    """What OpenAPI says of a path; its parameters are those of GET and HEAD alike."""
    item: dict[str, Any] = {"parameters": [_parameter(param) for param in route.params]} if route.params else {}
    statuses = [*_ANY_ERRORS, *route.errors, *([401] if secured and route.needs_token else [])]
    errors = {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(statuses)}
    # An empty list of requirements: open, whatever the rest of the document asks for.
    ways: list[dict[str, list[str]]] = [{"bearer": []}, {"query": []}] if route.needs_token else []
    security = {"security": ways} if secured else {}
    for method in route.methods:
        is_get = method == "GET"
        item[method.lower()] = {
            "operationId": route.name if is_get else f"{route.name}_head",
            "summary": route.summary if is_get else f"The head of GET {route.path}",
            **security,
            "responses": {**_good_answers(route, is_get), **errors},
        }
    return item


def _good_answers(route: Route, is_get: bool) -> dict[str, Any]:
    if route.websocket:
        return {"101": {"description": f"{route.summary}; /asyncapi.json describes its messages"}}
    answer: dict[str, Any] = {"description": route.summary}
    if is_get:
        answer["content"] = {media_type: _media(route, media_type) for media_type in route.media_types}
    return {"200": answer, "304": {"description": "As the client has it already: If-None-Match names its ETag"}}


def _media(route: Route, media_type: str) -> dict[str, Any]:
    is_json = media_type == "application/json"
    schema = type_schema(route.shape) if is_json and route.shape else {} if is_json else {"type": "string"}
    return {"schema": schema, **({} if route.example is None else {"example": route.example})}


def _parameter(param: Param) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if param.pattern:
        schema["pattern"] = param.pattern
    if param.words:
        schema["enum"] = list(param.words)
    described = {"name": param.name, "in": param.place, "description": param.summary, "required": param.required}
    empty = {"allowEmptyValue": True} if "" in param.words else {}
    return {**described, **empty, "schema": schema, **({"example": param.example} if param.example else {})}


def _error_answer(status: int) -> dict[str, Any]:
    """An error as any endpoint gives it; readiness alone says it in plain text."""
    content = {"application/json": {"schema": type_schema("Error")}}
    if status == 503:
        content["text/plain"] = {"schema": type_schema("string")}
    return {"description": _ERROR_TEXTS[status], "content": content}


# == 7 == Static files =================================================================================================
#
# Everything under static/ is read once, at start, into a dict: a request path is only ever looked up in it, so there is
# no path to traverse and no link to follow out of the folder.

STATIC_FOLDERS = ("static", "aiperf_api_static")  # beside a copied module; beside an installed one
DEMO_RECORDING = "demo.jsonl.gz"
_CONTENT_TYPES: Mapping[str, str] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".mjs": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".svg": "image/svg+xml",
        ".png": "image/png",
        ".ico": "image/x-icon",
        ".txt": "text/plain; charset=utf-8",
        ".md": "text/plain; charset=utf-8",
        "": "text/plain; charset=utf-8",  # LICENSE
    }
)


class StaticFile(NamedTuple):
    """A file as it is served: its bytes and its media type."""

    body: bytes
    content_type: str


def _module_file() -> str:
    return os.path.abspath(__file__)


def _read_folder(folder: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for parent, _, names in os.walk(folder):  # does not follow links to folders
        for name in names:
            path = os.path.join(parent, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    files[os.path.relpath(path, folder).replace(os.sep, "/")] = file.read()
    return files


def _read_archive(archive: str) -> dict[str, bytes]:
    """The files under static/ of the zip archive (`python3 -m zipapp`) that this module runs from."""
    import zipfile  # only a zipapp needs it

    with zipfile.ZipFile(archive) as package:
        names = [name for name in package.namelist() if name.startswith("static/") and not name.endswith("/")]
        return {name[len("static/") :]: package.read(name) for name in names}


def read_static_files() -> dict[str, bytes]:
    """Every file that ships beside the module, by its path under static/; empty where only the module was copied."""
    here = os.path.dirname(_module_file())
    if os.path.isfile(here):  # the "folder" is the archive itself
        return _read_archive(here)
    for folder in STATIC_FOLDERS:
        if any(os.path.isfile(os.path.join(here, folder, name)) for name in ("dashboard.html", DEMO_RECORDING)):
            return _read_folder(os.path.join(here, folder))
    return {}


def static_table(files: Mapping[str, bytes]) -> dict[str, StaticFile]:
    """What is served, by path under `/static/`: files of a known type (recordings are not)."""
    table = {}
    for name, body in files.items():
        extension = os.path.splitext(name)[1].lower()
        if extension in _CONTENT_TYPES:
            table[name] = StaticFile(body, _CONTENT_TYPES[extension])
    return table


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
# (unit, display unit) -> the factor that leads from one to the other. Dividing by a million would be more exact than
# multiplying by a millionth, but AIPerf multiplies, and its exports and ours are to agree to the last digit.
_CONVERSIONS: Mapping[tuple[str, str], float] = MappingProxyType(
    {("ns", "ms"): 1e-6, ("ns", "sec"): 1e-9, ("B", "KB"): 1 / 1024, ("sec", "ms"): 1000.0}
)


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def text_or(value: Any, default: str) -> str:
    """Return a value if it is a string with something in it, else the default."""
    return value if isinstance(value, str) and value else default


def _conversion(tag: str, unit: Any) -> Optional[tuple[float, str]]:
    """Return (factor, display unit) where a unit on the bus is not the one people read, else None."""
    metric = CATALOGUE.get(tag)
    if metric is None or unit != metric.unit or unit == metric.display_unit:
        return None
    return _CONVERSIONS[metric.unit, metric.display_unit], metric.display_unit


class RowPlan(NamedTuple):
    """What is done to a row before people see it."""

    is_hidden: bool = False  # it is not for them
    removed: tuple[str, ...] = ()  # fields that are not shown
    scaled: tuple[str, ...] = ()  # statistics that are multiplied
    factor: float = 1.0  # by it
    unit: str = ""  # in which they are then; "" when nothing is scaled


def make_row_plan(row: dict[str, Any]) -> RowPlan:
    """Work out what is to be done to a row."""
    tag = text_or(row.get("tag"), "")
    if not tag or (tag in CATALOGUE and CATALOGUE[tag].hidden):
        return RowPlan(is_hidden=True)
    removed = tuple(key for key, value in row.items() if key in INTERNAL_FIELDS or not _is_shown(key, value))
    conversion = _conversion(tag, row.get("unit"))
    if conversion is None:
        return RowPlan(removed=removed)
    scaled = tuple(key for key in row if key in STATISTICS and key not in removed)
    factor, unit = conversion
    return RowPlan(removed=removed, scaled=scaled, factor=factor, unit=unit)


class RowPlans:
    """Remembers plans: they follow from a row's shape alone, its tag and unit and the names and types of its fields. A
    run has some hundred shapes, and a burst brings a hundred thousand rows a second."""

    def __init__(self) -> None:
        self._plans: dict[tuple[Any, ...], RowPlan] = {}  # by shape

    def of(self, row: dict[str, Any]) -> RowPlan:
        """Return `make_row_plan(row)`."""
        shape = row.get("tag"), row.get("unit"), tuple(row), tuple(map(type, row.values()))
        try:
            plan = self._plans.get(shape)
        except TypeError:  # a list for a tag or a unit
            return make_row_plan(row)
        if plan is None:
            plan = make_row_plan(row)
            if len(repr(shape)) <= ROW_SHAPE_CHARS_MAX:
                if len(self._plans) >= ROW_SHAPES_MAX:
                    self._plans.clear()
                self._plans[shape] = plan
        return plan


def _is_shown(key: str, value: Any) -> bool:
    """Tell whether a field of a row has a value for clients: not null, and a number where one belongs."""
    return is_number(value) if key in STATISTICS or key == "count" else value is not None


MetricRows = dict[str, dict[str, Any]]  # rows of metrics by tag, without it
PlanOf = Callable[[dict[str, Any]], RowPlan]


def display_row(row: Any, plan_of: PlanOf = make_row_plan) -> Optional[dict[str, Any]]:
    """Return one row of a metrics message as people read it, in the order of its fields; None when it is not for them.

    Statistics are in display units, nulls are left out, fields that AIPerf may add later are kept.

    Args:
        row: as `json_load` returns it: no NaN, no infinity.
        plan_of: works out the plan of a row, or knows it (`RowPlans.of`).
    """
    plan = plan_of(row) if isinstance(row, dict) else None
    if plan is None or plan.is_hidden:
        return None
    shown: dict[str, Any] = row.copy()
    for key in plan.removed:
        del shown[key]
    if plan.unit:
        shown["unit"] = plan.unit
        for key in plan.scaled:
            shown[key] *= plan.factor
    return shown


def display_list(rows: list[Any], plan_of: PlanOf = make_row_plan) -> list[dict[str, Any]]:
    """Return those rows of a metrics message that people see, in the order they came."""
    return [row for row in (display_row(row, plan_of) for row in rows) if row is not None]


def display_rows(rows: Any, plan_of: PlanOf = make_row_plan) -> MetricRows:
    """Return the same by tag, the last of two with one tag; nothing where `rows` is no list."""
    return _by_tag(display_list(rows, plan_of)) if isinstance(rows, list) else {}


def _by_tag(rows: Iterable[dict[str, Any]]) -> MetricRows:
    return {row.pop("tag"): row for row in rows}


def forwardable_realtime_metrics(payload: bytes, plan_of: PlanOf = make_row_plan) -> tuple[bytes, Optional[MetricRows]]:
    """Return a realtime_metrics message as clients get it, the very same object where nothing needs a change, and its
    rows as `display_rows` returns them: None when it has none.

    Raises:
        BusMessageError: the payload is not JSON, or not an object.
    """
    message = read_message(payload)
    rows = message.get("metrics")
    if not isinstance(rows, list):
        return payload, None
    shown = display_list(rows, plan_of)
    if shown != rows:
        payload = json_bytes({**message, "metrics": shown})
    return payload, _by_tag(shown)


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
# What has been read on its way, by the state or for the clients; another message may be no JSON at all.
_READ_MESSAGE_TYPES = (CORE_MESSAGE_TYPES - METRICS_MESSAGE_TYPES) | {"realtime_metrics"}
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
        """Return the requests on their way, by the credit counters alone: they are of one moment."""
        return 0 if self.is_complete else max(0, self.sent - self.completed - self.cancelled)

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

    def offer(self, payload: bytes, now_ns: int, value: Optional[dict[str, Any]] = None) -> bool:
        """Take a payload; read it now if none was read for a while, which is what the answer tells.

        Args:
            value: what the payload says, when the caller has read it already.

        Raises:
            BusMessageError: it was read now, and is bad; what was known stays.
        """
        if value is None and self.read_ns is not None and 0 <= now_ns - self.read_ns < EAGER_PARSE_NS:
            self._pending = payload
            return False
        self.set(self._read(payload) if value is None else value)
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


def _read_rows(payload: bytes, plan_of: PlanOf) -> MetricRows:
    """Return the rows of a message by tag, in display units."""
    rows = read_message(payload).get("metrics")
    if not isinstance(rows, list):
        raise BusMessageError("bad_shape", "a metrics message without a list of metrics")
    return display_rows(rows, plan_of)


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
        about = (text_or(row.get("unit"), ""), text_or(row.get("header"), tag))
        for stat, value in row.items():
            if not is_number(value):
                continue
            column = self.columns.get((tag, stat))
            if column is None and len(self.columns) < HISTORY_MAX_SERIES:
                column = self.columns[tag, stat] = array("d", [math.nan]) * len(self.times)
            if column is not None:
                column[-1], self.about[tag] = value, about

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


def _find_text(value: Any, keys: Sequence[str], depth: int) -> Optional[str]:
    """Return the first text that stands under one of the keys, however deep (but not deeper than `depth`)."""
    plain = _plain_keys(value) if isinstance(value, dict) else {}
    inner = plain.values() if plain else value if isinstance(value, list) else ()
    here = next((text for key in keys if (text := _text(plain.get(key)))), None)
    if here is not None or depth == 0:
        return here
    return next((text for item in inner if (text := _find_text(item, keys, depth - 1))), None)


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

    def __init__(self, scrub: Callable[[bytes], bytes], plan_of: PlanOf) -> None:
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
        self.metrics = Latest(lambda payload: _read_rows(scrub(payload), plan_of))  # rows by tag, in display units
        self.telemetry = Latest(lambda payload: _read_rows(scrub(payload), plan_of))  # rows by tag
        # realtime_server_metrics without its envelope
        self.server_metrics = Latest(lambda payload: _read_server_metrics(scrub(payload)))
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

    def clocks(self, now_ns: int) -> tuple[Optional[int], int]:
        """Return that moment in the benchmark's time, None while the difference is unknown, and in bus time."""
        until_ns = self.until(now_ns)
        return None if self.skew_ns is None else until_ns - self.skew_ns, until_ns

    def elapsed(self, phase: Phase, now_ns: int) -> int:
        """Return the time in ns that a phase takes by now."""
        return phase.elapsed_ns(*self.clocks(now_ns))

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

    def take_metrics(self, message_type: str, payload: bytes, now_ns: int, rows: Optional[MetricRows] = None) -> Change:
        """Keep a metrics message for those who ask; read it now when a point of its history is due.

        Raises:
            BusMessageError: it was read now, and is bad.
        """
        latest, group, change = {
            "realtime_metrics": (self.metrics, "metrics", Change.METRICS),
            "realtime_telemetry_metrics": (self.telemetry, "telemetry", Change.TELEMETRY),
            "realtime_server_metrics": (self.server_metrics, "server", Change.SERVER_METRICS),
        }[message_type]
        if latest.offer(payload, now_ns, rows) and self.history.groups[group].is_due(now_ns):
            found = latest.get()
            self.history.groups[group].sample(now_ns, _server_rows(found) if group == "server" else found)
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
        clocks = self.clocks(now_ns)
        begun = [phase.elapsed_ns(*clocks) for phase in self.phases.values() if phase.has_begun]
        if begun:
            return sum(begun) / 1e9
        return None if self.first_ns is None else max(0, clocks[1] - self.first_ns) / 1e9

    def started_ns(self) -> Optional[int]:
        starts = [phase.start_ns for phase in self.phases.values() if phase.start_ns is not None]
        return min(starts) if starts else self.first_ns


def _weights(phases: Sequence[Phase]) -> list[float]:
    """Return what part each phase is of the whole: by requests or by duration where all have a target, else alike."""
    for targets in ([phase.expected for phase in phases], [phase.duration_sec for phase in phases]):
        if all(targets):
            return [target for target in targets if target]
    return [1.0 for _ in phases]


def _display_list(rows: Any) -> Any:
    """Return a list of rows in display units, hidden ones left out; anything else as it is."""
    return display_list(rows) if isinstance(rows, list) else rows


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
    changed. Payloads must be free of credentials already: what comes in may come out. Only those of metrics messages,
    most of which nobody reads, may go through `scrub` when they are read.
    """

    def __init__(self, scrub: Callable[[bytes], bytes] = bytes) -> None:
        self._scrub = scrub  # payload -> payload without credentials
        self.row_plans = RowPlans()  # for all who show rows of metrics
        self._configs: dict[str, dict[str, Any]] = {}  # given from outside, by origin ("file", "command")
        self._run = Run(scrub, self.row_plans.of)  # the run at hand
        self._identified: tuple[list[dict[str, Any]], dict[str, Any]] = [], {}  # configurations, and what they identify
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

    def apply(self, message_type: str, payload: bytes, now_ns: int, rows: Optional[MetricRows] = None) -> Change:
        """Take one bus message.

        Args:
            message_type: from the topic, without target and `$`.
            payload: the JSON object as it came, without credentials.
            now_ns: bus clock at reception.
            rows: of a realtime_metrics message that the caller has read already; they are the state's from now on.

        Raises:
            BusMessageError: it cannot be used; the state is as before. A metrics message that arrives within 100 ms
                of the one before is judged when somebody asks for it; if it is bad, `late_errors` grows.
        """
        self._run.fell_silent = self._run.fell_silent or self._run.is_stale(now_ns)
        if message_type in METRICS_MESSAGE_TYPES:
            change = self._run.take_metrics(message_type, payload, now_ns, rows)
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
            self._run = Run(self._scrub, self.row_plans.of)
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
            "benchmark_id": run.benchmark_id or self._identity().get("benchmark_id"),
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

    def artifact_dir(self) -> str:
        """Return where AIPerf writes its export, as the bus or a configuration tells; "" if none does."""
        found = _find_text(self._known_configs(), ("artifactdir", "artifactdirectory"), depth=6)
        return found or ""

    def results(self) -> dict[str, Any]:
        """Return how the run ended, with AIPerf's results. "running" while no end is known, also before the start."""
        return {"status": self._run.end or "running", "results": self._run.results}

    def config_answer(self) -> dict[str, Any]:
        """Return the configuration of the first origin that has one; {} when none has."""
        return next(iter(self._known_configs()), {})

    def _known_configs(self) -> list[dict[str, Any]]:
        """Return all configurations, the one that counts most first."""
        phases = {"phases": dict(self._run.phase_configs)} if self._run.phase_configs else {}
        found = {**self._configs, "bus": self._run.config or self._configs.get("bus", {}), "phases": phases}
        return [found[origin] for origin in CONFIG_ORIGINS if found.get(origin)]

    def _config_value(self, key: str) -> Optional[str]:
        sections = (section for config in self._known_configs() for section in _config_sections(config))
        return next((text for section in sections if (text := _text(section.get(key)))), None)

    def _identity(self) -> dict[str, Any]:
        """Return the identity field by field, each from the first origin that tells it."""
        configs = self._known_configs()
        if configs != self._identified[0]:  # quick: mostly the very same objects
            found: dict[str, Any] = {}
            for config in reversed(configs):
                found.update(identity_of(config))
            self._identified = configs, found
        run_id = {"benchmark_id": self._run.benchmark_id} if self._run.benchmark_id else {}
        return {**self._identified[1], **run_id}

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
#
# Where bus messages come from.  A source yields batches: what one poll turn found, each message a list of frames as
# they came off the wire, normally [topic, payload].  It knows nothing of state, HTTP or clients; `deliver` never waits.

log = logging.getLogger("aiperf_api")

Batch = list[list[bytes]]
Deliver = Callable[[Batch], None]
Notify = Callable[[str], None]

BUS_FRONTEND_PORT, BUS_BACKEND_PORT = 5663, 5664  # AIPerf's event bus proxy: publishers, subscribers
BUS_IPC_NAME = "event_bus_proxy_backend.ipc"


class Source:
    """One place where bus messages come from; the base is the source of a server that only `publish()` feeds."""

    def __init__(self, kind: str = "none", address: str = "") -> None:
        self.kind = kind  # tcp | ipc | zmq | bind | replay | demo | child | none
        self.address = address  # endpoint or file
        self.backend = ""  # pyzmq | builtin | "" where no ZMQ is involved
        self.connected = True  # whether there is a bus at the other end now
        self.is_held: Callable[[], bool] = lambda: False  # whether a bus is to keep its messages for a moment

    def start(self, deliver: Deliver, notify: Notify) -> None:
        """Begin to deliver, within the running event loop; `notify` takes a line that is worth a place in the log."""

    def subscribe(self, prefix: bytes) -> None:
        """Ask the bus for topics that begin with these bytes."""

    def unsubscribe(self, prefix: bytes) -> None:
        """Stop asking for topics that begin with these bytes."""

    async def stop(self) -> None:
        """Free sockets, files and timers; nothing is delivered afterwards."""

    def now_ns(self) -> int:
        """The clock of the bus, ns since the epoch: the present, or for a replay the time it has come to."""
        return time.time_ns()


def backend_address(host: str) -> str:
    """The subscriber endpoint of AIPerf's event bus on a host."""
    return f"tcp://[{host}]:{BUS_BACKEND_PORT}" if ":" in host else f"tcp://{host}:{BUS_BACKEND_PORT}"


def ipc_address(folder: str) -> str:
    """The subscriber endpoint of AIPerf's event bus in an IPC directory."""
    return "ipc://" + os.path.join(folder, BUS_IPC_NAME)


# -- The bus through pyzmq ---------------------------------------------------------------------------------------------


class PyzmqBusSource(Source):
    """A SUB socket, polled through its file descriptor by the event loop.

    The descriptor is edge-triggered: it says that something changed, once.  So every turn drains the socket until it
    says "again", and a turn that stops at its budget schedules the next one itself.
    """

    def __init__(self, address: str, kind: str, *, bind: bool = False) -> None:
        super().__init__(kind, address)
        self.backend = "pyzmq"  # what speaks ZMQ
        self.connected = False  # a handshake with a peer is done
        self._bind = bind  # publishers connect to us
        self._peers = 0  # connections whose handshake is done
        self._scheduled = False  # a further drain is on the loop already
        self._prefixes: set[bytes] = set()  # of topics that are asked for
        self._context: Any = None  # zmq.Context; None before start
        self._socket: Any = None  # zmq SUB; None before start and after stop
        self._monitor: Any = None  # zmq PAIR that tells of connections

    def start(self, deliver: Deliver, notify: Notify) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver, self._notify = deliver, notify
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.SUB)
        self._configure()
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )
        try:
            (self._socket.bind if self._bind else self._socket.connect)(self.address)
        except zmq.ZMQError as error:
            self._close()
            raise StartError(f"cannot {'bind' if self._bind else 'connect to'} {self.address}: {error}") from None
        if self._bind:
            self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        for prefix in self._prefixes:
            self._socket.setsockopt(zmq.SUBSCRIBE, prefix)
        self._watch(self._socket, self._drain)
        self._watch(self._monitor, self._drain_monitor)

    def _configure(self) -> None:
        options = {
            zmq.LINGER: 0,
            zmq.IPV6: 1,
            zmq.MAXMSGSIZE: BUS_FRAME_MAX,
            zmq.RCVHWM: BUS_QUEUE_MESSAGES_MAX,  # before connecting: it has no effect afterwards
            zmq.CONNECT_TIMEOUT: round(BUS_CONNECT_SEC * 1000),  # the kernel's own attempts come 64 s apart in the end
            zmq.RECONNECT_IVL: round(BUS_RETRY_MIN_SEC * 1000),
            zmq.RECONNECT_IVL_MAX: round(BUS_RETRY_MAX_SEC * 1000),
            zmq.HEARTBEAT_IVL: BUS_HEARTBEAT_INTERVAL_MS,  # so that a host that vanished is noticed
            zmq.HEARTBEAT_TIMEOUT: BUS_HEARTBEAT_TIMEOUT_MS,
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)

    def _watch(self, socket: Any, drain: Callable[[], None]) -> None:
        try:
            self._loop.add_reader(socket.getsockopt(zmq.FD), drain)
        except NotImplementedError:  # Windows' proactor loop cannot watch a descriptor
            self._poll(drain)
        self._loop.call_soon(drain)  # what came before we watched

    def _poll(self, drain: Callable[[], None]) -> None:
        if self._socket is not None:
            drain()
            self._loop.call_later(BUS_POLL_INTERVAL_SEC, self._poll, drain)

    def subscribe(self, prefix: bytes) -> None:
        self._prefixes.add(prefix)
        self._set(zmq.SUBSCRIBE, prefix)

    def unsubscribe(self, prefix: bytes) -> None:
        self._prefixes.discard(prefix)
        self._set(zmq.UNSUBSCRIBE, prefix)

    def _set(self, option: int, prefix: bytes) -> None:
        if self._socket is not None:
            self._socket.setsockopt(option, prefix)
            self._again()  # setting an option may have eaten the descriptor's edge

    def _again(self, delay_sec: float = 0.0) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_later(delay_sec, self._drain_again)

    def _drain_again(self) -> None:
        self._scheduled = False
        self._drain()

    def _drain(self) -> None:
        """One turn: everything that is there, up to the budget, delivered at once."""
        if self._socket is None:
            return
        if self.is_held():
            self._socket.getsockopt(zmq.EVENTS)  # quietens the descriptor
            self._again(BUS_HOLD_SEC)
            return
        receive, getsockopt = self._socket.recv, self._socket.getsockopt
        events, readable, more, no_block = zmq.EVENTS, zmq.POLLIN, zmq.RCVMORE, zmq.NOBLOCK
        batch: Batch = []
        size = 0
        while getsockopt(events) & readable:  # cheaper than to be told zmq.Again; 0 rearms the descriptor
            frames = [receive(no_block)]
            while getsockopt(more):
                frames.append(receive(no_block))  # the frames of one message arrive together
            batch.append(frames)
            size += len(frames[-1])
            if len(batch) >= BUS_TURN_MESSAGES_MAX or size >= BUS_TURN_BYTES_MAX:
                self._again()
                break
        if batch:
            self._deliver(batch)

    def _drain_monitor(self) -> None:
        while self._monitor is not None:
            try:
                event = struct.unpack_from("=HI", self._monitor.recv_multipart(zmq.NOBLOCK)[0])[0]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._peers += 1
            elif event == zmq.EVENT_DISCONNECTED:
                self._peers = max(0, self._peers - 1)
            else:
                self._notify(f"the peer at {self.address} does not speak ZMTP")
            if self.connected != (self._peers > 0):
                self.connected = self._peers > 0
                self._notify(f"{'connected to' if self.connected else 'lost'} the bus at {self.address}")

    async def stop(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._socket is None:
            return
        for watched in (self._socket, self._monitor):
            with contextlib.suppress(NotImplementedError):  # then it was polled
                self._loop.remove_reader(watched.getsockopt(zmq.FD))
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._socket = self._monitor = None
        self._context.term()


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
        self._ttl_sec = 0.0  # seconds that the PING at hand allows; 0: it says none

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
        if path[0] != "\0" and os.path.exists(path) and S_ISSOCK(os.stat(path).st_mode):
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
        self._source = source  # takes what arrives
        self._loop = asyncio.get_running_loop()  # carries the timers
        self.codec = ZMTPSubscriber()  # the bytes of this connection, understood
        self.gone: asyncio.Future[None] = self._loop.create_future()  # done when the connection is over
        self._transport: Any = None  # None until connected
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
            if len(messages) <= BUS_BATCH_MAX and not self._backlog and not self._source.is_held():
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
        if self._source.is_held():
            self._loop.call_later(BUS_HOLD_SEC, self._work_off)
            return
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

    def __init__(self, address: str, kind: str = "zmq", *, bind: bool = False) -> None:
        # source
        super().__init__(kind, address)
        self.backend = "builtin"  # what speaks ZMQ
        self.connected = False  # no handshake is done yet
        self._endpoint = parse_endpoint(address, bind=bind)  # what the address says
        self._bind = bind  # whether publishers connect to us
        # prefix -> how often subscribed, as a SUB socket counts
        self._subscriptions: collections.Counter[bytes] = collections.Counter()
        self.prefixes: tuple[bytes, ...] = ()  # those subscribed at all: told to every peer, and filtered by
        # run
        self._deliver: Callable[[Batch], None] = lambda batch: None  # where messages go
        self._notify: Callable[[str], None] = lambda line: None  # where lines for the log go
        self._task: asyncio.Task[None] | None = None  # connects again and again
        self._listener: socket.socket | None = None  # when bound
        self._server: asyncio.AbstractServer | None = None  # accepts from the listener
        self._file: tuple[str, int] | None = None  # path and inode of the socket that we bound
        self._stopped = False  # whether stop() was called
        # connections
        self._peers: set[_BusPeer] = set()
        self._ready: set[_BusPeer] = set()  # those whose handshake is over
        self._retry_sec = BUS_RETRY_MIN_SEC  # until the next attempt
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


def bus_source(address: str, kind: str, *, bind: bool = False, backend: str = "auto") -> Source:
    """The source for a ZMQ endpoint.

    Args:
        address: tcp://HOST:PORT or ipc://PATH.
        kind: how the user named it: tcp, ipc, zmq, bind or child.
        bind: whether publishers connect to us, instead of us to the bus.
        backend: auto, pyzmq or builtin.
    """
    parse_endpoint(address, bind=bind)  # says now what is wrong with it, whichever backend it is for
    if backend == "pyzmq" and zmq is None:
        raise UsageError("--zmq-backend pyzmq: pyzmq is not installed (builtin needs nothing)")
    if zmq is not None and backend != "builtin":
        return PyzmqBusSource(address, kind, bind=bind)
    return BuiltinBusSource(address, kind, bind=bind)


# -- Recordings --------------------------------------------------------------------------------------------------------
#
# One JSON object a line: {"t": ns of the epoch, "topic": "realtime_metrics$", "payload": "{...}"}; gzip by extension.


def open_recording(path: str) -> IO[bytes]:
    """A recording, for reading.

    Raises:
        UsageError: it is not there, or it is not readable.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise UsageError(f"{printable(path)}: {error.strerror}") from None
    return _unzipped(file) if path.endswith(".gz") else file


def _unzipped(file: IO[bytes]) -> IO[bytes]:
    import gzip  # only recordings need it

    return cast(IO[bytes], gzip.GzipFile(fileobj=file, mode="rb"))


class ReplaySource(Source):
    """Plays a recording at its own pace, `speed` times as fast, or (speed 0) at once; once or in a loop.

    The clock of the bus is the recording's: it stands at the last message's time and runs on from there.
    """

    def __init__(
        self, path: str, kind: str = "replay", *, speed: float = 1.0, loop: bool = False, data: bytes | None = None
    ) -> None:
        super().__init__(kind, path)
        # Opens the recording from its first line.
        self._open: Callable[[], IO[bytes]] = lambda: open_recording(path)
        if data is not None:
            self._open = lambda: _unzipped(io.BytesIO(data))
        self._speed = speed  # bus seconds a second; 0: at once
        self._repeat = loop  # begin again at the end
        self._timer: asyncio.Handle | None = None  # the next turn
        self._bus_ns = 0  # bus time ...
        self._at_ns = 0  # ... and the monotonic time at which it was that late
        self._rate = speed  # bus seconds a second: how fast the clock runs on
        self._message_ns = 0  # bus time of the message that is being delivered, 0 between messages
        self._file: IO[bytes] | None = None  # open while it plays

    def now_ns(self) -> int:
        if self._message_ns:
            return self._message_ns
        if not self._bus_ns:
            return time.time_ns()
        return self._bus_ns + int((time.monotonic_ns() - self._at_ns) * self._rate)

    def _set_clock(self, bus_ns: int, rate: float) -> None:
        self._bus_ns, self._at_ns, self._rate = bus_ns, time.monotonic_ns(), rate

    def start(self, deliver: Deliver, notify: Notify) -> None:
        self._deliver, self._notify = deliver, notify
        self._event_loop = asyncio.get_running_loop()
        self._begin()

    def _begin(self) -> None:
        self._file = self._open()
        self._lines = self._read(self._file)
        self._next = next(self._lines, None)
        if self._next is not None:
            self._set_clock(self._next[0], self._speed)
        self._timer = self._event_loop.call_soon(self._turn)

    def _begin_again(self) -> None:
        try:
            self._begin()
        except UsageError as error:  # the file has gone meanwhile
            self.connected = False
            self._notify(f"the replay has ended: {error}")

    def _read(self, file: IO[bytes]) -> Iterator[tuple[int, list[bytes]]]:
        """(time in ns, frames) of each line; a line that is none ends the recording with a word in the log."""
        number = 1
        try:
            for line in file:
                record = json_load(line)
                yield int(record["t"]), [record["topic"].encode(), record["payload"].encode()]
                number += 1
        except (JSONError, LookupError, TypeError, ValueError, AttributeError, OSError, EOFError, zlib.error) as error:
            self._notify(f"{self.address}: line {number} cannot be read, the replay ends there: {error}")

    def _turn(self) -> None:
        """Deliver all that is due, each message at its own time, then sleep until the next one is."""
        turn = 0
        while self._next is not None and turn < BUS_TURN_MESSAGES_MAX:
            due_ns, frames = self._next
            if self._speed and due_ns > self.now_ns():
                break
            if not self._speed:
                self._set_clock(due_ns, 0.0)
            self._message_ns = due_ns
            self._deliver([frames])
            self._message_ns = 0
            self._next = next(self._lines, None)
            turn += 1
        if self._next is None:
            self._set_clock(self.now_ns(), 1.0)  # from here on time passes as it does
        self._schedule()

    def _schedule(self) -> None:
        if self._next is None:
            self._end()
            return
        wait_sec = (self._next[0] - self.now_ns()) / 1e9 / self._speed if self._speed else 0.0
        self._timer = self._event_loop.call_later(max(0.0, wait_sec), self._turn)

    def _end(self) -> None:
        self._close()
        if self._repeat:
            self._timer = self._event_loop.call_later(REPLAY_PAUSE_SEC, self._begin_again)
        else:
            self.connected = False
            self._notify(f"the replay of {self.address} has ended")

    async def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Recorder:
    """Writes bus messages to a recording, as they come; the lines reach the disk once a second and at the end."""

    def __init__(self, path: str) -> None:
        self.path = path  # where it goes
        self.messages = 0  # written so far
        try:
            self._raw = open(path, "wb")  # noqa: SIM115 - close() closes it
        except OSError as error:
            raise UsageError(f"--record {printable(path)}: {error.strerror}") from None
        # what lines are written to: the file, or gzip over it
        self._file: IO[bytes] = self._zipped(self._raw) if path.endswith(".gz") else self._raw

    @staticmethod
    def _zipped(raw: IO[bytes]) -> IO[bytes]:
        import gzip

        return gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6, mtime=0, filename="")  # type: ignore[return-value]

    def write(self, t_ns: int, topic: str, payload: bytes) -> None:
        """One message. Raises OSError when the disk refuses, and UnicodeDecodeError for what is no text."""
        line = json_bytes({"t": t_ns, "topic": topic, "payload": payload.decode("utf-8")})
        self._file.write(line + b"\n")
        self.messages += 1

    def flush(self) -> None:
        self._file.flush()
        self._raw.flush()

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            self._raw.close()


def resident_bytes() -> int | None:
    """Resident memory of this process; None where /proc does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


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
_AIPERF_EVENT_BUS_PORT_VARIABLE = "AIPERF_ZMQ_EVENT_BUS_PROXY_BACKEND_PORT"  # moves it, since 0.13
_AIPERF_IPC_PATH = "/tmp/aiperf"  # where a configuration file puts the sockets if it says `type: ipc` and no path
_AIPERF_EXPORT = "profile_export_aiperf.json"
_ARTIFACT_BYTES_MAX = 16 * 1024 * 1024  # an export file larger than this is not read for its configuration
_CHILD_CONFIG_BYTES_MAX = 1024 * 1024  # a configuration file larger than this is not searched for its bus
_SHEBANG_BYTES_MAX = 512  # of the first line of a script; Linux itself reads 256
_COMMAND_NOT_FOUND, _COMMAND_NOT_EXECUTABLE = 127, 126  # POSIX.1-2017 XCU 2.8.2
_SIGNALS_BEFORE_KILL = 2  # signals that the child may answer in its own way; the next one is SIGKILL
_LIVE_METRICS = (  # both since AIPerf 0.5; without them a run without dashboard publishes no live metrics
    ("AIPERF_UI_REALTIME_METRICS_ENABLED", "true"),
    ("AIPERF_UI_REALTIME_METRICS_INTERVAL", "1"),  # s, the least that 0.5 and 0.6 accept
)
# Ours by contract, read by AIPerf too: left in the child's environment, its own API would want our port.
_OUR_VARIABLES = (
    "AIPERF_API_SERVER_HOST",
    "AIPERF_API_SERVER_PORT",
    "AIPERF_API_SERVER_CORS_ORIGINS",
    "AIPERF_API_TOKEN",
)
# Programs that run the rest of their command line in this environment and on this machine.
_WRAPPERS = frozenset(
    (
        "chrt",
        "conda",
        "env",
        "hatch",
        "ionice",
        "nice",
        "nohup",
        "numactl",
        "pdm",
        "pipenv",
        "pixi",
        "poetry",
        "prlimit",
        "rye",
        "setarch",
        "setpriv",
        "stdbuf",
        "strace",
        "taskset",
        "time",
        "timeout",
        "unbuffer",
        "uv",
        "uvx",
        "xvfb-run",
    )
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
_AIPERF_FLAGS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        flag: (path, kind)
        for path, kind, *flags in map(str.split, _AIPERF_FLAGS_TABLE.splitlines()[1:])
        for flag in flags
    }
)


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
        {**dict(_LIVE_METRICS), **inherited},
        address or ("" if note else ipc_address(ipc_dir)),
        False,
        True,
        str(flags.get("output.artifact_directory", "")),
        tuple(notes),
    )


def _find_profile(argv: Sequence[str]) -> int | None:
    """Where the flags of an `aiperf profile` begin in a command line, behind wrappers; None if it is none."""
    for index, (word, after) in enumerate(zip(argv, argv[1:])):
        if os.path.basename(word) in ("aiperf", "aiperf.exe") and after == "profile":
            return index + 2 if _hands_over(argv[:index]) else None
    return None


def aiperf_word(argv: Sequence[str]) -> str:
    """The word of an `aiperf profile` that names its program; "" if it is none."""
    start = _find_profile(argv)
    return "" if start is None else argv[start - 2]


def _hands_over(words: Sequence[str]) -> bool:
    """Whether these words before a command only wrap it: nothing, `python -m`, `python`, or a known wrapper."""
    if not words:
        return True
    name = os.path.basename(words[0])
    if _PYTHON_NAME.fullmatch(name):
        return words[-1] == "-m" or all(word.startswith("-") for word in words[1:])  # else it is a script's argument
    return name in _WRAPPERS


def _publishes_no_live_metrics(version: str, flags: Mapping[str, JSONValue]) -> bool:
    return version.startswith(("0.3.", "0.4.")) and flags.get("service.ui_type", "dashboard") != "dashboard"


def _tcp_address(host: str, port: JSONValue) -> str:
    # A host to bind is not always a host to connect to.
    return f"tcp://{'127.0.0.1' if host in ('0.0.0.0', '*') else host}:{port}"


def _chosen_bus(
    flags: Mapping[str, JSONValue], environ: Mapping[str, str], read: Callable[[str], str]
) -> tuple[str, str]:
    """(address, note) of the bus that a command line chooses; ("", "") if it chooses none.

    A note without an address: there is a choice, but it cannot be told from here.
    """
    port = environ.get(_AIPERF_EVENT_BUS_PORT_VARIABLE) or str(BUS_BACKEND_PORT)
    # In AIPerf's own order of precedence.
    if "service.zmq_ipc_path" in flags:
        return ipc_address(str(flags["service.zmq_ipc_path"])), ""
    if "service.zmq_host" in flags:
        return _tcp_address(str(flags["service.zmq_host"]), port), ""
    if flags.get("service.zmq_dual_bind"):
        return ipc_address(_AIPERF_IPC_PATH), ""
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
        return ipc_address(values.get("path", _AIPERF_IPC_PATH))
    return ipc_address(values.get("ipc_path", _AIPERF_IPC_PATH)) if kind == "dual" else ""


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
            first = file.readline(_SHEBANG_BYTES_MAX).decode().strip()
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
    if expected == "header" and not word.startswith(("-", "http://", "https://")):
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
        return json.dumps(dict.fromkeys(headers, REDACTED))
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
            return cast(dict[str, JSONValue], export["input_config"])
    return {}


# The process.


def make_ipc_directory() -> str:
    """A new directory that only this user can enter (mode 0700), with a path short enough for a Unix socket."""
    directory = tempfile.mkdtemp(prefix="aiperf-api-")
    if len(os.fsencode(os.path.join(directory, BUS_IPC_NAME))) <= BUS_IPC_PATH_MAX:
        return directory
    os.rmdir(directory)
    return tempfile.mkdtemp(prefix="aiperf-api-", dir="/tmp")


@contextlib.contextmanager
def ipc_directory() -> Iterator[str]:
    """A directory for a child's sockets, for as long as the context lasts."""
    directory = make_ipc_directory()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check_command(argv: Sequence[str], environ: Mapping[str, str]) -> None:
    """Find out before anything is started whether a command can be; raises CommandError if it is not found (127)."""
    command = argv[0]
    is_path = os.sep in command
    if shutil.which(command, path=environ.get("PATH")) is None and not (is_path and os.path.exists(command)):
        raise CommandError(_COMMAND_NOT_FOUND, f"{command}: {'no such file' if is_path else 'command not found'}")


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
        self.argv = tuple(argv)  # the command line
        self.environment = dict(environ)  # all of its variables
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
            self._process = await asyncio.create_subprocess_exec(*self.argv, env=self.environment)
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
        with contextlib.suppress(ProcessLookupError):  # it ended a moment ago
            self._process.send_signal(number)

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


def title_secrets(argv: Sequence[str]) -> list[str]:
    """What has to be hidden of a command line that is shown as it is: its secrets, else the words that hold them."""
    found: set[str] = set()
    shown = redact_command(argv, found)
    words = {word for word, clean in zip(argv, shown) if word != clean and not any(one in word for one in found)}
    return sorted(found | words)


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
#
# Who listens to what, and what becomes of a client that does not keep up.  A broadcast never waits: a batch of messages
# is encoded once for all clients that take the same ones in the same form, and goes out in one write per client.
#
# The slow.  While a client's transport is full, the writes that are due to it queue here, by reference: the bytes are
# shared with every other client.  One that is behind by more than the soft mark, in bytes or in seconds, gets of each
# state message (the latest replaces the one before) only the newest, and of the events as many as fit; it is told what
# it missed.  Above the hard mark, or when nothing has moved for a while, it is cut off with abort(), for close() would
# keep the bytes.


class Message(NamedTuple):
    """A bus message on its way to the clients."""

    number: int  # counts all messages of this server, from 1
    type: str  # message type
    payload: bytes  # one JSON text, one line
    replaceable: bool  # a state message: the next of its type replaces it


class Encoded(NamedTuple):
    """A message in the form in which a kind of client takes it."""

    type: str  # message type; "" for an answer to one client
    data: bytes  # a whole frame, event or line
    replaceable: bool  # a state message: the next of its type replaces it
    taken_sec: float  # monotonic: when the hub took it


class Chunk:
    """Messages joined into one write, once for all clients that take them; for a slow one they come apart again."""

    __slots__ = ("_heads", "_messages", "count", "data", "taken_sec")

    def __init__(self, messages: Sequence[Encoded]) -> None:
        self.data = b"".join([message.data for message in messages])  # only this is kept: the pieces would be as much
        self.count = sum([message.type != "" for message in messages])  # bus messages; an answer is none
        self.taken_sec = messages[-1].taken_sec  # monotonic: when the hub took them
        self._heads = [(message.type, len(message.data), message.replaceable) for message in messages]  # to cut it up
        self._messages: list[Encoded] = []  # the pieces, once somebody has asked for them

    def messages(self) -> list[Encoded]:
        """The messages by themselves; their bytes are cut out once for all clients that ask."""
        if not self._messages:
            start = 0
            for message_type, size, replaceable in self._heads:
                data = self.data[start : start + size]
                self._messages.append(Encoded(message_type, data, replaceable, self.taken_sec))
                start += size
        return self._messages


Encoder = Callable[[Message], bytes]


class Transport(Protocol):
    """What the hub needs of an asyncio transport."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def is_closing(self) -> bool: ...
    def get_write_buffer_size(self) -> int: ...


class Outlet:
    """The way out to one client.  It counts, because the size of a transport's buffer does not tell a slow client from
    one that takes nothing: it stands still or grows, too, while as much or more comes in than goes out."""

    __slots__ = ("_left", "closed", "moved_sec", "transport", "written")

    def __init__(self, transport: Transport, now_sec: float) -> None:
        self.transport = transport  # asyncio's
        self.closed = False  # our side has ended: nothing more is written
        self.written = 0  # bytes, ever
        self._left = 0  # bytes that had left the transport at the last look
        self.moved_sec = now_sec  # monotonic: the last look at which some had left, or none waited

    @property
    def waiting(self) -> int:
        """Bytes in the transport."""
        return self.transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        """Hand bytes to the transport, unless our side has ended: asyncio raises after write_eof(), and logs a line
        for each write after the peer's reset."""
        if not self.closed and not self.transport.is_closing():
            self.written += len(data)
            self.transport.write(data)

    def abort(self) -> None:
        """End at once and free all that waits; close() would wait for the peer to take it."""
        self.closed = True
        self.transport.abort()

    def has_stalled(self, now_sec: float) -> bool:
        """Whether bytes wait and none has moved for too long; to be asked about once a second."""
        waiting = self.waiting
        left = self.written - waiting
        # Over TLS `waiting` may hold more than was written, by the overhead of a record: only growth is movement.
        if left > self._left or not waiting:
            self.moved_sec = now_sec
        self._left = left
        return now_sec - self.moved_sec > CLIENT_STALL_SEC


class Subscriber:
    """One client that listens: a WebSocket or a stream."""

    def __init__(self, outlet: Outlet, kind: str, address: str, encode: Encoder, connected_ns: int = 0) -> None:
        # The connection's, for as long as it lasts.
        self.outlet = outlet  # the way to it
        self.kind = kind  # websocket | sse | ndjson
        self.address = address  # of the peer, as text
        self.encode = encode  # makes of a message what this kind of client takes
        self.connected_ns = connected_ns  # when it came, ns since the epoch
        self.asked: set[str] = set()  # message types as it named them, "*" among them
        self.types: frozenset[str] | None = frozenset()  # what it takes; None: everything
        self.paused = False  # the transport is full: messages queue here
        self.held = 0  # bytes in the transport when it became full
        self.gone = False  # cut off or leaving: it takes nothing more
        self.fault = ""  # why it was cut off; "" if it was not
        # Counters for /api/clients.
        self.sent = 0  # messages written
        self.skipped = 0  # messages left out, ever
        # What waits, oldest first: whole writes, or, from the moment it is slow until it has caught up, messages.
        self.backlog: collections.deque[Chunk] = collections.deque()
        self.thinned: dict[int, Encoded] = {}  # by a number that grows
        self.queued = 0  # the last such number
        self.newest: dict[str, int] = {}  # state type -> number of its newest in `thinned`
        self.backlog_bytes = 0  # of all that waits here; 0 only when nothing does
        self.took_sec = 0.0  # monotonic: when the transport last had room again
        self.reached_sec = 0.0  # monotonic: when the hub took what was last written out of it, or first put into it
        self.slow = False  # it has been behind by more than the soft mark, and has not caught up since
        self.missed: dict[str, int] = {}  # type -> left out since the last notice

    @property
    def outstanding(self) -> int:
        """Bytes that wait for this client, here and in the transport."""
        return self.backlog_bytes + self.outlet.waiting

    @property
    def events(self) -> int:
        """Messages in `thinned` that nothing replaces; of the others it has the newest of each type."""
        return len(self.thinned) - len(self.newest)

    def pause(self) -> None:
        """The transport is full."""
        self.paused = True
        self.held = self.outlet.waiting

    def send(self, chunks: Sequence[Chunk], now_sec: float) -> None:
        """Take a batch: written while the transport has room, queued from the first chunk on that finds it full."""
        for chunk in chunks:
            if self.gone:
                return
            if self.paused or self.backlog_bytes:
                self._queue(chunk, now_sec)
            else:
                self.outlet.write(chunk.data)
                self.sent += chunk.count

    def reply(self, data: bytes, now_sec: float) -> None:
        """Take an answer to this client alone, behind what waits for it; it is never left out."""
        if self.gone:
            return
        if not self.paused and not self.backlog_bytes:
            self.outlet.write(data)
            return
        answer = Encoded("", data, False, now_sec)
        if self.slow:
            self._keep(answer)
        else:
            self._append(Chunk([answer]))

    def is_slow(self, now_sec: float) -> bool:
        """Whether it is behind by more than the soft mark allows; then it stays slow until it has caught up."""
        behind_sec = now_sec - self.reached_sec if self.backlog_bytes else 0.0
        if not self.slow and (self.backlog_bytes > CLIENT_SOFT_MARK_BYTES or behind_sec > CLIENT_SOFT_MARK_SEC):
            self.slow = True
            self._take_apart()
        return self.slow

    def _take_apart(self) -> None:
        chunks, self.backlog, self.backlog_bytes = self.backlog, collections.deque(), 0
        reached_sec = self.reached_sec
        for chunk in chunks:
            for message in chunk.messages():
                self._replace(message)
                self._keep(message)
        self.reached_sec = reached_sec

    def _queue(self, chunk: Chunk, now_sec: float) -> None:
        is_slow = self.is_slow(now_sec)
        if self.gone:  # cut off just now
            return
        if not is_slow:
            self._append(chunk)
            return
        for message in chunk.messages():
            self._replace(message)
            if message.replaceable or self._has_room_for_event(message):
                self._keep(message)
            else:
                self._miss(message.type)

    def _replace(self, message: Encoded) -> None:
        """Leave out the state message that this one makes old."""
        number = self.newest.pop(message.type, None) if message.replaceable else None
        if number is not None:
            self.backlog_bytes -= len(self.thinned.pop(number).data)
            self._miss(message.type)

    def _has_room_for_event(self, message: Encoded) -> bool:
        return (
            self.events < CLIENT_QUEUE_EVENTS_MAX and self.backlog_bytes + len(message.data) <= CLIENT_QUEUE_BYTES_MAX
        )

    def _append(self, chunk: Chunk) -> None:
        self.backlog.append(chunk)
        self._grow(len(chunk.data), chunk.taken_sec)

    def _keep(self, message: Encoded) -> None:
        if self.gone:
            return
        self.queued += 1
        self.thinned[self.queued] = message
        if message.replaceable:
            self.newest[message.type] = self.queued
        self._grow(len(message.data), message.taken_sec)

    def _grow(self, size: int, taken_sec: float) -> None:
        if not self.backlog_bytes:
            self.reached_sec = taken_sec
        self.backlog_bytes += size
        # `held` instead of a look into the transport, which newer Pythons sum up over all its pieces.
        if self.backlog_bytes + self.held > CLIENT_HARD_MARK_BYTES:
            self.cut_off(f"{self.outstanding} bytes waited for it")

    def _miss(self, message_type: str) -> None:
        self.missed[message_type] = self.missed.get(message_type, 0) + 1
        self.skipped += 1

    def flush(self) -> None:
        """The transport has room again: say what was left out, then send what waits, oldest first."""
        self.paused = False
        self.took_sec = time.monotonic()
        if self.missed and not self.gone:
            notice = json_bytes({"type": "skipped", "counts": self.missed})
            self.missed = {}
            self.outlet.write(self.encode(Message(0, "skipped", notice, False)))
        while (self.backlog or self.thinned) and not self.paused and not self.gone:
            data = self._take_chunks() if self.backlog else self._take_messages()
            self.backlog_bytes -= len(data)
            self.outlet.write(data)
        if not self.backlog_bytes:
            self._forget_backlog()

    def _take_chunks(self) -> bytes:
        """The oldest writes, as many as make one."""
        taken = [self.backlog.popleft()]
        size = len(taken[0].data)
        while self.backlog and size + len(self.backlog[0].data) <= CLIENT_WRITE_BYTES_MAX:
            taken.append(self.backlog.popleft())
            size += len(taken[-1].data)
        self.sent += sum([chunk.count for chunk in taken])
        self.reached_sec = taken[-1].taken_sec
        return b"".join([chunk.data for chunk in taken])  # of a single one no copy

    def _take_messages(self) -> bytes:
        """The oldest of what is left of the messages, as many as make one write."""
        parts: list[bytes] = []
        size = 0
        for number in list(itertools.islice(self.thinned, CLIENT_WRITE_MESSAGES_MAX)):
            message = self.thinned[number]
            if parts and size + len(message.data) > CLIENT_WRITE_BYTES_MAX:
                break
            del self.thinned[number]
            if message.replaceable:
                del self.newest[message.type]
            self.sent += bool(message.type)  # an answer is no bus message
            self.reached_sec = message.taken_sec
            parts.append(message.data)
            size += len(message.data)
        return b"".join(parts)

    def _forget_backlog(self) -> None:
        self.backlog.clear()
        self.thinned.clear()
        self.newest.clear()
        self.backlog_bytes = 0
        self.slow = False

    def leave(self) -> None:
        """Take nothing more: what waits here is dropped, what is in the transport still goes out."""
        self.gone = True
        self._forget_backlog()

    def cut_off(self, fault: str) -> None:
        """End the connection at once, because it does not keep up; `fault` is for the log."""
        self.fault = self.fault or fault
        self.leave()
        self.outlet.abort()


class Patience:
    """The time that the bus waits for a few clients: CLIENT_HOLD_FEW_SEC in each CLIENT_HOLD_FEW_EVERY_SEC."""

    def __init__(self) -> None:
        self._since_sec = 0.0  # monotonic: when it was whole the last time
        self._used_sec = 0.0  # of it, since then
        self._asked_sec = 0.0  # monotonic: the last look that found it wanted; 0 when the last one did not

    def lasts(self, now_sec: float) -> bool:
        """Whether there is some left, now that somebody wants it; to be asked again and again as long as that is so."""
        if now_sec - self._since_sec > CLIENT_HOLD_FEW_EVERY_SEC:
            self._since_sec, self._used_sec, self._asked_sec = now_sec, 0.0, 0.0
        if self._asked_sec:
            self._used_sec += max(0.0, now_sec - self._asked_sec - BUS_HOLD_SEC)
        self._used_sec += BUS_HOLD_SEC  # until the next look: also when nobody wants it any more by then
        self._asked_sec = now_sec
        return self._used_sec < CLIENT_HOLD_FEW_SEC

    def rest(self) -> None:
        """Nobody wants it now."""
        self._asked_sec = 0.0


class Hub:
    """All subscribers, what they take, the last message of each type, and a short memory for streams that resume."""

    def __init__(self, on_wanted: Callable[[str, bool], None]) -> None:
        """`on_wanted(type, wanted)` hears of the first client that takes a type (`*`: everything) and of the last."""
        self._on_wanted = on_wanted  # hears of the first client of a type, and of the last
        self.subscribers: dict[int, Subscriber] = {}  # by a number of their own, in the order they came
        # clients that take the same messages in the same form
        self._groups: dict[tuple[Encoder, frozenset[str] | None], dict[int, Subscriber]] = {}
        self._wanted: dict[str, int] = {}  # type -> clients that take it; "*" -> that take everything
        self._numbers = itertools.count(1)  # names clients
        self._messages = itertools.count(1)  # names messages
        self.last_number = 0  # of the newest message
        self.retained: dict[str, Message] = {}  # the last message of each type of this run
        self._retained_bytes = 0  # of their payloads
        self.recent: collections.deque[Message] = collections.deque()  # for resuming streams, oldest first
        self._recent_bytes = 0  # of their payloads
        self.remember = False  # whether `recent` is kept: from the first stream on
        self.sent_total = 0  # by clients that have left
        self.skipped_total = 0  # by clients that have left
        self._held_since_sec = 0.0  # monotonic: since when the bus waits for many without a break; 0 when it does not
        self._patience = Patience()  # with a few
        self.cut_off_total = 0  # clients that did not keep up
        self.changes = 0  # grows whenever a client comes, goes, subscribes or misses something

    # -- Clients --

    def add(self, subscriber: Subscriber) -> int:
        """Take in a client that listens to nothing yet; its number is for the other methods."""
        number = next(self._numbers)
        self.subscribers[number] = subscriber
        self.changes += 1
        return number

    def remove(self, number: int) -> None:
        """Forget a client; whoever was cut off or has left is removed once."""
        subscriber = self.subscribers.pop(number, None)
        if subscriber is None:
            return
        self._leave(number, subscriber)
        subscriber.gone = True
        self.sent_total += subscriber.sent
        self.skipped_total += subscriber.skipped
        self.changes += 1

    def subscribe(self, number: int, types: frozenset[str] | None) -> None:
        """Set what a client takes from now on; None is everything."""
        subscriber = self.subscribers[number]
        before = subscriber.types
        self._join(number, subscriber, types)  # first in, then out: a type in both is never dropped by the bus
        self._count(before, -1)
        self.changes += 1

    def _join(self, number: int, subscriber: Subscriber, types: frozenset[str] | None) -> None:
        self._ungroup(number, subscriber)
        subscriber.types = types
        if types is None or types:
            self._groups.setdefault((subscriber.encode, types), {})[number] = subscriber
        self._count(types, +1)

    def _leave(self, number: int, subscriber: Subscriber) -> None:
        self._ungroup(number, subscriber)
        self._count(subscriber.types, -1)
        subscriber.types = frozenset()

    def _ungroup(self, number: int, subscriber: Subscriber) -> None:
        key = (subscriber.encode, subscriber.types)
        group = self._groups.get(key)
        if group is not None:
            group.pop(number, None)
            if not group:
                del self._groups[key]

    def _count(self, types: frozenset[str] | None, step: int) -> None:
        for message_type in ("*",) if types is None else types:
            count = self._wanted.get(message_type, 0) + step
            if count > 0:
                self._wanted[message_type] = count
            else:
                self._wanted.pop(message_type, None)
            if count == 0 or (count == 1 and step == 1):
                self._on_wanted(message_type, count > 0)

    def is_congested(self) -> bool:
        """Whether the bus is to keep a burst for a moment, because clients are behind although they read.

        It then waits there, in order and whole, instead of being thinned out. A pace, not a wait for a client: one that
        reads nothing does not count, nor one that is slow already; for many the bus is held CLIENT_HOLD_SEC_MAX in one
        go at most, and for a few, to whom TCP may be repeating a lost packet (0.2 s), CLIENT_HOLD_FEW_SEC in a minute.
        """
        now_sec = time.monotonic()
        behind = [
            s.backlog_bytes
            for s in self.subscribers.values()
            if s.backlog_bytes > CLIENT_HOLD_BYTES and now_sec - s.took_sec < CLIENT_HOLD_SEC and not s.slow
        ]
        if len(behind) >= max(CLIENT_HOLD_CLIENTS_MIN, CLIENT_HOLD_PART * len(self.subscribers)):
            self._patience.rest()
            self._held_since_sec = self._held_since_sec or now_sec
            return now_sec - self._held_since_sec < CLIENT_HOLD_SEC_MAX
        self._held_since_sec = 0.0
        if max(behind, default=0) <= CLIENT_HOLD_FEW_BYTES:
            self._patience.rest()
            return False
        return self._patience.lasts(now_sec)

    def wants(self, message_type: str) -> bool:
        """Whether any client takes this type now."""
        return message_type in self._wanted or "*" in self._wanted

    def names(self, message_type: str) -> bool:
        """Whether any client takes this type by its name (`*` is one, too)."""
        return message_type in self._wanted

    # -- Messages --

    def broadcast(self, batch: Sequence[tuple[str, bytes, bool]], now_sec: float) -> None:
        """Send (type, payload, replaceable) messages to whoever takes them, in order, without ever waiting."""
        messages = [Message(next(self._messages), *item) for item in batch]
        for message in messages:
            self._retain(message)
            if self.remember:
                self._remember(message)
        self.last_number = messages[-1].number if messages else self.last_number
        encoded: dict[tuple[Encoder, int], Encoded] = {}  # once for all clients, however they group
        for (encode, types), group in self._groups.items():
            taken = []
            for message in messages:
                if types is None or message.type in types:
                    key = encode, message.number
                    if key not in encoded:
                        encoded[key] = Encoded(message.type, encode(message), message.replaceable, now_sec)
                    taken.append(encoded[key])
            chunks = _chunks(taken)
            for subscriber in list(group.values()):
                subscriber.send(chunks, now_sec)

    def _retain(self, message: Message) -> None:
        before = self.retained.pop(message.type, None)
        if before is not None:
            self._retained_bytes -= len(before.payload)
        if len(self.retained) < RETAINED_TYPES_MAX and (
            self._retained_bytes + len(message.payload) <= RETAINED_BYTES_MAX
        ):
            self.retained[message.type] = message
            self._retained_bytes += len(message.payload)

    def _remember(self, message: Message) -> None:
        self.recent.append(message)
        self._recent_bytes += len(message.payload)
        while len(self.recent) > RESUME_MESSAGES_MAX or self._recent_bytes > RESUME_BYTES_MAX:
            self._recent_bytes -= len(self.recent.popleft().payload)

    def forget_run(self) -> None:
        """A new run begins: what the last one said last is no longer the present state."""
        self.retained.clear()
        self._retained_bytes = 0

    def snapshot(self, types: frozenset[str] | None) -> list[Message]:
        """The last message of each of these types, in bus order."""
        found = [message for message in self.retained.values() if types is None or message.type in types]
        return sorted(found)  # by number

    # -- Figures --

    def totals(self) -> tuple[int, int]:
        """(messages sent, messages skipped) over all clients, present and past."""
        present = self.subscribers.values()
        return self.sent_total + sum(s.sent for s in present), self.skipped_total + sum(s.skipped for s in present)


def _chunks(messages: Sequence[Encoded]) -> list[Chunk]:
    """The messages joined into writes of moderate size, once for all clients of a group."""
    chunks: list[Chunk] = []
    parts: list[Encoded] = []
    size = 0
    for message in messages:
        if parts and size + len(message.data) > CLIENT_WRITE_BYTES_MAX:
            chunks.append(Chunk(parts))
            parts, size = [], 0
        parts.append(message)
        size += len(message.data)
    if parts:
        chunks.append(Chunk(parts))
    return chunks


# == 13 == Connection ==================================================================================================
#
# One TCP (or Unix) connection: deadline -> parse -> route -> respond -> keep alive, or -> upgrade -> frames.
#
# It is an asyncio protocol, not a coroutine: no handler ever waits for anything, so a request is answered within the
# callback that brought its last byte.  That gives order to pipelined requests for free, no task per connection, and
# nothing to cancel at the end.  Deadlines are looked at by a sweep once a second (`check`), not by timers.


class Application(Protocol):
    """What a connection needs of the program behind it."""

    memo: dict[bytes, Request]  # heads already parsed, shared by all connections
    date: bytes  # the Date header, kept up to date by the sweep
    read_buffer: memoryview  # what has just come from any connection
    message_bytes_max: int  # of a WebSocket message from a client

    def opened(self, connection: Connection) -> Response | None:
        """A connection was accepted; a response refuses it."""

    def closed(self, connection: Connection) -> None:
        """It is gone, whatever the reason."""

    def respond(self, connection: Connection, request: Request) -> Response | None:
        """The answer to a request; None when the application has switched the connection to a WebSocket or stream."""

    def headers_for(self, request: Request) -> HeaderList:
        """Further headers of the answer, by what the request says of itself (CORS)."""

    def received(self, connection: Connection, message: TextMessage | BinaryMessage) -> None:
        """A WebSocket message came."""

    def failed(self, connection: Connection, error: Exception) -> None:
        """One of the above raised what it should not: the place to log it."""


class Connection(asyncio.BufferedProtocol):
    """One client, from accept to the last byte."""

    def __init__(self, app: Application, writer: asyncio.StreamWriter) -> None:
        # The connection.
        self.app = app
        self._writer = writer  # kept: its finaliser closes the transport on newer Pythons
        self.transport: asyncio.Transport = writer.transport  # type: ignore[assignment]
        self._displaced = self.transport.get_protocol()  # the stream's: to be told of the end, or it stays for the GC
        self.address = peer_name(self.transport)  # of the peer, as text
        self.mode = "http"  # http | websocket | stream | closing
        self.paused = False  # the transport is full
        self._eof = False  # the peer has half-closed
        self._ending = False  # the server stops: goodbye when the backlog is out
        # Deadlines, monotonic seconds.
        now = time.monotonic()
        self.outlet = Outlet(self.transport, now)  # the way to the peer
        self.heard_sec = now  # when the peer last sent anything
        self._deadline_sec = now + HTTP_HEAD_TIMEOUT_SEC  # when the mode at hand must have moved on
        self._pinged_sec = now  # when the last keepalive went out
        # HTTP.
        self._requests: RequestParser | None = RequestParser(app.memo)
        self._in_head = False  # a head has begun: its deadline runs
        self.admitted: tuple[Request, Any] | None = None  # the last request that passed all checks, and its route
        # WebSocket or stream.
        self._frames: FrameParser | None = None
        self._events: collections.deque[Event] = collections.deque()  # read, and not yet obeyed
        self._owed_pong: bytes | None = None  # the data of the last ping that came while the transport was full
        self.subscriber: Subscriber | None = None  # in the hub; None for HTTP
        self.number = 0  # the subscriber's in the hub
        self.transport.set_write_buffer_limits(high=CONNECTION_BUFFER_BYTES, low=CONNECTION_BUFFER_BYTES // 4)
        limit_unsent(self.transport)

    # -- Called by the transport --

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport reads to.

        A plain Protocol would get new bytes of 256 KiB for each read, which costs more than all that is done with them,
        and could hold 40,000 tiny frames, a second in which nobody else is served.  One small buffer serves all: it is
        filled and emptied in one call of the loop.
        """
        return self.app.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._take(bytes(self.app.read_buffer[:nbytes]))

    def _take(self, data: bytes) -> None:
        self.heard_sec = time.monotonic()
        try:
            if self.mode == "http" and self._requests is not None:
                known = self._requests.recall(data) if not self.paused else None
                if known is None:
                    self._requests.feed(data)
                    self._serve()
                else:
                    self._await_head(begun=False)
                    self._answer(known)
            elif self.mode == "websocket":
                self._read_frames(data)
        except Exception as error:  # a fault of ours must not leave the client hanging, nor take the server along
            self.app.failed(self, error)
            self._fail()

    def eof_received(self) -> bool:
        """The peer will send no more; True keeps the connection open for what it is still owed."""
        self._eof = True
        if self.mode == "websocket":
            self._leave()  # without a Close: the peer is gone, and takes nothing more
        elif self.mode == "stream":
            self._comment()  # curl and nc may half-close and read on; one that is gone answers this with a reset
        may_stay = (self.mode == "http" and self.paused) or self.mode == "stream"
        return may_stay and self.transport.can_write_eof()  # TLS cannot half-close

    def pause_writing(self) -> None:
        self.paused = True
        if self.subscriber is not None:
            self.subscriber.pause()
        else:
            self._set_reading(False)  # no answers to be had: no further requests

    def resume_writing(self) -> None:
        self.paused = False
        if self._owed_pong is not None and self.mode == "websocket":
            self.outlet.write(encode_frame(OP_PONG, self._owed_pong))
        self._owed_pong = None
        if self.subscriber is not None:
            self.subscriber.flush()
            if self.subscriber.backlog_bytes:
                return
        self._set_reading(True)
        if self._ending:
            self.end()
        elif self.mode == "websocket":
            self._take(b"")
        elif self.mode == "http":
            self._take(b"")
            if self._eof and not self.paused:
                self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.mode = "closing"
        self.outlet.closed = True
        if isinstance(self._displaced, asyncio.Protocol):
            self._displaced.connection_lost(None)
        self.app.closed(self)

    def _set_reading(self, on: bool) -> None:
        if not self._eof and not self.transport.is_closing() and self.transport.is_reading() != on:
            self.heard_sec = time.monotonic()  # while we do not read, its silence is ours
            (self.transport.resume_reading if on else self.transport.pause_reading)()

    # -- HTTP --

    def _serve(self) -> None:
        """Answer the requests that are complete, in order, while the answers find room."""
        requests = self._requests
        for _ in range(HTTP_PIPELINED_MAX):
            if requests is None or self.mode != "http" or self.paused:
                return
            try:
                request = requests.next_request()
            except HTTPError as error:
                self.refuse(error_response(error))
                return
            if request is None:
                self._await_head(requests.started)
                return
            self._answer(request)
        self._set_reading(False)  # also its end: that comes behind what was asked before it
        asyncio.get_running_loop().call_soon(self._serve_on)

    def _serve_on(self) -> None:
        """Others have had their turn."""
        if self.mode == "http" and not self.paused:
            self._set_reading(True)
            self._take(b"")

    def _await_head(self, begun: bool) -> None:
        """Set the deadline: one for a whole head, however slowly it trickles, and one for an idle connection."""
        if not begun:
            self._deadline_sec = self.heard_sec + HTTP_IDLE_TIMEOUT_SEC
        elif not self._in_head:
            self._deadline_sec = self.heard_sec + HTTP_HEAD_TIMEOUT_SEC
        self._in_head = begun

    def _answer(self, request: Request) -> None:
        self._in_head = False
        try:
            response = self.app.respond(self, request)
        except HTTPError as error:
            response = error_response(error, request.arg("pretty") is not None)
        if response is not None:
            self.send(response, request)

    def send(self, response: Response, request: Request) -> None:
        """Write an answer, and end the connection behind it when the request or the answer says so."""
        close = not request.keep_alive or response.body is None
        self.outlet.write(
            response.encode(
                date=self.app.date,
                head_only=request.method == "HEAD",
                close=close,
                gzip=response.is_compressible and accepts_gzip(request.headers.get("accept-encoding")),
                extra=self.app.headers_for(request),
            )
        )
        if close:
            self.linger()

    def refuse(self, response: Response) -> None:
        """Write a last answer; what the peer sends from now on is thrown away."""
        self.outlet.write(response.encode(date=self.app.date, close=True))
        self.linger()

    def linger(self) -> None:
        """End our side and wait a moment for the peer to end its own: closing with unread bytes would reset the
        connection, and the peer would lose our last words (RFC 9112 section 9.6)."""
        self.mode = "closing"
        self.outlet.closed = True
        self._deadline_sec = time.monotonic() + LINGER_TIMEOUT_SEC
        if self.transport.is_closing():
            return
        if self._eof or not self.transport.can_write_eof():  # TLS cannot half-close
            self.transport.close()
            return
        try:
            self.transport.write_eof()
            self._set_reading(True)
        except OSError:  # the peer has reset the connection already, and the loop has not seen it yet
            self.transport.abort()

    def _fail(self) -> None:
        """After a fault of ours: say so without detail, which may be sensitive, and end."""
        if self.mode == "http":
            self.refuse(error_response(HTTPError(500, "internal server error")))
        elif self.mode == "websocket":
            self.close_websocket(CLOSE_INTERNAL_ERROR)
        else:
            self.outlet.abort()

    # -- WebSocket and streams --

    def open_websocket(self, key: str, subprotocol: str | None) -> None:
        """Switch protocols; frames that came right behind the request are read, too."""
        self.mode = "websocket"
        self._frames = FrameParser(self.app.message_bytes_max)
        self.outlet.write(upgrade_response(key, subprotocol))
        early = self._requests.take_rest() if self._requests is not None else b""
        self._requests = None
        if early:
            asyncio.get_running_loop().call_soon(self._take, early)

    def open_stream(self, head: bytes) -> None:
        """Switch to an endless body."""
        self.mode = "stream"
        self._requests = None
        self.outlet.write(head)
        connected = self.transport.get_extra_info("socket")
        if connected is not None:  # a stream may be silent for ever: only TCP can find out that its peer has vanished
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def _read_frames(self, data: bytes) -> None:
        events = self._frames.feed(data) if self._frames is not None else []
        pings = [event for event in events if isinstance(event, Ping)]
        # RFC 6455 5.5.3: of several pings a peer "MAY elect to send a Pong frame for only the most recently processed".
        if len(pings) > WS_PINGS_PER_READ_MAX:
            events = [event for event in events if not isinstance(event, Ping) or event is pings[-1]]
        self._events += events
        # One read may hold hundreds of subscriptions to everything: who does not take the answers waits with the rest.
        while self._events and self.mode == "websocket" and self.transport.is_reading():
            self._handle(self._events.popleft())

    def _handle(self, event: Event) -> None:
        if isinstance(event, (TextMessage, BinaryMessage)):
            self.app.received(self, event)
        elif isinstance(event, Ping):
            self._pong(event)
        elif isinstance(event, Close):
            self._echo_close(event)
        elif isinstance(event, Failure):
            self.close_websocket(event.code, event.reason)

    def _pong(self, ping: Ping) -> None:
        if self.paused:
            self._owed_pong = ping.data
        else:
            self.outlet.write(encode_frame(OP_PONG, ping.data))

    def _echo_close(self, event: Close) -> None:
        """RFC 6455 5.5.1: the answer to a Close is a Close; 7.1.1: then the server closes the connection first."""
        if self.mode == "websocket":
            self._leave()
            self.outlet.write(encode_frame(OP_CLOSE, event.payload))
            self.linger()

    def _leave(self) -> None:
        """A peer that is leaving takes nothing more: what still waits for it in the hub is dropped."""
        if self.subscriber is not None:
            self.subscriber.leave()

    def close_websocket(self, code: int, reason: str = "") -> None:
        """Send a Close and end; the peer's own is not waited for (some never send it)."""
        if self.mode == "websocket":
            self._leave()
            self.outlet.write(encode_close(code, reason))
            self.linger()

    def send_frame(self, frame: bytes) -> None:
        """Write a frame to this client alone, behind what waits for it."""
        if self.subscriber is None:
            self.outlet.write(frame)
            return
        self.subscriber.reply(frame, time.monotonic())
        if self.subscriber.backlog_bytes:
            self._set_reading(False)  # who does not take our answers is not asked for further questions

    # -- The sweep --

    def check(self, now_sec: float) -> None:
        """Keep the deadlines; called about once a second."""
        if self.outlet.has_stalled(now_sec):
            self._cut_off("it took nothing any more")
        elif self.mode in ("websocket", "stream"):
            self._keep_alive(now_sec)
        elif now_sec > self._deadline_sec and not self.outlet.waiting:
            self._time_out()

    def _time_out(self) -> None:
        if self.mode == "closing":
            self.transport.abort()
        elif self._in_head:
            self.refuse(error_response(HTTPError(408, "the request head did not arrive in time")))
        else:
            self.transport.close()

    def _keep_alive(self, now_sec: float) -> None:
        """Ping a WebSocket, comment to a stream; a peer that is no longer there is cut off."""
        is_websocket = self.mode == "websocket"
        interval = WS_PING_INTERVAL_SEC if is_websocket else STREAM_COMMENT_INTERVAL_SEC
        waits = self.outlet.waiting > 0  # then what it takes is a sign of life, too
        alive_sec = max(self.heard_sec, self.outlet.moved_sec) if waits else self.heard_sec
        if is_websocket and now_sec - alive_sec > WS_SILENCE_TIMEOUT_SEC:
            self._cut_off("it was silent, and did not answer pings")
        elif not is_websocket and self._eof and self._is_reset():
            self.outlet.abort()
        elif now_sec - self._pinged_sec >= interval and not self.paused:
            self._pinged_sec = now_sec
            if is_websocket:
                self.outlet.write(encode_frame(OP_PING, b""))
            elif self.subscriber is not None and self.subscriber.kind == "sse":
                self._comment()

    def _comment(self) -> None:
        """Say something that means nothing: a comment (HTML standard 9.2.6), or an empty line of NDJSON."""
        if self.subscriber is not None and not self.paused:
            self.outlet.write(b": keepalive\n\n" if self.subscriber.kind == "sse" else b"\n")

    def _is_reset(self) -> bool:
        """Whether the peer has reset the connection: behind its EOF, asyncio looks only when it writes."""
        connected = self.transport.get_extra_info("socket")
        return connected is not None and connected.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    def _cut_off(self, fault: str) -> None:
        if self.subscriber is not None:
            self.subscriber.cut_off(fault)
        else:
            self.outlet.abort()

    def end(self) -> None:
        """The server stops: say goodbye in the way of the mode, behind what waits, without waiting for an answer."""
        self._ending = True
        if self.subscriber is not None and self.subscriber.backlog_bytes:
            return  # resume_writing() comes back here
        if self.mode == "websocket":
            self.close_websocket(CLOSE_GOING_AWAY, "the server stops")
        elif self.mode != "closing":
            self.transport.close()


UNIX_PEER = "unix"  # stands for the address of a peer on a Unix socket, which has none


def limit_unsent(transport: asyncio.BaseTransport) -> None:
    """Have the kernel take little more than the peer does.

    Otherwise it takes megabytes and wakes us when a third of them has gone: one that reads a KiB a second would look
    like one that reads nothing, and the newest state would stand behind minutes of old ones.
    """
    connected = transport.get_extra_info("socket")
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None and connected is not None and connected.family != getattr(socket, "AF_UNIX", None):
        with contextlib.suppress(OSError):  # an option that the system does not have after all
            connected.setsockopt(socket.IPPROTO_TCP, option, CONNECTION_UNSENT_BYTES)


def peer_name(transport: asyncio.BaseTransport) -> str:
    """The address of the peer, for logs and /api/clients."""
    peer = transport.get_extra_info("peername")
    if isinstance(peer, tuple) and len(peer) >= 2:
        return f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
    return UNIX_PEER


def connection_factory(app: Application) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
    """The callback for asyncio.start_server: no coroutine, so it costs no task; the connection takes the transport."""

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(app, writer)
        writer.transport.set_protocol(connection)
        refusal = app.opened(connection)
        if refusal is not None:
            connection.refuse(refusal)

    return accept


# == 14 == Endpoints and service =======================================================================================


BUS_MESSAGE_TYPE = re.compile("[A-Za-z0-9_:-]{1,128}")  # what stands before the target and the `$` of a topic
CLIENT_MESSAGE_TYPE = re.compile(r"[^\x00-\x20$\x7f]{1,128}")  # what a client may ask for; most of it never comes
STATIC_ROUTE = "/static/{file}"
PAGE_PATHS = frozenset(("/", "/dashboard"))  # what a person opens
FAVICON_PATH = "/favicon.ico"  # browsers ask for it beside a JSON answer, too, where no page names another


class Option(NamedTuple):
    """A setting of the command line, as `--help`, the environment and the documentation page know it."""

    flag: str  # --api-port
    metavar: str  # PORT; "" for a switch
    default: str  # as shown
    env: str  # variable that stands in for the flag; "" where there is none
    help: str  # one sentence


OPTIONS: tuple[Option, ...] = (
    Option(
        "--api-port",
        "PORT",
        "",
        "AIPERF_API_SERVER_PORT",
        "serve HTTP and WebSocket on this port; 0 is any free one, and the bound URL is printed",
    ),
    Option(
        "--api-host",
        "HOST",
        "127.0.0.1",
        "AIPERF_API_SERVER_HOST",
        "address to listen on, IPv4 or IPv6; needs --api-port; :: listens on both",
    ),
    Option(
        "--api-unix", "PATH", "", "AIPERF_API_UNIX", "listen on a Unix socket, too or instead of a port (mode 0600)"
    ),
    Option(
        "--zmq-host",
        "HOST",
        "127.0.0.1",
        "AIPERF_API_ZMQ_HOST",
        "watch the bus at tcp://HOST:5664; this is the default source",
    ),
    Option("--zmq-ipc-path", "DIR", "", "AIPERF_API_ZMQ_IPC_PATH", "watch the bus in this IPC directory"),
    Option("--zmq-address", "ADDR", "", "AIPERF_API_ZMQ_ADDRESS", "watch the bus at any subscriber endpoint"),
    Option("--zmq-bind", "ADDR", "", "AIPERF_API_ZMQ_BIND", "bind this endpoint, so that publishers connect to us"),
    Option("--zmq-backend", "NAME", "auto", "AIPERF_API_ZMQ_BACKEND", "auto, pyzmq or builtin: what speaks ZMQ"),
    Option("--replay", "FILE", "", "AIPERF_API_REPLAY", "play a recording (.jsonl or .jsonl.gz)"),
    Option("--replay-speed", "X", "1", "AIPERF_API_REPLAY_SPEED", "play X times as fast; 0 is at once"),
    Option("--replay-loop", "", "", "AIPERF_API_REPLAY_LOOP", "play it again and again"),
    Option("--demo", "", "", "AIPERF_API_DEMO", "replay the real run that ships with the module, in a loop"),
    Option("--record", "FILE", "", "AIPERF_API_RECORD", "write every bus message to a recording while serving"),
    Option(
        "--config",
        "FILE",
        "",
        "AIPERF_API_CONFIG",
        "benchmark configuration (JSON) for /api/config when the bus does not carry it",
    ),
    Option(
        "--linger",
        "SEC",
        "5 with a child, else for ever",
        "AIPERF_API_LINGER",
        "how long to serve after the end of the run",
    ),
    Option(
        "--api-token",
        "TOKEN",
        "",
        "AIPERF_API_TOKEN",
        "clients must present this token; better given in the environment",
    ),
    Option(
        "--allow-host",
        "NAME",
        "",
        "AIPERF_API_ALLOW_HOST",
        "accept this Host header; repeatable, in the environment with commas",
    ),
    Option(
        "--cors-origin",
        "ORIGIN",
        "",
        "AIPERF_API_SERVER_CORS_ORIGINS",
        "let pages of this origin read the API; repeatable, in the environment with commas or as a JSON list",
    ),
    Option("--tls-cert", "FILE", "", "AIPERF_API_TLS_CERT", "serve https and wss with this certificate chain (PEM)"),
    Option("--tls-key", "FILE", "", "AIPERF_API_TLS_KEY", "its private key (PEM), if it is not in the same file"),
    Option(
        "--ws-max-connections",
        "N",
        "1000",
        "AIPERF_API_WS_MAX_CONNECTIONS",
        "WebSockets and streams at once; more are refused with 503",
    ),
    Option("--log-level", "LEVEL", "info", "AIPERF_API_LOG_LEVEL", "debug, info, warning or error"),
    Option("--log-format", "FORMAT", "text", "AIPERF_API_LOG_FORMAT", "text or json"),
)


LIMITS: tuple[tuple[str, int, str, str], ...] = (
    # (name, value, unit, what happens past it)
    ("request head", HTTP_HEAD_BYTES_MAX, "bytes", "431, connection closed"),
    ("request headers", HTTP_HEADERS_MAX, "lines", "431, connection closed"),
    ("request target", HTTP_TARGET_BYTES_MAX, "bytes", "414, connection closed"),
    ("time for a head", HTTP_HEAD_TIMEOUT_SEC, "seconds", "408, connection closed"),
    ("idle keep-alive", HTTP_IDLE_TIMEOUT_SEC, "seconds", "connection closed"),
    ("request body", 0, "bytes", "413 or 501, connection closed"),
    ("connections beside the WebSocket limit", HTTP_CONNECTIONS_MAX, "connections", "503"),
    ("WebSockets and streams", WS_CONNECTIONS_MAX, "connections", "503 before the upgrade"),
    ("message from a client", WS_MESSAGE_BYTES_MAX, "bytes", "Close 1009"),
    ("silence of a WebSocket client", WS_SILENCE_TIMEOUT_SEC, "seconds", "cut off"),
    ("message types of a client", CLIENT_TYPES_MAX, "names", "error answer"),
    ("soft mark of a slow client", CLIENT_SOFT_MARK_BYTES, "bytes", "only the newest of each state message"),
    ("soft mark of a slow client, in time", CLIENT_SOFT_MARK_SEC, "seconds", "the same"),
    ("events waiting for a slow client", CLIENT_QUEUE_EVENTS_MAX, "messages", "left out and counted"),
    ("bytes waiting for a slow client", CLIENT_QUEUE_BYTES_MAX, "bytes", "events left out and counted"),
    ("hard mark of a slow client", CLIENT_HARD_MARK_BYTES, "bytes", "cut off"),
    ("time without a byte taken", CLIENT_STALL_SEC, "seconds", "cut off"),
    ("bus message", BUS_MESSAGE_BYTES_MAX, "bytes", "dropped and counted"),
    ("messages kept for streams that resume", RESUME_MESSAGES_MAX, "messages", "a snapshot instead"),
)


PAGES_MISSING = "the pages are not here: copy the folder static/ beside aiperf_api.py; the API works without"


class Settings(NamedTuple):
    """How a service runs; the command line fills it, and so do the arguments of APIService."""

    host: str = "127.0.0.1"  # address to listen on
    port: int | None = 0  # None: no TCP
    unix_path: str | None = None  # of a Unix socket
    token: str | None = None  # that clients must present; None: open
    allow_hosts: tuple[str, ...] = ()  # names for the Host check
    cors_origins: tuple[str, ...] = ()  # origins whose pages may read us; "*": all
    tls_cert: str | None = None  # PEM file; None: plain
    tls_key: str | None = None  # PEM file; None: in the same file
    ws_max_connections: int = WS_CONNECTIONS_MAX  # WebSockets and streams at once
    linger_sec: float | None = None  # None: for ever
    secrets: tuple[str, ...] = ()  # literals that must show nowhere


def _is_loopback(host: str) -> bool:
    """Whether nobody but this machine can connect."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _tcp_socket(host: str, port: int) -> socket.socket:
    """A listening socket; StartError when the machine says no. `::` takes IPv4, too."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=LISTEN_BACKLOG, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        reason = str(error.strerror).partition(" (while ")[0] if isinstance(error, OSError) else "not a host name"
        raise StartError(f"cannot listen on {printable(host)} port {port}: {reason}") from None


def _unix_socket(path: str) -> socket.socket:
    """A listening Unix socket of mode 0600; one that a live server listens on is never taken away from it."""
    if not hasattr(socket, "AF_UNIX"):
        raise StartError("there are no Unix sockets on this system")
    if os.path.lexists(path):
        _remove_dead_socket(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # bind() makes the file: no moment in which others could connect
    try:
        listener.bind(path)
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {printable(path)}: {error.strerror or error}") from None
    finally:
        os.umask(before)
    return listener


def _remove_dead_socket(path: str) -> None:
    if not S_ISSOCK(os.lstat(path).st_mode):
        raise StartError(f"{printable(path)} is there and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)  # left behind by a server that is gone
            return
        except OSError as error:
            raise StartError(f"cannot listen on {printable(path)}: {error.strerror or error}") from None
    raise StartError(f"{printable(path)}: another server listens there")


def _file_identity(path: str) -> tuple[int, int] | None:
    """What tells a file from another one of the same name; None if there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _remove_socket(path: str, identity: tuple[int, int] | None) -> None:
    """Tidy up, unless somebody did before us, or another server listens there by now."""
    if identity is not None and _file_identity(path) == identity:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _tls_context(certificate: str, key: str | None) -> ssl.SSLContext:
    """Room for https and wss; UsageError, in one line, for files that do not fit."""
    import ssl  # costs 10 ms that only TLS needs

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or str(error)
        raise UsageError(f"--tls-cert {printable(certificate)}: {reason}") from None
    return context


def _descriptors(wanted: int) -> int:
    """Ask for so many file descriptors, and say how many there are: the usual soft limit of 1024 is for select()."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def http_date(seconds: float) -> bytes:
    """IMF-fixdate (RFC 9110 section 5.6.7), whatever the locale."""
    t = time.gmtime(seconds)
    day = f"{_DAYS[t.tm_wday]}, {t.tm_mday:02} {_MONTHS[t.tm_mon - 1]} {t.tm_year}"
    return f"{day} {t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} GMT".encode()


def _source_of(source: str | Source | None) -> Source:
    if source is None:
        return Source()
    if isinstance(source, str):
        return bus_source(source, source.partition("://")[0])
    return source


def _describe(route: Route) -> dict[str, Any]:
    """A route as the documentation page shows it."""
    return {
        "path": route.path,
        "methods": list(route.methods),
        "summary": route.summary,
        "params": [{"name": p.name, "description": p.summary, "example": p.example} for p in route.params],
        "media": list(route.media_types),
        "websocket": route.websocket,
        "example": route.example,
    }


class BusCounters:
    """What came from the bus, for /api/status and /metrics."""

    def __init__(self) -> None:
        self.messages = 0  # good ones
        self.by_type: dict[str, int] = {}  # message type -> good ones
        self.errors: dict[str, int] = {}  # kind -> bad ones
        self.last_ns = 0  # bus clock at the last message

    def count(self, message_type: str, now_ns: int) -> None:
        self.messages += 1
        self.last_ns = now_ns
        if message_type not in self.by_type and len(self.by_type) >= BUS_TYPES_MAX:
            message_type = "other"  # names come from outside: they must not fill the memory
        self.by_type[message_type] = self.by_type.get(message_type, 0) + 1

    def count_error(self, kind: str) -> bool:
        """Whether it is the first of its kind."""
        self.errors[kind] = self.errors.get(kind, 0) + 1
        return self.errors[kind] == 1


class CachedText:
    """The text of /metrics in one format, for as long as it is true."""

    def __init__(self) -> None:
        self.version: tuple[int, ...] = ()  # of everything that the text is made from
        self.response = Response(503)  # ready to send


class APIService:
    """The server: owns state, source, hub and connections, and is what the endpoints answer from.

    Use it as an async context manager, or call start() and stop().

    Args:
        port: TCP port, 0 for any free one.
        host: address to listen on.
        source: a ZMQ subscriber endpoint (`tcp://127.0.0.1:5664`), a Source, or None for publish() alone.
        config: the benchmark's configuration for /api/config and the identity labels.
        record: a file to record the bus to.
        settings: how it runs, in place of host, port and options.
        options: further fields of Settings, such as token="...".

    Raises:
        UsageError: an argument is wrong.
        StartError: from start(): the machine says no.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        source: str | Source | None = None,
        config: Mapping[str, Any] | None = None,
        record: str | None = None,
        settings: Settings | None = None,
        **options: Any,
    ) -> None:
        # The server, from start to stop.
        self.settings = settings if settings is not None else Settings(host=host, port=port, **options)
        if self.settings.token == "":  # an unset variable of a shell script: nobody would notice that it guards nothing
            raise UsageError("--api-token: an empty token")
        self.source = _source_of(source)  # where messages come from
        self.router = Router(ROUTES)  # path -> route
        self.static = static_table(read_static_files())  # name -> file
        self._pages: dict[str, Response] = {}  # made from `static` when first asked for
        self.url = ""  # of the bound socket, once started
        self.started_ns = 0  # wall clock
        self._servers: list[asyncio.AbstractServer] = []  # listening
        self._unix_identity: tuple[int, int] | None = None  # of the Unix socket's file, which is removed at the end
        self._sweep_timer: asyncio.TimerHandle | None = None  # the next sweep
        self._recorder = Recorder(record) if record else None  # None: nothing is recorded
        # only this machine can connect: the Host check is strict
        self._bound_to_loopback = _is_loopback(self.settings.host)
        # What the connections share (Application).
        self.memo: dict[bytes, Request] = {}
        self.date = b""  # IMF-fixdate, of this second
        self.read_buffer = memoryview(bytearray(CONNECTION_READ_BYTES))  # what has just come from any connection
        self.message_bytes_max = WS_MESSAGE_BYTES_MAX  # of one WebSocket message from a client
        self.connections: set[Connection] = set()  # open ones of every kind
        self._connections_max = HTTP_CONNECTIONS_MAX + self.settings.ws_max_connections  # fewer if the system says so
        self.requests: dict[tuple[str, int], int] = {}  # (route, status) -> answers
        # The benchmark.
        self.state = BenchmarkState(self._scrub)
        self.state_version = 0  # grows with every change
        self.bus = BusCounters()  # counters
        self.hub = Hub(self._on_wanted)  # streaming clients
        self._secrets_found: set[str] = set(self.settings.secrets)  # literals that must show nowhere
        self.secrets = secret_forms(self._secrets_found)  # the same in the forms in which they may stand
        self._types: dict[bytes, str] = {}  # topic -> message type
        self._taken: list[tuple[str, bytes, bool]] = []  # of the batch at hand, for the hub
        self._held: dict[str, float] = {}  # type -> monotonic second until which a stream that took it may resume
        # media type -> the text of /metrics
        self._texts = {TEXT: CachedText() for TEXT in (CONTENT_TYPE_TEXT_0_0_4, CONTENT_TYPE_OPENMETRICS_1_0_0)}
        self._formats: dict[str | None, str] = {}  # Accept header -> media type of /metrics
        self._complete: asyncio.Event | None = None  # set while a run has ended
        self._emptied: asyncio.Event | None = None  # set when the last connection has gone, while stopping
        if config is not None:
            self.configure(config, "file")

    # -- Life --

    async def __aenter__(self) -> APIService:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, then begin to take messages: whoever asks early gets an answer, and nothing is missed."""
        self._loop = asyncio.get_running_loop()
        self._complete = asyncio.Event()
        self.started_ns = time.time_ns()
        self._sweep()
        try:
            await self._listen()
            self._start_source()
        except BaseException:
            await self.stop()
            raise

    async def _listen(self) -> None:
        settings = self.settings
        tls = _tls_context(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
        self._limit_connections()
        accept = connection_factory(self)
        # The deadline of the first head counts from the end of the handshake; before that, the handshake has its own.
        timing: dict[str, Any] = {"ssl": tls, "ssl_handshake_timeout": HTTP_HEAD_TIMEOUT_SEC} if tls else {}
        if settings.unix_path is not None:
            unix = await asyncio.start_unix_server(accept, sock=_unix_socket(settings.unix_path), **timing)
            self._unix_identity = _file_identity(settings.unix_path)
            self._servers.append(unix)
            self.url = f"unix:{settings.unix_path}"
        if settings.port is not None:
            listener = _tcp_socket(settings.host, settings.port)
            self._servers.append(await asyncio.start_server(accept, sock=listener, backlog=ACCEPT_MAX, **timing))
            listener.listen(LISTEN_BACKLOG)  # asyncio has one number for both: what waits, and what a turn accepts
            self.url = _url("https" if tls else "http", settings.host, listener.getsockname()[1])

    def _limit_connections(self) -> None:
        """Have descriptors for all connections, or refuse the last ones ourselves: asyncio would log and wait."""
        spare = HTTP_REFUSED_MAX + DESCRIPTORS_SPARE
        found = _descriptors(self._connections_max + spare) - spare
        if found < self._connections_max:
            log.warning("at most %d connections: the limit on open files allows no more (ulimit -n)", max(found, 0))
            self._connections_max = max(found, 0)

    def _start_source(self) -> None:
        topics = (b"",) if self._recorder else CORE_TOPICS
        for prefix in topics:
            self.source.subscribe(prefix)
        self.source.is_held = self.hub.is_congested
        self.source.start(self._deliver, self._notify)

    async def stop(self) -> None:
        """End within STOP_TIMEOUT_SEC, whatever the clients do.

        1. stop listening; 2. stop the source; 3. Close 1001 to WebSockets, end streams and idle connections; 4. let
        what is being sent go out, for a common moment; 5. abort the rest; 6. close the recording.
        """
        for server in self._servers:
            server.close()  # never wait_closed(): on 3.12 and later it waits for the clients
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.source.stop(), STOP_TIMEOUT_SEC / 4)
        for connection in list(self.connections):
            connection.end()
        if self.connections:
            self._emptied = asyncio.Event()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), STOP_TIMEOUT_SEC / 2)
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # lets connection_lost run
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self._close_recorder()
        if self.settings.unix_path is not None:
            _remove_socket(self.settings.unix_path, self._unix_identity)
        self._servers.clear()

    async def wait_complete(self) -> str:
        """Wait for the end of a run; its state: complete, cancelled or failed."""
        assert self._complete is not None, "start() comes first"
        await self._complete.wait()
        return str(self.state.status(self.source.now_ns())["state"])

    async def wait_lingered(self) -> None:
        """Wait until the end of a run has been served for `linger_sec`; for ever when that is None."""
        assert self._complete is not None, "start() comes first"
        while True:
            await self._complete.wait()
            if self.settings.linger_sec is None:
                await asyncio.Event().wait()
            await asyncio.sleep(self.settings.linger_sec or 0.0)
            if self._complete.is_set():  # no new run has begun meanwhile
                return

    def _sweep(self) -> None:
        """Once a second: the Date header, deadlines, stalled clients, the recording."""
        self._sweep_timer = self._loop.call_later(1.0, self._sweep)  # first: whatever fails below, it goes on
        now_sec = time.monotonic()
        self.date = http_date(time.time())
        for connection in list(self.connections):
            connection.check(now_sec)
        self._release_held(now_sec)
        if self._recorder is not None:
            self._record_safely(self._recorder.flush)

    # -- From the bus --

    def publish(self, message: Mapping[str, Any]) -> None:
        """Feed a message as if the bus had brought it; to be called in the event loop's thread.

        Raises:
            ValueError: it has no `message_type`.
        """
        assert self._complete is not None, "start() comes first"
        message_type = message.get("message_type")
        if not isinstance(message_type, str) or not message_type:
            raise ValueError("a message needs a message_type")
        self._deliver([[message_type.encode() + b"$", json_bytes(message)]])

    def _deliver(self, batch: Batch) -> None:
        """Take one poll turn's messages: into the state, the recording, and out to the clients in one go."""
        now_ns = self.source.now_ns()
        for frames in batch:
            try:
                message = self._take(frames, now_ns)  # may send what was taken before it
                self._taken.append(message)
            except BusMessageError as error:
                self._count_bad(error)
            except Exception as error:  # a fault of ours must not stop the bus
                if self.bus.count_error("internal"):
                    text = printable(repr(error))
                    log.error("a bus message was dropped, further ones are only counted: %s", text, exc_info=error)
        self._send_taken()

    def _send_taken(self) -> None:
        taken, self._taken = self._taken, []
        if taken:
            self.hub.broadcast(taken, time.monotonic())

    def _take(self, frames: list[bytes], now_ns: int) -> tuple[str, bytes, bool]:
        """One message: (type, payload as it goes to clients, whether the next of its type replaces it)."""
        if len(frames) != 2:
            raise BusMessageError("frames", f"{len(frames)} frames instead of topic and payload")
        topic, payload = frames
        if len(payload) > BUS_MESSAGE_BYTES_MAX:
            raise BusMessageError("too_large", f"{len(payload)} bytes")
        message_type = self._types.get(topic) or self._type_of(topic)
        is_wanted = self.hub.wants(message_type)
        if is_wanted or self._recorder is not None or message_type not in METRICS_MESSAGE_TYPES:
            payload = self._scrub(payload)
        shown, rows = payload, None
        if is_wanted and message_type == "realtime_metrics":  # read once, for the clients and the state
            shown, rows = forwardable_realtime_metrics(payload, self.state.row_plans.of)
        change = self.state.apply(message_type, payload, now_ns, rows)
        if change:
            self._follow(change)
        if self._recorder is not None:
            self._record(now_ns, topic, payload)
        self.bus.count(message_type, now_ns)
        if is_wanted:
            shown = self._on_one_line(message_type, shown)
        return message_type, shown, message_type in STATE_MESSAGE_TYPES

    def _type_of(self, topic: bytes) -> str:
        """The message type of a topic: what stands before the `$`, less the target of a targeted message."""
        try:
            message_type = topic.decode("ascii").rstrip("$").partition(".")[0]
        except UnicodeDecodeError:
            message_type = ""
        if not BUS_MESSAGE_TYPE.fullmatch(message_type):
            raise BusMessageError("topic", f"not a topic: {printable(topic)}")
        if len(self._types) < BUS_TYPES_MAX:
            self._types[topic] = message_type
        return message_type

    def _scrub(self, payload: bytes) -> bytes:
        found: set[str] = set()
        payload = scrub_json(payload, self.secrets, found)
        new = sorted(found - self._secrets_found)[: max(0, SECRETS_MAX - len(self._secrets_found))]
        if new:
            self._secrets_found.update(new)
            self.secrets = secret_forms(self._secrets_found)
        return payload

    def _prepare(self, message_type: str, payload: bytes) -> bytes:
        """The payload as clients get it: one JSON object on one line, hidden metrics out."""
        if message_type == "realtime_metrics":
            payload, _ = forwardable_realtime_metrics(payload, self.state.row_plans.of)
        return self._on_one_line(message_type, payload)

    def _on_one_line(self, message_type: str, payload: bytes) -> bytes:
        if b"\n" in payload or b"\r" in payload:
            return json_bytes(read_message(payload))
        if message_type not in _READ_MESSAGE_TYPES:
            read_message(payload)  # what nobody has looked at does not go to clients
        return payload

    def _follow(self, change: Change) -> None:
        """What a change of state means for the rest of the server."""
        self.state_version += 1
        assert self._complete is not None
        if change & Change.NEW_RUN:
            self._send_taken()  # what came before it in this batch is of the run that is forgotten
            self.hub.forget_run()
            self._complete.clear()
        if change & Change.ENDED:
            self._complete.set()

    def _count_bad(self, error: BusMessageError) -> None:
        if self.bus.count_error(error.kind):
            log.warning("bad bus message (%s), further ones are only counted: %s", error.kind, printable(str(error)))

    def _record(self, now_ns: int, topic: bytes, payload: bytes) -> None:
        read_message(payload)  # nobody may have looked at it before
        recorder = self._recorder
        if recorder is not None:
            self._record_safely(lambda: recorder.write(now_ns, topic.decode(), payload))

    def _record_safely(self, write: Callable[[], None]) -> None:
        """A full disk ends the recording, not the server."""
        try:
            write()
        except OSError as error:
            log.error("the recording ends here: %s", error)
            self._close_recorder()

    def _close_recorder(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            try:
                recorder.close()
            except OSError as error:
                log.error("the recording is not complete: %s", error)

    def configure(self, config: Mapping[str, Any], origin: str) -> None:
        """Take a configuration of the benchmark; `origin` is "file" or "command"."""
        clean = redact(config, self._secrets_found)
        self.secrets = secret_forms(self._secrets_found)
        self.state.configure(_scrub_strings(clean, self.secrets), origin)
        self.state_version += 1

    def end_child(self, exit_text: str) -> None:
        """Take note that the benchmark's process is gone; `exit_text` says how, "" if it ended well."""
        change = self.state.end_child(exit_text, self.source.now_ns())
        if change:
            self._follow(change)

    async def settle(self) -> None:
        """Wait until the bus of a process that is gone has brought its last message."""
        deadline = time.monotonic() + BUS_SETTLE_TIMEOUT_SEC
        seen = -1
        while self.bus.messages != seen and time.monotonic() < deadline:
            seen = self.bus.messages
            await asyncio.sleep(BUS_SETTLE_QUIET_SEC)

    def _on_wanted(self, message_type: str, wanted: bool) -> None:
        """The bus brings what clients want, besides what the state always needs."""
        is_held = message_type in self._held
        if wanted:
            self._held.pop(message_type, None)
        if not is_held:
            self._order(message_type, wanted)

    def _order(self, message_type: str, wanted: bool) -> None:
        act = self.source.subscribe if wanted else self.source.unsubscribe
        if self._recorder is not None:
            return  # everything is subscribed to already
        if message_type == "*":
            act(b"")
        elif message_type not in CORE_MESSAGE_TYPES:
            act(message_type.encode() + b"$")
            act(message_type.encode() + b".")

    def _hold(self, types: Iterable[str]) -> None:
        """Keep the bus bringing what a stream took that is leaving."""
        until_sec = time.monotonic() + RESUME_HOLD_SEC
        for message_type in types:
            if len(self._held) < BUS_TYPES_MAX:
                self._held[message_type] = until_sec

    def _release_held(self, now_sec: float) -> None:
        for message_type in [name for name, until_sec in self._held.items() if now_sec > until_sec]:
            del self._held[message_type]
            if not self.hub.names(message_type):
                self._order(message_type, False)

    def _notify(self, line: str) -> None:
        log.info("%s", printable(line, LOG_LINE_CHARS_MAX))

    # -- From the connections (Application) --

    def opened(self, connection: Connection) -> Response | None:
        self.connections.add(connection)
        over = len(self.connections) - self._connections_max
        if over > HTTP_REFUSED_MAX:
            connection.outlet.abort()
        elif over > 0:
            return error_response(HTTPError(503, "too many connections", (("Retry-After", "5"),)))
        return None

    def closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if self._emptied is not None and not self.connections:
            self._emptied.set()
        if connection.subscriber is not None:
            if connection.subscriber.fault:
                self.hub.cut_off_total += 1
                log.warning("cut off %s: %s", connection.address, connection.subscriber.fault)
            if connection.subscriber.kind == "sse":
                self._hold(connection.subscriber.asked)
            self.hub.remove(connection.number)

    def respond(self, connection: Connection, request: Request) -> Response | None:
        """Check, route, answer; errors are answers, too."""
        route: Route | None = None
        try:
            if connection.admitted is not None and connection.admitted[0] is request:
                route = connection.admitted[1]  # the memo gave the very object that was checked before
            else:
                self._check(connection, request)
                if request.method == "OPTIONS":
                    return self._answered(connection, request, None, self.preflight(request))
                route = self.router.match(request.method, self._routed_path(request))
                if route.needs_token and self.settings.token is not None:
                    check_token(request, self.settings.token.encode())
                connection.admitted = request, route
            response = route.handler(self, connection, request)
        except HTTPError as error:
            response = error_response(error, request.arg("pretty") is not None)
        return self._answered(connection, request, route, response)

    def received(self, connection: Connection, message: TextMessage | BinaryMessage) -> None:
        """A message of the /ws protocol: subscribe, unsubscribe or ping."""
        try:
            self._obey(connection, message)
        except ClientMessageError as error:
            connection.send_frame(encode_frame(OP_TEXT, json_bytes({"type": "error", "message": str(error)})))

    def failed(self, connection: Connection, error: Exception) -> None:
        log.error("a fault of this server while serving %s", connection.address, exc_info=error)

    # -- Requests --

    def _check(self, connection: Connection, request: Request) -> None:
        if connection.address != UNIX_PEER:  # no DNS name leads there
            allowed = frozenset(name.lower() for name in self.settings.allow_hosts)
            check_host(request.headers.get("host"), allowed=allowed, bound_to_loopback=self._bound_to_loopback)

    @staticmethod
    def _routed_path(request: Request) -> str:
        """Files share one route; their names are looked up in the table, nowhere else."""
        is_file = request.path.startswith("/static/") or request.path == FAVICON_PATH
        return STATIC_ROUTE if is_file else request.path

    def _answered(
        self, connection: Connection, request: Request, route: Route | None, response: Response | None
    ) -> Response | None:
        """The answer as it goes out, counted: 304 for what the client already has (RFC 9110 section 13.1.2)."""
        wanted = request.headers.get("if-none-match")
        if wanted is not None and response is not None and response.status == 200:
            etag = dict(response.headers).get("ETag", "")
            response = not_modified(response) if etag_matches(wanted, etag) else response
        switched = 101 if request.wants_upgrade else 200  # to a WebSocket; to an endless answer
        self._log_access(connection, request, route, switched if response is None else response.status)
        return response

    def headers_for(self, request: Request) -> HeaderList:
        """What an answer says beside its own headers: the cookie of a page opened with a token, CORS."""
        if self.settings.token is None:
            return self._cors_headers(request)
        return (*self._cookie_headers(request, self.settings.token.encode()), *self._cors_headers(request))

    def _cookie_headers(self, request: Request, token: bytes) -> HeaderList:
        """A page brings along scripts, reloads and a WebSocket; its cookie lets them in.  Without a Path it is for the
        folder of the page, also behind a proxy (RFC 6265 5.1.4)."""
        if request.path not in PAGE_PATHS or not has_page_token(request, token):
            return ()
        secure = "; Secure" if self.settings.tls_cert else ""
        return (("Set-Cookie", f"{TOKEN_COOKIE}={page_cookie(token)}; HttpOnly; SameSite=Strict{secure}"),)

    def _cors_headers(self, request: Request) -> HeaderList:
        """For a listed origin (Fetch standard, 3.2); none unless asked for on the command line."""
        if not self.settings.cors_origins:
            return ()
        origin = request.headers.get("origin")
        listed = {item.lower() for item in self.settings.cors_origins}
        if origin is None or (origin.lower() not in listed and "*" not in listed):
            return (("Vary", "Origin"),)  # a cache must not give this answer to a listed one
        return (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"), ("Access-Control-Expose-Headers", "ETag"))

    def preflight(self, request: Request) -> Response:
        """The answer to OPTIONS: which methods there are, and for a listed origin that it may use them."""
        allow = [("Allow", "GET, HEAD, OPTIONS")]
        asks = "access-control-request-method" in request.headers
        if asks and dict(self.headers_for(request)).get("Access-Control-Allow-Origin"):
            allow += [
                ("Access-Control-Allow-Methods", "GET, HEAD"),
                ("Access-Control-Allow-Headers", "Authorization, If-None-Match, Last-Event-ID"),
                ("Access-Control-Max-Age", "600"),
            ]
        return Response(204, headers=allow)

    def _log_access(self, connection: Connection, request: Request, route: Route | None, status: int) -> None:
        key = (route.name if route is not None else "none", status)
        self.requests[key] = self.requests.get(key, 0) + 1
        if log.isEnabledFor(logging.DEBUG):
            fields = (printable(request.method, 16), request.target, request.headers.get("user-agent", "-"))
            method, target, agent = (printable(field).replace('"', '\\"') for field in fields)
            log.debug('%s "%s %s" %d "%s"', connection.address, method, target, status, agent)

    # -- Streaming clients --

    def add_client(self, connection: Connection, kind: str, encode: Encoder) -> Subscriber:
        """Take a connection into the hub; it must have switched to its mode already."""
        subscriber = Subscriber(connection.outlet, kind, connection.address, encode, time.time_ns())
        if connection.paused:
            subscriber.pause()
        connection.subscriber = subscriber
        connection.number = self.hub.add(subscriber)
        return subscriber

    def check_room(self) -> None:
        """Refuse before the upgrade when all places are taken: who is let in and then dropped retries at once."""
        if len(self.hub.subscribers) >= self.settings.ws_max_connections:
            raise HTTPError(503, "all streaming connections are taken", (("Retry-After", "5"),))

    def _obey(self, connection: Connection, message: TextMessage | BinaryMessage) -> None:
        request = _read_client_message(message)
        if request["type"] == "ping":
            connection.send_frame(encode_frame(OP_TEXT, b'{"type":"pong"}'))
        elif request["type"] == "subscribe":
            self._subscribe(connection, _message_types(request), _flag(request, "snapshot", True))
        elif request["type"] == "unsubscribe":
            self._unsubscribe(connection, _message_types(request))
        else:
            raise ClientMessageError("unknown type; there are subscribe, unsubscribe and ping")

    def _subscribe(self, connection: Connection, types: list[str], snapshot: bool) -> None:
        client = connection.subscriber
        assert client is not None
        if len(client.asked | set(types)) > CLIENT_TYPES_MAX:
            raise ClientMessageError(f"at most {CLIENT_TYPES_MAX} message types")
        client.asked |= set(types)
        self.hub.subscribe(connection.number, _as_filter(client.asked))
        answer: dict[str, Any] = {"type": "subscribed", "message_types": types}
        unknown = [name for name in types if name != "*" and name not in KNOWN_MESSAGE_TYPES]
        if unknown:
            answer["unknown"] = unknown
        connection.send_frame(encode_frame(OP_TEXT, json_bytes(answer)))
        if snapshot:
            self.send_snapshot(client, _as_filter(set(types)))

    def _unsubscribe(self, connection: Connection, types: list[str]) -> None:
        client = connection.subscriber
        assert client is not None
        client.asked -= set(types)
        self.hub.subscribe(connection.number, _as_filter(client.asked))
        answer = {"type": "unsubscribed", "message_types": types}
        connection.send_frame(encode_frame(OP_TEXT, json_bytes(answer)))

    def send_snapshot(self, client: Subscriber, types: frozenset[str] | None) -> None:
        """The present state, for a client that has just come: the last message of each of these types."""
        self.send_past(client, self.hub.snapshot(types))

    def send_past(self, client: Subscriber, messages: Iterable[Message]) -> None:
        """Messages from before this client came: nobody may have taken their type then, so that they are as raw as the
        bus had them."""
        for message in messages:
            try:
                payload = self._prepare(message.type, self._scrub(message.payload))
            except BusMessageError as error:
                self._count_bad(error)  # nobody had looked at it before
                continue
            client.reply(client.encode(message._replace(payload=payload)), time.monotonic())

    def encode_event(self, message: Message) -> bytes:
        """A message as a Server-Sent Event; the id lets a client resume where it was cut off."""
        event_id = b"id: %x-%d\n" % (self.started_ns, message.number) if message.number else b""
        return b"%sevent: %s\ndata: %s\n\n" % (event_id, message.type.encode(), message.payload)

    def messages_after(self, event_id: str, types: frozenset[str] | None) -> list[Message] | None:
        """What came behind the message of this id, None when that is no longer known: a snapshot is due then."""
        epoch, _, number = event_id.partition("-")
        if epoch != f"{self.started_ns:x}" or not re.fullmatch("[0-9]{1,18}", number):
            return None
        recent = self.hub.recent
        first = recent[0].number if recent else self.hub.last_number + 1
        if int(number) + 1 < first or int(number) > self.hub.last_number:
            return None
        return [m for m in recent if m.number > int(number) and (types is None or m.type in types)]

    # -- What the endpoints say --

    def file(self, name: str) -> Response:
        """A file of static/, by its path there; HTTPError 404 if there is none, with a word on what is missing."""
        cached = self._pages.get(name)
        if cached is not None:
            return cached
        file = self.static.get(name)
        if file is None:
            if self.static:
                raise HTTPError(404, "no such file")
            raise HTTPError(404, PAGES_MISSING)
        response = Response(200, file.body, file.content_type, (_etag(file.body), ("Cache-Control", "no-cache")))
        self._pages[name] = response
        return response

    def documentation(self) -> dict[str, Any]:
        """What the documentation page shows: the tables that the server itself works from."""
        return {
            "version": __version__,
            "url": self.url,
            "source": {"kind": self.source.kind, "address": self.source.address},
            "routes": [_describe(route) for route in ROUTES if route.path != STATIC_ROUTE],
            "options": [option._asdict() for option in OPTIONS],
            "limits": [{"name": n, "value": v, "unit": u, "meaning": m} for n, v, u, m in LIMITS],
            "message_types": {"builtin": sorted(BUILTIN_MESSAGE_TYPES), "known": sorted(KNOWN_MESSAGE_TYPES)},
        }

    def now_ns(self) -> int:
        """The clock of the bus."""
        return self.source.now_ns()

    def status(self) -> dict[str, Any]:
        """The state of the run, and of the source it is heard from."""
        now_ns = self.now_ns()
        age_sec = (now_ns - self.bus.last_ns) / 1e9 if self.bus.messages else None
        source = {
            "kind": self.source.kind,
            "address": self.source.address,
            "backend": self.source.backend,
            "connected": self.source.connected,
            "messages": self.bus.messages,
            "last_message_age_sec": None if age_sec is None else max(0.0, round(age_sec, 3)),
        }
        return {**self.state.status(now_ns), "source": source}

    def exposition_format(self, accept: str | None) -> str:
        """The format of /metrics for an Accept header.  Never 406: a scraper that names neither gets the plain one
        (Prometheus sends */*, too)."""
        known = self._formats.get(accept)
        if known is None:
            known = accepts(accept, tuple(self._texts)) or CONTENT_TYPE_TEXT_0_0_4
            if len(self._formats) < HTTP_MEMO_HEADS_MAX:
                self._formats[accept] = known
        return known

    def exposition(self, content_type: str) -> Response:
        """/metrics in one format, built when something has changed (the clock counts, once a second)."""
        text = self._texts[content_type]
        version = (self.state_version, self.hub.changes, int(time.monotonic()))
        if text.version != version:
            families = unique_families([*state_families(self.state, self.now_ns()), *self._health_families()])
            render = render_openmetrics if content_type == CONTENT_TYPE_OPENMETRICS_1_0_0 else render_text
            text.response = Response(200, render(families), content_type)
            text.version = version
        return text.response

    def _health_families(self) -> list[Family]:
        """How this server does: its bus, its clients, its process."""
        found = FamilySet()
        for message_type, count in self.bus.by_type.items():
            found.add(_HEALTH["bus_messages"], (("type", message_type),), count, "_total")
        for kind, count in self.bus.errors.items():
            found.add(_HEALTH["bus_errors"], (("kind", kind),), count, "_total")
        found.add(_HEALTH["connected"], (), int(self.source.connected))
        for kind in ("websocket", "sse", "ndjson"):
            clients = [client for client in self.hub.subscribers.values() if client.kind == kind]
            found.add(_HEALTH["clients"], (("kind", kind),), len(clients))
        sent, skipped = self.hub.totals()
        found.add(_HEALTH["sent"], (), sent, "_total")
        found.add(_HEALTH["skipped"], (), skipped, "_total")
        found.add(_HEALTH["cut_off"], (), self.hub.cut_off_total, "_total")
        found.add(_HEALTH["connections"], (), len(self.connections))
        for (route, status), count in sorted(self.requests.items()):
            found.add(_HEALTH["requests"], (("route", route), ("status", str(status))), count, "_total")
        times = os.times()
        found.add(_HEALTH["cpu"], (), times.user + times.system, "_total")
        found.add(_HEALTH["start"], (), self.started_ns / 1e9)
        found.add(_HEALTH["memory"], (), resident_bytes())
        return list(found.families.values())


_HEALTH: Mapping[str, tuple[str, str, str, str]] = MappingProxyType(
    {  # (name, kind, help, unit), as FamilySet takes them
        "bus_messages": ("aiperf_api_bus_messages", "counter", "Bus messages taken, by type", ""),
        "bus_errors": ("aiperf_api_bus_errors", "counter", "Bus messages refused, by kind of fault", ""),
        "connected": ("aiperf_api_source_connected", "gauge", "Whether the bus is connected", ""),
        "clients": ("aiperf_api_clients", "gauge", "Streaming clients, by kind", ""),
        "sent": ("aiperf_api_messages_sent", "counter", "Messages sent to streaming clients", ""),
        "skipped": ("aiperf_api_messages_skipped", "counter", "Messages left out for slow clients", ""),
        "cut_off": ("aiperf_api_clients_cut_off", "counter", "Clients cut off because they did not keep up", ""),
        "connections": ("aiperf_api_connections", "gauge", "Open connections of every kind", ""),
        "requests": ("aiperf_api_http_requests", "counter", "HTTP requests answered, by route and status", ""),
        "cpu": ("aiperf_api_process_cpu_seconds", "counter", "CPU time of this server", "seconds"),
        "start": ("aiperf_api_process_start_time_seconds", "gauge", "When this server started", "seconds"),
        "memory": ("aiperf_api_process_resident_memory_bytes", "gauge", "Resident memory of this server", "bytes"),
    }
)


# -- Reading what WebSocket clients say --------------------------------------------------------------------------------


def _read_client_message(message: TextMessage | BinaryMessage) -> dict[str, Any]:
    if isinstance(message, BinaryMessage):
        raise ClientMessageError("send text, not binary")
    try:
        value = json_load(message.text.encode())
    except JSONError as error:
        raise ClientMessageError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ClientMessageError("send a JSON object")
    if not isinstance(value.get("type"), str):
        raise ClientMessageError("type must be a string: subscribe, unsubscribe or ping")
    return value


def _message_types(request: Mapping[str, Any]) -> list[str]:
    types = request.get("message_types")
    if not isinstance(types, list) or not types:
        raise ClientMessageError('message_types must be a list of names, such as ["realtime_metrics"] or ["*"]')
    for name in types:
        if not isinstance(name, str) or not (name == "*" or CLIENT_MESSAGE_TYPE.fullmatch(name)):
            raise ClientMessageError("message_types holds something that is not the name of a message type")
    return types


def _flag(request: Mapping[str, Any], name: str, default: bool) -> bool:
    value = request.get(name, default)
    if not isinstance(value, bool):
        raise ClientMessageError(f"{name} must be true or false")
    return value


def _as_filter(asked: set[str]) -> frozenset[str] | None:
    return None if "*" in asked else frozenset(asked)


def encode_text_frame(message: Message) -> bytes:
    """A message as a WebSocket client gets it."""
    return encode_frame(OP_TEXT, message.payload)


def encode_line(message: Message) -> bytes:
    """A message as NDJSON."""
    return message.payload + b"\n"


# -- The shapes of answers and messages --------------------------------------------------------------------------------
#
# What /openapi.json and /asyncapi.json say, and what the tests hold every answer against.  read_shapes() explains it.

ANSWER_SHAPES = """
Error  what went wrong
  error  string  what it was, and what to do about it
Index  where everything is
  version  string  of this server
  links  Link{}  by the name of the endpoint
Link  an endpoint
  href  string  relative to /api, so that it holds behind a proxy under a path, too
  summary  string  what is there
  media  string[]  media types; the first is what a client gets that does not say
Status  the state of the run, and the source it is heard from
  state  string  waiting, then AIPerf's own states, and at the end complete, cancelled or failed
  phase  string?  name of the phase at hand
  benchmark_id  string?
  profile_id  string?
  error  string?  why it failed
  stale  boolean  a running benchmark has been silent for 10 s
  started_ns  integer?  ns since the epoch
  elapsed_sec  number?  seconds since the first phase began
  source  Source
Source  where messages come from
  kind  string  tcp, ipc, zmq, bind, replay, demo, child or none
  address  string
  backend  string  what speaks ZMQ: pyzmq, builtin, or nothing
  connected  boolean
  messages  integer  good ones so far
  last_message_age_sec  number?  seconds since the last one
Progress  how far the run is; the top-level figures are of the profiling once it has begun, of the warm-up before
  total  integer?  requests; null for a run by duration
  completed  integer  requests that were answered, failed ones included
  errors  integer  requests that failed
  cancelled  integer  requests
  warmup  boolean  the figures are of the warm-up
  start_ns  integer?  ns since the epoch
  elapsed_ns  integer
  percent_complete  number  0 to 100; never goes back in a run
  eta_sec  number?  seconds left at the pace so far
  phases  Phase{}  by name
  results_exported  boolean
  system_state  string?  as AIPerf calls it
Phase+  a phase of the run; what AIPerf sends beyond this is passed on
  phase  string  warmup or profiling
  phase_name  string
  start_ns  integer?  ns since the epoch
  requests_end_ns  integer?  ns since the epoch
  total_expected_requests  integer?
  expected_duration_sec  number?
  requests_sent  integer
  requests_completed  integer
  requests_cancelled  integer
  request_errors  integer
  requests_in_flight  integer
  success_records  integer
  error_records  integer
  complete  boolean
  elapsed_ns  integer
  percent_complete  number
  eta_sec  number?
  requests_per_second  number?
Metrics  the benchmark's metrics
  aiperf_version  string?
  benchmark_id  string?
  model  string?
  endpoint_type  string?
  streaming  boolean?
  concurrency  number?
  request_rate  number?
  final  boolean  these are the final results
  metrics  Row{}  by tag
  telemetry  Row{}  of the GPUs, by tag
Row+  a metric: those of its statistics that there are, in its unit
  header  string  its name for people
  unit  string
  avg~  number
  min~  number
  max~  number
  std~  number
  p1~  number
  p5~  number
  p10~  number
  p25~  number
  p50~  number
  p75~  number
  p90~  number
  p95~  number
  p99~  number
  count~  number
  sum~  number
  current~  number
Workers  the workers
  total_workers  integer
  active_workers  integer  healthy, highly loaded, or with an error just now
  worker_statuses  string{}  by worker
  workers  Worker{}  by worker
  worker_groups  object  by group
Worker  one worker
  status  string  healthy, high_load, error, idle or stale
  startup_state  string?
  task_stats  object  requests: total, completed, failed
  processing_stats  object  records: success_records, error_records
  health  object?  cpu_usage in percent, memory_usage in bytes, ...
  last_update_ns  integer?  ns since the epoch
Config+  the benchmark's configuration, with "***" for secrets
ServerMetrics+  the inference server's own metrics
  endpoint_summaries  object  by host:port
Results  the end of the run
  status  running|complete|cancelled|failed
  results  object?  as AIPerf published them
HistoryOverview  what there is a history of
  start_ns  integer?  ns since the epoch
  interval_sec  number  between two points
  points  integer  of the longest series
  tags  HistoryTag{}
HistoryTag  a metric with a history
  unit  string
  header  string
  group  metrics|telemetry|server|phase
  stats  string[]
HistorySeries  one series
  tag  string
  stat  string
  unit  string
  header  string
  interval_sec  number
  points  number?[][]  [ns since the epoch, value]
HistoryMany  several series
  interval_sec  number
  series  HistorySeries[]
Clients  who is connected
  total  integer
  clients  StreamClient[]
StreamClient  a WebSocket or a stream
  address  string
  kind  websocket|sse|ndjson
  subscriptions  string[]
  connected_ns  integer  ns since the epoch
  sent  integer  messages
  skipped  integer  messages
  waiting_bytes  integer
Docs+  the tables behind the documentation page
  version  string
  routes  object[]
  options  object[]
  limits  object[]
"""

MESSAGE_SHAPES = """
Subscribe+  take messages of these types
  type  =subscribe
  message_types  string[]  names of message types, or "*" for all
  snapshot~  boolean  false: do not begin with the last message of each
Unsubscribe+  take them no more
  type  =unsubscribe
  message_types  string[]
Ping+  ask for a sign of life
  type  =ping
Subscribed  as asked, in order
  type  =subscribed
  message_types  string[]
  unknown~  string[]  those that AIPerf has none of: perhaps a typo
Unsubscribed  as asked, in order
  type  =unsubscribed
  message_types  string[]
Pong  a sign of life
  type  =pong
ClientError  a message that could not be obeyed; the connection stays
  type  =error
  message  string
Skipped  what was left out because this client did not keep up
  type  =skipped
  counts  integer{}  by message type
RealtimeMetrics+  the metrics so far, in display units
  message_type  =realtime_metrics
  metrics  MetricRow[]
RealtimeTelemetryMetrics+  the GPUs
  message_type  =realtime_telemetry_metrics
  metrics  MetricRow[]
MetricRow+  a metric, with its statistics beside
  tag  string
  header~  string?
  unit~  string?
CreditPhaseStart+  a phase begins
  message_type  =credit_phase_start
CreditPhaseProgress+  how far a phase is
  message_type  =credit_phase_progress
CreditPhaseComplete+  a phase has ended
  message_type  =credit_phase_complete
WorkerStatusSummary+  the status of each worker
  message_type  =worker_status_summary
  worker_statuses  string{}
ProcessingStats+  records processed so far
  message_type  =processing_stats
AllRecordsReceived+  the last record has come
  message_type  =all_records_received
BusMessage+  a message of any other type, as the bus has it
  message_type  string
"""

_CLIENT_SAYS = ("Subscribe", "Unsubscribe", "Ping")
_SERVER_ANSWERS = ("Subscribed", "Unsubscribed", "Pong", "ClientError", "Skipped")
_DESCRIPTION = "Watch an AIPerf benchmark over its ZMQ event bus and serve its metrics over HTTP and WebSocket."


def asyncapi(*, secured: bool) -> dict[str, Any]:
    """The messages of /ws and /api/stream as an AsyncAPI 3 document, ready for json_bytes."""
    shapes = read_shapes(MESSAGE_SHAPES)
    bus = [name for name, shape in shapes.items() if "message_type" in shape["properties"]]
    messages = {name: _message(name, shapes[name]["description"]) for name in (*_CLIENT_SAYS, *_SERVER_ANSWERS, *bus)}
    security = {"security": [{"$ref": "#/components/securitySchemes/bearer"}]} if secured else {}
    scheme = {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}} if secured else {}
    stream = ("Skipped", *bus)
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "aiperf-api", "version": __version__, "description": _DESCRIPTION},
        "defaultContentType": "application/json",
        "channels": {
            "websocket": _channel("/ws", "One JSON object a text message, both ways", messages),
            "stream": _channel("/api/stream", "Server-Sent Events or NDJSON: an endless answer to a GET", stream),
        },
        "operations": {
            "ask": {
                "action": "receive",
                **_messages_of("websocket", _CLIENT_SAYS),
                "reply": _messages_of("websocket", _SERVER_ANSWERS),
                **security,
            },
            "send": {"action": "send", **_messages_of("websocket", (*_SERVER_ANSWERS, *bus)), **security},
            "stream": {"action": "send", **_messages_of("stream", stream), **security},
        },
        "components": {"messages": messages, "schemas": shapes, **scheme},
    }


def _message(name: str, summary: str) -> dict[str, Any]:
    return {"name": name, "summary": summary, "payload": {"$ref": f"#/components/schemas/{name}"}}


def _channel(address: str, text: str, names: Iterable[str]) -> dict[str, Any]:
    messages = {name: {"$ref": f"#/components/messages/{name}"} for name in names}
    return {"address": address, "description": text, "messages": messages}


def _messages_of(channel: str, names: Iterable[str]) -> dict[str, Any]:
    messages = [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in names]
    return {"channel": {"$ref": f"#/channels/{channel}"}, "messages": messages}


# -- The endpoints -----------------------------------------------------------------------------------------------------


def _etag(body: bytes) -> tuple[str, str]:
    """Weak, because the same text may go out compressed (RFC 9110 section 8.8.1)."""
    return ("ETag", f'W/"{hashlib.blake2b(body, digest_size=8).hexdigest()}"')


def _json(request: Request, value: JSONValue) -> Response:
    """A JSON answer, indented with ?pretty; one that is worth it can be asked for again by its ETag."""
    pretty = request.arg("pretty") is not None
    body = json_bytes(value, pretty=pretty) + (b"\n" if pretty else b"")
    if len(body) < HTTP_GZIP_BYTES_MIN:
        return Response(200, body)
    return Response(200, body, headers=(_etag(body), ("Cache-Control", "no-cache")))


def _plain_text(text: str, status: int = 200, headers: HeaderList = ()) -> Response:
    return Response(status, text.encode(), "text/plain; charset=utf-8", headers)


def _get_documentation(service: APIService, _: Connection, request: Request) -> Response:
    if service.static:
        return service.file("index.html")
    paths = "".join(f"  {route.path:20} {route.summary}\n" for route in ROUTES if route.path != STATIC_ROUTE)
    return _plain_text(f"aiperf-api {__version__}\n\n{PAGES_MISSING}\n\n{paths}")


def _get_dashboard(service: APIService, _: Connection, request: Request) -> Response:
    return service.file("dashboard.html")


def _get_static(service: APIService, _: Connection, request: Request) -> Response:
    if request.path == FAVICON_PATH:
        return service.file("favicon.svg") if "favicon.svg" in service.static else Response(204)
    return service.file(request.path[len("/static/") :])


def _get_metrics_text(service: APIService, _: Connection, request: Request) -> Response:
    return service.exposition(service.exposition_format(request.headers.get("accept")))


def _get_metrics(service: APIService, _: Connection, request: Request) -> Response:
    return _json(request, service.state.metrics())


def _get_status(service: APIService, _: Connection, request: Request) -> Response:
    return _json(request, service.status())


def _get_progress(service: APIService, _: Connection, request: Request) -> Response:
    return _json(request, service.state.progress(service.now_ns()))


def _get_workers(service: APIService, _: Connection, request: Request) -> Response:
    return _json(request, service.state.workers())


def _get_config(service: APIService, _: Connection, request: Request) -> Response:
    return _json(request, service.state.config_answer())


def _get_server_metrics(service: APIService, _: Connection, request: Request) -> Response:
    return _json(request, service.state.server_metrics())


def _get_results(service: APIService, _: Connection, request: Request) -> Response:
    return _json(request, service.state.results())


def _split_args(request: Request, name: str) -> list[str]:
    """Values of an argument that may come several times, or once with commas."""
    return [item for value in request.args(name) for item in value.split(",") if item]


def _get_history(service: APIService, _: Connection, request: Request) -> Response:
    since = request.arg("since")
    if since is not None and not re.fullmatch("[0-9]{1,19}", since):
        raise HTTPError(400, "since must be a time in ns since the epoch")
    answer = service.state.history(
        _split_tags(request), _split_args(request, "stat"), None if since is None else int(since)
    )
    if answer is None:
        raise HTTPError(404, "no history of that; /api/history lists the tags and their statistics")
    return _json(request, answer)


def _split_tags(request: Request) -> list[str]:
    """Like _split_args, but a tag of a server metric has commas of its own, within braces."""
    return [tag for value in request.args("tag") for tag in re.findall(r"(?:[^,{]|\{[^}]*\})+", value)]


def _get_clients(service: APIService, _: Connection, request: Request) -> Response:
    clients = [
        {
            "address": client.address,
            "kind": client.kind,
            "subscriptions": sorted(client.asked),
            "connected_ns": client.connected_ns,
            "sent": client.sent,
            "skipped": client.skipped,
            "waiting_bytes": client.outstanding,
        }
        for client in service.hub.subscribers.values()
    ]
    return _json(request, {"total": len(clients), "clients": clients})


def _get_websocket(service: APIService, connection: Connection, request: Request) -> None:
    host = request.headers.get("host")
    check_origin(
        request.headers.get("origin"), host=host, allowed=frozenset(o.lower() for o in service.settings.cors_origins)
    )
    key = check_upgrade(request)
    service.check_room()
    connection.open_websocket(key, choose_subprotocol(request))
    service.add_client(connection, "websocket", encode_text_frame)


def _get_stream(service: APIService, connection: Connection, request: Request) -> Response | None:
    wanted = _stream_format(request)
    asked = set(_split_args(request, "types")) or {"*"}
    if request.arg("snapshot", "1") not in ("0", "1"):
        raise HTTPError(400, "snapshot must be 0 or 1")
    if len(asked) > CLIENT_TYPES_MAX or not all(name == "*" or CLIENT_MESSAGE_TYPE.fullmatch(name) for name in asked):
        raise HTTPError(400, "types must be names of message types, separated by commas")
    head = Response(200, None, wanted, (("X-Accel-Buffering", "no"),))
    if request.method == "HEAD":
        return head
    service.check_room()
    extra = service.headers_for(request)
    connection.open_stream(head.encode(date=service.date, extra=extra))
    is_sse = wanted == SSE
    client = service.add_client(
        connection, "sse" if is_sse else "ndjson", service.encode_event if is_sse else encode_line
    )
    client.asked = asked
    _begin_stream(service, connection, client, request)
    return None


def _stream_format(request: Request) -> str:
    named = request.arg("format")
    if named not in (None, "sse", "ndjson"):
        raise HTTPError(400, "format must be sse or ndjson")
    if named is None:
        return accepts(request.headers.get("accept"), (SSE, NDJSON)) or SSE
    return NDJSON if named == "ndjson" else SSE


def _begin_stream(service: APIService, connection: Connection, client: Subscriber, request: Request) -> None:
    """What a stream begins with: what it missed since `Last-Event-ID`, else the present state."""
    service.hub.remember = True
    types = _as_filter(client.asked)
    last_id = request.headers.get("last-event-id") or request.arg("last_event_id")
    missed = service.messages_after(last_id, types) if last_id else None
    service.hub.subscribe(connection.number, types)
    if client.kind == "sse":
        client.reply(b"retry: %d\n\n" % STREAM_RETRY_MS, time.monotonic())
    if missed is not None:
        service.send_past(client, missed)
    elif request.arg("snapshot") != "0":
        service.send_snapshot(client, types)


def _get_docs(service: APIService, _: Connection, request: Request) -> Response:
    return _json(request, service.documentation())


def _get_openapi(service: APIService, _: Connection, request: Request) -> Response:
    info = {"title": "aiperf-api", "version": __version__, "description": _DESCRIPTION}
    secured = service.settings.token is not None
    return _json(request, service.router.openapi(info, read_shapes(ANSWER_SHAPES), secured=secured))


def _get_asyncapi(service: APIService, _: Connection, request: Request) -> Response:
    return _json(request, asyncapi(secured=service.settings.token is not None))


def _get_index(service: APIService, _: Connection, request: Request) -> Response:
    links = {
        route.name: {"href": _from_api(route.path), "summary": route.summary, "media": list(route.media_types)}
        for route in service.router.routes
        if "{" not in route.path
    }
    return _json(request, {"version": __version__, "links": links})


def _from_api(path: str) -> str:
    """A path of ours as a reference relative to /api (RFC 3986 section 4.2)."""
    return path[1:] or "./"


def _get_health(_: APIService, __: Connection, request: Request) -> Response:
    return _plain_text("ok\n")


def _get_ready(service: APIService, _: Connection, request: Request) -> Response:
    if service.source.connected:
        return _plain_text("ok\n")
    text = f"not connected to the bus at {printable(service.source.address)}\n"
    return _plain_text(text, 503, (("Retry-After", "2"),))


SSE, NDJSON = "text/event-stream", "application/x-ndjson"
_HTML = ("text/html",)
_PRETTY = Param("pretty", "indent the answer, for people; it needs no value")
_TAG = Param("tag", "a metric's tag; repeatable, or separated by commas", "request_latency")
_STAT = Param("stat", "a statistic of it, such as avg, p50 or p99; repeatable", "p99")
_SINCE = Param("since", "only points later than this time, in ns since the epoch", pattern="^[0-9]{1,19}$")
_TYPES = Param("types", "message types, separated by commas; all without it", "realtime_metrics,worker_status_summary")
_FORMAT = Param("format", "sse or ndjson; otherwise the Accept header says", "ndjson", words=("sse", "ndjson"))
_SNAPSHOT = Param("snapshot", "0: begin with the next message instead of the present state", words=("0", "1"))
_LAST_ID = Param("last_event_id", "like the header Last-Event-ID: go on behind this event", pattern="^[^\\x00]*$")
_FILE = Param("file", "its path under static/", "favicon.svg", required=True, place="path")

ROUTES: tuple[Route, ...] = (
    Route(
        "/",
        "documentation",
        "This documentation, with lines to copy and a live try-out",
        _get_documentation,
        media_types=_HTML,
        errors=(404,),
    ),
    Route("/dashboard", "dashboard", "The run, live", _get_dashboard, media_types=_HTML, errors=(404,)),
    Route(
        "/metrics",
        "metrics_text",
        "Everything for Prometheus: text 0.0.4, or OpenMetrics 1.0.0 when asked for",
        _get_metrics_text,
        media_types=("text/plain", "application/openmetrics-text"),
    ),
    Route(
        "/api/metrics",
        "metrics",
        "The benchmark's metrics: the latest, at the end the final ones",
        _get_metrics,
        shape="Metrics",
        params=(_PRETTY,),
    ),
    Route(
        "/api/status",
        "status",
        "State and phase of the run, and the source it is heard from",
        _get_status,
        shape="Status",
        params=(_PRETTY,),
    ),
    Route(
        "/api/progress", "progress", "How far the run is, by phase", _get_progress, shape="Progress", params=(_PRETTY,)
    ),
    Route(
        "/api/workers",
        "workers",
        "The workers: status, tasks, CPU and memory",
        _get_workers,
        shape="Workers",
        params=(_PRETTY,),
    ),
    Route(
        "/api/config",
        "config",
        "The benchmark's configuration, secrets redacted",
        _get_config,
        shape="Config",
        params=(_PRETTY,),
    ),
    Route(
        "/api/server-metrics",
        "server_metrics",
        "The latest metrics of the inference server",
        _get_server_metrics,
        shape="ServerMetrics",
        params=(_PRETTY,),
    ),
    Route(
        "/api/results",
        "results",
        "The final results, once there are some",
        _get_results,
        shape="Results",
        params=(_PRETTY,),
    ),
    Route(
        "/api/history",
        "history",
        "Time series since the run began; without a tag, what there is",
        _get_history,
        params=(_TAG, _STAT, _SINCE, _PRETTY),
        shape="HistoryOverview,HistorySeries,HistoryMany",
        errors=(404,),
    ),
    Route(
        "/api/stream",
        "stream",
        "Bus messages as Server-Sent Events or NDJSON, for curl -N",
        _get_stream,
        params=(_TYPES, _FORMAT, _SNAPSHOT, _LAST_ID),
        media_types=(SSE, NDJSON),
    ),
    Route(
        "/api/clients",
        "clients",
        "Who is connected, what they take, and what they missed",
        _get_clients,
        shape="Clients",
        params=(_PRETTY,),
    ),
    Route("/api/docs", "docs", "The tables behind the documentation page", _get_docs, shape="Docs", params=(_PRETTY,)),
    Route("/api", "index", "Where everything is", _get_index, params=(_PRETTY,), shape="Index"),
    Route("/openapi.json", "openapi", "This API as OpenAPI 3.1", _get_openapi, params=(_PRETTY,)),
    Route(
        "/asyncapi.json",
        "asyncapi",
        "The messages of /ws and /api/stream as AsyncAPI 3",
        _get_asyncapi,
        params=(_PRETTY,),
    ),
    Route(
        "/ws",
        "websocket",
        "Bus messages over a WebSocket",
        _get_websocket,
        methods=("GET",),
        errors=(403, 426),
        websocket=True,
    ),
    Route("/health", "health", "The server answers", _get_health, media_types=("text/plain",), needs_token=False),
    Route("/healthz", "healthz", "The server answers", _get_health, media_types=("text/plain",), needs_token=False),
    Route(
        "/readyz",
        "readyz",
        "The source is connected; 503 until it is",
        _get_ready,
        media_types=("text/plain",),
        needs_token=False,
    ),
    Route(
        STATIC_ROUTE,
        "static",
        "The files of the pages",
        _get_static,
        params=(_FILE,),
        media_types=tuple(dict.fromkeys(kind.partition(";")[0] for kind in _CONTENT_TYPES.values())),
        errors=(404,),
    ),
)


# == 15 == Command line ================================================================================================


class Arguments(NamedTuple):
    """A command line that makes sense, with the environment behind it."""

    settings: Settings
    source: Source
    backend: str  # what speaks ZMQ: auto, pyzmq or builtin
    command: tuple[str, ...]  # the benchmark behind `--`, empty for none
    config: Mapping[str, Any] | None
    record: str | None
    log_level: str
    log_format: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


_EPILOG = (
    "Everything after -- is run as the benchmark: aiperf-api --api-port 9090 -- aiperf profile --model ...  "
    "To ask a server: aiperf-api get | watch | top, each with --help."
)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="aiperf-api", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False, add_help=False)
    for option in OPTIONS:
        text = option.help + (f" (default: {option.default})" if option.default else "") + f" [{option.env}]"
        if not option.metavar:
            parser.add_argument(option.flag, action="store_const", const="true", help=text)
        elif option.flag in _REPEATABLE:
            parser.add_argument(option.flag, metavar=option.metavar, action="append", help=text)
        else:
            parser.add_argument(option.flag, metavar=option.metavar, help=text)
    parser.add_argument("--version", action="version", version=f"aiperf-api {__version__}")
    parser.add_argument("--help", "-h", action="help", help="show this and exit")
    return parser


_REPEATABLE = frozenset(("--allow-host", "--cors-origin"))
_SOURCES = ("--zmq-host", "--zmq-ipc-path", "--zmq-address", "--zmq-bind", "--replay", "--demo")


class _Given:
    """The values of the options: the flag's, else its variable's, else None."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        self._flags = vars(_parser().parse_args(argv))
        self._environ = environ

    def from_flag(self, flag: str) -> bool:
        return self._flags[flag[2:].replace("-", "_")] is not None

    def text(self, flag: str) -> str | None:
        value = self._flags[flag[2:].replace("-", "_")]
        if value is None:
            value = self._environ.get(_ENV_OF[flag]) or None
        return value  # type: ignore[no-any-return]

    def switch(self, flag: str) -> bool:
        value = self.text(flag)
        if value is None or value.lower() in ("0", "false", "no", "off"):
            return False
        if value.lower() in ("1", "true", "yes", "on"):
            return True
        raise UsageError(f"{_ENV_OF[flag]}: true or false, not {printable(value)}")

    def texts(self, flag: str) -> tuple[str, ...]:
        """A repeatable option; its variable is a list with commas, or (AIPerf's way) a JSON list."""
        value = self._flags[flag[2:].replace("-", "_")]
        if value is not None:
            return tuple(value)
        text = self._environ.get(_ENV_OF[flag], "").strip()
        if text.startswith("["):
            try:
                items = json_load(text.encode())
            except JSONError as error:
                raise UsageError(f"{_ENV_OF[flag]}: {error}") from None
            return tuple(str(item) for item in items)
        return tuple(item.strip() for item in text.split(",") if item.strip())

    def number(self, flag: str, least: float, most: float, *, whole: bool) -> float | None:
        text = self.text(flag)
        if text is None:
            return None
        pattern = "[0-9]{1,9}" if whole else r"[0-9]{1,9}(\.[0-9]{1,9})?"
        if not re.fullmatch(pattern, text) or not least <= float(text) <= most:
            kind = "a whole number" if whole else "a number"
            raise UsageError(f"{flag}: {kind} from {least:g} to {most:g}, not {printable(text)}")
        return int(text) if whole else float(text)

    def choice(self, flag: str, default: str, choices: Sequence[str]) -> str:
        value = (self.text(flag) or default).lower()
        if value not in choices:
            raise UsageError(f"{flag}: one of {', '.join(choices)}, not {printable(value)}")
        return value


_ENV_OF: Mapping[str, str] = MappingProxyType({option.flag: option.env for option in OPTIONS})


def parse_arguments(argv: Sequence[str], environ: Mapping[str, str]) -> Arguments:
    """Make sense of a command line.

    Raises:
        UsageError: what is wrong with it, in one line.
    """
    own, command = _split_command(argv)
    given = _Given(own, environ)
    port = given.number("--api-port", 0, 65535, whole=True)
    unix_path = given.text("--api-unix")
    if port is None and given.from_flag("--api-host"):
        raise UsageError("--api-host needs --api-port")
    if port is None and unix_path is None:
        raise UsageError("nothing to serve on: give --api-port PORT (or --api-unix PATH); --help lists everything")
    _check_record(given)
    most = given.number("--ws-max-connections", 0, 1_000_000, whole=True)
    settings = Settings(
        host=(given.text("--api-host") or "127.0.0.1").strip("[]"),
        port=None if port is None else int(port),
        unix_path=unix_path,
        token=given.text("--api-token"),
        allow_hosts=given.texts("--allow-host"),
        cors_origins=given.texts("--cors-origin"),
        tls_cert=_existing_file(given, "--tls-cert"),
        tls_key=_existing_file(given, "--tls-key"),
        ws_max_connections=WS_CONNECTIONS_MAX if most is None else int(most),
        linger_sec=given.number("--linger", 0, 1e9, whole=False),
        secrets=tuple(secrets_from_argv(command, environ)),
    )
    if settings.tls_key and not settings.tls_cert:
        raise UsageError("--tls-key needs --tls-cert")
    backend = given.choice("--zmq-backend", "auto", ("auto", "pyzmq", "builtin"))
    return Arguments(
        settings,
        _no_source(given) if command else _choose_source(given, backend),
        backend,
        command,
        _read_config(given.text("--config")),
        given.text("--record"),
        given.choice("--log-level", "info", ("debug", "info", "warning", "error")),
        given.choice("--log-format", "text", ("text", "json")),
    )


def _split_command(argv: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
    """(our own words, those of the benchmark behind the first `--`)."""
    if "--" not in argv:
        return argv, ()
    place = list(argv).index("--")
    if not argv[place + 1 :]:
        raise UsageError("a command belongs behind --")
    return argv[:place], tuple(argv[place + 1 :])


def _check_record(given: _Given) -> None:
    """A recording is written from its beginning: not over the one that is being played."""
    record, played = given.text("--record"), given.text("--replay")
    if record and played and os.path.exists(record) and os.path.exists(played) and os.path.samefile(record, played):
        raise UsageError(f"--record {printable(record)}: that is the recording to be replayed")


def _no_source(given: _Given) -> Source:
    """A command brings its own bus; a source that a variable names is for runs without one."""
    flags = [flag for flag in _SOURCES if given.from_flag(flag)]
    if flags:
        raise UsageError(f"{flags[0]} and a command: only one source at a time")
    return Source("child")


def _existing_file(given: _Given, flag: str) -> str | None:
    path = given.text(flag)
    if path is not None and not os.path.isfile(path):
        raise UsageError(f"{flag} {printable(path)}: no such file")
    return path


def _choose_source(given: _Given, backend: str) -> Source:
    """The one source that is asked for: a flag beats variables, and two of the same standing are a mistake."""
    flags = [flag for flag in _SOURCES if given.from_flag(flag)]
    chosen = flags or [flag for flag in _SOURCES if (given.switch(flag) if flag == "--demo" else given.text(flag))]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)}: only one source at a time")
    flag = chosen[0] if chosen else "--zmq-host"
    value = given.text(flag) or "127.0.0.1"
    if flag in ("--replay", "--demo"):
        return _replay_source(given, flag, value)
    if flag == "--zmq-host":
        return bus_source(backend_address(value.strip("[]")), "tcp", backend=backend)
    if flag == "--zmq-ipc-path":
        return bus_source(ipc_address(value), "ipc", backend=backend)
    return bus_source(value, "bind" if flag == "--zmq-bind" else "zmq", bind=flag == "--zmq-bind", backend=backend)


def _replay_source(given: _Given, flag: str, path: str) -> Source:
    speed = given.number("--replay-speed", 0, 1e6, whole=False)
    speed = 1.0 if speed is None else speed
    if flag == "--replay":
        open_recording(path).close()  # says now what is wrong with it
        return ReplaySource(path, speed=speed, loop=given.switch("--replay-loop"))
    data = read_static_files().get(DEMO_RECORDING)
    if data is None:
        raise UsageError("--demo: the recording is not here; copy the folder static/ beside aiperf_api.py")
    return ReplaySource(DEMO_RECORDING, "demo", speed=speed, loop=True, data=data)


def _read_config(path: str | None) -> Mapping[str, Any] | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            value = json_load(file.read())
    except (OSError, JSONError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise UsageError(f"--config {printable(path)}: {reason}") from None
    if not isinstance(value, dict):
        raise UsageError(f"--config {printable(path)}: not a JSON object")
    return value


def _json_line(time_sec: float, level: str, message: str, **more: str) -> str:
    return json_bytes({"time": time_sec, "level": level, "message": message, **more}).decode()


class _JSONFormatter(logging.Formatter):
    """A log line as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        more = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        return _json_line(record.created, record.levelname.lower(), record.getMessage(), **more)


def _announce(lines: Iterable[str], log_format: str) -> None:
    """Say where the server is, at any log level and in the format of the log."""
    for line in lines:
        print(
            line if log_format == "text" else _json_line(time.time(), "info", line.strip()), file=sys.stderr, flush=True
        )


class _LogHandler(logging.StreamHandler):  # type: ignore[type-arg]  # its parameter is not there on 3.9 and 3.10
    """The log on stderr, which can be held back while a child has the same terminal for its own display."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._held: collections.deque[logging.LogRecord] | None = None  # None: nothing is held back
        self._left_out = 0  # records that were held back for too long

    def hold_back(self) -> None:
        """Keep back what comes from now on, if stderr is a terminal: a line would tear what is drawn there."""
        if sys.stderr.isatty():
            self._held = collections.deque(maxlen=LOG_LINES_HELD_MAX)

    def emit(self, record: logging.LogRecord) -> None:
        if self._held is None:
            super().emit(record)
            return
        self._left_out += len(self._held) == LOG_LINES_HELD_MAX
        self._held.append(record)

    def write_held(self) -> None:
        """Write what was held back."""
        held, self._held = self._held or (), None
        for record in held:
            super().emit(record)
        if self._left_out:
            log.warning("%d older lines of this log were left out", self._left_out)


def _set_up_log(arguments: Arguments) -> _LogHandler:
    handler = _LogHandler()
    if arguments.log_format == "json":
        handler.setFormatter(_JSONFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(arguments.log_level.upper())
    return handler


def start_lines(service: APIService) -> list[str]:
    """What somebody who starts the server wants to know first."""
    source = service.source
    what = {
        "demo": f"demo: a replay of a recorded run ({source.address}), in a loop",
        "replay": f"replay of {source.address}",
        "bind": f"publishers connect to {source.address}",
        "none": "publish()",
        "child": f"the benchmark, {source.address}" if source.address else "none: the benchmark's bus is not known",
    }.get(source.kind, f"the AIPerf event bus at {source.address}")
    lines = [f"aiperf-api {__version__} serves {service.url}"]
    if service.settings.port is not None:
        lines.append(f"  dashboard  {service.url}/dashboard")
        if service.settings.unix_path is not None:
            lines.append(f"  and        unix:{printable(service.settings.unix_path)}")
    lines.append(f"  source     {what}")
    if service.settings.port is not None and not _is_loopback(service.settings.host) and not service.settings.token:
        lines.append("  warning    open to the network without a token; see --api-token")
    return lines


class _Child:
    """The benchmark behind `--`: how it is to be run, its process, and the signals that come meanwhile."""

    def __init__(self, plan: ChildPlan, command: Sequence[str], version: str) -> None:
        self.plan = plan
        self.process = ChildProcess(plan.argv, plan.environ)
        self.config = config_from_argv(command)  # what the command line tells
        if version:
            self.config["aiperf_version"] = version
        self.started_sec = time.time()
        self.signals: list[int] = []  # those that have come, also after its end
        self.ended = asyncio.Event()  # the process is gone
        self.hurried = asyncio.Event()  # a second signal, or one after the end: no lingering

    def source(self, backend: str) -> Source:
        if not self.plan.address:
            source = Source("child")
            source.connected = False
            return source
        return bus_source(self.plan.address, "child", bind=self.plan.bind, backend=backend)

    def on_signal(self, number: int) -> None:
        """The child's first; it is on us to go when it has gone."""
        self.signals.append(number)
        if not self.ended.is_set():
            self.process.pass_on(number)
        if len(self.signals) > 1 or self.ended.is_set() or number != signal.SIGINT:
            if self.hurried.is_set() and self.ended.is_set():
                os._exit(128 + number)
            self.hurried.set()

    async def run(self, service: APIService) -> int:
        """Run it to its end, and tell the service; returns the exit code."""
        if self.signals:  # already: then it need not begin
            self.ended.set()
            return 128 + self.signals[0]
        await self.process.start()
        code = await self.process.wait()
        self.ended.set()
        await service.settle()
        directory = self.plan.artifact_dir or service.state.artifact_dir()
        config = load_artifact_config(directory, self.started_sec) if directory else {}
        if config:
            told: dict[str, Any] = {
                key: self.config[key] for key in ("command", "aiperf_version") if key in self.config
            }
            service.configure({**config, **told}, "command")
        if code or service.bus.messages:  # a command that ended well and never reported has not failed
            service.end_child(self.process.exit_text if code else "")
        return code


async def _serve_command(arguments: Arguments, environ: Mapping[str, str], handler: _LogHandler) -> int:
    """Serve, run the benchmark behind `--`, go on serving for a while; returns the benchmark's exit code."""
    check_command(arguments.command, environ)
    with ipc_directory() as directory:
        command = arguments.command
        version = aiperf_version(aiperf_word(command), environ.get("PATH"))
        child = _Child(child_plan(command, environ, directory, version=version), command, version)
        service = APIService(
            source=child.source(arguments.backend),
            config=arguments.config,
            record=arguments.record,
            settings=arguments.settings,
        )
        service.configure(child.config, "command")
        _watch_signals(child.on_signal)
        await service.start()
        try:
            notes = (f"  note       {note}" for note in child.plan.notes)
            _announce([*start_lines(service), *notes], arguments.log_format)
            handler.hold_back()
            try:
                code = await child.run(service)
            finally:
                handler.write_held()
            await _linger(service, child)
        finally:
            await service.stop()
    return code


async def _linger(service: APIService, child: _Child) -> None:
    seconds = LINGER_SEC if service.settings.linger_sec is None else service.settings.linger_sec
    if seconds and child.process.exit_text and not child.hurried.is_set():
        log.info("the benchmark ended (%s); serving its last state for %g s", child.process.exit_text, seconds)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(child.hurried.wait(), seconds)


async def _serve(arguments: Arguments) -> int:
    service = APIService(
        source=arguments.source, config=arguments.config, record=arguments.record, settings=arguments.settings
    )
    stop = asyncio.Event()

    def ask(number: int) -> None:  # the first signal asks for the end, a second one forces it
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    _watch_signals(ask)
    await service.start()
    _announce(start_lines(service), arguments.log_format)
    ends = {asyncio.ensure_future(stop.wait()), asyncio.ensure_future(service.wait_lingered())}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    await service.stop()
    return 0


def _watch_signals(ask: Callable[[int], None]) -> None:
    """Have SIGINT, SIGTERM and SIGHUP (unless it is ignored, as under nohup) handled within the loop."""
    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    for number in numbers:
        try:
            loop.add_signal_handler(number, ask, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda n, _: loop.call_soon_threadsafe(ask, n))


# -- The client --------------------------------------------------------------------------------------------------------
#
# `aiperf-api get | watch | top`, for machines without curl or websocat.  `watch` reads /api/stream rather than /ws: its
# events carry ids, so that a reader that was cut off goes on behind the last one it saw and misses none.
#
# What a server says goes to a terminal: control characters of strings on the bus must not drive it.

CLIENT_COMMANDS = ("get", "watch", "top")
_CLIENT_OPTIONS = (
    ("--url", "URL", "AIPERF_API_URL", "the server: http://HOST:PORT, https://..., or unix:PATH"),
    ("--token", "TOKEN", "AIPERF_API_TOKEN", "the token of the server; better given in the environment"),
)
_CLIENT_URL = "http://127.0.0.1:9090"
# What can drive a terminal or turn its text around, besides what JSON escapes anyway.
_TERMINAL_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_ALTERNATE_SCREEN, _NORMAL_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # and without a cursor
_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def _terminal_json(text: str) -> str:
    """JSON for a terminal: the same document, with what could drive a terminal escaped (it stands in strings only)."""
    return "\n".join(_TERMINAL_CONTROLS.sub(lambda m: f"\\u{ord(m[0]):04x}", line) for line in text.split("\n"))


def _terminal_text(value: JSONValue, limit: int = 80) -> str:
    """A value in a table or a headline: one line, nothing in it that could drive a terminal."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    text = value if isinstance(value, str) else json_bytes(value).decode()
    shown = _TERMINAL_CONTROLS.sub("?", text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


class _Remote:
    """The server that a client command asks; one connection a request."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url  # as it was given
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._unix_path = url[len("unix:") :] if url.startswith("unix:") else None
        try:
            parts = urlsplit("http://localhost" if self._unix_path else url if "://" in url else f"http://{url}")
            self._scheme, self._host, self._port = parts.scheme, parts.hostname or "", parts.port
        except ValueError:
            raise UsageError(f"--url {printable(url)}: not a URL") from None
        self._prefix = parts.path.rstrip("/")
        if self._scheme not in ("http", "https") or not self._host or _TERMINAL_CONTROLS.search(url) or " " in url:
            raise UsageError(f"--url {printable(url)}: one such as {_CLIENT_URL}, or unix:PATH")

    def _fault(self, error: Exception) -> AskError:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        hint = "; is the server running there? See --url" if isinstance(error, ConnectionRefusedError) else ""
        return AskError(f"{printable(self.url)}: {printable(reason)}{hint}")

    @contextlib.contextmanager
    def open(self, path: str, timeout_sec: float, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """A GET, and its answer to be read within the block.

        Raises:
            AskError: no answer, one that says no, or one that breaks off while it is read.
        """
        import http.client  # only a client needs it

        kind = http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=timeout_sec)
        sent = {**self._headers, "Connection": "close", **{k.replace("_", "-"): v for k, v in headers.items()}}
        try:
            if self._unix_path is not None:
                connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.sock.settimeout(timeout_sec)
                connection.sock.connect(self._unix_path)
            connection.request("GET", self._prefix + path, headers=sent)
            with connection.getresponse() as response:
                if response.status != 200:
                    reason = _error_of(response.read(CLIENT_ERROR_BYTES_MAX))
                    raise AskError(f"{printable(self.url + path)}: {response.status} {reason}", response.status)
                yield response
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._fault(error) from None
        finally:
            connection.close()

    def get(self, path: str) -> JSONValue:
        """The JSON value at a path; raises AskError."""
        with self.open(path, CLIENT_TIMEOUT_SEC) as response:
            body = response.read()
        try:
            return json_load(body)
        except JSONError:
            raise AskError(f"{printable(self.url + path)}: the answer is not JSON") from None

    def events(self, path: str, last_id: str) -> Iterator[tuple[str, str]]:
        """("", "") as the stream opens, then (id, data) of each event behind that of `last_id`; raises AskError."""
        resume = {"Last_Event_ID": last_id} if last_id else {}
        with self.open(path, CLIENT_SILENCE_SEC, Accept=SSE, **resume) as response:
            fields: dict[str, str] = {}
            yield "", ""
            for line in iter(response.readline, b""):
                name, _, value = line.decode("utf-8", "replace").rstrip("\r\n").partition(": ")
                if name:
                    fields[name] = value
                elif "data" in fields:
                    yield fields.get("id", ""), fields["data"]
                    fields = {}


def _error_of(body: bytes) -> str:
    """What an error answer says, whoever gave it."""
    try:
        return printable(str(json_load(body)["error"]))
    except (JSONError, KeyError, TypeError):
        return printable(body.strip())


class _ClientParser(_Parser):
    """The command line of one client command."""

    def __init__(self, command: str, description: str, environ: Mapping[str, str]) -> None:
        super().__init__(prog=f"aiperf-api {command}", description=description, allow_abbrev=False)
        for flag, metavar, variable, text in _CLIENT_OPTIONS:
            self.add_argument(flag, metavar=metavar, default=environ.get(variable) or None, help=f"{text} [{variable}]")


def run_client(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """`get`, `watch` or `top`; the exit code.

    Raises:
        UsageError: the command line is wrong.
        AskError: the server cannot be reached, or says no.
    """
    command, *words = argv
    run = {"get": _run_get, "watch": _run_watch, "top": _run_top}[command]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # JSON is UTF-8, whatever the locale
    try:
        return run(words, environ)
    except KeyboardInterrupt:  # how one leaves them
        return 0
    except BrokenPipeError:  # `| head`: whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there at the exit
        return 0


def _parse_client(parser: _ClientParser, words: Sequence[str]) -> tuple[argparse.Namespace, _Remote]:
    given = parser.parse_args(words)
    hide_in_process_title(title_secrets(words))
    return given, _Remote(given.url or _CLIENT_URL, given.token)


# get


def _answers() -> dict[str, str]:
    """The paths that `get` knows, by their last part."""
    json_routes = (route for route in ROUTES if "application/json" in route.media_types and not route.websocket)
    return {route.path.rpartition("/")[2]: route.path for route in json_routes if route.shape}


def _run_get(words: Sequence[str], environ: Mapping[str, str]) -> int:
    names = _answers()
    parser = _ClientParser("get", "Print an answer of the server as JSON, or as a table.", environ)
    parser.add_argument("name", metavar="NAME", help=f"one of: {', '.join(sorted(names))}")
    parser.add_argument(
        "arguments", metavar="KEY=VALUE", nargs="*", default=[], help="arguments, such as tag=request_latency"
    )
    parser.add_argument("--table", action="store_true", help="columns for people instead of JSON")
    given, remote = _parse_client(parser, words)
    if given.name not in names:
        near = difflib.get_close_matches(given.name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names))}"
        raise UsageError(f"get {printable(given.name)}: {hint}")
    pairs = [argument.partition("=") for argument in given.arguments]
    if not all(equals for _, equals, _ in pairs):
        raise UsageError("get: arguments are written KEY=VALUE")
    query = urlencode([(key, value) for key, _, value in pairs])
    value = remote.get(names[given.name] + (f"?{query}" if query else ""))
    shown = "\n".join(table_lines(value)) if given.table else _terminal_json(json_bytes(value, pretty=True).decode())
    print(shown, flush=True)
    return 0


def table_lines(value: JSONValue) -> list[str]:
    """Any answer in columns: first what is single, by name, then each map or list of objects as a table of its own."""
    if isinstance(value, list):
        return _rows_table({str(number): row for number, row in enumerate(value)})
    single, tables = _sorted_out(value)
    lines = _columns([[name, _terminal_text(item)] for name, item in single.items()])
    for name, rows in tables.items():
        lines += ["", f"{_terminal_text(name)}:", *_rows_table(rows)]
    return lines


def _sorted_out(value: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The single values of an object by their dotted names, and its maps and lists of objects."""
    single: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    for key, item in value.items():
        name = prefix + key
        if isinstance(item, dict) and item and not all(isinstance(row, dict) for row in item.values()):
            below, further = _sorted_out(item, f"{name}.")
            single.update(below)
            tables.update(further)
        elif isinstance(item, dict) and item:
            tables[name] = item
        elif isinstance(item, list) and item and isinstance(item[0], (dict, list)):
            tables[name] = {str(number): row for number, row in enumerate(item)}
        elif item not in ({}, []):
            single[_terminal_text(name)] = item
    return single, tables


def _rows_table(rows: Mapping[str, Any]) -> list[str]:
    flat = {name: _sorted_out(row)[0] if isinstance(row, dict) else dict(_numbered(row)) for name, row in rows.items()}
    heads = list(dict.fromkeys(key for row in flat.values() for key in row))
    cells = [
        [_terminal_text(name), *(_terminal_text(row.get(head, "")) for head in heads)] for name, row in flat.items()
    ]
    return _columns([["", *heads], *cells])


def _numbered(row: JSONValue) -> Iterator[tuple[str, Any]]:
    return ((str(number), item) for number, item in enumerate(row if isinstance(row, list) else [row]))


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns two spaces apart; a column of numbers under a head stands to the right."""
    columns = []
    for column in zip(*rows):
        width = max(map(len, column))
        is_numeric = any(map(_looks_numeric, column)) and all(
            _looks_numeric(cell) or cell in "-" for cell in column[1:]
        )
        columns.append([cell.rjust(width) if is_numeric else cell.ljust(width) for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns)]


def _looks_numeric(cell: str) -> bool:
    return cell[:1].isdigit() or (cell[:1] == "-" and cell[1:2].isdigit())


# watch


def _run_watch(words: Sequence[str], environ: Mapping[str, str]) -> int:
    parser = _ClientParser("watch", "Print messages of the bus, a line each, for as long as there are some.", environ)
    parser.add_argument(
        "types", metavar="TYPE", nargs="*", default=[], help="message types, such as realtime_metrics; all without"
    )
    parser.add_argument("--once", action="store_true", help="end with the connection instead of connecting again")
    given, remote = _parse_client(parser, words)
    for name in given.types:
        if name != "*" and name not in KNOWN_MESSAGE_TYPES:
            near = difflib.get_close_matches(name, KNOWN_MESSAGE_TYPES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            print(f"aiperf-api: AIPerf knows no message type {printable(name)}{hint}", file=sys.stderr)
    types = ",".join(quote(name, safe="*") for name in given.types if name)
    path = "/api/stream?format=sse" + (f"&types={types}" if types else "")
    for data in follow(remote.events, path, once=given.once):
        print(_terminal_json(data), flush=True)
    return 0


def follow(events: Callable[[str, str], Iterator[tuple[str, str]]], path: str, *, once: bool) -> Iterator[str]:
    """The data of each event, over any number of connections; the first must come about.

    Args:
        events: opens the stream at a path behind the event of an id; AskError when it cannot, or when it breaks.
        once: stop at the end of the first connection.

    Raises:
        AskError: the first attempt failed, a later one was refused for good (4xx), or `once` and the stream broke.
    """
    last_id, pause_sec, is_first = "", CLIENT_RETRY_MIN_SEC, True
    while True:
        reason = "the server ended the stream"
        try:
            for event_id, data in events(path, last_id):
                last_id, pause_sec, is_first = event_id or last_id, CLIENT_RETRY_MIN_SEC, False
                if data:
                    yield data
        except AskError as error:
            if once or error.is_final or (is_first and not error.status):
                raise
            reason = str(error)
        if once:
            return
        print(f"aiperf-api: {reason}; trying again in {pause_sec:g} s", file=sys.stderr, flush=True)
        time.sleep(pause_sec)
        pause_sec, is_first = min(2 * pause_sec, CLIENT_RETRY_MAX_SEC), False


# top


class Figures(NamedTuple):
    """What `top` shows: four answers of one moment."""

    status: dict[str, Any]  # /api/status
    progress: dict[str, Any]  # /api/progress
    metrics: dict[str, Any]  # /api/metrics
    workers: dict[str, Any]  # /api/workers


_THROUGHPUTS = (("output tokens/s", "output_token_throughput"), ("requests/s", "request_throughput"))
_LATENCIES = (
    ("time to first token", "time_to_first_token"),
    ("inter token latency", "inter_token_latency"),
    ("request latency", "request_latency"),
)


def _run_top(words: Sequence[str], environ: Mapping[str, str]) -> int:
    parser = _ClientParser("top", "Draw the run in the terminal, refreshed in place.", environ)
    parser.add_argument("--interval", metavar="SEC", default="1", help="between two looks, 0.1 to 3600 (default: 1)")
    parser.add_argument("--once", action="store_true", help="one look, then end")
    given, remote = _parse_client(parser, words)
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,3})?", given.interval) or not 0.1 <= float(given.interval) <= 3600:
        raise UsageError(f"--interval: seconds from 0.1 to 3600, not {printable(given.interval)}")
    figures = _look(remote)
    if given.once:
        print("\n".join(top_lines(figures, remote.url, shutil.get_terminal_size().columns)))
    elif sys.stdout.isatty():
        _draw_on_screen(remote, figures, float(given.interval))
    else:
        _print_lines(remote, figures, float(given.interval))
    return 0


def _look(remote: _Remote) -> Figures:
    found = [remote.get(f"/api/{name}") for name in Figures._fields]
    if not all(isinstance(answer, dict) for answer in found):
        raise AskError(f"{printable(remote.url)}: these are not the answers of aiperf-api")
    return Figures(*found)


def _looks(remote: _Remote, figures: Figures, interval_sec: float) -> Iterator[tuple[Figures, str]]:
    """(the latest figures, what is wrong), again and again; a server that has gone may come back."""
    trouble = ""
    while True:
        yield figures, trouble
        time.sleep(interval_sec)
        try:
            figures, trouble = _look(remote), ""
        except AskError as error:
            trouble = str(error)


def _print_lines(remote: _Remote, figures: Figures, interval_sec: float) -> None:
    for seen, trouble in _looks(remote, figures, interval_sec):
        print(time.strftime("%H:%M:%S"), trouble or top_line(seen), flush=True)


def _draw_on_screen(remote: _Remote, figures: Figures, interval_sec: float) -> None:
    """Draw in place, on a screen of its own; the last look stays behind on the normal one."""
    lines: list[str] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the terminal must be put right then, too
    try:
        sys.stdout.write(_ALTERNATE_SCREEN)
        for seen, trouble in _looks(remote, figures, interval_sec):
            size = shutil.get_terminal_size()
            lines = top_lines(seen, remote.url, size.columns)
            shown = ([trouble[: size.columns]] if trouble else []) + lines
            ended = (line + _END_OF_LINE for line in shown[: size.lines])
            sys.stdout.write(_HOME + "\n".join(ended) + _END_OF_SCREEN)
            sys.stdout.flush()
    finally:
        sys.stdout.write(_NORMAL_SCREEN + "\n".join([*lines, ""]))
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, before)


def _figure(figures: Figures, tag: str, *stats: str) -> Any:
    """The first of these statistics of a metric that there is."""
    row = _member(figures.metrics, "metrics", tag)
    return next((row[stat] for stat in stats if is_number(row.get(stat))), None)


def _member(value: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """An object within objects; empty where there is none."""
    found: Any = value
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _percent(figures: Figures) -> float:
    return min(100.0, max(0.0, _number_or(figures.progress.get("percent_complete"), 0.0)))


def _number_or(value: JSONValue, other: float) -> float:
    return float(value) if is_number(value) else other


def _counts(figures: Figures) -> str:
    """`120/300 requests, 3 errors, 0:42 left`."""
    progress = figures.progress
    total = f"/{_terminal_text(progress['total'])}" if progress.get("total") else ""
    text = (
        f"{_terminal_text(progress.get('completed'))}{total} requests, {_terminal_text(progress.get('errors'))} errors"
    )
    left = progress.get("eta_sec")
    return f"{text}, {_clock(left)} left" if is_number(left) and left else text


def _clock(seconds: float) -> str:
    minutes, sec = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{sec:02}" if minutes >= 60 else f"{minutes}:{sec:02}"


def _state(figures: Figures) -> str:
    """`profiling`, `warmup (profiling)`, `failed: why`, `profiling (silent)`."""
    status = figures.status
    text = _terminal_text(status.get("state"))
    if status.get("error"):
        text += f": {_terminal_text(status['error'])}"
    phase = status.get("phase")
    text += f", phase {_terminal_text(phase, 24)}" if phase and phase != status.get("state") else ""
    return f"{text} (silent)" if status.get("stale") else text


def top_line(figures: Figures) -> str:
    """A look at the run in one line, for logs."""
    parts = [_state(figures), f"{_percent(figures):.1f}%", _counts(figures)]
    for name, tag in _THROUGHPUTS:
        parts.append(f"{_terminal_text(_figure(figures, tag, 'avg', 'current'))} {name}")
    for name, tag in _LATENCIES:
        parts.append(f"{name} p50 {_terminal_text(_figure(figures, tag, 'p50', 'avg'))} ms")
    return ", ".join(parts)


def top_lines(figures: Figures, url: str, columns: int) -> list[str]:
    """A look at the run, none of its lines longer than `columns`."""
    identity = [
        _terminal_text(figures.metrics[key], 40) for key in ("model", "endpoint_type") if figures.metrics.get(key)
    ]
    head = "  ".join([_state(figures), *identity])
    lines = [f"{head}  {_terminal_text(url, 60)}", _bar(_percent(figures), columns), _counts(figures), ""]
    return [line[:columns] for line in [*lines, *_figure_lines(figures), "", *_worker_lines(figures)]]


def _bar(percent: float, columns: int) -> str:
    width = max(10, min(columns, 100) - 10)
    done = int(width * percent / 100)
    return f"[{'#' * done}{'-' * (width - done)}] {percent:5.1f} %"


def _figure_lines(figures: Figures) -> list[str]:
    rows = [["", "avg", "p50", "p99", ""]]
    for name, tag in _THROUGHPUTS:
        rows.append([name, _terminal_text(_figure(figures, tag, "avg", "current")), "", "", ""])
    for name, tag in _LATENCIES:
        values = [_terminal_text(_figure(figures, tag, stat)) for stat in ("avg", "p50", "p99")]
        unit = _member(figures.metrics, "metrics", tag).get("unit", "ms")
        rows.append([name, *values, _terminal_text(unit, 12)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *values, unit in rows:
        cells = (value.rjust(width) for value, width in zip(values, widths[1:]))
        lines.append("  ".join([name.ljust(widths[0]), *cells, unit]).rstrip())
    return lines


def _worker_lines(figures: Figures) -> list[str]:
    total, active = (_terminal_text(figures.workers.get(key)) for key in ("total_workers", "active_workers"))
    rows = [["worker", "status", "done", "failed", "cpu %", "MB"]]
    for name, worker in sorted(_member(figures.workers, "workers").items()):
        tasks, health = _member({"w": worker}, "w", "task_stats"), _member({"w": worker}, "w", "health")
        figure = (tasks.get("completed"), tasks.get("failed"), health.get("cpu_usage"))
        megabytes = round(_number_or(health["memory_usage"], 0.0) / 1e6) if "memory_usage" in health else None
        status = _member({"w": worker}, "w").get("status")
        rows.append([_terminal_text(cell, 40) for cell in (name, status, *figure, megabytes)])
    return [f"workers: {total}, {active} active", *(_columns(rows) if rows[1:] else [])]


# -- The program -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The program: serve until told to stop, or ask a server; returns the exit code."""
    try:
        words = sys.argv[1:] if argv is None else argv
        if words and words[0] in CLIENT_COMMANDS:
            return run_client(words, os.environ)
        arguments = parse_arguments(words, os.environ)
        handler = _set_up_log(arguments)
        hide_in_process_title(title_secrets(words))
        if arguments.command:
            return asyncio.run(_serve_command(arguments, os.environ, handler))
        return asyncio.run(_serve(arguments))
    except UsageError as error:
        print(f"aiperf-api: {error}", file=sys.stderr)
        return 2
    except CommandError as error:
        print(f"aiperf-api: {error}", file=sys.stderr)
        return error.exit_code
    except (StartError, AskError) as error:
        print(f"aiperf-api: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run() -> NoReturn:
    """`main()` for launchers that ignore what it returns (zipapp)."""
    sys.exit(main())


if __name__ == "__main__":
    run()
