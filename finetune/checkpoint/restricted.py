"""Reads what `torch.distributed.checkpoint` wrote without running what somebody else may have written into it.

Torch unpickles its index, `.metadata`, and every value that is no tensor. A pickle may name any function with any
arguments; here it may name the few that such a checkpoint consists of.
"""

import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

INDEX_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
}
"""Modules and names in an index; dtypes of torch beside them."""

RECONSTRUCT = np.empty(0).__reduce__()[0]
"""What makes an array again: the state of numpy's random numbers holds one."""

VALUE_CLASSES = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *[(RECONSTRUCT, f"numpy.{name}.multiarray._reconstruct") for name in ("core", "_core")],
]
"""Beside tensors, numbers, texts and collections of them."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # Python 3.13
            module = "pathlib"
        if module == "pathlib" and name in INDEX_CLASSES[module]:
            return PurePath  # of whatever system it was saved on
        found = getattr(torch, name, None) if module == "torch" else None
        if name in INDEX_CLASSES.get(module, ()) or isinstance(found, torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no training state contains")


class RestrictedReader(FileSystemReader):
    """A reader for `dcp.load` whose index may name nothing but what an index consists of, and files of its folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            Exception: of any kind, for one that is damaged; `UnpicklingError` for one that would do something else.
        """
        metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError(f"it holds {type(metadata).__name__}, not an index")
        for part in metadata.storage_data.values():
            if PurePath(part.relative_path).name != part.relative_path:
                raise pickle.UnpicklingError(f"it names {part.relative_path!r}, which is no file of its folder")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class RestrictedPlanner(DefaultLoadPlanner):
    """A planner for `dcp.load` that reads numbers, texts, collections, tensors and arrays, and nothing else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            with torch.serialization.safe_globals(VALUE_CLASSES):
                content = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's own text says how to run it all the same
            name = read_item.storage_index.fqn
            raise pickle.UnpicklingError(f"the value of {name} is damaged, or would do something") from error
        plain = io.BytesIO()
        torch.save(content, plain)  # what torch's own method reads next is ours
        plain.seek(0)
        super().load_bytes(read_item, plain)
