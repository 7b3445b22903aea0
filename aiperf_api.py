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

import base64
import codecs
import difflib
import hashlib
import hmac
import ipaddress
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Union
from urllib.parse import unquote_to_bytes

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
#
# Each limit: its unit in the name, a precedent, and what the peer sees past it.

# HTTP requests
HTTP_HEAD_BYTES_MAX = 16 * 1024  # request line and headers; nginx 8-32 KiB, Apache 8 KiB a line, node 16 KiB; 431
HTTP_HEADERS_MAX = 64  # header lines; Apache 100, websockets 128, ours are read by eye; 431
HTTP_TARGET_BYTES_MAX = 4 * 1024  # as sent, still percent-encoded; Apache 8190, uvicorn 64 KiB in all; 414
HTTP_REQUEST_LINE_BYTES_MAX = HTTP_TARGET_BYTES_MAX + 64  # the target, a method and " HTTP/1.1"; 414
HTTP_LEADING_CRLF_MAX = 4  # empty lines skipped before a request line; RFC 9112 2.2 asks for at least one; 400
HTTP_CONTENT_LENGTH_DIGITS_MAX = 15  # h11 20; any length above 0 is refused anyway; 400
HTTP_QUERY_FIELDS_MAX = 64  # parts between "&"; CPython's max_num_fields is off by default; 400
HTTP_ACCEPT_MEMBERS_MAX = 32  # media types of one Accept header, codings of one Accept-Encoding; the rest are ignored
HTTP_MEMO_HEADS_MAX = 64  # request heads remembered by one memo; the oldest is forgotten, nobody sees it
HTTP_MEMO_HEAD_BYTES_MAX = 1024  # longer heads are parsed each time; curl sends 80, Prometheus 300, Chromium 700
HTTP_SUGGEST_PATH_CHARS_MAX = 64  # an unknown path longer than this gets a 404 without "did you mean" (difflib is slow)

# WebSocket, from the client to us
WS_MESSAGE_BYTES_MAX = 64 * 1024  # one message over all its fragments; websockets 1 MiB, websocat 64 KiB; Close 1009
WS_CONTROL_BYTES_MAX = 125  # payload of a Close, Ping or Pong; RFC 6455 5.5; Close 1002
WS_CLOSE_REASON_BYTES_MAX = 123  # what 125 leaves beside the code; a longer reason of ours is cut on a character
WS_FRAGMENTS_MAX = 1024  # fragments of one message; an empty one costs the peer 6 bytes and us more; Close 1008
WS_FRAGMENT_BYTES_MEAN = 64  # above 64 KiB the cap grows: one fragment for each 64 bytes that a message may have

# Log lines
LOG_QUOTE_CHARS_MAX = 200  # a quoted string of a peer; websockets 75; cut with "..."


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
#   reading   UTF-8 bytes, RFC 8259 only: no NaN or Infinity, no numbers that overflow a double, no lone surrogates.
#             Integers outside the signed/unsigned 64-bit range become floats, as orjson has it.
#   writing   compact UTF-8 bytes; NaN and infinities are null; keys may be str, int, float, bool or None;
#             integers of any size keep their digits; lone surrogates become U+FFFD.

JSONValue = Any  # str | int | float | bool | None | list | dict, nested


def json_bytes(value: JSONValue, *, pretty: bool = False) -> bytes:
    """STAND-IN of branch wire, to be replaced by the lead's room 3."""
    layout: Any = {"indent": 2} if pretty else {"separators": (",", ":")}
    text = json.dumps(value, ensure_ascii=False, **layout)
    return text.encode("utf-8", "replace")


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
# RFC 9110 7.2: Host = uri-host [ ":" port ]; names as DNS and containers have them, addresses as IP-literal (RFC 3986 3.2.2)
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
# What must not be logged: the token in a query (its name may be percent-encoded), in a header, in a subprotocol
_SECRET_IN_TEXT = re.compile(
    r"([?&](?:t|%74)(?:o|%6f)(?:k|%6b)(?:e|%65)(?:n|%6e)=|aiperf\.token\.|bearer +)[^\s&]+", re.IGNORECASE
)

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

_REASONS = {
    101: "Switching Protocols", 200: "OK", 204: "No Content", 304: "Not Modified", 400: "Bad Request",
    401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    413: "Content Too Large", 414: "URI Too Long", 417: "Expectation Failed", 421: "Misdirected Request",
    426: "Upgrade Required", 429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    501: "Not Implemented", 503: "Service Unavailable", 505: "HTTP Version Not Supported",
}  # fmt: skip

# For pages: everything from here and nothing inline, so that a metric's name can never become a script.
_PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_PAGE_HEADERS = (
    ("Content-Security-Policy", _PAGE_POLICY),
    ("Referrer-Policy", "no-referrer"),  # the address may hold ?token=
)


def printable(text: str | bytes, limit: int = LOG_QUOTE_CHARS_MAX) -> str:
    """A peer's string for a log line: one line of ASCII, at most `limit` characters and "...", tokens as `***`."""
    raw = text.decode("latin-1") if isinstance(text, bytes) else text
    shown = _SECRET_IN_TEXT.sub(r"\1***", raw[: 4 * limit]).encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= limit and len(raw) <= 4 * limit else shown[:limit] + "..."


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
        hint = "this is a WebSocket: try websocat, or a browser's `new WebSocket(url)`"
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


def check_token(request: Request, token: bytes) -> None:
    """Refuse with 401 a request that presents the token in none of the three ways that clients can.

    `Authorization: Bearer` is for tools, `?token=` and the subprotocol `aiperf.token.<token>` are for browsers, which
    cannot set headers on a WebSocket.
    """
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    given = [credentials.strip(" ").encode("latin-1")] if scheme.lower() == "bearer" else []
    given += [value.encode("utf-8") for value in request.args("token")]
    prefix = "aiperf.token."
    given += [name[len(prefix) :].encode("latin-1") for name in subprotocols(request) if name.startswith(prefix)]
    # Constant time, on bytes (str with non-ASCII raises), and never stopping at the first that fits.
    if not sum([hmac.compare_digest(candidate, token) for candidate in given]):
        raise HTTPError(401, "a token is needed", (("WWW-Authenticate", 'Bearer realm="aiperf-api"'),))


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
    codings = {value: q for value, _, q in _weighted(header or "")}
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
        gzip_body: the same body compressed, for clients that take it.  An ETag beside it must be weak (`W/"…"`).
    """

    __slots__ = ("_gzip_head", "_head", "body", "gzip_body", "headers", "status")

    def __init__(
        self,
        status: int = 200,
        body: bytes | None = b"",
        content_type: str = "application/json",
        headers: HeaderList = (),
        *,
        gzip_body: bytes | None = None,
    ) -> None:
        self.status = status
        self.body = body
        self.headers = tuple(headers)
        self.gzip_body = gzip_body
        fixed = self._fixed_head(content_type)
        self._head = fixed + self._length(body)
        self._gzip_head = fixed + b"Content-Encoding: gzip\r\n" + self._length(gzip_body)

    def _fixed_head(self, content_type: str) -> bytes:
        names = {name.lower() for name, _ in self.headers}
        added = [("Content-Type", content_type)] if self.status not in (204, 304) else []
        added.append(("X-Content-Type-Options", "nosniff"))
        if "cache-control" not in names:
            added.append(("Cache-Control", "no-store"))
        if self.gzip_body is not None:
            added.append(("Vary", "Accept-Encoding"))
        if content_type.startswith("text/html"):
            added.extend(_PAGE_HEADERS)
        status_line = f"HTTP/1.1 {self.status} {_REASONS[self.status]}\r\n".encode("ascii")
        return status_line + _header_bytes((*added, *self.headers))

    def _length(self, body: bytes | None) -> bytes:
        # RFC 9110 8.6: no Content-Length with 204; with 304 it would have to be that of the 200.
        if body is None or self.status in (204, 304):
            return b"Date: "
        return b"Content-Length: %d\r\nDate: " % len(body)

    def encode(
        self, *, date: bytes, head_only: bool = False, close: bool = False, gzip: bool = False, extra: HeaderList = ()
    ) -> bytes:
        """The bytes of the answer.

        Args:
            date: IMF-fixdate (RFC 9110 5.6.7), such as b"Mon, 23 Nov 2026 00:00:00 GMT".
            head_only: the request is a HEAD: same head, no body.
            close: the connection ends after this answer; implied by a body of None.
            gzip: the client takes gzip (accepts_gzip); used if there is a gzip_body.
            extra: headers of this one answer, such as CORS.
        """
        body = self.body
        head = self._head
        if gzip and self.gzip_body is not None:
            head, body = self._gzip_head, self.gzip_body
        end = b"\r\n" + _header_bytes(extra) if extra else b"\r\n"
        if close or body is None:
            end += b"Connection: close\r\n"
        return b"".join((head, date, end, b"\r\n", b"" if head_only or body is None else body))


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
    if response.gzip_body is not None:
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
    schema: Mapping[str, Any] | None = None  # JSON Schema of the answer
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
            raise HTTPError(405, "method not allowed", (("Allow", ", ".join(route.methods)),))
        return route

    def _not_found(self, path: str) -> str:
        """What to tell the client: names only paths of ours, so that nothing of the request comes back in the answer."""
        if len(path) <= HTTP_SUGGEST_PATH_CHARS_MAX:
            near = difflib.get_close_matches(path, self._by_path, n=1)
            if near:
                return f"not found; did you mean {near[0]}?"
        return "not found; GET / lists what there is"

    def openapi(self, title: str, version: str) -> dict[str, Any]:
        """The table as an OpenAPI 3.1 document, ready for json_bytes."""
        paths = {route.path: {"get": _operation(route)} for route in self.routes}
        return {"openapi": "3.1.0", "info": {"title": title, "version": version}, "paths": paths}


def _operation(route: Route) -> dict[str, Any]:
    media: dict[str, Any] = {}
    if route.schema is not None:
        media["schema"] = route.schema
    if route.example is not None:
        media["example"] = route.example
    answer: dict[str, Any] = {"description": route.summary}
    if not route.websocket:
        answer["content"] = {media_type: media for media_type in route.media_types}
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "responses": {"101" if route.websocket else "200": answer},
    }
    if route.params:
        operation["parameters"] = [_parameter(param) for param in route.params]
    return operation


def _parameter(param: Param) -> dict[str, Any]:
    described = {"name": param.name, "in": "query", "description": param.summary, "required": param.required}
    return {**described, "schema": {"type": "string"}, **({"example": param.example} if param.example else {})}


# == 7 == Static files =================================================================================================


# == 8 == Metric catalogue =============================================================================================


# == 9 == Prometheus text ==============================================================================================


# == 10 == Benchmark state =============================================================================================


# == 11 == Sources =====================================================================================================


# == 12 == Hub =========================================================================================================


# == 13 == Connection ==================================================================================================


# == 14 == Endpoints and service =======================================================================================


# == 15 == Command line ================================================================================================
