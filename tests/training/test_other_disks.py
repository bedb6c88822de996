"""Two ranks whose disks differ, as on two machines: refused, or ended, on both at once and in the same words."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.tiny_repository import DATA, build_repo
from tests.training.test_distributed import TTT, job, work

pytestmark = pytest.mark.slow


def on_two_disks(folder: Path, last: str = "sister") -> dict:
    """Settings for a list of twenty dialogues on two disks, with another `last` one on that of rank 1."""
    for rank, name in enumerate(["sister", last]):
        disk = folder / str(rank)
        disk.mkdir(parents=True)
        for path in (*DATA.glob("boat.*"), *DATA.glob("sister.*")):
            shutil.copy(path, disk)
        lines = [json.dumps({"path": f"{stem}.wav", "duration": 4.0}) for stem in [*19 * ["boat"], name]]
        (disk / "eval.jsonl").write_text("\n".join(lines))
    data = {"train_data": f"{DATA}/train.jsonl", "eval_data": "eval.jsonl"}
    return {"data": data, "do_eval": True, "disks": [str(folder / "0"), str(folder / "1")]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """A folder, and by the name of the job the reports of both ranks."""
    folder = tmp_path_factory.mktemp("runs")
    repo = build_repo(folder / "repo", ttt=False)
    gone = on_two_disks(folder / "gone")
    for path in (folder / "gone" / "1").glob("boat.*"):
        path.unlink()
    changes = {
        "gone": gone,
        "other_lines": on_two_disks(folder / "other_lines", last="boat"),
        "lost": {"loses": "sister.wav", **on_two_disks(folder / "lost")},
        "full": {"largest_file": 400_000, "do_ckpt": True, "ckpt_freq": 2},
    }
    jobs = [job(repo, folder / f"run-{name}", batch_size=1, ttt=TTT, **change) for name, change in changes.items()]
    reports = work(folder / "work", jobs)
    return folder, {name: [report[index] for report in reports] for index, name in enumerate(changes)}


def test_too_many_missing_files_on_one_rank_are_told_with_the_rank_before_the_model_is_read(runs):
    folder, reports = runs
    for report in reports["gone"]:
        assert report["error"].startswith("rank 1: eval.jsonl: 19 of 20 items are broken, more than 5%")
        assert "boat.wav: no such file" in report["error"]
        assert report["read"] == []
    assert not (folder / "run-gone").exists()


def test_other_lines_on_one_rank_are_refused_before_the_model_is_read(runs):
    folder, reports = runs
    for report in reports["other_lines"]:
        assert "eval.jsonl: rank 0 has 20 items, rank 1 has other ones; all processes must see" in report["error"]
        assert report["read"] == []
    assert not (folder / "run-other_lines").exists()


def test_a_file_that_one_rank_loses_while_the_model_is_loaded_is_named(runs):
    folder, reports = runs
    for report in reports["lost"]:
        assert "rank 0 has 20 items, rank 1 has 19 items (eval.jsonl:20: sister.wav: no such file" in report["error"]
        assert "mimi.safetensors" in report["read"]
    assert not (folder / "run-lost").exists()


def test_a_disk_that_is_full_for_rank_0_ends_all_ranks(runs):
    folder, reports = runs
    for report in reports["full"]:
        assert "checkpoint_000002: cannot be saved (SafetensorError: " in report["error"]
        assert "File too large (os error 27), with " in report["error"]
        assert "there is no other checkpoint" in report["error"]
    assert list((folder / "run-full" / "checkpoints").iterdir()) == []
