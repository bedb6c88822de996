"""Which setting is in force, where it comes from, and what is refused before anything is loaded."""

import json

import pytest
import yaml

from finetune.common.errors import ConfigError
from finetune.evaluation.settings_in_force import parse_command_line
from finetune.settings.record import to_dict
from finetune.settings.schema import TrainArgs

TTT = {"ttt_enabled": True, "ttt_layers": [1, 3], "ttt_chunk_size": 16, "ttt_learning_rate": 0.03}


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint's files with weights that nobody reads here, and a list of data."""
    (tmp_path / "data.jsonl").write_text("")
    folder = tmp_path / "run" / "checkpoints" / "checkpoint_000500" / "consolidated"
    folder.mkdir(parents=True)
    (folder / "consolidated.safetensors").write_text("")
    (folder / "config.json").write_text(json.dumps({"dim": 64, "lora": False, **TTT}))
    training = to_dict(TrainArgs(text_padding_weight=0.25, seed=7, param_dtype="float32"))
    training["moshi_paths"] |= {"hf_repo_id": None, "mimi_path": "trained.mimi"}
    training["ttt"] |= {"chunk_size": 99}
    (folder / "training_config.json").write_text(json.dumps({"training": training}))
    return folder


def parse(checkpoint, *words, data=True):
    given = [f"--data.eval_data={checkpoint.parents[3] / 'data.jsonl'}"] if data else []
    return parse_command_line(["--checkpoint_dir", str(checkpoint.parent), *given, *words])


def config(tmp_path, **content):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return f"--config={path}"


def test_command_line_then_training_config_then_yaml_then_default(checkpoint, tmp_path):
    words = config(
        tmp_path,
        run_dir="any",
        seed=1,
        text_padding_weight=0.9,
        bootstrap_samples=11,
        max_minutes=3,
        moshi_paths={"mimi_path": "yaml.mimi"},
    )
    settings = parse(checkpoint, words, "--seed", "3", "--max_minutes=4.5")
    args, sources = settings.args, settings.sources
    assert (args.seed, sources["seed"]) == (3, "command line")
    assert (args.max_minutes, sources["max_minutes"]) == (4.5, "command line")
    assert (args.text_padding_weight, sources["text_padding_weight"]) == (0.25, "training_config.json")
    assert (args.param_dtype, sources["param_dtype"]) == ("float32", "training_config.json")
    assert (args.moshi_paths.mimi_path, args.moshi_paths.hf_repo_id) == ("trained.mimi", None)
    assert (args.bootstrap_samples, sources["bootstrap_samples"]) == (11, str(tmp_path / "config.yaml"))
    assert (args.eval_batch_size, sources["eval_batch_size"]) == (1, "default")
    assert (args.ttt.layers, args.ttt.chunk_size, sources["ttt.chunk_size"]) == ([1, 3], 16, "config.json")
    assert settings.table()["seed"] == {"value": 3, "source": "command line"}
    assert settings.warnings == []


def test_training_without_evaluation_leaves_the_data_to_the_yaml(checkpoint, tmp_path):
    words = config(tmp_path, run_dir="any", data={"eval_data": str(tmp_path / "data.jsonl")})
    settings = parse(checkpoint, words, data=False)
    assert settings.args.data.eval_data == str(tmp_path / "data.jsonl")
    assert settings.sources["data.eval_data"].endswith("config.yaml")


def test_an_old_checkpoint_works_with_the_yaml_of_its_training(checkpoint, tmp_path):
    (checkpoint / "training_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no training_config.json.*--config FILE"):
        parse(checkpoint)
    words = config(tmp_path, run_dir="any", param_dtype="float16", moshi_paths={"mimi_path": "yaml.mimi"})
    settings = parse(checkpoint, words)
    assert settings.args.moshi_paths.mimi_path == "yaml.mimi"
    assert settings.args.param_dtype == "float16"
    assert settings.args.ttt.learning_rate == 0.03
    assert parse(checkpoint, "--moshi_paths.hf_repo_id=folder").args.moshi_paths.hf_repo_id == "folder"


def test_how_fast_ttt_learns_may_be_changed_with_a_warning(checkpoint):
    settings = parse(checkpoint, "--ttt.learning_rate=0.5", "--ttt.chunk_size=8")
    assert (settings.args.ttt.learning_rate, settings.args.ttt.chunk_size) == (0.5, 8)
    assert settings.sources["ttt.learning_rate"] == "command line"
    assert len(settings.warnings) == 2
    assert any("ttt.learning_rate=0.5" in warning and "0.03" in warning for warning in settings.warnings)
    assert parse(checkpoint, "--ttt.learning_rate=0.03", "--ttt.layers=[1,3]").warnings == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--ttt.layers=[1,2]"], r"ttt.layers=\[1, 2\].*trained with \[1, 3\]"),
        (["--ttt.enabled=false"], r"ttt.enabled=False.*trained with True"),
        (["--ttt.target=hidden_states"], r"ttt.target='hidden_states'.*'token_embeddings'"),
        (["--ttt.conv_kernel_size=5"], r"ttt.conv_kernel_size=5.*trained with 2"),
        (["--lora.enable"], r"lora.enable=True.*trained with False"),
        (["--ttt.chunk_size=0"], r"ttt.chunk_size=0"),
        (["--eval_type=all"], r"eval_type='all': must be one of standard, paper, both"),
        (["--eval_type=paper"], r"paper\..*no data set"),
        (["--nosuch=1"], r"nosuch='1': unknown key"),
        (["--optim.lr=1"], r"optim.lr='1': unknown key"),
        (["--data.eval_data=missing.jsonl"], r"data.eval_data='missing.jsonl'.*no such file"),
        (["--data.eval_data=,"], r"data.eval_data=','.*is required"),
        (["--max_minutes=0"], r"max_minutes=0.0: must be"),
        (["--eval_batch_size=0"], r"eval_batch_size=0: must be"),
        (["--param_dtype=int8"], r"param_dtype='int8': must be one of"),
        (["--seed=-1"], r"seed=-1: must be"),
        (["--text_padding_weight=nan"], r"text_padding_weight=nan: must be"),
        (["--config"], r"config: needs a value"),
        (["--config=missing.yaml"], r"config='missing.yaml': no such file"),
        (["surplus"], r"'surplus': not understood"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_settings_name_the_key_and_what_is_allowed(checkpoint, words, named):
    with pytest.raises(ConfigError, match=named):
        parse(checkpoint, *words)


def test_a_misspelt_key_in_the_yaml_is_refused(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="max_minute=3: unknown key"):
        parse(checkpoint, config(tmp_path, run_dir="any", max_minute=3))
    with pytest.raises(ConfigError, match=r"ttt.chunksize=3: unknown key"):
        parse(checkpoint, config(tmp_path, run_dir="any", ttt={"chunksize": 3}))


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint_dir: is required"):
        parse_command_line([])
    with pytest.raises(ConfigError, match="no finished checkpoint"):
        parse_command_line([f"--checkpoint_dir={tmp_path}"])


def test_an_exported_folder_brings_its_own_files(checkpoint):
    for name in ("model.safetensors", "mimi.safetensors", "tokenizer.model"):
        (checkpoint / name).write_text("")
    names = {"moshi_name": "model.safetensors", "mimi_name": "mimi.safetensors", "tokenizer_name": "tokenizer.model"}
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | names))
    settings = parse(checkpoint)
    assert settings.args.moshi_paths.mimi_path == str(checkpoint / "mimi.safetensors")
    assert settings.sources["moshi_paths.mimi_path"] == "the checkpoint's own folder"
    assert settings.args.text_padding_weight == 0.25
    (checkpoint / "training_config.json").unlink()
    assert parse(checkpoint).args.moshi_paths.tokenizer_path == str(checkpoint / "tokenizer.model")
