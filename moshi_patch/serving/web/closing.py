"""How a websocket ends: with a code and a reason, or cut, if whoever is on the other side does not read them."""

import asyncio
import contextlib

from aiohttp import web

CLOSE_S = 5.0
"""Seconds that somebody has to read why they were sent away."""


async def close_or_cut(
    request: web.Request, socket: web.WebSocketResponse | None, code: int, reason: str, message: bytes = b""
) -> None:
    """Closes the websocket of `request`, or cuts its connection.

    Args:
        socket: None, if there is none yet.
        reason: of which the first 123 bytes are told: a close frame holds no more.
        message: sent before; empty: none.
    """
    if socket is not None and socket.prepared:
        with contextlib.suppress(asyncio.TimeoutError, ConnectionError):
            await asyncio.wait_for(_close(socket, code, reason, message), CLOSE_S)
            return
    if request.transport is not None:
        request.transport.abort()


async def _close(socket: web.WebSocketResponse, code: int, reason: str, message: bytes) -> None:
    if message and not socket.closed:
        await socket.send_bytes(message)
    await socket.close(code=code, message=reason.encode()[:123].decode(errors="ignore").encode())
