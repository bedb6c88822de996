"""Measures what `ttt_kind="mlp"` adds to the layers that it stands in: one pass, a training pass, one streamed step.

`python -m benchmarks.cost.hybrid [--dim 1024] [--mini-batch-sizes 8 16 64] [--out FILE.json]`

The same transformer layer with the memory and without runs in turns in one process, and what is compared is processor
time, so that other work on the machine meets both. Ratios are medians of per-round ratios against the layer without.
Peak memory is that of the tensors of one pass forward and backward of the memory alone.

Shapes: `T` steps, `D` width, `H` hidden width of the gated MLP, `h` heads, `d` head width, `C` mini-batch size.
"""

import argparse
import contextlib
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingTransformer
from tqdm import trange

import moshi_patch
from benchmarks.measure import PeakMemory, argument_parser, parse_arguments, write_result
from moshi_patch import TTTMLP, TTTConfig

logger = logging.getLogger(__name__)

HEAD = 128
"""d of Moshi 7B."""

MODEL = {
    "n_q": 1, "dep_q": 0, "delays": [0, 0], "card": 8, "text_card": 8, "num_layers": 1, "hidden_scale": 4.125,
    "causal": True, "context": 3000, "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope",
}  # fmt: skip


def make_transformer(args: argparse.Namespace, **ttt: Any) -> StreamingTransformer:
    """One layer of a temporal transformer, with a gate that is open, so that nothing is multiplied by zero."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model = LMModel(dim=args.dim, num_heads=args.dim // HEAD, device="cpu", dtype=dtype, **MODEL, **ttt)
    return model.transformer.train()


def one_pass(transformer: StreamingTransformer, x: torch.Tensor, backward: bool) -> None:
    """Forward of `x [1, T, D]`, or forward and backward."""
    if not backward:
        with torch.no_grad():
            transformer(x)
        return
    transformer(x.requires_grad_()).square().mean().backward()
    x.grad = None
    for parameter in transformer.parameters():
        parameter.grad = None


@torch.no_grad()
def steps(transformer: StreamingTransformer, x: torch.Tensor) -> None:
    """`x [1, 1, D]`, one step of a stream."""
    transformer(x)


def in_turns(runs: dict[str, Callable[[], None]], rounds: int, label: str) -> dict[str, list[float]]:
    """Seconds of processor time of each run, round by round; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in trange(rounds + 1, desc=label, leave=False):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number:
                times[name].append(time.process_time() - start)
    return times


def compared(times: dict[str, list[float]], place: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of results for each C: how many times the processor time of the layer without."""
    rows = []
    for size in args.mini_batch_sizes:
        ratios = [a / b for a, b in zip(times[str(size)], times["stock"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "place": place,
                "mini_batch_size": size,
                "time_ratio": round(statistics.median(ratios), 3),
                "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
                "operations_ratio": round(operations(size, args), 3),
            }
        )
    return rows


def operations(size: int, args: argparse.Namespace) -> float:
    """Multiply-adds of a step forward over those of the layer without, attention's scores left out."""
    width, hidden = args.dim, 2 * int(4.125 * args.dim) // 3  # as moshi splits it between gate and value
    stock = 4 * width**2 + 3 * width * hidden
    projections = 4 * width**2 + width * (width // HEAD)
    inner = 28 * width * HEAD + 10 * size * width  # seven products with an inner layer; those among C steps
    return 1 + (projections + inner) / stock


def streamed(transformers: dict[str, StreamingTransformer], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One step of a stream, and whether steps at some place of a mini-batch take longer than others."""
    x = torch.randn(1, 1, args.dim, dtype=getattr(torch, args.dtype))
    with contextlib.ExitStack() as stack:
        for transformer in transformers.values():
            stack.enter_context(transformer.streaming(1))
        runs = {name: partial(steps, transformer, x) for name, transformer in transformers.items()}
        times = in_turns(runs, args.stream_steps, "steps")
        states = {
            name: sum(
                tensor.numel() * tensor.element_size()
                for memory in moshi_patch.ttt_memories(transformer).values()
                for tensor in vars(memory._streaming_state.fast).values()
            )
            for name, transformer in transformers.items()
        }
    rows = compared(times, "streamed step", args)
    middle = {name: statistics.median(values) for name, values in times.items()}
    for row in rows:
        name, size = str(row["mini_batch_size"]), row["mini_batch_size"]
        phases = [statistics.median(times[name][phase::size]) for phase in range(size)]
        row["slowest_phase_over_p50"] = round(max(phases) / middle[name], 3)
        row["state_bytes_per_row"] = states[name]
    return rows


def peak_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes of one pass forward and backward of a memory alone, with groups of mini-batches computed again or not."""
    rows = []
    for size in args.mini_batch_sizes:
        for group in (0, 8):
            config = TTTConfig(kind="mlp", mini_batch_size=size, scan_checkpoint_group_size=group)
            dtype = getattr(torch, args.dtype)
            memory = TTTMLP(args.dim, args.dim // HEAD, config, dtype=dtype)
            x = torch.randn(1, args.memory_steps, args.dim, dtype=dtype).requires_grad_()
            with PeakMemory(torch.device("cpu")) as peak:
                memory(x).square().mean().backward()
            rows.append({"mini_batch_size": size, "group_size": group, "steps": args.memory_steps, "bytes": peak.bytes})
    return rows


def on(ttt: dict[str, Any]) -> dict[str, Any]:
    return {"ttt_enabled": True, "ttt_kind": "mlp", "ttt_layers": "all", "ttt_initial_gating_alpha": 0.1, **ttt}


def timed_in_turns(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of results of all that is timed."""
    transformers = {"stock": make_transformer(args)}
    for size in args.mini_batch_sizes:
        transformers[str(size)] = make_transformer(args, **on({"ttt_mini_batch_size": size}))
    rows = []
    for place, backward in (("one pass", False), ("forward and backward", True)):
        x = torch.randn(1, args.steps, args.dim, dtype=getattr(torch, args.dtype))
        runs = {name: partial(one_pass, transformer, x, backward) for name, transformer in transformers.items()}
        rows += compared(in_turns(runs, args.rounds, place), place, args)
    return rows + streamed(transformers, args)


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, device=False)
    parser.add_argument("--dim", type=int, default=1024, help=f"D, a multiple of {HEAD}; 4096 in Moshi 7B")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--mini-batch-sizes", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--steps", type=int, default=640, help="T of one pass")
    parser.add_argument("--rounds", type=int, default=9, help="0: nothing is timed")
    parser.add_argument("--stream-steps", type=int, default=512)
    parser.add_argument(
        "--memory-steps", type=int, default=1280, help="T of the pass whose memory is measured; 0: none"
    )
    args = parse_arguments(parser, argv)
    moshi_patch.install()
    rows = timed_in_turns(args) if args.rounds else []
    memory = peak_memory(args) if args.memory_steps else []
    for row in rows:
        logger.info(
            "%(place)-21s C=%(mini_batch_size)-3d processor time %(time_ratio).2fx (by operations "
            "%(operations_ratio).2fx)",
            row,
        )
    for row in memory:
        logger.info("C=%(mini_batch_size)-3d groups of %(group_size)d: peak %(bytes)d bytes", row)
    write_result("hybrid", args, rows=rows, memory=memory)


if __name__ == "__main__":
    main()
