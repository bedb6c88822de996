"""Shared by the tests of memories: models that have heard something, and what they remember of it."""

import torch

from moshi_patch.memory import fast_weight_tensors
from tests.support.models import random_codes, randomise_targets, tiny_model, ttt_settings

STEPS = 23  # four chunks of 5 and a part of one


def streaming_model(rows: int = 2, steps: int = STEPS, dtype=torch.bfloat16, seed: int = 0, **overrides):
    """A model that has heard `steps` random steps and is still streaming."""
    model = randomise_targets(tiny_model(dtype, seed=seed, **ttt_settings(**overrides)))
    model.streaming_forever(rows)
    hear(model, 0, steps, rows)
    return model


@torch.no_grad()
def hear(model, start: int, end: int, rows: int = 2) -> torch.Tensor:
    codes = random_codes(model, rows, 3 * STEPS)
    return torch.cat([model.forward_text(codes[:, :, t : t + 1])[1] for t in range(start, end)] or [torch.empty(0)])


def snapshot(model) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in fast_weight_tensors(model).items()}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])] == []
