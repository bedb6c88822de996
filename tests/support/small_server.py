"""Shared by the tests of conversations: a server as moshi's, in this process, with a model but no codec."""

import asyncio
import contextlib

import aiohttp
import torch
from aiohttp import web
from moshi.models import LMGen

import moshi_patch
from moshi_patch.serving.stock.conversations import Conversations
from moshi_patch.serving.stock.stock_server import missing_parts
from moshi_patch.serving.web.access import Access
from tests.support.listening import listening
from tests.support.models import TTT, randomise_targets, tiny_model

TIMEOUT_S = 60


class SmallServer:
    """As moshi's `ServerState`, with a model but no codec: each message is the name of what happens next."""

    def __init__(self):
        self.lm_gen = LMGen(randomise_targets(tiny_model(torch.float32, **TTT)), use_sampling=False)
        self.lm_gen.streaming_forever(1)
        self.reports = []

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
            if message.data == "report":
                self.reports.append(bool(moshi_patch.finite_rows(self.lm_gen.lm_model).all()))
            if tokens is not None:
                await self.decode_and_send(tokens, websocket)
        return websocket


@contextlib.asynccontextmanager
async def served(access: Access | None = None, **options):
    """A `SmallServer` with what is added to it, listening; gives it and a client's session with its address."""
    app, server = web.Application(), SmallServer()
    app.router.add_get("/api/chat", server.handle_chat)
    assert missing_parts(app) == []
    if access:
        access.attach(app)
    Conversations(server.handle_chat, **options).attach(app)
    async with listening(app) as (host, port), aiohttp.ClientSession(f"http://{host}:{port}") as session:
        yield server, session


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
