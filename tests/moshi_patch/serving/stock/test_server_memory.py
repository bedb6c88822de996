"""`moshi.server --memory PATH`: one person's conversations go on where the last one ended, or are refused a start."""

import asyncio
import os
import socket
import stat
import time

import aiohttp
import numpy as np
import pytest
import sphn
import torch
from moshi.models import LMGen
from safetensors.torch import load_file

import moshi_patch
from moshi_patch.memory import fast_weight_tensors
from moshi_patch.serving.stock.kept_memory import KeptMemory
from tests.support.servers import (
    ANSWER_S,
    ANSWERS,
    FRAME,
    RATE,
    START_S,
    ServerProcess,
    arguments,
    load_app,
    run,
    serve_here,
    speech,
)
from tests.support.tiny_repository import build_repo

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched_module")]


@pytest.fixture(scope="module")
def said() -> list[list[bytes]]:
    return [speech("boat"), speech("sister")]


def talk_and_wait(server, messages: list[bytes], path) -> dict[str, torch.Tensor]:
    """Talks, and returns what the file holds once the server has written it."""
    before = path.stat().st_mtime_ns if path.exists() else None
    server.talk(messages)
    deadline = time.monotonic() + ANSWER_S
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return load_file(path)


class Listener:
    """The repository's model in this process, hearing what a server hears, but never through a file.

    Args:
        repo: folder of the model.
    """

    @torch.no_grad()
    def __init__(self, repo):
        checkpoint = moshi_patch.load_checkpoint_info(repo)
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
    return next(tensor.item() for key, tensor in state.items() if key.endswith(".position"))


@pytest.mark.parametrize("kind", ["in_place", "mlp"])
def test_conversations_with_a_memory_are_one_that_went_on_also_after_a_restart(kind, request, said, tmp_path):
    ttt_repo = request.getfixturevalue("ttt_repo" if kind == "in_place" else "mlp_repo")
    path = tmp_path / "memory"
    with serve_here(["--memory", str(path)], ttt_repo) as server:
        assert server.status()["memory"] is True
        after_a = talk_and_wait(server, said[0], path)
        after_b = talk_and_wait(server, said[1], path)
    assert position(after_b) > position(after_a) > ANSWERS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with serve_here(["--memory", str(path)], ttt_repo) as server:
        after_c = talk_and_wait(server, said[0], path)

    listener = Listener(ttt_repo)
    assert differing(after_a, listener.hear(said[0], position(after_a), fresh=True)) == []
    assert differing(after_b, listener.hear(said[1], position(after_b) - position(after_a))) == []
    assert differing(after_c, listener.hear(said[0], position(after_c) - position(after_b))) == []
    forgetful = listener.hear(said[0], position(after_c) - position(after_b), fresh=True)
    assert any("delta" in key for key in differing(after_c, forgetful))


def test_a_client_that_says_nothing_changes_nothing(ttt_repo, said, tmp_path):
    path = tmp_path / "memory"

    async def come_and_go(server):
        async with server.connect():
            pass

    with serve_here(["--memory", str(path)], ttt_repo) as server:
        run(come_and_go(server))
        state = talk_and_wait(server, said[0], path)  # the next one comes after the first has been seen off
        before = path.stat().st_mtime_ns
        run(come_and_go(server))
    assert path.stat().st_mtime_ns == before
    assert position(state) > ANSWERS


def test_a_memory_that_is_spoilt_while_the_server_runs_ends_conversations_and_is_left_alone(
    ttt_repo, said, tmp_path, caplog
):
    path = tmp_path / "memory"

    async def knock(server):
        async with aiohttp.ClientSession() as session, session.ws_connect(server.chat) as websocket:
            return await websocket.receive()

    with serve_here(["--memory", str(path)], ttt_repo) as server:
        talk_and_wait(server, said[0], path)
        path.write_bytes(path.read_bytes()[:-1000])
        spoilt = path.read_bytes()
        message = run(knock(server))
        assert not server.status()["connected"]
    assert (message.data, message.extra) == (1011, "the memory of this server cannot be loaded; its log says why")
    (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert f"--memory {path}: {path}: the file is damaged or cut off" in error.getMessage()
    assert error.exc_info is None
    assert path.read_bytes() == spoilt


def refusal(*words: str) -> str:
    """What `python -m moshi_patch moshi.server WORDS` says as it ends, without serving."""
    with pytest.raises(SystemExit) as exit_:
        load_app(list(words))
    assert exit_.value.code not in (0, None)
    return str(exit_.value.code)


def test_a_server_does_not_start_with_the_memory_of_another_model_or_a_damaged_one(ttt_repo, tmp_path):
    path = tmp_path / "memory"
    moshi_patch.save_memory(Listener(ttt_repo).lm_gen.lm_model, path)
    other = build_repo(tmp_path / "settings", ttt_learning_rate=0.002)
    said = refusal("--memory", str(path), *arguments(other, 0))
    assert "ttt_learning_rate is 0.001 in the file and 0.002 in the model" in said
    assert "weights differ" not in said
    path.write_bytes(path.read_bytes()[:-1000])
    said = refusal("--memory", str(path), *arguments(ttt_repo, 0))
    assert f"{path}: the file is damaged or cut off" in said
    assert "\n" not in said


def test_a_server_without_ttt_has_nothing_to_remember_and_says_so(stock_repo, tmp_path):
    said = refusal("--memory", str(tmp_path / "memory"), *arguments(stock_repo, 0))
    assert f"--memory {tmp_path / 'memory'}: LMModel has no TTT layer, so there is nothing to remember" in said
    assert os.listdir(tmp_path) == []


def test_one_server_a_memory_kept_at_shutdown_and_left_as_it_was_by_a_kill(ttt_repo, said, tmp_path, monkeypatch):
    """The command itself, in a process of its own."""
    path, link = tmp_path / "memory", tmp_path / "link"
    link.symlink_to(path)
    servers = []

    def serve() -> ServerProcess:
        log = tmp_path / f"server{len(servers)}.log"
        servers.append(ServerProcess(["--memory", str(path)], ttt_repo, log))
        return servers[-1].wait_until_it_listens()

    async def interrupted(server, end):
        async with server.connect() as websocket:
            await server.say(websocket, said[1])
            await server.answers(websocket, ANSWERS)
            end()
            while (message := await websocket.receive()).type.name == "BINARY":
                pass
            return message

    try:
        server = serve()
        owner = f"process {server.process.pid} on {socket.gethostname()}"
        for name in (path, link):
            told = refusal(
                "--memory", str(name), "--hf-repo", "no-such/model", "--port", "0"
            )  # which is not looked for
            assert f"--memory {name}: in use by another server, {owner}" in told
            assert "Stop that one, or give this one a file of its own" in told
        talk_and_wait(server, said[0], path)
        before = path.read_bytes()
        message = asyncio.run(asyncio.wait_for(interrupted(server, server.process.kill), ANSWER_S))
        assert message.type.name in ("CLOSED", "ERROR")
        assert path.read_bytes() == before
        log = server.log.read_text()
        assert f"--memory {path}: no file yet, so this memory begins empty." in log
        assert f"--memory {path}: saved, 0.1 MiB after 4" in log

        server = serve()  # what was killed left no lock behind
        message = asyncio.run(asyncio.wait_for(interrupted(server, server.process.terminate), ANSWER_S))
        assert (message.data, message.extra) == (1001, "the server is shut down")
        assert server.process.wait(START_S) == 0
        assert path.read_bytes() != before
        assert position(load_file(path)) > ANSWERS
        assert f"--memory {path}: loaded, 0.1 MiB after 4" in server.log.read_text()
        assert sorted(name for name in os.listdir(tmp_path) if not name.endswith(".log")) == ["link", "memory"]
    finally:
        for server in servers:
            server.stop()


def test_a_memory_is_free_again_after_its_server_and_places_that_cannot_hold_one_are_told(tmp_path):
    memory = KeptMemory(tmp_path / "memory")
    for _ in range(2):
        with memory.held():
            assert os.listdir(tmp_path) == [".memory.lock"]
            with pytest.raises(OSError, match=rf"in use by another server, process {os.getpid()} on "):
                KeptMemory(tmp_path / "memory").held().__enter__()
            with KeptMemory(tmp_path / "other").held():
                pass
        assert os.listdir(tmp_path) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"--memory .*/nosuch/memory: its folder cannot be written to \(No such file"):
        KeptMemory(tmp_path / "nosuch" / "memory").held().__enter__()
    with pytest.raises(OSError, match=r"--memory .*/folder: cannot be read \(Is a directory\)"):
        KeptMemory(tmp_path / "folder").held().__enter__()
    assert os.listdir(tmp_path) == ["folder"]
