"""A streamed segment leaves the outputs and the state that its steps one by one would leave."""

import copy
from functools import partial

import pytest
import torch

from moshi_patch.kinds.in_place.ops import FastWeight, ResidualFastWeight, segment_, step_
from moshi_patch.kinds.in_place.target import TargetGenerator
from tests.support.models import relative

B, D, H, RATE = 4, 6, 10, 0.1
OPTIONS = {
    "plain": (FastWeight, {}),
    "decay": (FastWeight, {"decay": 0.8}),
    "clip": (FastWeight, {"delta_clip": 0.4}),
    "clip, decay and gain": (FastWeight, {"delta_clip": 0.4, "decay": 0.8, "target_gain": 2.0}),
    "residual": (ResidualFastWeight, {}),
    "residual, decay and gain": (ResidualFastWeight, {"decay": 0.8, "target_gain": 2.0}),
}


def by_steps(state, generator, z, x0, exec_mask, options):
    on = torch.tensor(True)
    outs = [
        step_(state, z[:, t], generator.taps(x0[:, t]), RATE, exec_mask, enabled=on, **options)
        for t in range(z.shape[1])
    ]
    return torch.stack(outs, 1)


def assert_same_state(actual: FastWeight, expected: FastWeight):
    assert torch.equal(actual.position, expected.position)
    assert torch.equal(actual.updates, expected.updates)
    assert torch.equal(actual.wrote, expected.wrote)
    assert type(actual) is type(expected)
    assert relative(actual.delta, expected.delta) < 1e-12
    if isinstance(expected, ResidualFastWeight):
        torch.testing.assert_close(actual.known_share(), expected.known_share(), rtol=1e-9, atol=1e-9, equal_nan=True)
    assert relative(actual.full_delta(RATE), expected.full_delta(RATE)) < 1e-12


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kernel", [1, 2, 5], ids="K={}".format)
@pytest.mark.parametrize("chunk", [1, 3, 4, 9], ids="C={}".format)
@torch.no_grad()
def test_a_segment_equals_its_steps_for_rows_at_different_positions(chunk, kernel, name):
    kind, options = OPTIONS[name]
    generator = TargetGenerator(D, kernel, depthwise=True, dtype=torch.float64)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    stepped = kind.allocate(B, D, H, chunk, torch.float64, "cpu")
    for _ in range(2 * chunk + 3):  # rows drift apart
        z, x0 = torch.randn(B, 1, H).double(), torch.randn(B, 1, D).double()
        by_steps(stepped, generator, z, x0, torch.rand(B) < 0.6, options)
    assert len(stepped.position.unique()) > 1
    for steps in (1, 2, chunk, 3 * chunk + 1, 17, 2):
        exec_mask = torch.rand(B) < 0.8
        z, x0, base = torch.randn(B, steps, H).double(), torch.randn(B, steps, D).double(), torch.randn(B, steps, D)
        jumped = copy.deepcopy(stepped)
        before = copy.deepcopy(stepped)
        expected = base + by_steps(stepped, generator, z, x0, exec_mask, options)
        actual = segment_(
            jumped, base.double(), z, x0, partial(generator, chunk_size=chunk), RATE, exec_mask, **options
        )
        assert relative(actual[exec_mask], expected[exec_mask]) < 1e-12
        assert_same_state(jumped, stepped)
        for field, value in vars(before).items():
            assert torch.equal(getattr(jumped, field)[~exec_mask], value[~exec_mask]), f"{field} of an idle row changed"
        # what comes after must not tell them apart either
        z, x0 = torch.randn(B, 2 * chunk, H).double(), torch.randn(B, 2 * chunk, D).double()
        everyone = torch.ones(B, dtype=torch.bool)
        after = by_steps(copy.deepcopy(stepped), generator, z, x0, everyone, options)
        assert relative(by_steps(jumped, generator, z, x0, everyone, options), after) < 1e-12
