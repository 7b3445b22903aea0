# SPDX-License-Identifier: Apache-2.0
"""What watching costs the benchmark, as AIPerf itself reports it: `python3 .ci/watching_costs.py`.

Pairs of equal runs, one watched and one not, in changing order; then one run whose watcher is stopped (SIGSTOP) for
30 s while the memory of AIPerf's main process, which holds the event bus, is followed.  It takes a quarter of
an hour, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

import real_aiperf

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENTS = pathlib.Path(os.environ.get("AIPERF_ENVIRONMENTS", ROOT / ".venv"))
LIVE = {"AIPERF_UI_REALTIME_METRICS_ENABLED": "true", "AIPERF_UI_REALTIME_METRICS_INTERVAL": "1"}


class Bench:
    def __init__(self, version: str, seconds: int, concurrency: int, directory: pathlib.Path) -> None:
        self.aiperf = real_aiperf.make_environment(ENVIRONMENTS / f"aiperf-{version}", version)
        self.directory = directory
        self.environ = {**real_aiperf.environment(directory / "hf"), **LIVE}
        real_aiperf.make_tokenizer(directory / "hf", self.aiperf.parent / "python")
        self.mock = real_aiperf.Mock(error_every=0)
        self.flags = ["--benchmark-duration", str(seconds), "--concurrency", str(concurrency), "--ui", "none"]
        self.count = 0

    def start(self) -> tuple[subprocess.Popen[bytes], pathlib.Path, str]:
        """A run: its process, its artifacts, the directory of its event bus."""
        self.count += 1
        artifacts = self.directory / f"run{self.count}"
        bus = str(self.directory / f"bus{self.count}")
        command = real_aiperf.profile(self.aiperf, self.mock.url, artifacts, *self.flags, "--zmq-ipc-path", bus)
        run = subprocess.Popen(command, env=self.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return run, artifacts, bus

    def watch(self, bus: str) -> tuple[subprocess.Popen[bytes], str]:
        command = [sys.executable, str(ROOT / "aiperf_api.py"), "--api-port", "0", "--zmq-ipc-path", bus]
        server = subprocess.Popen(command, stderr=subprocess.PIPE)
        assert server.stderr is not None
        while True:
            match = re.search(rb"http://127\.0\.0\.1:\d+", server.stderr.readline())
            if match:
                return server, match[0].decode()

    def measure(self, watched: bool) -> tuple[float, float]:
        """(request throughput, p99 latency in ms) of one run."""
        run, artifacts, bus = self.start()
        server, url = self.watch(bus) if watched else (None, "")
        while run.poll() is None:
            if server is not None:  # as a Prometheus server would, and more often
                urllib.request.urlopen(url + "/metrics", timeout=10).read()
            time.sleep(1)
        if server is not None:
            server.terminate()
            server.wait()
        export = json.loads((artifacts / "profile_export_aiperf.json").read_text())
        return export["request_throughput"]["avg"], export["request_latency"]["p99"]


def resident(pid: int) -> float:
    """MiB that a process has in memory."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(match[1]) / 1024 if match else 0.0


def pairs(bench: Bench, number: int) -> None:
    alone: list[tuple[float, float]] = []
    watched: list[tuple[float, float]] = []
    for index in range(number):
        for with_us in (False, True) if index % 2 == 0 else (True, False):
            (watched if with_us else alone).append(bench.measure(with_us))
        print(f"pair {index + 1}: alone {alone[-1][0]:.3f}/s p99 {alone[-1][1]:.3f} ms", end=", ")
        print(f"watched {watched[-1][0]:.3f}/s p99 {watched[-1][1]:.3f} ms", flush=True)
    for place, name in enumerate(("throughput (1/s)", "p99 latency (ms)")):
        differences = [b[place] - a[place] for a, b in zip(alone, watched)]
        mean, error = statistics.mean(differences), statistics.stdev(differences) / number**0.5
        normal = statistics.NormalDist().inv_cdf(0.975)
        t = normal + (normal**3 + normal) / (4 * (number - 1))  # Student's, by its expansion: 2 % low for ten pairs
        print(
            f"{name}: alone {statistics.mean(run[place] for run in alone):.3f}, difference when watched {mean:+.3f},"
            f" 95 % confidence {mean - t * error:+.3f} to {mean + t * error:+.3f}"
        )


def stopped(bench: Bench, seconds: float) -> None:
    run, artifacts, bus = bench.start()
    server, url = bench.watch(bus)
    while json.loads(urllib.request.urlopen(url + "/api/status", timeout=10).read())["state"] != "profiling":
        time.sleep(0.2)
    before, begun = resident(run.pid), time.monotonic()
    server.send_signal(signal.SIGSTOP)
    most, after = before, before
    while run.poll() is None:
        if time.monotonic() - begun > seconds:
            server.send_signal(signal.SIGCONT)
        after = resident(run.pid) or after
        most = max(most, after)
        time.sleep(0.5)
    server.send_signal(signal.SIGCONT)
    server.terminate()
    server.wait()
    export = json.loads((artifacts / "profile_export_aiperf.json").read_text())
    throughput, p99 = export["request_throughput"]["avg"], export["request_latency"]["p99"]
    print(f"stopped for {seconds:.0f} s: exit code {run.returncode}, {throughput:.3f}/s, p99 {p99:.3f} ms")
    print(f"AIPerf's main process: {before:.1f} MiB before, {most:.1f} MiB at most")


def main() -> None:
    parser = argparse.ArgumentParser(description="what watching costs the benchmark")
    parser.add_argument("--aiperf", default="0.13.0", metavar="VERSION")
    parser.add_argument("--pairs", type=int, default=10, metavar="N")
    parser.add_argument("--seconds", type=int, default=20, metavar="SEC", help="of each run")
    parser.add_argument("--concurrency", type=int, default=16, metavar="N")
    parser.add_argument("--stopped", type=float, default=30, metavar="SEC", help="0 = leave this out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options.aiperf, options.seconds, options.concurrency, pathlib.Path(name))
        with bench.mock:
            if options.pairs:
                pairs(bench, options.pairs)
            if options.stopped:
                bench.flags[1] = str(int(options.stopped) + 10)
                stopped(bench, options.stopped)


if __name__ == "__main__":
    main()
