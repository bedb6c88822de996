"""From the command line: train, be refused, move aside, and stream what was saved through moshi's own program."""

import json

import pytest
import sphn

from tests.support.tiny_repository import DATA, ROOT, stream_speech
from tests.support.training_runs import Program

pytestmark = pytest.mark.slow

MODES = {
    "adapters": ["--full_finetuning=false", "--lora.enable", "--lora.rank=4", "--save_adapters"],
    "merged": ["--full_finetuning=false", "--lora.enable", "--lora.rank=4"],
    "full": [],
}


@pytest.fixture
def repo(stock_repo):
    return stock_repo


@pytest.fixture
def train(repo, tmp_path, capsys, caplog, monkeypatch, patched):
    """Runs `train.py example/tiny_ttt.yaml` for three steps in `tmp_path / "run"`."""
    monkeypatch.chdir(ROOT)
    base = {"moshi": "model.safetensors", "mimi": "mimi.safetensors", "tokenizer": "tokenizer.model"}
    paths = [f"--moshi_paths.{name}_path={repo / file}" for name, file in (base | {"config": "config.json"}).items()]
    fixed = [*paths, f"--run_dir={tmp_path / 'run'}", "--max_steps=3", "--do_eval=false", "--optim.pct_start=0.5"]
    program = Program(capsys, caplog)
    return lambda *options: program("example/tiny_ttt.yaml", *fixed, *options)


@pytest.mark.parametrize("mode", MODES)
def test_a_trained_checkpoint_streams_through_run_inference(train, repo, tmp_path, mode):
    trained = train(*MODES[mode])
    assert trained.returncode == 0, trained.stderr
    saved = tmp_path / "run" / "checkpoints" / "checkpoint_000003" / "consolidated"
    config = json.loads((saved / "config.json").read_text())
    assert config["ttt_enabled"]
    assert config["ttt_chunk_size"] == 16
    assert config["lora"] == (mode == "adapters")
    options = ["--hf-repo", repo, "--config", saved / "config.json"]
    if mode != "adapters":
        options += ["--moshi-weight", saved / "consolidated.safetensors"]
    assert stream_speech(tmp_path / "out.wav", *options) > 10


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--ttt.layers=[99]"], "ttt.layers=[99]"),
        (["--ttt.layers=[1,"], "ttt.layers='[1,'"),
        (["--ttt.chunk_size=150"], "duration_sec=12"),
        (["--nosuch.key=1"], "nosuch"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_settings_are_one_line_and_leave_the_run_directory_free(train, tmp_path, options, named):
    refused = train(*options)
    assert refused.returncode != 0
    assert named in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run" / "args.yaml").exists()


def test_a_run_moved_aside_serves_its_own_adapters_and_a_refused_resume_changes_no_file(train, tmp_path):
    assert train(*MODES["adapters"]).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for options in (["--resume=999"], ["--resume", "--ttt.chunk_size=8"]):
        refused = train(*MODES["adapters"], *options)
        assert refused.returncode != 0
        assert "Traceback" not in refused.stderr
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert train(*MODES["adapters"], "--overwrite_run_dir").returncode == 0
    (aside,) = tmp_path.glob("run.*")
    for run in (aside, tmp_path / "run"):
        saved = run / "checkpoints" / "checkpoint_000003" / "consolidated"
        config = json.loads((saved / "config.json").read_text())
        assert config["lora_name"] == f"file://{saved / 'lora.safetensors'}"


def test_evaluation_of_nothing_is_an_error_not_a_loss_of_zero(train, tmp_path):
    sphn.write_wav(str(tmp_path / "mono.wav"), sphn.read(str(DATA / "sister.wav"))[0][0], 24_000)
    (tmp_path / "mono.json").write_text((DATA / "sister.json").read_text())
    (tmp_path / "eval.jsonl").write_text('{"path": "mono.wav", "duration": 11.6}\n')
    refused = train("--do_eval=true", f"--data.eval_data={tmp_path / 'eval.jsonl'}")
    assert refused.returncode != 0
    assert "1 of 1 items are broken" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_list_that_names_missing_files_stops_the_run_before_its_first_step(train, tmp_path):
    lines = (DATA / "train.jsonl").read_text().replace('"path": "', f'"path": "{DATA}/')
    (tmp_path / "train.jsonl").write_text(lines + '{"path": "missing.wav", "duration": 12.0}\n')
    refused = train(f"--data.train_data={tmp_path / 'train.jsonl'}")
    assert refused.returncode != 0
    assert "1 of 3 items are broken" in refused.stderr
    assert "missing.wav" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_embeddings_without_adapters_stay_frozen_as_the_warning_says(train):
    trained = train("--full_finetuning=false", "--lora.ft_embed")
    assert trained.returncode == 0, trained.stderr
    assert "has no effect without lora.enable" in trained.stderr
    (table,) = [part for part in trained.stderr.split("Trainable parameters:") if "(frozen)" in part]
    assert "embeddings" not in table.split("(frozen)")[0]
