#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the server bears, measured from outside: a server process, a bus, and many clients.

    python .ci/load_aiperf_api.py slow     98 good clients beside one that stalls and one that reads 1 KiB a second
    python .ci/load_aiperf_api.py crowd    2,000 WebSockets at once: time to connect, memory each, nothing missed
    python .ci/load_aiperf_api.py churn    10,000 connections dropped at every stage: what is left behind
    python .ci/load_aiperf_api.py stop     SIGTERM with 500 idle, 50 streaming and 5 stalled clients
    python .ci/load_aiperf_api.py all      the four of them

Needs pyzmq, and Linux for /proc.  Each prints its figures and exits 1 when one is not what it must be; none takes more
than three minutes.  `--seconds N` shortens the steady part of `slow` (60), `--scale X` the number of clients.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import zmq

MODULE = Path(__file__).resolve().parent.parent / "aiperf_api.py"
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
STATES = ("worker_status_summary", "realtime_metrics", "processing_stats")
TYPES = (*STATES, "load_event")
EVENT = "load_event"  # of no core topic: the server asks for it with the first client
CORE = b"worker_status_summary"
failures: list[str] = []


def must(condition: bool, text: str) -> None:
    print(f"  {'ok  ' if condition else 'FAIL'} {text}")
    if not condition:
        failures.append(text)


class Bus:
    """The subscribers' end of an event bus."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.subscribed: set[bytes] = set()
        self.count = 0

    async def wait_for(self, topic: bytes) -> None:
        """Until the server has asked for it, in whatever form."""
        while not any(prefix.startswith(topic) for prefix in self.subscribed):
            while self.socket.poll(0):
                told = self.socket.recv()
                (self.subscribed.add if told[0] else self.subscribed.discard)(told[1:])
            await asyncio.sleep(0.01)

    def publish(self, message_type: str, fill: int = 0) -> None:
        self.count += 1
        body = {
            "worker_status_summary": '"worker_statuses":{"w":"healthy"}',
            "realtime_metrics": '"metrics":[{"tag":"request_latency","unit":"ms","avg":2.5,"count":3}]',
            "processing_stats": '"processing_stats":{"processed":1,"errors":0}',
        }.get(message_type, '"x":1')
        text = '{"seq":%d,"sent_ns":%d,"message_type":"%s",%s,"fill":"%s"}'
        values = self.count, time.monotonic_ns(), message_type, body, "x" * fill
        self.socket.send_multipart([message_type.encode() + b"$", (text % values).encode()])


class Server:
    """The program, as users start it."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(MODULE), "--api-port", "0", *options], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.url = self.process.stderr.readline().split()[-1]
        self.lines: list[str] = []
        self.port = int(self.url.rpartition(":")[2])
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True)
        self.reader.start()

    def resident_kib(self) -> int:
        return int(re.findall(r"VmRSS:\s+([0-9]+)", Path(f"/proc/{self.process.pid}/status").read_text())[0])

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def cpu_sec(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def get(self, path: str) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        body = (await reader.read()).partition(b"\r\n\r\n")[2]
        writer.close()
        return json.loads(body)

    def log(self) -> list[str]:
        """Log lines, without those that every start prints."""
        return [line.strip() for line in self.lines if not line.startswith("  ") and "connected to the bus" not in line]

    def stop(self) -> float:
        """Seconds from SIGTERM to the exit; the exit code must be 0."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        took = time.monotonic() - began
        self.reader.join(5)
        must(code == 0, f"exit code {code}")
        return took


def masked(text: str) -> bytes:
    data = text.encode()
    size = bytes((0x80 | len(data),)) if len(data) < 126 else struct.pack("!BH", 254, len(data))
    return b"\x81" + size + b"\0\0\0\0" + data  # a mask of zeros is one, too


SUBSCRIBE = masked(json.dumps({"type": "subscribe", "message_types": TYPES, "snapshot": False}))


class Listener(asyncio.Protocol):
    """A WebSocket client that reads as fast as it can."""

    def __init__(self, ready: asyncio.Queue[None]) -> None:
        self.ready = ready
        self.buffer = bytearray()
        self.numbers: list[int] = []  # of the messages that came
        self.latencies: list[float] = []  # ms
        self.skipped = 0
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(UPGRADE + SUBSCRIBE)  # type: ignore[attr-defined]

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        now_ns, at, buffer = time.monotonic_ns(), 0, self.buffer
        if not self.numbers and buffer.startswith(b"HTTP"):
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            assert buffer.startswith(b"HTTP/1.1 101"), buffer[:100]
            at = end + 4
        while len(buffer) - at >= 2:
            size, head = buffer[at + 1], 2
            if size >= 126:
                head = 4 if size == 126 else 10
                if len(buffer) - at < head:
                    break
                size = int.from_bytes(buffer[at + 2 : at + head], "big")
            if len(buffer) - at < head + size:
                break
            if buffer[at] == 0x89:
                self.transport.write(b"\x8a\x80\0\0\0\0")  # type: ignore[attr-defined]
            elif buffer[at] == 0x81:
                self.receive(bytes(buffer[at + head : at + head + min(size, 300)]), now_ns)
            at += head + size
        del buffer[:at]

    def receive(self, text: bytes, now_ns: int) -> None:
        found = re.search(rb'"seq":([0-9]+),"sent_ns":([0-9]+)', text)
        if found:
            self.numbers.append(int(found[1]))
            self.latencies.append((now_ns - int(found[2])) / 1e6)
        elif b'"subscribed"' in text:
            self.ready.put_nowait(None)
        elif b'"skipped"' in text:
            self.skipped += sum(json.loads(text)["counts"].values())


async def connect(server: Server, count: int) -> list[Listener]:
    """So many listeners, all of them subscribed."""
    ready: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    made = [loop.create_connection(lambda: Listener(ready), "127.0.0.1", server.port) for _ in range(count)]
    listeners = [protocol for _, protocol in await asyncio.gather(*made)]
    for _ in range(count):
        await asyncio.wait_for(ready.get(), 30)
    return listeners


async def bad_socket(server: Server) -> socket.socket:
    """A WebSocket whose small SO_RCVBUF makes its reading, or not reading, show on the wire: with the kernel's default
    a client that reads nothing at all looks like a good one for the first megabytes, and one that reads 1 KiB a second
    opens its window only once a minute."""
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.setblocking(False)
    await asyncio.get_running_loop().sock_connect(peer, ("127.0.0.1", server.port))
    await asyncio.get_running_loop().sock_sendall(peer, UPGRADE + SUBSCRIBE)
    return peer


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))] if values else 0.0


async def publish_all(bus: Bus, seconds: int, burst: int) -> None:
    """20 messages a second, an event among ten of state; half way a burst of 12 KB each, as fast as they go."""
    loop = asyncio.get_running_loop()
    for n in range(seconds * 20):
        bus.publish(EVENT if n % 10 == 9 else STATES[n % 3], 2000)
        if n == seconds * 10:
            await loop.run_in_executor(None, lambda: [bus.publish(STATES[m % 3], 12_000) for m in range(burst)])
        await asyncio.sleep(0.05)


async def read_slowly(peer: socket.socket, into: bytearray, until: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    while not until.is_set():
        into += await loop.sock_recv(peer, 1024)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(until.wait(), 1)


async def watch(server: Server, stalled: socket.socket | None, found: dict[str, float], until: asyncio.Event) -> None:
    """The peak of the server's memory, and how long bytes had waited for the stalled client when it was evicted."""
    name = "{}:{}".format(*stalled.getsockname()) if stalled else ""
    waits_since = 0.0
    while not until.is_set():
        found["peak_kib"] = max(found.get("peak_kib", 0), server.resident_kib())
        clients = {c["address"]: c for c in (await server.get("/api/clients"))["clients"]}
        if name in clients and clients[name]["waiting_bytes"] and not waits_since:
            waits_since = time.monotonic()
        if name and name not in clients and waits_since and "evicted_sec" not in found:
            found["evicted_sec"] = time.monotonic() - waits_since
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(until.wait(), 0.25)


async def run_slow(seconds: int, burst: int, good: int, *, bad: bool) -> dict[str, float]:
    bus = Bus()
    server = Server("--zmq-address", f"tcp://127.0.0.1:{bus.port}")
    await bus.wait_for(CORE)
    listeners = await connect(server, good)
    stalled, slow = (await bad_socket(server), await bad_socket(server)) if bad else (None, None)
    await bus.wait_for(EVENT.encode())
    for _ in range(burst // 4):  # the allocator and the caches grow before the measurement
        bus.publish(STATES[0], 100)
    await wait_until(lambda: all(listener.numbers[-1:] == [bus.count] for listener in listeners))
    for listener in listeners:
        listener.latencies.clear()
    found: dict[str, float] = {}
    before, cpu, read, done = server.resident_kib(), server.cpu_sec(), bytearray(), asyncio.Event()
    helpers = [asyncio.ensure_future(watch(server, stalled, found, done))]
    if slow is not None:
        helpers.append(asyncio.ensure_future(read_slowly(slow, read, done)))
    await publish_all(bus, seconds, burst)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(wait_until(lambda: all(li.numbers[-1] == bus.count for li in listeners)), 60)
    done.set()
    await asyncio.gather(*helpers)
    everything = [ms for listener in listeners for ms in listener.latencies]
    found["p50_ms"], found["p99_ms"] = percentile(everything, 0.5), percentile(everything, 0.99)
    found["missed"] = sum(bus.count - len(set(listener.numbers)) for listener in listeners)
    found["disordered"] = sum(listener.numbers != sorted(listener.numbers) for listener in listeners)
    found["growth_mib"] = (found["peak_kib"] - before) / 1024
    found["cpu_sec"] = server.cpu_sec() - cpu
    if slow is not None:
        await check_slow(slow, bytes(read), bus.count)
        print("  log:", *server.log(), sep="\n    ")
    print("  " + ", ".join(f"{name} {value:.1f}" for name, value in sorted(found.items())))
    must(server.stop() < 2.5, "it stops in time")
    return found


async def wait_until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110 - the conditions are of another process
        await asyncio.sleep(0.05)


async def check_slow(peer: socket.socket, read: bytes, newest: int) -> None:
    """Let it catch up: it must have every event or have been told, and the newest of each state."""
    listener = Listener(asyncio.Queue())
    listener.data_received(read)
    listener.transport = asyncio.WriteTransport()
    with contextlib.suppress(asyncio.TimeoutError):
        while not {newest, newest - 1, newest - 2} <= set(listener.numbers):
            data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(peer, 65536), 20)
            if not data:
                break
            listener.data_received(data)
    missing = newest - len(set(listener.numbers))
    must({newest, newest - 1, newest - 2} <= set(listener.numbers), "the slow one has the newest state in the end")
    must(missing == listener.skipped, f"the slow one misses {missing} and was told of {listener.skipped}")
    must(listener.numbers == sorted(listener.numbers), "the slow one got them in order")
    peer.close()


async def slow(seconds: int, scale: float) -> None:
    good, burst = int(98 * scale), 2000
    print(f"slow: {good} good clients, {seconds} s of 20 messages a second, a burst of {burst} of 12 KB")
    alone = await run_slow(seconds, burst, good, bad=False)
    print("the same beside one stalled client and one that reads 1 KiB a second")
    beside = await run_slow(seconds, burst, good, bad=True)
    for name, figures in (("alone", alone), ("beside", beside)):
        must(figures["missed"] == 0 and figures["disordered"] == 0, f"{name}: the good ones miss nothing")
    ratio = beside["p99_ms"] / max(alone["p99_ms"], 0.001)
    must(ratio < 2, f"p99 {beside['p99_ms']:.1f} ms beside {alone['p99_ms']:.1f} ms alone: {ratio:.2f} times")
    # What they are behind is queued once for both, at most up to the hard mark of 32 MiB.
    must(beside["growth_mib"] < 48, f"memory grows by {beside['growth_mib']:.1f} MiB (alone {alone['growth_mib']:.1f})")
    evicted_sec = beside.get("evicted_sec", 99)
    must(evicted_sec < 35, f"the stalled one is evicted after {evicted_sec:.1f} s")


async def crowd(scale: float) -> None:
    count = int(2000 * scale)
    print(f"crowd: {count} WebSockets at once")
    bus = Bus()
    server = Server("--zmq-address", f"tcp://127.0.0.1:{bus.port}", "--ws-max-connections", str(count + 10))
    await bus.wait_for(CORE)
    (await connect(server, 1))[0].transport.abort()  # type: ignore[attr-defined]
    before = server.resident_kib()
    began = time.monotonic()
    listeners = await connect(server, count)
    took = time.monotonic() - began
    await bus.wait_for(EVENT.encode())
    each = (server.resident_kib() - before) / count
    must(took < 5, f"connected and subscribed in {took:.2f} s")
    must(each < 30, f"{each:.1f} KiB of memory each")
    for n in range(10):
        bus.publish(STATES[n % 3], 1000)
        await asyncio.sleep(1)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(wait_until(lambda: all(len(li.numbers) == 10 for li in listeners)), 20)
    must(all(li.numbers == list(range(1, 11)) for li in listeners), "each got each of 10 messages, one a second")
    everything = [ms for listener in listeners for ms in listener.latencies]
    print(f"  latency p50 {percentile(everything, 0.5):.0f} ms, p99 {percentile(everything, 0.99):.0f} ms")
    took = server.stop()
    must(took < 2.5, f"stopped in {took:.2f} s")
    must(not server.log(), f"log lines: {server.log()[:3]}")


def stages() -> list[bytes]:
    """Everything a client may have said when it is dropped."""
    stream = b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n"
    subscribe = masked('{"type":"subscribe","message_types":["*","home_made"]}')
    fragment = b"\x01" + subscribe[1:]
    whole = UPGRADE + subscribe
    return [
        *(whole[:size] for size in range(0, len(whole), 16)),
        whole + fragment,
        whole + fragment + b"\x80\x85\0\0\0\0he",
        whole + b"\x89\x80\0\0\0\0",
        whole + b"\x88\x82\0\0\0\0\x03\xe8",
        whole + b"\xff\xff",
        stream,
        stream[:30],
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3,
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\nGET /me",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n12345",
        b"\x16\x03\x01\x02\x00",
    ]


async def drop(server: Server, data: bytes, how: int) -> None:
    """Connect, say it, and go: by close, by reset, or by half-close and close."""
    loop = asyncio.get_running_loop()
    with socket.socket() as peer, contextlib.suppress(ConnectionError):
        peer.setblocking(False)
        await loop.sock_connect(peer, ("127.0.0.1", server.port))
        await loop.sock_sendall(peer, data)
        if how == 1:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == 2:
            peer.shutdown(socket.SHUT_WR)


async def churn_round(server: Server, bus: Bus, count: int) -> None:
    forms = stages()
    for start in range(0, count, 50):
        await asyncio.gather(
            *(
                drop(server, forms[n % len(forms)], 0 if n % len(forms) == 0 else n // 7 % 3)
                for n in range(start, start + 50)
            )
        )
        bus.publish(STATES[0], 500)
    for _ in range(100):
        if (await server.get("/api/clients"))["total"] == 0:
            break
        await asyncio.sleep(0.1)


async def churn(scale: float) -> None:
    count = int(10_000 * scale)
    print(f"churn: {count} connections dropped at {len(stages())} stages, in three ways")
    bus = Bus()
    server = Server("--zmq-address", f"tcp://127.0.0.1:{bus.port}")
    await bus.wait_for(CORE)
    await churn_round(server, bus, 8000)  # until the allocator has what it keeps
    await asyncio.sleep(3)
    before, descriptors = server.resident_kib(), server.descriptors()
    began = time.monotonic()
    grown = []
    for _ in range(4):  # a leak grows in every quarter, what the collector has not come to yet does not
        await churn_round(server, bus, count // 4)
        grown.append(server.resident_kib() - before)
    took = time.monotonic() - began
    await asyncio.sleep(3)  # lingering ends
    print(f"  {count / took:.0f} connections a second; memory grown by {grown} KiB after each quarter")
    growth = server.resident_kib() - before
    must(growth < 2048, f"memory grows by {growth} KiB: {growth * 1024 / count:.0f} bytes a connection")
    must(server.descriptors() <= descriptors, f"file descriptors {descriptors} before, {server.descriptors()} after")
    must((await server.get("/api/clients"))["total"] == 0, "no client is left")
    must(not server.log(), f"log lines: {server.log()[:3]}")
    must(server.stop() < 2.5, "it stops in time")


async def stop() -> None:
    print("stop: 500 idle, 50 streaming and 5 stalled clients")
    bus = Bus()
    server = Server("--zmq-address", f"tcp://127.0.0.1:{bus.port}")
    await bus.wait_for(CORE)
    loop = asyncio.get_running_loop()
    idle = await connect(server, 250)
    peers = []
    for data in (
        [b""] * 125
        + [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"] * 125
        + [b"GET /api/stream HTTP/1.0\r\n\r\n"] * 50
    ):
        peer = socket.socket()
        peer.setblocking(False)
        await loop.sock_connect(peer, ("127.0.0.1", server.port))
        await loop.sock_sendall(peer, data)
        peers.append(peer)
    stalled = [await bad_socket(server) for _ in range(5)]
    await bus.wait_for(EVENT.encode())
    for _ in range(100):
        bus.publish(EVENT, 12_000)
        await asyncio.sleep(0.01)
    await wait_until(lambda: all(len(li.numbers) == 100 for li in idle))
    took = await loop.run_in_executor(None, server.stop)
    must(took < 2.3, f"{took:.2f} s from SIGTERM to the end of the process")
    must(not server.log(), f"log lines: {server.log()[:3]}")
    for peer in peers + stalled:
        peer.close()


async def run(what: str, seconds: int, scale: float) -> None:
    for name, work in (
        ("stop", stop),
        ("churn", lambda: churn(scale)),
        ("crowd", lambda: crowd(scale)),
        ("slow", lambda: slow(seconds, scale)),
    ):
        if what in (name, "all"):
            await work()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("slow", "crowd", "churn", "stop", "all"))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    asyncio.run(run(options.what, options.seconds, options.scale))
    print("failed: " + "; ".join(failures) if failures else "all as it must be")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
