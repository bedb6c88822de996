"""What a run came to: its losses, its control, where everything is, a verdict in one sentence, and what to do next."""

import itertools
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..checkpoint.best import read_best
from ..checkpoint.folders import checkpoint_name, list_checkpoints
from ..common.commands import command, program_words, torchrun_words
from ..settings.schema import RATES, TrainArgs
from .activity import INACTIVE_BELOW
from .advice import CLEAR_NATS, RISE
from .control import CONTROL_FOLDER, DIFFERENCE, compared
from .metrics import read_metrics

CLEAR_ERRORS = 3.0
"""A difference between two runs counts from so many standard errors, with as few as five recordings."""

MEASURED = (
    "Nothing was trained and nothing is saved (training_mode: frozen); these are the losses of the model as it is."
)


@dataclass(frozen=True)
class Verdict:
    """What is known of TTT in a run.

    Args:
        kind: `helped`, `harmed`, `control rose`, `chance`, `dead`, `exploded`, `no control`, `no evaluation`,
            `without TTT`, or `frozen`.
        sentence: the same in words.
    """

    kind: str
    sentence: str


def verdict(
    train: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    differences: list[dict[str, Any]],
    control: Sequence[dict[str, Any]] = (),
    kind: str = "in_place",
) -> Verdict:
    """What the metrics of a run, and its differences to its control, let one say.

    Args:
        train, held_out: entries of the metrics of the run.
        differences: as from `control.compared`.
        control: entries of the evaluations of the control.
        kind: of memory.
    """
    relative = [value for name, value in (train[-1] if train else {}).items() if name.endswith("/relative_delta")]
    if not relative:
        return Verdict("without TTT", "This run has no TTT.")
    if all(value is not None and value < INACTIVE_BELOW for value in relative):
        return Verdict(
            "dead",
            f"TTT is dead: its fast weights change by less than {INACTIVE_BELOW:g} of the norm that they begin with. "
            f"Raise ttt.optim_lr, then ttt.{RATES[kind]}.",
        )
    if any(value is None for value in relative):
        return Verdict(
            "exploded", f"TTT exploded: how far its fast weights moved is no number any more. Lower ttt.{RATES[kind]}."
        )
    if differences:
        last = differences[-1]
        found = _of_difference(last["step"], last[DIFFERENCE], last.get(f"{DIFFERENCE}_error"))
        return _unless_control_rose(found, last["step"], _known(held_out), _known(control))
    if not held_out:
        return Verdict("no evaluation", "Whether TTT helps is not known: nothing was held out (do_eval: false).")
    reliance = held_out[-1].get("ttt_reliance")
    leans = (
        "" if reliance is None else f" (That these weights lose {-reliance:.3g} nats without updates shows nothing.)"
    )
    return Verdict(
        "no control",
        f"Whether TTT helps is not known: no control was trained.{leans} To train one:",
    )


def _of_difference(step: int, difference: float, error: float | None) -> Verdict:
    size = f"{difference:+.3g}{f' ± {error:.1g}' if error is not None else ''} nats at step {step}"
    if error is None:
        return Verdict("chance", f"Not told from chance: {size}, from fewer than five held-out recordings.")
    if abs(difference) <= CLEAR_ERRORS * error or abs(difference) < CLEAR_NATS:
        return Verdict("chance", f"Not told from chance: with TTT the held-out loss differs by {size} from without.")
    if difference < 0:
        return Verdict("helped", f"TTT helped: the held-out loss is lower than trained without, {size}.")
    return Verdict("harmed", f"TTT harmed: the held-out loss is higher than trained without, {size}.")


def _unless_control_rose(
    found: Verdict, step: int, held_out: list[dict[str, Any]], control: list[dict[str, Any]]
) -> Verdict:
    """`found`, but for a gain that the control makes by getting worse: at their best the two are no different."""
    at = [entry["loss"] for entry in control if entry["step"] == step]
    if found.kind != "helped" or not at or not held_out:
        return found
    ours, theirs = (min(entries, key=lambda entry: entry["loss"]) for entries in (held_out, control))
    if at[0] <= theirs["loss"] * (1 + RISE) or ours["loss"] < theirs["loss"]:
        return found
    return Verdict(
        "control rose",
        f"No gain is shown: the loss trained without TTT rose from {theirs['loss']:.4g} (step {theirs['step']}) to "
        f"{at[0]:.4g} at step {step}, where it is compared; at its best the run with TTT has {ours['loss']:.4g} (step "
        f"{ours['step']}). Train for fewer steps, or on more data.",
    )


def _known(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations whose loss is finite."""
    return [entry for entry in entries if isinstance(entry.get("loss"), float)]


def summary(args: TrainArgs, seconds: float, world_size: int) -> str:
    """The end of a run, in lines, from what lies in its folder.

    Args:
        seconds: that this process took.
    """
    run_dir = Path(args.run_dir)
    train, held_out = (read_metrics(run_dir / f"metrics.{kind}.jsonl") for kind in ("train", "eval"))
    control, differences = read_metrics(run_dir / CONTROL_FOLDER / "metrics.eval.jsonl"), compared(run_dir)
    step = train[-1]["step"] if train else 0
    rows = {"run": f"{run_dir}: {step} steps, {timedelta(seconds=round(seconds))} in this process"}
    if held_out:
        rows["held-out loss"] = _losses(held_out)
    if control:
        rows["trained without TTT"] = _losses(control)
    if differences:
        last = differences[-1]
        error = last.get(f"{DIFFERENCE}_error")
        spread = f" ± {error:.2g}" if error is not None else ""
        rows["with TTT − without"] = (
            f"{last[DIFFERENCE]:+.4g}{spread} nats at step {last['step']} (negative: TTT is better)"
        )
    chosen = chosen_checkpoint(run_dir)
    if chosen is not None:
        rows["checkpoint"] = f"{chosen[0]} ({chosen[1]})"
    rows["curves"] = str(run_dir / "report.png")
    width = max(map(len, rows))
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows.items()]
    frozen = args.training_mode == "frozen"
    said = Verdict("frozen", MEASURED) if frozen else verdict(train, held_out, differences, control, args.ttt.kind)
    lines += ["", said.sentence]
    if said.kind == "no control":
        lines.append(f"  {resume_command(args, world_size)} --control")
    lines.append("")
    if chosen is not None:
        lines += ["Next:", *(f"  {line}" for line in next_commands(args, chosen[0]))]
    if not frozen:
        lines += ["More steps:", f"  {resume_command(args, world_size)} --max_steps {2 * args.max_steps}"]
    return "\n".join(lines)


def chosen_checkpoint(run_dir: Path) -> tuple[Path, str] | None:
    """The checkpoint to use, and why: the one with the best held-out loss, or else the newest; None without any."""
    folder = run_dir / "checkpoints"
    there, best = list_checkpoints(folder), read_best(folder)
    if not there:
        return None
    if best is not None and best.step in there:
        return folder / checkpoint_name(best.step), f"best held-out loss, {best.loss:.4f}"
    return list(there.values())[-1], "the newest"


def next_commands(args: TrainArgs, checkpoint: Path) -> list[str]:
    """Evaluate, check, export: three commands that run as printed from this working directory."""
    run_dir, paths = Path(args.run_dir), args.moshi_paths
    local_base = paths.moshi_path is not None or Path(paths.hf_repo_id or "").is_dir()
    merge = ["--merge"] if args.lora.enable and args.save_adapters and local_base else []  # others could not find it
    names = (f"export_{checkpoint.name}" + f"-{number}" * (number > 1) for number in itertools.count(1))
    free = next(run_dir / name for name in names if not (run_dir / name).exists())
    found = [command("doctor", checkpoint), command("export", checkpoint, free, *merge)]
    if args.do_eval:  # otherwise nothing is known of held-out data
        control = (
            ["--baseline", run_dir / CONTROL_FOLDER]
            if list_checkpoints(run_dir / CONTROL_FOLDER / "checkpoints")
            else []
        )
        found.insert(0, command("evaluate", "--checkpoint_dir", checkpoint, *control))
    return found


def resume_command(args: TrainArgs, world_size: int) -> str:
    """Continues the run of `args`, for a control the run that it belongs to, from here and on as many processes."""
    folder = Path(args.run_dir)
    if args.ttt.as_control and (folder.parent / "args.yaml").is_file():
        folder = folder.parent
    words = torchrun_words(world_size) if world_size > 1 else program_words("train")
    return shlex.join([*words, str(folder / "args.yaml"), "--resume"])


def _losses(entries: list[dict[str, Any]]) -> str:
    known = _known(entries)
    if not known:
        return "not finite"
    best, last = min(known, key=lambda entry: entry["loss"]), known[-1]
    return f"best {best['loss']:.4f} at step {best['step']}, last {last['loss']:.4f} at step {last['step']}"
