"""Where training data comes from: lists of files and their shares, as a setting spells them."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import ConfigError, shown
from ..common.files import is_file
from .limits import require

LEAST_SHARE, MOST_SHARE = 1e-6, 1e6
"""Of a list among all that items are drawn from."""


@dataclass(frozen=True)
class Source:
    """Lists that are drawn from together.

    Attributes:
        share: of all items that are drawn, relative to the other sources': the number after the colon, or 1.
    """

    name: str
    share: float
    files: tuple[Path, ...]


def parse_sources(spec: str) -> list[Source]:
    """`"a.jsonl:2,folder"` as two sources. A folder stands for every `.jsonl` below it.

    Raises:
        ValueError: for a share that is not positive, a path that does not exist, a folder without lists, or nothing.
    """
    sources = [_parse_source(part.strip()) for part in spec.split(",") if part.strip()]
    if not sources:
        raise ValueError(f"{spec!r} names no list; must be a .jsonl file or a folder of them.")
    return sources


def check_sources(key: str, spec: str, otherwise: str = "") -> None:
    """That the setting `key` names lists that are there.

    Args:
        otherwise: what may be done instead of naming some, such as ` (or do_eval=false)`.

    Raises:
        ConfigError: naming the key, its value and what is wrong.
    """
    remedy = f"is required; a .jsonl file or a folder of them{otherwise}, as --{key} FILE.jsonl."
    require(bool(spec.strip(" ,")), key, spec, remedy)
    try:
        parse_sources(spec)
    except ValueError as error:
        raise ConfigError(f"{key}={shown(spec)}: {error}") from error


def _parse_source(part: str) -> Source:
    name, colon, share_text = part.rpartition(":")
    try:
        share = float(share_text) if colon else 1.0
    except ValueError:  # a colon within the path
        colon, share = "", 1.0
    path = Path(name if colon else part)
    if colon and not name:
        raise ValueError(f"{part}: there is no list before the colon.")
    if not LEAST_SHARE <= share <= MOST_SHARE:
        allowed = f"a number from {LEAST_SHARE:g} to {MOST_SHARE:g}"
        raise ValueError(f"{part}: the share after the colon must be {allowed}.")
    if os.path.isdir(path):
        files = tuple(sorted(path.rglob("*.jsonl")))
        if not files:
            raise ValueError(f"{path}: a folder without any .jsonl file.")
    elif is_file(path):
        files = (path,)
    else:
        raise ValueError(f"{path}: no such file or folder.")
    return Source(str(path), share, files)
