"""A memory that grows beyond what a healthy run shows: a warning while it trains, and suspects when a run diverges."""

import logging
import math
from collections.abc import Mapping

from ..settings.schema import RATES, TrainArgs

logger = logging.getLogger(__name__)

EXPLODED_ABOVE = {"in_place": 15.0, "mlp": 1000.0}
"""By kind of memory: a relative delta above this is no healthy run's. docs/training.md (*Troubleshooting*) has what was
measured."""


def relative_deltas(values: Mapping[str, float | None]) -> dict[str, float]:
    """Of what `Activity.values` returned, or a line of metrics, by layer; one that is null there is NaN."""
    found = {key: value for key, value in values.items() if key.endswith("/relative_delta")}
    return {key.split("/")[1]: math.nan if value is None else value for key, value in found.items()}


def exploded(values: Mapping[str, float | None], kind: str) -> dict[str, float]:
    """The relative deltas that no healthy run shows, by layer."""
    return {layer: value for layer, value in relative_deltas(values).items() if not value <= EXPLODED_ABOVE[kind]}


class ExplosionWatch:
    """Warns once when a layer's relative delta is beyond `EXPLODED_ABOVE` or no number, and again after it was well."""

    def __init__(self, args: TrainArgs):
        self._ttt = args.ttt
        self._warned = False

    def observe(self, step: int, values: Mapping[str, float]) -> bool:
        """Looks at what `Activity.values` returned after `step`; returns whether it warned."""
        found = exploded(values, self._ttt.kind)
        warns, self._warned = bool(found) and not self._warned, bool(found)
        if warns:
            rate = RATES[self._ttt.kind]
            logger.warning(
                "Step %d: the memory explodes: in %s a sequence changes the fast weights by %s times the norm of the "
                "weights they began with, and up to %g is healthy. Lower ttt.%s (%g).%s",
                step,
                ", ".join(found),
                ", ".join(f"{value:.3g}" for value in found.values()),
                EXPLODED_ABOVE[self._ttt.kind],
                rate,
                getattr(self._ttt, rate),
                " Or set ttt.update: residual, which saturates." * (self._ttt.kind == "in_place"),
            )
        return warns


def suspects(args: TrainArgs, grad_norm: tuple[int, float] | None, deltas: Mapping[str, float]) -> str:
    """What a run that diverged may be due to, with the last norms; a sentence or two.

    Args:
        grad_norm: the last finite gradient norm, and its step.
        deltas: the last relative delta of each layer.
    """
    names = [f"optim.lr={args.optim.lr:g}"]
    if args.ttt.enabled:
        rate = RATES[args.ttt.kind]
        names.insert(0, f"ttt.{rate}={getattr(args.ttt, rate):g}")
    names.append(f"max_norm={args.max_norm:g}")
    norms = [] if grad_norm is None else [f"gradient {grad_norm[1]:.3g} (step {grad_norm[0]})"]
    if deltas:
        norms.append("relative delta " + ", ".join(f"{layer} {value:.3g}" for layer, value in deltas.items()))
    return f"Suspects: {', '.join(names)}." + (f" Last norms: {'; '.join(norms)}." if norms else "")
