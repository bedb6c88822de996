"""Shared by the tests of the server for many people: one in this process, and clients that speak Opus or are rude."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import sphn
import torch
from aiohttp import web

from moshi_patch.serving.engine.policy import Policy
from moshi_patch.serving.engine.tick import Engine
from moshi_patch.serving.program import DRAIN, make_app, text_of
from moshi_patch.serving.web.front import CHAT_PATH, Front
from tests.support.listening import listening
from tests.support.rows import make_rows
from tests.support.servers import ANSWER_S, RATE, speech

STEPS = 20
"""Of a short conversation: the codebooks' delays and the codec's own keep some answers back."""


@dataclass
class Server:
    """A server in this process.

    Attributes:
        url: of its websocket.
    """

    engine: Engine
    app: web.Application
    session: aiohttp.ClientSession
    url: str

    @property
    def address(self) -> str:
        """Host and port."""
        return self.url.split("/")[2]

    @property
    def front(self) -> Front:
        return self.app[DRAIN].front

    @contextlib.asynccontextmanager
    async def connect(self, query: str = "") -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A websocket that has a row: after the handshake."""
        async with self.session.ws_connect(f"{self.url}{query}", max_msg_size=0) as socket:
            assert await receive(socket) == b"\x00"
            yield socket


@dataclass
class Heard:
    """What somebody heard: samples, text, metadata, and how it ended."""

    pcm: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    text: str = ""
    told: list[bytes] = field(default_factory=list)
    end: tuple[int | None, str] | None = None


async def receive(socket: aiohttp.ClientWebSocketResponse) -> bytes:
    """The next message, which is one of bytes."""
    message = await asyncio.wait_for(socket.receive(), ANSWER_S)
    assert message.type is aiohttp.WSMsgType.BINARY, message
    return message.data


async def say(socket: aiohttp.ClientWebSocketResponse, messages: list[bytes], pause: float = 0.0) -> None:
    for message in messages:
        await socket.send_bytes(b"\x01" + message)
        await asyncio.sleep(pause)


async def hear(socket: aiohttp.ClientWebSocketResponse, messages: int | None = None) -> Heard:
    """What comes until so many messages of sound, or until the end."""
    heard, reader, count = Heard(), sphn.OpusStreamReader(RATE), 0
    while count != messages:
        message = await asyncio.wait_for(socket.receive(), ANSWER_S)
        if message.type is not aiohttp.WSMsgType.BINARY:
            heard.end = (socket.close_code, message.extra or "")
            return heard
        kind, data = message.data[0], message.data[1:]
        if kind == 1:
            count += 1
            heard.pcm = np.concatenate([heard.pcm, reader.append_bytes(data)])
        elif kind == 2:
            heard.text += data.decode()
        else:
            heard.told.append(message.data)
    return heard


async def talk(server: Server, name: str = "boat", query: str = "", steps: int = STEPS, pause: float = 0.0) -> Heard:
    """Somebody says a few words, hears the answer and goes."""
    async with server.connect(query) as socket:
        saying = asyncio.create_task(say(socket, speech(name, steps + 7), pause))
        heard = await hear(socket, steps)
        await saying
        return heard


@contextlib.asynccontextmanager
async def serve(
    repo: Any, rows: int = 3, policy: Policy | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> AsyncIterator[Server]:
    """A server with a model of `repo`, until the end of the block. `options`: of `make_app`."""
    made = await asyncio.to_thread(make_rows, repo, rows, dtype)
    engine = Engine(made, policy, options.pop("memories", None))
    app = make_app(engine, text_of(tokenizer_of(repo)), **options)
    async with listening(app) as (host, port), aiohttp.ClientSession() as session:
        yield Server(engine, app, session, f"http://{host}:{port}{CHAT_PATH}")


def tokenizer_of(repo: Any) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(str(repo / "tokenizer.model"))


def run(coroutine: Any) -> Any:
    """What a coroutine returns, before the test takes too long."""
    return asyncio.run(asyncio.wait_for(coroutine, ANSWER_S))


class SharedServer:
    """One server for many tests, in an event loop and a thread of its own. The patch has to stay installed.

    Args:
        options: of :func:`serve`.
    """

    def __init__(self, repo: Any, **options: Any):
        self._repo, self._options, self._ready = repo, options, threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(ANSWER_S)

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with serve(self._repo, **self._options) as self.server:
            self._ready.set()
            await self._end.wait()

    def run(self, client: Callable[..., Any], *arguments: Any) -> Any:
        """What a coroutine of `client(server, *arguments)` returns, before the test takes too long."""
        work = asyncio.wait_for(client(self.server, *arguments), ANSWER_S)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(ANSWER_S)
