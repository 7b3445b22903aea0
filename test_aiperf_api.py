# SPDX-License-Identifier: Apache-2.0
"""Tests of aiperf_api: `python3 -m unittest` with nothing installed, or pytest with independent judges.

One class per subject, in the order of the module's rooms; names are sentences about behaviour.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
import unittest
from unittest import mock

import aiperf_api

try:
    import hypothesis
    import hypothesis.strategies as st
except ImportError:
    hypothesis = None

try:
    import zmq
except ImportError:
    zmq = None

# == Architecture ======================================================================================================


# == 3 == JSON =========================================================================================================


# == 4 == WebSocket codec ==============================================================================================


# == 5 == HTTP messages ================================================================================================


# == 6 == Router =======================================================================================================


# == 7 == Static files =================================================================================================


# == 8 == Metric catalogue =============================================================================================


# == 9 == Prometheus text ==============================================================================================


# == 10 == Benchmark state =============================================================================================


# == 11 == Sources =====================================================================================================

# -- ZMTP: the bus without pyzmq ---------------------------------------------------------------------------------------

# What peers send, recorded from libzmq: their greeting, READY, and `["abc", "1"]`.
GREETING_4_1 = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00NULL" + bytes(48)  # libzmq 4.1.6, 4.2.5 and 4.3.2 (ZMTP 3.0)
GREETING_4_3 = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01NULL" + bytes(48)  # libzmq 4.3.5 (ZMTP 3.1)
READY_XPUB = b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x04XPUB"
READY_PUB = b"\x04\x29\x05READY\x0bSocket-Type\0\0\0\x03PUB\x08Identity\0\0\0\x03abc"
ABC_1 = b"\x01\x03abc\x00\x011"
PING = b"\x04\x09\x04PING\0\0c1"


def zmtp_frame(body: bytes, flags: int = 0) -> bytes:
    if len(body) > 255:
        return bytes((flags | 2,)) + len(body).to_bytes(8, "big") + body
    return bytes((flags, len(body))) + body


def zmtp_message(*frames: bytes) -> bytes:
    return b"".join(zmtp_frame(frame, 1) for frame in frames[:-1]) + zmtp_frame(frames[-1])


def codec_after(*chunks: bytes) -> tuple[aiperf_api.ZMTPSubscriber, list[list[bytes]]]:
    codec = aiperf_api.ZMTPSubscriber()
    messages = []
    for chunk in chunks:
        messages += codec.feed(chunk)
    return codec, messages


def ready_codec(greeting: bytes = GREETING_4_3) -> aiperf_api.ZMTPSubscriber:
    codec = codec_after(greeting, READY_XPUB)[0]
    codec.take_output()
    return codec


class ZMTPCodecTests(unittest.TestCase):
    """The bytes of ZMTP 3.0 and 3.1, in both directions."""

    def test_speaks_first_with_the_greeting_and_answers_a_greeting_with_ready(self):
        codec = aiperf_api.ZMTPSubscriber()
        self.assertEqual(codec.take_output(), b"\xff\0\0\0\0\0\0\0\0\x7f\x03\x01NULL" + bytes(48))
        self.assertEqual(codec.feed(GREETING_4_1[:-1]), [])
        self.assertEqual(codec.take_output(), b"")
        codec.feed(GREETING_4_1[-1:])
        self.assertEqual(codec.take_output(), b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB")
        self.assertFalse(codec.ready)
        codec.feed(READY_PUB)
        self.assertTrue(codec.ready)
        self.assertEqual((codec.socket_type, codec.minor), ("PUB", 0))
        self.assertEqual(codec.metadata["identity"], b"abc")

    def test_a_peer_of_3_0_gets_subscriptions_as_messages(self):
        codec = ready_codec(GREETING_4_1)
        self.assertEqual(codec.encode_subscription(b"ab"), b"\x00\x03\x01ab")
        self.assertEqual(codec.encode_subscription(b"ab", False), b"\x00\x03\x00ab")
        self.assertEqual(codec.encode_subscription(b"x" * 300), b"\x02\0\0\0\0\0\0\x01\x2d\x01" + b"x" * 300)

    def test_a_peer_of_3_1_gets_subscriptions_as_commands(self):
        codec = ready_codec(GREETING_4_3)
        self.assertEqual(codec.encode_subscription(b"ab"), b"\x04\x0c\x09SUBSCRIBEab")
        self.assertEqual(codec.encode_subscription(b"ab", False), b"\x04\x09\x06CANCELab")
        self.assertEqual(codec.encode_subscription(b"x" * 300), b"\x06\0\0\0\0\0\0\x01\x36\x09SUBSCRIBE" + b"x" * 300)

    def test_a_peer_of_a_later_version_is_spoken_to_in_3_1(self):
        self.assertEqual(codec_after(GREETING_4_3[:10] + b"\x04\x00" + GREETING_4_3[12:])[0].minor, 1)

    def test_only_a_peer_of_3_1_gets_a_ping(self):
        self.assertEqual(ready_codec(GREETING_4_3).encode_ping(), b"\x04\x07\x04PING\0\0")
        self.assertEqual(ready_codec(GREETING_4_1).encode_ping(), b"")

    def test_every_cut_of_the_stream_gives_the_same_messages_and_answers(self):
        long_one = zmtp_message(b"topic$", b"p" * 300, b"")
        tail = ABC_1 + PING + b"\x01\x01x" + PING + b"\x02\0\0\0\0\0\0\0\x01y" + long_one
        stream = GREETING_4_3 + READY_XPUB + tail
        wanted = [[b"abc", b"1"], [b"x", b"y"], [b"topic$", b"p" * 300, b""]]
        whole = codec_after(stream)[0].take_output()
        self.assertTrue(whole.endswith(b"\x04\x07\x04PONGc1" * 2))
        for cut in range(len(stream) + 1):
            codec, messages = codec_after(stream[:cut], stream[cut:])
            self.assertEqual((messages, codec.take_output(), codec.error), (wanted, whole, None), cut)
        codec, messages = codec_after(*(stream[i : i + 1] for i in range(len(stream))))
        self.assertEqual((messages, codec.take_output(), codec.error), (wanted, whole, None))

    def test_a_ping_is_answered_with_its_context_and_names_the_time_to_live(self):
        codec = ready_codec()
        codec.feed(b"\x04\x0a\x04PING\x00\x1eabc")
        self.assertEqual(codec.take_output(), b"\x04\x08\x04PONGabc")
        self.assertEqual((codec.take_ttl(), codec.take_ttl()), (3.0, 0.0))
        codec.feed(zmtp_frame(b"\x04PING\0\0" + b"0123456789abcdef and more", 4))
        self.assertEqual(codec.take_output(), b"\x04\x15\x04PONG0123456789abcdef")

    def test_commands_that_nobody_knows_are_let_pass(self):
        codec = ready_codec()
        stream = b"\x04\x05\x04PONG" + b"\x04\x05\x04HUHx" + READY_XPUB + b"\x01\x01x" + b"\x04\x02\x01A" + b"\x00\x01y"
        self.assertEqual(codec.feed(stream), [[b"x", b"y"]])
        self.assertEqual((codec.error, codec.take_output()), (None, b""))

    def assert_fault(self, kind: str, stream: bytes, wanted: list[list[bytes]]) -> None:
        cuts = ([stream], [stream[i : i + 1] for i in range(len(stream))], [stream[:-1], stream[-1:]])
        for chunks in cuts:
            codec, messages = codec_after(*chunks)
            self.assertIsNotNone(codec.error, stream)
            self.assertEqual((codec.error.kind, messages), (kind, wanted))
            self.assertNotRegex(str(codec.error), r"[\x00-\x1f]")
            self.assertEqual(codec.feed(GREETING_4_3 + READY_XPUB + ABC_1), [], "nothing comes after a fault")

    def test_peers_that_speak_otherwise_are_told_apart(self):
        for kind, stream in (
            ("not_zmtp", b"HTTP/1.1 400 Bad Request\r\n"),
            ("not_zmtp", b"\0"),
            ("old_zmtp", b"\xff\0\0\0\0\0\0\0\x01\x7e"),  # an identity frame of libzmq 2
            ("old_zmtp", b"\xff\0\0\0\0\0\0\0\x01\x7f\x01\x02"),  # the greeting of libzmq 3.2, type SUB
            ("mechanism", GREETING_4_3[:12] + b"CURVE".ljust(20, b"\0")),
            ("mechanism", GREETING_4_3[:12] + b"NULLX"),
            ("refused", GREETING_4_3 + zmtp_frame(b"\x05ERROR\x0dnot \r\n wanted", 4)),
            ("socket_type", GREETING_4_3 + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03REP"),
            ("socket_type", GREETING_4_3 + b"\x04\x06\x05READY"),
        ):
            with self.subTest(stream=stream):
                self.assert_fault(kind, stream, [])

    def test_a_malformed_handshake_is_a_fault(self):
        for handshake in (
            b"\x00\x01x",  # a message before READY
            b"\x04\x00",  # a command without a name
            b"\x04\x01\x00",
            b"\x04\x03\x05REA",
            PING,
            b"\x04\x08\x05READY\x0bS",  # metadata cut in the name
            b"\x04\x15\x05READY\x0bSocket-Type\0\0\0",  # in the length
            b"\x04\x18\x05READY\x0bSocket-Type\0\0\0\x04PU",  # in the value
            b"\x04\x0b\x05READY\x00\0\0\0\0",  # a property without a name
        ):
            with self.subTest(handshake=handshake):
                self.assert_fault("malformed", GREETING_4_3 + handshake, [])

    def test_a_fault_in_the_stream_leaves_the_messages_before_it(self):
        for kind, fault in (
            ("malformed", b"\x08"),  # a reserved bit
            ("malformed", b"\x05"),  # a command with MORE
            ("malformed", b"\x04\x06\x04PING\0"),
            ("malformed", b"\x04\x03\x09SU"),
            ("refused", b"\x04\x09\x05ERROR\x02no"),
            ("too_large", b"\x02" + (aiperf_api.BUS_FRAME_MAX + 1).to_bytes(8, "big")),
            ("too_large", b"\x02" + b"\xff" * 8),
            ("too_large", b"\x01\x01x\x02" + aiperf_api.BUS_FRAME_MAX.to_bytes(8, "big")),  # the sum of the frames
            ("too_large", b"\x06" + (aiperf_api.BUS_COMMAND_MAX + 1).to_bytes(8, "big")),
            ("too_large", b"\x01\x00" * aiperf_api.BUS_PARTS_MAX),
        ):
            with self.subTest(fault=fault):
                self.assert_fault(kind, GREETING_4_3 + READY_XPUB + ABC_1 + fault, [[b"abc", b"1"]])

    def test_the_limits_themselves_are_allowed(self):
        codec = ready_codec()
        codec.feed(b"\x02" + aiperf_api.BUS_FRAME_MAX.to_bytes(8, "big"))
        self.assertIsNone(codec.error)
        frames = [b""] * aiperf_api.BUS_PARTS_MAX
        self.assertEqual(ready_codec().feed(zmtp_message(*frames)), [frames])

    def test_a_declared_length_allocates_nothing(self):
        codec = ready_codec()
        tracemalloc.start()
        try:
            codec.feed(b"\x02" + (200_000_000).to_bytes(8, "big") + b"x")
            self.assertLess(tracemalloc.get_traced_memory()[1], 100_000)
        finally:
            tracemalloc.stop()
        self.assertIsNone(codec.error)

    def test_a_large_frame_in_small_pieces_takes_time_in_proportion(self):
        def seconds(size):
            codec, stream = ready_codec(), zmtp_message(b"t$", bytes(size))
            begin = time.process_time()
            messages = [m for i in range(0, len(stream), 4096) for m in codec.feed(stream[i : i + 4096])]
            self.assertEqual(len(messages[0][1]), size)
            return time.process_time() - begin

        self.assertLess(seconds(32_000_000), 2.0)  # 0.02 s; copied at every piece it would be minutes

    @unittest.skipUnless(hypothesis, "needs the hypothesis package")
    def test_whatever_bytes_come_it_neither_raises_nor_grows(self):
        pieces = st.sampled_from(
            [GREETING_4_1, GREETING_4_3, READY_XPUB, ABC_1, PING, b"\x02\0\0\0\0\0\0", b"\x01\x00"]
        )
        streams = st.lists(st.one_of(pieces, st.binary(max_size=40)), max_size=12).map(b"".join)

        @hypothesis.settings(max_examples=200, deadline=None)
        @hypothesis.given(
            st.sampled_from([b"", GREETING_4_3, GREETING_4_3 + READY_XPUB]), streams, st.lists(st.integers(0, 400))
        )
        def check(begin, stream, cuts):
            stream = begin + stream
            whole, wanted = codec_after(stream)
            places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
            codec, messages = codec_after(*(stream[a:b] for a, b in zip(places, places[1:])))
            self.assertEqual(messages, wanted)
            self.assertEqual(codec.take_output(), whole.take_output())
            self.assertEqual(getattr(codec.error, "kind", None), getattr(whole.error, "kind", None))
            self.assertLessEqual(len(codec._held) + sum(map(len, codec._parts)), len(stream))

        check()


class BusAddressTests(unittest.TestCase):
    """What a bus address may look like."""

    def test_addresses_are_taken_apart_as_libzmq_does(self):
        parse = aiperf_api.parse_endpoint
        self.assertEqual(parse("tcp://127.0.0.1:5664"), ("127.0.0.1", 5664, ""))
        self.assertEqual(parse("tcp://head-node.cluster.local:1"), ("head-node.cluster.local", 1, ""))
        self.assertEqual(parse("tcp://[::1]:65535"), ("::1", 65535, ""))
        self.assertEqual(parse("tcp://[fe80::1%eth0]:5664"), ("fe80::1%eth0", 5664, ""))
        self.assertEqual(parse("tcp://::1:5664"), ("::1", 5664, ""))
        for any_port in ("*", "0"):
            self.assertEqual(parse(f"tcp://*:{any_port}", bind=True), ("", 0, ""))

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "needs Unix sockets")
    def test_ipc_paths_may_be_abstract_and_have_a_length(self):
        parse = aiperf_api.parse_endpoint
        most = aiperf_api.BUS_IPC_PATH_MAX
        self.assertEqual(parse("ipc:///tmp/with blank.ipc"), ("", 0, "/tmp/with blank.ipc"))
        self.assertEqual(parse("ipc://@name"), ("", 0, "\0name"))
        self.assertEqual(parse("ipc://" + "p" * most).path, "p" * most)
        for path in ("p" * (most + 1), "ü" * most, "@" + "p" * most):
            with self.assertRaisesRegex(
                aiperf_api.UsageError, f"bytes long; the system's limit for a socket is {most}"
            ):
                parse("ipc://" + path)

    def test_what_is_no_address_is_refused_with_the_reason(self):
        for text, reason in (
            ("", "tcp://HOST:PORT or ipc://PATH"),
            ("127.0.0.1:5664", "tcp://HOST:PORT or ipc://PATH"),
            ("inproc://x", "tcp://HOST:PORT or ipc://PATH"),
            ("tcp://", "nothing"),
            ("ipc://", "nothing"),
            ("tcp://host", "a port"),
            ("tcp://host:", "a port"),
            ("tcp://host:0", "a port"),
            ("tcp://host:*", "a port"),
            ("tcp://host:65536", "a port"),
            ("tcp://host:\u0665", "a port"),
            ("tcp://host:+5", "a port"),
            ("tcp://host:5\n", "blank or control"),
            ("tcp://*:5664", "a host name"),
            ("tcp://:5664", "a host name"),
            ("tcp://[]:5664", "a host name"),
            ("tcp://[host]:5664", "a host name"),
            ("tcp://1:2:5664", "a host name"),
            ("tcp://eth0;host:5664", "a host name"),
            ("tcp://user@host:5664", "a host name"),
            ("ipc://@", "a name after @"),
            ("ipc://a\0b", "control character"),
        ):
            with self.subTest(text=text), self.assertRaisesRegex(aiperf_api.UsageError, reason):
                aiperf_api.parse_endpoint(text)


class Inbox:
    """What a source delivers and notifies, to be waited for."""

    def __init__(self, source: aiperf_api.Source) -> None:
        self.source = source
        self.messages: list[list[bytes]] = []
        self.batches: list[int] = []
        self.lines: list[str] = []
        self.changed = asyncio.Event()

    def deliver(self, batch):
        self.messages += batch
        self.batches.append(len(batch))
        self.changed.set()

    def notify(self, line):
        self.lines.append(line)
        self.changed.set()

    def start(self):
        self.source.start(self.deliver, self.notify)

    async def until(self, condition, seconds=30):
        async def wait():
            while not condition():
                self.changed.clear()
                await self.changed.wait()

        try:
            await asyncio.wait_for(wait(), seconds)
        except asyncio.TimeoutError:
            raise AssertionError(f"{len(self.messages)} messages, lines {self.lines}") from None

    async def has(self, count, seconds=30):
        """Wait for so many messages."""
        await self.until(lambda: len(self.messages) >= count, seconds)

    async def tells(self, text):
        """Wait for a line with this text."""
        await self.until(lambda: any(text in line for line in self.lines))

    async def tells_lines(self, count):
        """Wait for so many lines."""
        await self.until(lambda: len(self.lines) >= count)


class RawPublisher:
    """A publisher made of literal bytes; `handshake` is all that it sends by itself."""

    def __init__(self, handshake: bytes = GREETING_4_3 + READY_XPUB) -> None:
        self.handshake = handshake
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self.writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.connected, "127.0.0.1", 0)
        self.address = f"tcp://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc):
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def connected(self, reader, writer):
        self.writers.append(writer)
        writer.write(self.handshake)
        self.connections.put_nowait((reader, writer))

    async def accept(self):
        return await asyncio.wait_for(self.connections.get(), 30)

    async def accept_until_cut_off(self):
        """Let the subscriber end a connection; closing with its bytes unread would throw away what was sent."""
        reader, writer = await self.accept()
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 30)
        writer.close()


HELLO = 64 + 27  # bytes of our greeting and our READY


class BuiltinBusSourceTests(unittest.IsolatedAsyncioTestCase):
    """The source against peers of literal bytes."""

    def open(self, address, **options):
        source = aiperf_api.BuiltinBusSource(address, **options)
        self.addAsyncCleanup(source.stop)
        return Inbox(source)

    def patch(self, **constants):
        for name, value in constants.items():
            patcher = mock.patch.object(aiperf_api, name, value)
            patcher.start()
            self.addCleanup(patcher.stop)

    async def read(self, reader, wanted: bytes):
        self.assertEqual(await asyncio.wait_for(reader.readexactly(len(wanted)), 30), wanted)

    async def test_a_prefix_is_told_once_however_often_it_is_subscribed(self):
        async with RawPublisher() as publisher:
            inbox = self.open(publisher.address)
            inbox.source.subscribe(b"ab")
            inbox.source.subscribe(b"ab")
            inbox.start()
            reader, _ = await publisher.accept()
            await reader.readexactly(HELLO)
            await self.read(reader, b"\x04\x0c\x09SUBSCRIBEab")
            inbox.source.subscribe(b"ab")
            inbox.source.subscribe(b"c")
            await self.read(reader, b"\x04\x0b\x09SUBSCRIBEc")
            for _ in range(3):
                inbox.source.unsubscribe(b"ab")
            inbox.source.unsubscribe(b"never subscribed")
            inbox.source.unsubscribe(b"c")
            await self.read(reader, b"\x04\x09\x06CANCELab\x04\x08\x06CANCELc")
            self.assertEqual(inbox.source.prefixes, ())

    async def test_a_peer_of_3_0_is_spoken_to_in_3_0_and_never_gets_a_ping(self):
        self.patch(BUS_HEARTBEAT_SEC=0.002)
        async with RawPublisher(GREETING_4_1 + READY_PUB) as publisher:
            inbox = self.open(publisher.address)
            inbox.source.subscribe(b"ab")
            inbox.start()
            reader, _ = await publisher.accept()
            await reader.readexactly(HELLO)
            await self.read(reader, b"\x00\x03\x01ab")
            beats = asyncio.Event()
            with mock.patch.object(aiperf_api.ZMTPSubscriber, "encode_ping", lambda codec: beats.set() or b""):
                await asyncio.wait_for(beats.wait(), 30)
            for _ in range(aiperf_api.BUS_HEARTBEAT_MISSES + 3):
                self.assertTrue(inbox.source.connected)
                await asyncio.sleep(0.002)
            inbox.source.subscribe(b"c")
            await self.read(reader, b"\x00\x02\x01c")

    async def test_what_is_not_subscribed_any_more_is_dropped_here(self):
        async with RawPublisher() as publisher:
            inbox = self.open(publisher.address)
            inbox.source.subscribe(b"ab")
            inbox.source.subscribe(b"command$")
            inbox.start()
            _, writer = await publisher.accept()
            writer.write(
                zmtp_message(b"abc", b"1") + zmtp_message(b"command_response$", b"2") + zmtp_message(b"a", b"3")
            )
            writer.write(zmtp_message(b"command$", b"4"))
            await inbox.has(2)
            inbox.source.unsubscribe(b"ab")
            writer.write(zmtp_message(b"abc", b"5") + zmtp_message(b"command$", b"6"))
            await inbox.has(3)
            self.assertEqual(inbox.messages, [[b"abc", b"1"], [b"command$", b"4"], [b"command$", b"6"]])

    async def test_a_lost_peer_is_found_again_and_told_the_subscriptions(self):
        async with RawPublisher() as publisher:
            inbox = self.open(publisher.address)
            inbox.start()
            inbox.source.subscribe(b"first")
            reader, writer = await publisher.accept()
            await reader.readexactly(HELLO + 17)
            inbox.source.subscribe(b"later")
            writer.close()
            await inbox.tells_lines(2)
            self.assertFalse(inbox.source.connected)
            reader, writer = await publisher.accept()
            await reader.readexactly(HELLO)
            await self.read(reader, b"\x04\x0f\x09SUBSCRIBEfirst\x04\x0f\x09SUBSCRIBElater")
            self.assertEqual(inbox.lines[0], f"connected to {publisher.address} (ZMTP 3.1, XPUB)")
            self.assertRegex(inbox.lines[1], r"^the bus at tcp://127\.0\.0\.1:\d+ is gone.*; trying until it is back$")

    async def test_a_connection_that_lasts_starts_the_log_and_the_back_off_afresh(self):
        self.patch(BUS_PROVEN_SEC=0.01, BUS_RETRY_MIN_SEC=0.01)
        proofs = []
        prove = aiperf_api.BuiltinBusSource.peer_proven

        def watch(source, peer):
            source._retry_sec = 99.0
            prove(source, peer)
            proofs.append(source._retry_sec)
            inbox.changed.set()

        with mock.patch.object(aiperf_api.BuiltinBusSource, "peer_proven", watch):
            async with RawPublisher() as publisher:
                inbox = self.open(publisher.address)
                inbox.start()
                for count in (1, 2, 3):
                    _, writer = await publisher.accept()
                    await inbox.until(lambda count=count: len(proofs) == count)
                    writer.close()
                    await inbox.tells_lines(2 * count)
        self.assertEqual(proofs, [0.01] * 3)
        self.assertEqual(["is gone" in line for line in inbox.lines], [False, True] * 3)

    async def test_the_same_fault_again_and_again_is_told_once_and_retried_for_ever(self):
        self.patch(BUS_RETRY_MIN_SEC=0.001, BUS_RETRY_MAX_SEC=0.002)
        for handshake, line in (
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak ZMTP: it began with b'HTTP"),
            (GREETING_4_3[:12] + b"PLAIN".ljust(20, b"\0") + bytes(32), "the security mechanism b'PLAIN'"),
            (GREETING_4_3 + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03REP", "a socket of type b'REP'"),
            (b"\xff\0\0\0\0\0\0\0\x01\x7f\x01\x01", "ZMTP 2"),
            (b"", "hung up during the handshake"),
        ):
            async with RawPublisher(handshake) as publisher:
                inbox = self.open(publisher.address)
                inbox.start()
                for _ in range(5):
                    if handshake:
                        await publisher.accept_until_cut_off()
                    else:
                        (await publisher.accept())[1].close()
                self.assertEqual(len(inbox.lines), 1, inbox.lines)
                self.assertIn(line, inbox.lines[0])
                await inbox.source.stop()
        async with RawPublisher(GREETING_4_3 + READY_XPUB + ABC_1 + b"\x08") as publisher:
            inbox = self.open(publisher.address)
            inbox.source.subscribe(b"")
            inbox.start()
            for _ in range(5):
                await publisher.accept_until_cut_off()
            self.assertGreaterEqual(inbox.messages.count([b"abc", b"1"]), 4)
            self.assertEqual(sum("flags 0x08" in line for line in inbox.lines), 1)
            self.assertLessEqual(len(inbox.lines), 3, inbox.lines)

    async def test_nobody_there_is_one_line_and_the_wait_grows_to_its_limit(self):
        self.patch(BUS_RETRY_MIN_SEC=0.001, BUS_RETRY_MAX_SEC=0.004)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        waits = []
        enough = asyncio.Event()
        real_sleep = asyncio.sleep

        async def sleep(seconds):
            waits.append(seconds)
            if len(waits) == 6:
                enough.set()
            await real_sleep(0)

        with mock.patch.object(aiperf_api.asyncio, "sleep", sleep):
            inbox = self.open(f"tcp://127.0.0.1:{port}")
            inbox.start()
            await asyncio.wait_for(enough.wait(), 30)
            await inbox.source.stop()
        for wait, base in zip(waits, (0.001, 0.002, 0.004, 0.004, 0.004)):
            self.assertTrue(base * 0.75 <= wait <= base * 1.25, waits)
        self.assertEqual(len(inbox.lines), 1)
        self.assertRegex(inbox.lines[0], r"^no bus at tcp://127\.0\.0\.1:\d+ yet \(.+\); trying until there is one$")

    async def test_a_name_that_cannot_be_is_waited_for_like_one_that_is_not_there_yet(self):
        inbox = self.open(f"tcp://{'x' * 70}.invalid:5664")
        inbox.start()
        await inbox.tells_lines(1)
        self.assertIn("no bus at", inbox.lines[0])

    async def test_a_silent_peer_gets_pings_and_is_given_up(self):
        self.patch(BUS_HEARTBEAT_SEC=0.01)
        async with RawPublisher() as publisher:
            inbox = self.open(publisher.address)
            inbox.start()
            reader, _ = await publisher.accept()
            await reader.readexactly(HELLO)
            await self.read(reader, b"\x04\x07\x04PING\0\0" * aiperf_api.BUS_HEARTBEAT_MISSES)
            with contextlib.suppress(ConnectionError):
                self.assertEqual(await asyncio.wait_for(reader.read(1), 30), b"")
            await inbox.tells("left 3 PINGs without an answer")
            await publisher.accept()

    async def test_a_peer_that_answers_pings_is_kept(self):
        self.patch(BUS_HEARTBEAT_SEC=0.05)
        async with RawPublisher() as publisher:
            inbox = self.open(publisher.address)
            inbox.start()
            reader, writer = await publisher.accept()
            await reader.readexactly(HELLO)
            for _ in range(10):
                await self.read(reader, b"\x04\x07\x04PING\0\0")
                writer.write(b"\x04\x05\x04PONG")
            self.assertEqual((len(publisher.writers), inbox.source.connected), (1, True))

    async def test_a_peer_is_given_up_after_the_silence_that_its_own_ping_names(self):
        async with RawPublisher(GREETING_4_3 + READY_XPUB + b"\x04\x07\x04PING\x00\x01") as publisher:
            inbox = self.open(publisher.address)
            inbox.start()
            reader, _ = await publisher.accept()
            await reader.readexactly(HELLO)
            await self.read(reader, b"\x04\x05\x04PONG")
            await inbox.tells("silent for 0.1 s")
            await publisher.accept()

    async def test_a_peer_that_accepts_and_says_nothing_is_given_up(self):
        self.patch(BUS_HANDSHAKE_SEC=0.02)
        async with RawPublisher(GREETING_4_3) as publisher:
            inbox = self.open(publisher.address)
            inbox.start()
            await inbox.tells("did not finish the handshake")
            await publisher.accept()
            await publisher.accept()

    async def test_a_peer_that_reads_no_answers_is_cut_off(self):
        async with RawPublisher() as publisher:
            inbox = self.open(publisher.address)
            inbox.start()
            _, writer = await publisher.accept()
            flood = zmtp_frame(b"\x04PING\0\0" + b"c" * 16, 4) * 4096
            with self.assertRaises(ConnectionError):
                while True:
                    writer.write(flood)
                    await asyncio.wait_for(writer.drain(), 30)
            await inbox.tells("does not read")

    async def test_one_read_with_many_messages_is_spread_over_turns_of_the_loop(self):
        async with RawPublisher() as publisher:
            inbox = self.open(publisher.address)
            inbox.source.subscribe(b"")
            inbox.start()
            _, writer = await publisher.accept()
            sent = [[b"t$", b"%d" % i] for i in range(2_000)]
            writer.write(b"".join(zmtp_message(*message) for message in sent))
            await inbox.has(len(sent))
            self.assertEqual(inbox.messages, sent)
            self.assertEqual(max(inbox.batches), aiperf_api.BUS_BATCH_MAX)

    async def test_messages_before_a_fault_or_an_end_are_all_delivered(self):
        for end in (b"", b"\x08", b"\x01\x05cut"):
            many = b"".join(zmtp_message(b"t$", b"%d" % i) for i in range(1_000))
            async with RawPublisher(GREETING_4_3 + READY_XPUB + many + end) as publisher:
                inbox = self.open(publisher.address)
                inbox.source.subscribe(b"")
                inbox.start()
                (await publisher.accept())[1].close()
                await inbox.has(1_000)
                self.assertEqual(inbox.messages[:1_000], [[b"t$", b"%d" % i] for i in range(1_000)])
                await inbox.source.stop()

    async def test_nothing_is_delivered_after_stop(self):
        async with RawPublisher(GREETING_4_3 + READY_XPUB + ABC_1 * 1_000) as publisher:
            inbox = self.open(publisher.address)
            inbox.source.subscribe(b"")
            inbox.start()
            await publisher.accept()
            await inbox.has(1)
            await inbox.source.stop()
            count = len(inbox.messages)
            await asyncio.sleep(0)
            self.assertEqual((len(inbox.messages), inbox.source.connected), (count, False))

    async def test_it_can_be_stopped_at_any_moment_of_a_connection(self):
        async with RawPublisher() as publisher:
            for options in ({}, {"bind": True}):
                for turns in range(40):
                    inbox = self.open("tcp://127.0.0.1:0" if options else publisher.address, **options)
                    inbox.start()
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    await asyncio.wait_for(inbox.source.stop(), 30)

    async def test_a_connection_that_met_itself_is_dropped(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        inbox = self.open(f"tcp://127.0.0.1:{port}")
        loop = asyncio.get_running_loop()
        end = ("127.0.0.1", port)
        _, peer = await loop.create_connection(lambda: aiperf_api._BusPeer(inbox.source), *end, local_addr=end)
        await asyncio.wait_for(peer.gone, 30)
        self.assertFalse(inbox.source.connected)

    async def test_bound_it_takes_several_publishers_at_once_up_to_its_limit(self):
        self.patch(BUS_PEERS_MAX=3)
        inbox = self.open("tcp://127.0.0.1:*", bind=True)
        inbox.source.subscribe(b"abc")
        inbox.start()
        host, port = inbox.source.address[len("tcp://") :].split(":")
        writers = []
        for minor in (GREETING_4_1, GREETING_4_3, GREETING_4_3):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(minor + READY_PUB)
            await reader.readexactly(HELLO)
            await self.read(reader, b"\x00\x04\x01abc" if minor == GREETING_4_1 else b"\x04\x0d\x09SUBSCRIBEabc")
            writers.append(writer)
        reader, surplus = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(ConnectionError):
            self.assertEqual(await asyncio.wait_for(reader.read(1), 30), b"")
        surplus.close()
        for writer in writers:
            writer.write(ABC_1)
        await inbox.has(3)
        writers.pop().close()
        writers.pop().close()
        writers[0].write(b"\x08")
        await inbox.tells_lines(3)
        self.assertEqual(inbox.lines[0], f"a publisher connected to {inbox.source.address} (ZMTP 3.0, PUB)")
        self.assertEqual(inbox.lines[1], f"a peer at {inbox.source.address}: a frame with the flags 0x08")
        self.assertEqual(inbox.lines[2], f"the last publisher at {inbox.source.address} left; waiting for the next")
        writers[0].close()

    async def test_an_address_in_use_cannot_be_bound_and_says_so_at_once(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            inbox = self.open(f"tcp://127.0.0.1:{taken.getsockname()[1]}", bind=True)
            with self.assertRaisesRegex(aiperf_api.StartError, "cannot bind tcp://127.0.0.1:"):
                inbox.start()

    async def test_every_interface_can_be_bound(self):
        inbox = self.open("tcp://*:0", bind=True)
        inbox.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", int(inbox.source.address.rpartition(":")[2]))
        await reader.readexactly(10)
        writer.close()

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "needs Unix sockets")
    async def test_a_bound_path_is_taken_over_from_the_dead_but_not_from_the_living(self):
        with tempfile.TemporaryDirectory() as directory:
            path = f"{directory}/bus.ipc"
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(path)
            inbox = self.open(f"ipc://{path}", bind=True)
            inbox.start()
            other = self.open(f"ipc://{path}", bind=True)
            with self.assertRaisesRegex(aiperf_api.StartError, "cannot bind ipc://"):
                other.start()
            reader, writer = await asyncio.open_unix_connection(path)
            await reader.readexactly(10)
            writer.close()
            await inbox.source.stop()
            self.assertEqual(os.listdir(directory), [])
            os.close(os.open(path, os.O_CREAT))  # an ordinary file
            other = self.open(f"ipc://{path}", bind=True)
            with self.assertRaises(aiperf_api.StartError):
                other.start()
            self.assertEqual(os.listdir(directory), ["bus.ipc"])


# A proxy as AIPerf has it, between XSUB and XPUB, in a process of its own; it prints where it listens.
PROXY = """
import sys, zmq
context = zmq.Context()
front, back = context.socket(zmq.XSUB), context.socket(zmq.XPUB)
for sock in (front, back):
    sock.linger = 0
    sock.sndhwm = sock.rcvhwm = 0
front.bind(sys.argv[1])
back.bind(sys.argv[2])
print(*[sock.getsockopt(zmq.LAST_ENDPOINT).decode().strip(chr(0)) for sock in (front, back)])
sys.stdout.flush()
zmq.proxy(front, back)
"""
# Interpreters whose pyzmq brings another libzmq, such as 4.1 (pyzmq 16), 4.2 (17) and 4.3.2 (18).
PEER_PYTHONS = [sys.executable, *filter(None, os.environ.get("AIPERF_API_TEST_PYTHONS", "").split(os.pathsep))]


def recorded_messages():
    """The committed recordings; without them, messages of many sizes."""
    paths = sorted((pathlib.Path(__file__).parent / ".ci" / "recordings").glob("*.jsonl.gz"))
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        yield path.name, [[row["topic"].encode(), row["payload"].encode()] for row in rows if "topic" in row]
    yield "sizes", [[b"size.%d$" % size, b"x" * size] for size in (*range(600), 65_535, 65_536, 1_000_000)]
    yield "frames", [[b"%d" % i] * (i + 1) for i in range(20)]


@unittest.skipUnless(zmq, "needs the pyzmq package")
class BuiltinBusSourceWithLibzmqTests(unittest.IsolatedAsyncioTestCase):
    """The source against the real thing, in another process."""

    def setUp(self):
        self.context = zmq.Context()
        self.addCleanup(self.context.destroy, linger=0)
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = directory.name

    def spawn(self, script, *arguments, python=sys.executable):
        process = subprocess.Popen(
            [python, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def proxy(self, front="tcp://127.0.0.1:*", back="tcp://127.0.0.1:*", python=sys.executable):
        process = self.spawn(PROXY, front, back, python=python)
        front, back = process.stdout.readline().split()
        return process, front, back

    def socket(self, kind, **options):
        sock = self.context.socket(kind)
        self.addCleanup(sock.close)
        sock.linger = 0
        sock.sndhwm = sock.rcvhwm = 0
        sock.rcvtimeo = 30_000
        for name, value in options.items():
            setattr(sock, name, value)
        return sock

    def publisher(self, address):
        """An XPUB behind a proxy: it sees the subscriptions arrive."""
        sock = self.socket(zmq.XPUB)
        sock.connect(address)
        return sock

    async def open(self, address, *prefixes, **options):
        source = aiperf_api.BuiltinBusSource(address, **options)
        self.addAsyncCleanup(source.stop)
        for prefix in prefixes:
            source.subscribe(prefix)
        inbox = Inbox(source)
        inbox.start()
        return inbox

    async def subscribed(self, sock, *prefixes):
        """Wait until the publisher knows these subscriptions."""
        missing = {b"\x01" + prefix for prefix in prefixes}
        while missing:
            missing.discard(await asyncio.get_running_loop().run_in_executor(None, sock.recv))

    async def test_every_message_comes_as_to_a_sub_socket_of_pyzmq(self):
        for python in PEER_PYTHONS:
            _, front, back = self.proxy(python=python)
            publisher, judge = self.publisher(front), self.socket(zmq.SUB)
            judge.connect(back)
            judge.subscribe(b"")
            judge.subscribe(b"sync-judge")
            inbox = await self.open(back, b"", b"sync-ours")
            await self.subscribed(publisher, b"", b"sync-judge", b"sync-ours")
            for name, messages in recorded_messages():
                with self.subTest(name, python=python):
                    for message in messages:
                        publisher.send_multipart(message)
                    await inbox.has(len(messages))
                    self.assertEqual(inbox.messages, messages)
                    self.assertEqual([judge.recv_multipart() for _ in messages], messages)
                    inbox.messages.clear()
            await inbox.source.stop()

    async def test_subscriptions_change_while_messages_flow(self):
        for python in PEER_PYTHONS:
            with self.subTest(python=python):
                await self.change_subscriptions(*self.proxy(python=python)[1:])

    async def change_subscriptions(self, front, back):
        publisher = self.publisher(front)
        inbox = await self.open(back, b"kept$")
        await self.subscribed(publisher, b"kept$")
        number = 0

        async def flow(until_kept=0, until_changed=0):
            nonlocal number
            while kept() < until_kept or len(changed()) < until_changed:
                publisher.send_multipart([b"kept$", b"%d" % number])
                publisher.send_multipart([b"changed$", b"%d" % number])
                number += 1
                await asyncio.sleep(0)

        def kept():
            return sum(topic == b"kept$" for topic, _ in inbox.messages)

        def changed():  # the numbers of the messages that the changing subscription has brought
            return [int(payload) for topic, payload in inbox.messages if topic == b"changed$"]

        await flow(until_kept=50)
        self.assertEqual(changed(), [])
        for _ in range(3):
            before = len(changed())
            inbox.source.subscribe(b"changed$")
            inbox.source.subscribe(b"chan")
            await flow(until_changed=before + 50)
            inbox.source.unsubscribe(b"chan")
            await flow(until_changed=before + 100)
            inbox.source.unsubscribe(b"changed$")
            after = len(changed())
            run = changed()[before:]
            self.assertEqual(run, list(range(run[0], run[0] + len(run))), "whole and in order")
            await flow(until_kept=number + 100)
            self.assertEqual(len(changed()), after)
        numbers = [payload for topic, payload in inbox.messages if topic == b"kept$"]
        self.assertEqual(numbers, [b"%d" % i for i in range(len(numbers))])
        await inbox.source.stop()

    async def test_a_proxy_that_is_killed_and_comes_back_is_found_again(self):
        for python in PEER_PYTHONS:
            with self.subTest(python=python):
                process, front, back = self.proxy(python=python)
                inbox = await self.open(back, b"abc")
                for life in range(3):
                    publisher = self.publisher(front)
                    await self.subscribed(publisher, b"abc")
                    publisher.send_multipart([b"abc$", b"%d" % life])
                    await inbox.has(life + 1)
                    publisher.close()
                    process.kill()
                    process.wait()
                    process, *_ = self.proxy(front, back, python=python)
                self.assertEqual(inbox.messages, [[b"abc$", b"%d" % life] for life in range(3)])
                await inbox.source.stop()

    async def test_a_burst_of_a_hundred_thousand_messages_loses_none(self):
        process = self.spawn(
            "import sys, zmq\n"
            "sock = zmq.Context().socket(zmq.XPUB)\n"
            "sock.sndhwm = 0\n"
            "print('tcp://127.0.0.1:%d' % sock.bind_to_random_port('tcp://127.0.0.1'), flush=True)\n"
            "sock.recv()\n"
            "for number in range(100_000):\n"
            "    sock.send_multipart([b'burst$', b'%01024d' % number])\n"
            "sys.stdin.read()\n"
        )
        inbox = await self.open(process.stdout.readline().strip(), b"burst$")
        await inbox.has(100_000, 120)
        wrong = sum(message != [b"burst$", b"%01024d" % i] for i, message in enumerate(inbox.messages))
        self.assertEqual((len(inbox.messages), wrong, len(inbox.lines)), (100_000, 0, 1))
        self.assertLessEqual(max(inbox.batches), aiperf_api.BUS_BATCH_MAX)

    async def test_a_message_of_50_megabytes_comes_whole(self):
        for python in PEER_PYTHONS:
            _, front, back = self.proxy(python=python)
            publisher = self.publisher(front)
            inbox = await self.open(back, b"")
            await self.subscribed(publisher, b"")
            large = os.urandom(1000) * 50_000
            publisher.send_multipart([b"large$", large])
            publisher.send_multipart([b"small$", b"1"])
            await inbox.has(2)
            self.assertTrue(inbox.messages == [[b"large$", large], [b"small$", b"1"]])
            await inbox.source.stop()

    async def test_heartbeats_of_libzmq_are_answered(self):
        publisher = self.socket(zmq.XPUB, heartbeat_ivl=20, heartbeat_timeout=1000, heartbeat_ttl=5000)
        address = f"tcp://127.0.0.1:{publisher.bind_to_random_port('tcp://127.0.0.1')}"
        seen = []
        take_command = aiperf_api.ZMTPSubscriber._take_command

        def watch(codec, body):
            seen.append(body)
            inbox.changed.set()
            take_command(codec, body)

        with mock.patch.object(aiperf_api.ZMTPSubscriber, "_take_command", watch):
            inbox = await self.open(address, b"")
            await inbox.until(lambda: sum(body.startswith(b"\x04PING\x00\x32") for body in seen) >= 60)
        await self.subscribed(publisher, b"")
        publisher.send_multipart([b"t$", b"1"])
        await inbox.has(1)
        self.assertEqual(len(inbox.lines), 1, "one connection, never lost")

    @unittest.skipUnless(hasattr(signal, "SIGSTOP"), "needs SIGSTOP")
    async def test_a_publisher_that_freezes_is_noticed(self):
        process, front, back = self.proxy()
        with mock.patch.object(aiperf_api, "BUS_HEARTBEAT_SEC", 0.05):
            inbox = await self.open(back, b"")
            await inbox.until(lambda: inbox.source.connected)
            process.send_signal(signal.SIGSTOP)
            await inbox.tells("PINGs without an answer")
            process.send_signal(signal.SIGCONT)
            publisher = self.publisher(front)
            await self.subscribed(publisher, b"")
            publisher.send_multipart([b"t$", b"1"])
            await inbox.has(1)

    async def test_bound_it_hears_several_publishers(self):
        addresses = ["tcp://127.0.0.1:*", "tcp://*:*", f"ipc://{self.directory}/bound.ipc"]
        if socket.has_ipv6 and aiperf_api.socket.has_dualstack_ipv6():
            addresses.append("tcp://[::1]:*")
        if sys.platform.startswith("linux"):
            addresses.append(f"ipc://@aiperf-api-test-{os.getpid()}")
        for address in addresses:
            with self.subTest(address):
                inbox = await self.open(address, b"abc", bind=True)
                senders = [self.socket(zmq.XPUB, ipv6=1), self.socket(zmq.XPUB, ipv6=1), self.socket(zmq.XPUB, ipv6=1)]
                for sender in senders:
                    sender.connect(inbox.source.address.replace("*", "127.0.0.1"))
                    await self.subscribed(sender, b"abc")
                for number, sender in enumerate(senders):
                    sender.send_multipart([b"abc$", b"%d" % number])
                    sender.send_multipart([b"else$", b"%d" % number])
                await inbox.has(3)
                self.assertEqual({payload for _, payload in inbox.messages}, {b"0", b"1", b"2"})
                await inbox.source.stop()

    async def test_paths_abstract_names_and_host_names_are_connected_to(self):
        addresses = ["tcp://127.0.0.1:*", f"ipc://{self.directory}/bus.ipc"]
        if sys.platform.startswith("linux"):
            addresses.append(f"ipc://@aiperf-api-test-{os.getpid()}")
        for address in addresses:
            publisher = self.socket(zmq.XPUB)
            publisher.bind(address)
            bound = publisher.last_endpoint.decode().rstrip("\0")
            for name in {bound, bound.replace("127.0.0.1", "localhost")}:
                with self.subTest(name):
                    inbox = await self.open(name, b"abc")
                    await self.subscribed(publisher, b"abc")
                    publisher.send_multipart([b"abc$", b"1"])
                    await inbox.has(1)
                    await inbox.source.stop()
                    publisher.recv()  # the end of the subscription

    async def test_a_server_that_wants_a_password_and_one_that_is_no_publisher_are_named(self):
        secured = self.socket(zmq.PUB, plain_server=True)
        other = self.socket(zmq.ROUTER)
        for sock, reason in ((secured, "mechanism b'PLAIN'"), (other, "type b'ROUTER'")):
            address = f"tcp://127.0.0.1:{sock.bind_to_random_port('tcp://127.0.0.1')}"
            inbox = await self.open(address)
            await inbox.tells_lines(1)
            self.assertRegex(inbox.lines[0], f"the peer at {address}: .*({reason}|is it a PUB or XPUB socket)")
            self.assertRegex(inbox.lines[0], "connecting again$")
            await inbox.source.stop()


# == 12 == Hub =========================================================================================================


# == 13 == Connection ==================================================================================================


# == 14 == Endpoints and service =======================================================================================


# == 15 == Command line ================================================================================================


if __name__ == "__main__":
    unittest.main()
