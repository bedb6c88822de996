"""Compares the layer and the streaming step with what this machine can do at most, by bytes and by operations.

`python -m benchmarks.cost.roofline [--device cuda] [--size small|7b] [--rows 1 8] [--threads 1] [--out FILE.json]`

Measured here, in one run: the machine's read bandwidth (products of a vector with matrices too large for its caches)
and its rate of bfloat16 multiply-adds (a large matrix product); then the gated MLP and the streaming step, stock and
with TTT, alternately. Beside each time stands what the shapes alone predict at those rates: operations for the layer,
bytes for the step. Everything is given as a ratio within the run; the machine's two rates alone have units.

Shapes: `B` rows, `T` steps, `D` width, `H` hidden width, `C` chunk size, `L` layers.
"""

import argparse
import logging
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.modules.gating import ActivationGating
from torch import nn

import moshi_patch
from benchmarks.cost.layer import operations, run_once
from benchmarks.cost.step import COMMON, SIZES, UPDATES, Stream
from benchmarks.measure import argument_parser, parse_arguments, timed, write_result
from moshi_patch import TTTConfig, TTTGating
from moshi_patch.kinds.in_place.ops.state import rows_per_step

logger = logging.getLogger(__name__)

BF16, FP32 = 2, 4
"""Bytes of a value."""


def bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes per second read by float32 products of a matrix and a vector, 512 MiB of matrices in turn; the median."""
    matrices = [torch.randn(4096, 4096, device=device) for _ in range(8)]
    vector = torch.randn(4096, device=device)
    times = [timed(partial(torch.mv, matrix, vector), device) for _ in range(rounds) for matrix in matrices]
    return matrices[0].nbytes / statistics.median(times[len(matrices) :])


def rate(device: torch.device, rounds: int, steps: int, width: int, hidden: int) -> float:
    """bfloat16 multiply-adds per second of a product `[T, D] @ [D, H]`; the median."""
    x = torch.randn(steps, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(hidden, width, device=device, dtype=torch.bfloat16)
    times = [timed(partial(F.linear, x, weight), device) for _ in range(rounds + 1)]
    return steps * width * hidden / statistics.median(times[1:])


def step_bytes(model: nn.Module, rows: int) -> dict[str, int]:
    """Bytes that one streaming step has to move: the stock model's, and what TTT adds to them.

    Weights are read once for all rows; each row has its own delta and rings. `fold` reads and writes r = ceil(D / C)
    rows of the delta, and reads the previous chunk's keys once more. With the residual update keys are float32, the
    ring is read whole both times, and the two matrices M are read six times in all.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    targets = {id(p) for p in moshi_patch.ttt_parameters(model).values()}
    weights = sum(p.nbytes for p in model.parameters() if id(p) not in embeddings | targets)
    layers = model.transformer.layers
    cache = rows * len(layers) * model.context * 2 * layers[0].self_attn.embed_dim * BF16
    parts = {"stock": weights + cache, "delta": 0, "fold": 0, "rings": 0, "whitening": 0, "target": 0}
    for gating in moshi_patch.ttt_gatings(model).values():
        width, hidden, chunk = gating.dim, gating.hidden, gating.config.chunk_size
        parts["delta"] += rows * width * hidden * FP32
        parts["fold"] += rows * 2 * rows_per_step(width, chunk) * hidden * FP32
        residual = gating.config.update == "residual"
        parts["rings"] += rows * 2 * chunk * (2 * hidden * (FP32 if residual else BF16) + width * BF16)
        parts["whitening"] += rows * 6 * chunk**2 * FP32 * residual
        parts["target"] += sum(p.nbytes for p in gating.target_generator.parameters())
    return parts


def predict(rows: int, update: str) -> dict:
    """Predicts a streaming step of Moshi 7B with the default layers and chunk from its bytes alone, on any machine."""
    settings = {**COMMON, **SIZES["7b"], "ttt_enabled": True, "ttt_update": update}
    parts = step_bytes(LMModel(device="meta", dtype=torch.bfloat16, **settings), rows)
    ratio = round(sum(parts.values()) / parts["stock"], 3)
    return {"rows": rows, "update": update, "bytes": parts, "ratio_by_bytes": ratio}


def measure_step(rows: int, args: argparse.Namespace, device: torch.device, bytes_per_second: float) -> dict:
    """Times a streaming step of both models and compares their ratio with that of their bytes."""
    stock = Stream(rows, args)
    ttt = Stream(rows, args, ttt_enabled=True, ttt_chunk_size=args.chunk_size, **args.layers)
    parts = step_bytes(ttt.model, rows)
    total = sum(parts.values())
    times: dict[str, list[float]] = {"stock": [], "ttt": []}
    with stock.context, ttt.context:
        for index in range(args.chunk_size + args.rounds * 8):
            pair = timed(stock, device), timed(ttt, device)
            if index >= args.chunk_size:  # the first chunk has nothing to fold
                times["stock"].append(pair[0])
                times["ttt"].append(pair[1])
    p50 = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rows": rows,
        "bytes": parts,
        "ratio": round(statistics.median(map(float.__truediv__, times["ttt"], times["stock"])), 3),
        "ratio_by_bytes": round(total / parts["stock"], 3),
        "bandwidth_share_stock": round(parts["stock"] / p50["stock"] / bytes_per_second, 3),
        "bandwidth_share_ttt": round(total / p50["ttt"] / bytes_per_second, 3),
    }


def measure_layer(args: argparse.Namespace, device: torch.device, width: int, peak: float) -> list[dict]:
    """Times one gated MLP, forward and with backward, and compares the ratio with that of the operations."""
    stock = ActivationGating(width, int(4.125 * width), F.silu, device=device, dtype=torch.bfloat16)
    hidden = stock.linear_out.in_features
    shapes = argparse.Namespace(dim=width, hidden=hidden, chunk_size=args.layer_chunk)
    ttt = TTTGating(stock, TTTConfig(enabled=True, chunk_size=args.layer_chunk), device=device, dtype=torch.bfloat16)
    nn.init.normal_(ttt.target_generator.conv1d.conv.weight)
    shape = (1, args.steps, width)
    x, x0, grad = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    x.requires_grad_()
    x0.requires_grad_()
    rows = []
    for backward in (False, True):
        times: dict[str, list[float]] = {"stock": [], "ttt": []}
        for _ in range(args.rounds + 1):
            for name, module in (("stock", stock.train()), ("ttt", ttt.train())):
                times[name].append(timed(partial(run_once, module, x, x0, grad, backward), device))
        p50 = {name: statistics.median(values[1:]) for name, values in times.items()}
        adds = 3 * args.steps * width * hidden * (3 if backward else 1)
        by_operations = operations(args.steps, shapes, "ttt")
        ratios = map(float.__truediv__, times["ttt"][1:], times["stock"][1:])
        rows.append(
            {
                "direction": "forward+backward" if backward else "forward",
                "steps": args.steps,
                "ratio": round(statistics.median(ratios), 3),
                "ratio_by_operations": round(by_operations, 3),
                "rate_share_stock": round(adds / p50["stock"] / peak, 3),
                "rate_share_ttt": round(adds * by_operations / p50["ttt"] / peak, 3),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=["small", "7b"], default="small", help="of the streaming model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--chunk-size", type=int, default=64, help="of the streaming model")
    parser.add_argument("--layers", type=lambda text: {"ttt_layers": text}, default={}, help='such as "1,5"')
    parser.add_argument("--width", type=int, default=4096, help="of the single layer")
    parser.add_argument("--layer-chunk", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1250, help="of the single layer's sequence")
    parser.add_argument("--rounds", type=int, default=9)
    args = parse_arguments(parser, argv)
    device = torch.device(args.device)
    torch.manual_seed(0)
    moshi_patch.install()
    read, peak = (
        bandwidth(device, args.rounds),
        rate(device, args.rounds, args.steps, args.width, int(4.125 * args.width)),
    )
    logger.info("this machine: %.1f GB/s read, %.1f G multiply-adds/s in bfloat16", read / 1e9, peak / 1e9)
    steps = [measure_step(rows, args, device, read) for rows in args.rows]
    for row in steps:
        logger.info(
            "step, B=%(rows)d: TTT/stock %(ratio).2fx, by bytes %(ratio_by_bytes).2fx; share of the bandwidth: stock "
            "%(bandwidth_share_stock).2f, TTT %(bandwidth_share_ttt).2f",
            row,
        )
    layers = measure_layer(args, device, args.width, peak)
    for row in layers:
        logger.info(
            "layer, T=%(steps)d, %(direction)s: TTT/stock %(ratio).2fx, by operations %(ratio_by_operations).2fx; "
            "share of the rate: stock %(rate_share_stock).2f, TTT %(rate_share_ttt).2f",
            row,
        )
    predicted = [predict(rows, update) for rows in args.rows for update in UPDATES]
    for row in predicted:
        logger.info("step of Moshi 7B, B=%(rows)d, %(update)s: by bytes %(ratio_by_bytes).2fx", row)
    rates = {"bandwidth_bytes_per_second": round(read), "bf16_multiply_adds_per_second": round(peak)}
    write_result("roofline", args, rates=rates, step=steps, layer=layers, moshi_7b=predicted)


if __name__ == "__main__":
    main()
