"""Shared by the tests that talk to a server: the process, a client that speaks Opus, and what it says."""

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import pytest
import sphn

from tests.support.tiny_repository import DATA, ENVIRONMENT, ROOT

RATE, FRAME = 24_000, 1920
ANSWERS = 40  # audio messages to wait for: two chunks of 16 steps and a half one
START_S, ANSWER_S = 120, 120  # longest waits for a server to start and for its answers, on a busy machine
BUSY = 1013


@dataclass
class Answer:
    """What a server said on one connection: samples, and each text with the number of audio messages before it."""

    pcm: np.ndarray
    texts: list[tuple[int, str]] = field(default_factory=list)


def speech(name: str = "boat", steps: int = ANSWERS + 5) -> list[bytes]:
    """What the user says in a dialogue, in Opus: one message per step of 80 ms.

    A few more than `ANSWERS`: the delays between codebooks and the codec's own keep some back.
    """
    pcm = sphn.read(str(DATA / f"{name}.wav"))[0][1]
    writer = sphn.OpusStreamWriter(RATE)
    messages = [writer.append_pcm(frame) for frame in np.split(pcm[: steps * FRAME], steps)]
    return [message for message in messages if message]


class Server:
    """A server in a process of its own, on a port that was free a moment ago."""

    def __init__(self, program: list[str], repo, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        command = [sys.executable, "-m", "moshi_patch", *program, "--device", "cpu", "--hf-repo", str(repo)]
        command += ["--static", "none", "--host", "127.0.0.1", "--port", str(self.port)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)

    def wait_until_it_listens(self) -> "Server":
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.1)
        pytest.fail(f"No server after {START_S} s:\n{self.log.read_text()}")

    def status(self) -> dict[str, Any]:
        """What `GET /api/ttt` answers; older than a second it never is."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/ttt", timeout=ANSWER_S) as answer:
            assert answer.headers["Content-Type"].startswith("application/json")
            return json.load(answer)

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

    def talk(self, messages: list[bytes]) -> Answer:
        """Says `messages`, listens to `ANSWERS` of audio and vanishes without a goodbye."""
        return asyncio.run(asyncio.wait_for(self.listen(messages), ANSWER_S))

    async def listen(self, messages: list[bytes], pause: float = 0.0) -> Answer:
        """As :meth:`talk`, waiting `pause` seconds before each message."""
        async with self.connect() as websocket:
            saying = asyncio.create_task(self.say(websocket, messages, pause))
            answer = await self.answers(websocket, ANSWERS)
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

    def stop(self) -> None:
        """As an operator does: SIGTERM. Fails when the server needs more than that."""
        self.process.terminate()
        try:
            self.process.wait(START_S)
        finally:
            self.process.kill()
            self.process.wait(START_S)
