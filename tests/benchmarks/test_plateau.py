"""The plateau benchmark: what its variants change, when a run ends, and what counts as a sign."""

import json

import pytest
import torch

import moshi_patch
from benchmarks.evidence import plateau, plateau_report, recall

pytestmark = pytest.mark.usefixtures("patched")

SMALL = {"width": 32, "heads": 2, "gap_max": 16, "batch": 4}


def test_audio_rows_are_random_and_the_model_hears_them_all():
    settings = recall.Settings(audio_rows=8, **SMALL)
    codes = recall.make_batch(settings, 3, 20, torch.Generator().manual_seed(0))
    assert codes.shape == (3, 9, 84)
    assert torch.equal(codes[:, 0, :32], codes[:, 0, 52:])
    assert len({tuple(row.flatten().tolist()) for row in codes[:, 1:].flatten(0, 1)}) == 24, "no row is another's copy"
    model = recall.build_model(settings, ttt=False)
    other = codes.clone()
    other[:, 8, 5] = (other[:, 8, 5] + 1) % settings.card
    with torch.no_grad():
        assert not torch.equal(*(model.forward_text(c)[1][:, :, 5] for c in (codes, other)))


def test_where_nothing_returns_the_last_part_is_another_one():
    settings = recall.Settings(**SMALL)
    batches = [
        plateau.make_batch(settings, plateau.VARIANTS[name], 8, 20, torch.Generator().manual_seed(0))
        for name in ("default", "nothing_returns")
    ]
    assert torch.equal(batches[0][..., :52], batches[1][..., :52])
    returned = [(codes[:, 0, :32] == codes[:, 0, 52:]).float().mean() for codes in batches]
    assert returned[0] == 1
    assert returned[1] < 0.1


@pytest.mark.parametrize("name", ["default", "readout_text_5_0.1", "conv_rate_50", "dead_frozen", "no_updates"])
def test_every_parameter_has_one_rate(name):
    variant = plateau.VARIANTS[name]
    settings = recall.Settings(**SMALL)
    model = plateau.build(settings, variant)
    groups = plateau.make_optimizer(model, settings, variant).param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(model.parameters()))
    assert rates[id(model.text_emb.weight)] == pytest.approx(variant.text_multiple * settings.lr)
    for key, parameter in moshi_patch.ttt_parameters(model).items():
        multiple = variant.conv_multiple if "conv1d" in key and variant.conv_multiple else variant.multiple
        assert rates[id(parameter)] == pytest.approx(0 if variant.frozen else multiple * settings.lr)


def test_text_alone_escapes_at_once_and_is_not_run_again(tmp_path, capsys):
    """With W_target a readout, the real task at its real size: from chance to below the mark in 40 steps at most."""
    file = tmp_path / "plateau.jsonl"
    argv = ["--rows", "0", "--variant", "readout", "--max-steps", "60", "--out", str(file)]
    plateau.main(argv)
    [run] = [json.loads(line) for line in file.read_text().splitlines()]
    assert run["escaped"] <= 40
    assert run["curve"][0]["on"] > 3.7
    assert run["curve"][0]["gain"] == 0
    assert run["curve"][-1]["on"] < plateau.ESCAPED
    assert run["curve"][-1]["gain"] > 1
    probe = run["probes"][0]["transformer.layers.0.gating"]
    assert probe["text_in_x0"] == pytest.approx(1)
    assert probe["conv"] == 0
    plateau.main(argv)
    assert len(file.read_text().splitlines()) == 1
    plateau_report.main([str(file), "--out", str(tmp_path / "out")])
    assert f"| 0 | readout | {run['escaped']} |" in capsys.readouterr().out
    assert (tmp_path / "out" / "plateau.png").read_bytes().startswith(b"\x89PNG")


def test_a_sign_is_a_gain_that_lasts():
    def curve(*gains):
        return {"curve": [{"step": 20 * i, "gain": gain, "gain_error": 1e-3} for i, gain in enumerate(gains)]}

    assert plateau_report.sign(curve(0.0, 0.01, 0.001, 0.01, 0.02)) == 60
    assert plateau_report.sign(curve(0.0, 0.01, 0.0)) is None
    assert plateau_report.sign(curve(0.0, -0.01)) is None
