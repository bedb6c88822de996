"""What a model is made of, whatever wraps it: the names of its parts, and its adapters, found by structure."""

from moshi.modules.lora import LoRALinear
from torch import nn

WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""What FSDP, activation checkpointing and torch.compile add to the names of modules."""


def stock_name(name: str) -> str:
    """The name of a module or parameter without what wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers of `model` with adapters, by stock name; empty for a model without."""
    return {stock_name(name): module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the adapters of `model`, by stock name: two per layer, not the weight that they adapt."""
    return {
        f"{layer}.{part}.{stock_name(name)}": parameter
        for layer, module in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
        for name, parameter in getattr(module, part).named_parameters()
    }
