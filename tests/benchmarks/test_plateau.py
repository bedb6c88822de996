"""The grid `plateau`: what its variants change, when a run ends, and what counts as a sign."""

import dataclasses
import json

import pytest
import torch

import moshi_patch
from benchmarks.evidence import model as models
from benchmarks.evidence import runner, suite
from benchmarks.evidence.grid import Cell, Run, ordered_runs, read_grid
from benchmarks.evidence.report import plateau
from benchmarks.evidence.results import Results
from benchmarks.evidence.settings import Settings
from benchmarks.evidence.training import make_optimizer, make_schedule

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]

RUNS = {run.cell: run.settings for run in ordered_runs(read_grid(suite.GRIDS / "plateau.yaml"))}
SMALL = {"width": 32, "heads": 2, "gap_max": 16, "batch": 4}


def small(cell: str) -> Settings:
    return dataclasses.replace(RUNS[cell], **SMALL)


def codes_of(settings: Settings, rows: int) -> torch.Tensor:
    return models.make(settings, rows, torch.Generator().manual_seed(0), gap=20).codes


def test_audio_rows_are_random_and_the_model_hears_them_all():
    settings = small("as shipped")
    codes = codes_of(settings, 3)
    assert codes.shape == (3, 9, 84)
    assert torch.equal(codes[:, 0, :32], codes[:, 0, 52:])
    assert len({tuple(row.flatten().tolist()) for row in codes[:, 1:].flatten(0, 1)}) == 24, "no row is another's copy"
    model = models.build_model(settings)
    other = codes.clone()
    other[:, 8, 5] = (other[:, 8, 5] + 1) % settings.card
    with torch.no_grad():
        assert not torch.equal(*(model.forward_text(c)[1][:, :, 5] for c in (codes, other)))


def test_where_nothing_returns_the_last_part_is_another_one():
    batches = [codes_of(small(cell), 8) for cell in ("as shipped", "nothing returns")]
    assert torch.equal(batches[0][..., :52], batches[1][..., :52])
    returned = [(codes[:, 0, :32] == codes[:, 0, 52:]).float().mean() for codes in batches]
    assert returned[0] == 1
    assert returned[1] < 0.1


@pytest.mark.parametrize("cell", ["as shipped", "both options", "dead targets", "no TTT"])
def test_every_parameter_has_one_rate(cell):
    settings = dataclasses.replace(small(cell), conv_lr=0.05 if cell == "as shipped" else None)
    model = models.start(settings)
    rates = {id(p): group["lr"] for group in make_optimizer(model, settings).param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model.text_emb.weight)] == (settings.text_lr or settings.lr)
    for name, parameter in moshi_patch.ttt_parameters(model).items():
        filters = settings.conv_lr is not None and "conv1d" in name
        assert rates[id(parameter)] == (settings.conv_lr if filters else settings.target_lr)


def test_in_the_first_stage_only_target_generators_and_w_down_train_and_then_all_at_the_lower_rate():
    settings = Settings(**SMALL, schedule="constant", targets_first=2, then_rate=0.25)
    optimizer = make_optimizer(models.build_model(settings), settings)
    schedule = make_schedule(optimizer, settings)
    started = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert set(started) == {"stock", "text", "conv", "W_target", "w_down"}
    for step in range(4):
        for group in optimizer.param_groups:
            early = 1.0 if group["name"] in ("conv", "W_target", "w_down") else 0.0
            assert group["lr"] == pytest.approx(started[group["name"]] * (early if step < 2 else 0.25))
        optimizer.step()
        schedule.step()


def test_text_alone_escapes_at_once():
    """With W_target a readout, the real task at its real size: from chance to below the mark in 60 steps at most."""
    settings = dataclasses.replace(RUNS["text alone"], init_target="readout", steps=60)
    line = json.loads(json.dumps(runner.execute(Run("text alone", 1, settings))))
    measured = line["training"]["measured"]
    assert line["training"]["stopped"] <= 40
    assert measured[0]["on"]["beyond"] > 3.7
    assert measured[0]["gain"] == 0
    assert measured[-1]["on"]["beyond"] < 2.5
    assert measured[-1]["gain"] > 1
    probe = line["training"]["probes"][0]["transformer.layers.0.gating"]
    assert probe["text_in_x0"] == pytest.approx(1)
    assert probe["conv"] == 0
    results = Results([Cell("text alone", 1, (0,), {}, {})], {line["id"]: line})
    assert f"| 0 | readout | {line['training']['stopped']} |" in plateau.escapes(results)
    assert plateau.draw(results) is not None


def test_a_sign_is_a_gain_that_lasts():
    def measured(*gains):
        points = [{"step": 20 * i, "gain": gain, "gain_error": 1e-3} for i, gain in enumerate(gains)]
        return {"training": {"measured": points}}

    assert plateau.first_lasting_gain(measured(0.0, 0.01, 0.001, 0.01, 0.02)) == 60
    assert plateau.first_lasting_gain(measured(0.0, 0.01, 0.0)) is None
    assert plateau.first_lasting_gain(measured(0.0, -0.01)) is None
