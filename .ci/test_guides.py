# SPDX-License-Identifier: Apache-2.0
"""The guides' configurations in the hands of the programs they are for: systemd, nginx, Caddy, promtool.

Needs `systemd-analyze`, `nginx`, `caddy`, `promtool` and `curl`.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from processes import free_port, running, serving

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ROOT / "static" / "guides"
HOST = "bench.example"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
WAIT_SEC = 20


def blocks(guide: str, marker: str) -> list[str]:
    """The fenced blocks right behind a marker of a guide."""
    text = (GUIDES / guide).read_text(encoding="utf-8")
    return re.findall(rf"^<!-- {re.escape(marker)} -->\n```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def output(*command: str, text: str | None = None, wait: float = WAIT_SEC) -> str:
    """What a command prints, on both of its outputs."""
    done = subprocess.run(
        command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=wait, check=False
    )
    return done.stdout


class TestProxies(unittest.TestCase):
    """Pages, WebSockets and streams come through, and other sites are kept out, under a path of a named host."""

    def setUp(self) -> None:
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.url, self.proxy = stack.enter_context(serving("--demo", "--allow-host", HOST)), free_port()

    def config(self, name: str, old: str = "", new: str = "") -> str:
        [text] = blocks("vendoring.md", f"file {name}")
        self.assertIn("127.0.0.1:9090", text)
        return text.replace("127.0.0.1:9090", self.url[len("http://") :]).replace(old, new)

    def answers(self, _log: str) -> bool:
        return output("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{self.proxy}/") != "000"

    def check(self) -> None:
        host, base = f"Host: {HOST}:{self.proxy}", f"127.0.0.1:{self.proxy}/aiperf"
        status = output("curl", "-s", "-H", host, f"http://{base}/api/status")
        self.assertIn('"kind":"demo"', status)
        self.assertIn("<!doctype html", output("curl", "-s", "-H", host, f"http://{base}/dashboard").lower())
        stream = output("curl", "-sN", "-m", "2", "-H", host, f"http://{base}/api/stream")
        self.assertIn("event: ", stream)
        upgrade = (
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {KEY}",
        )
        for origin, status in ((f"http://{HOST}:{self.proxy}", "101"), ("http://evil.example", "403")):
            with self.subTest(origin):
                headers = [word for line in (host, f"Origin: {origin}", *upgrade) for word in ("-H", line)]
                command = ("curl", "-s", "-m", "2", "-o", "/dev/null", "-w", "%{http_code}", *headers)
                self.assertEqual(output(*command, f"http://{base}/ws"), status)

    def test_nginx(self) -> None:
        location = self.config("nginx.conf")
        main = self.folder / "main.conf"
        paths = "".join(f"{kind}_temp_path {self.folder};" for kind in ("fastcgi", "uwsgi", "scgi", "proxy"))
        main.write_text(
            f"pid {self.folder}/pid; error_log stderr; events {{}}"
            f" http {{ access_log off; client_body_temp_path {self.folder}; {paths}"
            f" server {{ listen 127.0.0.1:{self.proxy}; {location} }} }}"
        )
        with running("nginx", "-p", str(self.folder), "-c", str(main), "-g", "daemon off;", ready=self.answers):
            self.check()

    def test_caddy(self) -> None:
        file = self.folder / "Caddyfile"
        site = self.config("Caddyfile", f"{HOST} {{", f"http://:{self.proxy} {{")
        file.write_text(f"{{\n\tadmin off\n\tauto_https off\n}}\n{site}")
        with running("caddy", "run", "--config", str(file), ready=self.answers):
            self.check()


class TestWheels(unittest.TestCase):
    """The commands of the offline installation, with a network, in an environment of their own."""

    def test_they_are_fetched_installed_and_unpacked(self) -> None:
        [block] = blocks("vendoring.md", "wheels")
        commands = "\n".join(line[2:] for line in block.splitlines())
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", "venv"], cwd=folder, check=True)
            script = f"export PATH=$PWD/venv/bin:$PATH\n{commands}\npython3 -c 'import zmq, orjson'\n"
            subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, check=True, timeout=120)
            self.assertTrue((Path(folder) / "orjson").is_dir())


class TestConfigurations(unittest.TestCase):
    """What can be judged without running it."""

    def test_the_systemd_unit_is_sound_and_well_locked_up(self) -> None:
        [unit] = blocks("vendoring.md", "file aiperf-api.service")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "aiperf-api.service"
            file.write_text(unit)
            self.assertEqual(output("systemd-analyze", "verify", str(file)), "")
            exposure = output("systemd-analyze", "security", "--offline=true", str(file))
        found = re.search(r"Overall exposure level for .*: ([0-9.]+)", exposure)
        assert found is not None, exposure
        self.assertLess(float(found[1]), 3)

    def test_promtool_accepts_the_scrape_configurations_and_the_rules(self) -> None:
        for kind, count in (("config", 3), ("rules", 1)):
            found = blocks("prometheus.md", f"promtool {kind}")
            self.assertEqual(len(found), count)
            for block in found:
                with self.subTest(block), tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / "file.yml"
                    file.write_text(block)
                    syntax = ("--syntax-only",) if kind == "config" else ()
                    self.assertIn("SUCCESS", output("promtool", "check", kind, *syntax, str(file)))


if __name__ == "__main__":
    unittest.main()
