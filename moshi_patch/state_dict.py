"""Loading: a stock checkpoint fits a TTT model strictly, and a checkpoint with half of the TTT keys fits nothing."""

import torch
from torch import nn

from .gating import TTTGating


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


def supply_missing_targets(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A load hook for `LMModel`: fills in target-generator keys that a checkpoint does not have.

    A generator that already holds values keeps them (LoRA adapters are loaded in a second pass); one that is still on
    the meta device gets the initial ones, on the device of the checkpoint's tensors.

    Raises:
        ValueError: when the checkpoint has some of the keys and not all of them.
    """
    wanted = {prefix + name: parameter for name, parameter in ttt_parameters(module).items()}
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
    for name, parameter in wanted.items():
        if not parameter.is_meta:
            state_dict[name] = parameter
        elif name.endswith("W_target.weight"):
            state_dict[name] = torch.eye(parameter.shape[0], dtype=parameter.dtype, device=device)
        else:
            state_dict[name] = torch.zeros_like(parameter, device=device)
