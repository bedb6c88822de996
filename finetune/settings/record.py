"""The settings of a run as it records them, and as they are read again, also from another working directory."""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .modes import with_mode_settled
from .parsing import build
from .plan_words import in_our_words, with_kind_settled
from .schema import MoshiPaths, TrainArgs, ttt_names

Place = Callable[[str], str]
"""Gives a path for a path."""


def to_dict(args: TrainArgs) -> dict[str, Any]:
    """Nested dictionaries for `training_config.json`. The key of Weights & Biases is a secret and left out (null).

    Of `ttt` only the settings that its kind has.
    """
    content = dataclasses.asdict(args)
    content["wandb"]["key"] = None
    content["ttt"] = {name: content["ttt"][name] for name in ttt_names(args.ttt)}
    return content


def from_dict(content: dict[str, Any]) -> TrainArgs:
    """The inverse of `to_dict`, as strict as `load_args`."""
    return build(TrainArgs, in_force(copy.deepcopy(content)))


def in_force(content: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings in today's words, with the keys that the kind of memory and the mode settle.

    Raises:
        ConfigError: for settings that contradict each other.
    """
    return with_mode_settled(with_kind_settled(in_our_words(content)[0])[0])


def with_absolute_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy of what `to_dict` made whose local paths are right in every working directory."""
    placed = _with_paths(settings, os.path.abspath)
    return placed | {"run_dir": os.path.abspath(settings["run_dir"])}


def with_paths_found(settings: dict[str, Any], folders: Iterable[Path]) -> dict[str, Any]:
    """A copy of recorded settings whose relative paths begin at the first of `folders` in which there is such a file.

    What is in none of them stays as it is.
    """
    roots = list(folders)

    def place(path: str) -> str:
        there = (os.path.join(root, path) for root in roots)
        return path if os.path.isabs(path) else next(filter(os.path.exists, there), path)

    return _with_paths(settings, place)


def _with_paths(settings: dict[str, Any], place: Place) -> dict[str, Any]:
    """A copy in which `place` was done to each local path that is read; anything else than texts stays as it is."""
    result = copy.deepcopy(settings)
    for section, names, change in (
        ("moshi_paths", [field.name for field in dataclasses.fields(MoshiPaths)], _place_file),
        ("data", ["train_data", "eval_data"], _place_sources),
    ):
        values = result.get(section)
        for name in names if isinstance(values, dict) else ():
            if isinstance(values.get(name), str):
                values[name] = change(values[name], place)
    if isinstance(result.get("init_from"), str):
        result["init_from"] = _place_file(result["init_from"], place)
    return result


def _place_file(name: str, place: Place) -> str:
    """Of a name on the Hub, nothing is changed."""
    path = name.removeprefix("file://")
    placed = place(path)
    return name.removesuffix(path) + placed if os.path.exists(placed) else name


def _place_sources(spec: str, place: Place) -> str:
    return ",".join(_place_source(part, place) for part in spec.split(","))


def _place_source(part: str, place: Place) -> str:
    """`list.jsonl:2` and `folder`, of which the share stays, and so do spaces around it."""
    path = part.strip()
    name, colon, _ = path.rpartition(":")
    if colon and not os.path.exists(place(path)):
        path = name
    return part.replace(path, _place_file(path, place), 1) if path else part


def working_directories(training_config: Mapping[str, Any], folder: Path) -> list[Path]:
    """Where the relative paths of a run may begin: where it was started, and where that would be now.

    Args:
        training_config: content of a checkpoint's `training_config.json`.
        folder: in which that file lies, `RUN_DIR/checkpoints/checkpoint_000500/consolidated` of a run.
    """
    started, settings = training_config.get("working_directory"), training_config.get("training")
    found = [Path(started)] if isinstance(started, str) else []
    run_dir = settings.get("run_dir") if isinstance(settings, dict) else None
    parents = folder.resolve().parents
    if isinstance(run_dir, str) and run_dir and not os.path.isabs(run_dir) and len(parents) > 2:
        parts = Path(run_dir).parts
        if ".." not in parts and parents[2].parts[-len(parts) :] == parts:
            found.append(Path(*parents[2].parts[: -len(parts)]))
    return found
