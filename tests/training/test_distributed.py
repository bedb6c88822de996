"""Two ranks train as one does on the same global batch: sharded, from weights that only one of them read."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sphn
import torch
import yaml
from moshi.models import loaders
from safetensors.torch import save_file

import moshi_patch
from finetune.settings.record import from_dict
from finetune.training.trainer import train
from tests.support.processes import run_processes
from tests.support.tiny_repository import DATA, ENVIRONMENT, ROOT, build_repo

pytestmark = pytest.mark.slow

WORLD, STEPS = 2, 5
TTT = {"enabled": True, "layers": [1, 3], "chunk_size": 16, "learning_rate": 1e-2}
CASES = {
    "lora+ttt": {"lora": {"enable": True, "rank": 4}, "ttt": TTT, "do_eval": True},
    "full+ttt+microbatches": {"full_finetuning": True, "ttt": TTT, "save_adapters": False, "num_microbatches": 2},
    "full+frozen_w_down": {"full_finetuning": True, "ttt": TTT | {"train_w_down": False}, "save_adapters": False},
    "ttt_alone": {"ttt": TTT},
    "two_stages": {"lora": {"enable": True, "rank": 4}, "ttt": TTT | {"first_steps": 2, "stock_lr": 1e-3}},
    "conditioned": {"lora": {"enable": True, "rank": 4, "ft_embed": True}, "ttt": TTT},
}
CONDITIONED = {
    "conditioners": {
        "mood": {
            "type": "lut",
            "lut": {"n_bins": 8, "dim": 6, "tokenizer": "noop", "possible_values": ["good", "bad"]},
        }
    },
    "fuser": {"sum": ["mood"], "cross": [], "prepend": []},
}
"""Added to the configuration of a model, as in Hibiki's."""
LORA = {"enable": True, "rank": 4}
TWO_STAGES = TTT | {"first_steps": 4, "stock_lr": 1e-3}
BFLOAT16 = {"lora": LORA, "ttt": TWO_STAGES, "param_dtype": "bfloat16", "do_ckpt": True, "ckpt_freq": 3}
BACK = {"resume": True, "resume_step": 3}
SKIPS = {"lora": {"enable": True, "rank": 4}, "ttt": TTT, "poison_step": 2}


def job(repo: Path, run_dir: Path, *, batch_size: int, **changes) -> dict:
    return {
        "data": {"train_data": f"{DATA}/train.jsonl", "eval_data": f"{DATA}/eval.jsonl", "shuffle": True},
        "run_dir": str(run_dir),
        "moshi_paths": {"hf_repo_id": str(repo)},
        "duration_sec": 4,
        "batch_size": batch_size,
        "max_steps": STEPS,
        "do_ckpt": False,
        "param_dtype": "float32",
        "optim": {"lr": 3e-3},
        **changes,
    }


def with_conditions(folder: Path, stock: Path) -> dict:
    """Settings for a model that takes a text condition, and dialogues that have one."""
    shutil.copytree(stock, folder)
    config = json.loads((stock / "config.json").read_text()) | CONDITIONED
    (folder / "config.json").write_text(json.dumps(config))
    names = {"moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lm_gen_config"}
    kwargs = copy.deepcopy({key: value for key, value in config.items() if key not in names})
    torch.manual_seed(0)
    model = loaders.get_moshi_lm(None, kwargs, dtype=torch.float32)
    save_file(model.state_dict(), folder / "model.safetensors")
    lines = []
    for name, mood in (("sister", "good"), ("boat", "bad")):
        shutil.copy(DATA / f"{name}.wav", folder)
        transcript = json.loads((DATA / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(transcript | {"text_conditions": {"mood": mood}}))
        lines.append(json.dumps({"path": f"{name}.wav", "duration": 11.0}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return {"moshi_paths": {"hf_repo_id": str(folder)}, "data": {"train_data": str(folder / "train.jsonl")}}


def with_broken_files(folder: Path) -> dict:
    """Settings for twenty dialogues: each rank reads a broken one in the second step, 5 % alone, 10 % together."""
    folder.mkdir()
    for name in ("mono0", "mono1"):
        sphn.write_wav(str(folder / f"{name}.wav"), sphn.read(str(DATA / "boat.wav"))[0][0], 24_000)
        shutil.copy(DATA / "boat.json", folder / f"{name}.json")
    paths = 2 * [DATA / "boat.wav"] + [folder / "mono0.wav", folder / "mono1.wav"] + 16 * [DATA / "boat.wav"]
    lines = [json.dumps({"path": str(path), "duration": 4.0}) for path in paths]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return {"data": {"train_data": str(folder / "train.jsonl")}}


def damaged_copy(repo: Path, folder: Path) -> Path:
    shutil.copytree(repo, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    return folder


def work(folder: Path, jobs: list[dict]) -> list[list[dict]]:
    """Does `jobs` on two ranks. The reports of each rank, one per job."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    words = [[folder, rank, WORLD, folder / "jobs.json"] for rank in range(WORLD)]
    run_processes("tests.support.training_worker", words, folder, seconds=300)
    return [json.loads((folder / f"report{rank}.json").read_text()) for rank in range(WORLD)]


def metrics(run_dir: Path, kind: str = "train") -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"metrics.{kind}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[list[dict]]]:
    """All cases once, on two ranks and on one with twice the batch; with the reports of the two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    repo = build_repo(folder / "repo", ttt=False)
    moshi_patch.install()
    cases = CASES | {"conditioned": CASES["conditioned"] | with_conditions(folder / "conditioned", repo)}
    two = [job(repo, folder / f"two-{name}", batch_size=1, **case) for name, case in cases.items()]
    resumed = job(repo, folder / "resumed", batch_size=1, **BFLOAT16)
    two += [resumed, resumed | {"checkpoint": BACK}, job(repo, folder / "skips", batch_size=1, **SKIPS)]
    two += [
        job(repo, folder / "stopped", batch_size=1, ttt=TTT, do_ckpt=True, stopped_in=3),
        job(repo, folder / "controlled", batch_size=1, ttt=TTT, lora=LORA, do_eval=True, control=True, max_steps=2),
    ]
    two += [
        job(repo, folder / "broken", batch_size=1, ttt=TTT, **with_broken_files(folder / "files")),
        job(repo, folder / "skips", batch_size=1, **CASES["ttt_alone"]),  # refused: there is a run
        job(repo, folder / "refused", batch_size=1, unreadable="mimi.safetensors", **CASES["ttt_alone"]),
        job(damaged_copy(repo, folder / "damaged"), folder / "refused", batch_size=1, **CASES["ttt_alone"]),
    ]
    reports = work(folder / "work", two)
    for name, case in cases.items():
        train(from_dict(job(repo, folder / f"one-{name}", batch_size=2, **case)))
    shutil.copytree(folder / "resumed", folder / "resumed_by_one")
    alone = {"run_dir": str(folder / "resumed_by_one"), "batch_size": 2, "checkpoint": BACK}
    train(from_dict(resumed | alone))
    moshi_patch.uninstall()
    return folder, reports


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_on_the_same_global_batch(runs, case):
    folder, _ = runs
    one, two = metrics(folder / f"one-{case}"), metrics(folder / f"two-{case}")
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    for single, double in zip(one, two, strict=True):
        for name in ("loss", "text_loss", "audio_loss", "grad_norm"):
            assert double[name] == pytest.approx(single[name], abs=1e-5)
        for name in (name for name in single if name.endswith(("conv_norm", "W_target_norm"))):
            assert double[name] == pytest.approx(single[name], rel=1e-5)
    assert abs(two[-1]["loss"] - two[0]["loss"]) > 0.1  # five steps that did something


def test_two_ranks_evaluate_as_one(runs):
    evaluations = [metrics(runs[0] / f"{number}-lora+ttt", "eval")[0] for number in ("one", "two")]
    assert evaluations[0].keys() == evaluations[1].keys()
    for name in evaluations[0].keys() - {"time"}:
        size = evaluations[0]["loss" if name.startswith("ttt_reliance") else name]  # a difference of two losses
        assert evaluations[1][name] == pytest.approx(evaluations[0][name], abs=1e-5 * size)


def test_rank_0_alone_reads_the_weights_and_nothing_stays_on_meta(runs):
    _, reports = runs
    for case, (first, second) in zip(CASES, zip(*reports, strict=True), strict=False):
        assert first["meta"] == second["meta"] == [], case
        assert first["read"] == ["model.safetensors", "mimi.safetensors"], case
        assert second["read"] == ["mimi.safetensors"], case
        assert first["wrapped"] == second["wrapped"] == "FullyShardedDataParallel"
        assert 0.8 < first["held"] / second["held"] < 1.25, case  # each has its share


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_the_threads_of_the_process_group_end_with_the_run(runs):
    _, reports = runs
    for report in reports:
        for case, job in list(zip(CASES, report, strict=False))[1:]:  # the first run starts threads that stay, of torch
            before, inside, after = job["threads"]
            assert before == after < inside, case


def test_a_gradient_that_is_bad_on_one_rank_is_skipped_by_both(runs):
    rows = metrics(runs[0] / "skips")
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0, 0]
    assert rows[1]["loss"] is None
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_signal_to_one_rank_stops_all_after_the_same_step_saved_by_all(runs):
    folder, reports = runs
    first, second = (report[-6] for report in reports)
    assert (first["exit_code"], second["exit_code"]) == (143, 143)
    assert first["error"].startswith("stopped by SIGTERM at step 3, saved as ")
    assert "--nproc-per-node 2 " in first["error"], "how to go on, on as many processes"
    assert [row["step"] for row in metrics(folder / "stopped")] == [1, 2, 3]
    [checkpoint] = (folder / "stopped" / "checkpoints").iterdir()
    assert checkpoint.name == "checkpoint_000003"
    assert len(list((checkpoint / "training_state").glob("*.distcp"))) == WORLD


def test_two_ranks_train_a_control_too(runs):
    run = runs[0] / "controlled"
    assert metrics(run)[0]["loss"] == metrics(run / "control")[0]["loss"]
    [ours], [theirs] = metrics(run, "eval"), metrics(run / "control", "eval")
    assert theirs["control_difference"] == pytest.approx(ours["loss"] - theirs["loss"], abs=1e-5)


def test_in_the_first_steps_stock_weights_wait_on_two_ranks_too(runs):
    rates = [row["lr/adapters"] for row in metrics(runs[0] / "two-two_stages")]
    assert rates[:2] == [0, 0]
    assert all(rates[2:])


def test_an_error_on_one_rank_reaches_every_rank(runs):
    folder, reports = runs
    for exists, unreadable, damaged in (report[-3:] for report in reports):
        assert "exists already" in exists["error"]
        assert "moshi_paths.mimi_path=" in unreadable["error"]  # on rank 1 alone
        assert "moshi_paths.moshi_path=" in damaged["error"]  # which rank 0 alone reads
    assert not (folder / "refused").exists()


def test_broken_files_of_all_ranks_count_together_and_stop_all_at_once(runs):
    folder, reports = runs
    for rank, report in enumerate(reports):
        assert "2 of 20 items are broken" in report[-4]["error"], rank
    assert [row["step"] for row in metrics(folder / "broken")] == [1]


def test_bfloat16_continues_exactly_on_two_ranks_and_on_one(runs):
    folder, _ = runs
    two, one = metrics(folder / "resumed"), metrics(folder / "resumed_by_one")
    assert [row["step"] for row in two] == [row["step"] for row in one] == list(range(1, STEPS + 1))
    straight = metrics(folder / "resumed", "train.replaced")
    assert [row["step"] for row in straight] == [4, 5]
    assert [row["loss"] for row in two[3:]] == [row["loss"] for row in straight]
    assert one[3]["loss"] == pytest.approx(straight[0]["loss"], rel=1e-6)  # then bfloat16 gradients are summed anew
    assert one[4]["loss"] == pytest.approx(straight[1]["loss"], rel=1e-3)


def test_torchrun_starts_it(runs, tmp_path):
    file = tmp_path / "run.yaml"
    settings = job(runs[0] / "repo", tmp_path / "run", batch_size=1, **CASES["lora+ttt"])
    file.write_text(yaml.safe_dump(settings))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "train.py"]
    done = subprocess.run([*words, file], env=ENVIRONMENT, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [row["loss"] for row in metrics(runs[0] / "two-lora+ttt")]
    assert [row["loss"] for row in metrics(tmp_path / "run")] == expected
