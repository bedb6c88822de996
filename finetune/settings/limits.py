"""What a setting may be: declared beside its field, checked here, shown by `--help`."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from ..common.errors import ConfigError, shown


def whole(default: int | None, least: int, most: int) -> Any:
    """A field of a dataclass for a whole number from `least` to `most`; also None where the field's type allows it."""
    allowed = f"a whole number from {_short(least)} to {_short(most)}"
    return limited(default, allowed, lambda value: value is None or least <= value <= most)


def number(
    default: float | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """As `whole`, for any number: `least` and `most` are allowed, `above` and `below` are not."""

    def holds(value: float | None) -> bool:
        if value is None:
            return True
        high_enough = least <= value if above is None else above < value
        return high_enough and (value <= most if below is None else value < below)  # NaN is neither

    low = f"at least {_short(least)}" if above is None else f"above {_short(above)}"
    high = f"at most {_short(most)}" if below is None else f"below {_short(below)}"
    return limited(default, f"a number {low} and {high}", holds)


def _short(bound: float) -> str:
    short = f"{bound:g}"
    return short if float(short) == bound else str(bound)


def choice(default: str, allowed: tuple[str, ...], **metadata: Any) -> Any:
    """A field of a dataclass for one of some words."""
    return limited(default, f"one of {', '.join(allowed)}", lambda value: value in allowed, **metadata)


def limited(default: Any, allowed: str, holds: Any, **metadata: Any) -> Any:
    """A field with what it may be, in words and as a function; `TTTConfig` declares its fields in the same way."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "holds": holds, **metadata})


def require(holds: bool, key: str, value: object, remedy: str) -> None:
    """Raises a ConfigError that names the dotted `key`, its value and the remedy, unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}={shown(value)}: {remedy}")


def check_limits(args: Any, section: str = "") -> None:
    """That every setting of a dataclass, in its sections too, is what its field allows.

    Args:
        section: what the dotted keys begin with, such as `paper.`.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    for key, field, value in settings_of(args, section):
        if "holds" in field.metadata:
            require(field.metadata["holds"](value), key, value, f"must be {allowed(field)}.")


def allowed(field: dataclasses.Field) -> str:
    """What a field with limits may be, in words."""
    empty = ", or null" if type(None) in typing.get_args(field.type) else ""
    return field.metadata["allowed"] + empty


def settings_of(args: Any, section: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Dotted key, field and value of every setting of a dataclass, in the order of its fields."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{section}{field.name}.")
        else:
            yield f"{section}{field.name}", field, value
