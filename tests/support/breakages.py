"""Ways to break a file of a checkpoint, each a function of the folder that the file lies in."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def without_sums(path: Path) -> Path:
    """`path`, beside which there are no checksums any more."""
    for folder in (path.parent, path.parent.parent):
        (folder / "SHA256SUMS").unlink(missing_ok=True)
    return path


def raw(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: replace(without_sums(folder / file), content)


def setting(file: str, key: str, value: Any) -> Callable[[Path], None]:
    """Sets a dotted key of a JSON file."""

    def do(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        *sections, last = key.split(".")
        section = content
        for name in sections:
            section = section[name]
        section[last] = value
        replace(without_sums(folder / file), json.dumps(content).encode())

    return do


def as_folder(file: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        without_sums(folder / file).unlink()
        (folder / file).mkdir()

    return do


def as_pipe(file: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        without_sums(folder / file).unlink()
        os.mkfifo(folder / file)

    return do


def gone(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def bytes_of(file: str, change: Callable[[bytes], bytes], sums: bool = True) -> Callable[[Path], None]:
    """Changes a file; with `sums` its checksum stays what it was, otherwise there is none."""

    def do(folder: Path) -> None:
        path = folder / file if sums else without_sums(folder / file)
        replace(path, change(path.read_bytes()))

    return do


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Changes tensors; there are no checksums afterwards."""

    def do(folder: Path) -> None:
        path = without_sums(folder / file)
        content = {name: value.clone() for name, value in load_file(path).items()}
        change(content)
        path.unlink()
        save_file(content, path, {"format": "pt"})

    return do


def fill(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda content: content[name].view(-1)[-1:].fill_(value)


def flip(content: bytes, place: float = 0.9) -> bytes:
    changed = bytearray(content)
    changed[int(place * (len(changed) - 1))] ^= 16
    return bytes(changed)


def header(change: Callable[[dict], Any]) -> Callable[[bytes], bytes]:
    """Changes the JSON at the head of a safetensors file."""

    def do(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        text = change(json.loads(content[8 : 8 + length]))
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return do


def moved_offsets(content: dict) -> dict:
    name = next(key for key in content if key != "__metadata__")
    return content | {name: content[name] | {"data_offsets": [0, 1 << 40]}}


class Exploit:
    """Unpickled, it makes a file."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


def proof_of(folder: Path) -> Path:
    """The file that an exploit makes in a folder it was put into."""
    return folder.parent / "exploited"


def exploit_index(folder: Path) -> None:
    path = without_sums(folder / ".metadata")
    replace(path, pickle.dumps(Exploit(proof_of(folder.parent))))


def exploit_value(folder: Path) -> None:
    """Replaces the first value that is no tensor by a pickle that torch would run, at the place that the index says."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    part = next(part for key, part in index.storage_data.items() if key.fqn == "progress")
    path = without_sums(folder / part.relative_path)
    content = path.read_bytes()
    torch.save(Exploit(proof_of(folder.parent)), folder / "value")
    value = (folder / "value").read_bytes()
    (folder / "value").unlink()
    replace(path, content + value)
    object.__setattr__(part, "offset", len(content))
    object.__setattr__(part, "length", len(value))
    replace(folder / ".metadata", pickle.dumps(index))


def index_elsewhere(folder: Path) -> None:
    """The index names a file outside of its folder."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    for part in index.storage_data.values():
        object.__setattr__(part, "relative_path", f"../{folder.name}/{part.relative_path}")
    replace(without_sums(folder / ".metadata"), pickle.dumps(index))


def of_another_step(folder: Path) -> None:
    """The whole checkpoint bears another step's name."""
    shutil.copytree(folder, folder.with_name("checkpoint_000005"))
    shutil.rmtree(folder)


def link(file: str) -> Callable[[Path], None]:
    """Replaces a file by a link to a secret elsewhere."""

    def do(folder: Path) -> None:
        without_sums(folder / file).unlink()
        (folder / file).symlink_to(folder.parent / "secret.key")

    return do
