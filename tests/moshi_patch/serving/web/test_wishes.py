"""How tokens are drawn for who asks for nothing: as the checkpoint says, and then as moshi does."""

import json
import re
import shutil
from pathlib import Path

import pytest

from moshi_patch.serving.engine.sampler import Sampling
from moshi_patch.serving.web.wishes import default_sampling, read_wishes


@pytest.mark.parametrize(
    ("lm_gen_config", "drawn"),
    [
        ({}, Sampling()),
        ({"use_sampling": True, "support_out_of_sync": False, "check": True}, Sampling()),
        ({"use_sampling": False}, Sampling(temperature=0, temperature_text=0)),
        ({"use_sampling": False, "temp": 0.5, "top_k": 9}, Sampling(temperature=0, temperature_text=0, top_k=9)),
        (
            {"temp": 0.5, "temp_text": 0.4, "top_k": 30, "top_k_text": 0},
            Sampling(temperature=0.5, temperature_text=0.4, top_k=30, top_k_text=0),
        ),
    ],
)
def test_a_checkpoint_says_how_tokens_are_drawn(lm_gen_config, drawn):
    assert default_sampling(lm_gen_config) == drawn


@pytest.mark.parametrize(
    ("lm_gen_config", "reason"),
    [
        ({"use_sampling": 1}, "lm_gen_config: use_sampling=1: must be true or false"),
        ({"temp": -1}, "lm_gen_config: temp=-1: must be a number from 0 to 100"),
        ({"temp_text": "warm"}, "lm_gen_config: temp_text='warm': must be a number from 0 to 100"),
        ({"top_k": 2.5}, "lm_gen_config: top_k=2.5: must be a whole number, 0 or more"),
        ({"top_k_text": None}, "lm_gen_config: top_k_text=None: must be a whole number, 0 or more"),
        (
            {"cfg_is_no_text": True},
            "lm_gen_config: cfg_is_no_text: this server does not know it; it knows use_",
        ),
        ({"seed": 3}, "lm_gen_config: seed: this server does not know it"),
        ({"two\nlines": 3}, "lm_gen_config: two lines: this server does not know it"),
        (None, "lm_gen_config=None: must be an object"),
        (["temp"], "lm_gen_config=['temp']: must be an object"),
    ],
)
def test_what_a_checkpoint_may_not_say_is_refused_by_name(lm_gen_config, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        default_sampling(lm_gen_config)


def test_what_an_address_asks_for_goes_before_what_the_checkpoint_says():
    checkpoint = Sampling(temperature=0.5, temperature_text=0.4, top_k=30, top_k_text=3)
    one, other = (read_wishes({}, checkpoint).sampling for _ in range(2))
    assert one.seed != other.seed  # nobody knows it
    assert (one.temperature, one.temperature_text, one.top_k, one.top_k_text) == (0.5, 0.4, 30, 3)
    asked = read_wishes({"audio_temperature": "1", "text_topk": "7", "text_seed": "1", "audio_seed": "2"}, checkpoint)
    assert asked.sampling == Sampling((1 << 32) + 2, 1.0, 0.4, 30, 7)
    assert read_wishes({"seed": "7"}, checkpoint).sampling.seed == 7  # as LiveKit's plugin says it


@pytest.mark.slow
@pytest.mark.usefixtures("patched")
def test_a_server_draws_as_its_checkpoint_says_and_starts_with_no_other(ttt_repo, tmp_path, monkeypatch):
    from moshi.models import loaders

    from moshi_patch.server import server_parser
    from moshi_patch.serving import program

    repo = Path(shutil.copytree(ttt_repo, tmp_path / "repo"))
    config = json.loads((repo / "config.json").read_text())
    options = server_parser("prog").parse_args(["--hf-repo", str(repo), "--device", "cpu"])
    (repo / "config.json").write_text(json.dumps(config | {"lm_gen_config": {"temp": 0.5}}))
    assert program.load_model(options, "prog").sampling == Sampling(temperature=0.5)
    (repo / "config.json").write_text(json.dumps(config | {"lm_gen_config": {"temp": -0.5}}))
    monkeypatch.setattr(loaders, "get_mimi", lambda *arguments, **named: pytest.fail("loaded before the refusal"))
    with pytest.raises(program.ServerError, match=r"lm_gen_config: temp=-0\.5: must be a number from 0 to 100"):
        program.load_model(options, "prog")
