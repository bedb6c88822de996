"""Serves an application in this event loop, as the servers' programs do."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web


@contextlib.asynccontextmanager
async def listening(app: web.Application, **options: Any) -> AsyncIterator[tuple[str, int]]:
    """Host and port, on this machine, where `app` answers until the end of the block.

    Args:
        options: of `AppRunner`. aiohttp's own server for tests cancels handlers, which the programs do not.
    """
    runner = web.AppRunner(app, **options)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0]
    finally:
        await runner.cleanup()
