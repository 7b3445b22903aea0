# SPDX-License-Identifier: Apache-2.0
"""Tests of aiperf_api: `python3 -m unittest` with nothing installed, or pytest with independent judges.

One class per subject, in the order of the module's rooms; names are sentences about behaviour.
"""

from __future__ import annotations

import ast
import itertools
import re
import statistics
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import aiperf_api

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
        return [
            f"line {field.lineno}: {node.name}.{name} has no comment"
            for node in classes
            if 10 <= self.room(node.lineno) <= 14
            for field, name in self._fields(node)
            if not self._has_comment(field)
        ]

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
            standard = getattr(sys, "stdlib_module_names", None)
            new = {name.split(".")[0] for name in set(sys.modules) - before} - {"aiperf_api", "zmq", "orjson"}
            foreign = [name for name in new if standard and name not in standard and "_sysconfigdata" not in name]
            print(seen, threading.active_count(), foreign)
        """
        folder = Path(aiperf_api.__file__).resolve().parent
        done = subprocess.run(
            [sys.executable, "-B", "-c", program], cwd=folder, capture_output=True, text=True, check=True, timeout=60
        )
        self.assertEqual(done.stdout.strip(), "[] 1 []")


# == 3 == JSON =========================================================================================================


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


if __name__ == "__main__":
    unittest.main()
