"""Measures what a person costs on the server for many, against stock servers side by side, and whether it lasts.

`python -m benchmarks.cost.many [--rows 1,2,4,8] [--seconds 20] [--fast] [--minutes 60] [--joins 1000] [--out FILE]`

*Rows*: for 1, 2, 4, 8 ... rows, until a tick takes 80 ms, a server in a process of its own and as many people, in real
time; then, in the same run, `--stock` servers of one conversation each, `python -m moshi_patch moshi.server`, with one
person each. Processor time per person and frame is that of the server's processes over the frames that were sent. It
depends little on what else the machine does; p50, p99 and late frames depend on it entirely. On a machine that is busy
use `--fast`: nobody keeps to real time then, no frame is dropped, and the percentiles mean nothing. A tick "takes" its
processor time then.

*Minutes*: at `--people` rows one half talks on and the other comes and goes, `--joins` times in all. Resident memory
every few seconds, and the line through it.

The model is the example's tiny one, on one core of the CPU: what is measured is the serving, not the model.
"""

import asyncio
import contextlib
import logging
import re
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cost.load import Heard, processor_s, resident_bytes, talk
from benchmarks.cost.server import Server
from benchmarks.measure import argument_parser, parse_arguments, write_result
from example.tiny_repo import make_tiny_repo

MANY = ("moshi_patch.server",)
logger = logging.getLogger(__name__)


def chat(server: Server) -> str:
    return f"ws://{server.address}/api/chat"


def metrics(server: Server) -> dict[str, float]:
    """What `/metrics` says, by name."""
    with urllib.request.urlopen(f"http://{server.address}/metrics") as answer:
        lines = re.findall(r"^(moshi_[^ ]+) (\S+)$", answer.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def measure(servers: list[Server], people: int, seconds: float, fast: bool) -> dict[str, Any]:
    """`people` spread over `servers` talk for so long: processor time per frame, and what they heard."""
    urls = [chat(servers[number % len(servers)]) for number in range(people)]
    asyncio.run(talk(urls, min(2.0, seconds), fast=fast))  # so that everything has been used once
    before = sum(processor_s(server.process.pid) for server in servers)
    heard = asyncio.run(talk(urls, seconds, fast=fast))
    used = sum(processor_s(server.process.pid) for server in servers) - before
    return {"processor_ms_per_frame": round(1000 * used / max(1, heard.sent), 2), **heard.summary()}


def measure_rows(
    repo: Path, rows: list[int], seconds: float, stock: int, fast: bool, options: list[str]
) -> list[dict[str, Any]]:
    """One entry for each number of rows, up to the first at which a tick takes 80 ms."""
    results = []
    for count in rows:
        with Server(repo, "--rows", str(count), *options, program=MANY) as server:
            mine = measure([server], count, seconds, fast)
            figures = metrics(server)
            steps, frames = (figures[f"moshi_{name}_total"] for name in ("steps", "frames"))
            mine["processor_ms_per_tick"] = round(mine["processor_ms_per_frame"] * frames / steps, 1)
            for name, quantile in (("p50", "0.5"), ("p99", "0.99")):
                mine[f"tick_ms_{name}"] = round(1000 * figures[f'moshi_tick_seconds{{quantile="{quantile}"}}'], 1)
            mine["dropped"] = int(figures["moshi_dropped_frames_total"])
            mine["resident_mib"] = round(resident_bytes(server.process.pid) / 2**20, 1)
        entry = {"rows": count, "many": mine}
        if stock:
            with contextlib.ExitStack() as stack:
                servers = [stack.enter_context(Server(repo)) for _ in range(min(count, stock))]
                entry["stock_servers"] = len(servers)
                entry["stock"] = measure(servers, len(servers), seconds, fast)
            ratio = mine["processor_ms_per_frame"] / entry["stock"]["processor_ms_per_frame"]
            entry["processor_over_stock"] = round(ratio, 3)
        logger.info("%s", entry)
        results.append(entry)
        if mine["processor_ms_per_tick" if fast else "tick_ms_p50"] >= 80:
            break
    return results


def measure_hour(server: Server, people: int, minutes: float, joins: int) -> dict[str, Any]:
    """Half of the people talk on, the others come and go `joins` times in all: does memory grow?"""
    staying, moving = (people + 1) // 2, people // 2
    stay = max(0.5, 60 * minutes * moving / max(1, joins))
    samples: list[tuple[float, float]] = []
    heard, start = Heard(), time.monotonic()
    before = processor_s(server.process.pid)

    async def run() -> None:
        url, seconds = chat(server), 60 * minutes
        talking = asyncio.gather(
            talk([url] * staying, seconds, heard=heard), talk([url] * moving, seconds, stay, heard=heard)
        )
        while not talking.done():
            samples.append((time.monotonic() - start, resident_bytes(server.process.pid) / 2**20))
            await asyncio.sleep(min(5.0, seconds / 50))
        await talking

    asyncio.run(run())
    used = processor_s(server.process.pid) - before
    figures = metrics(server)
    times, sizes = np.array(samples).T
    late = times > times[-1] / 3  # after the beginning
    return {
        "minutes": minutes,
        "people": people,
        "joined": int(figures["moshi_joined_total"]),
        "dropped": int(figures["moshi_dropped_frames_total"]),
        "late_frames": int(figures["moshi_late_frames_total"]),
        "processor_ms_per_frame": round(1000 * used / max(1, heard.sent), 2),
        "resident_mib": {"first_third": round(float(sizes[~late].max()), 1), "last": round(float(sizes[-1]), 1)},
        "slope_mib_per_minute": round(float(np.polyfit(times[late] / 60, sizes[late], 1)[0]), 3),
        **heard.summary(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, device=False)
    parser.set_defaults(threads=1)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64")
    parser.add_argument("--seconds", type=float, default=20, help="for each number of rows")
    parser.add_argument("--stock", type=int, default=2, help="stock servers beside each other at most; 0: none")
    parser.add_argument("--fast", action="store_true", help="not in real time, for a machine that is busy")
    parser.add_argument("--float32", action="store_true", help="of the server for many; stock's is bfloat16")
    parser.add_argument("--minutes", type=float, default=60, help="0: leave that part out")
    parser.add_argument("--people", type=int, default=4, help="in that part")
    parser.add_argument("--joins", type=int, default=1000, help="in that part")
    args = parse_arguments(parser, argv)
    options = ["--float32"] if args.float32 else []
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        repo = make_tiny_repo(Path(folder, "ttt"), ttt=True)
        rows = [int(count) for count in args.rows.split(",") if count]
        if rows:
            results["rows"] = measure_rows(repo, rows, args.seconds, args.stock, args.fast, options)
        if args.minutes:
            with Server(repo, "--rows", str(args.people), *options, program=MANY) as server:
                results["steady"] = measure_hour(server, args.people, args.minutes, args.joins)
            logger.info("%s", results["steady"])
    write_result("many", args, results=results)


if __name__ == "__main__":
    main()
