"""A checkpoint: are its files there and as they were written, and do its weights and settings belong together?"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ..checkpoint import verify
from ..checkpoint.best import best_beside
from ..checkpoint.saved import SavedCheckpoint, find_files, model_paths, open_checkpoint
from ..checkpoint.state_files import STATE, has_state_checksums, is_resumable, state_problems
from ..common.checksums import CHECKSUMS, read_checksums
from ..common.errors import ConfigError
from ..data.text_tokenizer import UnfitTokenizer
from ..model.tensor_file import HUGE, Size, read_header
from .answers import check_answers
from .finding import FAILED, OK, WARNING, Finding, guarded, in_units
from .tensors import describe_tensors, expected_layers

RESTORE = "copy the checkpoint again from where it was made, or take another one"
REMEDIES = {
    verify.SETTINGS: "restore config.json and weights that were saved together",
    verify.VALUES: "take an earlier checkpoint: its training diverged, or its file was damaged",
}
UNFINISHED = re.compile(r"\.(tmp|old)-checkpoint_\d+")


def check_checkpoint(path: Path, base: str | None, device: str, layers: str | None = None) -> Iterator[Finding]:
    """Checks of the checkpoint in `path`; the model is loaded only when nothing failed before.

    Args:
        base: the base model of adapters, as `saved.model_paths` takes it.
        layers: which are to have TTT, `"5,11,17"`, or how many, `"3"`; None: not looked at.
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
        ("weights", lambda: _parts(saved)),
        ("expected layers", lambda: expected_layers(saved, layers)),
    ):
        for check in guarded(name, checks):
            failed |= check.status == FAILED
            yield check
    if failed:
        yield Finding("model", WARNING, "not loaded, as something failed before", "first what failed above")
        return
    for check in guarded("tokenizer", lambda: _tokenizer(saved, base)):
        failed |= check.status == FAILED
        yield check
    if failed:
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
        yield Finding("training_config.json", OK, f"step {saved.step}, made with {made}")
    yield from _best(saved)
    yield from _adapters_named(saved)


def _best(saved: SavedCheckpoint) -> Iterator[Finding]:
    """Which checkpoint of the same run has the lowest held-out loss."""
    found = best_beside(saved.folder.parent)
    if found is None:
        return
    best, folder = found
    details = {"step": best.step, "loss": best.loss}
    text = f"step {best.step} of this run has the lowest held-out loss, {best.loss:.4f}"
    if best.step == saved.step:
        yield Finding("best", OK, f"{text}: this one", details=details)
    else:
        remedy = (
            f"look at {folder}; python -m finetune.export RUN OUT --best exports it" if folder else "it was deleted"
        )
        yield Finding("best", WARNING, f"{text}; this is step {saved.step}", remedy, details)


def _adapters_named(saved: SavedCheckpoint) -> Iterator[Finding]:
    """Stock moshi takes adapters from where config.json says, and from nowhere else; `moshi_patch` looks beside it."""
    name = saved.config.get("lora_name")
    if not saved.adapters or not name or name.startswith("hf://"):
        return
    named = saved.folder / name.removeprefix("file://")
    if not named.is_file() or not named.samefile(saved.weights):
        what = "another file" if named.is_file() else "a file that is not there"
        remedy = (
            f'`python -m moshi_patch` takes those beside it; for others, set it to "file://{saved.weights.resolve()}", '
            "or serve with --lora-weight; an export has no such paths"
        )
        yield Finding("config.json", WARNING, f"lora_name={name!r} names {what}; the checkpoint was moved", remedy)


def _training_state(checkpoint: Path) -> Iterator[Finding]:
    """Its files are those that were saved; no pickle in them is read."""
    state = checkpoint / STATE
    if not (checkpoint / "consolidated").is_dir():
        return  # an export, or weights by themselves: nothing to resume
    if not is_resumable(checkpoint):
        remedy = "begin a new run with init_from, or take another checkpoint"
        yield Finding("training state", WARNING, f"not there ({state}): this checkpoint cannot be resumed", remedy)
        return
    problems = state_problems(checkpoint)
    for problem in problems:
        yield Finding("training state", FAILED, problem, RESTORE)
    if problems:
        return
    size = sum(path.stat().st_size for path in state.iterdir())
    if has_state_checksums(checkpoint):
        yield Finding("training state", OK, f"{in_units(size)}, as saved", details={"bytes": size})
    else:
        text = f"{in_units(size)}, without {CHECKSUMS}: a flipped bit in it cannot be seen"
        remedy = "keep a copy that you trust; checkpoints saved by this version have one"
        yield Finding("training state", WARNING, text, remedy, {"bytes": size})


def _parts(saved: SavedCheckpoint) -> Iterator[Finding]:
    """The answer that every program gives, part by part."""
    sizes: dict[str, Size] = {}
    good = set()
    for part, problems in verify.examine(saved, sizes):
        for problem in problems:
            yield Finding(part, FAILED, problem, REMEDIES.get(part, RESTORE))
        if not problems:
            good.add(part)
            yield from _praise(part, saved, sizes)
    if {verify.HEADER, verify.VALUES} <= good:
        yield from describe_tensors(saved, read_header(saved.weights), sizes)


def _praise(part: str, saved: SavedCheckpoint, sizes: dict[str, Size]) -> Iterator[Finding]:
    """What is said of a part with no problem."""
    if part == verify.HEADER:
        header = read_header(saved.weights)
        dtypes = ", ".join(sorted({one.dtype for one in header.values()}))
        yield Finding(part, OK, f"{len(header)} tensors, {dtypes}", details={"tensors": len(header)})
    elif part == verify.SETTINGS:
        yield Finding(part, OK, "config.json describes these weights")
    elif part == verify.VALUES:
        yield Finding(part, OK, f"all values of {len(sizes)} tensors are finite and below {HUGE:g}")
    elif part == verify.CHECKED:
        yield _checksums(saved)


def _checksums(saved: SavedCheckpoint) -> Finding:
    recorded = read_checksums(saved.folder)
    if recorded is None:
        remedy = f"keep a copy that you trust; checkpoints saved by this version have a {CHECKSUMS}"
        return Finding("checksums", WARNING, f"no {CHECKSUMS}: a flipped bit in a weight cannot be seen", remedy)
    if saved.weights.name not in recorded:
        text = f"{CHECKSUMS} has no line for {saved.weights.name}: a flipped bit in it cannot be seen"
        return Finding("checksums", WARNING, text, RESTORE)
    return Finding("checksums", OK, f"{', '.join(recorded)} {'are' if len(recorded) > 1 else 'is'} as saved")


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
