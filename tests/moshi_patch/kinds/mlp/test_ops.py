"""`dual`, `step_` and `segment_` are the function that `naive` specifies: outputs, what is learnt, every gradient."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moshi_patch.kinds.mlp.ops import MLPWeights, dual, naive
from tests.moshi_patch.kinds.mlp.support import BATCH, HEADS, D, inputs, make_weights
from tests.support.models import relative

C = 8
STEPS = {"T=1": 1, "T<C": 5, "T=C": C, "T=nC": 4 * C, "ragged": 4 * C + 5}
NAMES = (*MLPWeights._fields, "q", "k", "v", "eta")


def leaves(steps: int) -> list[torch.Tensor]:
    return [part.requires_grad_() for part in (*make_weights(), *inputs(steps))]


def results(function, parts: list[torch.Tensor], size: int, **options) -> list[torch.Tensor]:
    """Outputs, what is learnt, and the gradients of a loss on both to all that it is made of."""
    out, delta = function(MLPWeights(*parts[:6]), *parts[6:], size, **options)
    generator = torch.Generator().manual_seed(5)
    made = [out, *delta]
    loss = sum((part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum() for part in made)
    return [*made, *torch.autograd.grad(loss, parts)]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("size", [1, 3, C], ids="C={}".format)
def test_one_pass_equals_the_specification_in_outputs_and_in_every_gradient(size, steps):
    parts = leaves(STEPS[steps])
    expected = results(naive, parts, size)
    actual = results(dual, parts, size, group_size=2)
    for name, one, other in zip(("y", *NAMES[:4], *(f"gradient to {n}" for n in NAMES)), expected, actual, strict=True):
        assert other.abs().max() > 0, name
        assert relative(other, one) < 1e-12, name


def test_the_gradients_are_those_of_finite_differences():
    weights, (q, k, v, eta) = make_weights(heads=1, width=3), inputs(5, batch=1, heads=1, width=3)
    parts = [part.requires_grad_() for part in (*weights, q, k, v, eta)]
    assert torch.autograd.gradcheck(lambda *args: dual(MLPWeights(*args[:6]), *args[6:], 2)[0], parts)


@pytest.mark.parametrize("group_size", [None, 1, 3, 100])
def test_computing_groups_again_changes_no_bit(group_size):
    parts = leaves(5 * C + 3)
    for one, other in zip(
        results(dual, parts, C, group_size=2),
        results(dual, parts, C, group_size=group_size),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_computing_groups_again_works_inside_what_is_itself_computed_again():
    parts = leaves(5 * C + 3)
    again = functools.partial(checkpoint, dual, use_reentrant=False)
    for one, other in zip(results(dual, parts, C), results(again, parts, C), strict=True):
        assert torch.equal(one, other)


def test_backward_keeps_less_when_groups_are_smaller():
    def kept(group_size):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            dual(MLPWeights(*parts[:6]), *parts[6:], 2, group_size=group_size)
        return sum(sizes)

    parts = leaves(64)
    assert kept(4) < kept(None) / 4


def test_no_step_hears_the_future_and_every_step_hears_all_of_the_past():
    weights, (q, k, v, eta) = make_weights(), (part.requires_grad_() for part in inputs(2 * C + 3, batch=1))
    y = dual(weights, q, k, v, eta, C)[0]
    for t in range(y.shape[2]):
        for name, gradient in zip(
            ["q", "k", "v", "eta"],
            torch.autograd.grad(y[:, :, t].square().sum(), (q, k, v, eta), retain_graph=True),
            strict=True,
        ):
            by_step = (
                gradient.abs().flatten(3).sum(3).sum((0, 1)) if gradient.dim() == 4 else gradient.abs().sum((0, 1))
            )
            heard = torch.arange(y.shape[2]) <= t if name != "q" else torch.arange(y.shape[2]) == t
            assert (by_step > 0).tolist() == heard.tolist(), (name, t)


def test_no_weight_is_written():
    weights, (q, k, v, eta) = make_weights(), inputs(20)
    before = [part.clone() for part in weights]
    dual(weights, q, k, v, eta, C)
    assert all(torch.equal(one, other) for one, other in zip(before, weights, strict=True))


def test_bfloat16_inputs_are_computed_in_float32():
    weights, parts = make_weights(), inputs(3 * C)
    narrow = MLPWeights(*(part.bfloat16() for part in weights)), [part.bfloat16() for part in parts]
    y = dual(narrow[0], *narrow[1], C)[0]
    assert y.dtype == torch.float32
    exact = naive(MLPWeights(*(part.double() for part in narrow[0])), *(part.double() for part in narrow[1]), C)[0]
    assert relative(y.double(), exact) < 1e-4


def test_a_rate_of_zero_teaches_nothing():
    weights, (q, k, v, eta) = make_weights(), inputs(3 * C)
    y, delta = dual(weights, q, k, v, torch.zeros_like(eta), C)
    assert delta.norm().tolist() == [0.0] * BATCH
    order = torch.arange(3 * C).flip(0)
    assert relative(dual(weights, q[:, :, order], k, v, torch.zeros_like(eta), C)[0], y[:, :, order]) < 1e-12
    assert y.shape == (BATCH, HEADS, 3 * C, D)
