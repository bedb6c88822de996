"""What clients send that they should not, and what they do not do: they are told and go, the others lose no frame."""

import asyncio
import contextlib
import random
import socket
import struct
import time

import numpy as np
import pytest

from moshi_patch.serving.engine import codec
from moshi_patch.serving.engine.ogg import checksum
from moshi_patch.serving.engine.policy import Policy
from tests.support.many import hear, receive, run, say, serve, talk
from tests.support.servers import ANSWER_S, UPGRADE, speech

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched_module")]

GREEDY = "?text_temperature=0&audio_temperature=0"
STEPS = 12


@pytest.fixture(scope="module")
def usual(many):
    return many.run(lambda server: talk(server, "boat", GREEDY, STEPS))


def beside_a_witness(many, usual, rude, *arguments):
    """What a rude client ends with, while somebody else talks and hears, bit for bit, the usual."""

    async def conversations(server):
        dropped = server.engine.dropped_frames
        heard, end = await asyncio.gather(
            talk(server, "boat", GREEDY, STEPS, pause=0.03), rude(server, *arguments), return_exceptions=True
        )
        while server.engine.stats()["people"]:
            await asyncio.sleep(0.01)
        return heard, end, server.engine.dropped_frames - dropped, list(server.front.sessions)

    heard, end, dropped, sessions = many.run(conversations)
    np.testing.assert_array_equal(heard.pcm, usual.pcm)
    assert heard.text == usual.text
    assert dropped == 0
    assert sessions == []
    if isinstance(end, BaseException):
        raise end
    return end


def bomb(packets: int) -> bytes:
    """A page of Ogg, of the stream that sphn's writer makes, with so many packets of 0.12 s: two bytes each."""
    packet = bytes([31 << 3 | 3, 6])  # six frames of 20 ms, all of them empty
    stream = speech("boat", 1)[0][14:18]
    header = b"OggS\0\0" + struct.pack("<q", packets * 5760) + stream + bytes(8) + bytes([packets])
    page = header + bytes([len(packet)]) * packets + packet * packets
    return page[:22] + checksum(page) + page[26:]


async def send(server, *messages):
    async with server.connect() as websocket:
        for message in messages:
            if isinstance(message, str):
                await websocket.send_str(message)
            else:
                await websocket.send_bytes(message)
        return (await hear(websocket)).end


SOUND = [b"\x01" + message for message in speech("sister", 3)]


@pytest.mark.parametrize(
    ("messages", "code", "reason"),
    [
        (["hello?"], 1003, "text frames are no part of this protocol"),
        ([*SOUND, b"\x09what"], 1003, "messages of kind 9 are no part of this protocol"),
        ([random.Random(2).randbytes(300).replace(b"\x01", b"\xff", 1)], 1003, "messages of kind"),
        ([b"\x01" + random.Random(0).randbytes(500)], 1007, "the audio is not Opus in Ogg"),
        ([*SOUND, b"\x01" + random.Random(1).randbytes(3_000_000)], 1007, "the audio is not Opus in Ogg"),
        ([b"\x01" + b"OggS" * 500], 1007, "the audio is not Opus in Ogg"),
        ([*SOUND, b"\x01" + bytes(5 << 20)], 1009, "more than 4 MiB in one message"),
        ([*SOUND, b"\x01" + bytes(4 << 20)], 1009, "more than 4 MiB in one message"),
        (["a" * (5 << 20)], 1009, "more than 4 MiB in one message"),
        ([b"\x04{]"], 1007, "a message of kind 4 is"),
        ([b'\x04{"updates": 1}'], 1007, "a message of kind 4 is"),
        ([b'\x04{"forget": true, "everybody": true}'], 1007, "a message of kind 4 is"),
        ([b"\x04" + b"[" * 100_000], 1007, "a message of kind 4 is"),
        ([b"\x04\xff"], 1007, "a message of kind 4 is"),
        ([], 1008, "no audio for 3 s"),
        ([b"\x06", b"", b"\x03\x00", b"\x01"], 1008, "no audio for 3 s"),
    ],
    ids=[
        "text",
        "kind",
        "garbage",
        "noise",
        "3_MB",
        "pattern",
        "5_MB",
        "4_MiB",
        "5_MB_of_text",
        "json",
        "one",
        "more",
        "deep",
        "utf8",
        "silence",
        "idle",
    ],
)
def test_who_sends_what_is_no_part_of_the_protocol_is_told_so(many, usual, messages, code, reason):
    end = beside_a_witness(many, usual, send, *messages)
    assert end[0] == code
    assert end[1].startswith(reason)


def test_what_does_no_harm_is_passed_over(many, usual):
    async def chatter(server):
        async with server.connect(GREEDY) as websocket:
            for message in speech("boat", STEPS + 7):
                for noise in (b"", b"\x00", b"\x02text", b"\x03\x01", b"\x05oops", b"\x06", b"\x01"):
                    await websocket.send_bytes(noise)
                await websocket.ping()
                await say(websocket, [message])
            return await hear(websocket, STEPS)

    heard = many.run(chatter)
    np.testing.assert_array_equal(heard.pcm, usual.pcm)


async def flood(server, messages):
    """Sends as fast as the server reads, and vanishes. How many frames waited at most, and how it ended."""
    async with server.connect() as websocket:
        session, most = await session_of_stranger(server), 0
        for message in messages:
            await websocket.send_bytes(b"\x01" + message)
        for _ in range(100):
            most = max(most, len(session.person.frames))
            await asyncio.sleep(0.005)
        websocket._response.connection.transport.abort()
        began = time.monotonic()
        while not session._over.is_set():
            await asyncio.sleep(0.01)
        assert time.monotonic() - began < 10  # though minutes of sound were still to be read
        return most, session._end.code


def test_87_bytes_that_hold_seconds_of_sound_are_heard_at_the_models_pace(many, usual):
    small = bomb(19)
    assert len(small) == 84
    most, code = beside_a_witness(many, usual, flood, [*speech("sister", 2), *[small] * 200])
    assert 6 <= most <= 6 + 12  # frames, of 5700 that were sent
    assert code == 1000


def test_a_flood_waits_in_the_senders_machine(many, usual):
    most, code = beside_a_witness(many, usual, flood, speech("sister", 100))
    assert 6 <= most <= 8
    assert code == 1000


def test_a_message_may_hold_ten_minutes_and_no_more(ttt_repo):
    async def conversation():
        async with serve(ttt_repo, rows=1, policy=Policy(message_s=1.0)) as server:
            return await send(server, b"\x01" + b"".join(speech("boat", 30)))

    assert run(conversation()) == (1009, "more than 1 s of sound in one message")


async def do_not_read(server):
    """Talks and reads nothing, not even the close frame, through a socket that holds little."""
    host, port = server.address.split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect((host, int(port)))
        client.sendall(UPGRADE)
        session = await session_of_stranger(server)
        client.setblocking(False)
        for message in speech("sister", 100):
            header = bytes([0x82, 0xFE]) + struct.pack(">H", len(message) + 1) + bytes(4)  # a mask of zeros
            sending = asyncio.get_running_loop().sock_sendall(client, header + b"\x01" + message)
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(sending, ANSWER_S)
        while not session._over.is_set():
            await asyncio.sleep(0.01)
        return session._end.code, session._end.reason


async def session_of_stranger(server):
    """Of the one that does not talk greedily, as the witness does."""
    while not (found := [one for one in server.front.sessions.values() if one.person.sampling.temperature]):
        await asyncio.sleep(0.01)
    return found[0]


def test_who_does_not_read_is_sent_away_and_nobody_waits_for_them(ttt_repo):
    async def conversations():
        async with serve(ttt_repo, rows=3, policy=Policy(outbox=10, socket_bytes=4096)) as server:
            usual = await talk(server, "boat", GREEDY, STEPS)
            witness = talk(server, "boat", GREEDY, STEPS, pause=0.03)
            return usual, *await asyncio.gather(witness, do_not_read(server))

    usual, heard, end = run(conversations())
    np.testing.assert_array_equal(heard.pcm, usual.pcm)
    assert end == (1008, "you do not read what is said to you")


async def free_rows(server) -> int:
    return server.engine.stats()["free"]


@pytest.mark.parametrize(
    ("opening", "reset"),
    [(b"", False), (b"GET /api/ch", False), (UPGRADE, False), (UPGRADE, True), (UPGRADE + b"\x82\xff", True)],
    ids=["nothing", "half_a_request", "upgrade", "upgrade_reset", "half_a_frame"],
)
def test_sockets_that_are_half_open_or_gone_leave_their_row(many, usual, opening, reset):
    async def vanish(server):
        host, port = server.address.split(":")
        for _ in range(3):
            with socket.create_connection((host, int(port)), timeout=ANSWER_S) as client:
                client.sendall(opening)
                await asyncio.sleep(0.05)
                if reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    assert beside_a_witness(many, usual, vanish) is None
    assert many.run(free_rows) == 3


def test_a_machine_that_is_gone_without_a_word_loses_its_row(many, usual):
    async def vanish(server):
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=ANSWER_S) as client:
            client.sendall(UPGRADE)
            session = await session_of_stranger(server)
            while not session._over.is_set():
                await asyncio.sleep(0.05)
            return session._end.code, session._end.reason

    assert beside_a_witness(many, usual, vanish) == (1008, "no audio for 3 s")


def test_a_clock_that_is_set_changes_nothing(many, usual, monkeypatch):
    real, jumps = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 86_400 * next(jumps))
    heard = many.run(lambda server: talk(server, "boat", GREEDY, STEPS, 0.03))
    np.testing.assert_array_equal(heard.pcm, usual.pcm)


def test_conversations_that_begin_and_end_at_once_leave_nothing(many):
    async def come_and_go(server):
        before = server.engine.stats()["joined"]
        for _ in range(50):
            async with server.session.ws_connect(server.url) as websocket:
                await receive(websocket)
        while server.engine.stats()["people"] or server.front.sessions:
            await asyncio.sleep(0.01)
        server.front.codecs._workers[0].submit(int).result()  # what was to be done before
        return server.engine.stats()["joined"] - before

    assert many.run(come_and_go) == 50
    assert codec._codecs == {}
