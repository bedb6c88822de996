"""The picture of a run shows its curves, its control and what it said, and no legend stands on a curve."""

import json
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from finetune.training.plots import draw_report
from finetune.training.samples import Sample, write_sample
from tests.training.test_metrics import monitor, write


@pytest.fixture
def drawn(monkeypatch) -> list[matplotlib.figure.Figure]:
    """The figures that were saved."""
    figures, plain = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, *a, **k: (figures.append(f), plain(f, *a, **k)))
    return figures


def lines(axes) -> dict:
    return {line.get_label(): line for line in axes.get_lines()}


def with_shares(folder: Path, losses: dict[int, float]) -> None:
    run = monitor(folder)
    for step, loss in losses.items():
        run.eval(step, {"loss": loss}, {f"{index}.wav": loss / 6 + 1e-3 * index * step for index in range(6)})
    run.close()


def test_the_report_shows_losses_deltas_and_rates(tmp_path, drawn):
    run = monitor(tmp_path)
    write(run, 1, 6)
    run.train(7, {"loss": float("inf")})
    path = draw_report(tmp_path)
    assert path == tmp_path / "report.png"
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 1000
    assert picture[..., :3].std() > 0.05
    loss, _, delta, rate, _ = map(lines, drawn[0].axes)
    assert loss.keys() == {"train/loss", "eval/loss", "eval/loss_updates_off"}
    assert list(loss["train/loss"].get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(loss["eval/loss_updates_off"].get_ydata()) == pytest.approx([1.0, 0.5, 1 / 3])
    assert delta.keys() == {"layers.1", "layers.3"}
    assert rate.keys() == {"lr/adapters"}


def test_the_control_has_its_curve_and_its_panel(tmp_path, drawn):
    with_shares(tmp_path, {2: 3.0, 4: 2.5, 6: 2.4})
    with_shares(tmp_path / "control", {2: 3.0, 4: 2.75})
    draw_report(tmp_path)
    loss, difference, *_ = map(lines, drawn[0].axes)
    assert list(loss["control/eval/loss"].get_ydata()) == [3.0, 2.75]
    curve = difference["with TTT − trained without"]
    assert list(curve.get_xdata()) == [2, 4], "the steps that both have evaluated"
    assert list(curve.get_ydata()) == pytest.approx([0.0, -0.25])
    assert "no control" not in str([text.get_text() for text in drawn[0].axes[1].texts])


def test_without_a_control_the_panel_says_so(tmp_path, drawn):
    with_shares(tmp_path, {2: 3.0})
    draw_report(tmp_path)
    assert "no control was trained" in str([text.get_text() for text in drawn[0].axes[1].texts])


def test_no_legend_covers_a_curve(tmp_path, drawn):
    write(monitor(tmp_path), 1, 6)
    draw_report(tmp_path)
    legends = [axes for axes in drawn[0].axes if axes.get_legend() is not None]
    assert len(legends) == 3
    for axes in legends:
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


def test_the_last_sample_is_in_the_picture(tmp_path, drawn):
    for step, said in ((2, "old"), (4, "costs $5 or $6")):
        write_sample(tmp_path, step, Sample(np.zeros((2, 2400), "float32"), 24_000, 0.05, "hello", said, "goodbye"))
    draw_report(tmp_path)
    title = drawn[0].axes[-1].get_title(loc="left")
    assert title.startswith("samples/step_000004.wav")
    assert "the model: costs $5 or $6" in title


def test_a_report_of_nothing_is_a_picture_too(tmp_path):
    assert matplotlib.image.imread(draw_report(tmp_path)).shape[0] > 1000


def test_values_that_are_no_numbers_are_left_out(tmp_path, drawn):
    rows = [{"step": 1, "loss": None}, {"step": 2, "loss": "x"}, {"step": 3, "loss": 1.0}]
    (tmp_path / "metrics.train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    draw_report(tmp_path)
    assert list(lines(drawn[0].axes[0])["train/loss"].get_xdata()) == [3]
