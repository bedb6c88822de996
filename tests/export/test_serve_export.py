"""Train, export, serve, speak: the export alone says what TTT is, and the run and its base model may be gone."""

import asyncio
import json
import shutil

import pytest

from finetune.export.__main__ import main as export_run
from finetune.training.__main__ import main as train
from tests.support.servers import ANSWERS, FRAME, run, serve_here, speech
from tests.support.tiny_repository import ROOT, build_repo

pytestmark = pytest.mark.slow

CHUNK = 8  # neither the default nor that of example/tiny_ttt.yaml


@pytest.fixture
def export(tmp_path, monkeypatch, patched):
    """Adapters and target generators of a short training of a model without TTT, exported with their base."""
    base = build_repo(tmp_path / "base", ttt=False)
    files = {"moshi": "model.safetensors", "mimi": "mimi.safetensors", "tokenizer": "tokenizer.model"}
    paths = [f"--moshi_paths.{name}_path={base / file}" for name, file in {**files, "config": "config.json"}.items()]
    training = ["--max_steps=3", "--duration_sec=4", "--batch_size=1", "--do_eval=false", f"--ttt.chunk_size={CHUNK}"]
    lora = ["--full_finetuning=false", "--lora.enable", "--lora.rank=4", "--save_adapters"]
    monkeypatch.chdir(ROOT)
    run_dir, out = tmp_path / "run", tmp_path / "out"
    assert train(["example/tiny_ttt.yaml", f"--run_dir={run_dir}", *paths, *training, *lora]) == 0
    assert export_run([str(run_dir), str(out), "--with-base"]) == 0
    shutil.rmtree(run_dir)
    shutil.rmtree(base)
    return out


def test_an_export_is_served_with_the_settings_it_was_trained_with_and_learns_while_it_is_spoken_to(export):
    async def converse(server):
        async with server.connect() as websocket:
            await server.say(websocket, speech())
            answer = await server.answers(websocket, ANSWERS)
            return answer, await asyncio.to_thread(server.status)

    with serve_here([], export) as server:
        answer, status = run(converse(server))
    assert len(answer.pcm) >= (ANSWERS - 2) * FRAME
    config = json.loads((export / "config.json").read_text())
    settings = {key: value for key, value in config.items() if key.startswith("ttt_")}
    assert status["settings"] == settings
    assert (settings["ttt_enabled"], settings["ttt_chunk_size"]) == (True, CHUNK)
    assert len(status["layers"]) == 2
    for layer in status["layers"].values():
        assert layer["updates"] == status["steps"] // CHUNK >= 5
        assert layer["relative_delta"] > 0
