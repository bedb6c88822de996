"""`python -m moshi_patch moshi.server --device cpu` over a websocket: real speech in Opus, a client that vanishes."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field

import aiohttp
import numpy as np
import pytest
import sphn

from .fixtures_repo import DATA, ENVIRONMENT, ROOT, build_repo

RATE, FRAME = 24_000, 1920
CHUNK = 16  # ttt_chunk_size of the repository
ANSWERS = 40  # audio messages to wait for: two chunks and a half one
START_S, ANSWER_S = 90, 60  # longest waits for a server to start and for its answers


@dataclass
class Answer:
    """What a server said on one connection: samples, and each text with the number of audio messages before it."""

    pcm: np.ndarray
    texts: list[tuple[int, str]] = field(default_factory=list)


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

    def wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        pytest.fail(f"No server after {START_S} s:\n{self.log.read_text()}")

    def talk(self, messages: list[bytes]) -> Answer:
        """Says `messages`, listens to `ANSWERS` of audio and vanishes without a goodbye."""
        return asyncio.run(asyncio.wait_for(self._talk(messages), ANSWER_S))

    async def _talk(self, messages: list[bytes]) -> Answer:
        reader, pcm, texts = sphn.OpusStreamReader(RATE), [], []
        async with aiohttp.ClientSession() as session:
            socket_ = await session.ws_connect(f"ws://127.0.0.1:{self.port}/api/chat")
            assert await socket_.receive_bytes() == b"\x00"  # the handshake: from here on the stream is ours
            for message in messages:
                await socket_.send_bytes(b"\x01" + message)
            while len(pcm) < ANSWERS:
                answer = await socket_.receive_bytes()
                if answer[0] == 1:
                    pcm.append(reader.append_bytes(answer[1:]))
                else:
                    assert answer[0] == 2
                    texts.append((len(pcm), answer[1:].decode()))
        return Answer(np.concatenate(pcm), texts)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return build_repo(tmp_path_factory.mktemp("tiny") / "repo")


@pytest.fixture
def serve(repo, tmp_path):
    """Starts servers, and ends them with the test."""
    servers = []

    def start(*program: str) -> Server:
        servers.append(Server(list(program), repo, tmp_path / f"server{len(servers)}.log"))
        servers[-1].wait_until_it_listens()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def speech() -> list[bytes]:
    """What the user says in a dialogue, in Opus: one message per step of 80 ms, more than `ANSWERS`."""
    pcm = sphn.read(str(DATA / "boat.wav"))[0][1]
    writer = sphn.OpusStreamWriter(RATE)
    steps = ANSWERS + 5  # the delays between codebooks and the codec's own keep a few back
    messages = [writer.append_pcm(frame) for frame in np.split(pcm[: steps * FRAME], steps)]
    return [message for message in messages if message]


def test_after_a_client_vanished_the_next_one_gets_the_same_answer_to_the_same_speech(serve, speech):
    server = serve("moshi.server")
    first, second = server.talk(speech), server.talk(speech)
    assert len(first.pcm) >= (ANSWERS - 2) * FRAME
    assert np.abs(first.pcm).max() > 0.01
    assert len({text for _, text in first.texts}) > 3
    assert second.texts == first.texts
    np.testing.assert_array_equal(second.pcm, first.pcm)


def test_a_connection_starts_with_fresh_fast_weights_whatever_the_last_one_left(serve, speech, tmp_path):
    log = tmp_path / "state.jsonl"
    server = serve("tests.serve_probe", str(log))
    server.talk(speech)
    server.talk(speech)
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
