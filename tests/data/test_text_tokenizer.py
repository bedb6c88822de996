"""Data: the tokenizer of another model is refused by every program, in one line, before weights are read."""

import json
import shutil

import pytest
import yaml
from moshi.models import loaders

from finetune.doctor.__main__ import main as doctor
from finetune.evaluation.__main__ import main as evaluate
from finetune.export.__main__ import main as export
from finetune.training.__main__ import main as train
from tests.support.text_tokenizers import write_tokenizer
from tests.support.tiny_repository import DATA
from tests.support.training_runs import settings_for


@pytest.fixture(scope="module")
def exported(ttt_repo, tmp_path_factory):
    """A model as an export leaves it: its weights, Mimi and the tokenizer in one folder. Never written to."""
    folder = shutil.copytree(ttt_repo, tmp_path_factory.mktemp("exported") / "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / config["moshi_name"]).rename(folder / "consolidated.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"moshi_name": "consolidated.safetensors"}))
    return folder


@pytest.fixture
def model(exported, tmp_path, monkeypatch, patched):
    """A copy to put another tokenizer in; a test that reads its weights fails."""
    make = loaders.get_moshi_lm

    def without_weights(filename, *args, **kwargs):
        return make(None, *args, **kwargs) if filename is None else pytest.fail("weights are read")

    monkeypatch.setattr(loaders, "get_moshi_lm", without_weights)
    return shutil.copytree(exported, tmp_path / "model")


def run(program: str, model, out) -> int:
    if program == "train":
        path = out.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(settings_for(model, out)))
        return train([str(path)])
    if program == "evaluate":
        return evaluate([f"--checkpoint_dir={model}", f"--data.eval_data={DATA}/eval.jsonl", f"--out_dir={out}"])
    return export([str(model), str(out)]) if program == "export" else doctor([str(model)])


@pytest.mark.parametrize("pieces", [40, 300])
@pytest.mark.parametrize("program", ["train", "evaluate", "export", "doctor"])
def test_a_tokenizer_of_another_size_is_refused(model, tmp_path, capsys, program, pieces):
    write_tokenizer(model / "tokenizer.model", pieces)
    assert run(program, model, tmp_path / "out") != 0
    out, err = capsys.readouterr()
    (line,) = [line for line in (out + err).splitlines() if "pieces" in line]
    assert f"{model}/tokenizer.model': has {pieces} pieces, and the model text_card=61" in line
    assert program == "evaluate" or not (tmp_path / "out").exists()
    assert "Traceback" not in err


@pytest.mark.parametrize("program", ["train", "evaluate", "export", "doctor"])
def test_a_tokenizer_with_a_word_as_padding_is_refused(model, tmp_path, capsys, program):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"existing_text_padding_id": 60}))
    assert run(program, model, tmp_path / "out") != 0
    out, err = capsys.readouterr()
    assert "of words at id 60, which the model reads as padding (existing_text_padding_id)" in out + err
