"""A folder or the name of a repository on the Hub: which of the two it is, and one line for what is neither."""

import json

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from moshi.models import LMModel, loaders

import moshi_patch
from moshi_patch.__main__ import main
from moshi_patch.repository import RepositoryError, local_repositories


def test_a_folder_serves_as_a_repository(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    stock = loaders.hf_hub_download
    with local_repositories():
        path = loaders.hf_hub_download(str(tmp_path), "config.json", revision=None)
        assert path == str(tmp_path / "config.json")
    assert loaders.hf_hub_download is stock


def test_a_file_missing_from_the_folder_is_named_with_the_folder(tmp_path):
    with local_repositories():
        with pytest.raises(EntryNotFoundError):  # what moshi expects of a repository without config.json
            loaders.hf_hub_download(str(tmp_path), "config.json")
        with (
            pytest.warns(UserWarning, match=r"no config\.json"),
            pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*model\.safetensors"),
        ):
            loaders.CheckpointInfo.from_hf_repo(str(tmp_path))


def test_the_name_of_a_repository_still_goes_to_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(loaders, "hf_hub_download", lambda *args, **kwargs: asked.append((args, kwargs)))
    with local_repositories():
        loaders.hf_hub_download("some/repository", "config.json", revision="main")
    assert asked == [(("some/repository", "config.json"), {"revision": "main"})]


def test_a_local_folder_gives_the_model_codec_and_tokenizer_in_python_too(ttt_repo, patched):
    info = moshi_patch.load_checkpoint_info(ttt_repo)
    model = info.get_moshi(device="cpu", dtype=torch.float32)
    assert isinstance(model, LMModel)
    assert len(moshi_patch.ttt_gatings(model)) == 2
    assert info.get_mimi(device="cpu").num_codebooks == 4
    assert info.get_text_tokenizer().vocab_size() == json.loads((ttt_repo / "config.json").read_text())["text_card"]


def test_files_given_beside_a_folder_replace_its_own(ttt_repo, stock_repo, patched):
    info = moshi_patch.load_checkpoint_info(
        ttt_repo, config_path=stock_repo / "config.json", moshi_weights=stock_repo / "model.safetensors"
    )
    assert moshi_patch.ttt_gatings(info.get_moshi(device="cpu")) == {}


@pytest.mark.parametrize(
    "name", ["tiny_rep", "./runs/out", "../out", "a/b/c", "/nosuch", "~/model", "", "a b/c", "ä/b"]
)
def test_what_is_no_folder_and_no_name_on_the_hub_is_one_line_and_asks_nobody(name, monkeypatch, capsys, patched):
    monkeypatch.setattr(loaders, "hf_hub_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(RepositoryError, match="no such folder, and no name on the Hub, which would be OWNER/NAME"):
        moshi_patch.load_checkpoint_info(name)


def test_a_file_in_place_of_its_folder_is_told(ttt_repo):
    with pytest.raises(RepositoryError, match=r"model\.safetensors': is a file; give the folder that it lies in"):
        moshi_patch.load_checkpoint_info(ttt_repo / "model.safetensors")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("no connection\nno cache"), "no such folder, and the Hub cannot be reached"),
        (
            RepositoryNotFoundError("401 Client Error.\n\nNot Found"),
            r"and the Hub does not give it \(RepositoryNotFoundError: 401 Client Error\. Not Found\)",
        ),
    ],
    ids=["offline", "nobody's"],
)
@pytest.mark.parametrize("program", ["moshi.run_inference", "moshi.server"])
def test_a_repository_that_cannot_be_had_is_one_line(program, error, reason, monkeypatch, capsys, patched):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr("sys.argv", ["pytest"])
    files = ["in.wav", "out.wav"] if program.endswith("inference") else ["--port", "0", "--static", "none"]
    with pytest.raises(SystemExit) as exit_:
        main([program, "--device", "cpu", "--hf-repo", "runs/out", *files])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("python -m moshi_patch: error: 'runs/out': no such folder, and ")
    with pytest.raises(RepositoryError, match=reason):
        moshi_patch.load_checkpoint_info("runs/out")


def test_a_downloaded_repository_may_lack_a_config(tmp_path, monkeypatch):
    """moshi then takes it for the first Moshi 7B, also without a connection."""

    def download(*_, **__):
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--some--repository").mkdir()
    with local_repositories(), pytest.raises(EntryNotFoundError, match="not in the cache"):
        loaders.hf_hub_download("some/repository", "config.json")
