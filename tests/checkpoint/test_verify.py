"""A checkpoint whose weights and settings contradict each other is recognised from its header, with the keys."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import moshi_patch
from finetune.checkpoint.contradictions import contradictions
from finetune.checkpoint.saved import open_checkpoint
from finetune.common.errors import ConfigError
from finetune.model.tensor_file import read_header
from tests.support.checkpoint_runs import MODES, arguments, tiny_run
from tests.support.loading import KEYS

pytestmark = pytest.mark.slow

CONV, W_TARGET = KEYS[1], KEYS[0]


@pytest.fixture(autouse=True)
def _patched(patched):
    """For the models that are saved here."""


@pytest.fixture
def saved(tmp_path):
    """Saves a checkpoint of a tiny model in one of `MODES` and returns its folder `consolidated`."""

    def save(mode: str, **settings):
        checkpointer, state = tiny_run(arguments(tmp_path / "run", **(MODES[mode] | settings)))
        return checkpointer.save(state) / "consolidated"

    return save


def found(folder) -> str:
    return "\n".join(contradictions(open_checkpoint(folder)))


def rewrite_weights(folder, change):
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def rewrite_config(folder, name="config.json", **settings):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | settings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_what_the_trainer_saves_contradicts_itself_nowhere(saved, mode, trained, dtype):
    folder = saved(mode, param_dtype=dtype)
    if not trained:
        (folder / "training_config.json").unlink()
    assert found(folder) == ""


@pytest.mark.parametrize("trained", [True, False])
def test_embeddings_that_were_trained_belong_to_adapters(saved, trained):
    folder = saved("adapter", lora={"enable": True, "rank": 3, "ft_embed": True})
    if not trained:
        (folder / "training_config.json").unlink()
    assert found(folder) == ""


def test_looking_leaves_the_patch_as_it_was_and_reads_no_weight(saved):
    folder = saved("full")
    moshi_patch.uninstall()
    assert found(folder) == ""
    assert not moshi_patch.is_installed()


@pytest.mark.parametrize("mode", MODES)
def test_target_generators_in_other_layers_are_named_with_the_setting(saved, mode):
    folder = saved(mode)

    def move(weights):
        for key in KEYS:
            if ".3." in key:
                weights[key.replace(".3.", ".2.")] = weights.pop(key)

    rewrite_weights(folder, move)
    (file,) = folder.glob("*.safetensors")
    assert f"ttt_layers=[1, 3] selects layers 1, 3, and {file.name} has target generators in layers 1, 2." in found(
        folder
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_key_is_named(saved, mode):
    folder = saved(mode)
    rewrite_weights(folder, lambda weights: weights.pop(W_TARGET))
    assert f"1 tensor missing: {W_TARGET}." in found(folder)


def test_a_file_without_any_target_generator_is_no_checkpoint_with_ttt(saved):
    folder = saved("full")
    rewrite_weights(folder, lambda weights: [weights.pop(key) for key in KEYS])
    assert "has target generators in no layer" in found(folder)
    rewrite_config(folder, ttt_enabled=False)
    assert "ttt_enabled=False in config.json, and True was trained" in found(folder)


def test_ttt_switched_off_over_ttt_weights_is_a_contradiction(saved):
    folder = saved("full")
    (folder / "training_config.json").unlink()
    rewrite_config(folder, ttt_enabled=False)
    assert "ttt_enabled=False selects no layer, and consolidated.safetensors has target generators in" in found(folder)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ttt_chunk_size": 8}, "ttt_chunk_size=8 in config.json, and 5 was trained"),
        ({"ttt_conv_kernel_size": 4}, "convolution of layers 1, 3 has 2 taps and is depthwise"),
        ({"ttt_conv_depthwise": False}, "ttt_conv_depthwise=False in config.json, and the convolution of layers 1, 3"),
        ({"lora": True}, "lora=True in config.json, and consolidated.safetensors has no adapters"),
        ({"num_layers": 6}, "num_layers=6 in config.json, and consolidated.safetensors has 4 layers"),
        ({"dim": 32}, "target_generator.W_target.weight [16, 16], not [32, 32]"),
        ({"card": 21}, "emb.0.weight [21, 16], not [22, 16]"),
        ({"hidden_scale": 3.0}, "gating.linear_in.weight [88, 16], not [64, 16]"),
        ({"ttt_layers": [99]}, "no model can be built from it: ValueError: ttt_layers=[99]"),
        ({"ttt_chunk": 8}, "no model can be built from it: ValueError: ttt_chunk=8"),
        ({"delays": [0]}, "no model can be built from it: AssertionError"),
    ],
    ids=str,
)
def test_another_config_is_named_with_and_without_the_settings_of_the_training(saved, settings, named):
    folder = saved("full")
    rewrite_config(folder, **settings)
    assert named in found(folder)
    (folder / "training_config.json").unlink()
    assert ("was trained" in named) != (named in found(folder))


def test_adapters_of_another_rank_or_under_the_wrong_setting_are_named(saved):
    folder = saved("adapter")
    rewrite_config(folder, lora_rank=4)
    assert "lora_rank=4 in config.json, and the adapters have rank 3." in found(folder)
    rewrite_config(folder, lora=False)
    assert "lora=False in config.json, and lora.safetensors has adapters." in found(folder)


def test_weights_that_no_training_changes_do_not_belong_in_an_adapter_file(saved):
    folder = saved("adapter")
    rewrite_weights(folder, lambda weights: weights.update({"text_emb.weight": torch.zeros(31, 16)}))
    assert "not of the model that config.json describes: text_emb.weight" in found(folder)


@pytest.mark.parametrize("trained", [True, False])
def test_a_target_generator_of_another_shape_or_dtype_is_named(saved, trained):
    folder = saved("full")
    if not trained:
        (folder / "training_config.json").unlink()
    rewrite_weights(folder, lambda weights: weights.update({CONV: weights[CONV].bfloat16()}))
    assert f"{CONV} BF16, not F32" in found(folder)
    rewrite_weights(folder, lambda weights: weights.update({W_TARGET: torch.zeros(16, 8)}))
    assert f"{W_TARGET} [16, 8], not [16, 16]" in found(folder)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda content: b"", "is empty (0 bytes)"),
        (lambda content: content[:-1], "is truncated: {less} bytes of {size}."),
        (lambda content: content[:100], "is truncated, or not a safetensors file: 100 bytes"),
        (lambda content: content[:5], "is truncated, or not a safetensors file: 5 bytes"),
        (lambda content: content + b"0", "is damaged"),
        (lambda content: b"PK\3\4" + content, "is truncated, or not a safetensors file"),
        (lambda content: content[:8] + b"x" + content[9:], "is not a safetensors file"),
    ],
    ids=["empty", "last byte", "in its header", "in its length", "longer", "another format", "broken header"],
)
def test_a_file_that_cannot_be_read_is_named_with_what_is_wrong(saved, damage, named):
    path = saved("full") / "consolidated.safetensors"
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with pytest.raises(ConfigError) as error:
        contradictions(open_checkpoint(path))
    assert str(path) in str(error.value)
    assert named.format(less=len(content) - 1, size=len(content)) in str(error.value)


def test_the_header_gives_shapes_and_dtypes(saved):
    header = read_header(saved("full", param_dtype="bfloat16") / "consolidated.safetensors")
    assert header[CONV].shape == (16, 1, 2)
    assert header[CONV].dtype == "BF16"
