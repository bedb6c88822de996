"""What the load driver hears: which answer is to which frame, and how long it took."""

import numpy as np
import pytest

DELAY = 2  # steps that the codebooks and the codec are behind


def talk(responses: list[float]) -> tuple[int, np.ndarray]:
    """Frames sent, one a step, and when their answers came, in steps, so long after each."""
    return len(responses) + DELAY, DELAY + np.arange(len(responses)) + np.array(responses)


def test_an_answer_belongs_to_its_frame_also_where_a_conversation_began_late():
    from benchmarks.cost.load import Heard

    prompt, late = [0.3, 0.5, 0.9, 0.4], [2.6, 1.8, 1.2, 1.4]
    heard = Heard(talks=[talk(late), talk(prompt)])
    np.testing.assert_allclose(heard.responses(), 0.08 * np.array(late + prompt))
    summary = heard.summary()
    assert summary["late"] == 4
    assert summary["response_ms"]["p50"] == pytest.approx(84.0)


def test_where_frames_were_left_out_no_answer_is_told_from_another():
    from benchmarks.cost.load import Heard

    sent, came = talk([0.5] * 9)
    heard = Heard(talks=[talk([0.25, 0.5]), (sent, np.delete(came, [2, 3, 4, 5]))])
    np.testing.assert_allclose(heard.responses(), [0.02, 0.04])
    assert Heard().responses().size == 0
    assert Heard().summary()["response_ms"] == {"p50": None, "p99": None}
