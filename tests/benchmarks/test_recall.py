"""The grid `recall`: what it feeds the model, that attention alone cannot solve it, and that a short run learns."""

import json
from pathlib import Path

import pytest
import torch

import moshi_patch
from benchmarks.evidence import model as models
from benchmarks.evidence import suite
from benchmarks.evidence.grid import read_grid
from benchmarks.evidence.results import Results
from benchmarks.evidence.settings import Settings
from benchmarks.evidence.training import make_optimizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]

CELLS = {cell.name: cell for cell in read_grid(suite.GRIDS / "recall.yaml")}


def settings_of(case: str, model: str = "ttt") -> Settings:
    return next(run.settings for run in CELLS[case].runs(seed=0) if run.settings.model == model)


def codes_of(case: str, rows: int = 64, gap: int = 20) -> torch.Tensor:
    return models.make(settings_of(case), rows, torch.Generator().manual_seed(3), gap=gap).codes


@pytest.mark.parametrize("case", ["easy", "hard"])
def test_the_first_part_returns_after_the_gap_and_nothing_else_does(case):
    text = codes_of(case)[:, 0]
    assert text.shape == (64, 84)
    assert torch.equal(text[:, :32], text[:, 52:])
    assert len({tuple(row) for row in text[:, :32].tolist()}) == 64, "parts differ from row to row"
    assert (text[:, 32:64] == text[:, :32]).float().mean() < 0.1, "what fills the gap is no copy"
    assert set(text.flatten().tolist()) == set(range(44))


def test_audio_is_the_zero_token_in_the_easy_case_and_never_repeats_in_the_hard_one():
    assert (codes_of("easy")[:, 1] == -1).all()
    audio = codes_of("hard")[:, 1]
    assert set(audio.flatten().tolist()) == set(range(44))
    assert (audio[:, :32] == audio[:, 52:]).float().mean() < 0.1


def test_a_part_that_attention_could_reach_is_refused():
    with pytest.raises(ValueError, match=r"part=8.*attention reaches 45"):
        Settings(layers=3, part=8)


@pytest.mark.parametrize("model", ["none", "ttt"])
@pytest.mark.parametrize("index", [1, 17, 31])
def test_a_token_reaches_the_step_that_must_recall_it_through_ttt_alone(index, model):
    settings = settings_of("easy", model)
    built = models.build_model(settings)
    codes = codes_of("easy", rows=2, gap=settings.gap_min)
    other = codes.clone()
    other[:, 0, index] = (other[:, 0, index] + 1) % settings.card  # in the first pass only
    predicting = settings.part + settings.gap_min + index - 1
    with torch.no_grad():
        for parameter in moshi_patch.ttt_parameters(built).values():
            parameter.normal_(std=0.3)
        logits = [built.forward_text(c)[1][:, :, predicting] for c in (codes, other)]
    assert torch.equal(*logits) is (model == "none")


def test_both_models_start_from_the_same_weights():
    stock, ttt = (models.build_model(settings_of("hard", model)).state_dict() for model in ("none", "ttt"))
    assert all(torch.equal(value, ttt[name]) for name, value in stock.items())


def test_a_short_training_lowers_the_loss_on_what_it_sees():
    """16 sequences seen again and again can be memorised: the chain from codes to weights is whole."""
    settings = settings_of("easy")
    model = models.build_model(settings)
    optimizer = make_optimizer(model, settings)
    codes = codes_of("easy", rows=16, gap=16)
    losses = []
    for _ in range(12):
        loss = models.token_losses(model, codes, spoken=False)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(parameter.grad.abs().sum() > 0 for parameter in moshi_patch.ttt_parameters(model).values())


def test_the_command_trains_measures_on_the_way_and_fills_table_and_figure(tmp_path: Path):
    small = {"width": 32, "heads": 2, "gap_max": 24, "batch": 4, "eval_batch": 4, "steps": 2, "measure_every": 1}
    grid = tmp_path / "small.yaml"
    cells = [{"name": "easy", "priority": 1, "seeds": [0], "vary": {"model": ["none", "ttt"]}}]
    common = {"layers": 3, "echo": 0, "sweep": True, "gaps": [1, 2, 8], **small}
    grid.write_text(json.dumps({"settings": common, "cells": cells}))
    page = tmp_path / "page.md"
    page.write_text("<!-- recalled -->\n<!-- end recalled -->\n")
    assert suite.main(["--grid", str(grid), "--doc", str(page), "--cache", str(tmp_path / "cache")]) == 0
    assert "| easy, 2 steps | same weights, updates off | 0 |" in page.read_text()
    stock, ttt = (json.loads(line) for line in (tmp_path / "small.jsonl").read_text().splitlines())
    assert [point["step"] for point in ttt["training"]["measured"]] == [0, 1, 2]
    assert stock["training"]["measured"][0]["none"] == ttt["training"]["measured"][0]["off"], "same start"
    results = Results(read_grid(grid), {line["id"]: line for line in (stock, ttt)})
    assert suite.PAGES["recall"].figures["recall"](results).get_axes()[0].get_lines()
