#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How much work aiperf_api costs, beside its peers and beside the floor of the machine.

    python3 .ci/bench_aiperf_api.py                          everything, about a quarter of an hour
    python3 .ci/bench_aiperf_api.py --quick                  the same in about a minute, to see that it works
    python3 .ci/bench_aiperf_api.py --only fanout,http       some sections: fanout, http, history, ingest, start, scale
    python3 .ci/bench_aiperf_api.py --markdown --json out.json

How it measures:

  * Every server is a process of its own, the bus is another (a bound ZMQ publisher), and the clients are this
    process: raw sockets under one epoll, which throw the bytes away unread where they can.  All share two cores.
  * The contenders take turns (A B C A B C ...); the table has the medians of the rounds, and a ratio is the median of
    the rounds' ratios, so that a slow minute of the machine falls on both sides of it.
  * "cpu" is what the server's process used, all threads, in user and kernel mode, divided by the units of work that
    *arrived* at the clients: a frame, an answer, a message.  It is read from the process's own CPU clock (nanoseconds).
  * Latency is from the sending of a message (or request) to the arrival of its last byte at a client, on one clock.
  * The floor is one blocking `socket.send` of a ready frame per client and message, and nothing else: no bus, no loop.

The clients are in bench_clients.py, the peers in bench_peers.py: one that is not installed is said to be so.  Linux
only (epoll, /proc).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import gzip
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench_clients import GIVE_UP_SEC, PACE_SEC, QUIET_SEC, BenchError, HTTPClients, WebSocketClients, get

ROOT = Path(__file__).resolve().parent.parent
SMALL_BYTES = 862  # a credit_phase_progress
LARGE_BYTES = 11_800  # a realtime_metrics
MIB = 1 << 20
NO_HTTP = 1  # the port that a contender names when it has no HTTP server


# How much of everything, with --quick in the second column: they differ in noise, not in what they measure.
EFFORT = {
    "rounds": (3, 1),  # times that every contender has its turn
    "burst_small": ({1: 4000, 100: 1000, 1000: 300}, {1: 500, 100: 200, 1000: 100}),  # clients: messages of 862 B
    "burst_large": ({1: 2000, 100: 300, 1000: 60}, {100: 60}),  # clients: messages of 11.8 KB
    "paced_clients": ((1, 100, 1000), (100,)),  # at 20 messages a second
    "paced_sec": (4.0, 0.6),
    "http_connections": ((1, 16, 256), (16,)),
    "http_sec": (2.5, 0.6),  # of each closed loop of requests
    "ingest": (50_000, 10_000),  # messages
    "recordings": (40, 3),  # times that the whole recording is played for "the mix"
    "answers": (50, 10),  # renderings of /metrics after a change, and of the history
    "starts": (7, 1),  # of every server
    "at_rest_sec": (1.5, 0.5),  # from its first answer until it is at rest
    "idle_clients": (1000, 200),  # idle WebSocket clients whose memory is counted
    "scale_clients": ((10, 100, 1000), (10, 100)),
    "scale_sizes": ((1_500, 3_000, 6_000, 12_000, 24_000, 48_000), (2_000, 12_000)),  # of a message, in bytes
    "scale_metrics": ((30, 100, 300, 1000), (30, 300)),
    "scale_history": ((10_000, 6), (4_000, 2)),  # messages of a block, blocks
    "scale_run": ((3_000, 6), (300, 2)),  # the same
    "scale_memory": ((20, 125, 125, 250, 450), (20, 100, 100)),  # clients that are added
}


# == Real messages =====================================================================================================

Messages = list[dict[str, str]]  # topic, head and tail: between these two each message gets a number of its own


class Recording:
    """A recorded run, and messages made out of it."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()
        rows = [row for row in map(json.loads, lines) if "topic" in row]
        self.messages: Messages = [{"topic": row["topic"], "head": text_of(row["payload"])} for row in rows]

    def of_type(self, message_type: str) -> list[str]:
        return [message["head"] for message in self.messages if message["topic"].partition("$")[0] == message_type]

    def before_the_end(self) -> Messages:
        """All up to the last realtime_metrics: a run in full swing.  Without what GPUs and the inference server say of
        themselves, which most runs have not: /metrics is then some 80 KB, with them 190."""
        last = max(index for index, message in enumerate(self.messages) if message["topic"] == "realtime_metrics$")
        extra = ("realtime_telemetry_metrics$", "realtime_server_metrics$")
        return [message for message in self.messages[: last + 1] if message["topic"] not in extra]

    def small(self) -> Messages:
        """A real credit_phase_progress of 862 B (the nearest in the recording, its service_id stretched or cut)."""
        nearest = min(self.of_type("credit_phase_progress"), key=lambda text: abs(len(text) - SMALL_BYTES))
        [message] = numbered("credit_phase_progress$", nearest, "total_session_turns")
        spare = SMALL_BYTES - len(message["head"]) - 7 - len(message["tail"])
        name = re.search('"service_id":"([^"]*)"', message["head"])
        assert name, "every AIPerf message has a service_id"
        stretched = (name[1] + "_" * max(spare, 0))[: max(len(name[1]) + spare, 1)]
        return [{**message, "head": message["head"].replace(name[1], stretched, 1)}]

    def metrics(self, size: int = LARGE_BYTES, count: int = 10_000) -> Messages:
        """A real realtime_metrics of about `size` bytes or of `count` rows: the recorded ones, again under new tags."""
        longest = json.loads(max(self.of_type("realtime_metrics"), key=len))
        rows = sorted(longest["metrics"], key=lambda row: "count" not in row)
        chosen: list[dict[str, Any]] = []
        size -= len(text_of({**longest, "metrics": chosen}))
        for index in range(10 * len(rows) + count):
            row, copy = rows[index % len(rows)], index // len(rows)
            extra = {**row, "tag": f"{row['tag']}_{copy}"} if copy else row
            length = len(text_of(extra)) + 1
            if length <= size and len(chosen) < count:
                chosen.append(extra)
                size -= length
        return numbered("realtime_metrics$", text_of({**longest, "metrics": chosen}), "count")


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def numbered(topic: str, payload: str, key: str) -> Messages:
    """Cut a payload around the first integer under `key`, where each message gets a number of its own."""
    match = re.search(f'"{key}":([0-9]+)', payload)
    assert match, f"no {key} in the recorded message"
    return [{"topic": topic, "head": payload[: match.start(1)], "tail": payload[match.end(1) :]}]


# == Processes =========================================================================================================


def cpu_of(pid: int) -> float:
    """Seconds of CPU used so far by all threads of a process: its CLOCK_PROCESS_CPUTIME_ID, from outside."""
    return time.clock_gettime((~pid << 3) | 2)


class Measured:
    """A process, and what /proc says of it."""

    process: subprocess.Popen[bytes]
    address: tuple[str, int]

    def cpu(self) -> float:
        return cpu_of(self.process.pid)

    def memory(self, name: str = "VmRSS") -> float:
        """Bytes that are resident; as VmHWM the most since `peak_from_here`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024

    def peak_from_here(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def is_at(self, url: str) -> None:
        self.address = (urlsplit(url).hostname or "", urlsplit(url).port or 0)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=4)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


class Server(Measured):
    """A process under measurement: says `http://…` on stderr when it listens."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        # Bytecode is cached, as it is by default.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self.started = time.monotonic()
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=env)
        while not (found := re.search(rb"(http://[^\s/\"']+)\s", self.text())):
            if self.process.poll() is not None or time.monotonic() > self.started + 20:
                self.stop()
                raise BenchError(self.text().decode(errors="replace").strip()[-400:] or "did not start")
            time.sleep(0.001)
        self.is_at(found[1].decode())

    def text(self) -> bytes:
        return os.pread(self.log.fileno(), 1 << 24, 0)


class Feeder(Measured):
    """The bus: a process with a bound ZMQ publisher that sends what it is ordered to, one JSON line an order."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.bus: str = self.reply()
        self.is_at(self.bus)  # the floor is feeder and server in one

    def order(self, **order: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def reply(self) -> Any:
        return json.loads(self.process.stdout.readline() or b"null") if self.process.stdout else None

    def send(self, file: str, count: int = 1, interval: float = 0) -> Any:
        self.order(file=file, count=count, interval=interval)
        return self.reply()

    def fileno(self) -> int:
        return self.process.stdout.fileno() if self.process.stdout else -1


def command_of(*args: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("bench_peers.py")), *args]


def command_of_ours(*options: str, builtin: bool = False, cached: bool = False) -> list[str]:
    """Our shipped command line.

    Args:
        builtin: hide pyzmq from it, as on a machine that has none.
        cached: as the console script of an installed package runs it: `import` finds compiled bytecode.  A file that is
            named on the command line is compiled anew at each start.
    """
    if not builtin and not cached:
        return [sys.executable, str(ROOT / "aiperf_api.py"), "--api-port", "0", *options]
    hide = "sys.modules['zmq'] = None; " if builtin else ""
    code = f"import sys; {hide}sys.path.insert(0, sys.argv.pop(1)); import aiperf_api; sys.exit(aiperf_api.main())"
    return [sys.executable, "-c", code, str(ROOT), "--api-port", "0", *options]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One that takes part in a section."""

    name: str
    command: Callable[[str, str], list[str]]  # (bus address, directory of ready bodies) -> argv
    needs: str = "zmq"  # packages that must be there


def ours(name: str, **how: bool) -> Contender:
    return Contender(name, lambda bus, _bodies: command_of_ours("--zmq-address", bus, **how))


def peer(name: str, function: str, needs: str) -> Contender:
    return Contender(name, lambda bus, bodies: command_of(function, bus, bodies), needs)


WE = ours("aiperf_api")
WE_CACHED = ours("aiperf_api, as a module", cached=True)  # as installed, and `python3 -m`: with cached bytecode
WE_BUILTIN = ours("aiperf_api, built-in ZMQ", builtin=True)
FLOOR = Contender("floor: socket.send", lambda _bus, _bodies: command_of("floor"), "")
WEBSOCKETS = peer("websockets.broadcast", "websockets", "websockets zmq")
AIOHTTP = peer("aiohttp", "aiohttp", "aiohttp zmq")
FASTAPI = peer("FastAPI/uvicorn", "fastapi", "fastapi uvicorn websockets zmq")
PROMETHEUS = peer("prometheus_client", "prometheus", "prometheus_client")
RECV = peer("pyzmq recv, nothing else", "recv", "zmq")
PARSE = peer("zmq.asyncio + orjson", "parse", "zmq orjson")


# == Results ===========================================================================================================

# What one turn of one contender gave: cpu (s a unit), rate (units/s), p50, p99 (s), memory (B), arrived (0 to 1).
Sample = dict[str, float]
Up = dict[str, tuple[Any, Feeder]]  # contenders that are running: server and bus of each, by name


@dataclasses.dataclass
class Row:
    """One line of the table: a contender at a piece of work."""

    section: str
    work: str
    contender: str
    samples: list[Sample] = dataclasses.field(default_factory=list)  # one a round
    note: str = ""
    targets: list[tuple[str, str, bool]] = dataclasses.field(default_factory=list)  # asked, measured, reached

    def median(self, key: str) -> float:
        values = [sample[key] for sample in self.samples if key in sample]
        return statistics.median(values) if values else math.nan

    def ratio(self, other: Row, key: str = "cpu") -> float:
        """Median of the rounds' ratios, this one over the other."""
        pairs = zip(self.samples, other.samples)
        ratios = [a[key] / b[key] for a, b in pairs if b.get(key) and key in a]
        return statistics.median(ratios) if ratios else math.nan

    def fails(self, error: Exception) -> None:
        """Note the last line of what went wrong: of a traceback, it is the one that says it."""
        self.note = (str(error).strip().splitlines() or [type(error).__name__])[-1][:100]

    def ask(self, key: str, limit: float, text: str, scale: float = 1.0) -> None:
        """A figure must be at most `limit`; both are shown in the unit of `scale`."""
        value = self.median(key) * scale
        if not math.isnan(value):
            self.targets.append((text, f"{value:,.2f}", value <= limit))

    def ask_ratio(self, other: Row, limit: float, text: str, key: str = "cpu") -> None:
        ratio = self.ratio(other, key)
        if not math.isnan(ratio):
            self.targets.append((text, f"{ratio:.2f}", ratio <= limit))


def quantiles(latencies: list[float]) -> Sample:
    ordered = sorted(latencies)
    return {"p50": ordered[len(ordered) // 2], "p99": ordered[len(ordered) * 99 // 100]}


# == Sections ==========================================================================================================


class Bench:
    """What the sections share: the effort, the messages on disk, the results."""

    def __init__(self, quick: bool, recording: Recording, directory: Path) -> None:
        self.effort: dict[str, Any] = {name: both[quick] for name, both in EFFORT.items()}
        self.recording, self.directory = recording, directory
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.small = self.write("small", recording.small())
        self.large = self.write("large", recording.metrics())
        for body in ("metrics", "status"):
            (directory / body).write_bytes(b"")

    def write(self, name: str, messages: Messages) -> str:
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(messages), encoding="utf-8")
        return str(path)

    def row(self, section: str, work: str, contender: Contender | str = WE) -> Row:
        name = contender if isinstance(contender, str) else contender.name
        return self.rows.setdefault((section, work, name), Row(section, work, name))

    @contextlib.contextmanager
    def running(self, contenders: Sequence[Contender], section: str, work: str = "all") -> Iterator[Up]:
        """Start each contender with a bus of its own; those that cannot start get a row that says so."""
        up: Up = {}
        with contextlib.ExitStack() as stack:
            for contender in contenders:
                try:
                    absent = [name for name in contender.needs.split() if importlib.util.find_spec(name) is None]
                    if absent:
                        raise BenchError(f"not installed: {', '.join(absent)}")
                    feeder = Feeder(command_of("floor" if contender is FLOOR else "publisher"))
                    stack.callback(feeder.stop)
                    command = contender.command(feeder.bus, str(self.directory))
                    server = feeder if contender is FLOOR else Server(command)
                    stack.callback(server.stop)
                    up[contender.name] = server, feeder
                except (BenchError, OSError) as error:
                    self.row(section, work, contender).fails(error)
            yield up

    def in_turn(self, up: Up, section: str, work: str, turn: Callable[..., Sample], *args: Any) -> None:
        """Every contender has its turn, in every round."""
        for index in range(self.effort["rounds"]):
            for name, (server, feeder) in up.items():
                print(f"  {section} | {work} | {name} | round {index + 1}", file=sys.stderr)
                row = self.row(section, work, name)
                try:
                    row.samples.append(turn(server, feeder, *args))
                except (BenchError, OSError) as error:
                    row.fails(error)


def of(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' if count != 1 else ''}"


@contextlib.contextmanager
def connected(server: Any, feeder: Feeder, clients: int, file: str) -> Iterator[WebSocketClients]:
    group = WebSocketClients(server, feeder, clients)
    try:
        group.warm_up(feeder, file)
        gc.collect()
        gc.disable()  # our own pauses are not the server's latency
        server.peak_from_here()
        yield group
    finally:
        gc.enable()
        group.close()
        time.sleep(0.1)  # let the server see the goodbyes before the next one's turn


def burst_turn(server: Any, feeder: Feeder, clients: int, file: str, messages: int, plain: bool = False) -> Sample:
    """All messages at once; CPU and rate of the deliveries that arrived, and the peak of memory."""
    with connected(server, feeder, clients, file) as group:
        before = server.cpu()
        frames, seconds = group.burst(feeder, file, messages, plain)
        used = server.cpu() - before
    if not frames:
        raise BenchError("nothing arrived")
    costs = {"cpu": used / frames, "rate": frames / seconds, "memory": server.memory("VmHWM")}
    return {**costs, "arrived": frames / (messages * clients)}


def paced_turn(server: Any, feeder: Feeder, clients: int, file: str, messages: int) -> Sample:
    """Twenty messages a second; CPU of a delivery, all idle costs included, and its latency."""
    with connected(server, feeder, clients, file) as group:
        before = server.cpu()
        latencies = group.paced(feeder, file, messages)
        used = server.cpu() - before
    if not latencies:
        raise BenchError("nothing arrived")
    costs = {"cpu": used / len(latencies), "rate": len(latencies) / (messages * PACE_SEC)}
    arrived = len(latencies) / (messages * clients)
    return {**costs, "memory": server.memory("VmHWM"), "arrived": arrived, **quantiles(latencies)}


def fan_out(bench: Bench) -> None:
    """Bus messages to N WebSocket clients, in a burst and paced: CPU per delivery, latency."""
    effort, section = bench.effort, "fan-out"
    with bench.running((WE, FLOOR, WEBSOCKETS, AIOHTTP, FASTAPI, WE_BUILTIN), section) as up:
        for label, file, counts in (("862 B", bench.small, "burst_small"), ("11.8 KB", bench.large, "burst_large")):
            for clients, messages in effort[counts].items():
                work = f"burst, {label}, {of(clients, 'client')}"
                bench.in_turn(up, section, work, burst_turn, clients, file, messages)
        work, count = "burst, 11.8 KB, 100 clients that select()", effort["burst_large"][100]
        bench.in_turn(up, section, work, burst_turn, 100, bench.large, count, True)
        for clients in effort["paced_clients"]:
            for label, file in (("862 B", bench.small), ("11.8 KB", bench.large)):
                if label == "862 B" or clients == 100:
                    work, count = f"paced 20/s, {label}, {of(clients, 'client')}", round(effort["paced_sec"] / PACE_SEC)
                    bench.in_turn(up, section, work, paced_turn, clients, file, count)
    for work, of_floor, of_websockets in (
        ("burst, 862 B, 100 clients", 0.6, 1 / 6),
        ("burst, 11.8 KB, 100 clients", 1.3, 1 / 2),
        ("burst, 11.8 KB, 100 clients that select()", 1.3, 1 / 2),
        ("paced 20/s, 862 B, 100 clients", 1.8, 0),
        ("paced 20/s, 11.8 KB, 100 clients", 1.6, 0),
    ):
        row = bench.row(section, work)
        row.ask_ratio(bench.row(section, work, FLOOR), of_floor, f"< {of_floor} x floor")
        if of_websockets:
            text = f"< 1/{1 / of_websockets:.0f} websockets"
            row.ask_ratio(bench.row(section, work, WEBSOCKETS), of_websockets, text)
        else:
            row.ask("p99", 5, "p99 < 5 ms", 1e3)
        many = bench.rows.get((section, work.replace("100 clients", "1,000 clients"), WE.name))
        if many:
            many.ask_ratio(row, 1.2, "<= 1.2 x 100 clients")


def settle(server: Any, feeder: Feeder, file: str) -> None:
    """Send single messages until the server's subscriber gets them: ZMQ connects in its own time."""
    deadline = time.monotonic() + 15
    while messages_of(server) == 0:
        if time.monotonic() > deadline:
            raise BenchError("the subscriber gets nothing")
        feeder.send(file)
        time.sleep(0.05)
    time.sleep(0.2)


def messages_of(server: Any) -> int:
    """Bus messages that a server says it has received: ours in /api/status, an ingest peer on stderr."""
    if server.address[1] == NO_HTTP:
        told = re.findall(rb"messages (\d+)\n", server.text())
        return int(told[-1]) if told else 0
    return int(json.loads(get(server, "/api/status"))["source"]["messages"])


def wait_for_messages(server: Any, more: int, base: int = 0, scrape: bool = False) -> tuple[int, float]:
    """Wait until `more` than `base` messages are in, or no further one comes: how many are, and the seconds it took.

    Ours does not subscribe to everything (not to the housekeeping of AIPerf's services), so a few may stay away.
    """
    begin = moved = scraped = time.monotonic()
    seen = base
    while seen < base + more and time.monotonic() - moved < (QUIET_SEC if seen > base else GIVE_UP_SEC / 10):
        time.sleep(0.02 if not scrape else 0.1)
        if scrape and time.monotonic() - scraped >= 1.0:
            get(server, "/metrics")
            scraped = time.monotonic()
        before, seen = seen, messages_of(server)
        moved = time.monotonic() if seen != before else moved
    if seen == base:
        raise BenchError("no message arrived")
    return seen - base, moved - begin


def http(bench: Bench) -> None:
    """/metrics of a real run and /api/status over keep-alive, and a rendering: CPU per request, latency."""
    section, rendering = "http", "/metrics after a change"
    with bench.running((WE,), section) as up:
        if up:  # bring it into a run's full swing; the peers serve what it answers
            server, feeder = up[WE.name]
            settle(server, feeder, bench.small)
            swing = bench.recording.before_the_end()
            feeder.send(bench.write("swing", swing))
            wait_for_messages(server, len(swing))
            for name, path in (("metrics", "/metrics"), ("status", "/api/status")):
                (bench.directory / name).write_bytes(get(server, path))
            bench.in_turn(up, section, rendering, change_turn, bench.large, bench.effort["answers"])
        with bench.running((AIOHTTP, FASTAPI, PROMETHEUS), section) as peers:
            for path in ("/metrics", "/api/status"):
                size = os.path.getsize(bench.directory / path.rpartition("/")[2])
                both = {n: who for n, who in {**up, **peers}.items() if path == "/metrics" or n != PROMETHEUS.name}
                for connections in bench.effort["http_connections"]:
                    work = f"{path} ({size / 1000:.1f} KB), {of(connections, 'connection')}"
                    bench.in_turn(
                        both, section, work, http_turn, path, connections, bench.effort["http_sec"], bench.large
                    )
    for row in [row for row in bench.rows.values() if row.contender == WE.name and "16 connections" in row.work]:
        row.ask_ratio(bench.row(section, row.work, AIOHTTP), 1 / 2, "<= 1/2 aiohttp")
        if row.work.startswith("/metrics"):
            row.ask_ratio(bench.row(section, row.work, FASTAPI), 1 / 6, "<= 1/6 FastAPI")


def http_turn(server: Any, feeder: Feeder, path: str, connections: int, seconds: float, file: str) -> Sample:
    """Requests in a closed loop, while the bus brings a new realtime_metrics each second."""
    clients = HTTPClients(server.address, path, connections)
    try:
        clients.run(0.1)
        feeder.order(file=file, count=max(1, int(seconds)), interval=min(1.0, seconds / 2))
        before = server.cpu()
        answers = clients.run(seconds)
        used = server.cpu() - before
        feeder.reply()
    finally:
        clients.close()
    if not answers:
        raise BenchError(f"no answer in {seconds} s")
    costs = {"cpu": used / answers, "rate": answers / seconds, "memory": server.memory()}
    return {**costs, **quantiles(clients.latencies)}


def change_turn(server: Any, feeder: Feeder, file: str, times: int) -> Sample:
    """CPU seconds of the first scrape after a message; the median."""
    costs = []
    for _ in range(times):
        base = messages_of(server)
        feeder.send(file)
        wait_for_messages(server, 1, base)
        before = server.cpu()
        get(server, "/metrics")
        costs.append(server.cpu() - before)
    return {"cpu": statistics.median(costs)}


def history(bench: Bench) -> None:
    """An hour's dashboard load out of a run that was replayed at once: CPU and bytes of 40 series of 1,000 points."""
    work, tags = "40 series, points=1000", [f"metric_{index}" for index in range(20)]
    path = bench.directory / "hour.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for second in range(3600):  # averages of all requests so far move a little, percentiles now and then
            waves = [math.sin(second // 10 / (5 + index)) * 30 / (1 + second // 60) + 200 for index in range(20)]
            rows = [
                {"tag": t, "unit": "ms", "avg": w * 1.000_001**second, "p99": round(w, 6)} for t, w in zip(tags, waves)
            ]
            payload = text_of({"message_type": "realtime_metrics", "metrics": rows})
            line = {"t": 1_800_000_000_000_000_000 + second * 10**9, "topic": "realtime_metrics$", "payload": payload}
            file.write(json.dumps(line) + "\n")
    asked = f"/api/history?tag={','.join(tags)}&stat=avg,p99&points=1000"
    with contextlib.ExitStack() as stack:
        server = Server(command_of_ours("--replay", str(path), "--replay-speed", "0"))
        stack.callback(server.stop)
        wait_for_messages(server, 3600)
        for _ in range(bench.effort["rounds"]):
            sizes, before = [], server.cpu()
            for _ in range(bench.effort["answers"]):
                sizes.append(len(get(server, asked, "Accept-Encoding: gzip\r\n")))
            used = (server.cpu() - before) / len(sizes)
            bench.row("history", work).samples.append({"cpu": used, "memory": server.memory(), "bytes": max(sizes)})
        print(f"  history | {len(get(server, asked)):,} bytes, gzipped {max(sizes):,}", file=sys.stderr)
    bench.row("history", work).ask("cpu", 20, "< 20 ms of CPU", 1e3)
    bench.row("history", work).ask("bytes", 250, "< 250 KB gzipped", 1e-3)


def ingest(bench: Bench) -> None:
    """Bus messages applied with no client: CPU per message, messages a second."""
    effort, recording = bench.effort, bench.recording.messages
    large = "realtime_metrics 11.8 KB, a scrape a second"
    with bench.running((WE, WE_BUILTIN, RECV, PARSE), "ingest") as up:
        for server, feeder in up.values():
            settle(server, feeder, bench.small)
        for work, file, count, each in (
            ("credit_phase_progress 862 B", bench.small, effort["ingest"], 1),
            (large, bench.large, effort["ingest"], 1),
            ("the mix of a recording", bench.write("mix", recording), effort["recordings"], len(recording)),
        ):
            bench.in_turn(up, "ingest", work, ingest_turn, file, count, each)
    for contender in (WE, WE_BUILTIN):
        bench.row("ingest", large, contender).ask("cpu", 12.5, "> 80,000/s: < 12.5 us", 1e6)


def ingest_turn(server: Any, feeder: Feeder, file: str, count: int, each: int) -> Sample:
    """Play a file of `each` messages `count` times, as fast as the subscriber receives them."""
    base, before = messages_of(server), server.cpu()
    feeder.order(file=file, count=count, interval=0)
    came, seconds = wait_for_messages(server, count * each, base, each == 1 and server.address[1] != NO_HTTP)
    used = server.cpu() - before
    feeder.reply()
    costs = {"cpu": used / (count * each), "rate": came / seconds, "arrived": came / (count * each)}
    return {**costs, "memory": server.memory()}


IMPORTS = 'python3 -c "import asyncio, zmq, orjson"'


def start(bench: Bench) -> None:
    """exec to the first answer; memory at rest; memory of an idle WebSocket client."""
    section, work = "start", "exec to first answer"
    for index in range(-1, bench.effort["starts"]):  # the first one is not counted: bytecode is cached then
        print(f"  start | round {index + 1}", file=sys.stderr)
        begin = time.monotonic()
        process = subprocess.Popen([sys.executable, "-c", "import asyncio, zmq, orjson"])
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
        sample = {"p50": time.monotonic() - begin, "cpu": usage.ru_utime + usage.ru_stime}
        if index >= 0:
            bench.row(section, work, IMPORTS).samples.append({**sample, "memory": usage.ru_maxrss * 1024})
        for contender in (WE, WE_CACHED, WE_BUILTIN, AIOHTTP, FASTAPI, PROMETHEUS):
            with bench.running((contender,), section, work) as up:  # its bus is there, and silent
                for server, _ in up.values():
                    get(server, "/metrics" if contender is PROMETHEUS else "/api/status")
                    sample = {"p50": time.monotonic() - server.started, "cpu": server.cpu()}
                    time.sleep(bench.effort["at_rest_sec"])
                    if index >= 0:
                        bench.row(section, work, contender).samples.append({**sample, "memory": server.memory()})
    for contender, limit_ms, limit_mib in ((WE, 110, 38), (WE_CACHED, 75, 29), (WE_BUILTIN, 0, 26)):
        row = bench.row(section, work, contender)
        if limit_ms:
            row.ask("p50", limit_ms, f"< {limit_ms} ms", 1e3)
        row.ask("memory", limit_mib, f"< {limit_mib} MiB at rest", 1 / MIB)
    idle_clients(bench)


def idle_clients(bench: Bench) -> None:
    count = bench.effort["idle_clients"]
    work = f"memory of an idle client (of {count})"
    with bench.running((WE, WEBSOCKETS, AIOHTTP, FASTAPI), "start", work) as up:
        for name, (server, feeder) in up.items():
            print(f"  start | {work} | {name}", file=sys.stderr)
            with contextlib.ExitStack() as stack:
                before, sizes = 10, []  # what the first clients cost is not theirs
                for more in (before, count - before):
                    stack.callback(WebSocketClients(server, feeder, more).close)
                    time.sleep(0.3)
                    sizes.append(server.memory())
            bench.row("start", work, name).samples.append({"memory": (sizes[1] - sizes[0]) / (count - before)})
    bench.row("start", work).ask("memory", 20, "< 20 KiB a client", 1 / 1024)


Points = Iterator[tuple[float, float]]  # (size, cost)


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
                print(f"  scale | {work}", file=sys.stderr)
                settle(server, feeder, bench.small)
                points = list(measure(bench, server, feeder))
                xs, ys = [math.log(size) for size, _ in points], [math.log(max(cost, 1e-12)) for _, cost in points]
                x, y = statistics.fmean(xs), statistics.fmean(ys)
                slope = sum((a - x) * (b - y) for a, b in zip(xs, ys)) / sum((a - x) ** 2 for a in xs)
                row = bench.row("scale", work)
                row.samples.append({"slope": slope})
                shown = [f"{cost * 1e6:.2f} us" if cost < 1 else f"{cost / MIB:.1f} MiB" for _, cost in points]
                row.note = "  ".join(f"{size:,.0f}: {cost}" for (size, _), cost in zip(points, shown))
                row.ask("slope", limit, f"slope < {limit}")


def scale_clients(bench: Bench, server: Any, feeder: Feeder) -> Points:
    for count in bench.effort["scale_clients"]:
        turns = [burst_turn(server, feeder, count, bench.small, 100) for _ in range(bench.effort["rounds"])]
        yield count, statistics.median(turn["cpu"] for turn in turns) * count


def scale_size(bench: Bench, server: Any, feeder: Feeder) -> Points:
    for size in bench.effort["scale_sizes"]:
        file = bench.write(f"size{size}", bench.recording.metrics(size))
        turns = [burst_turn(server, feeder, 50, file, 100) for _ in range(bench.effort["rounds"])]
        yield size, statistics.median(turn["cpu"] for turn in turns)


def scale_metrics(bench: Bench, server: Any, feeder: Feeder) -> Points:
    for count in bench.effort["scale_metrics"]:
        file = bench.write(f"metrics{count}", bench.recording.metrics(1 << 30, count))
        yield count, change_turn(server, feeder, file, bench.effort["answers"])["cpu"]


def scale_history(bench: Bench, server: Any, feeder: Feeder) -> Points:
    block, blocks = bench.effort["scale_history"]
    for number in range(1, blocks + 1):
        yield block * number, ingest_turn(server, feeder, bench.large, block, 1)["cpu"]


def scale_run(bench: Bench, server: Any, feeder: Feeder) -> Points:
    block, blocks = bench.effort["scale_run"]
    with connected(server, feeder, 100, bench.small) as group:
        group.burst(feeder, bench.small, 500)  # the first burst grows the buffers once and for all
        for number in range(1, blocks + 1):
            group.burst(feeder, bench.small, block)
            yield block * number, server.memory()


def scale_memory(bench: Bench, server: Any, feeder: Feeder) -> Points:
    with contextlib.ExitStack() as stack:
        base, clients = 0.0, 0
        for more in bench.effort["scale_memory"]:
            stack.callback(WebSocketClients(server, feeder, more).close)
            time.sleep(0.3)
            if base:  # the first cost more than the next
                clients += more
                yield clients, max(server.memory() - base, 1.0)
            base = base or server.memory()


SECTIONS = {"fanout": fan_out, "http": http, "history": history, "ingest": ingest, "start": start, "scale": scale}


# == The table =========================================================================================================

COLUMNS = ("work", "contender", "rate/s", "cpu us", "x ours", "p50 ms", "p99 ms", "MiB", "to reach", "got", "", "note")
FIGURES = (("rate", 1, 0), ("cpu", 1e6, 2), ("", 1, 2), ("p50", 1e3, 2), ("p99", 1e3, 2), ("memory", 1 / MIB, 2))


def table(rows: dict[tuple[str, str, str], Row], markdown: bool) -> str:
    """Each row, with a line for each of its targets."""
    lines: list[Sequence[str]] = []
    for row in rows.values():
        mine = rows.get((row.section, row.work, WE.name), row)
        values = [(row.median(key) if key else row.ratio(mine)) * unit for key, unit, _ in FIGURES]
        values[2] = math.nan if row is mine else values[2]
        cells = ["" if math.isnan(v) else f"{v:,.{digits}f}" for v, (_, _, digits) in zip(values, FIGURES)]
        arrived = row.median("arrived")
        note = "; ".join(part for part in (f"{arrived:.0%} arrived" if arrived < 0.995 else "", row.note) if part)
        for index, (asked, got, reached) in enumerate(row.targets or [("", "", True)]):
            mark = ("yes" if reached else "NO") if asked else ""
            first = (row.work, row.contender, *cells) if not index else ("",) * 8
            lines.append((*first, asked, got, mark, "" if index else note))
    widths = [max(len(line[i]) for line in (COLUMNS, *lines)) for i in range(len(COLUMNS))]
    lines[:0] = (COLUMNS, ["-" * (width - 1) + ":-"[not 2 <= i <= 7] for i, width in enumerate(widths)])
    texts = []
    for line in lines:
        cells = [cell.rjust(w) if 2 <= i <= 7 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        texts.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    return "\n".join(texts)


def machine() -> str:
    """What it was measured on: processor, kernel, Python, packages."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    versions = []
    for name in ("pyzmq", "orjson", "websockets", "aiohttp", "fastapi", "uvicorn", "prometheus_client"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return (
        f"{cpu[1] if cpu else platform.machine()}, {platform.system()} {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}; {', '.join(versions)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute's run: fewer rounds, shorter, noisier")
    parser.add_argument("--only", metavar="A,B", default=",".join(SECTIONS), help=f"of: {', '.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample of every round there too")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    demo = ROOT / "static" / "demo.jsonl.gz"
    parser.add_argument("--recording", type=Path, metavar="FILE", default=demo, help="where messages are from")
    options = parser.parse_args()
    sections = [name.strip() for name in options.only.split(",")]
    if not set(sections) <= set(SECTIONS):
        parser.error(f"there are {', '.join(SECTIONS)}")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory(prefix="bench_aiperf_api_") as directory:
        bench = Bench(options.quick, Recording(options.recording), Path(directory))
        for name in sections:
            print(f"{name}: {(SECTIONS[name].__doc__ or '').partition(chr(10))[0]}", file=sys.stderr)
            SECTIONS[name](bench)
    print(machine(), table(bench.rows, options.markdown), sep="\n\n")
    if options.json:
        rows = [dataclasses.asdict(row) for row in bench.rows.values()]
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
