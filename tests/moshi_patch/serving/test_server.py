"""The server for many people over real websockets."""

import asyncio

import numpy as np
import pytest

from tests.support.many import run, serve, talk

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]

GREEDY = "?text_temperature=0&audio_temperature=0"


def test_several_people_talk_at_once_and_each_hears_what_they_would_hear_alone(ttt_repo):
    async def conversations():
        async with serve(ttt_repo) as server:
            alone = await talk(server, "boat", GREEDY)
            together = await asyncio.gather(
                talk(server, "boat", GREEDY), talk(server, "sister", "?text_seed=1&audio_seed=2"), talk(server, "train")
            )
            return alone, together

    alone, together = run(conversations())
    assert np.abs(alone.pcm).max() > 0.01
    np.testing.assert_array_equal(together[0].pcm, alone.pcm)
    assert together[0].text == alone.text
    assert not np.array_equal(together[1].pcm, alone.pcm)
