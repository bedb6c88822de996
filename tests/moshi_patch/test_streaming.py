"""Streaming is the function of one pass: step by step, at every split, row by row, through resets and snapshots."""

import copy

import pytest
import torch

import moshi_patch
from moshi_patch.kinds.in_place import TTTGating
from moshi_patch.kinds.memory import SEGMENT_STEPS
from tests.support.models import random_codes, relative
from tests.support.streams import SETTINGS, B, T, call_memory, one_pass, steps, ttt_model, update_steps

pytestmark = pytest.mark.usefixtures("patched")


@pytest.mark.parametrize("name", SETTINGS)
def test_one_step_at_a_time_equals_one_pass(name):
    model = ttt_model(**SETTINGS[name])
    codes = random_codes(model, B, T)
    assert model.context * 3 < T
    expected = one_pass(model, codes)
    with moshi_patch.ttt_updates(model):
        control = one_pass(model, codes)
    assert relative(control, expected) > 1e-3, "this test would pass without TTT"
    with model.streaming(B):
        assert relative(steps(model, codes), expected) < 1e-12
        size = update_steps(model)
        for stats in moshi_patch.ttt_stats(model).values():
            assert stats["updates"] == [T // size] * B


@pytest.mark.parametrize(
    ("dtype", "overrides", "tolerance"),
    [
        pytest.param(torch.float32, {"positional_embedding": "rope"}, 1e-4, id="float32"),
        pytest.param(torch.float32, {"norm": "rms_norm_f32"}, 1e-4, id="float32 rms_norm_f32"),
        # rope rounds to float32 inside; with float64 around it the two paths still agree far below that
        pytest.param(torch.float64, {"positional_embedding": "rope"}, 1e-5, id="float64 rope"),
        pytest.param(torch.bfloat16, {"norm": "rms_norm_f32"}, 5e-2, id="bfloat16, 2e-2 for each of two TTT layers"),
        pytest.param(torch.float32, {"ttt_update": "residual"}, 1e-4, id="float32 residual"),
        pytest.param(torch.float32, {"ttt_kind": "mlp"}, 1e-4, id="float32 mlp"),
        pytest.param(torch.bfloat16, {"norm": "rms_norm_f32", "ttt_kind": "mlp"}, 5e-2, id="bfloat16 mlp"),
        pytest.param(torch.bfloat16, {"norm": "rms_norm_f32", "ttt_update": "residual"}, 5e-2, id="bfloat16 residual"),
    ],
)
def test_lower_precisions_agree_within_their_rounding(dtype, overrides, tolerance):
    model = ttt_model(dtype, **overrides)
    codes = random_codes(model, B, T)
    with model.streaming(B):
        assert relative(steps(model, codes), one_pass_outside(model, codes)) < tolerance


def one_pass_outside(model, codes):
    """One pass of a streaming model's weights, computed by a copy that is not streaming."""
    other = copy.deepcopy(model)
    other._stop_streaming()
    return one_pass(other, codes)


def random_split(total, cuts, generator):
    """The steps `0..total` cut at `cuts` random places."""
    cuts = torch.randperm(total - 1, generator=generator)[:cuts].sort().values + 1
    return torch.arange(total).tensor_split(cuts)


@pytest.mark.parametrize("cuts", [2, 5, 60], ids="{} cuts".format)
@pytest.mark.parametrize("name", SETTINGS)
def test_segments_of_any_length_agree_with_one_pass_at_the_level_of_the_memory(name, cuts):
    model = ttt_model(**SETTINGS[name])
    memory = next(iter(moshi_patch.ttt_memories(model).values()))
    steps = 90
    x, x0 = torch.randn(2, B, steps, model.dim, dtype=torch.float64)

    def call(part):
        return call_memory(memory, x[:, part], x0[:, part])

    expected = call(torch.arange(steps))
    parts = random_split(steps, cuts, torch.Generator().manual_seed(cuts))
    assert (max(map(len, parts)) >= max(SEGMENT_STEPS, memory.update_steps // 4)) == (cuts < 60)
    with memory.streaming(B):
        actual = torch.cat([call(part) for part in parts], 1)
    assert relative(actual, expected) < 1e-12


@pytest.mark.parametrize("cuts", [1, 5], ids="{} cuts".format)
@pytest.mark.parametrize("name", ["plain", "mlp"])
def test_segments_of_any_length_agree_for_the_whole_model_when_context_covers_the_sequence(name, cuts):
    steps = 60
    model = ttt_model(context=steps, **SETTINGS[name])
    codes = random_codes(model, B, steps)
    expected = one_pass(model, codes)
    with model.streaming(B), torch.no_grad():
        parts = random_split(steps, cuts, torch.Generator().manual_seed(cuts))
        actual = torch.cat([model.forward_text(codes[:, :, part])[0] for part in parts], 1)
    assert relative(actual, expected) < 1e-12


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_with_random_exec_masks_and_resets_equal_the_same_rows_alone(name):
    model = ttt_model(**SETTINGS[name])
    generator = torch.Generator().manual_seed(3)
    rows, total = 4, 100
    codes = random_codes(model, rows, total)
    fed: list[list[list[int]]] = [[[]] for _ in range(rows)]  # row -> stretches between resets -> steps fed
    outputs: dict[tuple[int, int], torch.Tensor] = {}
    with model.streaming(rows), torch.no_grad():
        for t in range(total):
            if t % 19 == 11:
                reset = torch.rand(rows, generator=generator) < 0.5
                model.reset_streaming(reset)
                for row in reset.nonzero()[:, 0].tolist():
                    fed[row].append([])
            execute = torch.rand(rows, generator=generator) < 0.7
            model.set_exec_mask(execute)
            out = model.forward_text(codes[:, :, t : t + 1])[0]
            for row in execute.nonzero()[:, 0].tolist():
                fed[row][-1].append(t)
                outputs[row, t] = out[row, 0]
    compared = 0
    for row in range(rows):
        for stretch in filter(None, fed[row]):
            alone = one_pass(model, codes[row : row + 1, :, stretch])[0]
            assert relative(torch.stack([outputs[row, t] for t in stretch]), alone) < 1e-12
            compared += len(stretch) > min(update_steps(model), 20)
    assert compared >= 2, "too few stretches were long enough to update"


@pytest.mark.parametrize("before", [3, 5, 8, 12])
@pytest.mark.parametrize("name", ["clip and decay", "residual, K=5, decay, gain", "mlp"])
def test_a_reset_row_is_a_fresh_row_bit_for_bit(before, name):
    model = ttt_model(**SETTINGS[name])
    codes = random_codes(model, 2, 40)
    with model.streaming(2):
        steps(model, codes[:, :, :before])
        model.reset_streaming(torch.tensor([True, False]))
        for name, memory in moshi_patch.ttt_memories(model).items():
            fresh = memory._init_streaming_state(2).fast
            for field, value in vars(memory._streaming_state.fast).items():
                assert torch.equal(value[0], getattr(fresh, field)[0]), f"{name}: {field} survived the reset"
        after = steps(model, codes[:, :, before:])
    with model.streaming(2):
        fresh = steps(model, codes[:, :, before:])
    assert torch.equal(after[0], fresh[0])
    assert not torch.equal(after[1], fresh[1])


@pytest.mark.parametrize("name", ["plain", "residual, K=5, decay, gain", "mlp"])
def test_a_snapshot_continues_twice_with_the_same_result(name):
    model = ttt_model(**SETTINGS[name])
    codes = random_codes(model, B, T)
    expected = one_pass(model, codes)
    with model.streaming(B):
        steps(model, codes[:, :, :13])
        snapshot = copy.deepcopy(model.get_streaming_state())
        first = steps(model, codes[:, :, 13:])
        model.set_streaming_state(snapshot)
        second = steps(model, codes[:, :, 13:])
    assert torch.equal(first, second)
    assert relative(first, expected[:, 13:]) < 1e-12


def test_the_streaming_state_is_float32_beside_bfloat16_weights_and_no_cast_touches_it():
    model = ttt_model(torch.bfloat16)
    keys = set(model.state_dict())
    with model.streaming(1):
        model.to(torch.bfloat16)
        for gating in moshi_patch.ttt_gatings(model).values():
            assert gating._streaming_state.fast.delta.dtype == torch.float32
            assert gating._streaming_state.fast.keys.dtype == torch.bfloat16
        assert set(model.state_dict()) == keys


def test_small_updates_are_not_rounded_away():
    """In bfloat16 beside a weight of size 1, a change of 1e-4 would vanish at every chunk."""
    model = ttt_model(torch.bfloat16, ttt_learning_rate=1e-6)
    codes = random_codes(model, 1, 60)
    with model.streaming(1):
        steps(model, codes)
        for stats in moshi_patch.ttt_stats(model).values():
            assert 0 < stats["relative_delta"][0] < 1e-3


def test_a_gating_called_outside_of_its_transformer_says_what_it_lacks():
    model = ttt_model()
    gating = next(iter(moshi_patch.ttt_gatings(model).values()))
    assert isinstance(gating, TTTGating)
    with pytest.raises(ValueError, match="ttt_x0"):
        gating(torch.zeros(1, 2, model.dim, dtype=torch.float64))
