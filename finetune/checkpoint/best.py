"""Which checkpoint of a run has the lowest held-out loss: `RUN_DIR/checkpoints/best.json` says it."""

import sys
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
    known = isinstance(step, int) and isinstance(loss, (int, float)) and abs(loss) <= sys.float_info.max
    return Best(step, float(loss)) if known else None


def best_beside(checkpoint: Path) -> tuple[Best, Path | None] | None:
    """The best of the run that `checkpoint`, a folder of one, belongs to, and its folder, if it is still there.

    None when it belongs to no run, or to one without a record.
    """
    folder = checkpoint.resolve().parent
    best = read_best(folder) if folder.name == "checkpoints" else None
    return None if best is None else (best, list_checkpoints(folder).get(best.step))


def best_checkpoint(run: Path) -> Path:
    """The folder of the best checkpoint of a run.

    Raises:
        ConfigError: when `run` is not a run's folder, or has no such checkpoint; says what it has.
    """
    folder = run / "checkpoints"
    found, best = list_checkpoints(folder), read_best(folder)
    if best is not None and best.step in found:
        return found[best.step]
    if not found:
        raise ConfigError(f"best=True: {run} is no run with checkpoints, of which one could be the best.")
    steps = ", ".join(map(str, found))
    reason = f"step {best.step} was, and is not there any more" if best else "none is recorded, as without do_eval"
    raise ConfigError(
        f"best=True: which checkpoint of {run} has the lowest held-out loss? {reason}; there are {steps}."
    )


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
