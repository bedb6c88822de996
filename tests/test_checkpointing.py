"""A checkpoint is served by stock moshi as it was trained, appears whole or not at all, and continues a run bitwise."""

import copy
import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from moshi.modules.lora import LoRALinear
from safetensors.torch import load_file, save_file

import moshi_patch
from finetune import checkpointing
from finetune.args import TrainArgs, from_dict
from finetune.checkpointing import Checkpointer, TrainState, load_finished_weights
from finetune.data.loader import TrainLoader
from finetune.data.tokenize import SpeechTokenizer
from finetune.distributed import Context
from finetune.eval import forward_loss
from finetune.optim import build_optimizer, parameter_groups
from finetune.parsing import build
from finetune.wrapped_model import add_adapters, build_model

from .fixtures_repo import DATA, build_repo
from .loading import KEYS, W_DOWN, assert_active, assert_loaded, logits, save
from .models import TINY, random_codes, randomise_targets, relative, tiny_model

pytestmark = pytest.mark.usefixtures("patched")

CTX = Context(0, 1, 0, torch.device("cpu"))
TTT = {"enabled": True, "layers": [1, 3], "chunk_size": 5, "learning_rate": 0.2}
LORA = {"enable": True, "rank": 3, "scaling": 2.0}
MODES = {
    "adapter": {"lora": LORA},
    "merged": {"lora": LORA, "save_adapters": False},
    "full": {"full_finetuning": True},
    "ttt_only": {},
}


class Place:
    """A loader that is nothing but its place."""

    def __init__(self):
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def arguments(run_dir, **settings) -> TrainArgs:
    content = {"run_dir": str(run_dir), "ttt": TTT, "param_dtype": "float32", "optim": {"lr": 1e-2}, "max_steps": 30}
    return build(TrainArgs, content | settings)


def lm_config(args: TrainArgs) -> dict:
    config = {**TINY, **args.ttt.lm_kwargs(), "lora": args.lora.enable, "moshi_name": "base.safetensors"}
    return config | ({"lora_rank": args.lora.rank, "lora_scaling": args.lora.scaling} if args.lora.enable else {})


def tiny_run(args: TrainArgs, seed: int = 0) -> tuple[Checkpointer, TrainState]:
    """A run at step 0, of a model whose stock weights depend on nothing and whose new ones depend on `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    model = randomise_targets(tiny_model(getattr(torch, args.param_dtype), **args.ttt.lm_kwargs()), seed=seed)
    if args.lora.enable:
        add_adapters(model, args.lora.rank, args.lora.scaling)
    return checkpointer_of(args), state_of(args, model)


def checkpointer_of(args: TrainArgs) -> Checkpointer:
    return Checkpointer(Path(args.run_dir), args, lm_config(args), CTX)


def state_of(args: TrainArgs, model: torch.nn.Module) -> TrainState:
    groups = parameter_groups(model, args)
    model.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    return TrainState(0, model, *build_optimizer(groups, args), Place())


def advance(state: TrainState, steps: int = 1) -> list[float]:
    """Trains, on other codes at every step, with dropout of codes that depends on all random numbers."""
    losses = []
    for _ in range(steps):
        codes = random_codes(state.model, 2, 24, seed=state.loader.place)
        noise = 1 + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        out = state.model(codes)
        loss = noise * (out.text_logits.logsumexp(-1).mean() + out.logits.nan_to_num().logsumexp(-1).mean())
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.scheduler.step()
        state.step, state.loader.place = state.step + 1, state.loader.place + 1
        losses.append(loss.item())
    return losses


def snapshot(state: TrainState) -> dict:
    content = (state.model.state_dict(), state.optimizer.state_dict(), state.scheduler.state_dict())
    return copy.deepcopy({"content": content, "place": state.loader.state_dict(), "step": state.step})


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def served(checkpoint: Path, base: Path | None, dtype=torch.float32, named: bool = False):
    """The model as `moshi.server --config-path` with `--lora-weight` or `--moshi-weight` loads it; nothing else.

    `named`: the adapters are those that the config names, as with `moshi.run_inference`.
    """
    folder = checkpoint / "consolidated"
    adapters, merged = folder / "lora.safetensors", folder / "consolidated.safetensors"
    nowhere = Path("not-read")
    info = CheckpointInfo.from_hf_repo(
        "no/repository",
        moshi_weights=merged if merged.is_file() else base,
        mimi_weights=nowhere,
        tokenizer=nowhere,
        config_path=folder / "config.json",
        lora_weights=adapters if adapters.is_file() and not named else None,
    )
    return info.get_moshi(dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_stock_moshi_serves_the_checkpoint_as_it_was_trained(tmp_path, mode, dtype):
    args = arguments(tmp_path / "run", param_dtype=dtype, **MODES[mode])
    kind = getattr(torch, dtype)
    base = save(tiny_model(kind).state_dict(), tmp_path / "base.safetensors")  # stock: no TTT in it
    checkpointer, state = tiny_run(args)
    before = logits(state.model)
    advance(state, 3)
    path = checkpointer.save(state)
    loaded = served(path, base, kind)
    assert_loaded(loaded, kind)
    state.model.requires_grad_(False)  # float32 products are rounded otherwise beside a weight that trains
    loaded.requires_grad_(False)
    assert relative(logits(state.model), before) > 1e-2  # something was trained
    if mode == "merged":
        # computed in float32: what differs is that merged weights are rounded once more
        difference = relative(logits(copy.deepcopy(loaded).float()), logits(copy.deepcopy(state.model).float()))
        assert difference < (1e-5 if dtype == "float32" else 2e-2)
    else:
        assert torch.equal(logits(loaded), logits(state.model))
    assert_active(loaded)
    assert loaded.ttt_config == state.model.ttt_config
    assert same(served(path, base, kind, named=True).state_dict(), loaded.state_dict())
    adapted = [module for module in loaded.modules() if isinstance(module, LoRALinear)]
    assert bool(adapted) == (mode == "adapter")


@pytest.mark.parametrize("train_w_down", [True, False])
@pytest.mark.parametrize("ft_embed", [False, True])
def test_an_adapter_file_holds_what_serving_needs_and_no_more(tmp_path, ft_embed, train_w_down):
    settings = {"lora": LORA | {"ft_embed": ft_embed}, "ttt": TTT | {"train_w_down": train_w_down}}
    checkpointer, state = tiny_run(arguments(tmp_path, **settings))
    file = checkpointer.save(state) / "consolidated" / "lora.safetensors"
    linear = {name for name, module in tiny_model().named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {f"{name}.lora_{which}.weight" for name in linear for which in "AB"} | {*KEYS, *W_DOWN}
    embeddings = {name for name in tiny_model().state_dict() if "emb" in name}
    assert load_file(file).keys() == expected | (embeddings if ft_embed else set())


@pytest.mark.parametrize("mode", MODES)
def test_settings_lie_beside_the_weights(tmp_path, mode):
    args = arguments(tmp_path, wandb={"key": "secret"}, **MODES[mode])
    args.wandb.project = None
    checkpointer, state = tiny_run(args)
    checkpointer.lm_config["lora_name"] = "of-the-base.safetensors"
    folder = checkpointer.save(state) / "consolidated"
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in config if key.startswith("ttt_")} == args.ttt.lm_kwargs()
    assert config["lora"] == (mode == "adapter")
    assert ("lora_rank" in config) == (mode == "adapter")
    # not the base's, which moshi would load
    assert config.get("lora_name") == (f"file://{folder / 'lora.safetensors'}" if mode == "adapter" else None)
    training = json.loads((folder / "training_config.json").read_text())
    args.wandb.key = None
    assert from_dict(training["training"]) == args
    assert training["versions"].keys() == {"python", "torch", "moshi", "moshi_ttt"}
    assert "secret" not in json.dumps(training)


def test_only_the_newest_are_kept_and_nothing_else_is_touched(tmp_path):
    checkpointer, state = tiny_run(arguments(tmp_path, num_ckpt_keep=2))
    folder = tmp_path / "checkpoints"
    others = ["checkpoint_best", ".tmp-mine", "checkpoint_12", "notes"]
    for name in others:
        (folder / name).mkdir(parents=True)
    for _ in range(4):
        advance(state)
        checkpointer.save(state)
    assert sorted(os.listdir(folder)) == sorted([*others, "checkpoint_000003", "checkpoint_000004"])
    assert checkpointer.find() == folder / "checkpoint_000004"
    assert checkpointer.find(3) == folder / "checkpoint_000003"
    with pytest.raises(ValueError, match=r"resume_step=1: .*there are 3, 4"):
        checkpointer.find(1)


def test_null_keeps_all_and_do_ckpt_false_saves_none(tmp_path):
    checkpointer, state = tiny_run(arguments(tmp_path / "all", num_ckpt_keep=None))
    for _ in range(5):
        advance(state)
        checkpointer.save(state)
    assert len(os.listdir(tmp_path / "all" / "checkpoints")) == 5
    checkpointer, state = tiny_run(arguments(tmp_path / "none", do_ckpt=False))
    assert checkpointer.save(state) is None
    assert checkpointer.find() is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="there is none"):
        checkpointer.find(3)


def test_a_run_that_goes_back_keeps_its_old_course_aside(tmp_path, caplog):
    args = arguments(tmp_path, num_ckpt_keep=1)
    args.num_ckpt_keep = None
    checkpointer, state = tiny_run(args)
    for _ in range(3):
        advance(state)
        checkpointer.save(state)
    checkpointer, state = tiny_run(args)
    checkpointer.load(checkpointer.find(1), state)
    advance(state)
    new = checkpointer.save(state)
    assert checkpointer.save(state) == new  # the same step again: nothing is written
    names = ["abandoned-checkpoint_000002", "abandoned-checkpoint_000003", "checkpoint_000001", "checkpoint_000002"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == names
    assert checkpointer.find() == new
    assert "abandoned-checkpoint_000003" in caplog.text


def fork(action) -> int:
    """The exit status of `action` in a process of its own: -9 if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(moment: int) -> None:
    """From now on, the `moment`-th operation that changes the disk for good is a SIGKILL instead."""
    left = [moment]

    def counted(operation):
        def run(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return run

    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def assert_loadable(args: TrainArgs, by_step: dict[int, dict]) -> int:
    """The newest checkpoint holds, in both of its parts, what was there at its step, which is returned."""
    checkpointer, state = tiny_run(args, seed=5)
    path = checkpointer.find()
    checkpointer.load(path, state)
    assert same(snapshot(state), by_step[state.step])
    weights = load_file(path / "consolidated" / "lora.safetensors")
    trained = by_step[state.step]["content"][0]
    assert all(torch.equal(weights[key], trained[key]) for key in KEYS)
    return state.step


def test_kill_9_at_every_moment_of_a_save_leaves_a_checkpoint_and_the_next_save_cleans_up(tmp_path):
    args = arguments(tmp_path / "run", num_ckpt_keep=2, **MODES["adapter"])
    checkpointer, state = tiny_run(args)
    by_step = {}
    for _ in range(2):
        advance(state)
        by_step[state.step] = snapshot(state)
        checkpointer.save(state)
    advance(state)
    by_step[3] = snapshot(state)
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    newest, moment, status = [], 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        moment += 1
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "before", tmp_path / "run")
        status = fork(lambda moment=moment: (kill_at(moment), checkpointer.save(state)))
        newest.append(assert_loadable(args, by_step))
        if moment % 5 == 1:  # not after each, for time
            fork(lambda: (advance(state), checkpointer_of(args).save(state)))
            assert len(os.listdir(tmp_path / "run" / "checkpoints")) == 2
            assert checkpointer.find(4)
    assert status == 0
    assert newest == sorted(newest)
    assert newest.count(2) > 8
    assert newest.count(3) > 8  # while the oldest one is deleted


def test_kill_9_at_any_time_leaves_a_checkpoint(tmp_path):
    args = arguments(tmp_path, num_ckpt_keep=1, **MODES["adapter"])
    checkpointer, state = tiny_run(args)
    advance(state)
    checkpointer.save(state)
    steps = []
    for number in range(5):
        child = os.fork()
        if child == 0:
            checkpointer, state = tiny_run(args)
            checkpointer.load(checkpointer.find(), state)
            while True:
                state.step += 1
                checkpointer.save(state)
        time.sleep(0.4 + 0.13 * number)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        checkpointer, state = tiny_run(args, seed=5)
        checkpointer.load(checkpointer.find(), state)
        steps.append(state.step)
    assert steps == sorted(steps)
    assert steps[-1] > 3


def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch):
    checkpointer, state = tiny_run(arguments(tmp_path))
    advance(state)
    first = checkpointer.save(state)
    advance(state)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save(state)
    assert checkpointer.find() == first
    second = checkpointer.save(state)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [first.name, second.name]


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
        parts = build_optimizer(parameter_groups(built.model, args), args)
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

    def start():
        checkpointer, state = tiny_run(args)
        state.model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
        state.optimizer.param_groups[0]["params"].append(state.model.unused)
        return checkpointer, state

    checkpointer, state = start()
    advance(state)
    path = checkpointer.save(state)
    checkpointer, resumed = start()
    checkpointer.load(path, resumed)
    assert resumed.model.unused not in resumed.optimizer.state
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
    load_finished_weights(start[point], new.model, CTX)
    assert same(new.model.state_dict(), state.model.state_dict())


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "new_adapters"])
def test_init_from_a_merged_model_begins_with_its_answers(tmp_path, lora, caplog):
    checkpointer, state = tiny_run(arguments(tmp_path, **MODES["merged"]))
    advance(state, 2)
    path = checkpointer.save(state)
    args = arguments(tmp_path / "next", ttt=TTT | {"chunk_size": 6}, **(MODES["adapter"] if lora else MODES["full"]))
    _, new = tiny_run(args, seed=5)
    load_finished_weights(path, new.model, CTX)
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
            load_finished_weights(path, new.model, CTX)
        assert "init_from=" in str(error.value)
        assert same(snapshot(new), before)


def test_saving_changes_nothing_in_the_run(tmp_path):
    checkpointer, state = tiny_run(arguments(tmp_path, **MODES["merged"]))
    advance(state)
    before = snapshot(state)
    generator = torch.get_rng_state()
    checkpointer.save(state)
    assert same(snapshot(state), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert sorted(moshi_patch.ttt_parameters(state.model)) == KEYS
