"""Which checkpoint of a run has the lowest held-out loss: `RUN_DIR/checkpoints/best.json` says it."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..common.disk import writing
from ..common.errors import ConfigError
from ..common.files import read_json, write_json
from .folders import list_checkpoints

BEST_FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """The step of a checkpoint, and its held-out loss in nats."""

    step: int
    loss: float


def read_best(folder: Path) -> Best | None:
    """The best of the checkpoints in `folder`, `RUN_DIR/checkpoints`; None when none is recorded or readable."""
    try:
        content = read_json(folder / BEST_FILE)
    except ConfigError:
        return None
    step, loss = content.get("step"), content.get("loss")
    known = isinstance(step, int) and isinstance(loss, (int, float)) and math.isfinite(loss)
    return Best(step, float(loss)) if known else None


def best_checkpoint(run_dir: Path, key: str) -> Path:
    """The checkpoint of a run with the lowest held-out loss.

    Raises:
        ConfigError: when none is recorded, or it is gone; names `key`, the setting that `run_dir` is the value of.
    """
    folder = run_dir / "checkpoints"
    best, there = read_best(folder), list_checkpoints(folder)
    if best is None:
        raise ConfigError(
            f"{key}={str(run_dir)!r}: {folder / BEST_FILE} says no best step (--best). It must be the folder of a run "
            "that was trained with do_eval and keep_best."
        )
    if best.step not in there:
        raise ConfigError(
            f"{key}={str(run_dir)!r}: the best step is {best.step} (--best), whose checkpoint is gone; there are "
            f"{', '.join(map(str, there)) or 'none'}."
        )
    return there[best.step]


def write_best(folder: Path, best: Best | None) -> None:
    """Records `best`, or that there is none.

    Raises:
        DiskError: when it cannot be written.
    """
    path = folder / BEST_FILE
    with writing(path):
        if best is not None:
            write_json(path, asdict(best))
        else:
            path.unlink(missing_ok=True)
