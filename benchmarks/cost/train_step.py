"""Measures what TTT costs in a training step, and how much host memory loading a checkpoint takes.

`python -m benchmarks.cost.train_step [--device cuda] [--size small|7b] [--rounds N] [--out FILE.json]`

Models with LoRA train alternately in one process, step by step, on the same random codes: without TTT, and with TTT of
either update in 5 of 32 layers (the default selection) whose target generators and W_down train too, as `train.py`
would train them. A
control trains the W_down of the same layers without TTT, to tell the cost of the fast weights from that of more weights
to train. A step is forward with activation checkpointing, loss, backward, clipping and AdamW. Ratios are medians over
rounds; memory is the peak of what tensors take during a step, weights and optimizer states included.

Start-up: resident memory of this process at its peak while a checkpoint is loaded into a TTT model through the meta
device, above what it was before, over the size of the file.
"""

import argparse
import gc
import logging
import statistics
import tempfile
from pathlib import Path

import torch
from moshi.models import LMModel, loaders
from moshi.modules.lora import replace_all_linear_with_lora
from safetensors.torch import save_file
from torch import nn
from tqdm import trange

import moshi_patch
from benchmarks.measure import PeakMemory, ResidentPeak, argument_parser, parse_arguments, timed, write_result
from finetune.model.loss import compute_loss
from finetune.model.trainable import parameter_groups
from finetune.settings.schema import LoraArgs, OptimArgs, TrainArgs, TTTArgs
from finetune.training.optimizer import build_optimizer

logger = logging.getLogger(__name__)

SIZES = {
    "small": loaders._lm_kwargs
    | {"dim": 256, "num_heads": 4, "card": 256, "text_card": 1000, "context": 750}
    | {"depformer_dim": 64, "depformer_dim_feedforward": 264, "depformer_num_heads": 2, "depformer_num_layers": 2},
    "7b": dict(loaders._lm_kwargs),
}
"""32 layers each; `7b` is Moshi itself, with random weights."""


class Training:
    """A model with adapters, its optimizer, and one step of training it."""

    def __init__(self, args: argparse.Namespace, ttt: str | None = None, w_down: bool = False):
        device = torch.device(args.device)
        self.args = TrainArgs(
            lora=LoraArgs(enable=True, rank=args.rank),
            ttt=TTTArgs(enabled=ttt is not None, chunk_size=args.chunk_size, update=ttt or "hebbian"),
            optim=OptimArgs(lr=2e-6),
            max_steps=1000,
        )
        torch.manual_seed(0)
        self.model = LMModel(
            device=device,
            dtype=torch.bfloat16,
            gradient_checkpointing=True,
            **SIZES[args.size],
            **self.args.ttt.to_kwargs(),
        ).train()
        replace_all_linear_with_lora(self.model, args.rank, 2.0)
        groups = parameter_groups(self.model, self.args)
        self.model.requires_grad_(False)
        trainable = [parameter for group in groups for parameter in group.parameters.values()]
        if w_down:
            layers = moshi_patch.TTTConfig(enabled=True).layer_indices(len(self.model.transformer.layers))
            more = [self.model.transformer.layers[index].gating.linear_out.frozen_W.weight for index in layers]
            groups[0].parameters |= {f"w_down.{index}": weight for index, weight in zip(layers, more, strict=True)}
            trainable += more
        for parameter in trainable:
            parameter.requires_grad_(True)
        self.trainable = sum(parameter.numel() for parameter in trainable)
        self.optimizer, _ = build_optimizer(groups, self.args.optim, self.args.max_steps)
        shape = (args.batch, self.model.num_codebooks, args.steps)
        self.codes = torch.randint(0, min(self.model.card, self.model.text_card), shape, device=device)

    def __call__(self) -> None:
        output = self.model(self.codes)
        compute_loss(output, self.codes, dep_q=self.model.dep_q).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def compare(args: argparse.Namespace) -> dict[str, dict]:
    """Time and peak memory of each variant over those of LoRA alone."""
    device = torch.device(args.device)
    variants = {
        "lora": Training(args),
        "lora, w_down of 5 layers": Training(args, w_down=True),
        "lora, ttt in 5 layers": Training(args, ttt="hebbian"),
        "lora, residual ttt in 5 layers": Training(args, ttt="residual"),
    }
    held, peaks = {}, {}
    for name, training in variants.items():
        training()  # optimizer states exist from here on
        parameters = [p for p in training.model.parameters()]
        states = [t for state in training.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        held[name] = sum(t.numel() * t.element_size() for t in [*parameters, *states])
        with PeakMemory(device) as peak:
            training()
        peaks[name] = held[name] + peak.bytes
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in trange(args.rounds, desc="rounds", leave=False):
        for name, training in variants.items():
            times[name].append(timed(training, device))
    results = {}
    for name, training in variants.items():
        ratios = [a / b for a, b in zip(times[name], times["lora"], strict=True)]
        results[name] = {
            "time_ratio": round(statistics.median(ratios), 3),
            "time_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "memory_ratio": round(peaks[name] / peaks["lora"], 3),
            "peak_bytes": peaks[name],
            "held_bytes": held[name],
            "trainable_parameters": training.trainable,
        }
    return results


def start_up(args: argparse.Namespace) -> dict[str, float]:
    """Peak resident memory while a checkpoint of about a gigabyte is loaded, over its size; stock and TTT."""
    kwargs = SIZES["small"] | {"dim": 2048, "num_layers": 12}
    variants = {"stock": {}, "ttt": TTTArgs(enabled=True, chunk_size=args.chunk_size).to_kwargs()}
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        torch.manual_seed(0)
        save_file(LMModel(dtype=torch.bfloat16, **kwargs).state_dict(), path)
        result["file_bytes"] = path.stat().st_size
        for name, ttt in variants.items():
            gc.collect()
            with ResidentPeak() as peak:
                model = loaders.get_moshi_lm(path, kwargs, dtype=torch.bfloat16, lm_kwargs_overrides=ttt)
                for parameter in model.parameters():  # the file is mapped: read it all
                    parameter.detach().view(torch.int16).max()
            assert not any(parameter.is_meta for parameter in model.parameters())
            result[f"{name}_peak_over_file"] = round(peak.bytes / result["file_bytes"], 3)
            new = sum(p.numel() * p.element_size() for p in moshi_patch.ttt_parameters(model).values())
            del model, parameter
    return result | {"ttt_weights_over_file": round(new / result["file_bytes"], 3)}


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=625, help="T; 625 steps are 50 s")
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parse_arguments(parser, argv)
    moshi_patch.install()
    start = start_up(args)
    logger.info(
        "start-up: peak memory over file size: stock %(stock_peak_over_file).2f, TTT %(ttt_peak_over_file).2f", start
    )
    results = compare(args)
    for name, row in results.items():
        logger.info("%-30s time %.2fx  peak memory %.2fx", name, row["time_ratio"], row["memory_ratio"])
    write_result("train_step", args, start_up=start, results=results)


if __name__ == "__main__":
    main()
