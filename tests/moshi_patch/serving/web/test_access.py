"""Pages of other sites and foreign names are kept out; programs, and whoever is named, are let in."""

import aiohttp
import pytest

from moshi_patch.serving.stock.kept_memory import KeptMemory
from moshi_patch.serving.web.access import Access, parse_host, parse_origin
from tests.support.small_server import SPEECH, converse, run, served

ALLOWED = ("https://studio.example", "http://lab.example:8080")
PATHS = ("/api/ttt", "/api/chat", "/", "/nosuch")


async def answer(session, path: str, headers: dict[str, str]) -> tuple[int, str]:
    async with session.get(path, headers=headers) as response:
        return response.status, await response.text()


def statuses(headers: dict[str, str], host: str = "localhost") -> set[int]:
    """What a plain request is answered at the addresses of a server."""

    async def client():
        async with served(Access(host, ALLOWED)) as (_, session):
            port = str(session._base_url.port)
            filled = {key: value.replace("PORT", port) for key, value in headers.items()}
            return {(await answer(session, path, filled))[0] for path in PATHS}

    return run(client())


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://localhost"},  # another port
        {"Origin": "http://localhost:PORT"},  # the request went to 127.0.0.1
        {"Origin": "https://127.0.0.1:PORT"},
        {"Origin": "http://127.0.0.1:PORT.evil.example"},
        {"Origin": "http://studio.example"},  # allowed over https
        {"Origin": "https://studio.example.evil.example"},
        {"Origin": "https://evil.example#https://studio.example"},
        {"Origin": "chrome-extension://abcdef"},
        {"Host": "evil.example"},
        {"Host": "evil.example:PORT", "Origin": "http://evil.example:PORT"},
        {"Host": "localhost.evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "evil@localhost"},
        {"Host": "localhost:PORT:1"},
        {"Host": ""},
        {"Host": "abc.gradio.live", "Origin": "https://abc.gradio.live"},
    ],
    ids=str,
)
def test_other_sites_and_foreign_names_are_refused_everywhere(headers, patched):
    assert statuses(headers) == {403}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://127.0.0.1:PORT"},
        {"Origin": "HTTP://127.0.0.1:PORT"},
        {"Host": "localhost:PORT", "Origin": "http://localhost:PORT"},
        {"Host": "LOCALHOST"},
        {"Host": "moshi.localhost:PORT", "Origin": "http://moshi.localhost:PORT"},
        {"Host": "[::1]:PORT", "Origin": "http://[::1]:PORT"},
        {"Host": "192.168.1.7:PORT", "Origin": "http://192.168.1.7:PORT"},
        {"Host": "mybox:PORT", "Origin": "http://mybox:PORT"},
        {"Host": "mybox.", "Origin": "http://mybox"},
        {"Origin": "https://studio.example"},
        {"Origin": "https://studio.example:443"},
        {"Origin": "http://lab.example:8080"},
        {"Host": "studio.example", "Origin": "https://studio.example"},  # a proxy speaks https for the server
    ],
    ids=str,
)
def test_own_pages_allowed_origins_and_programs_are_let_in(headers, patched):
    assert statuses(headers, "mybox") == {200, 400, 404}  # /api/chat wants a websocket, / has no page here


def test_moshis_tunnel_has_names_of_its_own(patched):
    async def client():
        async with served(Access("localhost", tunnel=True)) as (_, session):
            own = {"Host": "abc.gradio.live", "Origin": "https://abc.gradio.live"}
            foreign = {"Host": "abc.gradio.live", "Origin": "https://evil.example"}
            other = {"Host": "gradio.live.evil.example"}
            return [(await answer(session, "/api/ttt", headers))[0] for headers in (own, foreign, other)]

    assert run(client()) == [200, 403, 403]


def test_a_foreign_page_does_not_get_a_conversation_and_the_memory_stays_as_it_was(tmp_path, patched, caplog):
    path = tmp_path / "memory"

    async def client():
        async with served(Access("localhost", ALLOWED), memory=KeptMemory(path)) as (_, session):
            await converse(session, *SPEECH)
            before = path.read_bytes()
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect("/api/chat", headers={"Origin": "http://evil.example"})
            assert path.read_bytes() == before
            async with session.ws_connect("/api/chat", headers={"Origin": ALLOWED[0]}) as websocket:
                assert await websocket.receive_bytes() == b"\x00"
            return refused.value.status, await answer(session, "/api/ttt", {"Origin": "http://evil.example"})

    status, (forbidden, text) = run(client())
    assert status == forbidden == 403
    assert text == "Origin 'http://evil.example' may not use this server. --allow-origin ORIGIN allows one.\n"
    assert "Refused a request from 127.0.0.1: Origin 'http://evil.example'" in caplog.text
    assert str(path) not in text


def test_the_status_tells_no_path(tmp_path, patched):
    async def client():
        async with served(memory=KeptMemory(tmp_path / "memory")) as (_, session):
            return (await answer(session, "/api/ttt", {}))[1]

    status = run(client())
    assert '"memory": true' in status
    assert str(tmp_path) not in status


def test_a_browser_lets_the_page_of_an_allowed_origin_read_the_status(patched):
    async def client():
        async with served(Access("localhost", ALLOWED)) as (_, session):
            read = []
            for origin in (ALLOWED[0], f"http://127.0.0.1:{session._base_url.port}"):
                async with session.get("/api/ttt", headers={"Origin": origin}) as response:
                    read.append(response.headers.get("Access-Control-Allow-Origin"))
            return read

    assert run(client()) == [ALLOWED[0], None]


def test_hosts_and_origins_are_read_as_browsers_write_them():
    assert parse_host("[2001:db8::1]:80", "http") == ("2001:db8::1", 80)
    assert parse_host("example.org", "https") == ("example.org", 443)
    assert [parse_host(text, "http") for text in ("a b", "a/b", "a:b", "[::1", "::1", "ä")] == [None] * 6
    assert parse_origin("http://Example.org/") == ("http", "example.org", 80)
    assert [parse_origin(text) for text in ("example.org", "http:/a", "ftp://a", "http://", "http://a/b")] == [None] * 5
