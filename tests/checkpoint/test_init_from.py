"""A new run begins with the weights of a finished one, or is told what does not fit."""

import pytest
import torch
from safetensors.torch import save_file

from finetune.checkpoint.initial import load_initial_weights
from tests.support.checkpoint_runs import CTX, LORA, MODES, TTT, advance, arguments, same, served, snapshot, tiny_run
from tests.support.loading import logits
from tests.support.models import relative

pytestmark = pytest.mark.usefixtures("patched")


@pytest.mark.parametrize("point", ["run", "checkpoint", "consolidated", "file"])
def test_init_from_continues_adapters(tmp_path, point):
    args = arguments(tmp_path / "run", lora=LORA)
    checkpointer, state = tiny_run(args)
    advance(state)
    checkpointer.save(state)
    advance(state)
    path = checkpointer.save(state)
    folder = path / "consolidated"
    start = {"run": tmp_path / "run", "checkpoint": path, "consolidated": folder, "file": folder / "lora.safetensors"}
    _, new = tiny_run(args, seed=5)
    load_initial_weights(start[point], new.model, CTX)
    assert same(new.model.state_dict(), state.model.state_dict())


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "new_adapters"])
def test_init_from_a_merged_model_begins_with_its_answers(tmp_path, lora, caplog):
    checkpointer, state = tiny_run(arguments(tmp_path, **MODES["merged"]))
    advance(state, 2)
    path = checkpointer.save(state)
    args = arguments(tmp_path / "next", ttt=TTT | {"chunk_size": 6}, **(MODES["adapter"] if lora else MODES["full"]))
    _, new = tiny_run(args, seed=5)
    load_initial_weights(path, new.model, CTX)
    assert relative(logits(new.model, steps=5), logits(served(path, None), steps=5)) < 1e-6  # float32, no update yet
    assert "ttt_chunk_size is 6, was 5" in caplog.text
    assert ("serve them with it" in caplog.text) == lora


def test_init_from_says_what_does_not_fit_and_changes_nothing(tmp_path):
    checkpointer, state = tiny_run(arguments(tmp_path / "lora", lora=LORA))
    adapters = checkpointer.save(state)
    checkpointer, state = tiny_run(arguments(tmp_path / "full", full_finetuning=True))
    full = checkpointer.save(state)
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "alone.safetensors")
    rank, layers = {"lora": LORA | {"rank": 4}}, {"ttt": TTT | {"layers": [1]}}
    for path, settings, message in (
        (adapters, {"full_finetuning": True}, r"holds adapters, and lora.enable is false.*lora.rank: 3"),
        (adapters, rank, r"of another shape, such as .*lora_.*'lora_rank': 3"),
        (full, {"full_finetuning": True, **layers}, r"2 not in this model, such as transformer.layers.3.*target_gen"),
        (full, {"full_finetuning": True, "ttt": TTT | {"layers": [0, 1, 3]}}, r"2 missing, such as .*layers.0"),
        (tmp_path / "empty", {}, "no finished checkpoint"),
        (tmp_path / "alone.safetensors", {}, "no config.json"),
    ):
        _, new = tiny_run(arguments(tmp_path / "new", **settings))
        before = snapshot(new)
        with pytest.raises(ValueError, match=message) as error:
            load_initial_weights(path, new.model, CTX)
        assert "init_from=" in str(error.value)
        assert same(snapshot(new), before)
