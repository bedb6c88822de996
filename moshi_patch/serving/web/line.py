"""One websocket, and how much of this machine's memory its client can take.

aiohttp holds a frame until all of it is here and only then looks at its length: who announces a terabyte could send it.
"""

import asyncio
import socket
from collections.abc import Callable

from aiohttp import WSMessage, web

from ..engine.policy import Policy

MARGIN_BYTES = 1 << 20
"""More than a message may hold: what stands between two messages in the buffers of aiohttp and asyncio is less."""

QUEUED_BYTES = 256 << 10
"""That may wait to be received. aiohttp has such a limit too, but counts no bytes for an empty ping."""


class Line:
    """A websocket that holds so much of what is on its way in either direction, and no more.

    Attributes:
        websocket: None of its messages may be received past :meth:`receive`.
        policy: how much that is.
    """

    def __init__(self, websocket: web.WebSocketResponse, request: web.Request, policy: Policy):
        self.websocket, self.policy, self._transport = websocket, policy, request.transport
        self._inlet = _Inlet(request.transport, request.protocol, policy.message_bytes + MARGIN_BYTES)

    @classmethod
    async def open(cls, request: web.Request, policy: Policy) -> "Line":
        """Answers the handshake of the websocket.

        Without compression: Opus has none to gain, and 4 KB of it may hold 4 MB. Pings are the receiver's to answer.
        """
        most = policy.message_bytes + 2 * MARGIN_BYTES  # for one whose fragments have pings between them
        websocket = web.WebSocketResponse(max_msg_size=most, compress=False, autoping=False)
        await websocket.prepare(request)
        line = cls(websocket, request, policy)
        if request.transport is not None:  # else the client is gone
            request.transport.set_protocol(line._inlet)
            line._bound_buffers(request.transport)
        return line

    def _bound_buffers(self, transport: asyncio.Transport) -> None:
        """Has the system take no more than that from a client that floods, so that what is read at once is soon seen
        through, and for one that does not read: else it would take megabytes."""
        connection = transport.get_extra_info("socket")
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, self.policy.socket_bytes)

    def on_too_long(self, tell: Callable[[], None]) -> None:
        """Has `tell` called when more has come since the last message than a message may hold."""
        self._inlet.tell = tell

    async def receive(self, timeout: float | None) -> WSMessage:
        """The next message.

        Args:
            timeout: seconds; None: no limit.

        Raises:
            asyncio.TimeoutError: there was none.
        """
        waiting = asyncio.get_running_loop().call_soon(self._inlet.want)  # unless there is one already
        try:
            message = await self.websocket.receive(timeout=timeout)
            self._inlet.unread = 0
            return message
        finally:
            waiting.cancel()
            self._inlet.wanted = False

    def give_back(self) -> None:
        """Nobody receives any more but aiohttp, which reads on until the client has closed its side."""
        self._inlet.want()

    def is_full(self) -> bool:
        """Whether the client does not read, and as much is on its way to it as may be."""
        return self._transport is not None and self._transport.get_write_buffer_size() > self.policy.socket_bytes


class _Inlet(asyncio.Protocol):
    """Counts what comes between two messages, and throws it away above a limit; all else is aiohttp's protocol's.

    Args:
        transport: of the connection; None: it is gone.
        protocol: aiohttp's, of the connection.
        limit: bytes.

    Attributes:
        tell: called for what is thrown away.
        unread: bytes that came since the last message was received.
        wanted: whether somebody waits for a message, as none is there.
    """

    def __init__(self, transport: asyncio.Transport | None, protocol: asyncio.Protocol, limit: int):
        self._transport, self._protocol, self._limit = transport, protocol, limit
        self.tell: Callable[[], None] = lambda: None
        self.unread, self.wanted = 0, False
        self._queued = 0  # bytes that came since nothing was there
        self.connection_made, self.connection_lost = protocol.connection_made, protocol.connection_lost
        self.pause_writing, self.resume_writing = protocol.pause_writing, protocol.resume_writing
        self.eof_received = protocol.eof_received

    def want(self) -> None:
        """Somebody waits for a message, and none is there."""
        self.wanted, self._queued = True, 0
        if self._transport is not None:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self.unread += len(data)
        self._queued += len(data)
        if self.unread > self._limit:
            self.tell()
            return
        self._protocol.data_received(data)
        if self._queued > QUEUED_BYTES and not self.wanted:
            self._transport.pause_reading()
