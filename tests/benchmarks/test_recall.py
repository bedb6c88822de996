"""The recall benchmark: what it feeds the model, that attention alone cannot solve it, and that a short run learns."""

import json

import pytest
import torch

import moshi_patch
from benchmarks.evidence import recall

pytestmark = pytest.mark.usefixtures("patched")

SMALL = {"width": 32, "heads": 2, "part": 32, "gap_max": 24, "batch": 4, "eval_batch": 4, "curve_batch": 4}


def batch(case: str, gap: int = 20) -> torch.Tensor:
    return recall.make_batch(recall.Settings(case=case), 64, gap, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", ["easy", "hard"])
def test_the_first_part_returns_after_the_gap_and_nothing_else_does(case):
    text = batch(case)[:, 0]
    assert text.shape == (64, 84)
    assert torch.equal(text[:, :32], text[:, 52:])
    assert len({tuple(row) for row in text[:, :32].tolist()}) == 64, "parts differ from row to row"
    assert (text[:, 32:64] == text[:, :32]).float().mean() < 0.1, "what fills the gap is no copy"
    assert set(text.flatten().tolist()) == set(range(44))


def test_audio_is_the_zero_token_in_the_easy_case_and_never_repeats_in_the_hard_one():
    assert (batch("easy")[:, 1] == -1).all()
    audio = batch("hard")[:, 1]
    assert set(audio.flatten().tolist()) == set(range(44))
    assert (audio[:, :32] == audio[:, 52:]).float().mean() < 0.1


def test_a_part_that_attention_could_reach_is_refused():
    with pytest.raises(ValueError, match=r"part=8.*attention reaches 45"):
        recall.Settings(part=8)


@pytest.mark.parametrize("ttt", [False, True])
@pytest.mark.parametrize("index", [1, 17, 31])
def test_a_token_reaches_the_step_that_must_recall_it_through_ttt_alone(index, ttt):
    settings = recall.Settings(case="easy")
    model = recall.build_model(settings, ttt=ttt)
    codes = recall.make_batch(settings, 2, settings.gap_min, torch.Generator().manual_seed(0))
    other = codes.clone()
    other[:, 0, index] = (other[:, 0, index] + 1) % settings.card  # in the first pass only
    predicting = settings.part + settings.gap_min + index - 1
    with torch.no_grad():
        for parameter in moshi_patch.ttt_parameters(model).values():
            parameter.normal_(std=0.3)
        logits = [model.forward_text(c)[1][:, :, predicting] for c in (codes, other)]
    assert torch.equal(*logits) is not ttt


def test_both_models_start_from_the_same_weights():
    stock, ttt = (recall.build_model(recall.Settings(), ttt=flag).state_dict() for flag in (False, True))
    assert all(torch.equal(value, ttt[name]) for name, value in stock.items())


def test_every_parameter_is_trained_once_and_the_target_generators_faster():
    settings = recall.Settings()
    model = recall.build_model(settings, ttt=True)
    stock, targets = recall.make_optimizer(model, settings).param_groups
    assert {id(p) for p in targets["params"]} == {id(p) for p in moshi_patch.ttt_parameters(model).values()}
    assert len(stock["params"]) + len(targets["params"]) == len(list(model.parameters()))
    assert targets["lr"] > stock["lr"]


def test_a_short_training_lowers_the_loss_on_what_it_sees():
    """16 sequences seen again and again can be memorised: the chain from codes to weights is whole."""
    settings = recall.Settings(case="easy")
    model = recall.build_model(settings, ttt=True)
    optimizer = recall.make_optimizer(model, settings)
    codes = recall.make_batch(settings, 16, 16, torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        loss = recall.token_losses(model, codes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(parameter.grad.abs().sum() > 0 for parameter in moshi_patch.ttt_parameters(model).values())


def test_a_run_reports_every_condition_and_can_be_written_and_plotted(tmp_path):
    run = recall.run_case("hard", steps=2, seed=1, **SMALL)
    results = json.loads(json.dumps({"runs": [run]}))
    assert list(run["final"]) == list(run["gaps"]) == ["none", "on", "off"]
    assert all(list(gaps) == list(range(1, 9)) for gaps in run["gaps"].values())
    assert run["training"]["ttt"]["curve"]["step"] == [0, 1, 2]
    assert run["training"]["none"]["curve"]["none"][0] == run["training"]["ttt"]["curve"]["off"][0], "same start"
    recall.plot(results, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert "TTT, updates on" in recall.table([run])
