# SPDX-License-Identifier: Apache-2.0
"""The clients of bench_aiperf_api.py: raw sockets under one epoll, which throw the bytes away unread where they can."""

from __future__ import annotations

import contextlib
import math
import re
import select
import socket
import time
from typing import Any

PACE_SEC = 0.05  # the paced fan-out: 20 messages a second
QUIET_SEC = 2.0  # a burst is over when the bus is done and nothing came for so long: what is missing was skipped
GIVE_UP_SEC = 60.0  # a run that makes no end by then is reported with what arrived
RECV_BYTES = 1 << 20  # one read of a client
FRAME_OF_DATA_MIN = 256  # frames below it are answers and notices (subscribed, skipped), not bus messages


class BenchError(Exception):
    """A contender that cannot be measured; its row says why."""


class WebSocketClients:
    """N WebSocket clients on raw sockets: they ask for everything, count frames, and throw the bytes away."""

    def __init__(self, server: Any, feeder: Any, count: int) -> None:
        self.sockets: dict[int, socket.socket] = {}  # by file descriptor
        self.frames: dict[int, int] = {}  # data frames that have arrived, by file descriptor
        self.frame_bytes = 0  # length of one data frame on the wire, learned from the first
        self._rest: dict[int, bytes] = {}  # the unfinished frame of each
        self._poll = select.epoll()
        self._buffer = bytearray(RECV_BYTES)
        if server is feeder:  # the floor
            feeder.order(accept=count)
        for first in range(0, count, 64):  # no more at once than any listen backlog holds
            self._open(server.address, min(64, count - first))

    def _open(self, address: tuple[str, int], count: int) -> None:
        opened = [socket.create_connection(address, 10) for _ in range(count)]
        for sock in opened:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(
                b"GET /ws HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
                % (address[0].encode(), address[1])
            )
        for sock in opened:
            answer = b""
            while b"\r\n\r\n" not in answer:
                chunk = sock.recv(65536)
                answer += chunk
                if not chunk or b" 101 " not in answer[:40]:
                    raise BenchError(f"no upgrade: {answer[:200]!r}")
            sock.sendall(masked(1, b'{"type":"subscribe","message_types":["*"],"snapshot":false}'))
            sock.setblocking(False)
            self.sockets[sock.fileno()] = sock
            self.frames[sock.fileno()] = 0
            self._rest[sock.fileno()] = answer.partition(b"\r\n\r\n")[2]
            self._poll.register(sock, select.EPOLLIN)

    def warm_up(self, feeder: Any, file: str) -> None:
        """Send single messages until every client has had one: subscriptions are made, and buffers have grown."""
        deadline = time.monotonic() + 15
        while min(self.frames.values()) == 0:
            if time.monotonic() > deadline:
                raise BenchError("the warm-up messages did not arrive at all clients")
            feeder.send(file)
            self._read(0.05)
        self._read(0.2)
        self.frames = dict.fromkeys(self.frames, 0)

    def _read(self, quiet: float) -> None:
        """Count frames until nothing comes for `quiet` seconds."""
        while ready := self._poll.poll(quiet):
            for descriptor, _ in ready:
                self.frames[descriptor] += self._read_one(descriptor)

    def _read_one(self, descriptor: int) -> int:
        chunk = self.sockets[descriptor].recv(RECV_BYTES)
        if not chunk:
            raise BenchError("a client was cut off")
        data = self._rest[descriptor] + chunk
        position, count = 0, 0
        while 0 < (end := frame_end(data, position)) <= len(data):
            if end - position >= FRAME_OF_DATA_MIN:
                count += 1
                self.frame_bytes = end - position
            elif data[position] == 0x89:
                self.sockets[descriptor].send(masked(10, data[position + 2 : end]))
            position = end
        self._rest[descriptor] = data[position:]
        return count

    def burst(self, feeder: Any, file: str, count: int, plain: bool = False) -> tuple[int, float]:
        """Have `count` messages sent at once; (frames that arrived in all, seconds until the last byte).

        Frames are counted by their bytes, for all are of one length: by a reader that drains, to which MSG_TRUNC lets
        the kernel drop them without a copy, or by a plain one, select() and a copy of 64 KiB at most.
        """
        expected = count * self.frame_bytes * len(self.sockets)
        sockets, received, sent = dict(self.sockets), 0, False
        self._poll.register(feeder, select.EPOLLIN)
        begin = last = time.monotonic()
        feeder.order(file=file, count=count, interval=0)
        while received < expected and time.monotonic() - begin < GIVE_UP_SEC:
            if plain:
                ready = select.select([*sockets, *(() if sent else (feeder.fileno(),))], (), (), QUIET_SEC)[0]
            else:
                ready = [descriptor for descriptor, _ in self._poll.poll(QUIET_SEC)]
            if not ready and sent:
                break
            for descriptor in ready:
                if descriptor == feeder.fileno():
                    sent = feeder.reply() is not None
                    self._poll.unregister(feeder)
                    continue
                size = 0  # cut off as too slow: the others go on
                with contextlib.suppress(ConnectionError):
                    if plain:
                        size = len(sockets[descriptor].recv(65536))
                    else:
                        size = sockets[descriptor].recv_into(self._buffer, RECV_BYTES, socket.MSG_TRUNC)
                    last = time.monotonic()
                if not size:
                    self._poll.unregister(sockets.pop(descriptor))
                received += size
        if not sent:
            feeder.reply()
        return received // self.frame_bytes, last - begin

    def paced(self, feeder: Any, file: str, count: int) -> list[float]:
        """Have `count` messages sent, one each PACE_SEC; the latency in seconds of every delivery."""
        arrivals: list[tuple[int, int]] = []  # (index of the message, ns)
        feeder.order(file=file, count=count, interval=PACE_SEC)
        deadline = time.monotonic() + count * PACE_SEC + 3
        while len(arrivals) < count * len(self.sockets) and time.monotonic() < deadline:
            for descriptor, _ in self._poll.poll(0.5):
                before, new, now = self.frames[descriptor], self._read_one(descriptor), time.monotonic_ns()
                self.frames[descriptor] = before + new
                arrivals.extend((before + i, now) for i in range(new))
        times = feeder.reply()
        return [(at - times[index]) / 1e9 for index, at in arrivals]

    def close(self) -> None:
        """Say goodbye as RFC 6455 wants it, and go."""
        for sock in self.sockets.values():
            with contextlib.suppress(OSError):
                sock.send(masked(8, b"\x03\xe8"))
            sock.close()
        self._poll.close()


def frame_end(data: bytes, position: int) -> int:
    """Where the unmasked frame that begins at `position` ends, or -1 when its length has not come yet."""
    if len(data) < position + 2:
        return -1
    length = data[position + 1] & 127
    size = {126: 2, 127: 8}.get(length, 0)
    if len(data) < position + 2 + size:
        return -1
    return position + 2 + size + (int.from_bytes(data[position + 2 : position + 2 + size], "big") if size else length)


def masked(opcode: int, payload: bytes) -> bytes:
    """A short client frame; the mask is zero, which leaves the payload as it is."""
    return bytes((0x80 | opcode, 0x80 | len(payload))) + bytes(4) + payload


class HTTPClients:
    """N connections that ask for one path in a closed loop: the next request goes out when the answer is complete."""

    def __init__(self, address: tuple[str, int], path: str, count: int) -> None:
        self.address = address
        accept = "Accept: text/plain;version=0.0.4,*/*;q=0.1"
        self.request = f"GET {path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n{accept}\r\n\r\n".encode()
        self.latencies: list[float] = []  # seconds
        self._buffer = memoryview(bytearray(RECV_BYTES))
        self._poll = select.epoll()
        # By file descriptor: socket, bytes still to come (or the head so far), when it began, whether it is the last.
        self._all: dict[int, list[Any]] = {}
        for _ in range(count):
            self._open()

    def _open(self) -> None:
        """Begin to connect; the request goes out when that is done."""
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        sock.connect_ex(self.address)
        self._all[sock.fileno()] = [sock, b"", time.monotonic(), False]
        self._poll.register(sock, select.EPOLLOUT)

    def run(self, seconds: float) -> int:
        """Go on asking for `seconds`; the number of answers that were completed."""
        self.latencies.clear()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for descriptor, events in self._poll.poll(0.2):
                if events & select.EPOLLOUT:
                    self._poll.modify(descriptor, select.EPOLLIN)
                    self._all[descriptor][0].send(self.request)
                else:
                    self._read(descriptor)
        return len(self.latencies)

    def _read(self, descriptor: int) -> None:
        sock, missing, asked, last = self._all[descriptor]
        size = sock.recv_into(self._buffer)
        if isinstance(missing, bytes):
            missing += self._buffer[: min(size, 4096)]
            head, found, _ = missing.lower().partition(b"\r\n\r\n")
            if not size or b" 200 " not in head[:20]:
                raise BenchError(f"unexpected answer: {head[:200]!r}")
            last = head.startswith(b"http/1.0") or b"connection: close" in head
            length = re.search(rb"content-length: *(\d+)", head)
            if found:
                size += len(missing) - min(size, 4096)
                missing = int(length[1]) + len(head) + 4 if length else math.inf
        if not isinstance(missing, bytes):
            missing -= size
        self._all[descriptor] = [sock, missing, asked, last]
        if size and (missing or isinstance(missing, bytes)):
            return
        self.latencies.append(time.monotonic() - asked)
        if last:  # HTTP/1.0: a connection for every request
            self._all.pop(descriptor)[0].close()
            self._open()
        else:
            self._all[descriptor] = [sock, b"", time.monotonic(), False]
            sock.send(self.request)

    def close(self) -> None:
        for sock, *_ in self._all.values():
            sock.close()
        self._poll.close()


def get(server: Any, path: str, headers: str = "") -> bytes:
    """One request on a connection of its own; the body."""
    host, port = server.address
    with socket.create_connection((host, port), 10) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{headers}Connection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(RECV_BYTES), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head[:20]:
        raise BenchError(f"{path}: {head[:200]!r}")
    return body
