"""Loading: a stock checkpoint fits a TTT model strictly, and a checkpoint with half of the TTT keys fits nothing."""

import re

import torch
from torch import nn

from .gating import TTTGating

TARGET_KEYS = ("conv1d.conv.weight", "W_target.weight")
WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What FSDP, activation checkpointing and torch.compile add to names of modules, but not to those of a checkpoint."""


def ttt_gatings(model: nn.Module) -> dict[str, TTTGating]:
    """The TTT gatings of `model`, by their names in it and in layer order; empty for a model without TTT."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TTTGating)}


def ttt_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the target generators, by their names in `model`: found by structure, not by name."""
    return {
        f"{name}.target_generator.{key}": parameter
        for name, gating in ttt_gatings(model).items()
        for key, parameter in gating.target_generator.named_parameters()
    }


def prepare_targets(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A load hook for `LMModel`: a checkpoint has the weights of every target generator or of none.

    With none, generators that hold values keep them (LoRA adapters are loaded in a second pass), and generators on the
    meta device get their initial values, on the device of the checkpoint's tensors.

    Raises:
        ValueError: when the checkpoint has some of the keys and not all of them.
    """
    gatings = {WRAPPERS.sub("", name): gating for name, gating in ttt_gatings(model).items()}
    wanted = [f"{prefix}{name}.target_generator.{key}" for name in gatings for key in TARGET_KEYS]
    missing = [name for name in wanted if name not in state_dict]
    if not missing:
        return
    if len(missing) < len(wanted):
        present = [name for name in wanted if name in state_dict]
        raise ValueError(
            f"The checkpoint has {len(present)} of the {len(wanted)} TTT weights of this model; it must have all of "
            f"them or none. Missing: {', '.join(missing)}. Present: {', '.join(present)}. "
            "Were its ttt_layers (ttt_start_layer, ttt_layer_frequency) the same?"
        )
    device = next((value.device for value in state_dict.values() if isinstance(value, torch.Tensor)), None)
    for gating in gatings.values():
        gating.target_generator.materialise(device)
