"""`python -m moshi_patch moshi.server --device cpu` over a websocket: real speech in Opus, what an operator sees."""

import asyncio
import json
import time

import aiohttp
import numpy as np
import pytest

from tests.support.servers import ANSWERS, BUSY, FRAME, run, serve_here
from tests.support.tiny_repository import build_repo

pytestmark = pytest.mark.slow

CHUNK = 16  # ttt_chunk_size of the repository
LAYERS = ["transformer.layers.1.gating", "transformer.layers.3.gating"]


def test_after_a_client_vanished_the_next_one_gets_the_same_answer_to_the_same_speech(server, usual, said):
    assert len(usual.pcm) >= (ANSWERS - 2) * FRAME
    assert np.abs(usual.pcm).max() > 0.01
    assert len({text for _, text in usual.texts}) > 3
    second = server.talk(said)
    assert second.texts == usual.texts
    np.testing.assert_array_equal(second.pcm, usual.pcm)

    async def watched():
        """The same speech once more, with somebody who asks for the status all the time."""
        talking = asyncio.create_task(server.listen(said, pause=0.1))  # longer than a status is kept
        seen = []
        while not talking.done():
            seen.append(await asyncio.to_thread(server.status))
            await asyncio.sleep(0.05)
        return await talking, seen

    third, seen = run(watched())
    assert third.texts == usual.texts
    np.testing.assert_array_equal(third.pcm, usual.pcm)
    assert any(status["connected"] for status in seen)


def test_a_connection_starts_with_fresh_fast_weights_whatever_the_last_one_left(server, usual, said):
    assert server.is_free()
    server.events.clear()
    server.talk(said)
    server.talk(said)
    first, second = (i for i, event in enumerate(server.events) if event["event"] == "reset")

    left = server.events[second - 1]  # in the middle of a chunk, after updates in both layers
    assert not left["fresh"]
    assert all(position % CHUNK not in (0, CHUNK - 1) for position in left["position"])
    assert all(
        updates == position // CHUNK >= 2 for updates, position in zip(left["updates"], left["position"], strict=True)
    )
    assert all(norm > 0 for norm in left["delta_norm"])

    assert server.events[second]["fresh"]
    assert server.events[second]["position"] == server.events[second]["updates"] == [0, 0]
    assert server.events[second]["delta_norm"] == [0.0, 0.0]

    before, after = server.events[first:second], server.events[second:]  # the fast weights learn the same once more
    steps = min(len(before), len(after))
    assert steps > ANSWERS
    assert before[:steps] == after[:steps]


def test_the_status_shows_ttt_working_and_nothing_of_it_when_nobody_is_there(server, said):
    assert server.is_free()
    nobody = server.status()
    assert (nobody["enabled"], nobody["connected"], nobody["steps"], nobody["step_ms"]) == (True, False, None, None)
    assert nobody["layers"] == {name: {"updates": None, "relative_delta": None} for name in LAYERS}
    assert nobody["memory"] is False

    async def converse():
        async with server.connect() as websocket:
            await server.say(websocket, said)
            await server.answers(websocket, ANSWERS)
            await asyncio.sleep(1.1)  # the status is at most a second old
            return await asyncio.to_thread(server.status)

    there = run(converse())
    assert there["connected"]
    assert there["steps"] >= ANSWERS
    assert there["layers"].keys() == set(LAYERS)
    for layer in there["layers"].values():
        assert layer["updates"] == there["steps"] // CHUNK >= 2
        assert 0 < layer["relative_delta"] < 1
    assert 0 < there["step_ms"]["p50"] <= there["step_ms"]["p99"] < 60_000
    assert there["uptime_s"] > nobody["uptime_s"] >= 0

    assert server.is_free()
    assert {key: value for key, value in server.status().items() if key != "uptime_s"} == {
        key: value for key, value in nobody.items() if key != "uptime_s"
    }


@pytest.mark.usefixtures("patched_module")
def test_settings_come_from_the_repository_alone(tmp_path, said):
    repo = build_repo(tmp_path / "repo", ttt_chunk_size=8, ttt_layers=[2], ttt_learning_rate=0.002)

    async def converse(server):
        async with server.connect() as websocket:
            await server.say(websocket, said)
            await server.answers(websocket, ANSWERS)
            return await asyncio.to_thread(server.status)

    with serve_here([], repo) as server:
        status = run(converse(server))
    config = json.loads((repo / "config.json").read_text())
    assert {key: status["settings"][key] for key in config if key.startswith("ttt_")} == {
        key: value for key, value in config.items() if key.startswith("ttt_")
    }
    assert [layer["updates"] for layer in status["layers"].values()] == [status["steps"] // 8]
    assert status["steps"] // 8 >= 5


@pytest.mark.usefixtures("patched_module")
def test_a_model_without_ttt_is_served_too_and_the_status_says_so(stock_repo, said):
    with serve_here([], stock_repo) as server:
        assert len(server.talk(said).pcm) >= (ANSWERS - 2) * FRAME
        status = server.status()
    assert (status["enabled"], status["settings"], status["layers"]) == (False, None, {})


def test_a_second_client_is_told_that_the_server_is_busy_and_the_first_one_notices_nothing(server, usual, said):
    async def meet():
        talking = asyncio.create_task(server.listen(said, pause=0.12))
        await asyncio.sleep(0.5)
        async with aiohttp.ClientSession() as session:
            start = time.monotonic()
            async with session.ws_connect(server.chat) as second:
                refusal = await second.receive()
            waited = time.monotonic() - start
        return refusal, waited, talking.done(), await talking

    refusal, waited, over, first = run(meet())
    assert refusal.type == aiohttp.WSMsgType.CLOSE
    assert refusal.data == BUSY
    assert "another conversation is in progress" in refusal.extra
    assert waited < 30
    assert not over
    assert first.texts == usual.texts
    np.testing.assert_array_equal(first.pcm, usual.pcm)
    assert server.talk(said).texts == usual.texts  # and the place is free again
