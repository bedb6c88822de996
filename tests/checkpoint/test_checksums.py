"""A changed byte of a checkpoint is seen, by us and by sha256sum, wherever the checkpoint was moved to."""

import subprocess

import pytest

from finetune.common.checksums import CHECKSUMS, changed_files, read_checksums
from finetune.common.errors import ConfigError
from tests.support.checkpoint_runs import MODES, advance, arguments, tiny_run


@pytest.fixture
def folder(patched, tmp_path):
    """The folder `consolidated` of a checkpoint with adapters."""
    checkpointer, state = tiny_run(arguments(tmp_path / "run", **MODES["adapter"]))
    advance(state)
    return checkpointer.save(state) / "consolidated"


def test_what_the_trainer_saved_is_as_it_was_recorded(folder):
    recorded = read_checksums(folder)
    assert recorded.keys() == {"lora.safetensors", "training_config.json"}
    assert changed_files(folder, recorded) == []
    subprocess.run(["sha256sum", "--strict", "-c", CHECKSUMS], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("place", [0, 0.5, 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", ["lora.safetensors", "training_config.json"])
def test_one_flipped_bit_is_seen_and_its_file_named(folder, name, place):
    content = bytearray((folder / name).read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    (folder / name).write_bytes(content)
    assert changed_files(folder, read_checksums(folder)) == [name]


def test_a_missing_file_is_a_changed_one(folder):
    (folder / "training_config.json").unlink()
    assert changed_files(folder, read_checksums(folder)) == ["training_config.json"]


def test_an_abandoned_checkpoint_moves_its_config_and_keeps_its_sums(patched, tmp_path):
    args = arguments(tmp_path, **MODES["adapter"])
    checkpointer, state = tiny_run(args)
    for _ in range(2):
        advance(state)
        checkpointer.save(state)
    checkpointer.load(checkpointer.find(1), state)
    advance(state)
    checkpointer.save(state)  # step 2 again: the first one is renamed
    (aside,) = (tmp_path / "checkpoints").glob("abandoned-*")
    assert str(aside) in (aside / "consolidated" / "config.json").read_text()
    assert changed_files(aside / "consolidated", read_checksums(aside / "consolidated")) == []


def test_a_checkpoint_without_sums_has_none_and_damaged_ones_are_refused(folder):
    (folder / CHECKSUMS).write_text("no sum of anything\n")
    with pytest.raises(ConfigError, match=f"{CHECKSUMS}: is damaged"):
        read_checksums(folder)
    (folder / CHECKSUMS).write_text("")
    with pytest.raises(ConfigError, match=f"{CHECKSUMS}: is damaged"):
        read_checksums(folder)
    (folder / CHECKSUMS).unlink()
    assert read_checksums(folder) is None
