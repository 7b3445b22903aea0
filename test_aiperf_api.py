# SPDX-License-Identifier: Apache-2.0
"""Tests of aiperf_api: `python3 -m unittest` with nothing installed, or pytest with independent judges.

One class per subject, in the order of the module's rooms; names are sentences about behaviour.
"""

from __future__ import annotations

import ast
import itertools
import re
import statistics
import struct
import subprocess
import sys
import time
import unittest
import unittest.mock
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

import aiperf_api

# Independent judges: without them the module is still tested, with them its tests are.
try:
    import hypothesis
    import hypothesis.strategies as st
except ImportError:
    hypothesis = st = None  # type: ignore[assignment]

try:
    import h11
except ImportError:
    h11 = None  # type: ignore[assignment]

try:
    import websockets.client
    import websockets.protocol
    import websockets.uri
except ImportError:
    websockets = None  # type: ignore[assignment]

try:
    import wsproto.frame_protocol
except ImportError:
    wsproto = None  # type: ignore[assignment]


# == Tools =============================================================================================================


def chopped(data: bytes, size: int) -> list[bytes]:
    """`data` in pieces of `size` bytes."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def cut_at(data: bytes, places: Iterable[int]) -> list[bytes]:
    """`data` cut at each place, modulo its length."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:stop] for start, stop in zip(edges, edges[1:])]


def cut_places() -> Any:
    """A hypothesis strategy for the places of cut_at()."""
    return st.lists(st.integers(0, 1 << 16), max_size=12)


def for_all(*strategies: Any, examples: int = 200) -> Callable[[Callable[..., None]], None]:
    """Run the decorated check at once, over examples of the strategies; so that hypothesis may be missing on import."""

    def run(check: Callable[..., None]) -> None:
        settings = hypothesis.settings(max_examples=examples, deadline=None)
        settings(hypothesis.given(*strategies)(check))()

    return run


# == Architecture ======================================================================================================
#
# The rules that keep one file readable, checked on its syntax tree. Each rule is also shown a small sample that breaks
# it, because a rule that cannot fail checks nothing.

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MUTABLE_DISPLAYS = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
MUTABLE_CALLS = frozenset({"Counter", "array", "bytearray", "defaultdict", "deque", "dict", "list", "set"})
FILE_CALLS = frozenset(
    {"get_data", "glob", "iterdir", "listdir", "open", "read_bytes", "read_text", "rglob", "scandir"}
)

# Modules that belong to some rooms alone; an import statement itself stands in room 0, where it is not counted.
LOOP_ROOMS = frozenset(range(11, 16))
MODULE_WALLS = {
    "asyncio": LOOP_ROOMS,
    "argparse": frozenset({15}),
    "logging": LOOP_ROOMS,
    "select": LOOP_ROOMS,
    "selectors": LOOP_ROOMS,
    "signal": LOOP_ROOMS,
    "socket": LOOP_ROOMS,
    "ssl": LOOP_ROOMS,
    "subprocess": LOOP_ROOMS,
    "threading": LOOP_ROOMS,
    "time": LOOP_ROOMS,
    "zmq": frozenset({0, 11}),
}
# What a room must not know of although it stands above it: the sources neither HTTP nor state, the hub neither routes
# nor what the bytes mean, the connection no state.
ROOM_WALLS = {11: frozenset({5, 6, 10}), 12: frozenset({6, 10}), 13: frozenset({10})}
FILE_ROOMS = frozenset({7, 11, 15})
ENVIRONMENT_ROOMS = frozenset({15})
MAX_FUNCTION_LINES = 60
MEDIAN_FUNCTION_LINES = 10


class SourceRules:
    """One module's source, and the places where it breaks a rule, each as `line N: what`."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        self.tree = ast.parse(source)
        banners = [(n, re.match(r"# == (\d+) == ", line)) for n, line in enumerate(self.lines, 1)]
        self.banners = [(n, int(found.group(1))) for n, found in banners if found]
        self.defined = {name: self.room(line) for line, name in reversed(list(self._definitions(self.tree)))}
        self.modules = {
            (alias.asname or alias.name).split(".")[0]: (getattr(node, "module", None) or alias.name).split(".")[0]
            for node in ast.walk(self.tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }

    def room(self, line: int) -> int:
        """Return the number of the room that a line stands in; 0 above the first banner."""
        return max((number for start, number in self.banners if start <= line), default=0)

    def _definitions(self, block: ast.AST) -> Iterator[tuple[int, str]]:
        """Yield (line, name) for each name that module-level code binds, inside `if` and `try` as well."""
        for node in ast.iter_child_nodes(block):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                yield node.lineno, node.name
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from ((node.lineno, (alias.asname or alias.name).split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.lineno, node.id
            elif not isinstance(node, (ast.expr, ast.Lambda)) or isinstance(node, (ast.Tuple, ast.List)):
                yield from self._definitions(node)

    def _uses(self, node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[tuple[int, str]]:
        """Yield (line, name) for each use of a name that no enclosing function binds; annotations count."""
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            bound = {arg.arg for arg in ast.walk(node) if isinstance(arg, ast.arg)}
            bound |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            local = local | bound
        if isinstance(node, ast.Name) and node.id not in local:
            yield node.lineno, node.id
        for child in ast.iter_child_nodes(node):
            yield from self._uses(child, local)

    def banner_faults(self) -> list[str]:
        """Find rooms out of order, missing, or twice there."""
        numbers = [number for _, number in self.banners]
        return [] if numbers == list(range(1, 16)) else [f"rooms are {numbers}"]

    def arrow_faults(self) -> list[str]:
        """Find names used above the room that defines them."""
        return [
            f"line {line}: room {self.room(line)} uses {name} of room {self.defined[name]}"
            for line, name in self._uses(self.tree)
            if name in self.defined and self.defined[name] > self.room(line)
        ]

    def room_wall_faults(self) -> list[str]:
        """Find names of rooms that a room must not know of."""
        return [
            f"line {line}: room {self.room(line)} uses {name} of room {self.defined[name]}"
            for line, name in self._uses(self.tree)
            if name in self.defined and self.defined[name] in ROOM_WALLS.get(self.room(line), ())
        ]

    def module_wall_faults(self) -> list[str]:
        """Find modules used outside the rooms that may."""
        return [
            f"line {line}: room {self.room(line)} uses {self.modules[name]}"
            for line, name in self._uses(self.tree)
            if self.room(line) not in MODULE_WALLS.get(self.modules.get(name, ""), {self.room(line)})
        ]

    def file_faults(self) -> list[str]:
        """Find files opened or listed outside the rooms that may."""
        calls = (node for node in ast.walk(self.tree) if isinstance(node, ast.Call))
        named = ((node.lineno, getattr(node.func, "attr", getattr(node.func, "id", ""))) for node in calls)
        return [
            f"line {line}: room {self.room(line)} calls {name}()"
            for line, name in named
            if name in FILE_CALLS and self.room(line) not in FILE_ROOMS
        ]

    def environment_faults(self) -> list[str]:
        """Find the environment read outside the command line."""
        return [
            f"line {node.lineno}: room {self.room(node.lineno)} uses os.{node.attr}"
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Attribute)
            and node.attr in {"environ", "environb", "getenv", "putenv"}
            and self.room(node.lineno) not in ENVIRONMENT_ROOMS
        ]

    def state_faults(self) -> list[str]:
        """Find mutable values bound in the module or in a class body, and `global` statements."""
        faults = [f"line {node.lineno}: global" for node in ast.walk(self.tree) if isinstance(node, ast.Global)]
        classes = (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))
        for node in itertools.chain(self.tree.body, *(found.body for found in classes)):
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and self._is_mutable(node.value):
                target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
                faults += [f"line {node.lineno}: {target} is mutable"] if target != "__all__" else []
        return faults

    @staticmethod
    def _is_mutable(value: Optional[ast.expr]) -> bool:
        called = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else ""
        return isinstance(value, MUTABLE_DISPLAYS) or called in MUTABLE_CALLS

    def effect_faults(self) -> list[str]:
        """Find module-level statements that do more than define."""
        defining = (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
        return [
            f"line {node.lineno}: {type(node).__name__} at module level"
            for node in self.tree.body[1:]  # the first is the docstring
            if not isinstance(node, defining)
            and not (isinstance(node, ast.Try) and all(isinstance(inner, defining) for inner in node.body))
            and not (isinstance(node, ast.If) and re.match("__name__ ==|sys\\.|TYPE_CHECKING$", ast.unparse(node.test)))
        ]

    def function_lines(self) -> list[tuple[int, int]]:
        """Return (lines, first line) of each function, docstring and all."""
        functions = (node for node in ast.walk(self.tree) if isinstance(node, FUNCTIONS))
        return [((node.end_lineno or 0) - node.lineno + 1, node.lineno) for node in functions]

    def length_faults(self) -> list[str]:
        """Find functions that are too long, and a median that is."""
        lengths = self.function_lines()
        faults = [f"line {line}: {length} lines" for length, line in lengths if length > MAX_FUNCTION_LINES]
        median = statistics.median(length for length, _ in lengths) if lengths else 0
        return faults + ([f"median of {median} lines"] if median >= MEDIAN_FUNCTION_LINES else [])

    def field_faults(self) -> list[str]:
        """Find fields of stateful classes (rooms 10 to 14) without a comment on their line or right above."""
        classes = (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))
        faults = []
        for node in classes:
            fields = list(self._fields(node)) if 10 <= self.room(node.lineno) <= 14 else []
            said = {name for field, name in fields if self._has_comment(field)}  # once is enough
            faults += [f"line {f.lineno}: {node.name}.{name} has no comment" for f, name in fields if name not in said]
        return faults

    def _fields(self, node: ast.ClassDef) -> Iterator[tuple[ast.stmt, str]]:
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign):
                yield statement, ast.unparse(statement.target)
            if isinstance(statement, FUNCTIONS) and statement.name == "__init__":
                for inner in ast.walk(statement):
                    targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
                    if isinstance(inner, (ast.Assign, ast.AnnAssign)) and isinstance(targets[0], ast.Attribute):
                        yield inner, targets[0].attr

    def _has_comment(self, field: ast.stmt) -> bool:
        own = self.lines[field.lineno - 1 : field.end_lineno]
        return any("  # " in line for line in own) or self.lines[field.lineno - 2].strip().startswith("#")


class ArchitectureTests(unittest.TestCase):
    """The rules, on the module and on a sample that breaks each."""

    rules: SourceRules

    @classmethod
    def setUpClass(cls) -> None:
        cls.rules = SourceRules(Path(aiperf_api.__file__).read_text(encoding="utf-8"))

    def broken(self, *rooms: str) -> SourceRules:
        """Return the rules over a sample: alternating banner numbers and lines under them."""
        return SourceRules("\n".join(f"# == {line} == Room" if line.isdigit() else line for line in rooms))

    def test_the_rooms_stand_in_order(self) -> None:
        self.assertEqual(self.rules.banner_faults(), [])
        self.assertEqual(len(self.broken("1", "3", "2").banner_faults()), 1)

    def test_names_are_used_in_their_own_room_or_below(self) -> None:
        self.assertEqual(self.rules.arrow_faults(), [])
        for use in ("def f(): return later()", "def f(x: later): pass", "x = later", "class C(later): pass"):
            with self.subTest(use):
                self.assertEqual(len(self.broken("1", use, "2", "def later(): pass").arrow_faults()), 1)
        self.assertEqual(self.broken("1", "def f(later): return later", "2", "def later(): pass").arrow_faults(), [])

    def test_rooms_do_not_know_what_they_must_not_know(self) -> None:
        self.assertEqual(self.rules.room_wall_faults(), [])
        self.assertEqual(len(self.broken("10", "class State: pass", "12", "x = State").room_wall_faults()), 1)

    def test_modules_stay_behind_their_walls(self) -> None:
        self.assertEqual(self.rules.module_wall_faults(), [])
        for name, room in (("asyncio", "4"), ("zmq", "13"), ("time", "10"), ("socket", "5"), ("argparse", "14")):
            with self.subTest(name):
                self.assertEqual(len(self.broken(f"import {name}", room, f"x = {name}.y").module_wall_faults()), 1)
                from_import = self.broken(f"from {name} import y", room, "def f(): return y()")
                self.assertEqual(len(from_import.module_wall_faults()), 1)

    def test_files_are_read_in_three_rooms_only(self) -> None:
        self.assertEqual(self.rules.file_faults(), [])
        for call in ("open('x')", "gzip.open('x')", "Path('x').read_bytes()"):
            with self.subTest(call):
                self.assertEqual(len(self.broken("13", f"def f(): {call}").file_faults()), 1)

    def test_the_environment_is_read_by_the_command_line_only(self) -> None:
        self.assertEqual(self.rules.environment_faults(), [])
        self.assertEqual(len(self.broken("14", "x = os.environ").environment_faults()), 1)

    def test_nothing_mutable_lives_in_the_module_or_a_class_body(self) -> None:
        self.assertEqual(self.rules.state_faults(), [])
        for line in ("x = {}", "x: list = []", "x = set()", "class C:\n    x = {1: 2}", "def f():\n    global x"):
            with self.subTest(line):
                self.assertEqual(len(self.broken("1", line).state_faults()), 1)
        self.assertEqual(self.broken("1", "X = (1,)", "Y = frozenset({1})").state_faults(), [])

    def test_module_level_code_only_defines(self) -> None:
        self.assertEqual(self.rules.effect_faults(), [])
        for line in ("print()", "for x in y: pass", "if y: pass", "with y: pass"):
            with self.subTest(line):
                self.assertEqual(len(self.broken('"""Docstring."""', line).effect_faults()), 1)

    def test_functions_are_short(self) -> None:
        self.assertEqual(self.rules.length_faults(), [])
        long = ["def f():", *["    x = 1"] * MAX_FUNCTION_LINES]
        self.assertEqual(len(self.broken(*long).length_faults()), 2)

    def test_every_field_of_a_stateful_class_has_a_comment(self) -> None:
        self.assertEqual(self.rules.field_faults(), [])
        in_init = "class C:\n    def __init__(self):\n        self.x = 1"
        for line in ("class C:\n    x: int", in_init):
            with self.subTest(line):
                self.assertEqual(len(self.broken("10", line).field_faults()), 1)
                self.assertEqual(self.broken("10", line + "  # seconds").field_faults(), [])

    def test_importing_the_module_does_nothing_and_imports_little(self) -> None:
        program = """if True:
            import sys, threading
            import asyncio, argparse, subprocess
            seen = []
            watched = ("socket.", "subprocess.", "os.putenv", "os.mkdir", "os.remove", "signal.", "shutil.")
            def hook(event, arguments):
                if event.startswith(watched) or (event == "open" and any(c in str(arguments[1]) for c in "wax+")):
                    seen.append(event)
            before = set(sys.modules)
            sys.addaudithook(hook)
            import aiperf_api
            new = {name: getattr(sys.modules[name], "__file__", "") or "" for name in set(sys.modules) - before}
            roots = {name.split(".")[0] for name, file in new.items() if "site-packages" in file}
            print(seen, threading.active_count(), sorted(roots - {"zmq", "orjson"}))
        """
        folder = Path(aiperf_api.__file__).resolve().parent
        done = subprocess.run(
            [sys.executable, "-B", "-c", program], cwd=folder, capture_output=True, text=True, check=True, timeout=60
        )
        self.assertEqual(done.stdout.strip(), "[] 1 []")


# == 3 == JSON =========================================================================================================


# == 4 == WebSocket codec ==============================================================================================


MASK = b"\x37\xfa\x21\x3d"  # the one of RFC 6455 5.7


def client_frame(opcode: int, payload: bytes = b"", fin: bool = True, rsv: int = 0) -> bytes:
    """A masked frame, as a client sends it; made here without any code of the module."""
    size = len(payload)
    if size < 126:
        length = bytes((0x80 | size,))
    else:
        length = struct.pack("!BH", 254, size) if size <= 0xFFFF else struct.pack("!BQ", 255, size)
    key = int.from_bytes((MASK * (size // 4 + 1))[:size], "big")
    masked = (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")
    return bytes((fin << 7 | rsv << 4 | opcode,)) + length + MASK + masked


def client_close(code: int, reason: bytes = b"") -> bytes:
    return client_frame(8, struct.pack("!H", code) + reason)


def fragments(opcode: int, *parts: bytes) -> list[bytes]:
    """One message in several frames."""
    last = len(parts) - 1
    return [client_frame(0 if at else opcode, part, fin=at == last) for at, part in enumerate(parts)]


def feed_all(parser: aiperf_api.FrameParser, pieces: Iterable[bytes]) -> list[Any]:
    return [event for piece in pieces for event in parser.feed(piece)]


def echo(pieces: Iterable[bytes], max_message: int = 32 << 20) -> list[tuple[int, bytes]]:
    """What an echo server sends: (opcode, payload) of each frame; of a Close only its code (b"" for none)."""
    sent = []
    for event in feed_all(aiperf_api.FrameParser(max_message), pieces):
        if isinstance(event, aiperf_api.TextMessage):
            sent.append((1, event.text.encode("utf-8")))
        elif isinstance(event, aiperf_api.BinaryMessage):
            sent.append((2, event.data))
        elif isinstance(event, aiperf_api.Ping):
            sent.append((10, event.data))
        elif isinstance(event, aiperf_api.Close):
            sent.append((8, event.payload[:2]))
        elif isinstance(event, aiperf_api.Failure):
            sent.append((8, struct.pack("!H", event.code)))
    return sent


def closes(code: int) -> tuple[int, bytes]:
    return (8, struct.pack("!H", code))


TEXT, PING, BYE = client_frame(1, b"Hello, world!"), client_frame(9), client_close(1000)
TEXT_BACK, PONG_BACK, BYE_BACK = (1, b"Hello, world!"), (10, b""), closes(1000)
BROKEN, NOT_UTF8 = closes(1002), closes(1007)
OCTETS = b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff"
COSMOS = b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5"  # the Greek word, with a character of three bytes
GREETING = "Hello-µ@ßöäüàá-UTF-8!!".encode()

# The Autobahn suite's cases: number, frames sent, frames expected of an echo server.
AUTOBAHN_CASES: list[tuple[str, list[bytes], list[tuple[int, bytes]]]] = [
    *(
        (f"1.{group}.{at}", [client_frame(group, fill * size), BYE], [(group, fill * size), BYE_BACK])
        for group, fill in ((1, b"*"), (2, b"\xfe"))
        for at, size in enumerate((0, 125, 126, 127, 128, 65535, 65536), 1)
    ),
    ("2.1", [PING, BYE], [PONG_BACK, BYE_BACK]),
    ("2.2", [client_frame(9, b"Hello, world!"), BYE], [(10, b"Hello, world!"), BYE_BACK]),
    ("2.3", [client_frame(9, OCTETS), BYE], [(10, OCTETS), BYE_BACK]),
    ("2.4", [client_frame(9, b"\xfe" * 125), BYE], [(10, b"\xfe" * 125), BYE_BACK]),
    ("2.5", [client_frame(9, b"\xfe" * 126), BYE], [BROKEN]),
    ("2.7", [client_frame(10), BYE], [BYE_BACK]),
    ("2.8", [client_frame(10, b"unasked"), BYE], [BYE_BACK]),
    ("2.9", [client_frame(10, b"unasked"), client_frame(9, b"asked"), BYE], [(10, b"asked"), BYE_BACK]),
    (
        "2.10",
        [*(client_frame(9, b"payload-%d" % at) for at in range(10)), BYE],
        [*((10, b"payload-%d" % at) for at in range(10)), BYE_BACK],
    ),
    ("3.1", [client_frame(1, b"Hello, world!", rsv=1)], [BROKEN]),
    ("3.2", [TEXT, client_frame(1, b"Hello, world!", rsv=2), PING], [TEXT_BACK, BROKEN]),
    ("3.3", [TEXT, client_frame(1, b"Hello, world!", rsv=3), PING], [TEXT_BACK, BROKEN]),
    ("3.4", [TEXT, client_frame(1, b"Hello, world!", rsv=4), PING], [TEXT_BACK, BROKEN]),
    ("3.5", [client_frame(2, OCTETS, rsv=5)], [BROKEN]),
    ("3.6", [client_frame(9, b"Hello, world!", rsv=6)], [BROKEN]),
    ("3.7", [client_frame(8, rsv=7)], [BROKEN]),
    *((f"4.1.{op - 2}", [TEXT, client_frame(op, b"reserved"), PING], [TEXT_BACK, BROKEN]) for op in range(3, 8)),
    *((f"4.2.{op - 10}", [TEXT, client_frame(op), PING], [TEXT_BACK, BROKEN]) for op in range(11, 16)),
    ("5.1", fragments(9, b"fragment1", b"fragment2"), [BROKEN]),
    ("5.2", fragments(10, b"fragment1", b"fragment2"), [BROKEN]),
    ("5.3-5", [*fragments(1, b"fragment1", b"fragment2"), BYE], [(1, b"fragment1fragment2"), BYE_BACK]),
    (
        "5.6-8",
        [client_frame(1, b"one", fin=False), client_frame(9, b"ping"), client_frame(0, b"two"), BYE],
        [(10, b"ping"), (1, b"onetwo"), BYE_BACK],
    ),
    ("5.9-11", [client_frame(0, b"nothing to continue"), TEXT], [BROKEN]),
    ("5.12-14", [client_frame(0, b"nothing to continue", fin=False), TEXT], [BROKEN]),
    (
        "5.15",
        [*fragments(1, b"fragment1", b"fragment2"), client_frame(0, b"fragment3", fin=False), TEXT],
        [(1, b"fragment1fragment2"), BROKEN],
    ),
    ("5.16", [client_frame(0, b"1", fin=False), client_frame(1, b"2", fin=False), client_frame(0, b"3")], [BROKEN]),
    ("5.17", [client_frame(0, b"1"), client_frame(1, b"2", fin=False), client_frame(0, b"3")], [BROKEN]),
    ("5.18", [client_frame(1, b"fragment1", fin=False), client_frame(1, b"fragment2")], [BROKEN]),
    (
        "5.19-20",
        [
            *(client_frame(op, b"f%d" % at, fin=False) for at, op in enumerate((1, 0))),
            client_frame(9, b"pongme 1"),
            *(client_frame(0, b"f%d" % at, fin=False) for at in (2, 3)),
            client_frame(9, b"pongme 2"),
            client_frame(0, b"f4"),
            BYE,
        ],
        [(10, b"pongme 1"), (10, b"pongme 2"), (1, b"f0f1f2f3f4"), BYE_BACK],
    ),
    ("6.1.1", [client_frame(1), BYE], [(1, b""), BYE_BACK]),
    ("6.1.2", [*fragments(1, b"", b"", b""), BYE], [(1, b""), BYE_BACK]),
    ("6.1.3", [*fragments(1, b"", b"middle", b""), BYE], [(1, b"middle"), BYE_BACK]),
    ("6.2.1", [client_frame(1, GREETING), BYE], [(1, GREETING), BYE_BACK]),
    ("6.2.2", [*fragments(1, GREETING[:12], GREETING[12:]), BYE], [(1, GREETING), BYE_BACK]),
    ("6.2.3", [*fragments(1, *chopped(GREETING, 1)), BYE], [(1, GREETING), BYE_BACK]),
    ("6.2.4", [*fragments(1, *chopped(COSMOS, 1)), BYE], [(1, COSMOS), BYE_BACK]),
    ("6.3.1", [client_frame(1, COSMOS + b"\xed\xa0\x80edited"), BYE], [NOT_UTF8]),
    ("6.3.2", [*fragments(1, *chopped(COSMOS + b"\xed\xa0\x80edited", 1)), BYE], [NOT_UTF8]),
    ("6.4.1", [client_frame(1, COSMOS, fin=False), client_frame(0, b"\xf4\x90\x80\x80", fin=False)], [NOT_UTF8]),
    ("6.4.2", [client_frame(1, COSMOS + b"\xf4", fin=False), client_frame(0, b"\x90", fin=False)], [NOT_UTF8]),
    ("6.4.3", [client_frame(1, COSMOS + b"\xf4\x90\x80\x80edited")[:22]], [NOT_UTF8]),
    ("6.4.4", [client_frame(1, COSMOS + b"\xf4\x90\x80\x80edited")[:19]], [NOT_UTF8]),
    ("7.1.1", [TEXT, BYE], [TEXT_BACK, BYE_BACK]),
    ("7.1.2", [BYE, BYE], [BYE_BACK]),
    ("7.1.3", [BYE, PING], [BYE_BACK]),
    ("7.1.4", [BYE, TEXT], [BYE_BACK]),
    ("7.1.5", [client_frame(1, b"fragment1", fin=False), BYE, client_frame(0, b"fragment2")], [BYE_BACK]),
    ("7.1.6", [client_frame(1, b"BAsd7&jh23" * 26214), BYE, PING], [(1, b"BAsd7&jh23" * 26214), BYE_BACK]),
    ("7.3.1", [client_frame(8)], [(8, b"")]),
    ("7.3.2", [client_frame(8, b"a")], [BROKEN]),
    ("7.3.3", [client_close(1000)], [closes(1000)]),
    ("7.3.4", [client_close(1000, b"Hello World!")], [closes(1000)]),
    ("7.3.5", [client_close(1000, b"*" * 123)], [closes(1000)]),
    ("7.3.6", [client_close(1000, b"*" * 124)], [BROKEN]),
    ("7.5.1", [client_close(1000, COSMOS + b"\xed\xa0\x80edited")], [NOT_UTF8]),
    *(
        (f"7.7 code {code}", [client_close(code)], [closes(code)])
        for code in (*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999)
    ),
    *(
        (f"7.9 code {code}", [client_close(code)], [BROKEN])
        for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999)
    ),
    *((f"7.13 code {code}", [client_close(code)], [BROKEN]) for code in (5000, 65535)),
]

# Groups 6.5 to 6.23: Markus Kuhn's sequences.
UTF8_VALID = {
    "6.5 some valid": [COSMOS, GREETING, b"Hello-\xc2\xb5@", "\N{SNOWMAN}".encode(), "日本語".encode()],
    "6.6 whole characters of a prefix": [COSMOS[:at] for at in (2, 5, 7, 9, 11)],
    "6.7 first of a length": [b"\x00", b"\xc2\x80", b"\xe0\xa0\x80", b"\xf0\x90\x80\x80"],
    "6.9 last of a length": [b"\x7f", b"\xdf\xbf", b"\xef\xbf\xbf", b"\xf4\x8f\xbf\xbf"],
    "6.11 other boundaries": [b"\xed\x9f\xbf", b"\xee\x80\x80", b"\xef\xbf\xbd", b"\xf4\x8f\xbf\xbf"],
    "6.22 non-characters": [
        *(chr(plane << 16 | last).encode() for plane in range(17) for last in (0xFFFE, 0xFFFF)),
        *(chr(code).encode() for code in range(0xFDD0, 0xFDF0)),
    ],
    "6.23 specials": [chr(code).encode() for code in range(0xFFF9, 0x10000)],
}
UTF8_INVALID = {
    "6.6 cut prefixes": [COSMOS[:at] for at in range(1, 11) if at not in (2, 5, 7, 9)],
    "6.8 first of length 5, 6": [b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80"],
    "6.10 last of length 4, 5, 6": [b"\xf7\xbf\xbf\xbf", b"\xfb\xbf\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf\xbf"],
    "6.11 above U+10FFFF": [b"\xf4\x90\x80\x80"],
    "6.12 lone continuations": [b"\x80", b"\xbf", *(b"\x80\xbf" * n for n in range(1, 4)), bytes(range(0x80, 0xC0))],
    "6.13 lonely starts": [b"".join(bytes((b, 0x20)) for b in r) for r in (range(192, 224), range(224, 240))]
    + [bytes((b, 0x20)) for b in (*range(0xF0, 0xF8), 0xF8, 0xFB, 0xFC, 0xFD)],
    "6.14 last byte missing": [b"\xc0", b"\xe0\x80", b"\xf0\x80\x80", b"\xdf", b"\xef\xbf", b"\xf7\xbf\xbf"],
    "6.15 incomplete ones in a row": [b"\xc0\xe0\x80\xf0\x80\x80\xf8\x80\x80\x80\xdf\xef\xbf\xf7\xbf\xbf"],
    "6.16 impossible bytes": [b"\xfe", b"\xff", b"\xfe\xfe\xff\xff"],
    "6.17 overlong": [b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xf8\x80\x80\x80\xaf"],
    "6.18 most overlong": [b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xf8\x87\xbf\xbf\xbf"],
    "6.19 overlong NUL": [b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80"],
    "6.20 surrogates": [
        b"\xed\xa0\x80",
        b"\xed\xad\xbf",
        b"\xed\xae\x80",
        b"\xed\xaf\xbf",
        b"\xed\xb0\x80",
        b"\xed\xbf\xbf",
    ],
    "6.21 surrogate pairs": [b"\xed\xa0\x80\xed\xb0\x80", b"\xed\xad\xbf\xed\xbf\xbf", b"\xed\xaf\xbf\xed\xb0\x80"],
}


class TestAutobahnCases(unittest.TestCase):
    """Groups 1-7, 9 and 10 of the Autobahn suite, against an echo server made of the codec alone."""

    def test_each_case_is_answered_as_the_suite_wants_whole_by_frame_and_by_octet(self) -> None:
        for number, frames, expected in AUTOBAHN_CASES:
            stream = b"".join(frames)
            for how, pieces in (("whole", [stream]), ("by frame", frames), ("997", chopped(stream, 997))):
                with self.subTest(number, cut=how):
                    self.assertEqual(echo(pieces), expected)
            if len(stream) < 4096:
                with self.subTest(number, cut="by octet"):
                    self.assertEqual(echo(chopped(stream, 1)), expected)

    def test_6_valid_utf8_is_echoed_however_it_is_cut(self) -> None:
        for name, texts in UTF8_VALID.items():
            for text in texts:
                for frames in ([client_frame(1, text)], fragments(1, *chopped(text, 1))):
                    with self.subTest(name, text=text, frames=len(frames)):
                        self.assertEqual(echo(frames), [(1, text)])
                        self.assertEqual(echo(chopped(b"".join(frames), 1)), [(1, text)])

    def test_6_invalid_utf8_fails_with_1007_however_it_is_cut(self) -> None:
        for name, texts in UTF8_INVALID.items():
            for text in texts:
                for frames in ([client_frame(1, text)], fragments(1, *chopped(text, 1))):
                    with self.subTest(name, text=text, frames=len(frames)):
                        self.assertEqual(echo([*frames, PING]), [NOT_UTF8])
                        self.assertEqual(echo(chopped(b"".join(frames) + PING, 1)), [NOT_UTF8])

    def test_9_1_and_9_2_large_messages(self) -> None:
        for opcode, fill in ((1, b"*"), (2, b"\xfe")):
            for size in (1 << 16, 1 << 18, 1 << 20, 4 << 20, 8 << 20, 16 << 20):
                with self.subTest(opcode=opcode, size=size):
                    self.assertEqual(echo(chopped(client_frame(opcode, fill * size), 1 << 16)), [(opcode, fill * size)])

    def test_9_3_and_9_4_large_messages_in_fragments(self) -> None:
        for opcode, fill in ((1, b"*"), (2, b"\xfe")):
            for size in (64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20):
                with self.subTest(opcode=opcode, fragment=size):
                    frames = fragments(opcode, *[fill * size] * ((4 << 20) // size))
                    self.assertEqual(echo(chopped(b"".join(frames), 1 << 16)), [(opcode, fill * (4 << 20))])

    def test_9_5_and_9_6_large_messages_in_small_chunks(self) -> None:
        for opcode, fill in ((1, "µ*".encode()), (2, b"\xfe*\x00")):
            payload = fill * ((1 << 20) // len(fill))
            for size in (64, 128, 256, 512, 1024, 2048):
                with self.subTest(opcode=opcode, chunk=size):
                    self.assertEqual(echo(chopped(client_frame(opcode, payload), size)), [(opcode, payload)])

    def test_9_16_mib_of_text_in_64_byte_chunks_take_linear_time(self) -> None:
        payload = "µ-seconds ".encode() * ((16 << 20) // 11)
        pieces = chopped(client_frame(1, payload), 64)
        began = time.perf_counter()
        sent = echo(pieces)
        # 0.4 s on a laptop; anything quadratic takes minutes.
        self.assertLess(time.perf_counter() - began, 20)
        self.assertEqual(sent, [(1, payload)])

    def test_9_7_and_9_8_a_thousand_round_trips(self) -> None:
        parser = aiperf_api.FrameParser()
        for size in (0, 16, 64, 256, 1024, 4096, 16384):
            frame = client_frame(1, b"*" * size)
            for _ in range(1000):
                self.assertEqual(parser.feed(frame), [aiperf_api.TextMessage("*" * size)])

    def test_10_1_1_automatic_fragmentation(self) -> None:
        frames = fragments(1, *chopped(b"*" * 65536, 1300))
        self.assertEqual(echo(frames, max_message=65536), [(1, b"*" * 65536)])


class TestFramesOnTheWire(unittest.TestCase):
    """RFC 6455 5.2 and 5.7, byte by byte."""

    def test_the_examples_of_the_rfc_are_read(self) -> None:
        parser = aiperf_api.FrameParser()
        self.assertEqual(
            parser.feed(b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58"), [aiperf_api.TextMessage("Hello")]
        )
        self.assertEqual(parser.feed(b"\x8a\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58"), [aiperf_api.Pong(b"Hello")])

    def test_the_examples_of_the_rfc_are_written(self) -> None:
        self.assertEqual(aiperf_api.encode_frame(aiperf_api.OP_TEXT, b"Hello"), b"\x81\x05Hello")
        self.assertEqual(aiperf_api.encode_frame(aiperf_api.OP_TEXT, b"Hel", fin=False), b"\x01\x03Hel")
        self.assertEqual(aiperf_api.encode_frame(aiperf_api.OP_CONT, b"lo"), b"\x80\x02lo")
        self.assertEqual(aiperf_api.encode_frame(aiperf_api.OP_PING, b"Hello"), b"\x89\x05Hello")
        self.assertEqual(aiperf_api.encode_frame(aiperf_api.OP_BINARY, bytes(256)), b"\x82\x7e\x01\x00" + bytes(256))
        self.assertEqual(
            aiperf_api.encode_frame(aiperf_api.OP_BINARY, bytes(65536)),
            b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00" + bytes(65536),
        )

    def test_lengths_are_written_in_their_shortest_form(self) -> None:
        for size, head in ((0, 2), (125, 2), (126, 4), (65535, 4), (65536, 10)):
            self.assertEqual(len(aiperf_api.encode_frame(2, bytes(size))), head + size)

    def test_a_close_is_written_with_its_code_and_reason(self) -> None:
        self.assertEqual(aiperf_api.encode_close(1000), b"\x88\x02\x03\xe8")
        self.assertEqual(aiperf_api.encode_close(aiperf_api.CLOSE_GOING_AWAY, "bye"), b"\x88\x05\x03\xe9bye")

    def test_a_long_reason_is_cut_at_123_bytes_on_a_character(self) -> None:
        for reason, kept in (("x" * 200, b"x" * 123), ("é" * 100, "é".encode() * 61), ("x" + "😀" * 40, 30)):
            frame = aiperf_api.encode_close(1000, reason)
            expected = ("x" + "😀" * 30).encode() if kept == 30 else kept
            self.assertEqual(frame, bytes((0x88, len(expected) + 2)) + b"\x03\xe8" + expected)
            [event] = aiperf_api.FrameParser().feed(client_frame(8, frame[2:]))
            self.assertIsInstance(event, aiperf_api.Close)

    def test_a_reason_with_a_lone_surrogate_does_not_raise(self) -> None:
        self.assertEqual(aiperf_api.encode_close(1000, "\ud800"), b"\x88\x03\x03\xe8?")

    def test_the_key_of_the_rfc_gets_the_accept_of_the_rfc(self) -> None:
        self.assertEqual(aiperf_api.websocket_accept("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")

    def test_a_close_keeps_what_was_sent_for_the_echo(self) -> None:
        parser = aiperf_api.FrameParser()
        self.assertEqual(
            parser.feed(client_close(1001, "à".encode())), [aiperf_api.Close(1001, "à", b"\x03\xe9\xc3\xa0")]
        )
        self.assertEqual(aiperf_api.FrameParser().feed(client_frame(8)), [aiperf_api.Close(None, "", b"")])


class TestFrameFaults(unittest.TestCase):
    """Each fault is found at the byte that commits it, and nothing is read after it."""

    def fails(self, data: bytes, code: int, *, at: int | None = None, max_message: int = 65536) -> None:
        """Fails with `code` on the last byte of `data`, or on byte `at`, not a byte before, and stays silent."""
        parser = aiperf_api.FrameParser(max_message)
        last = len(data) if at is None else at
        self.assertFalse(
            [e for e in feed_all(parser, chopped(data[: last - 1], 1)) if isinstance(e, aiperf_api.Failure)]
        )
        [failure] = parser.feed(data[last - 1 : last])
        self.assertIsInstance(failure, aiperf_api.Failure)
        self.assertEqual(failure.code, code)
        self.assertEqual(parser.feed(data[last:] + TEXT + BYE), [])
        self.assertEqual(parser.feed(TEXT), [])

    def test_unmasked_frames_accepted(self) -> None:
        self.fails(b"\x81\x05Hello", 1002, at=2)
        self.fails(b"\x88\x00", 1002)

    def test_non_minimal_and_64_bit_lengths(self) -> None:
        self.fails(b"\x81\xfe\x00\x7d", 1002)
        self.fails(b"\x81\xfe\x00\x00", 1002)
        self.fails(b"\x81\xff\x00\x00\x00\x00\x00\x00\x00\x01", 1002)
        self.fails(b"\x81\xff\x00\x00\x00\x00\x00\x00\xff\xff", 1002)
        self.fails(b"\x81\xff\x80", 1002)
        self.fails(b"\x81\xff\xff", 1002)
        self.fails(b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff", 1009)

    def test_the_declared_length_checked_after_reading(self) -> None:
        self.fails(b"\x82\xff\x00\x00\x00\x00\x00\x01\x00\x01", 1009)
        self.fails(b"\x82\xfe\x03\xe9", 1009, max_message=1000)
        self.fails(b"\x82\x8b", 1009, max_message=10)

    def test_a_message_of_just_the_limit_passes(self) -> None:
        payload = bytes(65536)
        self.assertEqual(aiperf_api.FrameParser().feed(client_frame(2, payload)), [aiperf_api.BinaryMessage(payload)])

    def test_interleaved_control_frames_that_bypass_the_message_limit(self) -> None:
        half = client_frame(2, bytes(600), fin=False) + PING
        self.fails(half + client_frame(10, b"x") + b"\x80\xfe\x01\x91", 1009, max_message=1000)
        # A fragment that fills the limit is fine, and the sum starts anew with the next message.
        parser = aiperf_api.FrameParser(1000)
        self.assertEqual(len(parser.feed((half + client_frame(0, bytes(400))) * 3)), 6)

    def test_thousands_of_empty_fragments(self) -> None:
        start, empty = client_frame(1, b"", fin=False), client_frame(0, b"", fin=False)
        allowed = start + empty * (aiperf_api.WS_FRAGMENTS_MAX - 1)
        self.fails(allowed + b"\x00", 1008)
        self.fails(allowed + PING + b"\x80", 1008)
        parser = aiperf_api.FrameParser()
        self.assertEqual(
            parser.feed(start + empty * (aiperf_api.WS_FRAGMENTS_MAX - 2) + client_frame(0)),
            [aiperf_api.TextMessage("")],
        )

    def test_reserved_bits(self) -> None:
        for first in (0xC1, 0xA1, 0x91, 0xC9, 0x98, 0xF0):
            self.fails(bytes((first,)), 1002)

    def test_reserved_opcodes(self) -> None:
        for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
            self.fails(bytes((0x80 | opcode,)), 1002)
            self.fails(bytes((opcode,)), 1002)

    def test_control_frames_fragmented_or_long_are_refused_before_reading(self) -> None:
        for opcode in (8, 9, 10):
            self.fails(bytes((opcode,)), 1002)
            self.fails(bytes((0x80 | opcode, 0xFE)), 1002)
            self.fails(bytes((0x80 | opcode, 0xFF)), 1002)

    def test_a_continuation_without_a_message_and_a_message_inside_a_message(self) -> None:
        self.fails(b"\x80", 1002)
        self.fails(b"\x00", 1002)
        self.fails(TEXT + b"\x80", 1002)
        self.fails(client_frame(1, b"a", fin=False) + b"\x81", 1002)
        self.fails(client_frame(2, b"a", fin=False) + PING + b"\x02", 1002)

    def test_utf8_cut_across_fragments(self) -> None:
        smile = "😀".encode()
        for cut in range(5):
            self.assertEqual(echo(fragments(1, smile[:cut], smile[cut:])), [(1, smile)])
        for cut in (1, 2, 3):
            self.fails(client_frame(1, smile[:cut], fin=False) + client_frame(0), 1007)
            self.fails(client_frame(1, smile[:cut], fin=False) + client_frame(0, b"x", fin=False), 1007)

    def test_invalid_utf8_fails_at_the_byte_that_breaks_it_inside_a_frame(self) -> None:
        head = len(client_frame(1, bytes(20))) - 20
        for text, breaks_at in (
            (b"ab\xff", 3),
            (b"\xed\xa0", 2),
            (b"\xf4\x90", 2),
            (b"\xe0\x9f", 2),
            (b"\xc0", 1),
            (b"\xc3\x28", 2),
        ):
            self.fails(client_frame(1, text + b"x" * (20 - len(text))), 1007, at=head + breaks_at)

    def test_binary_messages_may_hold_any_bytes(self) -> None:
        self.assertEqual(echo(fragments(2, b"\xff\xfe", b"\xed\xa0")), [(2, b"\xff\xfe\xed\xa0")])

    def test_close_reasons_not_checked(self) -> None:
        self.fails(client_close(1000, b"\xff"), 1007)
        self.fails(client_close(1000, "é".encode()[:1]), 1007)
        self.fails(client_frame(8, b"\x03"), 1002)

    def test_close_codes_1004_to_1006_and_1015(self) -> None:
        for code in (1004, 1005, 1006, 1015):
            self.fails(client_close(code), 1002)

    def test_every_close_code_is_judged_by_its_range(self) -> None:
        allowed = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}
        for code in (*range(0, 5100), 32768, 65535):
            [event] = aiperf_api.FrameParser().feed(client_close(code))
            self.assertEqual(isinstance(event, aiperf_api.Close), code in allowed, code)

    def test_what_came_before_the_fault_is_delivered(self) -> None:
        events = aiperf_api.FrameParser().feed(TEXT + PING + b"\xc1")
        self.assertEqual(events[:2], [aiperf_api.TextMessage("Hello, world!"), aiperf_api.Ping(b"")])
        self.assertEqual(events[2].code, 1002)


def wsproto_events(data: bytes) -> list[Any]:
    """What wsproto, as a server without extensions, makes of a stream, in the events of the module."""
    protocol = wsproto.frame_protocol.FrameProtocol(client=False, extensions=[])
    events: list[Any] = []
    parts: list[Any] = []
    protocol.receive_bytes(data)
    try:
        for frame in protocol.received_frames():
            if frame.opcode in (1, 2, 0):
                parts.append(frame.payload)
                if frame.message_finished:
                    whole = parts[0][:0].join(parts) if isinstance(parts[0], str) else b"".join(parts)
                    events.append(
                        aiperf_api.TextMessage(whole) if isinstance(whole, str) else aiperf_api.BinaryMessage(whole)
                    )
                    parts = []
            elif frame.opcode == 8:
                code, reason = frame.payload
                none = code == 1005
                raw = b"" if none else struct.pack("!H", code) + (reason or "").encode()
                return [*events, aiperf_api.Close(None if none else int(code), reason or "", raw)]
            else:
                kind = aiperf_api.Ping if frame.opcode == 9 else aiperf_api.Pong
                events.append(kind(bytes(frame.payload)))
    except wsproto.frame_protocol.ParseFailed as failure:
        events.append(aiperf_api.Failure(int(failure.code), ""))
    return events


def without_reasons(events: Iterable[Any]) -> list[Any]:
    return [aiperf_api.Failure(e.code, "") if isinstance(e, aiperf_api.Failure) else e for e in events]


@unittest.skipUnless(hypothesis, "needs the hypothesis package")
class TestFrameProperties(unittest.TestCase):
    """Against hypothesis and, as independent implementations, wsproto and websockets."""

    @staticmethod
    def frames() -> Any:
        """A strategy: the arguments of client_frame for up to eight frames, most of them in order."""
        payload = st.one_of(
            st.binary(max_size=140),
            st.text(max_size=40).map(str.encode),
            st.sampled_from([b"", COSMOS, COSMOS[:5], b"\xed\xa0\x80", b"\x03\xe8", b"\x03\xe8bye", b"\x0b\xb8\xff"]),
        )
        opcode = st.sampled_from([1, 1, 2, 0, 0, 0, 8, 9, 10, 3, 11])
        fin, rsv = st.booleans() | st.just(True), st.sampled_from([0] * 30 + [1, 2, 4])
        return st.lists(st.tuples(opcode, payload, fin, rsv), max_size=8)

    def streams(self) -> Any:
        """A strategy: frames, with or without garbage at the end, or garbage alone."""
        framed = self.frames().map(lambda frames: b"".join(client_frame(*frame) for frame in frames))
        return st.tuples(framed, st.binary(max_size=30)).map(b"".join) | framed | st.binary(max_size=60)

    def test_a_stream_cut_anywhere_gives_the_same_events(self) -> None:
        @for_all(self.streams(), cut_places(), examples=300)
        def check(stream: bytes, places: list[int]) -> None:
            whole = aiperf_api.FrameParser(200).feed(stream)
            self.assertEqual(feed_all(aiperf_api.FrameParser(200), cut_at(stream, places)), whole)
            self.assertEqual(feed_all(aiperf_api.FrameParser(200), chopped(stream, 1)), whole)

    @unittest.skipUnless(wsproto, "needs the wsproto package")
    def test_frame_sequences_are_judged_as_wsproto_judges_them(self) -> None:
        @for_all(self.frames(), examples=500)
        def check(frames: list[tuple[int, bytes, bool, int]]) -> None:
            # Python's decoder, and so wsproto, holds back half a surrogate, which we refuse at once.
            hypothesis.assume(not any(re.search(rb"\xed[\xa0-\xbf]\Z", payload) for _, payload, _, _ in frames))
            stream = b"".join(client_frame(*frame) for frame in frames)
            ours = without_reasons(aiperf_api.FrameParser(1 << 20).feed(stream))
            self.assertEqual(ours, wsproto_events(stream))

    @unittest.skipUnless(websockets, "needs the websockets package")
    def test_our_frames_are_read_by_websockets_as_they_were_meant(self) -> None:
        @for_all(st.sampled_from([1, 2, 9, 10]), st.binary(max_size=125) | st.binary(min_size=126, max_size=70000))
        def check(opcode: int, payload: bytes) -> None:
            payload = payload[:125] if opcode > 2 else payload
            uri = websockets.uri.parse_uri("ws://x/")
            client = websockets.client.ClientProtocol(uri, state=websockets.protocol.OPEN)
            client.receive_data(aiperf_api.encode_frame(opcode, payload))
            [frame] = client.events_received()
            self.assertEqual((int(frame.opcode), bytes(frame.data), frame.fin), (opcode, payload, True))


# == 5 == HTTP messages ================================================================================================


HOST = b"Host: localhost:9090\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
DATE = b"Mon, 23 Nov 2026 00:00:00 GMT"


def head(*lines: bytes, first: bytes = b"GET / HTTP/1.1") -> bytes:
    """A request head with a Host and further header lines."""
    return b"\r\n".join((first, b"Host: localhost:9090", *lines, b"", b""))


def read_requests(pieces: Iterable[bytes], memo: dict[bytes, Any] | None = None) -> list[Any]:
    """The requests in a stream, with the status of the fault that ended it, if one did."""
    parser, found = aiperf_api.RequestParser(memo), []
    for piece in pieces:
        parser.feed(piece)
        try:
            found.extend(iter(parser.next_request, None))
        except aiperf_api.HTTPError as error:
            assert error.close, "a fault of the head ends the connection"
            found.append(error.status)
    return found


def read_request(data: bytes) -> aiperf_api.Request:
    [request] = read_requests([data])
    return request


class TestRequestsAccepted(unittest.TestCase):
    def test_a_plain_request(self) -> None:
        request = read_request(
            b"GET /api/history?tag=ttft&stat=p99 HTTP/1.1\r\nHost: localhost\r\nACCEPT:\t text/plain , */* \t\r\nX-Empty:\r\n\r\n"
        )
        self.assertEqual(request.method, "GET")
        self.assertEqual(request.target, "/api/history?tag=ttft&stat=p99")
        self.assertEqual(request.path, "/api/history")
        self.assertEqual(request.query, (("tag", "ttft"), ("stat", "p99")))
        self.assertEqual(dict(request.headers), {"host": "localhost", "accept": "text/plain , */*", "x-empty": ""})
        self.assertEqual((request.version, request.keep_alive, request.wants_upgrade), ((1, 1), True, False))

    def test_pipelined_requests_come_in_order(self) -> None:
        stream = b"".join(head(first=b"GET /%d HTTP/1.1" % at) for at in range(20))
        self.assertEqual([request.path for request in read_requests([stream])], [f"/{at}" for at in range(20)])

    def test_http_1_0_closes_and_needs_no_host(self) -> None:
        for extra in (b"", b"Connection: keep-alive\r\n"):
            request = read_request(b"GET / HTTP/1.0\r\n" + extra + b"\r\n")
            self.assertEqual((request.version, request.keep_alive), ((1, 0), False))

    def test_a_higher_minor_version_is_taken_for_1_1(self) -> None:
        self.assertEqual(read_request(head(first=b"GET / HTTP/1.7")).version, (1, 1))

    def test_connection_is_a_list_of_tokens_in_any_case(self) -> None:
        for value, keep_alive in ((b"keep-alive", True), (b"Close", False), (b"TE, ,close", False), (b"closed", True)):
            self.assertEqual(read_request(head(b"Connection: " + value)).keep_alive, keep_alive)
        self.assertFalse(read_request(head(b"Connection: TE", b"Connection: close")).keep_alive)

    def test_nothing_is_read_after_connection_close(self) -> None:
        parser = aiperf_api.RequestParser()
        parser.feed(head(b"Connection: close") + GET)
        self.assertFalse(parser.next_request().keep_alive)
        parser.feed(GET * 100)
        self.assertIsNone(parser.next_request())
        self.assertFalse(parser.started)

    def test_repeated_list_headers_are_joined(self) -> None:
        request = read_request(head(b"Accept: a/b", b"Cookie: x=1", b"accept: c/d", b"Cookie: y=2"))
        self.assertEqual(request.headers["accept"], "a/b, c/d")
        self.assertEqual(request.headers["cookie"], "x=1; y=2")

    def test_an_absolute_target_names_path_and_host(self) -> None:
        request = read_request(head(first=b"GET http://Example.com:80/a%20b?c=d HTTP/1.1"))
        self.assertEqual((request.path, request.query), ("/a b", (("c", "d"),)))
        self.assertEqual(request.headers["host"], "Example.com:80")
        self.assertEqual(read_request(head(first=b"GET HTTPS://[::1]?x HTTP/1.1")).path, "/")

    def test_options_asterisk(self) -> None:
        self.assertEqual(read_request(head(first=b"OPTIONS * HTTP/1.1")).path, "*")

    def test_paths_are_decoded_once_and_kept_literally(self) -> None:
        for target, path in (
            (b"/..", "/.."),
            (b"/static/../x", "/static/../x"),
            (b"/%2e%2E/%2fetc", "/..//etc"),
            (b"//evil.example/", "//evil.example/"),
            (b"/%252e", "/%2e"),
            (b"/%C3%A9+x", "/é+x"),
            (b"/a;b=c\\d", "/a;b=c\\d"),
        ):
            self.assertEqual(read_request(head(first=b"GET " + target + b" HTTP/1.1")).path, path)

    def test_query_arguments(self) -> None:
        request = read_request(head(first=b"GET /?tag=a%26b&tag=c;d=e&pretty&=x&&sp=1+2%2B3&%C3%A9=%C3%A9 HTTP/1.1"))
        self.assertEqual(request.args("tag"), ["a&b", "c;d=e"])
        self.assertEqual(request.arg("tag"), "a&b")
        self.assertEqual(request.arg("pretty"), "")
        self.assertEqual(request.arg("sp"), "1 2+3")
        self.assertEqual(request.arg("é"), "é")
        self.assertIsNone(request.arg("d"))
        self.assertEqual(request.arg("d", "x"), "x")

    def test_a_body_of_no_bytes_is_no_body(self) -> None:
        for length in (b"0", b"000"):
            self.assertEqual(
                read_requests([head(b"Content-Length: " + length, first=b"POST / HTTP/1.1") + GET])[1].path, "/"
            )

    def test_expect_continue_without_a_body_needs_no_continue(self) -> None:
        self.assertEqual(read_request(head(b"Expect: 100-Continue")).path, "/")
        self.assertEqual(read_request(b"GET / HTTP/1.0\r\nExpect: wonders\r\n\r\n").path, "/")

    def test_a_few_empty_lines_before_a_request_are_skipped(self) -> None:
        crlf = b"\r\n" * aiperf_api.HTTP_LEADING_CRLF_MAX
        self.assertEqual(len(read_requests([crlf + GET + crlf + GET])), 2)
        self.assertEqual(read_requests([crlf + b"\r\n" + GET]), [400])

    def test_range_is_ignored(self) -> None:
        self.assertEqual(read_request(head(b"Range: bytes=0-" + b",0-" * 1000)).path, "/")

    def test_started_tells_whether_a_next_head_has_begun(self) -> None:
        parser = aiperf_api.RequestParser()
        self.assertFalse(parser.started)
        parser.feed(GET[:1])
        self.assertTrue(parser.started)
        parser.feed(GET[1:])
        parser.next_request()
        self.assertFalse(parser.started)

    def test_early_bytes_behind_an_upgrade_are_not_lost(self) -> None:
        for size in (1, 7, 10_000):
            parser, found = aiperf_api.RequestParser(), None
            for piece in chopped(UPGRADE + TEXT + PING, size):
                parser.feed(piece)
                found = parser.next_request() or found
            self.assertTrue(found.wants_upgrade)
            self.assertFalse(found.keep_alive)
            self.assertEqual(parser.take_rest(), TEXT + PING)
            self.assertEqual(parser.take_rest(), b"")

    def test_limits_are_met_exactly(self) -> None:
        target = b"/" + b"a" * (aiperf_api.HTTP_TARGET_BYTES_MAX - 1)
        self.assertEqual(read_request(head(first=b"GET " + target + b" HTTP/1.1")).target, target.decode())
        lines = [b"X-%d: y" % at for at in range(aiperf_api.HTTP_HEADERS_MAX - 1)]
        self.assertEqual(len(read_request(head(*lines)).headers), aiperf_api.HTTP_HEADERS_MAX)
        fill = b"X: " + b"y" * (aiperf_api.HTTP_HEAD_BYTES_MAX - len(head(b"X: ")))
        self.assertEqual(len(head(fill)), aiperf_api.HTTP_HEAD_BYTES_MAX)
        self.assertEqual(read_request(head(fill)).path, "/")
        self.assertEqual(read_requests([head(fill + b"y")]), [431])


UPGRADE = head(
    b"Upgrade: websocket",
    b"Connection: keep-alive, Upgrade",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13",
    first=b"GET /ws HTTP/1.1",
)

# What is refused: name, head, status.  Those whose name begins with "h11:" are accepted by h11 with its defaults.
REFUSED: list[tuple[str, bytes, int]] = [
    # Request smuggling
    ("h11: chunked plus Content-Length", head(b"Transfer-Encoding: chunked", b"Content-Length: 5") + b"0\r\n\r\n", 400),
    ("h11: Content-Length plus chunked", head(b"Content-Length: 0", b"Transfer-Encoding: chunked"), 400),
    ("duplicate Content-Length, different", head(b"Content-Length: 0", b"Content-Length: 1"), 400),
    ("h11: duplicate Content-Length, equal", head(b"Content-Length: 0", b"Content-Length: 0"), 400),
    ("h11: Content-Length as a list", head(b"Content-Length: 0, 0"), 400),
    ("h11: bare LF after the request line", b"GET / HTTP/1.1\n" + HOST + b"\r\n", 400),
    ("h11: bare LF after a header", b"GET / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", 400),
    ("h11: bare LF at the end", b"GET / HTTP/1.1\r\n" + HOST + b"\n", 400),
    ("h11: bare LF everywhere", b"GET / HTTP/1.1\nHost: x\n\n", 400),
    ("bare CR in the request line", b"GET /\rx HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("bare CR in a header", head(b"X: a\rY: b"), 400),
    ("CR CR LF", b"GET / HTTP/1.1\r\r\n" + HOST + b"\r\n", 400),
    ("h11: obs-fold", head(b"X: a", b" b"), 400),
    ("h11: obs-fold with a tab", head(b"X: a", b"\tb"), 400),
    ("obs-fold on the first header", b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    ("space before the colon", head(b"Content-Length : 0"), 400),
    ("tab before the colon", head(b"Content-Length\t: 0"), 400),
    ("Transfer-Encoding that is not chunked", head(b"Transfer-Encoding: xchunked"), 501),
    ("h11: Transfer-Encoding chunked", head(b"Transfer-Encoding: chunked"), 501),
    ("Transfer-Encoding twice", head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"), 400),
    ("Transfer-Encoding empty", head(b"Transfer-Encoding:"), 501),
    ("h11: Transfer-Encoding in HTTP/1.0", head(b"Transfer-Encoding: chunked", first=b"GET / HTTP/1.0"), 400),
    ("h11: a body", head(b"Content-Length: 5", first=b"POST / HTTP/1.1") + b"GET /", 413),
    ("h11: a body that waits for 100", head(b"Content-Length: 5", b"Expect: 100-continue"), 413),
    # int() is lenient
    *(
        (f"Content-Length {value!r}", head(b"Content-Length: " + value), 400)
        for value in (b"+5", b"-0", b"1_0", b"5 5", b"0x5", b"", b"\xd9\xa5", b"1.0", b"9" * 5000)
    ),
    ("h11: Content-Length of 16 digits", head(b"Content-Length: " + b"0" * 16), 400),
    # Duplicates
    ("two Hosts", head(b"Host: localhost:9090"), 400),
    ("h11: two Origins", head(b"Origin: http://a", b"Origin: http://b"), 400),
    ("h11: two keys", head(b"Sec-WebSocket-Key: a", b"Sec-WebSocket-Key: b"), 400),
    ("h11: two versions", head(b"Sec-WebSocket-Version: 13", b"sec-websocket-version: 13"), 400),
    ("h11: two Authorizations", head(b"Authorization: Bearer a", b"Authorization: Bearer b"), 400),
    # Host
    ("no Host", b"GET / HTTP/1.1\r\n\r\n", 400),
    ("h11: Host with a path", b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    ("h11: Host with userinfo", b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    ("h11: Host with two ports", b"GET / HTTP/1.1\r\nHost: a:1:2\r\n\r\n", 400),
    ("h11: Host list", b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    # The request line
    ("HTTP/0.9", b"GET /\r\n", 400),
    ("HTTP/0.9 with headers", b"GET /\r\nHost: x\r\n\r\n", 400),
    ("no method", b" / HTTP/1.1\r\n\r\n", 400),
    ("malformed method", head(first=b'G"T / HTTP/1.1'), 400),
    ("method with a colon", head(first=b"GET: / HTTP/1.1"), 400),
    ("two spaces", head(first=b"GET  / HTTP/1.1"), 400),
    ("a tab for the space", head(first=b"GET\t/ HTTP/1.1"), 400),
    ("trailing space", head(first=b"GET / HTTP/1.1 "), 400),
    ("garbage after the version", head(first=b"GET / HTTP/1.1 x"), 400),
    ("lower-case version", head(first=b"GET / http/1.1"), 400),
    ("long version", head(first=b"GET / HTTP/1.10"), 400),
    ("signed version", head(first=b"GET / HTTP/+1.1"), 400),
    ("h11: HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("h11: HTTP/3", head(first=b"GET / HTTP/3.0"), 505),
    ("TLS ClientHello to the plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("a WebSocket frame", b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58", 400),
    ("NUL first", b"\0GET / HTTP/1.1\r\n\r\n", 400),
    ("LF first", b"\nGET / HTTP/1.1\r\n\r\n", 400),
    # Targets
    ("h11: authority-form", head(first=b"CONNECT example.com:443 HTTP/1.1"), 400),
    ("h11: asterisk without OPTIONS", head(first=b"GET * HTTP/1.1"), 400),
    ("h11: a relative target", head(first=b"GET api/metrics HTTP/1.1"), 400),
    ("h11: another scheme", head(first=b"GET ftp://localhost/ HTTP/1.1"), 400),
    ("h11: userinfo in the authority", head(first=b"GET http://a@localhost/ HTTP/1.1"), 400),
    ("h11: an empty authority", head(first=b"GET http:/// HTTP/1.1"), 400),
    ("h11: a fragment", head(first=b"GET /#top HTTP/1.1"), 400),
    ("h11: a fragment behind a query", head(first=b"GET /?a#top HTTP/1.1"), 400),
    ("h11: cut percent-encoding", head(first=b"GET /%4 HTTP/1.1"), 400),
    ("h11: bad percent-encoding", head(first=b"GET /%zz HTTP/1.1"), 400),
    ("h11: bad percent-encoding in the query", head(first=b"GET /?a=%u0041 HTTP/1.1"), 400),
    ("h11: path that is not UTF-8", head(first=b"GET /%ff HTTP/1.1"), 400),
    ("h11: overlong UTF-8", head(first=b"GET /%c0%af HTTP/1.1"), 400),
    ("h11: a surrogate", head(first=b"GET /%ed%a0%80 HTTP/1.1"), 400),
    ("h11: NUL in the path", head(first=b"GET /%00 HTTP/1.1"), 400),
    ("h11: NUL in the query", head(first=b"GET /?a=%00 HTTP/1.1"), 400),
    ("raw NUL in the target", head(first=b"GET /\0 HTTP/1.1"), 400),
    ("raw UTF-8 in the target", head(first="GET /é HTTP/1.1".encode()), 400),
    ("DEL in the target", head(first=b"GET /\x7f HTTP/1.1"), 400),
    ("h11: many query arguments", head(first=b"GET /?" + b"&" * 64 + b" HTTP/1.1"), 400),
    # Headers
    ("NUL in a header", head(b"X: a\0b"), 400),
    ("h11: control characters in a header", head(b"X: a\x01b"), 400),
    ("h11: DEL in a header", head(b"X: a\x7fb"), 400),
    ("vertical tab in a header", head(b"X: a\x0bb"), 400),
    ("no colon", head(b"X"), 400),
    ("empty name", head(b": x"), 400),
    ("name with a space", head(b"X Y: z"), 400),
    ("name that is not ASCII", head("É: x".encode()), 400),
    # Limits
    ("long target", head(first=b"GET /" + b"a" * 4096 + b" HTTP/1.1"), 414),
    ("endless target", b"GET /" + b"a" * 20000, 414),
    ("endless method", b"G" * 20000, 414),
    ("unbounded headers", head(*[b"X: y"] * 64), 431),
    ("unbounded header", head(b"X: " + b"y" * 17000), 431),
    ("unbounded header without an end", head(b"X: ")[:-4] + b"y" * 17000, 431),
    ("h11: unknown expectation", head(b"Expect: wonders"), 417),
    ("h11: two expectations", head(b"Expect: 100-continue", b"Expect: 100-continue"), 417),
]
REFUSED_BY_US_FOR_THE_LIMIT = ("long target", "unbounded headers", "unbounded header")  # h11 has other limits


class TestRequestsRefused(unittest.TestCase):
    def test_each_fault_gets_its_status_however_it_is_cut_and_nothing_is_read_after_it(self) -> None:
        for name, data, status in REFUSED:
            with self.subTest(name):
                self.assertEqual(read_requests([data + GET, GET]), [status])
                self.assertEqual(read_requests([GET + data + GET]), [read_request(GET), status])
                self.assertEqual(read_requests(chopped(data, 1)), [status])
                for at in range(0, len(data), max(1, len(data) // 50)):
                    self.assertEqual(read_requests([data[:at], data[at:]]), [status])

    def test_going_on_after_a_parse_error(self) -> None:
        parser = aiperf_api.RequestParser()
        parser.feed(b"GET /\x00 HTTP/1.1\r\n\r\n" + GET)
        with self.assertRaises(aiperf_api.HTTPError):
            parser.next_request()
        for _ in range(3):
            parser.feed(GET)
            self.assertIsNone(parser.next_request())
        self.assertEqual(parser.take_rest(), b"")

    def test_what_can_never_be_a_request_is_refused_at_the_first_byte(self) -> None:
        for first in (0x16, 0x00, 0x0A, 0x20, 0x7F, 0x80, 0xFF):
            self.assertEqual(read_requests([bytes((first,))]), [400])

    def test_a_bare_lf_is_refused_without_waiting_for_the_rest(self) -> None:
        self.assertEqual(read_requests([b"GET / HTTP/1.1\n"]), [400])

    @unittest.skipUnless(h11, "needs the h11 package")
    def test_the_table_says_rightly_where_we_are_stricter_than_h11(self) -> None:
        for name, data, _ in REFUSED:
            connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16384)
            with self.subTest(name):
                try:
                    connection.receive_data(data)
                    taken = isinstance(connection.next_event(), h11.Request)
                except h11.RemoteProtocolError:
                    taken = False
                self.assertEqual(taken, name.startswith("h11:") or name in REFUSED_BY_US_FOR_THE_LIMIT)


class TestRequestMemo(unittest.TestCase):
    def test_a_repeated_head_is_the_same_request(self) -> None:
        first, second = read_requests([GET + GET])
        self.assertIs(first, second)

    def test_one_memo_serves_many_connections(self) -> None:
        memo: dict[bytes, Any] = {}
        self.assertIs(read_requests(chopped(GET, 1), memo)[0], read_requests([GET], memo)[0])

    def test_a_request_cannot_be_changed(self) -> None:
        request = read_request(GET)
        with self.assertRaises(AttributeError):
            request.path = "/other"
        with self.assertRaises(TypeError):
            request.headers["host"] = "evil"

    def test_it_is_bounded_in_heads_and_bytes_and_leaves_upgrades_out(self) -> None:
        memo: dict[bytes, Any] = {}
        read_requests([head(first=b"GET /%d HTTP/1.1" % at) for at in range(500)], memo)
        self.assertEqual(len(memo), aiperf_api.HTTP_MEMO_HEADS_MAX)
        read_requests([UPGRADE], memo)
        read_requests([head(b"X: " + b"y" * aiperf_api.HTTP_MEMO_HEAD_BYTES_MAX)], memo)
        self.assertEqual({len(key) for key in memo}, {len(head(first=b"GET /499 HTTP/1.1"))})

    def test_a_remembered_head_that_closes_still_closes(self) -> None:
        memo: dict[bytes, Any] = {}
        closing = head(b"Connection: close")
        for _ in range(2):
            self.assertEqual(len(read_requests([closing + GET], memo)), 1)


@unittest.skipUnless(hypothesis, "needs the hypothesis package")
class TestRequestProperties(unittest.TestCase):
    @staticmethod
    def heads(
        methods: list[bytes], targets: list[bytes], versions: list[bytes], lines: list[bytes], ends: list[bytes]
    ) -> Any:
        """A strategy: heads put together from parts; each line may end differently."""
        first = st.tuples(*map(st.sampled_from, (methods, targets, versions))).map(b" ".join)
        parts = st.tuples(first, st.lists(st.sampled_from(lines), max_size=5))
        ended = parts.flatmap(
            lambda part: st.tuples(
                *(st.tuples(st.just(line), st.sampled_from(ends)) for line in (part[0], *part[1], b""))
            )
        )
        return ended.map(lambda pairs: b"".join(itertools.chain.from_iterable(pairs)))

    def fair_heads(self) -> Any:
        """Heads of which h11 and we ought to think the same."""
        return self.heads(
            [b"GET", b"HEAD", b"get", b"M-SEARCH", b"G=T", b"G T", b""],
            [b"/", b"/a?b=c", b"/%41", b"http://h/x", b"/a b", b"/\x80", b"/\x01", b""],
            [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.", b"HTTP/11", b"http/1.1", b"HTTP/1.1 "],
            [HOST[:-2]] * 4
            + [
                b"A:",
                b"a: b ",
                b"A:\tb\t",
                b"!#$%&'*+-.^_`|~: x",
                b"X: \xff\xe9",
                b"Content-Length: 0",
                b"Connection: close",
            ]
            + [
                b"Host : x",
                b"A B: c",
                b": x",
                b"x",
                b"X: \0",
                b"X: a\rb",
                b"Content-Length: +0",
                b"X\x80: y",
                b"X: \x0c",
            ],
            [b"\r\n"],
        )

    def streams(self) -> Any:
        """Heads with every fault that we know of, several in a row, broken anywhere."""
        wild = self.heads(
            [b"GET", b"GET", b"OPTIONS", b"PRI", b"\x16", b""],
            [b"/", b"/%41?x=%42", b"*", b"//x", b"/%", b"h:1", b"/" + b"a" * 4096],
            [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b""],
            [HOST[:-2]] * 6
            + [
                b"X: " + b"y" * 5000,
                b"Content-Length: 1",
                b"Transfer-Encoding: chunked",
                b"Connection: close",
                b" fold",
                b"",
            ]
            + [b"Upgrade: websocket", b"Connection: upgrade", b"Expect: x", b"\n", b"\r"],
            [b"\r\n"] * 8 + [b"\n", b"\r", b"\r\r\n"],
        )
        parts = (
            st.sampled_from([GET, UPGRADE, b"\r\n", b"\r\n\r\n"] + [data for _, data, _ in REFUSED])
            | wild
            | st.binary(max_size=20)
        )
        return st.lists(parts, max_size=5).map(b"".join)

    def test_a_stream_cut_anywhere_gives_the_same_requests(self) -> None:
        @for_all(self.streams(), cut_places(), examples=400)
        def check(stream: bytes, places: list[int]) -> None:
            whole = read_requests([stream])
            self.assertEqual(read_requests(cut_at(stream, places)), whole)
            self.assertEqual(read_requests(chopped(stream, 97)), whole)

    @staticmethod
    def h11_request(data: bytes) -> Any:
        """(method, target, headers) as h11 has them, or None if it refuses or waits."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16384)
        try:
            connection.receive_data(data)
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return None
        return (event.method, event.target, list(event.headers)) if isinstance(event, h11.Request) else None

    @unittest.skipUnless(h11, "needs the h11 package")
    def test_heads_are_accepted_and_refused_as_h11_does(self) -> None:
        @for_all(self.fair_heads(), examples=500)
        def check(data: bytes) -> None:
            [ours] = read_requests([data])[:1] or [None]
            theirs = self.h11_request(data)
            self.assertEqual(isinstance(ours, aiperf_api.Request), theirs is not None)

    @unittest.skipUnless(h11, "needs the h11 package")
    def test_what_we_accept_h11_accepts_and_reads_the_same(self) -> None:
        @for_all(
            self.streams(), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=2), examples=400
        )
        def check(stream: bytes, changes: list[tuple[int, int]]) -> None:
            data = bytearray(stream + GET)
            for place, value in changes:
                data[place % len(data)] = value
            ours = read_requests([bytes(data)])[0]
            if not isinstance(ours, aiperf_api.Request) or data.startswith(b"\r\n"):
                return  # h11 does not skip the empty lines that RFC 9112 2.2 has a server skip
            method, target, headers = self.h11_request(bytes(data))
            self.assertEqual((ours.method.encode(), ours.target.encode()), (method, target))
            names = {name for name, _ in headers}
            self.assertEqual({name.encode() for name in ours.headers} | {b"host"}, names | {b"host"})


class TestHostCheck(unittest.TestCase):
    """DNS rebinding."""

    def check(self, host: str | None, *allowed: str, loopback: bool = True) -> int:
        try:
            aiperf_api.check_host(host, allowed=frozenset(allowed), bound_to_loopback=loopback)
        except aiperf_api.HTTPError as error:
            return error.status
        return 200

    def test_on_loopback_addresses_and_localhost_pass(self) -> None:
        for host in (
            "127.0.0.1",
            "127.0.0.1:9090",
            "[::1]:9090",
            "[::1]",
            "localhost",
            "LocalHost:9090",
            "10.1.2.3",
            None,
        ):
            self.assertEqual(self.check(host), 200, host)

    def test_on_loopback_every_name_is_foreign(self) -> None:
        for host in (
            "evil.example", "localhost.evil.example", "localhost6", "localhost.", "127.0.0.1.nip.io", "127.1", "0x7f.1",
            "2130706433", "0177.0.0.1", "127.0.0.01", "", ":9090",
        ):  # fmt: skip
            self.assertEqual(self.check(host), 421, host)

    def test_allowed_names_pass_exactly(self) -> None:
        self.assertEqual(self.check("Bench.lan:9090", "bench.lan"), 200)
        self.assertEqual(self.check("bench.lan:9090", "bench.lan:9090"), 200)
        self.assertEqual(self.check("bench.lan:9091", "bench.lan:9090"), 421)
        self.assertEqual(self.check("x.bench.lan", "bench.lan"), 421)
        self.assertEqual(self.check("localhost", "bench.lan"), 200)

    def test_bound_wider_any_name_passes_unless_there_is_a_list(self) -> None:
        self.assertEqual(self.check("bench.lan", loopback=False), 200)
        self.assertEqual(self.check("bench.lan", "bench.lan", loopback=False), 200)
        self.assertEqual(self.check("10.0.0.1", "bench.lan", loopback=False), 421)

    def test_a_malformed_host_is_400(self) -> None:
        for host in ("a b", "[::1", "[::1]x", "a:b", "a@b", "[fe80::1%eth0]", "localhost:999999"):
            self.assertEqual(self.check(host), 400, host)


class TestOriginCheck(unittest.TestCase):
    """Cross-site WebSocket hijacking."""

    def check(self, origin: str | None, host: str | None = "localhost:9090", *allowed: str) -> int:
        try:
            aiperf_api.check_origin(origin, host=host, allowed=frozenset(allowed))
        except aiperf_api.HTTPError as error:
            return error.status
        return 200

    def test_none_and_our_own_pass(self) -> None:
        for origin in (None, "http://localhost:9090", "https://LOCALHOST:9090"):
            self.assertEqual(self.check(origin), 200, origin)

    def test_foreign_ones_are_403(self) -> None:
        for origin in (
            "null", "", "http://evil.example", "http://localhost", "http://localhost:9091", "http://localhost:9090.evil",
            "http://evil/localhost:9090", "file://localhost:9090", "localhost:9090", "http://", "://localhost:9090",
        ):  # fmt: skip
            self.assertEqual(self.check(origin), 403, origin)
        self.assertEqual(self.check("http://", ""), 403)
        self.assertEqual(self.check("http://x", None), 403)

    def test_listed_ones_pass_exactly(self) -> None:
        self.assertEqual(self.check("https://Grafana.lan", "x", "https://grafana.lan"), 200)
        self.assertEqual(self.check("https://grafana.lan:1", "x", "https://grafana.lan"), 403)
        self.assertEqual(self.check("http://anything", "x", "*"), 200)


class TestUpgradeCheck(unittest.TestCase):
    """RFC 6455 4.2.1."""

    def status(self, data: bytes) -> Any:
        try:
            aiperf_api.check_upgrade(read_request(data))
        except aiperf_api.HTTPError as error:
            return error.status, dict(error.headers)
        return 101, {}

    def test_a_right_handshake_gives_its_key(self) -> None:
        self.assertEqual(aiperf_api.check_upgrade(read_request(UPGRADE)), "dGhlIHNhbXBsZSBub25jZQ==")
        odd = UPGRADE.replace(b"Upgrade: websocket", b"UPGRADE: h2c, WebSocket").replace(
            b"alive, Upgrade", b"alive,,uPGRADE"
        )
        self.assertEqual(self.status(odd)[0], 101)

    def test_what_is_no_handshake_is_426_with_a_hint(self) -> None:
        for data in (
            head(first=b"GET /ws HTTP/1.1"),
            UPGRADE.replace(b"Connection: keep-alive, Upgrade", b"Connection: keep-alive"),
            UPGRADE.replace(b"Upgrade: websocket", b"Upgrade: websocket/13"),
            UPGRADE.replace(b"HTTP/1.1", b"HTTP/1.0"),
        ):
            self.assertEqual(self.status(data), (426, {"Upgrade": "websocket", "Connection": "Upgrade"}))

    def test_another_version_is_426_and_learns_ours(self) -> None:
        for version in (b"8", b"013", b"13, 8", b""):
            data = UPGRADE.replace(b"Version: 13", b"Version: " + version)
            self.assertEqual(self.status(data), (426, {"Sec-WebSocket-Version": "13"}))

    def test_another_method_is_405(self) -> None:
        self.assertEqual(self.status(UPGRADE.replace(b"GET", b"POST")), (405, {"Allow": "GET"}))

    def test_the_key_is_strict_base64_of_16_bytes(self) -> None:
        for key in (
            b"",
            b"dGhlIHNhbXBsZSBub25jZQ",
            b"dGhlIHNhbXBsZSBub25jZR==",
            b"dGhlIHNhbXBsZSBub25jZQ=a",
            b"AAAA",
            b"dGhl IHNhbXBsZSBub25jZ==",
        ):
            self.assertEqual(self.status(UPGRADE.replace(b"dGhlIHNhbXBsZSBub25jZQ==", key))[0], 400)

    def test_the_answer_is_that_of_the_rfc(self) -> None:
        self.assertEqual(
            aiperf_api.upgrade_response("dGhlIHNhbXBsZSBub25jZQ==", "aiperf.v1"),
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: aiperf.v1\r\n\r\n",
        )
        self.assertNotIn(b"Protocol:", aiperf_api.upgrade_response("dGhlIHNhbXBsZSBub25jZQ=="))

    def test_a_subprotocol_is_echoed_that_was_offered(self) -> None:
        for offered, chosen in (
            (b"", None),
            (b"chat", None),
            (b"aiperf.token.s3cret", "aiperf.token.s3cret"),
            (b"chat, aiperf.token.s3cret, aiperf.v1", "aiperf.v1"),
        ):
            request = read_request(head(b"Sec-WebSocket-Protocol: " + offered))
            self.assertEqual(aiperf_api.choose_subprotocol(request), chosen)
        with self.assertRaises(aiperf_api.HTTPError) as caught:
            aiperf_api.subprotocols(read_request(head(b"Sec-WebSocket-Protocol: a b")))
        self.assertEqual(caught.exception.status, 400)


class TestTokenCheck(unittest.TestCase):
    def status(self, data: bytes, token: bytes = b"s3cret") -> int:
        try:
            aiperf_api.check_token(read_request(data), token)
        except aiperf_api.HTTPError as error:
            self.assertEqual(error.headers, (("WWW-Authenticate", 'Bearer realm="aiperf-api"'),))
            return error.status
        return 200

    def test_it_may_come_in_a_header_a_query_or_a_subprotocol(self) -> None:
        self.assertEqual(self.status(head(b"Authorization: Bearer s3cret")), 200)
        self.assertEqual(self.status(head(b"Authorization: bearer   s3cret")), 200)
        self.assertEqual(self.status(head(first=b"GET /?x=y&token=s3cret HTTP/1.1")), 200)
        self.assertEqual(self.status(head(b"Sec-WebSocket-Protocol: chat, aiperf.token.s3cret")), 200)
        self.assertEqual(self.status(head(b"Authorization: Bearer caf\xc3\xa9"), "café".encode()), 200)

    def test_anything_else_is_401(self) -> None:
        for data in (
            GET,
            head(b"Authorization: Bearer S3cret"),
            head(b"Authorization: Bearer"),
            head(b"Authorization: Basic s3cret"),
            head(b"Authorization: s3cret"),
            head(b"Authorization: Bearer \xff"),
            head(b"Authorization: Bearer s3cret2"),
            head(first=b"GET /?token= HTTP/1.1"),
            head(first=b"GET /?Token=s3cret HTTP/1.1"),
            head(b"Sec-WebSocket-Protocol: aiperf.token.s3cre"),
            head(b"Sec-WebSocket-Protocol: s3cret"),
        ):
            self.assertEqual(self.status(data), 401)

    def test_timing_of_token_checks(self) -> None:
        with unittest.mock.patch.object(aiperf_api.hmac, "compare_digest", return_value=True) as compare:
            self.status(head(b"Authorization: Bearer a", first=b"GET /?token=b HTTP/1.1"))
        self.assertEqual([call.args[0] for call in compare.call_args_list], [b"a", b"b"])


class TestPrintable(unittest.TestCase):
    """CR/LF in log lines, bus strings included."""

    def test_control_and_other_characters_are_escaped(self) -> None:
        self.assertEqual(
            aiperf_api.printable("a\r\nb\x1b[31m\x7f\u2028é\ud800\\"), r"a\r\nb\x1b[31m\x7f\u2028\xe9\ud800\\"
        )
        self.assertEqual(aiperf_api.printable(b"a\xff\n"), r"a\xff\n")

    def test_it_is_cut(self) -> None:
        self.assertEqual(aiperf_api.printable("x" * 200), "x" * 200)
        for text in ("x" * 201, "\0" * 100, b"\xff" * 1_000_000):
            self.assertEqual(len(aiperf_api.printable(text)), 203)

    def test_secrets_never_logged(self) -> None:
        for text in (
            "/ws?token=s3cret&x=1", "/ws?x=1&token=s3cret", "/?%74oken=s3cret", "/?t%6Fk%65N=s3cret", "Bearer s3cret",
            "chat, aiperf.token.s3cret", "http://h/?TOKEN=s3,cret",
        ):  # fmt: skip
            self.assertNotIn("cret", aiperf_api.printable(text))
        self.assertEqual(aiperf_api.printable("/ws?token=s3cret&x=1"), "/ws?token=***&x=1")
        self.assertEqual(aiperf_api.printable("/?tokens=5"), "/?tokens=5")


class TestNegotiation(unittest.TestCase):
    TEXT, METRICS = (
        "text/plain; version=0.0.4; charset=utf-8",
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
    )

    def test_the_best_of_what_is_offered_the_earlier_of_equals(self) -> None:
        for header, best in (
            (None, self.TEXT),
            ("", self.TEXT),
            ("*/*", self.TEXT),
            ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", self.TEXT),
            ("application/openmetrics-text", self.METRICS),
            ("application/openmetrics-text;q=0.5, */*", self.TEXT),
            ("application/openmetrics-text; version=1.0.0; q=0.8, text/plain;q=0.5", self.METRICS),
            ("application/openmetrics-text;version=0.0.1", None),
            ("application/openmetrics-text;version=0.0.1,text/plain;version=0.0.4;q=0.2", self.TEXT),
            ("application/openmetrics-text;q=0, */*;q=0.1", self.TEXT),
            ("text/*;q=0.1, text/plain;q=0", None),
            ("TEXT/Plain", self.TEXT),
            ("image/png", None),
            ("text/plain;q=2", None),
            (",;,/;q", None),
        ):
            with self.subTest(header):
                self.assertEqual(aiperf_api.accepts(header, [self.TEXT, self.METRICS]), best)

    def test_what_prometheus_3_sends(self) -> None:
        header = (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;"
            "version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
        )
        self.assertEqual(aiperf_api.accepts(header, [self.TEXT, self.METRICS]), self.METRICS)
        self.assertEqual(aiperf_api.accepts(header, [self.TEXT]), self.TEXT)

    def test_gzip(self) -> None:
        for header, taken in (
            (None, False), ("", False), ("gzip", True), ("GZIP;q=0.1", True), ("gzip;q=0", False), ("deflate, gzip", True),
            ("*", True), ("*;q=0", False), ("gzip;q=0, *", False), ("identity", False), ("x-gzip", True), ("gzipped", False),
        ):  # fmt: skip
            self.assertEqual(aiperf_api.accepts_gzip(header), taken, header)

    def test_etags(self) -> None:
        for header, etag, same in (
            ('"a"', '"a"', True), ('W/"a"', '"a"', True), ('"a"', 'W/"a"', True), ('"x", W/"a"', 'W/"a"', True), ("*", '"a"', True),
            ('"b"', '"a"', False), ("a", '"a"', False), (None, '"a"', False), ("", '"a"', False), ("*", "", False), ('"xa"', '"a"', False),
        ):  # fmt: skip
            self.assertEqual(aiperf_api.etag_matches(header, etag), same, (header, etag))


class TestResponses(unittest.TestCase):
    def test_the_bytes_of_an_answer(self) -> None:
        self.assertEqual(
            aiperf_api.json_response({"a": 1}).encode(date=DATE),
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"
            b'Content-Length: 7\r\nDate: Mon, 23 Nov 2026 00:00:00 GMT\r\n\r\n{"a":1}',
        )

    def test_head_has_the_head_of_get(self) -> None:
        response = aiperf_api.Response(body=b"x" * 10)
        whole = response.encode(date=DATE)
        self.assertEqual(response.encode(date=DATE, head_only=True), whole[:-10])

    def test_close_and_further_headers_of_one_answer(self) -> None:
        answer = aiperf_api.Response(body=b"x").encode(date=DATE, close=True, extra=(("Vary", "Origin"),))
        self.assertTrue(answer.endswith(b" GMT\r\nVary: Origin\r\nConnection: close\r\n\r\nx"), answer)

    def test_an_error(self) -> None:
        answer = aiperf_api.error_response(aiperf_api.HTTPError(405, "no", (("Allow", "GET, HEAD"),))).encode(date=DATE)
        self.assertTrue(answer.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n"))
        self.assertIn(b"\r\nAllow: GET, HEAD\r\n", answer)
        self.assertTrue(answer.endswith(b'\r\n\r\n{"error":"no"}'))

    def test_a_page_runs_no_script_but_its_own(self) -> None:
        answer = aiperf_api.Response(content_type="text/html; charset=utf-8").encode(date=DATE)
        self.assertIn(b"\r\nContent-Security-Policy: default-src 'self'; ", answer)
        self.assertIn(b"\r\nReferrer-Policy: no-referrer\r\n", answer)
        self.assertNotIn(b"unsafe", answer)
        self.assertNotIn(b"Content-Security-Policy", aiperf_api.Response().encode(date=DATE))

    def test_cache_control_may_be_given(self) -> None:
        answer = aiperf_api.Response(headers=(("cache-control", "no-cache"),)).encode(date=DATE)
        self.assertEqual(answer.lower().count(b"cache-control"), 1)

    def test_gzip_is_chosen_by_the_client(self) -> None:
        response = aiperf_api.Response(body=b"plain", gzip_body=b"zip")
        for gzip, body in ((False, b"plain"), (True, b"zip")):
            answer = response.encode(date=DATE, gzip=gzip)
            self.assertIn(b"\r\nVary: Accept-Encoding\r\n", answer)
            self.assertIn(b"\r\nContent-Length: %d\r\n" % len(body), answer)
            self.assertEqual(b"Content-Encoding: gzip" in answer, gzip)
            self.assertTrue(answer.endswith(b"\r\n\r\n" + body))
        self.assertNotIn(b"gzip", aiperf_api.Response(body=b"plain").encode(date=DATE, gzip=True))

    def test_not_modified_has_no_body_and_no_length(self) -> None:
        response = aiperf_api.Response(
            body=b"x", gzip_body=b"z", headers=(("ETag", 'W/"a"'), ("Cache-Control", "no-cache"))
        )
        answer = aiperf_api.not_modified(response).encode(date=DATE, gzip=True)
        self.assertEqual(
            answer,
            b'HTTP/1.1 304 Not Modified\r\nX-Content-Type-Options: nosniff\r\nETag: W/"a"\r\nCache-Control: no-cache\r\n'
            b"Vary: Accept-Encoding\r\nDate: Mon, 23 Nov 2026 00:00:00 GMT\r\n\r\n",
        )
        self.assertNotIn(b"Content-", aiperf_api.Response(204).encode(date=DATE).replace(b"X-Content-", b""))

    def test_a_stream_ends_with_the_connection(self) -> None:
        answer = aiperf_api.Response(body=None, content_type="text/event-stream").encode(date=DATE)
        self.assertNotIn(b"Content-Length", answer)
        self.assertTrue(answer.endswith(b"\r\nConnection: close\r\n\r\n"))

    def test_cr_lf_in_response_headers(self) -> None:
        for name, value in (
            ("X", "a\r\nSet-Cookie: b"),
            ("X", "a\n"),
            ("X", "a\0"),
            ("X\r\nY", "a"),
            ("X Y", "a"),
            ("", "a"),
            ("X", "\u20ac"),
        ):
            with self.assertRaises(ValueError):
                aiperf_api.Response(headers=((name, value),))
            with self.assertRaises(ValueError):
                aiperf_api.Response().encode(date=DATE, extra=((name, value),))
        with self.assertRaises(ValueError):
            aiperf_api.Response(content_type="text/plain\r\n")

    @unittest.skipUnless(h11, "needs the h11 package")
    def test_a_client_reads_them_as_they_were_meant(self) -> None:
        for response in (aiperf_api.json_response([1, 2]), aiperf_api.Response(204), aiperf_api.Response(404, b"x")):
            client = h11.Connection(h11.CLIENT)
            client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
            client.send(h11.EndOfMessage())
            client.receive_data(response.encode(date=DATE))
            self.assertEqual(client.next_event().status_code, response.status)
            body = b""
            while isinstance(event := client.next_event(), h11.Data):
                body += event.data
            self.assertIsInstance(event, h11.EndOfMessage)
            self.assertEqual(body, response.body)


# == 6 == Router =======================================================================================================


class TestRouter(unittest.TestCase):
    ROUTER = aiperf_api.Router(
        [
            aiperf_api.Route("/metrics", "metrics", "Prometheus text.", media_types=("text/plain",), example="up 1"),
            aiperf_api.Route(
                "/api/metrics", "apiMetrics", "The metrics.", example={"metrics": {}}, schema={"type": "object"}
            ),
            aiperf_api.Route(
                "/api/history",
                "history",
                "The past.",
                params=(
                    aiperf_api.Param("tag", "Which.", example="ttft", required=True),
                    aiperf_api.Param("since", "From."),
                ),
            ),
            aiperf_api.Route("/ws", "ws", "The bus.", methods=("GET",), websocket=True),
        ]
    )

    def refused(self, method: str, path: str) -> aiperf_api.HTTPError:
        with self.assertRaises(aiperf_api.HTTPError) as caught:
            self.ROUTER.match(method, path)
        return caught.exception

    def test_get_and_head_find_their_route(self) -> None:
        self.assertEqual(self.ROUTER.match("GET", "/metrics").name, "metrics")
        self.assertEqual(self.ROUTER.match("HEAD", "/metrics").name, "metrics")

    def test_another_method_is_405_with_allow(self) -> None:
        for method in ("POST", "get", "TRACE", "BREW"):
            error = self.refused(method, "/metrics")
            self.assertEqual((error.status, error.headers), (405, (("Allow", "GET, HEAD"),)))
        self.assertEqual(self.refused("HEAD", "/ws").headers, (("Allow", "GET"),))

    def test_an_unknown_path_is_404_with_a_suggestion(self) -> None:
        for path, near in (("/metric", "/metrics"), ("/metrics/", "/metrics"), ("/api/histroy", "/api/history")):
            error = self.refused("GET", path)
            self.assertEqual((error.status, error.message), (404, f"not found; did you mean {near}?"))

    def test_nothing_of_the_request_comes_back_in_the_answer(self) -> None:
        for path in ("/<script>", "/" + "x" * 4000, "*", ""):
            self.assertEqual(self.refused("GET", path).message, "not found; GET / lists what there is")

    def test_open_redirect_and_path_traversal(self) -> None:
        for path in ("//metrics", "//evil.example/%2e%2e", "/api/../metrics", "/./metrics", "/metrics/..", "/METRICS"):
            error = self.refused("GET", path)
            self.assertEqual((error.status, error.headers), (404, ()))

    def test_two_routes_must_differ(self) -> None:
        for other in (aiperf_api.Route("/a", "y", ""), aiperf_api.Route("/b", "x", "")):
            with self.assertRaises(ValueError):
                aiperf_api.Router([aiperf_api.Route("/a", "x", ""), other])

    def test_openapi_describes_every_route(self) -> None:
        document = self.ROUTER.openapi("aiperf-api", "1.0.0")
        self.assertEqual(document["openapi"], "3.1.0")
        self.assertEqual(document["info"], {"title": "aiperf-api", "version": "1.0.0"})
        self.assertEqual(list(document["paths"]), [route.path for route in self.ROUTER.routes])
        operation = document["paths"]["/api/metrics"]["get"]
        self.assertEqual(operation["operationId"], "apiMetrics")
        self.assertEqual(
            operation["responses"]["200"]["content"],
            {"application/json": {"schema": {"type": "object"}, "example": {"metrics": {}}}},
        )
        self.assertEqual(
            document["paths"]["/api/history"]["get"]["parameters"],
            [
                {
                    "name": "tag",
                    "in": "query",
                    "description": "Which.",
                    "required": True,
                    "schema": {"type": "string"},
                    "example": "ttft",
                },
                {
                    "name": "since",
                    "in": "query",
                    "description": "From.",
                    "required": False,
                    "schema": {"type": "string"},
                },
            ],
        )
        self.assertEqual(list(document["paths"]["/ws"]["get"]["responses"]), ["101"])


# == 7 == Static files =================================================================================================


# == 8 == Metric catalogue =============================================================================================


# == 9 == Prometheus text ==============================================================================================


# == 10 == Benchmark state =============================================================================================


# == 11 == Sources =====================================================================================================


# == 12 == Hub =========================================================================================================


# == 13 == Connection ==================================================================================================


# == 14 == Endpoints and service =======================================================================================


# == 15 == Command line ================================================================================================


if __name__ == "__main__":
    unittest.main()
