"""From YAML and texts of a command line to nested dataclasses; nothing unknown or of a wrong type gets through."""

import dataclasses
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from moshi_patch import TTTConfig

from ..common.errors import ConfigError, in_one_line, shown
from .nearest import nearest_key
from .schema import ttt_names, ttt_setting

T = TypeVar("T")


def build(cls: type[T], content: Mapping[str, Any] | None, section: str = "", roots: tuple[type, ...] = ()) -> T:
    """An instance of the dataclass `cls` from nested mappings. A section left empty (None) keeps its defaults.

    Args:
        section: dotted name of the mapping, for error messages.
        roots: dataclasses of the whole file, where the right name of an unknown key may be; by default `cls`.

    Raises:
        ConfigError: for an unknown key at any depth, or a value of a wrong type.
    """
    roots = roots or (cls,)
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{section or 'file'}={shown(content)}: must be a section with the keys {_names(cls)}.")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in content.items():
        name = f"{section}.{key}" if section else str(key)
        if key not in hints:
            raise unknown_key(name, value, roots)
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = build(hint, value, name, roots)
        else:
            values[key] = convert(name, value, hint)
    try:
        made = cls(**values)
    except ValueError as error:  # of TTTConfig, which checks itself and calls its settings as LMModel does
        raise ConfigError(ttt_setting(str(error))) from error
    if isinstance(made, TTTConfig):
        _refuse_other_kind(made, values, section)
    return made


def _refuse_other_kind(ttt: TTTConfig, given: Mapping[str, Any], section: str) -> None:
    """Raises a ConfigError when a setting was given that the kind does not have, be it the default's value."""
    names = ttt_names(ttt)
    for name, value in given.items():
        if name not in names:
            kind = f"{section}.kind={shown(ttt.kind)}"
            raise ConfigError(f"{section}.{name}={shown(value)}: not with {kind}, which takes {', '.join(names)}.")


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`: bool, int, float, str, list[int], None, or a union of them.

    Numbers may be text: YAML reads `1e-4` as text, and people write it. A whole number may be written `2e3`.

    Raises:
        ConfigError: naming `name`, the value and the types allowed.
    """
    if isinstance(value, str) and ("\0" in value or not value.isascii()) and not _is_storable(value):
        raise ConfigError(f"{name}={shown(value)}: holds a character that no file can hold; write it anew.")
    options = _options(hint)
    for option in options:
        try:
            return _CONVERTERS[option](value)
        except (TypeError, ValueError, OverflowError):
            continue
    raise ConfigError(f"{name}={shown(value)}: must be {' or '.join(_DESCRIPTIONS[option] for option in options)}.")


def read_text(name: str, text: str | None, hint: Any) -> Any:
    """The value of `--name text` as the type `hint`; None as `text` is the bare flag `--name`, for booleans.

    `null` is None where the type allows None.

    Raises:
        ConfigError: as `convert`, or for a flag without its value.
    """
    options = _options(hint)
    if text is None:
        if bool not in options:
            raise ConfigError(f"{name}: needs a value, as in `--{name} VALUE`.")
        return True
    if type(None) in options and text in ("null", "None", "~"):
        return None
    if list[int] in options and text.startswith("["):
        try:
            return convert(name, yaml.safe_load(text), hint)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{name}={shown(text)}: not a list; write it without spaces, or quoted: [1,3]."
            ) from error
    return convert(name, text, hint)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a key that stands twice in one section.
    """
    if not os.path.isfile(path):
        what = "is a folder; give a YAML file" if os.path.isdir(path) else "no such file"
        raise ConfigError(f"config={shown(str(path))}: {what}.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"config={str(path)!r}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise ConfigError(f"config={str(path)!r}: not valid YAML: nested too deep.") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ConfigError(f"config={str(path)!r}: not valid YAML: {in_one_line(error)}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config={str(path)!r}: must hold `key: value` lines, not {shown(content)}.")
    return content


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    result: dict[str, Any] = {}
    for key, value in content.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def merge(content: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested settings in which those of `given`, by dotted key, are replaced.

    Raises:
        ConfigError: when a section of `content` is none.
    """
    result = dict(content)
    for key, value in given.items():
        *sections, name = key.split(".")
        section = result
        for part in sections:
            inner = section.get(part) or {}
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{part}={shown(inner)}: must be a section of keys, such as {key}.")
            section[part] = dict(inner)
            section = section[part]
        section[name] = value
    return result


def unknown_key(name: str, value: Any, roots: tuple[type, ...]) -> ConfigError:
    """For the dotted key `name`, which is in none of the dataclasses `roots`; says what was probably meant."""
    hint, section = _hint_of(name, roots[0]), name.rpartition(".")[0]
    if dataclasses.is_dataclass(hint):
        return ConfigError(f"{name}={shown(value)}: is a section; set one of its keys: {_names(hint)}.")
    owner = _hint_of(section, roots[0]) if section else None
    place, owner = (f" in {section}", owner) if dataclasses.is_dataclass(owner) else ("", roots[0])
    near = nearest_key(name, roots, section=isinstance(value, Mapping))
    question = f"did you mean {near!r}? " if near else ""
    found = name if value is None else f"{name}={shown(value)}"
    return ConfigError(f"{found}: unknown key; {question}Allowed{place}: {_names(owner)}.")


def _hint_of(name: str, cls: Any) -> Any:
    """The type of the dotted key `name` of a dataclass; None when there is no such key."""
    for part in name.split("."):
        cls = typing.get_type_hints(cls).get(part) if dataclasses.is_dataclass(cls) else None
    return cls


def _names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _is_storable(text: str) -> bool:
    """False for a NUL and for half of a character, which YAML can spell and no file name can hold."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


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
    list[str]: lambda value: [_to_str(item) for item in value],
    type(None): _to_none,
}
_DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[int]: "a list of whole numbers",
    list[str]: "a list of texts",
    type(None): "null",
}


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one section, where YAML would silently keep the last.

    Dates stay text, as no setting is one; so do whole numbers too long for Python, which are then refused by name.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConfigError(f"{key.value}: stands twice in one section (line {key.start_mark.line + 1}).")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_int_or_text(self, node: yaml.ScalarNode) -> int | str:
        try:
            return self.construct_yaml_int(node)
        except ValueError:
            return self.construct_scalar(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int_or_text)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_str)
