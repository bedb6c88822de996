"""Is this checkpoint good? One answer, for all who serve, evaluate, export, resume or begin from it."""

import logging
from collections.abc import Iterator

from ..common.checksums import CHECKSUMS, other_than_saved, read_checksums
from ..common.errors import ConfigError
from ..common.files import read_json
from ..model.mimi import mimi_problems
from ..model.tensor_file import Size, broken_values, measure, read_header
from .contradictions import contradictions
from .folders import step_of
from .saved import SavedCheckpoint, own_files

logger = logging.getLogger(__name__)

HEADER, SETTINGS, CHECKED, VALUES, CODEC = "weights", "settings", "checksums", "finite", "codec"
"""What the answer consists of, each part looked at when those before it are good."""


def examine(saved: SavedCheckpoint, sizes: dict[str, Size] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Each part of a checkpoint, and what is wrong with it, one sentence each. Reads every file twice at the most.

    The memory taken is small: weights are mapped from the file, and looked at one tensor at a time.

    Args:
        sizes: is filled with the size of the values of each tensor.
    """
    try:
        read_header(saved.weights)
    except ConfigError as error:
        yield HEADER, [str(error)]
        yield CHECKED, _changed(saved)
        return
    yield HEADER, []
    yield SETTINGS, _other_step(saved) + contradictions(saved)
    yield CHECKED, _changed(saved)
    sizes = {} if sizes is None else sizes
    sizes.update(measure(saved.weights))
    yield VALUES, [f"{saved.weights.name}: {text}" for text in broken_values(sizes)]
    yield CODEC, _codec(saved)


def refuse_broken(saved: SavedCheckpoint, key: str) -> None:
    """Raises a ConfigError that names `key` and what is wrong with a checkpoint, if anything is.

    One without checksums is accepted, with a warning.
    """
    for _, problems in examine(saved):
        if problems:
            raise ConfigError(
                f"{key}={str(saved.folder)!r}: is broken: {' '.join(problems)} Take another checkpoint, or copy it "
                "again from where it was made; `python -m finetune.doctor` says more."
            )
    if read_checksums(saved.folder) is None:
        logger.warning("%s: no %s; a flipped bit in its weights would not be seen.", saved.folder, CHECKSUMS)


def _other_step(saved: SavedCheckpoint) -> list[str]:
    named = step_of(saved.folder.resolve().parent)
    if saved.step is None or named is None or saved.folder.name != "consolidated" or named == saved.step:
        return []
    return [f"training_config.json is of step {saved.step}, and lies in the checkpoint of step {named}."]


def _changed(saved: SavedCheckpoint) -> list[str]:
    try:
        return other_than_saved(saved.folder, read_checksums(saved.folder) or {})
    except ConfigError as error:
        return [str(error)]


def _codec(saved: SavedCheckpoint) -> list[str]:
    """Of the Mimi that an exported folder brings."""
    try:
        files = own_files(saved)
        config = None if files.get("mimi_config_name") is None else read_json(files["mimi_config_name"])
    except ConfigError as error:
        return [str(error)]
    return mimi_problems(files["mimi_name"], config) if "mimi_name" in files else []
