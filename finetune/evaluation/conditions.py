"""What a model is evaluated as: with TTT's updates, without them, or as it is; and what two of these differ by."""

import contextlib

from moshi.models import LMModel

import moshi_patch

ON, OFF, PLAIN = "updates on", "updates off", "no TTT"
"""Of the checkpoint's own model; one without TTT has the last instead of the first two."""

CLOSED = "gates closed"
"""Of the checkpoint's own model, where updates off is not the base: nothing of its memories is read, not even what
they began with. What else was trained stays."""

CONTROL, BASELINE = "trained without TTT", "baseline"
"""Of the model beside it, as that one is served: the control of the run, or any other."""

RELIANCE = "reliance"
"""The loss of the same weights with updates less that without.

It is not what TTT gains: weights that were trained with updates come to lean on them. What it gains is `BENEFIT`.
"""

MUTED = "updates on but in layer "
"""Of the checkpoint's own model, before the index of a TTT layer."""

BENEFIT = "with TTT - trained without"
WHOLE = f"{ON} - {CLOSED}"
MEANINGS = {
    WHOLE: "the same weights with their memories and without; what was trained beside these has come to lean on them",
    RELIANCE: "updates on - updates off of the same weights, which have come to lean on updates; not what TTT gains",
    BENEFIT: "what TTT gains: the control was trained on the same data, in the same order, for as many steps",
}
"""What a difference says, beside its name."""


def conditions_of(model: LMModel) -> tuple[str, ...]:
    """The conditions of a checkpoint's own model, the first being the model as it is served."""
    memories = moshi_patch.ttt_memories(model).values()
    if not memories:
        return (PLAIN,)
    return (ON, OFF, CLOSED) if any(memory.answers_untaught for memory in memories) else (ON, OFF)


def muting_conditions(model: LMModel) -> tuple[str, ...]:
    """For each TTT layer the condition in which that layer alone learns nothing."""
    return tuple(f"{MUTED}{name.split('.')[-2]}" for name in moshi_patch.ttt_memories(model))


def under(condition: str, model: LMModel) -> contextlib.AbstractContextManager:
    """Inside, `model` is as `condition` says: without updates for `OFF`, without memories, or as it is."""
    if condition == OFF:
        return moshi_patch.ttt_updates(model)
    if condition == CLOSED:
        return moshi_patch.ttt_bypassed(model)
    if condition.startswith(MUTED):
        return moshi_patch.ttt_updates(model, layers=[int(condition.removeprefix(MUTED))])
    return contextlib.nullcontext()


def is_difference(name: str) -> bool:
    """Whether a name is that of a difference, and not of a condition."""
    return name == RELIANCE or " - " in name


def difference_name(first: str, other: str) -> str:
    """How the difference `first - other` of two conditions is called. Of losses and errors, negative is better."""
    return {OFF: RELIANCE, CONTROL: BENEFIT}.get(other, f"{first} - {other}")
