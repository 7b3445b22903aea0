# SPDX-License-Identifier: Apache-2.0
"""The program against real AIPerf, every generation of its event bus: `python3 .ci/test_real_aiperf.py`.

It needs a package index once, for AIPerf itself (kept in .venv/aiperf-VERSION, or below $AIPERF_ENVIRONMENTS), and no
network after that: the inference server, the tokenizer and the benchmark are all on this machine.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import unittest
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import real_aiperf
from processes import free_port

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENTS = pathlib.Path(os.environ.get("AIPERF_ENVIRONMENTS", ROOT / ".venv"))
VERSIONS = ("0.13.0", "0.6.0")  # with states of its own on the bus, and with commands and raw units
TIMEOUT = 90.0  # s for anything; a run takes 10 to 35
OUR_LINES = re.compile(r"\d\d:\d\d:\d\d [A-Z]+ |aiperf-api |  \w")
SECRETS = ("sk-flag-71f0c2d9a4", "sk-env-5be81d3370", "sk-header-c40f9911")
ORDER = ["waiting", "initializing", "configuring", "ready", "profiling", "processing", "stopping", "shutdown"]
ENDS = ["complete", "cancelled", "failed"]
HIDDEN = {"min_request_timestamp", "max_response_timestamp"}  # 0.6 exports these two although it hides them elsewhere


TWO_PHASES = """
schemaVersion: "2.0"
randomSeed: 7
benchmark:
  model: mock
  endpoint: {{url: {url}/v1/chat/completions, type: chat, streaming: true}}
  tokenizer: {{name: {tokenizer}}}
  dataset: {{type: synthetic, entries: 100, isl: {{mean: 64, stddev: 0}}, osl: {{mean: 10, stddev: 0}}}}
  phases:
    - {{name: low, kind: profiling, type: concurrency, requests: 60, concurrency: 2}}
    - {{name: high, kind: profiling, type: concurrency, requests: 90, concurrency: 6}}
  artifacts: {{dir: {artifacts}}}
"""


class Work:
    """What all tests share: made once, gone at the end."""

    def __init__(self) -> None:
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="real-aiperf-"))
        self.home = self.directory / "hf"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            folders = [ENVIRONMENTS / f"aiperf-{version}" for version in VERSIONS]
            self.aiperf = dict(zip(VERSIONS, pool.map(real_aiperf.make_environment, folders, VERSIONS)))
        real_aiperf.make_tokenizer(self.home, self.aiperf[VERSIONS[0]].parent / "python")
        self.mock = real_aiperf.Mock()
        self.count = 0

    def close(self) -> None:
        self.mock.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def artifacts(self) -> pathlib.Path:
        self.count += 1
        return self.directory / f"run{self.count}"

    def environment(self, **more: str) -> dict[str, str]:
        return {**real_aiperf.environment(self.home), "TMPDIR": str(self.temporary()), **more}

    def temporary(self) -> pathlib.Path:
        directory = self.directory / "t"
        directory.mkdir(exist_ok=True)
        return directory

    def profile(self, version: str, artifacts: pathlib.Path, *more: str) -> list[str]:
        flags = [] if "--concurrency" in more else ["--concurrency", "6"]
        flags += [] if "--ui" in more else ["--ui", "none"]
        return real_aiperf.profile(self.aiperf[version], self.mock.url, artifacts, *flags, *more)


class Program:
    """One aiperf_api.py as a process; everything it and its child say goes to `log`."""

    def __init__(self, work: Work, *arguments: str, environ: dict[str, str] | None = None, pty: bool = False) -> None:
        self.log = work.directory / f"log{time.monotonic_ns()}"
        command = [sys.executable, str(ROOT / "aiperf_api.py"), "--api-port", "0", *arguments]
        environ = environ or work.environment()
        self._terminal, output = os.openpty() if pty else (-1, os.open(self.log, os.O_CREAT | os.O_WRONLY, 0o600))
        self.process = subprocess.Popen(
            command,
            env=environ,
            cwd=work.directory,
            stdin=output if pty else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=_own_terminal if pty else os.setsid,  # noqa: PLW1509 -- not one thread holds a lock yet
        )
        os.close(output)
        if pty:
            threading.Thread(target=self._drain, daemon=True).start()
        self.url = self._wait_for_url()

    def _drain(self) -> None:
        with open(self.log, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(os.read(self._terminal, 65536))

    def _wait_for_url(self) -> str:
        for _ in until(lambda: f"the URL in {self.text()!r}"):
            match = re.search(r"http://127\.0\.0\.1:\d+", self.text())
            if match:
                return match[0]
            if self.process.poll() is not None:
                break
        raise AssertionError(f"ended with {self.process.returncode}: {self.text()}")

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def get(self, path: str) -> Any:
        return json.loads(self.get_text(path))

    def get_text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def type(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def wait(self) -> int:
        return self.process.wait(TIMEOUT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._terminal >= 0:
            os.close(self._terminal)


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))


def until(what: Any, seconds: float = TIMEOUT, pace: float = 0.05) -> Iterator[None]:
    """Turns of a loop that waits for something in another process; fails when it never comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(pace)
    raise AssertionError(f"waited {seconds} s for {what() if callable(what) else what}")


class Watcher(threading.Thread):
    """Follows a server while it lives: the order of its states, and everything `/ws` forwards."""

    def __init__(self, program: Program) -> None:
        super().__init__(daemon=True)
        self.program = program
        self.states: list[str] = []
        self.messages: list[str] = []
        self.updates: list[tuple[float, dict[str, Any]]] = []  # live metrics, with the time of their arrival
        self._socket = self._open()
        self._poller = threading.Thread(target=self._poll, daemon=True)
        self._poller.start()
        self.start()

    def _open(self) -> socket.socket:
        host, port = self.program.url[len("http://") :].split(":")
        connection = socket.create_connection((host, int(port)), timeout=TIMEOUT)
        key = base64.b64encode(os.urandom(16)).decode()
        connection.sendall(
            f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._file = connection.makefile("rb")
        assert b" 101 " in self._file.readline()
        while self._file.readline().strip():
            pass
        ask = json.dumps({"type": "subscribe", "message_types": ["*"]}).encode()
        connection.sendall(bytes([0x81, 0x80 | len(ask)]) + b"\0\0\0\0" + ask)
        return connection

    def run(self) -> None:
        with contextlib.suppress(OSError, ValueError, struct.error, IndexError):
            while True:
                head = self._file.read(2)
                length = head[1]
                if length == 126:
                    length = struct.unpack(">H", self._file.read(2))[0]
                elif length == 127:
                    length = struct.unpack(">Q", self._file.read(8))[0]
                payload = self._file.read(length)
                if head[0] & 15 == 9:
                    self._socket.sendall(bytes([0x8A, 0x80 | len(payload)]) + b"\0\0\0\0" + payload)
                elif head[0] & 15 == 1:
                    self._receive(payload.decode())

    def _receive(self, text: str) -> None:
        self.messages.append(text)
        message = json.loads(text)
        if message.get("message_type") == "realtime_metrics":
            self.updates.append((time.monotonic(), message))

    def _poll(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                state = self.program.get("/api/status")["state"]
                if self.states[-1:] != [state]:
                    self.states.append(state)
                time.sleep(0.05)

    def since_phase(self) -> list[str]:
        """What came from the first phase on; before it, each server finds the bus at a moment of its own."""
        return list(itertools.dropwhile(lambda text: '"credit_phase_start"' not in text, list(self.messages)))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.join(5)
        self._file.close()
        self._socket.close()
        self._poller.join(5)


class RealAIPerf(unittest.TestCase):
    work: Work

    @classmethod
    def setUpClass(cls) -> None:
        cls.work = Work()
        cls.addClassCleanup(cls.work.close)

    def setUp(self) -> None:
        self._started = time.monotonic()

    def tearDown(self) -> None:
        print(f"    {time.monotonic() - self._started:5.1f} s  {self._testMethodName}", file=sys.stderr, flush=True)

    # -- Steps

    def program(self, *arguments: str, **more: Any) -> Program:
        program = Program(self.work, *arguments, **more)
        self.addCleanup(program.close)
        return program

    def watch(self, program: Program) -> Watcher:
        watcher = Watcher(program)
        self.addCleanup(watcher.close)
        return watcher

    def wait_for_state(self, program: Program, *states: str, seconds: float = TIMEOUT) -> dict[str, Any]:
        for _ in until(lambda: f"{states}; {program.get_text('/api/status')}\n{program.text()[-3000:]}", seconds):
            status = program.get("/api/status")
            if status["state"] in states:
                break
        return dict(status)

    def wait_for_requests(self, program: Program, number: int) -> None:
        for _ in until(lambda: f"{number} requests\n{program.text()[-3000:]}"):
            progress = program.get("/api/progress")
            if not progress["warmup"] and (progress["completed"] or 0) >= number:
                return

    def wait_for_end_of_child(self, program: Program, seconds: float = TIMEOUT) -> None:
        for _ in until("the child's end", seconds):
            if "the benchmark ended" in program.text():
                break

    # -- What is checked of every run

    def check_states(self, watcher: Watcher, end: str) -> None:
        for _ in until(lambda: f"{end} in {watcher.states}", seconds=5):
            if watcher.states[-1] == end:
                break
        states = list(watcher.states)
        places = [(ORDER + ENDS).index(state) for state in states]
        self.assertEqual(places, sorted(places), states)
        if end != "failed":
            self.assertIn("profiling", states)

    def check_final_figures(self, program: Program, artifacts: pathlib.Path, run: str = "", gpus: int = 0) -> None:
        """Every metric of /api/metrics is AIPerf's own, to the last digit, and none is missing; so are those of GPUs."""
        export = json.loads((artifacts / "profile_export_aiperf.json").read_text())
        answer = program.get(f"/api/runs/{run}" if run else "/api/metrics")
        self.assertIs(answer["final"], True)
        self.check_final_telemetry(answer["telemetry"], export.get("telemetry_data"), gpus)
        ours = answer["metrics"]
        theirs = {tag: row for tag, row in export.items() if isinstance(row, dict) and "unit" in row and "avg" in row}
        self.assertGreater(len(theirs), 15)
        self.assertEqual(set(theirs) - set(ours) - HIDDEN, set())
        for tag, row in theirs.items():
            if tag in HIDDEN:
                continue
            for stat, value in row.items():
                if value is not None:
                    self.assertEqual(ours[tag].get(stat), value, (tag, stat))
        expected = theirs["request_count"]["avg"] + theirs["error_request_count"]["avg"]
        completed = answer["requests"] if run else program.get("/api/progress")["completed"]
        self.assertEqual(completed, expected)

    def check_final_telemetry(self, ours: dict[str, Any], export: dict[str, Any] | None, gpus: int) -> None:
        """`gpus` were asked for, and may be fewer than there are: AIPerf looks for some by itself."""
        endpoints = ((export or {}).get("endpoints") or {}).values()
        found = [gpu for endpoint in endpoints for gpu in endpoint["gpus"].values()]
        self.assertGreaterEqual(len(found), gpus)
        for gpu in found:
            self.assertTrue(gpu["metrics"])
            for name, theirs in gpu["metrics"].items():
                [row] = [row for tag, row in ours.items() if tag.startswith(name) and gpu["gpu_uuid"] in tag]
                for stat, value in theirs.items():
                    if value is not None:
                        self.assertEqual(row.get(stat), value, (name, stat))

    def check_workers(self, program: Program) -> None:
        workers = program.get("/api/workers")
        self.assertGreaterEqual(workers["total_workers"], 1)
        for worker, status in workers["worker_statuses"].items():
            self.assertIn(status, ("healthy", "high_load", "error", "idle", "stale"), worker)

    def check_config(self, program: Program) -> None:
        answer = program.get("/api/metrics")
        self.assertEqual(
            [answer[name] for name in ("model", "endpoint_type", "concurrency")],
            ["mock", "chat", 6],
            answer.get("model"),
        )
        self.assertIs(answer["streaming"], True)

    def check_no_secret(self, program: Program, watcher: Watcher, *files: pathlib.Path) -> None:
        pages = ["/", "/dashboard", "/report.html", "/top", "/metrics", "/openapi.json", "/api/runs/1"]
        pages += [f"/api/{name}" for name in ("metrics", "status", "progress", "workers", "config", "server-metrics")]
        pages += [f"/api/{name}" for name in ("results", "history", "clients", "runs")]
        # What the child says for itself is its own matter: 0.6 repeats its whole command line.
        ours = [line for line in program.text().splitlines() if OUR_LINES.match(line)]
        self.assertTrue(ours)
        texts = {"log": "\n".join(ours), "ws": "\n".join(watcher.messages)}
        for page in pages:
            with contextlib.suppress(urllib.error.HTTPError):
                texts[page] = program.get_text(page)
        texts.update({str(path): path.read_text(errors="replace") for path in files})
        for place, text in texts.items():
            for secret in SECRETS:
                self.assertNotIn(secret, text, place)

    # -- One command around a run

    def run_as_child(self, version: str) -> None:
        artifacts, recording = self.work.artifacts(), self.work.directory / f"recording-{version}.jsonl"
        more = ["--api-key", SECRETS[0], "--header", f"X-Api-Key: {SECRETS[2]}"]
        gpus = len(real_aiperf.GPUS) if version == "0.13.0" else 0
        more += ["--gpu-telemetry", self.work.mock.url + "/dcgm/metrics"] if gpus else []
        program = self.program(
            *("--record", str(recording), "--linger", "4", "--"),
            *self.work.profile(version, artifacts, "--request-count", "200", "--warmup-request-count", "10", *more),
            environ=self.work.environment(OPENAI_API_KEY=SECRETS[1]),
        )
        watcher = self.watch(program)
        self.wait_for_requests(program, 60)
        self.check_workers(program)
        self.check_config(program)
        status = self.wait_for_state(program, *ENDS)
        self.assertEqual(status["state"], "complete", status)
        self.wait_for_end_of_child(program)
        self.check_states(watcher, "complete")
        self.check_final_figures(program, artifacts, gpus=gpus)
        self.check_config(program)
        self.assertGreaterEqual(len(watcher.updates), 2)
        self.check_no_secret(program, watcher, recording)
        self.assertEqual(program.wait(), 0)
        self.assertEqual(list(self.work.temporary().glob("aiperf-api-*")), [])
        self.assertIn(f"Bearer {SECRETS[0]}", self.work.mock.seen()["authorizations"])

    def test_child_0_13(self) -> None:
        self.run_as_child("0.13.0")

    def test_child_0_6(self) -> None:
        self.run_as_child("0.6.0")

    # -- Attached from outside

    def run_attached(self, version: str, source: list[str], bus: list[str]) -> None:
        """Two servers that follow a run, one without pyzmq, and a third one that is stopped: it must hold up nobody."""
        artifacts = self.work.artifacts()
        program = self.program(*source, "--zmq-backend", "pyzmq")
        builtin, stopped = self.program(*source, "--zmq-backend", "builtin"), self.program(*source)
        watcher, other = self.watch(program), self.watch(builtin)
        stopper = threading.Thread(target=self.stop_while_profiling, args=(stopped,))
        stopper.start()
        environ = self.work.environment(
            AIPERF_UI_REALTIME_METRICS_ENABLED="true", AIPERF_UI_REALTIME_METRICS_INTERVAL="1"
        )
        command = self.work.profile(version, artifacts, "--request-count", "120", "--api-key", SECRETS[0], *bus)
        done = subprocess.run(
            command, env=environ, capture_output=True, timeout=TIMEOUT, cwd=self.work.directory, check=False
        )
        stopper.join()
        self.assertEqual(done.returncode, 0, done.stdout[-3000:])
        stopped.process.send_signal(signal.SIGCONT)
        self.assertIn(stopped.get("/api/status")["state"], ORDER + ENDS)
        self.wait_for_state(program, *ENDS, seconds=10)
        self.check_states(watcher, "complete")
        self.check_final_figures(program, artifacts)
        self.check_workers(program)
        self.check_same(program, builtin)
        lists: list[list[str]] = []
        for _ in until(lambda: f"the same messages: {[one[-3:] for one in lists]}", seconds=10):
            lists[:] = sorted((watcher.since_phase(), other.since_phase()), key=len)
            if lists[0] == lists[1][: len(lists[0])] and len(lists[1]) - len(lists[0]) <= 1:  # see check_same()
                break
        self.assertGreater(len(other.since_phase()), 10)
        self.assertGreaterEqual(len(watcher.updates), 2)
        self.check_no_secret(program, watcher)
        program.process.terminate()
        self.assertEqual(program.wait(), 0)

    def check_same(self, program: Program, builtin: Program) -> None:
        """What the bus said came out the same through pyzmq and through the built-in subscriber.

        But for the last message of a run: AIPerf's proxy ends with it, and one of the two may not get it any more.
        """
        status = self.wait_for_state(builtin, *ENDS, seconds=10)
        self.assertEqual(status["source"]["backend"], "builtin")
        reference = program.get("/api/status")
        self.assertEqual(reference["source"]["backend"], "pyzmq")
        for name in ("state", "phase", "benchmark_id", "stale", "error"):
            self.assertEqual(status[name], reference[name], name)
        for path in ("metrics", "progress", "workers", "config", "server-metrics", "results"):
            texts: list[str] = []
            for _ in until(lambda path=path, texts=texts: f"the same /api/{path}: {texts}", seconds=10):
                both = (one.get_text(f"/api/{path}") for one in (program, builtin))
                texts[:] = [re.sub(r'"(last_update_ns|results_exported)":\w+', "", text) for text in both]
                if len(set(texts)) == 1:
                    break

    def stop_while_profiling(self, program: Program) -> None:
        self.wait_for_requests(program, 10)
        program.process.send_signal(signal.SIGSTOP)

    def test_attached_over_tcp_0_13(self) -> None:
        self.run_attached("0.13.0", ["--zmq-host", "127.0.0.1"], ["--zmq-host", "127.0.0.1"])

    def test_attached_over_ipc_0_6(self) -> None:
        directory = str(self.work.artifacts())
        self.run_attached("0.6.0", ["--zmq-ipc-path", directory], ["--zmq-ipc-path", directory])

    # -- Kinds of run

    def test_a_sweep_of_two(self) -> None:
        artifacts = self.work.artifacts()
        flags = ["--concurrency", "2,4", "--request-count", "60"]
        program = self.program("--linger", "6", "--", *self.work.profile("0.13.0", artifacts, *flags))
        self.wait_for_end_of_child(program, 2 * TIMEOUT)
        runs = program.get("/api/runs")["runs"]
        self.assertEqual([(run["n"], run["state"]) for run in runs], [(1, "complete"), (2, "complete")])
        for number, concurrency in (("1", 2), ("2", 4)):
            folder = artifacts / f"concurrency_{concurrency}"
            self.check_final_figures(program, folder, number)
            theirs = json.loads((folder / "profile_export_aiperf.json").read_text())["benchmark_id"]
            self.assertEqual(program.get(f"/api/runs/{number}")["benchmark_id"], theirs)
        self.assertEqual(program.wait(), 0)

    def test_a_configuration_file_with_two_profiling_phases(self) -> None:
        artifacts = self.work.artifacts()
        artifacts.mkdir()
        (artifacts / "config.yaml").write_text(
            TWO_PHASES.format(url=self.work.mock.url, tokenizer=real_aiperf.TOKENIZER, artifacts=artifacts)
        )
        config = str(artifacts / "config.yaml")
        command = [str(self.work.aiperf["0.13.0"]), "profile", "--config", config, "--ui", "none"]
        program = self.program("--linger", "6", "--", *command)
        watcher = self.watch(program)
        self.wait_for_end_of_child(program)
        self.check_states(watcher, "complete")
        self.check_final_figures(program, artifacts)
        progress = program.get("/api/progress")
        self.assertEqual([progress["total"], progress["percent_complete"]], [150, 100.0])
        self.assertEqual(program.get("/api/metrics")["concurrency"], 2)
        self.assertEqual(program.wait(), 0)

    def test_a_server_that_is_down_fails_with_the_top_error(self) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        command = self.work.profile("0.13.0", self.work.artifacts(), "--request-count", "10")
        program = self.program(
            "--linger", "4", "--", *[url if word == self.work.mock.url else word for word in command]
        )
        self.wait_for_end_of_child(program)
        status, results = program.get("/api/status"), program.get("/api/results")
        self.assertEqual([status["state"], results["status"]], ["failed", "failed"], status)
        self.assertTrue(status["error"])
        self.assertEqual(sum(row["count"] for row in results["error_summary"]["errors"]), 10, results["error_summary"])
        self.assertEqual(program.wait(), 1)

    # -- Beside AIPerf's own API

    def test_beside_its_own_api_both_tell_the_same(self) -> None:
        artifacts, port = self.work.artifacts(), str(free_port())
        flags = ["--benchmark-duration", "20", "--api-port", port, "--workers-max", "2"]
        program = self.program("--linger", "0", "--", *self.work.profile("0.13.0", artifacts, *flags))
        watcher = self.watch(program)
        self.wait_for_state(program, "profiling")
        compared = 0
        for _ in until("moments to compare", seconds=30, pace=0.3):
            compared += self.compare_with(program, f"http://127.0.0.1:{port}")
            if compared >= 3:
                break
        self.assertEqual(program.wait(), 0)
        self.assertGreaterEqual(len(watcher.updates), 5)
        gaps = [after - before for (before, _), (after, _) in zip(watcher.updates, watcher.updates[1:])]
        self.assertLess(sorted(gaps)[len(gaps) // 2], 1.6, gaps)

    def compare_with(self, program: Program, their_url: str) -> bool:
        """Whether both showed the same message; if so they must agree in everything."""
        try:
            before = program.get("/api/metrics")
            with urllib.request.urlopen(their_url + "/api/metrics", timeout=5) as answer:
                theirs = json.loads(answer.read())
            with urllib.request.urlopen(their_url + "/metrics", timeout=5) as answer:
                their_text = answer.read().decode()
            our_text, after = program.get_text("/metrics"), program.get("/api/metrics")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        if not theirs["metrics"] or before["metrics"] != after["metrics"]:
            return False  # a message came in between
        latency = "request_latency"
        if theirs["metrics"].get(latency, {}).get("sum") != after["metrics"].get(latency, {}).get("sum"):
            return False  # they are one message apart
        for name in ("benchmark_id", "model", "endpoint_type", "streaming", "concurrency", "request_rate"):
            self.assertEqual(after.get(name), theirs[name], name)
        self.assertEqual(after["metrics"], theirs["metrics"])
        ours = dict(_samples(our_text))
        for name, value in _samples(their_text):
            self.assertEqual(ours.get(name), value, name)
        return True

    # -- Ends

    def test_ctrl_c_cancels_the_child_once_0_6(self) -> None:
        self.cancel("0.6.0", "--ui", "simple")

    def test_sigint_to_the_process_group_reaches_the_child_once(self) -> None:
        artifacts = self.work.artifacts()
        command = self.work.profile("0.13.0", artifacts, "--request-count", "2000")
        program = self.program("--linger", "2", "--", *command)
        self.wait_for_requests(program, 40)
        os.killpg(program.process.pid, signal.SIGINT)
        status = self.wait_for_state(program, *ENDS)
        self.assertEqual(status["state"], "cancelled", status)
        self.assertEqual(program.wait(), 0)
        self.check_was_cancelled(program, artifacts)

    def test_ctrl_c_in_its_dashboard(self) -> None:
        program = self.cancel("0.13.0", "--ui", "dashboard")
        drawn = program.text()
        begin, end = drawn.index("\x1b[?1049h"), drawn.rindex("\x1b[?1049l")  # the alternate screen of xterm
        self.assertNotIn("aiperf-api", drawn[begin:end].replace(str(ROOT), ""))

    def cancel(self, version: str, *flags: str) -> Program:
        artifacts = self.work.artifacts()
        command = self.work.profile(version, artifacts, "--request-count", "2000", *flags)
        environ = self.work.environment(TERM="xterm-256color")
        environ.pop("NO_COLOR")
        program = self.program("--linger", "2", "--", *command, pty=True, environ=environ)
        watcher = self.watch(program)
        self.wait_for_requests(program, 40)
        program.type(b"\x03")
        status = self.wait_for_state(program, *ENDS)
        self.assertEqual(status["state"], "cancelled", status)
        self.assertEqual(program.get("/api/results")["status"], "cancelled")
        self.check_states(watcher, "cancelled")
        self.assertEqual(program.wait(), 0)  # what AIPerf itself exits with
        self.check_was_cancelled(program, artifacts)
        return program

    def check_was_cancelled(self, program: Program, artifacts: pathlib.Path) -> None:
        """A second signal would have made AIPerf quit without its results."""
        self.assertNotIn("force quit immediately\n\n\n", program.text())
        export = json.loads((artifacts / "profile_export_aiperf.json").read_text())
        self.assertIs(export["was_cancelled"], True)

    def test_a_tokenizer_that_is_not_there_fails_0_13(self) -> None:
        # Data set manager and record processor fail at the same time. The first to fail ends the run, and only the data
        # set manager says so on the bus; of the other's failure 0.13 tells nobody but its terminal.
        status, watcher = self.fail_to_configure("0.13.0", tokenizer="local/none")
        if any('"dataset_configuration_failed"' in message for message in watcher.messages):
            self.assertIn("local/none", status["error"])
        else:
            self.assertIn("exit status 1", status["error"])

    def test_a_tokenizer_that_is_not_there_fails_0_6(self) -> None:
        status, _ = self.fail_to_configure("0.6.0", tokenizer="local/none")
        self.assertIn("local/none", status["error"])

    def test_a_child_that_dies_without_a_word_fails_with_its_exit_status(self) -> None:
        status, _ = self.fail_to_configure("0.13.0", "--request-count", "-1")
        self.assertIn("exit status 1", status["error"])

    def fail_to_configure(
        self, version: str, *flags: str, tokenizer: str = real_aiperf.TOKENIZER
    ) -> tuple[dict[str, Any], Watcher]:
        command = self.work.profile(version, self.work.artifacts(), *(flags or ("--request-count", "10")))
        command[command.index(real_aiperf.TOKENIZER)] = tokenizer
        program = self.program("--linger", "2", "--", *command)
        watcher = self.watch(program)
        self.wait_for_end_of_child(program)
        status = program.get("/api/status")
        self.check_states(watcher, "failed")
        self.assertTrue(status["error"], status)
        results = program.get("/api/results")
        self.assertEqual([results["status"], results["results"]], ["failed", None])
        self.assertEqual(program.wait(), 1)
        return dict(status), watcher


def _samples(text: str) -> Iterator[tuple[str, float]]:
    """(name and labels without version, value) of a Prometheus text."""
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            yield re.sub(r',version="[^"]*"', "", name), float(value)


if __name__ == "__main__":
    unittest.main(verbosity=0)
