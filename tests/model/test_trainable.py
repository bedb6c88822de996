"""What trains in each mode, at which rate, and an optimizer that does it in float32."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from moshi.modules.lora import LoRALinear
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import moshi_patch
from finetune.common.distributed import Context
from finetune.common.errors import ConfigError
from finetune.model.adapters import add_adapters
from finetune.model.base import find_base_files
from finetune.model.trainable import describe, parameter_groups
from finetune.settings.record import from_dict
from finetune.settings.schema import TrainArgs
from finetune.training.build_model import build_model, trained_config
from finetune.training.optimizer import MasterAdamW, build_optimizer
from tests.support.loading import KEYS
from tests.support.models import TTT, random_codes, tiny_model

LORA, FULL, ON = {"lora": {"enable": True, "rank": 3}}, {"full_finetuning": True}, {"ttt": {"enabled": True}}
FROZEN_W_DOWN = {"ttt": {"enabled": True, "train_w_down": False}}
TEXT = {"ttt": {"enabled": True, "text_emb_lr": 0.5}}
ONE = Context(0, 1, 0, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _patched(patched):
    """Training installs the patch for good; here it is gone after each test."""


def model_for(args: TrainArgs):
    model = tiny_model(torch.float32, **(TTT if args.ttt.enabled else {}))
    if args.lora.enable:
        add_adapters(model, args.lora.rank, args.lora.scaling)
    return model


def trained(settings: dict) -> dict[str, set[str]]:
    args = from_dict(settings)
    return {group.name: set(group.parameters) for group in parameter_groups(model_for(args), args)}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (FULL, ["embeddings", "base"]),
        (FULL | ON, ["target_generators", "w_down", "embeddings", "base"]),
        (FULL | FROZEN_W_DOWN, ["target_generators", "embeddings", "base"]),
        (LORA, ["adapters"]),
        (LORA | ON, ["target_generators", "w_down", "adapters"]),
        (LORA | FROZEN_W_DOWN, ["target_generators", "adapters"]),
        ({"lora": {"enable": True, "ft_embed": True}} | ON, ["target_generators", "w_down", "adapters", "embeddings"]),
        (ON, ["target_generators", "w_down"]),
        (FROZEN_W_DOWN, ["target_generators"]),
        (LORA | TEXT, ["target_generators", "w_down", "text_embedding", "adapters"]),
        (FULL | TEXT, ["target_generators", "w_down", "text_embedding", "embeddings", "base"]),
        (TEXT, ["target_generators", "w_down", "text_embedding"]),
    ],
)
def test_each_mode_trains_its_groups_and_no_parameter_twice(settings, names):
    groups = trained(settings)
    assert list(groups) == names
    assert sum(map(len, groups.values())) == len(set.union(*groups.values()))


def test_the_groups_are_those_parts_of_the_model():
    groups = trained(LORA | ON)
    assert groups["target_generators"] == set(KEYS)
    assert groups["w_down"] == {f"transformer.layers.{i}.gating.linear_out.frozen_W.weight" for i in (1, 3)}
    layers = {n for n, m in model_for(from_dict(LORA | ON)).named_modules() if isinstance(m, LoRALinear)}
    idle = {f"transformer.layers.{i}.gating.linear_out" for i in (1, 3)}  # their base trains in full
    assert groups["adapters"] == {f"{name}.lora_{which}.weight" for name in layers - idle for which in "AB"}
    assert len(trained(LORA | FROZEN_W_DOWN)["adapters"]) == len(groups["adapters"]) + 4
    full = trained(FULL | ON)
    assert set.union(*full.values()) == set(dict(model_for(from_dict(FULL | ON)).named_parameters()))
    names = {"emb.0.weight", "text_emb.weight", "depformer_emb.0.weight", "depformer_text_emb.weight"}
    assert names <= full["embeddings"]


def test_the_text_embedding_may_have_a_rate_of_its_own():
    args = from_dict(FULL | TEXT)
    rates = {group.name: (set(group.parameters), group.lr) for group in parameter_groups(model_for(args), args)}
    assert rates["text_embedding"] == ({"text_emb.weight"}, 0.5)
    assert "text_emb.weight" not in rates["embeddings"][0]
    assert rates["embeddings"][1] == args.optim.lr


def test_a_control_trains_what_a_run_with_ttt_trains_but_for_the_target_generators():
    as_control = {"ttt": {"as_control": True, "layers": [1, 3], "text_emb_lr": 0.5}}
    for mode in (LORA, FULL, {}):
        ours, theirs = trained(mode | TEXT), trained(mode | as_control)
        assert theirs == {name: members for name, members in ours.items() if name != "target_generators"}


def test_stock_weights_may_have_a_rate_of_their_own():
    stages = {"ttt": {"enabled": True, "stock_lr": 1e-5}, "optim": {"lr": 1e-3}}
    args = from_dict(FULL | stages)
    rates = {group.name: group.lr for group in parameter_groups(model_for(args), args)}
    assert rates == {"target_generators": 5e-3, "w_down": 1e-3, "embeddings": 1e-5, "base": 1e-5}
    without = from_dict(FULL | {"ttt": {"stock_lr": 1e-5}, "optim": {"lr": 1e-3}})
    assert {group.lr for group in parameter_groups(model_for(without), without)} == {1e-3}, "only beside TTT"


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="Nothing would be trained"):
        parameter_groups(tiny_model(), TrainArgs())


def test_target_generators_have_their_own_rate_and_the_table_says_so():
    for own, expected in ((None, 5e-3), (0.02, 0.02)):
        args = from_dict(LORA | {"ttt": {"enabled": True, "optim_lr": own}, "optim": {"lr": 1e-3}, "max_steps": 40})
        model = model_for(args)
        groups = parameter_groups(model, args)
        assert {group.name: group.lr for group in groups} == {
            "target_generators": expected,
            "w_down": 1e-3,
            "adapters": 1e-3,
        }
        optimizer, scheduler = build_optimizer(groups, args.optim, args.max_steps)
        peaks = [0.0] * 3
        for _ in range(args.max_steps):
            peaks = [max(peak, group["lr"]) for peak, group in zip(peaks, optimizer.param_groups, strict=True)]
            optimizer.step()
            scheduler.step()
        assert peaks == pytest.approx([expected, 1e-3, 1e-3], rel=1e-3)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        _, _, *table = describe(groups, sizes, sum(sizes.values())).splitlines()
        assert table[0].split() == ["target_generators", "4", str(2 * (16 * 2 + 16 * 16)), f"{expected:g}"]
        counts = [int(line.split()[-2].replace(",", "")) for line in table]
        assert sum(counts) == sum(sizes.values())


def test_new_adapters_change_nothing_at_first():
    model = tiny_model(torch.float32, **TTT)
    codes = random_codes(model, 2, 24)
    before = model(codes).text_logits
    add_adapters(model, 3, 2.0)
    assert torch.equal(model(codes).text_logits, before)
    assert all(m.lora_A.weight.any() for m in model.modules() if isinstance(m, LoRALinear))


def test_in_float32_the_optimizer_is_adamw():
    weights = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    twins = copy.deepcopy(weights)
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours, stock = MasterAdamW(weights, **settings), torch.optim.AdamW(twins, **settings)
    for _ in range(3):
        for weight, twin in zip(weights, twins, strict=True):
            weight.grad = torch.randn(3, 4)
            twin.grad = weight.grad.clone()
        ours.step()
        stock.step()
    assert all(torch.equal(weight, twin) for weight, twin in zip(weights, twins, strict=True))


def test_bfloat16_parameters_follow_a_float32_course_that_they_could_not_keep_themselves():
    start = torch.randn(64).bfloat16()
    low, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    ours, stock = MasterAdamW([low], lr=1e-5), torch.optim.AdamW([exact], lr=1e-5)
    for _ in range(200):
        low.grad = torch.randn(64).abs().bfloat16()
        exact.grad = low.grad.float()
        ours.step()
        stock.step()
    assert low.dtype == low.grad.dtype == torch.bfloat16
    assert torch.equal(low, exact.bfloat16())
    assert not torch.equal(low, start)  # a single step is below the spacing of bfloat16
    assert {name: value.dtype for name, value in ours.state[low].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq", "master"), torch.float32
    )


@pytest.mark.parametrize("through", ["optimizer", "torch.distributed.checkpoint"])
def test_a_loaded_optimizer_continues_bit_for_bit(through):
    def steps(model, optimizer, number, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(number):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
            optimizer.step()

    model = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
    optimizer = MasterAdamW(model.parameters(), lr=1e-4)
    steps(model, optimizer, 3, 0)
    other = copy.deepcopy(model)
    again = MasterAdamW(other.parameters(), lr=1e-4)
    if through == "optimizer":
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        set_optimizer_state_dict(other, again, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    steps(model, optimizer, 3, 1)
    steps(other, again, 3, 1)
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, twin)
        assert torch.equal(optimizer.state[parameter]["master"], again.state[twin]["master"])


def args_for(repo: Path, **settings) -> TrainArgs:
    ttt = {"enabled": True, "layers": [1, 3], "chunk_size": 16, "learning_rate": 0.01}
    return from_dict({"moshi_paths": {"hf_repo_id": str(repo)}, "param_dtype": "float32", "ttt": ttt, **settings})


def test_a_built_model_is_whole_frozen_where_it_should_be_and_described_for_serving(stock_repo):
    args = args_for(stock_repo, **LORA)
    built = build_model(args, ONE)
    tensors = dict(built.model.named_parameters())
    assert not any(tensor.is_meta for tensor in tensors.values())
    wanted = {name for group in parameter_groups(built.model, args) for name in group.parameters}
    assert {name for name, tensor in tensors.items() if tensor.requires_grad} == wanted
    raw = json.loads((stock_repo / "config.json").read_text())
    assert built.lm_config == raw | args.ttt.to_kwargs() | {"lora": True, "lora_rank": 3, "lora_scaling": 2.0}
    json.dumps(built.lm_config)
    again = build_model(args, ONE).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in built.model.state_dict().items())


def test_the_settings_of_ttt_are_built_once_and_once_more_by_the_model(stock_repo, monkeypatch):
    args, made, check = args_for(stock_repo), [], moshi_patch.TTTConfig.__post_init__
    monkeypatch.setattr(moshi_patch.TTTConfig, "__post_init__", lambda self: (made.append(self), check(self))[1])
    built = build_model(args, ONE)
    assert made == [built.model.ttt_config]
    assert isinstance(args.ttt, moshi_patch.TTTConfig)
    assert made[0].to_kwargs() == args.ttt.to_kwargs()


def test_single_files_do_as_well_as_the_folder(stock_repo):
    names = {"moshi": "model.safetensors", "mimi": "mimi.safetensors", "tokenizer": "tokenizer.model"}
    paths = {f"{kind}_path": str(stock_repo / name) for kind, name in names.items()}
    paths |= {"config_path": str(stock_repo / "config.json"), "hf_repo_id": None}
    single = find_base_files(from_dict({"moshi_paths": paths}).moshi_paths)
    assert single == find_base_files(args_for(stock_repo).moshi_paths)


def test_a_base_that_does_not_fit_is_refused_by_name(stock_repo, tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_base_files(args_for(tmp_path).moshi_paths)
    config = json.loads((stock_repo / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"ttt_enabled": True}))
    with pytest.raises(ConfigError, match=r"names 'model.safetensors'.*no such file"):
        find_base_files(args_for(tmp_path).moshi_paths)
    for file in stock_repo.glob("*[!n]"):
        if file.name != "config.json":
            shutil.copy(file, tmp_path)
    shutil.copy(stock_repo / "mimi_config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"ttt.enabled=False"):
        build_model(args_for(tmp_path, **FULL, ttt={}), ONE)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantize": True}))
    with pytest.raises(ConfigError, match="quantised"):
        build_model(args_for(tmp_path), ONE)
    (tmp_path / "config.json").write_text(json.dumps(config | {"conditioners": {"speaker": {"type": "tensor"}}}))
    with pytest.raises(ConfigError, match="tensor conditions speaker"):
        build_model(args_for(tmp_path), ONE)


def test_a_repository_without_config_is_moshi_7b_and_moshis_own_defaults_stay_as_they_are():
    from moshi.models import loaders

    before = copy.deepcopy(loaders._lm_kwargs)
    info = loaders.CheckpointInfo(Path("a"), Path("b"), Path("c"))
    config = trained_config(info, args_for(Path("unused"), **LORA))
    assert config["dim"] == 4096
    assert config["moshi_name"] == "model.safetensors"
    assert config["ttt_chunk_size"] == 16
    assert loaders._lm_kwargs == before


def test_names_of_ttt_settings_are_those_of_the_patch():
    assert set(TrainArgs().ttt.to_kwargs()) == set(moshi_patch.TTTConfig().to_kwargs())
