"""Synthetic checkpoints of ancestors, the older hybrids of Moshi and TTT-MLP, in each layout that they had."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moshi.modules.lora import replace_all_linear_with_lora
from safetensors.torch import save_file

from finetune.export.__main__ import main
from finetune.export.ancestor_names import LAYOUTS, tensor_shapes
from tests.support.models import TINY, tiny_model

LAYERS = (1, 3)
RANK = 2
SETTINGS = {"enable": True, "layers": "1,3", "base_lr": 0.1, "mini_batch_size": 8, "persistent_states": True}
SETTINGS |= {"initial_gating_alpha": 0.1}
NOTHING_CALLS_IT = "seq_modeling_block.backward_ssm_gating.gating_alpha"
"""The second gate of every wrapped layer."""


def stock_tensors(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Those of the tiny model."""
    return tiny_model(dtype=dtype).state_dict()


def ttt_tensors(layer: int, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The 19 of a layer, random, by their names after `ttt.`."""
    generator = torch.Generator().manual_seed(layer)
    shapes = tensor_shapes(TINY["dim"], TINY["num_heads"])
    return {name: (torch.randn(shape, generator=generator) * 0.5).to(dtype) for name, shape in shapes.items()}


def ancestor_tensors(
    layout: str = LAYOUTS[-1], *, adapters: bool = False, twice: bool = True, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by an ancestor's names.

    Args:
        adapters: LoRA of every linear layer and the TTT tensors, and no stock weight.
        twice: stock tensors of wrapped layers are registered twice.
    """
    found = {}
    for name, tensor in (lora_tensors(dtype) if adapters else stock_tensors(dtype)).items():
        parts = name.split(".")
        layer = int(parts[2]) if name.startswith("transformer.layers.") else None
        if layer not in LAYERS:
            found[name] = tensor
            continue
        inside = ".".join(parts[3:])
        found[f"transformer.layers.{layer}.original_layer.{inside}"] = tensor
        if twice:
            found[f"transformer.layers.{layer}.seq_modeling_block.original_layer.{inside}"] = tensor.clone()
    for layer in LAYERS:
        for name, tensor in ttt_tensors(layer, dtype).items():
            place = "seq_modeling_block.forward_ssm_gating" if name == "gating_alpha" else layout
            found[f"transformer.layers.{layer}.{place}.{name}"] = tensor
        found[f"transformer.layers.{layer}.{NOTHING_CALLS_IT}"] = torch.full((TINY["dim"],), 0.1, dtype=dtype)
    return found


def lora_tensors(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Random adapters of all linear layers, by the names of stock moshi."""
    model = tiny_model()
    replace_all_linear_with_lora(model, RANK, 2.0)
    generator = torch.Generator().manual_seed(9)
    return {
        name: (torch.randn(tensor.shape, generator=generator) * 0.1).to(dtype)
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }


def write_ancestor(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint's folder with its `consolidated`, as ancestors wrote them; returns it.

    Args:
        config: replaces keys of config.json; None takes a key out.
        settings: the whole training_config.json; an empty one is not written.
    """
    inside = folder / "consolidated"
    inside.mkdir(parents=True)
    adapters = any("lora_A" in name for name in tensors)
    save_file(tensors, inside / ("lora.safetensors" if adapters else "consolidated.safetensors"))
    written = {**TINY, "moshi_name": "model.safetensors", "mimi_name": "mimi.safetensors", "tokenizer_name": "t.model"}
    written |= {"lora": adapters, "lora_rank": RANK, "lora_scaling": 2.0, **(config or {})}
    (inside / "config.json").write_text(json.dumps({key: one for key, one in written.items() if one is not None}))
    if settings is None:
        settings = {"ttt": SETTINGS, "batch_size": 1, "duration_sec": 100.0, "full_finetuning": False}
    if settings:
        (inside / "training_config.json").write_text(json.dumps(settings))
    return folder


def run(source, out, *options) -> int:
    """Imports `source` into `out`; the exit code."""
    return main(["--import-ancestor", str(source), "--out", str(out), *options])


def without(*names: str) -> Callable[[dict], dict]:
    """Takes the tensors out whose names end in one of `names`."""
    return lambda tensors: {name: one for name, one in tensors.items() if not name.endswith(names)}
