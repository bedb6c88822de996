"""The right name of a misspelt key, in whatever section it is."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator


def nearest_key(name: str, roots: tuple[type, ...]) -> str | None:
    """The dotted key of one of the dataclasses `roots` that was probably meant by `name`, a section's name included.

    Case, dots, dashes and underscores do not matter; `checkpoint` and `ckpt` are the same word. A key of the right
    name in another section comes before one with a similar name.
    """
    known = list(dict.fromkeys(key for root in roots for key in _dotted(root)))
    plain = {key: _plain(key) for key in known}
    section = name.rpartition(".")[0]
    inside = [key for key in known if key.rpartition(".")[0] == section]
    outside = [key for key in known if key not in inside]
    wanted, last = _plain(name), _plain(name.rpartition(".")[2])
    for key in known:
        if plain[key] == wanted:
            return key
    for key in (*inside, *outside):
        if _plain(key.rpartition(".")[2]) == last:
            return key
    for keys, cutoff in ((inside, 0.6), (outside, 0.7)):
        by_last = {_plain(key.rpartition(".")[2]): key for key in reversed(keys)}
        close = difflib.get_close_matches(last, by_last, n=1, cutoff=cutoff)
        if close:
            return by_last[close[0]]
    close = difflib.get_close_matches(wanted, plain.values(), n=1)
    return next((key for key in known if close and plain[key] == close[0]), None)


def _dotted(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _dotted(hint, f"{prefix}{name}.")


def _plain(name: str) -> str:
    return name.lower().replace("checkpoint", "ckpt").translate(str.maketrans("", "", "._- "))
