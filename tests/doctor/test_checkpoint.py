"""The doctor recognises what is wrong with a machine or a checkpoint, names it, and says what to do."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.common.checksums import CHECKSUMS, write_checksums
from finetune.doctor.__main__ import main
from finetune.doctor.finding import FAILED, OK, WARNING
from tests.support.checkpoint_runs import MODES, advance, arguments, tiny_run
from tests.support.loading import KEYS, save
from tests.support.models import tiny_model

pytestmark = pytest.mark.slow

W_TARGET, CONV = KEYS[0], KEYS[1]
LAYERS = [f"TTT layer {layer}" for layer in (1, 3)]


@pytest.fixture(autouse=True)
def _patched(patched):
    """For the models that are saved here."""


@pytest.fixture
def saved(tmp_path):
    """Trains a tiny model in one of `MODES` and returns the folder of its checkpoint."""

    def train(mode: str = "full", **settings) -> Path:
        base = save(tiny_model(torch.float32).state_dict(), tmp_path / "base.safetensors")
        paths = {"hf_repo_id": None, "moshi_path": str(base)}
        args = arguments(tmp_path / "run", moshi_paths=paths, **(MODES[mode] | settings))
        checkpointer, state = tiny_run(args)
        advance(state, 2)
        return checkpointer.save(state)

    return train


@pytest.fixture
def doctor(capsys):
    """Runs the doctor; returns its exit code and the checks by name and status, from `--json`."""

    def run(*argv) -> tuple[int, dict[str, dict]]:
        capsys.readouterr()
        code = main([*map(str, argv), "--json"])
        content = json.loads(capsys.readouterr().out)
        assert content["ok"] == (code == 0)
        assert (code == 1) == any(check["status"] == FAILED for check in content["checks"])
        checks = {}
        for check in content["checks"]:
            name = f"{check['status']} {check['name']}"
            checks[name] = check | {"value": check["value"] + checks.get(name, {"value": ""})["value"]}
        return code, checks

    return run


def rewrite(folder: Path, change, sums: bool = True) -> None:
    """Changes the weights in `folder`, and their checksum as well, as a faulty program would."""
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    if sums:
        write_checksums(folder, [path.name, "training_config.json"])


def flip(path: Path, name: str, bit: int) -> None:
    """Flips one bit of the first value, little-endian, of a tensor in a safetensors file."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    begin = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[begin + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_the_environment_of_these_tests_is_fit(doctor):
    code, checks = doctor()
    assert code == 0
    assert {"ok python", "ok moshi", "ok packages", "ok patch"} <= checks.keys()
    assert {name.split(" ", 1)[1] for name in checks} >= {"torch", "memory", "disk"}
    assert checks["ok moshi"]["details"]["version"].startswith("0.2.13")


@pytest.mark.parametrize("mode", MODES)
def test_a_sound_checkpoint_is_sound_in_all_respects(saved, doctor, mode):
    path = saved(mode)
    code, checks = doctor(path)
    assert code == 0
    respects = ("files", "training state", "checksums", "weights", "settings", "finite", "size", "model", "TTT active")
    assert {f"ok {name}" for name in (*respects, *LAYERS)} <= checks.keys()
    layer = checks["ok TTT layer 3"]["details"]
    assert layer["parameters"] == 16 * 2 + 16 * 16
    weights = load_file(next((path / "consolidated").glob("*.safetensors")))
    for key, one in layer["tensors"].items():
        name = f"transformer.layers.3.gating.{'linear_out.weight' if key == 'W_down' else f'target_generator.{key}'}"
        assert one["shape"] == list(weights[name].shape)
        assert one["dtype"] == "F32"
        assert one["norm"] == pytest.approx(weights[name].norm().item(), rel=1e-5)
    assert checks["ok TTT active"]["details"]["largest_logit_change"] > 1e-3


def test_what_is_said_without_json_is_a_line_each(saved, capsys):
    assert main([str(saved().parent.parent)]) == 0  # the run's folder: its newest checkpoint
    *lines, counts = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in (OK, WARNING, FAILED) for line in lines)
    assert any("checkpoint_000002" in line for line in lines)
    assert counts.endswith("0 FAILED")


def test_the_size_without_ttt_is_that_of_what_a_run_without_it_saves(saved, doctor, tmp_path):
    with_ttt = doctor(saved("adapter"))[1]["ok size"]["details"]
    shutil.rmtree(tmp_path / "run")
    without = saved("adapter", ttt={"enabled": False})
    checks = doctor(without)[1]
    assert "ok TTT" in checks
    assert checks["ok size"]["details"]["bytes"] == checks["ok size"]["details"]["bytes_without_ttt"]
    difference = with_ttt["bytes_without_ttt"] - checks["ok size"]["details"]["bytes"]
    assert 0 <= difference < 1000  # the names in the header
    assert with_ttt["bytes"] - with_ttt["bytes_without_ttt"] == 4 * 2 * (16 * 2 + 16 * 16 + 16 * 44)


@pytest.mark.parametrize(
    ("keep", "named"),
    [(-1, "is truncated"), (40, "is truncated, or not a safetensors file"), (0, "is empty (0 bytes)")],
    ids=["truncated", "truncated header", "empty"],
)
@pytest.mark.parametrize("sums", [True, False])
def test_truncated_and_empty_files_are_named(saved, doctor, keep, named, sums):
    file = saved() / "consolidated" / "consolidated.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    if not sums:
        (file.parent / CHECKSUMS).unlink()
    code, checks = doctor(file)
    assert code == 1
    assert named in checks["FAILED weights"]["value"]
    assert str(file) in checks["FAILED weights"]["value"]
    assert checks["FAILED weights"]["remedy"]
    assert sums == ("FAILED checksums" in checks)


@pytest.mark.parametrize("bit", [0, 12, 30], ids=["mantissa", "higher mantissa", "exponent"])
def test_a_flipped_bit_is_seen_by_the_checksum(saved, doctor, bit):
    file = saved() / "consolidated" / "consolidated.safetensors"
    flip(file, W_TARGET, bit)
    code, checks = doctor(file)
    assert code == 1
    assert "consolidated.safetensors is not what was saved" in checks["FAILED checksums"]["value"]


def test_without_checksums_only_a_flipped_exponent_is_seen_and_that_is_said(saved, doctor):
    file = saved() / "consolidated" / "consolidated.safetensors"
    (file.parent / CHECKSUMS).unlink()
    flip(file, W_TARGET, 0)
    code, checks = doctor(file)
    assert code == 0
    assert "a flipped bit in a weight cannot be seen" in checks["warning checksums"]["value"]
    flip(file, W_TARGET, 30)
    code, checks = doctor(file)
    assert code == 1
    assert W_TARGET in checks["FAILED finite"]["value"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
def test_values_that_no_training_gives_are_named(saved, doctor, value):
    path = saved()
    rewrite(path / "consolidated", lambda weights: weights["text_emb.weight"].view(-1)[7:8].fill_(value))
    code, checks = doctor(path)
    assert code == 1
    assert "text_emb.weight" in checks["FAILED finite"]["value"]
    rewrite(path / "consolidated", lambda weights: weights[W_TARGET].fill_(value))
    assert W_TARGET in doctor(path)[1]["FAILED finite"]["value"]  # whose norm is in the JSON
    assert "warning model" in checks  # not loaded


def test_a_missing_key_is_named(saved, doctor):
    path = saved()
    rewrite(path / "consolidated", lambda weights: weights.pop(CONV))
    code, checks = doctor(path)
    assert code == 1
    assert f"1 tensor missing: {CONV}" in checks["FAILED settings"]["value"]


def test_target_generators_in_the_wrong_layer_are_named(saved, doctor):
    path = saved()

    def move(weights):
        for key in (CONV, W_TARGET):
            weights[key.replace(".1.", ".2.")] = weights.pop(key)

    rewrite(path / "consolidated", move)
    code, checks = doctor(path)
    assert code == 1
    assert "ttt_layers=[1, 3] selects layers 1, 3" in checks["FAILED settings"]["value"]
    assert "has target generators in layers 2, 3" in checks["FAILED settings"]["value"]


def test_weights_that_never_learnt_are_inactive(saved, doctor):
    path = saved()
    rewrite(path / "consolidated", lambda weights: [weights[key].zero_() for key in KEYS if "conv" in key])
    code, checks = doctor(path)
    assert code == 1
    assert "it never learnt" in checks["warning TTT layer 1"]["remedy"]
    assert checks["FAILED TTT active"]["details"]["largest_logit_change"] == 0


@pytest.mark.parametrize("name", ["config.json", "training_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"], ids=["empty", "cut", "list", "binary"])
def test_damaged_settings_are_named(saved, doctor, name, content):
    path = saved()
    (path / "consolidated" / name).write_bytes(content)
    code, checks = doctor(path)
    assert code == 1
    assert name in checks["FAILED files"]["value"]


def test_missing_files_are_named(saved, doctor, tmp_path):
    path = saved()
    shutil.rmtree(path / "training_state")
    (path / "consolidated" / "training_config.json").unlink()
    code, checks = doctor(path)
    assert code == 1  # its checksum was recorded
    assert "cannot be resumed" in checks["warning training state"]["value"]
    assert "training_config.json is not there" in checks["FAILED checksums"]["value"]
    (path / "consolidated" / "config.json").unlink()
    assert "no config.json" in doctor(path)[1]["FAILED files"]["value"]
    assert "no such file or folder" in doctor(tmp_path / "nothing")[1]["FAILED files"]["value"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "index"])
def test_a_training_state_that_cannot_be_resumed_is_named(saved, doctor, damage):
    path = saved()
    (part,) = (path / "training_state").glob("*.distcp")
    if damage == "truncated":
        part.write_bytes(part.read_bytes()[:-100])
    elif damage == "missing":
        part.unlink()
    else:
        (path / "training_state" / ".metadata").write_bytes(b"")
    code, checks = doctor(path)
    assert code == 1
    assert damage == "index" or part.name in checks["FAILED training state"]["value"]


def test_what_an_interrupted_save_left_is_no_checkpoint(saved, doctor):
    path = saved()
    path = path.rename(path.with_name(f".tmp-{path.name}"))
    assert "interrupted" in doctor(path)[1]["FAILED files"]["value"]


def test_adapters_that_were_moved_are_named_and_a_base_that_is_gone_can_be_given(saved, doctor, tmp_path):
    path = saved("adapter")
    moved = path.rename(tmp_path / "elsewhere")
    code, checks = doctor(moved)
    assert code == 0
    assert "names a file that is not there" in checks["warning config.json"]["value"]
    base = (tmp_path / "base.safetensors").rename(tmp_path / "renamed.safetensors")
    code, checks = doctor(moved)
    assert code == 1
    assert "--base" in checks["FAILED base model"]["remedy"]
    code, checks = doctor(moved, "--base", base)
    assert code == 0
    assert "ok TTT active" in checks


def test_a_device_that_is_not_there_is_named(saved, doctor, capsys):
    path = saved()
    index = torch.cuda.device_count()
    code, checks = doctor(path, "--device", f"cuda:{index}")
    assert code == 1
    assert f"there is no cuda:{index} here" in checks["FAILED model"]["value"]
    assert main([str(path), "--device", "foo"]) == 2
    assert "device='foo': must be cpu, cuda" in capsys.readouterr().err


def test_a_model_that_does_not_fit_into_memory_is_not_loaded(saved, doctor, monkeypatch):
    path = saved()
    monkeypatch.setattr("finetune.doctor.answers.available_memory", lambda: 1000)
    code, checks = doctor(path)
    assert code == 0
    assert "not loaded: it takes" in checks["warning model"]["value"]
    assert "ok TTT active" not in checks


def test_a_base_model_of_another_shape_does_not_load_and_is_named(saved, doctor, tmp_path):
    path = saved("adapter")
    other = save(tiny_model(torch.float32, dim=32).state_dict(), tmp_path / "other.safetensors")
    code, checks = doctor(path, "--base", other)
    assert code == 1
    assert "does not load" in checks["FAILED model"]["value"]
