"""LoRA adapters loaded in a second pass, with and without TTT weights, and int8 weights."""

import pytest
import torch
from moshi.models import LMModel
from moshi.utils.quantize import QLinear

import moshi_patch
from tests.support.loading import (
    KEYS,
    LORA,
    STEPS,
    W_DOWN,
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
from tests.support.models import TINY, TTT, random_codes, randomise_targets, relative, tiny_model

pytestmark = pytest.mark.usefixtures("patched")


@pytest.fixture
def adapted(tmp_path):
    """A TTT base file, a further trained model with other targets and other W_down, and how to save its adapters.

    float64 and no rotary embedding, whose sines are float32: what is left between fused and unfused is rounding.
    """

    def make(**what):
        lm_kwargs = {**TINY, "positional_embedding": "none"}
        base = randomise_targets(tiny_model(**lm_kwargs, **TTT))
        trained = randomise_targets(with_lora(base), seed=7) if what.get("ttt") else with_lora(base)
        if what.get("w_down"):
            with torch.no_grad():
                for key in W_DOWN:
                    weight = trained.get_parameter(key.replace("weight", "frozen_W.weight"))
                    weight += 0.1 * torch.randn(weight.shape, dtype=weight.dtype)
        path = save(base.state_dict(), tmp_path / "base.safetensors")
        lora = save(adapters(trained, **what), tmp_path / "lora.safetensors")
        return {"path": path, "dtype": torch.float64, "base": lm_kwargs, "lora_weights": lora}, base, trained

    return make


ADAPTERS = {
    "lora": {},
    "lora+ttt": {"ttt": True},
    "lora+w_down": {"w_down": True},
    "lora+ttt+w_down": {"ttt": True, "w_down": True},
}


@pytest.mark.parametrize("fuse", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("what", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_adapters_load_over_a_ttt_base_and_equal_the_trained_model(adapted, what, fuse):
    files, base, trained = adapted(**what)
    loaded = load(**files, fuse_lora=fuse, **TTT, **LORA)
    assert_loaded(loaded, torch.float64)
    source = trained if what.get("ttt") else base  # the weights in the adapters win; else those of the base survive
    for name, weight in moshi_patch.ttt_parameters(loaded).items():
        assert torch.equal(weight, moshi_patch.ttt_parameters(source)[name]), name
    assert relative(logits(loaded), logits(base)) > 1e-2
    if fuse:
        assert not [name for name, _ in loaded.named_parameters() if "lora_" in name]
        assert relative(logits(loaded), logits(trained)) < 1e-12
        assert relative(streamed(loaded), streamed(trained)) < 1e-12
    else:
        assert torch.equal(logits(loaded), logits(trained))
        assert torch.equal(streamed(loaded), streamed(trained))
    assert_active(loaded)


@pytest.mark.parametrize("fuse", [False, True], ids=["unfused", "fused"])
def test_adapters_with_ttt_weights_load_over_a_stock_base(adapted, tmp_path, fuse):
    files, _, trained = adapted(ttt=True)
    files["path"] = save(tiny_model(**files["base"]).state_dict(), tmp_path / "stock.safetensors")
    loaded = load(**files, fuse_lora=fuse, **TTT, **LORA)
    assert_loaded(loaded, torch.float64)
    assert relative(logits(loaded), logits(trained)) < 1e-12
    assert_active(loaded)


def test_random_adapters_take_no_layer_of_the_target_generators(tmp_path):
    loaded = load(save(tiny_model(torch.float32).state_dict(), tmp_path / "stock.safetensors"), **TTT, **LORA)
    assert_loaded(loaded, torch.float32)
    adapted = [name for name, _ in loaded.named_parameters() if "lora_" in name]
    assert "transformer.layers.1.gating.linear_out.lora_A.weight" in adapted
    assert [name for name in adapted if "target_generator" in name] == []
    assert sorted(moshi_patch.ttt_parameters(loaded)) == KEYS


def dequantised(model: LMModel, **settings) -> LMModel:
    """The same function without int8: every `QLinear`'s weight written out in full."""
    plain = tiny_model(model.dtype, **settings)
    full = {}
    for name, tensor in model.state_dict().items():
        if name + "_scb" in model.state_dict():
            tensor = (tensor.float() * model.state_dict()[name + "_scb"].float()[:, None] / 127).to(model.dtype)
        if not name.endswith("_scb"):
            full[name] = tensor
    plain.load_state_dict(full)
    return plain


def test_an_int8_stock_file_loads_with_ttt_and_answers_bitwise_as_the_stock_model(tmp_path):
    path = save(tiny_model(torch.float32, quantize=True).state_dict(), tmp_path / "q8.safetensors")
    stock, ttt = load(path, quantize=True), load(path, quantize=True, **TTT)
    assert torch.equal(logits(ttt), logits(stock))
    assert torch.equal(streamed(ttt), streamed(stock))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_an_int8_ttt_file_keeps_full_targets_and_equals_the_dequantised_model(tmp_path, dtype, tolerance):
    """`QLinear` answers in float16, 1e-3 per rounding; beside bfloat16 weights the tolerance is bfloat16's."""
    saved = trained_model(dtype, quantize=True)
    loaded = load(save(saved.state_dict(), tmp_path / "q8.safetensors"), dtype, **TTT, quantize=True)
    if dtype == torch.bfloat16:  # moshi's loader rounds the scales too, and then refuses to run with them
        loaded.load_state_dict({k: v for k, v in saved.state_dict().items() if "_scb" in k}, strict=False, assign=True)
    for gating in moshi_patch.ttt_gatings(loaded).values():
        assert isinstance(gating.linear_in, QLinear)
        assert isinstance(gating.linear_out, QLinear)
        assert {p.dtype for p in gating.target_generator.parameters()} == {dtype}
        assert gating.linear_out.weight_scb.dtype == torch.float32
    assert not [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
    assert torch.equal(logits(loaded), logits(saved))
    assert relative(logits(loaded), logits(dequantised(saved, **TTT))) < tolerance
    with torch.no_grad():
        one_pass = loaded.forward_text(random_codes(loaded, 2, STEPS))[1]
    assert relative(streamed(loaded), one_pass) < tolerance
    assert_active(loaded)
