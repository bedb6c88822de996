"""SIGTERM loses nobody: newcomers go elsewhere, who talks ends what they say, and all is written before the rest go."""

import asyncio
import logging
import time

import aiohttp
import pytest

from moshi_patch.serving.program import DRAIN
from tests.support.many import hear, receive, run, say, serve
from tests.support.servers import speech

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]


async def health(server) -> tuple[int, dict]:
    async with server.session.get(server.url.replace("/api/chat", "/healthz")) as answer:
        return answer.status, await answer.json()


def test_who_talks_may_end_what_they_say_and_who_comes_is_sent_to_another_server(ttt_repo):
    async def conversation():
        async with serve(ttt_repo, rows=2, drain_s=30.0) as server:
            assert await health(server) == (200, {"state": "ok", "rows": 2, "free": 2, "queue": 0})
            async with server.connect() as socket:
                assert (await health(server))[1]["free"] == 1
                ending = asyncio.create_task(server.app[DRAIN].run())
                await asyncio.sleep(0.1)
                assert await health(server) == (503, {"state": "draining", "rows": 2, "free": 1, "queue": 0})
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await server.session.ws_connect(server.url)
                saying = asyncio.create_task(say(socket, speech("boat", 27)))
                heard = await hear(socket, 20)
                await saying
                assert not ending.done()
            await ending
            return refused.value, heard

    refused, heard = run(conversation())
    assert refused.status == 503
    assert refused.headers["Retry-After"] == "1"
    assert len(heard.pcm)


def test_who_waits_for_a_row_is_told_to_come_again_at_once(ttt_repo):
    async def conversation():
        async with serve(ttt_repo, rows=1, drain_s=0.2) as server, server.connect() as first:  # noqa: SIM117
            async with server.session.ws_connect(server.url) as waiting:
                while not server.engine.stats()["queue"]:
                    await asyncio.sleep(0.01)
                ending = asyncio.create_task(server.app[DRAIN].run())
                left = await hear(waiting)
                sent_away = await hear(first)
                await ending
                return left.end[0], sent_away.end[0]

    assert run(conversation()) == (1012, 1012)


def test_a_second_signal_ends_the_waiting(ttt_repo):
    async def conversation():
        async with serve(ttt_repo, rows=1, drain_s=1000.0) as server, server.connect() as socket:
            ending = asyncio.create_task(server.app[DRAIN].run())
            await asyncio.sleep(0.2)
            assert not socket.closed
            server.app[DRAIN].hurry()
            await ending
            return (await hear(socket)).end[0]

    assert run(conversation()) == 1012


class SlowMemories:
    """Of a store that takes its time; notes in which order things are done."""

    def __init__(self, events: list, seconds: float):
        self.events, self.seconds, self.ends = events, seconds, {}
        self.lost = None

    def read(self, name, done):
        done(None, None)

    def write(self, name, memory):
        self.ends[name] = time.monotonic() + self.seconds
        self.events.append(("copied", name, len(memory) > 0))

    def busy(self, name) -> bool:
        pending = time.monotonic() < self.ends.get(name, 0.0)
        if not pending and name in self.ends and ("written", name) not in self.events:
            self.events.append(("written", name))
        return pending

    oldest_s = since_last_write_s = lambda self: 0.0
    forget = close = drain = lambda self, *_: None


def test_nobody_is_sent_away_before_what_they_have_learnt_is_written(ttt_repo):
    events: list = []

    async def conversation():
        memories = SlowMemories(events, seconds=0.5)
        async with serve(ttt_repo, rows=2, drain_s=0.3, memories=memories) as server:  # noqa: SIM117
            async with server.session.ws_connect(server.url) as socket:
                assert await receive(socket) == b"\x00"
                saying = asyncio.create_task(say(socket, speech("boat", 27)))
                await hear(socket, 10)
                await saying
                ending = asyncio.create_task(server.app[DRAIN].run())
                end = (await hear(socket)).end
                events.append(("closed", end[0]))
                await ending

    run(conversation())
    assert events[0] == ("copied", "local", True)
    assert events[1:] == [("written", "local"), ("closed", 1012)]


def test_the_log_says_nothing_of_what_was_said_or_by_whom(ttt_repo, caplog):
    async def conversation():
        async with serve(ttt_repo, rows=1, drain_s=0.0) as server, server.connect("?ticket=a-secret-ticket") as socket:
            saying = asyncio.create_task(say(socket, speech("boat", 27)))
            heard = await hear(socket, 20)
            await saying
            await server.app[DRAIN].run()
            return heard.text

    caplog.set_level(logging.DEBUG, logger="moshi_patch")
    words = [word for word in run(conversation()).split() if len(word) > 3]
    assert words
    text = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("moshi_patch"))
    assert "sent away" in text
    assert not [word for word in [*words, "a-secret-ticket", "127.0.0.1"] if word in text]
