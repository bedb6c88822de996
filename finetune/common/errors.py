"""The errors that end a program in one line, and how the words of a library get into one."""

import reprlib


class UserError(Exception):
    """Something that the user has to put right. It ends a program in one line, with `exit_code`."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A setting that cannot be used; the message names the dotted key, its value and what is allowed."""

    exit_code = 2


class DiskError(UserError, RuntimeError):
    """A run cannot write what it has to; the message names the folder, and what the system said."""


def in_one_line(error: object, limit: int = 300) -> str:
    """The text of `error`, cut after `limit` characters, for the end of a message: libraries write whole pages."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= limit else f"{text[:limit]}..."


def shown(value: object) -> str:
    """`repr` of a value that a user gave, cut where it is long, deep or wide."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 400
        self.maxdict = self.maxlist = self.maxtuple = 20

    def repr_int(self, value: int, level: int) -> str:
        """Python refuses to spell a number of more than a few thousand digits."""
        return super().repr_int(value, level) if value.bit_length() < 10_000 else f"<{value.bit_length()} bits>"


_SHORT = _Short()
