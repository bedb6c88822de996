"""Measures what TTT costs in one streaming step, and whether the step at the end of a chunk takes longer.

`python -m benchmarks.cost.step [--device cuda] [--size small|7b] [--rows 1 8] [--out FILE.json]`

Three models of the same size stream alternately in one process, step by step: stock, and TTT with the default layer
selection and either update. Reported per model: p50 and p99 of a step; beside each other: the median of per-step
ratios, and TTT's p50 at each phase of the chunk, where a spike would show. On CUDA the step runs as `LMGen` runs it, as
a replayed graph.
"""

import argparse
import contextlib
import logging
import statistics

import torch
from moshi.models.lm import LMModel
from moshi.utils.compile import CUDAGraphed
from tqdm import trange

import moshi_patch
from benchmarks.measure import argument_parser, parse_arguments, timed, write_result

logger = logging.getLogger(__name__)

UPDATES = ("hebbian", "residual")

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


def compare(rows: int, args: argparse.Namespace) -> list[dict]:
    """Time `chunks` chunks of steps of all models, alternating; a row of results for each update."""
    device, size = torch.device(args.device), args.chunk_size
    streams = {"stock": Stream(rows, args)}
    for update in UPDATES:
        ttt = {"ttt_enabled": True, "ttt_chunk_size": size, "ttt_update": update, **args.layers}
        streams[update] = Stream(rows, args, **ttt)
    times: dict[str, list[float]] = {name: [] for name in streams}
    with contextlib.ExitStack() as stack:
        for stream in streams.values():
            stack.enter_context(stream.context)
            for _ in range(size + 4):  # warm-up: kernels, graph capture, and a first chunk to fold
                stream()
            stream.model.reset_streaming()
        for _ in trange(size * args.chunks, desc=f"B={rows}", leave=False):
            for name, stream in streams.items():
                times[name].append(timed(stream, device))
        stats = {update: moshi_patch.ttt_stats(streams[update].model) for update in UPDATES}
    steady = {name: values[size:] for name, values in times.items()}  # the first chunk has nothing to fold
    results = []
    for update in UPDATES:
        assert all(layer["updates"] == [args.chunks] * rows for layer in stats[update].values()), stats
        p50 = {name: statistics.median(steady[name]) for name in ("stock", update)}
        spread = {name: quantile(steady[name], 0.99) / p50[name] for name in p50}
        phases = [statistics.median(steady[update][phase::size]) for phase in range(size)]
        results.append(
            {
                "rows": rows,
                "update": update,
                "layers": list(stats[update]),
                "ratio_p50": round(median_ratio(steady[update], steady["stock"]), 3),
                "ratio_to_hebbian_p50": round(median_ratio(steady[update], steady["hebbian"]), 3),
                "stock_p99_over_p50": round(spread["stock"], 3),
                "ttt_p99_over_p50": round(spread[update], 3),
                "ttt_p99_over_p50_beyond_stock": round(spread[update] / spread["stock"], 3),
                "chunk_end_over_p50": round(phases[-1] / p50[update], 3),
                "chunk_start_over_p50": round(phases[0] / p50[update], 3),
                "slowest_phase_over_p50": round(max(phases) / p50[update], 3),
                "state_bytes_per_row": state_bytes(streams[update].model, size),
            }
        )
    return results


def median_ratio(values: list[float], others: list[float]) -> float:
    """The median of ratios step by step."""
    return statistics.median(map(float.__truediv__, values, others))


def state_bytes(model: LMModel, chunk: int) -> int:
    """What the fast weights of one row take, scalars left out."""
    total = 0
    for gating in moshi_patch.ttt_gatings(model).values():
        residual = gating.config.update == "residual"
        total += 4 * gating.dim * gating.hidden + 2 * chunk * (2 * gating.dim + (4 if residual else 2) * gating.hidden)
        total += 4 * 2 * chunk**2 * residual
    return total


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=8, help="at least 2: the first has nothing to fold")
    parser.add_argument("--layers", type=lambda text: {"ttt_layers": text}, default={}, help='such as "1,5"')
    args = parse_arguments(parser, argv)
    if args.chunks < 2:
        parser.error(f"--chunks {args.chunks}: must be 2 or more, as the first chunk is not counted.")
    moshi_patch.install()
    results = [row for rows in args.rows for row in compare(rows, args)]
    for row in results:
        logger.info(
            "B=%(rows)d %(update)-8s  TTT/stock %(ratio_p50).3fx  TTT/hebbian %(ratio_to_hebbian_p50).3fx  p99/p50: "
            "stock %(stock_p99_over_p50).2f, TTT %(ttt_p99_over_p50).2f  "
            "chunk end/p50 %(chunk_end_over_p50).2f  slowest phase/p50 %(slowest_phase_over_p50).2f",
            row,
        )
    write_result("step", args, results=results)


if __name__ == "__main__":
    main()
