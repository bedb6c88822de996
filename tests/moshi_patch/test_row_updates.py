"""One person of many learns nothing: the updates of single rows switched off, the other rows untouched bit for bit."""

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import moshi_patch
from tests.support.models import random_codes, relative
from tests.support.streams import SETTINGS, B, T, one_pass, steps, ttt_model

pytestmark = pytest.mark.usefixtures("patched")
NAMES = ("plain", "K=5", "clip and decay", "residual, K=5, decay, gain", "mlp", "mlp, C>T")
OTHERS = [0, 2]


def fast_weights(model):
    return [copy.deepcopy(vars(m._streaming_state.fast)) for m in moshi_patch.ttt_memories(model).values()]


def heard(model, codes, run, muted=(), everybody=False):
    """Outputs and fast weights after a stream whose middle third `muted` rows, or all of them, do not learn from."""
    first, last = codes.shape[2] // 3, 2 * codes.shape[2] // 3
    with model.streaming(B):
        outs = [run(model, codes[:, :, :first])]
        moshi_patch.ttt_row_updates(model, muted, False)
        with moshi_patch.ttt_updates(model, enabled=not everybody):
            outs.append(run(model, codes[:, :, first:last]))
        moshi_patch.ttt_row_updates(model, muted, True)
        outs.append(run(model, codes[:, :, last:]))
        return torch.cat(outs, 1), fast_weights(model)


@pytest.mark.parametrize("form", ["steps", "segments"])
@pytest.mark.parametrize("name", NAMES)
def test_a_muted_row_is_as_if_all_were_muted_and_the_others_are_the_same_bit_for_bit(name, form):
    model = ttt_model(**SETTINGS[name])
    codes = random_codes(model, B, T if form == "steps" else 3 * T)
    run = steps if form == "steps" else one_pass
    on, kept_on = heard(model, codes, run)
    off, kept_off = heard(model, codes, run, everybody=True)
    mixed, kept = heard(model, codes, run, muted=[1])
    assert torch.equal(mixed[OTHERS], on[OTHERS])
    assert relative(mixed[1], off[1]) < 1e-12
    assert relative(on[1], off[1]) > 1e-4
    for layer, layer_on, layer_off in zip(kept, kept_on, kept_off, strict=True):
        for field in layer:
            assert torch.equal(layer[field][OTHERS], layer_on[field][OTHERS]), field
            if field != "whitening":  # the rows of M that keys of zero have, which nothing is multiplied with
                assert relative(layer[field][1].double(), layer_off[field][1].double()) < 1e-12, field


def test_a_row_that_is_muted_from_its_beginning_is_the_base_and_its_positions_go_on():
    model = ttt_model()
    codes = random_codes(model, B, T)
    with model.streaming(B):
        moshi_patch.ttt_row_updates(model, [1], False)
        actual = steps(model, codes)
        updates = [stats["updates"] for stats in moshi_patch.ttt_stats(model).values()]
        assert updates == [[T // 5, 0, T // 5]] * 2
        for memory in moshi_patch.ttt_memories(model).values():
            assert memory._streaming_state.fast.position.tolist() == [T] * B
    with moshi_patch.ttt_updates(model), model.streaming(B):
        assert torch.equal(actual[1], steps(model, codes)[1])


def test_a_reset_row_learns_again_and_only_that_one():
    model = ttt_model()
    with model.streaming(B):
        moshi_patch.ttt_row_updates(model, [0, 1], False)
        model.reset_streaming(torch.tensor([False, True, False]))
        steps(model, random_codes(model, B, T))
        for stats in moshi_patch.ttt_stats(model).values():
            assert stats["updates"] == [0, T // 5, T // 5]
        model.reset_streaming()
        for memory in moshi_patch.ttt_memories(model).values():
            state = memory._streaming_state
            assert state.learning.all()
            assert not state.muted_rows


def test_where_updates_are_off_no_row_learns():
    model = ttt_model()
    with model.streaming(B), moshi_patch.ttt_updates(model):
        moshi_patch.ttt_row_updates(model, [0, 1], True)
        steps(model, random_codes(model, B, T))
        for stats in moshi_patch.ttt_stats(model).values():
            assert stats["updates"] == [0] * B


def test_rows_can_be_muted_after_streaming_began_in_inference_mode():
    model = ttt_model()
    with torch.inference_mode():
        context = model.streaming(B)
    with context:
        moshi_patch.ttt_row_updates(model, [2], False)
        assert all(m._streaming_state.learning.tolist() == [1, 1, 0] for m in moshi_patch.ttt_memories(model).values())


@pytest.mark.slow
@torch.no_grad()
def test_a_replayed_step_mutes_rows_too():
    model = ttt_model()
    codes = random_codes(model, B, T)
    expected, _ = heard(model, codes, steps, muted=[1])
    with model.streaming(B):
        graph = make_fx(lambda step: model.forward_text(step)[0])(codes[:, :, :1])
        model.reset_streaming()
        outs = []
        for t in range(T):
            moshi_patch.ttt_row_updates(model, [1], not T // 3 <= t < 2 * T // 3)
            outs.append(graph(codes[:, :, t : t + 1]))
    assert relative(torch.cat(outs, 1), expected) < 1e-12


@pytest.mark.parametrize("rows", [[3], [-1], [True], [0.0], 1, "1", None], ids=str)
def test_rows_that_are_not_there_are_refused_and_none_is_muted(rows):
    model = ttt_model()
    with model.streaming(B):
        with pytest.raises(ValueError, match=r"^rows=.*: must be a list of rows of the stream, from 0 to 2\.$"):
            moshi_patch.ttt_row_updates(model, rows, False)
        with pytest.raises(ValueError, match=r"^enabled=0: must be True or False\.$"):
            moshi_patch.ttt_row_updates(model, [0], 0)
        assert all(m._streaming_state.learning.all() for m in moshi_patch.ttt_memories(model).values())


def test_rows_of_a_model_that_does_not_stream_are_refused():
    with pytest.raises(ValueError, match="is not streaming"):
        moshi_patch.ttt_row_updates(ttt_model(), [0], False)
