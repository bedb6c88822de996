"""The picture of the two updates shows what the page says: silence drowns the fact in one and not in the other."""

import pytest

from benchmarks.evidence.two_updates import MEMORIES, draw, hear


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_silence_drowns_the_fact_in_one_memory_and_saturates_in_the_other(seed):
    heard = {name: hear(60, seed, **options) for name, options in MEMORIES.items()}
    errors, answers = heard["residual"]
    assert max(errors) < 0.9
    assert answers[-1] == pytest.approx(1.0, abs=0.1)
    assert errors[-1] - errors[2] < 0.2
    for name in ("hebbian", "hebbian, decay 0.98"):
        errors, answers = heard[name]
        assert errors[-1] > 5
        assert answers[-1] > 50


def test_it_is_drawn(tmp_path):
    draw(tmp_path / "out.svg", 3)
    assert "<svg" in (tmp_path / "out.svg").read_text()
