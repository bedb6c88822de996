"""What is added to a server's conversations: how they end, what they leave, what is seen of them."""

import asyncio
import logging
import os

import aiohttp
import pytest
import torch
from aiohttp import web

import moshi_patch
from moshi_patch.serving.engine.percentiles import percentiles
from moshi_patch.serving.stock import conversations
from moshi_patch.serving.stock.conversations import WEBSOCKET_KEY, layer_status
from moshi_patch.serving.stock.kept_memory import KeptMemory
from moshi_patch.serving.web import closing
from moshi_patch.serving.web.closing import close_or_cut
from tests.support.disks import largest_file
from tests.support.listening import listening
from tests.support.models import TTT, TTT_MLP, randomise_targets, tiny_model
from tests.support.small_server import SPEECH, TIMEOUT_S, converse, run, served


def test_what_a_conversation_learnt_whose_step_failed_is_not_kept(tmp_path, patched, caplog):
    path = tmp_path / "memory"

    async def clients():
        async with served(memory=KeptMemory(path)) as (_, session):
            await converse(session, *SPEECH)
            before = path.read_bytes()
            broken = await converse(session, "speech", "too few")
            assert path.read_bytes() == before
            await converse(session, *SPEECH)
            assert path.read_bytes() != before
            return broken

    broken = run(clients())
    assert f"--memory {path}: not saved, the file is as before: a step failed" in caplog.text
    assert broken.data == 1011
    assert "error in the server" in broken.extra


@pytest.mark.parametrize("remembers", [True, False])
def test_a_row_that_is_not_finite_ends_with_its_reason_and_the_next_one_is_fresh(tmp_path, patched, caplog, remembers):
    path = tmp_path / "memory"

    async def clients():
        async with served(memory=KeptMemory(path) if remembers else None) as (server, session):
            await converse(session, *SPEECH)
            before = path.read_bytes() if remembers else None
            ends = [await converse(session, "spoil", "speech")]
            assert not remembers or path.read_bytes() == before
            ends.append(await converse(session, *SPEECH, "report"))
            return ends, server.reports

    (broken, sound), (report,) = run(clients())
    assert broken.data == 1011
    kept = "what was saved last goes on" if remembers else "starts fresh"
    assert broken.extra == f"the model's numbers are not finite any more; the next one {kept}"
    assert "as its fast weights or caches were not finite any more" in caplog.text
    assert "Traceback" not in caplog.text
    assert (f"--memory {path}: not saved" in caplog.text) == remembers
    assert sound.type == aiohttp.WSMsgType.CLOSED
    assert report


def test_the_log_says_whose_memory_was_loaded_and_saved_and_how_large_it_is(tmp_path, patched, caplog):
    path = tmp_path / "anna"
    caplog.set_level(logging.INFO, "moshi_patch")

    async def clients():
        async with served(memory=KeptMemory(path)) as (_, session):
            for _ in range(2):
                await converse(session, *SPEECH)

    run(clients())
    lines = [record.getMessage() for record in caplog.records if "--memory" in record.getMessage()]
    assert (
        lines[:2] == [f"--memory {path}: no file yet, so this memory begins empty."] * 2
    )  # at the start, and the reset
    size = rf"{path.stat().st_size / 2**20:.1f} MiB"
    after = f"{size} after 12 steps of 80 ms and 4 updates in 2 layers."
    assert lines[2:4] == [f"--memory {path}: saved, {after}", f"--memory {path}: loaded, {after}"]
    assert lines[4] == f"--memory {path}: saved, {size} after 24 steps of 80 ms and 8 updates in 2 layers."


def test_a_full_disk_at_the_end_of_a_conversation_is_one_line_and_leaves_the_old_memory(tmp_path, patched, caplog):
    path = tmp_path / "memory"

    async def clients():
        async with served(memory=KeptMemory(path)) as (_, session):
            await converse(session, *SPEECH)
            before = path.read_bytes()
            with largest_file(5_000):
                end = await converse(session, *SPEECH)
            assert path.read_bytes() == before
            await converse(session, *SPEECH)
            assert path.read_bytes() != before
            return end

    assert run(clients()).type == aiohttp.WSMsgType.CLOSED
    (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert error.exc_info is None
    assert error.getMessage() == (
        f"--memory {path}: not saved, the file is as before: {path}: cannot be written (File too large)."
    )
    assert os.listdir(tmp_path) == ["memory"]


def test_a_client_that_does_not_read_is_cut_off(patched, monkeypatch):
    """Its answers fill every buffer on the way, so a close frame would never leave."""
    monkeypatch.setattr(closing, "CLOSE_S", 0.5)

    async def clients():
        async with served(idle_timeout=1.0) as (_, session):
            websocket = await session.ws_connect("/api/chat")
            websocket._response.connection.transport.pause_reading()
            await websocket.send_str("flood")
            await asyncio.sleep(0)
            return await converse(session, *SPEECH)  # waits for its turn, and gets it

    monkeypatch.setattr(conversations, "NEWCOMER_WAITS_S", TIMEOUT_S)
    assert run(clients()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING)


def test_a_client_that_sends_faster_than_it_is_answered_keeps_nobody_else_waiting(patched):
    async def clients():
        async with served() as (_, session), session.ws_connect("/api/chat") as websocket:
            for _ in range(200):
                await websocket.send_str("speech")
            while await websocket.receive_bytes() != b"\x01":
                pass
            async with session.get("/api/ttt") as answer:
                websocket._response.connection.transport.abort()
                return await answer.json()

    assert 0 < run(clients())["steps"] < 100


def test_a_request_without_a_websocket_is_cut(patched):
    async def client():
        app = web.Application()

        async def handler(request: web.Request) -> web.Response:
            assert WEBSOCKET_KEY not in request
            await close_or_cut(request, None, 1000, "")
            return web.Response()

        app.router.add_get("/", handler)
        async with listening(app) as (host, port), aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientConnectionError):
                await session.get(f"http://{host}:{port}/")

    run(client())


def test_several_who_ask_for_the_status_at_once_cost_one_reading_of_it(patched, monkeypatch):
    readings = []

    def counted(gating):
        readings.append(gating)
        return layer_status(gating)

    monkeypatch.setattr(conversations, "layer_status", counted)
    monkeypatch.setattr(conversations, "STATUS_KEPT_S", TIMEOUT_S)

    async def get(session):
        async with session.get("/api/ttt") as answer:
            return await answer.json()

    async def clients():
        async with served() as (_, session):
            return await asyncio.gather(*[get(session) for _ in range(20)])

    answers = run(clients())
    assert answers[0]["connected"] is False
    assert answers == answers[:1] * 20
    assert len(readings) == len(TTT["ttt_layers"])


def test_percentiles_are_in_milliseconds_and_none_without_steps():
    assert percentiles(torch.arange(101).numpy() / 1000) == {"p50": 50.0, "p99": 99.0}
    assert percentiles(torch.empty(0).numpy()) == {"p50": None, "p99": None}


@pytest.mark.parametrize(("ttt", "field"), [(TTT, "delta"), (TTT_MLP, "delta2")], ids=["in_place", "mlp"])
def test_a_relative_delta_that_is_no_number_is_none_as_json_has_none(patched, ttt, field):
    model = randomise_targets(tiny_model(**ttt))
    memory = next(iter(moshi_patch.ttt_memories(model).values()))
    with model.streaming(1):
        assert layer_status(memory) == {"updates": 0, "relative_delta": 0.0}
        getattr(memory._streaming_state.fast, field).fill_(torch.inf)
        assert layer_status(memory) == {"updates": 0, "relative_delta": None}
