"""Floods of messages without sound: they hold no row, cost the others no frame, and none of them is inflated."""

import asyncio
import contextlib
import socket
import zlib

import aiohttp
import pytest

from tests.moshi_patch.serving.web.test_rude import GREEDY, STEPS, beside_a_witness, session_of_stranger
from tests.support.many import hear, talk
from tests.support.servers import UPGRADE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched_module")]


@pytest.fixture(scope="module")
def usual(many):
    return many.run(lambda server: talk(server, "boat", GREEDY, STEPS))


def frame(kind: int, data: bytes = b"") -> bytes:
    """As a client sends it, masked with zeros; short."""
    return bytes([0x80 | kind, 0x80 | len(data)]) + bytes(4) + data


@pytest.mark.parametrize(
    "messages",
    [
        frame(2),
        frame(2, b"\x01"),
        frame(2, b"\x03"),
        frame(2, b'\x04{"forget":true}'),
        frame(0xA),
        frame(9, b"x" * 125),
    ],
    ids=["empty", "no_sound", "control", "forget", "pong", "ping"],
)
@pytest.mark.parametrize("reads", [True, False], ids=["reads", "reads_not"])
def test_who_floods_with_what_is_no_sound_is_sent_away(many, usual, messages, reads):
    async def flood(server):
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(UPGRADE)
            session = await session_of_stranger(server)
            client.setblocking(False)
            while not session._over.is_set():
                with contextlib.suppress(BlockingIOError):
                    client.send(messages * 100)
                with contextlib.suppress(BlockingIOError):
                    _ = reads and client.recv(1 << 16)
                await asyncio.sleep(0.01)
            return session._end.code, session._end.reason

    assert beside_a_witness(many, usual, flood) == (1008, "too many messages without sound")


def test_a_ping_is_answered_and_a_thousand_messages_without_sound_are_no_flood(many):
    async def ping(server):
        async with server.session.ws_connect(server.url, autoping=False) as websocket:
            await websocket.receive()
            for _ in range(900):
                await websocket.send_bytes(b"\x06")
            await websocket.ping(b"hello")
            return await websocket.receive()

    message = many.run(ping)
    assert (message.type, message.data) == (aiohttp.WSMsgType.PONG, b"hello")


def test_what_is_compressed_is_not_inflated(many, usual):
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(bytes(4_000_000)) + deflate.flush(zlib.Z_SYNC_FLUSH)

    async def send(server):
        async with server.session.ws_connect(server.url, compress=15) as websocket:
            await websocket.receive()
            assert not websocket.compress
            websocket._response.connection.transport.write(
                bytes([0xC2, 0xFE]) + len(bomb).to_bytes(2, "big") + bytes(4) + bomb
            )
            return (await hear(websocket)).end

    assert beside_a_witness(many, usual, send)[0] == 1002
