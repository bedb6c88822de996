"""Who won an evaluation and by how much, in one sentence, and whether the comparison can bear one."""

from collections.abc import Mapping
from typing import Any

from .conditions import BASELINE, BENEFIT, ON, RELIANCE, difference_name
from .statistics import TOO_FEW

NO_CONTROL = "What TTT gains is not known: no control is beside it, the same run trained without TTT (control: true)."


def verdict(standard: Mapping[str, Any]) -> list[str]:
    """Of what `summarise` returned: the checkpoint against its control, or else against the baseline; in sentences.

    Only the losses are looked at, so that an `eval.json` of any age has a verdict.
    """
    differences = standard.get("differences", {})
    if BENEFIT in differences:
        found = differences[BENEFIT]["loss"]
        said = f"with TTT the loss is {compared(found, 'trained without')}"
        return [_judged(found, "TTT helped", "TTT harmed", said)]
    served = next(iter(standard["overall"]))
    against, sentences = differences.get(difference_name(served, BASELINE)), []
    if against is not None:
        said = "the checkpoint's loss is " + compared(against["loss"], "the baseline's")
        sentences.append(_judged(against["loss"], "The checkpoint won", "The checkpoint lost", said))
    if served == ON:
        sentences.append(NO_CONTROL)
        if RELIANCE in differences:
            said = compared(differences[RELIANCE]["loss"], "without")
            sentences.append(f"These weights lean on updates: with them their loss is {said}. That is no gain.")
    elif not sentences:
        sentences.append(f"The loss is {standard['overall'][served]['loss']:.4f} nats per step; there is no TTT in it.")
    return sentences


def compared(found: Mapping[str, float | None], other: str) -> str:
    """`0.0312 nats per step lower than trained without (95 % interval -0.0500 to -0.0120)`, of a difference."""
    value, low, high = (found[key] for key in ("value", "low", "high"))
    words = f"{abs(value):.4f} nats per step {'lower' if value < 0 else 'higher'} than" if value else "the same as"
    spread = TOO_FEW if low is None else f"95 % interval {low:+.4f} to {high:+.4f}"
    return f"{words} {other} ({spread})"


def is_clear(found: Mapping[str, float | None]) -> bool:
    """Whether a difference has an interval, and all of it is on one side of zero."""
    low, high = found["low"], found["high"]
    return low is not None and (high < 0 or low > 0)


def _judged(found: Mapping[str, float | None], better: str, worse: str, said: str) -> str:
    judgement = "Not told from chance" if not is_clear(found) else better if found["value"] < 0 else worse
    return f"{judgement}: {said}."
