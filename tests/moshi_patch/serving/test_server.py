"""The server for many people over real websockets: moshi's protocol, and the clients that speak it."""

import asyncio
import json

import aiohttp
import numpy as np
import pytest
import sphn
import torch

from moshi_patch.serving.engine.policy import Policy
from moshi_patch.serving.program import text_of
from tests.support.many import STEPS, hear, receive, run, say, serve, talk, tokenizer_of
from tests.support.rows import stock_answers
from tests.support.servers import FRAME, RATE, speech

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched_module")]

GREEDY = "?text_temperature=0&audio_temperature=0"
WEB_CLIENT = (
    "?text_temperature=0.7&text_topk=25&audio_temperature=0.8&audio_topk=250&pad_mult=0"
    "&text_seed={}&audio_seed={}&repetition_penalty_context=64&repetition_penalty=1"
)
"""What moshi's own page sends."""


def test_several_people_talk_at_once_and_each_hears_what_they_would_hear_alone(many):
    async def conversations(server):
        alone = await talk(server, "boat", GREEDY)
        return alone, await asyncio.gather(
            talk(server, "boat", GREEDY), talk(server, "sister", WEB_CLIENT.format(1, 2)), talk(server, "train")
        )

    alone, (boat, sister, _) = many.run(conversations)
    assert np.abs(alone.pcm).max() > 0.01
    np.testing.assert_array_equal(boat.pcm, alone.pcm)
    assert boat.text == alone.text
    assert not np.array_equal(sister.pcm, alone.pcm)


def test_the_seeds_of_moshis_page_decide_what_is_drawn_whoever_else_talks(many):
    async def conversations(server):
        first = await talk(server, query=WEB_CLIENT.format(17, 4))
        together = await asyncio.gather(
            talk(server, query=WEB_CLIENT.format(17, 4)),
            talk(server, query=WEB_CLIENT.format(17, 5)),
            talk(server, query=WEB_CLIENT.format(18, 4)),
        )
        return first, *together, *await asyncio.gather(talk(server), talk(server))

    first, again, other, third, unknown, unknown_too = many.run(conversations)
    np.testing.assert_array_equal(first.pcm, again.pcm)
    assert len({heard.pcm.tobytes() for heard in (first, other, third, unknown, unknown_too)}) == 5


def test_in_float64_a_person_among_others_hears_what_stocks_loop_says_from_opus_to_sound(ttt_repo):
    async def conversation():
        async with serve(ttt_repo, dtype=torch.float64) as server:
            said = {}
            codecs = server.front.codecs
            encode = codecs.encode

            async def observed(person, pcm):
                said.setdefault(person, []).append(pcm)
                return await encode(person, pcm)

            codecs.encode = observed
            boat, _ = await asyncio.gather(talk(server, "boat", GREEDY), talk(server, "sister"))
            return boat, list(said.values())

    boat, said = run(conversation())
    reader = sphn.OpusStreamReader(RATE)
    heard = np.concatenate([reader.append_bytes(message) for message in speech("boat", STEPS + 7)])
    frames = list(heard[: len(heard) // FRAME * FRAME].reshape(-1, FRAME))
    expected = [answer for answer in stock_answers(ttt_repo, frames, torch.float64) if answer.pcm is not None]
    mine = next(pcm for pcm in said if np.allclose(pcm[0], expected[0].pcm, rtol=0, atol=1e-6))
    assert len(mine) >= STEPS - 1
    for pcm, answer in zip(mine, expected, strict=False):
        np.testing.assert_allclose(pcm, answer.pcm, rtol=0, atol=1e-6)
    tokenizer = text_of(tokenizer_of(ttt_repo))
    text = "".join(tokenizer(answer.text) for answer in expected if answer.text not in (0, 3))
    assert len(boat.text) > 10
    assert text.startswith(boat.text)


def test_what_is_said_before_the_handshake_is_not_heard_and_a_burst_after_it_is(ttt_repo):
    """Some clients queue sound until the handshake, and send all of it at once then."""

    async def impatient(server):
        async with server.session.ws_connect(server.url + GREEDY) as socket:
            await say(socket, speech("train", 10))
            assert await receive(socket) == b"\x00"
            await say(socket, speech("boat", STEPS + 7))
            return await hear(socket, STEPS)

    async def conversations():
        async with serve(ttt_repo, rows=1) as server:
            usual = await talk(server, "boat", GREEDY)
            frames = server.engine.stats()["frames"]
            async with server.connect():  # so that the next one waits
                waiting = asyncio.create_task(impatient(server))
                while not server.engine.stats()["queue"]:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
            heard = await waiting
            return usual, heard, server.engine.stats()["frames"] - frames

    usual, heard, frames = run(conversations())
    np.testing.assert_array_equal(heard.pcm, usual.pcm)
    assert heard.text == usual.text
    assert frames <= STEPS + 7


def test_a_client_that_streams_from_the_start_is_heard_from_the_handshake_on(ttt_repo):
    """Its stream began before: what a decoder needs of that is not lost."""

    async def conversation():
        async with serve(ttt_repo, rows=1) as server:
            async with server.connect():
                socket = await server.session.ws_connect(server.url + GREEDY)
                messages = speech("boat", STEPS + 17)
                await say(socket, messages[:10])
                while not server.engine.stats()["queue"]:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.5)  # so that they have come
            assert await receive(socket) == b"\x00"
            await say(socket, messages[10:])
            heard = await hear(socket, STEPS)
            await socket.close()
            return heard, server.engine.stats()["frames"]

    heard, frames = run(conversation())
    assert len(heard.pcm) >= (STEPS - 2) * FRAME
    assert heard.end is None
    assert frames <= STEPS + 7


def test_a_whole_opus_file_in_one_message_is_heard_from_beginning_to_end(many):
    steps = 100  # eight seconds

    async def conversation(server):
        async with server.connect() as socket:
            await socket.send_bytes(b"\x01" + b"".join(speech("boat", steps)))
            return await hear(socket, steps - 6)

    dropped = many.server.engine.dropped_frames
    assert len(many.run(conversation).pcm) >= (steps - 8) * FRAME
    assert many.server.engine.dropped_frames == dropped


def test_metadata_comes_only_to_who_asks_and_tells_of_their_own_row(many):
    async def conversations(server):
        asks, other = await asyncio.gather(
            talk(server, "boat", "?metadata=1", 40), talk(server, "sister", "?metadata=0", 20)
        )
        async with server.connect("?metadata=1") as socket:
            await socket.send_bytes(b'\x04{"updates": false}')
            return asks, other, await hear_metadata(socket, lambda told: not told["updates"])

    asks, other, muted = many.run(conversations)
    assert other.told == []
    told = [json.loads(message[1:]) for message in asks.told]
    assert all(message[0] == 4 for message in asks.told)
    assert len(told) >= 2
    assert set(told[-1]) == {"type", "layers", "updates", "step_ms", "waiting_frames", "dropped_frames"}
    assert [layer["layer"] for layer in told[-1]["layers"]] == [1, 3]
    assert told[0]["layers"][0]["relative_delta"] == 0 < told[-1]["layers"][0]["relative_delta"] < 1
    assert all(0 <= layer["chunk_filled"] < 1 for message in told for layer in message["layers"])
    assert told[-1]["updates"] is True
    assert told[-1]["step_ms"] > 0
    assert muted["type"] == "memory"


def learnt(told: dict) -> bool:
    return any(layer["relative_delta"] for layer in told.get("layers", []))


async def hear_metadata(socket, wanted) -> dict:
    while True:
        message = await receive(socket)
        if message[0] == 4 and wanted(told := json.loads(message[1:])):
            return told


def test_who_asks_to_be_forgotten_talks_on_with_fresh_fast_weights(many):
    async def conversation(server):
        async with server.connect("?metadata=1") as socket:
            await say(socket, speech("sister", 24))
            await hear_metadata(socket, learnt)
            await socket.send_bytes(b'\x04{"forget": true}')
            forgotten = await hear_metadata(socket, lambda told: not learnt(told))
            saying = asyncio.create_task(say(socket, speech("sister", 24)))
            await hear_metadata(socket, learnt)
            await saying
            return forgotten

    assert [layer["relative_delta"] for layer in many.run(conversation)["layers"]] == [0, 0]


def test_who_comes_to_a_full_server_is_told_their_place_and_who_finds_no_place_comes_again(ttt_repo):
    async def come_and_wait(server, places):
        async with server.session.ws_connect(server.url + "?metadata=1") as socket:
            while (message := await receive(socket)) != b"\x00":
                places.append(json.loads(message[1:])["place"])
            await say(socket, speech("boat", STEPS + 7))
            return await hear(socket, 5)

    async def conversations():
        async with serve(ttt_repo, rows=1, policy=Policy(queue=2)) as server:
            seen = [[], []]
            async with server.connect():
                waiting = []
                for places in seen:
                    waiting.append(asyncio.create_task(come_and_wait(server, places)))
                    while not places:
                        await asyncio.sleep(0.01)
                async with server.session.ws_connect(server.url) as socket:
                    turned_away = await hear(socket)
                stats = server.engine.stats()
            heard = [await task for task in waiting]
            return seen, turned_away, stats, heard

    seen, turned_away, stats, heard = run(conversations())
    assert seen == [[1], [2, 1]]
    assert turned_away.end == (1013, "all places are taken, come again")
    assert turned_away.told == [b"\x05all places are taken, come again"]
    assert (stats["people"], stats["queue"], stats["free"]) == (1, 2, 0)
    assert all(len(one.pcm) for one in heard)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("?voice_prompt=NATF0.pt", "voice_prompt: this server has no prompts"),
        ("?text_prompt=You+are+wise", "text_prompt: this server has no prompts"),
        ("?text_temperature=hot", "text_temperature='hot': must be a number"),
        ("?audio_temperature=-1", "audio_temperature=-1.0: must be a number from 0 to 100"),
        ("?audio_temperature=nan", "audio_temperature=nan: must be a number from 0 to 100"),
        ("?text_topk=1.5", "text_topk='1.5': must be a whole number"),
        ("?audio_topk=-3", "audio_topk=-3: must be a whole number, 0 or more"),
        ("?text_seed=seed", "text_seed='seed': must be a whole number"),
        ("?seed=1.5", "seed='1.5': must be a whole number"),
        ("?seed=1&audio_seed=2", "seed: leave it out, or audio_seed"),
        ("?metadata=yes", "metadata='yes': must be 0 or 1"),
    ],
)
def test_what_an_address_may_not_ask_for_is_refused_by_name(many, query, reason):
    async def ask(server):
        async with server.session.ws_connect(server.url + query) as socket:
            return await hear(socket)

    refused = many.run(ask)
    assert refused.end[0] == 1008
    assert refused.end[1].startswith(reason)
    assert refused.told == [b"\x05" + refused.end[1].encode()]


def test_a_page_of_another_site_may_not_talk(ttt_repo):
    from moshi_patch.serving.web.access import Access

    async def conversation():
        async with serve(ttt_repo, access=Access("localhost")) as server:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await server.session.ws_connect(server.url, headers={"Origin": "https://example.org"})
            return refused.value.status

    assert run(conversation()) == 403
