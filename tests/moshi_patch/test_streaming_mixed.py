"""Steps and segments, masked, muted and reset rows, in any order: each row is what the specification makes of it."""

import random

import pytest
import torch

import moshi_patch
from moshi_patch.kinds.in_place.ops import naive, naive_target
from moshi_patch.kinds.mlp.ops import naive as mlp_naive
from tests.moshi_patch.kinds.mlp.support import specified_answer, specified_inputs
from tests.support.models import relative
from tests.support.streams import SETTINGS, call_memory, ttt_model

pytestmark = pytest.mark.usefixtures("patched")
ROWS, STEPS = 4, 120
NAMES = ("clip and decay", "residual", "residual, C=1", "residual, K>2C", "residual, C>D, decay, gain")
MLP = ("mlp", "mlp, C=1", "mlp, C>T", "mlp, C=16, low rate, every layer")


class Stretch:
    """What a row heard since its last reset, whether it was written, and what was answered."""

    def __init__(self):
        self.steps: list[int] = []
        self.written: list[bool] = []
        self.answers: list[torch.Tensor] = []


def stream(memory, x, x0, choose: random.Random) -> list[list[Stretch]]:
    """By row its stretches: random parts of `x`, for random rows, with updates on or off, and random resets."""
    rows = [[Stretch()] for _ in range(ROWS)]
    with memory.streaming(ROWS):
        first = 0
        while first < STEPS:
            size = min(choose.choice([1, 1, 1, 2, 5, 18, 40]), STEPS - first)
            executed = [choose.random() < 0.8 for _ in range(ROWS)]
            enabled = choose.random() < 0.7
            memory.set_exec_mask(torch.tensor(executed))
            memory.set_updates(enabled)
            part = range(first, first + size)
            out = call_memory(memory, x[:, first : first + size], x0[:, first : first + size])
            for row in (row for row in range(ROWS) if executed[row]):
                stretch = rows[row][-1]
                stretch.steps += part
                stretch.written += [enabled] * size
                stretch.answers += list(out[row])
            first += size
            if choose.random() < 0.15:
                reset = [choose.random() < 0.5 for _ in range(ROWS)]
                memory.reset_streaming(torch.tensor(reset))
                for row in (row for row in range(ROWS) if reset[row]):
                    rows[row].append(Stretch())
    memory.set_updates(True)
    return rows


def specified_in_place(gating, x, x0, written: torch.Tensor) -> torch.Tensor:
    """`[T, D]` for one row's `x` and `x0 [T, D]`: keys and sources of muted steps are zero, nothing else."""
    config, generator, w_down = gating.config, gating.target_generator, gating.linear_out.weight
    z = gating._hidden(x[None])
    weights = generator.conv1d.conv.weight, generator.W_target.weight
    v = naive_target(x0[None].masked_fill(~written[:, None], 0.0), *weights, config.chunk_size)
    keys = z.masked_fill(~written[:, None], 0.0)
    options = {name: getattr(config, name) for name in ("update", "target_gain", "delta_clip", "decay")}
    outs, delta = [], torch.zeros(1, *w_down.shape, dtype=z.dtype)
    for first in range(0, z.shape[1], config.chunk_size):
        part = slice(first, first + config.chunk_size)
        outs.append(z[:, part] @ (w_down + delta).transpose(1, 2))
        if written[part].any():
            chunk = keys[:, part], v[:, part], w_down, config.chunk_size, config.learning_rate
            _, delta = naive(*chunk, delta=delta, **options)
    return torch.cat(outs, 1)[0]


def specified_mlp(memory, x, x0, written: torch.Tensor) -> torch.Tensor:
    """`[T, D]` for one row's `x [T, D]`: muted steps have no learning rate, nothing else."""
    q, k, v, eta = specified_inputs(memory, x[None])
    y, _ = mlp_naive(memory._weights(), q, k, v, eta * written, memory.config.mini_batch_size)
    return x + specified_answer(memory, y)[0]


@pytest.mark.parametrize("name", [*NAMES, *MLP])
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_any_mixture_equals_the_specification_row_by_row(name, seed):
    memory = next(iter(moshi_patch.ttt_memories(ttt_model(**SETTINGS[name])).values()))
    specified = specified_mlp if name in MLP else specified_in_place
    x, x0 = torch.randn(2, ROWS, STEPS, memory.dim, dtype=torch.float64)
    compared = 0
    for row, stretches in enumerate(stream(memory, x, x0, random.Random(seed))):
        for stretch in filter(lambda stretch: stretch.steps, stretches):
            heard = torch.tensor(stretch.steps)
            expected = specified(memory, x[row, heard], x0[row, heard], torch.tensor(stretch.written))
            assert relative(torch.stack(stretch.answers), expected) < 1e-12
            compared += len(heard) > min(2 * memory.update_steps, 30)
    assert compared > 0
