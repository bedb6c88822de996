"""With TTT off, or on with fresh weights, the patched model is stock moshi bit for bit."""

import pytest
import torch
from moshi.models.lm import LMGen, LMModel

import moshi_patch
from tests.support.models import TTT, TTT_MLP, random_codes, randomise_targets, tiny_model

VARIANTS = {
    "TTT off": {"ttt_enabled": False},
    "fresh weights": TTT,
    "fresh weights, hidden_states": {**TTT, "ttt_target": "hidden_states"},
    "fresh weights, clip, decay, full conv": {
        **TTT,
        "ttt_delta_clip": 1e-3,
        "ttt_decay": 0.9,
        "ttt_conv_depthwise": False,
    },
}
VARIANTS["fresh weights, mlp"] = TTT_MLP
VARIANTS["fresh weights, residual"] = {**TTT, "ttt_update": "residual", "ttt_target_gain": 16.0}
DTYPES = [torch.float32, torch.bfloat16]


def results(model) -> list[torch.Tensor]:
    """Everything the model puts out: training forward, text forward, and generation with sampling."""
    codes = random_codes(model, 2, 24)
    with torch.no_grad():
        training = model(codes)
        text = model.forward_text(codes)
    torch.manual_seed(5)
    generated = []
    lm_gen = LMGen(model)
    with lm_gen.streaming(2):
        for t in range(24):
            out = lm_gen.step(codes[:, 3:, t : t + 1])
            if out is not None:
                generated.append(out)
    return [training.logits, training.text_logits, training.mask, *text, torch.cat(generated, 2)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes: tells -0.0 from 0.0, and finds NaN equal to itself."""
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_bitwise_those_of_stock_moshi(variant, dtype):
    stock = results(tiny_model(dtype, norm="rms_norm_f32"))
    moshi_patch.install()
    try:
        model = tiny_model(dtype, norm="rms_norm_f32", **VARIANTS[variant])
        assert bool(moshi_patch.ttt_memories(model)) == VARIANTS[variant]["ttt_enabled"]
        patched = results(model)
    finally:
        moshi_patch.uninstall()
    for one, other in zip(stock, patched, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(bits(one), bits(other))


@pytest.mark.usefixtures("patched")
def test_the_same_comparison_notices_trained_weights():
    fresh = results(tiny_model(torch.float32, **TTT))
    trained = results(randomise_targets(tiny_model(torch.float32, **TTT)))
    assert not torch.equal(fresh[3], trained[3])


def test_importing_changes_nothing_and_uninstall_restores_everything():
    assert not moshi_patch.is_installed()
    stock = LMModel.__init__
    with pytest.raises(TypeError, match="ttt_enabled"):
        tiny_model(ttt_enabled=True)
    moshi_patch.install()
    wrapped = LMModel.__init__
    moshi_patch.install()
    assert moshi_patch.is_installed()
    assert LMModel.__init__ is wrapped
    assert wrapped is not stock
    moshi_patch.uninstall()
    moshi_patch.uninstall()
    assert not moshi_patch.is_installed()
    assert LMModel.__init__ is stock


def test_a_constructor_put_back_by_someone_else_is_not_taken_for_ours():
    stock = LMModel.__init__
    moshi_patch.install()
    LMModel.__init__ = stock
    assert not moshi_patch.is_installed()
    moshi_patch.install()
    assert moshi_patch.ttt_gatings(tiny_model(**TTT))
    moshi_patch.uninstall()
    assert LMModel.__init__ is stock


@pytest.mark.usefixtures("patched")
def test_every_name_of_the_class_is_patched():
    import moshi.models
    from moshi.models import loaders

    assert moshi.models.LMModel is loaders.LMModel is LMModel
    assert moshi_patch.ttt_gatings(tiny_model(**TTT))


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("ttt", [TTT, TTT_MLP], ids=["in_place", "mlp"])
def test_stock_weights_do_not_depend_on_ttt(ttt):
    stock, model = tiny_model(), tiny_model(**ttt)
    new = set(moshi_patch.ttt_parameters(model))
    assert set(model.state_dict()) == set(stock.state_dict()) | new
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.usefixtures("patched")
def test_names_shapes_and_initial_values_of_the_new_weights():
    model = tiny_model(**TTT)
    parameters = moshi_patch.ttt_parameters(model)
    prefix = "transformer.layers.{}.gating.target_generator."
    names = [prefix.format(i) + name for i in (1, 3) for name in ("conv1d.conv.weight", "W_target.weight")]
    assert list(parameters) == names
    assert list(moshi_patch.ttt_gatings(model)) == ["transformer.layers.1.gating", "transformer.layers.3.gating"]
    for name, parameter in parameters.items():
        expected = torch.eye(16) if name.endswith("W_target.weight") else torch.zeros(16, 1, 2)
        assert torch.equal(parameter, expected.to(parameter))


@pytest.mark.usefixtures("patched")
def test_the_first_step_trains_the_convolution_and_the_second_the_projection():
    model = tiny_model(**TTT).train()
    codes = random_codes(model, 2, 24)
    parameters = moshi_patch.ttt_parameters(model)
    moved = []
    for _ in range(2):
        model.zero_grad()
        model.forward_text(codes)[1].square().mean().backward()
        moved.append({name: p.grad.abs().max().item() > 0 for name, p in parameters.items()})
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= 0.1 * parameter.grad
    assert all(moved[0][name] == ("conv1d" in name) for name in parameters)
    assert all(moved[1].values())
