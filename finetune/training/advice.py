"""What the evaluations of a run advise: the held-out loss first, then what TTT's updates do to it."""

import logging

from ..settings.schema import RATES

logger = logging.getLogger(__name__)

RISE = 0.01
"""From this share above its best on, the held-out loss has risen; within it, it is flat."""

CLEAR_ERRORS, CLEAR_NATS = 4.0, 1e-4
"""A reliance counts from so many standard errors, and from so many nats: less is rounding. Runs that cannot learn
stayed below 3 errors (docs/evidence_plateau.md)."""

ADVICE = {
    "rising": "the run unlearns more than it learns, whatever updates do. Lower optim.lr, train on more data or for "
    "fewer steps; the best step is what to use.",
    "falling": "the held-out loss falls, and these weights predict better with updates; go on.",
    "plateau": "these weights predict better with updates, and the held-out loss does not fall: the plateau before "
    "memory sets in. Go on while the reliance grows.",
    "hollow": "no gain: these weights got worse without updates, and no better with them. Only a control says what TTT "
    "gains (control: true); if the loss stays, lower optim.lr.",
    "dead": "nothing that can be told from chance. That should change well before the loss falls; if it never does, "
    "see whether relative_delta rises, and whether what is to be remembered returns after more than a chunk.",
    "harmed": "they do harm at present. Early on that is usual; if it stays, lower ttt.{rate}.",
}


class Advice:
    """Looks at each evaluation and logs what it means, whenever that changes.

    The loss may stay where it is for thousands of steps before memory sets in. On the same recordings the difference
    that updates make is known far better than the loss, and shows first. It says nothing while the loss rises, and
    never what TTT gains: weights come to lean on updates, and only a control that was trained without shows that.

    Args:
        kind: of memory, whose learning rate is advised on.
    """

    def __init__(self, kind: str = "in_place"):
        self._rate = RATES[kind]
        self._best: tuple[float, int] | None = None
        self._best_off: tuple[float, int] | None = None
        self._last, self._told = "", 0.0

    def remember(self, step: int, loss: float, updates_off: float | None = None) -> None:
        """Takes note of the losses of an earlier evaluation, of which there is nothing more to say."""
        if self._best is None or loss < self._best[0]:
            self._best = (loss, step)
        if updates_off is not None and (self._best_off is None or updates_off < self._best_off[0]):
            self._best_off = (updates_off, step)

    def observe(self, step: int, values: dict[str, float]) -> str:
        """The finding after `step`, a key of `ADVICE`, or "" when nothing is known yet.

        Args:
            values: of an evaluation; those of a model without TTT hold no `ttt_reliance_error`.
        """
        loss, off, best, best_off = values["loss"], values.get("loss_updates_off"), self._best, self._best_off
        self.remember(step, loss, off)
        rising = best is not None and not loss <= best[0] * (1 + RISE)
        flat = best is not None and loss > best[0] * (1 - RISE)
        reliance, error = values.get("ttt_reliance"), values.get("ttt_reliance_error")
        if rising:
            self._tell("rising", loss - best[0], "Step %d: the held-out loss rose from %.4g (step %d) to %.4g: %s",
                       step, best[0], best[1], loss)  # fmt: skip
            return "rising"
        if error is None:
            self._last = ""
            return ""
        worse_off = None not in (off, best_off) and off > best_off[0] * (1 + RISE)
        clear = abs(reliance) > CLEAR_ERRORS * error and abs(reliance) >= CLEAR_NATS
        finding = "dead" if not clear else "harmed" if reliance > 0 else "plateau" if flat else "falling"
        if finding == "plateau" and worse_off:
            said = "Step %d: the loss without updates rose from %.4g (step %d) to %.4g, and with them it stays: %s"
            self._tell("hollow", off - best_off[0], said, step, best_off[0], best_off[1], off)
            return "hollow"
        self._tell(finding, abs(reliance), "Step %d: updates change the loss of these weights by %.2g ± %.1g nats: %s",
                   step, reliance, error)  # fmt: skip
        return finding

    def _tell(self, finding: str, size: float, said: str, *values: float) -> None:
        """Logs a finding that is new, or twice as large as when it was last told."""
        if finding != self._last or (finding != "dead" and size >= 2 * self._told):
            self._last, self._told = finding, size
            level = logging.WARNING if finding in ("rising", "harmed", "hollow") else logging.INFO
            logger.log(level, said, *values, ADVICE[finding].format(rate=self._rate))
