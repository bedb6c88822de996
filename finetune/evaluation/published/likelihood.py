"""The negative log-likelihood of recordings, step by step.

Shapes: `B` recordings, `K` = 1 + n_q rows, `T` steps.
"""

from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel

import moshi_patch

from ...common.errors import ConfigError
from ...model.conditions import absent_conditions
from ...model.stream import score_stream
from ...settings.evaluation import EvalArgs
from ..conditions import conditions_of


@dataclass(frozen=True)
class Reach:
    """From where on a model can know more than what it was trained to, and how far it looks back.

    Attributes:
        quiet_steps: the fewest of its TTT layers, in which nothing that was learnt is read yet; None without TTT.
        delay: steps by which the last code that counts is predicted later than its own step.
        context: of its attention, in steps.
    """

    quiet_steps: int | None
    delay: int
    context: int

    def learns(self, steps: int) -> bool:
        """Whether a recording of so many steps reaches beyond TTT's first chunk, in which nothing was learnt yet."""
        return self.quiet_steps is not None and steps + self.delay > self.quiet_steps


class Likelihood:
    """Nats of each step of a batch of recordings, as `args` counts codebooks.

    Args:
        model: in eval mode, not streaming. Conditions that it takes are given as absent.
        conditions: what it is scored as; by default its own, `conditions_of(model)`.
    """

    def __init__(self, model: LMModel, args: EvalArgs, conditions: tuple[str, ...] | None = None):
        self.model, self._segment_steps = model, args.segment_steps
        self.conditions = conditions or conditions_of(model)
        self.weights = torch.ones(model.dep_q, dtype=torch.float64)
        if args.paper.codebooks == "first":
            self.weights[1:] = 0
        else:
            self.weights[0] = args.first_codebook_weight_multiplier
        counted = [row for row in range(model.dep_q) if self.weights[row] > 0]
        delay = max(model.delays[1 + row] for row in counted)
        quiet = [memory.quiet_steps for memory in moshi_patch.ttt_memories(model).values()]
        self.reach = Reach(min(quiet, default=None), delay, model.context)

    def __call__(self, codes: list[torch.Tensor]) -> torch.Tensor:
        """Nats `[B, T]` float64 on the CPU, 0 after the end of a recording.

        Args:
            codes: of each recording `[1, K, its steps]` int64, as `MonoTokenizer` makes them.

        Raises:
            ConfigError: when a likelihood is not finite.
        """
        longest = max(item.shape[-1] for item in codes)
        batch = torch.full((len(codes), self.model.num_codebooks, longest), self.model.zero_token_id)
        for row, item in enumerate(codes):
            batch[row, :, : item.shape[-1]] = item[0]
        losses = score_stream(
            self.model,
            batch,
            condition_tensors=absent_conditions(self.model, len(codes)),
            segment_steps=self._segment_steps,
        )
        audio, counts = losses.nats[:, 1:].double(), losses.weights[:, 1:] > 0
        nats = (torch.where(counts, audio, 0.0) * self.weights[:, None]).sum(1)
        if not nats.isfinite().all():
            raise ConfigError("A likelihood is not finite; `python -m finetune.doctor` tells whether the weights are.")
        return nats
