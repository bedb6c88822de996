"""Measures what a person costs on the server for many, against stock servers side by side, and whether it lasts.

`python -m benchmarks.cost.many [--rows 1,2,4,8] [--seconds 20] [--fast] [--minutes 60] [--joins 1000] [--out FILE]`

*Rows*: for 1, 2, 4, 8 ... rows, until a tick takes 80 ms, a server in a process of its own and as many people, in real
time; beside it as many servers of one conversation, `python -m moshi_patch moshi.server`, but at most `--stock`, with
one person each. The two talk in turns, `--turns` each, as a processor is not equally fast at all times. Processor time
per person and frame is that of the server's processes over the frames that were sent. p50, p99 and late frames depend
entirely on what else the machine does. On a machine that is busy use `--fast`: nobody keeps to real time then, no frame
is dropped, and the percentiles mean nothing. A tick "takes" its processor time then.

*Minutes*: at `--people` rows one half talks on and the other comes and goes, `--joins` times in all. Resident memory
every few seconds, and the line through it.

The model is the example's tiny one, on one core of the CPU: what is measured is the serving, not the model. Tokens are
drawn as moshi does, with its temperatures and top-k.
"""

import asyncio
import contextlib
import json
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
LEAVE_S = 2.0
"""In which all those who talked in the turn before are gone."""

logger = logging.getLogger(__name__)


def chat(server: Server) -> str:
    return f"ws://{server.address}/api/chat"


def metrics(server: Server) -> dict[str, float]:
    """What `/metrics` says, by name."""
    with urllib.request.urlopen(f"http://{server.address}/metrics") as answer:
        lines = re.findall(r"^(moshi_[^ ]+) (\S+)$", answer.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def what_the_server_says(figures: dict[str, float]) -> dict[str, float]:
    """Of its latest 8192 ticks, and of all frames."""
    quantiles = {"tick_ms_p50": "0.5", "tick_ms_p99": "0.99"}
    ticks = {name: figures[f'moshi_tick_seconds{{quantile="{quantile}"}}'] for name, quantile in quantiles.items()}
    return {
        **{name: round(1000 * seconds, 1) for name, seconds in ticks.items()},
        "dropped": int(figures["moshi_dropped_frames_total"]),
        "late_by_server": int(figures["moshi_late_frames_total"]),
    }


class Load:
    """Servers that people talk to in several turns, and what that takes in all of them."""

    def __init__(self, servers: list[Server], people: int, fast: bool):
        self.servers, self.fast = servers, fast
        self.urls = [chat(servers[number % len(servers)]) for number in range(people)]
        self.heard, self.used_s, self.turns = Heard(), 0.0, []
        asyncio.run(talk(self.urls, 2.0, fast=fast))  # so that everything has been used once

    def turn(self, seconds: float) -> None:
        """Everybody talks for so long."""
        time.sleep(LEAVE_S)
        used, sent = self._processor_s(), self.heard.sent
        asyncio.run(talk(self.urls, seconds, fast=self.fast, heard=self.heard))
        used = self._processor_s() - used
        self.used_s += used
        self.turns.append(round(1000 * used / max(1, self.heard.sent - sent), 2))

    def _processor_s(self) -> float:
        return sum(processor_s(server.process.pid) for server in self.servers)

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "processor_ms_per_frame": round(1000 * self.used_s / max(1, self.heard.sent), 2),
            "of_each_turn": self.turns,
            **self.heard.summary(),
        }


def measure_rows(
    repo: Path, rows: list[int], seconds: float, turns: int, stock: int, fast: bool, options: list[str]
) -> list[dict[str, Any]]:
    """One entry for each number of rows, up to the first at which a tick takes 80 ms."""
    results = []
    for count in rows:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Server(repo, "--rows", str(count), *options, program=MANY))
            loads = [Load([server], count, fast)]
            before = metrics(server)
            if stock:
                servers = [stack.enter_context(Server(repo)) for _ in range(min(count, stock))]
                loads.append(Load(servers, len(servers), fast))
            for _ in range(turns):
                for load in loads:
                    load.turn(seconds / turns)
            mine, after = loads[0].summary(), metrics(server)
            steps, frames = (after[name] - before[name] for name in ("moshi_steps_total", "moshi_frames_total"))
            mine["processor_ms_per_tick"] = round(mine["processor_ms_per_frame"] * frames / steps, 1)
            mine |= what_the_server_says(after)
            mine["resident_mib"] = round(resident_bytes(server.process.pid) / 2**20, 1)
        entry = {"rows": count, "many": mine}
        if stock:
            entry |= {"stock_servers": len(servers), "stock": loads[1].summary()}
            ratio = mine["processor_ms_per_frame"] / entry["stock"]["processor_ms_per_frame"]
            entry["processor_over_stock"] = round(ratio, 3)
        logger.info("%s", entry)
        results.append(entry)
        if mine["processor_ms_per_tick" if fast else "tick_ms_p50"] >= 80:
            break
    return results


def make_repo(folder: Path) -> Path:
    """The example's tiny model with TTT, whose tokens are drawn as moshi does: the example itself is greedy."""
    repo = make_tiny_repo(folder, ttt=True)
    config = json.loads((repo / "config.json").read_text())
    (repo / "config.json").write_text(json.dumps(config | {"lm_gen_config": {}}))
    return repo


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
        **what_the_server_says(figures),
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
    parser.add_argument("--turns", type=int, default=5, help="of so many seconds in all, for each of the two")
    parser.add_argument("--stock", type=int, default=8, help="stock servers beside each other at most; 0: none")
    parser.add_argument("--fast", action="store_true", help="not in real time, for a machine that is busy")
    parser.add_argument("--float32", action="store_true", help="of the server for many; stock's is bfloat16")
    parser.add_argument("--minutes", type=float, default=60, help="0: leave that part out")
    parser.add_argument("--people", type=int, default=4, help="in that part")
    parser.add_argument("--joins", type=int, default=1000, help="in that part")
    args = parse_arguments(parser, argv)
    options = ["--float32"] if args.float32 else []
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        repo = make_repo(Path(folder, "ttt"))
        rows = [int(count) for count in args.rows.split(",") if count]
        if rows:
            results["rows"] = measure_rows(repo, rows, args.seconds, args.turns, args.stock, args.fast, options)
        if args.minutes:
            with Server(repo, "--rows", str(args.people), *options, program=MANY) as server:
                results["steady"] = measure_hour(server, args.people, args.minutes, args.joins)
            logger.info("%s", results["steady"])
    write_result("many", args, results=results)


if __name__ == "__main__":
    main()
