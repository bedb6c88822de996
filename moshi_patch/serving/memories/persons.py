"""The names of people, and the folders of their memories: a name never leaves its folder, or meets another's."""

import re
import unicodedata

LONGEST_NAME = 64
"""Characters."""

LONGEST_FOLDER = 200
"""Bytes; file systems take 255."""


def check_person(name: str) -> str:
    """`name`, if a person may be called so: 1 to 64 printable characters in composed form (NFC), no space around them.

    Slashes, dots and other letters than those of English are allowed, as :func:`folder_of` writes them otherwise.

    Raises:
        ValueError: with the name and what is allowed.
    """
    if not isinstance(name, str):
        raise ValueError(f"a person's name must be a text, not {type(name).__name__}.")
    reason = None
    if not 1 <= len(name) <= LONGEST_NAME:
        reason = f"{len(name)} characters; 1 to {LONGEST_NAME} are allowed"
    elif not name.isprintable():
        reason = "it has characters that cannot be seen"
    elif name != name.strip():
        reason = "it has a space at its beginning or end"
    elif unicodedata.normalize("NFC", name) != name:
        reason = "its accents must be in composed form (NFC)"
    elif len(_escaped(name)) > LONGEST_FOLDER:
        reason = f"{len(_escaped(name))} bytes when written as a folder; {LONGEST_FOLDER} are allowed"
    if reason:
        shown = ascii(name) if len(name) <= 20 else f"{name[:20]!a}..."
        raise ValueError(f"{shown} cannot be a person's name: {reason}.")
    return name


def look_alike(name: str) -> str:
    """The same for names that people may take for one another: other case, other forms of the same letters."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def folder_of(name: str) -> str:
    """The folder of a person: a-z, 0-9 and `-` as they are, each other byte of UTF-8 as `_` and two hex digits.

    Other names have other folders, also where a file system does not tell upper from lower case.

    Raises:
        ValueError: as :func:`check_person`.
    """
    return _escaped(check_person(name))


def person_of(folder: str) -> str | None:
    """Whose folder it is; None for one that :func:`folder_of` would not have made."""
    if not re.fullmatch(r"(?:[a-z0-9-]|_[0-9a-f]{2})+", folder):
        return None
    try:
        name = re.sub(rb"_(..)", lambda match: bytes.fromhex(match[1].decode()), folder.encode()).decode()
        return name if folder_of(name) == folder else None
    except ValueError:
        return None


def _escaped(name: str) -> str:
    return re.sub(rb"[^a-z0-9-]", lambda match: b"_%02x" % match[0][0], name.encode()).decode()
