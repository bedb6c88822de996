"""A stream with updates switched off: nothing is written, what was learnt stays, and what is muted is not heard."""

import contextlib
import copy

import pytest
import torch

import moshi_patch
from moshi_patch.kinds.in_place.ops import naive, naive_target
from moshi_patch.kinds.memory import SEGMENT_STEPS
from tests.support.models import random_codes, relative, tiny_model
from tests.support.streams import SETTINGS, B, T, call_memory, one_pass, steps, ttt_model

pytestmark = pytest.mark.usefixtures("patched")
NAMES = ("plain", "K=5", "clip and decay", "gain", "residual", "residual, K=5, decay, gain")


@pytest.mark.parametrize("name", NAMES)
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
@pytest.mark.parametrize("name", NAMES)
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
                update=config.update,
                target_gain=config.target_gain,
                delta_clip=config.delta_clip,
                decay=config.decay,
                delta=before,
            )
    with gating.streaming(2):
        outs, first = [], 0
        for last in [*(muted[1:] != muted[:-1]).nonzero()[:, 0].add(1).tolist(), steps]:
            gating.set_updates(not muted[first])
            size = last - first if form == "segments" else 1
            outs += [call_memory(gating, x[:, t : t + size], x0[:, t : t + size]) for t in range(first, last, size)]
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


LAYERS = {"transformer.layers.1.gating": 1, "transformer.layers.3.gating": 3}


@pytest.mark.parametrize("form", ["one pass", "steps"])
@pytest.mark.parametrize(
    "muted", [[1], [3], ["transformer.layers.1.gating"], ["transformer.layers.3"], (1, 3)], ids=str
)
def test_single_layers_can_be_muted_by_index_or_name(muted, form):
    model = ttt_model()
    codes = random_codes(model, B, T)
    still = [name for name, index in LAYERS.items() if not {index, name, name.removesuffix(".gating")} & set(muted)]
    run = one_pass if form == "one pass" else steps
    with torch.no_grad():
        for name in LAYERS.keys() - set(still):
            generator = moshi_patch.ttt_gatings(model)[name].target_generator
            before = copy.deepcopy(generator.state_dict())
            generator.conv1d.conv.weight.zero_()  # nothing is learnt by that layer, and so nothing muted
            expected = one_pass(model, codes) if len(muted) == 1 else None
            generator.load_state_dict(before)
    with model.streaming(B) if form == "steps" else contextlib.nullcontext():
        with moshi_patch.ttt_updates(model, layers=muted):
            actual = run(model, codes)
        if form == "steps":
            updates = {name: stats["updates"] for name, stats in moshi_patch.ttt_stats(model).items()}
            assert updates == {name: [T // 5 if name in still else 0] * B for name in LAYERS}
    if expected is None:
        with moshi_patch.ttt_updates(model):
            expected = one_pass(model, codes)
    assert relative(actual, expected) < 1e-12
    assert relative(expected, one_pass(model, codes)) > 1e-3


def test_blocks_that_mute_single_layers_nest():
    model = ttt_model()
    codes = random_codes(model, B, T)
    with moshi_patch.ttt_updates(model, layers=[1]):
        expected = one_pass(model, codes)
    with moshi_patch.ttt_updates(model), moshi_patch.ttt_updates(model, enabled=True, layers=[3]):
        assert torch.equal(one_pass(model, codes), expected)
    assert all(gating.updates_enabled for gating in moshi_patch.ttt_gatings(model).values())


@pytest.mark.parametrize(
    "layers", [[0], [-1], [], [1, 99], ["transformer.layers.2"], [True], [1.0], 1, "1", [[1]]], ids=str
)
def test_layers_that_have_no_ttt_are_refused_and_nothing_is_muted(layers):
    model = ttt_model()
    with pytest.raises(ValueError, match=r"^layers=.*: must be a list of TTT layers of this model: \[1, 3\], or") as e:
        moshi_patch.ttt_updates(model, layers=layers).__enter__()
    assert repr(layers) in str(e.value)
    assert all(gating.updates_enabled for gating in moshi_patch.ttt_gatings(model).values())


def test_updates_switched_off_from_the_start_are_the_stock_model():
    model, stock = ttt_model(), tiny_model(positional_embedding="none")
    codes = random_codes(model, B, T)
    with moshi_patch.ttt_updates(model):
        assert torch.equal(one_pass(model, codes), one_pass(stock, codes))
        with model.streaming(B), stock.streaming(B):
            assert torch.equal(steps(model, codes), steps(stock, codes))


@pytest.mark.parametrize("name", ["plain", "residual"])
@torch.no_grad()
def test_a_muted_segment_of_a_fresh_stream_leaves_what_muted_steps_leave(name):
    model = ttt_model(**SETTINGS[name])
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
                outs += [call_memory(gating, *part) for part in parts[:heard_muted]]
            state = copy.deepcopy(vars(gating._streaming_state.fast))
            outs += [call_memory(gating, *part) for part in parts[heard_muted:]]
            outcomes.append((torch.cat(outs, 1), state))
    (stepped, expected), (jumped, actual) = outcomes
    assert relative(jumped, stepped) < 1e-12
    for field, value in expected.items():
        if field == "whitening":
            continue  # steps leave the rows of M that keys of zero have, which nothing is multiplied with
        assert torch.equal(actual[field], value), field
