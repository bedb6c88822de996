"""`save_memory` and `load_memory`: what a stream has learnt comes back bit for bit, or is refused with a reason."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moshi_patch
from moshi_patch.memory import _checksum, fast_weight_tensors
from tests.support.models import TTT, random_codes, randomise_targets, tiny_model
from tests.support.tiny_repository import ENVIRONMENT, ROOT

pytestmark = pytest.mark.usefixtures("patched")
STEPS = 23  # four chunks of 5 and a part of one


def streaming_model(rows: int = 2, steps: int = STEPS, dtype=torch.bfloat16, seed: int = 0, **overrides):
    """A model that has heard `steps` random steps and is still streaming."""
    model = randomise_targets(tiny_model(dtype, seed=seed, **{**TTT, **overrides}))
    model.streaming_forever(rows)
    hear(model, 0, steps, rows)
    return model


@torch.no_grad()
def hear(model, start: int, end: int, rows: int = 2) -> torch.Tensor:
    codes = random_codes(model, rows, 3 * STEPS)
    return torch.cat([model.forward_text(codes[:, :, t : t + 1])[1] for t in range(start, end)] or [torch.empty(0)])


def snapshot(model) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in fast_weight_tensors(model).items()}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"ttt_delta_clip": 0.05, "ttt_decay": 0.9}, {"ttt_update": "residual", "ttt_decay": 0.9}],
    ids=["plain", "clip_and_decay", "residual"],
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


def test_a_stream_that_was_saved_and_loaded_goes_on_as_one_whose_attention_alone_was_reset(tmp_path):
    straight, resumed = streaming_model(), streaming_model()
    moshi_patch.save_memory(resumed, tmp_path / "memory")
    resumed.reset_streaming()
    moshi_patch.load_memory(resumed, tmp_path / "memory")
    kept = snapshot(straight)
    straight.reset_streaming()
    for key, tensor in fast_weight_tensors(straight).items():
        tensor.copy_(kept[key])
    torch.testing.assert_close(hear(resumed, STEPS, 2 * STEPS), hear(straight, STEPS, 2 * STEPS), rtol=0, atol=0)
    assert_same(snapshot(resumed), snapshot(straight))
    forgetful = streaming_model(steps=0)
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


def _cut(size: float):
    def damage(path) -> None:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * size)])

    return damage


def _flip_a_bit_of_the_delta(path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _drop_the_metadata(path) -> None:
    save_file(load_file(path), path)


def _drop_a_tensor(path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut(0), "damaged or cut off"),
        (_cut(0.001), "damaged or cut off"),
        (_cut(0.5), "damaged or cut off"),
        (_cut(0.99), "damaged or cut off"),
        (lambda path: path.write_bytes(os.urandom(5000)), "damaged or cut off"),
        (_flip_a_bit_of_the_delta, "not those that were saved"),
        (_drop_a_tensor, "not those that were saved"),
        (_drop_the_metadata, "not a memory that this version can read"),
    ],
    ids=["empty", "header_cut", "half", "nearly_whole", "random", "flipped_bit", "tensor_gone", "other_safetensors"],
)
def test_a_damaged_file_is_refused_with_a_reason_and_nothing_changes(tmp_path, damage, reason):
    path = tmp_path / "memory"
    model = streaming_model()
    moshi_patch.save_memory(model, path)
    damage(path)
    hear(model, STEPS, STEPS + 4)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{path}: .*{reason}"):
        moshi_patch.load_memory(model, path)
    assert_same(snapshot(model), before)


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
    assert len({_checksum(t) for t in (zeros, one, other, zeros[:20], one[:20], torch.empty(0, dtype=dtype))}) == 6
    assert _checksum(one) == _checksum(one.clone()) == _checksum(one.view(3, 7).T.contiguous().T)
    assert _checksum(torch.cat([one, one])[21:]) == _checksum(one)  # whatever the address


WRITER = """
import sys
import moshi_patch
from tests.moshi_patch.test_memory import streaming_model
moshi_patch.install()
models = [streaming_model(rows=8, steps=steps, ttt_chunk_size=500) for steps in (3, 6)]
known = moshi_patch.fingerprint(models[0])
moshi_patch.save_memory(models[0], sys.argv[1], known)
print("saving", flush=True)
while True:
    for model in reversed(models):
        moshi_patch.save_memory(model, sys.argv[1], known)
"""


@pytest.mark.parametrize("delay", [0.0, 0.017, 0.111])
def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_file(tmp_path, delay):
    path = tmp_path / "memory"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"saving\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
    model = streaming_model(rows=8, steps=0, ttt_chunk_size=500)
    moshi_patch.load_memory(model, path)
    positions = fast_weight_tensors(model)["transformer.layers.1.gating.position"].tolist()
    assert positions in ([3] * 8, [6] * 8)
    expected = streaming_model(rows=8, steps=positions[0], ttt_chunk_size=500)
    assert_same(snapshot(model), snapshot(expected))
