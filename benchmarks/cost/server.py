"""Measures whether the server leaks memory, and how long its steps take in a long conversation, with TTT and without.

`python -m benchmarks.cost.server [--cycles 1000] [--minutes 30] [--out FILE.json]`

Both with the real server in processes of its own and a tiny model on the CPU, over websockets.

*Cycles*: connect, say a few words, hear an answer, close; resident memory of the server after each. The slope is the
least-squares line through those after the warm-up, without and with `--memory`.

*Steps*: the same speech to two servers, of a model with TTT and of the same model without it, in alternating blocks, as
fast as they answer. Each server's own `/api/ttt` gives p50 and p99, from the start of a step until its answer was
handed to the socket: the model's step, Mimi's decoder and Opus.
"""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from tqdm import trange

from benchmarks.cost.load import encode
from benchmarks.measure import argument_parser, parse_arguments, write_result
from example.tiny_repo import make_tiny_repo

ROOT = Path(__file__).parents[2]

STEPS_PER_S = 12.5
WORDS = 8  # messages of 80 ms per cycle
WARM_UP = 0.1  # of the cycles
BUSY = 1013

logger = logging.getLogger(__name__)


STOCK = ("moshi_patch", "moshi.server", "--static", "none")


class Server:
    """A server with a local repository, in a process of its own; `program`: what `python -m` runs."""

    def __init__(self, repo: Path, *options: str, program: tuple[str, ...] = STOCK):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        host, port = self.address.split(":")
        command = [sys.executable, "-m", *program, "--device", "cpu"]
        command += ["--hf-repo", str(repo), "--host", host, "--port", port, *options]
        environment = os.environ | {"NO_TORCH_COMPILE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        for _ in range(1200):
            with socket.socket() as client:
                if client.connect_ex((host, int(port))) == 0:
                    return
            if self.process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with code {self.process.returncode}")
            time.sleep(0.1)
        raise RuntimeError(f"{' '.join(command)} does not listen")

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{self.address}/api/ttt") as answer:
            return json.load(answer)

    def resident_kib(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

    async def connect(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        """A websocket after the handshake, tried again while the server is busy."""
        while True:
            websocket = await session.ws_connect(f"ws://{self.address}/api/chat")
            message = await websocket.receive()
            if message.data != BUSY:
                assert message.data == b"\x00", message
                return websocket

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()


async def next_audio(websocket: aiohttp.ClientWebSocketResponse) -> None:
    while (await websocket.receive_bytes())[0] != 1:
        pass


async def cycle_memory(server: Server, cycles: int) -> dict[str, Any]:
    """Holds `cycles` conversations one after the other; returns the server's resident memory, in KiB."""
    words, resident = encode(WORDS), []
    async with aiohttp.ClientSession() as session:
        for _ in trange(cycles, desc="cycles", leave=False):
            websocket = await server.connect(session)
            for message in words:
                await websocket.send_bytes(message)
            await next_audio(websocket)
            await websocket.close()
            resident.append(server.resident_kib())
    start = int(WARM_UP * cycles)
    slope = np.polyfit(np.arange(start, cycles), resident[start:], 1)[0]
    half = np.polyfit(np.arange(cycles // 2, cycles), resident[cycles // 2 :], 1)[0]
    return {
        "cycles": cycles,
        "warm_up_cycles": start,
        "slope_kib_per_cycle": round(float(slope), 3),
        "slope_of_second_half_kib_per_cycle": round(float(half), 3),
        "resident_kib": {"first": resident[0], "after_warm_up": resident[start], "last": resident[-1]},
        "highest_resident_kib": max(resident),
    }


async def stream(servers: dict[str, Server], steps: int, block: int) -> dict[str, Any]:
    """Sends the same speech to all servers, in alternating blocks; returns the step times that they report."""
    messages = encode(steps)
    async with aiohttp.ClientSession() as session:
        websockets = {name: await server.connect(session) for name, server in servers.items()}
        heard = dict.fromkeys(servers, 0)
        behind = dict.fromkeys(servers, 0)  # answers that the codec's and the codebooks' delays keep back
        for start in trange(0, len(messages), block, desc="blocks", leave=False):
            said = messages[start : start + block]
            for name, websocket in websockets.items():  # one at a time: they must not compete
                for message in said:
                    await websocket.send_bytes(message)
                while heard[name] < start + len(said) - behind[name]:
                    try:
                        await asyncio.wait_for(next_audio(websocket), None if start else 10)
                    except asyncio.TimeoutError:
                        behind[name] = len(said) - heard[name]
                    else:
                        heard[name] += 1
        await asyncio.sleep(1.5)  # a status may be a second old
        status = {name: await asyncio.to_thread(server.status) for name, server in servers.items()}
        for websocket in websockets.values():
            await websocket.close()
    result: dict[str, Any] = {
        name: {
            "steps": one["steps"],
            **{key + "_ms": value for key, value in one["step_ms"].items()},
            "p99_over_p50": round(one["step_ms"]["p99"] / one["step_ms"]["p50"], 3),
            "updates": [layer["updates"] for layer in one["layers"].values()],
        }
        for name, one in status.items()
    }
    result["ttt_p99_over_p50_beyond_stock"] = round(result["ttt"]["p99_over_p50"] / result["stock"]["p99_over_p50"], 3)
    result["ttt_over_stock_p50"] = round(result["ttt"]["p50_ms"] / result["stock"]["p50_ms"], 3)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, device=False)
    parser.set_defaults(threads=1)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--memory-cycles", type=int, default=200, help="the same with --memory")
    parser.add_argument("--minutes", type=float, default=30, help="of audio")
    parser.add_argument("--block", type=int, default=25, help="steps to one server before it is the other's turn")
    args = parse_arguments(parser, argv)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        ttt = make_tiny_repo(Path(folder, "ttt"), ttt=True)
        stock = make_tiny_repo(Path(folder, "stock"))
        if args.cycles:
            with Server(ttt) as server:
                results["cycles"] = asyncio.run(cycle_memory(server, args.cycles))
            logger.info("cycles: %s", results["cycles"])
        if args.memory_cycles:
            with Server(ttt, "--memory", str(Path(folder, "memory"))) as server:
                results["memory_cycles"] = asyncio.run(cycle_memory(server, args.memory_cycles))
            logger.info("cycles with --memory: %s", results["memory_cycles"])
        if args.minutes:
            with Server(stock) as one, Server(ttt) as other:
                steps = round(args.minutes * 60 * STEPS_PER_S)
                results["steps"] = asyncio.run(stream({"stock": one, "ttt": other}, steps, args.block))
            logger.info("steps: %s", results["steps"])
    write_result("server", args, results=results)


if __name__ == "__main__":
    main()
