"""Calls to what may never answer, such as a disk on a network: each in a thread of its own, waited for so long."""

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

MOST_STUCK = 4
"""Calls given up that may still hold their threads; no further one is begun while there are so many."""


class BoundedCalls:
    """Makes calls that end in time, or are given up. From any threads."""

    def __init__(self):
        self._stuck = 0
        self._lock = threading.Lock()

    def call(self, function: Callable[[threading.Event], Result], seconds: float) -> Result:
        """What `function` returns or raises, within `seconds`.

        Args:
            function: its argument is set when the call is given up: it should end then, and change nothing more.

        Raises:
            TimeoutError: when it does not end, or when as many as `MOST_STUCK` earlier calls have not.
        """
        if self._stuck >= MOST_STUCK:
            raise TimeoutError(f"{self._stuck} earlier calls still wait for an answer")
        call = _Call(function)
        thread = threading.Thread(target=self._run, args=(call,), name="memory store", daemon=True)
        thread.start()
        if not call.ended.wait(seconds):
            with self._lock:
                call.given_up.set()
                if not call.ended.is_set():
                    self._stuck += 1
                    call.stuck = True
            if call.stuck:
                raise TimeoutError(f"no answer within {seconds:g} s")
        if call.error is not None:
            raise call.error
        return call.result

    def _run(self, call: "_Call") -> None:
        try:
            call.result = call.function(call.given_up)
        except BaseException as error:
            call.error = error
        with self._lock:
            call.ended.set()
            if call.stuck:
                self._stuck -= 1


class _Call:
    def __init__(self, function: Callable):
        self.function = function
        self.ended, self.given_up = threading.Event(), threading.Event()
        self.stuck = False
        self.result = None
        self.error: BaseException | None = None
