"""A checkpoint: are its files there and as they were written, and do its weights and settings belong together?"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader

from ..checkpoint.saved import Finished, open_finished
from ..checkpoint.verify import contradictions, read_header
from ..common.checksums import CHECKSUMS, changed_files, read_checksums
from ..common.errors import ConfigError
from .answers import running
from .check import FAILED, OK, WARNING, Check, guarded, in_units
from .values import values

RESTORE = "copy the checkpoint again from where it was made, or take another one"
UNFINISHED = re.compile(r"\.(tmp|old)-checkpoint_\d+")


def checkpoint(path: Path, base: str | None, device: str) -> Iterator[Check]:
    """Checks of the checkpoint in `path`; the model is loaded only when nothing failed before.

    Args:
        base: the base model of adapters, as `finished.model_paths` takes it.
    """
    try:
        finished = open_finished(path, "CHECKPOINT")
    except ConfigError as error:
        yield Check("files", FAILED, str(error), RESTORE)
        return
    failed = False
    for name, checks in (
        ("files", lambda: _files(finished)),
        ("training state", lambda: _training_state(finished.folder.parent)),
        ("checksums", lambda: _checksums(finished)),
        ("weights", lambda: _weights(finished)),
    ):
        for check in guarded(name, checks):
            failed |= check.status == FAILED
            yield check
    if failed:
        yield Check("model", WARNING, "not loaded, as something failed before", "first what failed above")
        return
    yield from guarded("model", lambda: running(finished, base, torch.device(device)))


def _files(finished: Finished) -> Iterator[Check]:
    yield Check("files", OK, str(finished.weights.resolve()), details={"weights": str(finished.weights.resolve())})
    if UNFINISHED.fullmatch(finished.folder.parent.name):
        yield Check("files", FAILED, "left by a save that was interrupted", "take another checkpoint of this run")
    if finished.training is None:
        remedy = "give the settings of the training where they are asked for (--config, --base)"
        yield Check("training_config.json", WARNING, "not there", remedy)
    else:
        versions = finished.training.get("versions", {})
        made = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield Check("training_config.json", OK, f"step {finished.training.get('step')}, made with {made}")
    yield from _adapters_named(finished)


def _adapters_named(finished: Finished) -> Iterator[Check]:
    """`moshi.run_inference` takes adapters from where config.json says, and from nowhere else."""
    name = finished.config.get("lora_name")
    if not finished.adapters or not name or name.startswith("hf://"):
        return
    named = finished.folder / name.removeprefix("file://")
    if not named.is_file() or not named.samefile(finished.weights):
        what = "another file" if named.is_file() else "a file that is not there"
        remedy = (
            f'set it to "file://{finished.weights.resolve()}", or serve with --lora-weight; an export has no such paths'
        )
        yield Check("config.json", WARNING, f"lora_name={name!r} names {what}; the checkpoint was moved", remedy)


def _training_state(folder: Path) -> Iterator[Check]:
    """Complete as far as its index tells; of the values in it only a resume knows."""
    state = folder / "training_state"
    if not (folder / "consolidated").is_dir():
        return  # an export, or weights by themselves: nothing to resume
    if not (state / ".metadata").is_file():
        remedy = "begin a new run with init_from, or take another checkpoint"
        yield Check("training state", WARNING, f"not there ({state}): this checkpoint cannot be resumed", remedy)
        return
    ends: dict[str, int] = {}
    try:
        parts = FileSystemReader(state).read_metadata().storage_data.values()
    except Exception as error:  # a damaged pickle raises anything
        text = f"its index {state / '.metadata'} cannot be read: {type(error).__name__}: {error}"
        yield Check("training state", FAILED, text, RESTORE)
        return
    for part in parts:
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    short = [name for name, end in ends.items() if not (state / name).is_file() or (state / name).stat().st_size < end]
    size = sum(path.stat().st_size for path in state.iterdir())
    if short:
        names = ", ".join(sorted(short))
        yield Check("training state", FAILED, f"missing or truncated in {state}: {names}", RESTORE)
    else:
        yield Check("training state", OK, in_units(size), details={"bytes": size})


def _checksums(finished: Finished) -> Iterator[Check]:
    try:
        recorded = read_checksums(finished.folder)
    except ConfigError as error:
        yield Check("checksums", FAILED, str(error), RESTORE)
        return
    if recorded is None:
        remedy = f"keep a copy that you trust; checkpoints saved by this version have a {CHECKSUMS}"
        yield Check("checksums", WARNING, f"no {CHECKSUMS}: a flipped bit in a weight cannot be seen", remedy)
        return
    changed = changed_files(finished.folder, recorded)
    for name in changed:
        what = "is not what was saved" if (finished.folder / name).is_file() else "is not there"
        yield Check("checksums", FAILED, f"{name} {what} (SHA-256)", RESTORE, {"file": name})
    if finished.weights.name not in recorded:
        text = f"{CHECKSUMS} has no line for {finished.weights.name}: a flipped bit in it cannot be seen"
        yield Check("checksums", WARNING, text, RESTORE)
    elif not changed:
        yield Check("checksums", OK, f"{', '.join(recorded)} {'are' if len(recorded) > 1 else 'is'} as saved")


def _weights(finished: Finished) -> Iterator[Check]:
    try:
        header = read_header(finished.weights)
    except ConfigError as error:
        yield Check("weights", FAILED, str(error), RESTORE)
        return
    dtypes = ", ".join(sorted({one.dtype for one in header.values()}))
    yield Check("weights", OK, f"{len(header)} tensors, {dtypes}", details={"tensors": len(header)})
    found = contradictions(finished)
    for contradiction in found:
        yield Check("settings", FAILED, contradiction, "restore config.json and weights that were saved together")
    if not found:
        yield Check("settings", OK, "config.json describes these weights")
    yield from values(finished, header)
