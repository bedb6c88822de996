"""`step_` and `segment_` are, row by row, what `naive` makes of all that the row heard since its last reset."""

import copy
import random
from dataclasses import fields

import pytest
import torch

from moshi_patch.kinds.mlp.ops import MLPDelta, MLPFastWeight, naive, segment_, step_
from tests.moshi_patch.kinds.mlp.support import BATCH, HEADS, D, inputs, make_weights
from tests.support.models import relative

SIZES = pytest.mark.parametrize("size", [1, 2, 3, 8, 40], ids="C={}".format)
ON, EVERYONE = torch.tensor(True), torch.ones(BATCH, dtype=torch.bool)


def allocate(size: int, batch: int = BATCH) -> MLPFastWeight:
    return MLPFastWeight.allocate(batch, HEADS, D, 4 * D, size, torch.float64, "cpu")


def by_steps(state, weights, parts, exec_mask, **options):
    outs = [
        step_(state, weights, *(part[:, :, t] for part in parts), exec_mask, **options)
        for t in range(parts[0].shape[2])
    ]
    return torch.stack(outs, 2)


def expected_of(weights, parts, row: int, heard: list[int], learnt: list[bool], size: int):
    """Outputs `[h, T, d]` and what was learnt, by the specification, of one row that heard these steps."""
    q, k, v, eta = (part[row : row + 1, :, heard] for part in parts)
    out, delta = naive(weights, q, k, v, eta * torch.tensor(learnt), size)
    return out[0], MLPDelta(*(part[0] for part in delta))


class Row:
    """What a row heard since its last reset, whether it learnt of it, and what was answered."""

    def __init__(self):
        self.heard: list[int] = []
        self.learnt: list[bool] = []
        self.answers: list[torch.Tensor] = []

    def updates(self, size: int) -> int:
        whole = len(self.heard) // size
        return sum(any(self.learnt[size * number : size * (number + 1)]) for number in range(whole))


def mixture(state, weights, parts, size: int, lengths: list[int], choose: random.Random):
    """Hears `parts` in pieces of these `lengths`, in random rows, with random rows muted and reset."""
    rows, finished, first = [Row() for _ in range(BATCH)], [], 0
    while first < parts[0].shape[2]:
        length = min(choose.choice(lengths), parts[0].shape[2] - first)
        executed, learning = ([choose.random() < 0.75 for _ in range(BATCH)] for _ in "12")
        enabled = choose.random() < 0.9
        options = {"enabled": torch.tensor(enabled), "learning": torch.tensor(learning)}
        piece = [part[:, :, first : first + length] for part in parts]
        stream = by_steps if choose.random() < 0.3 else segment_
        out = stream(state, weights, *([piece] if stream is by_steps else piece), torch.tensor(executed), **options)
        for number, row in enumerate(rows):
            if executed[number]:
                row.heard += range(first, first + length)
                row.learnt += [enabled and learning[number]] * length
                row.answers += out[number].unbind(1)
        first += length
        if choose.random() < 0.1:
            reset = [choose.random() < 0.4 for _ in range(BATCH)]
            state.reset(torch.tensor(reset))
            finished += [(number, row) for number, row in enumerate(rows) if reset[number]]
            rows = [Row() if reset[number] else row for number, row in enumerate(rows)]
    return rows, finished


@SIZES
@pytest.mark.parametrize("lengths", [[1], [1, 2, 5, 17]], ids=["steps", "steps and segments"])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_mixture_of_steps_segments_masks_mutes_and_resets_equals_the_specification(size, lengths, seed):
    weights, parts, state = make_weights(), inputs(70), allocate(size)
    rows, finished = mixture(state, weights, parts, size, lengths, random.Random(seed))
    assert len(set(state.position.tolist())) > 1
    delta, compared = state.full_delta(), 0
    for number, row in [*enumerate(rows), *finished]:
        if row.heard:
            out, learnt = expected_of(weights, parts, number, row.heard, row.learnt, size)
            assert relative(torch.stack(row.answers, 1), out) < 1e-12
            compared += len(row.heard)
        if row is rows[number]:
            assert state.position[number] == len(row.heard)
            assert state.updates[number] == row.updates(size)
            if row.heard:
                for now, expected in zip(delta, learnt, strict=True):
                    assert (now[number] - expected).norm() <= 1e-12 * expected.norm()
    assert compared > 100


@SIZES
def test_a_segment_leaves_the_state_that_its_steps_would_leave(size):
    weights, stepped = make_weights(), allocate(size)
    mixture(stepped, weights, inputs(2 * size + 7), size, [1], random.Random(3))
    for steps in (1, 2, size, 3 * size + 1, 17, 2):
        parts, exec_mask = inputs(steps, seed=steps), torch.tensor([True, False, True, True])
        options = {"enabled": ON, "learning": torch.tensor([True, True, False, True])}
        jumped, before = copy.deepcopy(stepped), copy.deepcopy(stepped)
        expected = by_steps(stepped, weights, parts, exec_mask, **options)
        actual = segment_(jumped, weights, *parts, exec_mask, **options)
        assert relative(actual[exec_mask], expected[exec_mask]) < 1e-12
        for field in fields(stepped):
            one, other, old = (getattr(state, field.name) for state in (stepped, jumped, before))
            if one.is_floating_point():
                assert (one - other).norm() <= 1e-12 * one.norm(), field.name
            else:
                assert torch.equal(one, other), field.name
            assert torch.equal(one[~exec_mask], old[~exec_mask]), f"{field.name} of an idle row, by steps"
            assert torch.equal(other[~exec_mask], old[~exec_mask]), f"{field.name} of an idle row, in a segment"


def test_a_row_that_does_not_run_answers_what_it_would():
    weights, parts, state = make_weights(), inputs(12), allocate(5)
    by_steps(state, weights, parts, EVERYONE, enabled=ON)
    step = [part[:, :, 0] for part in inputs(1, seed=9)]
    idle = step_(copy.deepcopy(state), weights, *step, ~EVERYONE, enabled=ON)
    assert torch.equal(idle, step_(copy.deepcopy(state), weights, *step, EVERYONE, enabled=ON))


def test_a_reset_row_is_a_fresh_row_whatever_it_held():
    weights, state = make_weights(), allocate(4)
    parts = inputs(11)
    by_steps(state, weights, parts, EVERYONE, enabled=ON)
    before = copy.deepcopy(state)
    for field in fields(state):
        if getattr(state, field.name).is_floating_point():
            getattr(state, field.name)[1] = torch.nan
    state.reset(torch.tensor([False, True, False, False]))
    for field in fields(state):
        tensor = getattr(state, field.name)
        assert torch.equal(tensor[1], getattr(allocate(4), field.name)[1])
        assert torch.equal(tensor[2], getattr(before, field.name)[2])


def test_a_step_moves_no_tensor_of_the_state():
    weights, state = make_weights(), allocate(4)
    places = [getattr(state, field.name).data_ptr() for field in fields(state)]
    by_steps(state, weights, inputs(9), EVERYONE, enabled=ON)
    segment_(state, weights, *inputs(9), EVERYONE, enabled=ON)
    state.reset(EVERYONE)
    assert [getattr(state, field.name).data_ptr() for field in fields(state)] == places


def test_the_state_is_float32_whatever_the_weights_are_and_a_step_agrees_with_one_pass():
    weights, parts = make_weights(), inputs(21)
    narrow = type(weights)(*(part.bfloat16() for part in weights))
    state = MLPFastWeight.allocate(BATCH, HEADS, D, 4 * D, 4, torch.bfloat16, "cpu")
    assert state.delta1.dtype == state.keys.dtype == torch.float32
    out = by_steps(state, narrow, [part.bfloat16() for part in parts], EVERYONE, enabled=ON)
    exact = naive(type(weights)(*(part.double() for part in narrow)), *(part.bfloat16().double() for part in parts), 4)[
        0
    ]
    assert out.dtype == torch.float32
    assert relative(out.double(), exact) < 1e-4


def test_while_nothing_was_learnt_the_state_says_so():
    weights, state = make_weights(), allocate(4)
    by_steps(state, weights, inputs(9), EVERYONE, enabled=torch.tensor(False))
    assert state.untouched()
    assert state.full_delta().norm().tolist() == [0.0] * BATCH
    by_steps(state, weights, inputs(1), EVERYONE, enabled=ON)
    assert not state.untouched()
    assert (state.full_delta().norm() > 0).all()


def test_at_moshis_size_a_row_remembers_21_mib_a_layer():
    state = MLPFastWeight.allocate(1, 32, 128, 512, 16, torch.float32, "meta")
    size = sum(tensor.numel() * tensor.element_size() for tensor in vars(state).values())
    assert round(size / 2**20, 1) == 21.1
