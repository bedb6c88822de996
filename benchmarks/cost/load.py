"""Talks as many people to any server of moshi's protocol: real Opus over real websockets, in real time or faster.

`python -m benchmarks.cost.load ws://HOST:PORT/api/chat [--people 8] [--seconds 60] [--stay 10] [--fast] [--pid N]`

Each person says the example's speech, a message of 80 ms every 80 ms, beginning at a phase of their own. An answer is
late when it comes more than 80 ms after the frame was sent that it answers. With `--fast` everybody is at most a second
ahead of the answers instead. With `--stay` they leave after so many seconds and come again. `--pid` is of a server on
this machine: its processor time and memory, and those of its children.
"""

import argparse
import asyncio
import functools
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import sphn

DATA = Path(__file__).parents[2] / "example" / "data"
RATE, FRAME, STEP_S = 24_000, 1920, 0.08
ENCODED_STEPS = 250
"""Of speech that is said again and again: encoding must not take the time of the server that is measured."""

AHEAD = 12
"""Frames of somebody who talks fast that are not answered, those included that the codebooks are delayed by."""

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@functools.cache
def encode(steps: int) -> list[bytes]:
    """The example's speech, repeated to `steps` steps, as the messages of one Opus stream."""
    pcm = np.concatenate([sphn.read(str(path))[0][1] for path in sorted(DATA.glob("*.wav"))])
    writer = sphn.OpusStreamWriter(RATE)
    frames = (np.take(pcm, range(i * FRAME, (i + 1) * FRAME), mode="wrap") for i in range(steps))
    return [b"\x01" + message for message in map(writer.append_pcm, frames) if message]


@dataclass
class Heard:
    """What all people of a run heard.

    Attributes:
        sent, answers: messages of sound.
        talks: in real time: the frames of each that were sent, one a step, and when its answers came, in steps after
            the first frame.
        conversations: that began.
        refused: how conversations ended that the server ended: code and reason, counted.
    """

    sent: int = 0
    answers: int = 0
    talks: list[tuple[int, np.ndarray]] = field(default_factory=list)
    conversations: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def responses(self) -> np.ndarray:
        """Seconds from when a frame was sent until its answer came, in conversations in which all were answered.

        Answer i is to frame i + d. The codebooks and the codec are delayed by d, the same at all times; as no answer
        comes before its frame, d is at most what the earliest one says.
        """
        if not self.talks:
            return np.zeros(0)
        ages = [came - np.arange(len(came)) for _, came in self.talks]
        delay = int(min(age.min() for age in ages))
        whole = [age for age, (sent, came) in zip(ages, self.talks, strict=True) if len(came) + delay + 3 >= sent]
        return STEP_S * (np.concatenate(whole) - delay) if whole else np.zeros(0)

    def summary(self) -> dict[str, Any]:
        """JSON-ready; times in milliseconds."""
        times = 1000 * self.responses()
        return {
            "conversations": self.conversations,
            "frames": self.sent,
            "answers": self.answers,
            "response_ms": {
                name: round(float(np.percentile(times, q)), 1) if len(times) else None
                for name, q in (("p50", 50), ("p99", 99))
            },
            "late": int((times > 1000 * STEP_S).sum()),
            "ended_by_server": self.refused,
        }


async def converse(
    session: aiohttp.ClientSession, url: str, messages: list[bytes], end: float, fast: bool, heard: Heard
) -> None:
    """One conversation until the time `end`. `fast`: as fast as the server reads."""
    async with session.ws_connect(url, max_msg_size=0) as socket:
        message = await socket.receive()
        if message.data != b"\x00":
            code = f"{socket.close_code or message.data} {message.extra or ''}"
            heard.refused[code] = heard.refused.get(code, 0) + 1
            await asyncio.sleep(STEP_S)
            return
        heard.conversations += 1
        start, came = time.monotonic(), []
        listening = asyncio.create_task(_listen(socket, came))
        sent = 0
        while time.monotonic() < end and not listening.done():
            await socket.send_bytes(messages[sent % len(messages)])
            sent += 1
            if not fast:
                await asyncio.sleep(max(0.0, start + sent * STEP_S - time.monotonic()))
            while fast and sent - len(came) > AHEAD and not listening.done():
                await asyncio.sleep(0.002)
        if fast:
            await _until_quiet(came)
        listening.cancel()
        heard.sent += sent
        heard.answers += len(came)
        if came and not fast:
            heard.talks.append((sent, (np.array(came) - start) / STEP_S))


async def _listen(socket: aiohttp.ClientWebSocketResponse, came: list[float]) -> None:
    async for message in socket:
        if message.type is aiohttp.WSMsgType.BINARY and message.data[:1] == b"\x01":
            came.append(time.monotonic())


async def _until_quiet(came: list[float]) -> None:
    """Until no answer has come for a second."""
    count = -1
    while count != len(came):
        count = len(came)
        await asyncio.sleep(1.0)


async def talk(
    urls: list[str], seconds: float, stay: float | None = None, fast: bool = False, heard: Heard | None = None
) -> Heard:
    """One person for each of `urls`, which may be the same, for so many seconds."""
    heard = heard or Heard()
    messages = encode(ENCODED_STEPS)
    end = time.monotonic() + seconds

    async def person(number: int, url: str) -> None:
        await asyncio.sleep(STEP_S * (number * 0.618 % 1))
        while time.monotonic() < end:
            leave = end if stay is None else min(end, time.monotonic() + stay * (0.5 + number * 0.618 % 1))
            await converse(session, url, messages, leave, fast, heard)
            if stay is None and fast:
                break

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*[person(number, url) for number, url in enumerate(urls)])
    return heard


def processor_s(pid: int) -> float:
    """Seconds of processor time of a process and its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    own = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return own + sum(processor_s(child) for child in _children(pid))


def resident_bytes(pid: int) -> int:
    """Of a process and its children."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(child) for child in _children(pid))


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--stay", type=float, help="seconds on average until somebody leaves and comes again")
    parser.add_argument("--fast", action="store_true", help="as fast as the server reads, not in real time")
    parser.add_argument("--pid", type=int, help="of the server")
    args = parser.parse_args(argv)
    before = processor_s(args.pid) if args.pid else 0.0
    heard = asyncio.run(talk([args.url] * args.people, args.seconds, args.stay, args.fast))
    result = heard.summary()
    if args.pid:
        result["processor_ms_per_frame"] = round(1000 * (processor_s(args.pid) - before) / max(1, heard.sent), 2)
        result["resident_mib"] = round(resident_bytes(args.pid) / 2**20, 1)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
