"""What is no HTTP is one line in the log, without ticket or token; faults of the server keep their traceback."""

import asyncio
import contextlib
import logging
import resource

import pytest
from aiohttp import web

from moshi_patch.serving.web.listening import allow_many_connections
from moshi_patch.serving.web.request_log import show_log
from tests.support.listening import listening
from tests.support.many import run

UPGRADE = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
HEAD = b"GET /api/chat?ticket=SECRET HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def request_log(caplog):
    loggers = [logging.getLogger(name) for name in ("aiohttp.server", "asyncio", "aiohttp.websocket")]
    before = [(logger, list(logger.filters), logger.level) for logger in loggers]
    show_log()
    caplog.set_level(logging.DEBUG, logger="aiohttp.server")
    yield caplog
    for logger, filters, level in before:
        logger.filters[:] = filters
        logger.setLevel(level)


def ask(*requests: bytes) -> list[bytes]:
    """The beginnings of the answers of a server that speaks websockets, and fails at `/fault`."""

    async def chat(request):
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        await websocket.close()
        return websocket

    async def gone(request):
        request.transport.abort()
        return await chat(request)

    async def fault(request):
        raise KeyError("a fault")

    async def asking():
        app = web.Application()
        app.add_routes([web.get("/api/chat", chat), web.get("/gone", gone), web.get("/fault", fault)])
        answers = []
        async with listening(app, access_log=None) as address:
            for request in requests:
                reader, writer = await asyncio.open_connection(*address)
                writer.write(request)
                with contextlib.suppress(ConnectionError):
                    answers.append(await reader.read(4096))
                    writer.write_eof()
                    await reader.read()
                writer.close()
        return answers

    return run(asking())


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /api/chat?ticket=SECRET\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /api/chat?ticket=SECRET HTTP/9.x\r\n\r\n",
        b"GET http://[SECRET/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /?ticket=SECRET" + bytes([97]) * 9000 + b" HTTP/1.1\r\n\r\n",
        HEAD + b"Authorization: Bearer SECRET\x01\r\n\r\n",
        HEAD + b"Author ization: Bearer SECRET\r\n\r\n",
        HEAD + b"Content-Length: SECRET\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nSECRET\r\n",
        HEAD.replace(b"GET", b"POST") + b"Content-Encoding: deflate\r\nContent-Length: 6\r\n\r\nSECRET",
        b"\x16\x03\x01SECRET\r\n\r\n",
    ],
    ids=["byte", "version", "brackets", "long", "value", "header", "length", "chunks", "deflate", "tls"],
)
def test_a_request_that_cannot_be_read_is_one_line_without_what_it_holds(request_log, request_):
    ask(request_)
    lines = [line for record in request_log.records for line in logging.Formatter().format(record).splitlines()]
    assert len([line for line in lines if "rror" in line]) == 1, lines
    assert "SECRET" not in request_log.text
    assert "Traceback" not in request_log.text


def test_what_else_a_websocket_asks_for_is_not_in_the_log(request_log):
    [answer] = ask(HEAD + UPGRADE + KEY + b"Sec-WebSocket-Protocol: SECRET\r\n\r\n")
    assert b" 101 " in answer
    assert "SECRET" not in request_log.text


def test_who_is_gone_before_their_websocket_begins_is_not_in_the_log(request_log):
    request_log.set_level(logging.INFO, logger="aiohttp.server")
    ask(b"GET /gone?ticket=SECRET HTTP/1.1\r\nHost: x\r\n" + UPGRADE + KEY + b"\r\n")
    assert request_log.records == []


def test_a_fault_of_the_server_keeps_its_traceback(request_log):
    [answer] = ask(b"GET /fault?ticket=SECRET HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 500 " in answer
    assert "Traceback" in request_log.text
    assert "KeyError: 'a fault'" in request_log.text
    assert "SECRET" not in request_log.text


def test_as_many_connections_as_the_system_lets_there_be():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        allow_many_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
