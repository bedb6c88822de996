"""Where an evaluation's results go, and how they are written: `eval.json`, the plots, the page for the terminal."""

import datetime
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.best import best_beside
from ..checkpoint.saved import SavedCheckpoint
from ..common.checksums import read_checksums
from ..common.commands import command
from ..common.disk import writing
from ..common.distributed import Context
from ..common.errors import ConfigError
from ..common.files import finite_or_none, write_json, write_whole
from ..common.versions import versions
from .baseline import control_of
from .conditions import BENEFIT, ON
from .loss_plot import plot
from .loss_tables import standard_page
from .published.benchmark_plot import plot as benchmark_plot
from .published.benchmark_tables import benchmark_page
from .result_store import CONTINUE
from .settings_in_force import Settings


def out_dir(settings: Settings) -> Path:
    """Where results go: `RUN/eval/checkpoint_000500` for `RUN/checkpoints/checkpoint_000500`, if not set."""
    saved = settings.checkpoint
    if settings.args.out_dir is not None:
        return Path(settings.args.out_dir)
    folder = saved.folder.resolve()
    checkpoint = folder.parent if folder.name == "consolidated" else folder
    return checkpoint / "eval" if saved.run_dir is None else saved.run_dir / "eval" / checkpoint.name


def make_out_dir(folder: Path) -> None:
    """Makes the folder for the results.

    Raises:
        ConfigError: when there can be none of that name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out_dir={str(folder)!r}: no folder can be made there: {error.strerror}.") from error


def heading(settings: Settings, ctx: Context) -> dict[str, Any]:
    """What `eval.json` says beside the results."""
    saved = settings.checkpoint
    return {
        "checkpoint": str(saved.weights.resolve()),
        "step": saved.step,
        "sha256": (read_checksums(saved.folder) or {}).get(saved.weights.name),
        "adapters": saved.adapters,
        "settings": settings.table(),
        "versions": versions(),
        "device": torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else "cpu",
        "world_size": ctx.world_size,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def write_results(folder: Path, content: dict[str, Any], saved: SavedCheckpoint) -> str:
    """Writes `eval.json` and the plots, each whole or not at all, and returns the page.

    Raises:
        DiskError: when the disk is full; what stood in the folder is intact.
    """
    parts = []
    with writing(folder, CONTINUE):
        if "standard" in content:
            write_whole(folder / "eval.png", plot(content["standard"]))
            parts.append(standard_page(content["standard"]))
        if "paper" in content:
            write_whole(folder / "eval_paper.png", benchmark_plot(content["paper"]))
            parts.append(benchmark_page(content["paper"]))
        write_json(folder / "eval.json", finite_or_none(content))
    return "\n\n".join([*parts, "\n".join([*_what_next(content, saved), f"Results are in {folder}.", ""])])


def _what_next(content: dict[str, Any], saved: SavedCheckpoint) -> list[str]:
    """How to get the control that is missing, and the step of the run that is better than this one."""
    lines, run_dir = [], saved.run_dir
    if run_dir is None:
        return lines
    standard = content.get("standard", {"overall": {}, "differences": {}})
    if ON in standard["overall"] and BENEFIT not in standard["differences"]:
        train_it = command("train", run_dir / "args.yaml", "--resume", "--control")
        if control_of(saved) is not None:
            lines.append("The control of the run was left out; without --baseline it is beside it.")
        elif (run_dir / "args.yaml").is_file():
            lines.append(f"No control was trained. Train one: {train_it}")
    best, there = best_beside(saved.folder.parent) or (None, None)
    if best is not None and best.step != saved.step:
        remedy = "it was deleted" if there is None else command("evaluate", "--checkpoint_dir", run_dir, "--best")
        lines.append(f"The best held-out loss of the run is that of step {best.step}, not {saved.step}: {remedy}")
    return lines
