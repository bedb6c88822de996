"""How much the fast weights of each TTT layer move while training, and a warning when they do not.

One pass over a sequence never builds the fast weight's delta. Its norm is only computed on steps that are logged, for
one row per rank.
"""

import contextlib
import logging
from collections.abc import Iterator

import torch
from moshi.modules.lora import LoRALinear
from torch import nn

import moshi_patch
from moshi_patch import stock_name

from ..common.distributed import Context, sum_over_ranks

logger = logging.getLogger(__name__)

INACTIVE_BELOW = 1e-6
"""A relative delta under this is lost in the rounding of what it is added to."""

INACTIVE_STEPS = 100

QUANTITIES = ("conv_norm", "W_target_norm", "delta_norm", "relative_delta")


class Activity:
    """Norms per TTT layer of `model`, wrapped by FSDP or not. Empty and free of cost for a model without TTT."""

    def __init__(self, model: nn.Module, ctx: Context):
        self._ctx = ctx
        self._gatings = {stock_name(name): gating for name, gating in moshi_patch.ttt_gatings(model).items()}
        self._delta: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Measures a forward pass inside. The backward pass stays outside: it computes checkpointed layers again."""
        handles, hidden = [], {}
        self._delta.clear()

        def keep_hidden(name):
            return lambda module, inputs, output: hidden.__setitem__(name, inputs[0][:1].detach())

        def keep_norm(name, config):
            return lambda module, inputs, output: self._delta.__setitem__(
                name, moshi_patch.one_pass_delta_norm(hidden.pop(name), output[:1].detach(), config)[0]
            )

        for name, gating in self._gatings.items():
            handles.append(gating.linear_out.register_forward_hook(keep_hidden(name)))
            handles.append(gating.target_generator.register_forward_hook(keep_norm(name, gating.config)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """Of the last measured pass: `ttt/LAYER/conv_norm`, `W_target_norm`, `delta_norm` and `relative_delta`.

        `delta_norm` is the mean over ranks of their first rows, `relative_delta` its ratio to the norm of the base
        W_down. All ranks call it, between steps.
        """
        if not self._gatings:
            return {}
        zero = torch.zeros((), device=self._ctx.device)
        rows = []
        for name, gating in self._gatings.items():
            generator = gating.target_generator
            squares = [_square(generator.conv1d), _square(generator.W_target), _square(_base_of(gating.linear_out))]
            rows.append(torch.stack([*squares, self._delta.get(name, zero)]))
        total = sum_over_ranks(torch.stack(rows)) if self._sharded() else torch.stack(rows)
        found = {}
        for name, (conv, target, down, delta) in zip(self._gatings, total.tolist(), strict=True):
            delta /= self._ctx.world_size
            numbers = (conv**0.5, target**0.5, delta, delta / down**0.5 if down else float("nan"))
            layer = name.removeprefix("transformer.").removesuffix(".gating")
            found |= {f"ttt/{layer}/{key}": value for key, value in zip(QUANTITIES, numbers, strict=True)}
        return found

    def _sharded(self) -> bool:
        return self._ctx.world_size > 1


def _base_of(linear: nn.Module) -> nn.Module:
    """Without the adapter on it, if there is one."""
    return next((module.frozen_W for module in linear.modules() if isinstance(module, LoRALinear)), linear)


def _square(module: nn.Module) -> torch.Tensor:
    """Squared norm of this rank's share of a module's weights."""
    return torch.stack([parameter.detach().float().square().sum() for parameter in module.parameters()]).sum()


class InactivityWatch:
    """Warns once when the relative delta of every layer stays under `INACTIVE_BELOW` for `INACTIVE_STEPS` steps."""

    def __init__(self):
        self._since: int | None = None
        self._warned = False

    def observe(self, step: int, values: dict[str, float]) -> bool:
        """Looks at what `Activity.values` returned after `step`; returns whether it warned."""
        relative = [value for name, value in values.items() if name.endswith("/relative_delta")]
        if not relative or max(relative) >= INACTIVE_BELOW:
            self._since, self._warned = None, False
            return False
        self._since = step if self._since is None else self._since
        if self._warned or step - self._since < INACTIVE_STEPS:
            return False
        self._warned = True
        logger.warning(
            "TTT is inactive: for %d steps the fast weights changed W_down by less than %g of its norm (largest: %g). "
            "Raise ttt.optim_lr (the target generators' own rate) first, then ttt.learning_rate; check that "
            "ttt.delta_clip is null or large enough.",
            step - self._since,
            INACTIVE_BELOW,
            max(relative),
        )
        return True
