"""What is added to a server, in this process: its options, what it builds on, and conversations that end badly."""

import asyncio
import contextlib
import os

import aiohttp
import pytest
import torch
from aiohttp import web
from moshi.models import LMGen

import moshi_patch
from moshi_patch.__main__ import main
from moshi_patch.serving import conversations
from moshi_patch.serving.conversations import WEBSOCKET_KEY, Conversations, close_or_cut, layer_status, percentiles
from moshi_patch.serving.stock_server import Options, add_conversations, missing_parts, split_options
from tests.support.models import TTT, randomise_targets, tiny_model

TIMEOUT_S = 60


def test_the_options_are_taken_out_and_the_server_gets_the_rest(tmp_path):
    path = tmp_path / "memory"
    stock = ["--device", "cpu", "--half", "--hf-repo", "repo"]
    assert split_options(stock) == (Options(None, 30.0), stock)
    assert split_options(["--memory", str(path), *stock]) == (Options(path, 30.0), stock)
    assert split_options([*stock[:2], f"--memory={path}", *stock[2:], "--idle-timeout", "0"]) == (
        Options(path, 0),
        stock,
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--memory"], "expected one argument"),
        (["--memory", "nosuch/memory"], "--memory nosuch/memory: must be a file in a folder that exists"),
        (["--memory", "."], "--memory .: must be a file"),
        (["--idle-timeout", "-1"], "--idle-timeout -1.0: must be seconds, 0 or more"),
        (["--idle-timeout", "nan"], "--idle-timeout nan: must be"),
        (["--idle-timeout", "soon"], "invalid float value: 'soon'"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_loaded(arguments, reason, capsys):
    with pytest.raises(SystemExit) as exit_:
        split_options(arguments)
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        split_options(["--memory", str(tmp_path / "memory")])
    assert "can be written to" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--memory=m", "--idle-timeout=3"])
def test_other_programs_of_moshi_refuse_the_servers_options(option, capsys, patched):
    with pytest.raises(SystemExit) as exit_:
        main(["moshi.run_inference", option, "in.wav", "out.wav"])
    assert exit_.value.code == 2
    name = option.partition("=")[0]
    assert f"{name} is an option of moshi.server, not of moshi.run_inference" in capsys.readouterr().err


async def another_answer(request: web.Request) -> web.Response:
    return web.Response(text="chat")


def test_a_server_of_another_kind_is_served_as_it_is_and_a_warning_says_missing_parts(monkeypatch, caplog):
    app = web.Application()
    app.router.add_get("/api/chat", another_answer)
    served = []
    monkeypatch.setattr(web, "run_app", lambda app, **options: served.append((app, options)))
    stock = web.run_app
    with add_conversations(Options()):
        web.run_app(app, port=1)
    assert web.run_app is stock
    assert served == [(app, {"port": 1})]
    assert list(app.middlewares) == []
    assert [resource.canonical for resource in app.router.resources()] == ["/api/chat"]
    assert "has no method that answers GET /api/chat" in caplog.text
    assert "no method lm_gen.step of the server" in caplog.text


def test_a_server_of_another_kind_does_not_start_with_a_memory_that_it_would_not_keep(tmp_path):
    with add_conversations(Options(tmp_path / "memory")), pytest.raises(SystemExit) as exit_:
        web.run_app(web.Application())
    assert "has no method that answers GET /api/chat" in str(exit_.value.code)


class SmallServer:
    """As moshi's `ServerState`, with a model but no codec: each message is the name of what happens next."""

    def __init__(self):
        self.lm_gen = LMGen(randomise_targets(tiny_model(torch.float32, **TTT)), use_sampling=False)
        self.lm_gen.streaming_forever(1)

    async def decode_and_send(self, tokens: torch.Tensor, websocket: web.WebSocketResponse) -> None:
        await websocket.send_bytes(b"\x01")

    async def handle_chat(self, request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        self.lm_gen.reset_streaming()
        await websocket.send_bytes(b"\x00")
        async for message in websocket:
            if message.data == "flood":
                await websocket.send_bytes(bytes(100_000_000))
            codes = torch.ones(1, 2 if message.data != "too few" else 1, 1, dtype=torch.long)
            tokens = self.lm_gen.step(codes)
            if message.data == "spoil":
                moshi_patch.ttt_gatings(self.lm_gen.lm_model).popitem()[1]._streaming_state.fast.delta.fill_(torch.nan)
            if tokens is not None:
                await self.decode_and_send(tokens, websocket)
        return websocket


@contextlib.asynccontextmanager
async def served(**options):
    """A `SmallServer` with what is added to it, listening; gives it and a client's session with its address."""
    app, server = web.Application(), SmallServer()
    app.router.add_get("/api/chat", server.handle_chat)
    assert missing_parts(app) == []
    Conversations(server.handle_chat, **options).attach(app)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    try:
        async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
            yield server, session
    finally:
        await runner.cleanup()


def run(client):
    return asyncio.run(asyncio.wait_for(client, TIMEOUT_S))


async def converse(session, *messages: str) -> aiohttp.WSMessage:
    """Says `messages` and returns how the conversation ends: by a goodbye, unless the server ends it before."""
    async with session.ws_connect("/api/chat") as websocket:
        assert await websocket.receive_bytes() == b"\x00"
        for message in messages:
            await websocket.send_str(message)
        while (answer := await websocket.receive()).type == aiohttp.WSMsgType.BINARY:
            if answer.data == b"\x01":
                await websocket.close()
        return answer


SPEECH = ["speech"] * 12


@pytest.mark.parametrize(
    ("end", "code"), [(["speech", "too few"], 1011), (["spoil", "speech"], None)], ids=["step_fails", "not_finite"]
)
def test_what_a_broken_conversation_learnt_is_not_kept(tmp_path, patched, end, code, caplog):
    path = tmp_path / "memory"

    async def clients():
        async with served(memory=path) as (_, session):
            await converse(session, *SPEECH)
            before = path.read_bytes()
            broken = await converse(session, *end)
            assert path.read_bytes() == before
            await converse(session, *SPEECH)
            assert path.read_bytes() != before
            return broken

    broken = run(clients())
    assert f"--memory {path}: not saved" in caplog.text
    if code:
        assert broken.data == code
        assert "error in the server" in broken.extra


def test_a_client_that_does_not_read_is_cut_off(patched, monkeypatch):
    """Its answers fill every buffer on the way, so a close frame would never leave."""
    monkeypatch.setattr(conversations, "CLOSE_TIMEOUT_S", 0.5)

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
            await close_or_cut(request, 1000, "")
            return web.Response()

        app.router.add_get("/", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        try:
            async with aiohttp.ClientSession() as session:
                with pytest.raises(aiohttp.ClientConnectionError):
                    await session.get(f"http://{host}:{port}/")
        finally:
            await runner.cleanup()

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


def test_a_relative_delta_that_is_no_number_is_none_as_json_has_none(patched):
    model = randomise_targets(tiny_model(**TTT))
    gating = model.transformer.layers[1].gating
    with model.streaming(1):
        assert layer_status(gating) == {"updates": 0, "relative_delta": 0.0}
        gating._streaming_state.fast.delta.fill_(torch.inf)
        assert layer_status(gating) == {"updates": 0, "relative_delta": None}
