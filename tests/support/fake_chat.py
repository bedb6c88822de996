"""Shared by the tests of the page: a server of the chat's protocol without a model, which says back what it hears."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import sphn
from aiohttp import web

from moshi_patch.serving.web.web_page import add_page
from tests.support.listening import listening

RATE, FRAME = 24_000, 1920
START_S = 30
WORDS = ["▁my", "▁boat", "▁is", "▁Nim", "bus", "."]
TOKEN = "secret-of-anna-0123456789abcdef"
TICKET = "one-time"
LAYERS = (5, 11)


@dataclass
class Heard:
    """What one connection brought: samples, wishes, and what stood in its address."""

    query: dict[str, str]
    pcm: list[np.ndarray] = field(default_factory=list)
    wishes: list[dict] = field(default_factory=list)


class FakeChat:
    """Serves the page and `/api/chat` on a free port of this machine, in a thread of its own.

    Attributes:
        port: where.
        connections: what was heard, oldest first.
        layers: of the model that have a memory.
        paths: what was asked for.
        asks_token: whether tickets are given for `TOKEN` alone.
        place: in the queue, told to who comes; None: there is room.
        is_silent: whether it says nothing more, as when a network is gone.
        refusal: status and headers with which tickets are refused; None: they are not.
        close: code and reason with which the next connection is closed at once; None: none is.
    """

    def __init__(self) -> None:
        self.port = 0
        self.layers = LAYERS
        self.connections: list[Heard] = []
        self.paths: list[str] = []
        self.asks_token = self.is_silent = False
        self.place: int | None = None
        self.close: tuple[int, str] | None = None
        self.refusal: tuple[int, dict[str, str]] | None = None
        self._ends: dict[web.WebSocketResponse, asyncio.Future] = {}
        self._ready, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def reset(self) -> None:
        """As new, for the next test."""
        self.connections, self.paths, self.layers = [], [], LAYERS
        self.asks_token, self.is_silent, self.place, self.close, self.refusal = False, False, None, None, None

    def hang_up(self, code: int = 1000, reason: str = "", cut: bool = False) -> None:
        """Closes all that talk, or cuts their connections as a killed server does."""
        asyncio.run_coroutine_threadsafe(self._hang_up(code, reason, cut), self._loop).result(START_S)

    async def _hang_up(self, code: int, reason: str, cut: bool) -> None:
        for socket, end in list(self._ends.items()):
            if cut:
                socket._req.transport.abort()
            elif not end.done():
                end.set_result((code, reason))

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.on_response_prepare.append(self._note)
        add_page(app)
        app.router.add_post("/api/ticket", self._give_ticket)
        app.router.add_get("/api/chat", self._chat)
        async with listening(app) as (_, self.port):
            self._ready.set()
            await self._end.wait()
            await self._hang_up(1001, "", cut=True)

    async def _note(self, request: web.Request, response: web.StreamResponse) -> None:
        self.paths.append(request.path)

    async def _give_ticket(self, request: web.Request) -> web.Response:
        if self.refusal:
            status, headers = self.refusal
            return web.json_response({"error": "no"}, status=status, headers=headers)
        if self.asks_token and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise web.HTTPUnauthorized
        return web.json_response({"ticket": TICKET, "expires_in": 30})

    async def _chat(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        heard = Heard(dict(request.query))
        self.connections.append(heard)
        if self.place is not None:
            await tell(socket, {"type": "queue", "place": self.place})
            while self.place is not None:
                await asyncio.sleep(0.02)
        if self.close:
            (code, reason), self.close = self.close, None
            await socket.close(code=code, message=reason.encode())
            return socket
        end = self._ends[socket] = asyncio.get_running_loop().create_future()
        talk = asyncio.create_task(self._converse(socket, heard))
        try:
            await asyncio.wait([talk, end], return_when=asyncio.FIRST_COMPLETED)
            talk.cancel()  # a socket that somebody reads while it is closed is cut: the code may not arrive
            await asyncio.wait([talk])
            if not talk.cancelled():
                talk.result()
            if end.done():
                code, reason = end.result()
                await socket.close(code=code, message=reason.encode())
        finally:
            del self._ends[socket]
        return socket

    async def _converse(self, socket: web.WebSocketResponse, heard: Heard) -> None:
        with contextlib.suppress(ConnectionError):
            await socket.send_bytes(b"\x00")
            await self._answer(socket, heard)

    async def _answer(self, socket: web.WebSocketResponse, heard: Heard) -> None:
        reader, writer, rest, frames = sphn.OpusStreamReader(RATE), sphn.OpusStreamWriter(RATE), np.zeros(0), 0
        updates = True
        async for message in socket:
            if message.data[0] == 4:
                heard.wishes.append(json.loads(message.data[1:]))
                updates = heard.wishes[-1].get("updates", updates)
                continue
            if self.is_silent:
                continue
            pcm = reader.append_bytes(message.data[1:])
            heard.pcm.append(pcm)
            rest = np.concatenate([rest, pcm])
            while len(rest) >= FRAME:
                frame, rest = rest[:FRAME].astype(np.float32), rest[FRAME:]
                sound = writer.append_pcm(frame)
                if sound:
                    await socket.send_bytes(b"\x01" + sound)
                if frames % 5 == 0:
                    await socket.send_bytes(b"\x02" + WORDS[frames // 5 % len(WORDS)].replace("▁", " ").encode())
                frames += 1
                layers = [figures(layer, frames) for layer in self.layers]
                state = {"updates": updates, "step_ms": 12.3, "waiting_frames": 0, "dropped_frames": 0}
                if frames % 4 == 0:
                    await tell(socket, {"type": "memory", "layers": layers, **state})

    def start(self) -> "FakeChat":
        self._thread.start()
        assert self._ready.wait(START_S)
        return self

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(START_S)


def figures(layer: int, frames: int) -> dict:
    """A memory that grows, for one layer."""
    known = min(1.0, frames / 100) if layer == 11 else None
    return {"layer": layer, "relative_delta": 1e-4 * frames, "known": known, "chunk_filled": frames % 16 / 16}


async def tell(socket: web.WebSocketResponse, message: dict) -> None:
    await socket.send_bytes(b"\x04" + json.dumps(message).encode())


@contextlib.contextmanager
def fake_chat() -> Iterator[FakeChat]:
    chat = FakeChat().start()
    try:
        yield chat
    finally:
        chat.stop()
