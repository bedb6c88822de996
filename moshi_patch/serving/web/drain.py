"""SIGTERM: nobody is let in any more, who talks may end what they say, and nobody is sent away before it is written.

A proxy sends newcomers to another server, as they get 503 before there is a websocket. When the time is over, what each
person has learnt is written first and their websocket is closed after that: where they come next, it is there.
"""

import asyncio
import contextlib
import logging
import signal
import time
from typing import Any

from aiohttp import WSCloseCode, web

from ..engine.person import Person, Stage
from .front import CHAT_PATH, Front, Session

logger = logging.getLogger(__name__)

REASON = "this server is restarted: come again"
WRITE_S = 60.0
"""Seconds that a memory may take to be written before its person is sent away all the same."""

LOOK_EVERY_S = 0.05


class Drain:
    """The end of a server.

    Args:
        front: whose people are sent away.
        seconds: that those who talk may go on.
        closed_paths: what gets 503 from the first signal on.
    """

    def __init__(self, front: Front, seconds: float, closed_paths: tuple[str, ...] = (CHAT_PATH,)):
        self.front, self.engine, self.seconds, self.closed_paths = front, front.engine, seconds, closed_paths
        self._task: asyncio.Task | None = None
        self._hurry = asyncio.Event()

    def attach(self, app: web.Application) -> None:
        """`app` is not yet running."""
        app.middlewares.append(self._middleware)

    def listen(self, app: web.Application) -> None:
        """Has SIGTERM begin the end of a program that `aiohttp.web.run_app` runs. A second one ends the waiting."""

        async def begin(app: web.Application) -> None:
            with contextlib.suppress(NotImplementedError):  # on Windows
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._on_signal)

        app.on_startup.append(begin)

    def hurry(self) -> None:
        """Those who talk may not go on; what they have learnt is written all the same."""
        self._hurry.set()

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if (self.engine.draining or self.engine.failure) and request.path in self.closed_paths:
            raise web.HTTPServiceUnavailable(text="this server is about to stop\n", headers={"Retry-After": "1"})
        return await handler(request)

    def _on_signal(self) -> None:
        if self._task is not None:
            self.hurry()
            return
        self._task = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        try:
            await self.run()
        except Exception:
            logger.exception("The server ends without waiting.")
        finally:
            signal.raise_signal(signal.SIGINT)  # aiohttp's own way out

    async def run(self) -> None:
        """Lets nobody in, waits for those who talk, writes, and sends the rest away."""
        self.engine.drain()
        logger.info("Nobody is let in any more; %d talk, for %g s at most.", len(self.front.sessions), self.seconds)
        deadline = time.monotonic() + self.seconds
        while self.front.sessions and not self._hurry.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_EVERY_S)
        sessions = list(self.front.sessions.items())
        logger.info("%d are sent away.", len(sessions))
        await asyncio.gather(*[self._send_away(person, session) for person, session in sessions])

    async def _send_away(self, person: Person, session: Session) -> None:
        self.engine.leave(person)
        deadline = time.monotonic() + WRITE_S
        while not self._is_kept(person) and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_EVERY_S)
        session.end(WSCloseCode.SERVICE_RESTART, REASON)

    def _is_kept(self, person: Person) -> bool:
        memories = self.engine.memories
        written = person.name is None or memories is None or not memories.busy(person.name)
        return person.stage is Stage.GONE and written
