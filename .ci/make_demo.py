#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make static/demo.jsonl.gz from a recording: `.ci/make_demo.py RECORDING [OUTPUT]`.

The demo is a real run with every figure as it was recorded.  Left out is what shows nowhere: housekeeping, the
dataset's list of conversations, and the earlier of the two messages that carry the same final results.  The same
recording gives the same bytes (with the same zlib).

The bus of AIPerf 0.13 carries no configuration.  What this run was started with stands in static/demo.config.json,
which `--demo` gives to the server as `--config` would; it is checked here against what the recording does say.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from pathlib import Path
from typing import Any

LEFT_OUT = frozenset({"connection_probe", "heartbeat", "phase_baseline_request", "worker_startup_state"})
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"  # no time, no name, no system (RFC 1952 section 2.3)


def message_kind(topic: str) -> str:
    """The message type in a topic: of `command.system_controller$` it is `command`."""
    return topic.rstrip("$").split(".", 1)[0]


def without_conversations(record: dict[str, Any]) -> dict[str, Any]:
    """The dataset's notification with its list emptied: the rest names the benchmark's id from the start."""
    message = json.loads(record["payload"])
    message["metadata"]["conversations"] = []
    return {**record, "payload": json.dumps(message, ensure_ascii=False, separators=(",", ":"))}


def demo_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that stay, in their order."""
    kinds = [message_kind(record["topic"]) for record in records]
    left_out = LEFT_OUT | ({"process_records_result"} if "process_all_results" in kinds else frozenset())
    return [
        without_conversations(record) if kind == "dataset_configured_notification" else record
        for record, kind in zip(records, kinds)
        if kind not in left_out
    ]


def check_configuration(records: list[dict[str, Any]], config: dict[str, Any]) -> None:
    """Raise ValueError unless the configuration is that of the recorded run, as far as the recording tells it."""
    starts = [
        json.loads(record["payload"]) for record in records if message_kind(record["topic"]) == "credit_phase_start"
    ]
    told = {start["stats"]["phase"]: start["config"] for start in starts}
    found = {
        "concurrency": told["profiling"]["concurrency"],
        "request_count": told["profiling"]["total_expected_requests"],
        "warmup_request_count": told["warmup"]["total_expected_requests"],
    }
    if found != {name: config[name] for name in found}:
        raise ValueError(f"demo.config.json is not of this run, which had {found}")


def gzip_small(data: bytes) -> bytes:
    """A gzip file without time, name or system in its header."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
    trailer = zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
    return GZIP_HEADER + packer.compress(data) + packer.flush() + trailer


def main() -> int:
    """Write the demo and say how large it became."""
    if len(sys.argv) not in (2, 3):
        print(f"usage: {sys.argv[0]} RECORDING [OUTPUT]", file=sys.stderr)
        return 2
    static = Path(__file__).resolve().parent.parent / "static"
    output = Path(sys.argv[2]) if len(sys.argv) == 3 else static / "demo.jsonl.gz"
    with gzip.open(sys.argv[1]) as lines:
        kept = demo_records([json.loads(line) for line in lines])
    check_configuration(kept, json.loads((static / "demo.config.json").read_text(encoding="utf-8")))
    data = b"".join(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for record in kept)
    packed = gzip_small(data)
    output.write_bytes(packed)
    print(f"{output}: {len(kept)} messages, {len(packed)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
