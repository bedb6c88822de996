"""What trains, in which group and at which rate, and the optimizer that does it.

`parameter_groups` is the one place that decides; everything else (`requires_grad`, the optimizer, the table in the log,
what a checkpoint of adapters holds) follows from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from moshi.conditioners import ConditionProvider
from moshi.models.lm_utils import ScaledEmbedding
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

import moshi_patch

from .args import TrainArgs
from .parsing import ConfigError
from .structure import lora_parameters, stock_name

TARGET_LR_MULTIPLE = 5.0
"""`ttt.optim_lr: null` is this multiple of `optim.lr`: target generators start at zero, beside weights that are trained
already. On the recall benchmark (`benchmarks/recall.py`) it shortened the plateau before memory sets in."""

BETAS, EPS = (0.9, 0.95), 1e-8


@dataclass
class ParameterGroup:
    """Parameters that train at one rate.

    Args:
        name: `target_generators`, `w_down`, `text_embedding`, `adapters`, `embeddings` or `base`.
        parameters: by their names in the unwrapped model. Under FSDP each holds this rank's share.
        lr: the peak learning rate.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    lr: float


def parameter_groups(model: nn.Module, args: TrainArgs) -> list[ParameterGroup]:
    """Everything that trains, by what it is in the structure of `model`, wrapped or not.

    - `target_generators` of TTT layers, at `ttt.optim_lr`;
    - `w_down`, the base down projections of TTT layers, in full also under LoRA, with `ttt.train_w_down`. An adapter on
      top of a W_down that trains would be redundant and stays as it is;
    - `text_embedding` at `ttt.text_emb_lr`, when that is set;
    - `adapters` with `lora.enable`;
    - `embeddings` in full fine-tuning, and with `lora.ft_embed`;
    - `base`, the rest, in full fine-tuning. Condition providers never train.

    Raises:
        ConfigError: when nothing would train.
    """
    targets = set(moshi_patch.ttt_parameters(model).values())
    w_down, idle_adapters = _down_projections(model)
    text_lr = args.ttt.text_emb_lr
    roles = [
        ("frozen", _owned_by(model, ConditionProvider), 0.0, False),
        ("target_generators", targets, args.ttt.optim_lr or TARGET_LR_MULTIPLE * args.optim.lr, args.ttt.enabled),
        ("w_down", w_down, args.optim.lr, args.ttt.enabled and args.ttt.train_w_down),
        ("frozen", idle_adapters if args.ttt.train_w_down else set(), 0.0, False),
        ("text_embedding", _text_embedding(model) if text_lr else set(), text_lr or 0.0, args.ttt.enabled),
        ("adapters", set(lora_parameters(model).values()), args.optim.lr, args.lora.enable),
        (
            "embeddings",
            _owned_by(model, ScaledEmbedding),
            args.optim.lr,
            args.full_finetuning or (args.lora.enable and args.lora.ft_embed),
        ),
        ("base", set(model.parameters()), args.optim.lr, args.full_finetuning),
    ]
    members: list[dict[str, nn.Parameter]] = [{} for _ in roles]
    for name, parameter in model.named_parameters():
        first = next(index for index, (_, owned, _, _) in enumerate(roles) if parameter in owned)
        members[first][stock_name(name)] = parameter
    groups = [
        ParameterGroup(name, found, lr)
        for (name, _, lr, trains), found in zip(roles, members, strict=True)
        if trains and found
    ]
    if not groups:
        raise ConfigError("Nothing would be trained; set one of full_finetuning, lora.enable and ttt.enabled to true.")
    return groups


def _owned_by(model: nn.Module, kind: type[nn.Module]) -> set[nn.Parameter]:
    return {p for module in model.modules() if isinstance(module, kind) for p in module.parameters()}


def _text_embedding(model: nn.Module) -> set[nn.Parameter]:
    """What its `ScaledEmbedding` owns by itself. Adapters on parts of it are adapters."""
    found = {p for name, module in model.named_modules() if stock_name(name) == "text_emb" for p in module.parameters()}
    return found - set(lora_parameters(model).values())


def _down_projections(model: nn.Module) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """Of all TTT layers: the base weights of W_down, and the adapters on them."""
    down = {p for gating in moshi_patch.ttt_gatings(model).values() for p in gating.linear_out.parameters()}
    adapters = down & set(lora_parameters(model).values())
    return down - adapters, adapters


def describe(groups: list[ParameterGroup], sizes: dict[str, int], total: int) -> str:
    """A table: group, tensors, parameters, learning rate.

    Args:
        sizes: number of values per parameter name, in the whole model; under FSDP a rank holds less.
        total: number of values of the whole model.
    """
    rows = [("group", "tensors", "parameters", "learning rate")]
    for group in groups:
        number = sum(sizes[name] for name in group.parameters)
        rows.append((group.name, str(len(group.parameters)), f"{number:,}", f"{group.lr:g}"))
    frozen = total - sum(sizes[name] for group in groups for name in group.parameters)
    rows.append(("(frozen)", "", f"{frozen:,}", "0"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


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


def build_optimizer(groups: list[ParameterGroup], args: TrainArgs) -> tuple[AdamW, OneCycleLR]:
    """AdamW with one group of its own per `ParameterGroup`, and OneCycleLR over `args.max_steps`, as moshi-finetune."""
    optimizer = MasterAdamW(
        [{"params": list(group.parameters.values()), "lr": group.lr, "name": group.name} for group in groups],
        betas=BETAS,
        eps=EPS,
        weight_decay=args.optim.weight_decay,
    )
    rates = [group.lr for group in groups]
    return optimizer, OneCycleLR(optimizer, rates, total_steps=args.max_steps, pct_start=args.optim.pct_start)


def learning_rates(optimizer: AdamW) -> Iterator[tuple[str, float]]:
    """Name and present learning rate of each group."""
    return ((group["name"], float(group["lr"])) for group in optimizer.param_groups)
