"""Does a TTT-MLP layer alone learn to recall? One layer, no attention and nothing else that looks back.

`python -m benchmarks.evidence.layer_alone [--seeds 3] [--steps 800]`

A step shows a key and its value together. After 24 pairs, drawn anew for each sequence, 8 steps show a key alone, and
its value is asked. Chance is ln 32 = 3.47 nats; only what was written in the same sequence helps.

Shapes: `B` sequences, `T` = 32 steps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import argument_parser, parse_arguments, write_result
from moshi_patch.config import TTTConfig
from moshi_patch.kinds.mlp import TTTMLP

from .model import EVAL_SEED

WIDTH, HEADS, TOKENS, PAIRS, ASKED, BATCH = 64, 4, 32, 24, 8, 32
RATE = 3e-3


class Recall(nn.Module):
    """Embeddings of a key and a value, the layer, and a reading of the value."""

    def __init__(self, base_lr: float, mini_batch_size: int):
        super().__init__()
        config = TTTConfig(kind="mlp", base_lr=base_lr, mini_batch_size=mini_batch_size, initial_gating_alpha=0.1)
        self.keys, self.values = nn.Embedding(TOKENS, WIDTH), nn.Embedding(TOKENS + 1, WIDTH)
        self.memory = TTTMLP(WIDTH, HEADS, config)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS)

    def loss(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Nats per asked value of `count` new sequences."""
        keys = torch.stack([torch.randperm(TOKENS, generator=generator)[:PAIRS] for _ in range(count)])
        values = torch.randint(TOKENS, (count, PAIRS), generator=generator)
        asked = torch.stack([torch.randperm(PAIRS, generator=generator)[:ASKED] for _ in range(count)])
        nothing = torch.full((count, ASKED), TOKENS)
        x = self.keys(torch.cat([keys, keys.gather(1, asked)], 1)) + self.values(torch.cat([values, nothing], 1))
        logits = self.head(self.norm(self.memory(x)))[:, PAIRS:]
        return F.cross_entropy(logits.flatten(0, 1), values.gather(1, asked).flatten())

    @torch.no_grad()
    def held_out(self, updates: bool) -> float:
        """Nats on sequences that were not trained on."""
        self.memory.set_updates(updates)
        loss = self.loss(512, torch.Generator().manual_seed(EVAL_SEED)).item()
        self.memory.set_updates(True)
        return round(loss, 4)


def measure(base_lr: float, mini_batch_size: int, seed: int, steps: int) -> dict[str, Any]:
    """Trains one layer; what it knows with its updates and without."""
    torch.manual_seed(seed)
    model, generator = Recall(base_lr, mini_batch_size), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1.05 - step / steps)
        loss = model.loss(BATCH, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    settings = {"base_lr": base_lr, "mini_batch_size": mini_batch_size, "seed": seed, "steps": steps}
    return {**settings, "on": model.held_out(True), "off": model.held_out(False)}


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, device=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800, help="of training")
    parser.add_argument("--base-lr", type=float, nargs="+", default=[1.0, 0.1, 0.05], help="`ttt_base_lr`")
    parser.add_argument("--mini-batch-size", type=int, default=8, help="`ttt_mini_batch_size`")
    args = parse_arguments(parser, argv)
    runs = [
        measure(base_lr, args.mini_batch_size, seed, args.steps)
        for seed in range(args.seeds)
        for base_lr in args.base_lr
    ]
    write_result("layer_alone", args, runs=runs)


if __name__ == "__main__":
    main()
