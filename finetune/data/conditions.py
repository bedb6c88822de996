"""The text conditions of a file, for a model that takes some."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moshi.conditioners import ConditionAttributes
from moshi.models import loaders

from ..common.errors import in_one_line
from .manifest import in_short

Prepare = Callable[[list[ConditionAttributes]], Any]
"""What a model does first with a list of conditions; it raises for a value that it does not know."""


def known_conditions(
    found: Mapping[str, Any] | None, names: Sequence[str], prepare: Prepare | None
) -> ConditionAttributes | None:
    """Those of a file that the model takes, absent ones None; tried out, as a model would only raise within a step.

    Args:
        found: as the file has them.
        names: those that the model takes; without any the result is None.

    Raises:
        ValueError: for a value that the model does not know.
    """
    if not names:
        return None
    conditions = ConditionAttributes(text={name: (found or {}).get(name) for name in names}, tensor={})
    try:
        if prepare is not None:
            prepare([conditions])
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"text_conditions={in_short(conditions.text)}: {in_one_line(error)}") from error
    return conditions


def conditions_of(config: Mapping[str, Any]) -> tuple[tuple[str, ...], Prepare | None]:
    """The names that a model with this `config.json` takes, and its `prepare`, made without its weights."""
    described = config.get("conditioners") or {}
    if not described:
        return (), None
    provider = loaders.get_conditioner_provider(1, "cpu", {"conditioners": copy.deepcopy(described)})
    return tuple(provider.text_conditions), provider.prepare
