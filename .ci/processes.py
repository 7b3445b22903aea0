# SPDX-License-Identifier: Apache-2.0
"""Programs that the judges run beside themselves, ours among them."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

SCRIPT = Path(__file__).resolve().parent.parent / "aiperf_api.py"
START_SEC = 20
STOP_SEC = 10

T = TypeVar("T")


def free_port() -> int:
    """A port that was free just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(*command: str, ready: Callable[[str], T | None]) -> Iterator[T]:
    """A program, once `ready`, given all that was printed so far, finds something; gives what it found."""
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SEC
            while not (answer := ready(text := Path(log.name).read_text(errors="replace"))):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{command} did not start: {text}")
                time.sleep(0.05)
            yield answer
        finally:
            process.terminate()
            process.wait(STOP_SEC)


@contextlib.contextmanager
def serving(*options: str) -> Iterator[str]:
    """Run the server on a port of its choice; gives its URL."""
    command = (sys.executable, str(SCRIPT), "--api-port", "0", *options)
    with running(*command, ready=lambda log: re.search(r"http://127\.0\.0\.1:\d+", log)) as found:
        yield found.group()
