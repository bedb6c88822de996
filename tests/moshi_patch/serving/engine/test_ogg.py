"""The sound of a client, cut into pages of less than a second: nothing is lost, whatever one message holds."""

import asyncio
import random

import aiohttp
import numpy as np
import pytest
import sphn

from moshi_patch.serving.engine.ogg import HEADER_SIZE, PACKETS_PER_PAGE, OggPages, checksum, page_size
from tests.support.servers import ANSWERS, RATE, run, speech, user_speech

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> bytes:
    """A file of 33 s as programs write them: pages of 255 packets, 5.1 s each."""
    path = tmp_path_factory.mktemp("opus") / "speech.opus"
    sphn.write_opus(str(path), np.tile(user_speech(steps=138), 3), RATE)
    return path.read_bytes()


def pages(data: bytes) -> list[bytes]:
    found, start = [], 0
    while start < len(data):
        found.append(data[start : start + page_size(data, start)])
        start += len(found[-1])
    return found


def packets(data: bytes) -> list[bytes]:
    """What all pages of a stream hold, joined where a packet spans segments and pages."""
    found, unfinished = [], b""
    for page in pages(data):
        position = HEADER_SIZE + page[HEADER_SIZE - 1]
        for size in page[HEADER_SIZE:position]:
            unfinished += page[position : position + size]
            position += size
            if size < 255:
                found.append(unfinished)
                unfinished = b""
    return found


def make_page(flags: int, table: list[int], body: bytes, serial: bytes = bytes(4)) -> bytes:
    page = b"OggS\0" + bytes([flags]) + bytes(8) + serial + bytes(8) + bytes([len(table)]) + bytes(table) + body
    return page[:22] + checksum(page) + page[26:]


def fed(data: bytes, size: int) -> list[bytes]:
    cutter = OggPages()
    return [piece for start in range(0, len(data), size) for piece in cutter.feed(data[start : start + size])]


def decoded(pieces: list[bytes]) -> np.ndarray:
    reader = sphn.OpusStreamReader(RATE)
    return np.concatenate([reader.append_bytes(piece) for piece in pieces])


def test_the_decoder_alone_refuses_a_large_page(recording):
    """Why pages are cut. When this fails, they need not be any more."""
    with pytest.raises(ValueError, match="invalid argument"):
        sphn.OpusStreamReader(RATE).append_bytes(recording)


@pytest.mark.parametrize("size", [10**6, 4096, 1000, 27, 1])
def test_a_file_is_cut_into_small_pages_that_hold_the_same_packets(recording, size):
    pieces = fed(recording, size)
    assert max(page[26] for page in pages(recording)) == 255
    assert max(sum(value < 255 for value in piece[27 : 27 + piece[26]]) for piece in pieces) == PACKETS_PER_PAGE
    assert all(checksum(piece) == piece[22:26] for piece in pieces)
    assert packets(b"".join(pieces)) == packets(recording)
    assert [pieces[0][5], pieces[-1][5]] == [pages(recording)[0][5], pages(recording)[-1][5]]
    assert len(decoded(pieces)) / RATE == pytest.approx(33, abs=0.3)


def test_a_packet_that_spans_pages_stays_whole():
    """Two pages: ten packets and the first half of a long one; its other half and ten more."""
    first, second = [9] * 10 + [255, 255], [255, 7] + [11] * 10
    rng = random.Random(0)
    stream = make_page(2, first, rng.randbytes(sum(first))) + make_page(1 | 4, second, rng.randbytes(sum(second)))
    pieces = fed(stream, 100)
    assert packets(b"".join(pieces)) == packets(stream)
    assert [piece[5] for piece in pieces] == [2, 0, 1, 4]


def test_packets_of_no_bytes_are_left_out_and_those_of_whole_segments_stay():
    """sphn makes five seconds of a packet of no bytes. 255 and 0 are one packet, on two pages as well."""
    stream = [
        make_page(0, [0, 5, 0, 0, 255, 0, 0, 255], b"a" * 515),
        make_page(1, [0, 0, 3], b"abc"),
        make_page(1, [0], b""),
        make_page(0, [255], b"b" * 255),
        make_page(1, [0], b""),
    ]
    for size in (2000, 50):
        pieces = fed(b"".join(stream), size)
        assert [list(piece[27 : 27 + piece[26]]) for piece in pieces] == [[5, 255, 0, 255], [0, 3], [], [255], [0]]
        assert all(checksum(piece) == piece[22:26] for piece in pieces)


def test_packets_of_no_bytes_are_no_sound():
    stream = b"".join(speech())
    serial = stream[14:18]
    empty = make_page(0, [0], b"", serial)
    assert len(decoded(fed(stream, 10**6))) == len(decoded(fed(stream + 10 * empty, 10**6)))


def test_a_stream_of_small_pages_goes_through_as_it_is():
    data = b"".join(speech())
    for size in (len(data), 333):
        assert fed(data, size) == pages(data)


def test_a_damaged_page_goes_through_as_it_is_for_the_decoder_to_refuse(recording):
    large = pages(recording)[3]
    assert len(fed(large, 500)) == 32
    for position in (5, 20, 24, 26 + 255, len(large) - 1):
        damaged = large[:position] + bytes([large[position] ^ 1]) + large[position + 1 :]
        cutter = OggPages()
        assert b"".join(cutter.feed(damaged)) + cutter._kept == damaged


@pytest.mark.parametrize("size", [1, 3, 4, 50, 9999])
def test_what_is_no_ogg_goes_through_byte_for_byte(size):
    rng = random.Random(0)
    for nonsense in (b"x" * 999, b"OggS" * 99, bytes(300), b"Ogg" * 50 + b"Og", b"OggS\1" * 9, rng.randbytes(5000)):
        cutter = OggPages()
        pieces = [piece for i in range(0, len(nonsense), size) for piece in cutter.feed(nonsense[i : i + size])]
        assert b"".join(pieces) + cutter._kept == nonsense
        assert len(cutter._kept) <= 4
        page = pages(speech()[0])[0]
        assert b"".join([*pieces, *cutter.feed(page)]) == nonsense + page  # and it is in step again


@pytest.fixture
def unharmed(server, usual, said):
    """After the test the place is free, and the next client gets the usual answer."""
    server.events.clear()
    yield
    assert server.is_free()
    again = server.talk(said, count=10)
    np.testing.assert_array_equal(again.pcm, usual.pcm[: len(again.pcm)])


@pytest.mark.usefixtures("unharmed")
def test_a_whole_file_in_one_message_is_answered_as_the_same_sound_in_many(server, recording):
    """And so is a file in pieces that end anywhere."""
    expected = server.talk(fed(recording, 10**6), count=75)
    assert len(expected.pcm) > 5.5 * RATE
    for messages in ([recording], [recording[i : i + 9_999] for i in range(0, len(recording), 9_999)]):
        answer = server.talk(messages, count=75)
        assert answer.texts == expected.texts
        np.testing.assert_array_equal(answer.pcm, expected.pcm)


@pytest.mark.usefixtures("unharmed")
def test_ten_seconds_of_a_stream_in_one_message_are_answered_as_in_many(server, usual):
    answer = server.talk([b"".join(speech(steps=125))])
    assert answer.texts == usual.texts
    np.testing.assert_array_equal(answer.pcm, usual.pcm)


@pytest.mark.usefixtures("unharmed")
def test_a_client_that_leaves_while_its_long_message_is_answered_frees_its_place(server, recording):
    server.talk([recording * 20], count=ANSWERS)
    assert server.is_free()
    assert len([event for event in server.events if event["event"] == "step"]) < 20 * 33 * 12.5


@pytest.mark.usefixtures("unharmed")
def test_the_status_is_answered_while_a_long_message_is_decoded(server, recording):
    async def client():
        async with server.connect() as websocket:
            await server.say(websocket, [recording])
            await server.answers(websocket, 3)
            await asyncio.sleep(1.1)  # the status is at most a second old
            status = await asyncio.to_thread(server.status)
            websocket._response.connection.transport.abort()
            return status

    assert 0 < run(client())["steps"] < 300


@pytest.mark.usefixtures("unharmed")
def test_silence_in_a_few_bytes_is_cut_like_speech(server):
    """Packets of 0.12 s with nothing in them: 400 bytes that decode to 24 s."""
    packet = bytes([0b00011_0_11, 0b00_000010])  # SILK of 60 ms, mono, a number of frames; two of them, empty
    head = pages(b"".join(speech()))[:2]
    silence = make_page(0, [2] * 200, packet * 200, head[0][14:18])
    pieces = fed(b"".join(head) + silence, 10**6)
    assert len(pieces) == 2 + 200 // PACKETS_PER_PAGE
    assert len(decoded(pieces)) == 200 * 0.12 * RATE

    async def client():
        async with server.connect() as websocket:
            await websocket.send_bytes(b"\x01" + b"".join(head) + silence)
            answer = await websocket.receive()
            websocket._response.connection.transport.abort()
            return answer

    assert run(client()).type == aiohttp.WSMsgType.BINARY
