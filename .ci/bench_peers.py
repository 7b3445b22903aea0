# SPDX-License-Identifier: Apache-2.0
"""What bench_aiperf_api.py measures beside us, written as users would write it, with the bus and the floor.

Each is a process: `python3 .ci/bench_peers.py NAME ARGUMENT...`, which imports what that one needs and no more.
"""

from __future__ import annotations

import sys
from typing import Any


def subscribed(bus: str, module: str) -> Any:
    """A SUB socket for everything; `module` is zmq or zmq.asyncio."""
    import importlib

    import zmq

    subscriber = importlib.import_module(module).Context().socket(zmq.SUB)
    subscriber.connect(bus)
    subscriber.subscribe(b"")
    return subscriber


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def listening() -> Any:
    """A listening socket of the loopback; asyncio sets TCP_NODELAY for such sockets only, whose protocol is named."""
    import socket

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    say(f"http://127.0.0.1:{listener.getsockname()[1]}")
    return listener


def obeying(send: Any, accept: Any = None) -> None:
    """Orders come as JSON lines; the reply has the time of each paced send, in ns of the monotonic clock."""
    import json
    import time

    for line in sys.stdin:
        order = json.loads(line)
        if "accept" in order:
            accept(order["accept"])
            continue
        with open(order["file"], encoding="utf-8") as file:
            messages = [(m["topic"].encode(), m["head"].encode(), m.get("tail", "").encode()) for m in json.load(file)]
        times = []
        due = time.monotonic()
        for _ in range(order["count"]):
            if order["interval"]:
                due += order["interval"]
                time.sleep(max(0.0, due - time.monotonic()))
                times.append(time.monotonic_ns())
            for message in messages:
                send(*message)
        print(json.dumps(times), flush=True)


def publisher() -> None:
    """The bus, as AIPerf's proxy shows it to subscribers; nothing is lost here: every contender gets every message."""
    import itertools

    import zmq

    bus = zmq.Context().socket(zmq.XPUB)
    bus.setsockopt(zmq.SNDHWM, 10_000)
    bus.setsockopt(zmq.XPUB_NODROP, 1)
    print(f'"tcp://127.0.0.1:{bus.bind_to_random_port("tcp://127.0.0.1")}"', flush=True)
    numbers = itertools.cycle(range(1_000_000, 10_000_000))  # seven digits, so that all messages are of one length
    obeying(lambda t, head, tail: bus.send_multipart([t, b"%s%d%s" % (head, next(numbers), tail) if tail else head]))


def floor() -> None:
    """One blocking `socket.send` of a ready frame per client and message, and nothing else."""
    import functools
    import socket

    listener = listening()
    print(f'"http://127.0.0.1:{listener.getsockname()[1]}"', flush=True)
    clients: list[socket.socket] = []

    def accept(count: int) -> None:
        while clients:
            clients.pop().close()
        for _ in range(count):
            client = listener.accept()[0]
            clients.append(client)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            client.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")

    @functools.lru_cache(maxsize=1)
    def frame(head: bytes, tail: bytes) -> bytes:
        payload = b"%s1000000%s" % (head, tail)
        return b"\x81\x7e" + len(payload).to_bytes(2, "big") + payload

    def send(_topic: bytes, head: bytes, tail: bytes) -> None:
        data = frame(head, tail)
        for client in clients:
            client.send(data)

    obeying(send, accept)


def websockets(bus: str, _bodies: str) -> None:
    """websockets: its own `broadcast`, and zmq.asyncio."""
    import asyncio

    from websockets.asyncio.server import ServerConnection, broadcast, serve

    clients: set[ServerConnection] = set()

    async def handler(client: ServerConnection) -> None:
        clients.add(client)
        try:
            async for _ in client:
                pass
        finally:
            clients.discard(client)

    async def main() -> None:
        subscriber = subscribed(bus, "zmq.asyncio")
        async with serve(handler, sock=listening()):
            while True:
                _topic, payload = await subscriber.recv_multipart()
                broadcast(clients, payload.decode())

    asyncio.run(main())


async def forwarding(bus: str, clients: Any, method: str, *gone: Any) -> None:
    """Send what comes to each client in turn."""
    subscriber = subscribed(bus, "zmq.asyncio")
    while True:
        _topic, payload = await subscriber.recv_multipart()
        text = payload.decode()
        for client in list(clients):
            try:
                await getattr(client, method)(text)
            except gone:
                clients.discard(client)


def aiohttp(bus: str, bodies: str) -> None:
    """aiohttp: WebSocketResponse.send_str to each client in turn, and ready bodies."""
    import asyncio
    from pathlib import Path

    from aiohttp import web

    metrics, status = Path(bodies, "metrics").read_bytes(), Path(bodies, "status").read_bytes()
    clients: set[web.WebSocketResponse] = set()

    async def get_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=metrics, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def get_status(_request: web.Request) -> web.Response:
        return web.Response(body=status, content_type="application/json")

    async def get_ws(request: web.Request) -> web.WebSocketResponse:
        client = web.WebSocketResponse()
        await client.prepare(request)
        clients.add(client)
        async for _ in client:
            pass
        clients.discard(client)
        return client

    async def background(_app: web.Application) -> Any:
        task = asyncio.create_task(forwarding(bus, clients, "send_str", ConnectionError))
        yield
        task.cancel()

    app = web.Application()
    app.cleanup_ctx.append(background)
    app.add_routes([web.get("/metrics", get_metrics), web.get("/api/status", get_status), web.get("/ws", get_ws)])
    web.run_app(app, sock=listening(), print=None, access_log=None)


def fastapi(bus: str, bodies: str) -> None:
    """FastAPI under uvicorn: WebSocket.send_text to each client in turn, and ready bodies."""
    import asyncio
    from contextlib import asynccontextmanager
    from pathlib import Path

    import uvicorn
    from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect

    metrics, status = Path(bodies, "metrics").read_bytes(), Path(bodies, "status").read_bytes()
    clients: set[WebSocket] = set()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> Any:
        task = asyncio.create_task(forwarding(bus, clients, "send_text", WebSocketDisconnect, RuntimeError))
        yield
        task.cancel()

    async def get_metrics() -> Response:
        return Response(metrics, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def get_status() -> Response:
        return Response(status, media_type="application/json")

    async def get_ws(client: WebSocket) -> None:
        await client.accept()
        clients.add(client)
        try:
            while True:
                await client.receive_text()
        except WebSocketDisconnect:
            clients.discard(client)

    get_ws.__annotations__["client"] = WebSocket  # postponed annotations do not see this function's imports
    app = FastAPI(lifespan=lifespan)
    for path, answer in (("/metrics", get_metrics), ("/api/status", get_status)):
        app.add_api_route(path, answer, response_model=None, response_class=Response)
    app.add_api_websocket_route("/ws", get_ws)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening()])


def prometheus(_bus: str, bodies: str) -> None:
    """prometheus_client: the same samples as gauges in its registry, and its own start_http_server."""
    import threading
    from pathlib import Path

    from prometheus_client import CollectorRegistry, Gauge, start_http_server
    from prometheus_client.parser import text_string_to_metric_families

    registry = CollectorRegistry()
    gauges: dict[str, Gauge] = {}
    for family in text_string_to_metric_families(Path(bodies, "metrics").read_text()):
        for sample in family.samples:
            labels = sorted(sample.labels)
            if sample.name not in gauges:
                gauges[sample.name] = Gauge(sample.name, family.documentation, labels, registry=registry)
            gauge = gauges[sample.name]
            (gauge.labels(**sample.labels) if labels else gauge).set(sample.value)
    server, _thread = start_http_server(0, "127.0.0.1", registry)
    say(f"http://127.0.0.1:{server.server_port}")
    threading.Event().wait()


def recv(bus: str, _bodies: str) -> None:
    """Ingest's lower bound with pyzmq: a blocking receive, and nothing else; says how many now and then."""
    subscriber = subscribed(bus, "zmq")
    say("http://127.0.0.1:1")
    count = 0
    while True:
        subscriber.recv_multipart()
        count += 1
        if count % 1000 == 0 or not subscriber.poll(0):
            say(f"messages {count}")


def parse(bus: str, _bodies: str) -> None:
    """Ingest as a user would write it: zmq.asyncio, orjson, the latest message of each type kept."""
    import asyncio

    import orjson

    async def main() -> None:
        subscriber = subscribed(bus, "zmq.asyncio")
        say("http://127.0.0.1:1")
        latest: dict[bytes, object] = {}
        count = 0
        while True:
            topic, payload = await subscriber.recv_multipart()
            latest[topic] = orjson.loads(payload)
            count += 1
            if count % 1000 == 0 or not await subscriber.poll(0):
                say(f"messages {count}")

    asyncio.run(main())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
