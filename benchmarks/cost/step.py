"""Measures what TTT costs in one streaming step, and whether the step at the end of a chunk takes longer.

`python -m benchmarks.cost.step [--device cuda] [--size small|7b] [--rows 1 8] [--out FILE.json]`

Two models of the same size stream alternately in one process, step by step: stock, and TTT with the default layer
selection. Reported per model: p50 and p99 of a step; beside each other: the median of per-step ratios, and TTT's p50
at each phase of the chunk, where a spike would show. On CUDA the step runs as `LMGen` runs it, as a replayed graph.
"""

import argparse
import logging
import statistics
from functools import partial

import torch
from moshi.models.lm import LMModel
from moshi.utils.compile import CUDAGraphed
from tqdm import trange

import moshi_patch
from benchmarks.measure import argument_parser, parse_arguments, timed, write_result

logger = logging.getLogger(__name__)

SIZES = {
    "small": {"dim": 1024, "num_heads": 8, "num_layers": 6, "context": 250, "card": 2048, "text_card": 8000},
    "7b": {"dim": 4096, "num_heads": 32, "num_layers": 32, "context": 3000, "card": 2048, "text_card": 32000},
}
"""Temporal transformers: the depformer takes no part, as TTT never touches it."""

COMMON = {
    "n_q": 16,
    "dep_q": 0,
    "delays": [0] * 17,
    "hidden_scale": 4.125,
    "causal": True,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
}


class Stream:
    """A streaming model of B rows and the step that advances it."""

    def __init__(self, rows: int, args: argparse.Namespace, **ttt):
        torch.manual_seed(0)
        device = torch.device(args.device)
        self.model = LMModel(device=device, dtype=torch.bfloat16, **COMMON, **SIZES[args.size], **ttt).eval()
        with torch.no_grad():
            for parameter in moshi_patch.ttt_parameters(self.model).values():
                torch.nn.init.normal_(parameter, std=0.02)
        self.context = self.model.streaming(rows)
        self.codes = torch.randint(0, 2048, (rows, 17, 1), device=device)
        self.step = CUDAGraphed(self.model.forward_text, disable=device.type != "cuda")

    @torch.no_grad()
    def __call__(self) -> None:
        self.step(self.codes)


def compare(rows: int, args: argparse.Namespace) -> dict:
    """Time `chunks` chunks of steps of both models, alternating."""
    device, size = torch.device(args.device), args.chunk_size
    stock = Stream(rows, args)
    ttt = Stream(rows, args, ttt_enabled=True, ttt_chunk_size=size, **args.layers)
    times: dict[str, list[float]] = {"stock": [], "ttt": []}
    with stock.context, ttt.context:
        for _ in range(size + 4):  # warm-up: kernels, graph capture, and a first chunk to fold
            stock()
            ttt()
        ttt.model.reset_streaming()
        for _ in trange(size * args.chunks, desc=f"B={rows}", leave=False):
            times["stock"].append(timed(stock, device))
            times["ttt"].append(timed(ttt, device))
        stats = moshi_patch.ttt_stats(ttt.model)
    assert all(layer["updates"] == [args.chunks] * rows for layer in stats.values()), stats
    steady = {name: values[size:] for name, values in times.items()}  # the first chunk has nothing to fold
    phases = [statistics.median(steady["ttt"][phase::size]) for phase in range(size)]
    p50 = {name: statistics.median(values) for name, values in steady.items()}
    spread = {name: quantile(values, 0.99) / p50[name] for name, values in steady.items()}
    return {
        "rows": rows,
        "layers": list(stats),
        "ratio_p50": round(statistics.median(map(float.__truediv__, steady["ttt"], steady["stock"])), 3),
        "stock_p99_over_p50": round(spread["stock"], 3),
        "ttt_p99_over_p50": round(spread["ttt"], 3),
        "ttt_p99_over_p50_beyond_stock": round(spread["ttt"] / spread["stock"], 3),
        "chunk_end_over_p50": round(phases[-1] / p50["ttt"], 3),
        "chunk_start_over_p50": round(phases[0] / p50["ttt"], 3),
        "slowest_phase_over_p50": round(max(phases) / p50["ttt"], 3),
        "state_bytes_per_row": sum(
            4 * g.dim * g.hidden + 2 * size * (g.dim + g.hidden) * 2
            for g in moshi_patch.ttt_gatings(ttt.model).values()
        ),
    }


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--layers", type=lambda text: {"ttt_layers": text}, default={}, help='such as "1,5"')
    args = parse_arguments(parser, argv)
    moshi_patch.install()
    results = list(map(partial(compare, args=args), args.rows))
    for row in results:
        logger.info(
            "B=%(rows)d  TTT/stock %(ratio_p50).3fx  p99/p50: stock %(stock_p99_over_p50).2f, TTT "
            "%(ttt_p99_over_p50).2f  chunk end/p50 %(chunk_end_over_p50).2f  slowest phase/p50 "
            "%(slowest_phase_over_p50).2f",
            row,
        )
    write_result("step", args, results=results)


if __name__ == "__main__":
    main()
