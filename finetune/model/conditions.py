"""Text conditions for a forward pass."""

from moshi.conditioners import ConditionAttributes, ConditionTensors
from moshi.models import LMModel


def absent_conditions(model: LMModel, rows: int) -> ConditionTensors | None:
    """The text conditions of `rows` streams of which nothing is known; None for a model that takes none."""
    provider = model.condition_provider
    if provider is None:
        return None
    absent = ConditionAttributes(text=dict.fromkeys(provider.text_conditions), tensor={})
    return provider.prepare_and_provide([absent] * rows)
