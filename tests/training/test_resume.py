"""A resumed run equals one that never stopped, bitwise, and is refused where it cannot."""

import logging
import random

import pytest
import torch

from finetune.checkpoint.checkpointer import Checkpointer
from finetune.checkpoint.training_state import TrainState
from finetune.data.loader import TrainLoader
from finetune.data.tokenize import SpeechTokenizer
from finetune.model.trainable import parameter_groups
from finetune.training.batch_loss import forward_loss
from finetune.training.build_model import build_model
from finetune.training.optimizer import build_optimizer
from tests.support.checkpoint_runs import CTX, LORA, MODES, TTT, advance, arguments, same, snapshot, tiny_run
from tests.support.loading import KEYS
from tests.support.models import random_codes
from tests.support.tiny_repository import DATA, build_repo

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, mode, dtype):
    args = arguments(tmp_path, param_dtype=dtype, **MODES[mode])
    checkpointer, state = tiny_run(args)
    advance(state, 3)
    path = checkpointer.save(state)
    expected = advance(state, 4)
    resumed_checkpointer, resumed = tiny_run(args)
    if args.lora.enable:  # nothing of how the new run began is left
        for name, parameter in resumed.model.named_parameters():
            if "lora_" in name or name in KEYS:
                parameter.data.normal_()
    random.seed(9)
    torch.manual_seed(9)
    resumed_checkpointer.load(path, resumed)
    assert resumed.step == 3
    assert advance(resumed, 4) == expected
    assert same(snapshot(resumed), snapshot(state))


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return build_repo(tmp_path_factory.mktemp("repo"), context=20, num_layers=2, ttt_layers=[1])


def test_a_resumed_run_on_real_speech_equals_one_that_never_stopped(tmp_path, repo):
    ttt = {"enabled": True, "layers": [1], "chunk_size": 8}
    data = {"train_data": str(DATA / "train.jsonl"), "shuffle": True}
    settings = {"lora": LORA, "ttt": ttt, "data": data, "duration_sec": 2.0, "moshi_paths": {"hf_repo_id": str(repo)}}
    args = arguments(tmp_path, **settings)

    def start() -> tuple[Checkpointer, TrainState]:
        built = build_model(args, CTX)
        tokenizer = SpeechTokenizer.for_model(
            built.model, built.info.get_mimi(), built.info.get_text_tokenizer(), duration_sec=args.duration_sec
        )
        parts = build_optimizer(parameter_groups(built.model, args), args.optim, args.max_steps)
        state = TrainState(0, built.model, *parts, TrainLoader(args, tokenizer))
        return Checkpointer(tmp_path, args, built.lm_config, CTX), state

    def train(state: TrainState, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = forward_loss(state.model, next(state.loader), args, CTX).loss
            loss.backward()
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.scheduler.step()
            state.step += 1
            losses.append(loss.item())
        return losses

    checkpointer, state = start()
    train(state, 3)
    path = checkpointer.save(state)
    expected = train(state, 5)
    checkpointer, resumed = start()
    checkpointer.load(path, resumed)
    assert train(resumed, 5) == expected
    assert same(snapshot(resumed), snapshot(state))


def test_a_parameter_without_gradient_stays_without_optimizer_state(tmp_path):
    args = arguments(tmp_path, full_finetuning=True)
    checkpointer, state = tiny_run(args)
    state.model(random_codes(state.model, 2, 24)).text_logits.mean().backward()  # the depformer takes no part in it
    state.optimizer.step()
    state.scheduler.step()
    state.step += 1
    path = checkpointer.save(state)
    checkpointer, resumed = tiny_run(args)
    checkpointer.load(path, resumed)
    unused = set(resumed.model.depformer.parameters())
    assert unused
    assert not unused & resumed.optimizer.state.keys()
    assert same(snapshot(resumed), snapshot(state))


CHANGED = {
    "ttt_chunk_size=6, was 5": {"ttt": TTT | {"chunk_size": 6}},
    "ttt_learning_rate=0.1, was 0.2": {"ttt": TTT | {"learning_rate": 0.1}},
    "lora_rank=4, was 3": {"lora": LORA | {"rank": 4}},
    "lora_scaling=1.0, was 2.0": {"lora": LORA | {"scaling": 1.0}},
    "lora.enable=False, was True": {"lora": {}},
    "ttt.train_w_down=False, was True": {"ttt": TTT | {"train_w_down": False}},
    "param_dtype='bfloat16', was 'float32'": {"param_dtype": "bfloat16"},
}


@pytest.mark.parametrize("message", CHANGED)
def test_another_architecture_is_refused_before_anything_is_changed(tmp_path, message):
    checkpointer, state = tiny_run(arguments(tmp_path, lora=LORA))
    advance(state)
    path = checkpointer.save(state)
    changed, other = tiny_run(arguments(tmp_path, **({"lora": LORA} | CHANGED[message])))
    before = snapshot(other)
    with pytest.raises(ValueError, match="another model was trained") as error:
        changed.load(path, other)
    assert message in str(error.value)
    assert same(snapshot(other), before)


def test_another_base_model_is_refused_before_anything_is_changed(tmp_path):
    args = arguments(tmp_path, lora=LORA)
    checkpointer, state = tiny_run(args)
    advance(state)
    path = checkpointer.save(state)
    checkpointer, other = tiny_run(args)
    name = "transformer.layers.0.gating.linear_in.frozen_W.weight"
    other.model.get_parameter(name).data[0, 0] += 1e-3
    before = snapshot(other)
    with pytest.raises(ValueError, match=f"1 weights of the base model are not those .*{name}"):
        checkpointer.load(path, other)
    assert same(snapshot(other), before)


def test_changed_settings_of_training_are_logged_and_hold(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    checkpointer, state = tiny_run(arguments(tmp_path))
    advance(state, 3)
    path = checkpointer.save(state)
    changed = {"optim": {"lr": 5e-3, "weight_decay": 0.2}, "max_steps": 40, "log_freq": 7}
    checkpointer, resumed = tiny_run(arguments(tmp_path, **changed))
    checkpointer.load(path, resumed)
    for line in ("max_steps is 40, was 30", "optim.lr is 0.005, was 0.01", "log_freq is 7, was 1"):
        assert line in caplog.text
    _, straight = tiny_run(arguments(tmp_path, **changed))
    advance(straight, 3)
    assert resumed.optimizer.state_dict()["param_groups"] == straight.optimizer.state_dict()["param_groups"]
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.2}
    advance(straight)
    advance(resumed)
    assert resumed.scheduler.get_last_lr() == straight.scheduler.get_last_lr()
    checkpointer, late = tiny_run(arguments(tmp_path, max_steps=2))
    before = snapshot(late)
    with pytest.raises(ValueError, match="max_steps=2: the checkpoint has already done 3 steps"):
        checkpointer.load(path, late)
    assert same(snapshot(late), before)
