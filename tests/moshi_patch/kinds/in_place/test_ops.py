"""`dual` and the target generator are the function that `naive` specifies: outputs, final delta and every gradient."""

import importlib

import pytest
import torch

from moshi_patch.kinds.in_place.ops import FastWeight, dual, naive, naive_target, segment_, step_
from moshi_patch.kinds.in_place.target import TargetGenerator
from tests.support.models import relative

D, H, C, RATE = 6, 10, 8, 0.1
UPDATES = ("hebbian", "residual")

STEPS = {"T=1": 1, "T<C": 5, "T=C": C, "T=nC": 4 * C, "ragged": 4 * C + 5}
CONVS = {"K=1": (1, True), "K=2": (2, True), "K=5": (5, True), "K=2 full": (2, False), "K=9>C full": (9, False)}


def make(steps, kernel=2, depthwise=True, batch=2, dtype=torch.float64):
    """Leaves z, x0, conv, W_target, W_down with gradients on."""
    shapes = [(batch, steps, H), (batch, steps, D), (D, 1 if depthwise else D, kernel), (D, D), (D, H)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def generator(conv, w_target):
    """A `TargetGenerator` that holds these two tensors."""
    module = TargetGenerator(D, conv.shape[2], conv.shape[1] == 1, dtype=conv.dtype)
    with torch.no_grad():
        module.conv1d.conv.weight.copy_(conv)
        module.W_target.weight.copy_(w_target)
    return module


def both(leaves, chunk=C, **options):
    """`(output, gradients)` of naive and of dual, for one random loss on the outputs of a stream that goes on."""
    z, x0, conv, w_target, w_down = leaves
    module = generator(conv, w_target)
    delta = torch.randn(len(z), D, H, dtype=z.dtype).requires_grad_()
    expected, _ = naive(z, naive_target(x0, conv, w_target, chunk), w_down, chunk, RATE, delta=delta, **options)
    actual = dual(z @ w_down.T, z, module(x0, chunk), chunk, RATE, delta=delta, **options)
    weights = torch.randn_like(expected)
    results = []
    for out, (conv_leaf, target_leaf) in (
        (expected, (conv, w_target)),
        (actual, (module.conv1d.conv.weight, module.W_target.weight)),
    ):
        wanted = [z, x0, conv_leaf, target_leaf, w_down, delta]
        grads = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
        results.append((out, [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]))
    return results


def assert_same(expected, actual, tolerance):
    assert relative(actual[0], expected[0]) < tolerance
    names = ("z", "x0", "conv", "W_target", "W_down", "delta")
    for name, one, other in zip(names, expected[1], actual[1], strict=True):
        assert relative(other, one) < tolerance, f"gradient to {name}"


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("steps", STEPS)
def test_dual_equals_naive(steps, conv, update):
    assert_same(*both(make(STEPS[steps], *CONVS[conv]), update=update), 1e-12)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "options",
    [
        {"delta_clip": 0.5},
        {"decay": 0.9},
        {"delta_clip": 0.5, "decay": 0.7, "target_gain": 3.0},
        {"update": "residual", "decay": 0.7, "target_gain": 3.0},
    ],
    ids=str,
)
def test_dual_equals_naive_with_clip_decay_and_gain(steps, options):
    assert_same(*both(make(STEPS[steps]), **options), 1e-12)


def test_dual_equals_naive_when_the_clip_cuts_some_chunks_and_leaves_others():
    leaves = make(4 * C)
    z, x0, conv, w_target, _ = leaves
    v = naive_target(x0, conv, w_target, C).unflatten(1, (-1, C))
    norms = RATE * (v.transpose(2, 3) @ z.unflatten(1, (-1, C))).flatten(2).norm(dim=2)
    clip = norms.median().item()
    assert (norms > clip).any()
    assert (norms < clip).any()
    assert_same(*both(leaves, delta_clip=clip), 1e-12)


@pytest.mark.parametrize("chunk", [1, 64, 256, 300], ids="C={}".format)
@pytest.mark.parametrize("decay", [1.0, 0.8], ids="decay={}".format)
@pytest.mark.parametrize("update", UPDATES)
def test_query_blocks_of_one_and_of_many_chunks_agree_with_naive(chunk, decay, update):
    assert_same(*both(make(700, batch=1), chunk=chunk, decay=decay, update=update), 1e-12)


@pytest.mark.parametrize("segment", [1, 3 * C, 3 * C + 1])
@pytest.mark.parametrize(
    "options",
    [{}, {"delta_clip": 0.5, "decay": 0.7, "target_gain": 2.0}, {"update": "residual", "decay": 0.7}],
    ids=str,
)
def test_long_sequences_are_computed_in_segments_that_carry_a_delta(segment, options, monkeypatch):
    module = importlib.import_module(
        "moshi_patch.kinds.in_place.ops.dual"
    )  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "SEGMENT_STEPS", segment)
    carried, update = [], module.updated

    def counted(delta, z, *rest):
        carried.append(z.shape[1])
        return update(delta, z, *rest)

    monkeypatch.setattr(module, "updated", counted)
    assert_same(*both(make(6 * C + 3), **options), 1e-12)
    assert carried == ([C] * 6 if segment == 1 else [3 * C] * 2)


@pytest.mark.parametrize("cut", [C, 3 * C])
@pytest.mark.parametrize("update", UPDATES)
def test_a_stream_cut_in_two_calls_equals_one_call(cut, update):
    z, x0, conv, w_target, w_down = (leaf.detach() for leaf in make(5 * C + 3))
    v = naive_target(x0, conv, w_target, C)
    options = {"decay": 0.9, "update": update}
    whole = dual(z @ w_down.T, z, v, C, RATE, **options)
    _, carried = naive(z[:, :cut], v[:, :cut], w_down, C, RATE, **options)
    second = dual(z[:, cut:] @ w_down.T, z[:, cut:], v[:, cut:], C, RATE, delta=carried, **options)
    assert relative(second, whole[:, cut:]) < 1e-12


@pytest.mark.parametrize("update", UPDATES)
def test_a_fresh_stream_needs_no_delta(update):
    z, x0, conv, w_target, w_down = (leaf.detach() for leaf in make(3 * C))
    v = naive_target(x0, conv, w_target, C)
    zero = torch.zeros(2, D, H, dtype=torch.float64)
    fresh, carried = (dual(z @ w_down.T, z, v, C, RATE, update=update, delta=delta) for delta in (None, zero))
    assert relative(fresh, carried) < 1e-12


@pytest.mark.parametrize("update", UPDATES)
def test_the_last_chunks_targets_are_not_needed(update):
    z, x0, conv, w_target, w_down = make(3 * C)
    v = naive_target(x0, conv, w_target, C)
    expected, _ = naive(z, v, w_down, C, RATE, update=update)
    assert relative(dual(z @ w_down.T, z, v[:, : 2 * C], C, RATE, update=update), expected) < 1e-12


def test_clipping_a_zero_update_gives_finite_gradients():
    z, x0, conv, w_target, w_down = make(3 * C)
    conv = torch.zeros_like(conv).requires_grad_()
    module = generator(conv, w_target)
    out = dual(z @ w_down.T, z, module(x0, C), C, RATE, delta_clip=1e-5)
    out.square().sum().backward()
    grad = module.conv1d.conv.weight.grad
    assert grad.isfinite().all()
    assert grad.abs().max() > 0


@pytest.mark.parametrize("update", UPDATES)
def test_dual_leaves_base_alone(update):
    z, x0, conv, w_target, w_down = (leaf.detach() for leaf in make(3 * C))
    v = naive_target(x0, conv, w_target, C)
    base = z @ w_down.T
    before = base.clone()
    out = dual(base, z, v, C, RATE, update=update)
    assert torch.equal(base, before)
    assert not torch.equal(base, out)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_lower_precisions_stay_within_their_rounding(dtype, tolerance, update):
    leaves = make(4 * C + 5)
    z, x0, conv, w_target, w_down = (leaf.detach() for leaf in leaves)
    expected, _ = naive(z, naive_target(x0, conv, w_target, C), w_down, C, RATE, update=update)
    low = [leaf.detach().to(dtype) for leaf in leaves]
    v = generator(low[2], low[3])(low[1], C)
    out = dual(low[0] @ low[4].T, low[0], v, C, RATE, update=update)
    assert out.dtype == dtype
    assert relative(out, expected) < tolerance


def test_float16_scores_beyond_its_range_do_not_overflow():
    z = torch.full((1, 2 * C, 1000), 10.0, dtype=torch.float16)  # z·z = 100,000 > 65,504
    v = torch.full((1, 2 * C, D), 1e-4, dtype=torch.float16)
    out = dual(torch.zeros(1, 2 * C, D, dtype=torch.float16), z, v, C, RATE)
    assert out[:, C:].float().mean().item() == pytest.approx(RATE * C * 1e5 * 1e-4, rel=2e-3)


@pytest.mark.parametrize("clip", [None, 2.0], ids="clip={}".format)
def test_streaming_in_float16_does_not_overflow_either(clip):
    z = torch.full((1, 3 * C, 1000), 10.0, dtype=torch.float16)
    x0 = torch.full((1, 3 * C, D), 1e-4, dtype=torch.float16)
    module = generator(torch.ones(D, 1, 1), torch.eye(D)).half()
    wide = torch.zeros(D, 1000).double()
    expected, delta = naive(z.double(), x0.double(), wide, C, RATE, delta_clip=clip)
    run = torch.tensor([True])
    base = torch.zeros(1, 3 * C, D)
    stepped, jumped = (FastWeight.allocate(1, D, 1000, C, torch.float16, "cpu") for _ in range(2))
    with torch.no_grad():
        options = {"enabled": torch.tensor(True), "delta_clip": clip}
        outs = [step_(stepped, z[:, t], module.taps(x0[:, t]), RATE, run, **options) for t in range(3 * C)]
        out = segment_(jumped, base, z, x0, lambda x: module(x, C), RATE, run, delta_clip=clip)
    for state, actual in ((stepped, torch.stack(outs, 1)), (jumped, out)):
        assert relative(actual, expected) < 2e-3
        assert relative(state.full_delta(RATE), delta) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_clip_holds_in_lower_precisions(dtype):
    leaves = [leaf.detach() for leaf in make(4 * C)]
    z, x0, conv, w_target, w_down = leaves
    expected, _ = naive(z, naive_target(x0, conv, w_target, C), w_down, C, RATE, delta_clip=0.5)
    low = [leaf.to(dtype) for leaf in leaves]
    v = generator(low[2], low[3])(low[1], C)
    assert relative(dual(low[0] @ low[4].T, low[0], v, C, RATE, delta_clip=0.5), expected) < 2e-2


@pytest.mark.parametrize("update", UPDATES)
def test_no_output_depends_on_its_own_chunk_or_a_later_one_through_the_fast_weight(update):
    steps = 3 * C + 2
    z, x0, conv, w_target, _ = make(steps, kernel=3)
    module = generator(conv, w_target)
    base = torch.zeros(2, steps, D, dtype=torch.float64)
    out = dual(base, z, module(x0, C), C, RATE, update=update)
    for t in range(steps):
        (grad,) = torch.autograd.grad(out[:, t].sum(), x0, retain_graph=True)
        first = t // C * C
        assert (grad[:, first:] == 0).all(), f"step {t} sees its own chunk"
        assert (grad[:, :first] != 0).any(2).all(), f"step {t} misses an earlier step"
