# SPDX-License-Identifier: Apache-2.0
"""schemathesis tries to find an answer of the demo that breaks the promise of /openapi.json; AsyncAPI's own schema judges
/asyncapi.json.  Needs schemathesis, jsonschema and npm."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jsonschema

ROOT = Path(__file__).resolve().parent.parent
START_SEC = 20
RUN_SEC = 120  # never needed: each of the two runs takes some 15 s
TOKEN = "s3cret-token"
# What it cannot judge: a stream has no end, and /ws answers whoever asks for anything but a WebSocket with 426.
ENDLESS = "^/(ws|api/stream)$"
# A method that we do not know, as QUERY, is 501 (RFC 9110 9.1), which it takes for a server error.
METHODS = '[phases.coverage]\nunexpected-methods = ["DELETE", "PATCH", "POST", "PUT", "TRACE"]\n'


@contextlib.contextmanager
def demo(*options: str) -> Iterator[str]:
    """Serve the demo on a free port; gives its URL."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, str(ROOT / "aiperf_api.py"), "--api-port", "0", "--demo", "--replay-speed", "0"]
        command += options
        server = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + START_SEC
            found = None
            while found is None and time.monotonic() < deadline and server.poll() is None:
                log.seek(0)
                found = re.search(rb"http://127\.0\.0\.1:\d+", log.read())
                time.sleep(0.02)
            if found is None:
                raise AssertionError("the demo did not start")
            yield found.group().decode()
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(10)


class TestSchemathesis(unittest.TestCase):
    """A machine that reads the description, and believes nothing."""

    def run_against(self, url: str, *options: str) -> None:
        command = [
            *(str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json", "--url", url),
            *("--exclude-path-regex", ENDLESS, "--checks", "all", "--seed", "1", "--no-color"),
            # A NUL is refused in any target, which a description cannot say of a token.
            *("--generation-allow-x00", "false", "--suppress-health-check", "all", *options),
        ]
        with tempfile.TemporaryDirectory() as folder:  # it keeps a cache where it runs
            Path(folder, "schemathesis.toml").write_text(METHODS)
            done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=RUN_SEC)
        self.assertEqual(done.returncode, 0, done.stdout[-8000:] + done.stderr[-2000:])
        print(done.stdout[-1500:])

    def test_it_finds_no_failure(self) -> None:
        with demo() as url:
            self.run_against(url, "--phases", "examples,coverage,fuzzing", "--max-examples", "8")

    def test_nor_where_a_token_is_asked_for(self) -> None:
        with demo("--api-token", TOKEN) as url:
            self.run_against(url, "--phases", "coverage", "--header", f"Authorization: Bearer {TOKEN}")


class TestAsyncAPI(unittest.TestCase):
    """The document against the schema that its makers publish."""

    def test_it_is_asyncapi_3(self) -> None:
        with demo() as url, urllib.request.urlopen(url + "/asyncapi.json", timeout=10) as answer:
            document = json.load(answer)
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", "--silent", "@asyncapi/specs@6"], cwd=folder, check=True, timeout=RUN_SEC)
            [archive] = Path(folder).glob("*.tgz")
            with tarfile.open(archive) as package:
                member = package.extractfile("package/schemas/3.0.0.json")
                assert member is not None
                schema = json.load(member)
        jsonschema.validators.validator_for(schema)(schema).validate(document)


if __name__ == "__main__":
    unittest.main()
