"""The residual update: its limits, that it saturates, that no key spoils it, and what it tells of itself."""

from functools import partial

import pytest
import torch

import moshi_patch
from moshi_patch.kinds.in_place.ops import FastWeight, ResidualFastWeight, dual, naive, segment_, step_
from moshi_patch.kinds.in_place.target import TargetGenerator
from tests.support.models import random_codes, relative
from tests.support.streams import steps, ttt_model

D, H, C, T = 6, 24, 8, 83
FORMS = ("one pass", "steps", "segments")


def answers(form: str, z: torch.Tensor, v: torch.Tensor, rate: float, chunk: int = C, **options) -> torch.Tensor:
    """`[B, T, D]`: what the fast weight answers `z [B, T, H]` while it learns `v [B, T, D]`, in the dtype given."""
    base = torch.zeros_like(v)
    if form == "one pass":
        return dual(base, z, v, chunk, rate, update="residual", **options)
    generator = TargetGenerator(v.shape[2], 1, depthwise=True, dtype=v.dtype)
    state = ResidualFastWeight.allocate(len(z), v.shape[2], z.shape[2], chunk, z.dtype, "cpu")
    everyone, on = torch.ones(len(z), dtype=torch.bool), torch.tensor(True)
    with torch.no_grad():
        generator.conv1d.conv.weight.fill_(1.0)
        if form == "steps":
            return torch.stack(
                [
                    step_(state, z[:, t], generator.taps(v[:, t]), rate, everyone, enabled=on, **options)
                    for t in range(z.shape[1])
                ],
                1,
            )
        targets = partial(generator, chunk_size=chunk)
        parts = zip(base.split(50, 1), z.split(50, 1), v.split(50, 1), strict=True)
        return torch.cat([segment_(state, *part, targets, rate, everyone, **options) for part in parts], 1)


def specified(z: torch.Tensor, v: torch.Tensor, rate: float, chunk: int = C, **options) -> torch.Tensor:
    w_down = torch.zeros(v.shape[2], z.shape[2], dtype=torch.float64)
    return naive(z.double(), v.double(), w_down, chunk, rate, update="residual", **options)[0]


def stream(keys: str, values: str, steps: int = T, norm: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """`[1, T, H]` keys and `[1, T, D]` values in float64; every key has about the norm given."""
    one_key, one_value = torch.randn(1, 1, H).double() / H**0.5, torch.randn(1, 1, D).double()
    z = one_key.expand(-1, steps, -1) if keys == "same" else torch.randn(1, steps, H).double() / H**0.5
    v = one_value.expand(-1, steps, -1) if values == "same" else torch.randn(1, steps, D).double()
    return norm * z.contiguous(), v.contiguous()


@pytest.mark.parametrize("form", FORMS)
def test_a_small_rate_makes_it_the_papers_update(form):
    z, v = stream("random", "random")
    rate, gain = 1e-9, 3.0
    hebbian = dual(torch.zeros_like(v), z, v, C, rate, target_gain=gain)
    assert relative(answers(form, z, v, rate, target_gain=gain), hebbian) < 1e-6
    assert relative(answers(form, z, v, 1.0, target_gain=gain), rate**-1 * hebbian) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_large_rate_answers_the_last_chunk_exactly_with_the_least_change(form):
    z, v = stream("random", "random", 2 * C)
    again = torch.cat([z, z[:, C:]], 1)  # what was asked in the second chunk is asked once more
    out = answers(form, again, torch.cat([v, v[:, C:]], 1), 1e6, target_gain=2.0)
    assert relative(out[:, 2 * C :], 2.0 * v[:, C:]) < 1e-5
    _, first = naive(z[:, :C], v[:, :C], torch.zeros(D, H).double(), C, 1e6, update="residual", target_gain=2.0)
    least = first + ((2.0 * v[:, C:] - z[:, C:] @ first.mT).mT @ torch.linalg.pinv(z[:, C:]).mT)
    _, second = naive(z, v, torch.zeros(D, H).double(), C, 1e6, update="residual", target_gain=2.0)
    assert relative(second, least) < 1e-5


@pytest.mark.parametrize("rate", [0.01, 1.0, 1e6])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_said_a_hundred_times_saturates_at_its_target(form, rate):
    z, v = stream("same", "same", 100 * C)
    out = answers(form, z, v, rate)
    assert relative(out[:, -1], v[:, -1]) < (0.01 if rate == 0.01 else 1e-6)
    assert (out.norm(dim=2) <= v.norm(dim=2) * (1 + 1e-12)).all()
    hebbian = dual(torch.zeros_like(v), z, v, C, rate)
    assert hebbian[:, -1].norm() > 5 * v[:, -1].norm()


def rows(products: tuple[float, ...], z: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A row for each of `products`, which are what η z·z is about with η = 1."""
    scale = torch.tensor(products).double().sqrt()[:, None, None] / z[0, 0].norm()
    return scale * z, v.expand(len(products), -1, -1)


@pytest.mark.parametrize("form", FORMS)
def test_no_rate_makes_it_grow(form):
    """Random targets and repeated keys, for fifty chunks: the answers stay of the targets' size."""
    z, _ = stream("random", "random", 4 * C)
    z, v = rows((1e-3, 1.0, 1e3, 1e6), z.repeat(1, 12, 1), torch.randn(1, 48 * C, D).double())
    out = answers(form, z, v, 1.0)
    assert (out[:, -C:].flatten(1).norm(dim=1) < 5 * v[:, -C:].flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("form", FORMS)
def test_a_repeated_key_spoils_no_precision(form, dtype, tolerance):
    """A thousand times in float32: each chunk's Gram matrix has rank one, and a condition number of up to 16e6."""
    repeats = 1000 if dtype == torch.float32 else 200
    parts = [rows((1e2, 1e4, 1e6), *stream("same", values, repeats)) for values in ("same", "random")]
    z, v = (torch.cat(part).to(dtype) for part in zip(*parts, strict=True))
    out, expected = answers(form, z, v, 1.0, chunk=16), specified(z, v, 1.0, chunk=16)
    assert max(map(relative, out, expected)) < tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [16, 64, 256], ids="C={}".format)
def test_neither_do_keys_that_differ_by_their_rounding_or_by_orders_of_magnitude(form, chunk):
    z, v = stream("same", "random", 600, norm=30.0)
    z = z * (1 + 1e-6 * torch.randn(z.shape).double())
    z[:, 10::37] *= 1000.0
    z[:, 20::41] *= 0.0
    out = answers(form, z.float(), v.float(), 1e3, chunk=chunk)
    assert out.isfinite().all()
    assert out.norm() < 100 * v.norm()


@pytest.mark.parametrize("form", FORMS)
def test_values_beyond_the_range_of_float16_do_not_overflow_on_the_way(form):
    """A gain of 4,000 and targets of 30: what is missing is 120,000, and a fitting key answers little of it."""
    z, v = stream("random", "same", 3 * C)
    v = 30 * v / v.abs().max()
    low = answers(form, z.half(), v.half(), 0.01, target_gain=4000.0)
    assert relative(low, specified(z.half(), v.half(), 0.01, target_gain=4000.0)) < 2e-3


def test_gradients_equal_finite_differences():
    """Through the solve, decay, gain, chunks that share a block and a carried delta."""
    z, v, delta = torch.randn(1, 8, 4), torch.randn(1, 8, 2), torch.randn(1, 2, 4)

    def run(z, v, delta):
        options = {"update": "residual", "target_gain": 2.0, "decay": 0.9, "delta": delta}
        return dual(torch.zeros_like(v), z, v, 3, 0.7, **options).square()

    assert torch.autograd.gradcheck(run, [leaf.double().requires_grad_() for leaf in (z, v, delta)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_gradients_in_lower_precisions_stay_within_their_rounding(dtype, tolerance):
    z, v = stream("random", "random", 5 * C)
    grads = []
    for kind in (torch.float64, dtype):
        leaves = [leaf.to(dtype).to(kind).requires_grad_() for leaf in (z, v)]
        out = dual(torch.zeros_like(leaves[1]), *leaves, C, 10.0, update="residual")
        grads.append(torch.autograd.grad(out.double().square().sum(), leaves))
    for low, exact in zip(grads[1], grads[0], strict=True):
        assert relative(low, exact) < tolerance


def test_the_state_grows_by_two_matrices_of_a_chunk_and_nothing_else():
    sizes = [
        sum(tensor.numel() for tensor in vars(kind.allocate(3, D, H, C, torch.bfloat16, "cpu")).values())
        for kind in (FastWeight, ResidualFastWeight)
    ]
    assert sizes[1] - sizes[0] == 3 * 2 * C**2


def test_a_stream_of_moshi_7b_keeps_what_the_docs_say():
    """176 MiB of delta and 15 MiB of two kept chunks a layer, 955 MiB for five; 202.5 MiB with the residual update."""
    mib = []
    for kind in (FastWeight, ResidualFastWeight):
        state = kind.allocate(1, 4096, 11264, 256, torch.bfloat16, "meta")
        parts = [getattr(state, name, None) for name in ("delta", "keys", "values", "whitening")]
        mib.append([part.numel() * part.element_size() / 2**20 for part in parts if part is not None])
    assert mib[0][0] == mib[1][0] == 4 * 4096 * 11264 / 2**20 == 176
    assert sum(mib[0][1:]) == 2 * (2 * 256 * (4096 + 11264)) / 2**20 == 15
    assert 5 * sum(mib[0]) == 955
    assert sum(mib[1]) == 202.5


@pytest.mark.parametrize("position", [C + 3, 2 * C, 3 * C - 1])
def test_both_ways_to_multiply_with_the_previous_chunk_agree(position):
    state = ResidualFastWeight.allocate(2, D, H, C, torch.float64, "cpu")
    state.keys.normal_()
    state.position += torch.tensor([position, position + C])
    errors = torch.randn(2, C, 3).double()
    copied, whole = (state._with_previous_keys(errors, copying=copying) for copying in (True, False))
    assert relative(copied, whole) < 1e-12


# --- what it tells of itself ---


def known(model) -> list[list]:
    return [stats["known"] for stats in moshi_patch.ttt_stats(model).values()]


@pytest.mark.usefixtures("patched")
def test_stats_say_how_much_of_the_last_chunk_was_known():
    model = ttt_model(ttt_update="residual", ttt_learning_rate=1.0, ttt_target="hidden_states")
    codes = random_codes(model, 2, 1).expand(-1, -1, 30)
    assert known(model) == [None, None]
    with model.streaming(2):
        steps(model, codes[:, :, :4])
        assert known(model) == [[None, None]] * 2  # no chunk has ended
        steps(model, codes[:, :, 4:5])
        assert known(model) == [[0.0, 0.0]] * 2  # nobody knew the first
        steps(model, codes[:, :, 5:20])
        assert all(0.8 < share <= 1.0 for layer in known(model) for share in layer)
        model.reset_streaming(torch.tensor([True, False]))
        steps(model, codes[:, :, 20:25])
        assert [layer[0] for layer in known(model)] == [0.0, 0.0]


@pytest.mark.usefixtures("patched")
def test_what_was_known_is_that_of_its_definition_wherever_the_next_chunk_stands():
    generator = TargetGenerator(D, 1, depthwise=True, dtype=torch.float64)
    torch.nn.init.ones_(generator.conv1d.conv.weight)
    state = ResidualFastWeight.allocate(1, D, H, C, torch.float64, "cpu")
    z, v = stream("random", "same", 4 * C)
    on, run, gain, decay = torch.tensor(True), torch.tensor([True]), 2.0, 0.8
    options = {"target_gain": gain, "decay": decay}
    out = specified(z, v, 0.5, **options)
    for t in range(4 * C):
        if t > C:
            last = slice((t // C - 1) * C, t // C * C)
            missing = gain * v[:, last] - decay * out[:, last]
            expected = 1 - missing.square().sum() / (gain * v[:, last]).square().sum()
            assert state.known_share().item() == pytest.approx(max(expected.item(), 0.0), abs=1e-9)
        with torch.no_grad():
            step_(state, z[:, t], generator.taps(v[:, t]), 0.5, run, enabled=on, **options)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("silent", ["fresh", "muted"])
def test_where_there_was_no_target_there_is_nothing_to_know(silent):
    model = ttt_model(ttt_update="residual")
    if silent == "fresh":
        with torch.no_grad():
            for parameter in moshi_patch.ttt_parameters(model).values():
                parameter.zero_()
    with model.streaming(1), moshi_patch.ttt_updates(model, enabled=silent == "fresh"):
        steps(model, random_codes(model, 1, 12))
        assert known(model) == [[None]] * 2
        assert moshi_patch.finite_rows(model).all()


@pytest.mark.usefixtures("patched")
def test_the_papers_update_has_no_such_number():
    model = ttt_model()
    with model.streaming(1):
        steps(model, random_codes(model, 1, 12))
        assert known(model) == [None, None]
