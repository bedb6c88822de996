"""Streams a trained model for many windows and measures recall and the size of the delta on the way.

The stream is a row of units. A unit is filler, a part of random tokens, a gap, and the part again; the parts are fresh
in every unit. Filler and gap are what `Settings.stream` says: random tokens, one token (`"silence"`), or tokens that
the model itself has just drawn from its own distribution (`"own"`), which it learns from again.

Shapes: `B` rows, `T` steps, stepped one at a time through moshi's streaming state.
"""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel

import moshi_patch

from .model import EVAL_SEED, Diverged, build_model
from .settings import Settings
from .tasks import SILENCE
from .training import trained_model

ROWS = 16


def unit(settings: Settings) -> tuple[int, int, int]:
    """Steps of filler, part and gap; with the part twice a whole number of windows."""
    gap = settings.eval_gap
    filler = -(2 * settings.part + gap) % settings.window + 6 * settings.window
    return filler, settings.part, gap


def script(settings: Settings, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Tokens `[ROWS, T]`; `[T]`, True where the model draws the token itself; and where each unit begins."""
    filler, part, gap = unit(settings)
    length = filler + 2 * part + gap
    units = max(1, settings.stream_windows * settings.window // length)
    text, drawn, starts = [], [], []
    for number in range(units):
        words = torch.randint(settings.card, (ROWS, length), generator=generator)
        words[:, -part:] = words[:, filler : filler + part]
        between = torch.zeros(length, dtype=torch.bool)
        between[:filler] = True
        between[filler + part : filler + part + gap] = True
        if settings.stream == "silence":
            words[:, between] = SILENCE
        text.append(words)
        drawn.append(between & (settings.stream == "own"))
        starts.append(number * length)
    return torch.cat(text, 1), torch.cat(drawn), starts


def streamed_model(settings: Settings, cache: Path | None) -> LMModel:
    """The trained model of the run, with the decay and the clip of the stream."""
    changed = {"decay": settings.stream_decay, "clip": settings.stream_clip}
    changed = {name: value for name, value in changed.items() if value is not None}
    model = build_model(dataclasses.replace(settings, **changed))
    model.load_state_dict(trained_model(settings.training(), cache).state_dict())
    return model.eval()


@torch.no_grad()
def run_stream(settings: Settings, updates: bool, cache: Path | None = None) -> list[dict[str, Any]]:
    """Let the trained model of `settings` hear the whole stream.

    Returns:
        One point per unit, read at its end: `windows` heard, nats on the `first` pass and on the return (`beyond`),
        `entropy` of the model's next-token distribution over the filler (nats), and with TTT `relative_delta` of each
        layer, the mean over rows.

    Raises:
        Diverged: when a loss is not finite.
    """
    model = streamed_model(settings, cache)
    generator = torch.Generator().manual_seed(EVAL_SEED + 7)
    text, drawn, starts = script(settings, generator)
    filler, part, gap = unit(settings)
    length = filler + 2 * part + gap
    losses, entropy = torch.zeros(text.shape), torch.zeros(text.shape[1])
    points: list[dict[str, Any]] = []
    audio = torch.full((ROWS, settings.audio_rows, 1), -1)
    with model.streaming(ROWS), nullcontext() if updates else moshi_patch.ttt_updates(model):
        for t in range(text.shape[1] - 1):
            log_p = model.forward_text(torch.cat([text[:, None, t : t + 1], audio], 1))[1][:, 0, 0].log_softmax(-1)
            if drawn[t + 1]:
                text[:, t + 1] = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
            losses[:, t + 1] = F.nll_loss(log_p, text[:, t + 1], reduction="none")
            entropy[t + 1] = -(log_p.exp() * log_p).sum(-1).mean()
            if (t + 2) % length == 0:
                begin = starts[len(points)]
                points.append(_point(losses, entropy, begin, settings) | _delta(model, settings))
    return points


def _point(losses: torch.Tensor, entropy: torch.Tensor, begin: int, settings: Settings) -> dict[str, Any]:
    filler, part, gap = unit(settings)
    told, returned = begin + filler, begin + filler + part + gap
    point = {
        "first": losses[:, told + 1 : told + part].mean().item(),
        "beyond": losses[:, returned + 1 : returned + part].mean().item(),
        "entropy": entropy[begin + 1 : told].mean().item(),
    }
    if not all(map(torch.isfinite, map(torch.tensor, point.values()))):
        raise Diverged(f"a loss of the stream is not finite after {(returned + part) // settings.window} windows")
    return {"windows": (returned + part) / settings.window} | {name: round(v, 4) for name, v in point.items()}


def _delta(model: LMModel, settings: Settings) -> dict[str, list[float]]:
    if settings.model == "none":
        return {}
    stats = moshi_patch.ttt_stats(model).values()
    return {"relative_delta": [round(sum(s["relative_delta"]) / ROWS, 4) for s in stats]}
