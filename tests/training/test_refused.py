"""A run that cannot work ends in one line that names what is wrong, with exit code 2 or 1, and changes no file."""

import contextlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune.common.distributed import check_local_rank
from finetune.common.errors import ConfigError
from finetune.common.locks import FileLock
from finetune.training.__main__ import main
from tests.support.tiny_repository import DATA, ENVIRONMENT, ROOT, build_repo

pytestmark = pytest.mark.slow

NEWEST = "checkpoints/checkpoint_000004"


@pytest.fixture(autouse=True)
def _patched(patched):
    """Training installs the patch for good; here it is gone after each test."""


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A base model with TTT in the layers 1 and 3, and a run with checkpoints of the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("original")
    build_repo(folder / "repo")
    shutil.copytree(DATA, folder / "data")
    write_settings(folder)
    subprocess.run(
        [sys.executable, ROOT / "train.py", "run.yaml"], cwd=folder, env=ENVIRONMENT, check=True, capture_output=True
    )
    return folder


@pytest.fixture
def place(original, tmp_path, monkeypatch) -> Path:
    """A copy to break, made the working directory."""
    shutil.copytree(original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # it would outlive the test
    return tmp_path / "place"


def write_settings(folder: Path) -> None:
    files = {
        "moshi_path": "model.safetensors",
        "mimi_path": "mimi.safetensors",
        "tokenizer_path": "tokenizer.model",
        "config_path": "config.json",
    }
    settings = {
        "data": {"train_data": "data/train.jsonl"},
        "run_dir": "run",
        "moshi_paths": {"hf_repo_id": None} | {key: f"repo/{name}" for key, name in files.items()},
        "full_finetuning": True,
        "save_adapters": False,
        "param_dtype": "float32",
        "ttt": {"enabled": True, "layers": [1, 3], "chunk_size": 16},
        "duration_sec": 3,
        "max_steps": 4,
        "ckpt_freq": 2,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(place: Path, *words: str, exit_code: int = 2) -> str:
    """The line that `train.py run.yaml WORDS` ends with."""
    before = content(place.parent)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert main([str(place / "run.yaml"), *words], "train.py") == exit_code
    assert content(place.parent) == before
    line = errors.getvalue().splitlines()[-1]
    assert line.startswith("train.py: ")
    return line


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garble(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def empty(path: Path) -> None:
    path.write_bytes(b"")


damages = pytest.mark.parametrize("damage", [truncate, garble, empty])


@damages
@pytest.mark.parametrize(
    ("file", "named"),
    {
        "model.safetensors": "moshi_paths.moshi_path='repo/model.safetensors'",
        "mimi.safetensors": "moshi_paths.mimi_path='repo/mimi.safetensors'",
        "tokenizer.model": "moshi_paths.tokenizer_path='repo/tokenizer.model'",
        "config.json": "moshi_paths: repo/config.json: not valid JSON",
        "mimi_config.json": "moshi_paths: repo/mimi_config.json: not valid JSON",
    }.items(),
)
def test_a_damaged_file_of_the_base_model(place, file, named, damage):
    damage(place / "repo" / file)
    line = refused(place, "--run_dir=new")
    assert named in line
    assert re.search(r"[Cc]opy (it|the file|what is missing or damaged) anew", line)


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("config.json", "[1]", "repo/config.json: must hold an object, not list"),
        ("config.json", "{}", "repo/mimi.safetensors: 309 tensors are not those "),  # without a name, Mimi is the usual
        ("config.json", '{"dim": "wide"}', "repo/config.json: dim='wide': must be a whole number"),
        ("mimi_config.json", "[1]", "repo/mimi_config.json: must hold an object, not list"),
        ("mimi_config.json", "{}", "repo/mimi_config.json: seanet=None: must be an object"),
    ],
)
def test_a_configuration_that_describes_no_model(place, file, text, named):
    (place / "repo" / file).write_text(text)
    assert named in refused(place, "--run_dir=new")


@damages
@pytest.mark.parametrize(
    ("file", "named"),
    {
        "training_state/__0_0.distcp": "training_state/__0_0.distcp is not what was saved (SHA-256)",
        "training_state/.metadata": "training_state/.metadata is not what was saved (SHA-256)",
        "consolidated/training_config.json": "consolidated/training_config.json: not valid JSON",
        "consolidated/config.json": "consolidated/config.json: not valid JSON",
    }.items(),
)
def test_a_damaged_checkpoint_is_not_resumed(place, file, named, damage):
    damage(place / "run" / NEWEST / file)
    line = refused(place, "--resume")
    assert f"run/{NEWEST}/{named}" in line
    assert "--resume STEP" in line


@pytest.mark.parametrize(
    ("file", "named"),
    {
        "training_state/__0_0.distcp": "training_state/__0_0.distcp is not there",
        "training_state/.metadata": "has no training_state/.metadata and cannot be resumed; there are 2",
        "consolidated/training_config.json": "training_config.json is not there",
    }.items(),
)
def test_a_checkpoint_that_lacks_a_file_is_not_resumed_and_an_earlier_one_is(place, file, named):
    (place / "run" / NEWEST / file).unlink()
    for words in (["--resume"], ["--resume", "4"]):
        assert named in refused(place, *words)
    assert main(["run.yaml", "--resume", "2"]) == 0
    assert (place / "run" / NEWEST / file).is_file()
    assert (place / "run" / "checkpoints" / "abandoned-checkpoint_000004").is_dir()


@pytest.mark.parametrize("layers", ["[0,2]", "[1]", "[1,2,3]"])
def test_ttt_in_other_layers_than_the_base_models(place, layers):
    line = refused(place, "--run_dir=new", f"--ttt.layers={layers}")
    assert f"ttt.layers={layers.replace(',', ', ')}: " in line
    assert "has TTT weights in the layers [1, 3]; set ttt.enabled=true and ttt.layers=[1,3]" in line


@pytest.mark.parametrize("file", ["consolidated.safetensors", "config.json"])
def test_a_damaged_beginning(place, file):
    truncate(place / "run" / NEWEST / "consolidated" / file)
    assert f"run/{NEWEST}/consolidated/{file}" in refused(place, "--run_dir=new", "--init_from=run")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--run_dir=."], "the working directory"),
        (["--run_dir=.."], "the working directory"),
        (["--run_dir=data"], "data.train_data"),
        (["--run_dir=repo"], "moshi_paths.mimi_path"),
        (["--init_from=run"], "init_from"),
        ([f"--init_from=run/{NEWEST}"], "init_from"),
    ],
)
def test_nothing_that_is_in_use_is_moved_aside(place, words, named):
    line = refused(place, "--overwrite_run_dir", *words)
    assert f"overwrite_run_dir=true would move aside {named}" in line
    assert "choose another run_dir" in line


@pytest.mark.parametrize("words", [["--resume"], ["--overwrite_run_dir"], []])
@pytest.mark.parametrize("run_dir", ["run.yaml", "run.yaml/below"])
def test_a_run_dir_that_cannot_be_a_folder(place, words, run_dir):
    assert "run.yaml is a file; choose a folder" in refused(place, f"--run_dir={run_dir}", *words)


@pytest.mark.parametrize("words", [["--resume"], ["--overwrite_run_dir"], []])
def test_a_run_dir_that_links_to_nothing(place, words):
    (place / "scratch").symlink_to("not_mounted")
    line = refused(place, "--run_dir=scratch", *words)
    assert "run_dir='scratch': a link to not_mounted, which is not there" in line


def test_a_run_dir_that_cannot_be_made(place):
    line = refused(place, f"--run_dir={300 * 'x'}")
    assert "cannot be made (File name too long); choose another" in line


@pytest.mark.parametrize("words", [["--resume"], ["--overwrite_run_dir"], []])
def test_a_second_trainer_in_one_folder(place, words):
    holder = FileLock(place / "run" / ".lock", "run", "")
    holder.acquire()
    try:
        line = refused(place, *words)
    finally:
        holder.release()
    assert f"run_dir='run': in use by process {os.getpid()} on " in line
    assert "wait until it has ended, end it (kill PID), or choose another run_dir" in line
    assert main(["run.yaml", "--resume", "--max_steps=4"]) == 0, "afterwards it may"
    assert not (place / "run" / ".lock").exists()


def test_an_old_run_stays_where_it_is_until_all_that_can_refuse_the_new_one_has_been_read(place):
    (place / "data" / "train.wav").rename(place / "data" / "elsewhere.wav")
    assert "items are broken" in refused(place, "--overwrite_run_dir", exit_code=1)
    (place / "data" / "elsewhere.wav").rename(place / "data" / "train.wav")
    truncate(place / "repo" / "tokenizer.model")
    assert "tokenizer.model" in refused(place, "--overwrite_run_dir")


@pytest.mark.parametrize("words", [[], ["--do_eval", "--data.eval_data=data/eval.jsonl"]])
def test_missing_files_are_found_before_any_model_is_read(place, words):
    truncate(place / "repo" / "model.safetensors")
    name = "sister" if words else "train"
    (place / "data" / f"{name}.wav").unlink()
    line = refused(place, "--run_dir=new", *words, exit_code=1)
    assert "items are broken, more than 5%" in line
    assert f"data/{name}.wav: no such file" in line


def test_a_list_that_cannot_be_read(place):
    line = refused(place, "--run_dir=new", "--data.train_data=/proc/self/mem", exit_code=1)  # nothing lies at address 0
    assert "/proc/self/mem: cannot be read (Input/output error)" in line


@pytest.mark.parametrize(("local_rank", "gpus"), [(2, 2), (7, 1)])
def test_a_process_without_a_gpu_of_its_own(local_rank, gpus):
    with pytest.raises(ConfigError, match=f"LOCAL_RANK={local_rank}: .*--nproc-per-node {gpus}, or"):
        check_local_rank(local_rank, gpus)
    check_local_rank(gpus - 1, gpus)


def test_a_damaged_checkpoint_of_an_old_run_is_moved_aside_with_it(place, caplog):
    (place / "run" / NEWEST / "consolidated" / "config.json").write_text("{")
    assert main(["run.yaml", "--overwrite_run_dir", "--max_steps=2"]) == 0
    (aside,) = place.glob("run.2*")
    assert (aside / NEWEST).is_dir()
    assert "config.json: not valid JSON" in caplog.text
    assert [path.name for path in (place / "run" / "checkpoints").iterdir()] == ["checkpoint_000002"]


def test_the_exit_code_is_2_and_the_line_goes_to_stderr(place):
    truncate(place / "repo" / "model.safetensors")
    words = [sys.executable, ROOT / "train.py", "run.yaml", "--run_dir=new"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("train.py: moshi_paths.moshi_path='repo/model.safetensors'")
    assert "Traceback" not in done.stderr
    assert not (place / "new").exists()
