"""`python -m finetune.export --import-ancestor`: every tensor of an ancestor's checkpoint, bit for bit, or one line."""

import copy
import json
import math

import pytest
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file

import moshi_patch
from finetune.doctor.__main__ import main as doctor
from finetune.export.__main__ import main
from finetune.export.ancestor_names import LAYOUTS, TENSORS, tensor_shapes
from tests.support.ancestors import (
    LAYERS,
    NOTHING_CALLS_IT,
    SETTINGS,
    ancestor_tensors,
    lora_tensors,
    run,
    stock_tensors,
    ttt_tensors,
    without,
    write_ancestor,
)
from tests.support.models import TINY, random_codes, relative
from tests.support.streams import one_pass, steps

NAMES = {f"transformer.layers.{layer}.ttt.{name}": (layer, name) for layer in LAYERS for name in TENSORS}


def expected(dtype=torch.float16, stock=stock_tensors):
    """What an imported checkpoint holds: the stock tensors, and 19 in each TTT layer."""
    ttt = {name: ttt_tensors(layer, dtype)[inside] for name, (layer, inside) in NAMES.items()}
    return stock(dtype) | ttt


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name].dtype != wanted[name].dtype] == []
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_a_layer_has_nineteen_tensors():
    assert len(TENSORS) == len(set(TENSORS)) == 19


@pytest.mark.slow
def test_the_count_of_the_plans_is_met_but_for_the_backward_gates():
    with torch.device("meta"):
        moshi_7b = loaders.get_moshi_lm(None, copy.deepcopy(loaders._lm_kwargs), device="meta", dtype=torch.bfloat16)
    layer = sum(math.prod(shape) for shape in tensor_shapes(4096, 32).values())
    total = sum(parameter.numel() for parameter in moshi_7b.parameters()) + 2 * layer
    assert total == 7_830_712_384 == 7_830_720_576 - 2 * 4096


@pytest.mark.parametrize("twice", [True, False], ids=["stock layers twice", "once"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_the_same_checkpoint(tmp_path, capsys, layout, twice):
    source = write_ancestor(tmp_path / "a", ancestor_tensors(layout, twice=twice))
    assert run(source, tmp_path / "out") == 0
    assert_same(load_file(tmp_path / "out" / "consolidated.safetensors"), expected())
    said = capsys.readouterr().out
    assert f"in the layout {layout}: 40 tensors, of which 38 are kept (19 a layer) and 2 dropped" in said
    stock = sum(name.startswith(tuple(f"transformer.layers.{layer}." for layer in LAYERS)) for name in stock_tensors())
    assert f"{stock if twice else 0} stock tensors stood there twice, equal" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_values_keep_their_dtype_and_every_bit(tmp_path, dtype):
    assert run(write_ancestor(tmp_path / "a", ancestor_tensors(dtype=dtype)), tmp_path / "out") == 0
    assert_same(load_file(tmp_path / "out" / "consolidated.safetensors"), expected(dtype))


def test_the_config_says_what_the_checkpoint_is(tmp_path):
    source = write_ancestor(
        tmp_path / "a", ancestor_tensors(), {"lora": True, "lora_name": "file:///x/lora.safetensors"}
    )
    assert run(source, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: value for key, value in config.items() if key.startswith("ttt_")} == {
        "ttt_enabled": True,
        "ttt_kind": "mlp",
        "ttt_layers": [1, 3],
        "ttt_mini_batch_size": 8,
        "ttt_base_lr": 0.1,
        "ttt_initial_gating_alpha": 0.1,
        "ttt_scan_checkpoint_group_size": 8,
    }
    assert config["lora"] is False, "the weights are whole: with true, moshi would add random adapters"
    assert not {"lora_name", "lora_rank", "lora_scaling"} & config.keys()
    assert config["dim"] == 16


def loaded(folder, dtype=torch.float64, **files):
    """The model of an imported folder, as moshi's own programs load it: strictly."""
    config = json.loads((folder / "config.json").read_text())
    arguments = {key: value for key, value in config.items() if key not in moshi_patch.NOT_ARGUMENTS}
    files = files or {"filename": folder / "consolidated.safetensors"}
    return loaders.get_moshi_lm(lm_kwargs=arguments, device="cpu", dtype=dtype, **files)


def assert_learns_while_it_streams(model):
    codes = random_codes(model, 2, 21)
    answer = one_pass(model, codes)
    with model.streaming(2):
        assert relative(steps(model, codes), answer) < 1e-12
    with moshi_patch.ttt_updates(model):
        assert relative(one_pass(model, codes), answer) > 1e-4


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_imported_checkpoint_loads_strictly_and_streams(tmp_path, layout):
    assert run(write_ancestor(tmp_path / "a", ancestor_tensors(layout)), tmp_path / "out") == 0
    model = loaded(tmp_path / "out")
    assert model.ttt_config.kind == "mlp"
    assert model.ttt_config.mini_batch_size == 8
    assert_same(model.state_dict(), {name: tensor.double() for name, tensor in expected().items()})
    assert_learns_while_it_streams(model)


def test_the_doctor_finds_nothing_wrong_with_an_imported_checkpoint(tmp_path, capsys):
    assert run(write_ancestor(tmp_path / "a", ancestor_tensors()), tmp_path / "out") == 0
    assert doctor([str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "ok settings: config.json describes these weights" in said
    assert "ok TTT active" in said


@pytest.mark.usefixtures("patched")
def test_imported_adapters_load_over_their_base_and_stream(tmp_path):
    assert run(write_ancestor(tmp_path / "a", ancestor_tensors(adapters=True)), tmp_path / "out") == 0
    base = tmp_path / "base.safetensors"
    save_file(stock_tensors(), base)
    model = loaded(tmp_path / "out", filename=base, lora_weights=tmp_path / "out" / "lora.safetensors", fuse_lora=False)
    wanted = {name: tensor.double() for name, tensor in expected(stock=lora_tensors).items()}
    assert_same({name: tensor for name, tensor in model.state_dict().items() if name in wanted}, wanted)
    assert_learns_while_it_streams(model)


@pytest.mark.usefixtures("patched")
def test_an_ancestors_own_names_in_a_plain_load_say_what_to_do(tmp_path):
    source = write_ancestor(tmp_path / "a", ancestor_tensors()) / "consolidated"
    with pytest.raises(ValueError, match="--import-ancestor"):
        loaders.get_moshi_lm(source / "consolidated.safetensors", dict(TINY, ttt_enabled=True, ttt_kind="mlp"), "cpu")


def test_adapters_stay_adapters(tmp_path, capsys):
    source = write_ancestor(tmp_path / "a", ancestor_tensors(adapters=True))
    assert run(source, tmp_path / "out") == 0
    assert_same(load_file(tmp_path / "out" / "lora.safetensors"), expected(stock=lora_tensors))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["lora"], config["lora_rank"], config["ttt_kind"]) == (True, 2, "mlp")
    assert "give their base model with --base" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("states", "said"),
    [(True, "had adapted to"), (None, "is not recorded"), (False, "are what training left")],
)
def test_what_a_stream_may_have_left_in_the_weights_is_said(tmp_path, capsys, states, said):
    source = write_ancestor(
        tmp_path / "a", ancestor_tensors(), settings={"ttt": SETTINGS | {"persistent_states": states}}
    )
    assert run(source, tmp_path / "out") == 0
    lines = capsys.readouterr().out
    assert said in lines
    assert "not the same function" in lines


def test_names_that_wrappers_left_are_those_inside(tmp_path):
    tensors = {
        name.replace("transformer.layers.1.", "transformer.layers.1._fsdp_wrapped_module."): tensor
        for name, tensor in ancestor_tensors().items()
    }
    assert run(write_ancestor(tmp_path / "a", tensors), tmp_path / "out") == 0
    assert_same(load_file(tmp_path / "out" / "consolidated.safetensors"), expected())


YAML = "ttt:\n  enable: true\n  layers: [3, 1]\n  base_lr: 1e-4\n  ssm_layer: ttt_mlp\n"


def test_an_old_checkpoint_takes_its_settings_from_the_yaml_of_its_training(tmp_path, capsys):
    source = write_ancestor(tmp_path / "a", ancestor_tensors(), settings={})
    (tmp_path / "run.yaml").write_text(YAML)
    assert run(source, tmp_path / "out") == 2
    assert "give the YAML file of its training with --config" in capsys.readouterr().err
    assert run(source, tmp_path / "out", "--config", str(tmp_path / "run.yaml")) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["ttt_base_lr"], config["ttt_mini_batch_size"], config["ttt_layers"]) == (1e-4, 16, [1, 3])
    assert "Not carried over: ssm_layer" in capsys.readouterr().out


def test_the_settings_of_the_checkpoint_come_before_those_of_the_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text(YAML)
    source = write_ancestor(tmp_path / "a", ancestor_tensors())
    assert run(source, tmp_path / "out", "--config", str(tmp_path / "run.yaml")) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["ttt_base_lr"] == 0.1


def test_a_backward_gate_more_or_less_changes_only_the_count(tmp_path, capsys):
    tensors = without(f"3.{NOTHING_CALLS_IT}")(ancestor_tensors())
    assert run(write_ancestor(tmp_path / "a", tensors), tmp_path / "out") == 0
    assert "39 tensors, of which 38 are kept (19 a layer) and 1 dropped" in capsys.readouterr().out
    assert_same(load_file(tmp_path / "out" / "consolidated.safetensors"), expected())


def test_a_file_of_weights_alone_can_be_named(tmp_path):
    source = write_ancestor(tmp_path / "a", ancestor_tensors())
    assert main([f"--import-ancestor={source}/consolidated/consolidated.safetensors", f"--out={tmp_path / 'out'}"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"consolidated.safetensors", "config.json", "SHA256SUMS"}
    save_file({}, tmp_path / "nothing.safetensors")
    assert main([f"--import-ancestor={tmp_path / 'nothing.safetensors'}", f"--out={tmp_path / 'second'}"]) == 2


def test_keys_of_a_yaml_file_that_are_no_words_are_named_as_they_stand(tmp_path, capsys):
    source = write_ancestor(tmp_path / "a", ancestor_tensors(), settings={})
    yaml = tmp_path / "moshi.yaml"
    yaml.write_text('ttt:\n  enable: null\n  layers: 1,3\n  1: 2\n  null: 3\n  "a\\e": 4\n')
    assert run(source, tmp_path / "out", "--config", str(yaml)) == 0
    assert "Not carried over: 1, None, 'a\\x1b'; they change nothing" in capsys.readouterr().out
