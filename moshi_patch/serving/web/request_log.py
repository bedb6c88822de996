"""What a server logs; of requests that are no HTTP its libraries log one line, without the secrets in them."""

import logging

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError

LOGGERS = ("aiohttp.server", "asyncio")
WHAT_A_CLIENT_CAN_DO = ("Fatal error: protocol.data_received() call failed", "socket.accept() out of system resource")
"""Beginnings of what asyncio logs, with a traceback of many lines."""


def show_log() -> None:
    """Has what this package logs printed, on a program's standard error, unless it is already.

    That of the web server goes on without what requests hold.
    """
    package = logging.getLogger(__name__.partition(".")[0])
    package.setLevel(logging.INFO)
    keep_requests_out_of_the_log()
    if not package.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        package.addHandler(handler)


def keep_requests_out_of_the_log() -> None:
    """From now on; may be said more than once. What a fault in a handler logs stays as it is.

    aiohttp quotes the line that it cannot read, with the ticket or the token that stands in it.
    """
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_without_request)
    logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)  # it quotes a header of any request as a warning


def _without_request(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ConnectionError) and record.name == "aiohttp.server":
        return False  # who asked is gone, before they were answered: aiohttp passes over most of it itself
    told = record.getMessage().partition("\n")[0]
    if isinstance(error, (HttpProcessingError, RequestPayloadError)) or told.startswith(WHAT_A_CLIENT_CAN_DO):
        status = f"{error.code} " if isinstance(error, HttpProcessingError) else ""
        record.msg, record.args = f"%s: {status}%s", (told, type(error).__name__)
        record.exc_info = record.exc_text = record.stack_info = None
    return True
