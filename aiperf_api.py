#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A running AIPerf benchmark, followed on the ZMQ event bus of its processes and served on one port.

    /            what there is, with lines to copy         /dashboard   the run, live
    /metrics     Prometheus text                           /api/...     JSON
    /ws          the bus as a WebSocket                    /api/stream  the bus for `curl -N`
    /top         one screen for a terminal                 /report.html the run, to keep

    python3 aiperf_api.py --api-port 9090 --demo
    python3 aiperf_api.py --api-port 9090 --zmq-host 127.0.0.1
    python3 aiperf_api.py --api-port 9090 -- aiperf profile --model ... --url ... --streaming

Not here, on purpose: HTTP/2, request bodies, Range, permessage-deflate, writing to the bus.

Rooms: `grep -n '^# ==' aiperf_api.py`.  A name is used in its room or below; 2 to 9 know no loop, no socket, no clock.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import codecs
import collections
import contextlib
import functools
import gc
import gzip
import hashlib
import heapq
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
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import weakref
from array import array
from asyncio.sslproto import SSLProtocol
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from itertools import islice
from stat import S_ISSOCK
from types import MappingProxyType
from typing import IO, Any, NamedTuple, NoReturn, cast
from urllib.parse import unquote_to_bytes

try:
    import orjson
except ImportError:  # room 3 does the same with the standard library
    orjson = None  # type: ignore[assignment]

try:
    import zmq
except ImportError:  # room 10 has a subscriber of its own
    zmq = None  # type: ignore[assignment]

__version__ = "2.0.0"
__all__ = ["APIService", "__version__", "main"]


# == 1 == Limits =======================================================================================================
#
# The name has the unit; the comment: of what; a precedent, if any; what happens past it.

# HTTP requests
HTTP_HEAD_BYTES_MAX = 16 * 1024  # nginx 8-32 KiB, node 16; 431
HTTP_FIELDS_MAX = 64  # header lines (Apache 100); 431.  Query arguments; 400.  Parts of Accept; ignored
HTTP_HEAD_TIMEOUT_SEC = 10  # for a head, from its first byte; Apache 20-40; 408
HTTP_IDLE_TIMEOUT_SEC = 75  # of a kept-alive connection; nginx 75; closed

# Connections
HTTP_CONNECTIONS_MAX = 512  # in addition to WebSockets; TLS handshakes count; nginx 512; 503
LINGER_TIMEOUT_SEC = 2  # for the peer to end its side; nginx 5
CONNECTION_BUFFER_BYTES = 4 * 1024  # copied to a transport before it counts as full; asyncio 64 KiB
CONNECTION_READ_BYTES = 16 * 1024  # in one read; asyncio 256 KiB
CONNECTION_UNSENT_BYTES = 16 * 1024  # in the kernel, beyond the peer's window; Linux: megabytes
HTTP_UNSENT_BYTES_MAX = 16 * 1024 * 1024  # of all large answers that wait; 503 to the next

# WebSockets and streams
WS_CONNECTIONS_MAX = 1000  # or --ws-max-connections; 503 before the upgrade
WS_MESSAGE_BYTES_MAX = 64 * 1024  # of all fragments; websocat 64 KiB; Close 1009
WS_FRAGMENT_BYTES_MEAN = 64  # so at most 1,024 fragments: empty ones cost a client 6 bytes each; Close 1008
WS_PING_INTERVAL_SEC = 20  # websockets 20; a peer silent for two of them is evicted
WS_PINGS_PER_READ_MAX = 10  # that are answered (Autobahn sends ten); of more, only the last
CLIENT_TYPES_MAX = 100  # of one client; AIPerf has 70; an error reply
CLIENT_WRITE_BYTES_MAX = 64 * 1024  # in one write (HTTP: twice that); asyncio 64 KiB
CLIENT_SOFT_MARK_BYTES = 16 * 1024 * 1024  # behind by more: state messages are conflated, events past it dropped
CLIENT_SOFT_MARK_SEC = 5  # behind by more, the same
CLIENT_QUEUE_EVENTS_MAX = 1000  # that wait for such a client (ZMQ_SNDHWM 1000); it is told what was dropped
CLIENT_HARD_MARK_BYTES = 2 * CLIENT_SOFT_MARK_BYTES  # behind by more: evicted
CLIENT_STALL_SEC = 30  # bytes wait and none leaves; nginx 60; evicted
HUB_BYTES_MAX = 64 * 1024 * 1024  # of all backlogs, shared bytes counted once; those who do not read are evicted
RETAINED_BYTES_MAX = 16 * 1024 * 1024  # of the last message of each type (256 at most); past it no snapshot
STREAM_COMMENT_INTERVAL_SEC = 15  # ": keepalive" to an event stream; HTML standard 9.2.7: 15

# The bus.  libzmq is the precedent where nothing else is said; it bounds neither messages nor frames.
BUS_MESSAGE_BYTES_MAX = 4 * 1024 * 1024  # of figures and `process_*` (AIPerf 0.3 MB); dropped and counted
BUS_TEXT_BYTES_MAX = 128 * 1024  # of other types but results (AIPerf 3 KB); the same
BUS_RESULT_BYTES_MAX = 32 * 1024 * 1024  # past it builtin brings the topic alone, libzmq ends the connection
BUS_PARTS_MAX = 64  # frames of a message; the bus sends 2; the same
BUS_TYPES_MAX = 256  # that are told apart; further ones count as "other"
BUS_QUEUE_MESSAGES_MAX = 8  # in libzmq (its default 1000), of any size; more wait in TCP and at the publisher
BUS_TURN_MESSAGES_MAX = 256  # in one turn of the loop
BUS_TURN_BYTES_MAX = 256 * 1024  # the same
BUS_TURN_SEC = 0.02  # the same, estimated from the cost of the last turn
BUS_HANDSHAKE_SEC = 30.0  # from connection to READY (ZMQ_HANDSHAKE_IVL); reconnect
BUS_HEARTBEAT_SEC = 5.0  # of silence before a PING; after three without an answer, reconnect
BUS_RETRY_MIN_SEC = 0.1  # between attempts, at random up to ...
BUS_RETRY_MAX_SEC = 0.25  # ... this; AIPerf's proxy says who it is after 0.6 s

# The benchmark: what is kept of a run and walked in a message
JSON_ITEMS_MAX = 60_000  # count of `,` `[` `{`; in final results 4 times as many; AIPerf 700; dropped
JSON_DEPTH_MAX = 64  # levels; orjson 1,024 (RFC 8259 9); not JSON for us
NAME_BYTES_MAX = 512  # a tag, id, unit, label; bad_shape
ROWS_MAX = 2048  # of metrics, endpoints or series in a message; AIPerf 130; the rest is left out
EXTRAS_MAX = 64  # further fields of a phase, group or row; the rest is left out
SAMPLES_MAX, SAMPLES_BYTES_MAX = 20_000, 8 * 1024 * 1024  # of /metrics; a sample says how many are left out
WORKERS_MAX = 2048  # of a run; AIPerf 32 a node; further ones are not told apart
RESULTS_KEPT_BYTES_MAX = 8 * 1024 * 1024  # larger parts of the final results go, with a reason
RUNS_MAX, RUNS_BYTES_MAX = 100, 8 * 1024 * 1024  # then the oldest go.  Errors kept of a run
HISTORY_POINTS_DEFAULT = 1000  # of a series in an answer
HISTORY_POINTS_MAX = 7200  # of a series, two hours; then every other point goes
HISTORY_SERIES_MAX = 4096  # of a run, shared fairly among tags; the answer says what was left out
HISTORY_VALUES_MAX = 2 * 1024 * 1024  # of all series, 8 bytes each; then every other point goes
HISTORY_ANSWER_VALUES_MAX = 200_000  # of one answer; 400
SECRETS_MAX = 16  # of a run, redacted wherever they turn up; older ones only under their keys
STALE_AFTER_NS = 10_000_000_000  # of silence of a running benchmark; AIPerf's STALE_TIME

# The program
LOG_QUOTE_CHARS_MAX = 200  # of a string in a line of the log; cut with "..."


# == 2 == Errors =======================================================================================================


class ExitError(Exception):
    """The program ends with one line for the user and this exit code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = 2 if isinstance(self, UsageError) else exit_code


class UsageError(ExitError):
    """An option, or an argument of the Python API, is wrong."""


class StartError(ExitError):
    """The machine refuses: a port in use, an address that cannot be bound."""


class JSONError(Exception):
    """Bytes that are not one JSON document in UTF-8, or nested too deep."""


class BusError(Exception):
    """A bus message or peer that cannot be used: counted, and logged once, by `kind`, a fixed word."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ClientMessageError(Exception):
    """A WebSocket message that is not understood: an error reply."""


class HTTPError(Exception):
    """A request that gets `{"error": message}` with this status; a fault of its head also ends the connection."""

    def __init__(self, status: int, message: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


def busy(reason: str) -> HTTPError:
    return HTTPError(503, reason, (("Retry-After", "5"),))


class WebSocketError(Exception):
    """A violation of RFC 6455: its arguments are the code (7.4.1) and reason of a Close."""


# == 3 == JSON and secrets =============================================================================================
#
# One contract over orjson (may be missing) and json.  Reading: RFC 8259 in UTF-8, without NaN, numbers beyond a double,
# lone surrogates or a byte order mark; integers beyond 64 bits become floats.  Writing: NaN and infinities are null,
# integers keep their digits, lone surrogates become U+FFFD.

JSONValue = Any  # str | int | float | bool | None | list | dict, nested


def _read_number(digits: str) -> int | float:
    number = float(digits)
    if not math.isfinite(number):  # NaN and Infinity come here, too
        raise ValueError(f"not a number of JSON: {digits[:40]}")
    is_whole = digits.lstrip("-").isdecimal() and -(1 << 63) <= int(digits) < 1 << 64
    return int(digits) if is_whole else number


def _is_deep(value: JSONValue) -> bool:
    level = [value]
    for _ in range(JSON_DEPTH_MAX):
        inside = itertools.chain(*(one.values() if type(one) is dict else one for one in level if one))
        level = [one for one in inside if type(one) in (list, dict)]
    return bool(level)


def json_load(data: bytes, constant: Callable[[str], Any] = _read_number) -> JSONValue:
    """Return the value of one JSON text, or raise JSONError; `constant` reads NaN and the infinities."""
    try:
        if orjson is not None and constant is _read_number:
            value = orjson.loads(data)
        else:
            text = data.decode("utf-8")
            value = json.loads(text, parse_int=_read_number, parse_float=_read_number, parse_constant=constant)
            if "\\u" in text:  # only an escape can smuggle in a lone surrogate
                json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise JSONError(str(error) or type(error).__name__) from None
    if data.count(b"[") + data.count(b"{") > JSON_DEPTH_MAX and _is_deep(value):
        raise JSONError(f"nested deeper than {JSON_DEPTH_MAX} levels")
    return value


def json_load_lenient(data: bytes) -> tuple[JSONValue, bool]:
    """Return the value of a text of `json.dumps`, and whether a NaN or an infinity in it became None."""
    try:
        return json_load(data), False
    except JSONError:
        if b"NaN" not in data and b"Infinity" not in data:
            raise
    return json_load(data, lambda _: None), True


def json_bytes(value: JSONValue, *, pretty: bool = False) -> bytes:
    """Return the JSON text of a value, or raise TypeError."""
    if orjson is not None:
        with contextlib.suppress(TypeError):  # integers beyond 64 bits, lone surrogates: json knows how
            return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS | (orjson.OPT_INDENT_2 if pretty else 0))
    separators, indent = ((",", ": "), 2) if pretty else ((",", ":"), None)
    write = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=separators, indent=indent).encode
    try:
        return write(value).encode("utf-8")
    except ValueError:  # a NaN, an infinity, a lone surrogate: rare
        clean = json.loads(json.dumps(value), parse_constant=lambda _: None)
        return re.sub("[\ud800-\udfff]", "\ufffd", write(clean)).encode("utf-8")


# -- Secrets: redacted at the door; no pattern is worse than linear on any text

REDACTED = "***"
_STRONG = (  # a dot: where a separator may stand
    "api.key|access.key|private.key|access.token|auth.token|refresh.token|api.token|secret|password|passwd|passphrase"
    "|credential|authorization|cookie|bearer"
)
_STRONG_KEY = re.compile(_STRONG.replace(".", "") + "|^(?:jwt|auth)$")
_PLAIN = frozenset((int, float, bool, type(None)))  # types that no secret has
_WALK_MAX = 5 * JSON_ITEMS_MAX  # a value costs 6, a character 1
_RANDOM = re.compile(r"(?=[^0-9]*[0-9])(?=[^a-zA-Z]*[a-zA-Z])(?!\w*://)\S{16,}")
# Not time_to_first_token_p99 and meta-llama/Llama-3.1-8B
_KEYLIKE = re.compile(r"(?=\S*?(?<![a-zA-Z0-9])(?=[a-zA-Z]*[0-9])(?=[0-9]*[a-zA-Z])[a-zA-Z0-9]{8})" + _RANDOM.pattern)
_WORD = re.compile("(?i:(?:basic|bearer|digest|token) )?[A-Z]{1,15}")  # TOKEN, Bearer TOKEN
_PROSE = re.compile("[A-Z]{1,15}|[A-Za-z][a-z]{1,14}")  # "the bearer of bad news"
_PLACEHOLDER = r"""(?:(?:none|null|true|false)\.?|\*\*\*|(?:[Bb]earer[ ])?(?:\$\{?(?-i:[A-Z_]+)\}?|<[\w -]{1,64}>))
    (?:[\s"',;&)\]}\\]|$)"""
_PYTHON = r"""(?:secret\w{0,9}\(|[burf]{1,2})(?=["'])"""  # SecretStr('x'), b'x'
# Between a sign and its value; nested JSON escapes its quotes several times
_BEGIN = rf"""\s{{0,32}}(?:{_PYTHON}|(?!{_PYTHON}))\\{{0,7}}(?:["']|(?=[^\s"'\\]))(?!{_PLACEHOLDER})"""
_SECRET_IN_TEXT = re.compile(  # a match ends in its last group, which is hidden (`likely`: if it looks random)
    r"""(?xi)(?=[:abcjkprst])(?: ://(?![\w.-]+:\d+,)(?P<user>[^/\s"']+)(?=@)
      | (?<!\w)(?:bearer|basic)(?:[ \t:]+|%20)["']?(?P<scheme>[\w.~+/=-]+)
      | (?:authorization|cookie)\\{0,7}["']?\s{0,32}:BEGIN
        (?:(?:bearer|basic)[ \t]+["'])?(?P<line>[^"'\r\n]+(?:(?:(?<==)|(?<==\\))"[^"\r\n]*"?[^"'\r\n]*)*)
      | (?:(?:STRONG)(?=(?P<rest>[\w.-]{0,24}))(?P=rest)  # (?=(x))\1 is x, and gives nothing back
        |(?<![\w.])(?<!\w-)(?:jwt|auth))\\{0,7}["']?\s{0,32}(?P<sign>[=:]|%3[AD])BEGIN
        (?P<sure>(?:(?:bearer|basic|token|digest)[ \t]+)?(?:(?<=["'])[^"']+|[^\s"'&,;]+))
      | (?:key|token|pass|secret|password)(?:[ ]provided)?
        \\{0,7}["']?(?:\s{0,32}[=:]|(?<=["']),)?\s{0,32}(?:b(?=["']))?\\{0,7}["']?
        (?P<likely>(?<![a-z0-9])[^\s"'&,;=:]{16,}))
    """.replace("BEGIN", _BEGIN).replace("STRONG", _STRONG.replace(".", "(?:[_. -]|%5f|%2d)?"))
)
_SECRET_FLAG = re.compile(  # of a command line; a header is shown by its name
    r"""(?x)(?<![\w-])(?P<flag>--[\w-]{1,64}|-H)["']?(?:,?\s{1,32}|=)
        (?:(?P<escaped>\\["'])|(?P<double>")|(?P<single>')|(?=[^\\]))
        (?!-|PLACEHOLDER)(?P<name>[\w-]{1,64}:\s{0,32}(?=\S)(?!PLACEHOLDER))?
        (?P<value>(?(escaped)[^"'\\\r\n]+|(?(double)[^"\\\r\n]*(?:\\.[^"\\\r\n]*)*|(?(single)[^'\r\n]+|[^\s"']+))))
    """.replace("PLACEHOLDER", _PLACEHOLDER)
)
# In a query, percent-encoded or not, in a header, in a subprotocol
_OUR_TOKEN = re.compile(r"(?i)([?&](?:t|%74)(?:o|%6f)(?:k|%6b)(?:e|%65)(?:n|%6e)=|aiperf\.token\.|bearer +)[^\s&]+")


@functools.lru_cache(maxsize=512)
def key_role(key: str) -> str:
    """Return what stands under a key, whatever its spelling (api_key, apiKey, X-API-Key): "strong", every string is a
    secret; "weak", one that looks random is; "headers"; or ""."""
    letters = re.sub("[^a-z0-9]+", "", key.lower())
    if _STRONG_KEY.search(letters):
        return "strong"
    if letters.endswith(("key", "token", "pass")):
        return "weak"
    return "headers" if key == "-H" or letters.endswith(("header", "headers")) else ""


def _hide(match: re.Match[str]) -> str:
    form, found = match.lastgroup, match[match.lastgroup or 0]
    is_word = (_PROSE if form == "scheme" else _WORD).fullmatch(found)
    if (not _KEYLIKE.fullmatch(found)) if form == "likely" else (is_word and match["sign"] != "="):
        return match[0]
    return match[0].removesuffix(found) + REDACTED


def _hide_flag(match: re.Match[str]) -> str:
    role, hidden = key_role(match["flag"]), match["value"]
    if role == "strong":
        hidden = (match["name"] or "") + hidden
    elif role != "headers" or not match["name"]:
        return match[0]
    return match[0].removesuffix(hidden) + REDACTED


class Secrets:
    """The known secrets.  Only what looks random is remembered, and redacted where it stands without its key: else
    `{"auth": "metrics"}` would redact every "metrics"."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._for_ever = frozenset(filter(_RANDOM.fullmatch, (one.rpartition(" ")[2] for one in known)))
        self._met: dict[str, None] = {}  # in the last value; an ordered set
        self._texts: dict[str, str] = {}  # of the value at hand, and what is shown
        self.forget_run()

    def forget_run(self) -> None:
        """Forget the run's secrets but those of the last value: its message may have begun the next run."""
        self._of_run: list[str] = []
        self._remember(self._met)

    def _remember(self, words: Iterable[str]) -> None:
        self._of_run = [*dict.fromkeys((*self._of_run, *words))][-SECRETS_MAX:]
        self.known = tuple(sorted({*self._for_ever, *self._of_run}, key=len, reverse=True))  # cut below, if long
        words = (re.escape(word[:64]) + (r"[\w.~+/=-]*" if len(word) > 64 else "") for word in self.known)
        self._patterns = [*map(re.compile, words)]  # apart, each is linear; joined, they were not

    def redact(self, value: JSONValue) -> JSONValue:
        """Return a copy with `***` for every secret, or the very same object; keys never change."""
        self._met, self._left = {}, _WALK_MAX
        redacted = self._redact(value, "")
        if self._met.keys() - self.known:  # it may also stand before its key
            self._remember(self._met)
            self._texts = {text: self._without_known(shown) for text, shown in self._texts.items()}
            self._left = _WALK_MAX
            redacted = self._redact(value, "")
        self._texts.clear()
        return redacted

    def redact_payload(self, payload: bytes, value: JSONValue) -> tuple[bytes, JSONValue]:
        """Return a payload that says `value`, and the value, redacted or the very same objects."""
        redacted = self.redact(value)
        written = json_bytes(redacted)
        # Only the payload has the first value of a duplicate key: compare colons, which may be escaped.
        is_same = redacted is value and payload.count(b":") == written.count(b":") and b"\\u003" not in payload
        return payload if is_same else written, redacted

    def _without_known(self, text: str) -> str:
        for pattern in self._patterns if len(text) >= 16 else ():
            text = pattern.sub(REDACTED, text)
        return text

    def _redact(self, value: JSONValue, role: str) -> JSONValue:
        self._left -= 6 + (len(value) if isinstance(value, str) and value not in self._texts else 0)
        if self._left < 0:
            return REDACTED
        if isinstance(value, str):
            return self._redact_string(value, role)
        if isinstance(value, dict):
            changed, name = {}, value.get("name", value.get("key"))
            for key, item in value.items():
                if type(item) not in _PLAIN:
                    named = name if key == "value" and isinstance(name, str) else key  # {"name": …, "value": …}
                    is_inside = role in ("strong", "headers") or self._left < 0
                    own = "strong" if is_inside else key_role(str(named)[:NAME_BYTES_MAX])
                    own = "" if own == "headers" and "tag" in value else own  # a metric's `header` is a title
                    new = self._redact(item, own)
                    if new is not item:
                        changed[key] = new
            return {**value, **changed} if changed else value
        if isinstance(value, (list, tuple)) and not _PLAIN.issuperset(map(type, value)):
            items = [*map(self._redact, value, _roles_in(value, role))]
            return value if all(one is other for one, other in zip(items, value)) else items
        return value

    def _redact_string(self, text: str, role: str) -> str:
        name, colon, content = text.partition(":") if role else ("", "", "")
        if role == "strong" or (role == "weak" and _KEYLIKE.fullmatch(text)):
            name, content = "", text
        elif role != "headers" or not colon or " " in name:
            if text not in self._texts:
                shown = _SECRET_IN_TEXT.sub(_hide, self._without_known(text))
                self._texts[text] = _SECRET_FLAG.sub(_hide_flag, shown)
            return text if self._texts[text] == text else self._texts[text]
        if content.strip() in ("", REDACTED):
            return text
        form = content.rpartition(" ")[2]
        if _RANDOM.fullmatch(form) and len(self._met) < SECRETS_MAX:
            self._met[form] = None
        return f"{self._without_known(name)}: {REDACTED}" if name else REDACTED


def _roles_in(values: Sequence[JSONValue], role: str) -> Iterator[str]:
    """Yield the roles of a list's items: `["api_key", "…"]` counts as a member, so does `--api-key …`."""
    for before, value in zip(("", *values), values):
        if role == "headers":
            yield "pair" if isinstance(value, (list, tuple)) else role
        elif role == "strong" or (role == "pair" and value is not values[0]):
            yield "strong"
        else:
            is_key = isinstance(before, str) and (len(values) == 2 or before[:1] == "-")
            yield key_role(before[:NAME_BYTES_MAX]) if is_key else ""


def printable(text: str | bytes, limit: int = LOG_QUOTE_CHARS_MAX) -> str:
    """Return a peer's string as one line of ASCII, without tokens."""
    raw = text.decode("latin-1") if isinstance(text, bytes) else text
    shown = _OUR_TOKEN.sub(r"\1***", raw[: 4 * limit]).encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= limit and len(raw) <= 4 * limit else shown[:limit] + "..."


# == 4 == WebSocket frames =============================================================================================
#
# RFC 6455 without a socket and without extensions.  A fault is found at the byte that commits it: what a peer declares
# is checked before a byte of it is kept, and text is decoded while it arrives.  After it nothing is read (7.1.7).

OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG = 0x1, 0x2, 0x8, 0x9, 0xA
CLOSE_GOING_AWAY, CLOSE_PROTOCOL_ERROR, CLOSE_INVALID_DATA = 1001, 1002, 1007
CLOSE_POLICY_VIOLATION, CLOSE_MESSAGE_TOO_BIG, CLOSE_INTERNAL_ERROR = 1008, 1009, 1011
# RFC 6455 7.4 and the IANA registry.  1004, 1005, 1006 and 1015 are never on the wire.
_CLOSE_CODES = frozenset((*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)))


class Event(NamedTuple):
    """A whole message, a control frame, or a fault, which is answered by a Close with `code`."""

    kind: str  # text | binary | ping | pong | close | failure
    data: Any = b""  # str of a text, else the payload
    code: int | None = None  # of a close, if it gave one, or a failure
    reason: str = ""


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """Return one unmasked frame (RFC 6455 5.1, 5.2)."""
    first, size = 0x80 | opcode, len(payload)
    if size <= 125:
        return bytes((first, size)) + payload
    if size <= 0xFFFF:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


def encode_close(code: int, reason: str = "") -> bytes:
    """Return a Close; a reason over 123 bytes is cut on a character (RFC 6455 5.5)."""
    raw = reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore").encode("utf-8")
    return encode_frame(OP_CLOSE, struct.pack("!H", code) + raw)


def _unmask(data: bytes, mask: bytes) -> bytes:
    """Undo RFC 6455 5.3 as one XOR of two long integers: no loop in Python."""
    size = len(data)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")


def _require(holds: bool, reason: str, code: int = CLOSE_PROTOCOL_ERROR) -> None:
    if not holds:
        raise WebSocketError(code, reason)


def _decode_text(piece: bytes, decoder: codecs.IncrementalDecoder, final: bool = False) -> str:
    """Return the text of a piece; invalid UTF-8 fails at once (RFC 6455 8.1)."""
    try:
        text = decoder.decode(piece, final)
    except UnicodeDecodeError:
        raise WebSocketError(CLOSE_INVALID_DATA, "text is not UTF-8") from None
    held = decoder.getstate()[0]  # CPython holds back half a surrogate (ED A0..BF)
    _require(held[:1] != b"\xed" or held[1:2] < b"\xa0", "text is not UTF-8", CLOSE_INVALID_DATA)
    return text


def _control_event(opcode: int, payload: bytes) -> Event:
    if opcode != OP_CLOSE or not payload:
        return Event({OP_CLOSE: "close", OP_PING: "ping", OP_PONG: "pong"}[opcode], payload)
    code = int.from_bytes(payload[:2], "big")
    _require(len(payload) >= 2 and code in _CLOSE_CODES, f"close code {code} is not allowed")
    return Event("close", payload, code, _decode_text(payload[2:], codecs.getincrementaldecoder("utf-8")(), final=True))


class FrameParser:
    """Read the frames of one client; hold at most one message, one control payload and one incomplete head."""

    def __init__(self, max_message: int = WS_MESSAGE_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._events = _read_events(self._buffer, max_message)  # holds the buffer, not the parser: no cycle

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that `data` completes; [] for ever after a close or a failure."""
        events: list[Event] = []
        self._buffer += data
        try:
            for event in self._events:
                if event is None:
                    return events
                events.append(event)
        except WebSocketError as error:
            events.append(Event("failure", b"", *error.args))
        self._buffer.clear()
        return events


def _read_events(buffer: bytearray, max_message: int) -> Generator[Event | None, None, None]:
    """Yield each event, and None where more bytes must be appended to the buffer."""
    at = 0  # what stands before it has been read

    def read(size: int) -> Generator[None, None, bytes]:
        nonlocal at
        while len(buffer) - at < size:
            del buffer[:at]  # once for all frames that came together: linear
            at = 0
            yield
        at += size
        return bytes(buffer[at - size : at])

    kind = fragments = 0  # opcode and number of frames of the message at hand; 0 between messages
    message, decoder = bytearray(), codecs.getincrementaldecoder("utf-8")()
    while True:
        fin, opcode, length, mask = yield from _read_head(read, kind, fragments, len(message), max_message)
        if opcode >= 8:
            yield _control_event(opcode, _unmask((yield from read(length)), mask))
            if opcode == OP_CLOSE:
                return  # 5.5.1: nothing may follow a Close
            continue
        kind, fragments = opcode or kind, fragments + 1
        while length:
            piece = yield from read(min(length, max(1, len(buffer) - at)))
            length -= len(piece)
            data = _unmask(piece, mask)
            mask = (mask * 2)[len(piece) % 4 :][:4]
            message += data
            if kind == OP_TEXT:
                _decode_text(data, decoder)
        if fin:
            _require(not decoder.getstate()[0], "text ends inside a character", CLOSE_INVALID_DATA)
            yield Event("text", message.decode("utf-8")) if kind == OP_TEXT else Event("binary", bytes(message))
            kind, fragments, message = 0, 0, bytearray()


def _read_head(
    read: Callable[[int], Generator[None, None, bytes]], kind: int, fragments: int, size: int, max_message: int
) -> Generator[None, None, tuple[bool, int, int, bytes]]:
    """Return fin, opcode, length and mask of a frame behind `size` bytes of a message (RFC 6455 5.2)."""
    [first] = yield from read(1)
    fin, opcode = first >= 0x80, first & 0x0F
    is_reserved = first & 0x70 or OP_BINARY < opcode < OP_CLOSE or opcode > OP_PONG
    _require(not is_reserved, "reserved bits or opcode")
    _require(fin or opcode < 8, "fragmented control frame")  # 5.5
    _require(opcode >= 8 or (opcode == 0) == (kind > 0), "message or continuation out of order")  # 5.4
    _require(opcode > 0 or fragments < max_message // WS_FRAGMENT_BYTES_MEAN, "too fragmented", CLOSE_POLICY_VIOLATION)
    [second] = yield from read(1)
    _require(second >= 0x80, "frame is not masked")  # 5.1
    length = second & 0x7F
    _require(length <= 125 or opcode < 8, "control frame over 125 bytes")  # 5.5
    if length > 125:
        [high] = yield from read(1)
        _require(length == 126 or high < 0x80, "frame length with the top bit set")
        low = yield from read(1 if length == 126 else 7)
        length = high << 8 * len(low) | int.from_bytes(low, "big")
        _require(length > (0xFFFF if len(low) == 7 else 125), "frame length in too many bytes")
    if opcode < 8:  # 10.4: before a byte of it is kept
        _require(size + length <= max_message, f"message over {max_message} bytes", CLOSE_MESSAGE_TOO_BIG)
    return fin, opcode, length, (yield from read(4))


# == 5 == HTTP =========================================================================================================
#
# HTTP/1.1 (RFC 9110, RFC 9112) as strict as h11, without a socket.  Not here, on purpose: request bodies (413, with
# Transfer-Encoding 501), HTTP/1.0 keep-alive (ignored), HTTP/2 (505), CONNECT (400), TRACE (405), Range (ignored).
# Every fault of a head ends the connection: what follows may be a body, and guessing is request smuggling.

HeaderList = Sequence[tuple[str, str]]

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 5.6.2
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/(\d)\.(\d)" % _TOKEN.pattern)  # RFC 9112 3
_FIELD_LINE = re.compile(rb"(%b):([\t\x20-\x7e\x80-\xff]*)" % _TOKEN.pattern)  # RFC 9112 5, RFC 9110 5.5
# RFC 9112 3.2.1, 3.2.2: origin-form, and absolute-form without userinfo
_TARGET = re.compile(rb"(?:(?i:https?)://([^/?#]+))?(/[^?#]*)?(?:\?([^#]*))?")
_HOST = re.compile(r"(?:([A-Za-z0-9._~-]*)|\[([0-9A-Fa-f:.]+)\])(?::[0-9]{0,5})?")  # RFC 9110 7.2, RFC 3986 3.2.2
_CONTENT_LENGTH = re.compile(r"[0-9]{1,15}")  # RFC 9110 8.6; int() would also read "+5" and "1_0"
_BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")  # RFC 3986 2.1
_QVALUE = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")  # RFC 9110 12.4.2
_ENTITY_TAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"')  # RFC 9110 8.8.3, without W/
_WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{21}[AQgw]==")  # RFC 6455 4.1

# Programs disagree about which of two wins: a fault.
_SINGLE_HEADERS = frozenset(
    "authorization host if-modified-since origin sec-websocket-key sec-websocket-version transfer-encoding".split()
)
# Nothing inline, so that a metric's name can never become a script
_PAGE_POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
_TOKEN_PROTOCOL = "aiperf.token."  # a subprotocol: browsers can set no header
_MEMO_HEADS_MAX, _MEMO_HEAD_BYTES_MAX = 64, 1024  # Prometheus sends 300 bytes, Chromium 700
_TARGET_BYTES_MAX = HTTP_HEAD_BYTES_MAX // 4  # still percent-encoded; Apache 8190; 414
_GZIP_BYTES_MIN, _GZIP_BYTES_MAX = 1024, 1024 * 1024  # less fits in a packet; more takes too long


# -- Reading requests


class Request(NamedTuple):
    method: str
    target: str  # as sent; for logs, through printable()
    path: str  # percent-decoded once, but for %2F; begins with "/"
    query: tuple[tuple[str, str], ...]  # decoded; "" where there is no "="
    headers: Mapping[str, str]  # names in lower case, values as latin-1
    is_1_1: bool
    keep_alive: bool = False  # never behind a body or an upgrade
    wants_upgrade: bool = False  # to a WebSocket; whether rightly, upgrade_response() says
    refusal: HTTPError | None = None  # of its body: to be raised once the path is known

    def arg(self, name: str, default: str | None = None) -> str | None:
        return next(iter(self.args(name)), default)

    def args(self, name: str) -> list[str]:
        return [value for key, value in self.query if key == name]

    @property
    def wants_pretty(self) -> bool:
        return (self.arg("pretty", "0") or "").lower() not in ("0", "no", "false", "off")


def _percent_decode(raw: bytes) -> str:
    with contextlib.suppress(UnicodeDecodeError):
        text = unquote_to_bytes(raw).decode("utf-8")
        if "\0" not in text and not _BAD_PERCENT.search(raw):
            return text
    raise HTTPError(400, "the target is not percent-encoded UTF-8")


def host_name(host: str) -> str:
    """Return the name or address in a Host header: of `[::1]:8080`, `::1`."""
    match = _HOST.fullmatch(host)
    if match is None:
        raise HTTPError(400, "malformed Host")
    return (match[1] or match[2] or "").lower()


def _members(header: str) -> list[str]:  # RFC 9110 5.6.1
    return [item for item in (part.strip(" \t") for part in header.split(",")) if item]


def _parse_request_line(line: bytes) -> Request:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise HTTPError(400, "malformed request line")
    method, target, major, minor = match.groups()
    if major != b"1":  # RFC 9113 3.4: also "PRI * HTTP/2.0"
        raise HTTPError(505, "HTTP/1.1 is spoken here")
    if len(target) > _TARGET_BYTES_MAX:
        raise HTTPError(414, f"target over {_TARGET_BYTES_MAX} bytes")
    match = _TARGET.fullmatch(b"/" if (method, target) == (b"OPTIONS", b"*") else target)  # RFC 9112 3.2.4
    if match is None or not (match[1] or match[2]):
        raise HTTPError(400, "the target must be a path or an http(s) URL")
    headers = {"host": match[1].decode("ascii")} if match[1] else {}  # 3.2.2: it wins
    host_name(headers.get("host", ""))
    # ".." and "//" stay: a path is only ever looked up.  An encoded slash separates nothing (RFC 3986 2.2).
    path = _percent_decode((match[2] or b"/").replace(b"%2F", b"%252F").replace(b"%2f", b"%252f"))
    # Only "&" separates, never ";" (CVE-2020-28473).
    fields = (match[3] or b"").split(b"&", HTTP_FIELDS_MAX)
    if len(fields) > HTTP_FIELDS_MAX:
        raise HTTPError(400, f"over {HTTP_FIELDS_MAX} query arguments")
    pairs = (field.replace(b"+", b" ").partition(b"=") for field in fields if field)
    query = tuple((_percent_decode(name), _percent_decode(value)) for name, _, value in pairs)
    is_1_1 = minor != b"0"  # RFC 9110 2.5: or a higher minor version
    return Request(method.decode("ascii"), target.decode("ascii"), path, query, headers, is_1_1)


def _body_refusal(headers: Mapping[str, str], is_1_1: bool) -> HTTPError | None:
    """Decide on the body (RFC 9112 6.3), here alone."""
    lengths = {part.strip(" \t") for part in headers.get("content-length", "0").split(",")}
    if len(lengths) > 1 or not all(map(_CONTENT_LENGTH.fullmatch, lengths)):
        raise HTTPError(400, "malformed Content-Length")
    if "transfer-encoding" in headers:
        if "content-length" in headers or not is_1_1:  # 6.1: smuggling
            raise HTTPError(400, "Transfer-Encoding beside Content-Length or in HTTP/1.0")
        return HTTPError(501, "request bodies are not read here")
    return HTTPError(413, "request bodies are not read here") if any(map(int, lengths)) else None


def _build_request(line: Request, fields: Iterable[bytes]) -> Request:
    headers: dict[str, str] = {}
    for field in fields:  # RFC 9110 5.3
        match = _FIELD_LINE.fullmatch(field)  # no space before the colon (5.1), no obs-fold (5.2): smuggling
        if match is None:
            raise HTTPError(400, "malformed header line")
        name, value = match[1].decode("ascii").lower(), match[2].strip(b" \t").decode("latin-1")
        if name in headers and name in _SINGLE_HEADERS:
            raise HTTPError(400, f"two {name} headers")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if "host" not in headers and line.is_1_1:  # RFC 9112 3.2
        raise HTTPError(400, "no Host header")
    host_name(headers.get("host", ""))
    refusal = _body_refusal(headers, line.is_1_1)
    connection, upgrade = (_members(headers.get(name, "").lower()) for name in ("connection", "upgrade"))
    # RFC 9110 7.8, 7.6.1; behind a body there are no frames
    may_go_on = line.is_1_1 and not refusal
    wants_upgrade = may_go_on and "upgrade" in connection and "websocket" in upgrade
    keep_alive = may_go_on and not wants_upgrade and "close" not in connection
    headers.update(line.headers)
    return line._replace(
        headers=MappingProxyType(headers), keep_alive=keep_alive, wants_upgrade=wants_upgrade, refusal=refusal
    )


class RequestParser:
    """Read the requests of one connection, however the bytes were cut.  `memo` holds the heads of all connections: a
    keep-alive client repeats its head byte for byte."""

    def __init__(self, memo: dict[bytes, Request] | None = None) -> None:
        self._memo = {} if memo is None else memo
        self._ended = False
        self.is_head = False  # a HEAD request: even a fault gets no body
        self._buffer = bytearray()  # unread; the head at hand stands at its front
        self._line: Request | None = None  # its first line

    @property
    def started(self) -> bool:
        """Whether bytes of a next request are there."""
        return not self._ended and bool(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def take_rest(self) -> bytes:
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def recall(self, data: bytes) -> Request | None:
        """Return the request if these bytes, which are then not fed, are just a head seen before."""
        return None if self._buffer or self._ended else self._memo.get(data)

    def next_request(self) -> Request | None:
        """Return the next request, or None until there are more bytes; for ever behind a fault, which is raised, and
        behind a request that is not keep_alive (RFC 9112 9.6)."""
        if self._ended:
            return None
        self._ended = True  # also if it raises
        request = self._read_request()
        self._ended = request is not None and not request.keep_alive
        return request

    def _read_request(self) -> Request | None:
        buffer = self._buffer
        if self._line is None:
            while buffer.startswith(b"\r\n"):  # RFC 9112 2.2
                del buffer[:2]
            self.is_head = buffer.startswith(b"HEAD ")
            if buffer and buffer[0] != 0x0D and not 0x21 <= buffer[0] <= 0x7E:  # at once: a TLS handshake waits for us
                is_tls = buffer[0] == 0x16
                raise HTTPError(400, "this port speaks plain HTTP, not TLS" if is_tls else "malformed request line")
            line_end = buffer.find(b"\r\n", 0, HTTP_HEAD_BYTES_MAX)
            self._line = _parse_request_line(bytes(buffer[:line_end])) if line_end >= 0 else None
        end = buffer.find(b"\r\n\r\n", 0, HTTP_HEAD_BYTES_MAX)
        head = bytes(buffer[: end if end >= 0 else HTTP_HEAD_BYTES_MAX])
        if head.count(b"\n") > head.count(b"\r\n"):  # RFC 9112 2.2 allows it; not all programs do: smuggling
            raise HTTPError(400, "line ends without CR")
        if end < 0 or self._line is None:
            if len(head) >= HTTP_HEAD_BYTES_MAX:
                raise HTTPError(431, f"request head over {HTTP_HEAD_BYTES_MAX} bytes")
            return None
        _, *fields = head.split(b"\r\n")
        if len(fields) > HTTP_FIELDS_MAX:
            raise HTTPError(431, f"over {HTTP_FIELDS_MAX} headers")
        request = _build_request(self._line, fields)
        if request.keep_alive and len(head) < _MEMO_HEAD_BYTES_MAX:
            if len(self._memo) >= _MEMO_HEADS_MAX:
                del self._memo[next(iter(self._memo))]
            self._memo[head + b"\r\n\r\n"] = request
        del buffer[: end + 4]
        self._line = None
        return request


# -- Checks of a request


def check_host(host: str | None, *, allowed: frozenset[str], bound_to_loopback: bool) -> None:
    """Refuse a foreign Host with 421: a page that rebinds its DNS name to us still sends its own name.  `allowed`: in
    lower case, with or without a port."""
    if host is None or (not bound_to_loopback and not allowed):
        return
    name = host_name(host)
    with contextlib.suppress(ValueError):  # "localhost.evil" and "127.1" are names like any other
        if bound_to_loopback and (name == "localhost" or ipaddress.ip_address(name)):
            return
    if name not in allowed and host.lower() not in allowed:
        raise HTTPError(421, "this Host is not served here; see --allow-host")


def check_origin(request: Request, allowed: frozenset[str]) -> None:
    """Refuse with 403 what a foreign page asks for: CORS covers neither WebSockets (RFC 6455 10.2) nor `<img>`.
    `allowed`: in lower case, or "*".  Our own is the Host with any scheme: a proxy may end TLS."""
    headers = request.headers
    if "origin" in headers:
        host = headers.get("host", "").lower()
        is_foreign = headers["origin"].lower() not in {*allowed, f"http://{host}", f"https://{host}"}
    else:  # a browser leaves Origin out of a plain GET, but says whose it is; curl and websocat say nothing
        is_foreign = headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate"
    if is_foreign and "*" not in allowed:
        raise HTTPError(403, "this Origin is not allowed here; see --cors-origin")


def subprotocols(request: Request) -> list[str]:
    names = _members(request.headers.get("sec-websocket-protocol", ""))
    if not all(_TOKEN.fullmatch(name.encode("latin-1")) for name in names):
        raise HTTPError(400, "malformed Sec-WebSocket-Protocol")
    return names


def upgrade_response(request: Request) -> bytes:
    """Return the 101 to an opening handshake (RFC 6455 4.2); raise HTTPError 400 or 426.  Pages offer `aiperf` beside
    the subprotocol with the token: a browser that gets neither back fails the connection (4.1)."""
    if not request.wants_upgrade:
        hint = "a WebSocket is spoken here: websocat ws://HOST:PORT/ws; for curl there is curl -N .../api/stream"
        raise HTTPError(426, hint, (("Upgrade", "websocket"), ("Connection", "Upgrade")))
    if request.headers.get("sec-websocket-version") != "13":  # 4.4
        raise HTTPError(426, "only WebSocket version 13", (("Sec-WebSocket-Version", "13"),))
    key = request.headers.get("sec-websocket-key", "")
    if not _WEBSOCKET_KEY.fullmatch(key):
        raise HTTPError(400, "Sec-WebSocket-Key is not the base64 of 16 bytes")
    accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()).decode()
    chosen = "Sec-WebSocket-Protocol: aiperf\r\n" if "aiperf" in subprotocols(request) else ""
    head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade"
    return f"{head}\r\nSec-WebSocket-Accept: {accept}\r\n{chosen}\r\n".encode()


def page_cookie(token: bytes) -> str:
    """Return what a browser's cookie holds: it admits like the token, but does not reveal it."""
    return hmac.new(token, b"aiperf-api page cookie", "sha256").hexdigest()


def has_page_token(request: Request, token: bytes) -> bool:
    return any(hmac.compare_digest(value.encode("utf-8"), token) for value in request.args("token"))


def check_token(request: Request, token: bytes, cookie_name: str) -> None:
    """Refuse with 401 a request without the token.  Browsers cannot set every header: they send `?token=`, the
    subprotocol `aiperf.token.TOKEN`, or the cookie that a page opened with it sets."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    given = [credentials.strip(" ")] if scheme.lower() == "bearer" else []
    offered = (name.partition(_TOKEN_PROTOCOL) for name in subprotocols(request))
    given += [value for before, prefix, value in offered if prefix and not before]
    cookie = f"{cookie_name}={page_cookie(token)}".encode()
    fits = [hmac.compare_digest(value.encode("latin-1"), token) for value in given]  # a str must be ASCII
    cookies = (pair.strip(" ") for pair in request.headers.get("cookie", "").split(";"))
    fits += [hmac.compare_digest(pair.encode("latin-1"), cookie) for pair in cookies if pair]
    if not any((*fits, has_page_token(request, token))):
        what = "this is not the token of this server" if given or request.args("token") else "a token is needed"
        hint = f"{what} (--api-token, AIPERF_API_TOKEN): -H 'Authorization: Bearer TOKEN', or ?token=TOKEN"
        raise HTTPError(401, hint, (("WWW-Authenticate", 'Bearer realm="aiperf-api"'),))


# -- Negotiation and responses


def _weighted(header: str) -> list[tuple[str, dict[str, str], float]]:
    """Return (value, parameters, q) of each well-formed member of an Accept header."""
    members = []
    for item in header.lower().split(",", HTTP_FIELDS_MAX)[:HTTP_FIELDS_MAX]:
        value, *rest = (part.strip(" \t") for part in item.split(";"))
        params = {name.strip(" \t"): text.strip(' \t"') for name, _, text in (part.partition("=") for part in rest)}
        q = params.pop("q", "1")
        if value and _QVALUE.fullmatch(q):
            members.append((value, params, float(q)))
    return members


@functools.lru_cache(maxsize=64)  # without it, this took a quarter of the time of a scrape
def accepts(header: str | None, offered: tuple[str, ...]) -> str:
    """Return the media type that an Accept header likes best, the earlier of equals (RFC 9110 12.5.1)."""
    ranges = _weighted(header or "*/*")

    def weight(offer: str) -> float:  # the q of the most specific range that covers it
        [(kind, params, _)] = _weighted(offer)
        ranks = {"*/*": 0, kind.partition("/")[0] + "/*": 1, kind: 2}
        # A parameter that the offer does not have excludes nothing: Prometheus adds `escaping=...`.
        fits = [
            (ranks[value], len(wanted), q)
            for value, wanted, q in ranges
            if value in ranks and all(params.get(name, text) == text for name, text in wanted.items())
        ]
        return max(fits, default=(0, 0, 0.0))[2]

    return max(offered, key=weight)


@functools.lru_cache(maxsize=64)
def accepts_gzip(header: str | None) -> bool:  # RFC 9110 12.5.3
    codings = {value: q for value, _, q in _weighted(header or "")}
    return codings.get("gzip", codings.get("x-gzip", codings.get("*", 0.0))) > 0


def etag(body: bytes) -> tuple[str, str]:
    """Return an ETag header; weak, as it stands for the plain and the compressed form (RFC 9110 8.8.1)."""
    return "ETag", f'W/"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'


def _header_bytes(headers: HeaderList) -> bytes:
    """Return header lines; ValueError for what would split a response (CVE-2016-9964, CVE-2020-7695)."""
    lines = [f"{name}: {value}".encode("latin-1") for name, value in headers]
    if not all(map(_FIELD_LINE.fullmatch, lines)):
        raise ValueError(f"not headers: {printable(str(headers))}")
    return b"".join([line + b"\r\n" for line in lines])


@functools.lru_cache(maxsize=64)  # to make it anew took longer than the answer
def _head_bytes(status: int, content_type: str, is_compressible: bool, own: HeaderList) -> bytes:
    """Return how all heads of an answer begin; its own headers replace our defaults."""
    defaults = [] if status in (204, 304) else [("Content-Type", content_type)]
    defaults += [("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")]
    if is_compressible:
        defaults.append(("Vary", "Accept-Encoding"))
    if content_type.startswith("text/html"):  # Referrer-Policy: the address may hold ?token=
        defaults += [("Content-Security-Policy", _PAGE_POLICY), ("Referrer-Policy", "no-referrer")]
    kept = [pair for pair in defaults if pair[0] not in dict(own)]
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode() + _header_bytes((*kept, *own))


class Response:
    """One answer, sent to any number of requests.  A `body` of None is a stream that ends with the connection."""

    def __init__(
        self, status: int = 200, body: bytes | None = b"",
        content_type: str = "application/json", headers: HeaderList = (),
    ) -> None:  # fmt: skip
        self.status, self.body, self.headers = status, body, tuple(headers)
        self.is_compressible = status == 200 and _GZIP_BYTES_MIN <= len(body or b"") <= _GZIP_BYTES_MAX
        self._head = _head_bytes(status, content_type, self.is_compressible, self.headers)
        self._gzip_body = b""  # made when the first client wants it
        self._sent: tuple[bytes, bool, bytes] = b"", False, b""  # date, coding and bytes of the last answer

    def payload(self, is_gzip: bool) -> bytes:
        """Return the body as it is sent: always the same object, shared by all who read it."""
        body = self.body or b""
        if not (is_gzip and self.is_compressible):
            return body
        if not self._gzip_body:  # level 6 takes 5 ms for 128 KiB
            self._gzip_body = gzip.compress(body, 6 if len(body) <= _GZIP_BYTES_MAX // 8 else 1, mtime=0)
        return self._gzip_body

    def encode(
        self, *, date: bytes, head_only: bool = False, close: bool = False, gzip: bool = False, extra: HeaderList = ()
    ) -> bytes:
        """Return the bytes of the answer, or its head alone: payload() may be written behind it."""
        is_usual = not (head_only or close or extra)
        if is_usual and self._sent[:2] == (date, gzip):
            return self._sent[2]
        head, body = self._head, self.payload(gzip)
        if gzip and self.is_compressible:
            head += b"Content-Encoding: gzip\r\n"
        if self.body is not None and self.status not in (204, 304):  # RFC 9110 8.6
            head += b"Content-Length: %d\r\n" % len(body)
        end = b"Connection: close\r\n\r\n" if close or self.body is None else b"\r\n"
        sent = b"".join((head, b"Date: ", date, b"\r\n", _header_bytes(extra), end, b"" if head_only else body))
        if is_usual:
            self._sent = date, gzip, sent
        return sent


def json_response(value: JSONValue, status: int = 200, pretty: bool = False, headers: HeaderList = ()) -> Response:
    """Return a JSON answer; a long one can be asked for again by its ETag."""
    body = json_bytes(value, pretty=pretty) + b"\n"
    if status == 200 and len(body) >= _GZIP_BYTES_MIN:
        headers = (etag(body), ("Cache-Control", "no-cache"), *headers)
    return Response(status, body, headers=headers)


def text_response(text: str, status: int = 200, headers: HeaderList = ()) -> Response:
    return Response(status, text.encode("utf-8", "replace"), "text/plain; charset=utf-8", headers)


def error_response(error: HTTPError, pretty: bool = False) -> Response:
    return json_response({"error": error.message}, error.status, pretty, error.headers)


def with_preconditions(request: Request, response: Response) -> Response:
    """Return the response, or in its place a 304 or 412 (RFC 9110 13.2.2)."""
    if response.status != 200:
        return response
    if request.headers.get("if-match", "*") != "*":  # 13.1.1: by strong comparison, which our weak tags never pass
        return error_response(HTTPError(412, "If-Match names no version that is here"), request.wants_pretty)
    if_none_match = request.headers.get("if-none-match")
    if not if_none_match:
        return response
    tag = dict(response.headers).get("ETag", "").removeprefix("W/")  # 13.1.2: by weak comparison
    if if_none_match != "*" and tag not in _ENTITY_TAG.findall(if_none_match):
        return response
    kept = [pair for pair in response.headers if pair[0] in ("Cache-Control", "ETag")]
    kept += [("Vary", "Accept-Encoding")] if response.is_compressible else []
    return Response(304, b"", "", kept)  # 15.4.5


# == 6 == Router and static files ======================================================================================
#
# Paths are looked up in dicts, never built: nothing to traverse, and no redirect to "//host" (CVE-2021-28861).

_METHODS = frozenset("GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH".split())  # RFC 9110 9.3, RFC 5789
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9/_.-]{0,63}")  # safe to quote anywhere, and short: difflib is slow


class Route(NamedTuple):
    path: str  # exact, but "/{word}" at its end matches any rest that is not empty
    name: str  # unique; operationId in openapi.json
    summary: str
    answer: Callable[..., Any]
    methods: tuple[str, ...] = ("GET", "HEAD")
    needs_token: bool = True


class Router:
    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        self._by_path = {route.path: route for route in self.routes if "{" not in route.path}
        folders = {route.path.partition("{")[0]: route for route in self.routes if "{" in route.path}
        self._by_folder = dict(sorted(folders.items(), reverse=True))  # the longest first

    def match(self, method: str, path: str) -> tuple[Route, str]:
        """Return the route and the rest of a path; raise HTTPError 404, 405 or 501."""
        if method not in _METHODS:  # RFC 9110 9.1
            raise HTTPError(501, "unknown method")
        route, rest = self._by_path.get(path), ""
        if route is None:
            folder = next((folder for folder in self._by_folder if path.startswith(folder) and path != folder), None)
            if folder is None:
                raise HTTPError(404, self._unknown(path))
            route, rest = self._by_folder[folder], path[len(folder) :]
        if method not in route.methods:  # RFC 9110 15.5.6
            methods = ", ".join(route.methods)
            raise HTTPError(405, f"method not allowed; {route.path} has {methods}", (("Allow", methods),))
        return route, rest

    def _unknown(self, path: str) -> str:
        if not _PLAIN_PATH.fullmatch(path):
            return "unknown path; GET /api lists what there is"
        import difflib  # only here: few paths are wrong

        near = difflib.get_close_matches(path, self._by_path, n=1, cutoff=0.8)
        return f"unknown path {path}; " + (f"did you mean {near[0]}?" if near else "GET /api lists what there is")


# -- Static files

DEMO_RECORDING = "demo.jsonl.gz"
_CONTENT_TYPES = MappingProxyType({
    ".css": "text/css; charset=utf-8", ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".json": "application/json", ".md": "text/plain; charset=utf-8", ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
})  # fmt: skip


def read_static_files() -> dict[str, bytes]:
    """Return every file that ships with the module, by its path under static/."""
    here = os.path.dirname(os.path.abspath(__file__))
    if os.path.isfile(here):  # `python3 -m zipapp`: the "folder" is the archive
        import zipfile

        with zipfile.ZipFile(here) as archive:
            names = [name for name in archive.namelist() if name.startswith("static/") and not name.endswith("/")]
            return {name[len("static/") :]: archive.read(name) for name in names}
    for name in ("static", "aiperf_api_static"):  # of a copied module, of an installed one
        folder = os.path.join(here, name)  # site-packages may hold another of that name
        if any(os.path.isfile(os.path.join(folder, file)) for file in ("dashboard.html", DEMO_RECORDING)):
            return _read_folder(folder)
    return {}


def _read_folder(folder: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for parent, _, names in os.walk(folder):  # does not follow links to folders
        for path in (os.path.join(parent, name) for name in names):
            if os.path.isfile(path) and not os.path.islink(path):
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    files[os.path.relpath(path, folder).replace(os.sep, "/")] = file.read()
    return files


def static_table(files: Mapping[str, bytes]) -> dict[str, Response]:
    """Return what is served under /static/: files of a known type, which recordings are not."""
    return {
        name: Response(200, body, content_type, (etag(body), ("Cache-Control", "no-cache")))
        for name, body in files.items() if (content_type := _CONTENT_TYPES.get(os.path.splitext(name)[1].lower()))
    }  # fmt: skip


# == 7 == Metrics ======================================================================================================
#
# AIPerf up to 0.6 publishes metrics in the unit they are measured in, later versions in the unit that people read: both
# come out as the latter.  The lists are of AIPerf 0.13's registry; a tag that is not in them passes unchanged.

_HIDDEN_TAGS = frozenset(
    """credit_drop_latency max_response_timestamp min_request_timestamp overall_thinking_efficiency requested_osl
    replay_send_schedule_offset stream_prefill_latency stream_setup_latency thinking_efficiency""".split()
)
# (unit on the bus, display unit, factor, tags); AIPerf multiplies, too: exports agree to the last digit
_CONVERTED_TAGS = (
    ("ns", "ms", 1e-6, """decode_duration http_req_blocked http_req_connecting http_req_connection_overhead
        http_req_dns_lookup http_req_duration http_req_receiving http_req_sending http_req_total http_req_waiting
        inter_chunk_latency inter_token_latency network_adjusted_request_latency
        network_adjusted_time_to_first_output_token network_adjusted_time_to_first_token network_rtt request_latency
        time_to_first_output_token time_to_first_token time_to_second_token"""),
    ("ns", "sec", 1e-9, "benchmark_duration"),
    ("B", "KB", 1 / 1024, "http_req_data_received http_req_data_sent"),
    ("sec", "ms", 1000.0, "video_inference_time"),
)  # fmt: skip
_CONVERSIONS = MappingProxyType(  # (tag, unit) -> (factor, display unit)
    {(tag, unit): (factor, shown) for unit, shown, factor, tags in _CONVERTED_TAGS for tag in tags.split()}
)
QUANTILES = MappingProxyType({f"p{p}": f"{p / 100}" for p in (1, 5, 10, 25, 50, 75, 90, 95, 99)})
STATISTICS = frozenset(("avg", "min", "max", "std", "sum", "current", *QUANTILES))  # in the row's unit

MetricRow = dict[str, Any]
MetricRows = dict[str, MetricRow]  # by tag, without it


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def text_or(value: Any, default: str) -> str:
    return value if isinstance(value, str) and value else default


def is_name(text: str) -> bool:
    """Tell whether a name is short enough, as UTF-8 and in memory (1 to 4 bytes a character)."""
    if len(text) <= NAME_BYTES_MAX // 4:
        return True
    return sys.getsizeof(text) <= NAME_BYTES_MAX + 80 and len(text.encode("utf-8", "replace")) <= NAME_BYTES_MAX


@functools.lru_cache(maxsize=ROWS_MAX)  # a run has some hundred shapes, and a burst 100,000 rows a second
def _row_plan(names: tuple[str, ...], *types: type) -> tuple[list[str], list[str], list[str], float, str] | None:
    """Return how rows with this tag, unit and fields are shown: fields to remove, further fields of text, statistics
    to multiply, by what, and their unit then; None where they are hidden or unfit."""
    tag, unit, *fields = names
    if not tag or tag in _HIDDEN_TAGS or not is_name(tag) or not is_name(unit):
        return None
    kept = {}  # no null, nothing nested, and a number where one belongs
    for field, kind in zip(fields, types):
        fits = kind in (int, float) or (kind in (str, bool) and field not in STATISTICS and field != "count")
        if fits and field != "console_group" and is_name(field):
            kept[field] = kind
    factor, shown = _CONVERSIONS.get((tag, unit), (1.0, ""))
    scaled = [field for field in kept if shown and field in STATISTICS]
    texts = [field for field, kind in kept.items() if kind is str and field not in ("tag", "unit")]
    return [field for field in fields if field not in kept], texts, scaled, factor, shown


def display_row(row: Any) -> MetricRow | None:
    """Return a row as people read it, without nulls and what is internal; None if it is hidden or unfit."""
    if not isinstance(row, dict) or not isinstance(row.get("tag"), str) or len(row) > EXTRAS_MAX:
        return None
    names = (row["tag"], text_or(row.get("unit"), ""), *row)
    plan = _row_plan(names, *map(type, row.values())) if len("".join(names)) <= 4 * NAME_BYTES_MAX else None
    if plan is None:
        return None
    removed, texts, scaled, factor, display_unit = plan
    if not all(map(is_name, map(row.__getitem__, texts))):
        return None
    shown: MetricRow = row.copy()
    for field in removed:
        del shown[field]
    if display_unit:
        shown["unit"] = display_unit
        for field in scaled:
            shown[field] *= factor
    return shown


def display_list(rows: Any) -> list[MetricRow]:
    shown = map(display_row, rows[:ROWS_MAX] if isinstance(rows, list) else ())
    return [row for row in shown if row is not None]


def display_rows(rows: Any) -> MetricRows:
    return {row.pop("tag"): row for row in display_list(rows)}


def _shown(value: Any) -> Any:
    """Return a part of final results with its rows, objects with a tag at any depth, as people read them."""
    if isinstance(value, list):
        return [shown for shown in map(_shown, value) if shown is not None]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("tag"), str):
        return display_row(value)
    shown = {key: _shown(item) for key, item in value.items()}
    return {key: item for key, item in shown.items() if item is not None or value[key] is None}


def shown_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message of metrics or final results as clients get it; the same object if nothing changes."""
    if isinstance(message.get("metrics"), list):
        changed: dict[str, Any] = {"metrics": display_list(message["metrics"])}
    else:
        outer: Any = message.get("results")
        inner = outer.get("results") if isinstance(outer, dict) else None
        if not isinstance(inner, dict):
            return message
        parts = ("records", "warmup_records", "timeslices", "timeslice_metric_results")
        shown = {part: _shown(inner[part]) for part in parts if inner.get(part) is not None}
        changed = {"results": {**outer, "results": {**inner, **shown}}}
    return message if changed.items() <= message.items() else {**message, **changed}


# == 8 == Prometheus text ==============================================================================================
#
# Names and labels of the benchmark's metrics are those of AIPerf's own exporter: dashboards for one fit the other.

CONTENT_TYPE_TEXT_0_0_4 = "text/plain; version=0.0.4; charset=utf-8"
CONTENT_TYPE_OPENMETRICS_1_0_0 = "application/openmetrics-text; version=1.0.0; charset=utf-8"
Labels = tuple[tuple[str, str], ...]  # (name, value) in order


class Family(NamedTuple):
    name: str  # without `_total` and `_info`, as OpenMetrics has it
    kind: str  # "gauge", "counter", "summary" or "info"
    help: str
    unit: str  # the end of the name, or ""
    samples: dict[str, Any]  # by what follows the name, such as `_sum{model="m"}`: none is there twice


# By type: what 0.0.4 calls it and puts behind its name, and all ends of names that no other family may have
_KINDS = MappingProxyType({
    "gauge": ("gauge", "", ()), "counter": ("counter", "_total", ("_total", "_created")),
    "summary": ("summary", "", ("_sum", "_count", "_created")), "info": ("gauge", "_info", ("_info",)),
})  # fmt: skip
# Statistics that are gauges, in AIPerf's words; the last two only without percentiles
_GAUGES = MappingProxyType({
    "avg": "average", "min": "minimum", "max": "maximum", "std": "standard deviation", "current": "current value",
    "count": "observation count", "sum": "observation sum",
})  # fmt: skip
_NOT_IN_A_NAME = re.compile("[^a-zA-Z0-9_]")
# A name on the bus must not drive the terminal behind curl; the line feed is escaped
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def metric_name(text: str) -> str:
    name = _NOT_IN_A_NAME.sub("_", text.lower())
    return f"_{name}" if name[:1].isdigit() else name


@functools.lru_cache(maxsize=64)
def unit_name(unit: str) -> str:
    """Return a unit as the end of a name, by AIPerf's rules: tokens/sec/user is tps_per_user."""
    unit = unit.replace("%", "percent").replace("/", "_per_").replace("tokens_per_sec", "tps").replace("__", "_")
    return metric_name(unit)


def _escape(text: str) -> str:
    if text.isprintable() and "\\" not in text:
        return text
    return _CONTROL.sub(" ", text).replace("\\", "\\\\").replace("\n", "\\n")


def _labels_text(labels: Labels) -> str:
    return ",".join([f'{name}="' + _escape(value).replace('"', '\\"') + '"' for name, value in labels])


def render_text(families: Iterable[Family]) -> bytes:
    lines = []
    for name, kind, help_text, _, samples in families:
        shown, suffix, _ = _KINDS[kind]
        lines.append(f"# HELP {name}{suffix} {_escape(help_text)}\n# TYPE {name}{suffix} {shown}\n")
        lines += [f"{name}{key} {value!r}\n" for key, value in samples.items()]
    return "".join(lines).encode("utf-8", "replace")


def render_openmetrics(families: Iterable[Family]) -> bytes:
    lines = []
    for name, kind, help_text, unit, samples in families:
        unit_line = f"# UNIT {name} {unit}\n" if unit and name.endswith(f"_{unit}") else ""
        escaped = _escape(help_text).replace('"', '\\"')
        lines.append(f"# TYPE {name} {kind}\n{unit_line}# HELP {name} {escaped}\n")
        fit = samples.items()
        if kind == "summary":  # no negative figures and no fractional count
            fit = {key: n for key, n in fit if n >= 0 and (n % 1 == 0 or key[:6] != "_count")}.items()
        lines += [f"{name}{key} {value!r}\n" for key, value in fit]
    return "".join((*lines, "# EOF\n")).encode("utf-8", "replace")


def unique_families(families: Iterable[Family]) -> list[Family]:
    """Return the families whose names no earlier one uses: a scrape with a name twice is refused."""
    used: set[str] = set()
    kept = []
    for family in families:
        names = [family.name, *map(family.name.__add__, _KINDS[family.kind][2])]
        if family.samples and used.isdisjoint(names):
            used.update(names)
            kept.append(family)
    return kept


class FamilySet:
    """Families in the making; the first of equal series wins.  `room`: samples and bytes left, samples left out."""

    def __init__(self, before: FamilySet | None = None) -> None:
        self.families: dict[str, Family] = {}
        self.room: list[int] = before.room if before else [SAMPLES_MAX, SAMPLES_BYTES_MAX, 0]
        self._rows: set[tuple[str, str]] = set()  # names and labels

    def add(self, head: tuple[str, str, str, str], labels: Labels, value: Any) -> None:
        """Add a sample to the family (name, kind, help, unit), if it is a number, and of a counter not negative."""
        key = _KINDS[head[1]][1] + (f"{{{_labels_text(labels)}}}" if labels else "")
        if is_number(value) and (value >= 0 or head[1] != "counter") and self._admits(1, head[0], key):
            self._samples(*head)[key] = value

    def _admits(self, samples: int, name: str, labels: str) -> bool:
        """Tell whether a row is new (two equal ones would mix) and fits; if so, take its room."""
        if (name, labels) in self._rows:
            return False
        self._rows.add((name, labels))
        size = samples * (40 + len((name + labels).encode("utf-8", "replace")))  # a quantile, and the number
        if samples > self.room[0] or size > self.room[1]:
            self.room[2] += samples
            return False
        self.room[:2] = self.room[0] - samples, self.room[1] - size
        return True

    def _samples(self, name: str, kind: str, text: str, unit: str) -> dict[str, Any]:
        """Return the samples of a family; those of another kind go nowhere."""
        family = self.families.get(name)
        if family is None:
            family = self.families[name] = Family(name, kind, text, unit, {})
            self.room[1] -= 4 * len(name) + len(text.encode("utf-8", "replace"))
        return family.samples if family.kind == kind else {}

    def add_row(self, base: str, row: Mapping[str, Any], labels: str, title: str) -> None:
        """Add a row of statistics: percentiles with sum and count as a summary, the rest as gauges."""
        unit = text_or(row.get("unit"), "").replace("°C", "celsius")
        ending = unit_name(unit)
        suffix, words = (f"_{ending}" if unit else ""), f" (in {unit})"
        key, opened = (f"{{{labels}}}", f"{{{labels},") if labels else ("", "{")
        figures = {stat: value for stat, value in row.items() if type(value) in (int, float) and abs(value) < math.inf}
        if not self._admits(len(figures), base + suffix, labels):
            return
        if not figures.keys().isdisjoint(QUANTILES):
            samples = self._samples(base + suffix, "summary", title + words, ending)
            samples.update({f'{opened}quantile="{QUANTILES[p]}"}}': figures[p] for p in QUANTILES if p in figures})
            samples.update({f"_{stat}{key}": figures.pop(stat) for stat in ("count", "sum") if stat in figures})
        for stat, phrase in _GAUGES.items():
            if stat in figures:
                name = f"{base}_{stat}{suffix}"
                self._samples(name, "gauge", f"{title} {phrase}{words}", ending).setdefault(key, figures[stat])

    def add_series(self, series: ServerSeries, labels: Labels) -> None:
        """Add a series of an inference server, in its own words."""
        endpoint, own_name, series_kind, title, own_labels, own_stats = series
        base = f"aiperf_server_{metric_name(own_name)}"
        stem = _SERVER_UNIT.sub("", base)
        suffix = base[len(stem) :]
        joined = dict((*labels, ("endpoint", endpoint)))
        reserved = {*joined, "quantile", "le"}
        for original, value in own_labels:  # renamed where they clash with ours, as Prometheus does
            name = _NOT_IN_A_NAME.sub("_", original)
            clash = name in reserved or not re.match("_?[a-zA-Z]", name)
            joined.setdefault(f"exported_{name}" if clash else name, value)
        text = _labels_text(tuple(joined.items()))
        figures = ((stat.replace("_estimate", ""), value) for stat, value in own_stats.items() if is_number(value))
        stats = dict(islice(figures, 16))
        if not self._admits(len(stats), base, text):
            return
        is_summary = series_kind == "histogram" or not QUANTILES.keys().isdisjoint(stats)
        for stat, value in stats.items():
            name, kind, words, key = base, "summary", title, f"_{stat}{{{text}}}"
            if stat in QUANTILES:
                key = f'{{{text},quantile="{QUANTILES[stat]}"}}'
            elif stat == "total" and series_kind == "counter":
                kind = "counter"
            elif stat not in ("sum", "count") or not is_summary:
                has_unit = stat in _GAUGES and stat != "count"  # the metric's own
                name = f"{stem}_{stat}{suffix}" if has_unit else f"{base}_{metric_name(stat)}"
                words = f"{title} ({_GAUGES[stat] if has_unit else stat.replace('_', ' ')})"
                kind, key = "gauge", f"{{{text}}}"
            if value >= 0 or kind != "counter":
                self._samples(name, kind, words, suffix[1:]).setdefault(key, value)


def metric_families(metrics: MetricRows, labels: Labels = (), before: FamilySet | None = None) -> list[Family]:
    found, text = FamilySet(before), _labels_text(labels)
    for tag, row in metrics.items():
        found.add_row(f"aiperf_{metric_name(tag)}", row, text, text_or(row.get("header"), tag))
    return list(found.families.values())


# -- GPU telemetry: AIPerf has the GPU in the tag; here it is in labels

_GPU_VENDOR = re.compile("(nvidia|amd)[_ ]", re.IGNORECASE)


def gpu_series(tag: str, header: str) -> tuple[str, str, Labels]:
    """Return (metric, title, labels) of a tag `METRIC_dcgm_SOURCE_gpuINDEX_UUID` and a header
    `TITLE | SOURCE | GPU INDEX | NAME`, whose name may hold a bar."""
    title, source, gpu, gpu_name = (*header.split(" | ", 3), "", "", "", "")[:4]
    metric, _, rest = tag.partition("_dcgm_")
    place, _, device = rest.rpartition("_gpu")
    index, _, uuid = device.partition("_")
    if place and uuid and index.isdecimal():
        source, gpu = source or place, index
    else:
        metric, uuid, gpu = tag, "", gpu.replace("GPU ", "")
    labels = (("source", source), ("gpu", gpu), ("gpu_name", gpu_name), ("uuid", uuid))
    return _GPU_VENDOR.sub("", metric, 1).removeprefix("gpu_"), _GPU_VENDOR.sub("", title, 1), labels


def telemetry_families(telemetry: MetricRows, labels: Labels = (), before: FamilySet | None = None) -> list[Family]:
    found = FamilySet(before)
    for tag, row in telemetry.items():
        metric, title, own = gpu_series(tag, text_or(row.get("header"), tag))
        found.add_row(f"aiperf_gpu_{metric_name(metric)}", row, _labels_text((*labels, *own)), title)
    return list(found.families.values())


# -- Inference-server metrics: the server's own names and labels, prefixed

_SERVER_UNIT = re.compile("_(?:seconds|milliseconds|bytes|ratio|percent|tokens|celsius|watts|joules)$")
ServerSeries = tuple[str, str, str, str, Labels, Mapping[str, Any]]  # endpoint, name, type, description, ...


def server_series(summaries: Any) -> Iterator[ServerSeries]:
    """Yield the well-formed ones of the first ROWS_MAX series in `endpoint_summaries`."""
    found = (
        (endpoint, name, metric, series)
        for endpoint, summary in _objects(summaries)
        for name, metric in _objects(summary.get("metrics"))
        for series in (metric["series"] if isinstance(metric.get("series"), list) else ())
        if isinstance(series, dict)
    )
    for endpoint, name, metric, series in islice(found, ROWS_MAX):
        stats, labels = series.get("stats"), series.get("labels") or {}
        if isinstance(stats, dict) and isinstance(labels, dict):
            own = sorted((key, str(text)) for key, text in labels.items())
            if all(map(is_name, (endpoint, name, *itertools.chain(*own)))):
                kind, title = text_or(metric.get("type"), "gauge"), text_or(metric.get("description"), name)
                yield endpoint, name, kind, title, tuple(own), stats


def _objects(value: Any, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (key, object) pairs among the first `limit` members of whatever this is."""
    items = islice(value.items(), limit) if isinstance(value, dict) else ()
    return ((key, inner) for key, inner in items if isinstance(inner, dict))


def server_families(summaries: Any, labels: Labels = (), before: FamilySet | None = None) -> list[Family]:
    found = FamilySet(before)
    for series in server_series(summaries):
        found.add_series(series, labels)
    return list(found.families.values())


# == 9 == Benchmark ====================================================================================================
#
# A reducer: bus messages go in, answers come out at any moment. Time comes in as an argument: the bus clock, in ns.
# What a run keeps is bounded, whatever the bus sends.

Fields = dict[str, Any]  # of a JSON object

# Nothing was heard yet; then AIPerf's states, in their order
STATES = ("waiting", "initializing", "configuring", "ready", "profiling", "processing", "stopping", "shutdown")
ENDS = ("complete", "cancelled", "failed")

METRICS_MESSAGE_TYPES = frozenset("realtime_metrics realtime_telemetry_metrics realtime_server_metrics".split())
RESULT_MESSAGE_TYPES = frozenset(("process_all_results", "process_records_result"))  # from 0.12 on; in all versions
# Types whose latest message replaces all before: not those that tell of one worker or group each.
STATE_MESSAGE_TYPES = METRICS_MESSAGE_TYPES | {"credit_phase_progress", "processing_stats", "worker_status_summary"}
# Never looked through for secrets
FIGURES_MESSAGE_TYPES = METRICS_MESSAGE_TYPES | frozenset("""all_records_received credit_phase_complete
    credit_phase_progress credit_phase_sending_complete credits_complete dataset_configured_notification heartbeat
    phase_baseline_request processing_stats worker_group_stats worker_health worker_pod_state worker_startup_state
    worker_status_summary""".split())  # fmt: skip
_ENVELOPE = ("message_type", "service_id", "request_ns", "request_id")  # of any message


class BusMessage:
    """A message of the bus, parsed once when somebody asks."""

    parsed: Fields | None = None
    not_finite = False  # NaN or an infinity became null
    is_cut = False  # parts of huge results are gone
    errors_left_out = 0

    def __init__(self, type: str, payload: bytes) -> None:  # noqa: A002
        self.type, self.payload = type, payload  # as the topic names it

    @property
    def value(self) -> Fields:
        """The JSON object; may rewrite `payload`.  BusError too_large, not_json, not_object or too_deep."""
        if self.parsed is not None:
            return self.parsed
        items = sum(map(self.payload.count, (b",", b"[", b"{"))) if len(self.payload) > JSON_ITEMS_MAX else 0
        most = JSON_ITEMS_MAX * (4 if self.type in RESULT_MESSAGE_TYPES else 1)
        if items > most:
            raise BusError("too_large", f"{self.type} of over {most} items")
        try:
            value, self.not_finite = json_load_lenient(self.payload)
        except JSONError as error:
            raise BusError("too_deep" if "deep" in str(error) else "not_json", f"not JSON: {error}") from None
        if not isinstance(value, dict):
            raise BusError("not_object", f"a {type(value).__name__} instead of an object")
        self.parsed = self._without_more(value, items) if self.type in RESULT_MESSAGE_TYPES else value
        if self.not_finite or self.parsed is not value:
            self.payload = json_bytes(self.parsed)
        return self.parsed

    def _without_more(self, value: Fields, items: int) -> Fields:
        """Return final results without what is not kept."""
        outer, inner = _object(value, "results"), _object(value, "results", "results")
        records, errors = _list(inner.get("records")), _list(inner.get("error_summary"))
        self.is_cut = items > JSON_ITEMS_MAX or len(self.payload) > RESULTS_KEPT_BYTES_MAX
        if not self.is_cut and len(records) <= ROWS_MAX and len(errors) <= RUNS_MAX:
            return value
        # Those with 499, which were aborted, count apart, however few
        most = heapq.nlargest(RUNS_MAX, map(_object, errors), lambda one: (
            _object(one, "error_details").get("code") == 499, _count(one.get("count")) or 0))  # fmt: skip
        self.errors_left_out = len(errors) - len(most)
        if self.is_cut:
            value, outer, inner = map(_scalars, (value, outer, inner))
        inner = {**inner, "records": records[:ROWS_MAX], "error_summary": most}
        return {**value, "results": {**outer, "results": inner}}


def _needed(message: BusMessage, field: str, wanted: type) -> Any:
    value = message.value.get(field)
    if not isinstance(value, wanted) or (wanted is str and not _name(value)):
        raise BusError("bad_shape", f"{message.type} without a usable {field}")
    return value


# -- Reading values: something usable and bounded, whatever stands in a field


def _object(value: Any, *keys: str) -> Fields:
    for key in keys:  # one in the other
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _count(value: Any) -> int | None:
    """Return a number that counts something (also a time in ns), or None."""
    return int(value) if is_number(value) and 0 <= value < 2**63 else None


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and value and is_name(value) else None


def _scalars(value: Any, limit: int = EXTRAS_MAX, without: Iterable[str] = ()) -> Fields:
    """Return the first fields that hold a number, a short text or a few numbers."""
    found: Fields = {}
    for key, inner in islice(_object(value).items(), 4 * limit):
        numbers = inner if isinstance(inner, list) and len(inner) <= 8 else (inner,)
        fits = all(isinstance(one, (int, float)) for one in numbers) or _name(inner)
        if fits and len(found) < limit and len(key) <= 64 and key not in without:
            found[key] = inner
    return found


def _bounded_summaries(summaries: Any) -> Fields:
    """Return `endpoint_summaries` with at most ROWS_MAX series and metrics."""
    room, found, parts = ROWS_MAX, {}, ("labels", "stats", "buckets")
    for endpoint, summary in _objects(summaries, 256):
        metrics = {}
        for name, metric in _objects(summary.get("metrics"), room):
            series = [one for one in _list(metric.get("series"))[:room] if isinstance(one, dict)]
            kept = [{part: _scalars(one[part]) for part in parts if part in one} for one in series]
            metrics[name] = {**_scalars(metric), "series": kept}
            room = max(0, room - 1 - len(series))
        found[endpoint] = {**_scalars(summary), "info": _scalars(summary.get("info")), "metrics": metrics}
    return found


def _error_text(error: Any) -> str | None:
    """Return a text or AIPerf's {code, type, message} as one line."""
    error = error if isinstance(error, dict) else {"message": error}
    code, kind, message = _count(error.get("code")), text_or(error.get("type"), ""), text_or(error.get("message"), "")
    text = message if message.startswith(kind) else ": ".join(filter(None, (kind, message)))
    return (text if code is None else f"{code} {text}")[:NAME_BYTES_MAX] or None


def _pairs(text: str) -> Mapping[str, str]:
    return MappingProxyType(dict(pair.split("=") for pair in text.split()))


# -- Phases

# Names of 0.3 -> those of 0.6 and later
_PHASE_FIELDS = _pairs("""sent=requests_sent completed=requests_completed end_ns=requests_end_ns
    final_request_count=final_requests_completed processed=success_records errors=error_records""")  # fmt: skip
_COUNTERS = tuple("""requests_sent requests_completed requests_cancelled request_errors completed_sessions
    success_records error_records""".split())  # fmt: skip


def phase_stats(message: Fields) -> Fields:
    """Return the `stats` of a credit_phase_* message, which is flat in 0.3."""
    stats = _object(message, "stats") if "stats" in message else _scalars(message, without=_ENVELOPE)
    if not _name(stats.get("phase_name") or stats.get("phase")):
        raise BusError("bad_shape", "a phase message without the name of a phase")
    return stats


class Phase:
    """What AIPerf tells of one phase of a run, and what follows from that."""

    aborted = 0  # cancelled requests, which AIPerf counts as errors
    is_complete = False
    elapsed_ns = 0

    def __init__(self, name: str, stats: Mapping[str, Any], now_ns: int) -> None:
        self.name = name  # as the user named it, else its kind
        self.kind = _name(stats.get("phase_kind")) or _name(stats.get("phase")) or name  # warmup or profiling
        self.is_warmup = self.kind == "warmup"
        self.first_ns = now_ns
        self.stats: Fields = dict.fromkeys(_COUNTERS, 0)  # by AIPerf's names, times by its clock
        self.update({}, now_ns)

    def update(self, stats: Mapping[str, Any], now_ns: int) -> None:
        self.update_ns, told = now_ns, self.stats
        for name, value in _scalars(stats).items():
            key = _PHASE_FIELDS.get(name, name)
            counter = key.removeprefix("final_")
            if counter in _COUNTERS:
                told[counter] = max(told[counter], _count(value) or 0)
            if key not in _COUNTERS and (key in told or len(told) < EXTRAS_MAX):
                told[key] = value
        self.start_ns = _count(told.get("start_ns"))
        self.end_ns = _count(told.get("requests_end_ns"))
        self.expected = _count(told.get("total_expected_requests"))
        self.duration_sec = _positive(told.get("expected_duration_sec"))
        self.records = told["success_records"] + told["error_records"]
        # Versions differ in which counters are up to date: the one that is ahead is right.
        self.done = max(told["requests_completed"], self.records) - self.aborted
        self.failed = max(told["request_errors"], told["error_records"]) - self.aborted
        self.cancelled = max(told["requests_cancelled"], self.aborted)
        self.has_begun = bool(self.start_ns or told["requests_sent"] or self.done > 0)

    def percent(self) -> float:
        """Return 0 to 100; the target that is reached first counts, as in AIPerf."""
        targets = self.expected, self.duration_sec, _count(self.stats.get("expected_num_sessions"))
        reached = self.done, self.elapsed_ns / 1e9, self.stats["completed_sessions"]
        shares = [now / target for now, target in zip(reached, targets) if target]
        return 100.0 if self.is_complete else 100.0 * min(1.0, max(shares, default=0.0))

    def eta_sec(self) -> float | None:
        percent = self.percent()
        return self.elapsed_ns / 1e9 * (100 - percent) / percent if percent > 0 else self.duration_sec

    def figures(self) -> dict[str, int]:
        sent, completed, cancelled = (self.stats[f"requests_{name}"] for name in ("sent", "completed", "cancelled"))
        return {
            "requests_sent": max(sent, self.done), "requests_completed": self.done,
            "requests_cancelled": self.cancelled, "request_errors": self.failed,
            "requests_in_flight": 0 if self.is_complete else max(0, sent - completed - cancelled),
        }  # fmt: skip

    def answer(self, eta_sec: float | None) -> Fields:
        """Return the phase as /api/progress has it, under AIPerf's names."""
        seconds, target = self.elapsed_ns / 1e9, self.done + self.aborted if self.is_complete else self.expected
        records_eta = 0.0 if "records_end_ns" in self.stats else None
        if records_eta is None and eta_sec is not None and self.records and target:
            records_eta = max(0.0, seconds * target / self.records - seconds)
        return {
            **dict.fromkeys("start_ns requests_end_ns total_expected_requests expected_duration_sec".split()),
            **self.stats, **self.figures(),
            "phase": self.kind, "phase_name": self.name, "complete": self.is_complete,
            "elapsed_ns": self.elapsed_ns, "percent_complete": self.percent(), "last_update_ns": self.update_ns,
            "eta_sec": eta_sec, "requests_eta_sec": eta_sec, "records_eta_sec": records_eta,
            "requests_per_second": self.done / seconds if seconds else None,
            "records_per_second": self.records / seconds if seconds else None,
        }  # fmt: skip


# -- History

_TAG_STATS_MAX = 16  # AIPerf's rows have 15
_SAMPLE_NS = 750_000_000  # between two rows at least: messages of one a second may come early
# Where there is no room for all, the last go; `*` stands for what is not here.
_STAT_RANKS = tuple("avg current * count sum p50 p99 max min p90 p95 std p75 p25 p10 p5 p1".split())


def _rank(stat: str) -> int:
    return _STAT_RANKS.index(stat if stat in _STAT_RANKS else "*")


def _halved(column: array[Any]) -> array[Any]:
    """Return the second of every two figures, or the first where the second is NaN."""
    newer, older = column[::-2], column[-2::-2]
    if math.isnan(sum(newer)):
        pairs = itertools.zip_longest(newer, older, fillvalue=math.nan)
        newer = array("d", [new if new == new else old for new, old in pairs])
    return newer[::-1]


class History:
    """Rows, about one a second, with a column for each tag and statistic."""

    def __init__(self) -> None:
        self.interval_sec = 1.0
        self.times = array("q")  # of what came last into each row
        self.columns: dict[str, dict[str, array[float]]] = {}  # by tag and statistic; NaN where nothing came
        self._about: dict[str, Fields] = {}  # by tag
        self._row_ns = 0  # when the last row began
        self._series = 0  # number of columns
        self._ranks = len(_STAT_RANKS)  # ranks below this may have columns
        self._tags_left_out = 0
        self._stats_left_out: set[str] = set()

    def add(self, now_ns: int, group: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Write into the last row, or into a new one if that is a while ago."""
        if self.times and now_ns < self.times[-1]:
            return
        if not self.times or now_ns - self._row_ns >= self.interval_sec * _SAMPLE_NS:
            self._row_ns = now_ns
            self._fit()
            self.times.append(now_ns)
            for columns in self.columns.values():
                for column in columns.values():
                    column.append(math.nan)
        self.times[-1] = now_ns
        for tag, row in rows.items():
            if tag not in self.columns:
                if len(self.columns) >= HISTORY_SERIES_MAX or len(tag) > 2 * NAME_BYTES_MAX:
                    continue
                header = text_or(row.get("header"), tag)[:NAME_BYTES_MAX]
                self._about[tag] = {"unit": text_or(row.get("unit"), ""), "header": header, "group": group}
                self.columns[tag] = {}
            columns = self.columns[tag]
            for stat, value in row.items():
                if is_number(value) and (stat in columns or self._add_column(columns, stat)):
                    columns[stat][-1] = value
        self._tags_left_out = max(self._tags_left_out, len(rows.keys() - self.columns.keys()))

    def _add_column(self, columns: dict[str, array[float]], stat: str) -> bool:
        """Add a column if it fits; to make room all tags may give up statistics of the last ranks, but each keeps
        one."""
        gone: list[str] = []
        while self._series >= HISTORY_SERIES_MAX and self._ranks > 1 and (not columns or _rank(stat) < self._ranks - 1):
            self._ranks -= 1
            for others in self.columns.values():
                for one in sorted(others, key=_rank)[1:]:
                    if _rank(one) >= self._ranks:
                        gone.append(one)
                        del others[one]
            self._series = sum(map(len, self.columns.values()))
        is_known = not columns or _rank(stat) < self._ranks
        fits = is_known and self._series < HISTORY_SERIES_MAX and len(columns) < _TAG_STATS_MAX and len(stat) <= 64
        if fits:
            columns[stat] = array("d", [math.nan]) * len(self.times)
            self._series += 1
            self._fit()
        else:
            gone.append(stat)
        room = max(0, EXTRAS_MAX - len(self._stats_left_out))
        self._stats_left_out.update(islice(dict.fromkeys(gone), room))
        return fits

    def _fit(self) -> None:
        """Make room for another row, by joining every two."""
        while len(self.times) >= HISTORY_POINTS_MAX or (len(self.times) + 1) * self._series > HISTORY_VALUES_MAX:
            pace_sec = (self.times[-1] - self.times[0]) / 1e9 / max(1, len(self.times) - 1)
            self.interval_sec = 2 * max(self.interval_sec, round(pace_sec))
            self.times = _halved(self.times)
            for columns in self.columns.values():
                for stat, column in columns.items():
                    columns[stat] = _halved(column)

    def _truncated(self) -> Fields:
        stats = sorted(self._stats_left_out, key=_rank)
        return {"truncated": {"tags": self._tags_left_out, "stats": stats}} if stats or self._tags_left_out else {}

    def overview(self, start_ns: int | None) -> Fields:
        tags = {tag: {**about, "stats": sorted(self.columns[tag], key=_rank)} for tag, about in self._about.items()}
        head = {"start_ns": start_ns, "interval_sec": self.interval_sec, "points": len(self.times)}
        return {**head, "tags": tags, **self._truncated()}

    def answer(self, tags: Iterable[str], stats: Sequence[str], since_ns: int, points: int) -> Fields:
        """Return series of at most `points` rows; LookupError for what is not there, ValueError for too much."""
        found = {tag: [stat for stat in self.columns.get(tag, ()) if not stats or stat in stats] for tag in tags}
        if not all(found.values()):
            raise LookupError("no such tag, or without these statistics")
        chosen = [(tag, stat) for tag, stats in found.items() for stat in stats]
        start, halvings = bisect_right(self.times, since_ns), 0
        times = self.times[start:]
        while len(times) > max(1, points):
            times, halvings = _halved(times), halvings + 1
        if len(times) * len(chosen) > HISTORY_ANSWER_VALUES_MAX:
            size = f"{len(chosen)} series of {len(times)} points are more than {HISTORY_ANSWER_VALUES_MAX} values"
            raise ValueError(f"{size}: ask for fewer tags, name statistics, or give points or since")
        series = []
        for tag, stat in chosen:
            figures, about = self.columns[tag][stat][start:], self._about[tag]
            for _ in range(halvings):
                figures = _halved(figures)
            values = [value if value == value else None for value in figures]
            unit = "" if stat == "count" else about["unit"]
            series.append({"tag": tag, "stat": stat, "unit": unit, "header": about["header"], "values": values})
        interval_sec = self.interval_sec * 2**halvings
        return {"interval_sec": interval_sec, "times": times.tolist(), "series": series, **self._truncated()}


# -- Configuration and identity

# Of configurations: the first that tells a fact wins; those after "command" are of one run.
_ORIGINS = ("file", "command", "artifacts", "bus", "phases")
# Of AIPerf's run_config.json and export
_ARTIFACT_FIELDS = frozenset("""aiperf_version artifact_dir benchmark_id cfg cli_command input_config label multi_run
    sweep sweep_id trial variation""".split())  # fmt: skip
_IDENTITY_FIELDS = ("benchmark_id", "model", "endpoint_type", "streaming", "concurrency", "request_rate")


def _plain_keys(value: Any) -> Fields:
    """Return an object with `modelNames`, `model-names` and `model_names` as `modelnames`, and without nulls."""
    items = islice(_object(value).items(), ROWS_MAX)
    return {key.replace("-", "").replace("_", "").lower(): inner for key, inner in items if inner is not None}


def _phases_of(section: Mapping[str, Any]) -> list[Fields]:
    phases = section.get("phases")
    if isinstance(phases, dict):
        phases = [{"name": name, **phase} for name, phase in _objects(phases, EXTRAS_MAX)]
    found = [_plain_keys(phase) for phase in _list(phases)[:EXTRAS_MAX]]
    kinds = [_first(*map(phase.get, ("phasekind", "kind", "phase", "name"))) for phase in found]
    return [phase for phase, kind in zip(found, kinds) if kind and kind != "warmup"]


def _model_names(value: Any) -> str | None:
    """Return text, a list, or objects with a name, as AIPerf's exporter joins them."""
    if isinstance(value, dict):
        value = value.get("names") or value.get("items") or value.get("name")
    if isinstance(value, list):
        names = (one.get("name") if isinstance(one, dict) else one for one in value[:EXTRAS_MAX])
        value = ",".join(sorted({name for name in names if isinstance(name, str)}))
    return _name(value)


def _positive(value: Any) -> float | None:
    """Return a positive number, also of a text (on command lines, in YAML)."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,15}(\.\d{1,15})?", value, re.ASCII):
        value = float(value)
    return value if _count(value) is not None and value > 0 else None


def _thresholds(value: Any) -> dict[str, float] | None:
    """Return thresholds given as an object, or in words `tag:number`."""
    words = value.split() if isinstance(value, str) else _list(value)
    pairs = [word.partition(":")[::2] for word in words[:EXTRAS_MAX] if isinstance(word, str)]
    limits = ((tag, _positive(limit)) for tag, limit in (*pairs, *islice(_object(value).items(), EXTRAS_MAX)))
    return {tag: limit for tag, limit in limits if limit is not None and _name(tag)} or None


# How a fact is read, and its keys in AIPerf 0.3 to 0.13 and on the command line
_FACTS: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    ("benchmark_id", _name, "benchmarkid"),
    ("model", _model_names, "modelnames models modelname model"),
    ("endpoint_type", _name, "endpoint.type endpointtype"),
    ("streaming", lambda value: {"true": True, "false": False}.get(str(value).lower()), "streaming"),
    ("concurrency", lambda value: int(_positive(value) or 0) or None, "concurrency"),
    ("request_rate", lambda value: float(_positive(value) or 0) or None, "requestrate rate"),
    ("aiperf_version", _name, "aiperfversion"),
    ("artifact_dir", _name, "artifactdir artifactdirectory output.dir"),
    ("goodput", _thresholds, "goodput slos"),
    ("label", _name, "variation.label label"),
)


def identity_of(config: Mapping[str, Any]) -> Fields:
    """Return the facts that a configuration has, on its own level or in what wraps it."""
    found: Fields = {}
    wrappers = "input_config config user_config benchmark benchmark_config cfg".split()
    wrapped = [_object(config.get(key)) for key in wrappers]
    for section in map(_plain_keys, (config, *wrapped, *(inner.get("benchmark") for inner in wrapped))):
        phases, values = _phases_of(section), dict(section)
        section["phase"] = (*phases, None)[0]
        for part in "artifacts output input variation phase loadgen endpoint".split():
            for key, value in _plain_keys(section.get(part)).items():
                values[key] = values[f"{part}.{key}"] = value
        told = {"phases": len(phases) or None, "runs": _sweep_size(section)}
        for fact, read, keys in _FACTS:
            told[fact] = _first(*(read(values.get(key)) for key in keys.split()))
        found = {**{fact: value for fact, value in told.items() if value is not None}, **found}
    return found


def _sweep_size(section: Mapping[str, Any]) -> int | None:
    sweep, repeats = _plain_keys(section.get("sweep")), _plain_keys(section.get("multirun"))
    size = len(_list(sweep.get("runs"))) or 1
    for values in islice(_object(sweep.get("parameters") or sweep.get("variables")).values(), EXTRAS_MAX):
        size = max(size, len(_list(values))) if sweep.get("type") == "zip" else size * max(1, len(_list(values)))
    size *= _count(repeats.get("numruns")) or 1
    return size if 1 < size < 10**6 else None


# -- The benchmark

_TOO_LARGE = f"results too large: {JSON_ITEMS_MAX} items and {RESULTS_KEPT_BYTES_MAX} bytes are kept at most"
_HAS_RESULTS = RESULT_MESSAGE_TYPES | {"results_exported"}
_ANSWERED = frozenset(("all_records_received", "credits_complete"))  # no phase begins after these
_STATES_TOLD = "system_state_changed"  # 0.13
# A field of a worker, and the same of all
_WORKER_FIELDS = _pairs("""status=worker_statuses startup_state=worker_startup_states
    task_stats=worker_task_stats health=worker_health""")  # fmt: skip
_COMMAND_STATES = _pairs("""profile_configure=configuring profile_start=profiling profile_complete=processing
    profile_cancel=stopping shutdown=shutdown""")  # fmt: skip
# By which runs are compared
_SUMMARY_TAGS = """request_throughput output_token_throughput total_token_throughput output_token_throughput_per_user
    goodput request_latency time_to_first_token inter_token_latency""".split()
_SUMMARY_FIELDS = ("unit", "header", "avg", "p50", "p99")


class Benchmark:
    """The run at hand, the answers made from it (to be read, not changed), and the runs before it."""

    def __init__(self, on_late_error: Callable[[BusError], None] = lambda error: None) -> None:
        self._on_late_error = on_late_error  # told of bad messages that had been accepted unread
        self.version = 0  # grows whenever an answer may have changed
        self._configs: dict[str, Fields] = {}  # by origin
        self._earlier: dict[int, tuple[Fields, bytes]] = {}  # by number: in brief, and whole as JSON
        self._begin(1)

    def _begin(self, number: int) -> None:
        self.run_number = number
        self.started_ns: int | None = None  # first message
        self.last_message_ns: int | None = None
        self._end_ns: int | None = None
        self._skew_ns: int | None = None  # bus clock minus the benchmark's
        self._state = "waiting"
        self._fell_silent = False  # a registration that follows is another run's
        self.end: str | None = None  # one of ENDS
        self._error: str | None = None  # what went wrong, as it was told
        self._reason: str | None = None  # why there are no results, or not all
        self._signs: set[str] = set()  # what was heard: types of messages, and what they say of the end
        self._child_exit: str | None = None  # "" when it ended well
        self._benchmark_id: str | None = None
        self._profile_id: str | None = None
        self._configs = {origin: self._configs[origin] for origin in _ORIGINS[:2] if origin in self._configs}
        self._facts: Fields | None = None  # what all of them say; None when it must be worked out
        self._phases: dict[str, Phase] = {}  # by name, in order of appearance
        self._percent_floor = 0.0  # the highest percentage that was ever answered
        self._workers: dict[str, Fields] = {}  # by service id
        self._groups: dict[str, Fields] = {}  # by group id, without their workers
        self._group_of: dict[str, str] = {}  # worker -> group
        self._figures: dict[str, Fields] = {"metrics": {}, "telemetry": {}, "server": {}}
        self._unread: dict[str, BusMessage] = {}  # newer messages of these that nobody has asked for
        self._final: set[str] = set()  # kinds of figures that the results gave
        self._sampled_ns = dict.fromkeys((*self._figures, "phase"), -_SAMPLE_NS)  # when they last went into the history
        self._history = History()
        self._results = b""  # as JSON, rows in display units
        self._counts: tuple[int, int, int] | None = None  # succeeded, failed, of these aborted: by the results
        self._error_summary: Fields = {"errors": [], "more": 0}

    def _set_clock(self, benchmark_ns: Any, now_ns: int) -> None:
        self._skew_ns = now_ns - int(benchmark_ns) if _count(benchmark_ns) else self._skew_ns

    def _until_ns(self, now_ns: int) -> int:
        return self._end_ns or min(now_ns, (self.last_message_ns or now_ns) + STALE_AFTER_NS)

    def _look_at_clock(self, now_ns: int) -> None:
        for phase in self._phases.values():
            if phase.start_ns and phase.end_ns:
                phase.elapsed_ns = max(0, phase.end_ns - phase.start_ns)
            elif not phase.is_complete:
                begin_ns = phase.first_ns
                if phase.start_ns and self._skew_ns is not None:
                    begin_ns = phase.start_ns + self._skew_ns
                phase.elapsed_ns = max(0, self._until_ns(now_ns) - begin_ns) if phase.has_begun else 0

    def is_stale(self, now_ns: int) -> bool:
        return not self.end and now_ns - (self.last_message_ns or now_ns) >= STALE_AFTER_NS

    def _advance(self, state: str) -> None:
        if self._state in STATES[: STATES.index(state)]:
            self._state = state

    @property
    def _profiling(self) -> list[Phase]:
        return [phase for phase in self._phases.values() if not phase.is_warmup]

    @property
    def _begun(self) -> list[Phase]:
        return [phase for phase in self._phases.values() if phase.has_begun]

    def _has_gone_far(self) -> bool:  # past its configuration
        return self.end is not None or self._state not in STATES[:3]

    def _did_anything(self) -> bool:
        counted = any(phase.stats["requests_sent"] or phase.done for phase in self._phases.values())
        return counted or bool(self.figures("metrics"))

    def _requests(self, phases: list[Phase]) -> tuple[int, int, int]:
        """Return how many succeeded, failed and were cancelled."""
        cancelled, failed = sum(phase.cancelled for phase in phases), sum(phase.failed for phase in phases)
        if self._counts and not any(phase.is_warmup for phase in phases):
            succeeded, failed, aborted = self._counts
            return succeeded, failed - aborted, max(cancelled, aborted)
        return sum(phase.done for phase in phases) - failed, failed, cancelled

    def _judge(self) -> str | None:
        """Return the end that follows from the signs: its own message may go missing."""
        signs, child = self._signs, self._child_exit
        last_words = {"last_results", "results_exported", "benchmark_complete", "shutdown", "not_configured"}
        if signs.isdisjoint(last_words) and child is None:
            return None
        was_cancelled = signs & {"was_cancelled", "profile_cancel"}
        succeeded, failed, cancelled = self._requests(self._profiling)
        if succeeded <= 0 and (failed or (cancelled and not was_cancelled)):
            return "failed"
        if was_cancelled:
            return "cancelled"
        ended_well = signs & _HAS_RESULTS or (not self._error and ("benchmark_complete" in signs or child == ""))
        if "stopped_early" in signs and not (child or ended_well or self._error):
            return "cancelled"
        if child or not ended_well:
            return "failed"
        return "complete" if "results_exported" in signs or self._reason or self._did_anything() else "failed"

    def _settle(self, now_ns: int) -> None:
        self.version += 1
        self.started_ns, self.end = self.started_ns or now_ns, self._judge()
        if self.end:
            self._end_ns = self._end_ns or now_ns

    def _verdict(self) -> str:
        anything = "ended without results" if self._did_anything() else "ended before a request was sent"
        cause = self._error or self._child_exit or anything
        succeeded, failed, cancelled = self._requests(self._profiling)
        if succeeded > 0 or failed + cancelled <= 0:
            return cause
        errors = sorted(self._error_summary["errors"], key=lambda one: one["code"] == 499)  # aborted ones last
        what = "failed or were aborted" if cancelled else "failed"
        text = next(map(_error_text, errors), None) or cause
        return f"All {failed + cancelled} inference request(s) {what}: {text}"[:NAME_BYTES_MAX]

    def _on_state(self, message: BusMessage, now_ns: int) -> None:
        self._state = message.value["state"]
        self._signs |= {self._state} & {"shutdown"}
        is_finished = self._profiling and all(phase.is_complete for phase in self._profiling)
        if self._state == "stopping" and self._phases and not is_finished and not self._signs & _HAS_RESULTS:
            self._signs.add("stopped_early")

    def _on_command(self, message: BusMessage, now_ns: int) -> None:
        command, config = message.value["command"], _object(message.value, "config")
        self._advance(_COMMAND_STATES.get(command, "waiting"))
        if command == "profile_configure" and config:
            self._configs["bus"] = config
        self._signs |= {command} & {"profile_cancel", "shutdown"}

    def _on_error(self, message: BusMessage, now_ns: int) -> None:
        value = message.value
        is_failure = value.get("status") == "failure" and value.get("command") in ("profile_configure", "profile_start")
        if is_failure or message.type != "command_response":
            self._error = self._error or _error_text(value.get("error")) or "unknown error"
        if is_failure or message.type == "dataset_configuration_failed":
            self._signs.add("not_configured")

    def _on_dataset(self, message: BusMessage, now_ns: int) -> None:
        self._benchmark_id, self._facts = _name(message.value.get("benchmark_generation")) or self._benchmark_id, None
        if _STATES_TOLD not in self._signs:  # it is the last thing to get ready
            self._advance("ready")

    def _phase_of(self, stats: Mapping[str, Any], now_ns: int) -> Phase | None:
        """Return the phase that stats are of; None past the limit, or for a sum over several."""
        name, kind = _name(stats.get("phase_name")), _name(stats.get("phase")) or "profiling"
        if not name:
            of_kind = [phase.name for phase in self._phases.values() if phase.kind == kind]
            if len(of_kind) > 1:
                return None
            name = (*of_kind, kind)[0]
        if name not in self._phases and len(self._phases) < EXTRAS_MAX:
            self._phases[name] = Phase(name, stats, now_ns)
        return self._phases.get(name)

    def _on_phase(self, message: BusMessage, now_ns: int) -> None:
        stats, config = phase_stats(message.value), _object(message.value, "config")
        phase = self._phase_of(stats, now_ns)
        if phase is None:
            return
        phase.update(stats, now_ns)
        if message.type == "credit_phase_start":  # the only one that is looked through for secrets
            self._set_clock(stats.get("start_ns"), now_ns)
            if config and len(message.payload) <= BUS_TEXT_BYTES_MAX // 8:
                self._configs.setdefault("phases", {"phases": {}})["phases"][phase.name] = config
        if message.type == "credit_phase_complete":
            self._look_at_clock(now_ns)
            phase.is_complete = True
        self._sampled_ns["phase"] -= _SAMPLE_NS * phase.is_complete  # its last figures, at once
        self._sample_phases(now_ns)
        self._advance("profiling")

    def _sample_phases(self, now_ns: int) -> None:
        if now_ns - self._sampled_ns["phase"] < _SAMPLE_NS:
            return
        self._sampled_ns["phase"] = now_ns
        rows = {}
        for phase in self._begun:
            figures = {re.sub("requests?_", "", key): value for key, value in phase.figures().items()}
            rows[f"phase:{phase.name}"] = {"unit": "requests", "header": f"Requests of phase {phase.name}", **figures}
        self._history.add(now_ns, "phase", rows)

    def _on_records(self, message: BusMessage, now_ns: int) -> None:
        value = message.value
        for worker, told in self._workers_in(value.get("worker_stats")):
            records = worker["processing_stats"]
            for name, count in _scalars(told).items():
                field = _PHASE_FIELDS.get(name, name)
                if field in records:
                    records[field] = _first(_count(count), records[field])
        stats = _object(value, "processing_stats") or _object(value, "final_processing_stats")
        phase = self._phase_of(stats, now_ns) if stats else None
        if phase and phase.start_ns in (None, stats.get("start_ns", phase.start_ns)):
            phase.update(stats, now_ns)
            self._sample_phases(now_ns)
        if message.type in _ANSWERED:
            self._advance("processing")

    def _workers_in(self, told: Any) -> Iterator[tuple[Fields, Any]]:
        """Yield each worker of an object by service id, as far as they fit, and what is told of it."""
        for worker_id, value in islice(_object(told).items(), WORKERS_MAX):
            if worker_id not in self._workers and len(self._workers) < WORKERS_MAX and _name(worker_id):
                self._workers[worker_id] = {
                    "worker_id": worker_id, "status": "idle", "startup_state": None, "health": None,
                    "task_stats": {"total": 0, "completed": 0, "failed": 0},
                    "processing_stats": {"success_records": 0, "error_records": 0}, "last_update_ns": None,
                }  # fmt: skip
            if worker_id in self._workers:
                yield self._workers[worker_id], value

    def _on_workers(self, message: BusMessage, now_ns: int) -> None:
        value, group_id = message.value, None
        if message.type == "worker_group_stats":
            group_id = value["group_id"]
            if group_id not in self._groups and len(self._groups) >= 256:  # a group is a node
                return
            parts = {part: _scalars(value.get(part)) for part in ("task_stats", "health")}
            self._groups[group_id] = {**_scalars(value, without=_ENVELOPE), **parts, "last_update_ns": now_ns}
        is_one = message.type in ("worker_health", "worker_startup_state")
        for field, all_of_them in _WORKER_FIELDS.items():
            column = {value["service_id"]: value.get(field)} if is_one else value.get(all_of_them)
            for worker, told in self._workers_in(column):
                worker["last_update_ns"] = now_ns
                if group_id:
                    self._group_of[worker["worker_id"]] = group_id
                if field in ("status", "startup_state"):
                    worker[field] = _name(told) or worker[field]
                else:
                    numbers = {key: one for key, one in _scalars(told, 12).items() if not isinstance(one, str)}
                    found = {**(worker[field] or {}), **numbers}
                    worker[field] = dict(islice(found.items(), 12)) or None

    def _on_results(self, message: BusMessage, now_ns: int) -> None:
        if message.type == "process_records_result" and "process_all_results" in self._signs:
            return
        self._note_results(message.type)
        inner = _object(message.value, "results", "results")
        if inner.get("was_cancelled") is True:
            self._signs.add("was_cancelled")
        self._advance("processing")
        errors: list[Fields] = []
        for one in map(_object, _list(inner.get("error_summary"))):
            if count := _count(one.get("count")):
                details = _object(one, "error_details")
                texts = {key: text_or(details.get(key), "")[:NAME_BYTES_MAX] for key in ("type", "message")}
                errors.append({"code": _count(details.get("code")), **texts, "count": count})
        errors.sort(key=lambda one: -one["count"])
        self._error_summary = {"errors": errors, "more": message.errors_left_out}
        aborted = sum(one["count"] for one in errors if one["code"] == 499)
        shown = shown_message(message.value)["results"]
        self._finish("metrics", display_rows(_object(shown.get("results")).get("records")))
        results = json_bytes(shown)
        self._results = results if len(results) <= RESULTS_KEPT_BYTES_MAX else b""
        too_large = _TOO_LARGE if message.is_cut or not self._results else None
        self._reason = _error_text(inner.get("incomplete_reason")) or too_large or self._reason
        # After a cancel, or for who came late, these count what no phase message did.
        succeeded, failed = _count(inner.get("successful_request_count")), _count(inner.get("error_request_count"))
        if succeeded is not None and failed is not None:
            self._counts = succeeded, failed, min(aborted, failed)
        phase = self._phase_of({"phase": "profiling"}, now_ns)
        if phase and len(self._profiling) == 1:
            phase.aborted = min(aborted, max(failed or 0, phase.stats["error_records"]))
            told = {"start_ns": inner.get("start_ns"), "requests_end_ns": inner.get("end_ns"), **phase.stats}
            phase.update({**told, "success_records": succeeded, "error_records": failed}, now_ns)

    def _note_results(self, message_type: str) -> None:
        is_last = message_type == "process_all_results" or _STATES_TOLD not in self._signs
        self._signs |= {message_type, "last_results"} if is_last else {message_type}

    def results_too_large(self, message_type: str, now_ns: int) -> None:
        """Follow a message that is too large to be read: the topic of results alone ends the run."""
        if message_type in RESULT_MESSAGE_TYPES:
            self._note_results(message_type)
            self._reason, self.last_message_ns = _TOO_LARGE, now_ns
            self._settle(now_ns)

    def _on_server_results(self, message: BusMessage, now_ns: int) -> None:
        results = _object(message.value, "server_metrics_result", "results")
        self._benchmark_id = self._benchmark_id or _name(results.get("benchmark_id"))
        if summaries := _bounded_summaries(results.get("endpoint_summaries")):
            self._finish("server", {**self.figures("server"), "endpoint_summaries": summaries, "final": True})

    def _on_telemetry_results(self, message: BusMessage, now_ns: int) -> None:
        results, live = _object(message.value, "telemetry_result", "results"), self.figures("telemetry")
        rows: list[MetricRow] = []
        urls = list(filter(_name, _list(_object(results, "summary").get("endpoints_configured"))[:256]))
        for endpoint, found in _objects(results.get("endpoints"), 256):
            source = re.sub("[^a-zA-Z0-9]", "_", next((url for url in urls if f"//{endpoint}/" in url), endpoint))
            for _, gpu in _objects(found.get("gpus"), ROWS_MAX):
                index = _count(gpu.get("gpu_index")) or 0
                uuid, gpu_name = (text_or(gpu.get(key), "") for key in ("gpu_uuid", "gpu_name"))
                for metric, row in _objects(gpu.get("metrics"), ROWS_MAX - len(rows)):
                    tag = f"{metric}_dcgm_{source}_gpu{index}_{uuid[:12]}"  # as in real-time messages
                    title = text_or(row.get("display_name"), metric.replace("_", " "))
                    header = f"{title} | {endpoint} | GPU {index} | {gpu_name}"
                    rows.append({**row, "tag": tag, "header": live.get(tag, {}).get("header", header)})
        self._finish("telemetry", display_rows(rows))

    def _finish(self, kind: str, figures: Fields) -> None:
        if figures:
            self._figures[kind] = figures
            self._final.add(kind)
            self._unread.pop(kind, None)

    def _on_metrics(self, message: BusMessage, now_ns: int) -> None:
        """Keep a message of metrics; most are read only when somebody asks."""
        kind = message.type.split("_")[1]  # metrics, telemetry or server
        if kind in self._final:
            return
        if now_ns - self._sampled_ns[kind] < _SAMPLE_NS:
            self._unread[kind] = BusMessage(message.type, message.payload)  # without what is parsed
            return
        rows = figures = self._figures[kind] = self._read_message(message)
        self._unread.pop(kind, None)
        self._sampled_ns[kind] = now_ns
        if kind == "server":  # by tags `server:ENDPOINT:METRIC{label="value"}`
            rows = {}
            for endpoint, name, _, title, labels, stats in server_series(figures["endpoint_summaries"]):
                text = ",".join(f'{label}="{value}"' for label, value in labels)
                tag = f"server:{endpoint}:{name}" + (f"{{{text}}}" if text else "")
                rows[tag] = {"unit": "", **stats, "header": title}
        self._history.add(now_ns, kind, rows)

    def figures(self, kind: str) -> Fields:
        """Return the newest, or final, "metrics", "telemetry" (by tag) or "server"."""
        message = self._unread.pop(kind, None)
        if message:
            try:
                self._figures[kind] = self._read_message(message)
                if message.not_finite:
                    raise BusError("not_finite", f"NaN or an infinity in {message.type}")
            except BusError as error:
                self._on_late_error(error)
        return self._figures[kind]

    def _read_message(self, message: BusMessage) -> Fields:
        if message.type == "realtime_server_metrics":
            summaries = _bounded_summaries(_needed(message, "endpoint_summaries", dict))
            return {"endpoint_summaries": summaries, "snapshot": _scalars(message.value.get("snapshot"))}
        rows = _needed(message, "metrics", list)
        tags = (_object(row).get("tag") for row in rows[:ROWS_MAX])
        if len(rows) > ROWS_MAX or not all(is_name(tag) for tag in tags if isinstance(tag, str)):
            self._on_late_error(BusError("bad_shape", "rows of metrics with tags that are too long, or too many"))
        return display_rows(rows)

    def apply(self, message: BusMessage, now_ns: int) -> None:
        """Follow one message; BusError if it cannot be used, and then nothing has changed."""
        self._fell_silent = self._fell_silent or self.is_stale(now_ns)
        is_metrics = message.type in METRICS_MESSAGE_TYPES
        if is_metrics:
            self._on_metrics(message, now_ns)
        elif message.type in _HANDLERS:
            handle, field, wanted = _HANDLERS[message.type]
            value = message.value
            _needed(message, field, wanted)
            if self._begins_run(message):
                self._keep_run(now_ns)
                self._begin(self.run_number + 1)
            self._profile_id = _name(value.get("profile_id")) or self._profile_id
            self._set_clock(value.get("request_ns"), now_ns)
            self._signs |= {message.type, "was_cancelled"} if value.get("was_cancelled") is True else {message.type}
            handle(self, message, now_ns)
            if message.type not in FIGURES_MESSAGE_TYPES:
                self._facts = None
            self._settle(now_ns)
        if is_metrics or message.type == "processing_stats" or message.type.startswith("credit_phase_"):
            self._fell_silent = False  # only a benchmark under load sends these
        self.version += is_metrics or self.started_ns is None
        self.last_message_ns, self.started_ns = now_ns, self.started_ns or now_ns
        self._advance("initializing")

    def _begins_run(self, message: BusMessage) -> bool:
        """Tell whether a message must be another run's."""
        value, has_ended = message.value, self.end is not None
        is_over = has_ended or self._fell_silent
        if message.type == "worker_startup_state":
            return is_over and value.get("startup_state") == "starting"
        field = {_STATES_TOLD: "state", "command": "command"}.get(message.type)
        word = value.get(field) if field else None
        if word in ("initializing", "configuring", "profile_configure"):
            return is_over or self._has_gone_far()
        if word in ("ready", "profiling"):
            return has_ended
        if not message.type.startswith("credit_phase_"):
            return is_over and word in ("register_service", "spawn_workers")
        stats = phase_stats(value)
        known, start_ns = self._phases.get(stats.get("phase_name") or stats["phase"]), _count(stats.get("start_ns"))
        if known is None:
            return has_ended
        begins = message.type == "credit_phase_start" and (known.is_complete or has_ended)
        return begins or (None not in (known.start_ns, start_ns) and start_ns != known.start_ns)

    def end_child(self, exit_text: str, now_ns: int) -> None:
        """Follow the end of the benchmark's process: "exit status 1", or "" when it ended well."""
        self._child_exit = exit_text
        self._settle(now_ns)

    def configure(self, config: Mapping[str, Any], origin: str) -> None:
        """Follow a configuration; `origin` is "file", "command" or, for this run alone, "artifacts"."""
        if origin == "artifacts":
            found = {key: value for key, value in config.items() if key in _ARTIFACT_FIELDS}
            config = {**self._configs.get(origin, {}), **found}
        self._configs[origin], self._facts = dict(config), None
        self.version += 1

    def _fact(self, name: str) -> Any:
        if self._facts is None:
            facts: Fields = {}
            for origin in reversed(_ORIGINS):
                facts.update(identity_of(self._configs.get(origin, {})))
                if origin == "phases":
                    facts.pop("phases", None)  # those that were heard of are not all
            if "model" in facts:
                facts.setdefault("streaming", False)  # AIPerf's default
            if self._benchmark_id:
                facts["benchmark_id"] = self._benchmark_id
            self._facts = facts
        return self._facts.get(name)

    def config(self) -> Fields:
        """Return the first configuration, completed by the artifacts."""
        told = (self._configs[origin] for origin in _ORIGINS if self._configs.get(origin))
        return {**self._configs.get("artifacts", {}), **next(told, {})}

    def artifact_dir(self) -> str:
        """Return where AIPerf writes its export; "" where nothing tells."""
        phases = self._configs.get("phases", {"phases": {}})["phases"].values()
        return str(_first(*(_name(config.get("artifact_dir")) for config in phases), self._fact("artifact_dir"), ""))

    @property
    def runs_expected(self) -> int | None:
        return cast("int | None", self._fact("runs"))

    @property
    def label(self) -> str:
        """Such as "run 2 of 3: concurrency_4"."""
        of_all, label = self.runs_expected, self._fact("label")
        return f"run {self.run_number}" + (f" of {of_all}" if of_all else "") + (f": {label}" if label else "")

    def labels(self) -> dict[str, str]:
        """Return the identity as AIPerf's exporter writes it."""
        texts = {
            field: str(value).lower() if field == "streaming" else str(value)
            for field, value in self._identity().items() if value is not None
        }  # fmt: skip
        return {field: text.encode("utf-8", "replace")[:128].decode("utf-8", "ignore") for field, text in texts.items()}

    def status(self, now_ns: int) -> Fields:
        error = {None: self._error, "cancelled": self._reason}.get(self.end)
        self._look_at_clock(now_ns)
        elapsed_ns = sum(phase.elapsed_ns for phase in self._begun)
        if not self._begun:
            elapsed_ns = max(0, self._until_ns(now_ns) - (self.started_ns or now_ns))
        return {
            "state": self.end or self._state, "phase": next(reversed(self._phases), None),
            "run": self.run_number, "label": self.label,
            "benchmark_id": self._fact("benchmark_id"), "profile_id": self._profile_id,
            "error": self._verdict() if self.end == "failed" else error, "stale": self.is_stale(now_ns),
            "started_ns": min((one.start_ns for one in self._begun if one.start_ns), default=self.started_ns),
            "elapsed_sec": elapsed_ns / 1e9 if self.started_ns else None,
        }  # fmt: skip

    def _is_open(self) -> bool:
        """Tell whether more phases may follow: they have names, and nothing says how many."""
        is_known = self._fact("phases") or self.end or self._signs & _ANSWERED
        return not is_known and any(phase.name != phase.kind for phase in self._profiling)

    def _percent(self) -> float:
        percents = [phase.percent() for phase in self._profiling]
        now = sum(percents) / max(len(percents), self._fact("phases") or 1)
        if self.end == "complete":
            now = 100.0
        elif self._is_open():  # half the way for the first phase, half of the rest for each that follows
            now = sum(percent * 0.5**place for place, percent in enumerate(percents, 1))
        # Figures are corrected, and clocks: what was once answered is not withdrawn.
        self._percent_floor = min(100.0, max(self._percent_floor, now))
        return self._percent_floor

    def _eta_sec(self, phases: Sequence[Phase], now_ns: int) -> float | None:
        left = [0.0 if self.end == "complete" else phase.eta_sec() for phase in phases]
        is_over = self.end or self.is_stale(now_ns)
        return None if not left or None in left or (is_over and any(left)) else sum(filter(None, left), 0.0)

    def progress(self, now_ns: int) -> Fields:
        """Return the figures of the profiling, or of the warm-up until that begins."""
        self._look_at_clock(now_ns)
        is_warmup = {phase.is_warmup for phase in self._begun} == {True}
        main = [phase for phase in self._phases.values() if phase.is_warmup == is_warmup]
        expected = [phase.expected for phase in main]
        begun = [phase for phase in main if phase.has_begun]
        answers = {name: phase.answer(self._eta_sec([phase], now_ns)) for name, phase in self._phases.items()}
        succeeded, failed, cancelled = self._requests(main)
        has_results = self._signs & _HAS_RESULTS
        return {
            "total": sum(filter(None, expected)) if expected and None not in expected and not self._is_open() else None,
            "completed": succeeded + failed, "errors": failed, "cancelled": cancelled, "warmup": is_warmup,
            "start_ns": min((phase.start_ns for phase in main if phase.start_ns), default=None),
            "elapsed_ns": sum(phase.elapsed_ns for phase in main), "percent_complete": self._percent(),
            "eta_sec": None if self._is_open() and not is_warmup else self._eta_sec(main, now_ns),
            "phase": begun[-1].name if begun else None, "phase_number": len(begun),
            "phase_percent": begun[-1].percent() if begun else 0.0, "phases": answers,
            # AIPerf exports before it ends well; the message is often lost.
            "results_exported": "results_exported" in self._signs or bool(self._child_exit == "" and has_results),
            "system_state": self.end or self._state,
        }  # fmt: skip

    def _identity(self) -> Fields:
        return {field: self._fact(field) for field in _IDENTITY_FIELDS}

    def metrics(self) -> Fields:
        rows, thresholds = self.figures("metrics"), self._fact("goodput")
        tags = ("good_request_fraction", "good_request_count", "request_count")
        share, good, succeeded = (rows.get(tag, {}).get("avg") for tag in tags)
        if share is None and good is not None and succeeded:
            share = good / succeeded  # before 0.13
        return {
            "aiperf_version": self._fact("aiperf_version"), **self._identity(), "final": "metrics" in self._final,
            "goodput": {"thresholds": thresholds, "share": share} if thresholds else None,
            "metrics": rows, "telemetry": self.figures("telemetry"),
        }  # fmt: skip

    def workers(self) -> Fields:
        statuses = {worker_id: worker["status"] for worker_id, worker in self._workers.items()}
        groups = {group_id: {**figures, "workers": {}} for group_id, figures in self._groups.items()}
        for worker_id, group_id in self._group_of.items():
            groups[group_id]["workers"][worker_id] = self._workers[worker_id]
        active = sum(status in ("healthy", "high_load", "error") for status in statuses.values())
        return {
            "total_workers": len(statuses), "active_workers": active, "worker_statuses": statuses,
            "workers": self._workers, "worker_groups": groups,
        }  # fmt: skip

    def server_metrics(self) -> Fields:
        return self.figures("server") or {"endpoint_summaries": {}, "message": "No server metrics available yet"}

    def results(self, *, whole: bool = True) -> Fields:
        return {
            "status": self.end or "running",
            "results": json_load(self._results) if whole and self._results else None,
            "reason": self._verdict() if self.end == "failed" else self._reason,
            "error_summary": self._error_summary,
        }

    def history(self, tags: Sequence[str] = (), stats: Sequence[str] = (), since_ns: int = 0,
                points: int = HISTORY_POINTS_DEFAULT) -> Fields:  # fmt: skip
        return self._history.answer(tags, stats, since_ns, points) if tags else self._history.overview(self.started_ns)

    def _brief(self, now_ns: int) -> Fields:
        status, progress, rows = self.status(now_ns), self.progress(now_ns), self.figures("metrics")
        few = {tag: rows[tag] for tag in _SUMMARY_TAGS if tag in rows}
        return {
            "n": self.run_number, "label": self.label, "of": self.runs_expected, **self._identity(),
            **{field: status[field] for field in ("state", "error", "started_ns", "elapsed_sec")},
            "ended_ns": self._end_ns, "requests": progress["completed"], "errors": progress["errors"],
            "metrics": {tag: {key: row[key] for key in _SUMMARY_FIELDS if key in row} for tag, row in few.items()},
        }  # fmt: skip

    def _whole(self, brief: Fields) -> Fields:
        rows = {"metrics": self.figures("metrics"), "telemetry": self.figures("telemetry")}
        return {**brief, **rows, "final": "metrics" in self._final, "error_summary": self._error_summary}

    def _keep_run(self, now_ns: int) -> None:
        if not self._has_gone_far():
            return
        brief = self._brief(now_ns)
        if not self.end:
            brief.update(state="failed", error="fell silent: it was killed, or the network was gone")
        self._earlier[self.run_number] = brief, json_bytes(self._whole(brief))
        while len(self._earlier) >= RUNS_MAX or sum(len(one) for _, one in self._earlier.values()) > RUNS_BYTES_MAX:
            del self._earlier[min(self._earlier)]

    def runs(self, now_ns: int) -> list[Fields]:
        at_hand = [self._brief(now_ns)] if self.started_ns else []
        return [brief for brief, _ in self._earlier.values()] + at_hand

    def run(self, number: int, now_ns: int) -> Fields | None:
        if number == self.run_number and self.started_ns:
            return self._whole(self._brief(now_ns))
        return json_load(self._earlier[number][1]) if number in self._earlier else None


# What follows a message, the field that it must have, its type; "", object: none
_HANDLERS: Mapping[str, tuple[Callable[[Any, BusMessage, int], None], str, type]] = MappingProxyType({
    message_type: (handle, field, wanted) for handle, field, wanted, types in (
        (Benchmark._on_command, "command", str, "command"),
        (Benchmark._on_dataset, "", object, "dataset_configured_notification"),
        (Benchmark._on_error, "", object, "command_response dataset_configuration_failed error service_error"),
        (Benchmark._on_phase, "", object, """credit_phase_start credit_phase_progress credit_phase_sending_complete
            credit_phase_complete"""),
        (Benchmark._on_records, "", object, "all_records_received credits_complete"),
        (Benchmark._on_records, "processing_stats", dict, "processing_stats"),
        (Benchmark._on_results, "results", dict, "process_all_results process_records_result"),
        (Benchmark._on_server_results, "server_metrics_result", dict, "process_server_metrics_result"),
        (Benchmark._on_state, "state", str, "system_state_changed"),
        (Benchmark._on_telemetry_results, "telemetry_result", dict, "process_telemetry_result"),
        (Benchmark._on_workers, "group_id", str, "worker_group_stats"),
        (Benchmark._on_workers, "service_id", str, "worker_health worker_startup_state"),
        (Benchmark._on_workers, "worker_statuses", dict, "worker_status_summary"),
        (lambda *_: None, "", object, "benchmark_complete results_exported"),  # signs, no more
    ) for message_type in types.split()
})  # fmt: skip
# The topics: also commands to one service; of command responses only the controller's
CORE_MESSAGE_TYPES = METRICS_MESSAGE_TYPES | frozenset(_HANDLERS)
ALWAYS_SUBSCRIBED = CORE_MESSAGE_TYPES - {"command_response"}
CORE_TOPICS = (b"command.", b"command_response.system_controller$",
    *sorted(f"{name}$".encode() for name in ALWAYS_SUBSCRIBED))  # fmt: skip
# Of AIPerf 0.3 to 0.13; another one may be a typo
KNOWN_MESSAGE_TYPES = CORE_MESSAGE_TYPES | FIGURES_MESSAGE_TYPES | frozenset("""connection_probe conversation_request
    conversation_response conversation_turn_request conversation_turn_response credit_drop credit_phases_configured
    credit_return
    dataset_config_status_request dataset_config_status_response dataset_downloaded_notification dataset_timing_request
    dataset_timing_response inference_results metric_records network_latency_record notification
    parsed_inference_results process_accuracy_result profile_progress profile_results records registration
    server_metrics_record server_metrics_status status sweep_begin sweep_configure sweep_end sweep_progress
    telemetry_records telemetry_status""".split())  # fmt: skip


# -- The benchmark as families of samples

# kind|name|label|field|help|unit
_FAMILIES = """\
gauge|benchmark_state|state|is|State of the benchmark: 1 for the one it is in|
gauge|benchmark_stale||stale|Whether a running benchmark has fallen silent|
counter|phase_requests_sent|phase|requests_sent|Requests sent, by phase|
counter|phase_requests_completed|phase|requests_completed|Requests answered, failed ones included, by phase|
counter|phase_requests_errors|phase|request_errors|Requests that failed, by phase|
counter|phase_requests_cancelled|phase|requests_cancelled|Requests cancelled, by phase|
gauge|phase_requests_expected|phase|total_expected_requests|Requests the phase will send, by phase|
gauge|progress_ratio||ratio|How far the profiling is, 0 to 1|ratio
gauge|elapsed_seconds||elapsed_sec|Time the profiling, or the warm-up before it, has lasted|seconds
gauge|eta_seconds||eta_sec|Time left at the pace so far|seconds
gauge|worker_cpu_percent|worker|cpu_usage|CPU usage of the worker|percent
gauge|worker_memory_bytes|worker|memory_usage|Resident memory of the worker|bytes
gauge|worker_threads|worker|num_threads|Threads of the worker|
counter|worker_tasks|worker|total|Requests given to the worker|
counter|worker_tasks_completed|worker|completed|Requests the worker completed|
counter|worker_tasks_failed|worker|failed|Requests the worker saw fail|
gauge|workers|status|number|Workers by status|"""


def state_families(benchmark: Benchmark, now_ns: int) -> list[Family]:
    """Return everything the benchmark tells Prometheus."""
    labels: Labels = tuple(benchmark.labels().items())
    status, progress, workers = benchmark.status(now_ns), benchmark.progress(now_ns), benchmark.workers()
    version, own = benchmark.metrics()["aiperf_version"], FamilySet()
    if about := (*labels, *((("version", version),) if version else ())):
        own.add(("aiperf", "info", "AIPerf benchmark information", ""), about, 1)
    progress.update(ratio=progress["percent_complete"] / 100, elapsed_sec=progress["elapsed_ns"] / 1e9)
    states = dict.fromkeys((*STATES, *ENDS, status["state"]))
    statuses = collections.Counter(dict.fromkeys("healthy high_load error idle stale".split(), 0))
    statuses.update(workers["worker_statuses"].values())
    things: dict[str, dict[str, Fields]] = {  # by label and its value
        "": {"": {**progress, "stale": int(status["stale"])}},
        "phase": progress["phases"],
        "state": {state: {"is": int(state == status["state"])} for state in states},
        "status": {state: {"number": number} for state, number in statuses.items()},
        "worker": {name: {**one["task_stats"], **(one["health"] or {})} for name, one in workers["workers"].items()},
    }
    for line in _FAMILIES.splitlines():
        kind, name, label, field, text, unit = line.split("|")
        known = () if name.startswith("benchmark_") else labels  # those are there before the identity is
        for one, figures in things[label].items():
            own_labels = (*known, (label, one)) if label else known
            own.add((f"aiperf_{name}", kind, text, unit), own_labels, figures.get(field))
    metrics = metric_families(benchmark.figures("metrics"), labels, own)
    gpus = telemetry_families(benchmark.figures("telemetry"), labels, own)
    servers = server_families(benchmark.server_metrics()["endpoint_summaries"], labels, own)
    families = unique_families((*own.families.values(), *metrics, *gpus, *servers))
    text = "Samples that did not fit in this answer"
    return [*families, Family("aiperf_api_samples_left_out", "gauge", text, "", {"": own.room[2]})]


# == 10 == Bus =========================================================================================================
#
# A source delivers what one turn found, each message as [topic, payload], or [topic] alone where it was too large.  It
# never waits for clients: AIPerf's proxy would queue without a limit.

log = logging.getLogger("aiperf_api")

Batch = list[list[bytes]]
Deliver = Callable[[Batch], None]
Notify = Callable[[str], None]

BUS_BACKEND_PORT = 5664  # of AIPerf's event bus proxy
BUS_IPC_NAME = "event_bus_proxy_backend.ipc"
_IPC_PATH_BYTES_MAX = 107 if sys.platform.startswith("linux") else 103  # sun_path less its NUL
_TCP_ENDPOINT = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([^\[\]\s:/;@]+)):([0-9]{1,5}|\*)", re.ASCII)
_CONNECT_SEC = 10.0  # for name and connection; the kernel's attempts come up to 64 s apart
_ANEW_SEC = 1.0  # libzmq reconnects within a fifth of that, or has given up
_TURN_MESSAGES_LEAST = 16  # in a turn, if they fit in one write to a client: fewer would cost as much
_UNREAD_BYTES_MAX = 1024 * 1024  # that the bus has not read (all subscriptions take a third); reconnect
_PINGS_MAX = 3  # in a row without an answer; reconnect
_PROVEN_SEC = 2.0  # a connection that lasted so long is news when it is lost
_BUS_GONE = "the bus at {} is gone; trying until it is back"


class Source:
    """Where bus messages come from; the base brings none, for a server that only `publish()` feeds."""

    def __init__(self, kind: str = "none", address: str = "", backend: str = "") -> None:
        self.kind = kind  # tcp | ipc | zmq | bind | replay | demo | child | none
        self.address = address  # endpoint, or the name of a file
        self.backend = backend  # pyzmq | builtin | ""
        self.connected = not backend
        self.ended = False  # of a replay
        self._clock = time.time_ns(), time.monotonic_ns(), 1.0  # bus time, our monotonic time then, its pace since
        self._prefixes: dict[bytes, None] = {}  # an ordered set
        self._turn_messages = BUS_TURN_MESSAGES_MAX  # of the next turn
        self._told: set[str] = set()  # kinds of line that are not repeated
        self._since_sec = 0.0  # when the connection was made, or lost
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self, deliver: Deliver, notify: Notify) -> None:
        """Begin to deliver; `notify` gets lines for the log."""
        self._deliver, self._notify, self._loop = deliver, notify, asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        pass

    async def stop(self) -> None:
        """Free sockets, files and timers; nothing is delivered afterwards."""
        self._stopped, self.connected = True, False
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await asyncio.sleep(0)  # a transport closes its socket

    def now_ns(self) -> int:
        """Return the time of the bus; no step of the wall clock moves it."""
        bus_ns, at_ns, pace = self._clock
        return bus_ns + int((time.monotonic_ns() - at_ns) * pace)

    def subscribe(self, prefix: bytes) -> None:
        if prefix not in self._prefixes:
            self._prefixes[prefix] = None
            self._tell_bus(prefix, True)

    def unsubscribe(self, prefix: bytes) -> None:
        if prefix in self._prefixes:
            del self._prefixes[prefix]
            self._tell_bus(prefix, False)

    def _tell_bus(self, prefix: bytes, wanted: bool) -> None:
        pass

    def _deliver_turn(self, batch: Batch) -> None:
        """Deliver a batch; what it cost sizes the next: about BUS_TURN_SEC, but at least what fits in one write."""
        began_sec, size = time.monotonic(), sum([len(frames[-1]) for frames in batch]) + 1
        self._deliver(batch)
        fitting = int(len(batch) * BUS_TURN_SEC / max(time.monotonic() - began_sec, 1e-6))
        least = min(len(batch) * CLIENT_WRITE_BYTES_MAX // size, _TURN_MESSAGES_LEAST)
        self._turn_messages = max(1, least, min(fitting, 2 * len(batch) + 16, BUS_TURN_MESSAGES_MAX))

    def _report(self, kind: str, line: str) -> None:
        """Note that the bus is there (`up`), is not (`down`), or what is wrong; log each kind once, until a connection
        lasts.  The loss of one that did not is no news."""
        was, now_sec = self.connected, time.monotonic()
        lasted = was and now_sec - self._since_sec > _PROVEN_SEC
        self.connected, self._since_sec = kind == "up", now_sec
        if lasted:
            self._told.clear()
        if kind not in self._told and (kind != "down" or lasted or not was):
            self._told.add(kind)
            if kind == "down":
                self._told.discard("up")  # which then is news again
            self._notify(line)


def backend_address(host: str) -> str:
    return f"tcp://[{host}]:{BUS_BACKEND_PORT}" if ":" in host else f"tcp://{host}:{BUS_BACKEND_PORT}"


def ipc_address(folder: str) -> str:
    return "ipc://" + os.path.join(folder, BUS_IPC_NAME)


def parse_endpoint(text: str, *, bind: bool = False) -> tuple[str, int, str]:
    """Return (host, port, path), else UsageError; to bind, HOST and PORT may be `*`."""
    path = text[len("ipc://") :] if text.startswith("ipc://") else ""
    if path not in ("", "@", "*") and "\0" not in path and len(os.fsencode(path)) <= _IPC_PATH_BYTES_MAX:
        return "", 0, "\0" + path[1:] if path[0] == "@" else path  # @NAME: an abstract socket
    if match := _TCP_ENDPOINT.fullmatch(text):
        host, port = match[1] or match[2], int(match[3].replace("*", "0"))
        if port <= 65535 and (bind or (port and host != "*")):
            return host, port, ""
    forms = f"tcp://HOST:PORT, or ipc://PATH of {_IPC_PATH_BYTES_MAX} bytes at most"
    raise UsageError(f"not a bus address: {text!r} ({forms})")


def bus_source(address: str, kind: str, *, bind: bool = False, backend: str = "auto") -> Source:
    """Return the source for a ZMQ endpoint, else UsageError; `kind` is how the user named it."""
    parse_endpoint(address, bind=bind)
    is_builtin = zmq is None or backend == "builtin"
    if is_builtin and (bind or backend == "pyzmq"):
        raise UsageError("--zmq-bind and --zmq-backend pyzmq need pyzmq (pip install pyzmq); builtin only connects")
    return BuiltinBusSource(address, kind) if is_builtin else PyzmqBusSource(address, kind, bind=bind)


class PyzmqBusSource(Source):
    """A SUB socket.  Its descriptor tells of a change once: a turn drains the socket, or schedules the next turn."""

    def __init__(self, address: str, kind: str = "zmq", *, bind: bool = False) -> None:
        super().__init__(kind, address, "pyzmq")
        self._bind = bind  # publishers connect to us
        self._peers = 0  # whose handshake is done
        self._parts: list[bytes] = []  # of the message within which a turn ended
        self._room = BUS_RESULT_BYTES_MAX  # bytes that its further frames may have; -1: none is kept
        self._socket: Any = None  # from start to stop

    def start(self, deliver: Deliver, notify: Notify) -> None:
        super().start(deliver, notify)
        path = parse_endpoint(self.address, bind=self._bind)[2]
        if self._bind and os.path.lexists(path) and not S_ISSOCK(os.lstat(path).st_mode):  # libzmq would unlink it
            raise StartError(f"{printable(path)} is there and is not a socket")
        sub: Any = zmq.Context().socket(zmq.SUB)
        self._socket = sub
        sub.linger, sub.ipv6 = 0, True
        sub.immediate = True  # else subscriptions pile up for a bus that is not there
        sub.maxmsgsize = BUS_RESULT_BYTES_MAX  # of a frame; past it libzmq ends the connection
        sub.rcvhwm = BUS_QUEUE_MESSAGES_MAX  # before connecting, both: they have no effect afterwards
        sub.sndhwm = 0  # of subscriptions: past 1000 it drops them without a word
        sub.connect_timeout = round(_CONNECT_SEC * 1000)
        sub.reconnect_ivl = round(BUS_RETRY_MIN_SEC * 1000)  # libzmq adds up to as much again
        sub.heartbeat_ivl = round(BUS_HEARTBEAT_SEC * 1000)
        sub.heartbeat_timeout = sub.tcp_maxrt = sub.heartbeat_ivl * _PINGS_MAX
        self._monitor = sub.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        try:
            (sub.bind if self._bind else sub.connect)(self.address)
        except zmq.ZMQError as error:
            raise StartError(f"cannot {'bind' if self._bind else 'connect to'} {self.address}: {error}") from None
        if self._bind:
            self.address = sub.getsockopt_string(zmq.LAST_ENDPOINT)
        for prefix in self._prefixes:
            sub.setsockopt(zmq.SUBSCRIBE, prefix)
        self._next_turn = self._loop.call_soon(self._drain)  # what came before we watched
        self._loop.call_soon(self._drain_monitor)
        self._loop.add_reader(sub.getsockopt(zmq.FD), self._drain)
        self._loop.add_reader(self._monitor.getsockopt(zmq.FD), self._drain_monitor)

    def _tell_bus(self, prefix: bytes, wanted: bool) -> None:
        if self._socket is not None:
            self._socket.setsockopt(zmq.SUBSCRIBE if wanted else zmq.UNSUBSCRIBE, prefix)
            self._go_on()  # setting an option may have eaten the descriptor's edge

    def _go_on(self) -> None:
        self._next_turn.cancel()  # there is one at a time
        self._next_turn = self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Deliver what is there, up to the budget of a turn.  The loop that the speed of the source hangs on."""
        if self._socket is None:
            return
        receive, getsockopt = self._socket.recv, self._socket.getsockopt
        readable, no_block = int(zmq.POLLIN), zmq.NOBLOCK  # an enum's & is slow
        batch: Batch = []
        parts, room = self._parts, self._room
        frames_left, bytes_left = 2 * self._turn_messages, BUS_TURN_BYTES_MAX  # topic and payload
        while frames_left > 0 and bytes_left > 0:
            if not parts and not getsockopt(zmq.EVENTS) & readable:  # cheaper than zmq.Again; 0 rearms the descriptor
                break
            frame = receive(no_block, False)  # the frames of one message arrive together
            size = len(frame)
            frames_left -= 1
            bytes_left -= size
            if size <= room and len(parts) < BUS_PARTS_MAX and (parts or size <= NAME_BYTES_MAX):  # a topic is short
                parts.append(frame.bytes)
                room -= size
            else:
                parts, room = parts[:1] or [b""], -1
            if not frame.more:
                batch.append(parts)
                parts, room = [], BUS_RESULT_BYTES_MAX
        else:  # the budget is used up: there may be more
            self._go_on()
        self._parts, self._room = parts, room
        if batch:
            self._deliver_turn(batch)

    def _drain_monitor(self) -> None:
        while self._socket is not None and self._monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            event = struct.unpack_from("=H", self._monitor.recv_multipart(zmq.NOBLOCK)[0])[0]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._peers += 1
                if not self.connected:
                    what = "a publisher connected to" if self._bind else "connected to the bus at"
                    self._report("up", f"{what} {self.address}")
                continue
            if not self._bind:
                self._loop.call_later(_ANEW_SEC, self._connect_anew)
            self._peers = max(0, self._peers - 1)
            if not self.connected:  # its handshake failed
                self._report("handshake", f"the peer at {self.address} is no ZMTP 3 publisher; connecting again")
            elif not self._peers:
                gone = f"{_BUS_GONE} (a frame of over {BUS_RESULT_BYTES_MAX:,} bytes does that, too)"
                line = "the last publisher at {} left; waiting for the next" if self._bind else gone
                self._report("down", line.format(self.address))

    def _connect_anew(self) -> None:
        """Connect where libzmq gives up: after a fault of the peer, or a frame over maxmsgsize."""
        self._drain_monitor()  # it may be connected, and we not told yet
        if self._socket is None or self.connected:
            return
        if self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # disconnecting would drop what is not read yet
            self._loop.call_later(_ANEW_SEC, self._connect_anew)
        else:
            with contextlib.suppress(zmq.ZMQError):  # no such endpoint any more
                self._socket.disconnect(self.address)
            self._socket.connect(self.address)
        self._go_on()

    async def stop(self) -> None:
        await super().stop()
        if self._socket is not None:
            self._loop.remove_reader(self._socket.getsockopt(zmq.FD))
            self._loop.remove_reader(self._monitor.getsockopt(zmq.FD))
            self._socket.disable_monitor()
            closing, self._socket = self._socket, None
            # It waits for libzmq, which may be looking up a name; no exit waits for a daemon.
            ending = threading.Thread(target=closing.context.destroy, args=(0,), daemon=True)
            ending.start()
            while ending.is_alive():  # noqa: ASYNC110 - as long as the caller of stop() waits
                await asyncio.sleep(0.005)


# Without pyzmq: https://rfc.zeromq.org/spec/23/ (ZMTP 3.0) and 37 (3.1; 1 and 2 are refused).  A peer of 3.1 (libzmq
# 4.3.3) gets SUBSCRIBE, CANCEL and PING commands; one of 3.0 gets messages that begin with 1 or 0, and no PING: 4.1
# hands it on as a message.  A command may stand between the frames of a message: libzmq sends PINGs by a timer.

_MORE, _LONG, _COMMAND = 1, 2, 4  # the bits of a frame's first byte (23/ZMTP "Framing"); the others must be zero
_GREETING = b"\xff" + bytes(8) + b"\x7f\3\1" + b"NULL".ljust(20, b"\0") + bytes(32)  # signature, 3.1, NULL
_COMMAND_BYTES_MAX = 64 * 1024  # READY, the longest, has about 50
_SOCKET_TYPE = re.compile(rb"\x0b(?i:Socket-Type)\0\0\0(?:\x03(?=P)|\x04(?=X))(X?PUB)")  # in the metadata of READY
_READ_LENGTH = struct.Struct(">Q").unpack_from


def _encode_zmtp(body: bytes, command: bytes = b"") -> bytes:
    flags, body = (_COMMAND, bytes((len(command),)) + command + body) if command else (0, body)
    size = bytes((flags, len(body))) if len(body) < 256 else struct.pack(">BQ", flags | _LONG, len(body))
    return size + body


class ZMTPSubscriber:
    """The subscriber's side of one ZMTP connection (sans-IO)."""

    def __init__(self) -> None:
        self.minor: int | None = None  # of the version that both speak; None before the greeting
        self.socket_type = ""  # of the peer; "" before READY, which is too early to subscribe
        self.error: BusError | None = None  # why nothing more will come out
        self.output = _GREETING  # to be written to the peer now; the caller clears it
        self._held = bytearray()  # not read yet
        self._need = 0  # bytes that _held must reach before reading on is of use
        self._skip = 0  # bytes still to come of a frame that is not kept
        self._parts: list[bytes] = []
        self._room = -1  # as in PyzmqBusSource

    @property
    def pending(self) -> bool:
        return bool(self._held) and not self._need

    def feed(self, data: bytes, frames_max: int = sys.maxsize) -> Batch:
        """Return the messages that `data` completes; a fault sets `error`, and ends them."""
        messages: Batch = []
        data, self._skip = data[self._skip :], max(0, self._skip - len(data))
        if self._skip or self.error is not None or len(self._held) + len(data) < self._need:
            self._held += data
            return messages
        if self._held:
            data = b"".join((self._held, data))
            self._held = bytearray()  # frees the old one before a large frame is cut out of `data`
        self._need = 0
        try:
            pos = 0 if self.minor is not None else self._read_greeting(data)
            if self.minor is not None:
                self._read_frames(data, pos, frames_max, messages)
        except BusError as error:
            self.error = error.with_traceback(None)  # which would keep this frame, and all that came
        return messages

    def encode_subscription(self, prefix: bytes, wanted: bool = True) -> bytes:
        if not self.minor:
            return _encode_zmtp(bytes((wanted,)) + prefix)
        return _encode_zmtp(prefix, b"SUBSCRIBE" if wanted else b"CANCEL")

    def _read_greeting(self, data: bytes) -> int:
        """Check a greeting as far as it has come, and hold it until it is whole; return where the frames begin."""
        if data[:1] not in (b"", b"\xff") or (len(data) > 9 and not data[9] & 1) or (len(data) > 10 and data[10] < 3):
            raise BusError("not_zmtp", f"it does not speak ZMTP 3, as libzmq 4 does: it began with {data[:20]!r}")
        mechanism = data[12:32]
        if mechanism != _GREETING[12 : 12 + len(mechanism)]:
            raise BusError("mechanism", f"it wants security: {mechanism.rstrip(bytes(1))!r}; only NULL is spoken here")
        if len(data) < len(_GREETING):
            self._held, self._need = bytearray(data), len(data) + 1
        else:
            self.minor = 1 if data[10] > 3 or data[11] else 0
            self.output += _encode_zmtp(b"\x0bSocket-Type\0\0\0\x03SUB", b"READY")
        return len(_GREETING)

    def _read_frames(self, data: bytes, pos: int, frames_max: int, messages: Batch) -> None:
        """Read frames, and hold the rest.  The loop that the speed of the source hangs on."""
        size, parts, room = len(data), self._parts, self._room
        for _ in range(frames_max):
            if pos >= size:
                break
            flags = data[pos]
            if flags > 3 and flags not in (_COMMAND, _COMMAND | _LONG):
                raise BusError("malformed", f"a frame with the flags 0x{flags:02x}")
            start = pos + (9 if flags & _LONG else 2)
            if start > size:
                self._need = start - pos
                break
            length: int = _READ_LENGTH(data, pos + 1)[0] if flags & _LONG else data[pos + 1]
            end = start + length
            most = _COMMAND_BYTES_MAX if flags > 3 else room if parts else min(room, NAME_BYTES_MAX)  # a topic is short
            if length > most:
                if flags > 3 or not self.socket_type or length >> 63:  # 23/ZMTP: up to 2^63-1
                    what = f"a {'command' if flags > 3 else 'frame'}{'' if self.socket_type else ' before READY'}"
                    raise BusError("malformed", f"{what} of {length:,} bytes")
                parts, room = parts[:1] or [b""], -1  # the bytes are dropped as they come
            elif end > size:
                self._need = end - pos
                break
            elif flags > 3:
                room = room if self.socket_type else BUS_RESULT_BYTES_MAX  # READY comes first, or it raises
                self._read_command(data[start:end])
                pos = end
                continue
            else:
                parts.append(data[start:end])
                room -= length
            pos = end
            if not flags & _MORE:
                messages.append(parts)
                parts, room = [], BUS_RESULT_BYTES_MAX
            elif len(parts) >= BUS_PARTS_MAX:
                room = -1
        self._parts, self._room, self._skip = parts, room, max(0, pos - size)
        if pos < size:
            self._held += memoryview(data)[pos:]

    def _read_command(self, body: bytes) -> None:
        """Follow READY and PING; others are ignored, and a PONG has done its work by arriving."""
        name = body[1 : 1 + body[0]] if body else b""
        data = body[1 + len(name) :]
        is_whole = name and len(name) == body[0] and (name != b"PING" or len(data) > 1)
        if not is_whole or not (self.socket_type or name == b"READY"):
            raise BusError("malformed", f"a command that is cut, or stands in place of READY: {body[:100]!r}")
        if not self.socket_type:
            if not (found := _SOCKET_TYPE.search(data)):
                raise BusError("socket_type", f"it is no PUB or XPUB socket, as a subscriber needs: {data[:60]!r}")
            self.socket_type = found[1].decode()
        elif name == b"PING":
            self.output += _encode_zmtp(data[2:18], b"PONG")  # 37/ZMTP: a context has 16 bytes at most


class BuiltinBusSource(Source, asyncio.Protocol):
    """A SUB socket in the standard library, and the protocol of its one connection; it queues one read at most."""

    def __init__(self, address: str, kind: str = "zmq") -> None:
        super().__init__(kind, address, "builtin")
        self._transport: Any = None  # of this connection, or the last

    async def _run(self) -> None:
        host, port, path = parse_endpoint(self.address)
        connect: Any = functools.partial(self._loop.create_unix_connection, lambda: self, path)
        if not path:  # a name may have several addresses (RFC 8305)
            delay = 0.25 if re.search("[G-Zg-z]", host) else None
            tcp = self._loop.create_connection
            connect = functools.partial(tcp, lambda: self, host, port, happy_eyeballs_delay=delay)
        while not self._stopped:  # wait_for() before Python 3.12 may swallow a cancellation (bpo-37658)
            self._end: asyncio.Future[BusError | None] = self._loop.create_future()
            try:
                await asyncio.wait_for(connect(), _CONNECT_SEC)
                if self._stopped:
                    return
                error = await self._end
                line = f"the peer at {self.address}: {error}; connecting again"
                self._report(*(error.kind, line) if error else ("down", _BUS_GONE.format(self.address)))
            except (OSError, UnicodeError, asyncio.TimeoutError) as error:  # UnicodeError: a name that IDNA refuses
                reason = str(error) or type(error).__name__
                self._report("down", f"no bus at {self.address} yet ({reason}); trying until there is one")
            finally:
                if self._transport is not None:
                    self._transport.abort()
            await asyncio.sleep(random.uniform(BUS_RETRY_MIN_SEC, BUS_RETRY_MAX_SEC))

    def _tell_bus(self, prefix: bytes, wanted: bool) -> None:
        if self.connected:
            self._write(self._codec.encode_subscription(prefix, wanted))

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)
            if self._transport.get_write_buffer_size() > _UNREAD_BYTES_MAX:
                self._give_up("not_reading", "it does not read what it is sent")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._codec = transport, ZMTPSubscriber()
        self._silent_beats = 0  # since something came
        late = "it did not finish the handshake"
        self._timer = self._loop.call_later(BUS_HANDSHAKE_SEC, self._give_up, "silent", late)
        self.data_received()  # writes our greeting

    def data_received(self, data: bytes = b"") -> None:
        """Have one turn with what has come, or is pending."""
        codec, transport, self._silent_beats = self._codec, self._transport, 0
        if self._stopped or codec.error is not None:  # where the peer ended it, what came before is still read
            transport.abort()
            return
        messages = codec.feed(data, 2 * self._turn_messages)
        if codec.output:
            self._write(codec.output)
            codec.output = b""
        if codec.socket_type and not self.connected:
            self._timer.cancel()
            self._beat()
            self._report("up", f"connected to the bus at {self.address} (ZMTP 3.{codec.minor}, {codec.socket_type})")
            self._write(b"".join(map(codec.encode_subscription, self._prefixes)))
        if messages:
            self._deliver_turn(messages)
        if codec.error is not None:
            transport.abort()
        elif codec.pending:
            transport.pause_reading()
            self._loop.call_soon(self.data_received)
        else:
            transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        if not self._codec.socket_type:  # as libzmq does where a type or a mechanism does not suit it
            self._give_up("hung_up", "it hung up during the handshake; is it a PUB or XPUB socket without security?")
        if not self._end.done():
            self._end.set_result(self._codec.error)

    def _give_up(self, kind: str, reason: str) -> None:
        """End the connection because of the peer; the first reason counts."""
        self._codec.error = self._codec.error or BusError(kind, reason)
        self._transport.abort()

    def _beat(self) -> None:
        """Send a PING when nothing came; beats count, not time, so that our own pauses harm nobody."""
        self._timer = self._loop.call_later(BUS_HEARTBEAT_SEC, self._beat)
        if self._silent_beats > _PINGS_MAX:
            self._give_up("silent", f"it left {_PINGS_MAX} PINGs without an answer")
        elif self._silent_beats:
            self._write(_encode_zmtp(b"\0\0", b"PING"))  # no time to live
        self._silent_beats += self._codec.minor or 0  # a peer of ZMTP 3.0 knows no PING


# A recording, plain or gzip: {"t": ns of the epoch, "topic": "realtime_metrics$", "payload": "{...}"} in each line
_RECORDING_LINE_BYTES_MAX = BUS_RESULT_BYTES_MAX + 1024  # less its backslashes: a quotation mark takes two bytes
_REPLAY_PAUSE_SEC = 5.0  # between two rounds of a loop


def _read_recording(path: str, data: bytes | None = None) -> Generator[tuple[int, list[bytes]], None, None]:
    """Yield (time in ns, frames) of each line of a file, or of `data`; UsageError at what is none."""
    number, name = 1, printable(path)
    try:
        if data is None and os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, "not a regular file")  # a FIFO would block
        file: IO[bytes] = open(path, "rb") if data is None else io.BytesIO(data)  # noqa: SIM115 - closed below
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from None
    with file:
        try:
            lines = gzip.open(file) if file.read(2) == b"\x1f\x8b" else file  # noqa: SIM115
            file.seek(0)
            while line := lines.readline(2 * _RECORDING_LINE_BYTES_MAX):
                if len(line) - line.count(b"\\") > _RECORDING_LINE_BYTES_MAX:  # decoded, it may take four times that
                    raise ValueError(f"longer than {_RECORDING_LINE_BYTES_MAX:,} bytes")
                record = json_load(line)
                if not 0 <= int(record["t"]) < 1 << 62:
                    raise ValueError("t is no time in ns since the epoch")
                yield int(record["t"]), [record["topic"].encode(), record["payload"].encode()]
                number += 1
        except Exception as error:  # of reading, gzip, JSON or its shape: whatever the bytes may do
            raise UsageError(f"{name}: line {number} is not a line of a recording: {printable(str(error))}") from None
    if number == 1:
        raise UsageError(f"{name}: it is empty, and no recording")


class ReplaySource(Source):
    """Plays a recording `speed` times as fast; with speed 0, and its first `start_at` seconds, at once.  Each message
    sets the clock of the bus, which runs on at this pace."""

    def __init__(
        self, path: str, kind: str = "replay", *,
        speed: float = 1.0, loop: bool = False, data: bytes | None = None, start_at: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(kind, os.path.basename(path))
        next(_read_recording(path, data))  # UsageError unless it begins like one
        self._path, self._data, self._speed, self._repeat, self._start_at = path, data, speed, loop, start_at

    async def _run(self) -> None:
        reason = ""
        try:
            await self._play_round()
            while self._repeat:
                await asyncio.sleep(_REPLAY_PAUSE_SEC)
                await self._play_round()
        except UsageError as error:
            reason = f": {error}"
        self.connected, self.ended = False, True
        self._notify(f"the replay of {self.address} has ended{reason}")

    async def _play_round(self) -> None:
        start_ns, began_ns, rate = 0, 0, 0.0  # bus and monotonic time from which this pace is kept
        stop_sec, size = 0.0, 0  # of this turn
        with contextlib.closing(_read_recording(self._path, self._data)) as lines:
            for due_ns, frames in lines:
                start_ns = start_ns or due_ns + int(self._start_at * 1e9)
                if self._speed and not rate and due_ns >= start_ns:
                    began_ns, rate = time.monotonic_ns(), self._speed
                    self._clock = start_ns, began_ns, rate
                wait_sec = (began_ns - time.monotonic_ns() + (due_ns - start_ns) / rate) / 1e9 if rate else 0.0
                if wait_sec > 0 or size >= BUS_TURN_BYTES_MAX or time.monotonic() > stop_sec:
                    await asyncio.sleep(max(0.0, wait_sec))
                    stop_sec, size = time.monotonic() + BUS_TURN_SEC, 0
                self._clock = due_ns, time.monotonic_ns(), rate
                self._deliver([frames])
                size += len(frames[1])
        self._clock = self.now_ns(), time.monotonic_ns(), 1.0


def check_output(path: str, option: str) -> str:
    """Return the file to write, behind links; UsageError where anything else is there, or no folder for it."""
    real = os.path.realpath(path)
    is_other = (os.path.exists(path) or os.path.lexists(real)) and not os.path.isfile(path)  # a FIFO would block
    if is_other or not os.path.isdir(os.path.dirname(real)):
        raise UsageError(f"{option} {printable(path)}: {'not a regular file' if is_other else 'no such folder'}")
    return real


def open_output(path: str, option: str, buffering: int = -1) -> IO[bytes]:
    """Open a new file; an older one that is not empty becomes PATH.1, .2, …; UsageError where that cannot be."""
    real = check_output(path, option)
    try:
        if os.path.isfile(real) and os.path.getsize(real):
            older = next(name for name in (f"{real}.{n}" for n in itertools.count(1)) if not os.path.lexists(name))
            os.rename(real, older)
            log.info("%s was there: kept as %s", printable(real), printable(older))
        return open(real, "ab", buffering)
    except OSError as error:
        raise UsageError(f"{option} {printable(path)}: {error.strerror}") from None


class Recorder:
    """Writes a new recording; a flush appends whole lines (`.gz`: a whole gzip member), or nothing: OSError."""

    def __init__(self, path: str) -> None:
        self._file = open_output(path, "--record", buffering=0)
        self._is_gzip = path.endswith(".gz")
        self._lines = bytearray()  # since the last flush

    def write(self, t_ns: int, topic: str, payload: bytes) -> None:
        """Add a message; UnicodeDecodeError where its payload is no text."""
        self._lines += json_bytes({"t": t_ns, "topic": topic, "payload": payload.decode()}) + b"\n"
        if len(self._lines) >= BUS_TURN_BYTES_MAX:
            self.flush()

    def flush(self) -> None:
        lines, self._lines = self._lines, bytearray()
        left = memoryview(gzip.compress(lines, 1, mtime=0) if self._is_gzip and lines else lines)
        end = self._file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        with self._file:
            self.flush()


def read_artifact(directory: str, name: str, since_sec: float = 0.0) -> dict[str, Any]:
    """Return the JSON object in a file of AIPerf's; {} if it has none, is over 4 MiB, or older than `since_sec`."""
    path = os.path.join(directory, name)
    with contextlib.suppress(OSError, ValueError, JSONError):  # ValueError: a NUL in the path
        if os.path.isfile(path) and os.path.getmtime(path) >= since_sec:
            with open(path, "rb") as file:
                value = json_load(file.read(BUS_MESSAGE_BYTES_MAX))  # what is cut there is no JSON
            return value if isinstance(value, dict) else {}
    return {}


def resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


# == 11 == Hub =========================================================================================================
#
# A message is encoded once for each kind of client, a batch is joined once for all that subscribe to the same types.
# While a client's transport is full, they wait in its backlog, by reference.  Past the soft mark state messages are
# conflated and events bounded, and it is told what was dropped.  Past the hard mark, when no byte leaves for a while,
# or when all backlogs together hold too much, it is evicted.

Encoder = Callable[["Message"], bytes]
_EVICTED_MAX = 32  # in a turn: each takes time


class Message(NamedTuple):
    type: str
    payload: bytes  # JSON on one line
    is_state: bool  # the next of its type makes it obsolete
    is_shown: bool = True  # as clients get it; else as the bus brought it: nobody wanted it


class Unsent:
    """How many bytes wait to be sent; what many wait for counts once."""

    def __init__(self) -> None:
        self.total = 0
        self.frames = collections.Counter[int]()  # id() of bytes -> frames that hold them


class Frame:
    """Bytes that wait for any number of peers, counted while alive."""

    __slots__ = ("_unsent", "data", "is_state", "received_sec", "type")

    def __init__(self, unsent: Unsent, data: bytes, at_sec: float, name: str = "", is_state: bool = False) -> None:
        self.type = name  # of the message; "": of none, never dropped
        self._unsent, self.data, self.is_state, self.received_sec = unsent, data, is_state, at_sec
        unsent.total += 0 if unsent.frames[id(data)] else len(data)
        unsent.frames[id(data)] += 1

    def __del__(self) -> None:
        frames, key = self._unsent.frames, id(self.data)
        frames[key] -= 1
        if not frames[key]:
            del frames[key]
            self._unsent.total -= len(self.data)


class Outlet:
    """The way out to one peer.  A transport copies what it cannot send at once (up to 3.11): large writes are pending
    here, by reference, and are handed over in slices."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self.transport = transport
        self.paused = False  # the transport is full
        self.pending: collections.deque[tuple[memoryview, Frame | None]] = collections.deque()
        self.written = 0  # bytes given to the transport, ever
        self._left = 0  # of these, what had left it at the last sweep
        self.still = 0  # sweeps in a row in which bytes waited and none left

    @property
    def waiting(self) -> int:  # bytes
        return self.transport.get_write_buffer_size() + sum([len(view) for view, _ in self.pending])

    def write(self, data: bytes, frame: Frame | None = None) -> None:
        """Write, unless the peer has gone; `frame` is held until the transport has all of it."""
        if self.transport.is_closing():
            return
        if (len(data) <= CLIENT_WRITE_BYTES_MAX or frame is None) and not self.pending:
            self.written += len(data)
            self.transport.write(data)
        else:
            self.pending.append((memoryview(data), frame))
            self.write_pending()

    def write_pending(self) -> None:
        while self.pending and not self.paused and not self.transport.is_closing():
            view, frame = self.pending.popleft()
            view, rest = view[:CLIENT_WRITE_BYTES_MAX], view[CLIENT_WRITE_BYTES_MAX:]
            if rest:
                self.pending.appendleft((rest, frame))
            self.written += len(view)
            self.transport.write(view)

    def abort(self) -> None:
        """End at once; close() would wait for the peer to read what is buffered."""
        self.pending.clear()
        self.transport.abort()

    def has_stalled(self) -> bool:
        """Return whether bytes wait and none has left in CLIENT_STALL_SEC sweeps; called once a sweep."""
        buffered = self.transport.get_write_buffer_size()  # over TLS perhaps more than was written
        before, self._left = self._left, self.written - buffered
        self.still = 0 if self._left > before or not buffered else self.still + 1
        return self.still > CLIENT_STALL_SEC


class Subscriber:
    def __init__(self, outlet: Outlet, kind: str, address: str, encode: Encoder, connected_ns: int = 0) -> None:
        self.outlet, self.address, self.encode, self.connected_ns = outlet, address, encode, connected_ns
        self.kind = kind  # websocket | sse | ndjson
        self.unsent = Unsent()  # the hub's
        self.share = 1.0  # of the soft marks: hundreds that stall together must not be conflated in one turn
        self.asked: set[str] = set()  # message types as it named them
        self.types: frozenset[str] | None = frozenset()  # None: everything
        self.closed = False  # it gets nothing more
        self.fault = ""  # why it was evicted
        self.sent = self.skipped = 0  # messages
        self._untold = collections.Counter[str]()  # type -> dropped since the last notice
        # The frames of each write, by the first.  Of a slow client each frame is one write; a state message is kept by
        # its type: the next replaces it.
        self.backlog = collections.OrderedDict[object, list[Frame]]()
        self.backlog_bytes = 0
        self.slow = False  # from the soft mark until it has caught up

    @property
    def outstanding(self) -> int:  # bytes
        return self.backlog_bytes + self.outlet.waiting

    def send(self, frames: list[Frame], data: bytes, now_sec: float) -> None:
        """Write `data`, the frames joined, or queue them while the transport is full or others wait."""
        if self.closed:
            return
        if self.outlet.paused or self.backlog:
            self._queue(frames, len(data), now_sec)
        else:
            self.outlet.write(data, frames[0])
            self.sent += len(frames) if frames[0].type else 0

    def reply(self, data: bytes, now_sec: float) -> None:
        """Send to this client alone, behind what waits for it; never dropped."""
        self.send([Frame(self.unsent, data, now_sec)], data, now_sec)

    def _queue(self, frames: list[Frame], size: int, now_sec: float) -> None:
        if not self.slow:
            self.backlog[frames[0]] = frames
            self.backlog_bytes += size
            oldest_sec = next(iter(self.backlog.values()))[0].received_sec
            mark = CLIENT_SOFT_MARK_BYTES if self.outlet.still else CLIENT_HARD_MARK_BYTES  # readers get a burst whole
            if self.backlog_bytes <= mark * self.share and now_sec - oldest_sec <= CLIENT_SOFT_MARK_SEC * self.share:
                return  # else it is slow, and that goes for what waits already
            frames = [*itertools.chain(*self.backlog.values())]
            self.backlog.clear()
            self.backlog_bytes, self.slow = 0, True
        for frame in frames:
            older = self.backlog.pop(frame.type, None) if frame.is_state else None
            size = self.backlog_bytes + len(frame.data) - (len(older[0].data) if older else 0)
            fits = size <= CLIENT_SOFT_MARK_BYTES and len(self.backlog) < CLIENT_QUEUE_EVENTS_MAX
            is_kept = fits or frame.is_state or frame.type == ""
            if is_kept:
                self.backlog[frame.type if frame.is_state else frame] = [frame]
                self.backlog_bytes = size
            if older or not is_kept:  # conflated, or an event too many
                self.skipped += 1
                self._untold[frame.type] += 1
        if self.backlog_bytes > CLIENT_HARD_MARK_BYTES:
            self.evict(f"{self.outstanding} bytes waited for it")

    def flush(self) -> None:
        """Tell what was dropped, and send what waits while there is room."""
        if self._untold:
            notice = {"type": "skipped", "counts": self._untold}
            self.outlet.write(self.encode(Message("skipped", json_bytes(notice), False)))
            self._untold.clear()
        while (backlog := self.backlog) and not self.outlet.paused:
            frames, size = list[Frame](), 0
            while backlog:
                key, waiting = next(iter(backlog.items()))
                more = sum([len(frame.data) for frame in waiting])
                if frames and size + more > CLIENT_WRITE_BYTES_MAX:
                    break
                del backlog[key]
                frames += waiting
                size += more
            self.backlog_bytes -= size
            self.sent += sum([frame.type != "" for frame in frames])
            self.outlet.write(b"".join([frame.data for frame in frames]), frames[0])
        self.slow = self.slow and bool(self.backlog)

    def leave(self) -> None:
        """Get nothing more; what the outlet has still goes out."""
        self.closed = True
        self.backlog.clear()
        self._untold.clear()
        self.backlog_bytes, self.slow = 0, False

    def evict(self, fault: str) -> None:
        self.fault = self.fault or fault
        self.leave()
        self.outlet.abort()


class Hub:
    def __init__(self, on_wanted: Callable[[str, bool], None]) -> None:
        self._on_wanted = on_wanted  # hears (type, True) with its first client, (type, False) after the last; "*" too
        self.subscribers: dict[Subscriber, None] = {}  # in the order they came
        self._groups: dict[tuple[Encoder, frozenset[str] | None], dict[Subscriber, None]] = {}  # that get the same
        self._wanted = collections.Counter[str]()  # type -> clients
        self.retained: dict[str, Message] = {}  # the last of each type of this run, in bus order
        self.unsent = Unsent()  # of all backlogs
        self._totals = (0, 0)  # of clients that have left
        self.evicted_total = 0
        self.changes = 0  # grows whenever a client comes, goes or subscribes

    def add(self, subscriber: Subscriber) -> None:
        subscriber.unsent, subscriber.share = self.unsent, 1 - len(self.subscribers) % 64 / 128
        self.subscribers[subscriber] = None
        self.changes += 1

    def remove(self, subscriber: Subscriber) -> None:
        self.subscribe(subscriber, frozenset())
        self._totals = self._totals[0] + subscriber.sent, self._totals[1] + subscriber.skipped
        del self.subscribers[subscriber]
        subscriber.leave()
        self.evicted_total += bool(subscriber.fault)

    def subscribe(self, subscriber: Subscriber, types: frozenset[str] | None) -> None:
        before, subscriber.types = subscriber.types, types
        group = self._groups.get(key := (subscriber.encode, before), {})
        group.pop(subscriber, None)
        if not group:
            self._groups.pop(key, None)
        if types is None or types:
            self._groups.setdefault((subscriber.encode, types), {})[subscriber] = None
        old, new = (frozenset("*") if names is None else names for names in (before, types))
        for name in (*(new - old), *(old - new)):  # first in, then out: nothing is lost between
            self._wanted[name] += 1 if name in new else -1
            if self._wanted[name] == (name in new):  # its first client came, or its last one went
                self._on_wanted(name, name in new)
            if not self._wanted[name]:
                del self._wanted[name]
        self.changes += 1

    def has_room(self, invented: set[str]) -> bool:
        """Return whether clients may ask for names that no AIPerf has: each is a subscription upstream."""
        new = invented - self._wanted.keys()
        return not new or len(self._wanted) + len(new) <= 10 * CLIENT_TYPES_MAX

    def wants(self, message_type: str) -> bool:
        return message_type in self._wanted or "*" in self._wanted

    def broadcast(self, messages: Sequence[Message], now_sec: float) -> None:
        """Send messages to all who subscribe to them, without ever waiting."""
        self._relieve()
        for message in messages:
            self.retained.pop(message.type, None)
            size = sum([len(other.payload) for other in self.retained.values()]) + len(message.payload)
            if len(self.retained) < BUS_TYPES_MAX and size <= RETAINED_BYTES_MAX:
                self.retained[message.type] = message
        encoded: dict[tuple[Encoder, int], Frame] = {}  # once for all clients, however they group
        alone: dict[Frame, list[Frame]] = {}  # the same: garbage collection walks each
        for (encode, types), group in self._groups.items():
            chunks, room = list[list[Frame]](), 0  # a frame over CLIENT_WRITE_BYTES_MAX is one by itself
            for at, message in enumerate(messages):
                if types is None or message.type in types:
                    frame = encoded.get((encode, at))
                    if frame is None:
                        data = encode(message)
                        frame = encoded[encode, at] = Frame(self.unsent, data, now_sec, message.type, message.is_state)
                    if room < len(frame.data):
                        chunks.append([])
                        room = CLIENT_WRITE_BYTES_MAX
                    chunks[-1].append(frame)
                    room -= len(frame.data)
            for chunk in chunks:
                frames = alone.setdefault(chunk[0], chunk) if len(chunk) == 1 else chunk
                data = b"".join([frame.data for frame in frames])  # of a single one no copy
                for subscriber in group:  # who must wait has the frames, which groups share
                    subscriber.send(frames, data, now_sec)

    def _relieve(self) -> None:
        """Past HUB_BYTES_MAX, evict those whose bytes have stood still longest, then who is furthest behind."""
        if self.unsent.total > HUB_BYTES_MAX:
            there = [one for one in self.subscribers if not one.closed]
            for subscriber in heapq.nlargest(_EVICTED_MAX, there, key=lambda one: (one.outlet.still, one.outstanding)):
                if self.unsent.total > HUB_BYTES_MAX:
                    subscriber.evict(f"{self.unsent.total} bytes waited for all, {subscriber.outstanding} for it")

    def forget_run(self) -> None:
        self.retained.clear()

    def snapshot(self, types: frozenset[str] | None) -> list[Message]:
        self._relieve()
        return [message for message in self.retained.values() if types is None or message.type in types]

    def totals(self) -> tuple[int, int]:
        """Return (messages sent, dropped) over all clients, present and past."""
        sent, skipped = map(sum, zip(self._totals, *[(one.sent, one.skipped) for one in self.subscribers]))
        return sent, skipped


# == 12 == Connection ==================================================================================================
#
# One TCP (or Unix) connection: deadline -> parse -> route -> respond -> keep alive, or -> upgrade -> frames.
#
# An asyncio protocol, not a coroutine: no handler ever waits, so there is no task to cancel.  Deadlines are counted in
# sweeps, one a second, not on a clock: no peer can do its part while this process is stopped (SIGSTOP).

_TURN_SEC = 0.02  # of the loop for the messages of one read
UNIX_PEER = "unix"  # the address of a peer on a Unix socket


class Connection(asyncio.Protocol):
    """One client, from accept to the last byte.

    Of `app`, the program behind it, it knows memo, date, unsent and message_bytes_max, opened(), closed(), respond()
    (None: the connection has switched modes), headers_for(), received() and failed().
    """

    _frames: FrameParser  # of a WebSocket

    def __init__(self, app: Any, writer: asyncio.StreamWriter) -> None:
        self.app = app
        self._writer = writer  # its finaliser closes the transport on newer Pythons
        self.transport: asyncio.Transport = writer.transport  # type: ignore[assignment]
        self._stream_protocol = self.transport.get_protocol()  # told of the end, which breaks its cycle
        peer, sock = map(self.transport.get_extra_info, ("peername", "socket"))
        self.address = UNIX_PEER
        if isinstance(peer, tuple):
            self.address = f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
        self.mode = "http"  # http | websocket | stream | closing
        self.outlet = Outlet(self.transport)
        self.subscriber: Subscriber | None = None  # of a WebSocket or stream
        self.checked: tuple[Request, Any, str] | None = None  # the last request that passed all checks, with its route
        self._requests = RequestParser(app.memo)
        self._events = collections.deque[Event]()  # not yet handled
        self._owed_pong = b""  # for the last ping that came while the transport was full
        self._eof = False  # the peer has half-closed
        self._silent = 0  # sweeps since the peer read, or sent something (a head counts once)
        self._limit_sec = HTTP_HEAD_TIMEOUT_SEC  # of silence; within a head never more than this
        self.transport.set_write_buffer_limits(high=CONNECTION_BUFFER_BYTES, low=CONNECTION_BUFFER_BYTES // 4)
        self.transport.max_size = CONNECTION_READ_BYTES  # type: ignore[attr-defined]  # 256 KiB are 40,000 tiny frames
        with contextlib.suppress(OSError, AttributeError):  # a Unix socket, or gone already; not all have LOWAT
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # large answers are several writes
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a stream's peer may vanish silently
            # The kernel would buffer megabytes, and wake us when a third has gone: a slow reader would look stalled
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, CONNECTION_UNSENT_BYTES)
        self.transport.set_protocol(self)
        refusal = app.opened(self)
        if refusal is not None:
            self.refuse(refusal)

    @property
    def paused(self) -> bool:
        return self.outlet.paused

    def data_received(self, data: bytes) -> None:
        try:
            if self.mode == "http":
                self._serve(data)
            elif self.mode == "websocket":
                self._silent = 0
                self._read_frames(data)
        except Exception as error:  # a fault of ours: the client is not left hanging, and told no detail
            self.app.failed(self, error)
            if self.mode == "http":
                self.refuse(error_response(HTTPError(500, "internal server error")))
            elif self.mode == "websocket":
                self.close_websocket(CLOSE_INTERNAL_ERROR)
            else:
                self.outlet.abort()

    def eof_received(self) -> bool:
        """Return whether to keep the connection, for answers that the peer is still owed."""
        self._eof = True
        if self.subscriber is not None:
            self.subscriber.leave()  # the peer is gone
        is_owed = self.mode in ("http", "closing") and (self.paused or self._has_backlog())
        return is_owed and self.transport.can_write_eof()  # TLS cannot half-close

    def pause_writing(self) -> None:
        self.outlet.paused = True
        if self.subscriber is None:
            self._set_reading(False)  # no answers to be had: no further requests

    def resume_writing(self) -> None:
        self.outlet.paused = False
        # The rest is not for this call: a transport that is closed in it says connection_lost() twice.
        asyncio.get_running_loop().call_soon(self._resume)

    def _resume(self) -> None:
        self.outlet.write_pending()
        if self._owed_pong and self.mode == "websocket" and not self.paused:
            self.outlet.write(self._owed_pong)
            self._owed_pong = b""
        if self.subscriber is not None and not self.paused:
            self.subscriber.flush()
        if self.paused or self._has_backlog():
            return
        if self.mode == "closing":
            self._end_our_side()
        else:
            self._set_reading(True)
            self.data_received(b"")

    def connection_lost(self, error: Exception | None) -> None:
        self.mode = "closing"
        self.outlet.pending.clear()
        self._stream_protocol.connection_lost(None)
        self.app.closed(self)

    def _has_backlog(self) -> bool:
        return bool(self.outlet.pending or (self.subscriber and self.subscriber.backlog))

    def _set_reading(self, on: bool) -> None:
        if not self._eof and not self.transport.is_closing() and self.transport.is_reading() != on:
            self._silent = 0  # while we do not read, its silence is ours
            (self.transport.resume_reading if on else self.transport.pause_reading)()

    # -- HTTP

    def _serve(self, data: bytes) -> None:
        requests = self._requests
        request = None if self.paused else requests.recall(data)
        if request is None:
            self._silent = self._silent if requests.started else 0  # one deadline for a whole head
            requests.feed(data)
            if self.paused:
                return
            try:
                request = requests.next_request()
            except HTTPError as error:
                self.refuse(error_response(error), head_only=requests.is_head)
                return
        if request is not None:
            self._answer(request)
            if requests.started or self._eof:
                self._let_others()
        elif self._eof:
            self._linger()

    def _let_others(self) -> None:
        self._set_reading(False)  # also its end: that comes behind what was asked before it
        asyncio.get_running_loop().call_soon(self._resume)

    def _answer(self, request: Request) -> None:
        self._silent, self._limit_sec = 0, HTTP_IDLE_TIMEOUT_SEC
        try:
            response = self.app.respond(self, request)
            if response is not None:
                self.send(response, request)
        except HTTPError as error:
            self.send(error_response(error, request.wants_pretty), request)

    def send(self, response: Response, request: Request) -> None:
        """Write an answer, a large body by reference; end the connection behind it when request or answer say so."""
        gzip = response.is_compressible and accepts_gzip(request.headers.get("accept-encoding"))
        body = b"" if request.method == "HEAD" else response.payload(gzip)
        is_large, unsent = len(body) > 2 * CLIENT_WRITE_BYTES_MAX, self.app.unsent
        if is_large and unsent.total > HTTP_UNSENT_BYTES_MAX and id(body) not in unsent.frames:
            raise busy("too many large answers wait for slow readers")
        close = not request.keep_alive or response.body is None
        head_only, extra = is_large or request.method == "HEAD", self.app.headers_for(request)
        self.outlet.write(response.encode(date=self.app.date, head_only=head_only, close=close, gzip=gzip, extra=extra))
        if is_large:
            self.outlet.write(body, Frame(unsent, body, 0.0))
        if close:
            self._linger()

    def refuse(self, response: Response, *, head_only: bool = False) -> None:
        """Write a last answer; what the peer sends from now on is thrown away."""
        self.outlet.write(response.encode(date=self.app.date, head_only=head_only, close=True))
        self._linger()

    def _linger(self) -> None:
        """End our side behind what waits, and give the peer a moment to end its own: closing with unread bytes resets
        the connection, and the peer loses our last words (RFC 9112 9.6)."""
        self.mode = "closing"
        self._silent, self._limit_sec = 0, LINGER_TIMEOUT_SEC
        if not self._has_backlog():
            self._end_our_side()

    def _end_our_side(self) -> None:
        if self.transport.is_closing():  # over TLS a second close() makes asyncio (3.11) forget the connection
            return
        if self._eof or not self.transport.can_write_eof():  # TLS cannot half-close
            self.transport.close()
        else:
            try:
                self.transport.write_eof()
                self._set_reading(True)
            except OSError:  # the peer has reset the connection, and the loop has not seen it yet
                self.transport.abort()

    # -- WebSocket and streams

    def open_websocket(self, head: bytes) -> None:
        """Switch protocols; frames may have come right behind the request."""
        self.mode, self._frames = "websocket", FrameParser(self.app.message_bytes_max)
        self.outlet.write(head)
        early = self._requests.take_rest()
        if early:
            asyncio.get_running_loop().call_soon(self.data_received, early)

    def open_stream(self, head: bytes) -> None:
        self.mode = "stream"
        self.outlet.write(head)

    def _read_frames(self, data: bytes) -> None:
        events = self._frames.feed(data)
        pings = [event for event in events if event.kind == "ping"]
        # RFC 6455 5.5.3: of several pings only the last has to be answered
        if len(pings) > WS_PINGS_PER_READ_MAX:
            events = [event for event in events if event.kind != "ping" or event is pings[-1]]
        self._events += events
        # One read may hold hundreds of subscriptions to everything
        until_sec = time.monotonic() + _TURN_SEC
        while self._events and self.mode == "websocket" and self.transport.is_reading():
            if time.monotonic() > until_sec:
                self._let_others()
                break
            event = self._events.popleft()
            if event.kind in ("text", "binary"):
                self.app.received(self, event.data)
            elif event.kind == "ping" and self.paused:
                self._owed_pong = encode_frame(OP_PONG, event.data)
            elif event.kind == "ping":
                self.outlet.write(encode_frame(OP_PONG, event.data))
            elif event.kind in ("close", "failure"):  # 5.5.1: answered by a Close; 7.1.1: then the server closes first
                self.close_websocket(event.code, event.reason)

    def close_websocket(self, code: int | None, reason: str = "") -> None:
        """Send a Close, drop what waits, and end; some peers never send their own."""
        self.outlet.write(encode_frame(OP_CLOSE, b"") if code is None else encode_close(code, reason))
        if self.subscriber is not None:
            self.subscriber.leave()
        self._linger()

    def send_frame(self, frame: bytes) -> None:
        if self.subscriber is None:
            self.outlet.write(frame)
            return
        self.subscriber.reply(frame, time.monotonic())
        if self._has_backlog():
            self._set_reading(False)  # who does not read our replies is not asked for further questions

    def check(self) -> None:
        """Keep the deadlines, once a second."""
        in_head = self._requests.started
        self._silent += 1
        if self.outlet.has_stalled():
            self._evict(f"no byte has left for {CLIENT_STALL_SEC} s")
        elif self.outlet.waiting:
            self._silent = 0  # bytes that leave are a sign of life, too
        elif self.mode in ("websocket", "stream"):
            self._keep_alive()
        elif self._silent <= (min(self._limit_sec, HTTP_HEAD_TIMEOUT_SEC) if in_head else self._limit_sec):
            return
        elif self.mode == "closing":
            self.transport.abort()
        elif in_head:
            self.refuse(error_response(HTTPError(408, "the request head did not arrive in time")))
        else:
            self._linger()

    def _keep_alive(self) -> None:
        kind = self.subscriber.kind if self.subscriber is not None else self.mode
        if kind == "websocket" and self._silent > 2 * WS_PING_INTERVAL_SEC:
            self._evict("it was silent, and did not answer pings")
        elif kind == "websocket" and not self._silent % WS_PING_INTERVAL_SEC:
            self.outlet.write(encode_frame(OP_PING, b""))
        elif kind == "sse" and not self._silent % STREAM_COMMENT_INTERVAL_SEC:
            self.outlet.write(b": keepalive\n\n")  # HTML standard 9.2.6

    def _evict(self, fault: str) -> None:
        if self.subscriber is not None:
            self.subscriber.evict(fault)
        self.outlet.abort()

    def end(self) -> None:
        """Say goodbye behind what waits: the server stops."""
        if self.mode == "closing":
            return
        if self.mode == "websocket":
            self.send_frame(encode_close(CLOSE_GOING_AWAY, "the server stops"))
        if self.subscriber is not None:
            self.subscriber.closed = True
        if self.mode == "websocket" or self._has_backlog():
            self._linger()
        else:
            self.transport.close()


# == 13 == Service =====================================================================================================
#
# The bus feeds the benchmark's state, the recording and the hub; the endpoints answer from the state.

SSE, NDJSON = "text/event-stream", "application/x-ndjson"
PAGES = frozenset(("/", "/dashboard", "/report.html"))  # a person who opens one without a token gets a form for it
_CLIENT_MESSAGE_TYPE = re.compile(r"[A-Za-z0-9_:-]{1,128}|\*")
_KNOWN_TYPES = KNOWN_MESSAGE_TYPES | {"run", "*"}  # "run" is said by this server
_ROW_TYPES = METRICS_MESSAGE_TYPES | RESULT_MESSAGE_TYPES  # whose rows clients get in display units
ENCODERS: Mapping[str, Encoder] = MappingProxyType({
    "websocket": lambda message: encode_frame(OP_TEXT, message.payload),
    "sse": lambda message: b"event: %s\ndata: %s\n\n" % (message.type.encode(), message.payload),  # HTML 9.2
    "ndjson": lambda message: message.payload + b"\n",
})  # fmt: skip
_FORMATS = MappingProxyType({CONTENT_TYPE_TEXT_0_0_4: render_text, CONTENT_TYPE_OPENMETRICS_1_0_0: render_openmetrics})
STOP_TIMEOUT_SEC = 2  # in all, from the signal to the exit
_ACCEPT_MAX = 32  # connections accepted in one turn of the loop; asyncio 100
_FILES_SPARE = 32  # descriptors for everything but connections
# Made for each request; answers of other routes are shared for a second, as long as nothing changes.
_UNSHARED = frozenset("stream websocket static readyz status progress".split())
_SHARED_MAX, _SHARED_BYTES_MAX = 16, 8 * 1024 * 1024


class Settings(NamedTuple):
    host: str = "127.0.0.1"
    port: int | None = 0  # None: no TCP
    unix_path: str | None = None
    token: str | None = None
    allow_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None  # None: in the same file
    ws_max_connections: int = WS_CONNECTIONS_MAX  # streams count, too
    linger_sec: float | None = None  # None: for ever
    record: str | None = None
    report: str | None = None
    secrets: tuple[str, ...] = ()  # literals that must show nowhere


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()  # IPv4, too
        return socket.create_server(address[:2], family=family, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        reason = str(error.strerror).partition(" (while ")[0] if isinstance(error, OSError) else "not a host name"
        raise StartError(f"cannot listen on {printable(host)} port {port}: {reason}") from None


@functools.lru_cache(BUS_TYPES_MAX)
def message_type_of(topic: bytes) -> str:
    """Leave out `$`, and the target that some topics have."""
    found = re.fullmatch(rb"([A-Za-z0-9_:-]{1,128})(?:\.[!-~]{0,256})?\$?", topic)
    if found is None:
        raise BusError("topic", f"not a topic: {printable(topic)}")
    return found[1].decode()


class APIService:
    """The server: an async context manager, or to be started and stopped.

    A `source` is a ZMQ subscriber endpoint (`tcp://127.0.0.1:5664`), a Source, or None for publish() alone; `config` is
    what the bus may not tell; `settings` are the fields of Settings.  Raises UsageError, and StartError in start().
    """

    def __init__(self, *, source: str | Source | None = None, config: JSONValue = None, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self._allowed_hosts = frozenset(map(str.lower, self.settings.allow_hosts))
        self._allowed_origins = frozenset(map(str.lower, self.settings.cors_origins))
        token = self.settings.token
        if token == "":  # an unset variable of a script: nobody would notice that it guards nothing
            raise UsageError("--api-token: an empty token")
        self.source = bus_source(source, source.partition("://")[0]) if isinstance(source, str) else source or Source()
        self.router = Router(ROUTES)
        self.static = static_table(read_static_files())
        self.url = ""
        self._cookie_name = "aiperf_api_0"  # with the port, which keeps no cookies apart (RFC 6265 8.5)
        self.started_ns = time.time_ns()
        self.requests = collections.Counter[tuple[str, int]]()  # (route, status) -> answers
        self._servers: list[asyncio.AbstractServer] = []
        self._unix_inode = 0
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._recorder = Recorder(self.settings.record) if self.settings.record else None
        self._complaints: set[str] = set()  # of the event loop
        self._complete: asyncio.Event  # from start() on; set while the last run has ended
        # What the connections share
        self.memo: dict[bytes, Request] = {}
        self.date = b""
        self.message_bytes_max = WS_MESSAGE_BYTES_MAX
        self.connections: set[Connection] = set()
        self.connections_max = HTTP_CONNECTIONS_MAX + self.settings.ws_max_connections  # fewer if the system says so
        self.unsent = Unsent()
        self.secrets = Secrets(filter(None, (*self.settings.secrets, token)))
        self.hub = Hub(self._on_wanted)
        self.bus_messages = collections.Counter[str]()  # message type -> good ones
        self.bus_errors = collections.Counter[str]()  # kind -> bad ones
        self.bus_total = 0  # good ones
        self._unwanted: set[bytes] = set()  # topics whose last client has gone since the last sweep
        self._received: list[Message] = []  # not broadcast yet
        self.benchmark = Benchmark(self._count_bad)
        self._run_told: tuple[Any, ...] = (1, "", None)  # number, label, of: as last seen
        self._artifacts: set[tuple[str, str]] = set()  # (folder, file) that have been read
        self._ended_sweeps = 0  # since the end of the run
        self._gone_sec = 0.0  # since the bus was there
        self._answers: dict[tuple[Any, ...], Response] = {}  # but those of _UNSHARED
        self._answers_version = (0, 0, 0)
        if config is None and self.source.kind == "demo" and "demo.config.json" in self.static:
            config = json_load(self.static["demo.config.json"].payload(False))
        if config is not None:
            self.configure(config, "file")

    # -- From start to stop

    async def __aenter__(self) -> APIService:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, then begin to receive: whoever asks early gets an answer, and nothing is missed."""
        loop = asyncio.get_running_loop()
        if loop.get_exception_handler() is None:
            loop.set_exception_handler(self._on_loop_error)
        self._complete = asyncio.Event()
        self._sweep()
        try:
            await self._listen()
            for prefix in (b"",) if self.settings.record else CORE_TOPICS:
                self.source.subscribe(prefix)
            self.source.start(self._deliver, lambda line: log.info("%s", printable(line, 5 * LOG_QUOTE_CHARS_MAX)))
        except BaseException:
            await self.stop()
            raise

    async def _listen(self) -> None:
        settings = self.settings
        more: dict[str, Any] = {"backlog": _ACCEPT_MAX}
        more["client_connected_cb"] = lambda _, writer: Connection(self, writer)  # a coroutine would cost a task
        if settings.tls_cert:  # a handshake has a deadline of its own, before that of the first head
            more.update(ssl=self._tls_context(), ssl_handshake_timeout=HTTP_HEAD_TIMEOUT_SEC)
        self._limit_connections()
        if settings.unix_path:
            await self._listen_unix(settings.unix_path, more)
            self.url = f"unix:{settings.unix_path}"
        if settings.port is not None:
            listener = _listen_tcp(settings.host, settings.port)
            self._servers.append(await asyncio.start_server(sock=listener, **more))
            listener.listen(1024)  # that wait (nginx 511); asyncio has one number for these and for what a turn accepts
            host, port = f"[{settings.host}]" if ":" in settings.host else settings.host, listener.getsockname()[1]
            self.url, self._cookie_name = f"http{'s' * bool(settings.tls_cert)}://{host}:{port}", f"aiperf_api_{port}"

    async def _listen_unix(self, path: str, more: dict[str, Any]) -> None:
        """Listen with mode 0600; asyncio would replace a socket that is there, even under a live server."""
        before = os.umask(0o177)  # no moment in which others could connect
        try:
            with contextlib.suppress(ConnectionRefusedError, FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
                if not S_ISSOCK(os.stat(path).st_mode):
                    raise OSError("it is not a socket")
                probe.settimeout(1.0)
                probe.connect(path)
                raise OSError("another server listens there")
            self._servers.append(await asyncio.start_unix_server(path=path, **more))
            self._unix_inode = os.lstat(path).st_ino
        except (OSError, AttributeError) as error:  # AttributeError: Windows has none
            raise StartError(f"cannot listen on {printable(path)}: {getattr(error, 'strerror', '') or error}") from None
        finally:
            os.umask(before)

    def _tls_context(self) -> ssl.SSLContext:
        """Return a context whose handshakes count as connections; UsageError names the file that does not fit."""
        service, handshakes = self, weakref.WeakSet[ssl.SSLObject]()

        class Handshake(ssl.SSLObject):
            def do_handshake(self) -> None:  # called again when there are more bytes
                if self not in handshakes and len(service.connections) + len(handshakes) >= service.connections_max:
                    raise ssl.SSLError("too many connections")
                handshakes.discard(self)
                try:
                    super().do_handshake()
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    handshakes.add(self)
                    raise
                except ssl.SSLError as error:
                    if error.reason == "HTTP_REQUEST":  # which asyncio keeps to itself
                        text = "a client speaks plain HTTP to this port, which speaks TLS: use https:// and wss://"
                        asyncio.get_running_loop().call_exception_handler({"message": text, "exception": error})
                    raise

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslobject_class = Handshake
        SSLProtocol.max_size = CONNECTION_READ_BYTES  # that each connection holds; it is 256 KiB
        certificate, key = self.settings.tls_cert or "", self.settings.tls_key
        file = f"--tls-cert {certificate}"
        try:
            ssl.create_default_context(cafile=certificate)
            file = f"--tls-key {key}" if key else file
            context.load_cert_chain(certificate, key)
        except OSError as error:
            reason = "no private key fits the certificate" if isinstance(error, ssl.SSLError) else error.strerror
            raise UsageError(f"{printable(file)}: {reason}") from None
        return context

    def _limit_connections(self) -> None:
        """Have descriptors for all connections, or refuse the last ones ourselves: asyncio would log and wait."""
        if sys.platform == "win32":
            return
        import resource  # which Windows does not have

        reserve = 4 * _ACCEPT_MAX + _FILES_SPARE  # for what two turns accept or refuse, and everything else
        wanted = self.connections_max + reserve
        found, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # -1: no limit
        if 0 <= found < wanted:
            with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit of its own
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
                found = min(wanted, hard)
        if 0 <= found < wanted:
            self.connections_max = most = found - min(reserve, max(_FILES_SPARE, found // 2))
            if most < 2:
                raise StartError(f"{found} file descriptors are too few: {_FILES_SPARE + 2} are needed (ulimit -n)")
            log.warning("at most %d connections: the limit on open files (ulimit -n) is %d", most, found)

    async def stop(self) -> None:
        """End within STOP_TIMEOUT_SEC, whatever the clients do.

        1. stop listening; 2. stop the source; 3. Close 1001 to WebSockets, end streams and idle connections; 4. let
        what is being sent go out, for a common moment; 5. abort the rest; 6. close the recording, write the report.
        """
        for server in self._servers:
            server.close()  # never wait_closed(): on 3.12 and later it waits for the clients
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.source.stop(), STOP_TIMEOUT_SEC / 4)
        for connection in list(self.connections):
            connection.end()
        deadline = time.monotonic() + STOP_TIMEOUT_SEC / 2
        while self.connections and time.monotonic() < deadline:  # noqa: ASYNC110 - no event for this moment alone
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # lets connection_lost run
        if self._sweep_timer:
            self._sweep_timer.cancel()
        self._record(Recorder.close)
        self._recorder = None
        if self.benchmark.end and self._ended_sweeps < 2:
            self._write_report()
        with contextlib.suppress(OSError):
            path = self.settings.unix_path or ""
            if os.lstat(path).st_ino == self._unix_inode:  # not another server's by now
                os.unlink(path)

    async def wait_complete(self, linger_sec: float = 0.0) -> str:
        """Wait until the run has ended and no other is to be expected, and `linger_sec` more; return its state."""
        while True:
            await self._complete.wait()
            await asyncio.sleep(linger_sec)
            if self._complete.is_set():  # else a new run has begun meanwhile
                return str(self.status()["state"])

    def _judge_complete(self, passed_sec: float) -> None:
        """Set `_complete` at the end of the last run: within an AIPerf sweep the next bus comes in 43 s at most."""
        source, benchmark = self.source, self.benchmark
        self._gone_sec = 0.0 if source.connected else self._gone_sec + passed_sec
        is_told = (benchmark.artifact_dir(), "run_config.json") in self._artifacts
        is_only = is_told and benchmark.run_number >= (benchmark.runs_expected or 1)
        is_last = is_only or source.kind not in ("tcp", "ipc", "zmq") or self._gone_sec >= 60
        if source.ended or (benchmark.end and is_last):
            self._complete.set()

    def _sweep(self) -> None:
        self._sweep_timer = asyncio.get_running_loop().call_later(1.0, self._sweep)  # even if this fails
        day, month, date, clock, year = time.asctime(time.gmtime()).split()  # in English, whatever the locale
        self.date = f"{day}, {date:0>2} {month} {year} {clock} GMT".encode()  # RFC 9110 5.6.7
        for connection in list(self.connections):
            try:
                connection.check()
            except Exception as error:  # a fault of ours costs this client alone
                self.failed(connection, error)
                connection.transport.abort()
        self._read_artifacts()
        while self._unwanted:
            self.source.unsubscribe(self._unwanted.pop())
        self._judge_complete(1.0)
        self._ended_sweeps = self._ended_sweeps + 1 if self.benchmark.end else 0
        if self._ended_sweeps == 2:  # what is said after the end belongs in it
            self._write_report()
        self._record(Recorder.flush)

    def _on_loop_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log each kind of the event loop's complaints once, a fault of ours with its traceback."""
        error, text = context.get("exception"), str(context.get("message"))
        kind = f"{text.partition('(')[0]} {type(error).__name__}"
        if kind not in self._complaints:
            self._complaints.add(kind)
            fault = None if isinstance(error, OSError) else error
            log.error("%s: %s", printable(text), printable(str(error)), exc_info=fault)

    # -- From the bus: receive, redact, apply, broadcast

    def publish(self, message: Mapping[str, Any]) -> None:
        """Feed a message as if the bus had brought it, after start() and in its thread."""
        message_type = message.get("message_type")
        if not message_type or not isinstance(message_type, str):
            raise ValueError("a message needs a message_type")
        self._deliver([[f"{message_type}$".encode(), json_bytes(message)]])

    def _deliver(self, batch: Batch) -> None:
        now_ns, was_enabled = self.source.now_ns(), gc.isenabled()
        gc.disable()  # it would walk a large message again and again: half of the time of 4 MiB
        for frames in batch:
            try:
                self._receive(frames, now_ns)
            except BusError as error:
                self._count_bad(error)
            except Exception as error:  # ours; the bus goes on
                self._count_bad(BusError("internal", repr(error)), error)
        if was_enabled:
            gc.enable()
        self._broadcast()

    def _receive(self, frames: list[bytes], now_ns: int) -> None:
        if not 1 <= len(frames) <= 2:
            raise BusError("frames", f"{len(frames)} frames instead of topic and payload")
        topic, message_type = frames[0], message_type_of(frames[0])
        is_figures, is_wanted = message_type in FIGURES_MESSAGE_TYPES, self.hub.wants(message_type)
        limit = BUS_MESSAGE_BYTES_MAX if is_figures or message_type.startswith("process_") else BUS_TEXT_BYTES_MAX
        limit = BUS_RESULT_BYTES_MAX if message_type in RESULT_MESSAGE_TYPES else limit
        try:
            if len(frames) == 1 or len(frames[1]) > limit:
                raise BusError("too_large", f"{message_type} of over {limit} bytes")
            message = BusMessage(message_type, frames[1])
            if is_wanted or not is_figures or self._recorder is not None:
                value = message.value  # what is no JSON does not go out; may change the payload
                if not is_figures:
                    message.payload, message.parsed = self.secrets.redact_payload(message.payload, value)
        except BusError as error:
            if error.kind == "too_large":
                self.benchmark.results_too_large(message_type, now_ns)
                self._on_change()
            raise
        self.benchmark.apply(message, now_ns)
        if message.not_finite:
            self._count_bad(BusError("not_finite", f"NaN or Infinity in {message_type}"))
        self._on_change()
        self._record(lambda recorder: recorder.write(now_ns, topic.decode(), message.payload))
        self.bus_total += 1
        has_room = message_type in self.bus_messages or len(self.bus_messages) < BUS_TYPES_MAX
        self.bus_messages[message_type if has_room else "other"] += 1
        payload = self._shown(message) if is_wanted else message.payload
        self._received.append(Message(message_type, payload, message_type in STATE_MESSAGE_TYPES, is_wanted))

    def _shown(self, message: BusMessage) -> bytes:
        """Return a payload as clients get it: one line, rows in display units."""
        shown = shown_message(message.value) if message.type in _ROW_TYPES else message.value
        is_as_it_came = shown is message.value and b"\n" not in message.payload and b"\r" not in message.payload
        return message.payload if is_as_it_came else json_bytes(shown)

    def _broadcast(self) -> None:
        received, self._received = self._received, []
        self.hub.broadcast(received, time.monotonic())

    def _on_change(self) -> None:
        """Follow the benchmark into a new run; tell clients of it, and of its place in a sweep."""
        benchmark, before = self.benchmark, self._run_told
        self._run_told = number, label, of = benchmark.run_number, benchmark.label, benchmark.runs_expected
        if number != before[0]:
            self._broadcast()  # what came before it in this batch is of the earlier run
            self.hub.forget_run()
            self.secrets.forget_run()
            self._artifacts.clear()
            self._complete.clear()
            self._ended_sweeps = 0
        if self._run_told != before and (number > 1 or of):
            value = {"message_type": "run", "run": number, "label": label, "of": of}
            self._received.append(Message("run", json_bytes(value), True))

    def _count_bad(self, error: BusError, fault: Exception | None = None) -> None:
        self.bus_errors[error.kind] += 1
        if self.bus_errors[error.kind] == 1:
            line = f"bad bus message ({error.kind}), further ones are only counted: {printable(str(error))}"
            (log.error if fault else log.warning)("%s", line, exc_info=fault)

    def _record(self, work: Callable[[Recorder], None]) -> None:
        """Have the recorder work; a full disk ends the recording, not the server."""
        recorder = self._recorder
        if recorder is not None:
            try:
                work(recorder)
            except OSError as error:
                log.error("the recording ends here: %s", error)
                self._recorder = None
                with contextlib.suppress(OSError, ValueError):  # it was to be closed, and is
                    recorder.close()

    def configure(self, config: Mapping[str, Any], origin: str) -> None:
        """Set the benchmark's configuration; `origin` is "file", "command" or "artifacts"."""
        self.benchmark.configure(self.secrets.redact(dict(config)), origin)

    def _read_artifacts(self) -> None:
        """Read what AIPerf writes beside, where this machine has it, once a run."""
        benchmark, source = self.benchmark, self.source
        if source.kind == "child" or re.match(r"ipc:|tcp://(localhost:|127\.|\[::1\])", source.address):
            folder, since_sec = benchmark.artifact_dir(), (benchmark.started_ns or 0) // 10**9
            for name in ("run_config.json", "profile_export_aiperf.json")[: 2 if benchmark.end else 1]:
                is_due = folder and (folder, name) not in self._artifacts
                if is_due and (found := read_artifact(folder, name, since_sec)):
                    self._artifacts.add((folder, name))
                    self.configure(found, "artifacts")

    def end_child(self, exit_text: str) -> None:
        """Note how the benchmark's process ended, "" if well."""
        self._read_artifacts()
        self.benchmark.end_child(exit_text, self.source.now_ns())
        self._on_change()
        self._broadcast()

    def _on_wanted(self, message_type: str, wanted: bool) -> None:
        """Subscribe upstream for clients; unsubscribe only in _sweep(): toggling a type costs the bus nothing."""
        if self.settings.record or message_type in ALWAYS_SUBSCRIBED:
            return  # it is subscribed to for good, also when a full disk has ended the recording
        for prefix in (b"",) if message_type == "*" else (f"{message_type}$".encode(), f"{message_type}.".encode()):
            (self._unwanted.discard if wanted else self._unwanted.add)(prefix)
            if wanted:
                self.source.subscribe(prefix)

    # -- From the connections

    def opened(self, connection: Connection) -> Response | None:
        self.connections.add(connection)
        over = len(self.connections) - self.connections_max
        if over > 2 * _ACCEPT_MAX:
            connection.outlet.abort()
        return error_response(busy("too many connections")) if over > 0 else None

    def closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if client := connection.subscriber:
            if client.fault:
                log.warning("evicted %s: %s", connection.address, client.fault)
            self.hub.remove(client)

    def failed(self, connection: Connection, error: Exception) -> None:
        log.error("a fault of this server while serving %s", connection.address, exc_info=error)

    def respond(self, connection: Connection, request: Request) -> Response | None:
        """Answer; None is a switch to a WebSocket or an endless answer."""
        name = "none"
        try:
            if connection.checked is None or connection.checked[0] is not request:  # else the memo gave the same object
                connection.checked = (request, *self._admit(connection, request))
            _, route, rest = connection.checked
            name = route.name
            response = self._answer(route, rest, connection, request)
        except HTTPError as error:
            response = error_response(error, request.wants_pretty)
            if error.status == 401 and request.path in PAGES and "token.html" in self.static:
                response = Response(401, self.static["token.html"].body, "text/html; charset=utf-8", error.headers)
        response = response and with_preconditions(request, response)
        status = response.status if response else {"websocket": 101, "stream": 200}[name]
        self.requests[name, status] += 1
        if log.isEnabledFor(logging.DEBUG):
            said = self.secrets.redact(f"{request.method} {request.path}")
            log.debug("%s %d %s", connection.address, status, printable(said))
        return response

    def _admit(self, connection: Connection, request: Request) -> tuple[Route, str]:
        if connection.address != UNIX_PEER:  # no DNS name leads there
            is_local = is_loopback(self.settings.host)
            check_host(request.headers.get("host"), allowed=self._allowed_hosts, bound_to_loopback=is_local)
        if request.method == "OPTIONS":
            return _PREFLIGHT, ""
        route, rest = self.router.match(request.method, request.path)
        if request.refusal:
            raise request.refusal
        if route.needs_token:
            check_origin(request, self._allowed_origins)
            if self.settings.token:
                check_token(request, self.settings.token.encode(), self._cookie_name)
        return route, rest

    def _answer(self, route: Route, rest: str, connection: Connection, request: Request) -> Response | None:
        def make() -> Response | None:
            value = route.answer(self, request, rest, connection)
            is_made = value is None or isinstance(value, Response)
            return value if is_made else json_response(value, pretty=request.wants_pretty)

        if route.name in _UNSHARED:
            return make()
        asked = request.target if route.name == "history" else rest  # others have no arguments
        key = route.name, asked, request.wants_pretty, accepts(request.headers.get("accept"), tuple(_FORMATS))
        version, answers = (self.benchmark.version, self.hub.changes, int(time.monotonic())), self._answers
        if version != self._answers_version:
            answers.clear()
            self._answers_version = version
        if key not in answers:
            size = sum(len(answer.body or b"") for answer in answers.values())
            if len(answers) >= _SHARED_MAX or size > _SHARED_BYTES_MAX:
                answers.clear()
            answers[key] = cast("Response", make())
        return answers[key]

    def headers_for(self, request: Request) -> HeaderList:
        """Return the cookie of a page that was opened with a token, and CORS."""
        token, headers = self.settings.token, []
        if token and request.path in PAGES and has_page_token(request, token.encode()):
            # For what the page loads: without a Path that is its folder, also behind a proxy (RFC 6265 5.1.4).
            cookie = f"{self._cookie_name}={page_cookie(token.encode())}; HttpOnly; SameSite=Strict"
            headers.append(("Set-Cookie", cookie + ("; Secure" if self.settings.tls_cert else "")))
        if self._allowed_origins:  # Fetch standard, 3.2
            origin = request.headers.get("origin", "")
            headers.append(("Vary", "Origin"))  # caches must not mix them
            if origin and not self._allowed_origins.isdisjoint((origin.lower(), "*")):
                headers.append(("Access-Control-Allow-Origin", origin))
                if request.method == "OPTIONS":
                    wanted = request.headers.get("access-control-request-headers", "")
                    headers += [("Access-Control-Allow-Methods", "GET, HEAD"), ("Access-Control-Allow-Headers", wanted)]
        return tuple(headers)

    def add_client(self, connection: Connection, kind: str) -> Subscriber:
        """Put a connection into the hub, or refuse it before it switches: who is dropped later comes back at once."""
        if len(self.hub.subscribers) >= self.settings.ws_max_connections:
            raise busy("all streaming connections are in use")
        client = Subscriber(connection.outlet, kind, connection.address, ENCODERS[kind], time.time_ns())
        connection.subscriber = client
        self.hub.add(client)
        return client

    def received(self, connection: Connection, data: str | bytes) -> None:
        client = connection.subscriber
        assert client is not None
        try:
            reply, snapshot = self._handle_command(client, data)
        except ClientMessageError as error:
            reply, snapshot = {"type": "error", "message": str(error)}, []
        connection.send_frame(encode_frame(OP_TEXT, json_bytes(reply)))
        self.send_snapshot(client, snapshot)

    def _handle_command(self, client: Subscriber, data: str | bytes) -> tuple[dict[str, Any], list[str]]:
        """Return the reply, and the types of the snapshot behind it."""
        try:
            value = json_load(data.encode() if isinstance(data, str) else data)
        except JSONError as error:
            raise ClientMessageError(f"not JSON: {error}") from None
        command: dict[str, Any] = value if isinstance(value, dict) else {}
        kind, types, snapshot = command.get("type"), command.get("message_types", ()), command.get("snapshot", True)
        if kind == "ping":
            return {"type": "pong"}, []
        if kind not in ("subscribe", "unsubscribe"):
            raise ClientMessageError("send a JSON object whose type is subscribe, unsubscribe or ping")
        if not _are_types(types) or not isinstance(snapshot, bool):
            example = 'message_types must be a list of names, such as ["realtime_metrics"] or ["*"]'
            raise ClientMessageError(f"{example}, snapshot true or false")
        is_more = kind == "subscribe"
        asked = client.asked | {*types} if is_more else client.asked - {*types}
        if not is_more and "*" in asked:
            raise ClientMessageError('"*" is subscribed, which is every type: unsubscribe from "*" first')
        if len(asked) > CLIENT_TYPES_MAX:
            raise ClientMessageError(f"at most {CLIENT_TYPES_MAX} message types")
        if not self.hub.has_room(asked - _KNOWN_TYPES):
            raise ClientMessageError(_TOO_MANY_TYPES)
        self.subscribe(client, asked)
        reply = {"type": f"{kind}d", "message_types": types}
        if is_more and (unknown := [name for name in types if name not in _KNOWN_TYPES]):
            reply["unknown"] = unknown
        return reply, types if snapshot and is_more else []

    def subscribe(self, client: Subscriber, types: set[str]) -> None:
        client.asked = types
        self.hub.subscribe(client, None if "*" in types else frozenset(types))

    def send_snapshot(self, client: Subscriber, types: list[str]) -> None:
        """Send the last message of each type; what nobody wanted when it came is prepared only now."""
        for message in self.hub.snapshot(None if "*" in types else frozenset(types)):
            try:
                if not message.is_shown:
                    payload = self._shown(BusMessage(message.type, message.payload))
                    self.hub.retained[message.type] = message._replace(payload=payload, is_shown=True)
                client.reply(client.encode(self.hub.retained[message.type]), time.monotonic())
            except BusError as error:
                self._count_bad(error)
                del self.hub.retained[message.type]

    def file(self, name: str) -> Response:
        """Return a file of static/, or the list of a folder."""
        if name in self.static:
            return self.static[name]
        folder = name.rstrip("/") + "/"
        below = sorted({found[len(folder) :].partition("/")[0] for found in self.static if found.startswith(folder)})
        if below:
            return text_response("".join(f"{found}\n" for found in below))
        raise HTTPError(404, "no such file" if self.static else _PAGES_MISSING)

    def status(self) -> dict[str, Any]:
        now_ns, source, last_ns = self.source.now_ns(), self.source, self.benchmark.last_message_ns
        age_sec = None if last_ns is None else max(0.0, round((now_ns - last_ns) / 1e9, 3))
        return {**self.benchmark.status(now_ns), "source": {
            "kind": source.kind, "address": source.address, "backend": source.backend, "connected": source.connected,
            "messages": self.bus_total, "last_message_age_sec": age_sec,
        }}  # fmt: skip

    def health_families(self) -> list[Family]:
        kinds = [client.kind for client in self.hub.subscribers]
        sent, skipped = self.hub.totals()
        found = FamilySet()
        for name, labels, text, value in (
            ("bus_messages_total", "type", "Bus messages received, by type", self.bus_messages),
            ("bus_errors_total", "kind", "Bus messages refused, by kind of fault", self.bus_errors),
            ("source_connected", "", "Whether the bus is connected", int(self.source.connected)),
            ("clients", "kind", "Streaming clients, by kind", {kind: kinds.count(kind) for kind in ENCODERS}),
            ("messages_sent_total", "", "Messages sent to streaming clients", sent),
            ("messages_skipped_total", "", "Messages dropped for slow clients", skipped),
            ("clients_cut_off_total", "", "Slow clients evicted", self.hub.evicted_total),
            ("connections", "", "Open connections of every kind", len(self.connections)),
            ("http_requests_total", "route status", "HTTP requests answered, by route and status", self.requests),
            ("process_cpu_seconds_total", "", "CPU time of this server", sum(os.times()[:2])),
            ("process_start_time_seconds", "", "When this server started", self.started_ns / 1e9),
            ("process_resident_memory_bytes", "", "Resident memory of this server", resident_bytes()),
        ):
            base, total, _ = name.partition("_total")
            unit = next((unit for unit in ("seconds", "bytes") if base.endswith(unit)), "")
            head = (f"aiperf_api_{base}", "counter" if total else "gauge", text, unit)
            for key, number in sorted(value.items()) if isinstance(value, dict) else [((), value)]:
                texts = (key,) if isinstance(key, str) else map(str, key)
                found.add(head, tuple(zip(labels.split(), texts)), number)
        return list(found.families.values())

    def _write_report(self) -> None:
        try:
            if self.settings.report:
                report = _get_report(self).payload(False)
                with open_output(self.settings.report, "--report") as file:
                    file.write(report)
        except (OSError, UsageError, HTTPError) as error:  # HTTPError: without static/
            log.error("the report is not written: %s", error)


# -- The endpoints

_PAGES_MISSING = "the pages are not here: copy the folder static/ beside aiperf_api.py; the API works without"
_TOO_MANY_TYPES = "too many different message types are asked for by all clients"
# For the two histories of a report; nine digits are enough for the differences that it shows.
_REPORT_TAGS = frozenset("""request_latency time_to_first_token inter_token_latency output_token_throughput
    request_throughput output_sequence_length goodput""".split())  # fmt: skip
_REPORT_STATS = tuple("count sum avg std p50 p90 p99 sent completed errors cancelled in_flight".split())


def _are_types(names: Any) -> bool:
    is_list = isinstance(names, list) and bool(names)
    return is_list and all(isinstance(name, str) and _CLIENT_MESSAGE_TYPE.fullmatch(name) for name in names)


def _report_histories(benchmark: Benchmark) -> Iterator[JSONValue]:
    about = benchmark.history()["tags"]
    for groups, stats, points in (
        (("phase", "metrics"), _REPORT_STATS, 720),
        (("telemetry", "server"), ("current", "avg", "value"), 180),
    ):
        tags = [tag for tag in about if about[tag]["group"] in groups and not {*stats}.isdisjoint(about[tag]["stats"])]
        tags = [tag for tag in tags if about[tag]["group"] != "metrics" or tag in _REPORT_TAGS]
        with contextlib.suppress(ValueError):  # very many phases
            found = benchmark.history(tags[:100], stats, 0, points) if tags else {"series": []}
            for series in found["series"]:
                series["values"] = [value and float(f"{value:.9g}") for value in series["values"]]
            yield found


def _get_report(service: APIService, *_: Any) -> Response:
    """Put into static/report.html the files that it names, and the run as JSON."""
    benchmark, now_ns = service.benchmark, service.source.now_ns()
    run = {
        "kind": "aiperf-report", "format": 1, "server_version": __version__, "generated_ns": now_ns,
        **{name: getattr(benchmark, name)() for name in ("metrics", "workers", "server_metrics", "config")},
        "status": service.status(), "progress": benchmark.progress(now_ns), "runs": {"runs": benchmark.runs(now_ns)},
        "results": benchmark.results(whole=False), "histories": list(_report_histories(benchmark)),
    }  # fmt: skip

    def part(marker: re.Match[bytes]) -> bytes:
        if marker[1] is None:
            return json_bytes(run).replace(b"<", rb"\u003c")
        text = b"\n".join(service.file(name).payload(False) for name in marker[1].decode().split())
        return re.sub(rb"(?m)^import [^\n]*\n|^export ", b"", text)

    page = re.sub(rb"<!-- (?:inline: ([\w./ -]+)|run) -->", part, service.file("report.html").payload(False))
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    policy += "; base-uri 'none'; form-action 'none'"
    return Response(200, page, "text/html; charset=utf-8", (("Content-Security-Policy", policy),))


def _only_arguments(request: Request, names: str) -> None:
    """Refuse others: a typo would show something else."""
    for name, _ in request.query:
        if name not in (*names.split(), "_", "token"):
            raise HTTPError(400, f"unknown argument; there are {', '.join(names.split())}")


def _get_documentation(service: APIService, *_: Any) -> Response:
    paths = "".join(f"{route.path:20} {route.summary}\n" for route in ROUTES)
    return service.file("index.html") if service.static else text_response(f"{_PAGES_MISSING}\n\n{paths}")


_PREFLIGHT = Route("*", "none", "", lambda *_: Response(204, headers=(("Allow", "GET, HEAD, OPTIONS"),)))


def _get_exposition(service: APIService, request: Request, *_: Any) -> Response:
    families = [*state_families(service.benchmark, service.source.now_ns()), *service.health_families()]
    content_type = accepts(request.headers.get("accept"), tuple(_FORMATS))  # never 406: Prometheus sends */*
    return Response(200, _FORMATS[content_type](unique_families(families)), content_type)


def _get_history(service: APIService, request: Request, *_: Any) -> JSONValue:
    _only_arguments(request, "tag stat since points pretty")
    asked = f"{request.arg('since', '0')} {request.arg('points', str(HISTORY_POINTS_DEFAULT))}"
    numbers = re.fullmatch("([0-9]{1,19}) ([0-9]{1,5})", asked)
    if numbers is None or not 1 <= int(numbers[2]) <= HISTORY_POINTS_MAX:
        raise HTTPError(400, f"since must be in ns since the epoch, points a number from 1 to {HISTORY_POINTS_MAX}")
    tags = re.findall(r"(?:[^,{]|\{[^}]*\}?)+", ",".join(request.args("tag")))  # a server's tag has commas in braces
    stats = [stat for stat in ",".join(request.args("stat")).split(",") if stat]
    try:
        return service.benchmark.history(tags, stats, int(numbers[1]), int(numbers[2]))
    except LookupError:
        raise HTTPError(404, "no history of that; /api/history lists the tags and their statistics") from None
    except ValueError as error:
        raise HTTPError(400, str(error)) from None


def _get_run(service: APIService, _: Request, rest: str, __: Connection) -> JSONValue:
    number = int(rest) if re.fullmatch("[0-9]{1,9}", rest) else 0
    if found := service.benchmark.run(number, service.source.now_ns()):
        return found
    raise HTTPError(404, "no such run; /api/runs lists them")


def _get_clients(service: APIService, *_: Any) -> JSONValue:
    return {"total": len(service.hub.subscribers), "clients": [{
        "address": client.address, "kind": client.kind, "connected_ns": client.connected_ns, "sent": client.sent,
        "skipped": client.skipped, "subscriptions": sorted(client.asked), "waiting_bytes": client.outstanding,
    } for client in service.hub.subscribers]}  # fmt: skip


def _get_websocket(service: APIService, request: Request, _: str, connection: Connection) -> None:
    head = upgrade_response(request)
    service.add_client(connection, "websocket")
    connection.open_websocket(head)


def _get_stream(service: APIService, request: Request, _: str, connection: Connection) -> Response | None:
    _only_arguments(request, "types format snapshot")
    accepted, snapshot = accepts(request.headers.get("accept"), (SSE, NDJSON)), request.arg("snapshot", "1")
    media = {None: accepted, "sse": SSE, "ndjson": NDJSON}.get(request.arg("format"))
    if media is None or snapshot not in ("0", "1"):
        raise HTTPError(400, "format must be sse or ndjson, snapshot 0 or 1")
    types = list(dict.fromkeys(name for name in ",".join(request.args("types")).split(",") if name)) or ["*"]
    if len(types) > CLIENT_TYPES_MAX or not _are_types(types):
        raise HTTPError(400, "types must be names of message types, separated by commas")
    head = Response(200, None, media, (("X-Accel-Buffering", "no"),))
    if request.method == "HEAD":
        return head
    notices = {"subscribed": types if media == SSE else [], "unknown": [t for t in types if t not in _KNOWN_TYPES]}
    if not service.hub.has_room({*notices["unknown"]}):
        raise busy(_TOO_MANY_TYPES)
    client = service.add_client(connection, "sse" if media == SSE else "ndjson")
    connection.open_stream(head.encode(date=service.date, extra=service.headers_for(request)))
    service.subscribe(client, {*types})
    for name in filter(notices.get, notices):  # events begin at once, also on a silent bus
        notice = json_bytes({"type": name, "message_types": notices[name]})
        client.reply(client.encode(Message(name, notice, False)), time.monotonic())
    service.send_snapshot(client, types if snapshot == "1" else [])
    return None


def _get_index(service: APIService, *_: Any) -> JSONValue:
    shown = [route for route in ROUTES if "{" not in route.path]  # href: relative to /api (RFC 3986 4.2)
    links = {route.name: {"href": route.path[1:] or "./", "summary": route.summary} for route in shown}
    return {"version": __version__, "links": links}


def _get_ready(service: APIService, *_: Any) -> Response:
    if service.source.connected:
        return text_response("ok\n")
    what = "at the end of the recording" if service.source.ended else "not connected to the bus at"
    return text_response(f"{what} {printable(service.source.address)}\n", 503, (("Retry-After", "2"),))


def _top_row(name: str, cells: Iterable[Any]) -> str:
    forms = {float: "{:>11,.2f}", type(None): "          -"}
    return f"{name[:35]:36}" + "".join(forms.get(type(cell), "{!s:>11.10}").format(cell) for cell in cells)


def top_text(service: APIService) -> str:
    benchmark, status, now_ns = service.benchmark, service.status(), service.source.now_ns()
    metrics, progress, workers = benchmark.metrics(), benchmark.progress(now_ns), benchmark.workers()
    state, phase, percent = status["state"], status["phase"], progress["percent_complete"]
    news = {f"phase {phase}": phase not in (None, state), "silent": status["stale"]}
    news["recording ended" if service.source.ended else "no bus"] = not service.source.connected
    words = [state, *(word for word in news if news[word] and not benchmark.end)]
    words += filter(None, (metrics["model"], metrics["endpoint_type"]))
    of_all = f"/{progress['total']}" if progress["total"] else ""
    left = f", {progress['eta_sec']:,.0f} s left" if progress["eta_sec"] else ""
    requests = f"{progress['completed']}{of_all} requests, {progress['errors']} errors"
    bar = f"[{'#' * int(percent * 0.6):-<60}] {percent:5.1f} %"
    lines = ["  ".join(words), bar, f"{requests}, {progress['elapsed_ns'] / 1e9:,.0f} s{left}"]
    lines += [f"error: {status['error']}"] if status["error"] else []
    failures = benchmark.results(whole=False)["error_summary"]["errors"][:5]
    lines += [f"  {error['count']} x {error['type']}: {error['message']}" for error in failures]
    lines += ["", _top_row("", ("avg", "p50", "p99"))]
    for tag in """output_token_throughput output_token_throughput_per_user request_throughput
            time_to_first_token inter_token_latency request_latency""".split():  # fmt: skip
        row = metrics["metrics"].get(tag, {})
        name = tag.replace("_throughput", "s/s").replace("_", " ") + (", ms" if row.get("unit") == "ms" else "")
        lines.append(_top_row(name, map(row.get, ("avg", "p50", "p99"))))
    statuses = collections.Counter(workers["worker_statuses"].values()).most_common()
    tasks = [worker["task_stats"] for worker in workers["workers"].values()]
    done, failed = (sum(one[key] for one in tasks) for key in ("completed", "failed"))
    counts = ", ".join(f"{count} {status}" for status, count in statuses) or "none yet"
    lines += ["", f"workers: {counts}; {done} requests done, {failed} failed"]
    gpus: dict[str, dict[str, Any]] = {}
    for tag, row in metrics["telemetry"].items():
        metric, _, labels = gpu_series(tag, text_or(row.get("header"), tag))
        gpus.setdefault(" ".join(value for _, value in labels[:3]), {})[metric] = row.get("current", row.get("avg"))
    lines += ["", _top_row("GPUs", ("util %", "power W", "memory GB", "temp C"))] if gpus else []
    shown = ("utilization", "power_usage", "memory_used", "temperature")
    lines += [_top_row(f"  {gpu}", map(row.get, shown)) for gpu, row in list(gpus.items())[:16]]
    # Nothing may move the cursor, colour or turn the text.
    return "".join("".join(c if c.isprintable() else "\ufffd" for c in line[:80]) + "\n" for line in lines)


ROUTES: tuple[Route, ...] = (
    Route("/", "documentation", "This documentation, with lines to copy and a live try-out", _get_documentation),
    Route("/dashboard", "dashboard", "The run, live", lambda s, *_: s.file("dashboard.html")),
    Route("/top", "top", "The run on one screen of plain text", lambda s, *_: text_response(top_text(s))),
    Route("/report.html", "report", "The run so far as one self-contained HTML file", _get_report),
    Route("/metrics", "metrics_text", "Everything for Prometheus", _get_exposition),
    Route("/api/metrics", "metrics", "The metrics: latest, then final", lambda s, *_: s.benchmark.metrics()),
    Route("/api/status", "status", "State and phase of the run, and its source", lambda s, *_: s.status()),
    Route("/api/progress", "progress", "How far the run is, by phase",
          lambda s, *_: s.benchmark.progress(s.source.now_ns())),
    Route("/api/workers", "workers", "The workers: status, tasks, CPU and memory", lambda s, *_: s.benchmark.workers()),
    Route("/api/config", "config", "The configuration, secrets redacted", lambda s, *_: s.benchmark.config()),
    Route("/api/server-metrics", "server_metrics", "Metrics of the server under test",
          lambda s, *_: s.benchmark.server_metrics()),
    Route("/api/results", "results", "How the run ended, and its results", lambda s, *_: s.benchmark.results()),
    Route("/api/history", "history", "Time series since the run began; without a tag, what there is", _get_history),
    Route("/api/runs", "runs", "The runs of this server's life",
          lambda s, *_: {"runs": s.benchmark.runs(s.source.now_ns())}),
    Route("/api/runs/{n}", "run", "One run, whole", _get_run),
    Route("/api/stream", "stream", "Bus messages as Server-Sent Events or NDJSON, for curl -N", _get_stream),
    Route("/api/clients", "clients", "Who is connected, what they are sent, and what was dropped", _get_clients),
    Route("/api", "index", "Where everything is", _get_index),
    Route("/openapi.json", "openapi", "This API as OpenAPI 3.1", lambda s, *_: s.file("openapi.json")),
    Route("/asyncapi.json", "asyncapi", "The messages of /ws and /api/stream", lambda s, *_: s.file("asyncapi.json")),
    Route("/ws", "websocket", "Bus messages over a WebSocket", _get_websocket, methods=("GET",)),
    Route("/health", "health", "The server answers", lambda *_: text_response("ok\n"), needs_token=False),
    Route("/healthz", "healthz", "The server answers", lambda *_: text_response("ok\n"), needs_token=False),
    Route("/readyz", "readyz", "The source is connected; 503 until it is", _get_ready, needs_token=False),
    Route("/static/{file}", "static", "Files of the pages, and guides", lambda s, _, rest, __: s.file(rest),
          needs_token=False),
)  # fmt: skip


# == 14 == Command line ================================================================================================
#
# Options and the environment -> Plan -> serve, with or without a benchmark behind `--`.


# As `--help`, the environment and the documentation know them; a switch has no metavar.
Option = collections.namedtuple("Option", "flag metavar default env help")
# flag | METAVAR | default | variables, without AIPERF_API_ (the first that is set counts) | help
_OPTIONS = """
--api-port | PORT | | SERVER_PORT | serve HTTP and WebSocket on this port; 0 is any free one
--api-host | HOST | 127.0.0.1 | SERVER_HOST | address to listen on; needs --api-port; :: is IPv4 and IPv6
--api-unix | PATH | | UNIX | listen on a Unix socket, too or instead of a port (mode 0600)
--zmq-host | HOST | 127.0.0.1 | ZMQ_HOST | watch the bus at tcp://HOST:5664; this is the default source
--zmq-ipc-path | DIR | | ZMQ_IPC_PATH | watch the bus in this IPC directory
--zmq-address | ADDR | | ZMQ_ADDRESS | watch the bus at any subscriber endpoint
--zmq-bind | ADDR | | ZMQ_BIND | bind this endpoint, so that publishers connect to us; needs pyzmq
--zmq-backend | NAME | auto | ZMQ_BACKEND | auto, pyzmq or builtin: what speaks ZMQ
--replay | FILE | | REPLAY | play a recording (.jsonl or .jsonl.gz)
--replay-speed | X | 1 | REPLAY_SPEED | play X times as fast; 0 is at once
--replay-loop | | | REPLAY_LOOP | play it again and again
--demo | | | DEMO | replay the real run that ships with the module, in a loop
--record | FILE | | RECORD | record every bus message; an older recording is renamed to FILE.1, .2, ...
--report | FILE | | REPORT | write the report (HTML) at the end of a run; an older one is renamed likewise
--config | FILE | | CONFIG | benchmark configuration (JSON) for /api/config when the bus does not carry it
--linger | SEC | 5 with a child, else for ever | LINGER SERVER_POST_COMPLETE_GRACE \
 | serve on for this many seconds after the end
--api-token | TOKEN | | TOKEN | clients must present this token; better given in the environment
--allow-host | NAME | | ALLOW_HOST | accept this Host header; repeatable, in the environment with commas
--cors-origin | ORIGIN | | SERVER_CORS_ORIGINS | let its pages read the API; repeatable, or as JSON list
--tls-cert | FILE | | TLS_CERT | serve https and wss with this certificate chain (PEM)
--tls-key | FILE | | TLS_KEY | its private key (PEM), if it is not in the same file
--ws-max-connections | N | 1000 | WS_MAX_CONNECTIONS SERVER_WEBSOCKET_MAX_CONNECTIONS | streaming clients
--log-level | LEVEL | info | LOG_LEVEL | debug, info, warning or error
"""
OPTIONS: tuple[Option, ...] = tuple(
    Option(flag, metavar, default, " ".join(f"AIPERF_API_{name}" for name in names.split()), text)
    for flag, metavar, default, names, text in (re.split(r" *\| *", line) for line in _OPTIONS.strip().splitlines())
)
_SOURCES = MappingProxyType({"--zmq-host": "tcp", "--zmq-ipc-path": "ipc", "--zmq-address": "zmq", "--zmq-bind": "bind",
                             "--replay": "replay", "--demo": "demo"})  # fmt: skip
_OFF = ("0", "false", "no", "off")
_DECIMAL = r"[0-9]{1,9}(\.[0-9]{1,9})?"
_PATTERNS = MappingProxyType({  # what a value must look like, by metavar or flag
    "": "|".join(("1|true|yes|on", *_OFF)), "X": _DECIMAL, "SEC": _DECIMAL, "N": "[0-9]{1,6}",
    "TOKEN": r"[^\ud800-\udfff]+",  # bytes that are no UTF-8 come as surrogates
    "PORT": "[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]",
    "LEVEL": "debug|info|warning|error",
    "ORIGIN": r"\*|[a-z][a-z0-9+.-]*://[^/\s?#@]+",
    "--zmq-backend": "auto|pyzmq|builtin",
    "--allow-host": r"[a-z0-9._~-]+(:[0-9]{1,5})?|\[?[0-9a-f:.]+\]?(:[0-9]{1,5})?",
})  # fmt: skip


class Plan(NamedTuple):
    settings: Settings
    log_level: str
    config: JSONValue
    source: Source
    argv: tuple[str, ...]  # the benchmark behind `--`, empty for none
    environ: Mapping[str, str]  # for it
    told: Mapping[str, Any]  # of an `aiperf profile`, its flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        shown = re.sub("(unrecognized arguments: [^ =]+)[ =].*", r"\1 ...", message)  # a value may be a secret
        raise UsageError(f"{printable(shown)}; the port is --api-port, a benchmark stands behind --, there is --help")


def _read_options(argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return each option's text (a tuple if repeatable): its own, else its variable's, else None.  An empty variable is
    none, an empty value a mistake: `--api-token "$UNSET"` would leave the server open."""
    about = "Watch an AIPerf benchmark over its ZMQ event bus and serve its metrics over HTTP and WebSocket."
    more = "Everything after -- is run as the benchmark: aiperf-api --api-port 9090 -- aiperf profile --model ..."
    parser = _Parser(prog="aiperf-api", description=about, epilog=more, allow_abbrev=False)
    for flag, metavar, default, variables, text in OPTIONS:
        shown = text + (f" (default: {default})" if default else "") + f" [{variables.replace(' ', ' or ')}]"
        kind: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "append_const", "const": "true"}
        parser.add_argument(flag, **{"action": "append", "help": shown, "dest": flag, **kind})
    parser.add_argument("--version", action="version", version=f"aiperf-api {__version__}")
    given = vars(parser.parse_args(argv))
    for flag, metavar, _, variables, text in OPTIONS:
        values, is_list = given[flag] or [], "repeatable" in text
        if not values:
            variable = next((environ[name] for name in variables.split() if environ.get(name)), "")
            parts = re.split(r'[\s,"]+', variable) if is_list else [variable]
            values = [part for part in parts if part not in ("", "[", "]", "[]")]  # AIPerf's way is a JSON list
        for value in values:
            if not re.fullmatch(_PATTERNS.get(flag, _PATTERNS.get(metavar, "(?s:.+)")), value.strip(), re.IGNORECASE):
                what = "usable" if flag == "--api-token" else printable(repr(value))  # it may be seen by others
                raise UsageError(f"{flag}: not {what}; {text}")
        kept = tuple(value.strip() for value in values if metavar or value.lower() not in _OFF)
        given[flag] = kept if is_list else kept[-1] if kept else None
    return given


def _read_config(path: str) -> JSONValue:
    try:
        with open(path, "rb") as file:
            config = json_load(file.read())
    except (OSError, JSONError) as error:
        reason = str(error.strerror) if isinstance(error, OSError) else f"not JSON: {error}"
        raise UsageError(f"--config {printable(path)}: {reason}") from None
    if not isinstance(config, dict):
        raise UsageError(f"--config {printable(path)}: not a JSON object")
    return config


def parse_arguments(argv: Sequence[str], environ: Mapping[str, str], ipc_dir: str = "") -> Plan:
    """Make sense of a command line; `ipc_dir` is for a benchmark's bus."""
    place = [*argv, "--"].index("--")
    own, command = argv[:place], tuple(argv[place + 1 :])
    if len(own) + 1 == len(argv):
        raise UsageError("a command belongs behind --")
    flags, given = {word.partition("=")[0] for word in own}, _read_options(own, environ)
    port, linger_sec = given["--api-port"], given["--linger"]
    if not port and "--api-host" in flags:
        raise UsageError("--api-host needs --api-port")
    if not port and not given["--api-unix"]:
        raise UsageError("nothing to serve on: give --api-port PORT (or --api-unix PATH); --help lists everything")
    if given["--tls-key"] and not given["--tls-cert"]:
        raise UsageError("--tls-key needs --tls-cert")
    for option in filter(given.get, ("--record", "--report")):
        path = check_output(given[option], option)  # now, not when the run is over
        for read in filter(given.get, ("--config", "--replay", "--tls-cert", "--tls-key")):
            if os.path.exists(path) and os.path.exists(given[read]) and os.path.samefile(path, given[read]):
                raise UsageError(f"{option} {printable(path)}: that is the file that {read} reads")
    told, learnt = read_flags(command), Secrets()
    learnt.redact([told, dict(environ)])  # learns them; past SECRETS_MAX the first count
    settings = Settings(
        host=(given["--api-host"] or "127.0.0.1").strip("[]"), port=port and int(port), unix_path=given["--api-unix"],
        token=given["--api-token"], allow_hosts=given["--allow-host"], cors_origins=given["--cors-origin"],
        tls_cert=given["--tls-cert"], tls_key=given["--tls-key"], linger_sec=linger_sec and float(linger_sec),
        ws_max_connections=int(given["--ws-max-connections"] or WS_CONNECTIONS_MAX),
        record=given["--record"], report=given["--report"], secrets=learnt.known,
    )  # fmt: skip
    config = _read_config(given["--config"]) if given["--config"] else None
    chosen = _choose_source(flags, given, bool(command))
    words = [os.path.basename(word).replace("aiperf.exe", "aiperf") for word in command]
    is_aiperf = ("aiperf", "profile") in zip(words, words[1:])
    kind, value = chosen or (_bus_of(told, ipc_dir) if is_aiperf else ("bind", f"ipc://{ipc_dir}/bus.ipc"))
    source = _make_source(kind, value, given, bool(command))
    # Without them a run without dashboard publishes no live metrics (AIPerf 0.5 and later).
    live = {"AIPERF_UI_REALTIME_METRICS_ENABLED": "true", "AIPERF_UI_REALTIME_METRICS_INTERVAL": "1"}
    names = {name for option in OPTIONS for name in option.env.split()}
    ours = {name for name in names if "_SERVER_" in name or "TOKEN" in name}  # AIPerf's own API reads them, too
    environ = {**live, **{name: environ[name] for name in environ if name not in ours}}
    environ |= {"AIPERF_API_ZMQ_ADDRESS": value} if kind == "bind" and not chosen else {}
    command += ("--zmq-ipc-path", ipc_dir) if value == ipc_dir else ()
    defaults = {} if "config" in told else {"endpoint_type": "chat", "streaming": False}  # AIPerf's
    level = (given["--log-level"] or "info").upper()
    return Plan(settings, level, config, source, command, environ, {**defaults, **told} if is_aiperf else {})


def _choose_source(flags: set[str], given: Mapping[str, Any], has_command: bool) -> tuple[str, str] | None:
    """Return kind and value of the one source; a flag beats variables.  A command brings its own bus (None), unless a
    flag says where that is."""
    chosen = [flag for flag in _SOURCES if flag in flags]
    if not chosen and not has_command:
        chosen = [flag for flag in _SOURCES if given[flag]] or ["--zmq-host"]
    replays = {"--replay", "--demo"}.intersection(chosen)
    if len(chosen) > 1 or (has_command and replays):
        raise UsageError(f"{' and '.join(chosen)}{' and a command' if has_command else ''}: only one source at a time")
    for option in filter(given.get, ("--replay-speed", "--replay-loop")):
        if not replays:
            raise UsageError(f"{option} needs --replay or --demo")
    return (_SOURCES[chosen[0]], given[chosen[0]] or "127.0.0.1") if chosen else None


def _bus_of(flags: Mapping[str, Any], ipc_dir: str) -> tuple[str, str]:
    """Return kind and value of the source that is the bus of an `aiperf profile`."""
    if "zmq_host" in flags:
        host = str(flags["zmq_host"])
        return "tcp", "127.0.0.1" if host in ("0.0.0.0", "*") else host
    if "zmq_ipc_path" in flags or "zmq_dual_bind" in flags:
        return "ipc", str(flags.get("zmq_ipc_path", "/tmp/aiperf"))  # AIPerf's default
    path = str(flags.get("config", os.devnull))
    key = r"(?m)^[ \t\"'{,-]*communication[\"']?[ \t]*:|[{,]\s*[\"']communication"
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:  # AIPerf will say so
        if re.search(key, file.read(1 << 20)):  # AIPerf 0.13 takes no flag beside it
            example = "say where it is, as in aiperf-api ... --zmq-host 127.0.0.1 -- aiperf profile ..."
            raise UsageError(f"{printable(path)} chooses the event bus itself (communication): {example}")
    return "ipc", ipc_dir


def _make_source(kind: str, value: str, given: Mapping[str, Any], is_child: bool) -> Source:
    speed = float(given["--replay-speed"] or 1)
    if kind == "replay":
        return ReplaySource(value, speed=speed, loop=bool(given["--replay-loop"]))
    if kind == "demo":
        data = read_static_files().get(DEMO_RECORDING)
        if data is None:
            raise UsageError("--demo: the recording is not here; copy the folder static/ beside aiperf_api.py")
        middle_sec = 20.5  # there is something to see at once
        return ReplaySource(DEMO_RECORDING, kind, speed=speed, loop=True, data=data, start_at=middle_sec)
    if kind == "tcp":
        value = backend_address(value.strip("[]"))
    if kind == "ipc":
        value = ipc_address(value)
    backend = (given["--zmq-backend"] or "auto").lower()
    return bus_source(value, "child" if is_child else kind, bind=kind == "bind", backend=backend)


# -- The benchmark behind `--`


def read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return `--any-name VALUE` as any_name; without a value it is true, repeated a list."""
    found: dict[str, list[Any]] = {}
    short = {"-m": "--model", "-u": "--url", "-f": "--config", "-H": "--header"}
    for word, after in zip(argv, (*argv[1:], "--")):
        if word[:2] in short:
            word = short[word[:2]] + (f"={word[2:].lstrip('=')}" if word[2:] else "")  # noqa: PLW2901
        name, equals, value = word.partition("=")
        if re.match("--.", name):
            if not equals:
                value = "true" if re.match(r"-(?![0-9.]+\Z)", after) else after
            # A longer number may be a key.
            is_json = re.fullmatch(r"(?i)true|false|-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?", value)
            read = json_load(value.lower().encode()) if is_json else value
            found.setdefault(name[2:].replace("-", "_"), []).append(read)
    return {name: values if len(values) > 1 else values[0] for name, values in found.items()}


class Child:
    """The benchmark, run as a shell runs it: in a process group of its own, with the terminal.

    So Ctrl-C reaches it alone.  A signal to us is passed on, but not the second of two within a second: AIPerf's first
    SIGINT finishes, its second quits, and `timeout` sends one to us and one to our group.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.hurried = asyncio.Event()  # nobody wants us to go on serving
        self.exit_text = ""
        self._signals: list[tuple[int, float]] = []  # number and monotonic seconds of those that counted
        self._process: asyncio.subprocess.Process | None = None  # while it runs
        self._has_terminal = False
        with contextlib.suppress(OSError, AttributeError):
            self._has_terminal = os.tcgetpgrp(0) == os.getpgrp()

    def watch_signals(self) -> None:
        if sys.platform == "win32":  # Ctrl-C is a KeyboardInterrupt
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGCHLD, self._on_child_signal)

    def _give_terminal(self, group: int = 0) -> None:
        """Have the terminal signal a process group (0: our own); SIGTTOU would stop us for asking."""
        if self._has_terminal:
            before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            with contextlib.suppress(OSError):
                os.tcsetpgrp(0, group or os.getpgrp())
            signal.signal(signal.SIGTTOU, before)

    def _enter_group(self) -> None:  # in the child, between fork and exec
        os.setpgid(0, 0)
        self._give_terminal()

    async def run(self) -> int:
        """Run it to its end; return the exit code as a shell has it. ExitError 126 or 127 when it cannot be started."""
        argv, enter = self.plan.argv, self._enter_group if hasattr(os, "setpgid") else None
        try:
            self._process = await asyncio.create_subprocess_exec(*argv, env=self.plan.environ, preexec_fn=enter)
            for number, _ in self._signals:  # that came before
                self._send(number)
            self._on_child_signal()  # a Ctrl-Z, too
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self._give_terminal()
            code = 127 if isinstance(error, FileNotFoundError) else 126
            raise ExitError(f"{printable(argv[0])}: {getattr(error, 'strerror', None) or error}", code) from None
        code = await self._process.wait()
        self._give_terminal()
        self.exit_text = f"exit status {code}"
        if code < 0:
            self._send(signal.SIGKILL, to_group=True)  # what it had started goes, too
            self.exit_text = f"killed by {signal.Signals(-code).name if -code in [*signal.Signals] else -code}"
        self._process = None
        return code if code >= 0 else 128 - code

    def _send(self, number: int, *, to_group: bool = False) -> None:
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number) if to_group else self._process.send_signal(number)

    def _on_signal(self, number: int) -> None:
        """Pass it on; the third kills the benchmark.  After its end one asks for ours, another forces it."""
        now_sec = time.monotonic()
        if any(known == number and now_sec - at < 1.0 for known, at in self._signals):
            return
        self._signals.append((number, now_sec))
        if not self._process and self.hurried.is_set():
            sys.exit(128 + number)  # which ends what stop() waits for, and removes the directory
        if not self._process or len(self._signals) > 1 or number != signal.SIGINT:
            self.hurried.set()
        self._send(number)
        if len(self._signals) > 2:
            self._send(signal.SIGKILL, to_group=True)

    def _on_child_signal(self) -> None:
        """Follow a child that Ctrl-Z has stopped: stop, too, so that the shell has the terminal, and let it go on when
        we do."""
        own = self._process.pid if self._process and self._has_terminal else 0
        with contextlib.suppress(ChildProcessError, AttributeError):  # macOS has waitid() from Python 3.13 on
            if own and os.waitid(os.P_PID, own, os.WSTOPPED | os.WNOHANG):
                self._give_terminal()
                os.kill(os.getpid(), signal.SIGSTOP)
                with contextlib.suppress(OSError):
                    if os.tcgetpgrp(0) == os.getpgrp():  # fg, not bg
                        self._give_terminal(own)
                self._send(signal.SIGCONT, to_group=True)


@contextlib.contextmanager
def ipc_directory() -> Iterator[str]:
    """Hold a directory of this user alone, whose path is short enough for a Unix socket."""
    import shutil  # only here: they import half of the compressors
    import tempfile

    try:
        is_short = len(os.fsencode(tempfile.gettempdir())) + len(BUS_IPC_NAME) < 72
        directory = tempfile.mkdtemp(prefix="aiperf-api-", dir=None if is_short else "/tmp")
    except OSError as error:
        raise StartError(f"no folder for temporary files: {error.strerror or error}; set TMPDIR") from None
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def say(line: str) -> None:
    """Print; a standard error that is closed, full or broken costs the line only."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:  # print() would take stdout
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_held() -> Iterator[None]:
    """Hold the log while a benchmark draws on the same terminal."""
    from logging.handlers import MemoryHandler  # only here: it imports half of the standard library

    handler = log.handlers[0]
    held = MemoryHandler(1000, logging.CRITICAL + 1, handler)
    log.handlers[:] = [held if sys.stderr is not None and sys.stderr.isatty() else handler]
    try:
        yield
    finally:
        log.handlers[:] = [handler]
        held.close()  # writes what it holds


async def _run_benchmark(service: APIService, child: Child) -> int:
    with log_held():
        code = await child.run()
    deadline, seen = time.monotonic() + 3.0, -1
    while service.bus_total != seen and time.monotonic() < deadline:  # what it said last is still under way
        seen = service.bus_total
        await asyncio.sleep(0.2)
    if not seen:
        log.warning("the benchmark was not heard; in a script it needs --zmq-host: see the troubleshooting guide")
    if code or seen:  # a command that ended well and never reported has not failed
        hint = "" if seen else "; see its output above"
        service.end_child(child.exit_text + hint if code else "")
    linger_sec = 5 if service.settings.linger_sec is None else service.settings.linger_sec
    if linger_sec and not child.hurried.is_set():
        log.info("the benchmark ended (%s); serving its last state for %g s", child.exit_text, linger_sec)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(child.hurried.wait(), linger_sec)
    return code


async def _serve(plan: Plan) -> int:
    child = Child(plan)
    service = APIService(source=plan.source, config=plan.config, **plan.settings._asdict())
    service.configure(plan.told, "command")
    child.watch_signals()
    await service.start()
    try:
        source, settings = service.source, service.settings
        say(f"aiperf-api {__version__} serves {printable(service.url)}")
        if settings.port is not None:
            say(f"  dashboard  {service.url}/dashboard")
        say(f"  source     {source.kind}: {printable(source.address)}")
        if settings.port is not None and not is_loopback(settings.host) and not settings.token:
            say("  warning    open to the network without a token; see --api-token")
        if plan.argv:
            if os.getpid() == 1:
                say("  warning    the first process of this container reaps no orphans; start it with --init")
            return await _run_benchmark(service, child)
        over = service.wait_complete(math.inf if settings.linger_sec is None else settings.linger_sec)
        ends = [asyncio.ensure_future(end) for end in (child.hurried.wait(), over)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        return 0
    finally:
        await service.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; return the exit code."""
    given = sys.argv[1:] if argv is None else argv
    try:
        with ipc_directory() if "--" in given else contextlib.nullcontext("") as directory:
            plan = parse_arguments(given, os.environ, directory)
            logging.raiseExceptions = False  # as in say()
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
            log.handlers[:] = [handler]
            log.propagate = False
            log.setLevel(plan.log_level)
            return asyncio.run(_serve(plan))
    except ExitError as error:
        say(f"aiperf-api: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def run() -> NoReturn:
    """Run main(), for launchers that ignore what it returns (zipapp)."""
    while (spare := os.open(os.devnull, os.O_RDWR)) < 3:  # a closed stream would become a socket, and be written to
        pass
    os.close(spare)
    code = main()
    try:
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # Python would flush it once more, and exit with 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(code)


if __name__ == "__main__":
    run()
