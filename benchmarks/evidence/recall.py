"""Does it remember? The loss on something said before, when it returns after it has left the attention window.

`python -m benchmarks.evidence.recall [--case easy|hard|both] [--steps N] [--seed S ...] [--out DIR] [--quick]`

A sequence is a part of 32 random text tokens, a gap of other random tokens of the same vocabulary, and the part again.
Every token is drawn anew for every step, so nothing can be memorised across sequences: the loss on a part heard for the
first time cannot fall below chance, ln 44 = 3.78 nats, and the loss on its return falls only by remembering. A stock
`LMModel` (3 layers, width 96, text row and one audio row) is trained from scratch on the CPU to predict the next text
token through `forward_text`. Three attention layers of window 16 reach back 45 steps together; the step
that has to predict a returning token lies at least 47 steps behind its first occurrence, whatever the gap, so that
attention alone cannot do it: `Settings` insists.

- easy: the audio row carries the zero token, so x0, which the targets are made of, is the text embedding alone.
- hard: the audio row carries random codes, so that audio is half of x0, everything at moshi's stock scale.

Conditions: a model without TTT trained for as many steps on the same sequences; TTT; the same weights, updates off.
Reported are held-out sequences of another seed, in nats per token. The first token of a part is left out: nothing says
that it is about to come.

What made the hard case learnable, one change at a time, seed 0, nats on the repeat after 200 / 400 / 600 steps:
- TTT in all three layers: 1.48 / 0.69 / 0.46. In the middle one alone a long plateau comes first: 3.73 / 3.44 / 0.52,
  and 3.75 / 3.69 / 3.65, 0.44 after 1000, with one learning rate for everything.
- A learning rate for the target generators five times the others', as they start at zero: it shortens the plateau. With
  2e-3 for everything 3.46 / 0.81 / 0.49. AdamW's beta2 of 0.95 instead of 0.999 does the same: 2.05 / 0.69 / 0.49.
- Gaps of varying length. With 36 steps always 0.42 is reached at 36, and no more than 1.17 at 16 and 1.24 at 128: the
  place within a chunk is learnt too. With gaps of 16 to 64 steps 0.49 at 36, 0.53 at 16, 0.67 at 128.
- More steps: 0.34 after 1500, the learning rate falling along a cosine. Falling within 600 steps it ends at 0.65.
η = 0.1 is no worse (0.44), η = 4 (0.59) and C = 8 (0.78) are; K = 3 changes nothing. Nearly half of the rest, 0.15 of
0.35 at a gap of 64, is one token of 31, the one that begins a chunk: the taps end with the chunk, so the step before it
does not have it in its target.

Shapes: `B` rows, `K` codebooks (text, then `audio_rows`, 1 unless told), `T` = 2 part + gap steps.
"""

import argparse
import dataclasses
import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from tqdm import tqdm

import moshi_patch
from benchmarks.measure import machine, write_json

from .recall_report import CONDITIONS, plot, table

logger = logging.getLogger(__name__)

STEPS = {"easy": 600, "hard": 1600}
"""Training steps of each case."""

EVAL_SEED = 10**6


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on.

    Args:
        case: `"easy"` or `"hard"`.
        steps: of training.
        seed: of weights and training sequences.
        card: tokens of the text row and codes of each audio row.
        audio_rows: beside the text row; moshi has 8 or 16.
        width, layers, heads, window: of the transformer; `window` is its attention context, in steps.
        chunk, rate, kernel: C, η and K of the TTT layers, which are all layers.
        part: steps of what returns.
        gap_min, gap_max: the gap of a training batch is drawn from these, both included.
        batch: sequences per training step.
        lr, target_lr: AdamW's learning rate for the stock weights and for the target generators.
        beta2: of AdamW.
        eval_gap: gap of the headline numbers.
        eval_batch, curve_batch: held-out sequences per number, and per point of a curve.

    Raises:
        ValueError: when the attention layers could carry a token from the first pass to the repeat.
    """

    case: str = "hard"
    steps: int = 1600
    seed: int = 0
    card: int = 44
    audio_rows: int = 1
    width: int = 96
    layers: int = 3
    heads: int = 4
    window: int = 16
    chunk: int = 16
    rate: float = 1.0
    kernel: int = 2
    part: int = 32
    gap_min: int = 16
    gap_max: int = 64
    batch: int = 16
    lr: float = 2e-3
    target_lr: float = 1e-2
    beta2: float = 0.95
    eval_gap: int = 36
    eval_batch: int = 256
    curve_batch: int = 64

    def __post_init__(self):
        if self.case not in STEPS:
            raise ValueError(f"case={self.case!r}: must be one of {', '.join(STEPS)}.")
        reach = self.layers * (self.window - 1)
        nearest = self.part + min(self.gap_min, self.eval_gap, self.window) - 1
        if nearest <= reach:
            raise ValueError(
                f"part={self.part}, gap_min={self.gap_min}: a returning token is {nearest} steps back and attention "
                f"reaches {reach}; it must lie outside."
            )


def make_batch(settings: Settings, batch: int, gap: int, generator: torch.Generator) -> torch.Tensor:
    """Codes `[B, K, 2 part + gap]`: a random part, a random gap and the part again as text, and the case's audio."""
    part = torch.randint(settings.card, (batch, settings.part), generator=generator)
    filler = torch.randint(settings.card, (batch, gap), generator=generator)
    text = torch.cat([part, filler, part], 1)
    audio = torch.randint(settings.card, (batch, settings.audio_rows, text.shape[1]), generator=generator)
    if settings.case == "easy":
        audio = torch.full_like(audio, -1)  # moshi's zero token: its embedding is zero
    return torch.cat([text[:, None], audio], 1)


def build_model(settings: Settings, ttt: bool, **options) -> LMModel:
    """The small `LMModel`, with `ttt_*` options beside its settings; its stock weights are the same without TTT."""
    torch.manual_seed(settings.seed)
    return LMModel(
        n_q=settings.audio_rows,
        dep_q=0,
        delays=[0] * (1 + settings.audio_rows),
        card=settings.card,
        text_card=settings.card,
        dim=settings.width,
        num_heads=settings.heads,
        num_layers=settings.layers,
        context=settings.window,
        causal=True,
        gating="silu",
        norm="rms_norm",
        positional_embedding="rope",
        ttt_enabled=ttt,
        ttt_chunk_size=settings.chunk,
        ttt_learning_rate=settings.rate,
        ttt_conv_kernel_size=settings.kernel,
        **{"ttt_layers": "all", **options},
    )


def token_losses(model: LMModel, codes: torch.Tensor) -> torch.Tensor:
    """Nats `[B, T - 1]` of text tokens 1.. of `codes [B, K, T]`, each predicted from what comes before it."""
    _, logits = model.forward_text(codes[:, :, :-1])
    return F.cross_entropy(logits[:, 0].transpose(1, 2), codes[:, 0, 1:], reduction="none")


@torch.no_grad()
def evaluate(model: LMModel, settings: Settings, gap: int, batch: int, updates: bool = True) -> dict[str, float]:
    """Mean nats of held-out sequences, `first` pass and `repeat`, each without the part's first token."""
    generator = torch.Generator().manual_seed(EVAL_SEED + gap)
    codes = make_batch(settings, batch, gap, generator)
    with nullcontext() if updates else moshi_patch.ttt_updates(model):
        losses = token_losses(model, codes).mean(0)
    first, repeat = losses[: settings.part - 1], losses[settings.part + gap :]
    return {"first": round(first.mean().item(), 4), "repeat": round(repeat.mean().item(), 4)}


def make_optimizer(model: LMModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW without weight decay, with a learning rate of its own for the target generators, which start at zero."""
    targets = list(moshi_patch.ttt_parameters(model).values())
    ids = {id(parameter) for parameter in targets}
    stock = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in ids]
    groups = [{"params": stock, "lr": settings.lr}, {"params": targets, "lr": settings.target_lr}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=(0.9, settings.beta2), weight_decay=0
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """From 1 to 0.1 along a cosine."""
    return 0.55 + 0.45 * math.cos(math.pi * step / steps)


def train(model: LMModel, settings: Settings, conditions: tuple[str, ...]) -> dict[str, Any]:
    """Train, and evaluate each of `conditions` 20 times on the way.

    Returns:
        `seconds` and `cpu_seconds` of training without evaluation, `curve` with a list per condition beside `step`.
    """
    optimizer = make_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings.steps))
    generator = torch.Generator().manual_seed(settings.seed)
    every = max(1, settings.steps // 20)
    curve: dict[str, list] = {"step": [], **{condition: [] for condition in conditions}}
    seconds = cpu_seconds = 0.0
    progress = tqdm(range(settings.steps + 1), desc=f"{settings.case}, {CONDITIONS[conditions[0]]}", mininterval=0.5)
    for step in progress:
        if step % every == 0 or step == settings.steps:
            curve["step"].append(step)
            for condition in conditions:
                result = evaluate(model, settings, settings.eval_gap, settings.curve_batch, condition != "off")
                curve[condition].append(result)
            progress.set_postfix({key: f"{value:.2f}" for key, value in curve[conditions[0]][-1].items()})
        if step == settings.steps:
            break
        start, cpu_start = time.perf_counter(), time.process_time()
        gap = int(torch.randint(settings.gap_min, settings.gap_max + 1, (), generator=generator))
        loss = token_losses(model, make_batch(settings, settings.batch, gap, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), "curve": curve}


def run_case(case: str, steps: int | None = None, seed: int = 0, **overrides) -> dict[str, Any]:
    """Train both models of a case and measure the three conditions.

    Args:
        case: `"easy"` or `"hard"`.
        steps: of training; None for the case's own number.
        seed: of weights and training sequences.
        overrides: other fields of `Settings`.

    Returns:
        `settings`; for each condition (`none`, `on`, `off`) under `final` the nats on the `first` pass and on the
        `repeat`, and under `gaps` the repeat's by the gap in windows; `training` per model, as `train` returns it.
    """
    settings = Settings(case=case, steps=steps or STEPS[case], seed=seed, **overrides)
    moshi_patch.install()
    models = {ttt: build_model(settings, ttt) for ttt in (False, True)}
    training = {
        "none": train(models[False], settings, ("none",)),
        "ttt": train(models[True], settings, ("on", "off")),
    }
    final, gaps = {}, {}
    for condition in CONDITIONS:
        model, updates = models[condition != "none"], condition != "off"
        final[condition] = evaluate(model, settings, settings.eval_gap, settings.eval_batch, updates)
        gaps[condition] = {
            windows: evaluate(model, settings, windows * settings.window, settings.eval_batch, updates)["repeat"]
            for windows in range(1, 9)
        }
    logger.info("%s, seed %d: %s", case, seed, final)
    return {"settings": dataclasses.asdict(settings), "final": final, "gaps": gaps, "training": training}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The command line. Returns what it wrote to `DIR/recall.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*STEPS, "both"], default="both")
    parser.add_argument("--steps", type=int, help=f"of training; default {STEPS}")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one run for each")
    parser.add_argument("--out", type=Path, default=Path("recall_out"), metavar="DIR")
    parser.add_argument("--threads", type=int, default=1, help="two are faster on an idle machine only; default 1")
    parser.add_argument("--quick", action="store_true", help="40 steps: whether it runs, not whether it remembers")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [
        run_case(case, 40 if args.quick else args.steps, seed)
        for case in (STEPS if args.case == "both" else [args.case])
        for seed in args.seed
    ]
    results = {"machine": machine(torch.device("cpu")), "runs": runs}
    write_json(args.out / "recall.json", results)
    plot(results, args.out / "recall.png")
    print(table(runs))
    print(f"written: {args.out / 'recall.json'} and {args.out / 'recall.png'}")
    return results


if __name__ == "__main__":
    main()
