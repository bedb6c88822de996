"""What a model is evaluated as: with TTT's updates, without them, or, where it has no TTT, as it is."""

import contextlib

from moshi.models import LMModel

import moshi_patch

ON, OFF, PLAIN = "updates on", "updates off", "no TTT"
"""Of the checkpoint's own model; one without TTT has the last instead of the first two."""

BASELINE = "baseline"
"""Of the model that it is compared with, as that one is served."""


def conditions_of(model: LMModel) -> tuple[str, ...]:
    """The conditions of a checkpoint's own model, the first being the model as it is served."""
    return (ON, OFF) if moshi_patch.ttt_gatings(model) else (PLAIN,)


def under(condition: str, model: LMModel) -> contextlib.AbstractContextManager:
    """Inside, `model` is as `condition` says: without updates for `OFF`, as it is for any other."""
    return moshi_patch.ttt_updates(model) if condition == OFF else contextlib.nullcontext()
