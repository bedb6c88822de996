"""Train, export, serve, speak: the export alone says what TTT is, and the run and its base model may be gone."""

import asyncio
import json
import shutil
import subprocess
import sys

import pytest

from tests.support.servers import ANSWER_S, ANSWERS, FRAME, ServerProcess, speech
from tests.support.tiny_repository import ENVIRONMENT, ROOT, build_repo

CHUNK = 8  # neither the default nor that of example/tiny_ttt.yaml


def python(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def export(tmp_path):
    """Adapters and target generators of a short training of a model without TTT, exported with their base."""
    base = build_repo(tmp_path / "base", ttt=False)
    files = {"moshi": "model.safetensors", "mimi": "mimi.safetensors", "tokenizer": "tokenizer.model"}
    paths = [f"--moshi_paths.{name}_path={base / file}" for name, file in {**files, "config": "config.json"}.items()]
    training = ["--max_steps=3", "--duration_sec=4", "--batch_size=1", "--do_eval=false", f"--ttt.chunk_size={CHUNK}"]
    lora = ["--full_finetuning=false", "--lora.enable", "--lora.rank=4", "--save_adapters"]
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    python("train.py", "example/tiny_ttt.yaml", f"--run_dir={run}", *paths, *training, *lora)
    python("-m", "finetune.export", run, out, "--with-base")
    shutil.rmtree(run)
    shutil.rmtree(base)
    return tmp_path / "out"


def test_an_export_is_served_with_the_settings_it_was_trained_with_and_learns_while_it_is_spoken_to(export, tmp_path):
    server = ServerProcess([], export, tmp_path / "server.log")

    async def converse():
        async with server.connect() as websocket:
            await server.say(websocket, speech())
            answer = await server.answers(websocket, ANSWERS)
            return answer, await asyncio.to_thread(server.status)

    try:
        server.wait_until_it_listens()
        answer, status = asyncio.run(asyncio.wait_for(converse(), ANSWER_S))
    finally:
        server.stop()
    assert len(answer.pcm) >= (ANSWERS - 2) * FRAME
    config = json.loads((export / "config.json").read_text())
    settings = {key: value for key, value in config.items() if key.startswith("ttt_")}
    assert status["settings"] == settings
    assert (settings["ttt_enabled"], settings["ttt_chunk_size"]) == (True, CHUNK)
    assert len(status["layers"]) == 2
    for layer in status["layers"].values():
        assert layer["updates"] == status["steps"] // CHUNK >= 5
        assert layer["relative_delta"] > 0
