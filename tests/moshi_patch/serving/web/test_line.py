"""What one client makes a server hold, and whether it is told why it is sent away while it talks on."""

import asyncio
import contextlib
import socket
import struct
import time

import aiohttp
import pytest

from benchmarks.measure import status_bytes
from moshi_patch.serving.engine.ogg import checksum
from moshi_patch.serving.web.session import MESSAGES_PER_S
from tests.support.many import Server, hear
from tests.support.servers import ANSWER_S, UPGRADE, speech

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched_module")]

MIB = 1 << 20
SENT = 64
"""MiB that a client sends of a message without an end, of which 4 may be held."""

MASK = bytes([0x80]) + bytes(4)
EMPTY_PING = bytes([0x89]) + MASK


def frame(opcode: int, length: int) -> bytes:
    """The head of a frame that is masked with zeros."""
    return bytes([opcode, 0xFF]) + struct.pack(">Q", length) + bytes(4)


def endless(kind: str):
    """What is sent, piece by piece."""
    block = bytes(MIB)
    if kind == "frame":
        yield frame(0x82, 1 << 40)
        yield from [block] * SENT
    elif kind == "empty_fragments":
        yield frame(0x02, 0)
        for _ in range(SENT):
            yield (bytes([0x00]) + MASK) * (MIB // 6)
    else:
        yield frame(0x02, 0)
        for _ in range(SENT):
            yield frame(0x00, MIB) + block + (EMPTY_PING if kind == "fragments_and_pings" else b"")


def held_mib() -> float:
    return status_bytes("VmRSS") / MIB


def attack(address: str, kind: str) -> tuple[float, bytes]:
    """Sends it. How many MiB more this process, which is the server's, holds at most meanwhile; what came back."""
    host, port = address.split(":")
    before, most, heard = held_mib(), 0.0, b""
    with socket.create_connection((host, int(port)), timeout=ANSWER_S) as client:
        client.sendall(UPGRADE)
        while b"\x82\x01\x00" not in heard:  # the handshake of the conversation
            heard += client.recv(1000)
        try:
            for piece in endless(kind):
                client.sendall(piece)
                most = max(most, held_mib() - before)
            while got := client.recv(1000):
                heard += got
        except ConnectionError:
            assert kind == "fragments_and_pings"  # aiohttp's own limit cuts them
    return most, heard


@pytest.mark.parametrize("kind", ["frame", "fragments", "empty_fragments", "fragments_and_pings"])
def test_a_message_without_an_end_is_not_held(many, kind):
    most, heard = attack(many.server.address, kind)
    assert most < SENT / 2
    if kind != "fragments_and_pings":
        assert heard.endswith(struct.pack(">H", 1009) + b"more than 4 MiB in one message")


@pytest.mark.parametrize("kind", [b"\x89" + MASK, b"\x82\x81" + bytes(4) + b"\x06"], ids=["pings", "bytes"])
def test_what_waits_to_be_received_is_bounded_in_number_too(many, kind):
    """aiohttp counts no bytes for an empty ping, and would take millions while a session waits."""

    async def attack(server):
        taken = 0
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(server.connect())
            host, port = server.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(UPGRADE)
            await reader.read(1000)
            long = b"\x01" + b"OggS" * 300_000  # that takes 18 s to be spoken, in which nothing is received
            writer.write(b"\x82\xff" + struct.pack(">Q", len(long)) + bytes(4) + long)
            await writer.drain()
            await asyncio.sleep(1)
            before, block = held_mib(), kind * (65536 // len(kind))
            with contextlib.suppress(asyncio.TimeoutError):
                for _ in range(SENT * 16):
                    writer.write(block)
                    taken += len(block)
                    await asyncio.wait_for(writer.drain(), 2)
            more = held_mib() - before
            writer.transport.abort()
            return more, taken

    more, taken = many.run(attack)
    assert taken < 8 * MIB  # the rest waits in the sender's machine
    assert more < 32


def test_no_more_messages_are_read_a_second_than_the_model_can_do_without(many):
    """A page without a packet is sound that nobody waits for: reading as fast as it comes would starve the model."""
    empty = b"OggS\0\0" + bytes(8) + speech("boat", 1)[0][14:18] + bytes(8) + b"\0"
    count = 2 * MESSAGES_PER_S

    async def flood(server):
        async with server.connect() as websocket:
            began = time.monotonic()
            for _ in range(count):
                await websocket.send_bytes(b"\x01" + empty[:22] + checksum(empty) + empty[26:])
            await websocket.send_str("the end")
            return (await hear(websocket)).end[0], time.monotonic() - began

    code, seconds = many.run(flood)
    assert code == 1003
    assert seconds >= 0.9 * (count / MESSAGES_PER_S - 1)  # a second's may come at once


@pytest.mark.parametrize(
    ("message", "code"),
    [("hello?", 1003), (b"\x09what", 1003), (b"\x01" + b"OggS" * 500, 1007), (b"\x01" + bytes(5 * MIB), 1009)],
    ids=["text", "kind", "garbage", "length"],
)
def test_who_talks_on_and_reads_late_is_told_why_they_are_sent_away(many, message, code):
    """A server that cuts a connection while something is on its way to it takes back what it said last."""

    async def talk(server):
        async with aiohttp.ClientSession() as session:
            server = Server(server.engine, server.app, session, server.url)
            async with server.connect() as websocket:
                await (websocket.send_str if isinstance(message, str) else websocket.send_bytes)(message)
                for sound in speech("boat", 50):
                    await websocket.send_bytes(b"\x01" + sound)
                time.sleep(0.1)  # a client that is busy
                return (await hear(websocket)).end

    async def in_a_thread(server):
        return await asyncio.to_thread(lambda: asyncio.run(talk(server)))

    for _ in range(5):
        assert many.run(in_a_thread)[0] == code
