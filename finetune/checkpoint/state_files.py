"""The files of a training state: are they whole, and those that were saved? Found out without reading a pickle.

RUN_DIR/checkpoints/checkpoint_000500/SHA256SUMS        of all files in training_state
RUN_DIR/checkpoints/checkpoint_000500/training_state/   .metadata, the index, and __0_0.distcp, ... of each rank
"""

import pickletools
import re
from pathlib import Path

from ..common.checksums import CHECKSUMS, other_than_saved, read_checksums, write_checksums
from ..common.errors import ConfigError

STATE, INDEX = "training_state", ".metadata"
VALUES_FILE = re.compile(r"__\d+_\d+\.distcp")
ZIP_END, ZIP_END_BYTES = b"PK\x05\x06", 22
"""How the last record of a zip archive begins, and its length: each value in a file is such an archive."""


def is_resumable(checkpoint: Path) -> bool:
    """Whether the folder of a checkpoint holds a training state, whose index is written last."""
    return (checkpoint / STATE / INDEX).is_file()


def write_state_checksums(checkpoint: Path) -> None:
    """Writes the sums of the training state's files; reads each once."""
    write_checksums(checkpoint, [f"{STATE}/{path.name}" for path in sorted((checkpoint / STATE).iterdir())])


def has_state_checksums(checkpoint: Path) -> bool:
    """Whether sums were saved with the training state; earlier versions did not."""
    return (checkpoint / CHECKSUMS).is_file()


def state_problems(checkpoint: Path) -> list[str]:
    """What is wrong with the files of a training state, one sentence each; reads every file once.

    Without checksums only missing and truncated files are found.
    """
    try:
        recorded = read_checksums(checkpoint)
    except ConfigError as error:
        return [str(error)]
    if recorded is None:
        return _incomplete(checkpoint / STATE)
    missing = [name for name in (f"{STATE}/{path.name}" for path in _files(checkpoint / STATE)) if name not in recorded]
    unknown = [f"{checkpoint / CHECKSUMS}: has no line for {name}." for name in missing]
    return unknown + other_than_saved(checkpoint, recorded)


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name == INDEX or VALUES_FILE.fullmatch(path.name)]


def _incomplete(folder: Path) -> list[str]:
    """Files that the index names and that are not there, or end too early."""
    try:
        texts = [value for _, value, _ in pickletools.genops((folder / INDEX).read_bytes()) if isinstance(value, str)]
    except Exception as error:  # a damaged pickle raises anything
        return [f"{folder / INDEX} cannot be read ({type(error).__name__}: {error})."]
    names = sorted({text for text in texts if VALUES_FILE.fullmatch(text)})
    if not names:
        return [f"{folder / INDEX} is not the index of a training state."]
    problems = []
    for path in [folder / name for name in names]:
        if not path.is_file():
            problems.append(f"{path} is not there.")
        elif not _ends_with_an_archive(path):
            problems.append(f"{path} is truncated.")
    return problems


def _ends_with_an_archive(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - ZIP_END_BYTES, 0))
        return file.read().startswith(ZIP_END)
