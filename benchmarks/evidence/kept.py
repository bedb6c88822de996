"""What a memory loses when it is kept as bfloat16 between two visits: recall of what was told before, in nats.

`python -m benchmarks.evidence.kept [--seeds 3] [--steps 300]`

The recall model of docs/evidence.md is told a part, hears other tokens, and hears the part again.
On the way it leaves and returns: the memory is saved as the server saves it, everything is reset, and the memory is
restored. Attention begins anew each time, so no part is ever in its window.

Shapes: `B` rows, `T` steps.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel

import moshi_patch
from benchmarks.measure import argument_parser, parse_arguments, write_result
from moshi_patch.memory import copy_memory, restore_memory
from moshi_patch.memory_stream import MemoryReader, memory_pieces

from .model import EVAL_SEED
from .settings import Settings
from .training import trained

ROWS = 64
PART, GAP = 32, 256
RECALL = Settings()

VISITS = {"returns once": [PART + GAP], "returns 16 times": list(range(PART + 16, PART + GAP + 1, 16))}
"""Before which steps everything but the memory is lost; the part returns at step `PART + GAP`."""


def keep(model: LMModel, narrow: bool, owner: Mapping[str, Any]) -> None:
    """Saves the memory of all rows as the server does, resets the stream, and gives it back."""
    size, pieces = memory_pieces(copy_memory(model, range(ROWS)), owner, {}, narrow)
    kept = MemoryReader("memory", size, pieces).read(owner, None)
    model.reset_streaming()
    restore_memory(model, kept)


@torch.no_grad()
def recall(model: LMModel, settings: Settings, visits: list[int], kept_as: str) -> float:
    """Nats per token of the part's return, its first token left out.

    Args:
        visits: before which steps the person leaves and comes back.
        kept_as: dtype of the deltas meanwhile, or `nothing`.
    """
    generator = torch.Generator().manual_seed(EVAL_SEED + 11)
    text = torch.randint(settings.card, (ROWS, 2 * PART + GAP), generator=generator)
    text[:, -PART:] = text[:, :PART]
    audio = torch.full((ROWS, settings.audio_rows, 1), -1)
    owner, losses = moshi_patch.fingerprint(model), []
    with model.streaming(ROWS):
        for t in range(text.shape[1] - 1):
            if t in visits:
                model.reset_streaming() if kept_as == "nothing" else keep(model, kept_as == "bfloat16", owner)
            logits = model.forward_text(torch.cat([text[:, None, t : t + 1], audio], 1))[1][:, 0, 0]
            losses.append(F.cross_entropy(logits, text[:, t + 1]).item())
    return sum(losses[PART + GAP :]) / len(losses[PART + GAP :])


def measure(settings: Settings) -> dict[str, dict[str, float]]:
    """Of one seed: nats of the return, by visits and by what the deltas were kept as."""
    model = trained(settings, None)[0].eval()
    return {
        name: {kept: round(recall(model, settings, visits, kept), 6) for kept in ("float32", "bfloat16", "nothing")}
        for name, visits in VISITS.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, device=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=RECALL.steps, help="of training")
    parser.add_argument("--update", choices=["hebbian", "residual"], default="hebbian", help="`ttt_update`")
    args: argparse.Namespace = parse_arguments(parser, argv)
    moshi_patch.install()
    kind = {} if args.update == "hebbian" else {"ttt": (("update", args.update),)}
    settings = dataclasses.replace(RECALL, steps=args.steps, **kind)
    found = [measure(dataclasses.replace(settings, seed=seed)) for seed in range(args.seeds)]
    differences = {name: [round(one[name]["bfloat16"] - one[name]["float32"], 6) for one in found] for name in VISITS}
    write_result("kept", args, nats=found, bfloat16_minus_float32=differences)


if __name__ == "__main__":
    main()
