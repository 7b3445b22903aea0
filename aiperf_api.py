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
import re
from typing import Any, Union

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
#   reading   UTF-8 bytes, RFC 8259 only: no NaN or Infinity, no numbers that overflow a double, no lone surrogates.
#             Integers outside the signed/unsigned 64-bit range become floats, as orjson has it.
#   writing   compact UTF-8 bytes; NaN and infinities are null; keys may be str, int, float, bool or None;
#             integers of any size keep their digits; lone surrogates become U+FFFD.

JSONValue = Any  # str | int | float | bool | None | list | dict, nested


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
