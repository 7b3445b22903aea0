#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What peers, buses and machines that mean no good may cost: `python3 .ci/hostile_aiperf_api.py [CASE...]`.

Each case runs against a served process.  While it lasts the process stays under 256 MiB, and uses less than 100 ms of
CPU between a request for /health and its answer; at its end every endpoint answers, no traceback is in the log, and
SIGTERM ends it with 0.  Needs pyzmq, and Linux for /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import zmq
from bench_aiperf_api import MIB, ROOT, Measured, command_of_ours, cpu_of

RESIDENT_MIB_MAX = 256
HEALTH_CPU_SEC_MAX = 0.15 if os.environ.get("CI") else 0.1  # the step beside it in CI costs up to half as much again
PATHS = (
    "metrics top api/metrics api/status api/progress api/workers api/config api/server-metrics api/results api/history"
)
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
SETS = [{"labels": {"a": str(n)}, "stats": {"avg": 1.0}} for n in range(40_000)]
failures: list[str] = []


def must(condition: object, text: str) -> None:
    print(f"    {'ok  ' if condition else 'FAIL'} {text}", flush=True)
    if not condition:
        failures.append(text)


class Server(Measured):
    """The program, and somebody who asks for /health all the time."""

    def __init__(self, *options: str, builtin: bool = False, prefix: tuple[str, ...] = ()) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        command = [*prefix, *command_of_ours(*options, builtin=builtin, cached=True)]
        self.process = subprocess.Popen(command, stderr=self.log)
        deadline = time.monotonic() + 20
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.text())):
            assert time.monotonic() < deadline and self.process.poll() is None, self.text()
            time.sleep(0.02)
        self.address = ("127.0.0.1", int(found[1]))
        # A process of its own: a thread of this one would wait for the GIL while the server works on.
        prober = [sys.executable, __file__, "--probe", str(self.process.pid), found[1]]
        self.prober = subprocess.Popen(prober, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.prober.stdout and self.prober.stdout.readline() == b"connected\n"

    def text(self) -> str:
        return os.pread(self.log.fileno(), 1 << 24, 0).decode(errors="replace")

    def get(self, path: str) -> tuple[int, bytes]:
        with socket.create_connection(self.address, 60) as peer:
            peer.sendall(f"GET /{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: peer.recv(1 << 18), b""))
        return int(answer.split(None, 2)[1]), answer.partition(b"\r\n\r\n")[2]

    def settle(self) -> None:
        """Wait until the bus has nothing more to say."""
        before, still = -1, 0
        while still < 8:
            time.sleep(0.05)
            now = json.loads(self.get("api/status")[1])["source"]["messages"]
            before, still = now, still + 1 if now == before else 0

    def subscribe(self, types: list[str], buffer: int = 1 << 18) -> socket.socket:
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        peer.connect(self.address)
        text = json.dumps({"type": "subscribe", "message_types": types, "snapshot": False}).ljust(126).encode()
        peer.sendall(UPGRADE + struct.pack("!BBH", 0x81, 0xFE, len(text)) + b"\0\0\0\0" + text)
        return peer

    def check(self) -> None:
        """What holds after every case."""
        wrong = [path for path in PATHS.split() if self.get(path)[0] != 200]
        worst = self.prober.communicate(timeout=60)[0]
        peak = self.memory("VmHWM")
        must(worst, "/health is answered to the end")
        must(not wrong, f"every endpoint answers{' but ' if wrong else ''}{' '.join(wrong)}")
        must(peak < RESIDENT_MIB_MAX * MIB, f"{peak / MIB:.0f} MiB at most")
        used_sec = float(worst or 9)
        must(used_sec < HEALTH_CPU_SEC_MAX, f"{used_sec * 1e3:.0f} ms of CPU before /health was answered")
        must("Traceback" not in self.text(), f"no traceback in {len(self.text().splitlines())} lines of log")
        self.process.terminate()
        must(self.process.wait(20) == 0, "SIGTERM ends it with 0")


def probe(pid: int, port: int) -> None:
    """Ask for /health until stdin ends, then print the most CPU that `pid` used before an answer, in seconds."""
    with contextlib.suppress(PermissionError):  # else the server works on while this process waits for a core
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    worst = 0.0
    with socket.create_connection(("127.0.0.1", port), 60) as peer:
        print("connected", flush=True)
        while not select.select([sys.stdin], [], [], 0.003)[0]:
            before = cpu_of(pid)
            peer.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if b" 200 " not in peer.recv(4096)[:15]:
                return
            worst = max(worst, cpu_of(pid) - before)
    print(worst)


@contextlib.contextmanager
def served(name: str, *options: str, **how: Any) -> Iterator[Server]:
    print(f"  {name}{', built in' if how.get('builtin') else ''}", flush=True)
    server = Server(*options, **how)
    try:
        yield server
        server.check()
    except (OSError, ValueError) as error:
        must(False, f"it answers: {error!r}")
    finally:
        for process in (server.process, server.prober):
            process.kill()
            process.communicate()


@contextlib.contextmanager
def on_a_bus(name: str, builtin: bool = False) -> Iterator[tuple[Server, Callable[..., None]]]:
    """A server and a function that publishes on its bus."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as bus:
        bus.setsockopt(zmq.SNDHWM, 0)
        bus.setsockopt(zmq.LINGER, 0)
        port = bus.bind_to_random_port("tcp://127.0.0.1")
        with served(name, "--zmq-address", f"tcp://127.0.0.1:{port}", builtin=builtin) as server:
            while server.get("readyz")[0] != 200 or not bus.poll(100):
                pass
            time.sleep(0.2)

            def publish(message_type: str, body: bytes = b"", **fields: Any) -> None:
                body = body or json.dumps({"message_type": message_type, **fields}).encode()
                bus.send_multipart([message_type.encode() + b"$", body])

            yield server, publish


def growth() -> None:
    """State that grows with what the bus says, in number or in bytes."""
    long, big, many = "x" * 1000, "x" * 900_000, {f"w{n}": f"s{n}" for n in range(4096)}
    rows = [{"tag": f"tag_{n}", "unit": "ms", "avg": 1.0} for n in range(30_000)]
    for times, what, message_type, fields in (
        (20_000, "types", "t{}", lambda n: {"x": 1}),
        (20_000, "tags", "realtime_metrics", lambda n: {"metrics": [{"tag": f"t{n}", "unit": "ms", "avg": 1.0}]}),
        (30, "times 30,000 tags", "realtime_metrics", lambda n: {"metrics": rows}),
        (99, "long tags", "realtime_metrics", lambda n: {"metrics": [{"tag": f"{n}{big}", "unit": "s", "avg": 1}]}),
        (20_000, "workers", "worker_health", lambda n: {"service_id": f"w{n}", "health": {"cpu_usage": 1.0}}),
        (200, "groups of 1 MB", "worker_group_stats", lambda n: {"group_id": f"g{n}", "junk": big}),
        (200, "workers of 1 MB", "worker_health", lambda n: {"service_id": f"g{n}", "health": {"junk": big}}),
        (20_000, "phases", "credit_phase_progress", lambda n: {"stats": {"phase": f"p{n}", "requests_sent": 1}}),
        (20_000, "keys", "credit_phase_progress", lambda n: {"stats": {"phase": "profiling", f"k{n}": long}}),
        (60, "configs", "credit_phase_start", lambda n: {"stats": {"phase": f"p{n}"}, "config": {"a": big * 4}}),
        (20, "times 40,000 label sets", "realtime_server_metrics", lambda n: {"endpoint_summaries": {
            "e": {"metrics": {f"m{n}": {"type": "gauge", "series": SETS}}}}}),
        (5, "times 4,096 statuses", "worker_status_summary", lambda n: {"worker_statuses": many}),
    ):  # fmt: skip
        with on_a_bus(f"growth: {times:,} {what}") as (server, publish):
            for n in range(times):
                publish(message_type.format(n), **fields(n))
                time.sleep(0.01 if n % 200 == 0 else 0)
            server.settle()


def single() -> None:
    """Single messages that are costly to read, to search for secrets, or to show; and deep ones."""
    bodies = [
        b'{"api_key":"abcdefgh","x":[' + b"1," * (2 * MIB - 100) + b"1]}",
        b'{"' + b"_" * (3 * MIB) + b'xkey": 1}',
        *(b'{"x":"' + word * (3 * MIB // len(word)) + b'@="}' for word in (b"bearer ", b"://a", b"?a=&", b"?", b"a")),
        b'{"x":[' + b"1," * (2 * MIB - 100) + b"1]}",
        b'{"x":' + b"[" * 100_000,
        b'{"metrics":[{"tag":"x","unit":"ms","avg":NaN,"p50":1}],"stats":NaN}',
        b'{"metrics":[{"tag":"' + b"_dcgm_" * 20_000 + b'","unit":"W","avg":1.0}]}',
        b'{"x":"\xff\xfe"}',
    ]
    for depth in (60, 300, 1005):
        deep = '{"a":' * depth + "1" + "}" * depth
        bodies.append(f'{{"stats":{deep},"config":{deep},"health":{deep},"metrics":[{{"tag":{deep}}}]}}'.encode())
    types = "realtime_metrics realtime_telemetry_metrics credit_phase_start worker_health command mine".split()
    for builtin in (False, True):
        with on_a_bus("single messages", builtin) as (server, publish):
            peer = server.subscribe(["*"])
            threading.Thread(target=peer.makefile("rb").read, daemon=True).start()
            for body in bodies:
                for message_type in (*types, "process_records_result"):
                    publish(message_type, body)
                server.settle()
            for size in (3, 5, 40):  # under and over the limit of a message, and over that of results
                publish("process_records_result", b'{"results":{"x":"' + b"x" * (size * MIB) + b'"}}')
            server.settle()


def zmtp() -> None:
    """Publishers that speak ZMTP, and more of it than anybody wants; they come back each time they are refused."""
    hello = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + b"\x01" + bytes(31)
    hello += b"\x04\x1a\x05READY\x0bSocket-Type\x00\x00\x00\x04XPUB"
    topic, frame = b"\x01\x16worker_status_summary$", b"\x03" + struct.pack(">Q", MIB) + bytes(MIB)
    for name, data in (
        ("another protocol", b"HTTP/1.1 400 Bad\r\n\r\n"),
        ("a frame of 2^63", b"\x02" + struct.pack(">Q", 2**63 - 1)),
        ("pings", b"\x04\x07\x04PING\0\0" * 300_000),
        ("commands", (b"\x06" + struct.pack(">Q", 60_000) + b"\x03FOO" + bytes(59_996)) * 1000),
        ("a message without an end", topic + frame * 100),
        ("a message of 200,000 frames", topic + b"\x01\x01x" * 200_000 + b"\0\1z"),
        ("a frame of 250 MiB", topic + b"\x02" + struct.pack(">Q", 250 * MIB) + bytes(250 * MIB)),
    ):
        for builtin in (False, True):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
                with served(f"ZMTP: {name}", "--zmq-address", address, builtin=builtin):
                    end = time.monotonic() + 2
                    while (left := end - time.monotonic()) > 0:
                        listener.settimeout(left)
                        with contextlib.suppress(OSError), listener.accept()[0] as peer:
                            peer.settimeout(left)
                            peer.sendall(hello)
                            greeting = b""
                            while b"READY" not in greeting:  # libzmq accepts nothing before it has said so
                                greeting += peer.recv(4096) or b"READY"
                            peer.sendall(data)
                            while peer.recv(65536):
                                pass


def readers() -> None:
    """Requests for more than there is, and readers who do not read."""
    stats = dict.fromkeys("min max std p1 p5 p10 p25 p50 p75 p90 p95 p99".split(), 1.5)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for n in range(7190):
            metrics = [{"tag": "osl", "unit": "tokens", **stats, "avg": n * 1.1}]
            payload = json.dumps({"message_type": "realtime_metrics", "metrics": metrics})
            file.write(json.dumps({"t": (1_800_000_000 + n) * 10**9, "topic": "realtime_metrics$", "payload": payload}))
            file.write("\n")
        file.flush()
        with served("one tag 900 times; 150 readers who stall", "--replay", file.name, "--replay-speed", "0") as server:
            server.settle()
            for points in ("", "&points=7200"):
                status, body = server.get(f"api/history?tag={','.join(['osl'] * 900)}{points}")
                must(len(body) < 4 * MIB, f"{status} and {len(body):,} bytes")
            peers = [socket.create_connection(server.address) for _ in range(150)]
            for peer in peers:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                peer.sendall(b"GET /api/history?tag=osl&points=7200 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(4)
            for peer in peers:
                peer.close()


def clients() -> None:
    """Stalled WebSockets with a subscription each, beside 20 that read; made-up types; connects in a burst."""
    for builtin, pause_sec in ((False, 0.002), (True, 0.005)):  # their bytes are too many; or they wait too long
        with on_a_bus("300 stalled WebSockets", builtin) as (server, publish), contextlib.ExitStack() as stack:
            for n in range(300):
                stack.enter_context(server.subscribe(["realtime_metrics", f"mine_{n}"], 4096))
            good, heard = [stack.enter_context(server.subscribe(["realtime_metrics"])) for _ in range(20)], [b""] * 20

            def read(n: int, peer: socket.socket, heard: list[bytes] = heard) -> None:
                with contextlib.suppress(OSError):
                    for data in iter(lambda: peer.recv(MIB), b""):
                        heard[n] += b"." * data.count(b'"message_type"')

            for n, peer in enumerate(good):
                threading.Thread(target=read, args=(n, peer), daemon=True).start()
            time.sleep(1.5)
            for n in range(2500):
                publish("realtime_metrics", metrics=[{"tag": f"t{i}", "unit": "ms", "avg": n} for i in range(300)])
                publish(f"mine_{n % 300}", fill="x" * 11_000)
                time.sleep(pause_sec)
            server.settle()
            time.sleep(1)
            must(min(map(len, heard)) == 2500, f"those who read got {min(map(len, heard))} of 2,500")
            for n in range(60):
                stack.enter_context(server.subscribe([f"t{n}_{i}" for i in range(256)]))
            time.sleep(2)
            server.settle()
    with served("3,000 connects at once", "--demo", prefix=("prlimit", "--nofile=1024:20000")) as server:
        peers = [socket.socket() for _ in range(3000)]
        for peer in peers:
            peer.setblocking(False)
            peer.connect_ex(server.address)
        time.sleep(2)
        for peer in peers:
            peer.close()
        time.sleep(2)


def machine() -> None:
    """Standard streams that are not there; few descriptors."""
    program = f"{sys.executable} -B {ROOT}/aiperf_api.py --api-port 0 --linger 0"
    for streams in ("2>&-", "2>/dev/full", ">&- 2>&- <&-", "2>&1 | true; exit ${PIPESTATUS[0]}"):
        with tempfile.TemporaryDirectory() as folder:
            command = f"{program} -- sh -c 'echo ran >{folder}/ran; exit 3' {streams}"
            done = subprocess.run(["bash", "-c", command], check=False, timeout=60, stderr=subprocess.DEVNULL)
            must(done.returncode == 3 and os.path.exists(f"{folder}/ran"), f"{streams}: status {done.returncode}")
    for number in (64, 128):
        with served(f"{number} descriptors", "--demo", prefix=("prlimit", f"--nofile={number}:{number}")):
            pass


def main() -> int:
    if sys.argv[1:2] == ["--probe"]:
        probe(*map(int, sys.argv[2:]))
        return 0
    cases = {case.__name__: case for case in (machine, readers, clients, zmtp, single, growth)}
    for name in sys.argv[1:] or cases:
        print(f"{name}: {cases[name].__doc__}", flush=True)
        cases[name]()
    print("failed: " + "; ".join(failures) if failures else "all as it must be")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
