# SPDX-License-Identifier: Apache-2.0
"""Tests of aiperf_api: `python3 -m unittest` with nothing installed, or pytest with independent judges.

One class per subject, in the order of the module's rooms; names are sentences about behaviour.
"""

from __future__ import annotations

import ast
import asyncio
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

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


# -- Child -------------------------------------------------------------------------------------------------------------


def plan(*argv: str, environ: dict[str, str] | None = None, config: str | None = None, version: str = "") -> Any:
    """A child_plan with the private directory /p; `config` is the text of any configuration file."""

    def read(path: str) -> str:
        if config is None:
            raise FileNotFoundError(2, "No such file or directory", path)
        return config

    return aiperf_api.child_plan(argv, environ or {}, "/p", version=version, read=read)


class ChildPlanDecidesWhereTheBusIs(unittest.TestCase):
    PRIVATE = "ipc:///p/event_bus_proxy_backend.ipc"

    def test_a_profile_gets_the_private_directory_and_live_metrics(self) -> None:
        made = plan("aiperf", "profile", "--model", "m")
        self.assertEqual(made.argv, ("aiperf", "profile", "--model", "m", "--zmq-ipc-path", "/p"))
        self.assertEqual(made.address, self.PRIVATE)
        self.assertEqual(made.environ["AIPERF_UI_REALTIME_METRICS_ENABLED"], "true")
        self.assertEqual(made.environ["AIPERF_UI_REALTIME_METRICS_INTERVAL"], "1")
        self.assertEqual((made.bind, made.is_aiperf, made.notes), (False, True, ()))

    def test_an_interval_that_the_user_set_stays(self) -> None:
        made = plan("aiperf", "profile", environ={"AIPERF_UI_REALTIME_METRICS_INTERVAL": "7", "HOME": "/h"})
        self.assertEqual(made.environ["AIPERF_UI_REALTIME_METRICS_INTERVAL"], "7")
        self.assertEqual(made.environ["HOME"], "/h")

    def test_a_profile_is_found_behind_paths_modules_and_wrappers(self) -> None:
        for line in (
            "/opt/venv/bin/aiperf profile -m x",
            "python -m aiperf profile -m x",
            "/usr/bin/python3.11 -X dev -m aiperf profile -m x",
            "python3 /opt/venv/bin/aiperf profile",
            "uv run aiperf profile -m x",
            "uv run python -m aiperf profile",
            "env A=b aiperf profile",
            "nice -n 5 aiperf profile",
            "timeout 60 nice aiperf profile",
        ):
            made = plan(*line.split())
            self.assertTrue(made.is_aiperf, line)
            self.assertEqual(made.argv[-2:], ("--zmq-ipc-path", "/p"), line)

    def test_any_other_command_finds_a_bound_bus_in_its_environment(self) -> None:
        for line in ("python bench.py", "echo aiperf profile", "aiperf plot", "aiperf", "ssh host aiperf profile"):
            made = plan(*line.split(), environ={"X": "y"})
            self.assertEqual(made.argv, tuple(line.split()))
            self.assertEqual(made.environ, {"X": "y", "AIPERF_API_ZMQ_ADDRESS": "ipc:///p/bus.ipc"}, line)
            self.assertEqual((made.address, made.bind, made.is_aiperf), ("ipc:///p/bus.ipc", True, False))

    def test_a_bus_on_the_command_line_is_followed_and_nothing_is_added(self) -> None:
        for words, address in (
            (["--zmq-host", "10.0.0.7"], "tcp://10.0.0.7:5664"),
            (["--zmq-host=0.0.0.0"], "tcp://127.0.0.1:5664"),
            (["--zmq_host", "h"], "tcp://h:5664"),
            (["--zmq-ipc-path", "/run/x"], "ipc:///run/x/event_bus_proxy_backend.ipc"),
            (["--zmq-ipc-path=/run/x", "--zmq-host", "h"], "ipc:///run/x/event_bus_proxy_backend.ipc"),
            (["--zmq-dual-bind"], "ipc:///tmp/aiperf/event_bus_proxy_backend.ipc"),
        ):
            made = plan("aiperf", "profile", *words)
            self.assertEqual(made.address, address)
            self.assertEqual(made.argv, ("aiperf", "profile", *words))

    def test_a_moved_tcp_port_is_followed(self) -> None:
        made = plan("aiperf", "profile", "--zmq-host", "h", environ={"AIPERF_ZMQ_EVENT_BUS_PROXY_BACKEND_PORT": "7"})
        self.assertEqual(made.address, "tcp://h:7")

    def test_our_own_variables_do_not_reach_the_child(self) -> None:
        ours = {"AIPERF_API_SERVER_PORT": "9090", "AIPERF_API_SERVER_HOST": "h", "AIPERF_API_TOKEN": "t"}
        for command in (("aiperf", "profile"), ("true",)):
            self.assertFalse(set(ours) & set(plan(*command, environ=ours).environ))

    def test_the_artifact_directory_is_known_when_it_is_told(self) -> None:
        self.assertEqual(plan("aiperf", "profile", "--artifact-dir=a").artifact_dir, "a")
        self.assertEqual(plan("aiperf", "profile", "--output-artifact-dir", "b").artifact_dir, "b")
        self.assertEqual(plan("aiperf", "profile").artifact_dir, "")

    def test_a_version_without_live_metrics_is_said(self) -> None:
        self.assertIn("--ui dashboard", plan("aiperf", "profile", "--ui", "none", version="0.3.0").notes[0])
        self.assertEqual(plan("aiperf", "profile", "--ui", "dashboard", version="0.3.0").notes, ())
        self.assertEqual(plan("aiperf", "profile", "--ui", "none", version="0.13.0").notes, ())

    def test_a_configuration_file_without_a_bus_leaves_room_for_ours(self) -> None:
        made = plan("aiperf", "profile", "--config", "c.yaml", config="benchmark:\n  model: m\n")
        self.assertEqual(made.argv[-2:], ("--zmq-ipc-path", "/p"))
        self.assertEqual(made.address, self.PRIVATE)

    def test_a_configuration_file_with_a_bus_is_followed(self) -> None:
        text = "benchmark:\n  runtime:\n    communication:\n      type: tcp\n      host: 0.0.0.0\n"
        for words in (["-f", "c.yaml"], ["-fc.yaml"], ["--config=c.yaml"]):
            made = plan("aiperf", "profile", *words, config=text)
            self.assertEqual(made.address, "tcp://127.0.0.1:5664")
            self.assertEqual(made.argv, ("aiperf", "profile", *words))

    def test_a_flag_beats_the_configuration_file(self) -> None:
        text = "runtime: {communication: broken}"
        made = plan("aiperf", "profile", "-f", "c.yaml", "--zmq-ipc-path", "/x", config=text)
        self.assertEqual(made.address, "ipc:///x/event_bus_proxy_backend.ipc")

    def test_a_configuration_file_that_cannot_be_read_is_said_and_left_alone(self) -> None:
        for config in (None, "benchmark: *base\n"):
            made = plan("aiperf", "profile", "-f", "c.yaml", config=config)
            self.assertEqual(made.address, "")
            self.assertEqual(made.argv, ("aiperf", "profile", "-f", "c.yaml"))
            self.assertIn("c.yaml", made.notes[0])

    def test_variables_in_a_configuration_file_are_filled_in(self) -> None:
        text = "runtime:\n  communication: {type: ipc, path: '${DIR:/dflt}'}\n"
        plain = text.replace("'", "")
        for written in ("runtime:\n  communication:\n    type: ipc\n    path: ${DIR:/dflt}\n",):
            self.assertEqual(
                plan("aiperf", "profile", "-f", "c", config=written, environ={"DIR": "/d"}).address,
                "ipc:///d/event_bus_proxy_backend.ipc",
            )
            self.assertEqual(
                plan("aiperf", "profile", "-f", "c", config=written).address,
                "ipc:///dflt/event_bus_proxy_backend.ipc",
            )
        self.assertEqual(plan("aiperf", "profile", "-f", "c", config=plain).address, "")  # not read with certainty


class TheBusOfAConfigurationFile(unittest.TestCase):
    def test_block_style_in_both_spellings(self) -> None:
        text = (
            '---\n# a comment\nschemaVersion: "2.0"\nbenchmark:\n  model: "a # b"   # trailing\n'
            "  system: |\n    runtime:\n      communication:\n        type: ipc\n"
            "  phases:\n    - name: runtime\n      communication: x\n  runtime: &rt\n    ui: none\n"
            "    communication:\n      type: 'tcp'\n      host: 10.1.2.3  # here\n      eventBusProxy:\n"
            "        frontendPort: 1\n        backendPort: 7664\n    workers: 3\n"
        )
        self.assertEqual(
            aiperf_api.bus_of_config(text),
            {
                "type": "tcp",
                "host": "10.1.2.3",
                "event_bus_proxy.frontend_port": "1",
                "event_bus_proxy.backend_port": "7664",
            },
        )

    def test_the_flat_shape_json_and_flow_mappings(self) -> None:
        expected = {"type": "ipc", "path": "/x"}
        for text in (
            "runtime:\n  communication:\n    type: ipc\n    path: /x\n",
            "runtime:\n  communication: {type: ipc, path: /x}\n",
            '{"benchmark": {"runtime": {"communication": {"type": "ipc", "path": "/x"}}, "datasets": [1]}}',
        ):
            self.assertEqual(aiperf_api.bus_of_config(text), expected)

    def test_a_file_that_names_no_bus(self) -> None:
        for text in ("", "benchmark:\n  model: m\n", "# runtime:\n", '{"a": 1}', "other:\n  runtime:\n    x: 1\n"):
            self.assertEqual(aiperf_api.bus_of_config(text), {})

    def test_what_is_not_understood_is_refused_not_guessed(self) -> None:
        for text in (
            "benchmark: *common\n",
            "benchmark:\n  runtime:\n    <<: *base\n",
            "benchmark: {runtime: {communication: {type: ipc}}}\n",
            "benchmark:\n  runtime:\n    communication: {\n      type: ipc }\n",
            "runtime:\n  communication:\n    type: '{{ kind }}'\n",
            "{not json",
        ):
            with self.assertRaises(ValueError, msg=text):
                aiperf_api.bus_of_config(text)


class TheConfigurationOfACommandLine(unittest.TestCase):
    def test_every_spelling_of_a_flag(self) -> None:
        line = (
            "aiperf profile -m a --model b,c --url http://x:1 -u=http://y --endpoint-type completions --streaming"
            " --concurrency 8 --request_rate 2.5 --num-requests=100 --benchmark-duration 30 --isl 128 --unknown 3"
        )
        config = aiperf_api.config_from_argv(line.split())
        self.assertEqual(
            config["endpoint"],
            {
                "type": "completions",
                "streaming": True,
                "model_names": ["a", "b", "c"],
                "urls": ["http://x:1", "http://y"],
            },
        )
        self.assertEqual(
            config["loadgen"],
            {"concurrency": 8, "request_rate": 2.5, "request_count": 100, "benchmark_duration": 30},
        )
        self.assertEqual(config["input"], {"prompt": {"input_tokens": {"mean": 128}}})
        self.assertEqual(config["command"], line.split())

    def test_defaults_stand_in_unless_a_configuration_file_may_speak(self) -> None:
        self.assertEqual(
            aiperf_api.config_from_argv(["aiperf", "profile"])["endpoint"], {"type": "chat", "streaming": False}
        )
        self.assertNotIn("endpoint", aiperf_api.config_from_argv(["aiperf", "profile", "-f", "c.yaml"]))

    def test_numbers_that_are_none_stay_text(self) -> None:
        for text in ("1,2,4", "inf", "nan", "1_0", "5 ", "٥", "1e999"):
            config = aiperf_api.config_from_argv(["aiperf", "profile", "--concurrency", text])
            self.assertEqual(config["loadgen"]["concurrency"], text)
            aiperf_api.json_bytes(config)

    def test_a_switch_that_is_off(self) -> None:
        self.assertIs(
            aiperf_api.config_from_argv(["aiperf", "profile", "--streaming=false"])["endpoint"]["streaming"], False
        )

    def test_other_commands_have_only_their_words(self) -> None:
        self.assertEqual(
            aiperf_api.config_from_argv(["./run", "--api-key", "k"]), {"command": ["./run", "--api-key", "***"]}
        )

    def test_a_flag_at_the_end_without_its_value(self) -> None:
        self.assertEqual(aiperf_api.config_from_argv(["aiperf", "profile", "--model"])["endpoint"]["model_names"], [])


class CredentialsOnACommandLineAreHidden(unittest.TestCase):
    KEY = "sk-proj-4f9d8e7c6b5a"

    def test_in_every_place_where_one_can_stand(self) -> None:
        for words, shown in (
            (["--api-key", self.KEY], ["--api-key", "***"]),
            (["--api-key=" + self.KEY], ["--api-key=***"]),
            (["--api_key", "-" + self.KEY], ["--api_key", "***"]),
            (["-H", "Authorization: Bearer " + self.KEY], ["-H", "Authorization: ***"]),
            (["-HX-Api-Key:" + self.KEY], ["-HX-Api-Key:***"]),
            (["--header=X-Api-Key:" + self.KEY], ["--header=X-Api-Key:***"]),
            (["--header", "A: b", "Cookie: " + self.KEY], ["--header", "A: ***", "Cookie: ***"]),
            (["--header", '{"Authorization": "Bearer %s"}' % self.KEY], ["--header", '{"Authorization": "***"}']),
            (["--extra-inputs", "api_key:" + self.KEY], ["--extra-inputs", "api_key:***"]),
            (["--extra-inputs", '{"token": "%s", "n": 1}' % self.KEY], ["--extra-inputs", '{"token": "***", "n": 1}']),
            (["--url", "http://u:%s@host/v1" % self.KEY], ["--url", "http://***@host/v1"]),
            (["--url", "host:80/v1?api_key=%s&n=1" % self.KEY], ["--url", "host:80/v1?api_key=***&n=1"]),
            (["env", "OPENAI_API_KEY=" + self.KEY], ["env", "OPENAI_API_KEY=***"]),
            (
                ["sh", "-c", "aiperf profile --api-key %s -m x" % self.KEY],
                ["sh", "-c", "aiperf profile --api-key *** -m x"],
            ),
            (["sh", "-c", "HF_TOKEN='%s' run" % self.KEY], ["sh", "-c", "HF_TOKEN=***"]),
        ):
            found: set[str] = set()
            self.assertEqual(aiperf_api.redact_command(words, found), shown)
            self.assertTrue(any(self.KEY in secret for secret in found), (words, found))

    def test_innocent_words_stay(self) -> None:
        line = "aiperf profile --tokenizer local/tok --use-server-token-count --url http://h:1/v1?n=1 -vv --osl 10 a@b"
        found: set[str] = set()
        self.assertEqual(aiperf_api.redact_command(line.split(), found), line.split())
        self.assertEqual(found, set())

    def test_harmless_header_values_are_hidden_but_not_hunted(self) -> None:
        words = ["aiperf", "profile", "-H", "Accept: application/json"]
        self.assertEqual(aiperf_api.redact_command(words)[-1], "Accept: ***")
        self.assertEqual(aiperf_api.secrets_from_argv(words, {}), [])

    def test_secrets_of_the_environment(self) -> None:
        environ = {
            "OPENAI_API_KEY": self.KEY,
            "HF_TOKEN": "hf_abcdef",
            "PATH": "/bin",
            "TOKENIZERS_PARALLELISM": "false",
            "AIPERF_INJECTED_HEADERS": '{"Authorization": "Bearer inj-123456"}',
        }
        self.assertEqual(
            aiperf_api.secrets_from_argv(["aiperf", "profile"], environ),
            sorted([self.KEY, "hf_abcdef", "Bearer inj-123456"]),
        )

    def test_the_configuration_holds_none(self) -> None:
        words = ["aiperf", "profile", "-m", "m", "--api-key", self.KEY, "-u", "http://u:%s@h" % self.KEY]
        words += ["--header", "Authorization:Bearer " + self.KEY]
        config = aiperf_api.config_from_argv(words)
        self.assertNotIn(self.KEY, str(config))
        self.assertEqual(config["endpoint"]["api_key"], "***")


class TheConfigurationInTheArtifacts(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)

    def write(self, value: Any, name: str = "profile_export_aiperf.json") -> None:
        (self.directory / name).write_text(json.dumps(value))

    def test_there_is_none_before_the_export_is_there(self) -> None:
        self.assertEqual(aiperf_api.load_artifact_config(str(self.directory)), {})
        self.assertEqual(aiperf_api.load_artifact_config(str(self.directory / "missing")), {})

    def test_the_shape_of_0_6(self) -> None:
        config = {"endpoint": {"model_names": ["m"], "type": "chat"}, "loadgen": {"concurrency": 6}}
        self.write({"input_config": config})
        self.assertEqual(aiperf_api.load_artifact_config(str(self.directory)), config)

    def test_the_shape_of_0_13_gets_the_earlier_names_too(self) -> None:
        config = {
            "models": {"items": [{"name": "m"}]},
            "endpoint": {"urls": ["http://h"], "type": "chat", "streaming": True},
            "phases": [
                {"name": "warmup", "kind": "warmup", "concurrency": 1, "requests": 3},
                {"name": "profiling", "kind": "profiling", "concurrency": 6, "requests": 120, "rate": 2.5},
            ],
        }
        self.write({"input_config": config}, "my_aiperf.json")
        loaded = aiperf_api.load_artifact_config(str(self.directory))
        self.assertEqual(loaded["endpoint"]["model_names"], ["m"])
        self.assertEqual(loaded["loadgen"], {"concurrency": 6, "request_count": 120, "request_rate": 2.5})
        self.assertEqual(loaded["phases"], config["phases"])

    def test_an_export_of_an_earlier_run_or_without_sense_does_not_count(self) -> None:
        self.write({"input_config": {"endpoint": {}}})
        self.assertEqual(aiperf_api.load_artifact_config(str(self.directory), since_sec=4e9), {})
        for text in ("", "[1]", '{"input_config": 3}', "\udcff"):
            (self.directory / "profile_export_aiperf.json").write_bytes(text.encode("utf-8", "surrogateescape"))
            self.assertEqual(aiperf_api.load_artifact_config(str(self.directory)), {})


class AChildProcess(unittest.IsolatedAsyncioTestCase):
    async def run_child(self, *argv: str) -> Any:
        child = aiperf_api.ChildProcess(argv, os.environ)
        self.assertEqual((child.pid, child.exit_code, child.exit_text), (None, None, ""))
        await child.start()
        return child

    async def test_exit_codes_as_a_shell_has_them(self) -> None:
        for script, code, text in (
            ("exit 0", 0, "exit status 0"),
            ("exit 3", 3, "exit status 3"),
            ("kill -KILL $$", 137, "killed by SIGKILL"),
            ("kill -TERM $$", 143, "killed by SIGTERM"),
        ):
            child = await self.run_child("sh", "-c", script)
            self.assertEqual(await child.wait(), code)
            self.assertEqual((child.exit_code, child.exit_text), (code, text))

    async def test_a_command_that_cannot_be_started_is_one_line_and_the_shells_code(self) -> None:
        for command, code in (("no-such-command-4711", 127), ("/no/such/file", 127), (os.path.dirname(__file__), 126)):
            with self.assertRaises(aiperf_api.CommandError) as caught:
                await self.run_child(command)
            self.assertEqual(caught.exception.exit_code, code)
            self.assertTrue(str(caught.exception).startswith(command + ": "))
            self.assertNotIn("\n", str(caught.exception))

    async def test_it_stays_in_our_process_group(self) -> None:
        child = await self.run_child("sleep", "60")
        self.assertEqual(os.getpgid(child.pid), os.getpgrp())
        child.pass_on(signal.SIGTERM)
        self.assertEqual(await child.wait(), 143)

    async def test_a_signal_that_the_terminal_did_not_send_is_passed_on(self) -> None:
        child = await self.run_child("sleep", "60")
        with unittest.mock.patch.object(child, "_hears_terminal", lambda: False):
            child.pass_on(signal.SIGINT)
        self.assertEqual(await child.wait(), 130)
        child.pass_on(signal.SIGINT)  # after the end it is nobody's

    async def test_a_sigint_of_the_terminal_is_not_sent_twice(self) -> None:
        child = await self.run_child("sleep", "60")
        with unittest.mock.patch.object(child, "_hears_terminal", lambda: True):
            child.pass_on(signal.SIGINT)
            self.assertIsNone(child.exit_code)
            self.assertEqual(child.signals, 1)
            child.pass_on(signal.SIGTERM)  # no key of the terminal sends this one
        self.assertEqual(await child.wait(), 143)

    async def test_a_third_signal_kills_a_child_that_does_not_listen(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            ready = os.path.join(directory, "ready")
            os.mkfifo(ready)
            script = "trap '' INT TERM; echo > \"$0\"; while :; do sleep 0.05; done"
            child = await self.run_child("sh", "-c", script, ready)
            await asyncio.get_running_loop().run_in_executor(None, pathlib.Path(ready).read_bytes)
        for _ in range(3):
            child.pass_on(signal.SIGTERM)
        self.assertEqual(await child.wait(), 137)


class ThePrivateDirectory(unittest.TestCase):
    def test_it_is_ours_alone_and_its_path_fits_a_socket(self) -> None:
        deep = os.path.join(tempfile.gettempdir(), "x" * 90)
        os.makedirs(deep, exist_ok=True)
        self.addCleanup(shutil.rmtree, deep)
        for parent in (tempfile.gettempdir(), deep):
            with unittest.mock.patch.object(tempfile, "tempdir", parent):
                directory = aiperf_api.make_ipc_directory()
            self.addCleanup(os.rmdir, directory)
            self.assertEqual(os.stat(directory).st_mode & 0o777, 0o700)
            self.assertLess(len(directory), 72)


@unittest.skipUnless(sys.platform.startswith("linux"), "needs Linux's /proc")
class TheProcessTitle(unittest.TestCase):
    def test_secrets_disappear_from_the_command_line_that_ps_shows(self) -> None:
        script = (
            "import aiperf_api, sys; print(aiperf_api.hide_in_process_title(['s3cret-key']));"
            "print(open('/proc/self/cmdline').read().split(chr(0))[-4:]); print(sys.argv)"
        )
        command = [sys.executable, "-c", script, "--", "--api-key", "s3cret-key", "-H=Bearer s3cret-key"]
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            cwd=os.path.dirname(os.path.abspath(aiperf_api.__file__)),
        )
        done, title, kept = result.stdout.splitlines()
        self.assertEqual(done, "True")
        self.assertEqual(title, "['--api-key', '**********', '-H=Bearer **********', '']")
        self.assertIn("s3cret-key", kept)  # what the program works with is not touched

    def test_nothing_is_touched_without_secrets(self) -> None:
        with open("/proc/self/cmdline", "rb") as file:
            before = file.read()
        self.assertTrue(aiperf_api.hide_in_process_title([]))
        with open("/proc/self/cmdline", "rb") as file:
            self.assertEqual(file.read(), before)


class TheVersionOfAnInstalledAIPerf(unittest.TestCase):
    def test_it_is_read_beside_the_interpreter_of_the_script(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            root = pathlib.Path(directory)
            (root / "bin").mkdir()
            (root / "lib" / "python3.11" / "site-packages" / "aiperf-0.6.0.dist-info").mkdir(parents=True)
            script = root / "bin" / "aiperf"
            script.write_text(f"#!{root}/bin/python\nimport sys\n")
            script.chmod(0o755)
            self.assertEqual(aiperf_api.aiperf_version(str(script)), "0.6.0")
            self.assertEqual(aiperf_api.aiperf_version("aiperf", search_path=str(root / "bin")), "0.6.0")
            script.write_bytes(b"\x7fELF\xff")
            self.assertEqual(aiperf_api.aiperf_version(str(script)), "")
            self.assertEqual(aiperf_api.aiperf_version(str(root / "missing")), "")


# == 12 == Hub =========================================================================================================


# == 13 == Connection ==================================================================================================


# == 14 == Endpoints and service =======================================================================================


# == 15 == Command line ================================================================================================


if __name__ == "__main__":
    unittest.main()
