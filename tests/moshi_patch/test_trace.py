"""No host work per step: one traced streaming step, replayed without Python, is the whole stream."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moshi_patch
from tests.support.models import random_codes, randomise_targets, relative, tiny_model, ttt_settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]
B, T = 3, 34


def ttt_model(**overrides):
    return randomise_targets(tiny_model(**{"positional_embedding": "none", **ttt_settings(**overrides)}))


def trace(model, codes):
    """A graph of tensor operations for one step of `model`, bound to its streaming state of now."""
    return make_fx(lambda step: model.forward_text(step)[0])(codes[:, :, :1])


@torch.no_grad()
def one_pass(model, codes):
    return model.forward_text(codes)[0]


SETTINGS = {
    "plain": {},
    "clip, decay, K=5": {"ttt_delta_clip": 0.5, "ttt_decay": 0.8, "ttt_conv_kernel_size": 5},
    "residual, decay, gain, K=5": {
        "ttt_update": "residual",
        "ttt_decay": 0.8,
        "ttt_target_gain": 3.0,
        "ttt_conv_kernel_size": 5,
    },
    "full conv, hidden_states": {"ttt_conv_depthwise": False, "ttt_target": "hidden_states"},
    "mlp": {"ttt_kind": "mlp"},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("traced_at", [0, 7])
def test_a_replayed_step_is_the_stream_wherever_it_was_traced(name, traced_at):
    model = ttt_model(**SETTINGS[name])
    codes = random_codes(model, B, T)
    expected = one_pass(model, codes)
    with torch.no_grad(), model.streaming(B):
        for t in range(traced_at):
            model.forward_text(codes[:, :, t : t + 1])
        graph = trace(model, codes)
        model.reset_streaming()
        actual = torch.cat([graph(codes[:, :, t : t + 1]) for t in range(T)], 1)
        assert relative(actual, expected) < 1e-12
        for stats in moshi_patch.ttt_stats(model).values():
            assert stats["updates"] == [T // 5] * B


@pytest.mark.parametrize("name", ["plain", "residual, decay, gain, K=5", "mlp"])
def test_a_replayed_step_follows_exec_masks_and_resets(name):
    model = ttt_model(**SETTINGS[name])
    codes = random_codes(model, B, T)
    generator = torch.Generator().manual_seed(4)
    outputs, fed = {}, [[] for _ in range(B)]
    with torch.no_grad(), model.streaming(B):
        graph = trace(model, codes)
        model.reset_streaming()
        for t in range(T):
            if t == 13:
                model.reset_streaming(torch.tensor([False, True, False]))
                fed[1] = []
            execute = torch.rand(B, generator=generator) < 0.8
            model.set_exec_mask(execute)
            out = graph(codes[:, :, t : t + 1])
            for row in execute.nonzero()[:, 0].tolist():
                fed[row].append(t)
                outputs[row, t] = out[row, 0]
    for row in range(B):
        alone = one_pass(model, codes[row : row + 1, :, fed[row]])[0]
        assert relative(torch.stack([outputs[row, t] for t in fed[row]]), alone) < 1e-12
        assert len(fed[row]) > 10


@pytest.mark.parametrize("name", ["plain", "residual, decay, gain, K=5", "mlp"])
def test_the_control_switch_reaches_a_replayed_step(name):
    model = ttt_model(**SETTINGS[name])
    codes = random_codes(model, B, T)
    with moshi_patch.ttt_updates(model):
        control = one_pass(model, codes)
    with torch.no_grad(), model.streaming(B):
        graph = trace(model, codes)
        model.reset_streaming()
        with moshi_patch.ttt_updates(model):
            actual = torch.cat([graph(codes[:, :, t : t + 1]) for t in range(T)], 1)
        for stats in moshi_patch.ttt_stats(model).values():
            assert stats["updates"] == [0] * B
            assert stats["delta_norm"] == [0.0] * B
    assert relative(actual, control) < 1e-12


@pytest.mark.parametrize("kind", ["in_place", "mlp"])
def test_bypassing_reaches_a_replayed_step_and_what_is_heard_is_learnt_all_the_same(kind):
    model, stock = ttt_model(ttt_kind=kind), tiny_model(positional_embedding="none")
    codes = random_codes(model, B, T)
    expected = one_pass(model, codes)
    with torch.no_grad(), model.streaming(B), stock.streaming(B):
        graph = trace(model, codes)
        model.reset_streaming()
        with moshi_patch.ttt_bypassed(model):
            for t in range(15):
                assert torch.equal(graph(codes[:, :, t : t + 1]), stock.forward_text(codes[:, :, t : t + 1])[0])
        for stats in moshi_patch.ttt_stats(model).values():
            assert stats["updates"] == [3] * B
        model.reset_streaming()
        actual = torch.cat([graph(codes[:, :, t : t + 1]) for t in range(T)], 1)
    assert relative(actual, expected) < 1e-12


class Operations(TorchDispatchMode):
    """Writes down which operations run, on which shapes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        shapes = [tuple(part.shape) for part in tree_leaves((args, out)) if isinstance(part, torch.Tensor)]
        self.seen.append((str(function), shapes))
        return out


@pytest.mark.parametrize("name", [*SETTINGS, "mlp, C=1"])
@torch.no_grad()
def test_every_step_does_the_same_work_wherever_in_a_chunk_each_row_is(name):
    model = ttt_model(**SETTINGS.get(name, {"ttt_kind": "mlp", "ttt_mini_batch_size": 1}))
    codes, work = random_codes(model, B, T), []
    with model.streaming(B):
        for t in range(T):
            model.set_exec_mask(torch.tensor([t != 3, True, t % 4 > 0]))
            if t == 17:
                model.reset_streaming(torch.tensor([False, False, True]))
            with Operations() as operations:
                model.forward_text(codes[:, :, t : t + 1])
            work.append(operations.seen)
    assert len(work[0]) > 100
    assert all(step == work[1] for step in work[1:])


@pytest.mark.parametrize("options", [{"ttt_delta_clip": 0.5}, {"ttt_update": "residual"}, {"ttt_kind": "mlp"}], ids=str)
def test_the_state_lives_in_the_same_memory_from_first_to_last_step(options):
    model = ttt_model(**options)
    codes = random_codes(model, B, T)
    with torch.no_grad(), model.streaming(B):
        states = [memory._streaming_state.fast for memory in moshi_patch.ttt_memories(model).values()]
        before = [{name: (t.data_ptr(), t.shape) for name, t in vars(state).items()} for state in states]
        for t in range(T):
            model.forward_text(codes[:, :, t : t + 1])
        model.reset_streaming()
        assert before == [{name: (t.data_ptr(), t.shape) for name, t in vars(s).items()} for s in states]


@pytest.mark.parametrize("steps", [1, 20], ids="T={}".format)
@pytest.mark.parametrize("kind", ["in_place", "mlp"])
def test_streaming_with_gradients_on_keeps_no_graph_in_the_state(kind, steps):
    model = ttt_model(ttt_kind=kind)
    with model.streaming(B):
        out = model.forward_text(random_codes(model, B, steps))[0]
        assert out.requires_grad
        for memory in moshi_patch.ttt_memories(model).values():
            assert not any(tensor.requires_grad for tensor in vars(memory._streaming_state.fast).values())
            memory._streaming_state.reset(torch.ones(B, dtype=torch.bool))
