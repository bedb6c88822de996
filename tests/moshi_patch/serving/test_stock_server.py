"""`python -m moshi_patch moshi.server --device cpu` over a websocket: real speech in Opus, what an operator sees."""

import asyncio
import json
import time

import aiohttp
import numpy as np
import pytest

from tests.support.servers import ANSWER_S, ANSWERS, BUSY, FRAME, Server, speech
from tests.support.tiny_repository import build_repo

CHUNK = 16  # ttt_chunk_size of the repository
LAYERS = ["transformer.layers.1.gating", "transformer.layers.3.gating"]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return build_repo(tmp_path_factory.mktemp("tiny") / "repo")


@pytest.fixture
def serve(tmp_path):
    """Starts servers, and ends them with the test."""
    servers = []

    def start(repo, *program: str) -> Server:
        servers.append(Server(list(program), repo, tmp_path / f"server{len(servers)}.log"))
        return servers[-1].wait_until_it_listens()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def said() -> list[bytes]:
    return speech()


def test_after_a_client_vanished_the_next_one_gets_the_same_answer_to_the_same_speech(serve, repo, said):
    server = serve(repo, "moshi.server")
    first, second = server.talk(said), server.talk(said)
    assert len(first.pcm) >= (ANSWERS - 2) * FRAME
    assert np.abs(first.pcm).max() > 0.01
    assert len({text for _, text in first.texts}) > 3
    assert second.texts == first.texts
    np.testing.assert_array_equal(second.pcm, first.pcm)

    async def watched():
        """The same speech once more, with somebody who asks for the status all the time."""
        talking = asyncio.create_task(server.listen(said, pause=0.1))  # longer than a status is kept
        seen = []
        while not talking.done():
            seen.append(await asyncio.to_thread(server.status))
            await asyncio.sleep(0.05)
        return await talking, seen

    third, seen = asyncio.run(asyncio.wait_for(watched(), ANSWER_S))
    assert third.texts == first.texts
    np.testing.assert_array_equal(third.pcm, first.pcm)
    assert any(status["connected"] for status in seen)


def test_a_connection_starts_with_fresh_fast_weights_whatever_the_last_one_left(serve, repo, said, tmp_path):
    log = tmp_path / "state.jsonl"
    server = serve(repo, "tests.support.serve_probe", str(log))
    server.talk(said)
    server.talk(said)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    first, second = (i for i, record in enumerate(records) if record["event"] == "reset")

    left = records[second - 1]  # in the middle of a chunk, after updates in both layers
    assert not left["fresh"]
    assert all(position % CHUNK not in (0, CHUNK - 1) for position in left["position"])
    assert all(
        updates == position // CHUNK >= 2 for updates, position in zip(left["updates"], left["position"], strict=True)
    )
    assert all(norm > 0 for norm in left["delta_norm"])

    assert records[second]["fresh"]
    assert records[second]["position"] == records[second]["updates"] == [0, 0]
    assert records[second]["delta_norm"] == [0.0, 0.0]

    before, after = records[first:second], records[second:]  # and the fast weights learn the same once more
    steps = min(len(before), len(after))
    assert steps > ANSWERS
    assert before[:steps] == after[:steps]


def test_the_status_shows_ttt_working_and_nothing_of_it_when_nobody_is_there(serve, repo, said):
    server = serve(repo, "moshi.server")
    nobody = server.status()
    assert (nobody["enabled"], nobody["connected"], nobody["steps"], nobody["step_ms"]) == (True, False, None, None)
    assert nobody["layers"] == {name: {"updates": None, "relative_delta": None} for name in LAYERS}
    assert nobody["memory"] is None

    async def converse():
        async with server.connect() as websocket:
            await server.say(websocket, said)
            await server.answers(websocket, ANSWERS)
            await asyncio.sleep(1.1)  # the status is at most a second old
            return await asyncio.to_thread(server.status)

    there = asyncio.run(asyncio.wait_for(converse(), ANSWER_S))
    assert there["connected"]
    assert there["steps"] >= ANSWERS
    assert there["layers"].keys() == set(LAYERS)
    for layer in there["layers"].values():
        assert layer["updates"] == there["steps"] // CHUNK >= 2
        assert 0 < layer["relative_delta"] < 1
    assert 0 < there["step_ms"]["p50"] <= there["step_ms"]["p99"] < 60_000
    assert there["uptime_s"] > nobody["uptime_s"] >= 0

    deadline = time.monotonic() + ANSWER_S
    while server.status()["connected"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert {key: value for key, value in server.status().items() if key != "uptime_s"} == {
        key: value for key, value in nobody.items() if key != "uptime_s"
    }


def test_settings_come_from_the_repository_alone(serve, tmp_path, said):
    repo = build_repo(tmp_path / "repo", ttt_chunk_size=8, ttt_layers=[2], ttt_learning_rate=0.002)
    server = serve(repo, "moshi.server")

    async def converse():
        async with server.connect() as websocket:
            await server.say(websocket, said)
            await server.answers(websocket, ANSWERS)
            return await asyncio.to_thread(server.status)

    status = asyncio.run(asyncio.wait_for(converse(), ANSWER_S))
    config = json.loads((repo / "config.json").read_text())
    assert {key: status["settings"][key] for key in config if key.startswith("ttt_")} == {
        key: value for key, value in config.items() if key.startswith("ttt_")
    }
    assert [layer["updates"] for layer in status["layers"].values()] == [status["steps"] // 8]
    assert status["steps"] // 8 >= 5


def test_a_model_without_ttt_is_served_too_and_the_status_says_so(serve, tmp_path, said):
    server = serve(build_repo(tmp_path / "repo", ttt=False), "moshi.server")
    assert len(server.talk(said).pcm) >= (ANSWERS - 2) * FRAME
    status = server.status()
    assert (status["enabled"], status["settings"], status["layers"]) == (False, None, {})


def test_a_second_client_is_told_that_the_server_is_busy_and_the_first_one_notices_nothing(serve, repo, said):
    server = serve(repo, "moshi.server")
    alone = server.talk(said)

    async def meet():
        talking = asyncio.create_task(server.listen(said, pause=0.2))
        await asyncio.sleep(0.5)
        async with aiohttp.ClientSession() as session:
            start = time.monotonic()
            async with session.ws_connect(server.chat) as second:
                refusal = await second.receive()
            waited = time.monotonic() - start
        return refusal, waited, talking.done(), await talking

    refusal, waited, over, first = asyncio.run(asyncio.wait_for(meet(), ANSWER_S))
    assert refusal.type == aiohttp.WSMsgType.CLOSE
    assert refusal.data == BUSY
    assert "another conversation is in progress" in refusal.extra
    assert waited < 30
    assert not over
    assert first.texts == alone.texts
    np.testing.assert_array_equal(first.pcm, alone.pcm)
    assert server.talk(said).texts == alone.texts  # and the place is free again
