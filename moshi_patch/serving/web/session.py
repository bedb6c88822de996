"""One person's websocket: moshi's protocol, at the pace of the model on one side and of the client on the other.

A message is a byte that says its kind, and what belongs to it: 0 the conversation begins, 1 sound (Opus in Ogg), 2
text, 4 metadata (JSON, for who asked with `?metadata=1`), 5 why the conversation ends.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from aiohttp import WSCloseCode, WSMessage, WSMsgType, web

from ..engine.codec import Codecs, NotOpusError
from ..engine.person import Begin, End, Pace, Person, Place, Room, Told
from ..engine.policy import RATE, STEP_S
from ..engine.rows import Answer
from ..engine.tick import Engine
from .closing import close_or_cut
from .line import Line

logger = logging.getLogger(__name__)

HANDSHAKE, SOUND, TEXT, CONTROL, METADATA, ERROR, PING = range(7)
NO_TEXT = (0, 3)
"""Tokens that stand for no text."""

LARGEST_RATE = 64_000
"""Bytes of Opus for a second of sound: 510 kbit are the most that there are."""

CHATTER_SAMPLES, CHATTER_S = RATE // 50, 20.0
"""A message without sound counts as so many samples, and may come so much ahead: 1000 at once, then 50 a second."""


MESSAGES_PER_S = 500
"""That are read; so many more may come at once. Reading as fast as they come would leave the model's thread no time."""


class Session:
    """One websocket: what comes goes to the engine at its pace, what the engine says goes out at the client's."""

    def __init__(
        self,
        engine: Engine,
        codecs: Codecs,
        text_of: Callable[[int], str],
        person: Person,
        line: Line,
    ):
        self.engine, self.codecs, self.text_of, self.person, self.line = engine, codecs, text_of, person, line
        self.policy, self.codec = engine.policy, codecs.open()
        line.on_too_long(self._refuse_length)
        self._outbox: deque[Any] = deque()
        self._filled, self._room, self._over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._end = End(WSCloseCode.OK, "")
        self._begun = asyncio.Event()
        self._pace = Pace(self.policy.backlog * STEP_S / 2)
        self._last_sound = time.monotonic()
        self._chatter, self._messages = Pace(CHATTER_S), Pace(1.0)

    def hand(self, notice: Any) -> None:
        """Something for this person, from the engine."""
        if isinstance(notice, Room):
            self._room.set()
        elif isinstance(notice, End):
            self.end(notice.code, notice.reason)
        elif len(self._outbox) >= self.policy.outbox:
            self.end(WSCloseCode.POLICY_VIOLATION, "you do not read what is said to you")
        else:
            self._outbox.append(notice)
            self._filled.set()

    def end(self, code: int, reason: str) -> None:
        """The conversation is over, unless it is already."""
        if not self._over.is_set():
            self._end = End(code, reason)
            self._over.set()

    async def run(self) -> End:
        """Until the end, of which it returns the reason."""
        tasks = [asyncio.create_task(work) for work in (self._listen(), self._speak(), self._over.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks[:2]:
                if task.done() and (error := task.exception()):
                    self._fail(error)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self._end

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, ConnectionError):
            self.end(WSCloseCode.OK, "")  # they vanished
        elif isinstance(error, NotOpusError):
            self.end(WSCloseCode.INVALID_TEXT, str(error))
        else:
            logger.error("A conversation ended with an error.", exc_info=error)
            self.end(WSCloseCode.INTERNAL_ERROR, f"error in the server: {type(error).__name__}")

    async def _listen(self) -> None:
        while not self._over.is_set():
            try:
                await self._read(await self.line.receive(self._patience()))
                ahead = self._messages.hear(RATE // MESSAGES_PER_S, time.monotonic())
                await asyncio.sleep(1 / MESSAGES_PER_S if ahead else 0)  # else nobody else would be heard meanwhile
            except asyncio.TimeoutError:
                pass
            if self._is_idle():
                self.end(WSCloseCode.POLICY_VIOLATION, f"no audio for {self.policy.idle_s:g} s")

    async def _read(self, message: WSMessage) -> None:
        sound = message.type is WSMsgType.BINARY and message.data[:1] == bytes([SOUND]) and len(message.data) > 1
        if not sound and self._chatter.hear(CHATTER_SAMPLES, time.monotonic()):
            self.end(WSCloseCode.POLICY_VIOLATION, "too many messages without sound")
        elif message.type in (WSMsgType.BINARY, WSMsgType.TEXT) and len(message.data) > self.policy.message_bytes:
            self._refuse_length()
        elif message.type is WSMsgType.BINARY:
            await self._take(message.data)
        elif message.type is WSMsgType.PING:
            if not self.line.is_full():  # else who reads no answer would keep this from ending
                await self.line.websocket.pong(message.data)
        elif message.type is WSMsgType.TEXT:
            self.end(WSCloseCode.UNSUPPORTED_DATA, "text frames are no part of this protocol")
        elif message.type is not WSMsgType.PONG:
            self.end(self.line.websocket.close_code or WSCloseCode.OK, "")

    def _is_idle(self) -> bool:
        idle_s = self.policy.idle_s
        return bool(idle_s) and self._begun.is_set() and time.monotonic() >= self._last_sound + idle_s

    def _refuse_length(self) -> None:
        self.end(WSCloseCode.MESSAGE_TOO_BIG, f"more than {self.policy.message_bytes >> 20} MiB in one message")

    def _patience(self) -> float | None:
        """Seconds to wait for the next message."""
        if not self._begun.is_set() or not self.policy.idle_s:
            return 1.0
        return max(0.01, self._last_sound + self.policy.idle_s - time.monotonic())

    async def _take(self, data: bytes) -> None:
        kind = data[0] if data else PING
        if kind == SOUND and not self._begun.is_set():  # what is said before is not heard
            await self.codecs.skip(self.codec, data[1:])
            with contextlib.suppress(asyncio.TimeoutError):  # nobody needs to send faster than Opus can
                await asyncio.wait_for(self._begun.wait(), len(data) / LARGEST_RATE)
        elif kind == SOUND:
            await self._hear(data[1:])
        elif kind == METADATA:
            self._command(data[1:])
        elif kind > PING:
            self.end(WSCloseCode.UNSUPPORTED_DATA, f"messages of kind {kind} are no part of this protocol")

    async def _hear(self, data: bytes) -> None:
        length, more = 0.0, True
        while more and not self._over.is_set():
            frames, more = await self.codecs.decode(self.codec, data)
            data = b""
            if more:
                await asyncio.sleep(0)  # others are heard between two pieces
            if not len(frames):
                continue
            now = self._last_sound = time.monotonic()
            length += len(frames) * STEP_S
            if length > self.policy.message_s:
                self.end(WSCloseCode.MESSAGE_TOO_BIG, f"more than {self.policy.message_s:g} s of sound in one message")
                return
            ahead = self._pace.hear(frames.size, now)
            self._room.clear()
            if not self.engine.hear(self.person, list(frames), ahead):
                await self._room.wait()
                now = self._last_sound = time.monotonic()
                self._pace.resume(now)

    def _command(self, data: bytes) -> None:
        try:
            wish = json.loads(data)
            if not isinstance(wish, dict) or not wish or wish.keys() - {"updates", "forget"}:
                raise ValueError
            if not all(isinstance(value, bool) for value in wish.values()):
                raise ValueError
        except (ValueError, RecursionError):
            self.end(WSCloseCode.INVALID_TEXT, 'a message of kind 4 is {"updates": true or false} or {"forget": true}')
            return
        if "updates" in wish:
            self.engine.set_updates(self.person, wish["updates"])
        if wish.get("forget"):
            self.engine.forget(self.person)

    async def _speak(self) -> None:
        while True:
            await self._filled.wait()
            while self._outbox:
                while self.line.is_full():
                    await asyncio.sleep(STEP_S / 2)  # they do not read; aiohttp itself would take 64 KiB more
                await self._say(self._outbox.popleft())
            self._filled.clear()

    async def _say(self, notice: Any) -> None:
        send = self.line.websocket.send_bytes
        if isinstance(notice, Begin):
            self._last_sound = time.monotonic()
            self._pace.resume(self._last_sound)
            self._begun.set()
            await send(bytes([HANDSHAKE]))
        elif isinstance(notice, Answer):
            if notice.pcm is None:
                return
            opus = await self.codecs.encode(self.codec, notice.pcm)
            if opus:
                await send(bytes([SOUND]) + opus)
            if notice.text not in NO_TEXT:
                await send(bytes([TEXT]) + self.text_of(notice.text).encode())
        elif isinstance(notice, (Told, Place)) and self.person.metadata:
            message = notice.message if isinstance(notice, Told) else {"type": "queue", "place": notice.place}
            await send(bytes([METADATA]) + json.dumps(message).encode())


async def refuse(request: web.Request, socket: web.WebSocketResponse, code: int, reason: str) -> None:
    """Closes a websocket with a reason, also told as a message of moshi's protocol; cuts it if nobody listens."""
    await close_or_cut(request, socket, code, reason, bytes([ERROR]) + reason.encode() if reason else b"")
