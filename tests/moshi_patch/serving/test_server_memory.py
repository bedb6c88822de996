"""`moshi.server --memory PATH`: one person's conversations go on where the last one ended, or are refused a start."""

import asyncio
import stat
import subprocess
import time

import aiohttp
import numpy as np
import pytest
import sphn
import torch
from moshi.models import LMGen, loaders
from safetensors.torch import load_file

import moshi_patch
from moshi_patch.memory import fast_weight_tensors
from moshi_patch.repository import local_repositories
from tests.support.servers import ANSWER_S, ANSWERS, FRAME, RATE, START_S, Server, speech
from tests.support.tiny_repository import build_repo


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return build_repo(tmp_path_factory.mktemp("tiny") / "repo")


@pytest.fixture
def serve(tmp_path, repo):
    """Starts servers with a memory, and ends them with the test."""
    servers = []

    def start(memory) -> Server:
        program = ["moshi.server", "--memory", str(memory)]
        servers.append(Server(program, repo, tmp_path / f"server{len(servers)}.log"))
        return servers[-1].wait_until_it_listens()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def said() -> list[list[bytes]]:
    return [speech("boat"), speech("sister")]


def talk_and_wait(server, messages: list[bytes], path) -> dict[str, torch.Tensor]:
    """Talks, and returns what the file holds once the server has written it."""
    before = path.stat().st_mtime_ns if path.exists() else None
    server.talk(messages)
    deadline = time.monotonic() + ANSWER_S
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.05)
    return load_file(path)


class Listener:
    """The repository's model in this process, hearing what a server hears, but never through a file.

    Args:
        repo: folder of the model.
    """

    @torch.no_grad()
    def __init__(self, repo):
        with local_repositories():
            checkpoint = loaders.CheckpointInfo.from_hf_repo(str(repo))
        self.mimi = checkpoint.get_mimi(device="cpu")
        self.lm_gen = LMGen(checkpoint.get_moshi(device="cpu", dtype=torch.bfloat16), **checkpoint.lm_gen_config)
        self.mimi.streaming_forever(1)
        self.lm_gen.streaming_forever(1)

    @property
    def fast_weights(self) -> dict[str, torch.Tensor]:
        return fast_weight_tensors(self.lm_gen.lm_model)

    @torch.no_grad()
    def hear(self, messages: list[bytes], steps: int, fresh: bool = False) -> dict[str, torch.Tensor]:
        """A conversation of so many steps: all of the model starts anew, but for the fast weights unless `fresh`."""
        kept = {key: tensor.clone() for key, tensor in self.fast_weights.items()}
        self.mimi.reset_streaming()
        self.lm_gen.reset_streaming()
        for key, tensor in self.fast_weights.items():
            if not fresh:
                tensor.copy_(kept[key])
        reader = sphn.OpusStreamReader(RATE)
        pcm = np.concatenate([reader.append_bytes(message) for message in messages])
        for index in range(steps):
            frame = torch.from_numpy(pcm[index * FRAME : (index + 1) * FRAME])[None, None]
            codes = self.mimi.encode(frame)
            if index == 0:  # the server encodes the first frame as the beginning of the second
                self.mimi.reset_streaming()
            tokens = self.lm_gen.step(codes)
            if tokens is not None:
                self.mimi.decode(tokens[:, 1:])
        return {key: tensor.clone() for key, tensor in self.fast_weights.items()}


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def position(state: dict) -> int:
    return state["transformer.layers.1.gating.position"].item()


def test_conversations_with_a_memory_are_one_that_went_on_also_after_a_restart(serve, repo, said, tmp_path, patched):
    path = tmp_path / "memory"
    server = serve(path)
    assert server.status()["memory"] == str(path)
    after_a = talk_and_wait(server, said[0], path)
    after_b = talk_and_wait(server, said[1], path)
    assert position(after_b) > position(after_a) > ANSWERS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server.stop()
    after_c = talk_and_wait(serve(path), said[0], path)

    listener = Listener(repo)
    assert differing(after_a, listener.hear(said[0], position(after_a), fresh=True)) == []
    assert differing(after_b, listener.hear(said[1], position(after_b) - position(after_a))) == []
    assert differing(after_c, listener.hear(said[0], position(after_c) - position(after_b))) == []
    forgetful = listener.hear(said[0], position(after_c) - position(after_b), fresh=True)
    assert any(key.endswith("delta") for key in differing(after_c, forgetful))


def test_the_memory_is_kept_when_the_server_is_shut_down_and_not_when_it_is_killed(serve, said, tmp_path):
    path = tmp_path / "memory"
    server = serve(path)
    talk_and_wait(server, said[0], path)
    before = path.read_bytes()

    async def interrupted(end):
        async with server.connect() as websocket:
            await server.say(websocket, said[1])
            await server.answers(websocket, ANSWERS)
            end()
            while (message := await websocket.receive()).type.name == "BINARY":
                pass
            return message

    message = asyncio.run(asyncio.wait_for(interrupted(server.process.kill), ANSWER_S))
    assert message.type.name in ("CLOSED", "ERROR")
    assert path.read_bytes() == before

    server = serve(path)
    message = asyncio.run(asyncio.wait_for(interrupted(server.process.terminate), ANSWER_S))
    assert (message.data, message.extra) == (1001, "the server is shut down")
    assert server.process.wait(START_S) == 0
    assert path.read_bytes() != before
    assert position(load_file(path)) > ANSWERS


def test_a_client_that_says_nothing_changes_nothing(serve, said, tmp_path):
    path = tmp_path / "memory"
    server = serve(path)

    async def come_and_go():
        async with server.connect():
            pass

    asyncio.run(asyncio.wait_for(come_and_go(), ANSWER_S))
    state = talk_and_wait(server, said[0], path)  # the next one comes after the first has been seen off
    before = path.stat().st_mtime_ns
    asyncio.run(asyncio.wait_for(come_and_go(), ANSWER_S))
    server.stop()
    assert path.stat().st_mtime_ns == before
    assert position(state) > ANSWERS


def test_a_memory_that_is_spoilt_while_the_server_runs_ends_conversations_and_is_left_alone(serve, said, tmp_path):
    path = tmp_path / "memory"
    server = serve(path)
    talk_and_wait(server, said[0], path)
    path.write_bytes(path.read_bytes()[:-1000])
    spoilt = path.read_bytes()

    async def knock():
        async with aiohttp.ClientSession() as session, session.ws_connect(server.chat) as websocket:
            return await websocket.receive()

    message = asyncio.run(asyncio.wait_for(knock(), ANSWER_S))
    assert message.data == 1011
    assert "damaged or cut off" in server.log.read_text()
    assert path.read_bytes() == spoilt
    assert not server.status()["connected"]


def refusal(repo, path, log) -> str:
    """What a server says that will not start with this memory."""
    server = Server(["moshi.server", "--memory", str(path)], repo, log)
    try:
        assert server.process.wait(START_S) not in (0, None)
    except subprocess.TimeoutExpired:
        server.process.kill()
        pytest.fail(f"It started:\n{log.read_text()}")
    return log.read_text()


def test_a_server_does_not_start_with_the_memory_of_another_model_or_a_damaged_one(repo, said, tmp_path, patched):
    path = tmp_path / "memory"
    moshi_patch.save_memory(Listener(repo).lm_gen.lm_model, path)
    other = build_repo(tmp_path / "settings", ttt_learning_rate=0.002)
    said = refusal(other, path, tmp_path / "settings.log")
    assert "ttt_learning_rate is 0.001 in the file and 0.002 in the model" in said
    assert "weights differ" not in said
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{path}: the file is damaged or cut off" in refusal(repo, path, tmp_path / "damaged.log")


def test_a_server_without_ttt_has_nothing_to_remember_and_says_so(tmp_path):
    repo = build_repo(tmp_path / "repo", ttt=False)
    assert "LMModel has no TTT layer, so there is nothing to remember" in refusal(
        repo, tmp_path / "memory", tmp_path / "log"
    )
