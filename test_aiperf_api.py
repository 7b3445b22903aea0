# SPDX-License-Identifier: Apache-2.0
"""Tests of aiperf_api: `python3 -m unittest` with nothing installed, or pytest with independent judges.

One class per subject, in the order of the module's rooms; names are sentences about behaviour.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import itertools
import json
import re
import statistics
import subprocess
import sys
import unittest
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, cast

import aiperf_api

try:
    import prometheus_client
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
    from prometheus_client.parser import text_string_to_metric_families as parse_text
except ImportError:
    prometheus_client = None  # type: ignore[assignment]

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

RECORDINGS = Path(__file__).resolve().parent / ".ci" / "recordings"
RECORDING_NAMES = (
    "run_0_12_failed_configure",
    "run_0_13_cancelled",
    "run_0_13_duration_rate",
    "run_0_13_failed_configure",
    "run_0_13_gpu_and_server_metrics",
    "run_0_13_killed",
    "run_0_13_no_realtime_metrics",
    "run_0_13_success",
    "run_0_3_success",
    "run_0_6_success",
)
needs_recordings = unittest.skipUnless(RECORDINGS.is_dir(), "needs the recordings in .ci/recordings")

BusMessage = tuple[str, bytes, int]  # message type, payload, bus time in ns


def recording(name: str) -> list[BusMessage]:
    """Return the messages of a recorded run."""
    with gzip.open(RECORDINGS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines]
    types = (entry["topic"].rstrip("$").split(".")[0] for entry in entries)
    return [(kind, entry["payload"].encode(), entry["t"]) for kind, entry in zip(types, entries)]


class MetricCatalogueTests(unittest.TestCase):
    def test_the_table_holds_every_metric_of_the_registry(self) -> None:
        self.assertEqual(len(aiperf_api.CATALOGUE), 139)
        latency = aiperf_api.CATALOGUE["request_latency"]
        self.assertEqual(latency, ("request_latency", "Request Latency", "ns", "ms", False, False))
        self.assertTrue(aiperf_api.CATALOGUE["request_throughput"].larger_is_better)
        self.assertEqual(sum(metric.hidden for metric in aiperf_api.CATALOGUE.values()), 9)

    def test_every_unit_that_differs_can_be_converted(self) -> None:
        for tag, metric in aiperf_api.CATALOGUE.items():
            row = aiperf_api.display_row({"tag": tag, "unit": metric.unit, "avg": 1})
            self.assertEqual(row is None, metric.hidden, tag)
            if row is not None:
                self.assertEqual(row["unit"], metric.display_unit, tag)

    def test_raw_units_become_display_units_in_every_statistic_but_the_count(self) -> None:
        raw = {"tag": "request_latency", "unit": "ns", "avg": 270185870, "p99": 3e8, "sum": 1e9, "std": 0, "count": 295}
        raw.update(min=1, max=2e6, current=5e5)
        shown = {"unit": "ms", "avg": 270.18587, "p99": 300.0, "sum": 1000.0, "std": 0.0, "count": 295}
        shown.update(min=1e-6, max=2.0, current=0.5)
        self.assertEqual(aiperf_api.display_rows([raw]), {"request_latency": shown})

    def test_each_conversion_is_exact(self) -> None:
        for tag, unit, value, wanted in (
            ("benchmark_duration", "ns", 14096553324.0, 14.096553324),
            ("http_req_data_received", "B", 5143.0, 5.0224609375),
            ("video_inference_time", "sec", 0.25, 250.0),
            ("request_latency", "ms", 270.5, 270.5),  # as later versions send it
            ("benchmark_duration", "sec", 14.5, 14.5),
            ("no_such_tag", "ns", 7.0, 7.0),
            ("request_latency", "us", 7.0, 7.0),  # a unit the catalogue does not expect is left alone
        ):
            with self.subTest(tag, unit=unit):
                self.assertEqual(
                    aiperf_api.display_rows([{"tag": tag, "unit": unit, "avg": value}])[tag]["avg"], wanted
                )

    def test_hidden_tags_nulls_and_internal_fields_are_left_out(self) -> None:
        rows = [
            {"tag": "min_request_timestamp", "unit": "ns", "avg": 1.79e18},
            {"tag": "adj_request_latency", "unit": "ms", "avg": None, "p50": 2.5, "console_group": "default"},
        ]
        self.assertEqual(aiperf_api.display_rows(rows), {"adj_request_latency": {"unit": "ms", "p50": 2.5}})

    def test_fields_of_the_future_pass_and_wrong_types_do_not(self) -> None:
        row = {
            "tag": "t",
            "unit": "ms",
            "avg": "fast",
            "p50": True,
            "min": [1],
            "max": float("inf"),
            "note": {"a": [1]},
        }
        self.assertEqual(aiperf_api.display_rows([row]), {"t": {"unit": "ms", "note": {"a": [1]}}})

    def test_what_is_no_row_is_passed_over(self) -> None:
        cases: tuple[Any, ...] = (None, {}, "x", 7, [None, 1, "x", [], {}, {"tag": None}, {"tag": ""}, {"tag": 7}])
        for rows in cases:
            self.assertEqual(aiperf_api.display_rows(rows), {})

    def test_rows_keep_their_order(self) -> None:
        rows = [{"tag": tag, "avg": 1} for tag in "zebra"]
        self.assertEqual("".join(aiperf_api.display_rows(rows)), "zebra")

    def test_a_message_that_needs_no_change_is_forwarded_as_the_same_object(self) -> None:
        for payload in (
            b'{"metrics": [ {"tag":"request_latency","unit":"ms","avg":1.50} ], "message_type":"realtime_metrics"}',
            b'{"metrics":[]}',
            b'{"metrics":null}',
        ):
            self.assertIs(aiperf_api.forwardable_realtime_metrics(payload), payload)

    def test_a_message_that_needs_a_change_keeps_everything_else(self) -> None:
        rows = (
            b'[{"unit":"ns","avg":5000000,"tag":"request_latency","header":"H","current":null},'
            b'{"tag":"requested_osl","unit":"tokens","avg":1},{"tag":"x","unit":"","console_group":"none","new":[1]}]'
        )
        payload = b'{"message_type":"realtime_metrics","metrics":' + rows + b',"later":1}'
        self.assertEqual(
            aiperf_api.forwardable_realtime_metrics(payload),
            b'{"message_type":"realtime_metrics","metrics":[{"unit":"ms","avg":5.0,"tag":"request_latency","header":"H"}'
            b',{"tag":"x","unit":"","new":[1]}],"later":1}',
        )

    def test_what_cannot_be_forwarded_raises(self) -> None:
        for payload, kind in ((b"{", "not_json"), (b"[]", "not_object"), (b"\xff", "not_json"), (b"", "not_json")):
            with self.assertRaises(aiperf_api.BusMessageError) as caught:
                aiperf_api.forwardable_realtime_metrics(payload)
            self.assertEqual(caught.exception.kind, kind)

    @needs_recordings
    def test_forwarding_is_stable(self) -> None:
        """What was made fit for clients needs no further change."""
        for name in ("run_0_3_success", "run_0_6_success", "run_0_13_success"):
            for kind, payload, _ in recording(name):
                if kind == "realtime_metrics":
                    once = aiperf_api.forwardable_realtime_metrics(payload)
                    self.assertIs(aiperf_api.forwardable_realtime_metrics(once), once)


# == 9 == Prometheus text ==============================================================================================

GOLDEN_METRICS = {
    "request_latency": {
        "header": "Request Latency", "unit": "ms", "avg": 275.5, "p50": 275.25, "p99": 334.0, "count": 791,
        "sum": 217920.5,
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


def sample_lines(text: bytes) -> list[str]:
    """Return the lines of an exposition that hold samples."""
    return [line for line in text.decode().splitlines() if not line.startswith("#")]


def parsed(families: Sequence[aiperf_api.Family]) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """Return what prometheus_client reads in both formats, by (name, labels)."""
    text, openmetrics = aiperf_api.render_text(families), aiperf_api.render_openmetrics(families)
    read = []
    for parse, exposition in ((parse_text, text), (parse_openmetrics, openmetrics)):
        samples = [sample for family in parse(exposition.decode()) for sample in family.samples]
        series = {(sample.name, str(sorted(sample.labels.items()))): sample.value for sample in samples}
        assert len(series) == len(samples), "a series twice"
        read.append(series)
    return read[0], read[1]


class PrometheusTextTests(unittest.TestCase):
    def setUp(self) -> None:
        self.info = aiperf_api.Family(
            "aiperf", "info", "Benchmark", "", [aiperf_api.Sample("_info", (("model", 'a\\b"c\nd'),), 1)]
        )
        self.counter = aiperf_api.Family("aiperf_things", "counter", "Things", "", [aiperf_api.Sample("_total", (), 3)])

    def test_golden_text(self) -> None:
        metrics = aiperf_api.metric_families(GOLDEN_METRICS, (("model", "m"),))
        self.assertEqual(aiperf_api.render_text([self.info, *metrics, self.counter]).decode(), GOLDEN_TEXT)

    def test_golden_openmetrics(self) -> None:
        metrics = aiperf_api.metric_families({"request_error_rate": GOLDEN_METRICS["request_error_rate"]})
        text = aiperf_api.render_openmetrics([self.info, *metrics, self.counter]).decode()
        self.assertEqual(text, GOLDEN_OPENMETRICS)

    def test_nothing_is_an_empty_text_and_an_end(self) -> None:
        self.assertEqual(aiperf_api.render_text([]), b"")
        self.assertEqual(aiperf_api.render_openmetrics([]), b"# EOF\n")

    def test_units_are_named_by_the_rules_of_the_exporter(self) -> None:
        for unit, name in (
            ("ms", "ms"), ("%", "percent"), ("tokens/sec", "tps"), ("tokens/sec/user", "tps_per_user"),
            ("requests/sec", "requests_per_sec"), ("tokens/s", "tokens_per_s"), ("J*s", "j_s"), ("", ""),
            ("good-req/s/W", "good_req_per_s_per_w"), ("GB", "gb"), ("1/s", "_1_per_s"),
        ):  # fmt: skip
            self.assertEqual(aiperf_api.unit_name(unit), name)

    def test_a_hostile_tag_is_a_name_like_any_other(self) -> None:
        tag = '"}<script>\n'
        families = aiperf_api.metric_families({tag: {"header": tag, "unit": tag, "p50": 1.0}}, (("model", tag),))
        line = 'aiperf____script______script__{model="\\"}<script>\\n",quantile="0.5"} 1.0'
        self.assertEqual(sample_lines(aiperf_api.render_text(families)), [line])

    def test_control_characters_do_not_reach_a_terminal(self) -> None:
        families = aiperf_api.metric_families({"t": {"header": "a\x1b[2J\rb", "avg": 1}}, (("model", "\x9bx\x00"),))
        for render in (aiperf_api.render_text, aiperf_api.render_openmetrics):
            self.assertNotRegex(render(families).decode(), "[\x00-\x09\x0b-\x1f\x7f-\x9f]")

    def test_two_tags_that_clean_to_one_name_are_one_family_of_the_first(self) -> None:
        families = aiperf_api.metric_families(
            {"a-b": {"avg": 1, "unit": "ms"}, "a_b": {"avg": 2, "max": 3, "unit": "MS"}}
        )
        self.assertEqual(sample_lines(aiperf_api.render_text(families)), ["aiperf_a_b_avg_ms 1"])

    def test_a_family_that_would_take_anothers_name_is_left_out(self) -> None:
        families = [
            aiperf_api.Family("x", "summary", "", "", [aiperf_api.Sample("_count", (), 1)]),
            aiperf_api.Family("x_count", "gauge", "", "", [aiperf_api.Sample("", (), 2)]),
            aiperf_api.Family("x_other", "gauge", "", "", []),
            aiperf_api.Family("x", "gauge", "", "", [aiperf_api.Sample("", (), 3)]),
        ]
        self.assertEqual(aiperf_api.unique_families(families), families[:1])

    def test_values_are_written_as_numbers(self) -> None:
        values = (1, 1.0, 0.1, 1e300, float("inf"), float("-inf"), float("nan"), 2**63)
        family = aiperf_api.Family("x", "gauge", "", "", [aiperf_api.Sample("", (("i", str(v)),), v) for v in values])
        written = [line.rsplit(" ", 1)[1] for line in sample_lines(aiperf_api.render_text([family]))]
        self.assertEqual(written, ["1", "1.0", "0.1", "1e+300", "+Inf", "-Inf", "NaN", "9223372036854775808"])

    def test_null_makes_no_sample(self) -> None:
        for row in ({}, {"avg": None}, {"avg": float("nan")}, {"avg": "x", "p50": True}, {"unit": 7, "header": []}):
            self.assertEqual(sample_lines(aiperf_api.render_text(aiperf_api.metric_families({"t": row}))), [])

    def test_gpu_telemetry_has_labels_instead_of_names(self) -> None:
        for vendor, gpu in (("NVIDIA", "nvidia_power_usage"), ("AMD", "amd_power_usage"), ("", "gpu_power_usage")):
            tag = f"{gpu}_dcgm_http___127_0_0_1_19400_metrics_gpu1_GPU-8f1c7a52"
            header = f"{vendor} GPU Power Usage | 127.0.0.1:19400 | GPU 1 | H200 | 141 GB".strip()
            families = aiperf_api.telemetry_families(
                {tag: {"unit": "W", "header": header, "current": 460.5, "p50": 1.0}}
            )
            self.assertEqual(
                [family.name for family in families], ["aiperf_gpu_power_usage_w", "aiperf_gpu_power_usage_current_w"]
            )
            self.assertEqual(families[1].help, "GPU Power Usage current value (in W)")
            labels = (
                ("source", "127.0.0.1:19400"),
                ("gpu", "1"),
                ("gpu_name", "H200 | 141 GB"),
                ("uuid", "GPU-8f1c7a52"),
            )
            self.assertEqual(families[1].samples, [aiperf_api.Sample("", labels, 460.5)])

    def test_gpus_share_a_family_and_degrees_have_a_name(self) -> None:
        rows = {
            f"amd_temperature_dcgm_amdsmi___localhost_gpu{gpu}_abc": {
                "unit": "°C",
                "avg": gpu,
                "header": "AMD GPU Temperature",
            }
            for gpu in (0, 1)
        }
        (family,) = aiperf_api.telemetry_families(rows)
        self.assertEqual(
            (family.name, family.unit, len(family.samples)), ("aiperf_gpu_temperature_avg_celsius", "celsius", 2)
        )
        self.assertEqual(dict(family.samples[1].labels)["source"], "amdsmi___localhost")

    def test_a_telemetry_tag_of_another_form_still_counts(self) -> None:
        (family,) = aiperf_api.telemetry_families({"fan speed": {"avg": 1, "unit": "%"}})
        self.assertEqual(family.name, "aiperf_gpu_fan_speed_avg_percent")

    def test_server_metrics_have_labels_instead_of_names(self) -> None:
        stats = {"count": 2, "sum": 0.5, "avg": 0.25, "p50_estimate": 0.2, "count_rate": 1.5, "buckets": {}}
        metrics = {
            "vllm:ttft_seconds": {
                "type": "histogram",
                "series": [{"labels": {"engine": "0"}, "stats": stats}],
            },
            "vllm:prompt_tokens": {
                "type": "counter",
                "series": [{"labels": None, "stats": {"total": 5.0, "rate": 0.5}}],
            },
            "vllm:kv": {
                "type": "gauge",
                "series": [{"labels": {"endpoint": "own", "model": 7}, "stats": {"avg": 1.0}}],
            },
        }
        families = aiperf_api.server_families({"h:1": {"metrics": metrics}}, (("model", "m"),))
        self.assertEqual(
            sample_lines(aiperf_api.render_text(families)),
            [
                'aiperf_server_vllm_ttft_seconds_count{model="m",endpoint="h:1",engine="0"} 2',
                'aiperf_server_vllm_ttft_seconds_sum{model="m",endpoint="h:1",engine="0"} 0.5',
                'aiperf_server_vllm_ttft_seconds{model="m",endpoint="h:1",engine="0",quantile="0.5"} 0.2',
                'aiperf_server_vllm_ttft_avg_seconds{model="m",endpoint="h:1",engine="0"} 0.25',
                'aiperf_server_vllm_ttft_seconds_count_rate{model="m",endpoint="h:1",engine="0"} 1.5',
                'aiperf_server_vllm_prompt_tokens_total{model="m",endpoint="h:1"} 5.0',
                'aiperf_server_vllm_prompt_tokens_rate{model="m",endpoint="h:1"} 0.5',
                'aiperf_server_vllm_kv_avg{model="m",endpoint="h:1",exported_endpoint="own",exported_model="7"} 1.0',
            ],
        )

    def test_malformed_server_metrics_are_passed_over(self) -> None:
        cases: tuple[Any, ...] = (
            None,
            [],
            {"e": None},
            {"e": {"metrics": []}},
            {"e": {"metrics": {"m": {"series": 1}}}},
        )
        for summaries in cases:
            self.assertEqual(aiperf_api.server_families(summaries), [])
        series: list[Any] = [
            None,
            {},
            {"stats": []},
            {"stats": {"avg": "x", "p50": None, "total": -1}, "labels": {"": 1, "0": 2, "__a": 3}},
        ]
        metrics = {"m": {"type": "counter", "description": 7, "series": series}}
        families = aiperf_api.unique_families(aiperf_api.server_families({"e": {"metrics": metrics}}))
        self.assertEqual(families, [])

    @unittest.skipUnless(prometheus_client, "needs the prometheus_client package")
    def test_an_independent_parser_reads_both_formats(self) -> None:
        tag = '"}<script>\n'
        rows = {**GOLDEN_METRICS, tag: {"header": tag, "unit": tag, "p50": 1.0, "count": 1, "sum": 2, "avg": 3}}
        families = aiperf_api.unique_families(
            [self.info, *aiperf_api.metric_families(rows, (("model", tag),)), self.counter]
        )
        text, openmetrics = parsed(families)
        self.assertEqual(text, openmetrics)
        self.assertEqual(text["aiperf_things_total", "[]"], 3)
        self.assertIn(("aiperf_request_latency_avg_ms", str([("model", tag)])), text)


# == 10 == Benchmark state =============================================================================================

SECOND = 1_000_000_000
BASE_NS = 2_000_000_000 * SECOND  # a bus clock of its own, far from the benchmark's


def replayed(
    messages: Iterable[BusMessage], state: Optional[aiperf_api.BenchmarkState] = None, base_ns: Optional[int] = None
) -> tuple[aiperf_api.BenchmarkState, int]:
    """Apply messages, by their own time or as if the first came at `base_ns`; return the state and the last time."""
    state, shift, now_ns = state or aiperf_api.BenchmarkState(), None, 0
    for kind, payload, recorded_ns in messages:
        if shift is None:
            shift = 0 if base_ns is None else base_ns - recorded_ns
        now_ns = recorded_ns + shift
        state.apply(kind, payload, now_ns)
    return state, now_ns


def answers(state: aiperf_api.BenchmarkState, now_ns: int) -> dict[str, Any]:
    """Return every answer of a state as a client would read it."""
    found = {
        "status": state.status(now_ns),
        "progress": state.progress(now_ns),
        "metrics": state.metrics(),
        "workers": state.workers(),
        "config": state.config_answer(),
        "server_metrics": state.server_metrics(),
        "results": state.results(),
        "history": state.history(),
        "labels": state.labels(),
    }
    return cast("dict[str, Any]", json.loads(aiperf_api.json_bytes(found)))


def send(target: aiperf_api.BenchmarkState, now_ns: int, message_type: str, /, **fields: Any) -> aiperf_api.Change:
    """Apply a message made on the spot."""
    payload = json.dumps({"message_type": message_type, "service_id": "s", **fields}).encode()
    return target.apply(message_type, payload, now_ns)


def send_phase(
    target: aiperf_api.BenchmarkState, now_ns: int, kind: str, phase: str, /, **stats: Any
) -> aiperf_api.Change:
    """Apply a credit_phase_* message made on the spot."""
    return send(target, now_ns, f"credit_phase_{kind}", stats={"phase": phase, **stats})


class EndState(NamedTuple):
    """What a recording must come to."""

    state: str
    total: Optional[int]
    completed: int
    errors: int
    final: bool
    latency: Optional[float]  # avg of request_latency in ms
    percent: float
    states: str  # all states in order


RUN_STATES = "initializing configuring ready profiling processing complete"
END_STATES = {
    "run_0_13_success": EndState("complete", 800, 800, 9, True, 275.0049, 100, RUN_STATES),
    "run_0_13_gpu_and_server_metrics": EndState("complete", 1300, 1300, 23, True, 276.0126, 100, RUN_STATES),
    "run_0_13_cancelled": EndState(
        "cancelled", 900, 408, 7, True, 272.0799, 45.3333, "initializing configuring ready profiling stopping cancelled"
    ),
    "run_0_13_duration_rate": EndState(
        "complete", None, 510, 12, True, 273.3076, 100,
        "initializing configuring ready profiling processing stopping complete",
    ),
    "run_0_13_failed_configure": EndState("failed", None, 0, 0, False, None, 0, "initializing configuring failed"),
    "run_0_6_success": EndState("complete", 300, 300, 6, True, 270.1107, 100, RUN_STATES),
    "run_0_3_success": EndState("complete", 300, 300, 5, True, 270.1859, 100, RUN_STATES),
    "run_0_12_failed_configure": EndState("failed", None, 0, 0, False, None, 0, "initializing configuring failed"),
    "run_0_13_no_realtime_metrics": EndState("complete", 800, 800, 14, True, 297.6002, 100, RUN_STATES),
    "run_0_13_killed": EndState(
        "profiling", 800, 76, 1, False, 292.5429, 9.5, "initializing configuring ready profiling"
    ),
}  # fmt: skip


@needs_recordings
class RecordedRunTests(unittest.TestCase):
    def test_every_recording_comes_to_its_end_state(self) -> None:
        for name, wanted in END_STATES.items():
            with self.subTest(name):
                state, now_ns = replayed(recording(name))
                progress, metrics = state.progress(now_ns), state.metrics()
                figures = (progress["total"], progress["completed"], progress["errors"])
                self.assertEqual(state.status(now_ns)["state"], wanted.state)
                self.assertEqual(figures, (wanted.total, wanted.completed, wanted.errors))
                self.assertEqual(metrics["final"], wanted.final)
                self.assertAlmostEqual(progress["percent_complete"], wanted.percent, 3)
                latency = metrics["metrics"].get("request_latency", {"avg": None, "unit": "ms"})
                self.assertEqual(latency["unit"], "ms")
                self.assertEqual(latency["avg"] and round(latency["avg"], 4), wanted.latency)
                status = wanted.state if wanted.state in aiperf_api.ENDS else "running"
                self.assertEqual(state.results()["status"], status)
                self.assertEqual(state.results()["results"] is not None, wanted.final)

    def test_every_recording_goes_through_its_states_in_order(self) -> None:
        for name, wanted in END_STATES.items():
            state, states = aiperf_api.BenchmarkState(), []
            for kind, payload, now_ns in recording(name):
                state.apply(kind, payload, now_ns)
                states.append(state.status(now_ns)["state"])
            self.assertEqual(" ".join(key for key, _ in itertools.groupby(states)), wanted.states, name)

    def test_final_figures_are_in_display_units(self) -> None:
        for name, tag, value, unit in (
            ("run_0_13_success", "benchmark_duration", 28.4438, "sec"),
            ("run_0_3_success", "benchmark_duration", 14.0966, "sec"),
            ("run_0_6_success", "http_req_data_received", 5.0225, "KB"),
            ("run_0_13_no_realtime_metrics", "time_to_first_output_token", 84.3436, "ms"),
        ):
            row = replayed(recording(name))[0].metrics()["metrics"][tag]
            self.assertEqual((round(row["avg"], 4), row["unit"]), (value, unit))

    def test_results_have_the_same_shape_in_every_generation(self) -> None:
        for name in ("run_0_3_success", "run_0_6_success", "run_0_13_success"):
            records = replayed(recording(name))[0].results()["results"]["results"]["records"]
            found = {row["tag"]: row["unit"] for row in records}
            self.assertEqual((found["request_latency"], found["benchmark_duration"]), ("ms", "sec"), name)
            self.assertNotIn("min_request_timestamp", found)

    def test_hidden_tags_never_show(self) -> None:
        hidden = {tag for tag, metric in aiperf_api.CATALOGUE.items() if metric.hidden}
        for name in ("run_0_3_success", "run_0_6_success"):
            state, _ = replayed(recording(name))
            self.assertTrue(hidden.isdisjoint(state.metrics()["metrics"]))
            self.assertTrue(hidden.isdisjoint((state.history() or {})["tags"]))

    def test_errors_name_what_failed(self) -> None:
        for name in ("run_0_13_failed_configure", "run_0_12_failed_configure"):
            state, now_ns = replayed(recording(name))
            self.assertIn("okenizer", state.status(now_ns)["error"], name)

    def test_gpus_and_servers_are_there(self) -> None:
        state, now_ns = replayed(recording("run_0_13_gpu_and_server_metrics"))
        gpus = {aiperf_api.gpu_series(tag, row["header"]).labels for tag, row in state.metrics()["telemetry"].items()}
        self.assertEqual([dict(gpu)["gpu"] for gpu in sorted(gpus)], ["0", "1"])
        server = state.server_metrics()
        self.assertIn("vllm:num_requests_running", server["endpoint_summaries"]["127.0.0.1:18051"]["metrics"])
        self.assertIn("num_running", server["snapshot"])
        self.assertEqual(state.status(now_ns)["benchmark_id"], "b18be779b8d8")

    def test_without_real_time_telemetry_the_final_one_shows(self) -> None:
        run = recording("run_0_13_gpu_and_server_metrics")
        state, now_ns = replayed(message for message in run if message[0] != "realtime_telemetry_metrics")
        rows = state.metrics()["telemetry"]
        series = [aiperf_api.gpu_series(tag, row["header"]) for tag, row in rows.items()]
        self.assertEqual({dict(one.labels)["gpu"] for one in series}, {"0", "1"})
        self.assertIn("power_usage", {one.metric for one in series})
        names = {family.name for family in aiperf_api.state_families(state, now_ns)}
        self.assertIn("aiperf_gpu_power_usage_w", names)

    def test_the_identity_is_found_in_each_generation(self) -> None:
        known = {"model": "mock", "endpoint_type": "chat", "streaming": "true", "concurrency": "6"}
        self.assertEqual(replayed(recording("run_0_3_success"))[0].labels(), known)
        self.assertLessEqual(known.items(), replayed(recording("run_0_6_success"))[0].labels().items())
        rate = replayed(recording("run_0_13_duration_rate"))[0].labels()
        self.assertEqual(rate, {"benchmark_id": "dfc261dc81ea", "request_rate": "25.0"})

    def test_nothing_of_one_run_is_left_in_the_next(self) -> None:
        later_ns = BASE_NS + 3600 * SECOND
        runs = {name: recording(name) for name in RECORDING_NAMES}
        alone = {name: self.lasting(*replayed(run, base_ns=later_ns)) for name, run in runs.items()}
        for first, second in itertools.product(runs, runs):
            with self.subTest(f"{second} after {first}"):
                state, _ = replayed(runs[first], base_ns=BASE_NS)
                found = self.lasting(*replayed(runs[second], state, later_ns))
                for key, answer in alone[second].items():
                    self.assertTrue(found[key] == answer, f"{key} differs")  # a diff of these would take a minute

    def lasting(self, state: aiperf_api.BenchmarkState, now_ns: int) -> dict[str, Any]:
        """Return the answers without the moment of the first message: those before a run's sign are the last run's."""
        found = answers(state, now_ns)
        del found["history"]["start_ns"]
        if not found["progress"]["phases"]:
            del found["status"]["started_ns"], found["status"]["elapsed_sec"]
        return found

    def test_a_run_that_follows_at_once_replaces_a_killed_one(self) -> None:
        """The bus is not silent for 10 s in between, so that only the messages tell of the new run."""
        killed = recording("run_0_13_killed")
        for name in RECORDING_NAMES:
            state, now_ns = replayed(killed, base_ns=BASE_NS)
            found = answers(*replayed(recording(name), state, now_ns + SECOND))
            alone = answers(*replayed(recording(name), base_ns=now_ns + SECOND))
            for key in ("progress", "metrics", "results", "config", "server_metrics", "labels"):
                self.assertEqual(found[key], alone[key], f"{key} of {name}")

    def test_ten_runs_in_a_row_end_as_the_first(self) -> None:
        run = recording("run_0_6_success")
        state, now_ns = replayed(run)
        first = answers(state, now_ns)
        for _ in range(9):
            replayed(run, state)
        self.assertEqual(answers(state, now_ns), first)

    def test_every_prefix_has_answers_and_progress_never_goes_back(self) -> None:
        for name in RECORDING_NAMES:
            state, before = aiperf_api.BenchmarkState(), 0.0
            for kind, payload, now_ns in recording(name):
                state.apply(kind, payload, now_ns)
                found = answers(state, now_ns)
                percent = found["progress"]["percent_complete"]
                self.assertTrue(before <= percent <= 100, f"{name}: {before} to {percent}")
                self.assertIsNotNone(found["status"]["elapsed_sec"])
                before = percent

    def test_played_at_full_speed_through_another_clock_the_figures_are_the_same(self) -> None:
        for name, wanted in END_STATES.items():
            state, now_ns = aiperf_api.BenchmarkState(), BASE_NS
            for kind, payload, _ in recording(name):
                now_ns += 50_000
                state.apply(kind, payload, now_ns)
                elapsed_ns = state.progress(now_ns)["elapsed_ns"]
                self.assertLess(elapsed_ns, 60 * SECOND, name)
            self.assertEqual(state.status(now_ns)["state"], wanted.state)
            self.assertAlmostEqual(state.progress(now_ns)["percent_complete"], wanted.percent, 3)

    def test_a_killed_run_turns_stale(self) -> None:
        state, now_ns = replayed(recording("run_0_13_killed"))
        self.assertFalse(state.is_stale(now_ns + 10 * SECOND - 1))
        self.assertTrue(state.is_stale(now_ns + 10 * SECOND))
        later = state.progress(now_ns + 3600 * SECOND)
        self.assertIsNone(later["eta_sec"])
        self.assertLess(later["elapsed_ns"], 20 * SECOND)
        self.assertTrue(state.status(now_ns + 3600 * SECOND)["stale"])

    def test_an_ended_run_never_turns_stale(self) -> None:
        state, now_ns = replayed(recording("run_0_13_success"))
        self.assertFalse(state.is_stale(now_ns + 3600 * SECOND))
        self.assertEqual(state.progress(now_ns + 3600 * SECOND), state.progress(now_ns))

    def test_the_end_may_go_missing(self) -> None:
        last_words = ("results_exported", "benchmark_complete", "worker_startup_state", "system_state_changed")
        for name in ("run_0_13_success", "run_0_13_cancelled", "run_0_13_duration_rate"):
            run = recording(name)
            while run[-1][0] in last_words:
                run.pop()
            self.assertEqual(replayed(run)[0].end, END_STATES[name].state, name)

    def test_the_last_results_may_go_missing(self) -> None:
        run = [message for message in recording("run_0_13_success") if message[0] != "process_all_results"]
        state, _ = replayed(run)
        self.assertEqual((state.end, state.metrics()["final"]), ("complete", True))

    def test_who_comes_late_still_learns_the_end(self) -> None:
        for name in ("run_0_3_success", "run_0_6_success", "run_0_13_success"):
            run = recording(name)
            state, now_ns = replayed(run[-8:])
            self.assertEqual(state.end, "complete", name)
            self.assertEqual(state.progress(now_ns)["percent_complete"], 100, name)


class LifeOfARunTests(unittest.TestCase):
    def setUp(self) -> None:
        self.state = aiperf_api.BenchmarkState()

    def test_before_the_first_message_everything_has_an_answer(self) -> None:
        found = answers(self.state, BASE_NS)
        self.assertEqual(found["status"]["state"], "waiting")
        self.assertFalse(found["status"]["stale"])
        self.assertIsNone(found["status"]["elapsed_sec"])
        self.assertEqual(found["results"], {"status": "running", "results": None})
        self.assertEqual(found["progress"]["percent_complete"], 0)
        self.assertEqual(found["metrics"]["metrics"], {})
        self.assertEqual(found["config"], {})
        self.assertEqual(self.state.late_errors, 0)

    def test_any_message_is_a_sign_of_life(self) -> None:
        self.assertEqual(self.state.apply("heartbeat", b"whatever", 5), aiperf_api.Change.STATUS)
        self.assertEqual(self.state.apply("heartbeat", b"whatever", 6), aiperf_api.Change.NONE)
        self.assertEqual(self.state.status(6)["state"], "initializing")
        self.assertEqual(self.state.last_message_ns, 6)

    def test_without_announced_states_the_commands_lead(self) -> None:
        seen = []
        for command in ("profile_configure", "profile_start", "profile_complete", "shutdown"):
            send(self.state, 1, "command", command=command)
            seen.append(self.state.status(1)["state"])
        self.assertEqual(seen, ["configuring", "profiling", "processing", "failed"])
        self.assertEqual(self.state.status(1)["error"], "ended before a request was sent")

    def test_a_state_of_the_future_is_shown_as_it_is(self) -> None:
        send(self.state, 1, "system_state_changed", state="defragmenting")
        self.assertEqual(self.state.status(1)["state"], "defragmenting")

    def test_completion_without_a_request_is_failure(self) -> None:
        change = send(self.state, 1, "benchmark_complete", was_cancelled=False)
        self.assertIn(aiperf_api.Change.ENDED, change)
        self.assertEqual(self.state.end, "failed")

    def test_completion_after_requests_is_completion(self) -> None:
        send_phase(self.state, 1, "progress", "profiling", requests_sent=1, requests_completed=1)
        send(self.state, 1, "benchmark_complete")
        self.assertEqual(self.state.end, "complete")

    def test_a_service_error_and_no_results_is_failure(self) -> None:
        send_phase(self.state, 1, "start", "profiling", start_ns=5)
        send(self.state, 1, "service_error", error={"type": "OSError", "message": "no disk"})
        self.assertEqual(self.state.status(1)["error"], "OSError: no disk")
        send(self.state, 1, "system_state_changed", state="shutdown")
        self.assertEqual(self.state.end, "failed")

    def test_a_cancel_command_and_a_shutdown_is_a_cancel(self) -> None:
        send_phase(self.state, 1, "progress", "profiling", requests_sent=1)
        send(self.state, 1, "command", command="profile_cancel")
        self.assertEqual(self.state.status(1)["state"], "stopping")
        self.assertIsNone(self.state.end)
        send(self.state, 1, "command", command="shutdown")
        self.assertEqual(self.state.end, "cancelled")

    def test_a_better_sign_corrects_the_end(self) -> None:
        send(self.state, 1, "system_state_changed", state="shutdown")
        self.assertEqual(self.state.end, "failed")
        change = send(self.state, 2, "benchmark_complete", was_cancelled=True)
        self.assertEqual(self.state.end, "cancelled")
        self.assertNotIn(aiperf_api.Change.ENDED, change)
        self.assertIsNone(self.state.status(2)["error"])

    def test_a_child_that_dies_without_a_word_has_failed(self) -> None:
        send_phase(self.state, 1, "start", "profiling", start_ns=5)
        self.assertIn(aiperf_api.Change.ENDED, self.state.end_child("killed by SIGKILL", 2))
        status = self.state.status(3)
        self.assertEqual((status["state"], status["error"]), ("failed", "killed by SIGKILL"))

    def test_a_child_that_dies_unheard_has_failed(self) -> None:
        self.state.end_child("exit status 1", 2)
        self.assertEqual(self.state.status(3)["error"], "exit status 1")

    def test_a_child_that_ends_well_after_reporting_is_complete(self) -> None:
        send(self.state, 1, "realtime_metrics", metrics=[{"tag": "t", "avg": 1}])
        self.state.end_child(None, 2)
        self.assertEqual(self.state.end, "complete")

    def test_a_child_that_ends_well_without_a_word_has_failed(self) -> None:
        self.state.end_child(None, 2)
        self.assertEqual(self.state.end, "failed")

    def test_the_exit_status_does_not_change_a_known_end(self) -> None:
        send_phase(self.state, 1, "progress", "profiling", requests_sent=1)
        send(self.state, 1, "benchmark_complete", was_cancelled=True)
        self.state.end_child("exit status 1", 2)
        self.assertEqual(self.state.end, "cancelled")

    def test_trailing_messages_do_not_reset_an_ended_run(self) -> None:
        records = [{"tag": "t", "avg": 1}]
        send(self.state, 1, "process_all_results", results={"results": {"records": records}})
        trailing: tuple[tuple[str, dict[str, Any]], ...] = (
            ("system_state_changed", {"state": "stopping"}),
            ("system_state_changed", {"state": "shutdown"}),
            ("worker_startup_state", {"startup_state": "shutting_down"}),
            ("results_exported", {}),
            ("benchmark_complete", {}),
            ("heartbeat", {}),
            ("command", {"command": "shutdown"}),
            ("command_response", {"command": "shutdown", "status": "failure"}),
            ("worker_status_summary", {"worker_statuses": {}}),
            ("process_records_result", {"results": {"results": {"records": []}}}),
        )
        for now_ns, (kind, fields) in enumerate(trailing):
            self.assertNotIn(aiperf_api.Change.NEW_RUN, send(self.state, now_ns, kind, **fields), kind)
        self.assertEqual(self.state.metrics()["metrics"], {"t": {"avg": 1}})

    def test_the_first_sign_of_another_run_resets_an_ended_one(self) -> None:
        for kind, fields in (
            ("system_state_changed", {"state": "initializing"}),
            ("system_state_changed", {"state": "profiling"}),
            ("worker_startup_state", {"startup_state": "starting"}),
            ("command", {"command": "register_service"}),
            ("command", {"command": "spawn_workers"}),
            ("command", {"command": "profile_configure"}),
            ("credit_phase_start", {"stats": {"phase": "profiling", "start_ns": 5}}),
            ("credit_phase_progress", {"stats": {"phase": "another"}}),
        ):
            state = aiperf_api.BenchmarkState()
            send_phase(state, 1, "start", "profiling", start_ns=5)
            send(state, 1, "process_all_results", results={"results": {"records": [{"tag": "t", "avg": 1}]}})
            change = send(state, 2, kind, **fields)
            self.assertIn(aiperf_api.Change.NEW_RUN, change, kind)
            self.assertNotIn(aiperf_api.Change.ENDED, change)
            self.assertIsNone(state.end)
            self.assertEqual(state.metrics()["metrics"], {})

    def test_a_phase_that_began_at_another_time_is_another_run(self) -> None:
        send_phase(self.state, 1, "start", "profiling", start_ns=5)
        self.assertNotIn(aiperf_api.Change.NEW_RUN, send_phase(self.state, 1, "progress", "profiling", start_ns=5))
        self.assertNotIn(aiperf_api.Change.NEW_RUN, send_phase(self.state, 1, "progress", "profiling"))
        self.assertIn(aiperf_api.Change.NEW_RUN, send_phase(self.state, 1, "progress", "profiling", start_ns=6))

    def test_silence_makes_a_registration_the_start_of_another_run(self) -> None:
        send_phase(self.state, 1, "start", "profiling", start_ns=5)
        change = send(self.state, 5 * SECOND, "worker_startup_state", startup_state="starting")
        self.assertNotIn(aiperf_api.Change.NEW_RUN, change)
        send(self.state, 20 * SECOND, "worker_status_summary", worker_statuses={})  # of the other run already
        change = send(self.state, 20 * SECOND, "worker_startup_state", startup_state="starting")
        self.assertIn(aiperf_api.Change.NEW_RUN, change)

    def test_a_run_that_goes_on_after_a_silence_is_still_the_same(self) -> None:
        send_phase(self.state, 1, "start", "profiling", start_ns=5)
        send_phase(self.state, 60 * SECOND, "progress", "profiling", start_ns=5, requests_sent=1)
        change = send(self.state, 61 * SECOND, "worker_startup_state", startup_state="starting")
        self.assertNotIn(aiperf_api.Change.NEW_RUN, change)


class ProgressTests(unittest.TestCase):
    def setUp(self) -> None:
        self.state = aiperf_api.BenchmarkState()

    def test_the_warmup_shows_until_profiling_begins_but_is_no_progress_of_it(self) -> None:
        send_phase(self.state, 1, "start", "warmup", start_ns=1, total_expected_requests=10)
        send_phase(self.state, 2, "complete", "warmup", start_ns=1, requests_completed=10, requests_end_ns=2)
        progress = self.state.progress(2)
        self.assertEqual((progress["total"], progress["completed"], progress["warmup"]), (10, 10, True))
        self.assertEqual(progress["percent_complete"], 0)
        self.assertEqual(progress["phases"]["warmup"]["percent_complete"], 100)
        send_phase(self.state, 3, "start", "profiling", start_ns=3, total_expected_requests=40)
        progress = self.state.progress(3)
        self.assertEqual((progress["total"], progress["completed"], progress["warmup"]), (40, 0, False))

    def test_profiling_phases_are_summed(self) -> None:
        for index, total in enumerate((100, 300)):
            name, start_ns = f"step{index}", (1 + index) * SECOND
            stats = {
                "phase_name": name,
                "phase_kind": "profiling",
                "start_ns": start_ns,
                "total_expected_requests": total,
            }
            if index == 0:
                configs = [
                    {"phase": "profiling", "phase_name": f"step{i}", "total_expected_requests": n}
                    for i, n in ((0, 100), (1, 300))
                ]
                send(self.state, 1, "credit_phases_configured", configs=configs)
            send_phase(self.state, start_ns, "start", "profiling", **stats)
            done = {"requests_sent": total, "requests_completed": total, "requests_end_ns": start_ns + SECOND // 2}
            send_phase(self.state, start_ns + SECOND // 2, "complete", "profiling", **stats, **done)
            progress = self.state.progress(start_ns + SECOND // 2)
            self.assertEqual(progress["percent_complete"], (25, 100)[index])
            self.assertEqual(progress["completed"], (100, 400)[index])
            self.assertEqual(progress["total"], 400)
        self.assertEqual(list(progress["phases"]), ["step0", "step1"])
        self.assertEqual(progress["elapsed_ns"], SECOND)
        self.assertEqual(self.state.status(1)["phase"], "step1")

    def test_a_run_by_duration_counts_time(self) -> None:
        begin = 100 * SECOND
        send_phase(self.state, begin, "start", "profiling", start_ns=begin, expected_duration_sec=20)
        progress = self.state.progress(begin + 5 * SECOND)
        self.assertIsNone(progress["total"])
        self.assertEqual((progress["percent_complete"], progress["eta_sec"]), (25, 15))
        self.assertEqual(progress["elapsed_ns"], 5 * SECOND)

    def test_the_time_left_follows_from_the_pace(self) -> None:
        begin = 100 * SECOND
        send_phase(self.state, begin, "start", "profiling", start_ns=begin, total_expected_requests=100)
        self.assertIsNone(self.state.progress(begin)["eta_sec"])
        send_phase(self.state, begin + SECOND, "progress", "profiling", requests_completed=25)
        progress = self.state.progress(begin + SECOND)
        self.assertAlmostEqual(progress["eta_sec"], 3)
        self.assertAlmostEqual(progress["phases"]["profiling"]["requests_per_second"], 25)

    def test_a_different_clock_is_told_from_the_messages(self) -> None:
        theirs, ours = 5 * SECOND, BASE_NS
        send_phase(self.state, ours, "start", "profiling", start_ns=theirs, expected_duration_sec=10)
        self.assertEqual(self.state.progress(ours + SECOND)["elapsed_ns"], SECOND)
        send(
            self.state,
            ours + 2 * SECOND,
            "processing_stats",
            request_ns=theirs + 4 * SECOND,
            processing_stats={"errors": 0},
        )
        self.assertEqual(self.state.progress(ours + 2 * SECOND)["elapsed_ns"], 4 * SECOND)

    def test_who_comes_late_counts_from_then_on(self) -> None:
        send_phase(self.state, BASE_NS, "progress", "profiling", start_ns=5, requests_completed=1)
        self.assertEqual(self.state.progress(BASE_NS + 3 * SECOND)["elapsed_ns"], 3 * SECOND)

    def test_progress_is_never_taken_back(self) -> None:
        send_phase(self.state, 1, "start", "profiling", start_ns=1, total_expected_requests=100)
        send_phase(self.state, 2, "progress", "profiling", requests_completed=50)
        self.assertEqual(self.state.progress(2)["percent_complete"], 50)
        send_phase(self.state, 3, "progress", "profiling", requests_completed=10, total_expected_requests=1000)
        self.assertEqual(self.state.progress(3)["percent_complete"], 50)
        self.assertEqual(self.state.progress(3)["completed"], 50)

    def test_errors_come_from_whichever_counter_has_them(self) -> None:
        send_phase(self.state, 1, "start", "profiling", start_ns=1, total_expected_requests=100, request_errors=0)
        send(self.state, 1, "processing_stats", processing_stats={"phase": "profiling", "error_records": 4})
        self.assertEqual(self.state.progress(1)["errors"], 4)

    def test_flat_and_nested_phases_have_one_shape(self) -> None:
        flat, nested = aiperf_api.BenchmarkState(), aiperf_api.BenchmarkState()
        common = {"phase": "profiling", "start_ns": 5, "total_expected_requests": 9, "expected_duration_sec": None}
        send(flat, 5, "credit_phase_start", **common)
        send(flat, 6, "credit_phase_progress", phase="profiling", sent=5, completed=4)
        send(flat, 7, "credit_phase_complete", phase="profiling", completed=9, end_ns=7, final_request_count=9)
        send_phase(nested, 5, "start", "profiling", **common)
        send_phase(nested, 6, "progress", "profiling", requests_sent=5, requests_completed=4)
        done = {"requests_completed": 9, "final_requests_completed": 9, "requests_end_ns": 7}
        send_phase(nested, 7, "complete", "profiling", **done)
        self.assertEqual(flat.progress(8), nested.progress(8))

    def test_what_a_later_version_adds_to_a_phase_passes_through(self) -> None:
        send_phase(self.state, 1, "start", "profiling", start_ns=1, sla={"p99": 5}, sent_sessions=3)
        self.assertLessEqual(
            {"sla": {"p99": 5}, "sent_sessions": 3}.items(), self.state.progress(1)["phases"]["profiling"].items()
        )

    def test_a_publisher_of_endless_phases_is_bounded(self) -> None:
        for index in range(aiperf_api.MAX_PHASES + 10):
            send_phase(self.state, 1, "start", f"p{index}", start_ns=1)
        self.assertEqual(len(self.state.progress(1)["phases"]), aiperf_api.MAX_PHASES)


class WorkerTests(unittest.TestCase):
    def setUp(self) -> None:
        self.state = aiperf_api.BenchmarkState()

    def test_a_worker_is_put_together_from_its_messages(self) -> None:
        send(
            self.state,
            1,
            "worker_status_summary",
            worker_statuses={"w1": "healthy", "w2": "idle"},
            worker_startup_states={"w1": "ready"},
        )
        send(
            self.state,
            2,
            "worker_health",
            service_id="w1",
            health={"cpu_usage": 7.0},
            task_stats={"total": 5, "failed": None},
        )
        stats = {"w1": {"processed": 3, "errors": 1}, "w3": {"success_records": 2, "error_records": 0}}
        send(self.state, 3, "processing_stats", processing_stats={"errors": 1}, worker_stats=stats)
        workers = self.state.workers()
        self.assertEqual((workers["total_workers"], workers["active_workers"]), (3, 1))
        self.assertEqual(workers["worker_statuses"], {"w1": "healthy", "w2": "idle", "w3": "idle"})
        self.assertEqual(
            workers["workers"]["w1"],
            {
                "status": "healthy",
                "startup_state": "ready",
                "task_stats": {"total": 5, "completed": 0, "failed": 0},
                "processing_stats": {"success_records": 3, "error_records": 1},
                "health": {"cpu_usage": 7.0},
                "last_update_ns": 2,
            },
        )

    def test_groups_bring_their_workers(self) -> None:
        group = {"group_id": "g", "status": "healthy", "declared_workers": 2, "worker_statuses": {"w": "stale"}}
        send(self.state, 1, "worker_group_stats", **group, worker_task_stats={"w": {"total": 4}}, later=1)
        workers = self.state.workers()
        self.assertEqual(
            workers["worker_groups"], {"g": {**group, "worker_task_stats": {"w": {"total": 4}}, "later": 1}}
        )
        self.assertEqual(workers["workers"]["w"]["task_stats"]["total"], 4)
        self.assertEqual(workers["active_workers"], 0)

    def test_endless_workers_are_bounded(self) -> None:
        statuses = {f"w{index}": "idle" for index in range(aiperf_api.MAX_WORKERS + 10)}
        send(self.state, 1, "worker_status_summary", worker_statuses=statuses)
        self.assertEqual(self.state.workers()["total_workers"], aiperf_api.MAX_WORKERS)


class ConfigurationTests(unittest.TestCase):
    def test_every_spelling_tells_the_identity(self) -> None:
        wanted = {"model": "a,b", "endpoint_type": "chat", "streaming": True, "concurrency": 8, "request_rate": 2.5}
        for config in (
            {
                "endpoint": {"model_names": ["b", "a"], "type": "chat", "streaming": True},
                "loadgen": {"concurrency": 8, "request_rate": 2.5},
            },
            {
                "modelNames": ["b", "a"],
                "endpointType": "chat",
                "streaming": "true",
                "concurrency": "8",
                "requestRate": "2.5",
            },
            {"model": "a,b", "endpoint-type": "chat", "streaming": True, "concurrency": 8.0, "request-rate": 2.5},
            {
                "benchmark": {
                    "models": {"items": [{"name": "b"}, {"name": "a"}]},
                    "endpoint": {"type": "chat", "streaming": True},
                    "phases": [
                        {"name": "warmup", "concurrency": 1},
                        {"name": "profiling", "concurrency": 8, "rate": 2.5},
                    ],
                }
            },
            {
                "input_config": {
                    "models": ["a", "b"],
                    "endpoint": {"type": "chat", "streaming": True},
                    "phases": {"warmup": {"concurrency": 1}, "profiling": {"concurrency": 8, "request_rate": 2.5}},
                }
            },
        ):
            with self.subTest(config):
                self.assertEqual(aiperf_api.identity_of(config), wanted)

    def test_nonsense_tells_nothing(self) -> None:
        for value in (None, [], "", {}, [None], {"x": None}, -1, True):
            config = dict.fromkeys(
                ("endpoint", "loadgen", "phases", "models", "concurrency", "benchmark", "rate"), value
            )
            self.assertLessEqual(aiperf_api.identity_of(config).keys(), {"concurrency"} - {"concurrency"})

    def test_origins_have_a_rank_and_complete_each_other(self) -> None:
        state = aiperf_api.BenchmarkState()
        send_phase(state, 1, "start", "profiling", start_ns=1)
        config = {"stats": {"phase": "profiling", "start_ns": 1}, "config": {"concurrency": 1, "request_rate": 9}}
        send(state, 1, "credit_phase_start", **config)
        self.assertEqual(state.config_answer(), {"phases": {"profiling": {"concurrency": 1, "request_rate": 9}}})
        state.configure({"model": "from-command", "concurrency": 2}, "command")
        self.assertEqual(state.labels(), {"model": "from-command", "concurrency": "2", "request_rate": "9.0"})
        state.configure({"concurrency": 3}, "file")
        self.assertEqual(state.labels(), {"model": "from-command", "concurrency": "3", "request_rate": "9.0"})
        self.assertEqual(state.config_answer(), {"concurrency": 3})

    def test_a_configuration_from_outside_outlives_the_run(self) -> None:
        state = aiperf_api.BenchmarkState()
        state.configure({"model": "m", "aiperf_version": "0.13.0"}, "file")
        send_phase(state, 1, "start", "profiling", start_ns=1)
        send_phase(state, 1, "start", "profiling", start_ns=2)
        self.assertEqual((state.labels(), state.metrics()["aiperf_version"]), ({"model": "m"}, "0.13.0"))

    def test_an_unknown_origin_is_a_mistake_of_the_caller(self) -> None:
        with self.assertRaises(ValueError):
            aiperf_api.BenchmarkState().configure({}, "hearsay")


class LateReadingTests(unittest.TestCase):
    def setUp(self) -> None:
        self.state = aiperf_api.BenchmarkState()

    def metrics(self, value: float) -> bytes:
        return json.dumps({"metrics": [{"tag": "t", "avg": value}]}).encode()

    def test_the_latest_message_counts_however_fast_they_come(self) -> None:
        for index in range(1000):
            self.state.apply("realtime_metrics", self.metrics(index), BASE_NS + index)
        self.assertEqual(self.state.metrics()["metrics"], {"t": {"avg": 999}})

    def test_a_bad_message_is_refused_and_changes_nothing(self) -> None:
        self.state.apply("realtime_metrics", self.metrics(1), BASE_NS)
        for payload in (b"{", b"[]", b"\xff", b'{"metrics":{}}', b""):
            with self.assertRaises(aiperf_api.BusMessageError):
                self.state.apply("realtime_metrics", payload, BASE_NS + SECOND)
        self.assertEqual(self.state.metrics()["metrics"], {"t": {"avg": 1}})
        self.assertEqual(self.state.last_message_ns, BASE_NS)

    def test_a_bad_message_among_fast_ones_is_counted_when_it_is_read(self) -> None:
        self.state.apply("realtime_metrics", self.metrics(1), BASE_NS)
        self.state.apply("realtime_metrics", b"{", BASE_NS + 1)
        self.assertEqual(self.state.late_errors, 0)
        self.assertEqual(self.state.metrics()["metrics"], {"t": {"avg": 1}})
        self.assertEqual(self.state.late_errors, 1)
        self.assertEqual(self.state.metrics()["metrics"], {"t": {"avg": 1}})
        self.assertEqual(self.state.late_errors, 1)
        send_phase(self.state, BASE_NS, "start", "profiling", start_ns=1)
        send_phase(self.state, BASE_NS, "start", "profiling", start_ns=2)
        self.assertEqual(self.state.late_errors, 1)


class HistoryTests(unittest.TestCase):
    def setUp(self) -> None:
        self.state = aiperf_api.BenchmarkState()

    def send_metrics(self, now_ns: int, *rows: dict[str, Any]) -> None:
        send(self.state, now_ns, "realtime_metrics", metrics=list(rows))

    def points(self, tag: str, stat: str = "avg", since_ns: Optional[int] = None) -> list[list[float]]:
        return cast("list[list[float]]", (self.state.history([tag], [stat], since_ns) or {})["points"])

    def test_a_series_is_in_display_units(self) -> None:
        self.send_metrics(BASE_NS, {"tag": "request_latency", "header": "L", "unit": "ns", "avg": 5e6, "count": 2})
        self.assertEqual(
            self.state.history(["request_latency"], ["avg"]),
            {
                "tag": "request_latency",
                "stat": "avg",
                "unit": "ms",
                "header": "L",
                "interval_sec": 1.0,
                "points": [[BASE_NS, 5.0]],
            },
        )
        series = (self.state.history(["request_latency"]) or {})["series"]
        self.assertEqual([(one["stat"], one["unit"]) for one in series], [("avg", "ms"), ("count", "")])

    def test_what_is_unknown_is_none(self) -> None:
        self.send_metrics(BASE_NS, {"tag": "t", "avg": 1})
        for tags, stats in ((["x"], []), (["t", "x"], []), (["t"], ["max"])):
            self.assertIsNone(self.state.history(tags, stats))

    def test_points_are_no_closer_than_a_second(self) -> None:
        for index in range(100):
            self.send_metrics(BASE_NS + index * SECOND // 10, {"tag": "t", "avg": index})
        self.assertEqual([value for _, value in self.points("t")], list(range(0, 100, 10)))

    def test_messages_a_little_early_do_not_halve_the_pace(self) -> None:
        for index in range(100):
            self.send_metrics(BASE_NS + index * SECOND + (index * 37 % 11) * 1_000_000, {"tag": "t", "avg": index})
        self.assertGreater(len(self.points("t")), 90)

    def test_rows_may_come_and_go(self) -> None:
        for index, tags in enumerate(("a", "ab", "b", "ba")):
            self.send_metrics(BASE_NS + index * SECOND, *({"tag": tag, "avg": index} for tag in tags))
        self.assertEqual([value for _, value in self.points("a")], [0, 1, 3])
        self.assertEqual([value for _, value in self.points("b")], [1, 2, 3])

    def test_only_points_after_since_are_given(self) -> None:
        for index in range(5):
            self.send_metrics(BASE_NS + index * SECOND, {"tag": "t", "avg": index})
        self.assertEqual([value for _, value in self.points("t", since_ns=BASE_NS + 2 * SECOND)], [3, 4])
        self.assertEqual(self.points("t", since_ns=BASE_NS + 9 * SECOND), [])

    def test_two_hours_and_more_stay_bounded_and_even(self) -> None:
        group = aiperf_api.SeriesGroup()
        for index in range(20_000):
            if group.is_due(index * SECOND):
                group.sample(index * SECOND, {"t": {"avg": index}})
            self.assertLess(len(group.times), aiperf_api.HISTORY_MAX_POINTS)
        self.assertEqual(group.interval_ns, 4 * SECOND)
        times = list(group.times)
        self.assertEqual({after - before for before, after in zip(times, times[1:])}, {group.interval_ns})
        self.assertEqual(group.points("t", "avg", None), [[time, time / SECOND] for time in times])

    def test_a_slow_publisher_is_thinned_evenly_too(self) -> None:
        group = aiperf_api.SeriesGroup()
        for index in range(10_000):
            if group.is_due(index * 5 * SECOND):
                group.sample(index * 5 * SECOND, {"t": {"avg": index}})
        times = list(group.times)
        self.assertEqual({after - before for before, after in zip(times, times[1:])}, {10 * SECOND})

    def test_series_are_bounded(self) -> None:
        group = aiperf_api.SeriesGroup()
        group.sample(1, {f"t{index}": {"avg": 1} for index in range(aiperf_api.HISTORY_MAX_SERIES + 10)})
        self.assertEqual(len(group.columns), aiperf_api.HISTORY_MAX_SERIES)

    def test_a_clock_set_back_leaves_the_times_rising(self) -> None:
        for now_ns in (BASE_NS, BASE_NS - SECOND, BASE_NS, BASE_NS + SECOND):
            self.send_metrics(now_ns, {"tag": "t", "avg": 1})
        self.assertEqual([time for time, _ in self.points("t")], [BASE_NS, BASE_NS + SECOND])

    def test_phases_are_series_and_their_end_shows(self) -> None:
        send_phase(self.state, BASE_NS, "start", "profiling", start_ns=1)
        send_phase(self.state, BASE_NS + SECOND, "progress", "profiling", requests_sent=9, requests_completed=4)
        end = BASE_NS + SECOND + SECOND // 5
        send_phase(self.state, end, "complete", "profiling", requests_sent=9, requests_completed=9, request_errors=2)
        self.assertEqual(self.points("phase:profiling", "completed"), [[BASE_NS, 0], [end, 9]])
        self.assertEqual(self.points("phase:profiling", "errors")[-1], [end, 2])
        self.assertEqual(self.points("phase:profiling", "in_flight")[-1], [end, 0])

    @needs_recordings
    def test_telemetry_and_server_metrics_are_series(self) -> None:
        state, _ = replayed(recording("run_0_13_gpu_and_server_metrics"))
        tags = (state.history() or {})["tags"]
        self.assertEqual({about["group"] for about in tags.values()}, {"metrics", "telemetry", "server", "phase"})
        server = 'server:127.0.0.1:18051:vllm:num_requests_running{engine="0",model_name="mock"}'
        self.assertIn("avg", tags[server]["stats"])
        gpu = "nvidia_power_usage_dcgm_http___127_0_0_1_19400_metrics_gpu1_GPU-8f1c7a52"
        self.assertEqual(tags[gpu]["unit"], "W")
        both = state.history([server, gpu], ["avg"]) or {}
        self.assertEqual([one["tag"] for one in both["series"]], [server, gpu])


class BadMessageTests(unittest.TestCase):
    WRONG: tuple[Any, ...] = (
        None,
        [],
        {},
        "text",
        -1,
        0.5,
        True,
        [[]],
        [None],
        [{"tag": None}],
        {"a": {"b": None}},
        2**64,
        "\ud83d",
    )

    def examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the first message of each type of each generation, its lists cut to what is quick to go through."""
        seen = set()
        for name in (
            "run_0_13_gpu_and_server_metrics",
            "run_0_3_success",
            "run_0_12_failed_configure",
            "run_0_6_success",
        ):
            for kind, payload, _ in recording(name):
                message = self.cut(json.loads(payload), 0)
                key = (kind, name[:9], message.get("command"))
                if kind in aiperf_api.CORE_MESSAGE_TYPES and key not in seen:
                    seen.add(key)
                    yield kind, message
        yield "worker_group_stats", {"group_id": "g", "worker_statuses": {"w": "idle"}, "worker_health": {"w": {}}}
        yield "service_error", {"error": {"type": "T", "message": "m"}}
        yield "credit_phases_configured", {"configs": [{"phase": "profiling", "total_expected_requests": 5}]}

    def cut(self, value: Any, depth: int) -> Any:
        if isinstance(value, list):
            return [self.cut(inner, depth) for inner in value[:1]]
        if isinstance(value, dict):
            kept = itertools.islice(value.items(), 24 if depth < 4 else 3)
            return {key: self.cut(inner, depth + 1) for key, inner in kept}
        return value

    def mutations(self, value: Any) -> Iterator[Any]:
        """Yield the value with each of its parts replaced by each of the wrong things, or missing."""
        if isinstance(value, dict):
            for key, inner in value.items():
                yield {other: part for other, part in value.items() if other != key}
                yield from ({**value, key: wrong} for wrong in self.WRONG)
                yield from ({**value, key: mutated} for mutated in self.mutations(inner))
        elif isinstance(value, list) and value:
            yield from ([wrong] for wrong in self.WRONG)
            yield from ([mutated] for mutated in self.mutations(value[0]))

    @needs_recordings
    def test_wrong_types_anywhere_break_nothing(self) -> None:
        for kind, message in self.examples():
            with self.subTest(kind):
                state = aiperf_api.BenchmarkState()
                state.apply(kind, json.dumps(message).encode(), BASE_NS)
                for index, mutated in enumerate(self.mutations(message), 1):
                    payload = json.dumps(mutated).encode()
                    with contextlib.suppress(aiperf_api.BusMessageError):
                        state.apply(kind, payload, BASE_NS + index * SECOND // 5)
                    answers(state, BASE_NS + index * SECOND // 5)
                    if index % 16 == 0:
                        families = aiperf_api.state_families(state, BASE_NS + index * SECOND // 5)
                        aiperf_api.render_openmetrics(families)
                        state = aiperf_api.BenchmarkState()

    @needs_recordings
    def test_nulls_everywhere_break_nothing(self) -> None:
        def nulled(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: nulled(inner) for key, inner in value.items()}
            return [nulled(inner) for inner in value] if isinstance(value, list) else None

        state = aiperf_api.BenchmarkState()
        for kind, message in self.examples():
            with contextlib.suppress(aiperf_api.BusMessageError):
                state.apply(kind, json.dumps(nulled(message)).encode(), BASE_NS)
            text = aiperf_api.render_text(aiperf_api.state_families(state, BASE_NS))
            self.assertNotIn(b"NaN", text)
            self.assertNotIn(b"None", text)
        answers(state, BASE_NS)

    def test_a_message_that_cannot_be_used_changes_nothing(self) -> None:
        state = aiperf_api.BenchmarkState()
        send_phase(state, 1, "start", "profiling", start_ns=1)
        before = answers(state, 2)
        for kind in sorted(aiperf_api.CORE_MESSAGE_TYPES):
            for payload, error in (
                (b"", "not_json"),
                (b"\xff\xfe", "not_json"),
                (b"[1]", "not_object"),
                (b'"x"', "not_object"),
            ):
                with self.assertRaises(aiperf_api.BusMessageError) as caught:
                    state.apply(kind, payload, 2)
                self.assertEqual(caught.exception.kind, error, kind)
        for kind in ("credit_phase_start", "system_state_changed", "worker_health", "process_all_results", "command"):
            with self.assertRaises(aiperf_api.BusMessageError) as caught:
                state.apply(kind, b"{}", 2)
            self.assertEqual(caught.exception.kind, "bad_shape", kind)
        self.assertEqual(answers(state, 2), before)


class MessageTypeTests(unittest.TestCase):
    def test_the_lists_fit_together(self) -> None:
        known = aiperf_api.KNOWN_MESSAGE_TYPES
        self.assertLessEqual(aiperf_api.CORE_MESSAGE_TYPES, known)
        self.assertLessEqual(aiperf_api.STATE_MESSAGE_TYPES, known)
        self.assertLessEqual(aiperf_api.BUILTIN_MESSAGE_TYPES, aiperf_api.CORE_MESSAGE_TYPES)
        self.assertEqual(len(aiperf_api.BUILTIN_MESSAGE_TYPES), 8)

    def test_topics_are_prefixes_that_take_no_other_type(self) -> None:
        self.assertIn(b"command$", aiperf_api.CORE_TOPICS)
        self.assertIn(b"command.", aiperf_api.CORE_TOPICS)
        for topic in aiperf_api.CORE_TOPICS:
            others = [kind for kind in aiperf_api.KNOWN_MESSAGE_TYPES if kind.encode() != re.split(b"[.$]", topic)[0]]
            self.assertFalse([kind for kind in others if f"{kind}$".encode().startswith(topic)])

    @needs_recordings
    def test_the_recordings_hold_known_types_alone(self) -> None:
        for name in RECORDING_NAMES:
            self.assertLessEqual({kind for kind, _, _ in recording(name)}, aiperf_api.KNOWN_MESSAGE_TYPES)


class StateFamiliesTests(unittest.TestCase):
    def text(self, state: aiperf_api.BenchmarkState, now_ns: int = 1) -> list[str]:
        return sample_lines(aiperf_api.render_text(aiperf_api.state_families(state, now_ns)))

    def test_before_the_first_message_there_are_state_and_workers(self) -> None:
        lines = self.text(aiperf_api.BenchmarkState())
        self.assertIn('aiperf_benchmark_state{state="waiting"} 1', lines)
        self.assertIn('aiperf_benchmark_state{state="failed"} 0', lines)
        self.assertIn("aiperf_benchmark_stale 0", lines)
        self.assertIn('aiperf_workers{status="healthy"} 0', lines)
        self.assertFalse([line for line in lines if line.startswith("aiperf_info")])

    def test_the_state_is_one_of_all(self) -> None:
        state = aiperf_api.BenchmarkState()
        send(state, 1, "system_state_changed", state="new_kind")
        ones = [line for line in self.text(state) if line.startswith("aiperf_benchmark_state") and line.endswith(" 1")]
        self.assertEqual(ones, ['aiperf_benchmark_state{state="new_kind"} 1'])
        self.assertIn("aiperf_benchmark_stale 1", self.text(state, 60 * SECOND))

    def test_phases_and_workers_are_counted(self) -> None:
        state = aiperf_api.BenchmarkState()
        state.configure({"model": "m"}, "file")
        stats = {
            "start_ns": SECOND,
            "total_expected_requests": 8,
            "requests_sent": 5,
            "requests_completed": 4,
            "request_errors": 1,
        }
        send_phase(state, SECOND, "start", "profiling", **stats)
        send(state, SECOND, "worker_status_summary", worker_statuses={"w": "high_load"})
        send(state, SECOND, "worker_health", service_id="w", health={"cpu_usage": 90.5}, task_stats={"total": 5})
        lines = self.text(state, 2 * SECOND)
        for line in (
            'aiperf_info{model="m"} 1',
            'aiperf_phase_requests_sent_total{model="m",phase="profiling"} 5',
            'aiperf_phase_requests_completed_total{model="m",phase="profiling"} 4',
            'aiperf_phase_requests_errors_total{model="m",phase="profiling"} 1',
            'aiperf_phase_requests_cancelled_total{model="m",phase="profiling"} 0',
            'aiperf_phase_requests_expected{model="m",phase="profiling"} 8',
            'aiperf_progress_ratio{model="m"} 0.5',
            'aiperf_elapsed_seconds{model="m"} 1.0',
            'aiperf_eta_seconds{model="m"} 1.0',
            'aiperf_workers{model="m",status="high_load"} 1',
            'aiperf_workers{model="m",status="idle"} 0',
            'aiperf_worker_cpu_percent{model="m",worker="w"} 90.5',
            'aiperf_worker_tasks_total{model="m",worker="w"} 5',
        ):
            self.assertIn(line, lines)

    def test_identity_labels_are_those_of_the_exporter(self) -> None:
        state = aiperf_api.BenchmarkState()
        config = {
            "benchmark_id": "b",
            "model": "m",
            "endpoint_type": "chat",
            "streaming": True,
            "concurrency": 8,
            "request_rate": 5,
        }
        state.configure(config, "file")
        send(state, 1, "realtime_metrics", metrics=[{"tag": "t", "unit": "ms", "avg": 1.5}])
        labels = 'benchmark_id="b",model="m",endpoint_type="chat",streaming="true",concurrency="8",request_rate="5.0"'
        self.assertIn(f"aiperf_t_avg_ms{{{labels}}} 1.5", self.text(state))

    @needs_recordings
    def test_every_metric_of_a_message_is_there_with_its_value(self) -> None:
        """Each statistic by the exporter's rules, written down here once more."""
        state, now_ns = replayed(recording("run_0_13_gpu_and_server_metrics"))
        lines = set(self.text(state, now_ns))
        labels = ",".join(f'{name}="{value}"' for name, value in state.labels().items())
        for tag, row in state.metrics()["metrics"].items():
            unit = row["unit"].replace("%", "percent").replace("/", "_per_").replace("tokens_per_sec", "tps")
            unit = re.sub("[^a-z0-9_]", "_", unit.replace("__", "_").lower())
            if "p50" in row:
                self.assertIn(f'aiperf_{tag}_{unit}{{{labels},quantile="0.5"}} {row["p50"]}', lines)
            self.assertFalse("avg" in row and f"aiperf_{tag}_avg_{unit}{{{labels}}} {row['avg']}" not in lines, tag)
            self.assertFalse(
                "p50" in row and "sum" in row and f"aiperf_{tag}_{unit}_sum{{{labels}}} {row['sum']}" not in lines
            )

    @needs_recordings
    @unittest.skipUnless(prometheus_client, "needs the prometheus_client package")
    def test_an_independent_parser_reads_both_formats_as_a_run_goes_on(self) -> None:
        for name in RECORDING_NAMES:
            state, seen = aiperf_api.BenchmarkState(), set()
            messages = recording(name)
            for index, (kind, payload, now_ns) in enumerate(messages, 1):
                state.apply(kind, payload, now_ns)
                if kind not in seen or index == len(messages):  # each kind changes what there is; all of them take long
                    seen.add(kind)
                    text, openmetrics = parsed(aiperf_api.state_families(state, now_ns))
                    self.assertEqual(text, openmetrics)
                    self.assertFalse([series for series, value in text.items() if value != value], "NaN")


# == 11 == Sources =====================================================================================================


# == 12 == Hub =========================================================================================================


# == 13 == Connection ==================================================================================================


# == 14 == Endpoints and service =======================================================================================


# == 15 == Command line ================================================================================================


if __name__ == "__main__":
    unittest.main()
