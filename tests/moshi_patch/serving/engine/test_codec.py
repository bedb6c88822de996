"""Opus of many people, in a thread or in other processes: each has streams of their own, in pieces of bounded size."""

import asyncio
import os
import signal
import threading

import numpy as np
import pytest
import sphn

from moshi_patch.serving.engine import codec
from moshi_patch.serving.engine.codec import Codec, Codecs, NotOpusError
from moshi_patch.serving.engine.ogg import FIRST, OggPages, checksum
from moshi_patch.serving.engine.policy import FRAME, RATE
from tests.support.servers import speech, user_speech


def everything(streams: Codec, data: bytes) -> tuple[np.ndarray, int]:
    """All frames of `data`, and the most that came at once."""
    frames, more = streams.decode(data)
    parts = [frames]
    while more:
        frames, more = streams.decode(b"")
        parts.append(frames)
    return np.concatenate(parts), max(len(part) for part in parts)


def test_a_file_comes_out_in_pieces_of_less_than_a_second_and_is_the_same_sound():
    messages = speech("boat", 60)
    whole, most = everything(Codec(), b"".join(messages))
    streams = Codec()
    piecewise = np.concatenate([everything(streams, message)[0] for message in messages])
    np.testing.assert_array_equal(whole, piecewise)
    assert whole.shape[1] == FRAME
    assert len(whole) >= 58
    assert most <= 12


def test_what_is_no_opus_is_said_to_be_none_and_does_not_end_the_worker():
    for nonsense in (b"nonsense" * 50, bytes(1000), b"OggS" * 100):
        with pytest.raises(NotOpusError, match="the audio is not Opus in Ogg"):
            everything(Codec(), nonsense)


@pytest.fixture
def in_the_thread(monkeypatch):
    """Short messages go the way of long ones."""
    monkeypatch.setattr(codec, "SHORT_BYTES", -1)


async def converse(codecs: Codecs, names: list[str]) -> dict[str, tuple[np.ndarray, bytes]]:
    async def one(name: str):
        person = codecs.open()
        frames = [(await codecs.decode(person, message))[0] for message in speech(name, 12)]
        opus = b"".join([await codecs.encode(person, frame) for frame in user_speech(name, 12).reshape(-1, FRAME)])
        codecs.close(person)
        return name, (np.concatenate(frames), opus)

    return dict(await asyncio.gather(*[one(name) for name in names]))


async def until_it_fails(codecs: Codecs, person: int) -> None:
    while True:
        await codecs.decode(person, b"")
        await asyncio.sleep(0.01)


@pytest.mark.slow
def test_for_more_than_eight_people_opus_is_done_in_other_processes_with_the_same_result():
    async def both():
        few, many = Codecs(8), Codecs(9)
        try:
            assert (few.processes, many.processes, Codecs(30).processes) == (0, 1, 3)
            here, there = await converse(few, ["boat", "train"]), await converse(many, ["boat", "train", "sister"])
            (worker,) = many._workers[0]._processes
            assert worker != os.getpid()
            people = [many.open(), many.open()]
            os.kill(worker, signal.SIGKILL)
            for person in people:  # also the one who says nothing until there is a new process
                with pytest.raises(RuntimeError, match="a process for Opus ended"):
                    await until_it_fails(many, person)
            return here, there, await converse(many, ["boat"])  # in a new process
        finally:
            few.shut_down()
            many.shut_down()

    here, there, again = asyncio.run(asyncio.wait_for(both(), 60))
    for name, (frames, opus) in here.items():
        np.testing.assert_array_equal(there[name][0], frames)
        heard = [sphn.OpusStreamReader(RATE).append_bytes(one) for one in (there[name][1], opus)]
        np.testing.assert_array_equal(*heard)
    np.testing.assert_array_equal(again["boat"][0], here["boat"][0])


def test_what_is_asked_for_at_once_is_done_in_one_go_and_each_gets_their_own_or_the_reason(monkeypatch, in_the_thread):
    do_all, goes = codec._do_all, []
    monkeypatch.setattr(codec, "_do_all", lambda jobs: goes.append(len(jobs)) or do_all(jobs))
    message = b"".join(speech("boat", 8))

    async def three_at_once():
        codecs = Codecs(3)
        try:
            asked = [codecs.decode(codecs.open(), data) for data in (message, b"no Opus" * 50, message)]
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            codecs.shut_down()

    (first, _), wrong, (third, _) = asyncio.run(three_at_once())
    assert goes == [3]
    assert isinstance(wrong, NotOpusError)
    np.testing.assert_array_equal(first, third)
    np.testing.assert_array_equal(first, Codec().decode(message)[0])


@pytest.fixture
def panic(monkeypatch):
    class Panic(BaseException):
        """As those of Rust, which are no exceptions."""

    def panics(streams, pcm):
        raise Panic("a panic\nof two lines")

    monkeypatch.setattr(Codec, "encode", panics)


def test_nobody_is_left_without_an_answer_whatever_goes_wrong(panic, in_the_thread):
    async def ask(codecs: Codecs):
        return await asyncio.gather(
            codecs.encode(codecs.open(), np.zeros(FRAME, np.float32)),
            codecs.decode(codecs.open(), b""),
            return_exceptions=True,
        )

    async def both():
        codecs = Codecs(3)
        panicked = await ask(codecs)
        codecs.shut_down()
        return panicked, await ask(codecs)

    (panicked, (frames, more)), ended = asyncio.run(asyncio.wait_for(both(), 60))
    assert isinstance(panicked, RuntimeError)
    assert "a panic of two lines" in str(panicked)
    assert (len(frames), more) == (0, False)
    assert [type(one) for one in ended] == [RuntimeError] * 2


def test_what_few_people_say_goes_through_no_thread_unless_it_is_long(monkeypatch, panic):
    do_all, threads = codec._do_all, []
    monkeypatch.setattr(codec, "_do_all", lambda jobs: threads.append(threading.get_ident()) or do_all(jobs))
    messages = speech("boat", 60)
    whole = b"".join(messages)
    monkeypatch.setattr(codec, "SHORT_BYTES", max(map(len, messages)))

    async def decode(codecs, person, data):
        frames, more = await codecs.decode(person, data)
        return [frames, *(await decode(codecs, person, b"") if more else [])]

    async def talk():
        codecs = Codecs(8)
        short, long = codecs.open(), codecs.open()
        try:
            said = [frames for message in messages for frames in await decode(codecs, short, message)]
            assert set(threads) == {threading.get_ident()}
            with pytest.raises(RuntimeError, match="a panic of two lines"):
                await codecs.encode(short, np.zeros(FRAME, np.float32))
            at_once = await decode(codecs, long, whole)
            assert set(threads) > {threading.get_ident()}
            return np.concatenate(said), np.concatenate(at_once)
        finally:
            for person in (short, long):
                codecs.close(person)
            codecs.shut_down()

    np.testing.assert_array_equal(*asyncio.run(talk()))


@pytest.mark.slow
def test_people_are_spread_evenly_over_the_processes_whoever_leaves():
    codecs = Codecs(24)
    try:
        people = [codecs.open() for _ in range(8)]
        for person in people[::2]:
            codecs.close(person)
        for _ in range(4):
            codecs.open()
        homes = list(codecs._homes.values())
        assert [homes.count(worker) for worker in codecs._workers] == [4, 4]
    finally:
        codecs.shut_down()


def test_what_still_waits_when_all_is_shut_down_has_an_answer(monkeypatch, in_the_thread):
    do_all, go = codec._do_all, threading.Event()
    monkeypatch.setattr(codec, "_do_all", lambda jobs: go.wait(30) and do_all(jobs))

    async def shut_down():
        codecs, asked = Codecs(3), []
        for _ in range(2):
            asked.append(asyncio.create_task(codecs.decode(codecs.open(), b"")))
            await asyncio.sleep(0.05)  # the second one waits for the thread
        codecs.shut_down()
        go.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    (frames, more), ended = asyncio.run(asyncio.wait_for(shut_down(), 60))
    assert (len(frames), more) == (0, False)
    assert isinstance(ended, RuntimeError)
    assert str(ended) == "Opus is shut down"


def test_who_goes_while_their_sound_waits_leaves_no_stream_behind(in_the_thread):
    async def leave():
        codecs = Codecs(3)
        gone, stays = codecs.open(), codecs.open()
        try:
            asked = asyncio.create_task(codecs.decode(gone, b""))
            await asyncio.sleep(0)  # it is asked for, and has not been sent to the thread
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            codecs.close(gone)
            await codecs.decode(stays, b"")
            return gone in codec._codecs, stays in codec._codecs
        finally:
            codecs.close(stays)
            codecs.shut_down()

    assert asyncio.run(leave()) == (False, True)


def test_a_stream_that_was_skipped_at_first_is_heard_from_there_on_and_streams_may_follow_each_other():
    first, second = speech("boat", 30), speech("train", 30)
    skipped, usual = Codec(), Codec()
    for message in first[:10]:
        skipped.skip(message)
        everything(usual, message)
    heard, expected = (everything(one, b"".join(first[10:]))[0] for one in (skipped, usual))
    assert len(heard) == len(expected) >= 18
    np.testing.assert_allclose(heard[10:], expected[10:], atol=0.01)  # once the decoder has forgotten how it began
    kept = skipped._rest.size  # less than a frame of the first stream
    following, alone = (everything(one, b"".join(second))[0].ravel() for one in (skipped, Codec()))
    length = min(len(following) - kept, len(alone))
    assert length >= 28 * FRAME
    np.testing.assert_array_equal(following[kept : kept + length], alone[:length])


def page(packets: list[bytes], like: bytes, flags: int = 0) -> bytes:
    """A page of the stream that the page `like` is of, at its beginning as it says."""
    table = bytes(map(len, packets))
    made = (
        b"OggS\0" + bytes([flags]) + bytes(8) + like[14:18] + bytes(8) + bytes([len(table)]) + table + b"".join(packets)
    )
    return made[:22] + checksum(made) + made[26:]


def test_nothing_of_what_is_skipped_is_decoded_wherever_it_says_it_stands(monkeypatch):
    """Whoever waits in the queue could else have minutes of sound decoded, in a message that takes a moment to send."""
    read, decoded = Codec._read, []
    monkeypatch.setattr(Codec, "_read", lambda streams, piece: decoded.append(read(streams, piece)) or decoded[-1])
    first, comments = OggPages().feed(b"".join(speech("boat", 3)))[:2]
    sound = page([bytes([28 << 3 | 4 | 3, 48])] * 8, like=first)  # a second of stereo
    crowded = page([first[28:], comments[28:], *[bytes([28 << 3 | 3, 48])] * 4], like=first, flags=FIRST)
    for attack in (first + comments + sound * 50, (first + comments + sound) * 50, (first + sound) * 50, crowded * 50):
        Codec().skip(attack)
        assert sum(map(len, decoded)) == 0
    assert decoded  # what a stream begins with
    monkeypatch.undo()
    assert len(everything(Codec(), first + comments + sound * 2)[0]) >= 11  # it would have been sound
