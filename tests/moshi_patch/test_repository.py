"""What a config.json names is looked for in its own repository: nothing else of this machine is read or served."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import LocalEntryNotFoundError
from moshi.models import loaders
from safetensors.torch import save_file

import moshi_patch
from moshi_patch import RepositoryError, load_checkpoint_info, named_file
from moshi_patch.__main__ import main
from tests.support.loading import LORA, with_lora

NAMES = ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name")
OUTSIDE = ("../secret", "sub/../../secret", "/etc/hostname", "..\\secret", "", "a\0b", "a\nb", "x" * 2000, "sub/")


@pytest.fixture
def repo(stock_repo, tmp_path):
    """A copy to change, in a folder with a secret."""
    (tmp_path / "secret").write_text("a key")
    return Path(shutil.copytree(stock_repo, tmp_path / "repo"))


def change(repo: Path, **keys) -> None:
    path = repo / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    with pytest.raises(RepositoryError, match="must be the name of a file in the repository itself"):
        named_file(tmp_path, tmp_path, name)
    with pytest.raises(RepositoryError):  # of a repository on the Hub
        named_file("someone/model", tmp_path, name)


@pytest.mark.parametrize("key", NAMES)
def test_every_key_that_names_a_file_is_held_to_it(repo, key):
    change(repo, **{key: "../secret"})
    with pytest.raises(RepositoryError, match=rf"config\.json: {key}='\.\./secret'"):
        load_checkpoint_info(repo)


@pytest.mark.parametrize("key", NAMES)
def test_a_link_out_of_the_folder_is_refused(repo, key):
    (repo / "link").symlink_to(repo.parent / "secret")
    change(repo, **{key: "link"})
    with pytest.raises(RepositoryError, match="is a link out of"):
        load_checkpoint_info(repo)


def test_a_file_is_found_in_a_subfolder_and_through_a_link_within(repo):
    (repo / "sub").mkdir()
    (repo / "tokenizer.model").rename(repo / "sub" / "tokenizer.model")
    (repo / "link").symlink_to("sub/tokenizer.model")
    for name in ("sub/tokenizer.model", "link"):
        change(repo, tokenizer_name=name)
        assert load_checkpoint_info(repo).get_text_tokenizer().vocab_size() > 0


def test_the_hubs_cache_links_to_its_own_contents_and_to_nothing_else(repo, tmp_path):
    snapshot = tmp_path / "cache" / "snapshots" / "1f3a"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for number, file in enumerate(repo.iterdir()):
        shutil.copy(file, tmp_path / "cache" / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_checkpoint_info(snapshot).moshi_weights == snapshot / "model.safetensors"
    (snapshot / "tokenizer.model").unlink()
    (snapshot / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(RepositoryError, match="is a link out of"):
        load_checkpoint_info(snapshot)


def test_a_folder_that_is_itself_a_link_is_a_repository_like_any_other(repo, tmp_path):
    (tmp_path / "short").symlink_to(repo)
    assert load_checkpoint_info(tmp_path / "short").mimi_weights.is_file()


@pytest.mark.parametrize("name", ["hf://x", "hf://owner/name", "hf://owner/../x", "hf://owner/name/../../x"])
def test_a_name_on_the_hub_is_of_a_file_of_a_repository(tmp_path, name):
    with pytest.raises(RepositoryError, match="hf://owner/name/file"):
        named_file(tmp_path, tmp_path, name)
    assert named_file(tmp_path, tmp_path, "hf://owner/name/sub/file.bin") == "hf://owner/name/sub/file.bin"


def test_a_repository_on_the_hub_names_no_file_of_this_machine(repo, monkeypatch, tmp_path):
    """The Hub cannot be reached here: what it would send is that folder."""
    monkeypatch.setattr(loaders, "hf_hub_download", lambda _, name, **__: str(repo / name))
    assert load_checkpoint_info("someone/model").tokenizer == repo / "tokenizer.model"
    change(repo, tokenizer_name=f"file://{tmp_path / 'secret'}")
    with pytest.raises(LocalEntryNotFoundError, match=r"has to lie beside its config\.json"):
        load_checkpoint_info("someone/model")


@pytest.mark.parametrize("place", ["folder", "Hub"])
def test_a_configuration_of_no_mimi_is_refused_before_it_is_built(repo, monkeypatch, place):
    monkeypatch.setattr(loaders, "hf_hub_download", lambda _, name, **__: str(repo / name))
    (repo / "mimi_config.json").write_bytes(b"[" * 200_000)
    with pytest.raises(RepositoryError, match=r"mimi_config\.json: not valid JSON"):
        load_checkpoint_info(repo if place == "folder" else "someone/model")


@pytest.mark.usefixtures("patched")
def test_adapters_that_were_copied_with_their_config_are_served_not_those_they_were_copied_from(repo, tmp_path):
    """A training names its adapters by their path, as stock moshi needs it."""
    base = load_checkpoint_info(repo).get_moshi(dtype=torch.float32)
    adapted = {name: value for name, value in with_lora(base).state_dict().items() if "lora_" in name}
    original, copied = tmp_path / "original", tmp_path / "copied"
    original.mkdir()
    save_file(adapted, original / "lora.safetensors")
    config = json.loads((repo / "config.json").read_text()) | LORA
    config["lora_name"] = f"file://{original / 'lora.safetensors'}"
    (original / "config.json").write_text(json.dumps(config))
    shutil.copytree(original, copied)
    save_file({name: 2 * value for name, value in adapted.items()}, copied / "lora.safetensors")
    info = load_checkpoint_info(repo, config_path=copied / "config.json")
    assert info.lora_weights == copied / "lora.safetensors"
    name = "text_linear.lora_A.weight"
    assert torch.equal(info.get_moshi(dtype=torch.float32, fuse_lora=False).state_dict()[name], 2 * adapted[name])
    shutil.rmtree(original)
    assert load_checkpoint_info(repo, config_path=copied / "config.json").lora_weights == copied / "lora.safetensors"


def test_a_file_that_is_given_needs_no_name(repo, tmp_path):
    change(repo, tokenizer_name="../secret")
    mine = shutil.copy(repo / "tokenizer.model", tmp_path)
    assert load_checkpoint_info(repo, tokenizer=mine).tokenizer == Path(mine)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 200_000, "nested deeper"),
        (b'{"num_layers": 1000000000}', "whole number from 1 to 256"),
        (b"5", "object"),
    ],
    ids=["brackets", "layers", "number"],
)
def test_moshis_programs_refuse_a_config_of_no_model_in_one_line(repo, capsys, monkeypatch, content, said):
    monkeypatch.setattr("sys.argv", ["pytest"])
    (repo / "config.json").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        main(["moshi.run_inference", "--device", "cpu", "--hf-repo", str(repo), "in.wav", "out.wav"])
    moshi_patch.uninstall()
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said in line
    assert "config.json" in line
