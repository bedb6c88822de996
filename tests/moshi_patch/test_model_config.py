"""Every model of Kyutai's passes the check of config.json; what could never be built, or never end, does not."""

import pytest
from moshi.models import loaders

from moshi_patch.json_object import MAX_BYTES, parse_json, parse_object, read_object
from moshi_patch.model_config import check_mimi_config, check_model_config
from tests.support.model_kinds import KINDS
from tests.support.models import TINY, TTT

MIMI = {
    "sample_rate": loaders.SAMPLE_RATE,
    "channels": 1,
    "frame_rate": loaders.FRAME_RATE,
    "seanet": loaders._seanet_kwargs,
    "transformer": loaders._transformer_kwargs,
    "quantizer": loaders._quantizer_kwargs,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_kind_of_model_has_is_accepted(kind):
    config = {**TINY, **TTT, **KINDS[kind], "model_type": kind, "moshi_name": "model.safetensors"}
    assert check_model_config(config) is None


def test_what_is_published_is_accepted():
    assert check_model_config(loaders._lm_kwargs) is None
    assert check_mimi_config(MIMI) is None


def test_an_absent_value_and_an_unknown_key_are_moshis_business():
    config = {"dim": None, "conditioners": None, "delays": None, "nobody_knows": {"a": [1.5, "x", True]}}
    assert check_model_config(config) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 257),
        ("num_layers", True),
        ("nobody_knows", [{"deep": float("nan")}]),
        ("nobody_knows", 1 << 40),
        ("conditioners", {"a": {"type": 5}}),
        ("depformer_weights_per_step_schedule", [2]),
        ("text_card", 1 << 22),
    ],
)
def test_what_no_model_has_is_refused_by_its_key(key, value):
    config = {"dim": 4096, "dep_q": 2}
    with pytest.raises(ValueError, match=key) as error:
        check_model_config(config | {key: value})
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("transformer", "num_layers", 10**9),
        ("seanet", "ratios", [8] * 100),
        ("seanet", "ratios", "x"),
        ("quantizer", "n_q", "8"),
        ("quantizer", "anything", 10**20),
    ],
)
def test_what_no_mimi_has_is_refused(section, key, value):
    with pytest.raises(ValueError, match=f"{section}.{key}|a number"):
        check_mimi_config(MIMI | {section: MIMI[section] | {key: value}})


@pytest.mark.parametrize("section", ["seanet", "transformer", "quantizer", "sample_rate", "channels"])
def test_a_mimi_lacks_nothing(section):
    with pytest.raises(ValueError, match=section):
        check_mimi_config({key: value for key, value in MIMI.items() if key != section})


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[" * 65 + "]" * 65, "9" * 5000, "{", ""], ids=len)
def test_text_that_is_no_json_or_too_deep_is_an_error_of_one_line(text):
    with pytest.raises(ValueError, match=r".") as error:
        parse_json(text)
    assert "\n" not in str(error.value)


def test_an_object_is_an_object_of_bounded_size(tmp_path):
    assert parse_object(b'{"a": [[1]]}') == {"a": [[1]]}
    with pytest.raises(ValueError, match="must hold an object, not list"):
        parse_object("[]")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="more than 64 MiB"):
        read_object(tmp_path / "sparse")
    with pytest.raises(OSError, match="No such file"):
        read_object(tmp_path)
