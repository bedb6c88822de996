"""The layer of TTT-MLP: its weights, its function, what it leaves alone, and the base that it begins as."""

import pytest
import torch
from moshi.models import LMModel
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn

import moshi_patch
from moshi_patch import TTTMLP, TTTConfig
from moshi_patch.kinds.mlp.ops import naive
from tests.moshi_patch.kinds.mlp.support import specified_answer, specified_inputs
from tests.support.models import TTT_MLP, random_codes, randomise_targets, relative, tiny_model
from tests.support.streams import B, T, call_memory, one_pass, steps, ttt_model

pytestmark = pytest.mark.usefixtures("patched")
MLP = {"ttt_kind": "mlp"}
D, H, WIDTH = 16, 2, 8
SHAPES = {
    "W1": [H, WIDTH, 4 * WIDTH],
    "b1": [H, 1, 4 * WIDTH],
    "W2": [H, 4 * WIDTH, WIDTH],
    "b2": [H, 1, WIDTH],
    "ttt_norm_weight": [H, WIDTH],
    "ttt_norm_bias": [H, WIDTH],
    "learnable_ttt_lr_weight": [H, 1, D],
    "learnable_ttt_lr_bias": [H, 1],
    "gating_alpha": [D],
    **{
        f"{name}.{key}": [D, D] if key == "weight" else [D]
        for name in ("wq", "wk", "wv", "wo")
        for key in ("weight", "bias")
    },
    "post_norm.weight": [D],
    "post_norm.bias": [D],
}
RANDOM = {"W1", "W2", "learnable_ttt_lr_weight", "wq.weight", "wk.weight", "wv.weight", "wo.weight"}
ONES = {"ttt_norm_weight", "post_norm.weight"}


def memories(model):
    return list(moshi_patch.ttt_memories(model).values())


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_has_19_tensors_of_these_names_shapes_and_initial_values(dtype, alpha):
    model = tiny_model(dtype, **TTT_MLP, ttt_initial_gating_alpha=alpha)
    parameters = moshi_patch.ttt_parameters(model)
    assert len(SHAPES) == 19
    assert sorted(parameters) == sorted(f"transformer.layers.{i}.ttt.{name}" for i in (1, 3) for name in SHAPES)
    assert set(TTTMLP.weight_keys) == set(SHAPES)
    for name, parameter in parameters.items():
        key = name.split(".ttt.")[1]
        assert list(parameter.shape) == SHAPES[key], name
        assert parameter.dtype == dtype
        if key in RANDOM:
            assert 0.01 < parameter.float().std() < 0.03, name
            assert parameter.float().mean().abs() < 0.02, name
        else:
            value = 1.0 if key in ONES else alpha if key == "gating_alpha" else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, value)), name


def test_a_layer_of_moshi_7b_has_71_491_616_values():
    layer = TTTMLP(4096, 32, TTTConfig(enabled=True, kind="mlp"), device="meta")
    assert sum(parameter.numel() for parameter in layer.parameters()) == 71_491_616
    assert len(list(layer.parameters())) == 19


def test_a_row_of_moshi_7b_keeps_21_mib_a_layer():
    layer = TTTMLP(4096, 32, TTTConfig(enabled=True, kind="mlp"), device="meta")
    tensors = vars(layer._fresh(1, torch.device("meta"))).values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_floating_point())
    assert size == 4 * (4096 * (8 * 128 + 5) + 2 * 16 * 32 * (10 * 128 + 2))  # docs/streaming.md
    assert round(size / 2**20, 1) == 21.1


def test_half_of_the_layers_have_one_unless_others_are_named():
    model = tiny_model(ttt_enabled=True, ttt_kind="mlp")
    assert list(moshi_patch.ttt_memories(model)) == ["transformer.layers.1.ttt", "transformer.layers.2.ttt"]
    assert TTTConfig(kind="mlp").layer_indices(32) == list(range(8, 24))
    assert TTTConfig(kind="mlp", layers="all").layer_indices(3) == [0, 1, 2]


@pytest.mark.parametrize("base_lr", [20.0, 0.1])
@torch.no_grad()
def test_the_layer_is_its_specification(base_lr):
    model = ttt_model(ttt_base_lr=base_lr, **MLP)
    x = torch.randn(B, T, D, dtype=torch.float64)
    for memory in memories(model):
        q, k, v, eta = specified_inputs(memory, x)
        y, delta = naive(memory._weights(), q, k, v, eta, 5)
        assert relative(memory(x), x + specified_answer(memory, y)) < 1e-12
        assert delta.norm().min() > 0


@torch.no_grad()
def test_it_reads_the_residual_stream_after_the_attention_and_the_mlp_reads_it():
    model, seen = ttt_model(**MLP), {}
    layer = model.transformer.layers[1]
    layer.self_attn.register_forward_hook(lambda _, args, out: seen.update(attended=out))
    layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    layer.ttt.register_forward_hook(lambda _, args, out: seen.update(read=args[0], answered=out))
    layer.norm2.register_forward_pre_hook(lambda _, args: seen.update(normed=args[0]))
    layer.register_forward_hook(lambda _, args, out: seen.update(out=out))
    one_pass(model, random_codes(model, 2, 12))
    assert torch.equal(seen["read"], seen["x"] + seen["attended"])
    assert torch.equal(seen["normed"], seen["answered"])
    assert relative(seen["out"], seen["answered"] + layer.gating(layer.norm2(seen["answered"]))) < 1e-15


def test_the_layer_stays_moshis_own_and_lora_int8_and_moshis_initialisation_find_nothing_in_it():
    model = tiny_model(**TTT_MLP)
    for index, layer in enumerate(model.transformer.layers):
        assert type(layer) is StreamingTransformerLayer
        assert hasattr(layer, "ttt") == (index in (1, 3))
    for memory in memories(model):
        kinds = {type(module) for module in memory.modules()}
        assert not [kind for kind in kinds if issubclass(kind, (nn.Linear, nn.Embedding, nn.LayerNorm))]


def test_no_gated_mlp_is_needed():
    model = randomise_targets(tiny_model(**TTT_MLP, gating="none", positional_embedding="none"))
    codes = random_codes(model, B, T)
    expected = one_pass(model, codes)
    with model.streaming(B):
        assert relative(steps(model, codes), expected) < 1e-12


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_with_a_closed_gate_the_gate_alone_has_a_gradient_in_the_first_step(alpha):
    model = tiny_model(**TTT_MLP, ttt_initial_gating_alpha=alpha).train()
    codes = random_codes(model, 2, 24)
    parameters = moshi_patch.ttt_parameters(model)
    moved = []
    for _ in range(2):
        model.zero_grad()
        model.forward_text(codes)[1].square().mean().backward()
        moved.append({name for name, p in parameters.items() if p.grad is not None and p.grad.any()})
        with torch.no_grad():
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    gates = {name for name in parameters if name.endswith("gating_alpha")}
    assert moved[0] == (gates if alpha == 0 else parameters.keys())
    assert moved[1] == parameters.keys()


@pytest.mark.parametrize("form", ["one pass", "steps"])
def test_updates_off_is_not_the_base_and_a_closed_gate_is(form):
    model, stock = ttt_model(**MLP), tiny_model(positional_embedding="none")
    codes = random_codes(model, B, T)

    def run(model):
        if form == "one pass":
            return one_pass(model, codes)
        with model.streaming(B):
            return steps(model, codes)

    base, on = run(stock), run(model)
    with moshi_patch.ttt_updates(model):
        off = run(model)
    assert relative(on, off) > 1e-3
    assert relative(off, base) > 1e-3
    with moshi_patch.ttt_bypassed(model):
        assert torch.equal(run(model), base)
        with moshi_patch.ttt_updates(model):
            assert torch.equal(run(model), base)
    assert torch.equal(run(model), on)


def test_each_step_reads_its_own_update_so_that_short_sequences_learn_too():
    model = ttt_model(ttt_mini_batch_size=64, **MLP)
    codes = random_codes(model, 2, 3)
    with moshi_patch.ttt_updates(model):
        off = one_pass(model, codes)
    on = one_pass(model, codes)
    assert all(relative(on[:, t], off[:, t]) > 1e-6 for t in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_what_is_learnt_is_float32_whatever_the_weights_are(dtype):
    model = ttt_model(dtype, **MLP)
    memory = memories(model)[0]
    x = torch.randn(B, T, D).to(dtype)
    with memory.streaming(B):
        model.to(dtype)
        call_memory(memory, x[:, :7], None)
        state = memory._streaming_state.fast
        assert {value.dtype for value in vars(state).values() if value.is_floating_point()} == {torch.float32}
    exact = memory.double()
    expected = exact(x.double())
    # 2e-2 is what bfloat16 makes of the projections; nothing grows over the mini-batches.
    assert relative(ttt_model(dtype, **MLP).transformer.layers[1].ttt(x), expected) < 2e-2


def test_smaller_updates_than_bfloat16_can_add_are_not_lost():
    model = ttt_model(torch.bfloat16, ttt_base_lr=1e-4, **MLP)
    codes = random_codes(model, 1, 60)
    with model.streaming(1):
        steps(model, codes)
        for stats in moshi_patch.ttt_stats(model).values():
            assert 0 < stats["relative_delta"][0] < 1e-3
            assert stats["updates"] == [12]


def test_groups_that_are_computed_again_change_no_output_and_no_gradient():
    results = []
    for group in (0, 1, 2, 100):
        model = ttt_model(ttt_scan_checkpoint_group_size=group, **MLP).train()
        out = model.forward_text(random_codes(model, 2, 33))[0]
        out.square().mean().backward()
        results.append((out, {name: parameter.grad for name, parameter in moshi_patch.ttt_parameters(model).items()}))
    for out, gradients in results[1:]:
        assert torch.equal(out, results[0][0])
        for name, gradient in gradients.items():
            assert relative(gradient, results[0][1][name]) < 1e-12, name


def test_a_stream_that_is_muted_by_layer_is_muted_in_that_layer_alone():
    model = ttt_model(**MLP)
    codes = random_codes(model, B, T)
    with model.streaming(B), moshi_patch.ttt_updates(model, layers=[3]):
        steps(model, codes)
        updates = {name: stats["updates"] for name, stats in moshi_patch.ttt_stats(model).items()}
    assert updates == {"transformer.layers.1.ttt": [T // 5] * B, "transformer.layers.3.ttt": [0] * B}


def test_what_one_pass_teaches_can_be_watched():
    model, seen = ttt_model(**MLP), []
    memory = memories(model)[0]
    (handle,) = memory.watch_one_pass(lambda norm: seen.append(norm.item()))
    codes = random_codes(model, B, T)
    one_pass(model, codes)
    handle.remove()
    one_pass(model, codes)
    with model.streaming(B):
        steps(model, codes)
        assert seen == [pytest.approx(memory.delta_norm()[0].item(), rel=1e-12)]


def test_an_lm_model_says_what_kind_it_has():
    model = tiny_model(**TTT_MLP)
    assert isinstance(model, LMModel)
    assert model.ttt_config.kind == "mlp"
    assert moshi_patch.ttt_gatings(model) == {}
    assert TTTConfig.from_kwargs(model.ttt_config.to_kwargs()) == model.ttt_config
