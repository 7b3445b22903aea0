# SPDX-License-Identifier: Apache-2.0
"""Tests of aiperf_api: `python3 -m unittest` with nothing installed, or pytest with independent judges.

One class per subject, in the order of the module's rooms; names are sentences about behaviour.  With `CI=true` in the
environment the deep variants run too.
"""

from __future__ import annotations

import ast
import asyncio
import collections
import contextlib
import functools
import gc
import gzip
import importlib
import io
import itertools
import json
import logging
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unittest
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import quote

import aiperf_api


def optional(name: str, *submodules: str) -> Any:
    """Import a package that the tests can do without: None when it is not installed."""
    try:
        return [importlib.import_module(f"{name}{module}") for module in (*submodules, "")][-1]
    except ImportError:
        return None


# Independent judges: without them the module is still tested, with them its tests are.
h11 = optional("h11")
hypothesis = optional("hypothesis", ".strategies")
jsonschema = optional("jsonschema")
prometheus_client = optional("prometheus_client", ".parser", ".openmetrics.parser")
pty = optional("pty")  # not on Windows
zmq = optional("zmq")
st = hypothesis and hypothesis.strategies
parse_text = prometheus_client and prometheus_client.parser.text_string_to_metric_families
parse_openmetrics = prometheus_client and prometheus_client.openmetrics.parser.text_string_to_metric_families

# == Tools =============================================================================================================

DEEP = os.environ.get("CI") == "true"
ROOT = Path(__file__).resolve().parent
RECORDINGS = ROOT / ".ci" / "recordings"
needs_recordings = unittest.skipUnless(RECORDINGS.is_dir(), "needs the recordings in .ci/recordings")


def chopped(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@functools.cache
def wire_recording(name: str) -> tuple[tuple[int, bytes, bytes], ...]:  # (t in ns, topic, payload)
    if not RECORDINGS.is_dir():
        raise unittest.SkipTest("needs the recordings in .ci/recordings")
    with gzip.open(RECORDINGS / f"{name}.jsonl.gz", "rb") as file:
        lines = map(json.loads, file)
        return tuple((line["t"], line["topic"].encode(), line["payload"].encode()) for line in lines)


class Answer(NamedTuple):  # as a client reads it
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:  # of one connection: HTTP, then perhaps WebSocket; every wait is bounded
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def within(self, work: Any) -> Any:
        return await asyncio.wait_for(work, 10)

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def read_answer(self, method: str = "GET") -> Answer:
        head = (await self.within(self.reader.readuntil(b"\r\n\r\n"))).decode("latin-1")
        status_line, *lines = head.split("\r\n")[:-2]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers.get("content-length", 0)) if method != "HEAD" else 0
        body = await self.within(self.reader.readexactly(length))
        return Answer(int(status_line.split()[1]), headers, body)

    async def ask(self, data: bytes, method: str = "GET") -> Answer:
        self.send(data)
        return await self.read_answer(method)

    async def get(self, path: str, method: str = "GET", headers: dict[str, str] | None = None) -> Answer:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *(f"{k}: {v}" for k, v in (headers or {}).items())]
        return await self.ask(("\r\n".join(lines) + "\r\n\r\n").encode(), method)

    async def upgrade(self, path: str = "/ws", headers: dict[str, str] | None = None) -> Answer:
        key = {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        return await self.get(path, headers={"Connection": "Upgrade", "Upgrade": "websocket", **key, **(headers or {})})

    def say(self, message: Any) -> None:
        text = message if isinstance(message, bytes) else json.dumps(message).encode()
        self.send(client_frame(aiperf_api.OP_TEXT, text))

    async def read_frame(self) -> tuple[int, bytes]:
        first, size = await self.within(self.reader.readexactly(2))
        if size >= 126:
            size = int.from_bytes(await self.within(self.reader.readexactly(2 if size == 126 else 8)), "big")
        return first & 0x0F, await self.within(self.reader.readexactly(size))

    async def hear(self) -> Any:
        while True:
            opcode, payload = await self.read_frame()
            if opcode == aiperf_api.OP_TEXT:
                return json.loads(payload)
            if opcode == aiperf_api.OP_CLOSE:
                raise EOFError(payload)

    async def read_to_end(self) -> bytes:
        return bytes(await self.within(self.reader.read(-1)))

    def close(self) -> None:
        self.writer.transport.abort()


class LoopTestCase(unittest.IsolatedAsyncioTestCase):
    """A test on an event loop as the program has it: unittest's debug mode takes half of the time."""

    async def asyncSetUp(self) -> None:
        asyncio.get_running_loop().set_debug(False)
        await asyncio.sleep(0)  # what follows is no more in the step that began in debug mode

    patience_sec = 10

    async def until(self, condition: Callable[..., Any], *arguments: Any, seconds: float = 0) -> None:
        deadline = time.monotonic() + (seconds or self.patience_sec)
        while not condition(*arguments):
            self.assertLess(time.monotonic(), deadline, "it did not happen in time")
            await asyncio.sleep(0.005)

    def patch(self, **constants: Any) -> None:
        patcher = mock.patch.multiple(aiperf_api, **constants)
        patcher.start()
        self.addCleanup(patcher.stop)


class ServiceTestCase(LoopTestCase):
    """A running service and its clients, all ended with the test."""

    options: Mapping[str, Any] = {}  # of the service that each test has

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.service = await self.serve(**self.options)

    async def serve(self, **arguments: Any) -> aiperf_api.APIService:
        service = aiperf_api.APIService(**arguments)
        await service.start()
        self.addAsyncCleanup(service.stop)
        return service

    async def client(self, service: aiperf_api.APIService | None = None) -> Client:
        host, _, port = (service or self.service).url.partition("://")[2].rpartition(":")
        client = Client(*await asyncio.open_connection(host.strip("[]"), int(port)))
        self.addCleanup(client.close)
        return client

    async def get(self, path: str, service: aiperf_api.APIService | None = None, **more: Any) -> Answer:
        client = await self.client(service)
        answer = await client.get(path, **more)
        client.close()
        return answer

    async def value(self, path: str) -> Any:
        return (await self.get(path)).json

    async def open(self, service: aiperf_api.APIService | None = None) -> Client:
        client = await self.client(service)
        self.assertEqual((await client.upgrade()).headers["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
        return client

    async def listen(self, *types: str, service: aiperf_api.APIService | None = None, **more: Any) -> Client:
        client = await self.open(service)
        client.say({"type": "subscribe", "message_types": list(types), **more})
        self.assertEqual((await client.hear())["type"], "subscribed")
        return client

    def publish(self, message_type: str, **fields: Any) -> None:
        self.service.publish({"message_type": message_type, **fields})

    def feed(self, name: str, count: int | None = None, service: aiperf_api.APIService | None = None) -> None:
        """Hand the messages of a recording to a service that has no bus, on the recording's clock."""
        service = service or self.service
        for t_ns, topic, payload in wire_recording(name)[:count]:
            service.source.now_ns = lambda t_ns=t_ns: t_ns
            service._deliver([[topic, payload]])


class Bus:
    """A real XSUB/XPUB proxy with a publisher in front of it, on a free port of the loopback or a given address."""

    def __init__(self, address: str = "tcp://127.0.0.1:*") -> None:
        self.context = zmq.Context()
        # An XPUB publisher is told of subscriptions: so a test knows when nothing can be missed any more.
        self.frontend, self.backend, self.publisher = map(self.context.socket, (zmq.XSUB, zmq.XPUB, zmq.XPUB))
        for end in (self.frontend, self.backend, self.publisher):
            end.linger = end.sndhwm = end.rcvhwm = 0
        self.frontend.bind("inproc://front")
        self.backend.bind(address)
        self.address = self.backend.getsockopt(zmq.LAST_ENDPOINT).decode().strip("\0")
        self.publisher.connect("inproc://front")
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.subscribed: set[bytes] = set()

    def _run(self) -> None:
        with contextlib.suppress(zmq.ContextTerminated, zmq.ZMQError):
            zmq.proxy(self.frontend, self.backend)
        for end in (self.frontend, self.backend):  # by the thread that they belong to
            end.close()

    def has_subscribed(self, *prefixes: bytes) -> bool:
        """Return whether the subscriptions have come all the way through to the publisher."""
        while self.publisher.poll(0):
            told = self.publisher.recv()
            (self.subscribed.add if told[0] else self.subscribed.discard)(told[1:])
        return self.subscribed >= set(prefixes)

    def publish(self, *frames: bytes) -> None:
        self.publisher.send_multipart(frames)

    def stop(self) -> None:
        if not self.publisher.closed:
            self.publisher.close()
            self.context.term()  # ends the proxy
            self.thread.join(5)


# == Architecture ======================================================================================================

# The most lines of each room, banner and blank lines included: its budget in the design, and what came after, for what.
ROOMS = (
    ("Head", 80, 0, ""),
    ("Limits", 85, 0, ""),
    ("Errors", 55, 0, ""),
    ("JSON and secrets", 240, 4, "what a text may hold, as Python and nested JSON show it"),
    ("WebSocket frames", 175, 0, ""),
    ("HTTP", 560, 0, ""),
    ("Router and static files", 120, 0, ""),
    ("Metrics", 150, 0, ""),
    ("Prometheus text", 250, 0, ""),
    ("Benchmark", 1080, 65, "sweeps, the artifacts beside a run, why a run failed, silence, bounds in every field"),
    ("Bus", 650, 0, ""),
    ("Hub", 310, 0, ""),
    ("Connection", 350, 0, ""),
    ("Service", 830, 38, "sweeps and their end, the report, the text screen, answers that are shared"),
    ("Command line", 330, 107, "a benchmark behind --: signals, its output, its last words"),
)
MODULE_LINES, MODULE_BYTES = 5300, 277_500  # 240,000 in the design
TEST_LINES, README_LINES, FUNCTION_LINES, LIMITS = 5500, 260, 60, 60

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MUTABLE_DISPLAYS = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
MUTABLE_CALLS = "Counter array bytearray defaultdict deque dict list set".split()
# Modules, calls and attributes that belong to some rooms alone; import statements are not counted.
WALLS = {
    **dict.fromkeys("asyncio logging select selectors signal socket ssl subprocess threading time".split(), range(10, 15)),
    **dict.fromkeys("get_data glob iterdir listdir open read_bytes read_text rglob scandir".split(), (6, 10, 14)),
    **dict.fromkeys("argparse environ environb getenv putenv".split(), (14,)),
    "zmq": (0, 10),
}  # fmt: skip
# What a room must not know of although it stands above: the bus neither HTTP nor state, the hub not what the bytes mean.
ROOM_WALLS = {10: (5, 6, 9), 11: (6, 9), 12: (9,)}


class SourceRules:
    """One module's source, and the places where it breaks a rule, each as `line N: what`."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        self.tree = ast.parse(source)
        self.nodes = list(ast.walk(self.tree))
        found = [(line, re.match(r"# == (\d+) == ", text)) for line, text in enumerate(self.lines, 1)]
        self.banners = [(line, int(match[1])) for line, match in found if match]
        self.modules: dict[str, str] = {}  # by the name that an import binds
        self.defined: dict[str, int] = {}  # the room of each name of the module
        for block in self.tree.body:
            blocks = isinstance(block, (*FUNCTIONS, ast.ClassDef))
            loops = [node.target for node in ast.walk(block) if isinstance(node, ast.comprehension)]
            local = {name for target in loops for name in ast.walk(target)}
            for node in [block] if blocks else ast.walk(block):
                if blocks or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in local):
                    self.defined.setdefault(getattr(node, "name", getattr(node, "id", "")), self.room(block.lineno))
                elif isinstance(node, (ast.Import, ast.ImportFrom)):
                    for alias in node.names:
                        name = getattr(node, "module", None) or alias.name
                        self.modules[(alias.asname or alias.name).split(".")[0]] = name.split(".")[0]

    def room(self, line: int) -> int:
        return max((number for start, number in self.banners if start <= line), default=0)

    def faults(self) -> list[str]:
        rules = (self._arrows(), self._walls(), self._mutables(), self._lengths())
        return [f"line {line}: {what}" for line, what in sorted(itertools.chain(*rules))]

    def _uses(self, node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[tuple[int, str]]:
        """Yield (line, name) for each use of a name that no enclosing function binds; annotations count."""
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            bound = {inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)}
            bound |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            local = local | bound
        if isinstance(node, ast.Name) and node.id not in local:
            yield node.lineno, node.id
        for child in ast.iter_child_nodes(node):
            yield from self._uses(child, local)

    def _arrows(self) -> Iterator[tuple[int, str]]:
        for line, name in self._uses(self.tree):
            here, there = self.room(line), self.defined.get(name, 0)
            if there > here or there in ROOM_WALLS.get(here, ()):
                yield line, f"room {here} uses {name} of room {there}"

    def _walls(self) -> Iterator[tuple[int, str]]:
        used = {(line, self.modules.get(name, "")) for line, name in self._uses(self.tree)}
        called = [node.func for node in self.nodes if isinstance(node, ast.Call)]
        used |= {(node.lineno, getattr(node, "attr", getattr(node, "id", ""))) for node in called}
        used |= {(n.lineno, n.attr) for n in self.nodes if isinstance(n, ast.Attribute) and "env" in n.attr}
        for line, name in used:
            if self.room(line) not in WALLS.get(name, (self.room(line),)):
                yield line, f"room {self.room(line)} uses {name}"

    def _mutables(self) -> Iterator[tuple[int, str]]:
        yield from ((node.lineno, "global") for node in self.nodes if isinstance(node, ast.Global))
        for node in itertools.chain(self.tree.body, *(n.body for n in self.nodes if isinstance(n, ast.ClassDef))):
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and not ast.unparse(node).startswith("__all__"):
                called = ast.unparse(node.value.func).split(".")[-1] if isinstance(node.value, ast.Call) else ""
                if isinstance(node.value, MUTABLE_DISPLAYS) or called in MUTABLE_CALLS:
                    yield node.lineno, "mutable"

    def _lengths(self) -> Iterator[tuple[int, str]]:
        for node in self.nodes:
            if isinstance(node, FUNCTIONS) and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES:
                yield node.lineno, f"{node.name}() is too long"


class TestArchitecture(unittest.TestCase):  # on the module, and on samples that break each rule
    rules = SourceRules(Path(aiperf_api.__file__).read_text(encoding="utf-8"))

    def test_the_module_keeps_every_rule(self) -> None:
        self.assertEqual(self.rules.faults(), [])

    def test_rooms_stand_in_order_within_their_lines(self) -> None:
        banners = [self.rules.lines[line - 1] for line, _ in self.rules.banners]
        wanted = [f"# == {number} == {room[0]} ".ljust(120, "=") for number, room in enumerate(ROOMS)]
        self.assertEqual(banners, wanted[1:])  # the head has none
        lines = collections.Counter(self.rules.room(line) for line in range(1, len(self.rules.lines) + 1))
        over = {room[0]: lines[number] for number, room in enumerate(ROOMS) if lines[number] > room[1] + room[2]}
        self.assertEqual(over, {}, "room: lines")
        self.assertEqual([name for name, _, more, reason in ROOMS if bool(more) != bool(reason)], [])
        self.assertLessEqual(len(self.rules.lines), MODULE_LINES)
        self.assertLessEqual(Path(aiperf_api.__file__).stat().st_size, MODULE_BYTES)

    def test_limits_tests_and_readme_stay_few_and_short(self) -> None:
        limits = [name for name, room in self.rules.defined.items() if room == 1 and name.isupper()]
        self.assertLessEqual(len(limits), LIMITS)
        for file, most in ((Path(__file__), TEST_LINES), (ROOT / "README.md", README_LINES)):
            if file.exists():
                self.assertLessEqual(len(file.read_text(encoding="utf-8").splitlines()), most, file.name)

    def test_every_rule_can_be_broken(self) -> None:
        later = "# == 2 == X\ndef later(): pass"
        uses = ("def f(): return later()", "def f(x: later): pass", "x = later")
        for sample in (
            *(f"# == 1 == X\n{use}\n{later}" for use in uses),
            "# == 9 == X\nclass State: pass\n# == 11 == X\nx = State",
            *(f"import {name}\n# == 9 == X\nx = {name}.y" for name in ("asyncio", "zmq", "time", "argparse")),
            "from socket import y\n# == 5 == X\ndef f(): return y()",
            *(f"# == 13 == X\ndef f(): {call}" for call in ("open('x')", "Path('x').read_bytes()", "os.environ")),
            *("x = {}", "x: list = []", "x = set()", "class C:\n    x = {1: 2}", "def f():\n    global x"),
            "def f():\n" + "    x = 1\n" * FUNCTION_LINES,
        ):
            self.assertEqual(len(SourceRules(sample).faults()), 1, sample)
        for sample in (f"# == 1 == X\ndef f(later): return later\n{later}", "X = (1,)", "X = frozenset({1})"):
            self.assertEqual(SourceRules(sample).faults(), [], sample)

    def test_importing_the_module_does_nothing_and_imports_little(self) -> None:
        program = """if True:
            import sys, threading, asyncio, argparse, subprocess
            seen, before = [], set(sys.modules)
            watched = ("socket.", "subprocess.", "os.putenv", "os.mkdir", "os.remove", "signal.", "shutil.")
            def hook(event, arguments):
                if event.startswith(watched) or (event == "open" and any(c in str(arguments[1]) for c in "wax+")):
                    seen.append(event)
            sys.addaudithook(hook)
            import aiperf_api
            new = {name: getattr(sys.modules[name], "__file__", "") or "" for name in set(sys.modules) - before}
            roots = {name.split(".")[0] for name, file in new.items() if "site-packages" in file}
            print(seen, threading.active_count(), sorted(roots - {"zmq", "orjson"}))
        """
        command = [sys.executable, "-B", "-c", program]
        folder = Path(aiperf_api.__file__).resolve().parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
        self.assertEqual(done.stdout, "[] 1 []\n")


STATIC = ROOT / "static"
needs_static = unittest.skipUnless((STATIC / "dashboard.html").exists(), "needs the folder static/ beside it")


def needs_program(*names: str) -> Callable[[Any], Any]:
    missing = [name for name in names if shutil.which(name) is None]
    return unittest.skipIf(bool(missing), f"needs the {', '.join(missing)} program")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Program:
    """The server as its users start it, in a process of its own, on a port of its choice: `with Program(...) as url`."""

    def __init__(self, *arguments: str, program: Sequence[str] = (str(ROOT / "aiperf_api.py"),)) -> None:
        self.command = [sys.executable, *program, "--api-port", "0", *arguments]
        self.lines = []  # what it said before it was ready

    def __enter__(self) -> str:
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if line.startswith("  source"):
                return next(line for line in self.lines if line.startswith("aiperf-api")).split()[-1]
        raise AssertionError(f"it ended: {self.lines}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.stderr.read()
        self.process.stderr.close()
        self.process.wait()


def run_program(*arguments: str, program: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(program or (str(ROOT / "aiperf_api.py"),)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def status_when(url: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while not condition(status := json.loads(fetched(url + "/api/status"))):
        assert time.monotonic() < deadline, f"it did not happen in time: {status}"
        time.sleep(0.05)
    return status


# == 3 == JSON and secrets =============================================================================================

decoders = mock.patch.object(aiperf_api, "orjson", None), contextlib.nullcontext()  # json alone, then what is there


class TestJSON(unittest.TestCase):  # every case over orjson and over json, where both are there
    def test_both_refuse_what_is_not_json(self) -> None:
        bad = (
            b"", b"NaN", b"-Infinity", b"1e400", b"-1e400", b"01", b"-", b"'a'", b'{"a":1,}', b"1 2", b"[1", b"\x0b1",
            b'"\x01"', rb'"\x41"', b'"\xff"', b'"\xed\xa0\x80"', rb'"\ud800"', rb'"\udc00x"', b"\xef\xbb\xbf1",
            b"\xc2\xa01", b"9" * 400, b"1" * 5000, b"[" * 100_000, b'{"a":' * 100_000,
        )  # fmt: skip
        for data in bad:
            for decoder in decoders:
                with self.subTest(data[:20]), decoder:
                    self.assertRaises(aiperf_api.JSONError, aiperf_api.json_load, data)

    def test_both_read_the_same_values_of_the_same_types(self) -> None:
        good = {
            b"12345678901234567890123": 1.2345678901234568e22, b"18446744073709551615": 18446744073709551615,
            b"18446744073709551616": 1.8446744073709552e19, b"-9223372036854775808": -9223372036854775808,
            b"-9223372036854775809": -9.223372036854776e18, b'{"a":1,"a":2}': {"a": 2}, b"1e-400": 0.0, b"-0": 0,
            rb'"\ud83d\ude00"': "\U0001f600", b" [1 , 2.50, null]\r\n\t": [1, 2.5, None], b"9" * 300: float("9" * 300),
        }  # fmt: skip
        for data, value in good.items():
            for decoder in decoders:
                with self.subTest(data[:30]), decoder:
                    read = aiperf_api.json_load(data)
                    self.assertEqual((read, type(read)), (value, type(value)))

    def test_both_take_64_levels_and_no_more(self) -> None:
        flat = b'["[[[","' + b"{" * 100 + b'"' + b",[],{}" * 100 + b"]"  # neither a string nor many beside is depth
        deepest = (b"[" * 64 + b"]" * 64, b'{"a":[' * 32 + b"1" + b"]}" * 32, b"[" * 62 + flat + b"]" * 62)
        for decoder in decoders:
            with decoder:
                for text in (*deepest, flat, b'"' + b"[" * 1000 + b'"'):
                    self.assertEqual(aiperf_api.json_load(text), json.loads(text))
                for text in (*deepest, b"[" * 960 + b"]" * 960, b'["]",' * 70 + b"1" + b',"["]' * 70):
                    with self.subTest(text[:20]), self.assertRaisesRegex(aiperf_api.JSONError, "64|depth|recursion"):
                        aiperf_api.json_load(b'{"x":' + text + b"}")

    def test_a_nan_of_python_costs_its_own_value_only(self) -> None:
        value = {"a": [1.5, float("nan"), float("-inf"), float("inf")], "b": "NaN"}
        for decoder in decoders:
            with decoder:
                shown = {"a": [1.5, None, None, None], "b": "NaN"}
                self.assertEqual(aiperf_api.json_load_lenient(json.dumps(value).encode()), (shown, True))
                self.assertEqual(aiperf_api.json_load_lenient(b'{"b":"NaN"}'), ({"b": "NaN"}, False))
                text = rb'["a\\\\",NaN,"\"NaN,",{"NaN":"\\\"Infinity"},-Infinity]'
                self.assertEqual(aiperf_api.json_load_lenient(text)[0], json.loads(text, parse_constant=lambda _: None))
                for bad in (b"{NaN", b"[NaN,1e400]", b"nan", b'["NaN"', b"[" * 65 + b"NaN" + b"]" * 65):
                    self.assertRaises(aiperf_api.JSONError, aiperf_api.json_load_lenient, bad)

    def test_both_write_the_same_bytes(self) -> None:
        nan, inf = float("nan"), float("inf")
        values = (
            ([nan, inf, -inf, 1.5], b"[null,null,null,1.5]"), (2**64, b"18446744073709551616"),
            ({"n": [-(2**70)]}, b'{"n":[-1180591620717411303424]}'), ({1: 1, None: 2, 1.5: 4}, b'{"1":1,"null":2,"1.5":4}'),
            ("\ud800x", b'"\xef\xbf\xbdx"'), ({"\udfff": nan}, b'{"\xef\xbf\xbd":null}'), ((1, (2,)), b"[1,[2]]"),
            ("\u00e9\u2028\x7f\n", b'"\xc3\xa9\xe2\x80\xa8\x7f\\n"'),
        )  # fmt: skip
        for decoder in decoders:
            with decoder:
                for value, text in values:
                    self.assertEqual(aiperf_api.json_bytes(value), text)
                indented = b'{\n  "a": [\n    1,\n    {}\n  ]\n}'
                self.assertEqual(aiperf_api.json_bytes({"a": [1, {}]}, pretty=True), indented)
                for unfit in (b"x", {1, 2}, object()):
                    self.assertRaises(TypeError, aiperf_api.json_bytes, unfit)

    @unittest.skipUnless(vars(aiperf_api)["orjson"], "needs the orjson package")
    def test_random_texts_are_read_alike(self) -> None:
        dice = random.Random(1)
        for _ in range(20_000 if DEEP else 5_000):
            text = "".join(dice.choices('{}[]",:0123456789.eE+-\\u dD8fntrue ls\u00e9', k=dice.randrange(12)))
            results = []
            for decoder in decoders:
                with decoder, contextlib.suppress(aiperf_api.JSONError):
                    results.append(repr(aiperf_api.json_load(text.encode())))
            self.assertIn(results, ([], results[:1] * 2), text)


SECRET = "sk-1234567890abcdef"  # looks random: it is remembered


class TestSecrets(unittest.TestCase):  # hidden by key, by form and by value; all else is left alone, byte for byte
    def setUp(self) -> None:
        self.secrets = aiperf_api.Secrets()

    def test_keys_in_every_spelling(self) -> None:
        strong = """api_key apiKey API-KEY x-api-key api.key OPENAI_API_KEY api_keys api_key_2 authorization Proxy-Authorization
            accessToken ACCESS_TOKEN auth_token refresh_tokens AIPERF_API_TOKEN password db.password Passwd passphrase secret
            client_secret credentials aws_secret_access_key private_key_path Set-Cookie bearer bearer_token jwt AUTH"""
        weak = "token hf_token key ssh_key AZURE_OPENAI_KEY DB_PASS eos_token time_to_second_token monkey"
        neither = "tag tokens max_tokens output_token_throughput key_count author use_auth header tokenizer"
        for keys, roles in ((strong, ["strong"]), (weak, ["weak"]), (neither, ["", "headers"])):
            for key in keys.split():
                self.assertIn(aiperf_api.key_role(key), roles, key)

    def test_what_is_hidden(self) -> None:
        for value, shown in (
            ({"api_key": "x", "n": 1}, {"api_key": "***", "n": 1}),
            ({"auth": {"user": "u", "n": 5, "l": ["a", None]}}, {"auth": {"user": "***", "n": 5, "l": ["***", None]}}),
            ({"hf_token": SECRET, "eos_token": "</s>"}, {"hf_token": "***", "eos_token": "</s>"}), (["api_key", "x"], ["api_key", "***"]),
            ({"extra": [["api_key", "x"], ["seed", "0"]]}, {"extra": [["api_key", "***"], ["seed", "0"]]}),
            (["run", "--api-key", "x", "--model", "m"], ["run", "--api-key", "***", "--model", "m"]),
            (["--header", "X-A: v", "-H", f"x-api-key: {SECRET}"], ["--header", "X-A: ***", "-H", "x-api-key: ***"]),
            ({"headers": {"X-A": "v", "N": 1}}, {"headers": {"X-A": "***", "N": 1}}),
            ({"headers": [["X-A", "v"], ["X-B", "w"]]}, {"headers": [["X-A", "***"], ["X-B", "***"]]}),
            ({"extra_headers": ["X-A: v", "X-B: w"]}, {"extra_headers": ["X-A: ***", "X-B: ***"]}),
            ({"name": "DB_PASSWORD", "value": "x", "n": "x"}, {"name": "DB_PASSWORD", "value": "***", "n": "x"}),
            ([{"key": "HF_TOKEN", "value": SECRET}, ["-H", "X-A: v"]], [{"key": "HF_TOKEN", "value": "***"}, ["-H", "X-A: ***"]]),
            ({"header": ["X-A:v"], "http_header": "X-B: w"}, {"header": ["X-A: ***"], "http_header": "X-B: ***"}),
        ):  # fmt: skip
            self.assertEqual(self.secrets.redact(value), shown)
            self.assertIs(self.secrets.redact(shown), shown)

    def test_what_is_not(self) -> None:
        row = {"tag": "request_latency", "header": "Latency: p99", "unit": "ms", "avg": 1.5}
        unchanged = (
            {"api_key": None, "token": "", "password": False, "secret": 7, "credentials": [], "cookie": "***"},
            {"metric_results": {"time_to_second_token": {**row, "unit": "ms"}}, "time_to_first_token": {"unit": "ms"}},
            {"rows": {"headers": ["tag", "avg", "p99"]}, "header": "Request Latency", "records": [row]},
            {"primary_key": "id_column", "token": "Hello world", "tokenizer": "gpt2", "max_tokens": "512"},
            {"logprobs": [{"token": " metrics"}, {"token": "request_latency"}], "model": "key-model/secretary-7b"}, [1, 2.5, None, True],
            ["tokenizer", "x"], {"first_token": "meta-llama/Llama-3.1-8B"}, {"sort_key": "time_to_first_token_p99_ms"},
            {"name": "x", "value": "y"},
        )  # fmt: skip
        for value in unchanged:
            self.assertIs(self.secrets.redact(value), value)

    def test_free_text(self) -> None:
        for text, shown in (
            ("sent Authorization: Bearer abc.def-1, then", "sent Authorization: ***"),
            ("Bearer abc.def-1 BEARER\tabc1 Bearer%20abc1", "Bearer *** BEARER\t*** Bearer%20***"), ("Basic dXNlcjpwdw==", "Basic ***"),
            ("{'x-api-key': 'a b', \"password\": \"c\"}", "{'x-api-key': '***', \"password\": \"***\"}"),
            ("api_key=a&n=1 OPENAI_API_KEY=b; api%5Fkey=c", "api_key=***&n=1 OPENAI_API_KEY=***; api%5Fkey=***"),
            (f"--api-key {SECRET} --hf-token '{SECRET}x'", "--api-key *** --hf-token '***'"),
            (f"Incorrect API key provided: {SECRET}.", "Incorrect API key provided: ***"),
            ("http://user:pw@host:1/x?token=a", "http://***@host:1/x?token=a"),
            ("http://u:p@x@h/ http://h/?key=v&sig=" + SECRET, "http://***@h/ http://h/?key=v&sig=" + SECRET),
            (f"https://gw/v1?api-key=a&token={SECRET}#x", "https://gw/v1?api-key=***&token=***"),
            ('\\"api_key\\": \\"a\\"', '\\"api_key\\": \\"***"'), ("Authorization: ApiKey a\nb", "Authorization: ***\nb"),
            ('authorization: Digest username="b", response="r"', "authorization: ***"), ("Cookie: a=b; c=d", "Cookie: ***"),
            (r'-H "Authorization: Digest a=\"b\", c=\"d\"" x', '-H "Authorization: ***" x'), ("password =     a", "password =     ***"),
            ("password:\n  a", "password:\n  ***"), ("password=HUNTER secret=true-1", "password=*** secret=***"),
            ("password=***a&api_key=$ecret1", "password=***&api_key=***"), ("x --api-key a -m b", "x --api-key *** -m b"),
            ("x --verbose --my-secret 'a b' -m", "x --verbose --my-secret '***' -m"), ("['--api-key', 'a']", "['--api-key', '***']"),
            ("[('api-key', 'a1b2c3d4e5f6a7b8c9d0')]", "[('api-key', '***')]"), ("api_key%3Da", "api_key%3D***"),
            ("api_key=b'a' 'api_key': u'b' api_key=SecretStr('c')", "api_key=b'***' 'api_key': u'***' api_key=SecretStr('***')"),
            (f"(b'x-api-key', b'{SECRET}') Bearer 'a.b'", "(b'x-api-key', b'***') Bearer '***'"),
            ("env 'API_KEY=abc1' x", "env 'API_KEY=***' x"),
            (r'\\\"api_key\\\": \\\"a', r'\\\"api_key\\\": \\\"***'), ("Authorization: Bearer 'a.b'", "Authorization: Bearer '***'"),
            ("curl -H 'X-A: b c' --header X-B:d h", "curl -H 'X-A: ***' --header X-B:*** h"),
        ):  # fmt: skip
            self.assertEqual(self.secrets.redact(text), shown)
            self.assertEqual(self.secrets.redact([text]), [shown])
            self.assertIs(self.secrets.redact(shown), shown)
        for text in (
            "AIPERF_API_TOKEN and --api-token", "Authorization: Bearer TOKEN", "curl -H 'Authorization: Bearer $TOKEN'",
            "the bearer of bad news", "Basic authentication", "password: none", "http://host/a@b and mail me@x.org",
            "http://h/a?token_count=5&max_tokens=7&key=v", "primary key: id", "api_key=***", "a token of 16 characters",
            "İ key", "2 tokens per second", "tcp://127.0.0.1:5664,x@y", "--api-key $MY_KEY -H 'X-A: <your key>'", "password=none",
            "the token meta-llama/Llama-3.1-8B-Instruct",
        ):  # fmt: skip
            self.assertIs(self.secrets.redact(text), text)

    def test_only_what_looks_random_is_remembered(self) -> None:
        self.secrets.redact({"auth": "metrics", "token": "request_latency", "secret": "profiling", "api_key": "ollama"})
        rows = {"metrics": [{"tag": "request_latency"}], "phase": "profiling", "model": "ollama/llama3"}
        self.assertIs(self.secrets.redact(rows), rows)
        both = [{"error": f"401 for {SECRET}!", "n": 12345}, {"config": {"apiKey": f"Bearer {SECRET}"}}]
        shown = [{"error": "401 for ***!", "n": 12345}, {"config": {"apiKey": "***"}}]
        self.assertEqual(self.secrets.redact(both), shown)  # though its key comes later
        self.assertEqual(self.secrets.redact({SECRET: f"{SECRET}s"}), {SECRET: "***s"})  # keys are never changed

    def test_secrets_of_a_run_are_forgotten_and_known_ones_are_not(self) -> None:
        own, long = "t0ken-of-this-server", "eyJ" + "a1b2" * 300
        secrets = aiperf_api.Secrets([own, "short1", "no-digit-in-this-one"])
        secrets.redact({"api_key": long})
        self.assertEqual(secrets.redact(f"<{long}> {own} no-digit-in-this-one"), "<***> *** no-digit-in-this-one")
        secrets.forget_run()
        self.assertEqual(secrets.redact(f"{SECRET} {long[:20]} {own}"), f"{SECRET} {long[:20]} ***")
        secrets.redact({"api_key": SECRET})
        secrets.forget_run()  # which that message began
        self.assertEqual(secrets.redact(f"401 for {SECRET}"), "401 for ***")
        secrets = aiperf_api.Secrets([SECRET, own])
        for number in range(aiperf_api.SECRETS_MAX + 6):  # of a run, the newest are known
            secrets.redact({"api_key": f"junk-secret-{number:04}"})
        text = f"junk-secret-0005 junk-secret-0006 {SECRET} {own}"
        self.assertEqual(secrets.redact(text), "junk-secret-0005 *** *** ***")

    def test_a_payload_without_a_secret_is_the_same_object(self) -> None:
        for payload in (
            b'{"a": 1,  "token_count":2, "t": {"time_to_first_token" : {"avg": 1}}}', rb'[{"a":1},{"a":"\"a\": {\"a\":1}"}, ":", [], {}]',
            b'"x"',
        ):  # fmt: skip
            self.assertIs(self.secrets.redact_payload(payload, json.loads(payload))[0], payload)
        for payload, shown in (
            (b'{"api_key": "a", "n":1.50}', b'{"api_key":"***","n":1.5}'), (rb'{"api\u005fkey":"x12345"}', b'{"api_key":"***"}'),
            (b'{"api_key":"sk-1", "api_key" :"***"}', b'{"api_key":"***"}'),  # only its reader has forgotten the first
            (b'{"x":[{"a":"sk-1","b":{},"a":"x"}]}', b'{"x":[{"a":"x","b":{}}]}'),
            (rb'{"api_key":"sk-1","api_key":"","a":"\u003a"}', b'{"api_key":"","a":":"}'),
            (b'{"x":"%s"}' % (b"x" * (512 * 1024 + 1)), b'{"x":"***"}'),  # too long to be looked through
        ):  # fmt: skip
            self.assertEqual(self.secrets.redact_payload(payload, json.loads(payload))[0], shown)

    def test_no_message_holds_the_loop(self) -> None:
        """Of 128 KiB, the longest that is looked through, each takes 10 to 60 ms of CPU; with a pattern that is quadratic
        it is seconds."""
        size = aiperf_api.BUS_TEXT_BYTES_MAX
        pieces = "secret|api-key|pass|access_|_|aA|bearer |://a|?a=&|?|api_key=|key=|key |secret: '|a@|\\\"".split("|")
        more = '--a |-|-H a:|--api-key |cookie:|cookie: ="|pass$A|password=<a |key  \n|secret=true.|key a1b2c3d4e5'
        pieces += more.split("|")
        texts = [(piece * (size // len(piece) + 1))[:size] for piece in (*pieces, "key " * 4 + "x" * size)]
        values = [*texts, *(f"secret{text}" for text in texts), {"key": f"{texts[5]}1"}]
        values += [{texts[5] + "key": "v"}, {"headers": [["k", "x"]] * (size // 12)}]
        values += [[{}] * (size // 3), [["key", "x"]] * (size // 12), [":"] * (size // 5)]
        values += [{f"{n}": {} for n in range(size // 12)}, {f"{n}key": "x" for n in range(size // 14)}]
        alike = {f"{n}_secret": "a" * (n + 20) + "1" for n in range(40)}
        values += [{**alike, "text": "a" * size}, {"secret": "b" * 40 + "1", "text": texts[0]}]
        for value in values:
            payload = json.dumps(value).encode()
            started = time.process_time()
            aiperf_api.Secrets().redact_payload(payload, value)
            self.assertLess(time.process_time() - started, 0.25, payload[:40])


class TestPrintable(unittest.TestCase):  # CR/LF in log lines, control characters in a terminal, bus strings included
    def test_other_characters_are_escaped_it_is_cut_and_tokens_are_never_logged(self) -> None:
        for text, shown in (
            ("a\r\nb\x1b[31m\x7f\u2028é\ud800\\", r"a\r\nb\x1b[31m\x7f\u2028\xe9\ud800\\"), (b"a\xff\n", r"a\xff\n"),
            ("x" * 200, "x" * 200), ("x" * 201, "x" * 200 + "..."), (b"\xff" * 1_000_000, r"\xff" * 50 + "..."),
        ):  # fmt: skip
            self.assertEqual(aiperf_api.printable(text), shown)
        for text in (
            "/ws?token=s3cret&x=1", "/ws?x=1&token=s3cret", "/?%74oken=s3cret", "/?t%6Fk%65N=s3cret", "Bearer s3cret",
            "chat, aiperf.token.s3cret", "http://h/?TOKEN=s3,cret",
        ):  # fmt: skip
            self.assertNotIn("cret", aiperf_api.printable(text))
        self.assertEqual(aiperf_api.printable("/ws?token=s3cret&x=1"), "/ws?token=***&x=1")
        self.assertEqual(aiperf_api.printable("/?tokens=5"), "/?tokens=5")


# == 4 == WebSocket frames =============================================================================================

MASK = b"\x37\xfa\x21\x3d"  # the one of RFC 6455 5.7


def client_frame(opcode: int, payload: bytes = b"", fin: bool = True, rsv: int = 0) -> bytes:
    """A masked frame, as a client sends it; made here without any code of the module."""
    size = len(payload)
    short = bytes((0x80 | size,)) if size < 126 else b""
    length = short or (struct.pack("!BH", 254, size) if size <= 0xFFFF else struct.pack("!BQ", 255, size))
    key = int.from_bytes((MASK * (size // 4 + 1))[:size], "big")
    masked = (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")
    return bytes((fin << 7 | rsv << 4 | opcode,)) + length + MASK + masked


def client_close(code: int, reason: bytes = b"") -> bytes:
    return client_frame(8, struct.pack("!H", code) + reason)


def fragments(opcode: int, *parts: bytes) -> list[bytes]:
    last = len(parts) - 1
    return [client_frame(0 if at else opcode, part, fin=at == last) for at, part in enumerate(parts)]


def feed_all(parser: aiperf_api.FrameParser, pieces: Iterable[bytes]) -> list[aiperf_api.Event]:
    return [event for piece in pieces for event in parser.feed(piece)]


def echo(pieces: Iterable[bytes], max_message: int = 32 << 20) -> list[tuple[int, bytes]]:
    sent = []
    for kind, data, code, _ in feed_all(aiperf_api.FrameParser(max_message), pieces):
        if kind in ("close", "failure"):
            sent.append(closes(code) if code else (8, b""))
        elif kind != "pong":
            sent.append(({"text": 1, "binary": 2, "ping": 10}[kind], data.encode() if kind == "text" else data))
    return sent


def closes(code: int) -> tuple[int, bytes]:
    return (8, struct.pack("!H", code))


TEXT, PING, BYE = client_frame(1, b"Hello, world!"), client_frame(9), client_close(1000)
TEXT_BACK, PONG_BACK, BYE_BACK, BROKEN, NOT_UTF8 = (1, b"Hello, world!"), (10, b""), *map(closes, (1000, 1002, 1007))
COSMOS = b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5"  # the Greek word, with a character of three bytes
GREETING = "Hello-µ@ßöäüàá-UTF-8!!".encode()
ONE, TWO, OCTETS = b"fragment1", b"fragment2", b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff"

# The Autobahn suite's cases: number, frames sent, frames expected of an echo server.
# fmt: off
AUTOBAHN_CASES: list[tuple[str, list[bytes], list[tuple[int, bytes]]]] = [
    *((f"1.{group}.{at}", [client_frame(group, fill * size), BYE], [(group, fill * size), BYE_BACK])
      for group, fill in ((1, b"*"), (2, b"\xfe")) for at, size in enumerate((0, 125, 126, 127, 128, 65535, 65536), 1)),
    *((f"2.{at}", [client_frame(9, data), BYE], [(10, data), BYE_BACK]) for at, data in ((1, b""), (2, ONE), (3, OCTETS), (4, b"\xfe" * 125))),
    ("2.5", [client_frame(9, b"\xfe" * 126), BYE], [BROKEN]),
    *(("2.7-8", [client_frame(10, data), BYE], [BYE_BACK]) for data in (b"", b"unasked")),
    ("2.9", [client_frame(10, b"unasked"), client_frame(9, b"asked"), BYE], [(10, b"asked"), BYE_BACK]),
    ("2.10", [*(client_frame(9, b"%d" % at) for at in range(10)), BYE], [*((10, b"%d" % at) for at in range(10)), BYE_BACK]),
    ("3.1", [client_frame(1, ONE, rsv=1)], [BROKEN]),
    *((f"3.{rsv}", [TEXT, client_frame(1, ONE, rsv=rsv), PING], [TEXT_BACK, BROKEN]) for rsv in (2, 3, 4)),
    *((f"3.{rsv}", [client_frame(op, OCTETS, rsv=rsv)], [BROKEN]) for rsv, op in ((5, 2), (6, 9), (7, 8))),
    *((f"4.1.{op - 2}", [TEXT, client_frame(op, b"reserved"), PING], [TEXT_BACK, BROKEN]) for op in range(3, 8)),
    *((f"4.2.{op - 10}", [TEXT, client_frame(op), PING], [TEXT_BACK, BROKEN]) for op in range(11, 16)),
    *((f"5.{op - 8}", fragments(op, ONE, TWO), [BROKEN]) for op in (9, 10)),
    ("5.3-5", [*fragments(1, ONE, TWO), BYE], [(1, ONE + TWO), BYE_BACK]),
    ("5.6-8", [client_frame(1, ONE, fin=False), client_frame(9, b"ping"), client_frame(0, TWO), BYE],
     [(10, b"ping"), (1, ONE + TWO), BYE_BACK]),
    *(("5.9-14", [client_frame(0, b"nothing to continue", fin=fin), TEXT], [BROKEN]) for fin in (True, False)),
    ("5.15", [*fragments(1, ONE, TWO), client_frame(0, b"3", fin=False), TEXT], [(1, ONE + TWO), BROKEN]),
    *((f"5.{16 + op}", [client_frame(op, b"1", fin=False), client_frame(1, b"2", fin=False), client_frame(0, b"3")], [BROKEN]) for op in (0, 1)),
    ("5.18", [client_frame(1, ONE, fin=False), client_frame(1, TWO)], [BROKEN]),
    ("5.19-20", [client_frame(1, b"0", fin=False), client_frame(0, b"1", fin=False), client_frame(9, b"pongme 1"),
                 client_frame(0, b"2", fin=False), client_frame(9, b"pongme 2"), client_frame(0, b"3"), BYE],
     [(10, b"pongme 1"), (10, b"pongme 2"), (1, b"0123"), BYE_BACK]),
    *((f"6.{at}", [*fragments(1, *parts), BYE], [(1, b"".join(parts)), BYE_BACK]) for at, parts in (
        ("1.1", [b""]), ("1.2", [b"", b"", b""]), ("1.3", [b"", b"middle", b""]), ("2.1", [GREETING]), ("2.2", [GREETING[:12], GREETING[12:]]),
        ("2.3", chopped(GREETING, 1)), ("2.4", chopped(COSMOS, 1)))),
    *((f"6.{at}", frames, [NOT_UTF8]) for at, frames in (
        ("3.1", [client_frame(1, COSMOS + b"\xed\xa0\x80edited"), BYE]), ("3.2", fragments(1, *chopped(COSMOS + b"\xed\xa0\x80edited", 1))),
        ("4.1", [client_frame(1, COSMOS, fin=False), client_frame(0, b"\xf4\x90\x80\x80", fin=False)]),
        ("4.2", [client_frame(1, COSMOS + b"\xf4", fin=False), client_frame(0, b"\x90", fin=False)]),
        *((f"4.{at}", [client_frame(1, COSMOS + b"\xf4\x90\x80\x80edited")[:end]]) for at, end in ((3, 22), (4, 19))))),
    ("7.1.1", [TEXT, BYE], [TEXT_BACK, BYE_BACK]),
    *((f"7.1.{at}", [BYE, frame], [BYE_BACK]) for at, frame in ((2, BYE), (3, PING), (4, TEXT))),
    ("7.1.5", [client_frame(1, ONE, fin=False), BYE, client_frame(0, TWO)], [BYE_BACK]),
    ("7.1.6", [client_frame(1, b"BAsd7&jh23" * 26214), BYE, PING], [(1, b"BAsd7&jh23" * 26214), BYE_BACK]),
    *((f"7.3.{at}", [client_frame(8, data)], [back]) for at, data, back in ((1, b"", (8, b"")), (2, b"a", BROKEN))),
    *((f"7.3.{at}", [client_close(1000, reason)], [closes(1000)]) for at, reason in ((3, b""), (4, ONE), (5, b"*" * 123))),
    ("7.3.6", [client_close(1000, b"*" * 124)], [BROKEN]),
    ("7.5.1", [client_close(1000, COSMOS + b"\xed\xa0\x80edited")], [NOT_UTF8]),
    *((f"7.7 code {code}", [client_close(code)], [closes(code)])
      for code in (*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999)),
    *((f"7.9 code {code}", [client_close(code)], [BROKEN])
      for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)),
]

# Groups 6.5 to 6.23, Markus Kuhn's sequences: of each kind the first and the last.
UTF8_VALID = [COSMOS, *map(str.encode, "\0\x7f\x80\u07ff\u0800\ud7ff\ue000\ufdd0\ufffe\uffff\U00010000\U0010ffff")]
UTF8_INVALID = [
    *(COSMOS[:at] for at in (1, 3, 10)), b"\x80\xbf", *(b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xed\xa0\x80\xed\xb0\x80"),
    *(b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xf0\x80\x80\x80", b"\xf0\x8f\xbf\xbf"),  # overlong
    *(b"\xf4\x90\x80\x80", b"\xf7\xbf\xbf\xbf", b"\xf8\x88\x80\x80\x80", b"\xfd\xbf\xbf\xbf\xbf\xbf"),  # above U+10FFFF
    *(bytes((first, 0x20)) for first in range(0x80, 0x100)), *(b"\xe0\x80", b"\xf0\x80\x80", b"\xdf", b"\xef\xbf", b"\xf7\xbf\xbf"),
]
# fmt: on


class TestAutobahnCases(unittest.TestCase):  # groups 1-7, 9 and 10 of the suite, on the codec alone
    def test_each_case_is_answered_as_the_suite_wants_whole_by_frame_and_by_octet(self) -> None:
        for number, frames, expected in AUTOBAHN_CASES:
            stream = b"".join(frames)
            cuts = [stream], frames, chopped(stream, 997), chopped(stream, 1)
            for pieces in cuts[: 4 if len(stream) < 4096 else 3]:
                self.assertEqual(echo(pieces), expected, number)

    def test_6_utf8_is_echoed_or_fails_with_1007_however_it_is_cut(self) -> None:
        for text in (*UTF8_VALID, *UTF8_INVALID):
            expected = [(1, text), PONG_BACK] if text in UTF8_VALID else [NOT_UTF8]
            for frames in ([client_frame(1, text)], fragments(1, *chopped(text, 1))):
                self.assertEqual(echo([*frames, PING]), expected)
                self.assertEqual(echo(chopped(b"".join(frames) + PING, 1)), expected)

    def test_what_trickles_or_comes_in_tiny_frames_takes_linear_time(self) -> None:
        payload = b"x" * 65536
        for pieces, events in (
            (chopped(client_frame(1, payload), 1), 1), ([client_frame(1, b"y") * 50_000], 50_000),
            (chopped(client_frame(1, "µ-seconds ".encode() * (1 << 20)), 64) if DEEP else [TEXT], 1),
            (chopped(b"".join(fragments(2, *[payload[:64]] * 16384)), 997), 1),
        ):  # fmt: skip
            began = time.perf_counter()
            self.assertEqual(len(feed_all(aiperf_api.FrameParser(32 << 20), pieces)), events)
            self.assertLess(time.perf_counter() - began, 20, "0.5 s on a laptop; anything quadratic takes minutes")


class TestFramesOnTheWire(unittest.TestCase):  # RFC 6455 5.2 and 5.7
    def test_frames_are_written_as_the_rfc_has_them_in_their_shortest_form(self) -> None:
        for opcode, payload, head in (
            (1, b"Hello", b"\x81\x05"), (9, bytes(125), b"\x89\x7d"),
            (2, bytes(126), b"\x82\x7e\x00\x7e"), (2, bytes(65535), b"\x82\x7e\xff\xff"),
            (2, bytes(65536), b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00"),
        ):  # fmt: skip
            self.assertEqual(aiperf_api.encode_frame(opcode, payload), head + payload)

    def test_a_close_has_its_code_and_a_reason_cut_at_123_bytes_on_a_character(self) -> None:
        self.assertEqual(aiperf_api.encode_close(1000), b"\x88\x02\x03\xe8")
        self.assertEqual(aiperf_api.encode_close(aiperf_api.CLOSE_GOING_AWAY, "bye"), b"\x88\x05\x03\xe9bye")
        for reason, kept in (("x" * 200, "x" * 123), ("é" * 100, "é" * 61), ("😀" * 40, "😀" * 30), ("\ud800", "?")):
            frame, raw = aiperf_api.encode_close(1000, reason), b"\x03\xe8" + kept.encode()
            self.assertEqual(frame, bytes((0x88, len(raw))) + raw)
            [event] = aiperf_api.FrameParser().feed(client_frame(8, raw))
            self.assertEqual(event, aiperf_api.Event("close", raw, 1000, kept))
        self.assertEqual(aiperf_api.FrameParser().feed(client_frame(8)), [aiperf_api.Event("close", b"", None, "")])


class TestFrameFaults(unittest.TestCase):  # each is found at the byte that commits it, and nothing is read after it
    def fails(self, data: bytes, code: int, *, at: int | None = None, max_message: int = 65536) -> None:
        """Fails with `code` on the last byte of `data`, or on byte `at`, not a byte before, and stays silent."""
        parser = aiperf_api.FrameParser(max_message)
        last = len(data) if at is None else at
        before = feed_all(parser, chopped(data[: last - 1], 1))
        self.assertNotIn("failure", [event.kind for event in before], data[:20])
        [failure] = parser.feed(data[last - 1 : last])
        self.assertEqual(failure[:3], ("failure", b"", code), data[:20])
        self.assertEqual(parser.feed(data[last:] + TEXT + BYE) + parser.feed(TEXT), [])

    def test_what_the_first_bytes_of_a_frame_say_wrong_is_1002_before_the_rest_is_there(self) -> None:
        begun = client_frame(1, b"a", fin=False)
        for data in (
            *(bytes((first,)) for first in (0xC1, 0xA1, 0x91, 0xC9, 0x98, 0xF0)),  # reserved bits
            *(bytes((fin | opcode,)) for fin in (0, 0x80) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
            *(bytes((opcode,)) for opcode in (8, 9, 10)),  # fragmented control frames
            *(bytes((0x80 | opcode, size)) for opcode in (8, 9, 10) for size in (0xFE, 0xFF)),  # and long ones
            *(b"\x80", b"\x00", TEXT + b"\x80", begun + b"\x81", begun + PING + b"\x02"),  # out of order
            *(b"\x81\x05", b"\x88\x00"),  # not masked
            *(b"\x81\xfe\x00\x7d", b"\x81\xfe\x00\x00", b"\x81\xff\x00\x00\x00\x00\x00\x00\xff\xff"),  # not minimal
            *(b"\x81\xff\x80", b"\x81\xff\xff"),  # the top bit
        ):  # fmt: skip
            self.fails(data, 1002)

    def test_a_length_over_the_limit_of_all_fragments_is_1009_before_a_byte_of_it_is_read(self) -> None:
        self.fails(b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff", 1009)
        self.fails(b"\x82\xff\x00\x00\x00\x00\x00\x01\x00\x01", 1009)
        self.fails(b"\x82\xfe\x03\xe9", 1009, max_message=1000)
        self.fails(b"\x82\x8b", 1009, max_message=10)
        self.assertEqual(echo([client_frame(2, bytes(65536))], 65536), [(2, bytes(65536))])
        part = client_frame(2, bytes(600), fin=False) + PING
        self.fails(part + client_frame(10, b"x") + b"\x80\xfe\x01\x91", 1009, max_message=1000)
        self.assertEqual(echo([(part + client_frame(0, bytes(400))) * 3], 1000), [PONG_BACK, (2, bytes(1000))] * 3)

    def test_more_fragments_than_a_message_may_have_are_1008(self) -> None:
        start, empty = client_frame(1, b"", fin=False), client_frame(0, b"", fin=False)
        allowed = start + empty * 1023
        for data in (allowed + b"\x00", allowed + PING + b"\x80"):
            self.fails(data, 1008)
        self.assertEqual(echo([allowed[: -len(empty)] + client_frame(0)], 65536), [(1, b"")])

    def test_invalid_utf8_is_1007_at_the_byte_that_breaks_it(self) -> None:
        head, smile = len(client_frame(1, bytes(20))) - 20, "😀".encode()
        for text, at in ((b"ab\xff", 3), (b"\xed\xa0", 2), (b"\xf4\x90", 2), (b"\xe0\x9f", 2), (b"\xc0", 1)):
            self.fails(client_frame(1, text.ljust(20)), 1007, at=head + at)
        for cut in range(5):
            self.assertEqual(echo(fragments(1, smile[:cut], smile[cut:])), [(1, smile)])
        for cut in (1, 2, 3):
            for rest in (client_frame(0), client_frame(0, b"x", fin=False)):
                self.fails(client_frame(1, smile[:cut], fin=False) + rest, 1007)
        self.assertEqual(echo(fragments(2, b"\xff\xfe", b"\xed\xa0")), [(2, b"\xff\xfe\xed\xa0")])
        for reason in (b"\xff", b"\xc3"):
            self.fails(client_close(1000, reason), 1007)

    def test_a_parser_that_is_dropped_leaves_no_cycle(self) -> None:
        gc.collect()
        aiperf_api.FrameParser().feed(client_frame(1, b"x" * 100, fin=False) + b"\x80")
        self.assertEqual(gc.collect(), 0)


# == 5 == HTTP =========================================================================================================

HOST = b"Host: localhost:9090\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
DATE = b"Mon, 23 Nov 2026 00:00:00 GMT"


def head(*lines: bytes, first: bytes = b"GET / HTTP/1.1") -> bytes:
    return b"\r\n".join((first, b"Host: localhost:9090", *lines, b"", b""))


def get(target: bytes) -> bytes:
    return head(first=b"GET " + target + b" HTTP/1.1")


def read_requests(pieces: Iterable[bytes], memo: dict[bytes, Any] | None = None) -> list[Any]:
    """The requests in a stream, with the status of the fault that ended it, if one did."""
    parser, found = aiperf_api.RequestParser(memo), []
    for piece in pieces:
        parser.feed(piece)
        try:
            found.extend(iter(parser.next_request, None))
        except aiperf_api.HTTPError as error:
            found.append(error.status)
    return [each._replace(refusal=each.refusal.status) if getattr(each, "refusal", 0) else each for each in found]


def read_request(data: bytes) -> aiperf_api.Request:
    [request] = read_requests([data])
    return request


def status_of(check: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """The status of the HTTPError that a check raises; 200 if it raises none."""
    try:
        check(*args, **kwargs)
    except aiperf_api.HTTPError as error:
        return error.status
    return 200


UPGRADE = head(
    b"Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    first=b"GET /ws HTTP/1.1",
)  # fmt: skip


class TestRequestsAccepted(unittest.TestCase):
    def test_a_plain_request(self) -> None:
        request = read_request(
            b"GET /a?tag=ttft&stat=p99 HTTP/1.1\r\nHost: x\r\nACCEPT:\t text/plain , */* \t\r\nX-Empty:\r\nCookie: x=1\r\naccept: c/d\r\nCookie: y=2\r\n\r\n"
        )
        headers = {"host": "x", "accept": "text/plain , */*, c/d", "x-empty": "", "cookie": "x=1, y=2"}
        query = (("tag", "ttft"), ("stat", "p99"))
        self.assertEqual(request, ("GET", "/a?tag=ttft&stat=p99", "/a", query, headers, True, True, False, None))

    def test_whether_a_next_request_may_follow(self) -> None:
        for data, is_1_1, keep_alive in (
            (b"GET / HTTP/1.0\r\n\r\n", False, False), (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\nExpect: wonders\r\n\r\n", False, False),
            (head(first=b"GET / HTTP/1.7"), True, True), (head(b"Connection: keep-alive", b"Expect: 100-Continue"), True, True),
            (head(b"Connection: Close"), True, False), (head(b"Connection: TE, ,close"), True, False), (head(b"Connection: closed"), True, True),
            (head(b"Connection: TE", b"Connection: close"), True, False), (head(b"Range: bytes=0-" + b",0-" * 1000), True, True),
        ):  # fmt: skip
            request, *more = read_requests([data + GET, GET])
            self.assertEqual((request.is_1_1, request.keep_alive, len(more)), (is_1_1, keep_alive, 2 * keep_alive))

    def test_targets_are_decoded_once_and_kept_literally(self) -> None:
        for target, path in (
            (b"http://Example.com:80/a%20b?c=d", "/a b"), (b"HTTPS://[::1]?x", "/"), (b"/static/../x", "/static/../x"), (b"/%2e%2E/e", "/../e"),
            (b"//evil.example/", "//evil.example/"), (b"/%252e", "/%2e"), (b"/%C3%A9+x", "/é+x"), (b"/a;b=c\\d", "/a;b=c\\d"),
            (b"/a%2fb%2Fc", "/a%2fb%2Fc"),  # an encoded slash is none
        ):  # fmt: skip
            self.assertEqual(read_request(get(target)).path, path)
        self.assertEqual(read_request(get(b"http://Example.com:80/")).headers["host"], "Example.com:80")

    def test_query_arguments(self) -> None:
        request = read_request(get(b"/?tag=a%26b&tag=c;d=e&pretty&=x&&sp=1+2%2B3&%C3%A9=%C3%A9"))
        self.assertEqual(request.args("tag"), ["a&b", "c;d=e"])
        values = [request.arg(name) for name in ("tag", "pretty", "sp", "é", "d")]
        self.assertEqual([*values, request.arg("d", "x")], ["a&b", "", "1 2+3", "é", None, "x"])
        for query in (b"pretty", b"pretty=1", b"pretty=0", b"pretty=No", b"pretty=false", b"pretty=off", b"x"):
            wanted = read_request(get(b"/?" + query)).wants_pretty
            self.assertEqual(wanted, query in (b"pretty", b"pretty=1"), query)

    def test_a_body_is_refused_once_the_path_is_known_and_nothing_behind_it_is_parsed(self) -> None:
        post = b"POST /x HTTP/1.1"
        for line, status in (
            (b"Content-Length: 5", 413), (b"Content-Length: 5, 5", 413), (b"Content-Length: 5\r\nExpect: 100-continue", 413),
            (b"Transfer-Encoding: chunked", 501), (b"Transfer-Encoding: xchunked", 501), (b"Transfer-Encoding:", 501),
        ):  # fmt: skip
            [request] = read_requests([head(line, first=post) + GET, GET])
            self.assertEqual((request.path, request.refusal, request.keep_alive), ("/x", status, False))
        for length in (b"0", b"000", b"0, 0", b"0\r\nContent-Length: 0"):
            request, behind = read_requests([head(b"Content-Length: " + length, first=post) + GET])
            self.assertEqual((request.refusal, behind.path), (None, "/"))
        self.assertFalse(read_request(UPGRADE[:-2] + b"Content-Length: 5\r\n\r\nabcde").wants_upgrade)

    def test_empty_lines_before_a_request_are_skipped(self) -> None:
        for stream in (b"\r\n" * 9 + GET + b"\r\n" + GET, GET + b"\r\n\r\n" + GET):
            for size in (1, 3, 1000):
                self.assertEqual(len(read_requests(chopped(stream, size))), 2)

    def test_limits_are_met_exactly(self) -> None:
        target = b"/" + b"a" * (aiperf_api._TARGET_BYTES_MAX - 1)
        lines = [b"X-%d: y" % at for at in range(aiperf_api.HTTP_FIELDS_MAX - 1)]
        fill = b"X: " + b"y" * (aiperf_api.HTTP_HEAD_BYTES_MAX - len(head(b"X: ")))
        for data in (get(target), head(*lines), head(fill), get(b"/?" + b"&" * (aiperf_api.HTTP_FIELDS_MAX - 1))):
            self.assertIsInstance(read_request(data), aiperf_api.Request)
        self.assertEqual(read_requests([head(fill + b"y")]), [431])


# What is refused: head, status.  Others, such as h11 with its defaults, accept those of the second half.
# fmt: off
REFUSED: list[tuple[bytes, int]] = [
    *((head(b"Content-Length: " + value), 400)  # int() is lenient
      for value in (b"+5", b"-0", b"1_0", b"5 5", b"0x5", b"", b"\xd9\xa5", b"1.0", b"9" * 5000, b"0, 1", b"0, 00", b"0,")),
    *((head(*lines), 400) for lines in (
        (b"Content-Length: 0", b"Content-Length: 1"), (b"Content-Length : 0",), (b"Content-Length\t: 0",), (b"Host: localhost:9090",),
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"), (b"X",), (b": x",), (b"X Y: z",), ("É: x".encode(),),
        (b"X: a\rY: b",), (b"X: a\0b",), (b"X: a\x0bb",))),
    *((head(first=first), 400) for first in (
        b'G"T / HTTP/1.1', b"GET: / HTTP/1.1", b"GET  / HTTP/1.1", b"GET\t/ HTTP/1.1", b"GET / HTTP/1.1 ", b"GET / HTTP/1.1 x",
        b"GET / http/1.1", b"GET / HTTP/1.10", b"GET / HTTP/+1.1", b"GET /\0 HTTP/1.1", "GET /é HTTP/1.1".encode(), b"GET /\x7f HTTP/1.1")),
    *((data, 400) for data in (
        b"GET /\rx HTTP/1.1\r\n" + HOST + b"\r\n", b"GET / HTTP/1.1\r\r\n" + HOST + b"\r\n", b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n", b"GET /\r\n", b"GET /\r\nHost: x\r\n\r\n", b" / HTTP/1.1\r\n\r\n",  # no Host, HTTP/0.9, no method
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", TEXT, b"\0GET / HTTP/1.1\r\n\r\n", b"\nGET / HTTP/1.1\r\n\r\n")),  # first a ClientHello
    (b"GET /" + b"a" * 20000, 431), (b"G" * 20000, 431), (head(b"X: ")[:-4] + b"y" * 17000, 431),

    *((head(*lines), 400) for lines in (
        (b"Transfer-Encoding: chunked", b"Content-Length: 5"), (b"Content-Length: 0", b"Transfer-Encoding: chunked"),  # smuggling
        (b"Content-Length: " + b"0" * 16,), (b"X: a", b" b"), (b"X: a", b"\tb"), (b"Origin: http://a", b"Origin: http://b"),
        (b"Sec-WebSocket-Key: a", b"Sec-WebSocket-Key: b"), (b"Sec-WebSocket-Version: 13", b"sec-websocket-version: 13"),
        (b"Authorization: Bearer a", b"Authorization: Bearer b"), (b"X: a\x01b",), (b"X: a\x7fb",))),
    (head(b"Transfer-Encoding: chunked", first=b"GET / HTTP/1.0"), 400),
    *((data, 400) for data in (  # a bare LF
        b"GET / HTTP/1.1\n" + HOST + b"\r\n", b"GET / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", b"GET / HTTP/1.1\r\n" + HOST + b"\n",
        b"GET / HTTP/1.1\nHost: x\n\n")),
    *((b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n", 400) for host in (b"a/b", b"a@b", b"a:1:2", b"a, b")),
    *((get(target), 400) for target in (
        b"*", b"api/metrics", b"ftp://localhost/", b"http://a@localhost/", b"http:///", b"/#top", b"/?a#top", b"/%4", b"/%zz", b"/?a=%u0041",
        b"/%ff", b"/%c0%af", b"/%ed%a0%80", b"/%00", b"/?a=%00", b"/?" + b"&" * 64)),
    (head(first=b"CONNECT example.com:443 HTTP/1.1"), 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505), (head(first=b"GET / HTTP/3.0"), 505),
    (get(b"/" + b"a" * 4096), 414), (head(*[b"X: y"] * 64), 431), (head(b"X: " + b"y" * 17000), 431),  # h11 has other limits
]
# fmt: on


def h11_request(data: bytes) -> Any:
    """(method, target, names of headers) as h11 has them, or None if it refuses or waits."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16384)
    try:
        connection.receive_data(data)
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    return (event.method, event.target, {name for name, _ in event.headers}) if isinstance(event, h11.Request) else None


class TestRequestsRefused(unittest.TestCase):
    def test_each_fault_gets_its_status_however_it_is_cut_and_nothing_is_read_after_it(self) -> None:
        for data, status in REFUSED:
            with self.subTest(data[:60]):
                self.assertEqual(read_requests([data + GET, GET]), [status])
                self.assertEqual(read_requests([GET + data + GET]), [read_request(GET), status])
                self.assertEqual(read_requests(chopped(data, 1)), [status])
                for at in range(0, len(data), max(1, len(data) // 50)):
                    self.assertEqual(read_requests([data[:at], data[at:]]), [status])
        parser = aiperf_api.RequestParser()
        parser.feed(b"\x16")
        self.assertRaisesRegex(aiperf_api.HTTPError, "plain HTTP, not TLS", parser.next_request)

    @unittest.skipUnless(hypothesis and h11, "needs the hypothesis and h11 packages")
    def test_what_we_accept_h11_accepts_and_reads_the_same(self) -> None:
        """Heads with every fault that we know of, several in a row, broken anywhere."""
        good = [GET, UPGRADE, head(b"A:", b"a: \tb ", b"!#$%&'*+-.^_`|~: \xff"), get(b"http://h/%41?x=%42")]
        faults = [data for data, _ in REFUSED]
        known = st.sampled_from([*good * 8, b"\r\n", b"\r\n\r\n", head(b"Connection: close"), *faults])
        streams = st.lists(known | st.binary(max_size=20), max_size=5).map(b"".join)
        changes = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=2)

        @hypothesis.settings(max_examples=1000 if DEEP else 37, deadline=None, database=None)
        @hypothesis.given(streams, changes)
        def check(stream: bytes, changes: list[tuple[int, int]]) -> None:
            data = bytearray(stream + GET)
            for place, value in changes:
                data[place % len(data)] = value
            ours = next(iter(read_requests([bytes(data)])), None)
            if not isinstance(ours, aiperf_api.Request) or ours.refusal or data.startswith(b"\r\n"):
                return  # h11 reads some bodies, and does not skip the empty lines that RFC 9112 2.2 has a server skip
            theirs = h11_request(bytes(data))
            self.assertIsNotNone(theirs)
            self.assertEqual((ours.method.encode(), ours.target.encode()), theirs[:2])
            self.assertEqual({name.encode() for name in ours.headers} | {b"host"}, theirs[2] | {b"host"})

        check()


class TestRequestMemo(unittest.TestCase):
    def test_recall_knows_whole_heads_that_were_read_and_may_be_followed_by_others(self) -> None:
        memo = {}
        first = read_requests(chopped(GET, 1), memo)[0]
        parser = aiperf_api.RequestParser(memo)
        self.assertIs(parser.recall(GET), first)
        for data in (GET + GET, GET[:-1], b""):
            self.assertIsNone(parser.recall(data))
        parser.feed(GET[:5])
        self.assertIsNone(parser.recall(GET), "bytes wait to be read first")
        parser.feed(GET[5:] + head(b"Connection: close"))
        self.assertEqual([parser.next_request().keep_alive, parser.next_request().keep_alive], [True, False])
        self.assertEqual((parser.recall(GET), list(memo)), (None, [GET]), "nothing behind the last one")

    def test_a_flood_of_pipelined_requests_takes_linear_time(self) -> None:
        stream = (GET + b"\r\n") * 10_000
        for size in (len(stream), 1000, 1):
            began = time.perf_counter()
            self.assertEqual(len(read_requests(chopped(stream, size))), 10_000)
            self.assertLess(time.perf_counter() - began, 20, "0.4 s on a laptop; anything quadratic takes minutes")

    def test_it_is_bounded_in_heads_and_bytes(self) -> None:
        memo = {}
        read_requests([get(b"/%d" % at) for at in range(500)], memo)
        read_requests([head(b"X: " + b"y" * aiperf_api._MEMO_HEAD_BYTES_MAX)], memo)
        self.assertEqual(list(memo), [get(b"/%d" % at) for at in range(500 - aiperf_api._MEMO_HEADS_MAX, 500)])


class TestHostAndOriginCheck(unittest.TestCase):  # DNS rebinding, cross-site WebSocket hijacking, pages that fetch
    def test_a_host_is_served_or_not(self) -> None:
        lan, with_port = frozenset({"bench.lan"}), frozenset({"bench.lan:9090"})
        foreign = "evil.example localhost.evil localhost6 localhost. 127.0.0.1.nip.io 127.1 0x7f.1 2130706433 0177.0.0.1 127.0.0.01"
        for hosts, allowed, is_loopback, status in (
            ((*"127.0.0.1 127.0.0.1:9090 [::1]:9090 [::1] localhost LocalHost:9090 10.1.2.3".split(), None), frozenset(), True, 200),
            ((*foreign.split(), "", ":9090"), frozenset(), True, 421),
            (("a b", "[::1", "[::1]x", "a:b", "a@b", "[fe80::1%eth0]", "localhost:999999"), frozenset(), True, 400),
            (("Bench.lan:9090", "bench.lan", "localhost"), lan, True, 200), (("x.bench.lan",), lan, True, 421),
            (("bench.lan:9090",), with_port, True, 200), (("bench.lan:9091", "bench.lan"), with_port, True, 421),
            (("bench.lan", *foreign.split()), frozenset(), False, 200), (("bench.lan",), lan, False, 200), (("10.0.0.1", "localhost"), lan, False, 421),
        ):  # fmt: skip
            for host in hosts:
                given = status_of(aiperf_api.check_host, host, allowed=allowed, bound_to_loopback=is_loopback)
                self.assertEqual(given, status, (host, allowed, is_loopback))

    def check(self, *lines: bytes, allowed: Iterable[str] = ()) -> int:
        return status_of(aiperf_api.check_origin, read_request(head(*lines)), frozenset(allowed))

    def test_our_own_and_listed_origins_pass_and_others_do_not(self) -> None:
        for own in (b"http://localhost:9090", b"https://LOCALHOST:9090"):
            self.assertEqual(self.check(b"Origin: " + own), 200, own)
        for origin in (
            "null", "", "http://evil.example", "http://localhost", "http://localhost:9091", "http://localhost:9090.evil",
            "http://evil/localhost:9090", "file://localhost:9090", "localhost:9090", "http://", "://localhost:9090",
        ):  # fmt: skip
            self.assertEqual(self.check(b"Origin: " + origin.encode()), 403, origin)
        for origin, allowed, status in (
            (b"https://Grafana.lan", "https://grafana.lan", 200), (b"https://grafana.lan:1", "https://grafana.lan", 403), (b"null", "*", 200),
        ):  # fmt: skip
            self.assertEqual(self.check(b"Origin: " + origin, allowed=[allowed]), status)

    def test_without_an_origin_a_foreign_page_may_only_navigate(self) -> None:
        for site, mode, status in (
            (None, None, 200), (b"none", b"navigate", 200), (b"same-origin", b"cors", 200), (b"cross-site", b"navigate", 200),
            (b"cross-site", b"no-cors", 403), (b"cross-site", None, 403),
        ):  # fmt: skip
            lines = [b"Sec-Fetch-Site: " + site] if site else []
            self.assertEqual(self.check(*lines, *([b"Sec-Fetch-Mode: " + mode] if mode else [])), status, (site, mode))
        self.assertEqual(self.check(b"Sec-Fetch-Site: cross-site", allowed=["*"]), 200)


class TestUpgradeCheck(unittest.TestCase):  # RFC 6455 4.2.1
    def test_a_right_handshake_gives_its_key_and_gets_the_answer_of_the_rfc(self) -> None:
        start = (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
        )
        for data in (UPGRADE, UPGRADE.replace(b"alive, U", b"alive,,u").replace(b": websocket", b": h2c, WebSocket")):
            self.assertEqual(aiperf_api.upgrade_response(read_request(data)), start + b"\r\n")

    def test_what_is_none_is_told_what_to_do(self) -> None:
        hint, version = {"Upgrade": "websocket", "Connection": "Upgrade"}, {"Sec-WebSocket-Version": "13"}
        key = b"dGhlIHNhbXBsZSBub25jZQ=="
        bad_keys = (b"", key[:-2], key[:-3] + b"R==", key[:-1] + b"=a", key.replace(b"I", b" "))
        for old, new, status, headers in (
            (b"Upgrade: websocket\r\n", b"", 426, hint), (b"Connection: keep-alive, Upgrade", b"Connection: keep-alive", 426, hint),
            (b"Upgrade: websocket", b"Upgrade: websocket/13", 426, hint), (b"HTTP/1.1", b"HTTP/1.0", 426, hint),
            *((b"Version: 13", b"Version: " + other, 426, version) for other in (b"8", b"013", b"13, 8", b"")),
            *((key, bad, 400, {}) for bad in bad_keys),
        ):  # fmt: skip
            with self.subTest(new), self.assertRaises(aiperf_api.HTTPError) as caught:
                aiperf_api.upgrade_response(read_request(UPGRADE.replace(old, new)))
            self.assertEqual((caught.exception.status, dict(caught.exception.headers)), (status, headers))

    def test_a_subprotocol_is_chosen_that_was_offered_and_carries_no_token(self) -> None:
        for offered, chosen in (
            (b"", None), (b"chat", None), (b"aiperf.token.s3cret", None), (b"aiperf.token.s3cret, aiperf", "aiperf"),
            (b"chat, aiperf.token.s3cret, aiperf.v1", None), (b"aiperf.v1,aiperf", "aiperf"),
        ):  # fmt: skip
            request = read_request(UPGRADE[:-2] + b"Sec-WebSocket-Protocol: " + offered + b"\r\n\r\n")
            told = aiperf_api.upgrade_response(request).partition(b"Protocol: ")[2]
            self.assertEqual(told, b"aiperf\r\n\r\n" if chosen else b"")
        self.assertEqual(status_of(aiperf_api.subprotocols, read_request(head(b"Sec-WebSocket-Protocol: a b"))), 400)


class TestTokenCheck(unittest.TestCase):
    COOKIE = b"aiperf_api_9090"

    def status(self, data: bytes, token: bytes = b"s3cret") -> int:
        return status_of(aiperf_api.check_token, read_request(data), token, self.COOKIE.decode())

    def test_it_may_come_in_a_header_a_query_a_subprotocol_or_the_cookie_of_a_page(self) -> None:
        cookie = self.COOKIE + b"=" + aiperf_api.page_cookie(b"s3cret").encode()
        for data in (
            head(b"Authorization: Bearer s3cret"), head(b"Authorization: bearer   s3cret"), get(b"/?x=y&token=s3cret"),
            head(b"Sec-WebSocket-Protocol: chat, aiperf.token.s3cret"), head(b"Cookie: a=b; " + cookie),
        ):  # fmt: skip
            self.assertEqual(self.status(data), 200, data)
        self.assertEqual(self.status(head(b"Authorization: Bearer caf\xc3\xa9"), "café".encode()), 200)
        for data in (
            GET, *(head(b"Authorization: " + value) for value in (b"Bearer S3cret", b"Bearer", b"Basic s3cret", b"s3cret", b"Bearer \xff")),
            get(b"/?token="), get(b"/?Token=s3cret"), head(b"Sec-WebSocket-Protocol: aiperf.token.s3cre, s3cret"),
            head(b"Cookie: " + self.COOKIE + b"=s3cret"), head(b"Cookie: x" + cookie), head(b"Authorization: Bearer " + cookie.partition(b"=")[2]),
        ):  # fmt: skip
            self.assertEqual(self.status(data), 401, data)
        for value, is_right in ((b"s3cret", True), (b"x", False)):
            self.assertEqual(aiperf_api.has_page_token(read_request(get(b"/?token=" + value)), b"s3cret"), is_right)

    def test_the_refusal_says_where_a_token_comes_from_and_goes_to(self) -> None:
        words = r"(?s).*--api-token.*AIPERF_API_TOKEN.*Authorization: Bearer.*\?token="
        with self.assertRaisesRegex(aiperf_api.HTTPError, words) as caught:
            aiperf_api.check_token(read_request(GET), b"s3cret", "c")
        self.assertEqual(caught.exception.headers, (("WWW-Authenticate", 'Bearer realm="aiperf-api"'),))

    def test_timing_of_token_checks(self) -> None:
        with mock.patch.object(aiperf_api.hmac, "compare_digest", return_value=True) as compare:
            self.status(head(b"Authorization: Bearer a", first=b"GET /?token=b HTTP/1.1"))
        self.assertEqual([call.args[0] for call in compare.call_args_list], [b"a", b"b"])


class TestNegotiation(unittest.TestCase):
    TEXT = "text/plain; version=0.0.4; charset=utf-8"
    METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

    def test_the_best_of_what_is_offered_the_earlier_of_equals(self) -> None:
        many = "a/b," * (aiperf_api.HTTP_FIELDS_MAX - 1)
        for header, best in (
            *((header, self.TEXT) for header in (None, "", "*/*", "TEXT/Plain", "application/openmetrics-text;q=0.5, */*", many + "text/plain")),
            ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", self.TEXT), ("application/openmetrics-text;q=0, */*;q=0.1", self.TEXT),
            ("application/openmetrics-text;version=0.0.1,text/plain;version=0.0.4;q=0.2", self.TEXT), ("image/png,*/*;q=0.2", self.TEXT),
            ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2", self.METRICS),
            ("application/openmetrics-text", self.METRICS), ("application/openmetrics-text; version=1.0.0; q=0.8, text/plain;q=0.5", self.METRICS),
            *((header, self.TEXT) for header in ("text/*;q=0.1, text/plain;q=0", "image/png", "text/plain;q=2", ",;,/;q", many + "a/b,text/plain")),
            ("application/openmetrics-text;version=0.0.1", self.TEXT),
        ):  # fmt: skip
            self.assertEqual(aiperf_api.accepts(header, (self.TEXT, self.METRICS)), best, header)

    def test_gzip(self) -> None:
        for header in ("gzip", "GZIP;q=0.1", "deflate, gzip", "*", "x-gzip"):
            self.assertTrue(aiperf_api.accepts_gzip(header), header)
        for header in (None, "", "gzip;q=0", "*;q=0", "gzip;q=0, *", "identity", "gzipped"):
            self.assertFalse(aiperf_api.accepts_gzip(header), header)

    def test_preconditions(self) -> None:
        name, tag = aiperf_api.etag(b"x")
        self.assertRegex(tag, r'\AW/"[0-9a-f]{16}"\Z')
        response, bare = aiperf_api.Response(200, b"x", headers=((name, tag),)), aiperf_api.Response(200, b"x")
        for given, line, status in (
            *((response, b"If-None-Match: " + value, 304) for value in (tag.encode(), tag[2:].encode(), b'"b", ' + tag.encode(), b"*")),
            *((response, b"If-None-Match: " + value, 200) for value in (b'"b"', tag[3:-1].encode(), b"", b'"x' + tag[3:].encode())),
            *((response, b"If-Match: " + value, status) for value, status in ((b"*", 200), (b'"b"', 412), (tag.encode(), 412))),
            *((bare, line, status) for line, status in ((b"If-None-Match: " + tag.encode(), 200), (b'If-Match: "a"', 412), (b"X: y", 200))),
            (aiperf_api.Response(404, b"x"), b"If-Match: *\r\nIf-None-Match: *", 404),
            (response, b'If-Match: "b"\r\nIf-None-Match: *', 412),
        ):  # fmt: skip
            self.assertEqual(aiperf_api.with_preconditions(read_request(head(line)), given).status, status, line)


class TestResponses(unittest.TestCase):
    def test_the_bytes_of_an_answer(self) -> None:
        start = (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"
            b"Content-Length: 8\r\nDate: Mon, 23 Nov 2026 00:00:00 GMT\r\n"
        )
        response = aiperf_api.json_response({"a": 1})
        self.assertEqual(response.encode(date=DATE), start + b'\r\n{"a":1}\n')
        self.assertEqual(response.encode(date=DATE, head_only=True), start + b"\r\n")
        answer = response.encode(date=DATE, close=True, extra=(("Vary", "Origin"),))
        self.assertEqual(answer, start + b'Vary: Origin\r\nConnection: close\r\n\r\n{"a":1}\n')
        self.assertEqual(aiperf_api.json_response({"a": 1}, pretty=True).body, b'{\n  "a": 1\n}\n')

    def test_what_was_sent_is_sent_again_only_where_it_is_the_same(self) -> None:
        response = aiperf_api.Response(200, b"x" * 2000, "text/plain")
        self.assertIs(response.encode(date=b"1"), response.encode(date=b"1"))
        for part, kwargs in ((b"Date: 2", {}), (b"gzip", {"gzip": True}), (b"close", {"close": True})):
            self.assertIn(part, response.encode(date=b"2", **kwargs))
        self.assertIn(b"Date: 1", response.encode(date=b"1"))

    def test_errors_texts_and_pages(self) -> None:
        for response, parts in (
            (aiperf_api.error_response(aiperf_api.HTTPError(405, "no", (("Allow", "GET"),))), (b" 405 M", b"Allow: GET\r\n", b'\n{"error":"no"}\n')),
            (aiperf_api.text_response("µ\ud800", 503), (b"503 Service Unavailable", b"text/plain; charset=utf-8", "\r\n\r\nµ?".encode())),
            (aiperf_api.Response(content_type="text/html"), (b"-src 'self'; ", b"ancestors 'none'\r\nReferrer-P")),
            (aiperf_api.Response(body=None, content_type="text/event-stream"), (b"no-store\r\nDate: ", b"\r\nConnection: close\r\n\r\n")),
            (aiperf_api.Response(204), (b"204 No Content\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\nDate: ",)),
        ):  # fmt: skip
            answer = response.encode(date=DATE)
            for part in parts:
                self.assertIn(part, answer)
            self.assertNotIn(b"unsafe", answer)
        own = (("Cache-Control", "no-cache"), ("Content-Security-Policy", "default-src 'none'"))
        answer = aiperf_api.Response(content_type="text/html", headers=own).encode(date=DATE).lower()
        self.assertEqual((answer.count(b"cache-control"), answer.count(b"content-security-policy")), (1, 1))

    def test_gzip_is_chosen_by_the_client_and_made_once(self) -> None:
        response = aiperf_api.Response(body=b"plain " * 1000)
        for zipped in (False, True):
            answer, body = response.encode(date=DATE, gzip=zipped), response.payload(zipped)
            self.assertIs(response.payload(zipped), body)
            self.assertEqual(response.encode(date=DATE, gzip=zipped, head_only=True) + body, answer)
            self.assertIn(b"\r\nVary: Accept-Encoding\r\n", answer)
            self.assertIn(b"\r\nContent-Length: %d\r\n" % len(body), answer)
            self.assertEqual(b"Content-Encoding: gzip" in answer, zipped)
            self.assertEqual(gzip.decompress(body) if zipped else body, response.body)
        self.assertNotIn(b"gzip", aiperf_api.Response(body=b"plain").encode(date=DATE, gzip=True))

    def test_a_long_json_answer_can_be_asked_for_again(self) -> None:
        response = aiperf_api.json_response(["x" * 2000], headers=(("X", "y"),))
        tag = dict(response.headers)["ETag"]
        again = aiperf_api.with_preconditions(read_request(head(b"If-None-Match: " + tag.encode())), response)
        start = b"HTTP/1.1 304 Not Modified\r\nX-Content-Type-Options: nosniff\r\nETag: %b\r\n" % tag.encode()
        rest = b"Cache-Control: no-cache\r\nVary: Accept-Encoding\r\nDate: %b\r\n\r\n" % DATE
        self.assertEqual(again.encode(date=DATE, gzip=True), start + rest)

    def test_cr_lf_in_response_headers(self) -> None:
        for pair in (("X", "a\r\nY: b"), ("X", "a\n"), ("X", "a\0"), ("X\r\nY", "a"), ("X Y", "a"), ("", "a")):
            self.assertRaises(ValueError, aiperf_api.Response, headers=(pair,))
            self.assertRaises(ValueError, aiperf_api.Response().encode, date=DATE, extra=(pair,))
        self.assertRaises(ValueError, aiperf_api.Response, content_type="text/plain\r\n")


# == 6 == Router and static files ======================================================================================


class TestRouter(unittest.TestCase):
    def test_no_two_routes_share_a_path_or_a_name(self) -> None:
        for field in ("path", "name"):
            self.assertEqual(len({getattr(route, field) for route in aiperf_api.ROUTES}), len(aiperf_api.ROUTES), field)

    ROUTER = aiperf_api.Router(
        [
            aiperf_api.Route(path, path, "", print)
            for path in "/metrics /api/history /api/workers /api/runs /api/runs/{n} /static/{file} /static/guides/{file}".split()
        ]
        + [aiperf_api.Route("/ws", "ws", "The bus.", print, methods=("GET",))]
    )

    def refused(self, method: str, path: str) -> tuple[int, str, Any]:
        with self.assertRaises(aiperf_api.HTTPError) as caught:
            self.ROUTER.match(method, path)
        return caught.exception.status, caught.exception.message, caught.exception.headers

    def test_a_path_finds_its_route_and_its_rest(self) -> None:
        for path, found, rest in (
            ("/metrics", "/metrics", ""), ("/api/runs", "/api/runs", ""), ("/api/runs/2", "/api/runs/{n}", "2"),
            ("/static/a/b.js", "/static/{file}", "a/b.js"), ("/static/guides/x.md", "/static/guides/{file}", "x.md"),
            ("/static/guides/", "/static/{file}", "guides/"), ("/static/../x", "/static/{file}", "../x"),
        ):  # fmt: skip
            for method in ("GET", "HEAD"):
                route, given = self.ROUTER.match(method, path)
                self.assertEqual((route.path, given), (found, rest))

    def test_other_methods_are_405_with_allow_and_unknown_ones_501(self) -> None:
        refusal = (405, "method not allowed; /metrics has GET, HEAD", (("Allow", "GET, HEAD"),))
        for method in ("POST", "TRACE", "PATCH"):
            self.assertEqual(self.refused(method, "/metrics"), refusal)
        self.assertEqual(self.refused("HEAD", "/ws")[2], (("Allow", "GET"),))
        for method, path in (("get", "/metrics"), ("BREW", "/metrics"), ("BREW", "/nothing")):
            self.assertEqual(self.refused(method, path)[0], 501)

    def test_an_unknown_path_is_404_with_a_suggestion_that_is_near(self) -> None:
        for path, near in (("//metrics", "/metrics"), ("/api/histroy", "/api/history"), ("/api/runs/", "/api/runs")):
            self.assertEqual(self.refused("GET", path)[:2], (404, f"unknown path {path}; did you mean {near}?"))
        for path in ("/x", "/api/nope", "/static/", "/api/../x", "/METRICS", "//evil.example/"):
            unknown = f"unknown path {path}; GET /api lists what there is"
            self.assertEqual(self.refused("POST", path), (404, unknown, ()))
        not_plain = "/<script>|*||/a b|/a'b|/\"|/\x1b[2J|/é|/a\n|/a%2f|/&"  # not to be quoted back
        for path in (*not_plain.split("|"), "/" + "x" * 4000):
            self.assertEqual(self.refused("GET", path)[:2], (404, "unknown path; GET /api lists what there is"))


class TestStaticFiles(unittest.TestCase):  # nothing in a request is ever a path
    def read(self, files: Mapping[str, bytes], module: str = "aiperf_api.py") -> dict[str, bytes]:
        """What read_static_files() finds for a module that stands among such files, and links."""
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        for name, body in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(body)
        for name in ("static/passwd.txt", "static/etc"):
            if (folder / name).parent.is_dir():
                (folder / name).symlink_to("/etc/passwd" if name.endswith("txt") else "/etc")
        with mock.patch.object(aiperf_api, "__file__", str(folder / module)):
            return aiperf_api.read_static_files()

    def test_files_are_read_beside_a_copied_or_an_installed_module_and_in_an_archive(self) -> None:
        files = {"dashboard.html": b"1", "guides/a.md": b"2", "demo.jsonl.gz": b"3"}
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as package:
            package.writestr("static/", b"")
            package.writestr("other.txt", b"4")
            for name, body in files.items():
                package.writestr(f"static/{name}", body)
        for folder in ("static", "aiperf_api_static"):
            beside = {f"{folder}/{name}": body for name, body in files.items()}
            self.assertEqual(self.read({**beside, "secret.txt": b"4"}), files, "without what links lead to")
        self.assertEqual(self.read({"app.pyz": archive.getvalue()}, "app.pyz/aiperf_api.py"), files)
        self.assertEqual(self.read({"static/of_another.css": b"4"}), {})

    def test_files_of_a_known_type_are_served(self) -> None:
        text = "text/plain; charset=utf-8"
        names = {"a.HTML": "text/html; charset=utf-8", "g/a.md": text, "a.txt": text, "a.json": "application/json"}
        table = aiperf_api.static_table({**dict.fromkeys(names, b"1"), "demo.jsonl.gz": b"2", "LICENSE": b"3"})
        self.assertEqual(table.keys(), names.keys())
        for name, content_type in names.items():
            start = b"Content-Type: %b\r\n" % content_type.encode()
            for part in (start, b"\r\nETag: W/", b"\r\nCache-Control: no-cache\r\n"):
                self.assertIn(part, table[name].encode(date=b"x"))

    def test_no_spelling_of_a_path_leaves_the_table(self) -> None:
        table = aiperf_api.static_table({"dashboard.js": b"1", "g/a.md": b"2"})
        router = aiperf_api.Router([aiperf_api.Route("/static/{file}", "file", "", print)])
        others = b"""g%2Fa.md ../aiperf_api.py ..%2faiperf_api.py %2e%2e/aiperf_api.py ..%5caiperf_api.py . ..
            ..%252faiperf_api.py ../static/dashboard.js ./dashboard.js /dashboard.js g/../dashboard.js dashboard.js/
            dashboard.js%20 dashboard.js%2f.. dashboard.js::$DATA C:%5cW /etc/passwd %2fetc%2fpasswd file:///etc"""
        for name in (b"dashboard.js", b"%64ashboard.js", b"g/a.md", *others.split()):
            found = router.match("GET", read_request(get(b"/static/" + name)).path)[1] in table
            self.assertEqual(found, name not in others.split(), name)


# == 7 == Metrics ======================================================================================================


class TestMetrics(unittest.TestCase):
    def test_the_lists_are_those_of_the_registry(self) -> None:
        """Of AIPerf 0.13's 139 metrics, 27 are measured in another unit than shown, and 9 are hidden (3 are both)."""
        hidden = {tag for tag in aiperf_api._HIDDEN_TAGS if aiperf_api.display_row({"tag": tag, "avg": 1}) is None}
        self.assertEqual(len(hidden), 9)
        self.assertLess({"requested_osl", "min_request_timestamp", "stream_setup_latency"}, hidden)
        units = [(unit, shown, len(tags.split())) for unit, shown, _, tags in aiperf_api._CONVERTED_TAGS]
        self.assertEqual(units, [("ns", "ms", 20), ("ns", "sec", 1), ("B", "KB", 2), ("sec", "ms", 1)])
        self.assertTrue(hidden.isdisjoint(tag for tag, _ in aiperf_api._CONVERSIONS))

    def test_raw_units_become_display_units_in_every_statistic_but_the_count(self) -> None:
        stats = {"avg": 270185870, "p95": 122564750.76, "p99": 3e8, "sum": 1e9, "std": 0, "min": 1, "max": 2e6}
        stats["current"] = 5e5
        shown = {stat: value * 1e-6 for stat, value in stats.items()}  # as AIPerf does it, to the same last digit
        raw = {"tag": "request_latency", "unit": "ns", **stats, "count": 295}
        self.assertEqual(aiperf_api.display_rows([raw]), {"request_latency": {"unit": "ms", **shown, "count": 295}})
        for tag, unit, value, wanted in (
            ("benchmark_duration", "ns", 14096553324.0, 14.096553324), ("http_req_data_received", "B", 5143.0, 5.0224609375),
            ("video_inference_time", "sec", 0.25, 250.0), ("request_latency", "ns", 3e8, 300.0),
            ("request_latency", "ms", 270.5, 270.5), ("benchmark_duration", "sec", 14.5, 14.5),  # as later versions send them
            ("no_such_tag", "ns", 7.0, 7.0), ("request_latency", "us", 7.0, 7.0),  # a unit that is not expected is left alone
        ):  # fmt: skip
            rows = aiperf_api.display_rows([{"tag": tag, "unit": unit, "avg": value}])
            self.assertEqual(rows[tag]["avg"], wanted, tag)

    def test_what_a_row_may_hold(self) -> None:
        name = "n" * 512
        for row, shown in (
            ({"unit": "ms", "avg": None, "p50": 2.5, "console_group": "default"}, {"unit": "ms", "p50": 2.5}),
            ({"avg": "fast", "p50": True, "min": [1], "count": "1"}, {}),
            ({"new": "x", "is": True, "n": 7, "o": {"a": 1}, "l": [], "no": None}, {"new": "x", "is": True, "n": 7}),
            ({"header": name, "unit": name, name: 1, name + "n": 1}, {"header": name, "unit": name, name: 1}),
        ):
            self.assertEqual(aiperf_api.display_rows([{"tag": "t", **row}]), {"t": shown})
        unfit_rows = (
            None, 1, "x", [], {}, {"tag": None}, {"tag": ""}, {"tag": 7}, {"tag": []}, {"tag": "requested_osl", "avg": 1},
            {"tag": name + "n"}, {"tag": "t", "unit": "é" * 257}, {"tag": "t", "header": name + "n"},
            {"tag": "t", **dict.fromkeys(map(str, range(64)), 1)},
        )  # fmt: skip
        for unfit in unfit_rows * 2:
            self.assertEqual(aiperf_api.display_list([unfit, {"tag": "t"}]), [{"tag": "t"}])
        self.assertEqual([aiperf_api.display_rows(rows) for rows in (None, {}, "x", 7)], [{}] * 4)
        rows = [{"tag": f"{number}", "avg": 1} for number in range(aiperf_api.ROWS_MAX + 1)]
        self.assertEqual(list(aiperf_api.display_rows(rows)), [row["tag"] for row in rows[:-1]])

    def test_a_message_keeps_everything_that_needs_no_change(self) -> None:
        rows = [
            {"unit": "ns", "avg": 5000000, "tag": "request_latency", "header": "H", "current": None},
            {"tag": "requested_osl", "unit": "tokens", "avg": 1}, {"tag": "x", "unit": "", "console_group": "none"},
        ]  # fmt: skip
        latency = {"unit": "ms", "avg": 5.0, "tag": "request_latency", "header": "H"}
        shown = [latency, {"tag": "x", "unit": ""}]

        def final(rows: list[dict[str, Any]]) -> dict[str, Any]:
            slices = [{"start_ns": 1, "metric_results": {row["tag"]: row for row in rows}}]
            return {"results": {"results": {"records": rows, "timeslices": slices, "n": None}, "errors": []}}

        self.assertEqual(aiperf_api.shown_message({"metrics": rows, "later": 1}), {"metrics": shown, "later": 1})
        self.assertEqual(aiperf_api.shown_message(final(rows)), final(shown))
        unchanged: tuple[dict[str, Any], ...] = (
            final(shown), {"metrics": shown}, {"metrics": []}, {"metrics": None}, {"results": {"results": None}}, {"results": []},
        )  # fmt: skip
        for message in unchanged:
            self.assertIs(aiperf_api.shown_message(message), message)


# == 8 == Prometheus text ==============================================================================================

GOLDEN_METRICS = {
    "request_latency": {
        "header": "Request Latency", "unit": "ms", "avg": 275.5, "p50": 275.25, "p99": 334.0, "count": 791, "sum": 217920.5,
    },
    "output_token_throughput_per_user": {"header": "Per User", "unit": "tokens/sec/user", "avg": 1.5, "std": 0.5},
    "request_error_rate": {"header": 'Rate\\ of\n"errors"', "unit": "%", "avg": 2.0, "count": 1},
}  # fmt: skip

GOLDEN_TEXT = r"""# HELP aiperf_info Benchmark
# TYPE aiperf_info gauge
aiperf_info{model="a\\b\"c\nd"} 1
# HELP aiperf_request_latency_ms Request Latency (in ms)
# TYPE aiperf_request_latency_ms summary
aiperf_request_latency_ms{model="m",quantile="0.5"} 275.25
aiperf_request_latency_ms{model="m",quantile="0.99"} 334.0
aiperf_request_latency_ms_count{model="m"} 791
aiperf_request_latency_ms_sum{model="m"} 217920.5
# HELP aiperf_request_latency_avg_ms Request Latency average (in ms)
# TYPE aiperf_request_latency_avg_ms gauge
aiperf_request_latency_avg_ms{model="m"} 275.5
# HELP aiperf_output_token_throughput_per_user_avg_tps_per_user Per User average (in tokens/sec/user)
# TYPE aiperf_output_token_throughput_per_user_avg_tps_per_user gauge
aiperf_output_token_throughput_per_user_avg_tps_per_user{model="m"} 1.5
# HELP aiperf_output_token_throughput_per_user_std_tps_per_user Per User standard deviation (in tokens/sec/user)
# TYPE aiperf_output_token_throughput_per_user_std_tps_per_user gauge
aiperf_output_token_throughput_per_user_std_tps_per_user{model="m"} 0.5
# HELP aiperf_request_error_rate_avg_percent Rate\\ of\n"errors" average (in %)
# TYPE aiperf_request_error_rate_avg_percent gauge
aiperf_request_error_rate_avg_percent{model="m"} 2.0
# HELP aiperf_request_error_rate_count_percent Rate\\ of\n"errors" observation count (in %)
# TYPE aiperf_request_error_rate_count_percent gauge
aiperf_request_error_rate_count_percent{model="m"} 1
# HELP aiperf_things_total Things
# TYPE aiperf_things_total counter
aiperf_things_total 3
"""

GOLDEN_OPENMETRICS = r"""# TYPE aiperf info
# HELP aiperf Benchmark
aiperf_info{model="a\\b\"c\nd"} 1
# TYPE aiperf_request_error_rate_avg_percent gauge
# UNIT aiperf_request_error_rate_avg_percent percent
# HELP aiperf_request_error_rate_avg_percent Rate\\ of\n\"errors\" average (in %)
aiperf_request_error_rate_avg_percent 2.0
# TYPE aiperf_request_error_rate_count_percent gauge
# UNIT aiperf_request_error_rate_count_percent percent
# HELP aiperf_request_error_rate_count_percent Rate\\ of\n\"errors\" observation count (in %)
aiperf_request_error_rate_count_percent 1
# TYPE aiperf_things counter
# HELP aiperf_things Things
aiperf_things_total 3
# EOF
"""


def lines_of(families: Iterable[aiperf_api.Family], render: Any = aiperf_api.render_text) -> list[str]:
    return [line for line in render(families).decode().splitlines() if not line.startswith("#")]


def read_by(parse: Any, exposition: bytes) -> dict[tuple[str, str], float]:
    """Return the samples that a parser reads, none of them twice."""
    samples = [sample for family in parse(exposition.decode()) for sample in family.samples]
    series = {(sample.name, str(sorted(sample.labels.items()))): sample.value for sample in samples}
    assert len(series) == len(samples), "a series twice"
    return series


class TestPrometheusText(unittest.TestCase):
    def setUp(self) -> None:
        found = aiperf_api.FamilySet()
        found.add(("aiperf", "info", "Benchmark", ""), (("model", 'a\\b"c\nd'),), 1)
        found.add(("aiperf_things", "counter", "Things", ""), (), 3)
        self.info, self.counter = found.families.values()

    def test_golden_text(self) -> None:
        metrics = aiperf_api.metric_families(GOLDEN_METRICS, (("model", "m"),))
        self.assertEqual(aiperf_api.render_text([self.info, *metrics, self.counter]).decode(), GOLDEN_TEXT)

    def test_golden_openmetrics(self) -> None:
        metrics = aiperf_api.metric_families({"request_error_rate": GOLDEN_METRICS["request_error_rate"]})
        text = aiperf_api.render_openmetrics([self.info, *metrics, self.counter]).decode()
        self.assertEqual(text, GOLDEN_OPENMETRICS)
        self.assertEqual((aiperf_api.render_text([]), aiperf_api.render_openmetrics([])), (b"", b"# EOF\n"))

    def test_units_are_named_by_the_rules_of_the_exporter(self) -> None:
        for unit, name in (
            ("ms", "ms"), ("%", "percent"), ("tokens/sec", "tps"), ("tokens/sec/user", "tps_per_user"),
            ("requests/sec", "requests_per_sec"), ("tokens/s", "tokens_per_s"), ("J*s", "j_s"), ("", ""),
            ("good-req/s/W", "good_req_per_s_per_w"), ("GB", "gb"), ("1/s", "_1_per_s"),
        ):  # fmt: skip
            self.assertEqual(aiperf_api.unit_name(unit), name)

    def test_hostile_names_are_names_like_any_other(self) -> None:
        tag = '"}<script>\n'
        families = aiperf_api.metric_families({tag: {"header": tag, "unit": tag, "p50": 1.0}}, (("model", tag),))
        line = 'aiperf____script______script__{model="\\"}<script>\\n",quantile="0.5"} 1.0'
        self.assertEqual(lines_of(families), [line])
        families = aiperf_api.metric_families({"t": {"header": "a\x1b[2J\rb", "avg": 1}}, (("model", "\x9bx\x00"),))
        for render in (aiperf_api.render_text, aiperf_api.render_openmetrics):
            self.assertNotRegex(render(families).decode(), "[\x00-\x09\x0b-\x1f\x7f-\x9f]")

    def test_of_two_series_that_clean_to_one_the_first_stays(self) -> None:
        rows = {"a-b": {"avg": 1, "unit": "ms"}, "a_b": {"avg": 2, "max": 3, "unit": "MS"}}
        self.assertEqual(lines_of(aiperf_api.metric_families(rows)), ["aiperf_a_b_avg_ms 1"])
        found = aiperf_api.FamilySet()
        for worker in ("a\x00", "a\x01", "b"):  # both are written "a "
            found.add(("x", "gauge", "", ""), (("worker", worker),), len(worker))
        found.add(("x", "counter", "another kind", ""), (), 1)
        self.assertEqual(lines_of(found.families.values()), ['x{worker="a "} 2', 'x{worker="b"} 1'])
        pairs = (("a\x00", "p1"), ("b", "p1"), ("a\x01", "p99"))
        series = [{"labels": {"id": name}, "stats": {"p50": 1.0, stat: 2.0}} for name, stat in pairs]
        families = aiperf_api.server_families({"e": {"metrics": {"m": {"series": series}}}})
        self.assertEqual(len(lines_of(families)), 4)

    def test_a_family_that_would_take_anothers_name_is_left_out(self) -> None:
        families = [
            aiperf_api.Family("x", "summary", "", "", {"_count": 1}), aiperf_api.Family("x_count", "gauge", "", "", {"": 2}),
            aiperf_api.Family("x_other", "gauge", "", "", {}), aiperf_api.Family("x", "gauge", "", "", {"": 3}),
        ]  # fmt: skip
        self.assertEqual(aiperf_api.unique_families(families), families[:1])

    def test_values_are_written_as_numbers_and_nothing_else_is_written(self) -> None:
        found = aiperf_api.FamilySet()
        unfit = (float("inf"), float("nan"), None, True, "1", [])
        for value in (1, 1.0, 0.1, 1e300, -2.5, 2**63, *unfit):
            found.add(("x", "gauge", "", ""), (("i", str(value)),), value)
            found.add_row("y", {"avg": value}, f'i="{value}"', "Y")
            found.add(("z", "counter", "", ""), (), -1)
        lines = lines_of(found.families.values())
        numbers = ["1", "1.0", "0.1", "1e+300", "-2.5", "9223372036854775808"]
        self.assertEqual([line.rsplit(" ", 1)[1] for line in lines], numbers * 2)

    def test_openmetrics_leaves_out_what_a_summary_may_not_say(self) -> None:
        families = aiperf_api.metric_families({"t": {"p50": -1.0, "p99": 1.0, "sum": -5, "count": 2, "avg": -1.0}})
        families += aiperf_api.metric_families({"u": {"p50": 1.5, "count": 2.5, "sum": 0.5}})
        self.assertEqual(len(lines_of(families)), 8)
        shown = ['aiperf_t{quantile="0.99"} 1.0', "aiperf_t_count 2", "aiperf_t_avg -1.0"]
        shown += ['aiperf_u{quantile="0.5"} 1.5', "aiperf_u_sum 0.5"]
        self.assertEqual(lines_of(families, aiperf_api.render_openmetrics), shown)

    def test_gpu_telemetry_has_labels_instead_of_names(self) -> None:
        for vendor, gpu in (("NVIDIA", "nvidia_power_usage"), ("AMD", "amd_power_usage"), ("", "gpu_power_usage")):
            tag = f"{gpu}_dcgm_http___127_0_0_1_19400_metrics_gpu1_GPU-8f1c7a52"
            header = f"{vendor} GPU Power Usage | 127.0.0.1:19400 | GPU 1 | H200 | 141 GB".strip()
            row = {"unit": "W", "header": header, "current": 460.5, "p50": 1.0}
            summary, current = aiperf_api.telemetry_families({tag: row})
            labels = '{source="127.0.0.1:19400",gpu="1",gpu_name="H200 | 141 GB",uuid="GPU-8f1c7a52"}'
            help_text = "GPU Power Usage current value (in W)"
            self.assertEqual(current, ("aiperf_gpu_power_usage_current_w", "gauge", help_text, "w", {labels: 460.5}))
            self.assertEqual(summary.name, "aiperf_gpu_power_usage_w")

    def test_gpus_of_several_sources_share_a_family(self) -> None:
        places = ("amdsmi___localhost", "pynvml_gpu0_x", "_dcgm_" * 20_000)
        gpus = list(itertools.product(places, (0, 1)))
        rows = {f"amd_temperature_dcgm_{place}_gpu{gpu}_abc": {"unit": "°C", "avg": gpu} for place, gpu in gpus}
        for tag in ("fan speed", "_dcgm_" * 20_000, "x_dcgm_y_gpu1_", "x_dcgm_y_gpuA_b", "x_gpu1_b"):
            self.assertEqual(aiperf_api.gpu_series(tag, "T | S | GPU 7")[2][:2], (("source", "S"), ("gpu", "7")))
        (family,) = aiperf_api.telemetry_families(rows)
        self.assertEqual((family.name, family.unit), ("aiperf_gpu_temperature_avg_celsius", "celsius"))
        labels = [f'{{source="{place}",gpu="{gpu}",gpu_name="",uuid="abc"}}' for place, gpu in gpus]
        self.assertEqual(list(family.samples), labels)

    def test_server_metrics_have_labels_instead_of_names(self) -> None:
        stats = {"count": 2, "sum": 0.5, "avg": 0.25, "p50_estimate": 0.2, "count_rate": 1.5, "buckets": {}}
        own, counted = {"endpoint": "own", "model": 7}, {"total": 5.0, "rate": 0.5}
        metrics = {
            "vllm:ttft_seconds": {"type": "histogram", "series": [{"labels": {"engine": "0"}, "stats": stats}]},
            "vllm:prompt_tokens": {"type": "counter", "series": [{"labels": None, "stats": counted}]},
            "vllm:kv": {"type": "gauge", "series": [{"labels": own, "stats": {"avg": 1.0}}]},
        }
        shown = """ttft_seconds_count{model="m",endpoint="h:1",engine="0"} 2
            ttft_seconds_sum{model="m",endpoint="h:1",engine="0"} 0.5
            ttft_seconds{model="m",endpoint="h:1",engine="0",quantile="0.5"} 0.2
            ttft_avg_seconds{model="m",endpoint="h:1",engine="0"} 0.25
            ttft_seconds_count_rate{model="m",endpoint="h:1",engine="0"} 1.5
            prompt_tokens_total{model="m",endpoint="h:1"} 5.0
            prompt_tokens_rate{model="m",endpoint="h:1"} 0.5
            kv_avg{model="m",endpoint="h:1",exported_endpoint="own",exported_model="7"} 1.0"""
        families = aiperf_api.server_families({"h:1": {"metrics": metrics}}, (("model", "m"),))
        self.assertEqual(lines_of(families), [f"aiperf_server_vllm_{line.strip()}" for line in shown.splitlines()])

    def test_malformed_server_metrics_are_passed_over(self) -> None:
        stats = {"avg": "x", "p50": None, "total": -1}
        series = [
            None, {}, {"stats": []}, {"stats": stats, "labels": {"": 1, "0": 2, "__a": 3}}, {"stats": {"avg": 1}, "labels": 7},
            {"stats": {"avg": 1}, "labels": {"a": "b" * 513}},
        ]  # fmt: skip
        many = [{"stats": {"avg": 1}, "labels": {"n": n}} for n in range(aiperf_api.ROWS_MAX + 1)]
        for summaries, count in (
            (None, 0), ([], 0), ({"e": None}, 0), ({"e": {"metrics": []}}, 0), ({"e": {"metrics": {"m": {"series": 1}}}}, 0),
            ({"e": {"metrics": {"m": {"type": "counter", "description": 7, "series": series}}}}, 0),
            ({"e": {"metrics": {"m": {"series": many}}}, "f": {"metrics": {"m": {"series": many}}}}, aiperf_api.ROWS_MAX),
        ):  # fmt: skip
            self.assertEqual(len(lines_of(aiperf_api.server_families(summaries))), count)


@needs_recordings
@unittest.skipUnless(prometheus_client, "needs the prometheus_client package")
class TestExpositionOfRecordings(unittest.TestCase):  # over HTTP, and by Prometheus itself: .ci/test_prometheus.py
    def test_two_parsers_read_the_same_values_out_of_both_formats_all_through_every_recording(self) -> None:
        seen = set()
        for path in sorted(RECORDINGS.glob("*.jsonl.gz")):
            benchmark = aiperf_api.Benchmark()
            for number, (kind, payload, now_ns) in enumerate(recorded_run(path.name.partition(".")[0]), 1):
                benchmark.apply(aiperf_api.BusMessage(kind, payload), now_ns)
                families = aiperf_api.unique_families(aiperf_api.state_families(benchmark, now_ns))
                text = aiperf_api.render_text(families)
                form = frozenset(line.rstrip(b"0123456789.e+-") for line in text.splitlines())
                if form not in seen:  # more than numbers has changed: one in seven
                    seen.add(form)
                    values, again = read_by(parse_text, text), aiperf_api.render_openmetrics(families)
                    self.assertTrue(values == read_by(parse_openmetrics, again), f"{path.name} {number}")
                    self.assertGreater(len(values), 10)


# == 9 == Benchmark ====================================================================================================

SECOND = 1_000_000_000
BASE_NS = 2_000_000_000 * SECOND  # a bus clock of its own, far from the benchmark's


def recorded_run(name: str) -> list[tuple[str, bytes, int]]:
    """Return the (type, payload, bus time in ns) of the messages of a recorded run."""
    messages = wire_recording(name)
    return [(topic.decode().rstrip("$").split(".")[0], payload, t_ns) for t_ns, topic, payload in messages]


def replayed(messages: Iterable[Any], benchmark: Any = None, base_ns: int | None = None) -> tuple[Any, int]:
    """Apply messages, by their own time or as if the first came at `base_ns`; return the benchmark and the last time."""
    benchmark, shift, now_ns = benchmark or aiperf_api.Benchmark(), None, 0
    for kind, payload, recorded_ns in messages:
        if shift is None:
            shift = 0 if base_ns is None else base_ns - recorded_ns
        now_ns = recorded_ns + shift
        benchmark.apply(aiperf_api.BusMessage(kind, payload), now_ns)
    return benchmark, now_ns


def answers(benchmark: aiperf_api.Benchmark, now_ns: int) -> dict[str, Any]:
    """Return every answer as a client would read it, but for those that other runs take part in."""
    names = "metrics workers config server_metrics results history labels".split()
    found = {"status": benchmark.status(now_ns), "progress": benchmark.progress(now_ns)}
    found.update((name, getattr(benchmark, name)()) for name in names)
    return json.loads(aiperf_api.json_bytes(found))


class BenchmarkTestCase(unittest.TestCase):
    """A benchmark, and messages for it that are made on the spot."""

    def setUp(self) -> None:
        self.late_errors = []
        self.benchmark = aiperf_api.Benchmark(self.late_errors.append)

    def send(self, now_ns: int, message_type: str, /, **fields: Any) -> None:
        payload = json.dumps({"message_type": message_type, "service_id": "s", **fields}).encode()
        self.benchmark.apply(aiperf_api.BusMessage(message_type, payload), now_ns)

    def send_phase(self, now_ns: int, kind: str, phase: str, /, **stats: Any) -> None:
        self.send(now_ns, f"credit_phase_{kind}", stats={"phase": phase, **stats})

    def send_metrics(self, now_ns: int, *rows: dict[str, Any]) -> None:
        self.send(now_ns, "realtime_metrics", metrics=list(rows))

    def results(self, errors: Mapping[int, int], **fields: Any) -> dict[str, Any]:
        details = {code: {"code": code, "type": "T", "message": f"m{code}"} for code in errors}
        summary = [{"error_details": details[code], "count": count} for code, count in errors.items()]
        return {"results": {"results": {"records": [{"tag": "t", "avg": 1}], "error_summary": summary, **fields}}}

    def send_results(self, now_ns: int, *, errors: Mapping[int, int] = {}, **fields: Any) -> None:
        self.send(now_ns, "process_all_results", **self.results(errors, **fields))

    def check_progress(self, now_ns: int, **wanted: Any) -> None:
        progress = self.benchmark.progress(now_ns)
        self.assertEqual({field: progress[field] for field in wanted}, wanted)


class EndState(NamedTuple):  # its first four fields as figures() has them
    state: str
    total: int | None
    completed: int
    errors: int
    latency: float | None  # avg of request_latency in ms; None without final results
    percent: float
    states: str  # all states in order
    error: str = ""  # words of it


def figures(progress: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(progress[field] for field in ("system_state", "total", "completed", "errors"))


RUN = "initializing configuring ready profiling processing complete"
STOPPED = "initializing configuring ready profiling processing stopping complete"
EARLY = "initializing configuring "
BEGUN = EARLY + "ready profiling "

END_STATES = {
    "run_0_3_success": EndState("complete", 300, 300, 5, 270.1859, 100, RUN),
    "run_0_6_success": EndState("complete", 300, 300, 6, 270.1107, 100, RUN),
    "run_0_12_failed_configure": EndState("failed", None, 0, 0, None, 0, EARLY + "failed", "okenizer"),
    "run_0_13_all_errors": EndState("failed", 200, 200, 200, None, 100, BEGUN + "processing failed", "500 Internal Server Error"),
    "run_0_13_cancelled": EndState("cancelled", 900, 408, 7, 272.0799, 45.3333, BEGUN + "stopping cancelled"),
    "run_0_13_duration_rate": EndState("complete", None, 510, 12, 273.3076, 100, STOPPED),
    "run_0_13_failed_configure": EndState("failed", None, 0, 0, None, 0, EARLY + "failed", "okenizer"),
    "run_0_13_failed_request_threshold": EndState("cancelled", 400, 11, 7, 444.5401, 2.75, BEGUN + "processing cancelled", "before all records"),
    "run_0_13_four_phases": EndState("complete", None, 359, 7, None, 100, RUN),
    "run_0_13_goodput": EndState("complete", 200, 200, 5, 500.9913, 100, STOPPED),
    "run_0_13_gpu_and_server_metrics": EndState("complete", 1300, 1300, 23, 276.0126, 100, RUN),
    "run_0_13_gpu_final_differs": EndState("complete", 300, 300, 6, None, 100, RUN),
    "run_0_13_killed": EndState("profiling", 800, 76, 1, None, 9.5, EARLY + "ready profiling"),
    "run_0_13_multi_turn": EndState("complete", None, 77, 2, None, 100, STOPPED),
    "run_0_13_no_realtime_metrics": EndState("complete", 800, 800, 14, 297.6002, 100, RUN),
    "run_0_13_server_down": EndState("failed", 200, 200, 200, None, 100, BEGUN + "processing failed", "ClientConnectorError"),
    "run_0_13_success": EndState("complete", 800, 800, 9, 275.0049, 100, RUN),
    "run_0_13_sweep_of_three": EndState("complete", 60, 60, 0, None, 100, " ".join([RUN] * 3)),
    "run_0_13_timeslices": EndState("complete", None, 232, 1, None, 100, RUN),
    "run_0_13_two_urls": EndState("complete", 100, 100, 50, None, 100, RUN),
}  # fmt: skip
PLAYED = """run_0_13_success run_0_13_gpu_and_server_metrics run_0_13_cancelled run_0_13_duration_rate
    run_0_13_failed_configure run_0_12_failed_configure run_0_6_success run_0_3_success run_0_13_no_realtime_metrics
    run_0_13_killed""".split()  # through a real bus, one after the other; the last was killed


@needs_recordings
class TestRecordedRuns(unittest.TestCase):
    def test_every_recording_comes_to_its_end(self) -> None:
        for name, wanted in END_STATES.items():
            with self.subTest(name):
                benchmark, states, before = aiperf_api.Benchmark(), [], 0.0
                for kind, payload, now_ns in recorded_run(name):
                    benchmark.apply(aiperf_api.BusMessage(kind, payload), now_ns)
                    self.assertIn(kind, aiperf_api.KNOWN_MESSAGE_TYPES)
                    states.append(benchmark.status(now_ns)["state"])
                    percent = benchmark.progress(now_ns)["percent_complete"]
                    if "sweep" not in name:
                        self.assertTrue(before <= percent <= 100, f"{before} to {percent}")
                    before = percent
                progress, results = benchmark.progress(now_ns), benchmark.results()
                self.assertEqual(figures(progress), wanted[:4])
                self.assertAlmostEqual(progress["percent_complete"], wanted.percent, 3)
                self.assertEqual(" ".join(key for key, _ in itertools.groupby(states)), wanted.states)
                self.assertEqual(results["status"], wanted.state if wanted.state in aiperf_api.ENDS else "running")
                for told in (benchmark.status(now_ns)["error"], results["reason"]) if wanted.error else ():
                    self.assertIn(wanted.error, told)
                if wanted.latency is not None:
                    row = benchmark.metrics()["metrics"]["request_latency"]
                    self.assertEqual((round(row["avg"], 4), row["unit"]), (wanted.latency, "ms"))
                    if wanted.state == "complete" and name != "run_0_6_success":
                        self.assertEqual(row["count"], wanted.completed - wanted.errors)

    def test_final_figures_equal_the_last_results_to_the_last_digit(self) -> None:
        for name in END_STATES:
            run = recorded_run(name)
            last = {kind: json.loads(payload) for kind, payload, _ in run}
            benchmark, _ = replayed(run)
            results = last.get("process_all_results", {}).get("results", {}).get("results", {})
            for row in results.get("records", ()):
                found = benchmark.figures("metrics")[row["tag"]]
                del row["tag"]
                row.pop("console_group", None)
                kept = {key: value for key, value in row.items() if value is not None}
                self.assertEqual(found, kept, name)
            telemetry = last.get("process_telemetry_result", {}).get("telemetry_result", {}).get("results", {})
            for endpoint in telemetry.get("endpoints", {}).values():
                for gpu in endpoint["gpus"].values():
                    for metric, row in gpu["metrics"].items():
                        tag = f"{metric}_dcgm_http___127_0_0_1_19400_metrics_gpu{gpu['gpu_index']}_GPU-8f1c7a52"
                        self.assertLessEqual(row.items(), benchmark.figures("telemetry")[tag].items())

    def test_four_phases_are_counted_once_and_the_percentage_never_stands(self) -> None:
        benchmark, changed_ns, before = aiperf_api.Benchmark(), None, -1.0
        for kind, payload, now_ns in recorded_run("run_0_13_four_phases"):
            benchmark.apply(aiperf_api.BusMessage(kind, payload), now_ns)
            progress = benchmark.progress(now_ns)
            if progress["percent_complete"] > before or not progress["phase_number"] or benchmark.end:
                before, changed_ns = progress["percent_complete"], now_ns
            self.assertLess(now_ns - (changed_ns or now_ns), 3 * SECOND)
        self.assertEqual(list(progress["phases"]), ["warm-me", "low-load", "high", "rate_10"])
        self.assertEqual((round(progress["elapsed_ns"] / SECOND, 1), benchmark.labels()["concurrency"]), (22.7, "2"))
        self.assertEqual((progress["phase"], progress["phase_number"], progress["phase_percent"]), ("rate_10", 3, 100))

    def test_a_sweep_is_three_runs(self) -> None:
        benchmark, now_ns = replayed(recorded_run("run_0_13_sweep_of_three"))
        runs = benchmark.runs(now_ns)
        found = [(one["n"], one["state"], one["requests"], one["errors"], one["concurrency"]) for one in runs]
        self.assertEqual(found, [(1, "complete", 60, 1, 2), (2, "complete", 60, 1, 4), (3, "complete", 60, 0, 8)])
        self.assertEqual(len({one["benchmark_id"] for one in runs}), 3)
        self.assertTrue(all(one["started_ns"] < one["ended_ns"] for one in runs))
        self.assertEqual(set(runs[0]["metrics"]["request_latency"]), {"unit", "header", "avg", "p50", "p99"})
        first, last = benchmark.run(1, now_ns) or {}, benchmark.run(3, now_ns) or {}
        self.assertEqual(last["metrics"], benchmark.figures("metrics"))
        self.assertLess(len(runs[0]["metrics"]), len(first["metrics"]))
        self.assertEqual(first.keys() - runs[0].keys(), {"final", "telemetry", "error_summary"})
        self.assertIsNone(benchmark.run(4, now_ns))
        self.assertEqual(benchmark.run_number, 3)

    def test_nothing_of_one_run_is_left_in_the_next(self) -> None:
        some = "0_3_success 0_6_success 0_12_failed_configure 0_13_killed 0_13_all_errors 0_13_failed_configure"
        names = [name for name in END_STATES if "sweep" not in name and (DEEP or name[4:] in some.split())]
        pairs = [(first, second, BASE_NS + 3600 * SECOND) for first, second in itertools.product(names, names)]
        _, end_ns = replayed(recorded_run("run_0_13_killed"), base_ns=BASE_NS)
        at_once = ("run_0_13_success", "run_0_6_success", "run_0_3_success", "run_0_13_failed_configure")
        pairs += [("run_0_13_killed", second, end_ns + SECOND) for second in at_once]  # no silence: messages tell
        alone = functools.cache(lambda name, at_ns: self.lasting(*replayed(recorded_run(name), base_ns=at_ns)))
        for first, second, later_ns in pairs:
            benchmark, _ = replayed(recorded_run(first), base_ns=BASE_NS)
            found = self.lasting(*replayed(recorded_run(second), benchmark, later_ns))
            for key, answer in alone(second, later_ns).items():
                self.assertTrue(found[key] == answer, f"{key} of {second} after {first}")  # a diff would take a minute

    def lasting(self, benchmark: aiperf_api.Benchmark, now_ns: int) -> dict[str, Any]:
        """Return the answers without the moment of the first message: those before a run's sign are the last run's."""
        found = answers(benchmark, now_ns)
        del found["history"]["start_ns"], found["status"]["run"], found["status"]["label"]
        if not found["progress"]["phases"]:
            del found["status"]["started_ns"], found["status"]["elapsed_sec"]
        return found

    def test_a_killed_run_turns_stale(self) -> None:
        benchmark, now_ns = replayed(recorded_run("run_0_13_killed"))
        self.assertFalse(benchmark.is_stale(now_ns + 10 * SECOND - 1))
        self.assertTrue(benchmark.is_stale(now_ns + 10 * SECOND))
        later = benchmark.progress(now_ns + 3600 * SECOND)
        self.assertIsNone(later["eta_sec"])
        self.assertLess(later["elapsed_ns"], 20 * SECOND)
        benchmark, now_ns = replayed(recorded_run("run_0_13_success"))
        self.assertFalse(benchmark.is_stale(now_ns + 3600 * SECOND))
        self.assertEqual(benchmark.progress(now_ns + 3600 * SECOND), benchmark.progress(now_ns))

    def test_the_end_may_go_missing(self) -> None:
        last_words = ("results_exported", "benchmark_complete", "worker_startup_state", "system_state_changed")
        for name in ("run_0_13_success", "run_0_13_cancelled", "run_0_13_duration_rate", "run_0_13_all_errors"):
            run = recorded_run(name)
            while run[-1][0] in last_words:
                run.pop()
            self.assertEqual(replayed(run)[0].end, END_STATES[name].state, name)
        for name in ("run_0_3_success", "run_0_6_success", "run_0_13_success"):  # who comes late learns it as well
            benchmark, now_ns = replayed(recorded_run(name)[-8:])
            self.assertEqual((benchmark.end, benchmark.progress(now_ns)["percent_complete"]), ("complete", 100), name)
        run = [message for message in recorded_run("run_0_13_success") if message[0] != "process_all_results"]
        benchmark, _ = replayed(run)
        self.assertEqual((benchmark.end, benchmark.metrics()["final"]), ("complete", True))


class TestLifeOfARun(BenchmarkTestCase):
    def test_what_is_heard_and_how_a_child_ended_lead_to_a_state_and_say_why(self) -> None:
        def command(name: str) -> tuple[str, dict[str, Any]]:
            return "command", {"command": name}

        def phase(kind: str, **stats: Any) -> tuple[str, dict[str, Any]]:
            return f"credit_phase_{kind}", {"stats": {"phase": "profiling", **stats}}

        def results(errors: Mapping[int, int]) -> tuple[str, dict[str, Any]]:
            return "process_all_results", self.results(errors, successful_request_count=0, error_request_count=5)

        commands = [command(name) for name in ("profile_configure", "profile_start", "profile_complete", "shutdown")]
        one, start = phase("progress", requests_sent=1, requests_completed=1), phase("start", start_ns=1)
        all_failed = phase("complete", requests_sent=5, requests_completed=5, request_errors=5)
        done, cancelled = (("benchmark_complete", {"was_cancelled": flag}) for flag in (False, True))
        stopping, off = (("system_state_changed", {"state": state}) for state in ("stopping", "shutdown"))
        cancel, some = command("profile_cancel"), ("process_all_results", self.results({}))
        metrics = "realtime_metrics", {"metrics": [{"tag": "t", "avg": 1}]}
        too_early, all_of_them = "ended before a request was sent", "All 5 inference request(s) failed"
        aborted = f"{all_of_them} or were aborted: "
        for messages, exit_text, state, error in (
            (commands[:1], None, "configuring", None), (commands[:2], None, "profiling", None),
            (commands[:3], None, "processing", None), (commands, None, "failed", too_early),
            ([cancel], None, "stopping", None), ([cancel, commands[-1]], None, "cancelled", None),
            ([done], None, "failed", too_early),  # completion needs a request
            ([one, off], None, "failed", "ended without results"),  # and a better sign corrects an end
            ([one, off, cancelled], None, "cancelled", None), ([one, off, done], None, "complete", None),
            ([start, stopping, off], None, "cancelled", None),  # in the middle of a phase: by a user
            ([one, ("process_records_result", some[1]), stopping], None, "complete", None),
            ([start, results({500: 5})], None, "failed", f"{all_of_them}: 500 T: m500"),
            ([start, results({499: 4, 500: 1})], None, "failed", f"{aborted}500 T: m500"),
            ([start, results({499: 5})], None, "failed", f"{aborted}499 T: m499"),
            ([start, cancel, results({499: 5})], None, "cancelled", None), ([], "", "failed", too_early),
            ([one], "killed by SIGKILL", "failed", "killed by SIGKILL"), ([some], "", "complete", None),
            ([some], "exit status 1", "failed", "exit status 1"), ([metrics], "", "complete", None),
            ([one, cancelled], "exit status 1", "cancelled", None),
            ([all_failed], "", "failed", f"{all_of_them}: ended without results"),
        ):  # fmt: skip
            self.setUp()
            for kind, fields in messages:
                self.send(1, kind, **fields)
            if exit_text is not None:
                self.benchmark.end_child(exit_text, 2)
            status = self.benchmark.status(3)
            self.assertEqual((status["state"], status["error"]), (state, error), messages)
            self.assertEqual(self.benchmark.end, state if state in aiperf_api.ENDS else None)
            exported = self.benchmark.progress(3)["results_exported"]
            self.assertEqual(exported, messages == [some] and not exit_text, messages)

    def test_the_most_frequent_errors_are_kept_and_cancelled_requests_count_apart(self) -> None:
        errors = {code: code + 1 for code in range(100, 40_000)}
        self.send_results(1, successful_request_count=5, error_request_count=5, errors={**errors, 499: 10**6, 500: 2})
        results = self.benchmark.results()
        summary = results["error_summary"]
        self.assertEqual(summary["errors"][0], {"code": 499, "type": "T", "message": "m499", "count": 10**6})
        self.assertEqual((summary["errors"][1]["count"], len(summary["errors"])), (40_000, 100))
        self.assertEqual((summary["more"], len(results["results"]["results"]["error_summary"])), (39_800, 100))
        payload = b'{"results":{"results":{"records":[%s1]}}}' % (b"1," * 9000)
        message = aiperf_api.BusMessage("process_all_results", payload)
        self.assertEqual(message.value, json.loads(message.payload))
        self.assertEqual(len(message.value["results"]["results"]["records"]), aiperf_api.ROWS_MAX)
        slices = b'{"results":{"results":{"records":[],"was_cancelled":false,"timeslices":[%s1]}}}' % (b"1," * 60_001)
        message = aiperf_api.BusMessage("process_all_results", slices)
        kept = {"records": [], "was_cancelled": False, "error_summary": []}
        self.assertEqual(message.value, {"results": {"results": kept}})
        self.setUp()
        self.benchmark.apply(message, 1)
        self.assertIn("60000 items", self.benchmark.results()["reason"])
        aborted = {**dict.fromkeys(range(1000, 1120), 2), 499: 1}  # they count, however rare
        for count, errors, wanted in (
            (5, {499: 3, 500: 2}, {"completed": 7, "errors": 2, "cancelled": 3}),
            (0, {499: 3}, {"completed": 5, "errors": 0}),  # not among the errors
            (241, aborted, {"cancelled": 1}),
        ):
            self.setUp()
            self.send_phase(1, "start", "profiling", start_ns=1, total_expected_requests=10)
            self.send_results(2, successful_request_count=5, error_request_count=count, errors=errors)
            self.check_progress(2, **wanted)

    def test_results_that_are_too_large_still_end_the_run(self) -> None:
        self.send_phase(1, "progress", "profiling", requests_sent=1, requests_completed=1)
        self.benchmark.results_too_large("process_telemetry_result", 2)
        self.assertIsNone(self.benchmark.end)
        self.benchmark.results_too_large("process_all_results", 3)
        results = self.benchmark.results()
        self.assertEqual((results["status"], results["results"]), ("complete", None))
        self.assertIn("too large", results["reason"])
        self.setUp()
        self.send_results(1, timeslices=["x" * 1000] * 9000)
        results = self.benchmark.results()
        self.assertIn("too large", results["reason"])
        self.assertEqual(results["results"]["results"]["records"], [{"tag": "t", "avg": 1}])

    def test_trailing_messages_leave_an_ended_run_and_the_first_sign_of_another_resets_it(self) -> None:
        for kind, field, values, number in (
            ("system_state_changed", "state", ("stopping", "shutdown"), 1),
            ("system_state_changed", "state", ("initializing", "profiling"), 2),
            ("command", "command", ("shutdown",), 1),
            ("command", "command", ("register_service", "spawn_workers", "profile_configure"), 2),
            ("worker_startup_state", "startup_state", ("shutting_down",), 1),
            ("worker_startup_state", "startup_state", ("starting",), 2),
            *((kind, "x", (1,), 1) for kind in ("results_exported", "benchmark_complete", "heartbeat")),
            ("command_response", "command", ("shutdown",), 1),
            ("worker_status_summary", "worker_statuses", ({},), 1),
            ("process_records_result", "results", ({"results": {"records": []}},), 1),
            ("credit_phase_start", "stats", ({"phase": "profiling", "start_ns": 5},), 2),
            ("credit_phase_progress", "stats", ({"phase": "another"},), 2),
        ):
            for value in values:
                self.setUp()
                self.send_phase(1, "start", "profiling", start_ns=5)
                self.send_results(1)
                self.send(2, kind, status="failure", **{field: value})
                found = (self.benchmark.run_number, self.benchmark.end, self.benchmark.metrics()["metrics"])
                self.assertEqual(found, (1, "complete", {"t": {"avg": 1}}) if number == 1 else (2, None, {}), value)

    def test_a_phase_that_began_at_another_time_is_another_run(self) -> None:
        self.send_phase(1, "start", "profiling", start_ns=5)
        self.send_phase(1, "progress", "profiling", start_ns=5)
        self.send_phase(1, "progress", "profiling")
        self.assertEqual(self.benchmark.run_number, 1)
        self.send_phase(1, "progress", "profiling", start_ns=6)
        self.assertEqual(self.benchmark.run_number, 2)
        first = self.benchmark.runs(1)[0]
        self.assertEqual((first["state"], "fell silent" in first["error"]), ("failed", True))

    def test_silence_makes_a_registration_the_start_of_another_run(self) -> None:
        self.send_phase(1, "start", "profiling", start_ns=5)
        self.send(5 * SECOND, "worker_startup_state", startup_state="starting")
        self.assertEqual(self.benchmark.run_number, 1)
        self.send(20 * SECOND, "worker_status_summary", worker_statuses={})  # of the other run already
        self.send(20 * SECOND, "worker_startup_state", startup_state="starting")
        self.assertEqual(self.benchmark.run_number, 2)

    def test_a_hundred_runs_are_remembered(self) -> None:
        for start_ns in range(1, 131):
            self.send_phase(1, "start", "profiling", start_ns=start_ns)
            self.send_results(1, was_cancelled=start_ns == 130)
        self.assertEqual([one["n"] for one in self.benchmark.runs(1)], list(range(31, 131)))
        self.assertEqual(self.benchmark.runs(1)[-1]["state"], "cancelled")
        self.assertIsNone(self.benchmark.run(30, 1))


class TestProgress(BenchmarkTestCase):
    def test_the_warmup_shows_until_profiling_begins_but_is_no_progress_of_it(self) -> None:
        self.send_phase(1, "start", "warmup", start_ns=1, total_expected_requests=10)
        self.send_phase(2, "complete", "warmup", start_ns=1, requests_completed=10, requests_end_ns=2)
        self.check_progress(2, total=10, completed=10, warmup=True, percent_complete=0)
        self.assertEqual(self.benchmark.progress(2)["phases"]["warmup"]["percent_complete"], 100)
        self.send_phase(3, "start", "profiling", start_ns=3, total_expected_requests=40)
        self.check_progress(3, total=40, completed=0, warmup=False)

    def test_phases_count_as_far_as_is_known_what_is_to_come(self) -> None:
        steps = (("step0", 100), ("step1", 300))
        phases = [{"name": "w", "kind": "warmup"}, *({"name": f"step{i}", "kind": "profiling"} for i in range(4))]
        for known, percents, totals in ((True, (25, 50), (100, 400)), (False, (50, 75), (None, None))):
            self.setUp()
            if known:
                self.benchmark.configure({"input_config": {"phases": phases}}, "artifacts")
            for index, (name, total) in enumerate(steps):
                start_ns = (1 + index) * SECOND
                stats = {"phase_name": name, "start_ns": start_ns, "total_expected_requests": total}
                self.send_phase(start_ns, "start", "profiling", **stats)
                done = {"requests_sent": total, "requests_completed": total, "requests_end_ns": start_ns + SECOND // 2}
                self.send_phase(start_ns + SECOND // 2, "complete", "profiling", **stats, **done)
                now_ns, completed = start_ns + SECOND // 2, (100, 400)[index]
                self.check_progress(now_ns, percent_complete=percents[index], completed=completed, total=totals[index])
                self.check_progress(now_ns, phase=name, phase_percent=100)
        self.send(9 * SECOND, "credits_complete")
        self.check_progress(9 * SECOND, percent_complete=100)

    def test_pace_and_time_left_are_named_as_in_aiperf(self) -> None:
        begin = 100 * SECOND
        self.send_phase(begin, "start", "profiling", start_ns=begin, total_expected_requests=100)
        self.assertIsNone(self.benchmark.progress(begin)["eta_sec"])
        stats = {"phase": "profiling", "success_records": 15, "error_records": 5}
        self.send(begin + SECOND, "processing_stats", request_ns=begin + SECOND, processing_stats=stats)
        self.send_phase(begin + SECOND, "progress", "profiling", requests_completed=25)
        progress = self.benchmark.progress(begin + SECOND)
        phase = progress["phases"]["profiling"]
        self.assertAlmostEqual(progress["eta_sec"], 3)
        wanted = {"requests_per_second": 25, "records_per_second": 20, "requests_eta_sec": 3, "records_eta_sec": 4}
        self.assertEqual({field: phase[field] for field in wanted}, wanted)
        self.assertEqual(phase["last_update_ns"], begin + SECOND)

    def test_a_different_clock_is_told_from_the_messages(self) -> None:
        theirs, ours = 5 * SECOND, BASE_NS
        self.send_phase(ours, "start", "profiling", start_ns=theirs, expected_duration_sec=10)
        self.check_progress(ours + SECOND, total=None, elapsed_ns=SECOND, percent_complete=10, eta_sec=9)
        sent_ns = theirs + 4 * SECOND
        self.send(ours + 2 * SECOND, "processing_stats", request_ns=sent_ns, processing_stats={"errors": 0})
        self.assertEqual(self.benchmark.progress(ours + 2 * SECOND)["elapsed_ns"], 4 * SECOND)

    def test_progress_is_never_withdrawn(self) -> None:
        self.send_phase(1, "start", "profiling", start_ns=1, total_expected_requests=100)
        self.send_phase(2, "progress", "profiling", requests_completed=50)
        self.check_progress(2, percent_complete=50)
        self.send_phase(3, "progress", "profiling", requests_completed=10, total_expected_requests=1000)
        self.check_progress(3, percent_complete=50, completed=50)


class TestWorkers(BenchmarkTestCase):
    def test_a_worker_is_put_together_from_its_messages(self) -> None:
        statuses = {"w1": "healthy", "w2": "idle"}
        self.send(1, "worker_status_summary", worker_statuses=statuses, worker_startup_states={"w1": "ready"})
        health = {"cpu_usage": 7.0, "io_counters": [1], "junk": {"a": 1}}
        self.send(2, "worker_health", service_id="w1", health=health, task_stats={"total": 5, "failed": None})
        stats = {"w1": {"processed": 3, "errors": 1}, "w3": {"success_records": 2, "error_records": 0}}
        self.send(3, "processing_stats", processing_stats={"errors": 1}, worker_stats=stats)
        group = {"group_id": "g", "status": "healthy", "declared_workers": 2, "task_stats": {"total": 4}}
        self.send(4, "worker_group_stats", **group, worker_statuses={"w4": "stale"})
        workers = self.benchmark.workers()
        self.assertEqual((workers["total_workers"], workers["active_workers"]), (4, 1))
        self.assertEqual(workers["worker_statuses"], {"w1": "healthy", "w2": "idle", "w3": "idle", "w4": "stale"})
        wanted = {**group, "health": {}, "last_update_ns": 4, "workers": {"w4": workers["workers"]["w4"]}}
        self.assertEqual(workers["worker_groups"], {"g": wanted})
        wanted = {
            "worker_id": "w1", "status": "healthy", "startup_state": "ready", "last_update_ns": 2,
            "task_stats": {"total": 5, "completed": 0, "failed": 0}, "health": {"cpu_usage": 7.0, "io_counters": [1]},
            "processing_stats": {"success_records": 3, "error_records": 1},
        }  # fmt: skip
        self.assertEqual(workers["workers"]["w1"], wanted)


class TestConfiguration(BenchmarkTestCase):
    def test_every_spelling_tells_the_identity(self) -> None:
        wanted = {"model": "a,b", "endpoint_type": "chat", "streaming": True, "concurrency": 8, "request_rate": 2.5}
        endpoint = {"type": "chat", "streaming": True}
        kinds = [{"name": "a", "kind": "warmup", "concurrency": 1}, {"name": "b", "kind": "profiling", "concurrency": 8, "rate": 2.5}]  # fmt: skip
        names = {"warmup": {"concurrency": 1}, "profiling": {"concurrency": 8, "request_rate": 2.5}}
        camel = {"modelNames": ["b", "a"], "endpointType": "chat", "streaming": "true", "concurrency": "8"}
        for config in (
            {"endpoint": {"model_names": ["b", "a"], **endpoint}, "loadgen": {"concurrency": 8, "request_rate": 2.5}},
            {**camel, "requestRate": "2.5"},
            {"model": "a,b", "endpoint-type": "chat", "streaming": True, "concurrency": 8.0, "request-rate": 2.5},
            {"benchmark": {"models": {"items": [{"name": "b"}, {"name": "a"}]}, "endpoint": endpoint, "phases": kinds}},
            {"input_config": {"models": ["a", "b"], "endpoint": endpoint, "phases": names}},
        ):
            self.assertLessEqual(wanted.items(), aiperf_api.identity_of(config).items(), config)

    def test_nonsense_tells_nothing(self) -> None:
        keys = "endpoint loadgen phases models concurrency benchmark rate sweep goodput variation".split()
        for value in (None, [], "", {}, [None], {"x": None}, -1, True):
            self.assertEqual(aiperf_api.identity_of(dict.fromkeys(keys, value)), {}, value)

    def test_origins_have_a_rank_and_complete_each_other(self) -> None:
        config = {"stats": {"phase": "profiling", "start_ns": 1}, "config": {"concurrency": 1, "request_rate": 9}}
        self.send(1, "credit_phase_start", **config)
        self.assertEqual(self.benchmark.config(), {"phases": {"profiling": {"concurrency": 1, "request_rate": 9}}})
        self.benchmark.configure({"model": "from-command", "concurrency": 2}, "command")
        wanted = {"model": "from-command", "streaming": "false", "concurrency": "2", "request_rate": "9.0"}
        self.assertEqual(self.benchmark.labels(), wanted)
        self.benchmark.configure({"concurrency": 3}, "file")
        self.assertEqual(self.benchmark.labels(), {**wanted, "concurrency": "3"})
        self.assertEqual(self.benchmark.config(), {"concurrency": 3})

    def test_a_configuration_from_outside_outlives_the_run_and_artifacts_do_not(self) -> None:
        self.benchmark.configure({"model": "m", "aiperf_version": "0.13.0"}, "file")
        self.send_phase(1, "start", "profiling", start_ns=1)
        cfg = {"sweep": {"type": "grid", "parameters": {"concurrency": [1, 2, 4]}}, "endpoint": {"type": "chat"}}
        run_config = {"benchmark_id": "b", "cfg": cfg, "variation": {"index": 0, "label": "concurrency_1"}, "junk": 1}
        self.benchmark.configure(run_config, "artifacts")
        self.assertEqual((self.benchmark.label, self.benchmark.runs_expected), ("run 1 of 3: concurrency_1", 3))
        self.assertEqual(self.benchmark.labels()["endpoint_type"], "chat")
        self.assertEqual(self.benchmark.config()["cfg"], cfg)
        self.assertNotIn("junk", self.benchmark.config())
        self.send_phase(1, "start", "profiling", start_ns=2)
        self.assertEqual(self.benchmark.labels(), {"model": "m", "streaming": "false"})
        self.assertEqual(self.benchmark.metrics()["aiperf_version"], "0.13.0")
        self.assertEqual((self.benchmark.label, self.benchmark.runs_expected), ("run 2", None))

    def test_the_artifact_directory_and_the_id_of_the_benchmark_are_those_of_the_bus(self) -> None:
        self.benchmark.configure({"output": {"artifact_directory": "there"}}, "command")
        self.assertEqual(self.benchmark.artifact_dir(), "there")
        config = {"stats": {"phase": "profiling", "start_ns": 1}, "config": {"artifact_dir": "here/concurrency_2"}}
        self.send(1, "credit_phase_progress", **config)  # which nobody looks through for secrets
        self.assertEqual(self.benchmark.artifact_dir(), "there")
        self.send(1, "credit_phase_start", **config)
        self.assertEqual(self.benchmark.artifact_dir(), "here/concurrency_2")
        self.send(1, "dataset_configured_notification", benchmark_generation="b")
        self.assertEqual(self.benchmark.status(1)["benchmark_id"], "b")

    def test_goodput_shows_its_thresholds_and_share(self) -> None:
        self.assertIsNone(self.benchmark.metrics()["goodput"])
        thresholds = {"request_latency": 250, "inter_token_latency": 10}
        flag = {"goodput": "request_latency:250 inter_token_latency:10"}
        for config in (flag, {"input": {"goodput": thresholds}}):
            self.benchmark.configure(config, "command")
            self.assertEqual(self.benchmark.metrics()["goodput"], {"thresholds": thresholds, "share": None})
        self.send_metrics(1, {"tag": "request_count", "avg": 8}, {"tag": "good_request_count", "avg": 6})
        self.assertEqual(self.benchmark.metrics()["goodput"]["share"], 0.75)


class TestHistory(BenchmarkTestCase):
    def values(self, tag: str, stat: str = "avg", **arguments: Any) -> list[float | None]:
        answer = self.benchmark.history([tag], [stat], **arguments)
        self.assertEqual(len(answer["times"]), len(answer["series"][0]["values"]))
        return answer["series"][0]["values"]

    def test_a_series_is_columnar_and_in_display_units(self) -> None:
        self.send_metrics(BASE_NS, {"tag": "request_latency", "header": "L", "unit": "ns", "avg": 5e6, "count": 2})
        series = {"tag": "request_latency", "stat": "avg", "unit": "ms", "header": "L", "values": [5.0]}
        count = {**series, "stat": "count", "unit": "", "values": [2]}
        wanted = {"interval_sec": 1.0, "times": [BASE_NS], "series": [series, count]}
        self.assertEqual(self.benchmark.history(["request_latency", "request_latency"]), wanted)
        self.send_metrics(BASE_NS - SECOND, {"tag": "request_latency", "avg": 1})  # a clock that was set back
        self.assertEqual(self.benchmark.history()["points"], 1)

    def test_since_and_points_choose(self) -> None:
        for index in range(10):
            self.send_metrics(BASE_NS + index * SECOND, {"tag": "t", "avg": index})
        self.assertEqual(self.values("t", since_ns=BASE_NS + 7 * SECOND), [8, 9])
        self.assertEqual(self.values("t", since_ns=BASE_NS + 9 * SECOND), [])
        for points, wanted in ((0, [9]), (1, [9]), (3, [1, 5, 9]), (9, [1, 3, 5, 7, 9]), (10, list(range(10)))):
            self.assertEqual(self.values("t", points=points), wanted, points)

    def test_an_answer_has_a_bound(self) -> None:
        tags = [f"t{index}" for index in range(150)]
        for index in range(1000):
            self.send_metrics(BASE_NS + index * SECOND, *({"tag": tag, "avg": 1, "max": 1} for tag in tags))
        with self.assertRaisesRegex(ValueError, "300 series of 1000 points .* fewer tags"):
            self.benchmark.history(tags)
        for unknown, stats in ((["x"], []), (["t1", "x"], []), (["t1"], ["min"])):
            self.assertRaises(LookupError, self.benchmark.history, unknown, stats)
        self.assertEqual(len(self.benchmark.history(tags, ["avg"])["series"]), 150)
        self.assertEqual(len(self.benchmark.history(tags, points=600)["times"]), 500)

    def test_hours_stay_bounded_and_even_at_any_pace(self) -> None:
        for pace in (1, 5):
            history = aiperf_api.History()
            for now_ns in range(0, 20_000 * pace * SECOND, pace * SECOND):
                history.add(now_ns, "phase", {"t": {"avg": now_ns / SECOND}})
                self.assertLessEqual(len(history.times), aiperf_api.HISTORY_POINTS_MAX)
            answer = history.answer(["t"], [], 0, aiperf_api.HISTORY_POINTS_MAX)
            gaps = [after - before for before, after in zip(answer["times"], answer["times"][1:])]
            self.assertLessEqual(max(gaps), 4 * pace * SECOND)
            self.assertGreater(len(gaps), 3500)
            self.assertEqual(answer["series"][0]["values"], [time_ns / SECOND for time_ns in answer["times"]])

    def test_joined_rows_keep_the_newest_figure_of_each_series(self) -> None:
        history = aiperf_api.History()
        for second in range(8):
            rows = {tag: {"avg": second} for tag in "tu" if tag == "t" or second in (2, 5)}
            history.add(second * SECOND, "phase", rows)
        for points, wanted in ((4, [[1, 3, 5, 7], [None, 2, 5, None]]), (2, [[3, 7], [2, 5]]), (1, [[7], [5]])):
            answer = history.answer(["t", "u"], [], 0, points)
            self.assertEqual([one["values"] for one in answer["series"]], wanted)
            self.assertEqual(answer["times"], [(7 - 8 // points * back) * SECOND for back in range(points)][::-1])

    def test_many_series_are_shared_fairly_and_the_answer_says_what_was_left_out(self) -> None:
        rows = {f"t{index}": dict.fromkeys("avg min max std p50 p99 sum count".split(), 1.0) for index in range(600)}
        history = aiperf_api.History()
        history.add(1, "server", dict(itertools.islice(rows.items(), 400)))
        self.assertNotIn("truncated", history.overview(1))
        history.add(SECOND * 2, "server", rows)
        overview = history.overview(1)
        stats = {" ".join(about["stats"]) for about in overview["tags"].values()}
        self.assertEqual((len(overview["tags"]), stats), (600, {"avg count sum p50 p99 max"}))
        self.assertEqual(overview["truncated"], {"tags": 0, "stats": ["min", "std"]})
        history.add(3 * SECOND, "server", {f"u{number}": {"avg": 1.0, "max": 1.0} for number in range(4000)})
        self.assertLessEqual(sum(map(len, history.columns.values())), aiperf_api.HISTORY_SERIES_MAX)
        self.assertGreater(history.overview(1)["truncated"]["tags"], 0)
        self.assertTrue(all(about["stats"] for about in history.overview(1)["tags"].values()))
        history = aiperf_api.History()
        for turn in range(9):  # made-up statistics take nothing from other tags
            made_up = {f"s{turn}_{index}": 1.0 for index in range(40)}
            history.add(turn * SECOND, "server", {"t": made_up, "u": {"avg": 1.0, "max": 1.0}})
        self.assertEqual([len(columns) for columns in history.columns.values()], [16, 2])
        self.assertEqual(len(history.overview(1)["truncated"]["stats"]), aiperf_api.EXTRAS_MAX)

    def test_the_values_of_all_series_are_bounded(self) -> None:
        history = aiperf_api.History()
        rows = {f"t{index}": {"avg": 1.0} for index in range(aiperf_api.HISTORY_SERIES_MAX)}
        for index in range(800):
            history.add(index * SECOND, "metrics", rows if index == 799 else {"t0": {"avg": 1.0}})
        self.assertLessEqual(len(history.times) * len(rows), aiperf_api.HISTORY_VALUES_MAX)

    def test_phases_are_series_and_their_end_shows(self) -> None:
        self.send_phase(BASE_NS, "start", "profiling", start_ns=1)
        self.send_phase(BASE_NS + SECOND, "progress", "profiling", requests_sent=9, requests_completed=4)
        end = BASE_NS + SECOND + SECOND // 5
        done = {"final_requests_sent": 9, "final_requests_completed": 9, "request_errors": 2}
        self.send_phase(end, "complete", "profiling", **done)
        answer = self.benchmark.history(["phase:profiling"], ["completed", "errors", "in_flight"])
        self.assertEqual(answer["times"], [BASE_NS, end])
        self.assertEqual([one["values"] for one in answer["series"]], [[0, 9], [0, 2], [0, 0]])


class TestBadMessages(BenchmarkTestCase):
    WRONG = json.loads(
        r'[null, [], {}, "x", -1, 0.5, true, [[]], [{"tag": null}], {"a": {"b": null}}, 18446744073709551616, "\ud83d"]'
    )

    def examples(self) -> Iterator[tuple[str, Any]]:
        """Yield the first message of each type of each generation, cut to what is quick to go through."""
        seen = set()
        for name in ("0_13_gpu_and_server_metrics", "0_3_success", "0_12_failed_configure", "0_6_success"):
            for kind, payload, _ in recorded_run(f"run_{name}"):
                message = json.loads(payload)
                key = (kind, name[:4], message.get("command"))
                if kind in aiperf_api.CORE_MESSAGE_TYPES and key not in seen:
                    seen.add(key)
                    yield kind, self.cut(message, 0)
        yield "worker_group_stats", {"group_id": "g", "worker_statuses": {"w": "idle"}, "worker_health": {"w": {}}}
        yield "service_error", {"error": {"type": "T", "message": "m"}}

    def cut(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            kept = itertools.islice(value.items(), 24 if depth < 4 else 3)
            return {key: self.cut(inner, depth + 1) for key, inner in kept}
        return [self.cut(inner, depth) for inner in value[:1]] if isinstance(value, list) else value

    def mutations(self, value: Any) -> Iterator[Any]:
        """Yield the value with each of its parts replaced by each of the wrong things, or missing."""
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            for wrong in (*self.WRONG, *self.mutations(value[key])):
                mutated = value.copy()
                mutated[key] = wrong
                yield mutated
            mutated = value.copy()
            del mutated[key]
            yield mutated

    @needs_recordings
    def test_wrong_types_anywhere_break_nothing(self) -> None:
        step = 1 if DEEP else 7
        for kind, message in self.examples():
            with self.subTest(kind):
                self.setUp()
                self.benchmark.apply(aiperf_api.BusMessage(kind, json.dumps(message).encode()), BASE_NS)
                for index, mutated in enumerate(itertools.islice(self.mutations(message), 0, None, step), 1):
                    now_ns = BASE_NS + index * SECOND // 5
                    with contextlib.suppress(aiperf_api.BusError):
                        self.benchmark.apply(aiperf_api.BusMessage(kind, json.dumps(mutated).encode()), now_ns)
                    answers(self.benchmark, now_ns)
                    if index % 16 == 0:
                        text = aiperf_api.render_text(aiperf_api.state_families(self.benchmark, now_ns))
                        self.assertNotIn(b"None", text)
                        aiperf_api.json_bytes([self.benchmark.runs(now_ns), self.benchmark.run(1, now_ns)])
                        self.setUp()

    def test_a_message_that_cannot_be_used_changes_nothing(self) -> None:
        self.send_phase(1, "start", "profiling", start_ns=1)
        self.send_metrics(1, {"tag": "t", "avg": 1})
        before, version = answers(self.benchmark, 2), self.benchmark.version
        kinds = sorted(aiperf_api.CORE_MESSAGE_TYPES - {"realtime_metrics"})
        bad = [(kind, payload, "not_json") for kind in kinds for payload in (b"", b"\xff\xfe", b"{")]
        bad += [(kind, payload, "not_object") for kind in kinds for payload in (b"[1]", b'"x"')]
        bad += [(kind, b"{}", "bad_shape") for kind in ("credit_phase_start", "worker_health", "command")]
        bad += [("realtime_telemetry_metrics", b'{"metrics":{}}', "bad_shape")]
        bad += [("process_all_results", b"[%s1]" % (b"1," * 1_000_000), "too_large")]
        bad += [("command", b"[%s1]" % (b"{}," * 50_000), "too_large")]
        bad += [("worker_health", b'{"service_id":"%s"}' % (b"w" * 513), "bad_shape")]
        bad += [("credit_phase_start", b'{"stats":{"phase":"%s"}}' % (b"p" * 513), "bad_shape")]
        for kind, payload, error in bad:
            with self.assertRaises(aiperf_api.BusError) as caught:
                self.benchmark.apply(aiperf_api.BusMessage(kind, payload), 2)
            self.assertEqual(caught.exception.kind, error, kind)
        self.assertEqual((answers(self.benchmark, 2), self.benchmark.version), (before, version))

    def test_metrics_are_read_when_asked_for_and_bad_ones_are_told_once(self) -> None:
        for index in range(100):
            self.send_metrics(BASE_NS + index, {"tag": "t", "avg": index})
        self.assertEqual(self.benchmark.figures("metrics"), {"t": {"avg": 99}})
        message = aiperf_api.BusMessage("realtime_metrics", b'{"metrics":[]}')
        value, count = message.value, sys.getrefcount(message.value)
        self.benchmark.apply(message, BASE_NS + 100)
        del message
        self.assertLess(sys.getrefcount(value), count)  # what waits to be read keeps no parsed value
        self.benchmark.apply(aiperf_api.BusMessage("realtime_metrics", b"{"), BASE_NS + 100)
        self.assertEqual(self.late_errors, [])
        for _ in range(2):
            self.assertEqual(self.benchmark.figures("metrics"), {"t": {"avg": 99}})
        self.send_metrics(BASE_NS + 200, *({"tag": f"t{n}", "avg": 1} for n in range(aiperf_api.ROWS_MAX + 1)))
        self.assertEqual(len(self.benchmark.figures("metrics")), aiperf_api.ROWS_MAX)
        self.assertEqual([error.kind for error in self.late_errors], ["not_json", "bad_shape"])

    def test_a_hostile_publisher_cannot_fill_the_memory(self) -> None:
        junk = "x" * 1000
        for index in range(aiperf_api.EXTRAS_MAX + 10):
            config = {"stats": {"phase": f"p{index}", "start_ns": 1}, "config": {"junk": junk * 20}}
            self.send(1, "credit_phase_start", **config)
            self.send_phase(1, "progress", "p0", **{f"k{index * 50 + i}": junk[:500] for i in range(50)})
        self.assertEqual(len(self.benchmark.progress(1)["phases"]), aiperf_api.EXTRAS_MAX)
        self.assertLess(len(aiperf_api.json_bytes(self.benchmark.progress(1)["phases"]["p0"])), 64 * 1024)
        for index in range(300):
            self.send(1, "worker_group_stats", group_id=f"g{index}", junk=junk)
        statuses = {f"w{index}": f"s{index}" for index in range(aiperf_api.WORKERS_MAX + 10)}
        self.send(1, "worker_status_summary", worker_statuses=statuses)
        workers = self.benchmark.workers()
        self.assertEqual((workers["total_workers"], len(workers["worker_groups"])), (aiperf_api.WORKERS_MAX, 256))
        self.assertNotIn(junk.encode(), aiperf_api.json_bytes(workers))
        self.assertEqual(self.benchmark.config(), {})

    def test_the_lists_of_message_types_fit_together(self) -> None:
        known = aiperf_api.KNOWN_MESSAGE_TYPES
        parts = (aiperf_api.FIGURES_MESSAGE_TYPES, aiperf_api.STATE_MESSAGE_TYPES, aiperf_api.RESULT_MESSAGE_TYPES)
        self.assertLessEqual(frozenset().union(*parts), known)
        for topic in aiperf_api.CORE_TOPICS:  # a topic is a prefix: it must match no other type
            others = [kind for kind in known if kind.encode() != re.split(b"[.$]", topic)[0]]
            self.assertFalse([kind for kind in others if f"{kind}$".encode().startswith(topic)])


class TestStateFamilies(BenchmarkTestCase):
    def lines(self, now_ns: int = 1) -> list[str]:
        return lines_of(aiperf_api.state_families(self.benchmark, now_ns))

    def test_before_the_first_message_there_are_state_and_workers(self) -> None:
        wanted = {'aiperf_benchmark_state{state="waiting"} 1', 'aiperf_benchmark_state{state="failed"} 0'}
        wanted |= {"aiperf_benchmark_stale 0", 'aiperf_workers{status="healthy"} 0'}
        self.assertLessEqual(wanted, set(self.lines()))
        self.assertNotIn("aiperf_info", "".join(self.lines()))
        self.send(1, "system_state_changed", state="new_kind")
        ones = [line for line in self.lines(60 * SECOND) if line.endswith(" 1")]
        self.assertEqual(ones, ['aiperf_benchmark_state{state="new_kind"} 1', "aiperf_benchmark_stale 1"])

    def test_an_answer_is_bounded_and_says_what_was_left_out(self) -> None:
        self.assertIn("aiperf_api_samples_left_out 0", self.lines())
        self.benchmark.configure({"benchmark_id": "b" * 500}, "file")
        stats = {f"s{index}": 1 for index in range(30)}
        series = [{"labels": {"n": str(index)}, "stats": stats} for index in range(1000)]
        summaries = {"e": {"metrics": {"m": {"type": "gauge", "series": series}}}}
        self.send(1, "realtime_server_metrics", endpoint_summaries=summaries, snapshot={"num_running": 3, "x": {}})
        self.assertEqual(self.benchmark.server_metrics()["snapshot"], {"num_running": 3})
        found = [line for line in self.lines() if line.startswith("aiperf_server_m_")]
        self.assertEqual(len(found), 16 * 1000)  # statistics of a series
        self.assertIn(f'benchmark_id="{"b" * 128}"', found[0])
        for samples, size in ((1000, 1 << 20), (50_000, 100_000)):
            with mock.patch.multiple(aiperf_api, SAMPLES_MAX=samples, SAMPLES_BYTES_MAX=size):
                lines = self.lines()
            self.assertLess(len(lines), samples + 10)
            self.assertLess(sum(map(len, lines)), size)
            left_out = len([line for line in found if line not in set(lines)])
            self.assertIn(f"aiperf_api_samples_left_out {left_out}", lines)
        rows = [{"tag": f"t{n}", "unit": "%" * 512, "avg": 1} for n in range(4000)]  # "percent" so many times
        self.send(2, "realtime_telemetry_metrics", metrics=rows)
        self.assertLess(sum(map(len, self.lines())), 2 * aiperf_api.SAMPLES_BYTES_MAX)

    def test_phases_and_workers_are_counted(self) -> None:
        self.benchmark.configure({"benchmark_id": "b", "aiperf_version": "0.13.0"}, "file")
        stats = {"total_expected_requests": 8, "requests_sent": 5, "requests_completed": 4, "request_errors": 1}
        self.send_phase(SECOND, "start", "profiling", start_ns=SECOND, **stats)
        self.send(SECOND, "worker_status_summary", worker_statuses={"w": "high_load"})
        self.send(SECOND, "worker_health", service_id="w", health={"cpu_usage": 90.5}, task_stats={"total": 5})
        lines = self.lines(2 * SECOND)
        for line in """aiperf_info{benchmark_id="b",version="0.13.0"} 1
            aiperf_phase_requests_sent_total{benchmark_id="b",phase="profiling"} 5
            aiperf_phase_requests_completed_total{benchmark_id="b",phase="profiling"} 4
            aiperf_phase_requests_errors_total{benchmark_id="b",phase="profiling"} 1
            aiperf_phase_requests_cancelled_total{benchmark_id="b",phase="profiling"} 0
            aiperf_phase_requests_expected{benchmark_id="b",phase="profiling"} 8
            aiperf_progress_ratio{benchmark_id="b"} 0.5
            aiperf_elapsed_seconds{benchmark_id="b"} 1.0
            aiperf_eta_seconds{benchmark_id="b"} 1.0
            aiperf_workers{benchmark_id="b",status="high_load"} 1
            aiperf_workers{benchmark_id="b",status="idle"} 0
            aiperf_worker_cpu_percent{benchmark_id="b",worker="w"} 90.5
            aiperf_worker_tasks_total{benchmark_id="b",worker="w"} 5""".splitlines():
            self.assertIn(line.strip(), lines)


# == 10 == Bus =========================================================================================================

# What peers send, recorded from libzmq: their greeting, READY, and `["abc", "1"]`.
GREETING_4_1 = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00NULL" + bytes(48)  # libzmq 4.1.6, 4.2.5 and 4.3.2 (ZMTP 3.0)
GREETING_4_3 = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01NULL" + bytes(48)  # libzmq 4.3.5 (ZMTP 3.1)
READY_XPUB = b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x04XPUB"
READY_PUB = b"\x04\x29\x05READY\x0bSocket-Type\0\0\0\x03PUB\x08Identity\0\0\0\x03abc"
ABC_1 = b"\x01\x03abc\x00\x011"
ZMTP_PING = b"\x04\x09\x04PING\0\0c1"
HELLO = 64 + 27  # bytes of our greeting and our READY


def zmtp_frame(body: bytes, flags: int = 0) -> bytes:
    if len(body) > 255:
        return bytes((flags | 2,)) + len(body).to_bytes(8, "big") + body
    return bytes((flags, len(body))) + body


def zmtp_message(*frames: bytes) -> bytes:
    return b"".join(zmtp_frame(frame, 1) for frame in frames[:-1]) + zmtp_frame(frames[-1])


def codec_after(*chunks: bytes) -> tuple[aiperf_api.ZMTPSubscriber, list[list[bytes]]]:
    codec = aiperf_api.ZMTPSubscriber()
    return codec, [message for chunk in chunks for message in codec.feed(chunk)]


def ready_codec(greeting: bytes = GREETING_4_3) -> aiperf_api.ZMTPSubscriber:
    codec = codec_after(greeting, READY_XPUB)[0]
    popped(codec)
    return codec


def popped(codec: aiperf_api.ZMTPSubscriber) -> bytes:
    output, codec.output = codec.output, b""
    return output


class TestZMTPCodec(unittest.TestCase):
    def test_speaks_first_with_the_greeting_and_answers_a_greeting_with_ready(self):
        codec = aiperf_api.ZMTPSubscriber()
        self.assertEqual(popped(codec), b"\xff\0\0\0\0\0\0\0\0\x7f\x03\x01NULL" + bytes(48))
        self.assertEqual((codec.feed(GREETING_4_1[:-1]), popped(codec)), ([], b""))
        codec.feed(GREETING_4_1[-1:])
        self.assertEqual(popped(codec), b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB")
        self.assertEqual(codec.socket_type, "")
        codec.feed(READY_PUB)
        self.assertEqual((codec.socket_type, codec.minor), ("PUB", 0))

    def test_each_version_gets_subscriptions_in_its_own_form(self):
        long, sub = b"x" * 300, b"\x09SUBSCRIBE"
        for greeting, forms in (
            (GREETING_4_1, (b"\0\x03\x01ab", b"\0\x03\0ab", b"\x02\0\0\0\0\0\0\x01\x2d\x01" + long)),
            (GREETING_4_3, (b"\4\x0c" + sub + b"ab", b"\4\x09\6CANCELab", b"\6\0\0\0\0\0\0\1\x36" + sub + long)),
        ):
            encode = ready_codec(greeting).encode_subscription
            self.assertEqual((encode(b"ab"), encode(b"ab", False), encode(long)), forms)
        self.assertEqual(codec_after(GREETING_4_3[:10] + b"\x04\x00" + GREETING_4_3[12:])[0].minor, 1)

    def test_every_cut_of_the_stream_gives_the_same_messages_and_answers(self):
        long_one = zmtp_message(b"topic$", b"p" * 300, b"")
        tail = ABC_1 + ZMTP_PING + b"\x01\x01x" + ZMTP_PING + b"\x02\0\0\0\0\0\0\0\x01y" + long_one
        stream = GREETING_4_3 + READY_XPUB + tail
        wanted = [[b"abc", b"1"], [b"x", b"y"], [b"topic$", b"p" * 300, b""]]
        whole = popped(codec_after(stream)[0])
        self.assertTrue(whole.endswith(b"\x04\x07\x04PONGc1" * 2))
        for pieces in (chopped(stream, 1), *([stream[:at], stream[at:]] for at in range(len(stream) + 1))):
            codec, messages = codec_after(*pieces)
            self.assertEqual((messages, popped(codec), codec.error), (wanted, whole, None), pieces)
        for frames_max in (1, 2, 3):
            codec = aiperf_api.ZMTPSubscriber()
            messages = codec.feed(stream, frames_max)
            while codec.pending:
                more = codec.feed(b"", frames_max)
                self.assertLessEqual(len(more), frames_max)
                messages += more
            self.assertEqual((messages, popped(codec)), (wanted, whole))

    def test_of_commands_only_a_ping_is_answered_with_at_most_16_bytes_of_its_context(self):
        codec = ready_codec()
        stream = b"\x04\x05\x04PONG" + b"\x04\x05\x04HUHx" + READY_XPUB + b"\x01\x01x" + b"\x04\x02\x01A" + b"\x00\x01y"
        self.assertEqual((codec.feed(stream), codec.error, popped(codec)), ([[b"x", b"y"]], None, b""))
        codec.feed(zmtp_frame(b"\x04PING\0\x1e" + b"0123456789abcdef and more", 4))
        self.assertEqual(popped(codec), b"\x04\x15\x04PONG0123456789abcdef")

    def test_faults_are_told_apart_and_leave_the_messages_before_them(self):
        ready = GREETING_4_3 + READY_XPUB + ABC_1
        too_long = b"\x06" + (aiperf_api._COMMAND_BYTES_MAX + 1).to_bytes(8, "big")
        of_libzmq_2, of_libzmq_3 = b"\xff\0\0\0\0\0\0\0\x01\x7e", b"\xff\0\0\0\0\0\0\0\x01\x7f\x01\x02"
        name = b"\5READY\x0bSocket-Type\0\0\0"
        cut_metadata = (b"\4\x08\5READY\x0bS", b"\4\x15" + name, b"\4\x18" + name + b"\4PU")
        for kind, start, ends in (
            ("not_zmtp", b"", (b"HTTP/1.1 400 Bad Request\r\n", b"\0", of_libzmq_2, of_libzmq_3)),
            ("mechanism", GREETING_4_3[:12], (b"CURVE".ljust(20, b"\0"), b"NULLX")),
            ("socket_type", GREETING_4_3, (b"\4\x19\5READY\x0bSocket-Type\0\0\0\3REP", b"\4\6\5READY", *cut_metadata)),
            ("socket_type", GREETING_4_3, (b"\4\x0b\5READY\x00\0\0\0\0",)),  # a property without a name
            ("malformed", GREETING_4_3, (b"\0\1x", ZMTP_PING)),  # in place of READY
            ("malformed", GREETING_4_3, (b"\4\0", b"\4\1\0", b"\4\3\5REA")),  # commands that are cut
            ("malformed", GREETING_4_3, (zmtp_frame(b"\x05ERROR\x0dnot \r\n wanted", 4),)),
            ("malformed", ready, (b"\x08", b"\5")),  # a reserved bit, a command with MORE
            ("malformed", ready, (b"\4\6\4PING\0", b"\4\3\x09SU", too_long)),
            ("malformed", ready, (b"\2" + b"\xff" * 8,)),  # 2^63 bytes and more
        ):
            for stream in (start + end for end in ends):
                for pieces in ([stream], chopped(stream, 1), [stream[:-1], stream[-1:]]):
                    codec, messages = codec_after(*pieces)
                    self.assertEqual(codec.error and codec.error.kind, kind)
                    self.assertEqual(messages, [[b"abc", b"1"]] if start == ready else [])
                    self.assertNotRegex(str(codec.error), r"[\x00-\x1f]")
                    self.assertIsNone(codec.error.__traceback__, "it would keep what came")
                    self.assertEqual(codec.feed(GREETING_4_3 + READY_XPUB + ABC_1), [], "after a fault")

    def test_of_a_message_over_the_limits_the_topic_comes_and_the_next_one_whole(self):
        most, parts = 1000, aiperf_api.BUS_PARTS_MAX
        with mock.patch.object(aiperf_api, "BUS_RESULT_BYTES_MAX", most):
            for message, wanted in (
                *(([b"t$", b"x" * (most - 2)], None), ([b"t$", b"x" * (most - 1)], [b"t$"])),
                *(([b"t$", b"x" * 5000, b"y"], [b"t$"]), ([b"t$", b"x" * 500, b"y" * 500], [b"t$"])),
                *(([b"x" * 5000, b"y"], [b""]), ([b"t$"] + [b"x"] * 500, [b"t$"])),
                *(([b"t" * 512, b"y"], None), ([b"t" * 513, b"y"], [b""])),
                *(([b"t$"] + [b""] * (parts - 1), None), ([b"t$"] + [b""] * parts, [b"t$"])),
            ):
                stream = zmtp_message(*message) + ABC_1
                for size in (1, 7, len(stream)):
                    codec = ready_codec()
                    got = [message for piece in chopped(stream, size) for message in codec.feed(piece)]
                    self.assertEqual((got, codec.error), ([wanted or message, [b"abc", b"1"]], None))

    def test_what_is_declared_or_skipped_costs_no_memory_and_what_is_large_no_time(self):
        declaring, skipping, reading = ready_codec(), ready_codec(), ready_codec()
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        declaring.feed(b"\x02" + (30 << 20).to_bytes(8, "big") + b"x")
        skipping.feed(b"\x01\x01t\x02" + (2**62).to_bytes(8, "big"))
        for _ in range(100):
            skipping.feed(bytes(65536))
        self.assertLess(tracemalloc.get_traced_memory()[1], 300_000)
        tracemalloc.stop()
        stream, began = zmtp_message(b"t$", bytes(30 << 20)), time.process_time()
        messages = [message for piece in chopped(stream, 4096) for message in reading.feed(piece)]
        self.assertEqual(len(messages[0][1]), 30 << 20)
        self.assertLess(time.process_time() - began, 2.0)  # 0.02 s; copied at every piece it would be minutes


class TestBusAddresses(unittest.TestCase):
    def test_addresses_are_read_as_libzmq_does(self):
        path = "p" * aiperf_api._IPC_PATH_BYTES_MAX
        for text, wanted in (
            ("tcp://127.0.0.1:5664", ("127.0.0.1", 5664, "")), ("tcp://head-node.local:1", ("head-node.local", 1, "")),
            ("tcp://[::1]:65535", ("::1", 65535, "")), ("tcp://[fe80::1%eth0]:5664", ("fe80::1%eth0", 5664, "")),
            ("ipc:///tmp/with blank.ipc", ("", 0, "/tmp/with blank.ipc")), ("ipc://@name", ("", 0, "\0name")),
            (f"ipc://{path}", ("", 0, path)),
        ):  # fmt: skip
            self.assertEqual(aiperf_api.parse_endpoint(text), wanted)
        self.assertEqual(aiperf_api.parse_endpoint("tcp://*:*", bind=True), ("*", 0, ""))
        self.assertEqual(aiperf_api.parse_endpoint("tcp://*:0", bind=True), ("*", 0, ""))
        self.assertEqual(aiperf_api.backend_address("::1"), "tcp://[::1]:5664")
        self.assertEqual(aiperf_api.ipc_address("/tmp/x"), "ipc:///tmp/x/event_bus_proxy_backend.ipc")

    def test_what_is_no_address_is_refused(self):
        texts = """127.0.0.1:5664 inproc://x http://x:1 tcp:// ipc:// ipc://* tcp://host tcp://host: tcp://host:0
            tcp://host:* tcp://host:65536 tcp://host:\u0665 tcp://host:+5 tcp://*:5664 tcp://:5664 tcp://[]:5664
            tcp://[host]:5664 tcp://1:2:5664 tcp://eth0;host:5664 tcp://user@host:5664 ipc://@"""
        path = "p" * aiperf_api._IPC_PATH_BYTES_MAX
        odd = ("", "tcp://host:5\n", "tcp://a b:5", "ipc://a\0b", f"ipc://{path}p", f"ipc://@{path}")
        for text in (*odd, *texts.split()):
            with self.subTest(text), self.assertRaisesRegex(aiperf_api.UsageError, "^not a bus address: "):
                aiperf_api.bus_source(text, "zmq")


class Inbox:  # what a source delivers and notifies
    def __init__(self, source: aiperf_api.Source, *prefixes: bytes) -> None:
        self.source = source
        self.messages = []
        self.batches = []
        self.times_ns = []  # of the bus, when they came
        self.lines = []
        self.cost_sec = 0.0  # of each message
        for prefix in prefixes:
            source.subscribe(prefix)
        source.start(self.deliver, self.lines.append)

    def deliver(self, batch):
        time.sleep(self.cost_sec * len(batch))
        self.messages += batch
        self.batches.append(len(batch))
        self.times_ns += [self.source.now_ns()] * len(batch)

    def has(self, count):
        return len(self.messages) >= count

    def tells(self, text):
        return any(text in line for line in self.lines)

    def is_connected(self):
        return self.source.connected


class RawPublisher:
    """A publisher made of literal bytes; `handshake` is all that it sends by itself."""

    def __init__(self, handshake: bytes = GREETING_4_3 + READY_XPUB, ipc_path: str = "") -> None:
        self.handshake, self.ipc_path = handshake, ipc_path
        self.connections = asyncio.Queue()
        self.writers = []

    async def __aenter__(self):
        if self.ipc_path:
            self.server = await asyncio.start_unix_server(self.connected, self.ipc_path)
        else:
            self.server = await asyncio.start_server(self.connected, "127.0.0.1", 0)
            self.address = f"tcp://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc):
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def connected(self, reader, writer):
        self.writers.append(writer)
        writer.write(self.handshake)
        self.connections.put_nowait((reader, writer))

    async def accept(self, skip=0):
        reader, writer = await asyncio.wait_for(self.connections.get(), 30)
        await reader.readexactly(skip)
        return reader, writer

    async def heard(self):
        """Return all that the subscriber sends on its next connection, until it ends that."""
        reader, writer = await self.accept()
        heard = b""
        with contextlib.suppress(ConnectionError):
            heard = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        return heard


class BusTestCase(LoopTestCase):  # its sources are stopped at the end
    patience_sec = 30

    def open(self, source, *prefixes):
        self.addAsyncCleanup(source.stop)
        return Inbox(source, *prefixes)

    async def meet(self, *prefixes, handshake=GREETING_4_3 + READY_XPUB, source=aiperf_api.BuiltinBusSource):
        """Return a publisher of literal bytes and what the source gets that connects to it."""
        publisher = await RawPublisher(handshake).__aenter__()
        self.addAsyncCleanup(publisher.__aexit__)
        return publisher, self.open(source(publisher.address), *prefixes)

    async def read(self, reader, wanted: bytes):
        self.assertEqual(await asyncio.wait_for(reader.readexactly(len(wanted)), 30), wanted)


class TestBuiltinBusSource(BusTestCase):  # against peers of literal bytes
    async def test_a_prefix_is_told_once_and_its_end_too(self):
        publisher, inbox = await self.meet(b"ab", b"ab")
        reader, _ = await publisher.accept(HELLO)
        await self.read(reader, b"\x04\x0c\x09SUBSCRIBEab")
        for prefix in (b"ab", b"c"):
            inbox.source.subscribe(prefix)
        for prefix in (b"never subscribed", b"c", b"c", b"ab"):
            inbox.source.unsubscribe(prefix)
        await self.read(reader, b"\x04\x0b\x09SUBSCRIBEc\x04\x08\x06CANCELc\x04\x09\x06CANCELab")

    async def test_a_peer_of_3_0_is_spoken_to_in_3_0_and_never_gets_a_ping(self):
        self.patch(BUS_HEARTBEAT_SEC=0.002)
        publisher, inbox = await self.meet(b"ab", handshake=GREETING_4_1 + READY_PUB)
        reader, _ = await publisher.accept(HELLO)
        await self.read(reader, b"\x00\x03\x01ab")
        beats, beat = [], inbox.source._beat
        with mock.patch.object(inbox.source, "_beat", lambda: (beats.append(1), beat())):
            await self.until(lambda: len(beats) > aiperf_api._PINGS_MAX + 2)
        self.assertTrue(inbox.source.connected)
        inbox.source.subscribe(b"c")
        await self.read(reader, b"\x00\x02\x01c")

    async def test_the_same_fault_again_and_again_is_told_once_and_retried_for_ever(self):
        self.patch(BUS_RETRY_MIN_SEC=0.001, BUS_RETRY_MAX_SEC=0.002)
        for handshake, line in (
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "libzmq 4 does: it began with b'HTTP"),
            (b"", "hung up during the handshake"),
            (GREETING_4_3 + READY_XPUB + ABC_1 + b"\x08", "flags 0x08"),
        ):
            publisher, inbox = await self.meet(b"", handshake=handshake)
            for _ in range(5):
                if handshake:
                    await publisher.heard()  # closing with its bytes unread would throw away what was sent
                else:
                    (await publisher.accept())[1].close()
            await inbox.source.stop()
            self.assertRegex(inbox.lines[-1], f"^the peer at {publisher.address}: .*{line}.*; connecting again$")
            self.assertEqual(len(inbox.lines), 2 if ABC_1 in handshake else 1, inbox.lines)
            self.assertGreaterEqual(inbox.messages.count([b"abc", b"1"]), 4 if ABC_1 in handshake else 0)

    async def test_nobody_there_is_one_line_and_looked_for_every_tenth_to_quarter_second(self):
        waits, enough, real_sleep = [], asyncio.Event(), asyncio.sleep

        async def sleep(seconds):
            waits.append(seconds)
            if len(waits) == 6:
                enough.set()
            await real_sleep(0)

        with mock.patch.object(aiperf_api.asyncio, "sleep", sleep):
            inbox = self.open(aiperf_api.BuiltinBusSource(f"tcp://127.0.0.1:{free_port()}"))
            await asyncio.wait_for(enough.wait(), 30)
            await inbox.source.stop()
        self.assertTrue(all(0.1 <= wait <= 0.25 for wait in waits[:6]), waits)
        [line] = inbox.lines
        self.assertRegex(line, r"^no bus at tcp://127\.0\.0\.1:\d+ yet \(.+\); trying until there is one$")
        inbox = self.open(aiperf_api.BuiltinBusSource(f"tcp://{'x' * 70}.invalid:5664"))  # IDNA refuses that name
        await self.until(inbox.tells, "no bus at")

    async def test_silence_is_answered_with_pings_and_a_peer_that_does_not_answer_those_is_given_up(self):
        for handshake, constants, line, pings in (
            (GREETING_4_3 + READY_XPUB, {"BUS_HEARTBEAT_SEC": 0.01}, "left 3 PINGs without an answer", 3),
            (GREETING_4_3, {"BUS_HANDSHAKE_SEC": 0.02}, "did not finish the handshake", 0),
        ):
            with self.subTest(line), mock.patch.multiple(aiperf_api, **constants):
                publisher, inbox = await self.meet(handshake=handshake)
                self.assertEqual((await publisher.heard()).count(b"\x04\x07\x04PING\0\0"), pings)
                await self.until(inbox.tells, line)
                await publisher.accept()
                await inbox.source.stop()
        self.patch(BUS_HEARTBEAT_SEC=0.02)
        publisher, inbox = await self.meet()
        reader, writer = await publisher.accept(HELLO)
        for _ in range(10):
            await self.read(reader, b"\x04\x07\x04PING\0\0")
            writer.write(b"\x04\x05\x04PONG")
        self.assertEqual((len(publisher.writers), inbox.source.connected), (1, True))

    async def test_a_peer_that_floods_with_pings_leaves_others_their_turn_and_must_read_the_answers(self):
        self.patch(BUS_RESULT_BYTES_MAX=1 << 20)
        publisher, inbox = await self.meet()
        reader, writer = await publisher.accept(HELLO)
        reader._transport.pause_reading()
        turns, feed = [], aiperf_api.ZMTPSubscriber.feed

        def watch(codec, data, frames_max):
            began = time.process_time()
            messages = feed(codec, data, frames_max)
            turns.append(time.process_time() - began)
            return messages

        with mock.patch.object(aiperf_api.ZMTPSubscriber, "feed", watch), self.assertRaises(ConnectionError):
            while True:
                writer.write(zmtp_frame(b"\x04PING\0\0" + b"c" * 16, 4) * 4096)
                await asyncio.wait_for(writer.drain(), 30)
        await self.until(inbox.tells, "does not read")
        self.assertLess(sorted(turns)[-len(turns) // 100], 0.02)

    async def test_a_peer_that_does_not_read_gets_all_subscriptions_and_is_left_when_they_change_for_ever(self):
        self.patch(BUS_RETRY_MIN_SEC=0.001, BUS_RETRY_MAX_SEC=0.002)
        prefixes = [b"%0128d" % number for number in range(2_000)]
        publisher, inbox = await self.meet(*prefixes)
        for _ in range(2):
            (await publisher.accept(HELLO))[0]._transport.pause_reading()
            await self.until(inbox.is_connected)
            buffered, transport = 0, inbox.source._transport
            while not transport.is_closing():
                buffered = max(buffered, transport.get_write_buffer_size())
                for change in (inbox.source.subscribe, inbox.source.unsubscribe) * 50:
                    change(b"x" * 60_000)
                await asyncio.sleep(0)
            self.assertLess(buffered, 2 << 20)
            await self.until(lambda gone=transport: inbox.source._transport is not gone)
        await self.until(inbox.tells, "does not read what it is sent; connecting again")

    async def test_one_read_with_many_messages_is_spread_over_turns_and_costly_ones_over_more(self):
        for cost_sec, count, most in ((0.0, 2000, 256), (0.002, 400, 20)):
            publisher, inbox = await self.meet(b"")
            inbox.cost_sec = cost_sec
            _, writer = await publisher.accept()
            sent = [[b"t$", b"%d" % i] for i in range(count)]
            writer.write(b"".join(zmtp_message(*message) for message in sent))
            await self.until(inbox.has, count)
            self.assertEqual(inbox.messages, sent)
            self.assertLessEqual(max(inbox.batches[1:]), most)
            await inbox.source.stop()

    async def test_messages_before_a_fault_or_an_end_are_all_delivered_and_none_after_stop(self):
        many = [[b"t$", b"%d" % i] for i in range(1_000)]
        stream = GREETING_4_3 + READY_XPUB + b"".join(zmtp_message(*message) for message in many)
        for end in (b"", b"\x08", b"\x01\x05cut"):
            publisher, inbox = await self.meet(b"", handshake=stream + end)
            (await publisher.accept())[1].close()
            await self.until(inbox.has, 1_000)
            self.assertEqual(inbox.messages[:1_000], many)
            await inbox.source.stop()
        publisher, inbox = await self.meet(b"", handshake=stream * 10)
        await self.until(inbox.has, 1)
        await inbox.source.stop()
        count = len(inbox.messages)
        await asyncio.sleep(0)
        self.assertEqual((len(inbox.messages), inbox.source.connected), (count, False))

    async def test_it_can_be_stopped_at_any_moment_of_a_connection(self):
        async with RawPublisher() as publisher:
            for turns in range(40):
                inbox = self.open(aiperf_api.BuiltinBusSource(publisher.address))
                for _ in range(turns):
                    await asyncio.sleep(0)
                await asyncio.wait_for(inbox.source.stop(), 30)
                self.assertFalse(inbox.source.connected)

    async def test_a_connection_that_met_itself_is_dropped(self):
        port, loop = free_port(), asyncio.get_running_loop()
        meet = functools.partial(loop.create_connection, local_addr=("127.0.0.1", port))
        with mock.patch.object(loop, "create_connection", meet):
            inbox = self.open(aiperf_api.BuiltinBusSource(f"tcp://127.0.0.1:{port}"))
            await self.until(inbox.tells, "no PUB or XPUB socket")
        self.assertFalse(inbox.source.connected)


@unittest.skipUnless(zmq, "needs the pyzmq package")
class TestBusSourcesWithLibzmq(BusTestCase):  # both sources against the real thing
    BACKENDS = ("pyzmq", "builtin")

    def bus(self, *address):
        bus = Bus(*address)
        self.addCleanup(bus.stop)
        return bus

    async def follow(self, bus, source, *prefixes):
        inbox = self.open(source, *prefixes)
        await self.until(bus.has_subscribed, *prefixes)
        return inbox

    async def test_of_a_message_over_the_limits_both_deliver_the_topic_and_then_the_next(self):
        most, bus = 1 << 20, self.bus()
        self.patch(BUS_RESULT_BYTES_MAX=most)
        sources = [aiperf_api.bus_source(bus.address, "zmq", backend=backend) for backend in self.BACKENDS]
        inboxes = [self.open(source, b"t$", b"sync-%d" % i) for i, source in enumerate(sources)]
        await self.until(bus.has_subscribed, b"t$", b"sync-0", b"sync-1")
        kept, dropped = ([b"t$", bytes(most - 2)], [b"t$"] * 64, [b"t$", b"next"]), [b"t$"]
        large = ([b"t$", bytes(most - 1)], [b"t$"] + [bytes(most // 2)] * 3, [b"t$"] * 65, [b"t$", *[b"x"] * 100_000])
        for message in (large[0], kept[0], large[1], large[2], kept[1], large[3], [b"t$" * 300, b"{}"], kept[2]):
            bus.publish(*message)
        for inbox in inboxes:
            await self.until(inbox.has, 8)
            wanted = [dropped, kept[0], dropped, dropped, kept[1], dropped, [b""], kept[2]]
            self.assertTrue(inbox.messages == wanted, [message[:2] for message in inbox.messages][:9])
            self.assertEqual(len(inbox.lines), 1, "one connection, never lost")

    async def test_a_bus_that_comes_back_is_told_every_subscription_and_many_cost_no_more_each(self):
        self.patch(BUS_RETRY_MIN_SEC=0.001, BUS_RETRY_MAX_SEC=0.002)
        prefixes = [b"type_%d$" % number for number in range(20_000 if DEEP else 2_000)]
        for backend in self.BACKENDS:
            bus = self.bus()
            source = aiperf_api.bus_source(bus.address, "zmq", backend=backend)
            await self.follow(bus, source, b"first")
            bus.stop()
            began = time.thread_time()
            for prefix in prefixes:
                source.subscribe(prefix)
            cost_sec = time.thread_time() - began
            again = self.bus(bus.address)
            await self.until(again.has_subscribed, b"first", *prefixes)
            began = time.thread_time()
            for prefix in prefixes:
                source.unsubscribe(prefix)
            cost_sec += time.thread_time() - began
            await self.until(lambda again=again: again.has_subscribed() and again.subscribed == {b"first"})
            self.assertLess(cost_sec, 4)  # 20,000: 0.3 s

    async def test_pyzmq_too_connects_again_after_a_frame_that_is_too_large_and_a_peer_that_is_none(self):
        self.patch(BUS_RESULT_BYTES_MAX=1 << 16, _ANEW_SEC=0.01, _PROVEN_SEC=0)
        bus = self.bus()
        inbox = await self.follow(bus, aiperf_api.PyzmqBusSource(bus.address), b"t$")
        for life in range(3):
            while sum("a frame of over" in line for line in inbox.lines) <= life:
                bus.publish(b"t$", bytes((1 << 16) + 1))  # dropped until it knows the subscription again
                await asyncio.sleep(0.01)
        while not inbox.messages:
            bus.publish(b"t$", b"next")
            await asyncio.sleep(0.01)
        self.assertEqual(inbox.messages[0], [b"t$", b"next"])
        for handshake in (GREETING_4_3[:12] + b"PLAIN".ljust(52, b"\0"), GREETING_4_3 + READY_XPUB + b"\x08\0"):
            peer, inbox = await self.meet(b"", handshake=handshake, source=aiperf_api.PyzmqBusSource)
            for _ in range(3):
                await peer.heard()

    async def test_a_bus_that_comes_late_goes_and_comes_back_is_heard_over_tcp_and_ipc(self):
        self.patch(_PROVEN_SEC=0)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        addresses = [f"tcp://localhost:{free_port()}", f"ipc://{folder.name}/bus"]
        addresses += [f"ipc://@aiperf-api-test-{os.getpid()}"] * sys.platform.startswith("linux")
        for address, backend in itertools.product(addresses, self.BACKENDS):
            inbox = self.open(aiperf_api.bus_source(address, "zmq", backend=backend), b"abc")
            await asyncio.sleep(0.1)  # some attempts are in vain
            for life in range(2):
                bus = self.bus(address.replace("localhost", "127.0.0.1"))
                await self.until(bus.has_subscribed, b"abc")
                bus.publish(b"abc$", b"%d" % life)
                await self.until(inbox.has, life + 1)
                bus.stop()
                await self.until(lambda inbox=inbox: not inbox.source.connected)
            await inbox.source.stop()
            self.assertEqual(inbox.messages, [[b"abc$", b"0"], [b"abc$", b"1"]])
            gone = [" is gone" in line for line in inbox.lines if not line.startswith("no bus")]
            self.assertEqual(gone, [False, True] * 2, inbox.lines)

    async def test_a_burst_loses_none(self):
        count = 100_000 if DEEP else 10_000
        for backend in self.BACKENDS:
            bus = self.bus()
            inbox = await self.follow(bus, aiperf_api.bus_source(bus.address, "zmq", backend=backend), b"burst$")
            for number in range(count):
                bus.publish(b"burst$", b"%01024d" % number)
            await self.until(inbox.has, count, seconds=120)
            wrong = sum(message != [b"burst$", b"%01024d" % i] for i, message in enumerate(inbox.messages))
            self.assertEqual((len(inbox.messages), wrong, len(inbox.lines)), (count, 0, 1))
            self.assertLessEqual(max(inbox.batches), aiperf_api.BUS_TURN_MESSAGES_MAX)
            await inbox.source.stop()

    async def test_several_publishers_connect_to_a_bound_source(self):
        self.patch(_PROVEN_SEC=0)
        inbox = self.open(aiperf_api.bus_source("tcp://127.0.0.1:*", "bind", bind=True), b"abc")
        with zmq.Context() as context:
            publishers = [context.socket(zmq.XPUB) for _ in range(2)]
            for number, publisher in enumerate(publishers):
                publisher.connect(inbox.source.address)
                await self.until(publisher.poll, 0)
                publisher.send_multipart([b"abc$", b"%d" % number])
                await self.until(inbox.has, number + 1)
            for publisher in publishers:
                publisher.close(0)
        await self.until(inbox.tells, "left; waiting for the next")
        self.assertEqual(inbox.lines[0], f"a publisher connected to {inbox.source.address}")
        with self.assertRaisesRegex(aiperf_api.StartError, "^cannot bind tcp://.* in use"):
            self.open(aiperf_api.bus_source(inbox.source.address, "bind", bind=True))


class TestReplayAndRecord(BusTestCase):  # whole lines, and nothing that was there is lost
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, "r.jsonl")

    def record(self, *times_sec, payload="{}"):
        lines = [{"t": 10**18 + int(sec * 1e9), "topic": "heartbeat$", "payload": payload} for sec in times_sec]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        Path(self.path).write_bytes(data)
        return data

    async def played(self, path="", **options):
        inbox = self.open(aiperf_api.ReplaySource(path or self.path, **options))
        await self.until(lambda: inbox.source.ended)
        return inbox

    async def test_at_once_each_message_has_its_own_time_and_then_time_passes(self):
        for name in ("run_0_13_success", "run_0_3_success"):
            wanted = wire_recording(name)
            inbox = await self.played(str(RECORDINGS / f"{name}.jsonl.gz"), speed=0)
            self.assertEqual(inbox.messages, [[topic, payload] for _, topic, payload in wanted])
            self.assertEqual(inbox.times_ns, [t for t, _, _ in wanted])
            with mock.patch.object(aiperf_api.time, "monotonic_ns", return_value=time.monotonic_ns() + 10**10):
                self.assertAlmostEqual(inbox.source.now_ns() / 1e9, wanted[-1][0] / 1e9 + 10, delta=5)
            self.assertEqual(inbox.source.address, f"{name}.jsonl.gz", "no path of the disk")
            self.assertFalse(inbox.source.connected)

    async def test_at_its_own_pace_it_takes_its_time(self):
        for speed, seconds in ((1.0, 0.3), (10.0, 0.03)):
            began = time.monotonic()
            await self.played("x", data=gzip.compress(self.record(0, 0.1, 0.2, 0.3)), speed=speed)
            self.assertGreaterEqual(time.monotonic() - began, seconds)

    async def test_what_lies_before_its_start_comes_at_once_in_its_own_time_in_every_round(self):
        self.patch(_REPLAY_PAUSE_SEC=0.01)
        self.record(*range(3600), 3600.2)
        began = time.monotonic()
        inbox = self.open(aiperf_api.ReplaySource(self.path, start_at=3600, loop=True))
        await self.until(inbox.has, 2 * 3601)
        self.assertTrue(0.4 <= time.monotonic() - began < 30)
        self.assertEqual(inbox.times_ns[:3600], [10**18 + sec * 10**9 for sec in range(3600)])
        self.assertEqual(inbox.times_ns[3601:7201], inbox.times_ns[:3600])
        self.assertFalse(inbox.source.ended)
        os.unlink(self.path)  # the next round finds nothing
        await self.until(inbox.tells, "the replay of r.jsonl has ended: ")
        self.assertTrue(inbox.source.ended)

    async def test_a_turn_has_a_budget_in_bytes_and_time(self):
        for payload, cost_sec, most in (("x" * 200_000, 0, 3), ("{}", 0.005, 8)):
            self.record(*range(300 if not cost_sec else 30), payload=payload)
            inbox = self.open(aiperf_api.ReplaySource(self.path, speed=0))
            inbox.cost_sec, turns = cost_sec, []
            while not inbox.source.ended:
                turns.append(len(inbox.messages))
                await asyncio.sleep(0)
            self.assertLessEqual(max(b - a for a, b in zip(turns, turns[1:])), most)

    async def test_a_broken_recording_plays_up_to_the_fault_and_says_so(self):
        self.patch(_RECORDING_LINE_BYTES_MAX=4000)
        line = b'{"t":1,"topic":"heartbeat$","payload":"%d"}\n'
        lines = b"".join(line % random.getrandbits(60) for _ in range(9999))
        for data, text in (
            (gzip.compress(lines)[:-20], "line [0-9]{4} is not a line of a recording: Compressed file ended"),
            (line + b"nonsense\n", "line 2 is not"), (line + b'{"t":2}\n', "line 2 is not"),
            *((line + b'{"t":%s,"topic":"a","payload":""}\n' % t, "line 2 is not")
              for t in (b"1e400", b"-1", b"9223372036854775808", b"1" + b"0" * 300, b"null")),
            (line + b'"' + b"x" * 5000, "line 2 is not a line of a recording: longer than 4,000 bytes"),
            (line + b'{"t":1,"topic":"a","payload":"%s"}\n' % ("x" * 4100 + "😀").encode(), "line 2 .* longer than"),
        ):  # fmt: skip
            Path(self.path).write_bytes(data)
            inbox = await self.played(speed=0)
            self.assertEqual(len(inbox.lines), 1)
            self.assertRegex(inbox.lines[0], f"^the replay of r.jsonl has ended: .*r.jsonl: {text}[^\n]*$")
            self.assertEqual(inbox.messages[0][0], b"heartbeat$")

    def test_what_is_no_recording_is_refused(self):
        self.record(0)
        aiperf_api.ReplaySource(self.path)
        self.patch(_RECORDING_LINE_BYTES_MAX=4000)
        os.mkfifo(self.path + ".fifo")
        for name, data in enumerate((b"", b"[1]\n", b'{"t":1}\n', b"\x1f\x8b", b'"' + b"x" * 5000)):
            Path(f"{self.path}.{name}").write_bytes(data)
        for name in ("gone", "fifo", *range(5)):
            with self.assertRaisesRegex(aiperf_api.UsageError, f"^{self.path}.{name}: [^\n]+$"):
                aiperf_api.ReplaySource(f"{self.path}.{name}")

    async def test_what_is_recorded_replays_as_it_was_and_keeps_what_was_there(self):
        wanted = [[b"t$", f'{{"é":"{number}"}}'.encode()] for number in range(3)]
        for path in (self.path, self.path + ".gz"):
            for _ in range(2):
                recorder = aiperf_api.Recorder(path)
                for number, (topic, payload) in enumerate(wanted):
                    recorder.write(10**18 + number, topic.decode(), payload)
                    recorder.flush()  # a reader finds whole lines at any time
                    self.assertEqual(len((await self.played(path, speed=0)).messages), number + 1)
                self.assertRaises(UnicodeDecodeError, recorder.write, 1, "t$", b"\xff")
                recorder.close()
            for name in (path, path + ".1"):
                self.assertEqual((await self.played(name, speed=0)).messages, wanted)
            self.assertFalse(os.path.exists(path + ".2"))
        quoted = json.dumps({"a": ['"'] * 100})  # of a line, nearly half is backslashes
        self.record(0, payload=quoted)
        self.patch(_RECORDING_LINE_BYTES_MAX=len(Path(self.path).read_bytes()) - 200)
        self.assertEqual((await self.played(speed=0)).messages, [[b"heartbeat$", quoted.encode()]])

    def test_output_goes_to_a_file_behind_links_and_anything_else_is_refused_before_it_can_block(self):
        folder = os.path.dirname(self.path)
        os.mkfifo(self.path + ".fifo")
        places = {"link": self.path, "new": self.path + ".new", "lost": "no/x", "pipe": "r.jsonl.fifo", "loop": "loop"}
        for name, target in places.items():
            os.symlink(target, os.path.join(folder, name))
        for name in (".", "", "no/x", "r.jsonl.fifo", "lost", "pipe", "loop", "/dev/null", "r.jsonl/x"):
            path = os.path.join(folder, name) if name else ""
            with self.assertRaisesRegex(aiperf_api.UsageError, "^--record .*: (not a regular file|no such folder)$"):
                aiperf_api.check_output(path, "--record")
            self.assertRaises(aiperf_api.UsageError, aiperf_api.Recorder, path)
            self.assertRaises(aiperf_api.UsageError, aiperf_api.open_output, path, "--report")
        for name in ("link", "new"):
            for text in (b"1", b"2"):
                with aiperf_api.open_output(os.path.join(folder, name), "--report") as file:
                    file.write(text)
            self.assertEqual([Path(places[name] + ending).read_bytes() for ending in ("", ".1")], [b"2", b"1"])
            recorder = aiperf_api.Recorder(os.path.join(folder, name))
            recorder.write(1, "t$", b"{}")
            recorder.close()
            self.assertTrue(os.path.islink(os.path.join(folder, name)))
            self.assertEqual(Path(places[name] + ".2").read_bytes(), b"2")
            self.assertEqual(len(Path(places[name]).read_bytes().splitlines()), 1)

    def test_a_full_disk_leaves_whole_lines(self):
        for path in (self.path, self.path + ".gz"):
            recorder = aiperf_api.Recorder(path)
            recorder.write(1, "t$", b"1")
            recorder.flush()
            recorder.write(2, "t$", b"2")
            file, recorder._file = recorder._file, mock.Mock(wraps=recorder._file)
            writes = iter((lambda data, file=file: file.write(data[:9]), mock.Mock(side_effect=OSError)))
            recorder._file.write.side_effect = lambda data, writes=writes: next(writes)(data)
            self.assertRaises(OSError, recorder.flush)
            recorder._file = file
            recorder.close()
            self.assertEqual([t_ns for t_ns, _ in aiperf_api._read_recording(path)], [1])

    def test_artifacts_are_read_up_to_their_limit_and_not_from_before_the_run(self):
        read = functools.partial(aiperf_api.read_artifact, os.path.dirname(self.path))
        too_long = b" " * (4 << 20) + b"{}"
        for data, wanted in ((b"[]", {}), (b"{", {}), (too_long, {}), (b'{"a": 1}', {"a": 1})):
            Path(self.path).write_bytes(data)
            self.assertEqual(read("r.jsonl"), wanted)
        for written_sec, wanted in ((1_000, {"a": 1}), (999, {})):
            os.utime(self.path, (written_sec, written_sec))
            self.assertEqual(read("r.jsonl", 1_000), wanted)
        self.assertEqual([read(name) for name in ("gone", "a\0b", ".")], [{}] * 3)


# == 11 == Hub =========================================================================================================


def encode_line(message: aiperf_api.Message) -> bytes:
    return message.payload + b"\n"


class PipeTransport:
    """An asyncio transport as the hub sees it, whose peer reads when the test says so; and its subscriber."""

    HIGH, LOW = 32 * 1024, 8 * 1024

    def __init__(self) -> None:
        self.buffer, self.read = bytearray(), bytearray()  # read: by the peer
        self.writes = 0
        self.aborted = False
        self.is_closing, self.get_write_buffer_size = lambda: self.aborted, self.buffer.__len__
        self.outlet = aiperf_api.Outlet(self)
        self.subscriber = aiperf_api.Subscriber(self.outlet, "ndjson", "peer", encode_line)

    def write(self, data: Any) -> None:
        assert not self.aborted, "written behind the end"
        self.writes += 1
        self.buffer += data
        self.outlet.paused = self.outlet.paused or len(self.buffer) > self.HIGH

    def drain(self, size: int) -> None:
        self.read += self.buffer[:size]
        del self.buffer[:size]
        if self.outlet.paused and len(self.buffer) <= self.LOW:
            self.outlet.paused = False
            self.outlet.write_pending()
            self.subscriber.flush()

    def drain_all(self) -> list[Any]:
        """(type, n) of each message that the peer has read; the counts of a notice."""
        while self.buffer:
            self.drain(len(self.buffer))
        lines = [json.loads(line) for line in self.read.splitlines()]
        return [line["counts"] if line["type"] == "skipped" else (line["type"], line["n"]) for line in lines]

    def abort(self) -> None:
        self.aborted = True
        self.buffer.clear()


class HubTestCase(unittest.TestCase):
    """A hub with clients of NDJSON, whose peers and clock the test drives."""

    def setUp(self) -> None:
        self.wanted = []
        self.hub = aiperf_api.Hub(lambda name, wanted: self.wanted.append((name, wanted)))
        self.now = 1000.0
        self.count = 0

    def client(self, types: Iterable[str] | None = None) -> PipeTransport:
        transport = PipeTransport()
        self.hub.add(transport.subscriber)
        self.hub.subscribe(transport.subscriber, None if types is None else frozenset(types))
        return transport

    def full_client(self) -> PipeTransport:
        """A client whose transport is full, and who has read nothing for a sweep."""
        transport = self.client()
        self.send("a", size=transport.HIGH)
        transport.outlet.has_stalled()
        return transport

    def send(self, *types: str, size: int = 0) -> None:
        """Broadcast one batch; a type in lower case is an event, one in upper case a state message."""
        batch = []
        for name in types:
            self.count += 1
            payload = b'{"type":"%b","n":%d,"fill":"%b"}' % (name.encode(), self.count, b"x" * size)
            batch.append(aiperf_api.Message(name, payload, name.isupper()))
        self.hub.broadcast(batch, self.now)


class TestHub(HubTestCase):
    def test_each_gets_what_it_asked_for_in_order_in_one_write_a_batch_encoded_once(self) -> None:
        encode = mock.Mock(side_effect=encode_line)
        clients = [self.client(()) for _ in range(3)]
        for transport, types in zip(clients, (None, frozenset({"a", "S"}), frozenset({"a"}))):
            transport.subscriber.encode = encode
            self.hub.subscribe(transport.subscriber, types)
        self.client(())
        self.send("a", "b", "S", "a")
        self.assertEqual(clients[0].drain_all(), [("a", 1), ("b", 2), ("S", 3), ("a", 4)])
        self.assertEqual(clients[1].drain_all(), [("a", 1), ("S", 3), ("a", 4)])
        self.assertEqual(clients[2].drain_all(), [("a", 1), ("a", 4)])
        self.assertEqual([t.writes for t in clients], [1, 1, 1])
        self.assertEqual(encode.call_count, 4)

    def test_the_bus_is_asked_for_a_type_with_the_first_client_and_no_more_behind_the_last(self) -> None:
        first, second = self.client({"a"}).subscriber, self.client({"a", "b"}).subscriber
        self.hub.subscribe(second, frozenset({"a"}))
        for subscriber in (first, second):
            self.hub.remove(subscriber)
        self.assertEqual(self.wanted, [("a", True), ("b", True), ("b", False), ("a", False)])
        self.assertFalse(self.hub.wants("a"))
        self.client()
        self.assertTrue(self.hub.wants("a"))

    def test_what_is_retained_for_late_clients_is_bounded_and_in_bus_order(self) -> None:
        for n in range(aiperf_api.BUS_TYPES_MAX + 50):
            self.send(f"type{n}")
        self.send(*["big"] * 3, size=aiperf_api.RETAINED_BYTES_MAX // 2)
        self.send("BIGGER", size=aiperf_api.RETAINED_BYTES_MAX)
        kept = self.hub.snapshot(None)
        self.assertEqual(len(kept), aiperf_api.BUS_TYPES_MAX)
        self.assertLess(sum(len(m.payload) for m in kept), aiperf_api.RETAINED_BYTES_MAX)
        self.hub.forget_run()
        self.send("b", "a", "b", "c")
        self.assertEqual([m.type for m in self.hub.snapshot(frozenset("ab"))], ["a", "b"])


class TestSlowClients(HubTestCase):  # they cost nobody else anything, and know what was dropped
    def test_a_burst_of_24_mb_reaches_every_client_that_reads_whole(self) -> None:
        reader, other, stalled = self.client(), self.client({"S", "T"}), self.client()
        for _ in range(2000 // 40):
            self.send(*"eS" * 20, size=12_000)
            reader.drain(100)
            other.drain(10**6)
            for transport in (reader, other, stalled):
                transport.outlet.has_stalled()
        self.assertEqual([n for _, n in reader.drain_all()], list(range(1, 2001)))
        self.assertEqual([n for _, n in other.drain_all()], list(range(2, 2001, 2)))
        stalled.drain_all()
        self.assertGreater(stalled.subscriber.skipped, 500)

    def test_above_the_soft_mark_in_seconds_state_messages_are_conflated_and_it_is_told(self) -> None:
        slow = self.full_client()
        self.send("S", "T", "a", "S")
        self.now += aiperf_api.CLIENT_SOFT_MARK_SEC
        self.send("b")
        self.assertEqual(slow.subscriber.skipped, 0)
        self.now += 0.1
        self.send("S", "S", "T")
        slow.subscriber.reply(b'{"type":"pong","n":0}\n', self.now)
        # 1 was in the transport; 2, 5 and 7 (S) and 3 (T) became obsolete.
        expected = [("a", 1), {"S": 3, "T": 1}, ("a", 4), ("b", 6), ("S", 8), ("T", 9), ("pong", 0)]
        self.assertEqual(slow.drain_all(), expected)
        self.assertEqual((slow.subscriber.sent, slow.subscriber.skipped, slow.subscriber.slow), (5, 4, False))
        self.hub.remove(slow.subscriber)
        self.client()
        self.send("a")
        self.assertEqual(self.hub.totals(), (5 + 1, 4), "clients that have left count on")

    def test_hundreds_that_stall_together_are_conflated_and_evicted_a_few_at_a_time(self) -> None:
        clients = [self.client(("S", f"own_{n}")) for n in range(128)]
        self.send("S", size=PipeTransport.HIGH)
        self.send("S")
        waiting = [frames for one in clients for frames in one.subscriber.backlog.values()]
        self.assertEqual((len(waiting), len({*map(id, waiting)})), (128, 1), "one list for the garbage collector")
        slow = [0]
        for _ in range(101):
            self.now += aiperf_api.CLIENT_SOFT_MARK_SEC / 100
            self.send("S")
            slow.append(sum(one.subscriber.slow for one in clients))
        self.assertLessEqual(max(after - before for before, after in zip(slow, slow[1:])), 4)
        with mock.patch.object(aiperf_api, "HUB_BYTES_MAX", 0):
            for evicted in (32, 64, 96, 128):
                self.assertEqual(slow[-1], 128)
                self.send("S")
                self.assertEqual(sum(one.aborted for one in clients), evicted)

    def test_above_the_soft_mark_in_bytes_the_same_and_obsolete_bytes_do_not_stay(self) -> None:
        slow, size = self.full_client(), aiperf_api.CLIENT_SOFT_MARK_BYTES // 16
        for _ in range(40):
            self.send("S", size=size)
        self.assertLess(max(slow.subscriber.outstanding, self.hub.unsent.total), 2 * size)
        self.assertEqual(slow.drain_all(), [("a", 1), {"S": 39}, ("S", 41)])

    def test_events_are_bounded_in_number_and_bytes_dropped_ones_are_counted_the_newest_state_fits(self) -> None:
        for count, size in ((aiperf_api.CLIENT_QUEUE_EVENTS_MAX + 7, 0), (30, 1 << 20)):
            slow = self.full_client()
            self.now += aiperf_api.CLIENT_SOFT_MARK_SEC + 1
            self.send(*"e" * count, "S", "S", size=size)
            kept = min(aiperf_api.CLIENT_QUEUE_EVENTS_MAX, aiperf_api.CLIENT_SOFT_MARK_BYTES // max(size + 99, 1))
            self.now += aiperf_api.CLIENT_SOFT_MARK_SEC + 1
            self.send("S", size=size)
            heard = slow.drain_all()
            self.assertEqual(heard[1], {"S": 2, "e": count - kept})
            self.assertEqual([name for name, _ in heard[2:]], ["e"] * kept + ["S"])
            self.assertEqual(heard[-1], ("S", self.count))

    def test_above_the_hard_mark_it_is_evicted_and_its_memory_is_free(self) -> None:
        slow, good, asking = self.full_client(), self.client(), self.full_client()
        for name in "STU":
            self.send(name, size=aiperf_api.CLIENT_HARD_MARK_BYTES // 3 + 1)
            self.assertEqual(good.drain_all()[-1], (name, self.count))
        asking.subscriber.reply(b"x" * aiperf_api.CLIENT_HARD_MARK_BYTES, self.now)
        self.send("a")  # and nobody writes to them any more
        good.drain_all()
        for transport in (slow, asking):
            self.assertTrue(transport.aborted)
            self.assertIn("waited for it", transport.subscriber.fault)
            self.assertEqual((transport.subscriber.outstanding, self.hub.unsent.total), (0, 0))
            self.hub.remove(transport.subscriber)
        self.assertEqual(self.hub.evicted_total, 2)

    def test_one_that_leaves_or_has_reset_gets_nothing_more_and_is_not_called_slow(self) -> None:
        slow, gone = self.full_client(), self.client()
        gone.aborted = True  # as the loop leaves it until it says connection_lost()
        self.send("a")
        slow.subscriber.leave()
        self.send("b")
        self.assertEqual((slow.drain_all(), slow.subscriber.fault, gone.writes), ([("a", 1)], "", 0))

    def test_a_large_message_is_handed_over_in_slices_and_what_waits_is_shared(self) -> None:
        clients = [self.client({"a", f"only{n}"}) for n in range(50)]
        self.send("a", size=4_000_000)
        for transport in clients:
            self.assertLess(len(transport.buffer), transport.HIGH + aiperf_api.CLIENT_WRITE_BYTES_MAX + 1)
            self.assertGreater(transport.subscriber.outstanding, 4_000_000)
        self.send(*"a" * 20, size=10_000)
        self.assertLess(self.hub.unsent.total, 4_000_100 + 20 * 10_100)
        for transport in clients:
            self.assertEqual([n for _, n in transport.drain_all()], list(range(1, 22)))
        self.assertEqual(self.hub.unsent.total, 0)

    @mock.patch.object(aiperf_api, "HUB_BYTES_MAX", 400_000)
    def test_all_backlogs_together_are_bounded_and_those_that_read_miss_nothing(self) -> None:
        names = [f"own{n}" for n in range(30)]
        stalled, readers = [self.client({name}) for name in names], [self.client() for _ in range(3)]
        for _ in range(20):
            self.send(*names, size=10_000)
            for transport in readers:
                transport.drain_all()
            for transport in (*stalled, *readers):
                transport.outlet.has_stalled()
            self.assertLess(self.hub.unsent.total, 400_000 + 30 * 10_100)
        self.assertTrue(0 < sum(transport.aborted for transport in stalled) < 30)
        for transport in readers:
            self.assertEqual([n for _, n in transport.drain_all()], list(range(1, self.count + 1)))

    def test_who_has_stalled_is_told_by_bytes_that_have_left_from_sweep_to_sweep(self) -> None:
        for name, wrote, writes, reads, stalls in (
            ("nothing read for 30 sweeps", 1000, 0, [0], True), ("only more and more to read", 1000, 4, [0], True),
            ("less read than comes in", 0, 100, [50], False), ("as much read as comes in", 5000, 50, [50], False),
            ("nothing to read", 0, 0, [0], False), ("one byte in 29 sweeps", 1000, 0, [1, *[0] * 28], False),
        ):  # fmt: skip
            transport, found = PipeTransport(), []
            transport.outlet.write(b"x" * wrote)
            for read in itertools.islice(itertools.cycle(reads), 200):
                transport.outlet.write(b"x" * writes)
                transport.drain(read)
                found.append(transport.outlet.has_stalled())
            self.assertEqual((True in found, any(found[: aiperf_api.CLIENT_STALL_SEC])), (stalls, False), name)


@mock.patch.multiple(aiperf_api, CLIENT_WRITE_BYTES_MAX=5_000, CLIENT_QUEUE_EVENTS_MAX=8)
@mock.patch.multiple(aiperf_api, CLIENT_SOFT_MARK_BYTES=20_000, CLIENT_HARD_MARK_BYTES=90_000)
@mock.patch.multiple(PipeTransport, HIGH=2000, LOW=500)
class TestHubModel(HubTestCase):  # whatever happens in whatever order
    def run_model(self, actions: Iterable[tuple[int, int]]) -> None:
        """Each action is (what, how much); the marks are small, so that all of them are met."""
        clients = [self.client(), self.client({"S", "a"})]
        wants = [{"S", "T", "a", "b"}, {"S", "a"}]
        sent: list[tuple[str, int]] = []
        for what, much in actions:
            if what < 4:
                name = "STab"[what]
                self.send(*[name] * (1 + much % 3), size=much * 40)
                sent += [(name, n) for n in range(self.count - much % 3, self.count + 1)]
            elif what < 6:
                clients[what - 4].drain(much * 200)
            else:
                self.now += much / 20
                clients[much % 2].outlet.has_stalled()
            for transport in clients:
                self.assertLessEqual(transport.subscriber.backlog_bytes, aiperf_api.CLIENT_HARD_MARK_BYTES)
                held = sum(len(frame.data) for frame in itertools.chain(*transport.subscriber.backlog.values()))
                self.assertEqual(held, transport.subscriber.backlog_bytes)
        for transport, types in zip(clients, wants):
            if not transport.subscriber.fault:
                self.check(transport, [item for item in sent if item[0] in types])
        self.assertEqual(self.hub.unsent.total, 0)

    def check(self, transport: PipeTransport, due: list[tuple[str, int]]) -> None:
        subscriber, heard = transport.subscriber, transport.drain_all()
        got = [item for item in heard if not isinstance(item, dict)]
        told = collections.Counter[str]()
        for notice in (item for item in heard if isinstance(item, dict)):
            told.update(notice)
        self.assertEqual(got, [item for item in due if item in set(got)], "bus order, nothing twice")
        for name in "STab":
            missing = sum(item[0] == name for item in due) - sum(item[0] == name for item in got)
            self.assertEqual(missing, told[name], "lost without a word")
        for name in "ST":
            newest = [item for item in due if item[0] == name][-1:]
            self.assertEqual([item for item in got if item[0] == name][-1:], newest, "the newest state is not there")
        self.assertEqual((subscriber.sent, subscriber.skipped), (len(got), sum(told.values())))
        self.assertEqual((subscriber.outstanding, subscriber.slow), (0, False))

    def test_order_counts_bounds_and_the_newest_state_hold_in_random_histories(self) -> None:
        dice = random.Random(20)
        for _ in range(3000 if DEEP else 200):
            self.setUp()
            self.run_model([(dice.randrange(7), dice.randrange(200)) for _ in range(dice.randrange(150))])


# == 12 == Connection ==================================================================================================


class EchoService(aiperf_api.APIService):
    """The service, which sends back what a WebSocket sends it, for judges such as the Autobahn suite."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.message_bytes_max = 32 << 20
        self.large = aiperf_api.Response(200, os.urandom(3_000_000), "image/png")
        self.served = []

    def sweep(self, count: int = 1) -> None:
        for connection in list(self.connections) * count:
            connection.check()

    def respond(self, connection: aiperf_api.Connection, request: aiperf_api.Request) -> aiperf_api.Response | None:
        self.served.append(request.path)
        if request.path in ("/large", "/fresh"):  # the same each time, another one each time
            fresh = aiperf_api.Response(200, os.urandom(3_000_000), "image/png")
            return self.large if request.path == "/large" else fresh
        response = super().respond(connection, request)
        if connection.subscriber is not None:
            self.hub.subscribe(connection.subscriber, None)
        return response

    def received(self, connection: aiperf_api.Connection, data: str | bytes) -> None:
        text = isinstance(data, str)
        connection.send_frame(aiperf_api.encode_frame(1 if text else 2, data.encode() if text else data))


async def run_echo(port: int) -> None:
    async with EchoService(port=port) as service:
        print(service.url.replace("http", "ws"), flush=True)
        await asyncio.Event().wait()


@contextlib.contextmanager
def log_lines(level: int = logging.INFO) -> Iterator[list[str]]:
    """Collect what the module, from `level` on, and asyncio would have written to the terminal."""
    lines: list[str] = []
    handler, layout, log = logging.Handler(), logging.Formatter("%(levelname)s %(message)s"), aiperf_api.log
    handler.emit = lambda record: lines.append(layout.format(record))
    with mock.patch.object(log, "propagate", False), mock.patch.object(log, "handlers", [*log.handlers, handler]):
        before = log.level
        log.setLevel(level)
        logging.getLogger("asyncio").addHandler(handler)
        try:
            yield lines
        finally:
            logging.getLogger("asyncio").removeHandler(handler)
            log.setLevel(before)


class WireTestCase(ServiceTestCase):
    """Literal bytes to a real server; whatever happens, its log stays empty and nobody is left behind."""

    HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    LARGE = HEALTH.replace(b"health", b"large")
    LAST = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    expected_log: tuple[str, ...] = ()
    log_level = logging.INFO

    async def asyncSetUp(self) -> None:
        context = log_lines(self.log_level)
        self.log = context.__enter__()
        self.addCleanup(self._check_log)
        self.addCleanup(context.__exit__, None, None, None)
        await super().asyncSetUp()

    def _check_log(self) -> None:
        self.assertEqual([line for line in self.log if not any(word in line for word in self.expected_log)], [])

    async def exchange(self, *pieces: bytes) -> bytes:
        """Send, and read until the server ends the connection, which it must."""
        client = await self.client()
        for piece in pieces:
            client.send(piece)
            await asyncio.sleep(0)
        return await client.read_to_end()

    def connection(self) -> aiperf_api.Connection:
        [connection] = self.service.connections
        return connection

    async def raw(self, data: bytes = b"", receive_bytes: int = 4096) -> socket.socket:
        """A socket that reads only when told to, with a small buffer."""
        peer = socket.socket()
        self.addCleanup(peer.close)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        peer.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(peer, ("127.0.0.1", int(self.service.url.rpartition(":")[2])))
        await loop.sock_sendall(peer, data)
        return peer

    async def read_all(self, peer: socket.socket) -> bytes:
        data = bytearray()
        while piece := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(peer, 1 << 16), 10):
            data += piece
        return bytes(data)

    async def no_connections(self) -> None:
        await self.until(lambda: not self.service.connections)
        self.assertEqual(list(self.service.hub.subscribers), [])


class EchoTestCase(WireTestCase):  # whose service echoes, and sweeps when the test says so
    async def serve(self, **arguments: Any) -> Any:
        service = EchoService(**arguments)
        await service.start()
        self.addAsyncCleanup(service.stop)
        service._sweep_timer.cancel()
        return service

    async def swept(self) -> None:
        await self.until(lambda: self.service.sweep() or not self.service.connections)


def statuses(data: bytes) -> list[int]:
    """The status of each answer, every one of them whole."""
    found = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        length = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
        assert end and length and len(data) >= int(length[1]), head
        found.append(int(head.split()[1]))
        data = data[int(length[1]) :]
    return found


class TestMistakesOfOthersInHTTP(EchoTestCase):  # that need a connection; in a head alone: room 5
    async def test_nothing_is_served_behind_a_fault_or_the_end(self) -> None:
        for data, expected in (
            (self.HEALTH + b"GET / HTTP/1.1\r\nHost : x\r\n\r\n" + self.HEALTH, [200, 400]),
            (self.HEALTH + self.LAST + self.HEALTH, [200, 200]),
            (b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + self.HEALTH, [200]),
        ):
            answer = await self.exchange(data)
            self.assertEqual(statuses(answer), expected)
            self.assertIn(b"\r\nConnection: close", answer[answer.rindex(b"HTTP/1.1") :])
        answer = await self.exchange(b"HEAD /health?x=%zz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertTrue(answer.startswith(b"HTTP/1.1 400 ") and answer.endswith(b"\r\n\r\n"), answer)

    async def test_others_have_their_turn_between_pipelined_requests(self) -> None:
        busy, other = await self.client(), await self.client()
        busy.send(b"HEAD /nosuch HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
        busy.writer.write_eof()
        await other.ask(self.HEALTH)
        self.assertEqual((await busy.read_to_end()).count(b"HTTP/1.1 404 "), 200)
        self.assertLess(self.service.served.index("/health"), 100)

    async def test_pipelined_answers_come_in_order_also_to_a_slow_reader_that_has_half_closed(self) -> None:
        data = (self.HEALTH + b"GET /nosuch HTTP/1.1\r\nHost: localhost\r\n\r\n" + self.LARGE) * 3
        self.assertEqual(statuses(await self.exchange(*chopped(data + self.LAST, 50))), [200, 404, 200] * 3 + [200])
        await self.swept()
        peer = await self.raw(data)
        await self.until(lambda: self.service.connections and self.connection().paused)
        self.assertFalse(self.connection().transport.is_reading(), "it is asked no further")
        self.assertLess(self.connection().outlet.waiting, 3_001_000)
        peer.shutdown(socket.SHUT_WR)
        self.assertEqual(statuses(await self.read_all(peer)), [200, 404, 200] * 3)
        await self.no_connections()

    async def test_an_error_answer_is_not_lost_in_a_reset(self) -> None:
        """Closing with unread bytes sends RST, and the peer's kernel throws away what it has not read yet."""
        for start, expected in ((b"BAD\r\n" + b"x" * 4_000_000, 400), (self.LAST + self.HEALTH * 50_000, 200)):
            self.assertEqual(statuses(await self.read_all(await self.raw(start, 1 << 16))), [expected])

    @mock.patch.object(aiperf_api, "HTTP_UNSENT_BYTES_MAX", 2_500_000)
    async def test_large_answers_wait_by_reference_and_past_a_bound_of_all_there_is_503(self) -> None:
        gzip = self.LARGE.replace(b"\r\n\r\n", b"\r\nAccept-Encoding: gzip\r\n\r\n")  # too large for that
        peers = [await self.raw(request) for request in (self.LARGE, gzip) * 20]
        await self.until(lambda: sum(c.paused for c in self.service.connections) == 40)
        body = self.service.large.payload(True)
        self.assertEqual(self.service.unsent.total, len(body))  # all of them wait for the same one
        for connection in self.service.connections:
            self.assertIs(connection.outlet.pending[0][0].obj, body)
            self.assertLess(connection.transport.get_write_buffer_size(), 80_000)
            connection.end()  # the server stops: what has begun still goes out
        answer = await self.get("/fresh")
        self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "5"))
        self.assertEqual((await self.get("/health")).status, 200)
        self.assertEqual(statuses(await self.read_all(peers[0])), [200])
        for peer in peers:
            peer.close()
        await self.swept()  # one that does not end its side is ended
        self.assertEqual(self.service.unsent.total, 0)
        self.assertEqual((await self.get("/fresh")).status, 200)


class TestDeadlines(EchoTestCase):  # counted in sweeps, which are the test's: nobody waits here
    async def test_slowloris_has_one_deadline_for_the_whole_head(self) -> None:
        client = await self.client()
        client.send(b"GET /health HTTP/1.1\r\n")
        await self.until(lambda: self.service.connections and self.connection()._requests.started)
        for second in range(aiperf_api.HTTP_HEAD_TIMEOUT_SEC):  # a header a second: there is always something new
            self.service.sweep()
            client.send(b"X-%d: y\r\n" % second)
            await self.until(lambda second=second: b"X-%d" % second in self.connection()._requests._buffer)
        self.service.sweep()
        self.assertEqual(statuses(await client.read_to_end()), [408])

    async def test_a_silent_or_idle_connection_ends_after_its_time_without_a_word_and_not_before(self) -> None:
        for questions, limit in ((0, aiperf_api.HTTP_HEAD_TIMEOUT_SEC), (2, aiperf_api.HTTP_IDLE_TIMEOUT_SEC)):
            client = await self.client()
            await self.until(lambda: self.service.connections)
            for _ in range(questions):
                await client.get("/health")
                self.service.sweep(limit)
            self.service.sweep(0 if questions else limit)
            self.assertFalse(self.connection().transport.is_closing())
            self.service.sweep()
            self.assertEqual(await client.read_to_end(), b"")
            self.service.sweep(aiperf_api.LINGER_TIMEOUT_SEC + 1)  # it does not end its side
            await self.no_connections()

    async def test_a_slow_reader_of_a_large_answer_is_cut_off_only_when_nothing_moves(self) -> None:
        peer = await self.raw(self.LARGE)
        await self.until(lambda: self.service.connections and self.connection().paused)
        outlet = self.connection().outlet
        for turn in range(5):
            left, read = outlet.written - outlet.transport.get_write_buffer_size(), 0
            while outlet.written - outlet.transport.get_write_buffer_size() == left:
                read += len(await asyncio.wait_for(asyncio.get_running_loop().sock_recv(peer, 1024), 10))
                await asyncio.sleep(0)
            if hasattr(socket, "TCP_NOTSENT_LOWAT") and turn:  # else the kernel holds megabytes that go first
                self.assertLess(read, 30 * 1024, "one that reads a KiB a second would look stalled")
            self.service.sweep(aiperf_api.CLIENT_STALL_SEC)
            self.assertEqual(len(self.service.connections), 1)
        self.service.sweep(2)
        await self.no_connections()

    async def test_a_silent_websocket_is_pinged_then_evicted(self) -> None:
        self.expected_log = ("evicted",)
        client = await self.open()
        self.service.sweep(aiperf_api.WS_PING_INTERVAL_SEC)
        self.assertEqual(await client.read_frame(), (aiperf_api.OP_PING, b""))
        client.send(client_frame(aiperf_api.OP_PONG))
        await self.until(lambda: not self.connection()._silent)
        self.service.sweep(2 * aiperf_api.WS_PING_INTERVAL_SEC)
        self.assertEqual(len(self.service.hub.subscribers), 1)
        self.service.sweep()
        await self.no_connections()
        self.assertEqual(self.service.hub.evicted_total, 1)

    async def test_no_time_goes_by_while_the_process_is_stopped(self) -> None:
        await self.open()
        await (await self.client()).get("/health")
        for data in (b"", self.HEALTH[:20], self.LARGE):
            await self.raw(data)
        await self.until(lambda: any(connection.paused for connection in self.service.connections))
        with mock.patch("time.monotonic", return_value=time.monotonic() + 3600):
            self.service.sweep()  # the one sweep that comes late
        self.assertEqual([c.transport.is_closing() for c in self.service.connections], [False] * 5)

    async def test_event_streams_get_comments_and_streams_end_with_their_peer(self) -> None:
        for query, comment in (("", b": keepalive\n\n"), ("?format=ndjson&snapshot=0", b"")):  # NDJSON has none
            client = await self.client()
            await client.get("/api/stream" + query)
            if not query:
                self.assertIn(b"subscribed", await client.within(client.reader.readuntil(b"\n\n")))
            self.service.sweep(aiperf_api.STREAM_COMMENT_INTERVAL_SEC)
            self.publish("a", n=1)
            client.writer.write_eof()
            answer = await client.read_to_end()
            self.assertTrue(answer.startswith(comment) and b'"n":1' in answer, answer)
            await self.swept()


class TestConnectionCaps(WireTestCase):
    async def serve(self, **arguments: Any) -> aiperf_api.APIService:
        self.patch(HTTP_CONNECTIONS_MAX=5, _ACCEPT_MAX=2)
        return await super().serve(ws_max_connections=2, **arguments)

    async def test_who_finds_no_room_or_no_bus_gets_503_before_the_upgrade_and_is_told_when_to_come_back(self) -> None:
        first, _ = await self.listen("*"), await self.listen("*")
        refused = await (await self.client()).upgrade()
        stream = await self.get("/api/stream")
        self.service.source.connected = False
        ready = await self.get("/readyz")
        for answer, seconds in ((refused, "5"), (stream, "5"), (ready, "2")):
            self.assertEqual((answer.status, answer.headers["retry-after"]), (503, seconds))
        first.close()
        await self.until(lambda: len(self.service.hub.subscribers) == 1)
        await self.listen("*")

    async def test_half_open_connections_count_and_one_more_gets_503_then_none_a_word(self) -> None:
        peers = [await self.raw() for _ in range(5 + 2)]
        await self.until(lambda: len(self.service.connections) == 7)
        for _ in range(4):
            answer = await (await self.client()).read_answer()
            self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "5"))
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(await self.read_all(await self.raw()), b"")
        for peer in peers:
            peer.close()
        await self.until(lambda: len(self.service.connections) <= 4)
        self.assertEqual((await self.get("/health")).status, 200)


class TestMistakesOfOthersInWebSockets(EchoTestCase):  # that need a connection; in frames alone: room 4
    async def test_autobahn_cases_over_a_socket(self) -> None:
        for number, frames, expected in AUTOBAHN_CASES if DEEP else AUTOBAHN_CASES[::5]:
            client = await self.open()
            for piece in frames:
                client.send(piece)
                await client.writer.drain()
            found = [await client.read_frame() for _ in expected]
            self.assertTrue([(kind, data[:2] if kind == 8 else data) for kind, data in found] == expected, number)
            self.assertEqual(await client.read_to_end(), b"")
            client.close()
        await self.no_connections()

    async def test_text_and_binary_frames_that_come_with_the_upgrade_are_read_alike(self) -> None:
        client = await self.client()
        await client.ask(UPGRADE + client_frame(1, b"{}") + client_frame(2, b"{}"))  # curl sends binary frames only
        self.assertEqual([await client.read_frame(), await client.read_frame()], [(1, b"{}"), (2, b"{}")])

    async def test_of_a_ping_flood_at_most_ten_are_answered_a_read_the_last_among_them(self) -> None:
        client = await self.open()
        pings = b"".join(client_frame(9, b"%04d" % n) for n in range(10_000))
        client.send(pings + client_frame(1, b"{}"))
        answers = []
        while (frame := await client.read_frame())[0] == 10:
            answers.append(int(frame[1]))
        reads = -(-len(pings) // aiperf_api.CONNECTION_READ_BYTES) + aiperf_api.WS_PINGS_PER_READ_MAX
        self.assertLess(len(answers), 3 * reads)  # a read may bring less than it could
        self.assertEqual((answers, answers[-1]), (sorted(answers), 9999))

    async def test_a_flood_of_questions_whose_replies_nobody_reads_is_not_read_further(self) -> None:
        peer, loop = await self.raw(UPGRADE), asyncio.get_running_loop()
        sending = asyncio.ensure_future(loop.sock_sendall(peer, client_frame(1, b"{" + b" " * 100 + b"}") * 300_000))
        await self.until(lambda: any(c.subscriber and not c.transport.is_reading() for c in self.service.connections))
        for _ in range(100):
            await asyncio.sleep(0)
        self.assertLess(self.connection().subscriber.outstanding, 1024 * 1024)
        self.assertFalse(sending.done())
        sending.cancel()
        peer.close()
        await self.no_connections()

    async def test_peers_that_vanish_at_every_step_leave_no_memory_task_or_descriptor(self) -> None:
        whole = UPGRADE + client_frame(1, b"{}") + client_frame(9, b"x") + client_close(1000)
        stream = self.HEALTH.replace(b"health", b"api/stream")
        steps = [whole[:n] for n in range(0, len(whole), 9)]
        steps += [stream[:20], stream, self.HEALTH * 3, self.LARGE, b"BAD\r\n"]

        async def round_of(count: int) -> None:
            for n in range(count):
                peer = await self.raw(steps[n % len(steps)])
                if n // len(steps) % 2:  # close() sends RST
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                peer.close()
                self._cleanups.pop()  # or the test itself would keep the sockets
                self.publish("a")
            await self.swept()
            self.assertEqual((dict(self.service.hub.subscribers), self.service.hub.wants("*")), ({}, False))
            self.assertEqual((self.service.hub.unsent.total, self.service.unsent.total), (0, 0))
            self.service.served.clear()
            gc.collect()

        await round_of(200)  # what is made once is made now
        selector = asyncio.get_running_loop()._selector
        tasks, watched = asyncio.all_tasks(), len(selector.get_map())
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        await round_of(60)
        growth = []
        for _ in range(5):  # caches fill up; what leaks shows in each of them
            before = tracemalloc.get_traced_memory()[0]
            await round_of(200)
            growth.append(tracemalloc.get_traced_memory()[0] - before)
        self.assertLess(min(growth), 10_000, f"more than 50 bytes a connection: {growth}")
        self.assertEqual((asyncio.all_tasks(), len(selector.get_map())), (tasks, watched))

    async def test_a_close_is_answered_by_a_close_also_while_bytes_are_on_their_way(self) -> None:
        client, good = await self.open(), await self.open()
        for _ in range(200):
            self.publish("a", fill="x" * 20_000)
        client.send(client_close(1000))
        while (frame := await client.read_frame())[0] != 8:
            pass
        self.assertEqual(frame[1], struct.pack("!H", 1000))
        self.publish("last")  # behind our write_eof() to the other one
        self.assertEqual(await client.read_to_end(), b"")
        while (await good.hear())["message_type"] != "last":
            pass


class TestStopping(WireTestCase):  # the numbered procedure of the service
    async def test_idle_streaming_and_stalled_clients_end_within_two_seconds(self) -> None:
        subscribe = client_frame(1, b'{"type":"subscribe","message_types":["command"]}')
        for data in [self.HEALTH, b""] * 50 + [UPGRADE + subscribe] * 5:
            await self.raw(data)
        sockets = [await self.listen("heartbeat") for _ in range(100)]
        streams = [await self.client() for _ in range(50)]
        for client in streams:
            await client.get("/api/stream?types=status")
        await self.until(lambda: sum("command" in s.asked for s in self.service.hub.subscribers) == 5)
        while sum(connection.paused for connection in self.service.connections) < 5:
            self.publish("command", command="x", fill="x" * 12_000)
            await asyncio.sleep(0)
        self.publish("status", n=1)
        tasks, began = asyncio.all_tasks(), time.monotonic()
        await self.service.stop()
        self.assertLess(time.monotonic() - began, aiperf_api.STOP_TIMEOUT_SEC)
        self.assertEqual(len(self.service.connections), 0)
        self.assertLessEqual(asyncio.all_tasks(), tasks)
        for client in sockets:
            self.assertEqual(await client.read_frame(), (8, struct.pack("!H", 1001) + b"the server stops"))
        for client in streams:
            self.assertIn(b'"n":1', await client.read_to_end())
        with self.assertRaises(OSError):
            await self.raw()


# == 13 == Service =====================================================================================================


@unittest.skipUnless(zmq, "needs the pyzmq package")
class TestRecordingsThroughARealProxy(ServiceTestCase):  # all at full speed
    backend = "pyzmq"

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.bus = Bus()
        self.addCleanup(self.bus.stop)
        source = aiperf_api.bus_source(self.bus.address, "zmq", backend=self.backend)
        self.service = await self.serve(source=source)
        await self.until(self.bus.has_subscribed, *aiperf_api.CORE_TOPICS)

    async def test_each_run_comes_to_its_end_and_a_client_of_everything_hears_it_as_it_was(self) -> None:
        client = None
        for number, name in enumerate(PLAYED):  # one server for all: of each run nothing is left in the next
            with self.subTest(name):
                messages = wire_recording(name)
                if number == 5:  # before, only what the state needs is subscribed to
                    client = await self.listen("*", snapshot=False)
                    await self.until(self.bus.has_subscribed, b"")
                due = [topic for _, topic, _ in messages if client or topic.startswith(aiperf_api.CORE_TOPICS)]
                total = self.service.bus_total + len(due)
                for _, topic, payload in messages:
                    self.bus.publish(topic, payload)
                await self.until(lambda total=total: self.service.bus_total == total, seconds=30)
                self.assertEqual(figures(await self.value("/api/progress")), END_STATES[name][:4])
                final = (await self.value("/api/metrics"))["final"]
                self.assertEqual(final, END_STATES[name].latency is not None)
                for _, topic, payload in messages if client else ():
                    while json.loads(heard := (await client.read_frame())[1]).get("message_type") == "run":
                        pass  # ours: a new run has begun
                    if topic.startswith((b"realtime_", b"process_")):  # display units, internal fields out
                        self.assertEqual(json.loads(heard)["message_type"], topic.decode().rstrip("$"))
                    elif heard != payload:
                        self.assertIn(b"***", heard, "only a credential may change a message")
        runs = (await self.value("/api/runs"))["runs"]
        self.assertEqual([run["state"] for run in runs], [END_STATES[name].state for name in PLAYED])
        self.assertEqual(self.service.hub.totals()[1], 0)


class TestRecordingsThroughARealProxyToTheBuiltinSubscriber(TestRecordingsThroughARealProxy):
    backend = "builtin"


class TestServiceAnswers(ServiceTestCase):
    async def test_every_route_answers_get_and_head_with_the_same_head(self) -> None:
        self.feed("run_0_13_success", 120)
        for route in aiperf_api.ROUTES:
            path = route.path.replace("{n}", "1").replace("{file}", "favicon.svg")
            if route.name in ("stream", "websocket") or (not self.service.static and "." in path + "/dashboard."):
                continue
            with self.subTest(path):
                got, head = await self.get(path), await self.get(path, method="HEAD")
                self.assertEqual((got.status, head.body), (200, b""), got.body[:200])
                volatile = ("date", "content-length", "etag")  # a clock stands in some answers
                kept = [{k: v for k, v in a.headers.items() if k not in volatile} for a in (got, head)]
                self.assertEqual(*kept)
                if got.headers["content-type"] == "application/json" and not path.startswith("/static"):
                    self.assertTrue(path.endswith(".json") or got.body.endswith(b"}\n"), path)
        if self.service.static:
            self.assertIn(b"protocol.md\n", (await self.get("/static/guides/")).body)
        openmetrics = await self.get("/metrics", headers={"Accept": "application/openmetrics-text"})
        self.assertTrue(openmetrics.body.endswith(b"# EOF\n"), "Accept is heard")

    async def test_without_the_pages_it_says_what_to_copy(self) -> None:
        self.service.static = {}
        answer = await self.get("/dashboard")
        self.assertEqual((answer.status, "copy the folder static/" in answer.json["error"]), (404, True))

    async def test_a_fault_in_a_sweep_costs_one_client_alone(self) -> None:
        self.expected_log = ("a fault of this server",)
        client, other = await self.client(), await self.client()
        for one in (client, other):
            await one.get("/health")
        faulty = min(self.service.connections, key=id)
        with mock.patch.object(faulty, "check", side_effect=ZeroDivisionError):
            self.service._sweep()
        await self.until(lambda: len(self.service.connections) == 1)

    async def test_errors_say_what_to_do(self) -> None:
        for path, method, status, words in (
            ("/api/metric", "GET", 404, "did you mean /api/metrics?"), ("/api/metrics", "POST", 405, "/api/metrics"),
            ("/ws", "GET", 426, "websocat ws://"), ("/api/history?tag=nothing", "GET", 404, "/api/history lists"),
            ("/api/history?tags=x", "GET", 400, "tag, stat, since"), ("/api/runs/0", "GET", 404, "/api/runs lists"),
            ("/api/history?points=0", "GET", 400, "points"), ("/api/history?since=soon", "GET", 400, "since"),
            ("/api/stream?format=<x>", "GET", 400, "sse or ndjson"), ("/api/stream?snapshot=2", "GET", 400, "0 or 1"),
            ("/api/stream?type=x", "GET", 400, "types, format, snapshot"),
            ("/api/stream?types=" + "x" * 200, "GET", 400, "names of message types"),
            ("/api/runs/x", "GET", 404, "/api/runs lists"), ("/static/nosuch.js", "GET", 404, ""),
        ):  # fmt: skip
            with self.subTest(path):
                answer = await self.get(path, method=method)
                self.assertEqual((answer.status, answer.headers["content-type"]), (status, "application/json"))
                self.assertEqual(list(answer.json), ["error"])
                self.assertIn(words, answer.json["error"])
                self.assertNotIn(b"<", answer.body)

    async def test_publish_feeds_the_state_without_zmq_and_wait_complete_returns_the_end(self) -> None:
        status = await self.value("/api/status")
        self.assertEqual((status["state"], status["source"]["messages"], status["stale"]), ("waiting", 0, False))
        self.assertIsNone(status["source"]["last_message_age_sec"])
        waiting = asyncio.ensure_future(self.service.wait_complete())
        self.publish("system_state_changed", state="profiling")
        self.assertEqual((await self.value("/api/status"))["state"], "profiling")
        self.feed("run_0_13_success")
        self.assertEqual(await asyncio.wait_for(waiting, 5), "complete")
        for value in ({"metrics": []}, {"message_type": 3}):
            self.assertRaisesRegex(ValueError, "message_type", self.service.publish, value)

    async def test_between_two_runs_of_a_sweep_an_attached_server_is_not_complete(self) -> None:
        service = await self.serve(source=SpySource())
        self.feed("run_0_13_success", service=service)
        self.assertEqual(service.status()["state"], "complete")
        for connected, seconds, over in ((True, 100, False), (False, 59, False), (False, 2, True)):
            service.source.connected = connected
            service._judge_complete(seconds)
            self.assertEqual(service._complete is not None and service._complete.is_set(), over, (connected, seconds))

    async def test_what_aiperf_writes_beside_a_run_is_read_where_it_runs_on_this_machine(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "run_config.json").write_text('{"benchmark_id":"b","cfg":{"endpoint":{"type":"chat"}}}')
            for kind, address, told in (
                ("ipc", "ipc:///x", True), ("zmq", "tcp://127.0.0.1:5664", True), ("zmq", "tcp://10.1.2.3:5664", False),
            ):  # fmt: skip
                service = await self.serve(config={"output": {"artifact_directory": folder}})
                service.source.kind, service.source.address = kind, address
                service.end_child("")
                self.assertEqual("endpoint_type" in service.benchmark.labels(), told, address)

    async def test_costly_answers_are_shared_for_a_second_and_no_longer(self) -> None:
        self.feed("run_0_13_killed")
        with mock.patch.object(aiperf_api, "time", wraps=time) as clock:
            clock.monotonic = lambda: 1000.0
            client = await self.client()
            told = [await client.get(path) for path in ("/api/runs", "/metrics")]
            kept = dict(self.service._answers)
            self.assertEqual(len(kept), 2)
            await client.get("/api/runs?whatever=1")
            self.assertEqual(self.service._answers, kept)
            clock.monotonic = lambda: 1001.0  # nothing has come, but time has gone by
            later = self.service.source.now_ns() + 11_000_000_000
            with mock.patch.object(self.service.source, "now_ns", lambda: later):
                again = [await client.get(path) for path in ("/api/runs", "/metrics")]
                self.assertTrue((await client.get("/api/status")).json["stale"])
            self.assertGreater(again[0].json["runs"][0]["elapsed_sec"], told[0].json["runs"][0]["elapsed_sec"])
            self.assertNotEqual(again[1].body, told[1].body)
            self.publish("system_state_changed", state="processing")
            self.assertNotEqual((await client.get("/metrics")).body, again[1].body)
            for n in range(40):
                await client.get(f"/api/config?{n}")
            self.assertLessEqual(len(self.service._answers), 16)

    async def test_a_new_run_starts_from_empty_also_within_one_batch_of_messages(self) -> None:
        fields = (
            {"message_type": "system_state_changed", "state": "profiling"},
            {"message_type": "worker_status_summary", "worker_statuses": {"old": "idle"}},
            {"message_type": "benchmark_complete", "was_cancelled": False},
            {"message_type": "system_state_changed", "state": "configuring"},
        )
        heard = await self.listen("*")
        self.service._deliver([[f"{one['message_type']}$".encode(), json.dumps(one).encode()] for one in fields])
        told = [await heard.hear() for _ in range(5)]
        self.assertEqual([one for one in told if one["message_type"] != "run"], list(fields))
        self.assertEqual([one["run"] for one in told if one["message_type"] == "run"], [2])
        self.assertEqual(set(self.service.hub.retained), {"system_state_changed", "run"})

    async def test_one_nan_costs_its_own_value_only(self) -> None:
        client = await self.listen("*")
        row = b'{"tag":"request_latency","unit":"ms","avg":1.5,"p99":NaN}'
        for topic in (b"realtime_metrics$", b"realtime_telemetry_metrics$", b"home_made$"):
            self.service._deliver([[topic, b'{"metrics":[' + row + b"]}"]])
            while "metrics" not in (heard := await client.hear()):
                pass
            self.assertEqual(heard["metrics"][0].get("p99"), None)
        client.close()
        await self.until(lambda: not self.service.hub.subscribers)
        gc.disable()  # as a program may that embeds this
        self.addCleanup(gc.enable)
        self.service._deliver([[b"heartbeat$", b'{"load":NaN}'], [b"worker_pod_state$", b"{"]])  # looked at by nobody
        self.assertFalse(gc.isenabled())
        with self.assertLogs("aiperf_api", "WARNING"):
            late = await self.listen("heartbeat", "worker_pod_state")
            self.assertEqual(await late.read_frame(), (aiperf_api.OP_TEXT, b'{"load":null}'))
        prepared = self.service.hub.retained["heartbeat"]
        await self.listen("heartbeat")
        self.assertIs(self.service.hub.retained["heartbeat"], prepared)  # once for all who come
        self.assertEqual(self.service.bus_errors.pop("not_json"), 1)
        self.assertEqual((await self.value("/api/metrics"))["metrics"]["request_latency"]["avg"], 1.5)
        self.assertEqual(self.service.bus_errors, {"not_finite": 3})

    async def test_bad_messages_are_counted_logged_once_a_kind_and_stop_nothing(self) -> None:
        self.feed("run_0_13_killed")
        client = await self.listen("*", snapshot=False)
        payloads = (b"{", b"not json", b"[1]", b"{}", b'{"stats":{"phase":null,"start_ns":"x"}}', b"\xff\xfe")
        bad = [[b"credit_phase_progress$", payload] for payload in payloads]
        bad += [[b"credit_phase_progress$"], [b"credit_phase_progress$", b"{}", b"{}"], [b"\xff\xff$", b"{}"]]
        bad += [[b"status$", b"[" * 70 + b"]" * 70], [b"heartbeat$"]]
        with self.assertLogs("aiperf_api", "WARNING") as logs:
            self.service._deliver([*bad * 3, [b"heartbeat$", b'{"message_type":"heartbeat"}']])
            while (await client.hear())["message_type"] != "heartbeat":
                pass
        self.assertEqual(len(logs.records), len({record.getMessage().split(")")[0] for record in logs.records}))
        self.assertEqual(sum(self.service.bus_errors.values()), 3 * len(bad))
        self.service._deliver([[b"process_all_results$"]])  # too large, and the end all the same
        results = await self.value("/api/results")
        self.assertEqual(
            (results["status"], results["results"], "large" in results["reason"]), ("complete", None, True)
        )

    async def test_history_reads_lists_of_tags_each_once(self) -> None:
        self.feed("run_0_13_gpu_and_server_metrics")
        once = await self.get("/api/history?stat=p99&tag=request_latency")
        many = await self.get("/api/history?stat=p99&since=0&tag=" + ",".join(["request_latency"] * 120))
        self.assertEqual(once.json, many.json)
        tags = (await self.value("/api/history"))["tags"]
        self.assertEqual({about["group"] for about in tags.values()}, {"metrics", "telemetry", "server", "phase"})
        server = 'server:127.0.0.1:18051:vllm:num_requests_running{engine="0",model_name="mock"}'
        gpu = "nvidia_power_usage_dcgm_http___127_0_0_1_19400_metrics_gpu1_GPU-8f1c7a52"
        self.assertEqual(tags[gpu]["unit"], "W")
        both = await self.get(f"/api/history?tag={gpu},{quote(server)}&stat=avg")
        self.assertEqual([one["tag"] for one in both.json["series"]], [gpu, server])

    async def test_a_topic_has_a_length_and_a_full_disk_ends_the_recording_alone(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            service = await self.serve(source=SpySource(), record=f"{folder}/run.jsonl")
            source = service.source
            listener = await self.listen("*", service=service)
            for topic in (b"status." + b"x" * 1000 + b"$", b"status.\xff$"):
                service._deliver([[topic, b"{}"]])
            self.assertEqual(service.bus_errors, {"topic": 2})
            full = mock.patch.object(aiperf_api.Recorder, "flush", side_effect=OSError(28, "No space left"))
            with full, self.assertLogs("aiperf_api", "ERROR"):
                service._sweep()
            listener.close()
            await self.until(lambda: not service.hub.subscribers)
            self.assertEqual((service._recorder, source.topics), (None, [b""]))  # still deaf to nothing

    async def test_top_is_one_screen_that_drives_no_terminal(self) -> None:
        service = await self.serve(config={"model": "evil\x1b[2J\u202emodel"})
        self.feed("run_0_13_gpu_and_server_metrics", service=service)
        answer = await self.get("/top", service)
        text = answer.body.decode()
        self.assertEqual(answer.headers["content-type"], "text/plain; charset=utf-8")
        self.assertTrue(all(len(line) <= 80 and line.isprintable() for line in text.splitlines()), text)
        for words in ("complete", "100.0 %", "1300/1300 requests, 23 errors", "request latency", "GPU"):
            self.assertIn(words, text)
        self.assertRegex(text, r"workers: \d+ \w+(, \d+ \w+)*; \d+ requests done, \d+ failed\n")
        self.assertNotIn("no bus", text)  # which is gone when a run is over
        row = re.search(r"request latency, ms +([\d.]+) +([\d.]+) +([\d.]+)", text)
        metrics = service.benchmark.metrics()["metrics"]["request_latency"]
        self.assertEqual([float(cell) for cell in row.groups()], [round(metrics[s], 2) for s in ("avg", "p50", "p99")])

    async def test_credentials_show_nowhere(self) -> None:
        secret = "sk-live-0123456789abc"
        client = await self.listen("*")
        headers = [["Authorization", f"Bearer {secret}"], ["X-Team", "hush-hush"]]
        endpoint = {"api_key": secret, "model_names": ["m"], "urls": [f"http://u:{secret}@h/"]}
        config = {"endpoint": endpoint, "input": {"headers": headers}}
        self.publish("command", command="profile_configure", config=config)
        self.publish("service_error", error={"message": f"401 for key {secret}"})
        heard = json.dumps([await client.hear() for _ in range(2)])
        paths = ("/api/config", "/api/status", "/metrics", "/api/metrics", "/top", "/api/runs")
        answers = [(await self.get(path)).body for path in paths]
        everything = heard.encode() + b"".join(answers)
        self.assertNotIn(secret.encode(), everything)
        self.assertNotIn(b"hush-hush", everything)
        self.assertIn(b'"***"', answers[0])
        self.assertIn(b'"m"', answers[0])

    async def test_cors_is_silent_unless_an_origin_is_listed(self) -> None:
        service = await self.serve(cors_origins=("https://ui.example",), token="s3cret-token")
        bearer = {"Authorization": "Bearer s3cret-token"}
        for origin, path, status, allowed in (
            ("https://UI.example", "/api/status", 200, "https://UI.example"),
            ("https://ui.example", "/nothing", 404, "https://ui.example"),
            ("https://evil.example", "/api/status", 403, None),
            ("null", "/api/status", 403, None),
            ("", "/api/status", 200, None),
        ):
            headers = {**bearer, **({"Origin": origin} if origin else {})}
            answer = await self.get(path, service, headers=headers)
            self.assertEqual((answer.status, answer.headers.get("access-control-allow-origin")), (status, allowed))
            self.assertIn("Origin", answer.headers["vary"])
        asked = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "x-anything, authorization"}
        for origin, told in (("https://ui.example", "x-anything, authorization"), ("https://evil.example", None)):
            preflight = await self.get("/api/status", service, method="OPTIONS", headers={**asked, "Origin": origin})
            self.assertEqual((preflight.status, preflight.headers.get("access-control-allow-headers")), (204, told))
            self.assertEqual("access-control-allow-methods" in preflight.headers, told is not None)

    async def test_requests_are_counted_by_what_was_answered(self) -> None:
        etag = dict((await self.get("/api")).headers).get("etag", "")
        await self.get("/api", headers={"If-None-Match": etag})
        await self.get("/nothing")
        await self.get("/api", method="OPTIONS")
        await self.listen("*")
        await (await self.client()).get("/api/stream")
        text = (await self.get("/metrics")).body.decode()
        counted = re.findall(r'(?m)^aiperf_api_http_requests_total\{route="(\w+)",status="(\d+)"\} (\d+)$', text)
        expected = {("index", "200"), ("index", "304"), ("none", "404"), ("none", "204"), ("websocket", "101")}
        self.assertEqual({one[:2] for one in counted}, expected | {("stream", "200")})
        self.assertEqual({one[2] for one in counted}, {"1"})

    @unittest.skipUnless(hasattr(socket, "AF_INET6") and socket.has_dualstack_ipv6(), "needs IPv6")
    async def test_two_colons_listen_on_both_kinds_of_address(self) -> None:
        service = await self.serve(host="::")
        port = int(service.url.rpartition(":")[2])
        self.assertEqual(service.url, f"http://[::]:{port}")
        for host in ("127.0.0.1", "::1"):
            client = Client(*await asyncio.open_connection(host, port))
            self.addCleanup(client.close)
            self.assertEqual((await client.get("/health")).body, b"ok\n")

    @needs_static
    @needs_recordings
    async def test_the_report_is_one_file_with_the_run_in_it(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "report.html")
            path.write_text("older")
            service = aiperf_api.APIService(report=str(path))
            await service.start()
            self.feed("run_0_13_gpu_and_server_metrics", service=service)
            answer = await self.get("/report.html", service)
            await service.stop()
            self.assertEqual((Path(folder, "report.html.1").read_text(), path.exists()), ("older", True))
            written = path.read_bytes()
        for page in (answer.body, written):
            self.assertNotRegex(page, rb"(?:src|href)=\"(?!#|data:)")
            blob = json.loads(re.search(rb'<script type="application/json" id="run">(.*?)</script>', page, re.S)[1])
            self.assertEqual((blob["kind"], blob["status"]["state"]), ("aiperf-report", "complete"))
            self.assertEqual(blob["metrics"]["metrics"], service.benchmark.metrics()["metrics"])
            self.assertGreater(len(blob["histories"][0]["series"]), 5)
        self.assertIn("unsafe-inline", answer.headers["content-security-policy"])

    @needs_static
    async def test_a_run_that_begins_and_ends_within_a_sweep_has_its_report(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            async with aiperf_api.APIService(report=f"{folder}/report.html") as service:
                for run in (1, 2):
                    service.publish({"message_type": "credit_phase_start", "phase_name": "profiling", "start_ns": run})
                    service.publish({"message_type": "process_records_result", "results": {"results": {}}})
                    for _ in range(3 if run == 1 else 0):
                        service._sweep()
            pages = (Path(folder, name).read_bytes() for name in ("report.html.1", "report.html"))
            runs = [int(re.search(rb'"run":([0-9]+),"label"', page)[1]) for page in pages]
            self.assertEqual(runs, [1, 2])

    @needs_static
    async def test_a_report_that_cannot_be_written_costs_one_line(self) -> None:
        service = aiperf_api.APIService(report="/nonexistent/report.html")
        await service.start()
        service.publish({"message_type": "process_records_result", "results": {"results": {}}})
        with self.assertLogs("aiperf_api", "ERROR") as logs:
            await service.stop()
        said = "the report is not written: --report /nonexistent/report.html: no such folder"
        self.assertEqual([record.getMessage() for record in logs.records], [said])


class SpySource(aiperf_api.Source):
    """A source that brings nothing and remembers what was asked of it."""

    def __init__(self) -> None:
        super().__init__("tcp", "nowhere")
        self.topics = []

    def subscribe(self, prefix: bytes) -> None:
        self.topics += [prefix] if prefix not in self.topics else []

    def unsubscribe(self, prefix: bytes) -> None:
        self.topics.remove(prefix)


@unittest.skipUnless(hasattr(socket, "AF_UNIX"), "needs Unix sockets")
class TestUnixSocket(ServiceTestCase):  # only its owner opens it, and no server takes it from another
    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.folder = tempfile.mkdtemp(prefix="aa", dir="/tmp")  # a path of at most 103 bytes
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = os.path.join(self.folder, "api.sock")

    async def ask(self, path: str = "/api/status", host: str = "localhost") -> Answer:
        client = Client(*await asyncio.open_unix_connection(self.path))
        answer = await client.ask(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        client.close()
        return answer

    async def test_it_answers_whatever_the_host_and_only_to_its_owner(self) -> None:
        service = await self.serve(port=None, unix_path=self.path)
        self.assertEqual((service.url, os.stat(self.path).st_mode & 0o777), (f"unix:{self.path}", 0o600))
        self.assertEqual((await self.ask(host="any.name")).status, 200)
        await service.stop()
        self.assertEqual(os.listdir(self.folder), [])

    async def test_a_live_one_is_never_taken_and_a_dead_one_is_replaced(self) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(self.path)
        first = await self.serve(unix_path=self.path)
        with self.assertRaisesRegex(aiperf_api.StartError, "another server listens there"):
            await self.serve(unix_path=self.path)
        self.assertEqual((await self.ask()).status, 200)
        os.unlink(self.path)
        await self.serve(unix_path=self.path)
        await first.stop()  # removes its own socket, not this one
        self.assertEqual((await self.ask()).status, 200)

    async def test_what_is_no_socket_stays_and_a_path_that_cannot_be_is_one_line(self) -> None:
        Path(self.path).write_text("precious")
        os.symlink("/nowhere", self.path + ".link")
        for path, words in (
            (self.path, "is not a socket"),
            (self.path + ".link", "already in use"),
            *((path, "cannot listen on [^\n]+$") for path in (self.path + "/below", "/tmp/" + "x" * 200)),
        ):
            with self.assertRaisesRegex(aiperf_api.StartError, words):
                await self.serve(unix_path=path)
        self.assertEqual(Path(self.path).read_text(), "precious")


class TestWebSocketProtocol(ServiceTestCase):
    async def test_what_is_chosen_and_what_is_unknown_is_told(self) -> None:
        client = await self.client()
        answer = await client.upgrade(headers={"Sec-WebSocket-Protocol": "chat, aiperf"})
        self.assertEqual(answer.headers["sec-websocket-protocol"], "aiperf")
        types = ["worker_health", "realtime_metrcs", "run"]
        client.say({"type": "subscribe", "message_types": types})
        expected = {"type": "subscribed", "message_types": types, "unknown": ["realtime_metrcs"]}
        self.assertEqual(await client.hear(), expected)

    async def test_bad_input_gets_an_error_and_the_connection_stays(self) -> None:
        client = await self.open()
        lists = ([], [1], [""], ["x" * 200], ["é"], ["a.b"], ["a$"], [f"t{n}" for n in range(300)])
        bad = (
            *(b"{", b"[]", b"1", b'"subscribe"', {}, {"type": 5}, {"type": "nosuch"}, {"type": "subscribe"}),
            *({"type": "subscribe", "message_types": types} for types in ("realtime_metrics", *lists)),
            {"type": "subscribe", "message_types": ["*"], "snapshot": "yes"},
            {"type": "unsubscribe", "message_types": None},
        )
        for message in bad:
            client.say(message)
            answer = await client.hear()
            self.assertEqual((answer["type"], type(answer["message"])), ("error", str), message)
        client.send(client_frame(aiperf_api.OP_BINARY, b'{"type":"ping"}'))  # as curl sends it
        self.assertEqual(await client.hear(), {"type": "pong"})

    async def test_all_clients_together_ask_for_a_bounded_number_of_types(self) -> None:
        clients = [await self.open() for _ in range(11)]
        for n, client in enumerate(clients):
            client.say({"type": "subscribe", "message_types": [f"type_{n}_{m}" for m in range(100)]})
            self.assertEqual((await client.hear())["type"], "subscribed" if n < 10 else "error")
        self.assertEqual((await self.get("/api/stream?types=one_more")).status, 503)
        for name in ("realtime_metrics", "*"):  # nobody is locked out
            await self.listen(name)
        clients[10].say({"type": "subscribe", "message_types": ["type_0_0"]})
        self.assertEqual((await clients[10].hear())["type"], "subscribed")

    async def test_everything_and_single_types_mix_and_the_last_messages_come_first_if_wanted(self) -> None:
        self.publish("status", n=1)
        quiet = await self.listen("status", snapshot=False)
        quiet.say({"type": "ping"})
        self.assertEqual(await quiet.hear(), {"type": "pong"})
        client = await self.listen("*", "heartbeat")
        self.assertEqual((await client.hear())["n"], 1)
        client.say({"type": "unsubscribe", "message_types": ["heartbeat"]})
        self.assertIn('"*"', (await client.hear())["message"])
        client.say({"type": "unsubscribe", "message_types": ["*"]})
        await client.hear()
        self.publish("status", n=2)
        self.publish("heartbeat", n=3)
        self.assertEqual((await client.hear())["n"], 3)

    async def test_messages_are_one_line_in_display_units_without_hidden_tags_nulls_and_internals(self) -> None:
        client = await self.listen("realtime_metrics", "home_made", "process_records_result")
        self.service._deliver([[b"home_made$", b'{\n  "message_type": "home_made"\n}']])
        self.assertEqual(await client.read_frame(), (aiperf_api.OP_TEXT, b'{"message_type":"home_made"}'))
        rows = [
            {"tag": "request_latency", "unit": "ns", "avg": 2_500_000.0, "p99": None, "console_group": "x", "count": 3},
            {"tag": "min_request_timestamp", "unit": "ns", "avg": 1.0},
        ]
        shown = [{"tag": "request_latency", "unit": "ms", "avg": 2.5, "count": 3}]
        self.publish("realtime_metrics", service_id="r", metrics=rows)
        message = await client.hear()
        self.assertEqual((message["metrics"], message["service_id"]), (shown, "r"))
        self.publish("process_records_result", results={"results": {"records": rows}})
        self.assertEqual((await client.hear())["results"]["results"]["records"], shown)
        self.publish("home_made", metrics=[{"name": "x"}, 3])
        self.assertEqual((await client.hear())["metrics"], [{"name": "x"}, 3])


class TestStreams(ServiceTestCase):
    async def stream(self, query: str, service: aiperf_api.APIService | None = None) -> Client:
        client = await self.client(service)
        self.head = await client.get("/api/stream" + query)
        return client

    async def read_event(self, client: Client) -> dict[str, str]:
        text = (await client.within(client.reader.readuntil(b"\n\n"))).decode()
        return dict(line.partition(": ")[::2] for line in text.strip().split("\n"))

    async def test_a_stream_begins_with_an_event_and_goes_on_with_the_snapshot(self) -> None:
        self.publish("heartbeat", n=0)
        client = await self.stream("?types=heartbeat,heartbaet&_=1")
        self.assertEqual(self.head.headers["content-type"], "text/event-stream")
        self.assertEqual(self.head.headers["x-accel-buffering"], "no")
        first, unknown = await self.read_event(client), await self.read_event(client)
        told = {"type": "subscribed", "message_types": ["heartbeat", "heartbaet"]}
        self.assertEqual((first["event"], json.loads(first["data"])), ("subscribed", told))
        told = {"type": "unknown", "message_types": ["heartbaet"]}
        self.assertEqual((unknown["event"], json.loads(unknown["data"])), ("unknown", told))
        self.publish("status", n=1)
        self.publish("heartbeat", n=2)
        events = [await self.read_event(client) for _ in range(2)]
        heard = [(event["event"], json.loads(event["data"])["n"]) for event in events]
        self.assertEqual(heard, [("heartbeat", 0), ("heartbeat", 2)])

    async def test_ndjson_is_a_message_a_line_also_for_http_1_0(self) -> None:
        for request in (
            "GET /api/stream?format=ndjson&snapshot=0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "GET /api/stream?snapshot=0 HTTP/1.1\r\nHost: localhost\r\nAccept: application/x-ndjson\r\n\r\n",
            "GET /api/stream?format=ndjson&snapshot=0 HTTP/1.0\r\n\r\n",
        ):
            client = await self.client()
            head = await client.ask(request.encode(), "HEAD")
            self.assertEqual(head.headers["content-type"], "application/x-ndjson")
            self.assertNotIn("transfer-encoding", head.headers)
            for n in range(100):  # more than it reads at once
                self.publish("heartbeat", n=n, fill="x" * 20_000)
            lines = [await client.within(client.reader.readline()) for _ in range(100)]
            self.assertEqual([json.loads(line)["n"] for line in lines], list(range(100)))

    async def test_head_shows_what_get_would_begin_with_and_ends(self) -> None:
        for query, kind in (("", "text/event-stream"), ("?format=ndjson", "application/x-ndjson")):
            client = await self.client()
            answer = await client.get("/api/stream" + query, method="HEAD")
            self.assertEqual((answer.status, answer.headers["content-type"]), (200, kind))
            self.assertEqual(await client.read_to_end(), b"")
        self.assertEqual(len(self.service.hub.subscribers), 0)

    async def test_upstream_subscriptions_last_as_long_as_their_clients(self) -> None:
        source = SpySource()
        service = await self.serve(source=source)
        stream = await self.stream("?types=heartbeat", service)
        listener = await self.listen("heartbeat", "*", service=service)
        self.assertEqual(sorted(source.topics), sorted([*aiperf_api.CORE_TOPICS, b"", b"heartbeat$", b"heartbeat."]))
        listener.close()
        await self.until(lambda: b"" not in source.topics)
        self.assertIn(b"heartbeat$", source.topics)
        stream.close()
        await self.until(lambda: b"heartbeat$" not in source.topics)
        self.assertEqual(sorted(source.topics), sorted(aiperf_api.CORE_TOPICS))
        listener = await self.listen(
            "command_response", service=service
        )  # of these the state needs the controller's alone
        self.assertIn(b"command_response.", source.topics)
        service._sweep_timer.cancel()
        for kind in ("unsubscribe", "subscribe", "unsubscribe"):  # who toggles costs the bus nothing
            listener.say({"type": kind, "message_types": ["command_response"]})
            await listener.hear()
            self.assertIn(b"command_response.", source.topics)
        service._sweep()
        self.assertNotIn(b"command_response.", source.topics)


class TestSecurity(WireTestCase):
    options: Mapping[str, Any] = {
        "allow_hosts": ("Bench.internal", "proxy:8443"),
        "cors_origins": ("https://ui.example",),
    }

    async def status_of(self, request: str) -> int:
        return (await (await self.client()).ask(request.encode() + b"\r\n\r\n")).status

    async def test_dns_rebinding_a_name_that_is_not_ours_is_421_everywhere(self) -> None:
        for request in ("GET /health", "OPTIONS /api/status", "GET /ws"):
            self.assertEqual(await self.status_of(f"{request} HTTP/1.1\r\nHost: evil.example"), 421, request)
        for host in ("localhost:1234", "bench.INTERNAL:9", "proxy:8443"):
            self.assertEqual(await self.status_of(f"GET /health HTTP/1.1\r\nHost: {host}"), 200, host)
        for hosts, status in (((), 200), (("bench",), 421)):  # bound wider, any Host passes unless there is a list
            self.service = await self.serve(host="0.0.0.0", allow_hosts=hosts)
            self.service.url = self.service.url.replace("0.0.0.0", "127.0.0.1")
            self.assertEqual(await self.status_of("GET /health HTTP/1.1\r\nHost: node17.cluster"), status)

    async def test_a_body_is_refused_behind_the_path_and_the_method(self) -> None:
        for method, path, status in (("POST", "/api/status", 405), ("POST", "/nosuch", 404), ("GET", "/health", 413)):
            request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nxyz"
            answer = await self.exchange(request.encode() + self.HEALTH)
            self.assertEqual(statuses(answer), [status], path)  # and nothing behind it is served

    async def test_a_fault_of_ours_in_a_bus_message_is_logged_once_and_counted(self) -> None:
        self.expected_log = ("bad bus message (internal)",)
        with mock.patch.object(self.service.benchmark, "apply", side_effect=RuntimeError("oops")):
            for _ in range(3):
                self.publish("status")
        self.assertEqual(self.service.bus_errors, {"internal": 3})
        self.assertEqual(len(self.log), 1)

    async def test_log_lines_quote_what_strangers_say(self) -> None:
        with log_lines(logging.DEBUG) as lines:
            request = b"GET /x%0d%0aforged?a=%1b[31m HTTP/1.1\r\nHost: localhost\r\n"
            await (await self.client()).ask(request + b"User-Agent: \x9b31m\xff\ttab\r\n\r\n")
            await self.status_of(f"G'ET\" /{'y' * 3000} HTTP/1.1\r\nHost: localhost")
            forged = b"not json \x1b[31m\nINFO forged"
            self.service._deliver([[b"evil\ntopic\x1b$", b"{}"], [b"home_made$", forged], [b"a$", b"b", b"c"]])
            self.service.source._notify("publisher \x1b[31m\nINFO forged")
        self.log.clear()
        self.assertGreater(len(lines), 4)
        for line in lines:
            self.assertTrue(line.isascii() and line.isprintable() and len(line) < 1500, line)

    async def test_a_fault_of_ours_is_500_without_detail_and_logged(self) -> None:
        self.expected_log = ("a fault of this server",)
        with mock.patch.object(aiperf_api.APIService, "status", side_effect=RuntimeError("/secret/path")):
            answer = await self.exchange(b"GET /api/status HTTP/1.1\r\nHost: localhost\r\n\r\n" + self.HEALTH)
        self.assertEqual(statuses(answer), [500])
        self.assertNotIn(b"secret", answer)
        self.assertIn("/secret/path", self.log[0])
        with mock.patch.object(aiperf_api.APIService, "_handle_command", side_effect=RuntimeError("x")):
            client = await self.client()
            await client.upgrade()
            client.say({"type": "ping"})
            self.assertEqual(await client.read_frame(), (8, struct.pack("!H", 1011)))
        self.assertEqual((await self.get("/health")).status, 200)


class TestTokens(WireTestCase):
    TOKEN, QUOTED = "s3cret/token+with=signs", "s3cret%2Ftoken%2Bwith%3Dsigns"
    options: Mapping[str, Any] = {"token": TOKEN}
    log_level, expected_log = logging.DEBUG, ("DEBUG", "INFO")

    async def test_every_route_but_health_and_files_needs_it(self) -> None:
        for route in aiperf_api.ROUTES:
            path = route.path.replace("{file}", "favicon.svg").replace("{n}", "1")
            status = (await self.get(path)).status
            self.assertEqual(status == 401, route.needs_token, path)
        free = {route.name for route in aiperf_api.ROUTES if not route.needs_token}
        self.assertEqual(free, {"health", "healthz", "readyz", "static"})
        answer = await self.get("/api/status", headers={"Authorization": f"Bearer {self.TOKEN}x"})
        self.assertEqual((answer.status, answer.headers["www-authenticate"][:6]), (401, "Bearer"))

    @needs_static
    async def test_people_get_a_form_and_a_cookie_of_this_port(self) -> None:
        form = await self.get("/dashboard")
        self.assertEqual((form.status, form.headers["content-type"]), (401, "text/html; charset=utf-8"))
        self.assertIn(b'name="token"', form.body)
        page = await self.get(f"/dashboard?token={self.QUOTED}")
        cookie, *attributes = page.headers["set-cookie"].split("; ")
        self.assertEqual(attributes, ["HttpOnly", "SameSite=Strict"])
        self.assertIn(self.service.url.rpartition(":")[2], cookie.partition("=")[0])
        self.assertNotIn("s3cret", cookie)
        other = await self.serve(token="another-token")
        second = (await self.get("/dashboard?token=another-token", other)).headers["set-cookie"].split("; ")[0]
        for service in (self.service, other):  # two servers on one host: a browser sends both cookies to both
            answer = await self.get("/api/status", service, headers={"Cookie": f"{cookie}; {second}"})
            self.assertEqual(answer.status, 200)
            self.assertNotIn("set-cookie", answer.headers)
        self.assertNotIn("set-cookie", (await self.get("/dashboard?token=wrong")).headers)

    async def test_it_is_never_logged_at_any_level_and_the_access_log_is_quoted(self) -> None:
        bearer = {"Authorization": f"Bearer {self.TOKEN}", "User-Agent": f"x?token={self.TOKEN}"}
        await self.get(f"/api/status?token={self.TOKEN}&x=1", headers=bearer)
        await self.get(f"/api/status?token={self.QUOTED}&x=%0d%0a", headers={"User-Agent": 'curl" 200 "'})
        await self.get(f"/api/status/{self.TOKEN}", headers={"User-Agent": self.TOKEN})
        await self.get(f"/nosuch?x=1&TOKEN=no&token={self.QUOTED}")
        await self.get(f"/ws?%74oken={self.QUOTED}")
        await (await self.client()).upgrade(headers={"Sec-WebSocket-Protocol": "aiperf.token.plain-token"})
        await (await self.client()).ask(f"GET /?token={self.TOKEN} HTTP/1.1\r\nBad : header\r\n\r\n".encode())
        await self.service.stop()
        self.assertGreater(len(self.log), 5)
        for text in (self.TOKEN, self.QUOTED, "plain-token", "s3cret"):
            self.assertNotIn(text, "".join(self.log))
        self.assertRegex("\n".join(self.log), r"127\.0\.0\.1:\d+ 404 GET /api/status/\*\*\*\n")


def make_certificate(directory: str, name: str = "cert") -> tuple[str, str]:
    """A self-made certificate for localhost: the paths of certificate and key."""
    certificate, key = os.path.join(directory, f"{name}.pem"), os.path.join(directory, f"{name}-key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    more = ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", certificate)
    subprocess.run([*command.split(), *more], check=True, capture_output=True)
    return certificate, key


@needs_program("openssl")
class TestTLS(WireTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.certificate, cls.key = make_certificate(directory.name)
        cls.context = ssl.create_default_context(cafile=cls.certificate)
        if sys.version_info < (3, 11):  # whose transport of a handshake that failed nobody could close
            warnings.filterwarnings("ignore", "unclosed transport <asyncio.sslproto", ResourceWarning)
        cls.options = {"tls_cert": cls.certificate, "tls_key": cls.key}

    async def client(self, service: aiperf_api.APIService | None = None) -> Client:
        port = int((service or self.service).url.rpartition(":")[2])
        client = Client(*await asyncio.open_connection("localhost", port, ssl=self.context, family=socket.AF_INET))
        self.addCleanup(client.close)
        return client

    async def test_https_and_wss_to_the_end_of_the_server(self) -> None:
        self.assertTrue(self.service.url.startswith("https://"))
        client = await self.client()
        for _ in range(3):
            self.assertEqual((await client.get("/health")).body, b"ok\n")
        self.assertEqual(statuses(await self.exchange(b"BAD\r\n")), [400])
        heard, stream = await self.listen("status"), await self.client()
        self.publish("status", fill="µ" * 50_000)
        self.assertEqual(len((await heard.hear())["fill"]), 50_000)
        await stream.get("/api/stream")
        await self.service.stop()
        with self.assertRaises(EOFError):
            await heard.hear()

    async def test_a_peer_that_never_answers_our_end_is_ended(self) -> None:  # nor does it stop the sweep
        client = await self.client()
        await client.get("/health")
        client.writer.transport.pause_reading()
        [connection] = self.service.connections
        for _ in range(aiperf_api.HTTP_IDLE_TIMEOUT_SEC + aiperf_api.LINGER_TIMEOUT_SEC + 2):
            connection.check()
        await self.until(lambda: not self.service.connections)

    async def test_plain_http_on_the_tls_port_is_logged_once(self) -> None:
        self.expected_log = ("plain HTTP",)
        for data in (self.HEALTH, self.HEALTH, b"", b"\x16\x03\x01", bytes(range(256))):
            peer = await self.raw(data)
            await self.read_all(peer) if data == self.HEALTH else peer.close()
        self.assertEqual((await self.get("/health")).status, 200)
        self.assertEqual(len(self.log), 1)

    async def test_handshakes_that_never_end_are_counted_and_ended(self) -> None:
        with mock.patch.object(aiperf_api, "HTTP_HEAD_TIMEOUT_SEC", 0.5):
            self.service = await self.serve(**self.options)
        self.service.connections_max = 2
        silent = [await self.raw(b"\x16\x03\x01\x00\xff") for _ in range(3)]
        for peer in silent:
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(await self.read_all(peer), b"")
        self.assertEqual((await self.get("/health")).status, 200)

    def test_a_certificate_or_key_that_does_not_fit_is_one_line_that_names_the_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            nonsense = os.path.join(folder, "nonsense.pem")
            Path(nonsense).write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
            _, foreign = make_certificate(folder, "other")
            for files, blamed in (
                (("--tls-cert", nonsense), "--tls-cert"),
                (("--tls-cert", "/nowhere/cert.pem"), "--tls-cert"),
                (("--tls-cert", self.certificate), "--tls-cert"),  # without its key
                (("--tls-cert", self.certificate, "--tls-key", nonsense), "--tls-key"),
                (("--tls-cert", self.certificate, "--tls-key", foreign), "--tls-key"),
                (("--tls-cert", self.key, "--tls-key", self.key), "--tls-cert"),
                (("--tls-key", self.key), "--tls-key"),
            ):
                code, errors = run_main("--api-port", "0", *files)
                self.assertEqual(code, 2)
                self.assertRegex(errors, rf"\Aaiperf-api: {blamed}[^\n]+\n\Z")


# == 14 == Command line ================================================================================================

ONE_LINE = r"\Aaiperf-api: [^\n]+\n\Z"


def run_main(*argv: str, **environ: str) -> tuple[int, str]:
    """main() in this process, up to where it would serve: the exit code and what it said."""
    errors = io.StringIO()
    with mock.patch.dict(os.environ, environ), contextlib.redirect_stderr(errors):
        code = aiperf_api.main(argv)
    return code, errors.getvalue()


class TestCommandLine(unittest.TestCase):
    def test_wrong_usage_is_one_line_and_exit_2(self) -> None:
        port = ("--api-port", "0")
        with tempfile.TemporaryDirectory() as folder:
            empty, text, json_list = (os.path.join(folder, name) for name in ("empty.jsonl", "x.jsonl", "list.json"))
            for path, content in ((empty, ""), (text, '{"n":1}\n'), (json_list, "[]")):
                Path(path).write_text(content)
            for argv, words in (
                ((), "--api-port"), (("--api-host", "127.0.0.1"), "needs --api-port"), (("--api-port",), "--api-port"),
                *((("--api-port", value), "--api-port") for value in ("x", "65536", "+5", "\u0665")),
                ((*port, "--demo", "--zmq-host", "h"), "only one source"),
                ((*port, "--replay", "/nonexistent.jsonl"), "/nonexistent.jsonl"),
                ((*port, "--replay", empty), "empty"), ((*port, "--replay", text), ""),
                ((*port, "--replay", text, "--record", text), "--replay reads"),
                ((*port, "--config", json_list, "--report", json_list), "--config reads"),
                ((*port, "--config", "/no/such"), "/no/such: No such file"), ((*port, "--config", empty), "not JSON: "),
                ((*port, "--config", json_list), "not a JSON object"),
                ((*port, "--record", text, "--tls-cert", json_list, "--tls-key", text), "--tls-key reads"),
                ((*port, "--zmq-address", "x"), "not a bus"), ((*port, "--zmq-backend", "x"), "auto, pyzmq or builtin"),
                ((*port, "--replay-speed", "-1", "--demo"), "--replay-speed"),
                ((*port, "--replay-speed", "2"), "needs --replay"), ((*port, "--replay-loop"), "needs --replay"),
                ((*port, "--linger", "soon"), "--linger"), ((*port, "--log-level", "loud"), "--log-level"),
                ((*port, "--cors-origin", "x"), "--cors-origin"), ((*port, "--allow-host", "http://x"), "--allow-host"),
                ((*port, "--api-token", "t\udcff"), "--api-token: not usable"),
                *(((*port, flag, ""), flag) for flag in ("--api-token", "--zmq-host", "--record", "--config")),
                ((*port, "--report", "/nonexistent/report.html"), "no such folder"), (("--nonsense",), "--nonsense"),
                (("--port", "9090"), "--api-port"), (("help",), "--help"), ((*port, "aiperf", "profile"), "behind --"),
                ((*port, "--"), "behind --"), ((*port, "--demo", "--", "true"), "only one source"),
            ):  # fmt: skip
                code, errors = run_main(*argv)
                self.assertEqual(code, 2, errors)
                self.assertRegex(errors, ONE_LINE)
                self.assertIn(words, errors)

    def test_what_the_machine_refuses_is_one_line_and_exit_1(self) -> None:
        missing = mock.patch.object(tempfile, "mkdtemp", side_effect=FileNotFoundError(2, "No such file"))
        with tempfile.NamedTemporaryFile() as file, socket.create_server(("127.0.0.1", 0)) as busy, missing:
            port = str(busy.getsockname()[1])
            refused = [
                (("--api-port", port, "--demo"), f"cannot listen on 127.0.0.1 port {port}: Address already in use")
            ]
            for argv, words in (
                (("--zmq-bind", f"ipc://{file.name}"), "is not a socket"),
                (("--", "true"), "No such file"),
            ):
                refused += [(("--api-port", "0", *argv), words)] if zmq else []
            for argv, words in refused:
                code, errors = run_main(*argv)
                self.assertEqual(code, 1)
                self.assertRegex(errors, ONE_LINE)
                self.assertIn(words, errors)
            self.assertTrue(os.path.isfile(file.name), "to bind never removes a file")

    def test_help_and_version(self) -> None:
        shown = run_program("--help")
        self.assertEqual(shown.returncode, 0)
        flags = set(re.findall(r"^ +(?:-h, )?(--[a-z][a-z-]+)", shown.stdout, re.MULTILINE))
        self.assertEqual(flags, {option.flag for option in aiperf_api.OPTIONS} | {"--version", "--help"})
        for word in " ".join(option.env for option in aiperf_api.OPTIONS).split():
            self.assertIn(word, shown.stdout)
        self.assertEqual(run_program("--version").stdout, f"aiperf-api {aiperf_api.__version__}\n")

    def test_variables_stand_in_for_flags_and_flags_beat_them(self) -> None:
        server = {"PORT": "1234", "HOST": "::1", "POST_COMPLETE_GRACE": "7", "WEBSOCKET_MAX_CONNECTIONS": "0"}
        server["CORS_ORIGINS"] = '["https://a", "https://b"]'
        environ = {f"AIPERF_API_SERVER_{name}": value for name, value in server.items()}
        environ.update({"AIPERF_API_ALLOW_HOST": "x, y", "AIPERF_API_TOKEN": "t"})
        settings = aiperf_api.parse_arguments([], environ).settings
        self.assertEqual((settings.port, settings.host, settings.token), (1234, "::1", "t"))
        self.assertEqual((settings.cors_origins, settings.allow_hosts), (("https://a", "https://b"), ("x", "y")))
        self.assertEqual((settings.linger_sec, settings.ws_max_connections), (7, 0))
        environ["AIPERF_API_SERVER_CORS_ORIGINS"] = "[]"  # AIPerf's default
        self.assertEqual(aiperf_api.parse_arguments([], environ).settings.cors_origins, ())
        self.assertEqual(aiperf_api.parse_arguments(["--api-port", "1"], environ).settings.port, 1)
        self.assertRaisesRegex(aiperf_api.UsageError, "empty token", aiperf_api.APIService, token="")

    def test_the_source_follows_the_options(self) -> None:
        for argv, kind, address in (
            ([], "tcp", "tcp://127.0.0.1:5664"),
            (["--zmq-host", "::1"], "tcp", "tcp://[::1]:5664"),
            (["--zmq-ipc-path", "/tmp/x"], "ipc", "ipc:///tmp/x/event_bus_proxy_backend.ipc"),
            (["--zmq-address", "tcp://h:1"], "zmq", "tcp://h:1"),
            *([(["--zmq-bind", "tcp://127.0.0.1:*"], "bind", "tcp://127.0.0.1:*")] if zmq else []),
        ):
            source = aiperf_api.parse_arguments(["--api-port", "0", *argv], {}).source
            self.assertEqual((source.kind, source.address), (kind, address))
            self.assertEqual(source.backend, "pyzmq" if zmq else "builtin")
        asked = ["--api-port", "0", "--zmq-backend", "builtin"]
        self.assertEqual(getattr(aiperf_api.parse_arguments(asked, {}).source, "backend", ""), "builtin")

    def test_the_flags_of_a_command_line_are_read_whatever_their_names(self) -> None:
        line = "aiperf profile -m m --url=http://h --streaming --concurrency 4 --isl-stddev -1 -H A:b -H C:d --rate 2.5"
        line += f" --api-key {'1234' * 5}"  # it stays a text, which can be redacted
        told = {"model": "m", "url": "http://h", "streaming": True, "concurrency": 4, "isl_stddev": -1, "rate": 2.5}
        told.update(header=["A:b", "C:d"], api_key="1234" * 5)
        self.assertEqual(aiperf_api.read_flags(line.split()), told)

    def test_the_demo_serves_says_so_and_stops_on_a_signal_with_exit_0(self) -> None:
        for number, host, shown in ((signal.SIGINT, "127.0.0.1", "127.0.0.1"), (signal.SIGTERM, "::1", "[::1]")):
            program = Program("--demo", "--api-host", host)
            with self.subTest(host), program as url:
                self.assertRegex(url, rf"\Ahttp://{re.escape(shown)}:[0-9]+\Z")
                self.assertIn(f"{url}/dashboard", program.lines[1])
                self.assertIn("demo", program.lines[2])
                status = json.loads(fetched(url + "/api/status"))  # it begins in the middle of the run
                self.assertEqual((status["source"]["kind"], status["source"]["address"]), ("demo", "demo.jsonl.gz"))
                program.process.send_signal(number)
                self.assertEqual(program.process.wait(10), 0)

    @needs_recordings
    def test_with_linger_a_replay_ends_the_program_also_without_an_end_of_the_run(self) -> None:
        for name in ("run_0_13_success", "run_0_13_killed"):
            recording = str(RECORDINGS / f"{name}.jsonl.gz")
            done = run_program("--api-port", "0", "--replay", recording, "--replay-speed", "0", "--linger", "0")
            self.assertEqual(done.returncode, 0, done.stderr)

    def test_with_too_few_descriptors_it_says_how_many_it_needs(self) -> None:
        program = [sys.executable, aiperf_api.__file__, "--api-port", "0", "--demo"]
        limited = ["bash", "-c", 'ulimit -n 24; exec "$0" "$@"', *program]
        done = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertRegex(done.stderr.splitlines()[-1], r"descriptors are too few: \d+ are needed")


class TestChildPlan(unittest.TestCase):
    def plan(self, line: str, *options: str, environ: dict[str, str] | None = None) -> aiperf_api.Plan:
        argv = ["--api-port", "0", *options, "--", *line.split()]
        return aiperf_api.parse_arguments(argv, environ or {}, "/p")

    def test_a_profile_is_followed_to_the_bus_that_it_or_we_were_told(self) -> None:
        private = "ipc:///p/event_bus_proxy_backend.ipc"
        for line, options, address, added in (
            ("aiperf profile -m x", (), private, "--zmq-ipc-path /p"),
            ("uv run --with aiperf /opt/aiperf profile -m x", (), private, "--zmq-ipc-path /p"),
            ("python -m aiperf profile", (), private, "--zmq-ipc-path /p"),
            ("aiperf profile --zmq-ipc-path /x", (), "ipc:///x/event_bus_proxy_backend.ipc", ""),
            ("aiperf profile --zmq-host 0.0.0.0", (), "tcp://127.0.0.1:5664", ""),
            ("aiperf profile --zmq-dual-bind", (), "ipc:///tmp/aiperf/event_bus_proxy_backend.ipc", ""),
            ("aiperf profile", ("--zmq-host", "h"), "tcp://h:5664", ""),
            ("aiperf profile --zmq-host x", ("--zmq-address", "tcp://h:1"), "tcp://h:1", ""),
        ):
            made = self.plan(line, *options)
            self.assertEqual((made.source.address, made.source.kind), (address, "child"))
            self.assertEqual(" ".join(made.argv), f"{line} {added}".strip())

    def test_live_metrics_are_switched_on_unless_the_user_set_them_and_our_variables_stay_ours(self) -> None:
        environ = {"AIPERF_UI_REALTIME_METRICS_INTERVAL": "7", "AIPERF_API_SERVER_PORT": "1", "AIPERF_API_TOKEN": "t"}
        made = self.plan("aiperf profile", environ=environ)
        wanted = {"AIPERF_UI_REALTIME_METRICS_ENABLED": "true", "AIPERF_UI_REALTIME_METRICS_INTERVAL": "7"}
        self.assertEqual(made.environ, wanted)

    def test_the_secrets_of_the_command_count_before_those_of_the_environment(self) -> None:
        environ = {f"VAR{number}_API_KEY": f"{SECRET}{number}" for number in range(30)}
        argv = ("--api-port", "0", "--", "aiperf", "profile", "--api-key", f"own-{SECRET}")
        self.assertIn(f"own-{SECRET}", aiperf_api.parse_arguments(argv, environ).settings.secrets)

    def test_a_configuration_file_that_chooses_the_bus_is_one_line_that_says_what_to_do(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "c.yaml")
            for text, chooses in (
                ("runtime:\n  communication:\n    type: tcp\n", True),
                ('{"runtime": {"communication": {"type": "tcp"}}}', True),
                ("benchmark:\n  model: communication\n# communication\n", False),
            ):
                path.write_text(text)
                if not chooses:
                    self.assertEqual(self.plan(f"aiperf profile -f {path}").argv[-2:], ("--zmq-ipc-path", "/p"))
                    continue
                with self.assertRaisesRegex(aiperf_api.UsageError, "--zmq-host 127.0.0.1 -- aiperf profile"):
                    self.plan(f"aiperf profile --config {path}")
                named = self.plan(f"aiperf profile --config {path}", "--zmq-host", "h")
                self.assertEqual(named.source.address[:7], "tcp://h")

    def test_what_the_command_line_tells_is_the_configuration(self) -> None:
        made = self.plan("aiperf profile -m x --api-key sk-4711-aaaa-bbbb-cccc --concurrency 3")
        self.assertEqual(made.told["concurrency"], 3)
        self.assertEqual((made.told["endpoint_type"], made.told["streaming"]), ("chat", False))  # AIPerf's defaults
        self.assertEqual(self.plan("aiperf profile -f /nonexistent.yaml").told, {"config": "/nonexistent.yaml"})

    @unittest.skipUnless(zmq, "needs the pyzmq package")
    def test_any_other_command_finds_an_address_to_publish_to(self) -> None:
        made = self.plan("python3 mine.py")
        self.assertEqual((made.source.address, made.environ["AIPERF_API_ZMQ_ADDRESS"]), ("ipc:///p/bus.ipc",) * 2)
        environ = {"AIPERF_API_SERVER_PORT": "1", "AIPERF_API_SERVER_SHUTDOWN_RESPONSE_DELAY_SECONDS": "2"}
        plan = aiperf_api.parse_arguments(("--api-port", "0", "--zmq-bind", "ipc:///x", "--", "true"), environ, "/p")
        self.assertEqual(set(environ) & set(plan.environ), {"AIPERF_API_SERVER_SHUTDOWN_RESPONSE_DELAY_SECONDS"})
        self.assertNotIn("AIPERF_API_ZMQ_ADDRESS", plan.environ)  # the user's own may be no address to connect to
        without = mock.patch.object(aiperf_api, "zmq", None)
        with without, self.assertRaisesRegex(aiperf_api.UsageError, "pyzmq"):
            self.plan("python3 mine.py")


@unittest.skipUnless(zmq, "needs the pyzmq package")
@unittest.skipUnless(hasattr(os, "setpgid"), "only on POSIX")
class TestChild(unittest.TestCase):  # `-- COMMAND`; the commands are small scripts
    def start(self, *argv: str, **env: str) -> subprocess.Popen[str]:
        command, pipe = [sys.executable, aiperf_api.__file__, "--api-port", "0", *argv], subprocess.PIPE
        environ = {**os.environ, **env}
        process = subprocess.Popen(command, env=environ, text=True, stdout=pipe, stderr=pipe, start_new_session=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def ended(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return run_program("--api-port", "0", "--linger", "0", "--", *argv)

    def test_the_exit_code_is_the_childs(self) -> None:
        for script, code in (("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", 137), ("kill -TERM $$", 143)):
            self.assertEqual(self.ended("sh", "-c", script).returncode, code, script)
        for command, code in (("no-such-command-4711", 127), ("/no/such/file", 127), (__file__, 126)):
            done = self.ended(command)
            self.assertEqual(done.returncode, code)
            self.assertRegex(done.stderr.splitlines()[-1], rf"\Aaiperf-api: {re.escape(command)}: [^\n]+\Z")

    def test_the_server_is_up_before_the_command_starts_and_its_directory_goes(self) -> None:
        script = (
            "import os, stat; path = os.environ['AIPERF_API_ZMQ_ADDRESS'][6:];"
            "print(stat.S_ISSOCK(os.stat(path).st_mode), oct(os.stat(os.path.dirname(path)).st_mode & 0o777), path)"
        )
        is_socket, mode, path = self.ended(sys.executable, "-c", script).stdout.split()
        self.assertEqual((is_socket, mode), ("True", "0o700"))
        self.assertFalse(os.path.exists(os.path.dirname(path)))

    def test_a_command_that_never_reports_has_failed_only_if_it_ends_badly(self) -> None:
        for code, state, error in ((7, "failed", "exit status 7; see its output above"), (0, "waiting", None)):
            process = self.start("--linger", "60", "--", "sh", "-c", f"exit {code}")
            url = process.stderr.readline().split()[-1]
            while "the benchmark ended" not in process.stderr.readline():
                pass
            status = json.loads(fetched(url + "/api/status"))
            self.assertEqual((status["source"]["kind"], status["state"], status["error"]), ("child", state, error))
            process.send_signal(signal.SIGTERM if code else signal.SIGINT)  # while lingering: at once
            self.assertEqual(process.wait(10), code)

    def test_each_way_to_send_sigint_reaches_the_child_exactly_once(self) -> None:
        script = (
            "import os, signal, sys, time\nseen = []\nsignal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
            "print('up', flush=True)\ndeadline = time.time() + 30\n"
            "while not seen and time.time() < deadline: time.sleep(0.02)\ntime.sleep(1)\nprint(len(seen))"
        )
        for way in ("process", "group", "both"):
            with self.subTest(way):
                process = self.start("--linger", "0", "--", sys.executable, "-c", script)
                self.assertEqual(process.stdout.readline(), "up\n")
                if way in ("process", "both"):  # `timeout` sends it to the process and to its group
                    process.send_signal(signal.SIGINT)
                if way in ("group", "both"):
                    os.killpg(process.pid, signal.SIGINT)
                self.assertEqual(process.communicate(timeout=60)[0], "1\n")
                self.assertEqual(process.returncode, 0)

    def test_signals_end_the_child_and_its_directory(self) -> None:
        for number, code in ((signal.SIGTERM, 143), (signal.SIGQUIT, 131), (signal.SIGHUP, 129)):
            if signal.getsignal(number) == signal.SIG_IGN:  # under nohup, and so for the server
                continue
            script = 'echo "$AIPERF_API_ZMQ_ADDRESS $$"; exec sleep 60'
            process = self.start("--linger", "60", "--", "sh", "-c", script)
            address, pid = process.stdout.readline().split()
            process.send_signal(number)
            self.assertEqual(process.wait(20), code)
            self.assertFalse(os.path.exists(os.path.dirname(address[len("ipc://") :])))
            self.assertRaises(ProcessLookupError, os.kill, int(pid), 0)

    @unittest.skipUnless(pty, "needs a terminal")
    def test_on_a_terminal_ctrl_c_reaches_the_child_alone_and_ctrl_z_stops_both(self) -> None:
        script = "trap 'echo got; kill $!; exit 5' INT; sleep 60 & echo up; wait"  # no vfork() for Ctrl-Z to hit
        options = ("--api-port", "0", "--linger", "0", "--", "sh", "-c", script)
        program = shlex.join([sys.executable, aiperf_api.__file__, *options])
        pid, terminal = pty.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background it is ignored
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        self.addCleanup(os.close, terminal)
        seen = ""

        def expect(words: str) -> None:
            nonlocal seen
            deadline = time.monotonic() + 30
            while words not in seen:
                self.assertLess(time.monotonic(), deadline, seen)
                if select.select([terminal], [], [], 1)[0]:
                    seen += os.read(terminal, 1 << 16).decode("utf-8", "replace")
            seen = seen.partition(words)[2]

        os.write(terminal, f"PS1=ready$; {program}\n".encode())
        expect("up\r\n")
        os.write(terminal, b"\x1a")  # Ctrl-Z
        expect("Stopped")
        os.write(terminal, b"fg\n")
        expect("fg\r\n")
        time.sleep(0.5)
        os.write(terminal, b"\x03")  # Ctrl-C
        expect("got")
        os.write(terminal, b"echo code=$?; exit\n")
        expect("code=5")
        os.waitpid(pid, 0)

    def test_credentials_of_the_command_line_show_nowhere(self) -> None:
        key = "sk-very-secret-4711-aaaa"
        with tempfile.TemporaryDirectory() as folder:
            aiperf = Path(folder, "aiperf")
            aiperf.write_text("#!/bin/sh\necho up\nexec sleep 60\n")
            aiperf.chmod(0o755)
            command = (str(aiperf), "profile", "--api-key", key, "-H", f"X-Team: {key}", "--model", "m")
            process = self.start("--linger", "0", "--log-level", "debug", "--", *command, HF_TOKEN=key)
            process.stdout.readline()
            config = json.loads(fetched(process.stderr.readline().split()[-1] + "/api/config"))
            self.assertEqual((config["api_key"], config["model"]), ("***", "m"))
            self.assertNotIn(key, json.dumps(config))
            process.terminate()
            self.assertNotIn(key, process.communicate(timeout=20)[1])

    def test_the_log_waits_while_the_child_draws_on_the_terminal(self) -> None:
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        with mock.patch.object(aiperf_api.log, "handlers", [handler]):
            for is_terminal in (True, False):
                with mock.patch.object(sys, "stderr", mock.Mock(isatty=lambda at=is_terminal: at)):
                    with aiperf_api.log_held():
                        aiperf_api.log.error("one")
                        self.assertEqual(stream.getvalue(), "" if is_terminal else "one\none\n")
                    aiperf_api.log.error("one") if not is_terminal else None
        self.assertEqual(stream.getvalue(), "one\n" * 3)


# == The program, as it is copied ======================================================================================


@needs_recordings
class TestWithNothingInstalled(LoopTestCase):  # by an interpreter that sees no package
    BARE = ("-I", "-S", str(ROOT / "aiperf_api.py"))
    RUN = "run_0_13_success"

    def check_end(self, url: str, kind: str, backend: str) -> None:
        wanted = END_STATES[self.RUN]
        status = status_when(url, lambda status: status["state"] == wanted.state)
        self.assertEqual((status["source"]["kind"], status["source"]["backend"]), (kind, backend))
        self.assertEqual(figures(json.loads(fetched(url + "/api/progress"))), wanted[:4])
        self.assertIn('"final":true', fetched(url + "/api/metrics"))
        self.assertRegex(fetched(url + "/metrics"), r"(?m)^aiperf_request_latency_ms\{.*quantile=\"0.5\"\} [0-9.]+$")

    def check_attached(self, option: str, value: str, kind: str) -> None:
        with self.subTest(option), Program(option, value, program=self.BARE) as url:
            self.check_end(url, kind, "builtin")

    async def test_it_attaches_over_tcp_and_ipc(self) -> None:
        run = b"".join(zmtp_message(topic, payload) for _, topic, payload in wire_recording(self.RUN))
        with tempfile.TemporaryDirectory() as folder:
            paths = ["", f"{folder}/event_bus_proxy_backend.ipc"][: 1 + hasattr(socket, "AF_UNIX")]
            for path in paths:
                async with RawPublisher(GREETING_4_3 + READY_XPUB + run, path) as publisher:
                    given = ("--zmq-ipc-path", folder, "ipc") if path else ("--zmq-address", publisher.address, "zmq")
                    await asyncio.get_running_loop().run_in_executor(None, self.check_attached, *given)

    def test_the_module_alone_serves_all_but_the_pages(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            alone = shutil.copy(ROOT / "aiperf_api.py", folder)
            recording = RECORDINGS / f"{self.RUN}.jsonl.gz"
            with Program("--replay", str(recording), "--replay-speed", "0", program=("-I", "-S", alone)) as url:
                self.check_end(url, "replay", "")
                self.assertIn("copy the folder static/", fetched(url + "/"))
                for path in ("/api", "/api/workers", "/api/results", "/api/runs", "/api/history"):
                    self.assertTrue(json.loads(fetched(url + path)), path)
            pyzmq = (("--zmq-backend", "pyzmq"), ("--zmq-bind", "tcp://127.0.0.1:*"), ("--", "true"))
            for arguments, reason in ((("--demo",), "demo"), *((one, "need pyzmq") for one in pyzmq)):
                done = run_program("--api-port", "0", *arguments, program=("-I", "-S", alone))
                self.assertEqual(done.returncode, 2)
                self.assertRegex(done.stderr, ONE_LINE)
                self.assertIn(reason, done.stderr)


# == README, guides and descriptions ===================================================================================

DOCUMENTS = (ROOT / "README.md", *sorted((STATIC / "guides").glob("*.md")))
DEMO = STATIC / "demo.jsonl.gz"
DEMO_CONFIG = ("--config", str(STATIC / "demo.config.json"))
OWN_FAMILIES = re.compile("aiperf_(api|benchmark_sta|elapsed|eta|info|phase|progress|worker)")
IDENTITY_LABELS = {"benchmark_id", "model", "endpoint_type", "streaming", "concurrency", "request_rate"}
HALF_WAY = 122  # messages of the demo until its profiling is half done
WEBSOCAT = shutil.which("websocat") is not None
OURS = r"(?:aiperf-api|(?<!test_)(?<!bench_)aiperf_api\.pyz?) "  # the program in a line of shell
# Console blocks that the tests below run, and those that .ci/run and .ci/test_guides.py run.
RUN_HERE, RUN_IN_CI = {"start", "half-way", "live", "shell"}, {"test", "unittest", "zipapp", "sums", "wheels"}
needs_documents = unittest.skipUnless(len(DOCUMENTS) > 1 and DOCUMENTS[0].exists(), "needs README.md and the guides")
needs_demo = unittest.skipUnless(DEMO.exists(), "needs the demo in static/")


def at_once(recording: Path) -> Program:
    return Program("--replay", str(recording), "--replay-speed", "0", *DEMO_CONFIG)


def markdown_table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a table, a line each row; `|` in a cell is quoted."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join((head, re.sub(r"[^|]+", "---", head), *(re.sub(r" +", " ", line) for line in lines)))


def options_table() -> str:
    rows = []
    for option in aiperf_api.OPTIONS:
        flag = f"`{option.flag} {option.metavar}`" if option.metavar else f"`{option.flag}`"
        rows.append((flag, option.default, f"`{option.env}`" if option.env else "", option.help))
    return markdown_table("| option | default | variable | |", rows)


def limits_table() -> str:
    """Each constant of room 1: its value as people write it, and what its comment says."""
    lines = Path(aiperf_api.__file__).read_text(encoding="utf-8").splitlines()
    first, end = (next(n for n, line in enumerate(lines) if line.startswith(f"# == {room} ==")) for room in (1, 2))
    rows = []
    for line in lines[first:end]:
        found = re.fullmatch(r"([A-Z][A-Z_\d]+)(?:: [\w\[\]., ]+)? = .*?  # (.*)", line)
        if found:
            value = getattr(aiperf_api, found[1])
            shown = str(value) if isinstance(value, str) else f"{value:,}"
            for size, unit in ((1 << 10, "KiB"), (1 << 20, "MiB")):
                if "BYTES" in found[1] and value % size == 0:
                    shown = f"{value // size:,} {unit}"
            rows.append((f"`{found[1]}`", shown, found[2]))
    return markdown_table("| constant | | |", rows)


def families_table() -> str:
    """The metrics of our own, as a server that has heard a run exposes them."""
    with at_once(DEMO) as url:
        status_when(url, lambda status: status["state"] == "complete")
        text = fetched(url + "/metrics")
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", text, re.MULTILINE))
    rows = []
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        if OWN_FAMILIES.match(name):
            labels = set(re.findall(r"(\w+)=\"", "".join(re.findall(rf"^{name}{{.*$", text, re.MULTILINE))))
            own = sorted(labels - IDENTITY_LABELS) if name != "aiperf_info" else []
            rows.append((f"`{name}`", kind, ", ".join(own), helps[name]))
    return markdown_table("| name | type | labels | |", rows)


ENDPOINTS = [(f"`{route.path}`", route.summary) for route in aiperf_api.ROUTES]
TABLES: Mapping[str, Callable[[], str]] = {
    "options": options_table,
    "endpoints": functools.partial(markdown_table, "| path | answer |", ENDPOINTS),
    "limits": limits_table,
    "families": families_table,
}


def write_tables() -> None:
    """Make each table anew behind its marker, `<!-- NAME -->`."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name, make in TABLES.items():
            if (marker := f"<!-- {name} -->\n") in text:
                text = re.sub(rf"{marker}(?:\|.*\n)*", (marker + make() + "\n").replace("\\", r"\\"), text)
        document.write_text(text, encoding="utf-8")


class Block(NamedTuple):  # a fenced one of a document
    document: str  # file name
    marker: str  # of the line `<!-- MARKER -->` before it; "" without one
    language: str
    text: str


class Session(NamedTuple):  # a command of a document and what it shows
    command: str
    shown: list[str]  # lines; a last line of "..." means that more follow


def blocks(language: str = "", marker: str = "") -> list[Block]:
    """Return the fenced blocks of README and guides, of one language or marker only where it is given."""
    pattern = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = [Block(path.name, *parts) for path in DOCUMENTS for parts in pattern.findall(path.read_text("utf-8"))]
    return [one for one in found if language in ("", one.language) and marker in ("", one.marker)]


def sessions_of(*found: Block) -> list[Session]:
    sessions = []
    for part in (part for block in found for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]):
        command, rest = re.fullmatch(r"((?:.*\\\n)*.*)\n((?:.*\n)*)", part).groups()
        sessions.append(Session(command, rest.splitlines()))
    return sessions


def masked(text: str) -> str:
    """Return text without the numbers, which differ from run to run, and what depends on them (a bar, columns)."""
    return re.sub(r" +|[#-]{8,}", " ", re.sub(r"-?\d+([.:]\d+)*(e-?\d+)?", "N", text)).rstrip()


class Shell:
    """Runs a line of shell in a process group of its own and gives the lines that it prints; half a minute ends it."""

    def __init__(self, command: str, folder: str) -> None:
        for name, target in (("aiperf-api", f'"{ROOT}/aiperf_api.py" "$@"'), ("python3", '"$@"')):
            self.program(folder, name, f'exec "{sys.executable}" {target}')
        self.program(folder, "aiperf", "sleep 30")  # somebody else's benchmark
        path = f"{folder}/bin{os.pathsep}{os.environ['PATH']}"
        environ = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
        where: Any = {"cwd": folder, "env": environ, "stdin": subprocess.DEVNULL, "start_new_session": True}
        self.process = subprocess.Popen(["bash", "-c", command], **where, stdout=subprocess.PIPE)
        self.pipe = self.process.stdout
        self.timer = threading.Timer(30, self._kill)
        self.timer.start()

    @staticmethod
    def program(folder: str, name: str, line: str) -> None:
        file = Path(folder) / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{line}\n")
        file.chmod(0o755)

    def lines(self) -> Iterator[str]:
        return (line.decode().rstrip("\n") for line in self.pipe)

    def close(self) -> None:
        self.timer.cancel()
        self._kill()
        self.pipe.close()
        self.process.wait()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@needs_documents
class TestDocumentation(unittest.TestCase):
    def setUp(self) -> None:
        self.texts = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}

    def test_every_option_endpoint_limit_and_metric_is_documented(self) -> None:
        text = "".join(self.texts.values())
        for name, make in TABLES.items():
            if name == "families" and not DEMO.exists():
                continue
            self.assertTrue(
                f"<!-- {name} -->\n{make()}\n\n" in text, f"{name}: see --write-docs at the end of this file"
            )

    def test_links_lead_somewhere(self) -> None:
        for document in DOCUMENTS:
            for target in re.findall(r"\]\(([^)]+)\)", self.texts[document.name]):
                name, _, anchor = target.partition("#")
                place = document.parent / name if name else document
                if "://" in target or not (document.parent / name.split("/")[0]).exists():  # a copy has no .ci/
                    continue
                titles = re.findall(r"^#+ (.*)$", self.texts.get(place.name, ""), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
                self.assertTrue(place.exists() and (not anchor or anchor in anchors), f"{document.name}: {target}")

    def test_options_in_examples_exist(self) -> None:
        known = {option.flag for option in aiperf_api.OPTIONS} | {"--version", "--help"}
        for line in re.findall(rf"^.*{OURS}--.*$", "\n".join(self.texts.values()), re.MULTILINE):
            ours = re.split(OURS, line, maxsplit=1)[1].split(" -- ")[0].split("`")[0]
            self.assertLessEqual(set(re.findall(r"(?<!\S)--[a-z-]+", ours)), known, line)

    def test_every_command_is_run_by_a_test_and_python_compiles(self) -> None:
        for block in blocks("console"):
            is_run = block.marker in RUN_HERE | RUN_IN_CI or block.marker.startswith("elsewhere: ")
            self.assertTrue(is_run, block.text)
        for block in blocks("python"):
            compile(block.text, block.document, "exec")

    def test_the_documentation_page_links_every_guide(self) -> None:
        page = (STATIC / "index.html").read_text(encoding="utf-8")
        self.assertEqual(set(re.findall(r"static/guides/([\w-]+\.md)", page)), {path.name for path in DOCUMENTS[1:]})


@needs_documents
@needs_demo
@needs_program("bash", "curl", "jq", "openssl")
class TestReadmeSessions(unittest.TestCase):
    maxDiff = None

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def shell(self, command: str) -> Shell:
        shell = Shell(command, self.folder)
        self.addCleanup(shell.close)
        return shell

    def check(self, sessions: Iterable[Session], url: str) -> None:
        """Run commands, all at once, against a server that is there; numbers differ."""
        runs = []
        for session in sessions:
            if WEBSOCAT or "websocat" not in session.command:
                runs.append((session, self.shell(session.command.replace("localhost:9090", url.partition("//")[2]))))
        for (command, shown), shell in runs:
            with self.subTest(command):
                goes_on = shown[-1:] == ["..."]
                lines = list(itertools.islice(shell.lines(), len(shown) - 1 if goes_on else None))
                both = lines, shown[: -1 if goes_on else None]
                self.assertEqual(*([masked(line) for line in part] for part in both))
            shell.close()

    def test_what_is_shown_once_a_run_is_half_way(self) -> None:
        half = Path(self.folder) / "demo.jsonl"
        with gzip.open(DEMO) as demo:
            half.write_bytes(b"".join(itertools.islice(demo, HALF_WAY)))
        with at_once(half) as url:
            status_when(url, lambda status: status["source"]["messages"] == HALF_WAY)
            self.check(sessions_of(*blocks("console", "half-way")), url)

    def test_what_goes_on_while_a_run_lasts(self) -> None:
        with Program("--demo", "--replay-speed", "2") as url:  # it begins in the middle of the run
            status_when(url, lambda status: status["phase"] == "profiling" and status["elapsed_sec"] > 3)
            self.check(sessions_of(*blocks("console", "live")), url)

    def test_the_first_lines(self) -> None:
        for command, shown in sessions_of(*blocks("console", "start")):
            with self.subTest(command):
                port, lines = str(free_port()), [""]
                shell = self.shell(command.replace("9090", port) + " 2>&1 >/dev/null")
                while not lines[-1].startswith("  source"):
                    lines.append(next(shell.lines()).replace(port, "9090"))
                self.assertIn(shown, (lines[1:], []))
                shell.close()

    def test_whole_sessions_in_an_empty_directory(self) -> None:
        needs, shells = {"benchmark.py": zmq, "websocat": WEBSOCAT}, []
        for block in blocks("console", "shell"):
            if all(there or word not in block.text for word, there in needs.items()):
                self.setUp()
                for file in blocks("python"):
                    if file.document == block.document and file.marker.startswith("file "):
                        (Path(self.folder) / file.marker[5:]).write_text(file.text)
                shells.append((block, self.shell(self.script(block))))  # all at once: some have to wait
        for block, shell in shells:
            lines = shell.lines()
            for command, shown in sessions_of(block):
                answer = list(itertools.takewhile(lambda line: line != "=====", lines))
                self.assertEqual(answer, shown, command)
            shell.close()

    @staticmethod
    def script(block: Block) -> str:
        """Return the commands of a block for one shell; between two it waits, as a person would, until a server is up."""
        script = ""
        for command, _ in sessions_of(block):
            script += f"{command}\n"
            for port in re.findall(r"--api-port (\d+).*&$", command):
                script += f"until (: </dev/tcp/127.0.0.1/{port}) 2>/dev/null; do sleep 0.05; done\n"
            for path in re.findall(r"--api-unix (\S+).*&$", command):
                script += f"until [ -S {path} ]; do sleep 0.05; done\n"
            script += "echo =====\n"
        for port in set(re.findall(r"\b909\d\b", block.text)):
            script = script.replace(port, str(free_port()))
        return script

    def test_the_example_in_python_serves(self) -> None:
        [block] = blocks("python", "file watch.py")
        (Path(self.folder) / "watch.py").write_text(block.text)
        self.assertRegex(next(self.shell("python3 watch.py").lines()), r"^http://127\.0\.0\.1:\d+$")


class TestDescriptions(ServiceTestCase):  # made of the routes and types, and held against them, by .ci/make_api_docs.py
    @classmethod
    def setUpClass(cls) -> None:
        if not (STATIC / "openapi.json").exists():
            raise unittest.SkipTest("needs static/openapi.json")
        names = ("openapi", "asyncapi")
        cls.openapi, cls.asyncapi = (json.loads((STATIC / f"{name}.json").read_text("utf-8")) for name in names)

    @staticmethod
    def judge(document: Any, schema: Any) -> Any:  # a name is one of the document's
        schema = {"$ref": f"#/components/schemas/{schema}"} if isinstance(schema, str) else schema
        return jsonschema.Draft202012Validator({"components": {"schemas": document["components"]["schemas"]}, **schema})

    def validators(self) -> dict[str, Any]:
        """Return a validator for each path that answers in JSON of a known shape."""
        found = {}
        for path, item in self.openapi["paths"].items():
            content = item["get"]["responses"].get("200", {}).get("content", {})
            if content.get("application/json", {}).get("schema") and len(content) == 1:
                found[path.replace("{n}", "1")] = self.judge(self.openapi, content["application/json"]["schema"])
        return found

    def test_asyncapi_names_each_message_type(self) -> None:
        schemas = self.asyncapi["components"]["schemas"].values()
        types = {shape["properties"].get("message_type", {}).get("const") for shape in schemas}
        names = self.asyncapi["x-message-types"]
        self.assertEqual(types - {None}, {*names["builtin"], "run"})
        self.assertLessEqual(set(names["builtin"]), aiperf_api.KNOWN_MESSAGE_TYPES)
        self.assertEqual(set(names["known"]), set(aiperf_api.KNOWN_MESSAGE_TYPES))

    @needs_recordings
    @unittest.skipUnless(jsonschema, "needs the jsonschema package")
    async def test_answers_and_messages_are_as_described_through_every_recording(self) -> None:
        schemas, any_message = self.asyncapi["components"]["schemas"], self.judge(self.asyncapi, "BusMessage")
        kinds = {shape["properties"].get("message_type", {}).get("const"): name for name, shape in schemas.items()}
        judges = {kind: self.judge(self.asyncapi, name) for kind, name in kinds.items() if kind}
        validators, seen = self.validators(), set()
        await self.check_answers(self.service, validators)
        for number, path in enumerate(sorted(RECORDINGS.glob("*.jsonl.gz"))):
            name = path.name.partition(".")[0]
            length = len(wire_recording(name))
            for count in (length // 2, length) if DEEP else (length // (1 + number % 2),):
                with self.subTest(f"{name} after {count} messages"):
                    service = await self.serve()
                    listener = await self.listen("*", service=service)
                    self.feed(name, count, service=service)
                    await self.check_answers(service, validators)
                    listener.say({"type": "ping"})
                    while (message := await listener.hear()) != {"type": "pong"}:
                        kind = message.get("message_type")
                        if kind is not None and (name, kind) not in seen:
                            seen.add((name, kind))
                            judges.get(kind, any_message).validate(message)
                    await service.stop()
        self.assertLessEqual(set(judges), {kind for _, kind in seen})

    async def check_answers(self, service: aiperf_api.APIService, validators: dict[str, Any]) -> None:
        client = await self.client(service)
        for path, validator in validators.items():
            answer = await client.get(path)
            self.assertIn(answer.status, (200, 404) if path == "/api/runs/1" else (200,), path)
            if answer.status == 200:
                validator.validate(answer.json)
        for tag, about in list((await client.get("/api/history")).json["tags"].items())[:2]:
            for query in (f"?tag={quote(tag)}", f"?tag={quote(tag)}&stat={about['stats'][0]}&points=2"):
                validators["/api/history"].validate((await client.get("/api/history" + query)).json)
        client.close()

    @unittest.skipUnless(jsonschema, "needs the jsonschema package")
    async def test_the_protocol_is_as_described(self) -> None:
        client = await self.listen("heartbeat")
        for message, name in (
            ({"type": "subscribe", "message_types": ["nothing_of_the_kind"], "snapshot": False}, "Subscribed"),
            ({"type": "unsubscribe", "message_types": ["heartbeat"]}, "Unsubscribed"),
            ({"type": "ping"}, "Pong"),
            ({"type": "sing"}, "ClientError"),
        ):
            client.say(message)
            self.judge(self.asyncapi, name).validate(await client.hear())


if __name__ == "__main__":
    if sys.argv[1:] == ["--write-docs"]:
        write_tables()
    elif sys.argv[1:2] == ["--echo"]:
        asyncio.run(run_echo(int(sys.argv[2])))
    else:
        unittest.main()
