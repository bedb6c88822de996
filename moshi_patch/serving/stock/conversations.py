"""A stock server's conversations, one at a time, each with an end, a status and, if asked for, a memory.

The server steps its model in the event loop's own thread, and everything here runs in that thread too, between two
steps: nothing is read while it is being written.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import WSCloseCode, web
from torch import nn

from ...model import finite_rows, ttt_memories, ttt_stats
from ..engine.ogg import cut_messages
from ..engine.percentiles import percentiles
from ..engine.policy import Policy
from ..web.closing import close_or_cut
from .kept_memory import KeptMemory

logger = logging.getLogger(__name__)

STATUS_PATH = "/api/ttt"
WEBSOCKET_KEY = "moshi_patch.socket"
"""Key of a request under which its websocket can be found, once there is one."""

NEWCOMER_WAITS_S = Policy.name_s
"""Seconds that a newcomer waits for the place of the one before, as when a page is reloaded, before it is told busy."""

STATUS_KEPT_S = 1.0
"""Seconds for which a status is given again: reading one waits for the device and builds the delta of each layer."""

RECENT_STEPS = 32_768
"""Steps of one connection, the latest 43 minutes, over which the percentiles are taken."""


class NotFiniteError(Exception):
    """What the model answers is not finite any more, and stays so until its state is reset."""


class MemoryUnusableError(Exception):
    """The memory cannot be loaded; the text says why."""


@dataclass(eq=False)
class Connection:
    """The conversation in progress.

    Attributes:
        request: what the client opened it with.
        ready: whether its stream has begun: before that, the model still holds the previous one.
        steps: of the model so far.
        last: when the last step ended, or the connection was accepted, as `time.perf_counter()` has it.
        answered: steps that were answered, and so timed.
        failed: whether a step raised an error and left the fast weights in an unknown state.
    """

    request: web.Request
    ready: bool = False
    steps: int = 0
    last: float = field(default_factory=time.perf_counter)
    answered: int = 0
    failed: bool = False


class Conversations:
    """What this package adds to moshi's own server.

    Args:
        handle_chat: the method of moshi's `ServerState` that answers a client.
        memory: what every conversation goes on with; None: each starts fresh.
        idle_timeout: seconds without a step after which a client loses its place; 0: never.

    Raises:
        ValueError, OSError: when `memory` cannot be continued with this model, with the reason.
    """

    def __init__(self, handle_chat: Any, memory: KeptMemory | None = None, idle_timeout: float = 30.0):
        self.handle_chat, self.memory, self.idle_timeout = handle_chat, memory, idle_timeout
        self.server = handle_chat.__self__
        self.model = self.server.lm_gen.lm_model
        self.slot = asyncio.Lock()
        self.reading = asyncio.Lock()
        self.connection: Connection | None = None
        self.started = time.perf_counter()
        self.times = np.zeros(RECENT_STEPS, np.float32)  # a ring: seconds per answered step of this connection
        self.status: dict[str, Any] = {}
        self.status_read = float("-inf")
        self.has_ttt = bool(ttt_memories(self.model))
        if memory:
            memory.check(self.model)

    def attach(self, app: web.Application) -> None:
        """Take over the conversations of `app`, which is not yet running."""
        self._wrap_step()
        self._wrap_reset()
        app.middlewares.append(self._middleware)
        app.on_response_prepare.append(self._remember_socket)
        app.on_shutdown.append(self._shut_down)
        app.router.add_get(STATUS_PATH, self._get_status)

    def _wrap_step(self) -> None:
        stock_step, stock_send = self.server.lm_gen.step, self.server.decode_and_send
        begin = 0.0

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal begin
            begin = time.perf_counter()
            try:
                out = stock_step(*args, **kwargs)
            except BaseException:
                self.connection.failed = True
                raise
            self.connection.steps += 1
            self.connection.last = time.perf_counter()
            if self.has_ttt and not finite_rows(self.model).all():
                self.connection.failed = True
                raise NotFiniteError
            return out

        async def decode_and_send(*args: Any, **kwargs: Any) -> None:
            await stock_send(*args, **kwargs)
            connection = self.connection
            self.times[connection.answered % RECENT_STEPS] = time.perf_counter() - begin
            connection.answered += 1
            # A client that sends faster than the model answers must not keep everybody else from being heard.
            await asyncio.sleep(0)

        self.server.lm_gen.step, self.server.decode_and_send = step, decode_and_send

    def _wrap_reset(self) -> None:
        stock_reset = self.server.lm_gen.reset_streaming

        def reset_streaming(*args: Any, **kwargs: Any) -> None:
            stock_reset(*args, **kwargs)
            if self.memory:
                try:
                    self.memory.load(self.model)
                except (ValueError, OSError) as error:
                    raise MemoryUnusableError(str(error)) from error
            self.connection.ready = True

        self.server.lm_gen.reset_streaming = reset_streaming

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.match_info.handler != self.handle_chat:
            return await handler(request)
        try:
            await asyncio.wait_for(self.slot.acquire(), NEWCOMER_WAITS_S)
        except asyncio.TimeoutError:
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            reason = b"busy: another conversation is in progress, try again later"
            await socket.close(code=WSCloseCode.TRY_AGAIN_LATER, message=reason)
            return socket
        try:
            code, reason = await self._converse(request, handler)
        finally:
            self.slot.release()
        await close_or_cut(request, request.get(WEBSOCKET_KEY), code, reason)
        return request[WEBSOCKET_KEY]

    async def _converse(self, request: web.Request, handler: Any) -> tuple[int, str]:
        """One conversation from its beginning to its end, whatever ends it. Returns how to take leave."""
        connection = self.connection = Connection(request)
        watchdog = asyncio.create_task(self._hang_up_when_idle(connection))
        try:
            await handler(request)
        except Exception as error:
            if WEBSOCKET_KEY not in request:
                raise  # it never became a conversation
            if isinstance(error, ConnectionError):
                logger.info("The client vanished: %s", error)
            elif isinstance(error, NotFiniteError):
                logger.error("A conversation ended, as its fast weights or caches were not finite any more.")
                kept = "what was saved last goes on" if self.memory else "starts fresh"
                return WSCloseCode.INTERNAL_ERROR, f"the model's numbers are not finite any more; the next one {kept}"
            elif isinstance(error, MemoryUnusableError):
                logger.error("%s", error)
                return WSCloseCode.INTERNAL_ERROR, "the memory of this server cannot be loaded; its log says why"
            elif isinstance(error, ValueError) and connection.ready and not connection.failed:
                logger.warning("The client sent what is no Opus in Ogg: %s", error)
                return WSCloseCode.INVALID_TEXT, f"the audio is not Opus in Ogg: {error}"
            else:
                logger.exception("A conversation ended with an error.")
                return WSCloseCode.INTERNAL_ERROR, f"error in the server: {type(error).__name__}"
        finally:
            watchdog.cancel()
            self.connection = None
            self._keep_memory(connection)
        return WSCloseCode.OK, ""

    def _keep_memory(self, connection: Connection) -> None:
        if not self.memory or not connection.steps:
            return
        if connection.failed:
            self.memory.not_saved("a step failed.")
        else:
            self.memory.save(self.model)

    async def _hang_up_when_idle(self, connection: Connection) -> None:
        timeout = self.idle_timeout
        if not timeout:
            return
        while (left := connection.last + timeout - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        logger.warning("The client said nothing for %g s and lost its place.", timeout)
        await self._hang_up(connection, WSCloseCode.POLICY_VIOLATION, f"no audio for {timeout:g} s")

    async def _hang_up(self, connection: Connection, code: int, reason: str) -> None:
        await close_or_cut(connection.request, connection.request.get(WEBSOCKET_KEY), code, reason)

    async def _remember_socket(self, request: web.Request, response: web.StreamResponse) -> None:
        if isinstance(response, web.WebSocketResponse):
            request[WEBSOCKET_KEY] = response
            cut_messages(response)

    async def _shut_down(self, app: web.Application) -> None:
        if self.connection is not None:
            await self._hang_up(self.connection, WSCloseCode.GOING_AWAY, "the server is shut down")

    async def _get_status(self, request: web.Request) -> web.Response:
        async with self.reading:
            if time.perf_counter() - self.status_read >= STATUS_KEPT_S:
                self.status = await self._read_status()
                self.status_read = time.perf_counter()
        return web.json_response(self.status)

    async def _read_status(self) -> dict[str, Any]:
        memories = ttt_memories(self.model)
        config = next(iter(memories.values())).config if memories else None
        while True:
            connection = self.connection if self.connection and self.connection.ready else None
            layers = {}
            for name, memory in memories.items():
                layers[name] = layer_status(memory if connection else None)
                await asyncio.sleep(0)  # a step that is due comes first
            if connection is None or self.connection is connection:
                break  # and otherwise the numbers are of two conversations
        return {
            "enabled": self.has_ttt,
            "settings": config and config.to_kwargs(),
            "connected": connection is not None,
            "steps": connection and connection.steps,
            "step_ms": connection and percentiles(self.times[: connection.answered]),
            "layers": layers,
            "memory": self.memory is not None,
            "uptime_s": round(time.perf_counter() - self.started, 3),
        }


def layer_status(memory: nn.Module | None) -> dict[str, Any]:
    """`updates` and `relative_delta` of the first row that a memory streams; None for no memory or no finite number."""
    if memory is None:
        return {"updates": None, "relative_delta": None}
    (stats,) = ttt_stats(memory).values()
    relative = stats["relative_delta"][0]
    return {"updates": stats["updates"][0], "relative_delta": relative if np.isfinite(relative) else None}
