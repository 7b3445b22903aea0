# SPDX-License-Identifier: Apache-2.0
"""schemathesis tries to find an answer of the demo that breaks the promise of /openapi.json; AsyncAPI's own schema judges
static/asyncapi.json.  Needs schemathesis, jsonschema and npm."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path

import jsonschema
from processes import serving

ROOT = Path(__file__).resolve().parent.parent
RUN_SEC = 120  # never needed: each of the two runs takes some 15 s
TOKEN = "s3cret-token"
DEMO = ("--demo", "--replay-speed", "0")
# What it cannot judge: a stream has no end, and /ws answers whoever asks for anything but a WebSocket with 426.
ENDLESS = "^/(ws|api/stream)$"
# A method that we do not know, as QUERY, is 501 (RFC 9110 9.1), which it takes for a server error.
METHODS = '[phases.coverage]\nunexpected-methods = ["DELETE", "PATCH", "POST", "PUT", "TRACE"]\n'


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
        with serving(*DEMO) as url:
            self.run_against(url, "--phases", "examples,coverage,fuzzing", "--max-examples", "8")

    def test_nor_where_a_token_is_asked_for(self) -> None:
        with serving(*DEMO, "--api-token", TOKEN) as url:
            self.run_against(url, "--phases", "coverage", "--header", f"Authorization: Bearer {TOKEN}")


class TestAsyncAPI(unittest.TestCase):
    """The document against the schema that its makers publish."""

    def test_it_is_asyncapi_3(self) -> None:
        document = json.loads((ROOT / "static" / "asyncapi.json").read_text(encoding="utf-8"))
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
