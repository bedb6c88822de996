"""What all weights that TTT adds have in common: there whatever a checkpoint holds, also from the meta device."""

import torch
from torch import nn


def keep_own_weights(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A load hook: where the checkpoint has no weight, the module keeps its own.

    It hangs on the module that owns the weight: what wraps modules in between (FSDP, activation checkpointing) has
    renamed the keys and gathered the weight by then.
    """
    for name, weight in module._parameters.items():
        if weight is not None:
            state_dict.setdefault(prefix + name, weight)


class NewWeights(nn.Module):
    """Owns weights that a stock checkpoint lacks. A subclass says in :meth:`initial` what they begin as.

    None of these is an `nn.Linear` or a norm of torch or moshi: LoRA, int8 and moshi's own initialisation take every
    one they find. In training each weight is only used inside the `forward` of the module that owns it, so that FSDP
    may wrap any of them.
    """

    def add_weights(self, names: tuple[str, ...], device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Makes the weights, and lets them stay where a checkpoint has none. To be called once."""
        for name in names:
            self.register_parameter(name, nn.Parameter(self.initial(name, device, dtype)))
        self._register_load_state_dict_pre_hook(keep_own_weights, with_module=True)

    def initial(self, name: str, device: torch.device | str | None, dtype: torch.dtype | None) -> torch.Tensor:
        """What the weight `name` begins as."""
        raise KeyError(name)


def materialise(module: nn.Module, device: torch.device | None) -> None:
    """Give all weights below `module` that are still on the meta device their initial values on `device`."""
    for owner in module.modules():
        if isinstance(owner, NewWeights):
            for name, weight in owner._parameters.items():
                if weight is not None and weight.is_meta:
                    value = owner.initial(name, device, weight.dtype)
                    owner.register_parameter(name, nn.Parameter(value, weight.requires_grad))
