"""What two sets of settings say differently: which keys, and in words."""

from collections.abc import Iterable, Mapping
from typing import Any


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], keys: Iterable[str] | None = None) -> list[str]:
    """The keys, sorted, whose values are not equal; a key that is absent has the value None.

    Args:
        keys: those that are compared; None: all of both.
    """
    compared = one.keys() | other.keys() if keys is None else set(keys)
    return sorted(key for key in compared if one.get(key) != other.get(key))


def differences(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    wording: str = "{key}={one!r}, not {other!r}",
    keys: Iterable[str] | None = None,
) -> list[str]:
    """A text for each of :func:`differing_keys`, made from `wording` with `key` and the values `one` and `other`."""
    return [wording.format(key=key, one=one.get(key), other=other.get(key)) for key in differing_keys(one, other, keys)]
