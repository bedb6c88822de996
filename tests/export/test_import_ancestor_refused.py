"""`python -m finetune.export --import-ancestor` reads with suspicion: what no ancestor left like this is one line."""

import os

import pytest
import torch

from finetune.export.__main__ import main
from finetune.export.ancestor_names import LAYOUTS, TENSORS
from tests.support.ancestors import (
    SETTINGS,
    ancestor_tensors,
    lora_tensors,
    run,
    stock_tensors,
    without,
    write_ancestor,
)

LAST = LAYOUTS[-1]


def replaced(name, value):
    return lambda tensors: tensors | {name: value}


def moved(old, new):
    return lambda tensors: {name.replace(old, new): one for name, one in tensors.items()}


def first_value(name, value):
    def change(tensors):
        tensor = tensors[name].clone()
        tensor.flatten()[0] = value
        return tensors | {name: tensor}

    return change


W1 = f"transformer.layers.1.{LAST}.W1"
STOCK = "transformer.layers.1.seq_modeling_block.original_layer.gating.linear_in.weight"
BAD_WEIGHTS = {
    "a tensor of a layer missing": (without(f"1.{LAST}.post_norm.weight"), "layer 1 lacks 1 of 19 TTT tensors: post"),
    "a whole layer missing": (without(*(f"3.{LAST}.{name}" for name in TENSORS)), "layer 3 lacks 18 of 19"),
    "its gate missing": (without("3.seq_modeling_block.forward_ssm_gating.gating_alpha"), "gating_alpha"),
    "nothing of layer 3": (lambda all: {n: t for n, t in all.items() if not n.startswith("transformer.layers.3.")},
                           "means layers [1, 3]"),
    "no TTT at all": (lambda _: stock_tensors(), "no TTT layer of an ancestor"),
    "stock twice, not equal": (first_value(STOCK, 7.0), "registered twice, and differ"),
    "NaN": (first_value(W1, float("nan")), "NaN or infinity in transformer.layers.1"),
    "infinity": (first_value(STOCK, float("inf")), "NaN or infinity"),
    "another shape": (replaced(W1, torch.zeros(2, 8, 31, dtype=torch.float16)), "is [2, 8, 31], not [2, 8, 32]"),
    "another dtype": (replaced(W1, torch.zeros(2, 8, 32)), "is F32, not F16"),
    "whole numbers": (lambda all: {n: t.to(torch.int8) for n, t in all.items()}, "its tensors are I8"),
    "two layouts mixed": (moved(f"3.{LAST}.W1", "3.seq_modeling_block.W1"), "two layouts mixed"),
    "stock names mixed": (moved("1.original_layer.norm1", "1.norm1"), "layers [1] have"),
    "a deeper network": (moved(f"1.{LAST}.W1", f"1.{LAST}.weights.0"), "another number of layers than two"),
    "an unknown tensor": (moved(f"1.{LAST}.W1", f"1.{LAST}.W3"), "is no tensor of a known layout"),
    "adapters on TTT's own": (moved(f"1.{LAST}.wq.weight", f"1.{LAST}.wq.lora_A.weight"), "is no tensor of a known"),
    "in the depformer": (moved("depformer.layers.0.", "depformer.layers.0.original_layer."), "is no tensor of a known"),
    "a stock layer missing": (lambda all: {n: t for n, t in all.items() if not n.startswith("transformer.layers.2.")},
                              "num_layers=4 in config.json"),
    "a stock tensor missing": (without("transformer.layers.0.norm1.alpha"), "1 tensor missing: transformer.layers.0"),
    "a stock tensor of another shape": (replaced("out_norm.alpha", torch.ones(4, dtype=torch.float16)), "out_norm"),
    "a tensor too many": (replaced("spare.weight", torch.ones(4, dtype=torch.float16)), "spare.weight"),
    "a layer that is not there": (moved("transformer.layers.3.", "transformer.layers.7."), "num_layers=4"),
    "a layer of digits that are none": (moved("transformer.layers.3.", "transformer.layers.03."), "is no tensor of a"),
    "no tensor at all": (lambda _: {}, "consolidated.safetensors': holds no TTT layer of an ancestor"),
    "this project's own": (moved(f"{LAST}.", "ttt."), "is a name of this project"),
    "adapters beside the model": (lambda all: all | lora_tensors(), "two layouts mixed"),
    "neither adapters nor a model": (without("text_emb.weight"), "neither adapters nor a whole model"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weights_are_refused_in_one_line(tmp_path, capsys, change, said):
    tensors = change(ancestor_tensors())
    source = write_ancestor(tmp_path / "a", {name: one.contiguous() for name, one in tensors.items()})
    assert refused(source, tmp_path, capsys, said)


def refused(source, tmp_path, capsys, said, *options):
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(source, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert ".," not in error
    assert ".." not in error.replace("...", "").replace("/..", "").replace("../", "")
    assert "Traceback" not in error
    return sorted(path.name for path in tmp_path.iterdir()) == before


BAD_CONFIGS = {
    "heads that do not divide": ({"num_heads": 3}, "num_heads=3: must divide dim=16"),
    "another width": ({"dim": 32}, "not [2, 16, 64]"),
    "no width": ({"dim": None}, "dim is missing"),
    "a name that leads elsewhere": ({"mimi_name": "../../secret.safetensors"}, "secret.safetensors"),
    "the second name leads elsewhere": ({"tokenizer_name": "/etc/passwd"}, "/etc/passwd"),
    "a size that no model has": ({"num_layers": 10**9}, "num_layers"),
}


@pytest.mark.parametrize(("config", "said"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_bad_config_is_refused_in_one_line(tmp_path, capsys, config, said):
    assert refused(write_ancestor(tmp_path / "a", ancestor_tensors(), config), tmp_path, capsys, said)


BAD_SETTINGS = {
    "other layers": ({"layers": "28,29,30"}, "ttt.layers='28,29,30'"),
    "layers that the weights have not": ({"layers": "all"}, "means layers [0, 1, 2, 3]"),
    "off": ({"enable": False}, "contradicts the weights"),
    "of another kind": ({"kind": "in_place"}, "ttt.kind='in_place': belongs to In-Place TTT"),
    "of In-Place TTT": ({"chunk_size": 256}, "ttt.chunk_size=256: belongs to In-Place TTT"),
    "no mini-batch": ({"mini_batch_size": 0}, "ttt.mini_batch_size=0"),
    "half a step": ({"mini_batch_size": 8.5}, "ttt.mini_batch_size=8.5"),
    "a word for a rate": ({"base_lr": "fast"}, "ttt.base_lr='fast'"),
    "no rate": ({"base_lr": 0.0}, "ttt.base_lr=0.0"),
    "true for a number": ({"initial_gating_alpha": True}, "ttt.initial_gating_alpha=True"),
}


@pytest.mark.parametrize(("settings", "said"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused_in_one_line(tmp_path, capsys, settings, said):
    source = write_ancestor(tmp_path / "a", ancestor_tensors(), settings={"ttt": SETTINGS | settings})
    assert refused(source, tmp_path, capsys, said)


def test_damaged_files_are_refused_in_one_line(tmp_path, capsys):
    source = write_ancestor(tmp_path / "a", ancestor_tensors())
    inside = source / "consolidated"
    weights, whole = inside / "consolidated.safetensors", (inside / "consolidated.safetensors").read_bytes()
    for content, said in (
        (whole[:-100], "is truncated"),
        (b"", "is empty"),
        (b"PK" + whole[2:], "not a safetensors file"),
    ):
        weights.write_bytes(content)
        assert refused(source, tmp_path, capsys, said)
    weights.write_bytes(whole)
    for name in ("training_config.json", "config.json"):
        kept = (inside / name).read_text()
        (inside / name).write_text("{")
        assert refused(source, tmp_path, capsys, name)
        (inside / name).write_text(kept)
    (inside / "config.json").unlink()
    assert refused(source, tmp_path, capsys, "no config.json beside it")
    assert refused(tmp_path / "nosuch", tmp_path, capsys, "no such file or folder")


def test_nothing_is_overwritten(tmp_path, capsys):
    source = write_ancestor(tmp_path / "a", ancestor_tensors())
    (tmp_path / "out").mkdir()
    assert run(source, tmp_path / "out") == 2
    assert "exists" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    os.symlink(tmp_path / "gone", tmp_path / "link")
    assert run(source, tmp_path / "link") == 2
    assert main(["--import-ancestor", str(source)]) == 2
    assert "out=''" in capsys.readouterr().err


def test_a_disk_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    source = write_ancestor(tmp_path / "a", ancestor_tensors())
    monkeypatch.setattr("finetune.export.ancestor.save_file", full)
    assert run(source, tmp_path / "out") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_adapters_without_a_word_of_them_in_the_config_are_refused(tmp_path, capsys):
    source = write_ancestor(tmp_path / "a", ancestor_tensors(adapters=True), {"lora": False})
    assert refused(source, tmp_path, capsys, "lora=False in config.json, and the file holds adapters")


def test_a_whole_model_with_adapters_beside_it_is_to_be_merged_first(tmp_path, capsys):
    source = write_ancestor(tmp_path / "a", ancestor_tensors() | {
        "transformer.layers.0.gating.linear_in.lora_A.weight": torch.zeros(2, 16, dtype=torch.float16)})  # fmt: skip
    assert refused(source, tmp_path, capsys, "merge them first")
