"""On a GPU: `LMGen` replays CUDA graphs, and the fast weights still learn in every chunk."""

import pytest
import torch
from moshi.models.lm import LMGen
from moshi.utils.compile import no_cuda_graph

import moshi_patch
from tests.support.models import TTT, random_codes, randomise_targets, relative, tiny_model

pytestmark = pytest.mark.usefixtures("patched")
STEPS = 83
updates = pytest.mark.parametrize("update", ["hebbian", "residual"])
CUDA = {"device": "cuda", "positional_embedding": "none", "norm": "rms_norm_f32"}


def ttt_model(dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    model = tiny_model(dtype, **{**TTT, **CUDA, **overrides})
    with torch.no_grad():
        generator = torch.Generator("cuda").manual_seed(1)
        for parameter in moshi_patch.ttt_parameters(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, device="cuda"))
    return model


def generate(model, rows=2):
    """Text logits `[T, B, card]` of `LMGen`, which is fed a fixed stream, and the stats at its end."""
    logits = []
    lm_gen = LMGen(model, use_sampling=False, on_text_logits_hook=lambda x: logits.append(x[:, 0, 0].clone()))
    codes = random_codes(model, rows, STEPS).cuda()
    with lm_gen.streaming(rows):
        for t in range(STEPS):
            lm_gen.step(codes[:, 3:, t : t + 1])
            if t == 40:
                lm_gen.reset_streaming(torch.tensor([False, True], device="cuda")[:rows])
        graphed = lm_gen._streaming_state.graphed_main._graph is not None
        return torch.stack(logits), moshi_patch.ttt_stats(model), graphed


@updates
def test_updates_happen_in_every_chunk_of_a_replayed_graph(update):
    _, stats, graphed = generate(ttt_model(ttt_update=update))
    assert graphed, "LMGen did not capture a graph: this test would show nothing"
    for layer in stats.values():
        assert layer["updates"] == [STEPS // 5, (STEPS - 41) // 5]
        assert min(layer["delta_norm"]) > 0


@updates
def test_graph_on_equals_graph_off(update):
    on, stats_on, graphed = generate(ttt_model(ttt_update=update))
    with no_cuda_graph():
        off, stats_off, ungraphed = generate(ttt_model(ttt_update=update))
    assert graphed
    assert not ungraphed
    assert relative(on, off) < 1e-5
    for name, layer in stats_on.items():
        assert layer["updates"] == stats_off[name]["updates"]
        assert layer["delta_norm"] == pytest.approx(stats_off[name]["delta_norm"], rel=1e-4)


def test_the_control_switch_holds_inside_a_replayed_graph():
    model = ttt_model()
    codes = random_codes(model, 1, STEPS).cuda()
    lm_gen = LMGen(model, use_sampling=False)
    with lm_gen.streaming(1):
        for t in range(20):
            lm_gen.step(codes[:, 3:, t : t + 1])
        with moshi_patch.ttt_updates(model):
            for t in range(20, 60):
                lm_gen.step(codes[:, 3:, t : t + 1])
        for layer in moshi_patch.ttt_stats(model).values():
            assert layer["updates"] == [4]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)]
)
@updates
def test_streaming_equals_one_pass(dtype, tolerance, update):
    model = ttt_model(dtype, ttt_update=update, norm="rms_norm" if dtype == torch.float64 else "rms_norm_f32")
    codes = random_codes(model, 2, STEPS).cuda()
    with torch.no_grad():
        expected = model.forward_text(codes)[0]
        with model.streaming(2):
            steps = [model.forward_text(codes[:, :, t : t + 1])[0] for t in range(STEPS)]
    assert relative(torch.cat(steps, 1), expected) < tolerance


@updates
def test_gradients_equal_those_on_the_cpu(update):
    model = ttt_model(torch.float64, norm="rms_norm", ttt_update=update).train()
    settings = {**TTT, **CUDA, "device": "cpu", "norm": "rms_norm", "ttt_update": update}
    twin = tiny_model(torch.float64, **settings).train()
    twin.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    codes = random_codes(model, 2, 33)
    model.forward_text(codes.cuda())[1].log_softmax(-1)[..., 0].mean().backward()
    twin.forward_text(codes)[1].log_softmax(-1)[..., 0].mean().backward()
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            assert relative(model.get_parameter(name).grad.cpu(), parameter.grad) < 1e-10, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fresh_weights_are_bitwise_stock_moshi(dtype):
    """With `torch.compile` away (NO_TORCH_COMPILE=1, see conftest)."""
    stock, model = tiny_model(dtype, **CUDA), tiny_model(dtype, **{**TTT, **CUDA})
    model.load_state_dict(stock.state_dict())
    codes = random_codes(stock, 2, STEPS).cuda()
    with torch.no_grad():
        assert torch.equal(stock.forward_text(codes)[1], model.forward_text(codes)[1])


@updates
def test_no_step_waits_for_the_device(update):
    settings = {**TTT, "positional_embedding": "none", "ttt_update": update}
    model = randomise_targets(tiny_model(torch.float32, **settings)).cuda()
    codes = random_codes(model, 2, 12).cuda()
    with torch.no_grad(), model.streaming(2):
        model.forward_text(codes[:, :, :1])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in range(1, 12):
                model.forward_text(codes[:, :, t : t + 1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert model.ttt_config.chunk_size < 12
