"""Shared by the tests that talk to a server: one in this process, one in its own, and a client that speaks Opus."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import moshi.models
import numpy as np
import pytest
import sphn
import torch
from aiohttp import web
from moshi.models import LMGen

import moshi_patch
from moshi_patch.__main__ import main
from moshi_patch.serving.stock.stock_server import find_chat_handler
from tests.support.listening import listening
from tests.support.tiny_repository import DATA, ENVIRONMENT, ROOT

RATE, FRAME = 24_000, 1920
ANSWERS = 40  # audio messages to wait for: two chunks of 16 steps and a half one
START_S, ANSWER_S = 120, 120  # longest waits for a server to start and for its answers, on a busy machine
BUSY = 1013
IDLE_S = 2
UPGRADE = (
    b"GET /api/chat HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)


@dataclass
class Answer:
    """What a server said on one connection: samples, and each text with the number of audio messages before it."""

    pcm: np.ndarray
    texts: list[tuple[int, str]] = field(default_factory=list)


def user_speech(name: str = "boat", steps: int = ANSWERS + 5) -> np.ndarray:
    """What the user says in a dialogue.

    A few steps more than `ANSWERS`: the delays between codebooks and the codec's own keep some back.
    """
    return sphn.read(str(DATA / f"{name}.wav"))[0][1][: steps * FRAME]


def speech(name: str = "boat", steps: int = ANSWERS + 5) -> list[bytes]:
    """The same in Opus: one message per step of 80 ms."""
    writer = sphn.OpusStreamWriter(RATE)
    messages = [writer.append_pcm(frame) for frame in np.split(user_speech(name, steps), steps)]
    return [message for message in messages if message]


class Client:
    """Talks to a server on this machine.

    Attributes:
        port: of the server.
    """

    port: int

    def status(self) -> dict[str, Any]:
        """What `GET /api/ttt` answers; older than a second it never is."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/ttt", timeout=ANSWER_S) as answer:
            assert answer.headers["Content-Type"].startswith("application/json")
            return json.load(answer)

    def is_free(self) -> bool:
        """Whether nobody holds the server's one place any more, within the time that a silent client would have had."""
        deadline = time.monotonic() + ANSWER_S
        while self.status()["connected"] and time.monotonic() < deadline:
            time.sleep(0.2)
        return not self.status()["connected"]

    @property
    def chat(self) -> str:
        return f"ws://127.0.0.1:{self.port}/api/chat"

    @asynccontextmanager
    async def connect(self):
        """A websocket that has its place: after the handshake. While the server is busy, tried again as it asks for."""
        async with aiohttp.ClientSession() as session:
            for _ in range(20):
                async with session.ws_connect(self.chat) as websocket:
                    first = await websocket.receive()
                    if first.type == aiohttp.WSMsgType.CLOSE and first.data == BUSY:
                        continue
                    assert first.data == b"\x00", first  # the handshake: from here on the stream is ours
                    yield websocket
                    return
            pytest.fail("The server stays busy.")

    def talk(self, messages: list[bytes], count: int = ANSWERS) -> Answer:
        """Says `messages`, listens to `count` messages of audio and vanishes without a goodbye."""
        return asyncio.run(asyncio.wait_for(self.listen(messages, count=count), ANSWER_S))

    async def listen(self, messages: list[bytes], pause: float = 0.0, count: int = ANSWERS) -> Answer:
        """As :meth:`talk`, waiting `pause` seconds before each message."""
        async with self.connect() as websocket:
            saying = asyncio.create_task(self.say(websocket, messages, pause))
            answer = await self.answers(websocket, count)
            await saying
            websocket._response.connection.transport.abort()
        return answer

    async def say(self, websocket, messages: list[bytes], pause: float = 0.0) -> None:
        for message in messages:
            await asyncio.sleep(pause)
            await websocket.send_bytes(b"\x01" + message)

    async def answers(self, websocket, count: int) -> Answer:
        """What the server says until `count` messages of audio have come."""
        reader, pcm, texts = sphn.OpusStreamReader(RATE), [], []
        while len(pcm) < count:
            answer = await websocket.receive_bytes()
            if answer[0] == 1:
                pcm.append(reader.append_bytes(answer[1:]))
            else:
                assert answer[0] == 2
                texts.append((len(pcm), answer[1:].decode()))
        return Answer(np.concatenate(pcm), texts)


def run(client):
    """What a coroutine returns, before the test takes too long."""
    return asyncio.run(asyncio.wait_for(client, ANSWER_S))


def arguments(repo, port: int) -> list[str]:
    """Of `moshi.server`, with a model in a local folder and no page."""
    return ["--device", "cpu", "--hf-repo", str(repo), "--static", "none", "--host", "127.0.0.1", "--port", str(port)]


class ServerProcess(Client):
    """`python -m moshi_patch moshi.server` in a process of its own, on a port that was free a moment ago."""

    def __init__(self, options: list[str], repo, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        command = [sys.executable, "-m", "moshi_patch", "moshi.server", *options, *arguments(repo, self.port)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)

    def wait_until_it_listens(self) -> "ServerProcess":
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.1)
        pytest.fail(f"No server after {START_S} s:\n{self.log.read_text()}")

    def stop(self) -> None:
        """As an operator does: SIGTERM. Fails when the server needs more than that."""
        self.process.terminate()
        try:
            self.process.wait(START_S)
        finally:
            self.process.kill()
            self.process.wait(START_S)


class ServerHere(Client):
    """The server that the same command makes, in this process: an event loop in a thread of its own.

    The patch has to stay installed while it serves.

    Args:
        options: of the command.
        repo: folder of the model.

    Attributes:
        events: what `ObservedLMGen` wrote down, one entry per reset and step.
    """

    def __init__(self, options: list[str], repo):
        self.app, self.events = load_app([*options, *arguments(repo, 0)])
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> "ServerHere":
        self._thread.start()
        assert self._ready.wait(START_S)
        return self

    def _run(self) -> None:
        with torch.no_grad():  # as moshi's server, whose switch holds for its own thread alone
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with listening(self.app) as (_, self.port):
            self._ready.set()
            await self._end.wait()

    def stop(self) -> None:
        """As SIGTERM does. Waits for the end of the conversation."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(START_S)
        assert not self._thread.is_alive()


def load_app(words: list[str]) -> tuple[web.Application, list[dict[str, Any]]]:
    """The application that `python -m moshi_patch moshi.server WORDS` would serve, and what its model will do."""
    caught, events = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "run_app", lambda app, **options: caught.append(app))
        patch.setattr(sys, "argv", ["pytest"])
        patch.setattr(ObservedLMGen, "events", events, raising=False)
        patch.setattr(moshi.models, "LMGen", ObservedLMGen)
        main(["moshi.server", *words])
    (app,) = caught
    find_chat_handler(app).__globals__["log"] = lambda *_: None  # a line per step and per word
    return app, events


@contextlib.contextmanager
def serve_here(options: list[str], repo) -> Iterator[ServerHere]:
    """A server in this process, until the end of the block."""
    server = ServerHere(options, repo).start()
    try:
        yield server
    finally:
        server.stop()


class ObservedLMGen(LMGen):
    """A stock `LMGen` that writes down the state of its fast weights after each reset and step.

    Each entry has `event`, `fresh`, and with one value per layer `position`, `updates` and `delta_norm`.

    Attributes:
        events: where to; of the class when the object is made.
    """

    events: list[dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.events = type(self).events

    def reset_streaming(self, reset_mask: torch.Tensor | None = None) -> None:
        super().reset_streaming(reset_mask)
        self._write_down("reset")

    def step(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        tokens = super().step(*args, **kwargs)
        self._write_down("step")
        return tokens

    def _write_down(self, event: str) -> None:
        gatings = moshi_patch.ttt_gatings(self.lm_model)
        stats = moshi_patch.ttt_stats(self.lm_model).values() if gatings else []
        positions = [gating.get_streaming_state()[""].fast.position.item() for gating in gatings.values()]
        self.events.append(
            {
                "event": event,
                "fresh": all(is_fresh(gating) for gating in gatings.values()),
                "position": positions,
                "updates": [layer["updates"][0] for layer in stats],
                "delta_norm": [layer["delta_norm"][0] for layer in stats],
            }
        )


def is_fresh(gating: moshi_patch.TTTGating) -> bool:
    """Whether all that `gating` remembers is, bit for bit, what it remembers before it has heard anything."""
    state = gating.get_streaming_state()[""].fast
    fresh = gating._init_streaming_state(1).fast
    names = [field.name for field in dataclasses.fields(state)]
    return all(torch.equal(getattr(state, name), getattr(fresh, name)) for name in names)
