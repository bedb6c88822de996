"""The file of a memory: damaged ones are refused in one line; a full disk or a kill leaves the old one whole."""

import contextlib
import itertools
import json
import os
import signal
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moshi_patch
from moshi_patch.memory import fast_weight_tensors
from moshi_patch.memory_file import dtype_shape_checksum
from tests.support.disks import largest_file
from tests.support.memories import STEPS, assert_same, hear, snapshot, streaming_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]


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
    _write_anew(path, lambda tensors, metadata: tensors.popitem())


def _write_anew(path, change) -> None:
    """The same file, after `change(tensors, metadata)`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def _replace(name: str, content: str):
    return lambda path: _write_anew(path, lambda _, metadata: metadata.update({name: content}))


def _change_the_fingerprint(**sections):
    def change(_, metadata) -> None:
        metadata["fingerprint"] = json.dumps({**json.loads(metadata["fingerprint"]), **sections})

    return lambda path: _write_anew(path, change)


def _store_infinity(path) -> None:
    """A file that says of itself that it is whole."""

    def change(tensors, metadata) -> None:
        key = "transformer.layers.1.gating.delta"
        tensors[key][0, 0, 0] = torch.inf
        metadata["state"] = json.dumps(json.loads(metadata["state"]) | {key: dtype_shape_checksum(tensors[key])})

    _write_anew(path, change)


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
        (_replace("format", "moshi_patch memory 2"), "not a memory that this version can read"),
        (_replace("fingerprint", "[" * 200_000), "its 'fingerprint': not valid JSON .nested deeper than 64"),
        (_replace("state", "[" * 200_000), "its 'state': not valid JSON .nested deeper than 64"),
        (_replace("state", "9" * 5_000), "its 'state': not valid JSON .Exceeds the limit"),
        (_replace("state", "{"), "its 'state': not valid JSON"),
        (_replace("state", '{"a":' * 99 + "1" + "}" * 99), "its 'state': not valid JSON .nested deeper than 64"),
        (_replace("state", '["delta"]'), "its 'state': must hold an object, not list"),
        (_replace("state", "{}"), "not those that were saved"),
        (_replace("state", '{"delta": 1e999}'), "not those that were saved"),
        (_replace("fingerprint", "null"), "its 'fingerprint': must hold an object, not NoneType"),
        (_replace("fingerprint", "{}"), "the settings in its fingerprint are None"),
        (_change_the_fingerprint(settings=[1] * 9_999), r"the settings in its fingerprint are \[1, 1"),
        (_change_the_fingerprint(weights="all"), "the weights in its fingerprint are 'all'"),
        (_change_the_fingerprint(settings={"layers": 1e999}), "layers is inf in the file"),
        (_change_the_fingerprint(settings={str(i): "x" * 999 for i in range(999)}), "other settings: 0 is 'xxx"),
        (_change_the_fingerprint(weights={"a\nb": {"deep": 1}}), r"weights differ: a b .and \d+ more"),
        (_store_infinity, "delta in the file is not finite"),
        (lambda path: (path.unlink(), path.mkdir()), "no such file"),
    ],
)
def test_a_damaged_file_is_refused_with_a_reason_and_nothing_changes(tmp_path, damage, reason):
    path = tmp_path / "memory"
    model = streaming_model()
    moshi_patch.save_memory(model, path)
    damage(path)
    hear(model, STEPS, STEPS + 4)
    before = snapshot(model)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{path}: .*{reason}") as refused:
        moshi_patch.load_memory(model, path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1500
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("room", [0, 100, 12_000], ids=["none", "for_the_start", "for_half"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file_alone(tmp_path, room):
    path, model = tmp_path / "memory", streaming_model()
    moshi_patch.save_memory(model, path)
    content = path.read_bytes()
    assert len(content) > 1.5 * room
    hear(model, STEPS, STEPS + 4)
    with largest_file(room), pytest.raises(OSError, match=rf"^{path}: cannot be written \(File too large\)\.$"):
        moshi_patch.save_memory(model, path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["memory"]


def test_places_that_cannot_be_written_or_read_are_one_line(tmp_path):
    model = streaming_model()
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, reason in (
        (tmp_path / "nosuch" / "memory", "No such file or directory"),
        (tmp_path / "file" / "memory", "Not a directory"),
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / ("m" * 300), "File name too long"),
    ):
        with pytest.raises(OSError, match=rf"^{path}: cannot be written \({reason}\)\.$"):
            moshi_patch.save_memory(model, path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def save_forever(path, models: list) -> None:
    """Saves the models in turns, in a child of this process, until it is killed."""
    known = moshi_patch.fingerprint(models[0])
    moshi_patch.save_memory(models[0], path, known)
    for model in itertools.cycle(models[::-1]):
        moshi_patch.save_memory(model, path, known)


def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_file(tmp_path):
    path, long = tmp_path / "memory", {"rows": 8, "ttt_chunk_size": 500}
    models = [streaming_model(steps=steps, **long) for steps in (3, 6)]
    expected = {steps: snapshot(model) for steps, model in zip((3, 6), models, strict=True)}
    fresh, found = streaming_model(steps=0, **long), []
    for delay in (0.0, 0.01, 0.017, 0.03, 0.05, 0.111):
        path.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                save_forever(path, models)
            os._exit(1)
        while not path.exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        moshi_patch.load_memory(fresh, path)
        positions = fast_weight_tensors(fresh)["transformer.layers.1.gating.position"].tolist()
        assert_same(snapshot(fresh), expected[positions[0]])
        found.append(positions[0])
    assert set(found) <= {3, 6}
