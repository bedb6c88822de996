"""Opus in and out, a reader and a writer for each person; for many people, in other processes.

sphn holds Python's lock while it works: 100 ms for two seconds of sound. Here it never gets more than a second at a
time, whatever somebody sends: 87 bytes of Opus can hold seconds. As nothing else runs meanwhile, a thread is no help:
the event loop does what few people send and hear, and a thread finds the pages in a long message.
"""

import asyncio
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import signal
from collections import defaultdict, deque
from typing import Any

import numpy as np
import sphn

from ...errors import in_one_line
from .ogg import CAPTURE, OggPages, is_first, packets_in
from .policy import FRAME, RATE

PEOPLE_IN_PROCESS = 8
"""Above so many, Opus is left to other processes."""

PEOPLE_PER_PROCESS = 12
"""A person's Opus takes 3 to 5 ms of a step of 80."""

SHORT_BYTES = 16 << 10
"""Up to so many, a message of few people is done at once: the way to a thread and back costs as much as its sound."""

HEADERS = 2
"""Packets that a stream begins with, on pages of their own: what it is, and comments (RFC 7845)."""


class NotOpusError(ValueError):
    """What somebody sent is no Opus in Ogg."""


class Codec:
    """The streams of one person."""

    def __init__(self) -> None:
        self._reader, self._writer = sphn.OpusStreamReader(RATE), sphn.OpusStreamWriter(RATE)
        self._pages, self._waiting, self._rest = OggPages(), deque(), np.zeros(0, np.float32)
        self._headers = 0  # that are still to come of what is skipped

    def decode(self, data: bytes) -> tuple[np.ndarray, bool]:
        """Whole frames `[N, F]`, float32, of less than a second; and whether what came already holds more.

        Raises:
            NotOpusError: with the words of the decoder.
        """
        self._waiting.extend(self._pages.feed(data))
        if self._waiting:
            self._rest = np.concatenate([self._rest, self._read(self._waiting.popleft())])
        whole = len(self._rest) // FRAME * FRAME
        frames, self._rest = self._rest[:whole].reshape(-1, FRAME), self._rest[whole:]
        return frames, bool(self._waiting)

    def skip(self, data: bytes) -> None:
        """Hears nothing of `data` but what a stream begins with, without which what follows could not be decoded.

        Raises:
            NotOpusError: as :meth:`decode`.
        """
        for piece in self._pages.feed(data):
            if is_first(piece):
                self._headers = HEADERS
            packets = packets_in(piece)
            if self._headers and packets <= self._headers and piece.startswith(CAPTURE):
                self._headers -= packets
                self._read(piece)

    def _read(self, piece: bytes) -> np.ndarray:
        if is_first(piece):
            self._reader = sphn.OpusStreamReader(RATE)  # files of several streams are files too
        try:
            return self._reader.append_bytes(piece)
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise NotOpusError(f"the audio is not Opus in Ogg: {error}") from None

    def encode(self, pcm: np.ndarray) -> bytes:
        """The next bytes of the stream for `pcm [F]`; none at times."""
        return self._writer.append_pcm(pcm)


_numbers = itertools.count(1)
"""Of people in this process, whatever server they are on."""

_codecs: defaultdict[int, Codec] = defaultdict(Codec)
"""In the thread or process that does the work."""


def _do_all(jobs: list[tuple[str, int, Any]]) -> list[Any]:
    """What each job comes to, or its exception. A job is a method of :class:`Codec`, a person, and the argument."""
    results = []
    for work, person, data in jobs:
        try:
            results.append(getattr(_codecs[person], work)(data))
        except BaseException as error:  # a panic in Rust is no Exception; nobody may be left without an answer
            results.append(error if isinstance(error, NotOpusError) else RuntimeError(f"Opus: {in_one_line(error)}"))
    return results


def _close(person: int) -> None:
    _codecs.pop(person, None)


def _leave_signals_to_the_server() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Codecs:
    """The codecs of all people, here for few and in other processes for many. Used by the event loop.

    Args:
        rows: how many people talk at the same time.
    """

    def __init__(self, rows: int):
        count = 0 if rows <= PEOPLE_IN_PROCESS else -(-rows // PEOPLE_PER_PROCESS)
        self.processes = count
        self._workers = [self._start() for _ in range(max(1, count))]
        self._homes: dict[int, concurrent.futures.Executor] = {}
        # What is asked for at about the same time, as the answers of one step are, goes there together: the way to
        # another thread and back costs as much as the decoding of a frame.
        self._waiting: dict[concurrent.futures.Executor, list[tuple[tuple[str, int, Any], asyncio.Future]]] = {}
        self._tasks: set[asyncio.Task] = set()

    def _start(self) -> concurrent.futures.Executor:
        if not self.processes:
            return concurrent.futures.ThreadPoolExecutor(1, "opus")
        return concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _leave_signals_to_the_server
        )

    def open(self) -> int:
        """A new person's number."""
        person, homes = next(_numbers), list(self._homes.values())
        self._homes[person] = min(self._workers, key=homes.count)
        return person

    async def decode(self, person: int, data: bytes) -> tuple[np.ndarray, bool]:
        """As :meth:`Codec.decode`.

        Raises:
            NotOpusError: as it.
            RuntimeError: when the process that had the streams of this person ended.
        """
        return await self._do("decode", person, data)

    async def skip(self, person: int, data: bytes) -> None:
        """As :meth:`Codec.skip`.

        Raises:
            NotOpusError, RuntimeError: as :meth:`decode`.
        """
        await self._do("skip", person, data)

    async def encode(self, person: int, pcm: np.ndarray) -> bytes:
        """As :meth:`Codec.encode`.

        Raises:
            RuntimeError: as :meth:`decode`.
        """
        return await self._do("encode", person, pcm)

    def close(self, person: int) -> None:
        """Forgets a person."""
        with contextlib.suppress(RuntimeError):  # it ended, or is about to
            self._homes.pop(person).submit(_close, person)

    async def _do(self, work: str, person: int, data: Any) -> Any:
        home = self._homes[person]
        if not self.processes and len(data) <= SHORT_BYTES:
            (end,) = _do_all([(work, person, data)])
            if isinstance(end, Exception):
                raise end
            return end
        result = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(home, [])
        waiting.append(((work, person, data), result))
        if len(waiting) == 1:
            task = asyncio.create_task(self._work(home))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await result

    async def _work(self, home: concurrent.futures.Executor) -> None:
        """Has all done that waits for `home`, but for those who do not want it any more: they may be closed already."""
        asked = [(job, result) for job, result in self._waiting.pop(home) if not result.done()]
        try:
            jobs = [job for job, _ in asked]
            ends = await asyncio.get_running_loop().run_in_executor(home, _do_all, jobs)
        except concurrent.futures.BrokenExecutor:
            if home in self._workers:
                self._workers[self._workers.index(home)] = self._start()
            ends = [RuntimeError("a process for Opus ended")] * len(asked)
        except asyncio.CancelledError:  # so ends what still waits when all is shut down
            ends = [RuntimeError("Opus is shut down")] * len(asked)
        except Exception as error:
            ends = [error] * len(asked)
        for (_, result), end in zip(asked, ends, strict=True):
            if result.done():
                continue
            if isinstance(end, Exception):
                result.set_exception(end)
            else:
                result.set_result(end)

    def shut_down(self) -> None:
        """Ends the threads or processes."""
        for worker in self._workers:
            worker.shutdown(wait=False, cancel_futures=True)
