"""What goes with the weights of an export: where Mimi, the tokenizer and the base model are, and their names there."""

import shutil
from pathlib import Path

from huggingface_hub.utils import LocalEntryNotFoundError
from moshi.models import loaders

import moshi_patch
from moshi_patch import HUB

from ..checkpoint.contradictions import base_contradictions
from ..checkpoint.saved import SavedCheckpoint, find_files
from ..common.errors import ConfigError
from ..model.tensor_file import broken_values, read_tensors
from ..settings.schema import MoshiPaths

NAMES = {"mimi_name": "mimi", "mimi_config_name": "mimi_config", "tokenizer_name": "tokenizer", "moshi_name": "model"}
"""Keys of config.json that name a file, and what it is called in an export; it keeps its suffix."""


def find_sources(saved: SavedCheckpoint, paths: MoshiPaths, *, base: bool) -> dict[str, str | Path]:
    """For each key of `NAMES` that is needed: a file of this machine, or `hf://owner/name/file`.

    Args:
        base: whether the weights of the base model are needed besides Mimi and the tokenizer.

    Raises:
        ConfigError: when a file is not there, or is not what it is called: nothing else of this machine is exported.
    """
    info = find_files(saved, paths, weights=False)
    given = {"moshi_name": paths.moshi_path, "mimi_name": paths.mimi_path, "tokenizer_name": paths.tokenizer_path}
    sources: dict[str, str | Path] = {}
    for key in NAMES if base else [key for key in NAMES if key != "moshi_name"]:
        named = (info.raw_config or {}).get(key) or moshi_patch.DEFAULT_NAMES.get(key)
        if given.get(key) is not None:
            sources[key] = given[key] if given[key].startswith(HUB) else loaders.hf_get(given[key])
        elif named is not None:
            sources[key] = _in_repository(named, paths)
    for key, source in sources.items():
        if isinstance(source, Path) and not source.is_file():
            raise ConfigError(f"moshi_paths: {source}, the {key} of this model, is not there; name it with --base.")
    _refuse_broken_base(saved, sources.get("moshi_name"))
    return sources


def place(folder: Path, key: str, source: str | Path, *, with_base: bool) -> str:
    """The name of a file for config.json, after it was copied into `folder` if it has to be there."""
    wanted = key == "mimi_config_name" or (key == "moshi_name" and with_base)
    if isinstance(source, str) and not wanted:
        return source
    file = loaders.hf_get(source)
    name = NAMES[key] + file.suffix
    shutil.copyfile(file, folder / name)
    return name


def hub_of(paths: MoshiPaths) -> str | None:
    """The Hub repository of the base model's weights, `owner/name`; None when they are a file."""
    if paths.moshi_path is not None:
        is_hub = paths.moshi_path.startswith(HUB)
        return "/".join(paths.moshi_path.removeprefix(HUB).split("/")[:2]) if is_hub else None
    return None if paths.hf_repo_id is None or Path(paths.hf_repo_id).is_dir() else paths.hf_repo_id


def _in_repository(name: str, paths: MoshiPaths) -> str | Path:
    """What `name` in the config.json of `paths` stands for: a file, or `hf://owner/name/file`."""
    repository = paths.hf_repo_id
    folder = loaders.hf_get(paths.config_path).parent if paths.config_path is not None else Path(str(repository))
    try:
        place = moshi_patch.named_file(folder if repository is None else repository, folder, name)
    except (moshi_patch.RepositoryError, LocalEntryNotFoundError) as error:
        raise ConfigError(f"moshi_paths: {error}") from error
    return f"{HUB}{repository}/{name}" if place is None else place


def _refuse_broken_base(saved: SavedCheckpoint, weights: str | Path | None) -> None:
    """Raises a ConfigError for a base model of this machine that is damaged, or is not that of these adapters."""
    if not isinstance(weights, Path):
        return
    shapes, sizes = read_tensors(weights, "fsdp_best_state", "model")
    problems = base_contradictions(saved, shapes) + broken_values(sizes)
    if problems:
        raise ConfigError(f"moshi_paths: the base model {weights} cannot be used: {' '.join(problems)}")
