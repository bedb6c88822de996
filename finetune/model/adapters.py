"""What a model is made of, whatever wraps it: the names of its parts, and its adapters, found by structure."""

import math

from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from torch import nn

from moshi_patch import stock_name


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


def add_adapters(model: nn.Module, rank: int, scaling: float) -> None:
    """LoRA on every linear layer, changing nothing yet: A random, B zero. Stays on the meta device where `model` is."""
    replace_all_linear_with_lora(model, rank, scaling, device="meta")
    for module in model.modules():
        if isinstance(module, LoRALinear):
            device = module.frozen_W.weight.device
            for linear in (module.lora_A, module.lora_B):
                linear.to_empty(device=device)
            nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5))
            nn.init.zeros_(module.lora_B.weight)
