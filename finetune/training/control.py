"""The control of a run: the same run trained without TTT, in `RUN_DIR/control`, and what the two say together.

Same data, order, steps and seed; what trains is the same but for the target generators, which it does not have: W_down
of the same layers in full, adapters or all weights as set, at the same rates.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.folders import find_weights, list_checkpoints
from ..common.errors import ConfigError
from ..common.files import read_json
from ..model.base import check_base, find_base_files
from ..settings.schema import TrainArgs
from ..settings.validation import validate
from .held_out import Shares, difference
from .metrics import read_metrics

CONTROL_FOLDER = "control"
"""In a run's folder."""

DIFFERENCE = "control_difference"
"""The held-out loss with TTT less that of the control at the same step; negative: TTT predicts better."""


def control_args(args: TrainArgs) -> TrainArgs:
    """The settings of the control of `args`. It continues where it was interrupted.

    Raises:
        ConfigError: when there would be nothing to compare, or nothing that trains.
    """
    own = copy.deepcopy(args)
    own.control, own.run_dir, own.overwrite_run_dir = False, str(Path(args.run_dir) / CONTROL_FOLDER), False
    own.ttt = replace(args.ttt, enabled=False, as_control=True)
    own.checkpoint.resume, own.checkpoint.resume_step = bool(list_checkpoints(Path(own.run_dir) / "checkpoints")), -1
    if own.wandb.run_name is not None:
        own.wandb.run_name += "-control"
    if args.init_from is not None:
        own.init_from = _beginning(args.init_from)
    try:
        validate(own)
    except ConfigError as error:
        raise ConfigError(f"control=True: without TTT this run cannot be trained: {error}") from error
    return own


def is_finished(args: TrainArgs) -> bool:
    """Whether the run of `args` has done all its steps, its last evaluation and its last checkpoint."""
    run_dir = Path(args.run_dir)

    def done(kind: str) -> bool:
        entries = read_metrics(run_dir / f"metrics.{kind}.jsonl")
        return bool(entries) and entries[-1]["step"] >= args.max_steps

    saved = not args.do_ckpt or max(list_checkpoints(run_dir / "checkpoints"), default=-1) >= args.max_steps
    return saved and done("train") and (not args.do_eval or done("eval"))


def compared(run_dir: Path) -> list[dict[str, Any]]:
    """For each step that the run in `run_dir` and its control have both evaluated: what `compare` returns.

    Empty without a control, and for held-out data that are not the same in both.
    """
    ours, theirs = (_shares_by_step(folder) for folder in (run_dir, run_dir / CONTROL_FOLDER))
    found = [{"step": step} | compare(ours[step], theirs[step]) for step in ours if step in theirs]
    return [entry for entry in found if DIFFERENCE in entry]


def compare(with_ttt: Shares, without: Shares) -> dict[str, float]:
    """`control_difference`, and `control_difference_error` from enough recordings; empty for other recordings."""
    return difference(DIFFERENCE, with_ttt, without) if with_ttt.keys() == without.keys() else {}


def compare_now(args: TrainArgs, step: int, shares: Shares) -> dict[str, float]:
    """`compare` for an evaluation of `args` at `step`, whichever of the two runs it is; empty without the other."""
    run_dir = Path(args.run_dir)
    other = _shares_by_step(run_dir.parent if args.ttt.as_control else run_dir / CONTROL_FOLDER).get(step, {})
    return compare(other, shares) if args.ttt.as_control else compare(shares, other)


def _shares_by_step(run_dir: Path) -> dict[int, Shares]:
    """Of each evaluation; without those in which a recording had no finite loss."""
    entries = read_metrics(run_dir / "metrics.recordings.jsonl")
    known = {entry["step"]: entry["shares"] for entry in entries if isinstance(entry.get("shares"), dict)}
    return {step: shares for step, shares in known.items() if all(isinstance(one, float) for one in shares.values())}


def _beginning(init_from: str) -> str:
    """Where the control of a run begins that continues another one: at the other's control, at the same step."""
    weights = find_weights(Path(init_from), "init_from")
    settings = weights.with_name("config.json")
    if settings.is_file() and not read_json(settings).get("ttt_enabled"):
        return init_from  # trained without TTT: a beginning for both
    folder = next((folder for folder in weights.parents if folder.name == "checkpoints"), weights.parent)
    control = folder.parent / CONTROL_FOLDER
    given_run = Path(init_from).resolve() == folder.parent.resolve()
    own = control if given_run else control / weights.relative_to(folder.parent).parent
    if (own / "checkpoints" if given_run else own).is_dir():
        return str(own)
    raise ConfigError(
        f"control=True: init_from={init_from!r} was trained with TTT, and {own}, where its control would be to begin "
        "from, is no checkpoint; train that first (control=true in that run), or set control to false."
    )


def check_control(args: TrainArgs) -> None:
    """That the base model can be trained with `args`, those of a control, as far as its files say; reads no weights.

    Raises:
        ConfigError: when it cannot, such as a base model that has TTT itself.
    """
    try:
        check_base(find_base_files(args.moshi_paths, weights=False), args)
    except ConfigError as error:
        raise ConfigError(f"control=True: {error}") from error
