"""Loading through moshi's own loaders: stock and TTT files, local repositories, refusals that name the keys."""

import copy
import json

import pytest
import torch
from moshi.models import loaders
from moshi.modules.transformer import StreamingTransformerLayer
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import moshi_patch
from tests.support.loading import (
    KEYS,
    LORA,
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
from tests.support.models import TINY, TTT, randomise_targets, tiny_model

pytestmark = pytest.mark.usefixtures("patched")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["token_embeddings", "hidden_states"])
def test_a_stock_file_loads_with_ttt_and_answers_bitwise_as_the_stock_model(tmp_path, dtype, target):
    path = save(tiny_model(dtype).state_dict(), tmp_path / "stock.safetensors")
    stock, ttt = load(path, dtype), load(path, dtype, **TTT, ttt_target=target)
    assert_loaded(ttt, dtype)
    assert not ttt.training
    assert sorted(moshi_patch.ttt_parameters(ttt)) == KEYS
    for name, weight in moshi_patch.ttt_parameters(ttt).items():
        initial = torch.eye(16, dtype=dtype) if "W_target" in name else torch.zeros(16, 1, 2, dtype=dtype)
        assert torch.equal(weight, initial), name
    assert torch.equal(logits(ttt), logits(stock))
    assert torch.equal(streamed(ttt), streamed(stock))


@pytest.mark.parametrize("depthwise", [True, False], ids=["depthwise", "full-conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_ttt_file_loads_strictly_and_equals_the_model_it_was_saved_from(tmp_path, dtype, depthwise):
    settings = {**TTT, "ttt_conv_depthwise": depthwise}
    saved = randomise_targets(tiny_model(dtype, **settings))
    loaded = load(save(saved.state_dict(), tmp_path / "ttt.safetensors"), dtype, **settings)
    assert_loaded(loaded, dtype)
    assert torch.equal(logits(loaded), logits(saved))
    assert torch.equal(streamed(loaded), streamed(saved))
    assert_active(loaded)


@pytest.mark.parametrize("kind", ["stock", "ttt"])
def test_a_torch_file_loads_as_a_safetensors_file_does(tmp_path, kind):
    model = tiny_model(torch.float32) if kind == "stock" else trained_model(torch.float32)
    torch.save({"fsdp_best_state": {"model": model.state_dict()}}, tmp_path / "model.pt")
    save(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.pt", **TTT)
    assert_loaded(loaded, torch.float32)
    assert torch.equal(logits(loaded), logits(load(tmp_path / "model.safetensors", **TTT)))


def test_loading_leaves_the_keyword_arguments_it_was_given_and_moshis_own_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "_lm_kwargs", dict(TINY))
    path = save(tiny_model(torch.float32).state_dict(), tmp_path / "stock.safetensors")
    overrides, defaults = copy.deepcopy({**TTT, **LORA}), copy.deepcopy(loaders._lm_kwargs)
    model = loaders.get_moshi_lm(path, lm_kwargs_overrides=overrides)
    assert len(moshi_patch.ttt_gatings(model)) == 2
    assert overrides == {**TTT, **LORA}
    assert loaders._lm_kwargs == defaults
    assert moshi_patch.ttt_gatings(loaders.get_moshi_lm(path)) == {}


def test_a_stock_file_loads_over_a_live_model_and_keeps_its_trained_targets():
    live = trained_model(torch.float32)
    before = {name: weight.clone() for name, weight in moshi_patch.ttt_parameters(live).items()}
    live.load_state_dict(tiny_model(torch.float32, seed=5).state_dict())
    assert torch.equal(live.text_linear.weight, tiny_model(torch.float32, seed=5).text_linear.weight)
    for name, weight in moshi_patch.ttt_parameters(live).items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("kind", ["ttt", "stock", "some-keys-missing"])
def test_wrapped_layers_load_as_bare_ones_do(kind):
    """torch's wrappers name a module in between, which the keys of a checkpoint do not have."""
    state = (tiny_model if kind == "stock" else trained_model)(torch.float32).state_dict()
    live = tiny_model(torch.float32, seed=5, **TTT)
    apply_activation_checkpointing(live, check_fn=lambda module: isinstance(module, StreamingTransformerLayer))
    assert any("_checkpoint_wrapped_module" in name for name, _ in live.named_parameters())
    if kind == "some-keys-missing":
        del state[KEYS[0]]
        with pytest.raises(ValueError, match=KEYS[0]):
            live.load_state_dict(state)
        return
    kept = live.state_dict()
    live.load_state_dict(state)
    assert all(torch.equal(value, state.get(name, kept[name])) for name, value in live.state_dict().items())


# A local repository through CheckpointInfo


@pytest.fixture
def repository(tmp_path):
    """A folder with weights and a `config.json` with `ttt_*` keys: the arguments of `from_hf_repo`, and the model."""

    def make(**config):
        model = trained_model(torch.float32)
        save(model.state_dict(), tmp_path / "model.safetensors")
        for name in ("mimi.safetensors", "tokenizer.model"):
            (tmp_path / name).touch()
        (tmp_path / "config.json").write_text(json.dumps({**TINY, **TTT, **config}))
        arguments = {
            "moshi_weights": tmp_path / "model.safetensors",
            "mimi_weights": tmp_path / "mimi.safetensors",
            "tokenizer": tmp_path / "tokenizer.model",
            "config_path": tmp_path / "config.json",
        }
        return arguments, model

    return make


@pytest.mark.parametrize("model_type", ["moshi", "hibiki"])
def test_a_local_repository_loads_with_the_ttt_settings_of_its_config(repository, model_type):
    arguments, saved = repository(model_type=model_type, lm_gen_config={"temp": 0.5})
    info = loaders.CheckpointInfo.from_hf_repo("nobody/nothing", **arguments)
    model = info.get_moshi(dtype=torch.float32)
    assert model.ttt_config == saved.ttt_config == moshi_patch.TTTConfig.from_kwargs(TTT)
    assert_loaded(model, torch.float32)
    if model_type == "hibiki":  # moshi reads the end of text as padding there
        assert torch.equal(model.text_emb.weight[2], saved.text_emb.weight[3])
        saved.text_emb.weight.data[2] = saved.text_emb.weight.data[3]
    assert torch.equal(logits(model), logits(saved))
    assert_active(model)


def test_overrides_win_over_the_config_of_a_local_repository(repository):
    arguments, saved = repository()
    info = loaders.CheckpointInfo.from_hf_repo("nobody/nothing", **arguments)
    model = info.get_moshi(dtype=torch.float32, lm_kwargs_overrides={"ttt_chunk_size": 7})
    assert moshi_patch.TTTConfig.from_kwargs({**TTT, "ttt_chunk_size": 7}) == model.ttt_config
    assert info.get_moshi(dtype=torch.float32).ttt_config == saved.ttt_config
    empty = info.get_moshi(dtype=torch.float32, load_weight=False)
    assert sorted(moshi_patch.ttt_parameters(empty)) == KEYS
    assert_loaded(empty, torch.float32)


def test_a_local_repository_with_adapters_loads_through_checkpoint_info(repository, tmp_path):
    arguments, saved = repository(**LORA)
    reference = with_lora(saved)
    lora = save(adapters(reference), tmp_path / "lora.safetensors")
    info = loaders.CheckpointInfo.from_hf_repo("nobody/nothing", **arguments, lora_weights=lora)
    assert torch.equal(logits(info.get_moshi(dtype=torch.float32, fuse_lora=False)), logits(reference))


WITHOUT_TTT: dict = {}
REFUSALS = {
    "one-key-missing": (TTT, lambda state: state.pop(KEYS[0]), ValueError, KEYS),
    "one-layer-missing": ({**TTT, "ttt_layers": [0, 1, 3]}, None, ValueError, [*KEYS, KEYS[0].replace("1", "0", 1)]),
    "one-layer-too-many": ({**TTT, "ttt_layers": [1]}, None, RuntimeError, KEYS[2:]),
    "no-layer-in-common": ({**TTT, "ttt_layers": [0, 2]}, None, RuntimeError, KEYS),
    "model-without-ttt": (WITHOUT_TTT, None, RuntimeError, KEYS),
    "other-kernel": ({**TTT, "ttt_conv_kernel_size": 3}, None, RuntimeError, [k for k in KEYS if "conv1d" in k]),
    "other-conv": ({**TTT, "ttt_conv_depthwise": False}, None, RuntimeError, [k for k in KEYS if "conv1d" in k]),
    "narrow-target": (TTT, lambda state: state.update({KEYS[0]: torch.eye(8)}), RuntimeError, KEYS[:1]),
}
"""By name: the settings of the model, what is done to a TTT checkpoint, the error, and the keys that it names."""


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
@pytest.mark.parametrize("where", ["base", "adapters"])
def test_a_checkpoint_whose_ttt_weights_do_not_fit_is_refused_by_key(tmp_path, case, where):
    settings, damage, error, named = case
    trained = with_lora(trained_model(torch.float32))
    state = adapters(trained, ttt=True) if where == "adapters" else tiny_model(torch.float32, **TTT).state_dict()
    if damage:
        damage(state)
    wrong = save(state, tmp_path / "wrong.safetensors")
    stock = save(tiny_model(torch.float32).state_dict(), tmp_path / "stock.safetensors")
    with pytest.raises(error) as caught:
        load(wrong, **settings) if where == "base" else load(stock, lora_weights=wrong, **settings, **LORA)
    assert [key for key in named if key not in str(caught.value)] == []


def test_a_ttt_file_in_stock_moshi_is_refused_by_key(tmp_path):
    path = save(tiny_model(torch.float32, **TTT).state_dict(), tmp_path / "ttt.safetensors")
    moshi_patch.uninstall()
    with pytest.raises(RuntimeError) as caught:
        load(path)
    assert [key for key in KEYS if key not in str(caught.value)] == []
