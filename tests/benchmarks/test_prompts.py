"""Unseen voices: how recordings become codes, that codebooks hear the training alone, and that the page holds."""

import json

import pytest
import sphn
import torch

from benchmarks.evidence import model as models
from benchmarks.evidence import prompts
from benchmarks.evidence.report import prompts as prompts_report
from benchmarks.evidence.settings import Settings

pytestmark = pytest.mark.usefixtures("patched")


def noise(seed: int, seconds: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1, round(seconds * 24_000), generator=generator) * 0.1


def test_a_track_is_prompts_in_order_with_pauses(tmp_path, monkeypatch):
    for name, value in (("b", 0.5), ("a", 0.25), ("c", 0.75)):
        sphn.write_wav(str(tmp_path / f"{name}.wav"), torch.full((2400,), value).numpy(), 24_000)
    monkeypatch.setattr(prompts, "SECONDS", 0.5)
    pcm = prompts.track(tmp_path)
    pause = round(prompts.PAUSE * 24_000)
    assert pcm.shape == (1, 1, 2 * (2400 + pause)), "two prompts are long enough"
    assert pcm[0, 0, 100].item() == pytest.approx(0.25, abs=1e-3)
    assert pcm[0, 0, 2400 + pause + 100].item() == pytest.approx(0.5, abs=1e-3)
    assert not pcm[0, 0, 2400 : 2400 + pause].any()


@pytest.mark.slow
def test_the_codebooks_have_heard_the_training_alone():
    first, other = (prompts.encode([noise(0)], [noise(seed)]) for seed in (1, 2))
    assert torch.equal(first[False][0], other[False][0])
    assert not torch.equal(first[True][0], other[True][0])
    assert first[True][0].shape == (8, 50)


def test_speech_in_which_nothing_returns_is_measured_from_both_ends(monkeypatch):
    voices = {False: (torch.zeros(8, 400, dtype=torch.long),), True: (torch.ones(8, 400, dtype=torch.long),)}
    monkeypatch.setitem(prompts.SOURCES, "prompts", voices.__getitem__)
    settings = Settings(**prompts.SPEECH | {"width": 32, "heads": 2, "eval_batch": 2})
    found = prompts.new_speech(models.build_model(settings).eval(), settings, updates=False)
    assert set(found) == {"early", "late"}
    assert all(0 < value < 10 for value in found.values())


def test_recordings_that_were_not_fetched_are_refused():
    with pytest.raises(ValueError, match=r"recordings='prompts'.*benchmarks\.evidence\.prompts"):
        models.make(Settings(**prompts.SPEECH), 2, torch.Generator().manual_seed(0))


def test_a_machine_without_the_package_manager_is_told_which_package_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        prompts.main(["--data", str(tmp_path / "recordings")])
    assert "asterisk-core-sounds-en-wav: could not be fetched" in capsys.readouterr().err


def test_the_page_says_what_the_committed_results_say():
    page = prompts_report.PAGE.read_text()
    assert all(f"<!-- {name} -->" in page for name in prompts_report.PARTS)
    assert prompts_report.filled(page) == page, "run python -m benchmarks.evidence.prompts --report-only"
    assert {"command", "machine", "settings"} <= set(json.loads(prompts_report.DATA.read_text()))
