"""Recordings of small models that stream, for the tests of the recorder and of its picture."""

from pathlib import Path

import torch

from moshi_patch.recorder import Recorder
from tests.support.models import TTT, random_codes, randomise_targets, tiny_model


def stream(model, steps: int, rows: int = 2, reset_at: int | None = None, mask=None) -> torch.Tensor:
    codes = random_codes(model, rows, steps)
    logits = []
    with torch.no_grad(), model.streaming(rows):
        for t in range(steps):
            if t == reset_at:
                model.reset_streaming(mask)
            logits.append(model.forward_text(codes[:, :, t : t + 1])[1])
    return torch.cat(logits, 2)


def recorded(folder, steps: int = 20) -> Path:
    """A whole recording in `folder`."""
    model = randomise_targets(tiny_model(**TTT))
    with Recorder(model, folder / "log.jsonl", every=5):
        stream(model, steps)
    return folder / "log.jsonl"
