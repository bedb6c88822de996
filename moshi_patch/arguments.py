"""What stands in the arguments of our and of moshi's own programs, looked at before torch and moshi are imported."""

import argparse
import itertools
import os
import re
from collections.abc import Sequence
from typing import NoReturn

from .json_object import MAX_BYTES, parse_object

FILES = ("--moshi-weight", "--mimi-weight", "--lora-weight", "--tokenizer", "--config", "--config-path")
"""Options of `moshi.server` and `moshi.run_inference` that name a file, or `hf://owner/name/file`."""

HUB_FILE = re.compile(r"hf://[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)+")
"""A file of any repository on the Hub, as moshi takes it: `hf://owner/name/file`."""

BASE_KEY = "base_fingerprint"
"""In the metadata of a file of weights that trained alone: of the base model that they belong to."""

WITHOUT_BASE = (
    "holds what trained alone (training_mode: ttt), without its base model; make a whole model of it with "
    "`python -m finetune.export CHECKPOINT OUT`, and give that"
)

ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, and not all that is allowed: `--help` does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help says more)\n")


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of `option` among `arguments`; None when it has none."""
    found = None
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else following
    return found


def wrong_path(arguments: Sequence[str]) -> str | None:
    """Which of the files and folders that are named is not there, in words; None when all are."""
    repository = value_of("--hf-repo", arguments)
    problem = None if repository is None else wrong_repository(repository)
    if problem:
        return f"--hf-repo {repository}: {problem}"
    for option in FILES:
        path = value_of(option, arguments)
        problem = None if path is None else wrong_file(path)
        if problem:
            return f"{option} {path}: {problem}"
    return None


def wrong_file(path: str) -> str | None:
    """Why `path` is neither a file with a whole content nor names one on the Hub, in words; None when it is."""
    if path.startswith("hf://"):
        return None if HUB_FILE.fullmatch(path) else "must be of the form hf://OWNER/NAME/FILE"
    if os.path.isdir(path):
        return "is a folder; give a file in it"
    file = path.removeprefix("file://")
    if not os.path.isfile(file):
        return "no such file"
    return WITHOUT_BASE if needs_a_base(file) else None


def needs_a_base(path: str) -> bool:
    """Whether a safetensors file says in its header that it holds what trained alone, without the base model."""
    if not path.endswith(".safetensors"):
        return False
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_object(file.read(min(length, MAX_BYTES + 1)))
        return BASE_KEY in header["__metadata__"]
    except (OSError, ValueError, LookupError, TypeError):  # another program says what is wrong with it
        return False


def wrong_repository(name: str) -> str | None:
    """Why `name` is neither a folder nor can be a repository on the Hub, in words; None when it is one of them."""
    if os.path.isdir(name):
        return None
    if os.path.exists(name):
        return "is a file; give the folder that it lies in"
    return None if ON_THE_HUB.fullmatch(name) else "no such folder, and no name on the Hub, which would be OWNER/NAME"
