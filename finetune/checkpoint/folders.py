"""Where the checkpoints of a run lie, and which file in them is served."""

import logging
import os
import re
from pathlib import Path

from ..common.errors import ConfigError, shown
from ..common.files import read_json, write_json

logger = logging.getLogger(__name__)

ADAPTERS, MERGED, TRAINED = "lora.safetensors", "consolidated.safetensors", "ttt.safetensors"
"""Adapters, the whole model, or what `training_mode: ttt` trained alone; a checkpoint holds one of them."""

CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{6,})")
"""The name of a complete checkpoint in `RUN_DIR/checkpoints`."""


ABANDONED = re.compile(rf"(?:abandoned-)?{CHECKPOINT_NAME.pattern}(?:-\d+)?")
"""The name of a complete checkpoint, also of one that was put aside when the run went back."""


def checkpoint_name(step: int) -> str:
    """The name of the complete checkpoint of `step`."""
    return f"checkpoint_{step:06d}"


def step_of(checkpoint: Path) -> int | None:
    """The step that the name of a checkpoint's folder says; None for a folder of another name."""
    match = ABANDONED.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def relocate_adapters(folder: Path) -> None:
    """Corrects the path of the adapters in the configs of all checkpoints in `folder`, after they were moved there.

    A config that cannot be read stays as it is, with a warning.
    """
    for path in folder.rglob("consolidated/config.json"):
        adapters = path.with_name(ADAPTERS)
        try:
            config = read_json(path)
        except ConfigError as error:
            logger.warning("%s It was damaged before it was moved.", error)
            continue
        if "lora_name" in config and adapters.is_file():
            write_json(path, config | {"lora_name": f"file://{adapters.resolve()}"})


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in `RUN_DIR/checkpoints` by step, ascending; whole, but not all can be resumed.

    A checkpoint has such a name only when it was written to its end. Its training state may have been removed since: it
    can still be served, or begin a new run. `Checkpointer.find` asks for the training state too.
    """
    found = [(CHECKPOINT_NAME.fullmatch(item.name), item) for item in folder.iterdir()] if folder.is_dir() else []
    return dict(sorted((int(match[1]), item) for match, item in found if match))


def find_weights(path: Path, key: str = "init_from") -> Path:
    """The weights file in a run's folder, a checkpoint's or its `consolidated`, or the file itself.

    Raises:
        ConfigError: when there is none; names `key`, the setting that `path` is the value of.
    """
    if not os.path.exists(path):
        raise ConfigError(f"{key}={shown(str(path))}: no such file or folder.")
    newest = list(list_checkpoints(path / "checkpoints").values())[-1:]
    for folder in [*newest, path]:
        for place in (folder / "consolidated", folder):
            for name in (ADAPTERS, MERGED, TRAINED):
                if (place / name).is_file():
                    return place / name
    if path.is_file() and path.suffix == ".safetensors":
        return path
    raise ConfigError(
        f"{key}={str(path)!r}: no finished checkpoint; give a run's folder, one of its checkpoints/checkpoint_... "
        f"or the {ADAPTERS}, {MERGED} or {TRAINED} in it."
    )
