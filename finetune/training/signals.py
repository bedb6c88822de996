"""SIGTERM and SIGINT: the first one stops a run after its step, saved; the second one ends it at once."""

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType

import torch

from ..common.distributed import sum_over_ranks
from ..common.errors import UserError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

SAME_SECONDS = 2.0
"""Under torchrun, signals so soon after the first are the same one: who stops a job signals torchrun, which passes it
on, and often each process too."""


class Stopped(UserError):
    """A signal ended the run; the message says what was saved and how to continue. Exit code 143 or 130."""

    def __init__(self, message: str, number: int):
        super().__init__(message, number)
        self.message, self.exit_code = message, 128 + number

    def __str__(self) -> str:
        return self.message


def signal_name(number: int) -> str:
    """`SIGTERM` or `SIGINT`."""
    return signal.Signals(number).name


class StopSignals:
    """While it is entered, signals do not end the process.

    Before `finishing` is set there is nothing to save, and a signal raises `Stopped` where the program stands. After
    that it is only remembered, and the run ends when all ranks know, through `votes` or `agreed`.

    Outside of the main thread Python takes no signals, and nothing is done.
    """

    def __init__(self):
        self.finishing = False
        self._number, self._time = 0, 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def votes(self) -> list[float]:
        """What this rank has received, one number for each of `SIGNALS`, to be summed over ranks; see `decided`."""
        return [float(number == self._number) for number in SIGNALS]

    @staticmethod
    def decided(votes: list[float]) -> int:
        """The signal that the sums of all ranks' `votes` stand for; 0 for none."""
        return next((number for number, count in zip(SIGNALS, votes, strict=True) if count > 0), 0)

    def agreed(self) -> int:
        """The signal that any rank has received; 0 for none. Collective, on the CPU."""
        return self.decided(sum_over_ranks(torch.tensor(self.votes())).tolist())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._time < SAME_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._number, self._time = number, time.monotonic()
        name, told_by_others = signal_name(number), os.environ.get("RANK", "0") != "0"
        if not self.finishing:
            if told_by_others:
                raise SystemExit(128 + number)
            raise Stopped(f"{name} while it was starting: nothing is lost; start it again as before.", number)
        if not told_by_others:
            logger.warning("%s: finishing this step, then saving. A second signal ends at once, without saving.", name)
