"""`save_memory` and `load_memory`: what a stream has learnt comes back bit for bit, or is refused with a reason."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moshi_patch
from moshi_patch.memory import copy_memory, fast_weight_tensors, restore_memory
from moshi_patch.memory_file import checksum
from tests.support.memories import STEPS, assert_same, hear, snapshot, streaming_model
from tests.support.models import TTT, tiny_model

pytestmark = pytest.mark.usefixtures("patched")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ttt_delta_clip": 0.05, "ttt_decay": 0.9},
        {"ttt_update": "residual", "ttt_decay": 0.9},
        {"ttt_kind": "mlp"},
    ],
    ids=["plain", "clip_and_decay", "residual", "mlp"],
)
def test_what_was_saved_in_the_middle_of_a_chunk_comes_back_bit_for_bit(tmp_path, dtype, options):
    model = streaming_model(dtype=dtype, **options)
    saved = snapshot(model)
    moshi_patch.save_memory(model, tmp_path / "memory")
    other = streaming_model(steps=7, dtype=dtype, **options)
    other.reset_streaming()
    fresh = snapshot(other)
    moshi_patch.load_memory(other, tmp_path / "memory")
    assert_same(snapshot(other), saved)
    assert any(not torch.equal(fresh[key], saved[key]) for key in saved)


@pytest.mark.parametrize("kind", ["in_place", "mlp"])
def test_a_stream_that_was_saved_and_loaded_goes_on_as_one_whose_attention_alone_was_reset(tmp_path, kind):
    straight, resumed = streaming_model(ttt_kind=kind), streaming_model(ttt_kind=kind)
    moshi_patch.save_memory(resumed, tmp_path / "memory")
    resumed.reset_streaming()
    moshi_patch.load_memory(resumed, tmp_path / "memory")
    kept = snapshot(straight)
    straight.reset_streaming()
    for key, tensor in fast_weight_tensors(straight).items():
        tensor.copy_(kept[key])
    torch.testing.assert_close(hear(resumed, STEPS, 2 * STEPS), hear(straight, STEPS, 2 * STEPS), rtol=0, atol=0)
    assert_same(snapshot(resumed), snapshot(straight))
    forgetful = streaming_model(steps=0, ttt_kind=kind)
    hear(forgetful, STEPS, 2 * STEPS)
    assert moshi_patch.ttt_stats(resumed) != moshi_patch.ttt_stats(forgetful)


def test_loading_writes_into_the_tensors_that_a_captured_graph_reads(tmp_path):
    model = streaming_model()
    moshi_patch.save_memory(model, tmp_path / "memory")
    before = {key: tensor.data_ptr() for key, tensor in fast_weight_tensors(model).items()}
    moshi_patch.load_memory(model, tmp_path / "memory")
    assert {key: tensor.data_ptr() for key, tensor in fast_weight_tensors(model).items()} == before


def test_the_file_is_for_its_owner_alone_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "memory"
    path.write_text("old")
    path.chmod(0o644)
    (tmp_path / ".memory.partial").write_text("left by a process that was killed")
    (tmp_path / ".memory.partial").chmod(0o644)
    moshi_patch.save_memory(streaming_model(), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["memory"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "memory").symlink_to(tmp_path / "elsewhere" / "memory")
    moshi_patch.save_memory(streaming_model(), tmp_path / "memory")
    assert (tmp_path / "memory").is_symlink()
    assert (tmp_path / "elsewhere" / "memory").is_file()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"ttt_learning_rate": 0.1}, r"ttt_learning_rate is 0\.2 in the file and 0\.1 in the model"),
        ({"ttt_chunk_size": 4}, r"ttt_chunk_size is 5 in the file and 4 in the model"),
        ({"ttt_update": "residual"}, r"ttt_update is 'hebbian' in the file and 'residual' in the model"),
        ({"ttt_target_gain": 2.0}, r"ttt_target_gain is 1\.0 in the file and 2\.0 in the model"),
        ({"ttt_layers": [1, 2]}, r"layers is \['transformer\.layers\.1\.gating', 'transformer\.layers\.3\.gating'\]"),
        ({"seed": 1}, r"weights differ: .* \(and \d+ more\) of \d+"),
        ({"dtype": torch.float32}, r"weights differ: .* \(and \d+ more\) of \d+"),
    ],
    ids=["learning_rate", "chunk_size", "update", "gain", "layers", "weights", "dtype"],
)
def test_a_memory_of_another_model_is_refused_with_the_difference_and_nothing_changes(tmp_path, overrides, reason):
    moshi_patch.save_memory(streaming_model(), tmp_path / "memory")
    other = streaming_model(**overrides)
    before = snapshot(other)
    with pytest.raises(ValueError, match=rf"{tmp_path}/memory: this memory was made with another.*{reason}"):
        moshi_patch.load_memory(other, tmp_path / "memory")
    assert_same(snapshot(other), before)


@pytest.mark.parametrize(("saved", "here"), [("in_place", "mlp"), ("mlp", "in_place")])
def test_a_memory_of_the_other_kind_is_refused_with_the_kinds_and_nothing_changes(tmp_path, saved, here):
    moshi_patch.save_memory(streaming_model(ttt_kind=saved), tmp_path / "memory")
    other = streaming_model(ttt_kind=here)
    before = snapshot(other)
    with pytest.raises(ValueError, match=f"settings: ttt_kind is '{saved}' in the file and '{here}' in the model; wei"):
        moshi_patch.load_memory(other, tmp_path / "memory")
    assert_same(snapshot(other), before)


def test_a_memory_of_an_mlp_tells_its_settings_apart_but_not_how_its_training_was_computed(tmp_path):
    kind = {"ttt_kind": "mlp"}
    model = streaming_model(**kind)
    moshi_patch.save_memory(model, tmp_path / "memory")
    for setting, value in {"ttt_mini_batch_size": 4, "ttt_base_lr": 1.0}.items():
        with pytest.raises(ValueError, match=rf"{setting} is \S+ in the file and {value} in the model\.$"):
            moshi_patch.load_memory(streaming_model(**kind, **{setting: value}), tmp_path / "memory")
    other = streaming_model(**kind, steps=3, ttt_scan_checkpoint_group_size=0, ttt_initial_gating_alpha=0.5)
    moshi_patch.load_memory(other, tmp_path / "memory")
    assert_same(snapshot(other), snapshot(model))


@pytest.mark.parametrize("key", ["text_emb.weight", "transformer.layers.0.gating.linear_out.weight"])
def test_a_single_bit_of_any_weight_makes_it_another_model(tmp_path, key):
    model = streaming_model()
    moshi_patch.save_memory(model, tmp_path / "memory")
    with torch.no_grad():
        model.state_dict()[key].view(torch.int16)[-1, -1] ^= 1
    with pytest.raises(ValueError, match=f"weights differ: {key} of"):
        moshi_patch.load_memory(model, tmp_path / "memory")


@pytest.mark.parametrize("update", ["hebbian", "residual"])
def test_a_memory_from_before_there_was_another_update_is_one_of_the_first(tmp_path, update):
    path, model = tmp_path / "memory", streaming_model()
    known = moshi_patch.fingerprint(model)
    assert [known["settings"].pop(key) for key in ("ttt_update", "ttt_target_gain")] == ["hebbian", 1.0]
    moshi_patch.save_memory(model, path, known)
    other = streaming_model(steps=7, ttt_update=update)
    if update == "hebbian":
        moshi_patch.load_memory(other, path)
        assert_same(snapshot(other), snapshot(model))
    else:
        with pytest.raises(ValueError, match=r"ttt_update is 'hebbian' in the file and 'residual' in the model\.$"):
            moshi_patch.load_memory(other, path)


def test_a_setting_that_the_memory_of_an_mlp_does_not_name_had_its_default(tmp_path):
    path, model = tmp_path / "memory", streaming_model(ttt_kind="mlp", ttt_base_lr=1.0)
    known = moshi_patch.fingerprint(model)
    assert known["settings"].pop("ttt_base_lr") == 1.0
    moshi_patch.save_memory(model, path, known)
    other = streaming_model(ttt_kind="mlp", ttt_base_lr=1.0, steps=7)
    moshi_patch.load_memory(other, path)
    assert_same(snapshot(other), snapshot(model))
    with pytest.raises(ValueError, match=r"ttt_base_lr is 1.0 in the file and 0.5 in the model\.$"):
        moshi_patch.load_memory(streaming_model(ttt_kind="mlp", ttt_base_lr=0.5), path)


def test_the_same_layers_selected_in_another_way_are_the_same_model(tmp_path):
    model = streaming_model(ttt_layers=[1, 3])
    moshi_patch.save_memory(model, tmp_path / "memory")
    other = streaming_model(steps=7, ttt_layers=None, ttt_start_layer=1, ttt_layer_frequency=2)
    moshi_patch.load_memory(other, tmp_path / "memory")
    assert_same(snapshot(other), snapshot(model))


def test_another_number_of_rows_is_refused(tmp_path):
    moshi_patch.save_memory(streaming_model(rows=2), tmp_path / "memory")
    with pytest.raises(ValueError, match="stream as many rows as were saved"):
        moshi_patch.load_memory(streaming_model(rows=1), tmp_path / "memory")


def test_rows_are_saved_and_loaded_one_by_one_and_the_others_are_not_touched(tmp_path):
    path, model = tmp_path / "memory", streaming_model(rows=3)
    saved = snapshot(model)
    moshi_patch.save_memory(model, path, rows=[2])
    other = streaming_model(rows=2, steps=7)
    before = snapshot(other)
    moshi_patch.load_memory(other, path, rows=[0])
    for key, tensor in snapshot(other).items():
        assert torch.equal(tensor[0], saved[key][2]), key
        assert torch.equal(tensor[1], before[key][1]), key
    alone = streaming_model(rows=1, steps=0)
    moshi_patch.load_memory(alone, path)  # a server of one person goes on with it
    assert_same(snapshot(alone), {key: tensor[2:] for key, tensor in saved.items()})

    both = copy_memory(model, [2, 0])
    restore_memory(model, both, [0, 2])
    for key, tensor in snapshot(model).items():
        assert torch.equal(tensor, saved[key].flip(0) if len(tensor) == 3 else tensor), key
    assert_same(both, {key: tensor[[2, 0]] for key, tensor in saved.items()})  # copies: they stay as they were


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([2], "row=2: must be a row of the stream, from 0 to 1"),
        ([-1], "row=-1: must be a row of the stream, from 0 to 1"),
        ([], r"rows=\[\]: must be one or more rows, each once"),
        ([0, 0], r"rows=\[0, 0\]: must be one or more rows, each once"),
        ([0, 1], r"delta is float32\[1, 16, 44\] in the memory and float32\[2, 16, 44\] in the model"),
    ],
)
def test_rows_that_are_not_there_or_too_many_are_refused_and_nothing_changes(tmp_path, rows, reason):
    model = streaming_model(rows=2)
    before = snapshot(model)
    if rows != [0, 1]:
        with pytest.raises(ValueError, match=reason):
            moshi_patch.save_memory(model, tmp_path / "memory", rows=rows)
        assert os.listdir(tmp_path) == []
    moshi_patch.save_memory(model, tmp_path / "memory", rows=[1])
    with pytest.raises(ValueError, match=reason):
        moshi_patch.load_memory(model, tmp_path / "memory", rows=rows)
    assert_same(snapshot(model), before)
    state = copy_memory(model, [1])
    state.popitem()
    with pytest.raises(ValueError, match=r"the memory is of other layers: transformer\.layers\.3\.gating\.keep"):
        restore_memory(model, state, [0])


def test_what_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/memory: no such file"):
        moshi_patch.load_memory(streaming_model(), tmp_path / "memory")


def test_fast_weights_that_are_not_finite_are_not_kept(tmp_path):
    path, model = tmp_path / "memory", streaming_model()
    moshi_patch.save_memory(model, path)
    content = path.read_bytes()
    fast_weight_tensors(model)["transformer.layers.3.gating.delta"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"transformer\.layers\.3\.gating\.delta of the fast weights is not finite"):
        moshi_patch.save_memory(model, path)
    assert path.read_bytes() == content


def test_a_memory_of_an_older_version_loads_as_it_was_saved():
    """Made with commit 19e7289, with the weights it belongs to: random numbers differ between processors."""
    folder = Path(__file__).parent / "memory_of_19e7289"
    layers = {"num_layers": 2, "ttt_layers": [1], "depformer_num_layers": 1}
    model = tiny_model(torch.bfloat16, **{**TTT, **layers, "ttt_chunk_size": 3})
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.streaming_forever(1)
    moshi_patch.load_memory(model, folder / "memory.safetensors")
    assert_same(snapshot(model), load_file(folder / "memory.safetensors"))
    assert moshi_patch.ttt_stats(model)["transformer.layers.1.gating"]["updates"] == [2]


def test_a_setting_that_a_file_does_not_know_had_its_default(tmp_path):
    model = streaming_model()
    known = moshi_patch.fingerprint(model)
    old = {**known, "settings": {key: value for key, value in known["settings"].items() if key != "ttt_decay"}}
    moshi_patch.save_memory(model, tmp_path / "memory", old)
    moshi_patch.load_memory(model, tmp_path / "memory")
    with pytest.raises(ValueError, match=r"ttt_decay is 1\.0 in the file and 0\.9 in the model"):
        moshi_patch.load_memory(streaming_model(ttt_decay=0.9), tmp_path / "memory")


def test_models_without_fast_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="LMModel has no TTT layer"):
        moshi_patch.fingerprint(tiny_model())
    model = tiny_model(**TTT)
    for use in (moshi_patch.save_memory, moshi_patch.load_memory):
        with pytest.raises(ValueError, match="LMModel is not streaming"):
            use(model, tmp_path / "memory")


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64])
def test_a_checksum_tells_values_their_order_and_the_size_apart(dtype):
    zeros = torch.zeros(21, dtype=dtype)
    one, other = zeros.clone(), zeros.clone()
    one[3], other[4] = 1, 1
    assert len({checksum(t) for t in (zeros, one, other, zeros[:20], one[:20], torch.empty(0, dtype=dtype))}) == 6
    assert checksum(one) == checksum(one.clone()) == checksum(one.view(3, 7).T.contiguous().T)
    assert checksum(torch.cat([one, one])[21:]) == checksum(one)  # whatever the address
