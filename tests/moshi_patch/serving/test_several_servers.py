"""Two servers over one store behind real HAProxy, as the example configures it: killed, drained, and nobody is lost."""

import asyncio
import json
import re
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from tests.support.browsers import DELTA, chromium, open_page, wait_for, write_microphone
from tests.support.browsers import talk as start
from tests.support.many import hear, receive, run, say
from tests.support.servers import speech
from tests.support.sites import HAProxy, RealServer, free_port
from tests.support.tools import needs_chromium, needs_haproxy

pytestmark = [pytest.mark.slow, needs_haproxy]

TOKENS = {name: f"{name}-0123456789abcdefghijk" for name in ("anna", "bob", "carol")}
DRAIN_S = 4.0
STEPS = 40
"""Of a few words: two chunks of 16 steps are learnt."""


@dataclass
class Site:
    """Two servers and the proxy before them; a server that is gone is started again where it was."""

    repo: Path
    folder: Path
    ports: dict[str, int] = field(default_factory=lambda: {"first": free_port(), "second": free_port()})
    servers: dict[str, RealServer] = field(default_factory=dict)

    def __post_init__(self):
        tokens = self.folder / "tokens.txt"
        tokens.write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
        tokens.chmod(0o600)
        self.proxy = HAProxy(self.folder, *self.ports.values(), port=free_port())
        self.options = ["--rows", "3", "--token-file", str(tokens), "--memory-dir", str(self.folder / "memory")]
        self.options += ["--drain-timeout", str(DRAIN_S), "--allow-origin", self.proxy.url, "--trusted-proxies", "1"]

    def start(self) -> None:
        """Both servers, until the proxy sends people to both."""
        for name, port in self.ports.items():
            if name not in self.servers or self.servers[name].process.poll() is not None:
                log = self.folder / f"{name}.log"
                self.servers[name] = RealServer(self.repo, log, *self.options, port=port)
        for server in self.servers.values():
            server.wait_until_healthy()
        run(self._seen_by_the_proxy())

    async def _seen_by_the_proxy(self) -> None:
        seen = set()
        while not seen >= self.ports.keys():
            async with self.proxy.client() as session:
                await session.get("/")
                seen |= {home(session)}
            await asyncio.sleep(0.05)

    def stop(self) -> None:
        for process in (*self.servers.values(), self.proxy):
            process.kill()


@pytest.fixture(scope="module")
def whole_site(ttt_repo, tmp_path_factory):
    site = Site(ttt_repo, tmp_path_factory.mktemp("site"))
    yield site
    site.stop()


@pytest.fixture
def site(whole_site):
    whole_site.start()
    return whole_site


def home(session: aiohttp.ClientSession) -> str | None:
    """Which server the proxy's cookie brings somebody back to."""
    return next((cookie.value for cookie in session.cookie_jar if cookie.key == "SERVER"), None)


async def enter(session: aiohttp.ClientSession, name: str, at: str | None = None) -> aiohttp.ClientWebSocketResponse:
    """A websocket after the handshake. `at`: the server to come back to, if it is there."""
    if at:
        session.cookie_jar.update_cookies({"SERVER": at}, session._base_url)
    async with session.post("/api/ticket", headers={"Authorization": f"Bearer {TOKENS[name]}"}) as answer:
        assert answer.status == 200, await answer.text()
        ticket = (await answer.json())["ticket"]
    socket = await session.ws_connect(f"/api/chat?metadata=1&ticket={ticket}")
    assert await receive(socket) == b"\x00"
    return socket


async def memory(socket: aiohttp.ClientWebSocketResponse) -> float:
    """The size of what was learnt, as the next message about it has it."""
    while True:
        message = await receive(socket)
        if message[0] == 4:
            return json.loads(message[1:])["layers"][0]["relative_delta"]


async def talk(socket: aiohttp.ClientWebSocketResponse, steps: int = STEPS) -> int:
    """Says a few words as fast as they are heard; how many messages of sound came back."""
    saying = asyncio.create_task(say(socket, speech("boat", steps + 7)))
    heard = await hear(socket, steps)
    await saying
    return len(heard.pcm)


async def status_of(port: int, path: str) -> int:
    """Of a request whose path is written as it is: a client would put it in order."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n".encode())
    status = int((await reader.readline()).split()[1])
    writer.close()
    return status


def test_what_is_for_operators_is_seen_behind_the_proxy_alone_and_tickets_stand_in_no_log(site):
    async def outside():
        async with site.proxy.client() as session:
            socket = await enter(session, "bob")
            await talk(socket, 10)
            hidden = ("/metrics", "/healthz", "/%6detrics", "//metrics", "/api/../metrics", "/api/%2e%2e/healthz")
            statuses = [await status_of(site.proxy.port, path) for path in (*hidden, "/", "/page/app.js")]
            await socket.close()
            return statuses

    assert run(outside()) == [404] * 6 + [200, 200]
    status, text = site.servers["first"].get("/metrics")
    assert status == 200
    assert re.search(r"^moshi_rows 3\.0$", text, re.M)
    numbers = dict(re.findall(r"^((?:moshi|process)\S+) ([\d.e+-]+)$", text, re.M))
    for name in ("people", "queue", "late_frames_total", "dropped_frames_total", "since_last_write_seconds"):
        assert float(numbers[f"moshi_{name}"]) >= 0
    assert float(numbers["process_resident_memory_bytes"]) > 1e6
    status, other = site.servers["second"].get("/metrics")
    assert 'moshi_tick_seconds{quantile="0.99"}' in text + other  # of the one that Bob talked to
    for log in site.folder.glob("*.log"):
        said = log.read_text()
        assert "GET /api/chat 101" in said or log.name != "haproxy.log"
        assert not [word for word in ("ticket=", *TOKENS.values()) if word in said], log


def test_a_person_moves_from_a_killed_server_to_the_other_and_is_remembered(site):
    async def conversations():
        async with site.proxy.client() as anna, site.proxy.client() as bob:
            first_visit = await enter(anna, "anna")
            await talk(first_visit)
            learnt = await memory(first_visit)
            await first_visit.close()
            here = home(anna)
            there = next(name for name in site.ports if name != here)
            others = await enter(bob, "bob", at=there)
            second_visit = await enter(anna, "anna")
            assert home(anna) == here  # the cookie's
            kept = await memory(second_visit)
            site.servers[here].kill()
            lost = await asyncio.wait_for(second_visit.receive(), 10)
            assert lost.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.BINARY)
            begin = time.monotonic()
            third_visit = await enter(anna, "anna")
            took = time.monotonic() - begin
            assert home(anna) == there
            remembered = await memory(third_visit)
            others_heard = await talk(others)
            await talk(third_visit)
            return learnt, kept, remembered, took, others_heard

    learnt, kept, remembered, took, others_heard = run(conversations())
    assert 0 < kept == pytest.approx(learnt, rel=0.5)
    assert remembered == kept
    assert took < 10
    assert others_heard


def test_a_server_that_drains_loses_nobody(site):
    async def conversations():
        clients = [site.proxy.client() for _ in range(3)]
        anna, bob, carol = clients
        try:
            stays, ends = await enter(anna, "anna", at="first"), await enter(bob, "bob", at="first")
            assert home(anna) == home(bob) == "first"
            before = await memory(stays)
            await talk(stays)
            learnt = await memory(stays)
            server = site.servers["first"]
            server.process.terminate()
            while server.get("/healthz")[0] == 200:
                await asyncio.sleep(0.02)
            newcomers = []
            for _ in range(5):  # in the time in which the proxy does not know yet
                newcomer = await enter(carol, "carol", at="first")
                newcomers.append(home(carol))
                await newcomer.close()
            heard = await talk(ends)
            await ends.close()
            end = (await hear(stays)).end
            again = await enter(anna, "anna")
            remembered = await memory(again)
            assert await asyncio.to_thread(server.process.wait, 60) == 0
            return newcomers, heard, end, before, learnt, remembered
        finally:
            await asyncio.gather(*[client.close() for client in clients])

    newcomers, heard, end, before, learnt, remembered = run(conversations())
    assert newcomers == ["second"] * 5
    assert heard
    assert end[0] == 1012
    assert before < learnt <= remembered * 1.000001


@needs_chromium
def test_the_page_finds_the_other_server_by_itself_and_the_memory_there(site, tmp_path):
    with chromium(write_microphone(tmp_path / "boat.wav")) as browser:
        context = browser.new_context(ignore_https_errors=True)
        page = open_page(context, site.proxy.url)
        page.get_by_role("button", name="Start talking").click()
        wait_for(page, "document.activeElement.id === 'token'")
        page.get_by_label("Your token").fill(TOKENS["carol"])
        page.keyboard.press("Enter")
        wait_for(page, f"{DELTA} > 0")
        page.get_by_role("button", name="Stop").click()
        here = next(cookie["value"] for cookie in context.cookies() if cookie["name"] == "SERVER")
        site.servers[here].wait_for_metrics(moshi_people=0.0, moshi_oldest_unwritten_seconds=0.0)
        kept = page.evaluate(DELTA)
        start(page)
        site.servers[here].kill()
        wait_for(page, "document.body.dataset.phase === 'starting'")
        wait_for(page, "document.body.dataset.phase === 'talking'")
        there = next(cookie["value"] for cookie in context.cookies() if cookie["name"] == "SERVER")
        page.evaluate("document.querySelector('#layers b').textContent = '–'")  # until the next message
        wait_for(page, f"{DELTA} >= 0")
        assert there != here
        assert page.evaluate(DELTA) > kept / 2
