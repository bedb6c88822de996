"""A model's repository: a folder, laid out like one on the Hub, wherever moshi takes the name of a repository."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.utils import LocalEntryNotFoundError
from moshi.models import loaders


def load_checkpoint_info(repository: str | Path, **options: Any) -> loaders.CheckpointInfo:
    """`CheckpointInfo.from_hf_repo`, also for a folder on this machine.

    Args:
        repository: a folder, or the name of a repository on the Hub. A folder that exists wins over such a name.
        **options: of `CheckpointInfo.from_hf_repo`.
    """
    with local_repositories():
        return loaders.CheckpointInfo.from_hf_repo(str(repository), **options)


@contextlib.contextmanager
def local_repositories() -> Iterator[None]:
    """Inside, `CheckpointInfo.from_hf_repo` and so `--hf-repo` also take the path of a folder.

    A folder that exists wins over a repository of the same name on the Hub.
    """
    stock = loaders.hf_hub_download

    def download(repo_id: str | Path, filename: str, *args: Any, **kwargs: Any) -> str:
        if os.path.isdir(repo_id):
            return file_in_folder(repo_id, filename)
        return stock(repo_id, filename, *args, **kwargs)

    loaders.hf_hub_download = download
    try:
        yield
    finally:
        loaders.hf_hub_download = stock


def file_in_folder(folder: str | Path, filename: str) -> str:
    """The path of `filename` in `folder`.

    Raises:
        LocalEntryNotFoundError: naming both. It is a FileNotFoundError, and an EntryNotFoundError as the Hub gives.
    """
    path = Path(folder) / filename
    if not path.is_file():
        raise LocalEntryNotFoundError(f"The local folder {str(folder)!r} has no file {filename!r}.")
    return str(path)
