"""The right name of a misspelt key, in whatever section it is."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator

SIMILAR = 0.7
"""Of two names, as `difflib` measures it; 0.1 less in the same section."""


def nearest_key(name: str, roots: tuple[type, ...], *, section: bool = False) -> str | None:
    """The dotted key of one of the dataclasses `roots` that was probably meant by `name`; None when none is near.

    Case, dots, dashes and underscores do not matter; `checkpoint` and `ckpt` are the same word. A key of the right
    name in another section comes before one with a similar name.

    Args:
        section: `name` was given keys of its own, so that a section was meant.
    """
    known = {key: is_section for root in roots for key, is_section in _dotted(root)}
    keys = [key for key in known if known[key] or not section]
    wanted, last, home = _plain(name), _plain(_last(name)), name.rpartition(".")[0]

    def score(key: str) -> float:
        if _plain(key) == wanted:
            return 4
        near = 0.1 * (key.rpartition(".")[0] == home)  # in the same section
        if _plain(_last(key)) == last:
            return 2 + near
        return difflib.SequenceMatcher(None, _plain(_last(key)), last).ratio() + near

    best = max(keys, key=score, default=None)
    return best if best is not None and score(best) >= SIMILAR else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _dotted(cls: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Each key, and whether it is a section."""
    for name, hint in typing.get_type_hints(cls).items():
        yield f"{prefix}{name}", dataclasses.is_dataclass(hint)
        if dataclasses.is_dataclass(hint):
            yield from _dotted(hint, f"{prefix}{name}.")


def _plain(name: str) -> str:
    return name.lower().replace("checkpoint", "ckpt").translate(str.maketrans("", "", "._- "))
