"""`eval_from_checkpoint.py` on checkpoints that `train.py` made: numbers, controls, interruptions, ranks."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

import moshi_patch
from example.make_pairs import make_benchmarks
from finetune.checkpoint.saved import load_model, open_checkpoint
from finetune.common.errors import ConfigError
from finetune.data.manifest import Entry
from finetune.data.tokenize import SpeechTokenizer
from finetune.evaluation.__main__ import main
from finetune.evaluation.run import evaluate
from finetune.evaluation.settings_in_force import parse_command_line
from finetune.model.loss import LossParts, compute_loss
from finetune.settings.schema import MoshiPaths
from tests.support.evaluations import MODES, NAMES, results, start, training
from tests.support.tiny_repository import DATA

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def by_hand(made, name: str, updates: bool, but: int | None = None) -> LossParts:
    """The loss of all three dialogues from single passes, with updates in all layers but one, or in none."""
    saved = open_checkpoint(made / name)
    model, info = load_model(saved, MoshiPaths(hf_repo_id=str(made / "repo")), CPU, torch.float32)
    tokenizer = SpeechTokenizer.for_model(model, info.get_mimi(device=CPU), info.get_text_tokenizer(), 20)
    total = None
    for name in NAMES:
        (segment,) = tokenizer.segments(Entry(DATA / f"{name}.wav", 11.0, Path(), 1))
        codes = tokenizer(segment).codes
        codes = codes[..., : int((codes[0] != -1).any(0).nonzero()[-1]) + 1]
        for layer, gating in moshi_patch.ttt_gatings(model).items():
            gating.set_updates(updates and layer != f"transformer.layers.{but}.gating")
        with torch.no_grad():
            parts = compute_loss(model(codes), codes, dep_q=model.dep_q, first_codebook_weight_multiplier=5.0)
        total = LossParts(total.sums + parts.sums, total.counts + parts.counts) if total else parts
    return total


@pytest.mark.parametrize("mode", MODES)
def test_losses_are_those_of_single_passes_with_updates_on_and_off(made, words, tmp_path, mode):
    table = evaluate(parse_command_line(words(mode)))
    found = results(tmp_path)
    assert found["adapters"] == (mode == "adapters")
    for condition, updates in (("updates on", True), ("updates off", False)):
        expected, overall = by_hand(made, mode, updates), found["standard"]["overall"][condition]
        assert overall["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
        assert overall["text_loss"] == pytest.approx(expected.text.item(), rel=1e-5)
        assert overall["audio_loss"] == pytest.approx(expected.audio.item(), rel=1e-5)
        assert overall["per_codebook"] == pytest.approx((expected.sums / expected.counts).tolist(), rel=1e-5)
        assert f"{overall['loss']:.4f}" in table
    on, off = (found["standard"]["overall"][name]["loss"] for name in ("updates on", "updates off"))
    difference = found["standard"]["differences"]["reliance"]["loss"]
    assert abs(on - off) > 1e-3, "updates change nothing: this test would pass without TTT"
    assert difference["value"] == pytest.approx(on - off)
    assert (difference["low"], difference["high"]) == (None, None)  # of three recordings
    assert found["settings"]["first_codebook_weight_multiplier"] == {"value": 5.0, "source": "training_config.json"}
    assert found["versions"]["torch"] == torch.__version__
    (stretch,) = found["standard"]["by_position"]
    assert stretch["minutes"] == "0-1"
    assert stretch["conditions"]["updates on"]["loss"] == pytest.approx(on)
    assert [Path(item["path"]).stem for item in found["standard"]["items"]] == list(NAMES)
    assert (tmp_path / "out" / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_baselines_are_the_base_model_another_checkpoint_or_itself(made, words, tmp_path):
    losses = {}
    for name, baseline in (("base", "base"), ("folder", str(made / "repo")), ("run", str(made / "stock"))):
        evaluate(parse_command_line(words("adapters", f"--baseline={baseline}")))
        found = results(tmp_path)["standard"]
        losses[name] = found["overall"]["baseline"]["loss"]
        difference = found["differences"]["updates on - baseline"]["loss"]["value"]
        assert difference == pytest.approx(found["overall"]["updates on"]["loss"] - losses[name])
    assert losses["base"] == losses["folder"] != losses["run"]
    assert losses["run"] == pytest.approx(by_hand(made, "stock", True).loss.item(), rel=1e-5)
    evaluate(parse_command_line(words("adapters", f"--baseline={made / 'adapters'}")))
    found = results(tmp_path)["standard"]["differences"]["updates on - baseline"]["loss"]
    assert found == {"value": 0, "low": None, "high": None}


def test_an_old_checkpoint_with_the_yaml_of_its_training_gives_the_same(made, words, tmp_path):
    evaluate(parse_command_line(words("merged")))
    expected = results(tmp_path)["standard"]["overall"]
    shutil.copytree(made / "merged", tmp_path / "old")
    (record,) = tmp_path.glob("old/checkpoints/*4/consolidated/training_config.json")
    for file in (record, record.with_name("SHA256SUMS")):
        file.unlink()
    yaml = tmp_path / "training.yaml"
    yaml.write_text(json.dumps(training(made / "repo", tmp_path / "old", **MODES["merged"])))  # JSON is YAML
    evaluate(parse_command_line(words("merged", f"--checkpoint_dir={tmp_path / 'old'}", f"--config={yaml}")))
    assert results(tmp_path)["standard"]["overall"] == expected
    assert results(tmp_path)["settings"]["param_dtype"] == {"value": "float32", "source": str(yaml)}


def test_each_layer_is_muted_by_itself_on_request(made, words, tmp_path):
    page = evaluate(parse_command_line(words("merged", "--by_layer")))
    found = results(tmp_path)["standard"]
    served = found["overall"]["updates on"]["loss"]
    assert list(found["by_layer"]) == ["1", "3"]
    for layer, row in found["by_layer"].items():
        expected = by_hand(made, "merged", True, but=int(layer)).loss.item()
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert row["reliance"]["loss"]["value"] == pytest.approx(served - expected, abs=1e-4)
        assert row["loss"] not in (served, found["overall"]["updates off"]["loss"])
        assert f"{expected:.4f}" in page.split("layer without updates")[1]
    assert list(found["overall"]) == ["updates on", "updates off"]


@pytest.mark.parametrize(
    ("name", "option", "named"),
    [("stock", "--eval_type=standard", "no TTT layers"), ("merged", "--eval_type=paper", "eval_type must be standard")],
)
def test_layers_that_cannot_be_muted_are_refused(words, name, option, named):
    with pytest.raises(ConfigError, match=f"by_layer=True: .*{named}"):
        parse_command_line(words(name, "--by_layer", option))


def test_a_checkpoint_without_ttt_has_one_line_and_no_control(words, tmp_path):
    table = evaluate(parse_command_line(words("stock")))
    found = results(tmp_path)["standard"]
    assert list(found["overall"]) == ["no TTT"]
    assert found["differences"] == {}
    assert "no TTT" in table


def test_streams_scored_together_and_in_other_segments_have_the_same_losses(words, tmp_path):
    for out, options in (("out", []), ("other", ["--eval_batch_size=2", "--segment_steps=33"])):
        evaluate(parse_command_line(words("merged", *options, f"--out_dir={tmp_path / out}")))
    for one, other in zip(
        results(tmp_path)["standard"]["items"], results(tmp_path, "other")["standard"]["items"], strict=True
    ):
        assert one["steps"] == other["steps"]
        for condition in ("updates on", "updates off"):
            assert other["conditions"][condition]["loss"] == pytest.approx(
                one["conditions"][condition]["loss"], rel=1e-5
            )


def test_long_files_are_cut_into_streams_and_other_settings_never_share_results(words, tmp_path):
    evaluate(parse_command_line(words("merged")))
    whole = results(tmp_path)["standard"]
    evaluate(parse_command_line(words("merged", "--max_minutes=0.1", "--ttt.learning_rate=0.1")))
    cut = results(tmp_path)["standard"]
    assert (whole["streams"], cut["streams"]) == (3, 6)
    assert [item["first_step"] for item in cut["items"]] == [0, 75] * 3
    assert cut["overall"]["updates on"]["loss"] != whole["overall"]["updates on"]["loss"]
    assert len(list((tmp_path / "out" / "items").iterdir())) == 2


def many(tmp_path, copies: int) -> str:
    """A list of the same dialogue under many names."""
    lines = []
    for index in range(copies):
        for suffix in (".wav", ".json"):
            (tmp_path / f"copy{index}{suffix}").symlink_to(DATA / f"sister{suffix}")
        lines.append(json.dumps({"path": f"copy{index}.wav", "duration": 11.0}))
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    return f"--data.eval_data={tmp_path / 'many.jsonl'}"


def test_killed_in_the_middle_it_continues_where_it_stopped(words, tmp_path, monkeypatch):
    given = words("merged", many(tmp_path, 12))
    process = start(given)
    deadline, lines = time.monotonic() + 60, 0
    while lines < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
        lines = sum(path.read_bytes().count(b"\n") for path in (tmp_path / "out").glob("items/*"))
    process.kill()
    process.wait()
    (store,) = (tmp_path / "out" / "items").iterdir()
    before = store.read_bytes()
    done = before.count(b"\n")
    assert 4 <= done < 24, "it was not killed in the middle"
    assert not (tmp_path / "out" / "eval.json").exists()
    store.write_bytes(before + b'{"kind": "standard/upd')  # what a crash may leave

    table = evaluate(parse_command_line(given))
    after = store.read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 24, "finished items were evaluated again"
    found = results(tmp_path)["standard"]
    assert found["streams"] == 12
    assert len({item["conditions"]["updates on"]["loss"] for item in found["items"]}) == 1

    monkeypatch.setattr("finetune.evaluation.scoring.score_stream", None)  # nothing is left to score
    assert evaluate(parse_command_line(given)) == table
    assert results(tmp_path)["standard"] == found


def test_two_ranks_find_what_one_finds(words, tmp_path):
    options = [many(tmp_path, 5), "--baseline=base"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = start(words("merged", *options, f"--out_dir={tmp_path / 'two'}"), launcher)
    evaluate(parse_command_line(words("merged", *options)))
    out, errors = two.communicate(timeout=120)
    assert two.returncode == 0, errors
    assert results(tmp_path, "two")["standard"] == results(tmp_path)["standard"]
    assert results(tmp_path, "two")["world_size"] == 2
    assert out.count("\nreliance  ") == 2, "printed by one rank alone"  # overall and by minutes
    assert {path.name[-11:] for path in (tmp_path / "two" / "items").iterdir()} == {"rank0.jsonl", "rank1.jsonl"}


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("mode", MODES)
def test_the_program_prints_its_results_and_leaves_them_beside_the_run(made, tmp_path, capsys, caplog, mode):
    shutil.copytree(made / mode, tmp_path / "run")
    caplog.set_level("INFO")
    assert main([f"--checkpoint_dir={tmp_path / 'run'}", f"--data.eval_data={made / 'eval.jsonl'}"]) == 0
    assert "training_config.json" in caplog.text
    assert "first_codebook_weight_multiplier" in caplog.text
    assert "text_padding_weight" not in caplog.text, "it is the default"
    folder = tmp_path / "run" / "eval" / "checkpoint_000004"
    assert f"Results are in {folder}" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"eval.json", "eval.png", "items"}


def test_benchmarks_and_recordings_are_evaluated_together_or_the_benchmarks_alone(words, tmp_path):
    benchmarks = make_benchmarks(tmp_path / "sets", items=2, longform_seconds=12.0)
    sets = [f"--paper.sblimp={benchmarks / 'sLM21-dataset'}", f"--paper.longform={benchmarks / 'longform'}"]
    table = evaluate(parse_command_line(words("merged", *sets, "--eval_type=both", "--baseline=base")))
    found = results(tmp_path)
    assert list(found["paper"]) == ["sblimp", "longform"]
    assert {"updates on", "updates off", "baseline"} <= found["paper"]["sblimp"].keys()
    assert found["standard"]["streams"] == 3
    assert table.index("reliance") < table.index("sblimp") < table.index("Results are in")
    assert (tmp_path / "out" / "eval_paper.png").read_bytes().startswith(b"\x89PNG")
    evaluate(parse_command_line(words("merged", *sets, "--eval_type=paper", "--baseline=base", "--data.eval_data=")))
    alone = results(tmp_path)
    assert "standard" not in alone
    assert alone["paper"] == found["paper"]
