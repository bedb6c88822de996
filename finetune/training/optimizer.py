"""The optimizer: AdamW in float32 whatever the parameters are, and its schedule."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from ..model.trainable import FIRST_GROUPS, ParameterGroup
from ..settings.schema import OptimArgs, TTTArgs

BETAS, EPS = (0.9, 0.95), 1e-8


class MasterAdamW(AdamW):
    """AdamW on the model's own parameters, in float32 whatever their dtype.

    A parameter of lower precision gets a float32 copy, `state[parameter]["master"]`: it is the copy that is updated and
    the parameter is rounded from it, so that updates smaller than the parameter's spacing add up. All of it is ordinary
    per-parameter state of the parameter's shape, which `torch.distributed.checkpoint` gathers and shards as usual.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As `AdamW.step`."""
        low = [p for group in self.param_groups for p in group["params"] if p.grad is not None and _is_low(p)]
        originals = [(p.data, p.grad) for p in low]
        masters = [self.state[p]["master"] if "master" in self.state[p] else p.data.float() for p in low]
        for parameter, master, (_, grad) in zip(low, masters, originals, strict=True):
            parameter.grad = None  # a gradient has to be of its parameter's dtype at any time
            parameter.data = master
            parameter.grad = grad.float()
        try:
            result = super().step(closure)
        finally:
            for parameter, master, (data, grad) in zip(low, masters, originals, strict=True):
                data.copy_(master)
                parameter.grad = None
                parameter.data = data
                parameter.grad = grad
        for parameter, master in zip(low, masters, strict=True):
            self.state[parameter]["master"] = master
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `AdamW.load_state_dict`, which however casts all state to the parameter's dtype; here it stays float32."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, own, strict=True):
            if not _is_low(parameter):
                continue
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step" and isinstance(value, torch.Tensor):
                    self.state[parameter][name] = value.detach().to(parameter.device, torch.float32, copy=True)


def _is_low(parameter: torch.Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def build_optimizer(groups: list[ParameterGroup], optim: OptimArgs, max_steps: int) -> tuple[AdamW, OneCycleLR]:
    """AdamW with one group of its own per `ParameterGroup`, and OneCycleLR over `max_steps`, as moshi-finetune."""
    entries = [
        {
            "params": list(group.parameters.values()),
            "lr": group.lr,
            "name": group.name,
            "weight_decay": optim.weight_decay if group.decays else 0.0,
        }
        for group in groups
    ]
    optimizer = MasterAdamW(entries, betas=BETAS, eps=EPS)
    rates = [group.lr for group in groups]
    return optimizer, OneCycleLR(optimizer, rates, total_steps=max_steps, pct_start=optim.pct_start)


def learning_rates(optimizer: AdamW, ttt: TTTArgs, step: int) -> Iterator[tuple[str, float]]:
    """Name and learning rate of each group in the update after `step`; 0 while it waits."""
    return (
        (group["name"], 0.0 if _waits(group, ttt, step) else float(group["lr"])) for group in optimizer.param_groups
    )


def waiting_parameters(optimizer: AdamW, ttt: TTTArgs, step: int) -> Iterator[nn.Parameter]:
    """What does not train yet in the update after `step`: see `ttt.first_steps`."""
    return (parameter for group in optimizer.param_groups if _waits(group, ttt, step) for parameter in group["params"])


def _waits(group: dict[str, Any], ttt: TTTArgs, step: int) -> bool:
    return step < ttt.first_steps and group["name"] not in FIRST_GROUPS
