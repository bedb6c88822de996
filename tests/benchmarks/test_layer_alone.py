"""One TTT-MLP layer alone: only what it wrote can answer, and a run leaves what it measured."""

import json

import torch

from benchmarks.evidence import layer_alone


def test_an_answer_depends_on_what_was_shown_through_updates_alone():
    model = layer_alone.Recall(base_lr=1.0, mini_batch_size=8)
    shown = torch.randn(2, layer_alone.PAIRS, layer_alone.WIDTH)
    asked = torch.randn(1, layer_alone.ASKED, layer_alone.WIDTH).expand(2, -1, -1)

    def answers(updates: bool) -> torch.Tensor:
        model.memory.set_updates(updates)
        return model.memory(torch.cat([shown, asked], 1))[:, layer_alone.PAIRS :]

    with torch.no_grad():
        on, off = answers(True), answers(False)
    torch.testing.assert_close(off[0], off[1], rtol=0, atol=1e-6)  # rows of one product, in another order
    assert (on[0] - on[1]).abs().max() > 1e-4


def test_a_run_says_what_was_known_with_updates_and_without(tmp_path):
    out = tmp_path / "layer_alone.json"
    layer_alone.main(["--seeds", "1", "--steps", "2", "--base-lr", "1", "0.1", "--out", str(out)])
    runs = json.loads(out.read_text())["runs"]
    assert [(run["base_lr"], run["seed"], run["steps"]) for run in runs] == [(1.0, 0, 2), (0.1, 0, 2)]
    assert all(3.0 < run[key] < 4.0 for run in runs for key in ("on", "off"))
