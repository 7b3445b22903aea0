#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of the two parsers that read from strangers.

    pip install atheris
    python .ci/fuzz_aiperf_api.py ws   -max_total_time=600
    python .ci/fuzz_aiperf_api.py http -max_total_time=600

Further arguments are libFuzzer's: a directory keeps the corpus, a file replays one finding.  What must hold for any
bytes: no exception, the same result however the bytes are cut, silence after a fault, and bounded buffers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports(include=["aiperf_api"]):
    import aiperf_api

MESSAGE_BYTES_MAX = 300  # small, so that the fuzzer meets the limit; above 125, so that it meets long lengths
MASK = b"\x37\xfa\x21\x3d"


def pieces(data: bytes, seed: int) -> list[bytes]:
    """`data` in pieces of 1 to 13 bytes, the same for the same seed."""
    parts, at = [], 0
    while at < len(data):
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        size = 1 + (seed >> 16) % 13
        parts.append(data[at : at + size])
        at += size
    return parts


def framed(data: bytes) -> bytes:
    """Read `data` as a list of (first byte, length, payload), so that most inputs are frames with a right mask."""
    frames, at = [], 0
    while at + 2 <= len(data):
        first, size = data[at], data[at + 1]
        payload = data[at + 2 : at + 2 + size]
        at += 2 + len(payload)
        length = bytes((0x80 | len(payload),)) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
        masked = bytes(byte ^ MASK[place % 4] for place, byte in enumerate(payload))
        frames.append(bytes((first,)) + length + MASK + masked)
    return b"".join(frames)


def ws_events(parts: list[bytes]) -> list[Any]:
    parser = aiperf_api.FrameParser(MESSAGE_BYTES_MAX)
    events: list[Any] = []
    for part in parts:
        ended = bool(events) and events[-1].kind in ("close", "failure")
        found = parser.feed(part)
        assert not (ended and found), "an event after the end"
        events += found
        assert len(parser._buffer) < 14 + 125, "more is held back than a head or a control frame"
    return events


def fuzz_ws(data: bytes) -> None:
    if len(data) < 2:
        return
    stream = framed(data[2:]) if data[0] & 1 else data[2:]
    whole = ws_events([stream])
    assert ws_events(pieces(stream, data[1])) == whole
    for event in whole:
        assert len(event.data) <= MESSAGE_BYTES_MAX
        if event.kind == "failure":
            assert event.code in (1002, 1007, 1008, 1009)
            assert len(aiperf_api.encode_close(event.code, event.reason)) <= 127
        elif event.kind == "text":
            event.data.encode("utf-8")


def http_results(parts: list[bytes], memo: dict[bytes, aiperf_api.Request]) -> list[Any]:
    parser = aiperf_api.RequestParser(memo)
    results: list[Any] = []
    for part in parts:
        parser.feed(part)
        try:
            results.extend(iter(parser.next_request, None))
        except aiperf_api.HTTPError as error:
            results.append(error.status)
        if not results or (isinstance(results[-1], aiperf_api.Request) and results[-1].keep_alive):
            assert len(parser._buffer) < aiperf_api.HTTP_HEAD_BYTES_MAX
        else:
            assert parser.next_request() is None, "a request behind the last one"
    last = results[-1] if results else None
    has_rest = last is None or (isinstance(last, aiperf_api.Request) and (last.keep_alive or last.wants_upgrade))
    return [*results, parser.take_rest() if has_rest else b""]


def check_request(request: aiperf_api.Request) -> None:
    """The pure functions on a request raise nothing but HTTPError."""
    headers = request.headers
    assert request.path.startswith("/") or request.path == "*"
    for check in (
        lambda: aiperf_api.check_host(headers.get("host"), allowed=frozenset(), bound_to_loopback=True),
        lambda: aiperf_api.check_origin(request, frozenset()),
        lambda: aiperf_api.upgrade_response(request),
        lambda: aiperf_api.check_token(request, b"s3cret", "aiperf_api_80"),
        lambda: aiperf_api.with_preconditions(request, aiperf_api.text_response("x" * 4096)).encode(date=b""),
    ):
        try:
            check()
        except aiperf_api.HTTPError as error:
            aiperf_api.error_response(error).encode(date=b"")
    aiperf_api.accepts(headers.get("accept"), ("text/plain; version=0.0.4", "application/json"))
    aiperf_api.accepts_gzip(headers.get("accept-encoding"))
    assert aiperf_api.printable(request.target).isascii()


def fuzz_http(data: bytes) -> None:
    if len(data) < 2:
        return
    prefix = (b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"GET /", b"GET / HTTP/1.1\r\nHost: ")[data[0] & 3]
    stream = prefix + data[2:]
    memo: dict[bytes, aiperf_api.Request] = {}
    whole = http_results([stream], memo)
    assert http_results(pieces(stream, data[1]), {}) == whole
    assert http_results([stream], memo) == whole
    for result in whole:
        if isinstance(result, aiperf_api.Request):
            check_request(result)


def main() -> None:
    targets = {"ws": fuzz_ws, "http": fuzz_http}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        sys.exit(__doc__)
    atheris.Setup([sys.argv[0], *sys.argv[2:]], targets[sys.argv[1]])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
