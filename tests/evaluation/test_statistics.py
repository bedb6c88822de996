"""Means are those of the training loss, and intervals those of a bootstrap that keeps pairs together."""

import numpy as np
import pytest
import torch

from finetune.evaluation.statistics import Sums, intervals, mean_interval, summary
from finetune.model.loss import LossParts


def random_sums(items: int, rows: int = 4, seed: int = 0) -> Sums:
    generator = np.random.default_rng(seed)
    weights = generator.integers(1, 50, (items, rows)).astype(float)
    return Sums(weights * generator.gamma(3.0, 1.0, (items, rows)), weights)


def shifted(sums: Sums, by: float) -> Sums:
    """Every position's loss higher by so many nats."""
    return Sums(sums.nats + by * sums.weights, sums.weights)


def test_means_are_those_of_the_training_loss():
    sums = random_sums(5)
    sums.weights[:, 2] = sums.nats[:, 2] = 0  # a codebook that nobody heard
    parts = LossParts(torch.from_numpy(sums.nats.sum(0)), torch.from_numpy(sums.weights.sum(0)))
    found = summary(sums)
    assert found["loss"] == pytest.approx(parts.loss.item())
    assert found["text_loss"] == pytest.approx(parts.text.item())
    assert found["audio_loss"] == pytest.approx(parts.audio.item())
    assert found["per_codebook"] == pytest.approx((parts.sums / parts.counts.clamp(min=1e-9)).tolist())
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    assert found["text_perplexity"] == pytest.approx(np.exp(found["text_loss"]))


def test_a_difference_that_all_items_share_has_no_spread_while_the_losses_themselves_have():
    sums = random_sums(20)
    found = intervals(shifted(sums, -0.25), sums, 500, seed=0)
    for name, shift in (("loss", -0.5), ("text_loss", -0.25), ("audio_loss", -0.25)):
        assert found[name]["value"] == pytest.approx(shift)
        assert found[name]["low"] == pytest.approx(shift)
        assert found[name]["high"] == pytest.approx(shift)
    alone = intervals(sums, None, 500, seed=0)
    assert alone["loss"]["high"] - alone["loss"]["low"] > 0.1


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        nats = 1 + generator.normal(size=(60, 2))
        found = intervals(Sums(nats, np.ones_like(nats)), None, 300, seed)["text_loss"]
        covered += found["low"] <= 1 <= found["high"]
    assert 0.90 <= covered / 200 <= 0.98


def test_long_items_count_by_their_length():
    sums = Sums(np.array([[10.0, 10.0], [400.0, 400.0]]), np.array([[10.0, 10.0], [200.0, 200.0]]))
    assert summary(sums)["text_loss"] == pytest.approx(410 / 210)


def test_the_seed_decides():
    sums, control = random_sums(7), random_sums(7, seed=1)
    assert intervals(sums, control, 250, seed=3) == intervals(sums, control, 250, seed=3)
    assert intervals(sums, control, 250, seed=3) != intervals(sums, control, 250, seed=4)


@pytest.mark.parametrize(("number", "has_interval"), [(1, False), (4, False), (5, True)])
def test_fewer_than_five_recordings_have_no_interval(number, has_interval):
    sums = random_sums(number)
    for found in (intervals(sums, None, 250, seed=3), intervals(sums, random_sums(number, seed=1), 250, seed=3)):
        assert {(one["low"] is not None, one["high"] is not None) for one in found.values()} == {(has_interval,) * 2}
    assert intervals(sums, None, 250, seed=3)["loss"]["value"] == pytest.approx(summary(sums)["loss"])
    assert (mean_interval(np.arange(number), seed=0, samples=50)["low"] is not None) == has_interval


def test_streams_cut_from_one_recording_are_one_item():
    parts = [[[1.0, 2.0], [1.0, 1.0]], [[3.0, 4.0], [2.0, 1.0]], [[5.0, 6.0], [1.0, 1.0]]]
    sums = Sums.of(parts, ["long.wav", "short.wav", "long.wav"])
    assert sums.nats.tolist() == [[6.0, 8.0], [3.0, 4.0]]
    assert sums.weights.tolist() == [[2.0, 2.0], [2.0, 1.0]]
