"""Which checkpoint of a run has the lowest held-out loss: `RUN_DIR/checkpoints/best.json` says it."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..common.disk import writing
from ..common.errors import ConfigError
from ..common.files import read_json, write_json

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
