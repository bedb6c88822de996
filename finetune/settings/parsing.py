"""From YAML and command-line overrides to nested dataclasses, where nothing unknown or of a wrong type gets through."""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..common.errors import ConfigError, in_one_line

T = TypeVar("T")


def build(cls: type[T], content: Mapping[str, Any] | None, section: str = "") -> T:
    """An instance of the dataclass `cls` from nested mappings. A section left empty (None) keeps its defaults.

    Args:
        section: dotted name of the mapping, for error messages.

    Raises:
        ConfigError: for an unknown key at any depth, or a value of a wrong type.
    """
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{section or 'file'}={content!r}: must be a section with the keys {_names(cls)}.")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in content.items():
        name = f"{section}.{key}" if section else str(key)
        if key not in hints:
            raise _unknown(cls, section, str(key), f"{name}={value!r}")
        hint = hints[key]
        values[key] = build(hint, value, name) if dataclasses.is_dataclass(hint) else convert(name, value, hint)
    return cls(**values)


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`: bool, int, float, str, list[int], None, or a union of them.

    Numbers may be text: YAML reads `1e-4` as text, and people write it. A whole number may be written `2e3`.

    Raises:
        ConfigError: naming `name`, the value and the types allowed.
    """
    options = _options(hint)
    for option in options:
        try:
            return _CONVERTERS[option](value)
        except (TypeError, ValueError, OverflowError):
            continue
    raise ConfigError(f"{name}={value!r}: must be {' or '.join(_DESCRIPTIONS[option] for option in options)}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a key that stands twice in one section.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"config={str(path)!r}: no such file.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={str(path)!r}: not valid YAML: {in_one_line(error)}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config={str(path)!r}: must hold `key: value` lines, not {content!r}.")
    return content


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    result: dict[str, Any] = {}
    for key, value in content.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def read_options(words: Iterable[str], example: str) -> Iterator[tuple[str, str | None]]:
    """Name and value of each `--name value`, `--name=value` or, with None as its value, `--name`.

    Args:
        example: what a correct one looks like, for the message.

    Raises:
        ConfigError: for a word that is none of these.
    """
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r}: not understood; {example}.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else None
        yield name, value


def override(cls: type, content: dict[str, Any], name: str, text: str | None) -> None:
    """Sets the dotted key `name` of `content` in place to `text`, read as the type of the field of dataclass `cls`.

    `text` None is the bare flag `--key`, allowed for booleans. `null` is None where the field allows None.

    Raises:
        ConfigError: for an unknown key, a section instead of a key, or a flag without its value.
    """
    *sections, key = name.split(".")
    owner = cls
    for depth, section in enumerate(sections):
        hint = typing.get_type_hints(owner).get(section)
        if not dataclasses.is_dataclass(hint):
            raise _unknown(owner, ".".join(sections[:depth]), section, f"{name}={text!r}")
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise ConfigError(f"{section}={content!r}: must be a section with the keys {_names(hint)}.")
        owner = hint
    hints = typing.get_type_hints(owner)
    if key not in hints:
        raise _unknown(owner, ".".join(sections), key, f"{name}={text!r}")
    if dataclasses.is_dataclass(hints[key]):
        raise ConfigError(f"{name}={text!r}: is a section; set one of its keys: {_names(hints[key])}.")
    content[key] = _read_text(name, text, hints[key])


def _read_text(name: str, text: str | None, hint: Any) -> Any:
    options = _options(hint)
    if text is None:
        if bool not in options:
            raise ConfigError(f"{name}: needs a value, as in `--{name} VALUE`.")
        return True
    if type(None) in options and text in ("null", "None", "~"):
        return None
    if list[int] in options and text.startswith("["):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}={text!r}: not a list; write it without spaces, or quoted: [1,3].") from error
    return convert(name, text, hint)


def _unknown(cls: type, section: str, key: str, found: str) -> ConfigError:
    """For `key` in `section`, which holds a `cls`; `found` is the setting as the user gave it."""
    hints = typing.get_type_hints(cls)
    inside = [f"{name}.{key}" for name, hint in hints.items() if dataclasses.is_dataclass(hint) and hasattr(hint, key)]
    close = inside or difflib.get_close_matches(key, hints, n=1)
    question = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"{found}: unknown key; {question}Allowed{' in ' * bool(section)}{section}: {_names(cls)}.")


def _names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _to_bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise TypeError
    return value


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return float(value)


def _to_int(value: Any) -> int:
    number = _to_float(value)
    if not number.is_integer():
        raise ValueError
    try:
        return int(value)  # a float does not hold every number above 2**53
    except ValueError:  # 2e3
        return int(number)


def _to_str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return str(value)


def _to_ints(value: Any) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return [_to_int(item) for item in value]


def _to_none(value: Any) -> None:
    if value is not None:
        raise TypeError


_CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    list[int]: _to_ints,
    type(None): _to_none,
}
_DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[int]: "a list of whole numbers",
    type(None): "null",
}


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one section, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConfigError(f"{key.value}: stands twice in one section (line {key.start_mark.line + 1}).")
            seen.add(key.value)
        return super().construct_mapping(node, deep)
