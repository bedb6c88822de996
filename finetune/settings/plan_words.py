"""The words of older files of settings in those of today, and what has no counterpart answered in a line.

Read are settings in sections or flat (`ttt.chunk_size`, `ttt_chunk_size`), `ttt.enable` for `ttt.enabled`, and the keys
of TTT-MLP, which is another kind of memory than In-Place TTT: none of them ever becomes a setting of the other kind.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from ..common.errors import ConfigError, shown
from .parsing import merge
from .schema import TrainArgs, TTTArgs

RENAMED = {"ttt.enable": "ttt.enabled", "lora.enabled": "lora.enable"}
PERSISTENT = "ttt.persistent_states"
KIND_OF = {field.name: field.metadata.get("kind") for field in dataclasses.fields(TTTArgs)}
"""By the name of a setting of TTT, the kind of memory that alone has it; None: every kind."""

DESIGNS = {"in_place": "In-Place TTT", "mlp": "TTT-MLP"}
"""What the kinds of memory are called."""

SECTIONS = tuple(name for name, hint in typing.get_type_hints(TrainArgs).items() if dataclasses.is_dataclass(hint))


def in_our_words(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Nested settings with today's names, and what there is to say of the names that are gone.

    Raises:
        ConfigError: when a setting stands there twice, with two values.
    """
    result = {
        key: dict(value) if isinstance(value, Mapping) and key in SECTIONS else value for key, value in content.items()
    }
    for key in [key for key in content if isinstance(key, str) and _place(key) is not None]:
        result = _moved(result, (key,), _place(key))
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        if isinstance(result.get(section), dict) and name in result[section]:
            result = _moved(result, (section, name), new)
    notes, ttt = [], result.get("ttt")
    if isinstance(ttt, dict) and PERSISTENT.partition(".")[2] in ttt:
        value = ttt.pop(PERSISTENT.partition(".")[2])
        if not isinstance(value, bool) and str(value).lower() not in ("true", "false"):
            raise ConfigError(f"{PERSISTENT}={shown(value)}: must be true or false; the key may be left out.")
        notes.append(
            f"{PERSISTENT}={str(value).lower()}: nothing depends on it; a stream always carries its state, and no "
            "forward pass changes a parameter."
        )
    return result, notes


def with_kind_settled(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Nested settings of which the kind of memory is known, and a line if it was told by the keys.

    Raises:
        ConfigError: for keys of both kinds.
    """
    ttt = content.get("ttt")
    given = [name for name in ttt if ttt[name] is not None] if isinstance(ttt, Mapping) else []
    kind = ttt["kind"] if "kind" in given and isinstance(ttt["kind"], str) else None
    for name in (name for name in given if kind in DESIGNS and KIND_OF.get(name) not in (None, kind)):
        other = KIND_OF[name]
        raise ConfigError(
            f"ttt.{name}={shown(ttt[name])}: not with ttt.kind={kind!r}: it belongs to {DESIGNS[other]} (ttt.kind: "
            f"{other}) and has no counterpart in {DESIGNS[kind]}; leave it out, or change ttt.kind."
        )
    mlp = [name for name in given if KIND_OF.get(name) == "mlp"]
    if not mlp or "kind" in given:
        return dict(content), []
    other = [name for name in given if KIND_OF.get(name) == "in_place"]
    if other:
        raise ConfigError(
            f"ttt.{mlp[0]}={shown(ttt[mlp[0]])}: belongs to TTT-MLP (ttt.kind: mlp), and ttt.{other[0]}="
            f"{shown(ttt[other[0]])} to In-Place TTT (ttt.kind: in_place); keep the keys of one kind, and set ttt.kind."
        )
    said = ", ".join(f"ttt.{name}" for name in mlp)
    return merge(content, {"ttt.kind": "mlp"}), [f"ttt.kind=mlp: taken from {said}, which TTT-MLP alone has."]


def _place(key: str) -> str | None:
    """The dotted name of a setting that stands flat in a file; None for any other key."""
    section, dot, name = key.partition(".")
    if dot:
        return key if section in SECTIONS and name else None
    name = key.removeprefix("ttt_")
    known = {*KIND_OF, "enable", PERSISTENT.partition(".")[2]}
    return f"ttt.{name}" if name != key and name in known else None


def _moved(content: dict[str, Any], place: tuple[str, ...], key: str) -> dict[str, Any]:
    """`content` with the value at `place` at the dotted `key`."""
    owner = content if len(place) == 1 else content[place[0]]
    value = owner.pop(place[-1])
    section, _, name = key.partition(".")
    there = content.get(section)
    if isinstance(there, Mapping) and there.get(name, value) != value:
        raise ConfigError(
            f"{'.'.join(place)}={shown(value)}: contradicts {key}={shown(there[name])}; keep one of them."
        )
    return merge(content, {key: value})
