"""`/api/chat` for many people: who may come in, and for whom what the model's thread says is."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from aiohttp import WSCloseCode, web

from ..engine.codec import Codecs
from ..engine.person import End, Person
from ..engine.sampler import Sampling
from ..engine.tick import Engine, Notices
from .closing import CLOSE_S
from .limits import Limits, TooManyError
from .line import Line
from .session import Session, refuse
from .tickets import Tickets
from .wishes import read_wishes

logger = logging.getLogger(__name__)

CHAT_PATH = "/api/chat"
ONLY_NAME = "local"
"""Of the one person whose memory is kept where nobody has a name."""

LOOK_EVERY_S = 2.0
"""Seconds between two looks at who still has a token."""


class Front:
    """The conversations of one server.

    Args:
        text_of: the text of a token.
        tickets: of people who have names; None: nobody has one. If something is kept then, it is kept as one person's,
            and who comes while that one talks is a guest, of whom nothing is kept.
        limits: how much one person or address may have; None: everything.
        sampling: of who asks for nothing else.
    """

    def __init__(
        self,
        engine: Engine,
        codecs: Codecs,
        text_of: Callable[[int], str],
        tickets: Tickets | None = None,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
    ):
        self.engine, self.codecs, self.text_of, self.tickets, self.limits = engine, codecs, text_of, tickets, limits
        self.sampling = sampling or Sampling()
        self.sessions: dict[Person, Session] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: asyncio.Task | None = None

    def attach(self, app: web.Application) -> None:
        """Serves :data:`CHAT_PATH` in `app`, which is not yet running. The engine begins and ends with it."""
        app.router.add_get(CHAT_PATH, self.chat)
        app.on_startup.append(self._start)
        app.on_shutdown.append(self._stop)

    async def _start(self, app: web.Application) -> None:
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self.engine.start, self._notify)
        if self.tickets is not None:
            self._watch = asyncio.create_task(self._end_the_revoked(self.tickets))

    async def _end_the_revoked(self, tickets: Tickets) -> None:
        """Who is taken out of the token file talks no longer; what they have taught is kept."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for person, session in list(self.sessions.items()):
                if person.name is not None and not tickets.knows(person.name):
                    session.end(WSCloseCode.POLICY_VIOLATION, "your token was taken back")

    async def _stop(self, app: web.Application) -> None:
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.to_thread(self.engine.stop)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_gone(), CLOSE_S)
        self.codecs.shut_down()

    async def _all_gone(self) -> None:
        while self.sessions:
            await asyncio.sleep(0.01)

    def _notify(self, notices: Notices) -> None:
        """Called by the model's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._deliver, notices)

    def _deliver(self, notices: Notices) -> None:
        for person, notice in notices:
            session = self.sessions.get(person)
            if session:
                session.hand(notice)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """One person, from the handshake of the websocket to its end."""
        line = await Line.open(request, self.engine.policy)
        try:
            wishes = read_wishes(request.query, self.sampling)
            name = self._name(request)
            person = Person(wishes.sampling, name, wishes.metadata, guest=self.tickets is None)
            with self._counted(request, name):
                end = await self._converse(person, line)
        except (ValueError, PermissionError, TooManyError) as error:
            end = End(WSCloseCode.POLICY_VIOLATION, str(error))
        line.give_back()
        await refuse(request, line.websocket, end.code, end.reason)
        return line.websocket

    def _name(self, request: web.Request) -> str | None:
        if self.tickets is None:
            return ONLY_NAME if self.engine.memories else None
        name = self.tickets.redeem(request.query.get("ticket", ""))
        if name is None:
            raise PermissionError("ticket: is missing, wrong, used or too old; get one with your token")
        return name

    def _counted(self, request: web.Request, name: str | None) -> contextlib.AbstractContextManager:
        if self.limits is None:
            return contextlib.nullcontext()
        return self.limits.conversation(name if self.tickets else None, self.limits.address(request))

    async def _converse(self, person: Person, line: Line) -> End:
        if not self.engine.enter(person):
            why = "this server is about to stop" if self.engine.draining else "all places are taken, come again"
            return End(WSCloseCode.TRY_AGAIN_LATER, why)
        session = Session(self.engine, self.codecs, self.text_of, person, line)
        self.sessions[person] = session
        try:
            return await session.run()
        finally:
            self.engine.leave(person)
            del self.sessions[person]
            self.codecs.close(session.codec)
