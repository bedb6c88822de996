"""A checkpoint: are its files there and as they were written, and do its weights and settings belong together?"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader

from ..checkpoint.saved import SavedCheckpoint, find_files, model_paths, open_checkpoint
from ..checkpoint.verify import contradictions, read_header
from ..common.checksums import CHECKSUMS, changed_files, read_checksums
from ..common.errors import ConfigError
from ..data.text_tokenizer import UnfitTokenizer
from .answers import check_answers
from .finding import FAILED, OK, WARNING, Finding, guarded, in_units
from .tensors import check_tensors

RESTORE = "copy the checkpoint again from where it was made, or take another one"
UNFINISHED = re.compile(r"\.(tmp|old)-checkpoint_\d+")


def check_checkpoint(path: Path, base: str | None, device: str) -> Iterator[Finding]:
    """Checks of the checkpoint in `path`; the model is loaded only when nothing failed before.

    Args:
        base: the base model of adapters, as `saved.model_paths` takes it.
    """
    try:
        saved = open_checkpoint(path, "CHECKPOINT")
    except ConfigError as error:
        yield Finding("files", FAILED, str(error), RESTORE)
        return
    failed = False
    for name, checks in (
        ("files", lambda: _files(saved)),
        ("training state", lambda: _training_state(saved.folder.parent)),
        ("checksums", lambda: _checksums(saved)),
        ("weights", lambda: _weights(saved)),
        ("tokenizer", lambda: _tokenizer(saved, base)),
    ):
        for check in guarded(name, checks):
            failed |= check.status == FAILED
            yield check
    if failed:
        yield Finding("model", WARNING, "not loaded, as something failed before", "first what failed above")
        return
    yield from guarded("model", lambda: check_answers(saved, base, torch.device(device)))


def _files(saved: SavedCheckpoint) -> Iterator[Finding]:
    yield Finding("files", OK, str(saved.weights.resolve()), details={"weights": str(saved.weights.resolve())})
    if UNFINISHED.fullmatch(saved.folder.parent.name):
        yield Finding("files", FAILED, "left by a save that was interrupted", "take another checkpoint of this run")
    if saved.training is None:
        remedy = "give the settings of the training where they are asked for (--config, --base)"
        yield Finding("training_config.json", WARNING, "not there", remedy)
    else:
        versions = saved.training.get("versions", {})
        made = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield Finding("training_config.json", OK, f"step {saved.training.get('step')}, made with {made}")
    yield from _adapters_named(saved)


def _adapters_named(saved: SavedCheckpoint) -> Iterator[Finding]:
    """`moshi.run_inference` takes adapters from where config.json says, and from nowhere else."""
    name = saved.config.get("lora_name")
    if not saved.adapters or not name or name.startswith("hf://"):
        return
    named = saved.folder / name.removeprefix("file://")
    if not named.is_file() or not named.samefile(saved.weights):
        what = "another file" if named.is_file() else "a file that is not there"
        remedy = (
            f'set it to "file://{saved.weights.resolve()}", or serve with --lora-weight; an export has no such paths'
        )
        yield Finding("config.json", WARNING, f"lora_name={name!r} names {what}; the checkpoint was moved", remedy)


def _training_state(folder: Path) -> Iterator[Finding]:
    """Complete as far as its index tells; of the values in it only a resume knows."""
    state = folder / "training_state"
    if not (folder / "consolidated").is_dir():
        return  # an export, or weights by themselves: nothing to resume
    if not (state / ".metadata").is_file():
        remedy = "begin a new run with init_from, or take another checkpoint"
        yield Finding("training state", WARNING, f"not there ({state}): this checkpoint cannot be resumed", remedy)
        return
    ends: dict[str, int] = {}
    try:
        parts = FileSystemReader(state).read_metadata().storage_data.values()
    except Exception as error:  # a damaged pickle raises anything
        text = f"its index {state / '.metadata'} cannot be read: {type(error).__name__}: {error}"
        yield Finding("training state", FAILED, text, RESTORE)
        return
    for part in parts:
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    short = [name for name, end in ends.items() if not (state / name).is_file() or (state / name).stat().st_size < end]
    size = sum(path.stat().st_size for path in state.iterdir())
    if short:
        names = ", ".join(sorted(short))
        yield Finding("training state", FAILED, f"missing or truncated in {state}: {names}", RESTORE)
    else:
        yield Finding("training state", OK, in_units(size), details={"bytes": size})


def _checksums(saved: SavedCheckpoint) -> Iterator[Finding]:
    try:
        recorded = read_checksums(saved.folder)
    except ConfigError as error:
        yield Finding("checksums", FAILED, str(error), RESTORE)
        return
    if recorded is None:
        remedy = f"keep a copy that you trust; checkpoints saved by this version have a {CHECKSUMS}"
        yield Finding("checksums", WARNING, f"no {CHECKSUMS}: a flipped bit in a weight cannot be seen", remedy)
        return
    changed = changed_files(saved.folder, recorded)
    for name in changed:
        what = "is not what was saved" if (saved.folder / name).is_file() else "is not there"
        yield Finding("checksums", FAILED, f"{name} {what} (SHA-256)", RESTORE, {"file": name})
    if saved.weights.name not in recorded:
        text = f"{CHECKSUMS} has no line for {saved.weights.name}: a flipped bit in it cannot be seen"
        yield Finding("checksums", WARNING, text, RESTORE)
    elif not changed:
        yield Finding("checksums", OK, f"{', '.join(recorded)} {'are' if len(recorded) > 1 else 'is'} as saved")


def _weights(saved: SavedCheckpoint) -> Iterator[Finding]:
    try:
        header = read_header(saved.weights)
    except ConfigError as error:
        yield Finding("weights", FAILED, str(error), RESTORE)
        return
    dtypes = ", ".join(sorted({one.dtype for one in header.values()}))
    yield Finding("weights", OK, f"{len(header)} tensors, {dtypes}", details={"tensors": len(header)})
    found = contradictions(saved)
    for contradiction in found:
        yield Finding("settings", FAILED, contradiction, "restore config.json and weights that were saved together")
    if not found:
        yield Finding("settings", OK, "config.json describes these weights")
    yield from check_tensors(saved, header)


def _tokenizer(saved: SavedCheckpoint, base: str | None) -> Iterator[Finding]:
    """Whether the text tokenizer that is served with these weights is theirs."""
    try:
        info = find_files(saved, model_paths(saved, base), weights=False)
    except UnfitTokenizer as error:
        remedy = "serve it with the tokenizer of its base model (--tokenizer), and train with that one"
        yield Finding("tokenizer", FAILED, str(error), remedy)
    except ConfigError as error:
        yield Finding("tokenizer", WARNING, f"not looked at: {error}", "name the base model with --base")
    else:
        yield Finding("tokenizer", OK, f"{info.tokenizer} fits the model", details={"tokenizer": str(info.tokenizer)})
