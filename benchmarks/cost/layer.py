"""Measures time and peak memory of one gated MLP of Moshi 7B: stock, with each update, and in the materialised form.

`python -m benchmarks.cost.layer [--device cuda] [--steps 625 1250 ...] [--out FILE.json]`

Four variants run alternately in one process, so that a drift of the machine meets all of them: the stock
`ActivationGating`, `TTTGating` with the paper's update and with the residual one, and the materialised form of the
paper's Algorithm 1 (per-chunk deltas, cumulative sum, one matrix product per chunk), which exists only here. Ratios are
medians of per-round ratios against stock.

Shapes: `B` rows, `T` steps, `D` width, `H` hidden width, `C` chunk size, `n` chunks.
"""

import argparse
import logging
import math
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from moshi.modules.gating import ActivationGating
from tqdm import tqdm

from benchmarks.measure import PeakMemory, argument_parser, parse_arguments, synchronize, timed, write_result
from moshi_patch import TTTConfig, TTTGating
from moshi_patch.call import LayerCall, current_call

logger = logging.getLogger(__name__)


class Materialised(torch.nn.Module):
    """Algorithm 1 of arXiv 2604.06169 as a data-parallel scan: builds every chunk's weight, `[B, n, D, H]`."""

    def __init__(self, ttt: TTTGating):
        super().__init__()
        self.ttt = ttt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ttt, size = self.ttt, self.ttt.config.chunk_size
        batch, steps, _ = x.shape
        z = ttt._hidden(x)
        v = ttt.target_generator(current_call.get().x0, size)
        missing = -steps % size
        z_c = F.pad(z, (0, 0, 0, missing)).view(batch, -1, size, z.shape[2])
        v_c = F.pad(v, (0, 0, 0, missing)).view(batch, -1, size, v.shape[2])
        updates = ttt.config.learning_rate * v_c.transpose(2, 3) @ z_c
        delta = F.pad(updates[:, :-1].cumsum(1), (0, 0, 0, 0, 1, 0))
        out = z_c @ (ttt.linear_out.weight + delta).transpose(2, 3)
        return out.flatten(1, 2)[:, :steps]


def run_once(module: torch.nn.Module, x: torch.Tensor, x0: torch.Tensor, grad: torch.Tensor, backward: bool) -> None:
    """One forward, or forward and backward, of `x [B, T, D]`."""
    token = current_call.set(LayerCall(x0, frozenset()))
    try:
        if not backward:
            with torch.no_grad():
                module(x)
            return
        module(x).backward(grad)
    finally:
        current_call.reset(token)
    for parameter in module.parameters():
        parameter.grad = None
    x.grad = x0.grad = None


def compare(variants: dict, steps: int, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Rows of results at T = `steps`: per variant and direction the ratio to stock in time and in peak memory."""
    make = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(args.batch, steps, args.dim, **make).requires_grad_()
    x0 = torch.randn(args.batch, steps, args.dim, **make).requires_grad_()
    grad = torch.randn(args.batch, steps, args.dim, **make)
    rows = []
    for backward in (False, True):
        times: dict[str, list[float]] = {name: [] for name in variants}
        peaks = {}
        for name, module in variants.items():  # peak memory above the weights, gradients included
            run_once(module, x, x0, grad, backward)  # warm-up: libraries keep what they allocate in a first call
            with PeakMemory(device) as peak:
                run_once(module, x, x0, grad, backward)
            peaks[name] = peak.bytes
        label = f"T={steps} {'forward+backward' if backward else 'forward'}"
        for _ in tqdm(range(args.rounds), desc=label, leave=False):
            for name, module in variants.items():
                times[name].append(timed(partial(run_once, module, x, x0, grad, backward), device))
        for name in variants:
            ratios = [a / b for a, b in zip(times[name], times["stock"], strict=True)]
            rows.append(
                {
                    "steps": steps,
                    "direction": "forward+backward" if backward else "forward",
                    "variant": name,
                    "time_ratio": round(statistics.median(ratios), 3),
                    "time_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                    "memory_ratio": round(peaks[name] / peaks["stock"], 3),
                    "peak_bytes": peaks[name],
                    "operations_ratio": round(operations(steps, args, name), 3),
                }
            )
    synchronize(device)
    return rows


def operations(steps: int, args: argparse.Namespace, variant: str) -> float:
    """Multiply-adds relative to the stock MLP's 3·T·D·H, from the shapes alone."""
    width, hidden, chunk = args.dim, args.hidden, args.chunk_size
    stock = 3 * steps * width * hidden
    chunks = math.ceil(steps / chunk)
    if variant == "stock":
        extra = 0
    elif variant == "materialised":
        extra = steps * width * width + steps * width * hidden
    else:
        seen = sum(min(chunk, steps - i * chunk) * i * chunk for i in range(chunks))
        written = (chunks - 1) * chunk
        extra = written * width * width + seen * (width + hidden)
        if variant == "residual":  # the Gram matrix, the whitened keys, what is missing
            extra += written * chunk * (2 * hidden + width)
    return 1 + extra / stock


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[1250])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-materialised", action="store_true", help="it needs n·D·H values; leave it out at large T")
    args = parse_arguments(parser, argv)
    device = torch.device(args.device)
    torch.manual_seed(0)

    stock = ActivationGating(args.dim, int(4.125 * args.dim), F.silu, device=device, dtype=torch.bfloat16)
    args.hidden = stock.linear_out.in_features
    variants = {"stock": stock}
    for name, update in (("ttt", "hebbian"), ("residual", "residual")):
        config = TTTConfig(enabled=True, chunk_size=args.chunk_size, update=update)
        variants[name] = TTTGating(stock, config, device=device, dtype=torch.bfloat16)
        torch.nn.init.normal_(variants[name].target_generator.conv1d.conv.weight)
    variants["materialised"] = Materialised(variants["ttt"])
    if args.no_materialised:
        variants.pop("materialised")
    for module in variants.values():
        module.train()

    rows = []
    for steps in args.steps:
        rows += compare(variants, steps, args, device)
        for row in rows[-2 * len(variants) :]:
            logger.info(
                "T=%(steps)-6d %(direction)-17s %(variant)-13s time %(time_ratio).2fx (by operations "
                "%(operations_ratio).2fx)  peak memory %(memory_ratio).2fx",
                row,
            )
    write_result("layer", args, rows=rows)


if __name__ == "__main__":
    main()
