"""A client that behaves like LiveKit's plugin for servers of this protocol, as it stands in livekit-plugins-nvidia.

It sends 100 ms a message, from the start, and not from the handshake on. It knows the kinds 0, 1 and 2 and warns of all
others. When the server closes its connection, with whatever code, it comes again, with new streams of Opus.
"""

import asyncio
import contextlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import sphn
from aiohttp import WSMsgType

from moshi_patch.serving.engine.policy import Policy
from tests.support.many import Server, run, serve
from tests.support.servers import RATE, user_speech

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched_module")]

MESSAGE = RATE // 10
"""Samples."""

RETRY_S = 0.1
"""A second at first in the plugin."""


@dataclass
class Plugin:
    """What it has met.

    Attributes:
        heard: samples of each connection.
        kinds: of the messages that came.
        closed: the codes with which the server closed it.
    """

    heard: list[int] = field(default_factory=list)
    kinds: set[int] = field(default_factory=set)
    closed: list[int] = field(default_factory=list)

    async def talk(self, server: Server, query: str = "") -> None:
        """Says the same again and again, until it is cancelled."""
        while True:
            async with server.session.ws_connect(f"{server.url}{query}") as socket:
                self.heard.append(0)
                saying = asyncio.create_task(self._say(socket))
                await self._hear(socket)
                saying.cancel()
            self.closed.append(socket.close_code)
            await asyncio.sleep(RETRY_S)

    async def _say(self, socket) -> None:
        writer, said = sphn.OpusStreamWriter(RATE), user_speech("boat", 60)
        with contextlib.suppress(ConnectionError):
            while True:
                for message in np.split(said, len(said) // MESSAGE):
                    if opus := writer.append_pcm(message):
                        await socket.send_bytes(b"\x01" + opus)
                    await asyncio.sleep(MESSAGE / RATE)

    async def _hear(self, socket) -> None:
        reader = sphn.OpusStreamReader(RATE)
        while (message := await socket.receive()).type is WSMsgType.BINARY:
            self.kinds.add(message.data[0])
            if message.data[0] == 1:
                self.heard[-1] += len(reader.append_bytes(message.data[1:]))

    async def until_it_hears(self, seconds: float) -> None:
        while not self.heard or self.heard[-1] < seconds * RATE:
            await asyncio.sleep(0.02)


def test_it_is_heard_though_it_speaks_before_the_handshake_and_in_messages_of_another_length(ttt_repo):
    async def conversation():
        async with serve(ttt_repo, rows=2) as server:
            one, other = Plugin(), Plugin()
            talking = [asyncio.create_task(plugin.talk(server, "?seed=7")) for plugin in (one, other)]
            for plugin in (one, other):
                await plugin.until_it_hears(2)
            for task in talking:
                task.cancel()
            return one, other, server.engine.dropped_frames

    one, other, dropped = run(conversation())
    assert one.closed == other.closed == []
    assert one.kinds == other.kinds == {0, 1, 2}
    assert dropped == 0


def test_it_comes_again_when_there_was_no_place_and_when_it_was_sent_away(ttt_repo):
    async def conversation():
        async with serve(ttt_repo, rows=1, policy=Policy(queue=0)) as server:
            plugin = Plugin()
            async with server.connect():
                talking = asyncio.create_task(plugin.talk(server))
                while len(plugin.closed) < 3:
                    await asyncio.sleep(0.02)
            await plugin.until_it_hears(1)
            (session,) = server.front.sessions.values()
            session.end(1011, "the model's numbers are not finite any more")
            while plugin.closed[-1] != 1011:
                await asyncio.sleep(0.02)
            refused = len(plugin.heard)
            while len(plugin.heard) == refused:
                await asyncio.sleep(0.02)
            await plugin.until_it_hears(1)  # in streams that begin anew
            talking.cancel()
            return plugin.closed

    closed = run(conversation())
    assert set(closed[:-1]) == {1013}
    assert closed[-1] == 1011
