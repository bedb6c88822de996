"""Streaming is the function of one pass: step by step, at every split, row by row, through resets and snapshots."""

import copy

import pytest
import torch

import moshi_patch
from moshi_patch.gating import SEGMENT_STEPS, TTTGating
from moshi_patch.layer import LayerCall, current_call
from moshi_patch.ops import naive, naive_target

from .models import TTT, random_codes, randomise_targets, relative, tiny_model

pytestmark = pytest.mark.usefixtures("patched")

B, T = 3, 33
SETTINGS = {
    "plain": {},
    "C=1": {"ttt_chunk_size": 1},
    "C>D": {"ttt_chunk_size": 20},
    "K=1": {"ttt_conv_kernel_size": 1},
    "K=5": {"ttt_conv_kernel_size": 5},
    "K>2C": {"ttt_conv_kernel_size": 5, "ttt_chunk_size": 2},
    "full conv": {"ttt_conv_depthwise": False},
    "hidden_states": {"ttt_target": "hidden_states"},
    "clip and decay": {"ttt_delta_clip": 0.5, "ttt_decay": 0.8},
    "every layer": {"ttt_layers": "all"},
}


def ttt_model(dtype=torch.float64, **settings):
    return randomise_targets(tiny_model(dtype, **{**TTT, "positional_embedding": "none", **settings}))


@torch.no_grad()
def one_pass(model, codes):
    return model.forward_text(codes)[0]


@torch.no_grad()
def steps(model, codes):
    """`[B, T, D]`: the model's outputs, one step at a time, in the streaming state it is in."""
    return torch.cat([model.forward_text(codes[:, :, t : t + 1])[0] for t in range(codes.shape[2])], 1)


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
        size = model.ttt_config.chunk_size
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


@torch.no_grad()
def call_gating(gating, x, x0):
    """The gating's output as its layer would ask for it."""
    token = current_call.set(LayerCall(x0, frozenset()))
    try:
        return gating(x)
    finally:
        current_call.reset(token)


def random_split(total, cuts, generator):
    """The steps `0..total` cut at `cuts` random places."""
    cuts = torch.randperm(total - 1, generator=generator)[:cuts].sort().values + 1
    return torch.arange(total).tensor_split(cuts)


@pytest.mark.parametrize("cuts", [2, 5, 60], ids="{} cuts".format)
@pytest.mark.parametrize("name", SETTINGS)
def test_segments_of_any_length_agree_with_one_pass_at_the_level_of_the_gating(name, cuts):
    model = ttt_model(**SETTINGS[name])
    gating = next(iter(moshi_patch.ttt_gatings(model).values()))
    steps = 90
    x, x0 = torch.randn(2, B, steps, model.dim, dtype=torch.float64)

    def call(part):
        return call_gating(gating, x[:, part], x0[:, part])

    expected = call(torch.arange(steps))
    parts = random_split(steps, cuts, torch.Generator().manual_seed(cuts))
    assert (max(map(len, parts)) >= SEGMENT_STEPS) == (cuts < 60)
    with gating.streaming(B):
        actual = torch.cat([call(part) for part in parts], 1)
    assert relative(actual, expected) < 1e-12


@pytest.mark.parametrize("cuts", [1, 5], ids="{} cuts".format)
def test_segments_of_any_length_agree_for_the_whole_model_when_context_covers_the_sequence(cuts):
    steps = 60
    model = ttt_model(context=steps)
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
            compared += len(stretch) > model.ttt_config.chunk_size
    assert compared >= 2, "too few stretches were long enough to update"


@pytest.mark.parametrize("before", [3, 5, 8, 12])
def test_a_reset_row_is_a_fresh_row_bit_for_bit(before):
    model = ttt_model(ttt_delta_clip=0.5, ttt_decay=0.9)
    codes = random_codes(model, 2, 40)
    with model.streaming(2):
        steps(model, codes[:, :, :before])
        model.reset_streaming(torch.tensor([True, False]))
        for name, gating in moshi_patch.ttt_gatings(model).items():
            fresh = gating._init_streaming_state(2).fast
            for field, value in vars(gating._streaming_state.fast).items():
                assert torch.equal(value[0], getattr(fresh, field)[0]), f"{name}: {field} survived the reset"
        after = steps(model, codes[:, :, before:])
    with model.streaming(2):
        fresh = steps(model, codes[:, :, before:])
    assert torch.equal(after[0], fresh[0])
    assert not torch.equal(after[1], fresh[1])


def test_a_snapshot_continues_twice_with_the_same_result():
    model = ttt_model()
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


@pytest.mark.parametrize("name", ["plain", "K=5", "clip and decay"])
def test_nothing_heard_while_updates_are_off_is_written(name):
    model = ttt_model(**SETTINGS[name])
    codes = random_codes(model, B, T)
    size = model.ttt_config.chunk_size
    with model.streaming(B):
        steps(model, codes[:, :, : 2 * size])
        before = moshi_patch.ttt_stats(model)
        with moshi_patch.ttt_updates(model):
            steps(model, codes[:, :, 2 * size : 4 * size])
        steps(model, codes[:, :, 4 * size : 4 * size + 1])
        for name, after in moshi_patch.ttt_stats(model).items():
            assert after["updates"] == before[name]["updates"] == [2] * B
            assert after["delta_norm"] == pytest.approx(before[name]["delta_norm"], rel=1e-12)


@pytest.mark.parametrize("form", ["steps", "segments"])
@pytest.mark.parametrize("name", ["plain", "K=5", "clip and decay"])
def test_muted_steps_in_the_middle_of_a_chunk_are_heard_by_no_update(name, form):
    """As if z and x0 of those steps had been zero when the updates were computed; what came before stays in force."""
    model = ttt_model(**SETTINGS[name])
    gating = next(iter(moshi_patch.ttt_gatings(model).values()))
    config, steps = model.ttt_config, 67
    x, x0 = torch.randn(2, 2, steps, model.dim, dtype=torch.float64)
    muted = torch.zeros(steps, dtype=torch.bool)
    for first, last in ((3, 7), (13, 14), (31, 54), (61, 63)):
        muted[first:last] = True
    with torch.no_grad():
        z = gating._hidden(x)
        weights = gating.target_generator.conv1d.conv.weight, gating.target_generator.W_target.weight
        v = naive_target(x0.masked_fill(muted[:, None], 0.0), *weights, config.chunk_size)
        keys = z.masked_fill(muted[:, None], 0.0)
        expected, delta = [], None
        for first in range(0, steps, config.chunk_size):
            part = slice(first, first + config.chunk_size)
            before = torch.zeros(2, model.dim, gating.hidden).double() if delta is None else delta
            expected.append(z[:, part] @ (gating.linear_out.weight + before).transpose(1, 2))
            if muted[part].all():
                continue  # no update, and so nothing decays either
            _, delta = naive(
                keys[:, part],
                v[:, part],
                gating.linear_out.weight,
                config.chunk_size,
                config.learning_rate,
                delta_clip=config.delta_clip,
                decay=config.decay,
                delta=before,
            )
    with gating.streaming(2):
        outs, first = [], 0
        for last in [*(muted[1:] != muted[:-1]).nonzero()[:, 0].add(1).tolist(), steps]:
            gating.set_updates(not muted[first])
            size = last - first if form == "segments" else 1
            outs += [call_gating(gating, x[:, t : t + size], x0[:, t : t + size]) for t in range(first, last, size)]
            first = last
    assert relative(torch.cat(outs, 1), torch.cat(expected, 1)) < 1e-12


def test_updates_can_be_switched_after_streaming_in_inference_mode():
    model = ttt_model()
    codes = random_codes(model, B, T)
    with torch.inference_mode(), model.streaming(B):
        model.forward_text(codes[:, :, :1])
    with moshi_patch.ttt_updates(model), model.streaming(B):
        steps(model, codes)
        assert moshi_patch.ttt_stats(model)["transformer.layers.1.gating"]["updates"] == [0] * B


def test_updates_switched_off_from_the_start_are_the_stock_model():
    model, stock = ttt_model(), tiny_model(positional_embedding="none")
    codes = random_codes(model, B, T)
    with moshi_patch.ttt_updates(model):
        assert torch.equal(one_pass(model, codes), one_pass(stock, codes))
        with model.streaming(B), stock.streaming(B):
            assert torch.equal(steps(model, codes), steps(stock, codes))


@torch.no_grad()
def test_a_muted_segment_of_a_fresh_stream_leaves_what_muted_steps_leave():
    model = ttt_model()
    gating = next(iter(moshi_patch.ttt_gatings(model).values()))
    muted = SEGMENT_STEPS + 3
    assert muted > model.ttt_config.chunk_size
    x, x0 = torch.randn(2, B, T, model.dim, dtype=torch.float64)
    outcomes = []
    for splits in ([1] * T, [muted] + [1] * (T - muted)):
        outs, parts = [], list(zip(x.split(splits, 1), x0.split(splits, 1), strict=True))
        heard_muted = len(parts) - (T - muted)
        with gating.streaming(B):
            gating.set_exec_mask(torch.tensor([True] * (B - 1) + [False]))
            with moshi_patch.ttt_updates(model):
                outs += [call_gating(gating, *part) for part in parts[:heard_muted]]
            state = copy.deepcopy(vars(gating._streaming_state.fast))
            outs += [call_gating(gating, *part) for part in parts[heard_muted:]]
            outcomes.append((torch.cat(outs, 1), state))
    (stepped, expected), (jumped, actual) = outcomes
    assert relative(jumped, stepped) < 1e-12
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_a_gating_called_outside_of_its_transformer_says_what_it_lacks():
    model = ttt_model()
    gating = next(iter(moshi_patch.ttt_gatings(model).values()))
    assert isinstance(gating, TTTGating)
    with pytest.raises(ValueError, match="ttt_x0"):
        gating(torch.zeros(1, 2, model.dim, dtype=torch.float64))
