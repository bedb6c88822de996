"""Clients that vanish, stay silent or send what is no speech: the server goes on, and the next one gets it fresh."""

import asyncio
import contextlib
import random
import socket
import time

import aiohttp
import numpy as np
import pytest

from tests.support.servers import ANSWER_S, ANSWERS, FRAME, IDLE_S, UPGRADE, run


@pytest.fixture
def unharmed(server, usual, said):
    """After the test the next client starts fresh and gets the usual answer."""
    server.events.clear()
    yield
    again = server.talk(said, count=20)
    assert again.texts == [text for text in usual.texts if text[0] < 20]
    np.testing.assert_array_equal(again.pcm, usual.pcm[: len(again.pcm)])
    assert all(event["fresh"] and event["position"] == [0, 0] for event in server.events if event["event"] == "reset")


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unharmed")]


async def farewell(websocket) -> aiohttp.WSMessage:
    """What the connection ends with, whatever comes before."""
    while (message := await websocket.receive()).type == aiohttp.WSMsgType.BINARY:
        pass
    return message


def after_speech(server, said, nonsense: list[bytes]) -> aiohttp.WSMessage:
    """How a conversation ends that begins well and goes on with `nonsense`."""

    async def client():
        async with server.connect() as websocket:
            await server.say(websocket, said[:10])
            for message in nonsense:
                await websocket.send_bytes(message)
            return await farewell(websocket)

    return run(client())


@pytest.mark.parametrize(
    ("opening", "reset"),
    [(b"", False), (b"GET /api/ch", False), (UPGRADE, False), (UPGRADE, True), (UPGRADE + b"\x82\xff", True)],
    ids=["nothing", "half_a_request", "upgrade", "upgrade_reset", "half_a_frame"],
)
def test_a_client_that_vanishes_early(server, opening, reset):
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port), timeout=ANSWER_S) as client:
            client.sendall(opening)
            if reset:  # RST instead of FIN
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    assert server.is_free()


def test_a_client_that_vanishes_while_it_is_answered(server, said):
    async def client():
        async with server.connect() as websocket:
            await server.say(websocket, said)
            await websocket.receive_bytes()
            websocket._response.connection.transport.abort()

    run(client())
    assert server.is_free()


@pytest.mark.parametrize("kind", ["text", "empty", "unknown", "ping", "empty_audio"])
def test_what_is_not_speech_is_passed_over_and_the_conversation_goes_on(server, usual, said, kind):
    async def client():
        async with server.connect() as websocket:
            for message in said:
                await server.say(websocket, [message])
                if kind == "text":
                    await websocket.send_str("hello?")
                elif kind == "ping":
                    await websocket.ping()
                else:
                    await websocket.send_bytes({"empty": b"", "unknown": b"\x07\x08", "empty_audio": b"\x01"}[kind])
            return await server.answers(websocket, ANSWERS)

    answer = run(client())
    assert answer.texts == usual.texts
    np.testing.assert_array_equal(answer.pcm, usual.pcm)


@pytest.mark.parametrize(
    "nonsense",
    [
        [b"\x01" + random.Random(0).randbytes(500)],
        [b"\x01" + random.Random(1).randbytes(4_000_000)],
        [b"\x01" + bytes(300)],
        [b"\x01" + b"OggS" * 500],
    ],
    ids=["random", "4_MB", "zeros", "only_the_pattern"],
)
def test_what_is_not_opus_ends_the_conversation_and_says_why(server, said, nonsense):
    message = after_speech(server, said, nonsense)
    assert message.type == aiohttp.WSMsgType.CLOSE
    assert message.data == 1007
    assert "the audio is not Opus in Ogg" in message.extra


def test_a_stream_of_opus_with_flipped_bits(server, said):
    """Some of it can still be decoded, some cannot, and some leaves the decoder waiting: all of that has an end."""
    rng = random.Random(2)
    for _ in range(5):
        broken = [bytearray(message) for message in said]
        for message in broken[2:]:
            message[rng.randrange(len(message))] ^= 1 << rng.randrange(8)
        assert run(how_it_ends(server, [b"\x01" + message for message in broken])) in (1007, 1008)


def test_a_frame_of_10_mb_is_too_big(server, said):
    messages = [b"\x01" + message for message in [*said[:10], bytes(10_000_000)]]
    assert run(how_it_ends(server, messages)) == 1009


async def how_it_ends(server, messages: list[bytes]) -> int:
    """The code of the close frame, or of the one that a client most likely missed when it was cut off while sending."""
    async with server.connect() as websocket:
        with contextlib.suppress(ConnectionError):
            for message in messages:
                await websocket.send_bytes(message)
        return (await farewell(websocket)).data


@pytest.mark.parametrize(
    "frame", [b"\x81\x82\0\0\0\0\xc3\x28", b"\x83\x80\0\0\0\0", b"\xf2\x80\0\0\0\0"], ids=["utf8", "opcode", "reserved"]
)
def test_frames_that_break_the_protocol(server, frame):
    """Text that is no UTF-8, an unknown opcode, reserved bits."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=ANSWER_S) as client:
        client.sendall(UPGRADE)
        assert client.recv(4096).startswith(b"HTTP/1.1 101 ")
        client.sendall(frame)
        while client.recv(4096):  # until the server hangs up
            pass


def test_a_plain_request_for_a_conversation_is_refused_as_such(server):
    async def client():
        async with aiohttp.ClientSession() as session, session.get(server.chat.replace("ws:", "http:")) as answer:
            return answer.status

    assert run(client()) == 400


@pytest.mark.parametrize("noise", [None, "ping", b"\x07", b"\x01"], ids=["silence", "ping", "unknown", "empty_audio"])
def test_a_client_without_speech_loses_its_place_whatever_else_it_sends(server, noise):
    async def say_nothing():
        async with server.connect() as websocket:
            while True:
                try:
                    return await websocket.receive(timeout=0.2)
                except asyncio.TimeoutError:
                    if isinstance(noise, bytes):
                        await websocket.send_bytes(noise)
                    elif noise:
                        await websocket.ping()

    message = run(say_nothing())
    assert message.type == aiohttp.WSMsgType.CLOSE
    assert (message.data, message.extra) == (1008, f"no audio for {IDLE_S} s")


def test_a_client_whose_machine_is_gone_loses_its_place_though_it_never_hung_up(server, said):
    """A socket that answers nothing, not even the close frame: all that is seen of a machine without power."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=ANSWER_S) as client:
        client.sendall(UPGRADE)
        start = time.monotonic()
        assert len(server.talk(said).pcm) >= (ANSWERS - 2) * FRAME
        assert time.monotonic() - start < ANSWER_S
        client.setblocking(False)
        assert b"no audio for" in client.recv(4096)  # it was told, had it listened
