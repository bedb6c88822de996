"""On a GPU: `LMGen` replays CUDA graphs, and the fast weights still learn in every chunk."""

import pytest
import torch
from moshi.models.lm import LMGen
from moshi.utils.compile import no_cuda_graph

import moshi_patch
from tests.support.models import BY_KIND, random_codes, randomise_targets, relative, tiny_model, ttt_settings

pytestmark = pytest.mark.usefixtures("patched")
STEPS = 83
KINDS = {"hebbian": {}, "residual": {"ttt_update": "residual"}, "mlp": {"ttt_kind": "mlp"}}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
CUDA = {"device": "cuda", "positional_embedding": "none", "norm": "rms_norm_f32"}


def ttt_model(dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    model = tiny_model(dtype, **{**CUDA, **ttt_settings(**overrides)})
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


@every_kind
def test_updates_happen_in_every_chunk_of_a_replayed_graph(options):
    _, stats, graphed = generate(ttt_model(**options))
    assert graphed, "LMGen did not capture a graph: this test would show nothing"
    for layer in stats.values():
        assert layer["updates"] == [STEPS // 5, (STEPS - 41) // 5]
        assert min(layer["delta_norm"]) > 0


@every_kind
def test_graph_on_equals_graph_off(options):
    on, stats_on, graphed = generate(ttt_model(**options))
    with no_cuda_graph():
        off, stats_off, ungraphed = generate(ttt_model(**options))
    assert graphed
    assert not ungraphed
    assert relative(on, off) < 1e-5
    for name, layer in stats_on.items():
        assert layer["updates"] == stats_off[name]["updates"]
        assert layer["delta_norm"] == pytest.approx(stats_off[name]["delta_norm"], rel=1e-4)


@every_kind
def test_the_control_switch_holds_inside_a_replayed_graph(options):
    model = ttt_model(**options)
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


@every_kind
def test_a_row_is_muted_and_all_are_bypassed_inside_a_replayed_graph(options):
    model, logits = ttt_model(**options), []
    stock = tiny_model(torch.float32, **CUDA)
    stock.load_state_dict(model.state_dict(), strict=False)
    codes = random_codes(model, 2, STEPS).cuda()
    lm_gen = LMGen(model, use_sampling=False, on_text_logits_hook=lambda x: logits.append(x[:, 0, 0].clone()))
    with lm_gen.streaming(2):
        for t in range(20):
            lm_gen.step(codes[:, 3:, t : t + 1])
        moshi_patch.ttt_row_updates(model, [1], False)
        for t in range(20, 60):
            lm_gen.step(codes[:, 3:, t : t + 1])
        assert lm_gen._streaming_state.graphed_main._graph is not None
        for layer in moshi_patch.ttt_stats(model).values():
            assert layer["updates"] == [12, 4]
        lm_gen.reset_streaming()
        logits.clear()
        with moshi_patch.ttt_bypassed(model):
            for t in range(20):
                lm_gen.step(codes[:, 3:, t : t + 1])
    expected = []
    plain = LMGen(stock, use_sampling=False, on_text_logits_hook=lambda x: expected.append(x[:, 0, 0].clone()))
    with plain.streaming(2):
        for t in range(20):
            plain.step(codes[:, 3:, t : t + 1])
    assert torch.equal(torch.stack(logits), torch.stack(expected))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)]
)
@every_kind
def test_streaming_equals_one_pass(dtype, tolerance, options):
    model = ttt_model(dtype, **options, norm="rms_norm" if dtype == torch.float64 else "rms_norm_f32")
    codes = random_codes(model, 2, STEPS).cuda()
    with torch.no_grad():
        expected = model.forward_text(codes)[0]
        with model.streaming(2):
            steps = [model.forward_text(codes[:, :, t : t + 1])[0] for t in range(STEPS)]
    assert relative(torch.cat(steps, 1), expected) < tolerance


@every_kind
def test_gradients_equal_those_on_the_cpu(options):
    model = ttt_model(torch.float64, norm="rms_norm", **options).train()
    settings = {**CUDA, "device": "cpu", "norm": "rms_norm", **ttt_settings(**options)}
    twin = tiny_model(torch.float64, **settings).train()
    twin.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    codes = random_codes(model, 2, 33)
    model.forward_text(codes.cuda())[1].log_softmax(-1)[..., 0].mean().backward()
    twin.forward_text(codes)[1].log_softmax(-1)[..., 0].mean().backward()
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            assert relative(model.get_parameter(name).grad.cpu(), parameter.grad) < 1e-10, name


@pytest.mark.parametrize("ttt", BY_KIND.values(), ids=BY_KIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fresh_weights_are_bitwise_stock_moshi(dtype, ttt):
    """With `torch.compile` away (NO_TORCH_COMPILE=1, see conftest)."""
    stock, model = tiny_model(dtype, **CUDA), tiny_model(dtype, **{**ttt, **CUDA})
    model.load_state_dict(stock.state_dict())
    codes = random_codes(stock, 2, STEPS).cuda()
    with torch.no_grad():
        assert torch.equal(stock.forward_text(codes)[1], model.forward_text(codes)[1])


@every_kind
def test_no_step_waits_for_the_device(options):
    settings = {"positional_embedding": "none", **ttt_settings(**options)}
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
    assert all(memory.update_steps < 12 for memory in moshi_patch.ttt_memories(model).values())
