"""How much the fast weights of each TTT layer move while training, and a warning when they do not.

One pass over a sequence never builds the fast weight's delta. Its norm is only computed on steps that are logged, for
one row per rank.
"""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

import moshi_patch
from moshi_patch import stock_name

from ..common.distributed import Context, sum_over_ranks

logger = logging.getLogger(__name__)

INACTIVE_BELOW = 1e-6
"""A relative delta under this is lost in the rounding of what it is added to."""

INACTIVE_STEPS = 100


class Activity:
    """Norms per TTT layer of `model`, wrapped by FSDP or not. Empty and free of cost for a model without TTT."""

    def __init__(self, model: nn.Module, ctx: Context):
        self._ctx = ctx
        self._memories = {stock_name(name): memory for name, memory in moshi_patch.ttt_memories(model).items()}
        self._delta: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Measures a forward pass inside. The backward pass stays outside: it computes checkpointed layers again."""
        self._delta.clear()
        handles = [
            handle
            for name, memory in self._memories.items()
            for handle in memory.watch_one_pass(partial(self._delta.__setitem__, name))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """Of the last measured pass: `ttt/LAYER/delta_norm`, `relative_delta`, and norms of weights of its kind.

        `delta_norm` is the mean over ranks of their first rows, `relative_delta` its ratio to the norm of the weights
        that rows begin with (W_down). All ranks call it, between steps.
        """
        if not self._memories:
            return {}
        zero = torch.zeros((), device=self._ctx.device)
        rows, names = [], []
        for name, memory in self._memories.items():
            weights = memory.reported_weights()
            names.append([*weights, "delta_norm"])
            rows.append(torch.stack([*map(_square, weights.values()), self._delta.get(name, zero)]))
        total = sum_over_ranks(torch.stack(rows)) if self._sharded() else torch.stack(rows)
        found = {}
        for name, keys, numbers in zip(self._memories, names, total.tolist(), strict=True):
            norms = {key: number**0.5 for key, number in zip(keys[:-1], numbers, strict=False)}
            initial, delta = norms.pop("initial_norm"), numbers[-1] / self._ctx.world_size
            norms |= {"delta_norm": delta, "relative_delta": delta / initial if initial else float("nan")}
            layer = name.removeprefix("transformer.").rpartition(".")[0]
            found |= {f"ttt/{layer}/{key}": value for key, value in norms.items()}
        return found

    def _sharded(self) -> bool:
        return self._ctx.world_size > 1


def _square(weights: list[nn.Parameter]) -> torch.Tensor:
    """Squared norm of this rank's share of some weights."""
    return torch.stack([weight.detach().float().square().sum() for weight in weights]).sum()


class InactivityWatch:
    """Warns once when no layer's memory has any effect for `INACTIVE_STEPS` steps.

    One has none while its relative delta is under `INACTIVE_BELOW`, or the norm of its gate if it has one.
    """

    def __init__(self):
        self._since: int | None = None
        self._warned = False

    def observe(self, step: int, values: dict[str, float]) -> bool:
        """Looks at what `Activity.values` returned after `step`; returns whether it warned."""
        relative = {name: value for name, value in values.items() if name.endswith("/relative_delta")}
        gates = {name: values.get(name.replace("relative_delta", "gating_alpha_norm")) for name in relative}
        effects = [min(value, value if gates[name] is None else gates[name]) for name, value in relative.items()]
        if not effects or max(effects) >= INACTIVE_BELOW:
            self._since, self._warned = None, False
            return False
        self._since = step if self._since is None else self._since
        if self._warned or step - self._since < INACTIVE_STEPS:
            return False
        self._warned = True
        if any(gate is not None for gate in gates.values()):
            logger.warning(
                "TTT is inactive: for %d steps every gate was closed or the fast weights changed by less than %g of "
                "their norm (largest of the smaller: %g). Raise ttt.optim_lr (the memories' own rate), or begin with "
                "ttt.initial_gating_alpha 0.1.",
                step - self._since,
                INACTIVE_BELOW,
                max(effects),
            )
            return True
        logger.warning(
            "TTT is inactive: for %d steps the fast weights changed W_down by less than %g of its norm (largest: %g). "
            "Raise ttt.optim_lr (the target generators' own rate) first, then ttt.learning_rate; check that "
            "ttt.delta_clip is null or large enough.",
            step - self._since,
            INACTIVE_BELOW,
            max(effects),
        )
        return True
