"""Loading a checkpoint into a model with TTT: the weights of all its memories are there, or none of them."""

import re
from typing import NamedTuple

import torch
from torch import nn

from .kinds import CLASSES
from .kinds.weights import materialise
from .model import stock_name, ttt_memories

LAYER_KEY = re.compile(r"(?:.*\.)?transformer\.layers\.(\d+)\.(\w+)\.(.+)")
NESTED_KEY = re.compile(r"(?:^|\.)layers\.\d+\.(?:original_layer|seq_modeling_block|ttt_layer)\.")
"""Names in checkpoints of the ancestors of `ttt_kind="mlp"`, which put a layer of theirs around the stock one."""

SHOWN_NAMES = 8
"""So many names stand in a message, then how many more there are."""


class MemoryKey(NamedTuple):
    """What a weight of a memory is, for its name in a checkpoint.

    Attributes:
        kind: `ttt_kind`.
        layer: index in the transformer.
        key: name below the memory's own, one of its class's `weight_keys`.
    """

    kind: str
    layer: int
    key: str


def memory_key(name: str) -> MemoryKey | None:
    """What the weight of this name in a checkpoint is, if TTT added it; else None."""
    match = LAYER_KEY.fullmatch(name)
    kinds = [kind for kind, cls in CLASSES.items() if match and (cls.place == match[2] and match[3] in cls.weight_keys)]
    return MemoryKey(kinds[0], int(match[1]), match[3]) if kinds else None


def target_key(name: str) -> tuple[int, str] | None:
    """The layer of a target generator and which of `TARGET_KEYS` it is, for its name in a checkpoint; else None."""
    found = memory_key(name)
    return (found.layer, found.key.removeprefix("target_generator.")) if found and found.kind == "in_place" else None


def refuse_ancestors(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A load hook for `LMModel`.

    Raises:
        ValueError: when the checkpoint's names are those of an ancestor of `ttt_kind="mlp"`.
    """
    nested = [name for name in state_dict if NESTED_KEY.search(name)]
    if nested:
        raise ValueError(
            f"The checkpoint has {len(nested)} tensors with names such as {nested[0]}, of an older system that put a "
            "layer of its own around the stock one: import it first, with python -m finetune.export --import-ancestor."
        )


def prepare_weights(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A load hook for an `LMModel` with TTT: a checkpoint has all of TTT's weights or none.

    With none, weights that hold values keep them (LoRA adapters are loaded in a second pass), and weights on the meta
    device get their initial values, on the device of the checkpoint's tensors.

    Raises:
        ValueError: when the checkpoint has some of the keys and not all of them, those of another kind of memory, or
            those of an ancestor.
    """
    refuse_ancestors(model, state_dict, prefix)
    _refuse_other_kinds(model, state_dict)
    memories = {stock_name(name): memory for name, memory in ttt_memories(model).items()}
    wanted = [f"{prefix}{name}.{key}" for name, memory in memories.items() for key in memory.weight_keys]
    missing = [name for name in wanted if name not in state_dict]
    if not missing:
        return
    if len(missing) < len(wanted):
        present = [name for name in wanted if name in state_dict]
        raise ValueError(
            f"The checkpoint has {len(present)} of the {len(wanted)} TTT weights of this model; it must have all of "
            f"them or none. Missing: {_listed(missing)}. Present: {_listed(present)}. "
            "Were its ttt_layers (ttt_start_layer, ttt_layer_frequency) the same?"
        )
    device = next((value.device for value in state_dict.values() if isinstance(value, torch.Tensor)), None)
    for memory in memories.values():
        materialise(memory, device)


def _refuse_other_kinds(model: nn.Module, state_dict: dict) -> None:
    kind = model.ttt_config.kind
    for name in state_dict:
        found = memory_key(name)
        if found and found.kind != kind:
            raise ValueError(
                f'The checkpoint is of ttt_kind="{found.kind}", as {name} in it says, and this model of '
                f'ttt_kind="{kind}": build the model with the settings in the config.json beside the checkpoint.'
            )


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
