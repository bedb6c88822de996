"""A model's repository: a folder, laid out like one on the Hub, wherever moshi takes the name of a repository.

What a `config.json` names is looked for in its own repository alone, so that nobody else's config reads, serves or
copies a file of this machine.
"""

import contextlib
import functools
import inspect
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, file_download
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from moshi.models import loaders

from .arguments import HUB_FILE, wrong_repository
from .errors import in_one_line
from .json_object import read_object
from .model_config import check_mimi_config, read_model_config

HUB, LOCAL = "hf://", "file://"
DEFAULT_NAMES = {
    "moshi_name": loaders.MOSHI_NAME,
    "mimi_name": loaders.MIMI_NAME,
    "tokenizer_name": loaders.TEXT_TOKENIZER_NAME,
}
"""What moshi looks for where a config.json does not say."""

ARGUMENTS = {
    "moshi_name": "moshi_weights",
    "mimi_name": "mimi_weights",
    "mimi_config_name": "mimi_config_path",
    "tokenizer_name": "tokenizer",
    "lora_name": "lora_weights",
}
"""For each key of a config.json that names a file, the argument of `CheckpointInfo.from_hf_repo` that replaces it."""


class RepositoryError(ValueError):
    """A repository that does not exist, or whose config.json cannot be used; one line that names it, file and key."""


def load_checkpoint_info(repository: str | Path, **options: Any) -> loaders.CheckpointInfo:
    """`CheckpointInfo.from_hf_repo`, also for a folder on this machine.

    Args:
        repository: a folder, or the name of a repository on the Hub. A folder that exists wins over such a name.
        **options: of `CheckpointInfo.from_hf_repo`.

    Raises:
        RepositoryError: when there is no such folder or repository, or its config.json is of no model or names a file
            outside of the repository.
        LocalEntryNotFoundError: when a folder lacks a file that its config.json names.
    """
    with local_repositories():
        return loaders.CheckpointInfo.from_hf_repo(str(repository), **options)


@contextlib.contextmanager
def local_repositories() -> Iterator[None]:
    """Inside, `CheckpointInfo.from_hf_repo` and so `--hf-repo` also take the path of a folder.

    A folder that exists wins over a repository of the same name on the Hub. Of both, config.json is checked before
    anything is read or built, as by `load_checkpoint_info`.
    """
    stock_download, stock_find = loaders.hf_hub_download, loaders.CheckpointInfo.from_hf_repo

    def download(repo_id: str | Path, filename: str, *args: Any, **kwargs: Any) -> str:
        if os.path.isdir(repo_id):
            return str(file_in_folder(repo_id, filename))
        with _from_the_hub(str(repo_id)):
            return stock_download(repo_id, filename, *args, **kwargs)

    @functools.wraps(stock_find)
    def find(hf_repo: str, *args: Any, **kwargs: Any) -> loaders.CheckpointInfo:
        bound = inspect.signature(stock_find).bind(hf_repo, *args, **kwargs).arguments
        given = {name: value for name, value in bound.items() if value is not None and name != "hf_repo"}
        _require_repository(str(hf_repo))
        if "config_path" not in given:
            try:
                given["config_path"] = loaders.hf_hub_download(hf_repo, "config.json", revision=given.get("revision"))
            except EntryNotFoundError:
                return stock_find(hf_repo, **given)  # warns, and takes it for Moshi 7B
        files = named_files(hf_repo, given["config_path"], given, given.get("revision"))
        return stock_find(hf_repo, **{**files, **given, "config_path": Path(given["config_path"])})

    loaders.hf_hub_download, loaders.CheckpointInfo.from_hf_repo = download, staticmethod(find)
    try:
        yield
    finally:
        loaders.hf_hub_download, loaders.CheckpointInfo.from_hf_repo = stock_download, staticmethod(stock_find)


def _require_repository(name: str) -> None:
    problem = wrong_repository(name)
    if problem:
        raise RepositoryError(f"{name[:200]!r}: {problem}.")


@contextlib.contextmanager
def _from_the_hub(name: str) -> Iterator[None]:
    """Makes what huggingface_hub raises about a repository one line. That a file is not in it is left as it is."""
    try:
        yield
    except LocalEntryNotFoundError as error:
        if Path(constants.HF_HUB_CACHE, file_download.repo_folder_name(repo_id=name, repo_type="model")).is_dir():
            raise  # of a repository that was downloaded, this file was not
        raise RepositoryError(f"{name!r}: no such folder, and the Hub cannot be reached.") from error
    except EntryNotFoundError:
        raise
    except HfHubHTTPError as error:
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        raise RepositoryError(f"{name!r}: no such folder, and the Hub does not give it ({reason}).") from error


def named_files(
    repository: str | Path, config_path: str | Path, given: Collection[str] = (), revision: str | None = None
) -> dict[str, Any]:
    """The files that a config.json names, for `CheckpointInfo.from_hf_repo`; not those that it finds itself.

    Args:
        repository: in which the names are looked for, a folder or the name of one on the Hub.
        given: arguments that are not needed.
        revision: of a repository on the Hub.

    Raises:
        RepositoryError, LocalEntryNotFoundError: as `load_checkpoint_info`.
    """
    try:
        config = read_model_config(config_path)
    except ValueError as error:
        raise RepositoryError(str(error)) from error
    files: dict[str, Any] = {}
    for key, argument in ARGUMENTS.items():
        name = config.get(key) or DEFAULT_NAMES.get(key)
        if name is None or argument in given:
            continue
        try:
            place = named_file(repository, Path(config_path).parent, name)
        except LocalEntryNotFoundError as error:
            raise LocalEntryNotFoundError(
                f"{config_path} names {name!r}, and there is no such file: {error}"
            ) from error
        except RepositoryError as error:
            raise RepositoryError(f"{config_path}: {key}={error}") from error
        if argument == "mimi_config_path":
            place = _checked_codec(loaders.hf_get(name if place is None else place, str(repository), revision=revision))
        if place is not None:
            files[argument] = place
    return files


def _checked_codec(path: Path) -> Path:
    """`path`, when it holds the configuration of a Mimi."""
    try:
        check_mimi_config(read_object(path))
    except ValueError as error:
        raise RepositoryError(f"{path}: {error}") from error
    return path


def named_file(repository: str | Path, config_folder: Path, name: str) -> Path | str | None:
    """What a `name` in a config.json stands for: a file of a folder, `hf://owner/name/file`, or None for a Hub's own.

    `file://` is what a training writes for its adapters. The file stands beside the config.json, also after both were
    copied to elsewhere.

    Raises:
        RepositoryError: when the name leads out of the repository.
        LocalEntryNotFoundError: when there is no such file in it.
    """
    if name.startswith(HUB):
        if not HUB_FILE.fullmatch(name):
            raise RepositoryError(f"{name!r}: must be of the form hf://owner/name/file.")
        return name
    if name.startswith(LOCAL):
        beside = config_folder / Path(name).name
        if not beside.is_file():
            raise LocalEntryNotFoundError(f"a file {LOCAL} has to lie beside its config.json, and {beside} does not.")
        return file_in_folder(config_folder, beside.name)
    if os.path.isdir(repository):
        return file_in_folder(repository, name)
    _refuse_outside(name)
    return None


def file_in_folder(folder: str | Path, filename: str) -> Path:
    """The path of `filename` in `folder`.

    Raises:
        RepositoryError: when it lies elsewhere, also through a link; the Hub's cache may link to its own contents.
        LocalEntryNotFoundError: naming both. It is a FileNotFoundError, and an EntryNotFoundError as the Hub gives.
    """
    _refuse_outside(filename)
    path = Path(folder) / filename
    if not os.path.isfile(path):
        raise LocalEntryNotFoundError(f"The local folder {str(folder)!r} has no file {filename!r}.")
    root, target = Path(folder).resolve(), path.resolve()
    roots = [root]
    if root.parent.name == "snapshots":  # of huggingface_hub: SNAPSHOTS/REVISION/FILE -> BLOBS/HASH
        roots.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(one) for one in roots):
        raise RepositoryError(
            f"{filename!r}: is a link out of {folder}, to {target}; copy that file there, or name it yourself."
        )
    return path


def _refuse_outside(filename: str) -> None:
    parts = re.split(r"[/\\]", filename)
    if not filename.isprintable() or os.path.isabs(filename) or ".." in parts or not parts[-1] or len(filename) > 1024:
        raise RepositoryError(f"{filename[:60]!r}: must be the name of a file in the repository itself.")
