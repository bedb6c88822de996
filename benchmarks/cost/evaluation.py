"""Measures time and memory of scoring a stream in segments, against a plain forward pass of the same model.

    python -m benchmarks.cost.evaluation --threads 1 --out benchmarks/results/evaluation.json

Throughput: `score_stream`, TTT learning along the way and every loss computed, over `model(codes)` alone, alternating
in one process, at a length that a single pass still manages. On a CPU also in processor time, which a busy machine
distorts less. Memory: the peak of what tensors take above the weights while 30 minutes are scored, over that of 3.
"""

import logging
import statistics
import time
from functools import partial
from typing import Any

import torch
from moshi.models import LMModel, loaders
from tqdm import trange

import moshi_patch
from benchmarks.measure import PeakMemory, argument_parser, parse_arguments, timed, write_result
from finetune.model.stream import SEGMENT_STEPS, score_stream

logger = logging.getLogger(__name__)

TINY = {
    **{"dim": 64, "num_heads": 4, "num_layers": 4, "card": 64, "text_card": 100, "context": 64, "n_q": 8, "dep_q": 4},
    **{"delays": [0, 0, 1, 1, 1, 0, 1, 1, 1], "depformer_dim": 32, "depformer_dim_feedforward": 132},
    **{"depformer_num_heads": 2, "depformer_num_layers": 2, "ttt_layers": [1, 3], "ttt_chunk_size": 16},
}
"""Of the size of the model that `example/tiny_repo.py` makes."""
SMALL = {
    **{"dim": 256, "num_heads": 4, "card": 256, "text_card": 1000, "context": 750, "depformer_dim": 64},
    **{"depformer_dim_feedforward": 264, "depformer_num_heads": 2, "depformer_num_layers": 2},
}
SIZES: dict[str, dict[str, Any]] = {"small": SMALL, "7b": {}}
"""Moshi's 32 layers with TTT in five of them; `7b` is Moshi itself, with random weights."""

MINUTES_SHORT, MINUTES_LONG, STEPS_PER_MINUTE = 3, 30, 750


@torch.no_grad()
def build(overrides: dict[str, Any], device: torch.device, dtype: torch.dtype) -> LMModel:
    """A random model whose TTT layers do learn."""
    torch.manual_seed(0)
    kwargs = {**loaders._lm_kwargs, "ttt_enabled": True, **overrides}
    model = LMModel(device=device, dtype=dtype, **kwargs).eval()
    for parameter in moshi_patch.ttt_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def random_codes(model: LMModel, steps: int) -> torch.Tensor:
    return torch.randint(0, min(model.card, model.text_card), (1, model.num_codebooks, steps))


@torch.no_grad()
def throughput(model: LMModel, steps: int, segments: list[int], rounds: int) -> dict[str, dict[str, Any]]:
    """Times scoring in segments of each length, and its ratio to a plain forward pass in the same round."""
    codes, device = random_codes(model, steps), model.device
    calls = {"plain forward": lambda: model(codes.to(device))}
    calls |= {f"segments of {size}": partial(score_stream, model, codes, segment_steps=size) for size in segments}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in trange(rounds, desc=f"{steps} steps", leave=False):
        for name, call in calls.items():
            before = time.process_time()
            seconds[name].append(timed(call, device))
            processor[name].append(time.process_time() - before)
    times = {"time": seconds} | ({"processor_time": processor} if device.type == "cpu" else {})
    results: dict[str, dict[str, Any]] = {}
    for name in calls:
        results[name] = {"seconds": round(statistics.median(seconds[name]), 4)}
        for kind, measured in times.items():
            ratios = [a / b for a, b in zip(measured[name], measured["plain forward"], strict=True)]
            results[name][f"{kind}_ratio"] = round(statistics.median(ratios), 3)
            results[name][f"{kind}_ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        results[name]["steps_per_second"] = round(steps / results[name]["seconds"], 1)
    return results


@torch.no_grad()
def memory(device: torch.device, segment_steps: int) -> dict[str, Any]:
    """Peak bytes above the weights while the tiny model scores a short and a long stream."""
    model, peaks = build(TINY, device, torch.float32), {}
    for minutes in (MINUTES_SHORT, MINUTES_LONG):
        codes = random_codes(model, minutes * STEPS_PER_MINUTE)
        score_stream(model, codes[..., :segment_steps], segment_steps=segment_steps // 2)  # libraries start up
        with PeakMemory(device) as peak:
            score_stream(model, codes, segment_steps=segment_steps)
        peaks[minutes] = peak.bytes
    return {
        "segment_steps": segment_steps,
        "peak_bytes": {f"{minutes} minutes": value for minutes, value in peaks.items()},
        "ratio": round(peaks[MINUTES_LONG] / peaks[MINUTES_SHORT], 3),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, nargs="+", default=[1500, 3000], help="lengths of a stream; 750 a minute")
    parser.add_argument("--segments", type=int, nargs="+", default=[1024, SEGMENT_STEPS], help="steps of a segment")
    parser.add_argument("--rounds", type=int, default=5)
    args = parse_arguments(parser, argv)
    moshi_patch.install()
    device = torch.device(args.device)
    used = memory(device, SEGMENT_STEPS)
    logger.info("peak memory, %d minutes over %d: %.3f", MINUTES_LONG, MINUTES_SHORT, used["ratio"])
    model, times = build(SIZES[args.size], device, torch.bfloat16), {}
    for steps in args.steps:
        times[f"{steps} steps"] = throughput(model, steps, args.segments, args.rounds)
        for name, row in times[f"{steps} steps"].items():
            kinds = ", ".join(f"{key.removesuffix('_ratio')} {row[key]:.3f}x" for key in row if key.endswith("_ratio"))
            logger.info("%5d steps, %-18s %7.1f steps/s  %s", steps, name, row["steps_per_second"], kinds)
    write_result("evaluation", args, memory=used, throughput=times)


if __name__ == "__main__":
    main()
