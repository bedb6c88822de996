"""Loading models with `ttt_kind="mlp"` through moshi's own loaders: stock, trained, int8, adapters; and refusals."""

import pytest
import torch
from moshi.modules.transformer import StreamingTransformerLayer
from moshi.utils.quantize import QLinear
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import moshi_patch
from tests.support.loading import (
    LORA,
    STEPS,
    adapters,
    assert_active,
    assert_loaded,
    load,
    logits,
    save,
    streamed,
    trained_model,
    with_lora,
)
from tests.support.models import TINY, TTT, TTT_MLP, random_codes, randomise_targets, relative, tiny_model

pytestmark = pytest.mark.usefixtures("patched")
MLP = {"ttt_kind": "mlp"}
RANDOM = ("W1", "W2", "lr_weight", "wq.weight", "wk.weight", "wv.weight", "wo.weight")
KEYS = sorted(f"transformer.layers.{i}.ttt.{key}" for i in (1, 3) for key in moshi_patch.TTTMLP.weight_keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_stock_file_loads_from_the_meta_device_and_answers_bitwise_as_the_stock_model(tmp_path, dtype):
    path = save(tiny_model(dtype).state_dict(), tmp_path / "stock.safetensors")
    stock, ttt = load(path, dtype), load(path, dtype, **TTT_MLP)
    assert_loaded(ttt, dtype)
    assert sorted(moshi_patch.ttt_parameters(ttt)) == KEYS
    for name, weight in moshi_patch.ttt_parameters(ttt).items():
        assert (0.01 < weight.float().std() < 0.03) == name.endswith(RANDOM), name
    assert torch.equal(logits(ttt), logits(stock))
    assert torch.equal(streamed(ttt), streamed(stock))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_trained_file_loads_strictly_and_equals_the_model_it_was_saved_from(tmp_path, dtype):
    saved = trained_model(dtype, **MLP)
    loaded = load(save(saved.state_dict(), tmp_path / "ttt.safetensors"), dtype, **TTT_MLP)
    assert_loaded(loaded, dtype)
    assert torch.equal(logits(loaded), logits(saved))
    assert torch.equal(streamed(loaded), streamed(saved))
    assert_active(loaded)


def test_a_stock_file_loads_over_a_live_model_and_keeps_its_trained_weights():
    live = trained_model(torch.float32, **MLP)
    before = {name: weight.clone() for name, weight in moshi_patch.ttt_parameters(live).items()}
    live.load_state_dict(tiny_model(torch.float32, seed=5).state_dict())
    assert torch.equal(live.text_linear.weight, tiny_model(torch.float32, seed=5).text_linear.weight)
    for name, weight in moshi_patch.ttt_parameters(live).items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("kind", ["ttt", "stock", "some-keys-missing"])
def test_wrapped_layers_load_as_bare_ones_do(kind):
    state = (tiny_model(torch.float32) if kind == "stock" else trained_model(torch.float32, **MLP)).state_dict()
    live = tiny_model(torch.float32, seed=5, **TTT_MLP)
    apply_activation_checkpointing(live, check_fn=lambda module: isinstance(module, StreamingTransformerLayer))
    if kind == "some-keys-missing":
        del state[KEYS[0]]
        with pytest.raises(ValueError, match=f"has 37 of the 38 TTT weights .* Missing: {KEYS[0]}"):
            live.load_state_dict(state)
        return
    kept = live.state_dict()
    live.load_state_dict(state)
    assert all(torch.equal(value, state.get(name, kept[name])) for name, value in live.state_dict().items())


@pytest.mark.parametrize("fuse", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize(
    ("with_ttt", "base_is_stock"),
    [(True, True), (True, False), (False, False)],
    ids=["lora+ttt over stock", "lora+ttt over ttt", "lora over ttt"],
)
def test_adapters_load_in_a_second_pass_and_equal_the_trained_model(tmp_path, fuse, with_ttt, base_is_stock):
    lm_kwargs = {**TINY, "positional_embedding": "none"}
    base = randomise_targets(tiny_model(**lm_kwargs, **TTT_MLP))
    trained = randomise_targets(with_lora(base), seed=7) if with_ttt else with_lora(base)
    state = tiny_model(**lm_kwargs).state_dict() if base_is_stock else base.state_dict()
    files = {
        "path": save(state, tmp_path / "base.safetensors"),
        "base": lm_kwargs,
        "lora_weights": save(adapters(trained, ttt=with_ttt), tmp_path / "lora.safetensors"),
    }
    loaded = load(**files, dtype=torch.float64, fuse_lora=fuse, **TTT_MLP, **LORA)
    assert_loaded(loaded, torch.float64)
    assert [name for name, _ in loaded.named_parameters() if "lora_" in name and ".ttt." in name] == []
    for name, weight in moshi_patch.ttt_parameters(loaded).items():
        assert torch.equal(weight, moshi_patch.ttt_parameters(trained)[name]), name
    assert relative(logits(loaded), logits(trained)) < 1e-12
    assert relative(streamed(loaded), streamed(trained)) < 1e-12
    assert_active(loaded)


def test_an_int8_stock_file_loads_and_answers_bitwise_as_the_stock_model(tmp_path):
    path = save(tiny_model(torch.float32, quantize=True).state_dict(), tmp_path / "q8.safetensors")
    stock, ttt = load(path, quantize=True), load(path, quantize=True, **TTT_MLP)
    assert torch.equal(logits(ttt), logits(stock))
    assert torch.equal(streamed(ttt), streamed(stock))


def test_an_int8_trained_file_keeps_its_memories_in_full_and_streams_as_one_pass(tmp_path):
    saved = trained_model(torch.float32, quantize=True, **MLP)
    loaded = load(save(saved.state_dict(), tmp_path / "q8.safetensors"), **TTT_MLP, quantize=True)
    assert {type(module) for layer in loaded.transformer.layers for module in (layer.gating.linear_in,)} == {QLinear}
    assert {parameter.dtype for parameter in moshi_patch.ttt_parameters(loaded).values()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(saved))
    with torch.no_grad():
        one_pass = loaded.forward_text(random_codes(loaded, 2, STEPS))[1]
    assert relative(streamed(loaded), one_pass) < 5e-3  # QLinear answers in float16, 1e-3 per rounding
    assert_active(loaded)


OTHER_KIND = {
    "mlp into in_place": (TTT_MLP, TTT, 'is of ttt_kind="mlp", as transformer.layers.1.ttt.'),
    "in_place into mlp": (TTT, TTT_MLP, 'is of ttt_kind="in_place", as transformer.layers.1.gating.target_generator.'),
}


@pytest.mark.parametrize(("theirs", "ours", "named"), OTHER_KIND.values(), ids=OTHER_KIND)
def test_a_checkpoint_of_the_other_kind_is_refused_in_one_line_and_nothing_changes(tmp_path, theirs, ours, named):
    state = tiny_model(torch.float32, **theirs).state_dict()
    path = save(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="The checkpoint is of ttt_kind=") as caught:
        load(path, **ours)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    live = tiny_model(torch.float32, seed=3, **ours)
    before = {name: value.clone() for name, value in live.state_dict().items()}
    with pytest.raises(ValueError, match="The checkpoint is of ttt_kind="):
        live.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in live.state_dict().items())


ANCESTORS = [
    "original_layer.norm1.alpha",
    "seq_modeling_block.ttt_layer.ttt.W1",
    "seq_modeling_block.forward_ssm_gating.gating_alpha",
    "ttt_layer.wq.weight",
]


@pytest.mark.parametrize("settings", [{}, TTT, TTT_MLP], ids=["stock", "in_place", "mlp"])
@pytest.mark.parametrize("nested", ANCESTORS)
def test_names_of_an_ancestor_are_refused_in_one_line_that_names_the_importer(tmp_path, nested, settings):
    state = tiny_model(torch.float32).state_dict() | {f"transformer.layers.2.{nested}": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"python -m finetune\.export --import-ancestor") as caught:
        load(save(state, tmp_path / "ancestor.safetensors"), **settings)
    assert f"transformer.layers.2.{nested}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_in_a_checkpoint_says_what_it_is():
    assert moshi_patch.memory_key(KEYS[0]) == ("mlp", 1, KEYS[0].split(".ttt.")[1])
    target = "transformer.layers.17.gating.target_generator.W_target.weight"
    assert moshi_patch.memory_key(target) == ("in_place", 17, "target_generator.W_target.weight")
    assert moshi_patch.target_key(target) == (17, "W_target.weight")
    for other in ("transformer.layers.1.gating.linear_in.weight", "transformer.layers.1.ttt.W3", "emb.0.weight"):
        assert moshi_patch.memory_key(other) is None
        assert moshi_patch.target_key(other) is None
    assert moshi_patch.target_key(KEYS[0]) is None


def test_a_model_of_another_number_of_layers_is_refused_and_the_list_of_names_is_short():
    state = tiny_model(torch.float32, **TTT_MLP).state_dict()
    with pytest.raises(
        ValueError, match=r"38 of the 76 TTT weights .* and 30 more\. Present: .* and 30 more\."
    ) as caught:
        tiny_model(torch.float32, **{**TTT_MLP, "ttt_layers": "all"}).load_state_dict(state)
    assert len(str(caught.value)) < 1500
