# SPDX-License-Identifier: Apache-2.0
"""What a real AIPerf run needs, with no network: an inference server to load, a tokenizer, a virtual environment.

As a program it is the inference server (`python3 .ci/real_aiperf.py --port 0`); as a module it is the support of
test_real_aiperf.py.  The server is a process of its own, so that its work never delays the clock of a test.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.request
from typing import Any

TOKENIZER = "local/tok"
REVISION = "0123456789abcdef0123456789abcdef01234567"

GPUS = (("0", "GPU-8f1c7a52", "NVIDIA H200"), ("1", "GPU-1d20be77", "NVIDIA H200"))
DCGM_FIELDS = (
    ("DCGM_FI_DEV_POWER_USAGE", 412.5),
    ("DCGM_FI_DEV_GPU_UTIL", 87),
    ("DCGM_FI_DEV_FB_USED", 61234),
    ("DCGM_FI_DEV_GPU_TEMP", 61),
    ("DCGM_FI_DEV_SM_CLOCK", 1755),
)


class InferenceServer:
    """An OpenAI-compatible chat endpoint that streams tokens at a set pace and fails every so often."""

    def __init__(self, ttft: float, itl: float, error_every: int) -> None:
        self.ttft = ttft  # s until the first token
        self.itl = itl  # s between tokens
        self.error_every = error_every  # every n-th request is answered 500; 0 = none
        self.requests = 0
        self.running = 0
        self.authorizations: dict[str, int] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        target = head[0].split()[1]
        if target.endswith("/chat/completions"):
            await self._chat(headers, json.loads(body), writer)
        else:
            status, content_type, text = self._page(target)
            answer = _response(status, content_type, text.encode())
            writer.write(answer if head[0][:5] != "HEAD " else answer[: answer.index(b"\r\n\r\n") + 4])
        await writer.drain()
        return True

    def _page(self, target: str) -> Any:
        if target.startswith("/dcgm/metrics"):
            return "200 OK", "text/plain; version=0.0.4", _dcgm(self.requests)
        if target.startswith("/metrics"):
            return "200 OK", "text/plain; version=0.0.4", self._vllm()
        if target.startswith("/seen"):
            return (
                "200 OK",
                "application/json",
                json.dumps({"requests": self.requests, "authorizations": self.authorizations}),
            )
        if target.startswith("/v1/models"):
            return "200 OK", "application/json", json.dumps({"object": "list", "data": [{"id": "mock"}]})
        return "404 Not Found", "application/json", '{"error": "no such page"}'

    def _vllm(self) -> str:
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f'vllm:num_requests_running{{model_name="mock"}} {self.running}',
            "# TYPE vllm:kv_cache_usage_perc gauge",
            f'vllm:kv_cache_usage_perc{{model_name="mock"}} {min(1.0, self.running / 64):.3f}',
            "# TYPE vllm:prompt_tokens_total counter",
            f'vllm:prompt_tokens_total{{model_name="mock"}} {self.requests * 64}',
        ]
        return "\n".join(lines) + "\n"

    async def _chat(self, headers: dict[str, str], asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.requests += 1
        number = self.requests
        authorization = headers.get("authorization", "")
        self.authorizations[authorization] = self.authorizations.get(authorization, 0) + 1
        if self.error_every and number % self.error_every == 0:
            writer.write(_response("500 Internal Server Error", "application/json", b'{"error": {"message": "mock"}}'))
            return
        self.running += 1
        try:
            await self._answer(number, asked, writer)
        finally:
            self.running -= 1

    async def _answer(self, number: int, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        tokens = int(asked.get("max_completion_tokens") or asked.get("max_tokens") or 8)
        tokens = max(2, min(tokens, 12) - number % 3)
        base = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": asked.get("model", "mock")}
        usage = {"prompt_tokens": 64, "completion_tokens": tokens, "total_tokens": 64 + tokens}
        if not asked.get("stream"):
            await asyncio.sleep(self.ttft + self.itl * tokens)
            message = {"role": "assistant", "content": "word " * tokens}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            answer = dict(base, object="chat.completion", choices=[choice], usage=usage)
            writer.write(_response("200 OK", "application/json", json.dumps(answer).encode()))
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        await asyncio.sleep(self.ttft * (0.9 + number % 5 * 0.05))
        for index in range(tokens):
            delta = {"content": f"word{index} "}
            choice = {"index": 0, "delta": delta, "finish_reason": "stop" if index == tokens - 1 else None}
            _event(writer, json.dumps(dict(base, object="chat.completion.chunk", choices=[choice])))
            await writer.drain()
            await asyncio.sleep(self.itl)
        if (asked.get("stream_options") or {}).get("include_usage"):
            _event(writer, json.dumps(dict(base, object="chat.completion.chunk", choices=[], usage=usage)))
        _event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")


def _response(status: str, content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _event(writer: asyncio.StreamWriter, data: str) -> None:
    event = f"data: {data}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(event), event))


def _dcgm(requests: int) -> str:
    lines = []
    for field, value in DCGM_FIELDS:
        lines.append(f"# TYPE {field} gauge")
        for gpu, uuid, model in GPUS:
            labels = f'gpu="{gpu}",UUID="{uuid}",device="nvidia{gpu}",modelName="{model}",Hostname="node1"'
            lines.append(f"{field}{{{labels}}} {value + requests % 7 + int(gpu)}")
    return "\n".join(lines) + "\n"


# -- Support of the tests ----------------------------------------------------------------------------------------------


class Mock:
    """The inference server as a process; `url` is its base address. Use it as a context manager."""

    def __init__(self, ttft: float = 0.05, itl: float = 0.01, error_every: int = 40) -> None:
        command = [sys.executable, os.path.abspath(__file__), "--port", "0"]
        command += ["--ttft", str(ttft), "--itl", str(itl), "--error-every", str(error_every)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().decode().strip()

    def __enter__(self) -> Mock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def seen(self) -> dict[str, Any]:
        """{"requests": int, "authorizations": {header value: times}}: what reached the server so far."""
        with urllib.request.urlopen(self.url + "/seen", timeout=10) as answer:
            return dict(json.loads(answer.read()))


def make_environment(directory: pathlib.Path, version: str) -> pathlib.Path:
    """A virtual environment with aiperf==version; returns its `aiperf`. Kept and used again when it is there."""
    executable = directory / "bin" / "aiperf"
    if not executable.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        install = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
        install += ["--disable-pip-version-check"]
        subprocess.run([*install, "aiperf==" + version], check=True)
    return executable


TRAIN = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
tokenizer = Tokenizer(models.BPE(unk_token=None))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
words = "the quick brown fox jumps over a lazy dog word hello world benchmark token model of and to in is"
trainer = trainers.BpeTrainer(
    vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
)
tokenizer.train_from_iterator([words] * 50, trainer)
tokenizer.save(sys.argv[1])
"""


def make_tokenizer(home: pathlib.Path, python: pathlib.Path) -> None:
    """A tiny byte-level BPE tokenizer as `local/tok` in a Hugging Face cache below `home`, trained by `python`."""
    model = home / "hub" / ("models--" + TOKENIZER.replace("/", "--"))
    snapshot = model / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(REVISION)
    subprocess.run([str(python), "-c", TRAIN, str(snapshot / "tokenizer.json")], check=True, stdout=subprocess.DEVNULL)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    (snapshot / "tokenizer_config.json").write_text(json.dumps(settings))
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 600}))


def environment(home: pathlib.Path) -> dict[str, str]:
    """The environment of an AIPerf run that needs no network."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AIPERF_", "HF_"))}
    kept.update(
        HF_HOME=str(home),
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        NO_COLOR="1",
        COLUMNS="200",
        no_proxy="127.0.0.1,localhost",
    )
    return kept


def profile(aiperf: pathlib.Path, url: str, artifacts: pathlib.Path, *more: str) -> list[str]:
    """The command line of a short `aiperf profile`; flags in `more` are added."""
    command = [str(aiperf), "profile", "--model", "mock", "--url", url, "--endpoint-type", "chat", "--streaming"]
    command += ["--tokenizer", TOKENIZER, "--artifact-dir", str(artifacts)]
    command += ["--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "10", "--random-seed", "7"]
    return [*command, *more]


def main() -> None:
    parser = argparse.ArgumentParser(description="an inference server for benchmarks to load")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft", type=float, default=0.05, metavar="SEC")
    parser.add_argument("--itl", type=float, default=0.01, metavar="SEC")
    parser.add_argument("--error-every", type=int, default=40, metavar="N")
    options = parser.parse_args()

    async def run() -> None:
        server = InferenceServer(options.ttft, options.itl, options.error_every)
        listener = await asyncio.start_server(server.serve, "127.0.0.1", options.port)
        print(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", flush=True)
        await listener.serve_forever()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())


if __name__ == "__main__":
    main()
