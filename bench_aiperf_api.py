#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How much work aiperf_api costs, beside its peers and beside the floor of the machine.

    python3 bench_aiperf_api.py                          everything, about a quarter of an hour
    python3 bench_aiperf_api.py --quick                  the same in about a minute, to see that it works
    python3 bench_aiperf_api.py --only fanout,http       some sections: fanout, http, ingest, start, scale
    python3 bench_aiperf_api.py --markdown --json out.json

How it measures:

  * Every server is a process of its own, the bus is another (a bound ZMQ publisher), and the clients are this
    process: raw sockets under one epoll, which throw the bytes away unread where they can.
  * The contenders take turns (A B C A B C ...); the table has the medians of the rounds, and a ratio is the median of
    the rounds' ratios, so that a slow minute of the machine falls on both sides of it.
  * "cpu" is what the server's process used, all threads, in user and kernel mode, divided by the units of work that
    *arrived* at the clients: a frame, an answer, a message.  It is read from the process's own CPU clock (nanoseconds).
  * Latency is from the sending of a message (or request) to the arrival of its last byte at a client, on one clock.
  * The floor is one blocking `socket.send` of a ready frame per client and message, and nothing else: no bus, no loop.

The peers are functions here, written as their users would write them; each runs alone in a process that has nothing
of this file but that function's source.  Linux only (epoll, /proc).  A peer that is not installed is said to be so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import gzip
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
OURS = "aiperf_api"  # as the table calls us
OURS_BUILTIN = "aiperf_api, built-in ZMQ"
OURS_CACHED = "aiperf_api, as installed"  # imported, as the console script and `python3 -m` do: with cached bytecode
FLOOR = "floor: socket.send"


# == 1 == How much of everything =======================================================================================


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a run takes; the figures of the two efforts differ in noise, not in what they measure."""

    rounds: int  # times that every contender has its turn
    burst_small: dict[int, int]  # clients -> messages of 862 B in a burst
    burst_large: dict[int, int]  # clients -> messages of 11.8 KB in a burst
    paced_clients: tuple[int, ...]  # numbers of clients at 20 messages a second
    paced_sec: float  # seconds of it
    http_connections: tuple[int, ...]
    http_sec: float  # seconds of each closed loop of requests
    ingest: int  # realtime_metrics messages
    recordings: int  # times that the whole recording is played for "the mix"
    starts: int  # starts of every server
    idle_clients: int  # idle WebSocket clients whose memory is counted


FULL = Effort(
    rounds=3,
    burst_small={1: 4000, 100: 1000, 1000: 300},
    burst_large={1: 2000, 100: 300, 1000: 60},
    paced_clients=(1, 100, 1000),
    paced_sec=4.0,
    http_connections=(1, 16, 256),
    http_sec=2.5,
    ingest=50_000,
    recordings=40,
    starts=7,
    idle_clients=1000,
)

QUICK = Effort(
    rounds=1,
    burst_small={1: 500, 100: 200, 1000: 20},
    burst_large={100: 60},
    paced_clients=(100,),
    paced_sec=1.0,
    http_connections=(1, 16),
    http_sec=1.2,
    ingest=10_000,
    recordings=3,
    starts=1,
    idle_clients=200,
)

PACE_SEC = 0.05  # the paced fan-out: 20 messages a second
AT_REST_SEC = 1.5  # after its first answer a server is at rest
QUIET_SEC = 2.0  # a burst is over when the bus is done and nothing came for so long: what is missing was skipped
GIVE_UP_SEC = 60.0  # a run that makes no end by then is reported with what arrived
RECV_BYTES = 1 << 20  # one read of a client
SMALL_BYTES = 862  # a credit_phase_progress
LARGE_BYTES = 11_800  # a realtime_metrics
FRAME_OF_DATA_MIN = 256  # frames below it are answers and notices (subscribed, skipped), not bus messages
MIB = 1 << 20
TO_END = -1  # the length of an answer that ends with its connection
NO_HTTP = 1  # the port that a contender names when it has no HTTP server


# == 2 == Real messages ================================================================================================


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recorded run: (topic, payload) in bus order."""

    messages: list[tuple[str, str]]

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Read a `.jsonl.gz` (or `.jsonl`) recording: one object a line with `topic` and `payload` (text or JSON)."""
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()
        rows = [json.loads(line) for line in lines]
        return cls([(row["topic"], text_of(row["payload"])) for row in rows if "topic" in row])

    def of_type(self, message_type: str) -> list[str]:
        return [payload for topic, payload in self.messages if topic.partition("$")[0] == message_type]

    def before_the_end(self) -> list[tuple[str, str]]:
        """All up to the last realtime_metrics: a run in full swing.  Without what GPUs and the inference server say of
        themselves, which most runs have not: /metrics is then some 80 KB, with them 190."""
        last = max(index for index, (topic, _) in enumerate(self.messages) if topic == "realtime_metrics$")
        extra = ("realtime_telemetry_metrics$", "realtime_server_metrics$")
        return [message for message in self.messages[: last + 1] if message[0] not in extra]


def text_of(payload: Any) -> str:
    return payload if isinstance(payload, str) else compact(payload)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def small_message(recording: Recording) -> dict[str, str]:
    """A real credit_phase_progress of 862 B (the nearest in the recording, its service_id stretched or cut)."""
    nearest = min(recording.of_type("credit_phase_progress"), key=lambda text: abs(len(text) - SMALL_BYTES))
    head, counter, tail = numbered(nearest, "total_session_turns")
    spare = SMALL_BYTES - len(head) - 7 - len(tail)
    name = re.search('"service_id":"([^"]*)"', head)
    assert name, "every AIPerf message has a service_id"
    stretched = (name[1] + "_" * max(spare, 0))[: max(len(name[1]) + spare, 1)]
    return template("credit_phase_progress$", head.replace(name[0], f'"service_id":"{stretched}"'), counter, tail)


def large_message(recording: Recording, size: int = LARGE_BYTES) -> dict[str, str]:
    """A real realtime_metrics of about `size` bytes: rows are left out of (or repeated in) a recorded one."""
    longest = json.loads(max(recording.of_type("realtime_metrics"), key=len))
    rows = fitted(longest["metrics"], size - len(compact({**longest, "metrics": []})))
    head, counter, tail = numbered(compact({**longest, "metrics": rows}), "count")
    return template("realtime_metrics$", head, counter, tail)


def fitted(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Rows whose JSON comes near `size` bytes; rows above the recorded number are copies under new tags."""
    chosen: list[dict[str, Any]] = []
    for copy in range(1000):
        for row in sorted(rows, key=lambda row: "count" not in row):
            extra = row if not copy else {**row, "tag": f"{row['tag']}_{copy}"}
            length = len(compact(extra)) + 1
            if length <= size:
                chosen.append(extra)
                size -= length
            elif size < 60:
                return chosen
        if size < min(len(compact(row)) for row in rows) + 8:
            return chosen
    return chosen


def many_metrics(recording: Recording, count: int) -> dict[str, str]:
    """A realtime_metrics with `count` rows, all of different tags."""
    longest = json.loads(max(recording.of_type("realtime_metrics"), key=len))
    rows = sorted(longest["metrics"], key=lambda row: "count" not in row)
    copies = [{**rows[i % len(rows)], "tag": f"{rows[i % len(rows)]['tag']}_{i}"} for i in range(count)]
    head, counter, tail = numbered(compact({**longest, "metrics": copies}), "count")
    return template("realtime_metrics$", head, counter, tail)


def numbered(payload: str, key: str) -> tuple[str, str, str]:
    """Cut a payload around the first integer under `key`, where each message gets a number of its own."""
    match = re.search(f'"{key}":([0-9]+)', payload)
    assert match, f"no {key} in the recorded message"
    return payload[: match.start(1)], match[1], payload[match.end(1) :]


def template(topic: str, head: str, _counter: str, tail: str) -> dict[str, str]:
    return {"topic": topic, "head": head, "tail": tail}


# == 3 == Processes ====================================================================================================

URL = re.compile(rb"http://[^\s/\"']+")


class Server:
    """A process under measurement: says `http://…` on stderr when it listens."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.log = b""  # the last of what it wrote on stderr
        self._said_url = threading.Event()
        self.started = time.monotonic()
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            argv, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE, bufsize=0, env=environment()
        )
        self.pid = self.process.pid
        threading.Thread(target=self._read_stderr, daemon=True).start()
        self._said_url.wait(20)
        match = URL.search(self.log)
        if not match:
            self.stop()
            raise BenchError(self.log.decode(errors="replace").strip()[-400:] or "did not start")
        parts = urlsplit(match[0].decode())
        self.address = (parts.hostname or "127.0.0.1", parts.port or 80)

    def _read_stderr(self) -> None:
        """Runs in a thread: a server that complains must not block on a full pipe."""
        assert self.process.stderr
        with contextlib.suppress(ValueError):  # closed under us: the server is being stopped
            while chunk := self.process.stderr.read(65536):
                self.log = (self.log + chunk)[-65536:]
                if URL.search(self.log):
                    self._said_url.set()
        self._said_url.set()

    def cpu(self) -> float:
        """Seconds of CPU used so far by all threads of the process: its CLOCK_PROCESS_CPUTIME_ID, from outside."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def memory(self) -> dict[str, float]:
        """Rss and Pss in bytes, from /proc/PID/smaps_rollup."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        found = re.findall(r"^(Rss|Pss):\s+(\d+) kB", text, re.MULTILINE)
        return {name.lower(): int(kib) * 1024 for name, kib in found}

    def peak_from_here(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak(self) -> float:
        """Highest RSS in bytes since `peak_from_here`."""
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(match[1]) * 1024 if match else math.nan

    def stop(self) -> None:
        stop_process(self.process)


class Feeder:
    """The bus: a process with a bound ZMQ publisher that sends what it is ordered to, one JSON line an order."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin and self.process.stdout
        self.bus: str = self.reply()

    def order(self, **order: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def reply(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline() or b"null")

    def fileno(self) -> int:
        assert self.process.stdout
        return self.process.stdout.fileno()

    def prepare(self, clients: int) -> None:
        """Nothing to do: the clients are the server's."""

    def stop(self) -> None:
        stop_process(self.process)


class Floor(Feeder):
    """The floor is feeder and server in one: it is ordered to accept, and then to send."""

    def __init__(self) -> None:
        super().__init__(command_of(floor))
        self.pid = self.process.pid
        parts = urlsplit(self.bus)
        self.address = (parts.hostname or "", parts.port or 0)

    def prepare(self, clients: int) -> None:
        self.order(accept=clients)

    cpu, memory, peak_from_here, peak = Server.cpu, Server.memory, Server.peak_from_here, Server.peak


class BenchError(Exception):
    """A contender that cannot be measured; its row says why."""


def stop_process(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(4)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def environment() -> dict[str, str]:
    """Ours, but with bytecode cached as it is by default."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def command_of(function: Callable[..., None], *args: str) -> list[str]:
    """A command line that runs one function of this file, alone: its source and nothing else is in the process."""
    source = f"from __future__ import annotations\nimport sys\n{inspect.getsource(function)}\n"
    return [sys.executable, "-c", f"{source}{function.__name__}(*sys.argv[1:])", *args]


def command_of_ours(bus: str, *, builtin: bool = False, cached: bool = False) -> list[str]:
    """Our shipped command line.

    Args:
        builtin: hide pyzmq from it, as on a machine that has none.
        cached: as the console script of an installed package runs it: `import` finds compiled bytecode.  A file that is
            named on the command line is compiled anew at each start.
    """
    options = ["--api-port", "0", "--zmq-address", bus]
    if not builtin and not cached:
        return [sys.executable, str(HERE / "aiperf_api.py"), *options]
    hide = "sys.modules['zmq'] = None; " if builtin else ""
    code = f"import sys; {hide}sys.path.insert(0, sys.argv.pop(1)); import aiperf_api; sys.exit(aiperf_api.main())"
    return [sys.executable, "-c", code, str(HERE), *options]


# == 4 == The bus, the floor ===========================================================================================
#
# The functions of this room and the next run in processes of their own: they import what they need inside.


def publisher() -> None:
    """The bus: orders come as JSON lines; the reply has the time of each paced send, in ns of the monotonic clock."""
    import json
    import time

    import zmq

    bus = zmq.Context().socket(zmq.XPUB)  # what AIPerf's proxy shows to subscribers
    bus.setsockopt(zmq.SNDHWM, 10_000)
    bus.setsockopt(zmq.XPUB_NODROP, 1)  # nothing is lost here: every contender gets every message
    port = bus.bind_to_random_port("tcp://127.0.0.1")
    print(json.dumps(f"tcp://127.0.0.1:{port}"), flush=True)
    number = 1_000_000  # seven digits, so that all messages are of one length
    for line in sys.stdin:
        order = json.loads(line)
        with open(order["file"], encoding="utf-8") as file:
            messages = [(m["topic"].encode(), m["head"].encode(), m.get("tail", "").encode()) for m in json.load(file)]
        times = []
        due = time.monotonic()
        for _ in range(order["count"]):
            if order["interval"]:
                due += order["interval"]
                time.sleep(max(0.0, due - time.monotonic()))
                times.append(time.monotonic_ns())
            for topic, head, tail in messages:
                number = number + 1 if number < 9_999_999 else 1_000_000
                bus.send_multipart([topic, b"%s%d%s" % (head, number, tail) if tail else head])
        print(json.dumps(times), flush=True)


def floor() -> None:
    """One blocking `socket.send` of a ready frame per client and message, and nothing else."""
    import base64
    import hashlib
    import json
    import re
    import socket
    import time

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(json.dumps(f"http://127.0.0.1:{listener.getsockname()[1]}"), flush=True)
    clients: list[socket.socket] = []
    for line in sys.stdin:
        order = json.loads(line)
        if "accept" in order:
            for client in clients:
                client.close()
            clients = []
            for _ in range(order["accept"]):
                client = listener.accept()[0]
                clients.append(client)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(4096)
                key = re.search(rb"(?i)sec-websocket-key: *(\S+)", head)
                assert key
                digest = hashlib.sha1(key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
                client.sendall(
                    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
                )
            continue
        with open(order["file"], encoding="utf-8") as file:
            message = json.load(file)[0]
        payload = f"{message['head']}1000000{message['tail']}".encode()
        frame = b"\x81\x7e" + len(payload).to_bytes(2, "big") + payload
        times = []
        due = time.monotonic()
        for _ in range(order["count"]):
            if order["interval"]:
                due += order["interval"]
                time.sleep(max(0.0, due - time.monotonic()))
                times.append(time.monotonic_ns())
            for client in clients:
                client.send(frame)
        print(json.dumps(times), flush=True)


# == 5 == The peers ====================================================================================================


def peer_websockets(bus: str, _bodies: str) -> None:
    """websockets: its own `broadcast`, and zmq.asyncio."""
    import asyncio

    import zmq
    import zmq.asyncio
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    clients: set[ServerConnection] = set()

    async def handler(client: ServerConnection) -> None:
        clients.add(client)
        try:
            async for _ in client:
                pass
        finally:
            clients.discard(client)

    async def main() -> None:
        subscriber = zmq.asyncio.Context.instance().socket(zmq.SUB)
        subscriber.connect(bus)
        subscriber.subscribe(b"")
        async with serve(handler, "127.0.0.1", 0) as server:
            print(f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}", file=sys.stderr, flush=True)
            while True:
                _topic, payload = await subscriber.recv_multipart()
                broadcast(clients, payload.decode())

    asyncio.run(main())


def peer_aiohttp(bus: str, bodies: str) -> None:
    """aiohttp: WebSocketResponse.send_str to each client in turn, and ready bodies."""
    import asyncio
    import socket
    from collections.abc import AsyncIterator
    from pathlib import Path

    import zmq
    import zmq.asyncio
    from aiohttp import web

    metrics = Path(bodies, "metrics").read_bytes()
    status = Path(bodies, "status").read_bytes()
    clients: set[web.WebSocketResponse] = set()

    async def get_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=metrics, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def get_status(_request: web.Request) -> web.Response:
        return web.Response(body=status, content_type="application/json")

    async def get_ws(request: web.Request) -> web.WebSocketResponse:
        client = web.WebSocketResponse()
        await client.prepare(request)
        clients.add(client)
        try:
            async for _ in client:
                pass
        finally:
            clients.discard(client)
        return client

    async def forward() -> None:
        subscriber = zmq.asyncio.Context.instance().socket(zmq.SUB)
        subscriber.connect(bus)
        subscriber.subscribe(b"")
        while True:
            _topic, payload = await subscriber.recv_multipart()
            text = payload.decode()
            for client in list(clients):
                try:
                    await client.send_str(text)
                except ConnectionError:
                    clients.discard(client)

    async def background(_app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(forward())
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        yield
        task.cancel()

    listener = socket.socket(
        socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # asyncio: TCP_NODELAY for these only
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    app = web.Application()
    app.cleanup_ctx.append(background)
    app.add_routes([web.get("/metrics", get_metrics), web.get("/api/status", get_status), web.get("/ws", get_ws)])
    web.run_app(app, sock=listener, print=None, access_log=None)


def peer_fastapi(bus: str, bodies: str) -> None:
    """FastAPI under uvicorn: WebSocket.send_text to each client in turn, and ready bodies."""
    import asyncio
    import socket
    from collections.abc import AsyncIterator
    from contextlib import asynccontextmanager
    from pathlib import Path

    import uvicorn
    import zmq
    import zmq.asyncio
    from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect

    metrics = Path(bodies, "metrics").read_bytes()
    status = Path(bodies, "status").read_bytes()
    clients: set[WebSocket] = set()

    async def forward() -> None:
        subscriber = zmq.asyncio.Context.instance().socket(zmq.SUB)
        subscriber.connect(bus)
        subscriber.subscribe(b"")
        while True:
            _topic, payload = await subscriber.recv_multipart()
            text = payload.decode()
            for client in list(clients):
                try:
                    await client.send_text(text)
                except (WebSocketDisconnect, RuntimeError):
                    clients.discard(client)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(forward())
        yield
        task.cancel()

    async def get_metrics() -> Response:
        return Response(metrics, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def get_status() -> Response:
        return Response(status, media_type="application/json")

    async def get_ws(client: WebSocket) -> None:
        await client.accept()
        clients.add(client)
        try:
            while True:
                await client.receive_text()
        except WebSocketDisconnect:
            clients.discard(client)

    get_ws.__annotations__["client"] = WebSocket  # postponed annotations do not see this function's imports
    app = FastAPI(lifespan=lifespan)
    app.add_api_route("/metrics", get_metrics, response_model=None, response_class=Response)
    app.add_api_route("/api/status", get_status, response_model=None, response_class=Response)
    app.add_api_websocket_route("/ws", get_ws)
    listener = socket.socket(
        socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # asyncio: TCP_NODELAY for these only
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


def peer_prometheus(_bus: str, bodies: str) -> None:
    """prometheus_client: the same samples as gauges in its registry, and its own start_http_server."""
    import threading
    from pathlib import Path

    from prometheus_client import CollectorRegistry, Gauge, start_http_server
    from prometheus_client.parser import text_string_to_metric_families

    registry = CollectorRegistry()
    gauges: dict[str, Gauge] = {}
    for family in text_string_to_metric_families(Path(bodies, "metrics").read_text()):
        for sample in family.samples:
            labels = sorted(sample.labels)
            if sample.name not in gauges:
                gauges[sample.name] = Gauge(sample.name, family.documentation, labels, registry=registry)
            gauge = gauges[sample.name]
            (gauge.labels(**sample.labels) if labels else gauge).set(sample.value)
    server, _thread = start_http_server(0, "127.0.0.1", registry)
    print(f"http://127.0.0.1:{server.server_port}", file=sys.stderr, flush=True)
    threading.Event().wait()


def peer_recv(bus: str, _bodies: str) -> None:
    """Ingest's lower bound with pyzmq: a blocking receive, and nothing else; says `done` after the last."""
    import zmq

    subscriber = zmq.Context().socket(zmq.SUB)
    subscriber.connect(bus)
    subscriber.subscribe(b"")
    print("http://127.0.0.1:1", file=sys.stderr, flush=True)
    count = 0
    while True:
        subscriber.recv_multipart()
        count += 1
        if count % 1000 == 0 or not subscriber.poll(0):
            print("messages", count, file=sys.stderr, flush=True)


def peer_parse(bus: str, _bodies: str) -> None:
    """Ingest as a user would write it: zmq.asyncio, orjson, the latest message of each type kept."""
    import asyncio

    import orjson
    import zmq
    import zmq.asyncio

    async def main() -> None:
        subscriber = zmq.asyncio.Context.instance().socket(zmq.SUB)
        subscriber.connect(bus)
        subscriber.subscribe(b"")
        print("http://127.0.0.1:1", file=sys.stderr, flush=True)
        latest: dict[bytes, object] = {}
        count = 0
        while True:
            topic, payload = await subscriber.recv_multipart()
            latest[topic] = orjson.loads(payload)
            count += 1
            if count % 1000 == 0 or not await subscriber.poll(0):
                print("messages", count, file=sys.stderr, flush=True)

    asyncio.run(main())


@dataclasses.dataclass(frozen=True)
class Contender:
    """One that takes part in a section."""

    name: str
    command: Callable[[str, str], list[str]]  # (bus address, directory of ready bodies) -> argv
    needs: tuple[str, ...] = ()  # packages that must be there

    def missing(self) -> str | None:
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if not absent and self.name.startswith(OURS) and not (HERE / "aiperf_api.py").exists():
            absent = ["aiperf_api.py"]
        return f"not installed: {', '.join(absent)}" if absent else None


def peer(name: str, function: Callable[..., None], *needs: str) -> Contender:
    return Contender(name, lambda bus, bodies: command_of(function, bus, bodies), needs)


WE = Contender(OURS, lambda bus, _bodies: command_of_ours(bus), ("zmq",))
WE_CACHED = Contender(OURS_CACHED, lambda bus, _bodies: command_of_ours(bus, cached=True), ("zmq",))
WE_BUILTIN = Contender(OURS_BUILTIN, lambda bus, _bodies: command_of_ours(bus, builtin=True), ("zmq",))
THE_FLOOR = Contender(FLOOR, lambda _bus, _bodies: command_of(floor))
WEBSOCKETS = peer("websockets.broadcast", peer_websockets, "websockets", "zmq")
AIOHTTP = peer("aiohttp", peer_aiohttp, "aiohttp", "zmq")
FASTAPI = peer("FastAPI/uvicorn", peer_fastapi, "fastapi", "uvicorn", "websockets", "zmq")
PROMETHEUS = peer("prometheus_client", peer_prometheus, "prometheus_client")
RECV = peer("pyzmq recv, nothing else", peer_recv, "zmq")
PARSE = peer("zmq.asyncio + orjson", peer_parse, "zmq", "orjson")


# == 6 == Clients ======================================================================================================


class WebSocketClients:
    """N WebSocket clients on raw sockets: they ask for everything, count frames, and throw the bytes away."""

    def __init__(self, address: tuple[str, int], count: int, prepare: Callable[[int], None]) -> None:
        self.sockets: dict[int, socket.socket] = {}  # by file descriptor
        self.frames: dict[int, int] = {}  # data frames that have arrived, by file descriptor
        self.frame_bytes = 0  # length of one data frame on the wire, learned from the first
        self._rest: dict[int, bytes] = {}  # the unfinished frame of each
        self._poll = select.epoll()
        self._buffer = bytearray(RECV_BYTES)
        prepare(count)
        try:
            for first in range(0, count, 64):  # no more at once than any listen backlog holds
                self._open(address, min(64, count - first))
        except BaseException:
            self.close()
            raise

    def _open(self, address: tuple[str, int], count: int) -> None:
        head = (
            f"GET /ws HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        opened = [socket.create_connection(address, 10) for _ in range(count)]
        for sock in opened:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(head.encode())
        for sock in opened:
            self._shake_hands(sock)

    def _shake_hands(self, sock: socket.socket) -> None:
        answer = b""
        while b"\r\n\r\n" not in answer:
            chunk = sock.recv(65536)
            if not chunk:
                raise BenchError(f"refused: {answer[:200]!r}")
            answer += chunk
        if b" 101 " not in answer[:40]:
            raise BenchError(f"no upgrade: {answer[:200]!r}")
        sock.sendall(masked(1, b'{"type":"subscribe","message_types":["*"],"snapshot":false}'))
        sock.setblocking(False)
        self.sockets[sock.fileno()] = sock
        self.frames[sock.fileno()] = 0
        self._rest[sock.fileno()] = answer.partition(b"\r\n\r\n")[2]
        self._poll.register(sock, select.EPOLLIN)

    def warm_up(self, feeder: Feeder, file: str) -> None:
        """Send single messages until every client has had one: subscriptions are made, and buffers have grown."""
        deadline = time.monotonic() + 15
        while min(self.frames.values()) == 0:
            if time.monotonic() > deadline:
                raise BenchError("the warm-up messages did not arrive at all clients")
            feeder.order(file=file, count=1, interval=0)
            feeder.reply()
            while self.read_frames(0.05):
                pass
        while self.read_frames(0.2):
            pass
        self.frames = dict.fromkeys(self.frames, 0)

    def read_frames(self, timeout: float) -> list[tuple[int, int]]:
        """Wait for bytes, count the frames in them; (file descriptor, data frames) of each that was ready."""
        arrived = []
        for descriptor, _ in self._poll.poll(timeout):
            count = self._read_one(descriptor)
            self.frames[descriptor] += count
            arrived.append((descriptor, count))
        return arrived

    def _read_one(self, descriptor: int) -> int:
        chunk = self.sockets[descriptor].recv(RECV_BYTES)
        if not chunk:
            raise BenchError("a client was cut off")
        data = self._rest[descriptor] + chunk
        position, count = 0, 0
        while True:
            end = frame_end(data, position)
            if end > len(data) or end < 0:
                break
            if end - position >= FRAME_OF_DATA_MIN:
                count += 1
                self.frame_bytes = end - position
            elif data[position] == 0x89:
                self.sockets[descriptor].send(masked(10, data[position + 2 : end]))
            position = end
        self._rest[descriptor] = data[position:]
        return count

    def burst(self, feeder: Feeder, file: str, count: int) -> tuple[int, float]:
        """Have `count` messages sent at once; (frames that arrived in all, seconds until the last byte).

        Frames are counted by their bytes, which MSG_TRUNC lets the kernel drop without a copy: all are of one length.
        """
        expected = count * self.frame_bytes * len(self.sockets)
        self._poll.register(feeder, select.EPOLLIN)
        received, sent = 0, False
        begin = last = time.monotonic()
        feeder.order(file=file, count=count, interval=0)
        while received < expected and time.monotonic() - begin < GIVE_UP_SEC:
            ready = self._poll.poll(QUIET_SEC)
            if not ready and sent:
                break
            for descriptor, _ in ready:
                if descriptor == feeder.fileno():
                    sent = bool(feeder.reply() is not None)
                    self._poll.unregister(feeder)
                    continue
                received += self._discard(descriptor)
            if any(descriptor != feeder.fileno() for descriptor, _ in ready):
                last = time.monotonic()
        if not sent:
            feeder.reply()
        return received // self.frame_bytes, last - begin

    def _discard(self, descriptor: int) -> int:
        try:
            size = self.sockets[descriptor].recv_into(self._buffer, RECV_BYTES, socket.MSG_TRUNC)
        except BlockingIOError:
            return 0
        except ConnectionError:
            size = 0
        if not size:  # cut off as too slow: the others go on
            self._poll.unregister(descriptor)
        return size

    def paced(self, feeder: Feeder, file: str, count: int, interval: float) -> list[float]:
        """Have `count` messages sent, one each `interval` seconds; the latency in seconds of every delivery."""
        arrivals: list[tuple[int, int]] = []  # (index of the message, ns)
        feeder.order(file=file, count=count, interval=interval)
        deadline = time.monotonic() + count * interval + 3
        expected = count * len(self.sockets)
        while len(arrivals) < expected and time.monotonic() < deadline:
            for descriptor, _ in self._poll.poll(0.5):
                before = self.frames[descriptor]
                new = self._read_one(descriptor)
                now = time.monotonic_ns()
                self.frames[descriptor] = before + new
                arrivals.extend((before + i, now) for i in range(new))
        times = feeder.reply()
        return [(at - times[index]) / 1e9 for index, at in arrivals]

    def close(self) -> None:
        """Say goodbye as RFC 6455 wants it, and go."""
        for sock in self.sockets.values():
            with contextlib.suppress(OSError):
                sock.send(masked(8, b"\x03\xe8"))
            sock.close()
        self._poll.close()


def frame_end(data: bytes, position: int) -> int:
    """Where the unmasked frame that begins at `position` ends, or -1 when its length has not come yet."""
    if len(data) < position + 2:
        return -1
    length = data[position + 1] & 127
    if length < 126:
        return position + 2 + length
    size = 2 if length == 126 else 8
    if len(data) < position + 2 + size:
        return -1
    return position + 2 + size + int.from_bytes(data[position + 2 : position + 2 + size], "big")


def masked(opcode: int, payload: bytes) -> bytes:
    """A short client frame; the mask is zero, which leaves the payload as it is."""
    return bytes((0x80 | opcode, 0x80 | len(payload))) + bytes(4) + payload


class HTTPClients:
    """N connections that ask for one path in a closed loop: the next request goes out when the answer is complete."""

    HEAD = "GET {} HTTP/1.1\r\nHost: {}:{}\r\nUser-Agent: bench\r\nAccept: text/plain;version=0.0.4,*/*;q=0.1\r\n\r\n"

    def __init__(self, address: tuple[str, int], path: str, count: int) -> None:
        self.address = address
        self.request = self.HEAD.format(path, *address).encode()
        self.latencies: list[float] = []  # seconds
        self._buffer = bytearray(RECV_BYTES)
        self._view = memoryview(self._buffer)
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._head: dict[int, bytes] = {}  # of the answer that is coming, while it is not complete
        self._missing: dict[int, int] = {}  # bytes of the answer still to come; TO_END: until the server closes
        self._asked: dict[int, float] = {}  # when the request (or the connecting before it) began
        self._last: dict[int, bool] = {}  # whether the server closes after this answer
        for _ in range(count):
            self._open()

    def _open(self) -> None:
        """Begin to connect; the request goes out when that is done."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        sock.connect_ex(self.address)
        self._sockets[sock.fileno()] = sock
        self._asked[sock.fileno()] = time.monotonic()
        self._poll.register(sock, select.EPOLLOUT)

    def run(self, seconds: float) -> int:
        """Go on asking for `seconds`; the number of answers that were completed."""
        self.latencies.clear()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for descriptor, events in self._poll.poll(0.2):
                if events & select.EPOLLOUT:
                    self._poll.modify(descriptor, select.EPOLLIN)
                    self._ask(descriptor, self._asked[descriptor])
                else:
                    self._read(descriptor)
        return len(self.latencies)

    def _ask(self, descriptor: int, begun: float) -> None:
        self._head[descriptor] = b""
        self._missing[descriptor] = TO_END
        self._last[descriptor] = True
        self._asked[descriptor] = begun
        self._sockets[descriptor].send(self.request)

    def _read(self, descriptor: int) -> None:
        size = self._sockets[descriptor].recv_into(self._buffer)
        head = self._head[descriptor]
        if not head.endswith(b"\r\n\r\n"):
            self._read_head(descriptor, head + bytes(self._view[: min(size, 4096)]), size + len(head))
        elif self._missing[descriptor] != TO_END:
            self._missing[descriptor] -= size
        if not size or self._missing[descriptor] == 0:
            self._answered(descriptor)

    def _read_head(self, descriptor: int, data: bytes, size: int) -> None:
        """Find the end of the head in the first bytes of an answer of which `size` bytes are here."""
        head, found, _ = data.partition(b"\r\n\r\n")
        self._head[descriptor] = head + found
        if not found:
            return
        lower = head.lower()
        if b" 200 " not in lower[:20]:
            raise BenchError(f"unexpected answer: {head[:200]!r}")
        self._last[descriptor] = lower.startswith(b"http/1.0") or b"connection: close" in lower
        length = re.search(rb"content-length: *(\d+)", lower)
        self._missing[descriptor] = int(length[1]) - (size - len(head) - 4) if length else TO_END

    def _answered(self, descriptor: int) -> None:
        if not self._head[descriptor].endswith(b"\r\n\r\n"):
            raise BenchError("closed without an answer")
        self.latencies.append(time.monotonic() - self._asked[descriptor])
        if self._last[descriptor]:  # HTTP/1.0: a connection for every request
            self._sockets.pop(descriptor).close()
            self._open()
        else:
            self._ask(descriptor, time.monotonic())

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()
        self._poll.close()


def get(address: tuple[str, int], path: str) -> bytes:
    """One request on a connection of its own; the body."""
    with socket.create_connection(address, 10) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while chunk := sock.recv(RECV_BYTES):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head[:20]:
        raise BenchError(f"{path}: {head[:200]!r}")
    return body


# == 7 == Results ======================================================================================================

# What one turn of one contender gave: cpu (s a unit), rate (units/s), p50, p99 (s), memory (B), arrived (0 to 1).
Sample = dict[str, float]
Turn = Callable[[Any, Feeder], Sample]
Up = dict[str, tuple[Any, Feeder]]  # contenders that are running: server and bus of each, by name
Points = list[tuple[float, float]]  # (size, cost)


@dataclasses.dataclass
class Row:
    """One line of the table: a contender at a piece of work."""

    section: str
    work: str
    contender: str
    samples: list[Sample] = dataclasses.field(default_factory=list)  # one a round
    note: str = ""
    targets: list[tuple[str, str, bool | None]] = dataclasses.field(default_factory=list)  # asked, measured, reached

    def median(self, key: str) -> float:
        values = [sample[key] for sample in self.samples if key in sample]
        return statistics.median(values) if values else math.nan

    def ratio(self, other: Row, key: str = "cpu") -> float:
        """Median of the rounds' ratios, this one over the other."""
        pairs = zip(self.samples, other.samples)
        ratios = [a[key] / b[key] for a, b in pairs if b.get(key) and key in a]
        return statistics.median(ratios) if ratios else math.nan


class Results:
    """All rows, in the order in which they were measured."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def row(self, section: str, work: str, contender: str) -> Row:
        for row in self.rows:
            if (row.section, row.work, row.contender) == (section, work, contender):
                return row
        self.rows.append(Row(section, work, contender))
        return self.rows[-1]

    def find(self, section: str, work: str, contender: str) -> Row | None:
        found = [r for r in self.rows if (r.section, r.work, r.contender) == (section, work, contender) and r.samples]
        return found[0] if found else None

    def ask_ratio(self, section: str, work: str, other: str, limit: float, text: str, key: str = "cpu") -> None:
        """Our figure over another's, in the same work, must be at most `limit`."""
        ours, theirs = self.find(section, work, OURS), self.find(section, work, other)
        if ours and theirs:
            ratio = ours.ratio(theirs, key)
            ours.targets.append((text, f"{ratio:.2f}", ratio <= limit))

    def ask_value(self, row: Row | None, key: str, limit: float, text: str, shown: Callable[[float], str]) -> None:
        """A figure of a row must be at most `limit`."""
        if row and not math.isnan(row.median(key)):
            row.targets.append((text, shown(row.median(key)), row.median(key) <= limit))


def quantiles(latencies: list[float]) -> Sample:
    if not latencies:
        return {}
    ordered = sorted(latencies)
    return {"p50": ordered[len(ordered) // 2], "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]}


def reason(error: Exception) -> str:
    """The last line of what went wrong: of a traceback, it is the one that says it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:100]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# == 8 == Sections =====================================================================================================


class Bench:
    """What the sections share: the effort, the messages on disk, the results."""

    def __init__(self, effort: Effort, recording: Recording, directory: Path) -> None:
        self.effort = effort
        self.recording = recording
        self.directory = directory
        self.results = Results()
        self.small = self.write("small", [small_message(recording)])
        self.large = self.write("large", [large_message(recording)])
        self.swing = self.write("swing", [{"topic": t, "head": p} for t, p in recording.before_the_end()])
        self.mix = self.write("mix", [{"topic": t, "head": p} for t, p in recording.messages])
        (directory / "metrics").write_bytes(b"")
        (directory / "status").write_bytes(b"{}")

    def write(self, name: str, messages: list[dict[str, str]]) -> str:
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(messages), encoding="utf-8")
        return str(path)

    @contextlib.contextmanager
    def running(self, contenders: Sequence[Contender], section: str, work: str) -> Iterator[Up]:
        """Start each contender with a bus of its own; those that cannot start get a row that says so."""
        up: Up = {}
        with contextlib.ExitStack() as stack:
            for contender in contenders:
                absent = contender.missing()
                try:
                    if absent:
                        raise BenchError(absent)
                    up[contender.name] = self._start(contender, stack)
                except (BenchError, OSError) as error:
                    self.results.row(section, work, contender.name).note = reason(error)
            yield up

    def _start(self, contender: Contender, stack: contextlib.ExitStack) -> tuple[Any, Feeder]:
        if contender is THE_FLOOR:
            both = Floor()
            stack.callback(both.stop)
            return both, both
        feeder = Feeder(command_of(publisher))
        stack.callback(feeder.stop)
        server = Server(contender.command(feeder.bus, str(self.directory)))
        stack.callback(server.stop)
        return server, feeder

    def in_turn(self, up: Up, section: str, work: str, turn: Turn) -> None:
        """Every contender has its turn, in every round."""
        for index in range(self.effort.rounds):
            for name, (server, feeder) in up.items():
                say(f"  {section} | {work} | {name} | round {index + 1}")
                row = self.results.row(section, work, name)
                try:
                    row.samples.append(turn(server, feeder))
                except (BenchError, OSError) as error:
                    row.note = reason(error)


def fan_out(bench: Bench) -> None:
    """Bus messages to N WebSocket clients, in a burst and paced: CPU per delivery, latency."""
    effort = bench.effort
    contenders = (WE, THE_FLOOR, WEBSOCKETS, AIOHTTP, FASTAPI, WE_BUILTIN)
    with bench.running(contenders, "fan-out", "all") as up:
        for label, file, counts in (
            ("862 B", bench.small, effort.burst_small),
            ("11.8 KB", bench.large, effort.burst_large),
        ):
            for clients, messages in counts.items():
                work = f"burst, {label}, {of(clients, 'client')}"
                bench.in_turn(up, "fan-out", work, burst_turn(clients, file, messages))
        for clients in effort.paced_clients:
            for label, file in (("862 B", bench.small), ("11.8 KB", bench.large)):
                if label == "862 B" or clients == 100:
                    work = f"paced 20/s, {label}, {of(clients, 'client')}"
                    count = round(effort.paced_sec / PACE_SEC)
                    bench.in_turn(up, "fan-out", work, paced_turn(clients, file, count))
    fan_out_targets(bench.results)


@contextlib.contextmanager
def connected(server: Any, feeder: Feeder, clients: int, file: str) -> Iterator[WebSocketClients]:
    group = WebSocketClients(server.address, clients, feeder.prepare)
    try:
        group.warm_up(feeder, file)
        gc.collect()
        gc.disable()  # our own pauses are not the server's latency
        yield group
    finally:
        gc.enable()
        group.close()
        time.sleep(0.1)  # let the server see the goodbyes before the next one's turn


def burst_turn(clients: int, file: str, messages: int) -> Turn:
    """All messages at once; CPU and rate of the deliveries that arrived, and the peak of memory."""

    def turn(server: Any, feeder: Feeder) -> Sample:
        with connected(server, feeder, clients, file) as group:
            server.peak_from_here()
            before = server.cpu()
            frames, seconds = group.burst(feeder, file, messages)
            used = server.cpu() - before
        if not frames:
            raise BenchError("nothing arrived")
        arrived = frames / (messages * clients)
        return {"cpu": used / frames, "rate": frames / seconds, "memory": server.peak(), "arrived": arrived}

    return turn


def paced_turn(clients: int, file: str, messages: int) -> Turn:
    """Twenty messages a second; CPU of a delivery, all idle costs included, and its latency."""

    def turn(server: Any, feeder: Feeder) -> Sample:
        with connected(server, feeder, clients, file) as group:
            server.peak_from_here()
            before = server.cpu()
            latencies = group.paced(feeder, file, messages, PACE_SEC)
            used = server.cpu() - before
        if not latencies:
            raise BenchError("nothing arrived")
        arrived, rate = len(latencies) / (messages * clients), len(latencies) / (messages * PACE_SEC)
        costs = {"cpu": used / len(latencies), "rate": rate, "memory": server.peak(), "arrived": arrived}
        return {**costs, **quantiles(latencies)}

    return turn


def fan_out_targets(results: Results) -> None:
    def ask(work: str, other: str, limit: float, text: str) -> None:
        results.ask_ratio("fan-out", work, other, limit, text)

    small, large, paced = "burst, 862 B, 100 clients", "burst, 11.8 KB, 100 clients", "paced 20/s, 862 B, 100 clients"
    ask(small, FLOOR, 0.6, "< 0.6 x floor")
    ask(small, WEBSOCKETS.name, 1 / 6, "< 1/6 websockets")
    ask(large, FLOOR, 1.0, "< 1.0 x floor")
    ask(large, WEBSOCKETS.name, 1 / 2, "< 1/2 websockets")
    for work in (paced, "paced 20/s, 11.8 KB, 100 clients"):
        ask(work, FLOOR, 1.8, "< 1.8 x floor")
        results.ask_value(results.find("fan-out", work, OURS), "p99", 0.005, "p99 < 5 ms", milliseconds)
    for work in (small, large, paced):
        many = results.find("fan-out", work.replace("100 clients", "1,000 clients"), OURS)
        few = results.find("fan-out", work, OURS)
        if many and few:
            ratio = many.ratio(few)
            many.targets.append(("<= 1.2 x 100 clients", f"{ratio:.2f}", ratio <= 1.2))


def http(bench: Bench) -> None:
    """/metrics of a real run and /api/status over keep-alive: CPU per request, latency."""
    with bench.running((WE,), "http", "all") as ours:
        ready_bodies(bench, ours)
        with bench.running((AIOHTTP, FASTAPI, PROMETHEUS), "http", "all") as peers:
            for path in ("/metrics", "/api/status"):
                up = {**ours, **peers}
                if path != "/metrics":
                    up.pop(PROMETHEUS.name, None)
                size = os.path.getsize(bench.directory / path.rpartition("/")[2])
                for connections in bench.effort.http_connections:
                    work = f"{path} ({size / 1000:.1f} KB), {of(connections, 'connection')}"
                    turn = http_turn(bench, path, connections)
                    bench.in_turn(up, "http", work, turn)
    http_targets(bench.results)


def ready_bodies(bench: Bench, ours: Up) -> None:
    """Bring our server into a run's full swing, and keep what it answers for the peers to serve."""
    if not ours:
        (bench.directory / "metrics").write_bytes(stand_in_metrics())
        return
    server, feeder = ours[OURS]
    settle(server, feeder, bench.small)
    feeder.order(file=bench.swing, count=1, interval=0)
    feeder.reply()
    wait_for_messages(server, len(bench.recording.before_the_end()))
    (bench.directory / "metrics").write_bytes(get(server.address, "/metrics"))
    (bench.directory / "status").write_bytes(get(server.address, "/api/status"))


def stand_in_metrics() -> bytes:
    """What the peers serve when our own server is not there to ask."""
    lines = [f'aiperf_metric_{i}_ms{{model="stand-in",quantile="0.99"}} {i / 7}\n' for i in range(1500)]
    return "".join(lines).encode()


def http_turn(bench: Bench, path: str, connections: int) -> Turn:
    """Requests in a closed loop, while the bus brings a new realtime_metrics each second."""
    seconds = bench.effort.http_sec

    def turn(server: Any, feeder: Feeder) -> Sample:
        clients = HTTPClients(server.address, path, connections)
        try:
            clients.run(0.1)
            feeder.order(file=bench.large, count=max(1, int(seconds)), interval=min(1.0, seconds / 2))
            before = server.cpu()
            answers = clients.run(seconds)
            used = server.cpu() - before
            feeder.reply()
            if not answers:
                raise BenchError(f"no answer in {seconds} s")
            memory = server.memory()["rss"]
            return {"cpu": used / answers, "rate": answers / seconds, "memory": memory, **quantiles(clients.latencies)}
        finally:
            clients.close()

    return turn


def http_targets(results: Results) -> None:
    for work in sorted({row.work for row in results.rows if row.section == "http"}):
        if "16 connections" in work:
            results.ask_ratio("http", work, AIOHTTP.name, 1 / 2, "<= 1/2 aiohttp")
            if work.startswith("/metrics"):
                results.ask_ratio("http", work, FASTAPI.name, 1 / 6, "<= 1/6 FastAPI")


def settle(server: Server, feeder: Feeder, file: str) -> None:
    """Send single messages until the server's subscriber gets them: ZMQ connects in its own time."""
    deadline = time.monotonic() + 15
    while messages_of(server) == 0:
        if time.monotonic() > deadline:
            raise BenchError("the subscriber gets nothing")
        feeder.order(file=file, count=1, interval=0)
        feeder.reply()
        time.sleep(0.05)
    time.sleep(0.2)


def messages_of(server: Server) -> int:
    """Bus messages that a server says it has taken in: ours in /api/status, an ingest peer on stderr."""
    if server.address[1] == NO_HTTP:
        told = re.findall(rb"messages (\d+)\n", server.log)
        return int(told[-1]) if told else 0
    return int(json.loads(get(server.address, "/api/status"))["source"]["messages"])


def wait_for_messages(server: Server, more: int, base: int = 0, scrape: bool = False) -> tuple[int, float]:
    """Wait until `more` than `base` messages are in, or no further one comes: how many are, and the seconds it took.

    Ours does not subscribe to everything (not to the housekeeping of AIPerf's services), so a few may stay away.
    """
    begin = moved = scraped = time.monotonic()
    seen = base
    while seen < base + more and time.monotonic() - moved < (QUIET_SEC if seen > base else GIVE_UP_SEC / 10):
        time.sleep(0.02 if not scrape else 0.1)
        if scrape and time.monotonic() - scraped >= 1.0:
            get(server.address, "/metrics")
            scraped = time.monotonic()
        before, seen = seen, messages_of(server)
        moved = time.monotonic() if seen != before else moved
    if seen == base:
        raise BenchError("no message arrived")
    return seen - base, moved - begin


def ingest(bench: Bench) -> None:
    """Bus messages taken into state with no client: CPU per message, messages a second."""
    works = (
        (f"realtime_metrics {LARGE_BYTES / 1000:.1f} KB, a scrape a second", bench.large, bench.effort.ingest, 1),
        ("the mix of a recording", bench.mix, bench.effort.recordings, len(bench.recording.messages)),
    )
    with bench.running((WE, WE_BUILTIN, RECV, PARSE), "ingest", "all") as up:
        for server, feeder in up.values():
            settle(server, feeder, bench.small)
        for work, file, count, each in works:
            bench.in_turn(up, "ingest", work, ingest_turn(file, count, each))
    row = bench.results.find("ingest", works[0][0], OURS)
    bench.results.ask_value(row, "cpu", 1e-4, "> 10,000/s on one core", lambda cpu: f"{1 / cpu:,.0f}/s")


def ingest_turn(file: str, count: int, each: int) -> Turn:
    """Play a file of `each` messages `count` times, as fast as the subscriber takes them."""

    def turn(server: Any, feeder: Feeder) -> Sample:
        base, before = messages_of(server), server.cpu()
        feeder.order(file=file, count=count, interval=0)
        scrape = each == 1 and server.address[1] != NO_HTTP
        taken, seconds = wait_for_messages(server, count * each, base, scrape)
        used = server.cpu() - before
        feeder.reply()
        costs = {"cpu": used / (count * each), "rate": taken / seconds, "arrived": taken / (count * each)}
        return {**costs, "memory": server.memory()["rss"]}

    return turn


def start(bench: Bench) -> None:
    """exec to the first answer; memory at rest; memory of an idle WebSocket client."""
    work = "exec to first answer"
    contenders = [
        c for c in (WE, WE_CACHED, WE_BUILTIN, AIOHTTP, FASTAPI, PROMETHEUS) if not skip_missing(bench, c, work)
    ]
    for contender in contenders:  # once uncounted, so that bytecode is cached
        with contextlib.suppress(BenchError, OSError):
            start_turn(bench, contender)
    for index in range(bench.effort.starts):
        say(f"  start | round {index + 1}")
        bench.results.row("start", work, IMPORTS).samples.append(import_turn())
        for contender in contenders:
            row = bench.results.row("start", work, contender.name)
            try:
                row.samples.append(start_turn(bench, contender))
            except (BenchError, OSError) as error:
                row.note = reason(error)
    idle_clients(bench)
    start_targets(bench.results, work)


IMPORTS = 'python3 -c "import asyncio, zmq, orjson"'


def skip_missing(bench: Bench, contender: Contender, work: str) -> bool:
    absent = contender.missing()
    if absent:
        bench.results.row("start", work, contender.name).note = absent
    return bool(absent)


def import_turn() -> Sample:
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", "import asyncio, zmq, orjson"])
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    seconds = time.monotonic() - begin
    return {"p50": seconds, "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * 1024}


def start_turn(bench: Bench, contender: Contender) -> Sample:
    """Time, CPU and memory of one start; the bus is there, and silent."""
    feeder = Feeder(command_of(publisher))
    server: Server | None = None
    try:
        server = Server(contender.command(feeder.bus, str(bench.directory)))
        get(server.address, "/metrics" if contender is PROMETHEUS else "/api/status")
        seconds = time.monotonic() - server.started
        used = server.cpu()
        time.sleep(AT_REST_SEC)
        memory = server.memory()
        return {"p50": seconds, "cpu": used, "memory": memory["rss"], "pss": memory["pss"]}
    finally:
        if server:
            server.stop()
        feeder.stop()


def idle_clients(bench: Bench) -> None:
    work = f"memory of an idle client (of {bench.effort.idle_clients})"
    contenders = (WE, WEBSOCKETS, AIOHTTP, FASTAPI)
    with bench.running(contenders, "start", work) as up:
        for name, (server, feeder) in up.items():
            say(f"  start | {work} | {name}")
            first = WebSocketClients(server.address, 10, feeder.prepare)  # what the first clients cost is not theirs
            time.sleep(0.3)
            base = server.memory()["rss"]
            group = WebSocketClients(server.address, bench.effort.idle_clients - 10, feeder.prepare)
            time.sleep(0.3)
            each = (server.memory()["rss"] - base) / (bench.effort.idle_clients - 10)
            bench.results.row("start", work, name).samples.append({"memory": each})
            group.close()
            first.close()
    row = bench.results.find("start", work, OURS)
    bench.results.ask_value(row, "memory", 20 * 1024, "< 20 KiB a client", lambda size: f"{size / 1024:.1f} KiB")


def start_targets(results: Results, work: str) -> None:
    imports = results.find("start", work, IMPORTS)
    for name in (OURS, OURS_CACHED):
        row = results.find("start", work, name)
        if row and imports:
            ratio = row.ratio(imports, "p50")
            row.targets.append(("< 2 x the imports", f"{ratio:.2f}", ratio <= 2.0))
    for name, limit in ((OURS, 36), (OURS_CACHED, 36), (OURS_BUILTIN, 28)):
        results.ask_value(results.find("start", work, name), "memory", limit * MIB, f"< {limit} MiB at rest", mebibytes)


def scale(bench: Bench) -> None:
    """How cost grows: the slope of log(cost) over log(size).  1 is linear, 0 is not at all."""
    for work, limit, measure in (
        ("CPU a message, over clients", 1.1, scale_clients),
        ("CPU a delivery, over message size", 1.1, scale_size),
        ("CPU of a scrape after a change, over metrics", 1.1, scale_metrics),
        ("CPU a message, over messages so far", 0.1, scale_history),
        ("memory, over messages delivered to 100 clients", 0.1, scale_run),
        ("memory above that at rest, over clients", 1.1, scale_memory),
    ):
        with bench.running((WE,), "scale", work) as up:
            for server, feeder in up.values():
                say(f"  scale | {work}")
                settle(server, feeder, bench.small)
                points = measure(bench, server, feeder, bench.effort.rounds == 1)
                slope_row(bench.results.row("scale", work, OURS), limit, points)


def slope_row(row: Row, limit: float, points: Points) -> None:
    slope = log_slope(points)
    row.samples.append({"slope": slope})
    row.note = "  ".join(f"{size:,.0f}: {figure(cost)}" for size, cost in points)
    row.targets.append((f"slope < {limit}", f"{slope:.2f}", slope < limit))


def log_slope(points: Points) -> float:
    """Least squares through (log size, log cost)."""
    pairs = [(math.log(size), math.log(max(cost, 1e-12))) for size, cost in points]
    middle_x, middle_y = statistics.fmean(x for x, _ in pairs), statistics.fmean(y for _, y in pairs)
    return sum((x - middle_x) * (y - middle_y) for x, y in pairs) / sum((x - middle_x) ** 2 for x, _ in pairs)


def figure(cost: float) -> str:
    """Seconds or bytes, whichever it is: no run here takes a second a unit, nor a byte."""
    return f"{cost * 1e6:.2f} us" if cost < 1 else f"{cost / MIB:.1f} MiB"


def median_cpu(turn: Turn, server: Server, feeder: Feeder, quick: bool) -> float:
    return statistics.median(turn(server, feeder)["cpu"] for _ in range(1 if quick else 3))


def scale_clients(bench: Bench, server: Server, feeder: Feeder, quick: bool) -> Points:
    counts = (10, 100) if quick else (10, 100, 1000)
    turns = [(count, burst_turn(count, bench.small, 100)) for count in counts]
    return [(count, median_cpu(turn, server, feeder, quick) * count) for count, turn in turns]


def scale_size(bench: Bench, server: Server, feeder: Feeder, quick: bool) -> Points:
    points: Points = []
    for size in (2_000, 12_000) if quick else (1_500, 3_000, 6_000, 12_000, 24_000, 48_000):
        file = bench.write(f"size{size}", [large_message(bench.recording, size)])
        points.append((size, median_cpu(burst_turn(50, file, 100), server, feeder, quick)))
    return points


def scale_metrics(bench: Bench, server: Server, feeder: Feeder, quick: bool) -> Points:
    points: Points = []
    for count in (30, 300) if quick else (30, 100, 300, 1000):
        file = bench.write(f"metrics{count}", [many_metrics(bench.recording, count)])
        costs = [scrape_after_change(server, feeder, file) for _ in range(7)]
        points.append((count, statistics.median(costs)))
    return points


def scrape_after_change(server: Server, feeder: Feeder, file: str) -> float:
    """CPU seconds of taking in one message and answering the first scrape after it."""
    base, before = messages_of(server), server.cpu()
    feeder.order(file=file, count=1, interval=0)
    feeder.reply()
    wait_for_messages(server, 1, base)
    get(server.address, "/metrics")
    return server.cpu() - before


def scale_history(bench: Bench, server: Server, feeder: Feeder, quick: bool) -> Points:
    points: Points = []
    for block in (4_000, 4_000) if quick else (10_000,) * 6:
        sample = ingest_turn(bench.large, block, 1)(server, feeder)
        points.append((block * (len(points) + 1), sample["cpu"]))
    return points


def scale_run(bench: Bench, server: Server, feeder: Feeder, quick: bool) -> Points:
    points: Points = []
    done = 0
    with connected(server, feeder, 100, bench.small) as group:
        group.burst(feeder, bench.small, 500)  # the first burst grows the buffers once and for all
        for block in (300, 300) if quick else (3_000,) * 6:
            group.burst(feeder, bench.small, block)
            done += block
            points.append((done, server.memory()["rss"]))
    return points


def scale_memory(_bench: Bench, server: Server, feeder: Feeder, quick: bool) -> Points:
    points: Points = []
    with contextlib.ExitStack() as stack:
        stack.callback(WebSocketClients(server.address, 20, feeder.prepare).close)  # the first cost more than the next
        time.sleep(0.3)
        base, clients = server.memory()["rss"], 0
        for more in (100, 100) if quick else (125, 125, 250, 450):
            stack.callback(WebSocketClients(server.address, more, feeder.prepare).close)
            clients += more
            time.sleep(0.3)
            points.append((clients, max(server.memory()["rss"] - base, 1.0)))
    return points


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "fanout": fan_out,
    "http": http,
    "ingest": ingest,
    "start": start,
    "scale": scale,
}


# == 9 == The table ====================================================================================================

COLUMNS = (
    "work",
    "contender",
    "rate/s",
    "cpu us",
    "x ours",
    "p50 ms",
    "p99 ms",
    "MiB",
    "to reach",
    "got",
    "reached",
    "note",
)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def mebibytes(size: float) -> str:
    return f"{size / MIB:.1f} MiB"


def of(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' if count != 1 else ''}"


def number(value: float, scale_by: float = 1.0, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value * scale_by:,.{digits}f}"


def lines_of(row: Row, ours: Row | None) -> list[tuple[str, ...]]:
    """The cells of a row; a row with several targets takes a line for each."""
    ratio = row.ratio(ours) if ours and ours is not row else math.nan
    arrived = row.median("arrived")
    skipped = f"{arrived:.0%} arrived" if arrived < 0.995 else ""
    first = (
        row.work,
        row.contender,
        number(row.median("rate"), digits=0),
        number(row.median("cpu"), 1e6),
        number(ratio),
        number(row.median("p50"), 1e3),
        number(row.median("p99"), 1e3),
        number(row.median("memory"), 1 / MIB, 3 if row.median("memory") < MIB else 1),
    )
    targets = row.targets or [("", "", None)]
    cells = [(asked, got, "" if reached is None else "yes" if reached else "NO") for asked, got, reached in targets]
    note = "; ".join(part for part in (skipped, row.note) if part)
    return [(*first, *cells[0], note)] + [("",) * len(first) + cell + ("",) for cell in cells[1:]]


def table(results: Results) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for row in results.rows:
        lines += lines_of(row, results.find(row.section, row.work, OURS))
    return lines


def aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in [COLUMNS, *lines]) for i in range(len(COLUMNS))]
    right = range(2, 8)

    def one(line: tuple[str, ...]) -> str:
        cells = (cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        return "  ".join(cells).rstrip()

    return "\n".join([one(COLUMNS), "  ".join("-" * width for width in widths), *map(one, lines)])


def markdown(lines: list[tuple[str, ...]]) -> str:
    def one(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---:" if 2 <= i <= 7 else "---" for i in range(len(COLUMNS))]
    return "\n".join([one(COLUMNS), one(rule), *map(one, lines)])


def machine() -> str:
    """What it was measured on: processor, kernel, Python, packages."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    versions = []
    for name in ("pyzmq", "orjson", "websockets", "aiohttp", "fastapi", "uvicorn", "prometheus_client"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return (
        f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}; {', '.join(versions)}"
    )


def as_json(results: Results) -> dict[str, Any]:
    rows = [
        {
            **{key: getattr(row, key) for key in ("section", "work", "contender", "note", "samples")},
            "targets": [{"asked": asked, "got": got, "reached": reached} for asked, got, reached in row.targets],
        }
        for row in results.rows
    ]
    return {"machine": machine(), "units": "seconds and bytes; cpu is per unit of work", "rows": rows}


# == 10 == Command line ================================================================================================


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute's run: fewer rounds, shorter, noisier")
    parser.add_argument("--only", metavar="A,B", default=",".join(SECTIONS), help=f"of: {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often every contender has its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample of every round there too")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--recording",
        type=Path,
        metavar="FILE",
        default=HERE / "static" / "demo.jsonl.gz",
        help="where messages are from",
    )
    options = parser.parse_args(argv)
    options.sections = [name.strip() for name in options.only.split(",")]
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if not options.recording.exists():
        parser.error(f"no recording at {options.recording}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    effort = QUICK if options.quick else FULL
    if options.rounds:
        effort = dataclasses.replace(effort, rounds=options.rounds)
    directory = Path(tempfile.mkdtemp(prefix="bench_aiperf_api_"))
    try:
        bench = Bench(effort, Recording.read(options.recording), directory)
        for name in options.sections:
            say(f"{name}: {(SECTIONS[name].__doc__ or '').partition(chr(10))[0]}")
            SECTIONS[name](bench)
    finally:
        shutil.rmtree(directory)
    lines = table(bench.results)
    print(machine())
    print()
    print(markdown(lines) if options.markdown else aligned(lines))
    if options.json:
        options.json.write_text(json.dumps(as_json(bench.results), indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
