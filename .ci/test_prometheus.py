# SPDX-License-Identifier: Apache-2.0
"""Prometheus itself scrapes a replayed run: needs `prometheus`, `promtool`, `curl` and prometheus_client."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import math
import re
import signal
import subprocess
import tempfile
import time
import unittest
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from processes import free_port, serving
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

ROOT = Path(__file__).resolve().parent.parent
RECORDINGS = [ROOT / "static" / "demo.jsonl.gz", *sorted((ROOT / ".ci").rglob("*.jsonl.gz"))]
DASHBOARD = ROOT / "static" / "grafana-dashboard.json"
OPENMETRICS = "application/openmetrics-text;version=1.0.0"
ENDED = ("--replay", str(RECORDINGS[0]), "--replay-speed", "0")
ADVICE = 3  # promtool's exit code when it parsed everything and has advice on names
# Names that AIPerf or the inference server gives are theirs; advice on ours is a fault.
OUR_OWN_NAMES = re.compile("aiperf_(api|benchmark_sta|elapsed|eta|info|phase|progress|workers)")
WAIT_SEC = 90
SPEED = 4  # times as fast as it was recorded: the run of 40 s is scraped some ten times

T = TypeVar("T")
Sample = tuple[str, frozenset[tuple[str, str]]]  # name and labels: what makes a series


def fetch(url: str, **headers: str) -> str:
    """Return the body of a GET."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return str(answer.read().decode())


def wait_for(what: str, ask: Callable[[], T | None]) -> T:
    """Ask again until there is an answer; fail when there is none in time."""
    deadline = time.monotonic() + WAIT_SEC
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            answer = ask()
            if answer:
                return answer
        time.sleep(0.05)
    raise AssertionError(f"waited {WAIT_SEC} s in vain for {what}")


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for as long as the block lasts; its output goes to `log`."""
    with open(log, "wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def has_state(url: str, state: str) -> bool:
    """Whether the run that the server watches is in a state."""
    return bool(json.loads(fetch(url + "/api/status"))["state"] == state)


def samples(text: str, parse: Callable[[str], Any] = parse_text) -> dict[Sample, float]:
    """Return each sample of an exposition, refusing a series that is there twice."""
    found: dict[Sample, float] = {}
    for family in parse(text):
        for sample in family.samples:
            series = (sample.name, frozenset(sample.labels.items()))
            assert series not in found, f"twice: {series}"
            found[series] = sample.value
    return found


def length_sec(recording: Path) -> float:
    """How long the recorded run took."""
    with gzip.open(recording, "rt", encoding="utf-8") as file:
        times = [json.loads(line)["t"] for line in file if '"topic"' in line]
    return float(times[-1] - times[0]) / 1e9


class TestExposition(unittest.TestCase):
    """Both formats, through independent parsers, while recordings are played."""

    def test_both_parsers_accept_both_formats_all_through_every_recording(self) -> None:
        times = 0
        for recording in RECORDINGS:
            options = ("--replay", str(recording), "--replay-speed", f"{length_sec(recording):.2f}")
            with self.subTest(recording.name), serving(*options) as url:
                times += self._parse_until_the_end(url)
        self.assertGreater(times, 2 * len(RECORDINGS))  # not only at the end

    def _parse_until_the_end(self, url: str) -> int:
        """Parse again and again, the end included; returns how often."""
        times = 0
        ended = False
        while not ended:
            status = json.loads(fetch(url + "/api/status"))
            ended = status["state"] in {"complete", "cancelled", "failed"} or status["stale"]
            text, openmetrics = fetch(url + "/metrics"), fetch(url + "/metrics", Accept=OPENMETRICS)
            self.assertTrue(samples(text))
            self.assertNotIn("NaN", text)
            self.assertTrue(samples(openmetrics, parse_openmetrics))
            self.assertTrue(openmetrics.endswith("\n# EOF\n"))
            times += 1
        return times

    def test_promtool_accepts_what_is_there_before_and_after_a_run(self) -> None:
        nothing = ("--zmq-bind", "tcp://127.0.0.1:*")
        for state, options in (("waiting", nothing), ("complete", ENDED)):
            with self.subTest(state), serving(*options) as url:
                wait_for(state, functools.partial(has_state, url, state))
                self._check_with_promtool(fetch(url + "/metrics"))

    def _check_with_promtool(self, text: str) -> None:
        command = ["promtool", "check", "metrics"]
        checked = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)
        self.assertIn(checked.returncode, (0, ADVICE), checked.stderr)
        advice = [line for line in checked.stderr.splitlines() if OUR_OWN_NAMES.match(line)]
        self.assertEqual(advice, [])


class ScrapedRun:
    """A run replayed from its start in front of a Prometheus, which is still there to be asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.api = ""
        self.prometheus = f"http://127.0.0.1:{free_port()}"
        self.log = folder / "prometheus.log"

    @contextlib.contextmanager
    def played(self) -> Iterator[ScrapedRun]:
        """Start both, wait until the end of the run is in Prometheus."""
        targets = self.folder / "targets.json"
        config = {
            "job_name": "aiperf",
            "scrape_interval": "1s",
            "scrape_timeout": "1s",
            "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}],
        }
        (self.folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": [config]}))  # JSON is YAML
        address = urllib.parse.urlsplit(self.prometheus).netloc
        command = ["prometheus", f"--config.file={self.folder}/prometheus.yml", f"--web.listen-address={address}"]
        command += [f"--storage.tsdb.path={self.folder}/tsdb", "--log.level=debug"]
        with running(command, self.log):
            wait_for("Prometheus", lambda: fetch(self.prometheus + "/-/ready"))
            options = ("--replay", str(RECORDINGS[0]), "--replay-speed", str(SPEED))
            with serving(*options) as self.api:
                written = targets.with_suffix(".new")  # renamed when whole, for Prometheus is already looking
                written.write_text(json.dumps([{"targets": [urllib.parse.urlsplit(self.api).netloc]}]))
                written.rename(targets)
                wait_for("a complete run", lambda: self.query('aiperf_benchmark_state{state="complete"} == 1'))
                self.settle()
                yield self

    def settle(self) -> None:
        """Wait for two more scrapes, so that the last figures are in."""
        before = self.scrapes()
        wait_for("two scrapes", lambda: self.scrapes() >= before + 2)

    def scrapes(self) -> float:
        """Return how often the server was scraped."""
        answer = self.query("count_over_time(up[10m])")
        return float(answer[0]["value"][1]) if answer else 0

    def query(self, expression: str) -> list[Any]:
        """Return the result of an instant query."""
        url = f"{self.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        return list(json.loads(fetch(url))["data"]["result"])

    def range(self, expression: str) -> list[Any]:
        """Return the result of a query over the last two minutes, each second."""
        now = time.time()
        asked = urllib.parse.urlencode({"query": expression, "start": now - 120, "end": now, "step": "1"})
        return list(json.loads(fetch(f"{self.prometheus}/api/v1/query_range?{asked}"))["data"]["result"])


class TestPrometheus(unittest.TestCase):
    """What a real Prometheus holds after it scraped a run from its start to its end."""

    run_: ScrapedRun

    @classmethod
    def setUpClass(cls) -> None:
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cls.run_ = stack.enter_context(ScrapedRun(folder).played())

    def test_every_scrape_succeeded(self) -> None:
        self.assertGreater(self.run_.scrapes(), 6)
        [up] = self.run_.query("min_over_time(up[10m])")
        self.assertEqual(up["value"][1], "1")

    def test_no_sample_was_refused(self) -> None:
        own = samples(fetch(self.run_.prometheus + "/metrics"))
        refused = {
            name: value
            for (name, _), value in own.items()
            if re.search(r"target_scrapes_(exceeded|sample_)|tsdb_(out_of_(order|bound)|too_old)", name) and value
        }
        self.assertEqual(refused, {})
        complaints = re.findall(r"^.*level=(?:warn|error).*$", self.run_.log.read_text(), re.MULTILINE)
        self.assertEqual([line for line in complaints if "component=tsdb" not in line], [])

    def test_promtool_returns_the_values_of_the_api(self) -> None:
        expected = samples(fetch(self.run_.api + "/metrics"))
        held = self._held()
        for series, value in expected.items():
            if series[0].startswith(("aiperf_api_", "process_", "python_")):
                continue  # our own health changes with each scrape
            with self.subTest(series=series):
                self.assertIn(series, held)
                self.assertTrue(math.isclose(held[series], value, rel_tol=1e-12), (held[series], value))

    def test_the_api_and_prometheus_agree_on_every_statistic(self) -> None:
        held = {(name, dict(labels).get("quantile")): value for (name, labels), value in self._held().items()}
        metrics = json.loads(fetch(self.run_.api + "/api/metrics"))["metrics"]
        self.assertGreater(len(metrics), 20)
        for tag, row in metrics.items():
            unit = row["unit"].replace("%", "percent").replace("/", "_per_").replace("tokens_per_sec", "tps").lower()
            unit = re.sub(r"[^a-z0-9_]", "_", unit)
            for statistic, value in row.items():
                name: tuple[str, str | None] = (f"aiperf_{tag}_{statistic}_{unit}", None)
                if re.fullmatch(r"p\d+", statistic):
                    name = (f"aiperf_{tag}_{unit}", f"{int(statistic[1:]) / 100:g}")
                if name in held and isinstance(value, (int, float)):
                    self.assertTrue(math.isclose(held[name], value, rel_tol=1e-12), (name, held[name], value))
                else:
                    self.assertIn(statistic, {"header", "unit", "count", "sum"}, name)

    def test_every_query_of_the_grafana_dashboard_shows_something(self) -> None:
        dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
        queries = [(panel, target) for panel in dashboard["panels"] for target in panel.get("targets", ())]
        self.assertGreater(len(queries), 40)
        for panel, target in queries:
            expression = re.sub(r"\$(job|instance|benchmark_id)\b", ".*", target["expr"])
            with self.subTest(panel=panel["title"], query=expression):
                found = self.run_.range(expression)
                self.assertTrue(found, "no data")
                labels = set.intersection(*(set(series["metric"]) for series in found))
                self.assertLessEqual(set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])), labels)

    def test_the_variables_of_the_grafana_dashboard_have_values(self) -> None:
        variables = json.loads(DASHBOARD.read_text(encoding="utf-8"))["templating"]["list"]
        for variable in variables[1:]:  # the first is the data source
            with self.subTest(variable["name"]):
                selector, label = variable["definition"][len("label_values(") : -1].rsplit(", ", 1)
                [series, *_] = self.run_.range(re.sub(r"\$(job|instance)\b", ".*", selector))
                self.assertTrue(series["metric"][label])

    def _held(self) -> dict[Sample, float]:
        """Return what `promtool query instant` prints, without the labels of the target."""
        command = ["promtool", "query", "instant", "--format=json", self.run_.prometheus, '{__name__=~"aiperf_.+"}']
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        held = {}
        for row in json.loads(answer):
            labels = {key: value for key, value in row["metric"].items() if key not in {"instance", "job", "__name__"}}
            held[row["metric"]["__name__"], frozenset(labels.items())] = float(row["value"][1])
        return held


if __name__ == "__main__":
    unittest.main()
