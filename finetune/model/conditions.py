"""Conditions for a forward pass: from the texts of an item to what `LMModel` takes."""

import torch
from moshi.conditioners import ConditionAttributes, ConditionTensors
from moshi.models import LMModel

ALWAYS_FLOAT32 = ("condition_provider.", "fuser.")
"""Beginnings of names of weights that moshi keeps in float32 whatever the rest is."""


def condition_tensors(model: LMModel, attributes: list[ConditionAttributes] | None) -> ConditionTensors | None:
    """The conditions of a batch, for `LMModel.forward` or `LMGen`; None for a model that takes none.

    Args:
        attributes: of each row of the batch; None when the model takes no conditions.
    """
    return None if attributes is None else model.condition_provider.prepare_and_provide(attributes)


def absent_conditions(model: LMModel, rows: int) -> ConditionTensors | None:
    """The text conditions of `rows` streams of which nothing is known; None for a model that takes none."""
    provider = model.condition_provider
    if provider is None:
        return None
    absent = ConditionAttributes(text=dict.fromkeys(provider.text_conditions), tensor={})
    return condition_tensors(model, [absent] * rows)


def fused_conditions(
    model: LMModel, tensors: ConditionTensors | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The two arguments of `LMModel.forward_text`: what is added to its input, and what cross attention looks at."""
    return (None, None) if tensors is None else (model.fuser.get_sum(tensors), model.fuser.get_cross(tensors))
