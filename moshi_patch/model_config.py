"""`config.json` of a model: what no model can have is refused before anything is built, as building might never end."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .json_object import read_object

FILE_KEYS = ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name")
"""Keys that name a file."""

LORA_KEYS = ("lora", "lora_rank", "lora_scaling")
GENERATION_KEYS = ("lm_gen_config", "tts_config", "stt_config")
NOT_ARGUMENTS = (*FILE_KEYS, *GENERATION_KEYS, "model_type", "model_id")
"""Keys that are not arguments of moshi's loader; `CheckpointInfo.from_hf_repo` takes them out."""

WHOLE_NUMBERS = {
    "dim": (1, 1 << 16),
    "num_heads": (1, 1 << 10),
    "num_layers": (1, 256),
    "kv_repeat": (1, 1 << 10),
    "n_q": (0, 128),
    "dep_q": (0, 128),
    "card": (1, 1 << 20),
    "text_card": (1, 1 << 22),
    "text_card_out": (1, 1 << 22),
    "context": (1, 1 << 24),
    "existing_text_padding_id": (0, 1 << 22),
    "existing_text_end_padding_id": (0, 1 << 22),
    "depformer_dim": (0, 1 << 16),
    "depformer_num_heads": (0, 1 << 10),
    "depformer_num_layers": (0, 64),
    "depformer_low_rank_embeddings": (0, 1 << 16),
    "depformer_context": (0, 1 << 24),
    "extra_heads_num_heads": (0, 128),
    "extra_heads_dim": (1, 1 << 22),
    "lora_rank": (1, 1 << 16),
}
"""Smallest and largest value: generous for any model, and built in seconds."""

MIMI_WHOLE_NUMBERS = {
    "num_layers": 64,
    "n_residual_layers": 64,
    "n_filters": 1 << 12,
    "dimension": 1 << 14,
    "d_model": 1 << 14,
    "num_heads": 1 << 10,
    "dim_feedforward": 1 << 17,
    "n_q": 256,
    "bins": 1 << 20,
}
"""The same for Mimi, in any of its sections."""

NUMBERS = {"hidden_scale": 1 << 10, "max_period": math.inf, "lora_scaling": math.inf}
"""Positive numbers and their largest value."""

WORDS = (*FILE_KEYS, "model_type", "gating", "norm", "positional_embedding", "depformer_gating", "depformer_pos_emb")
SWITCHES = ("lora", "causal", "quantize", "depformer_weights_per_step", "depformer_multi_linear", "cross_attention")
OBJECTS = (*GENERATION_KEYS, "model_id", "conditioners", "fuser")
LARGEST = 1 << 31
"""Of any other whole number, and of the elements in all of the layers that moshi makes in memory at once."""


def read_model_config(path: str | Path) -> dict[str, Any]:
    """Content of a `config.json`, checked.

    Raises:
        OSError: when it cannot be read.
        ValueError: naming the file, and the key, its value and what is allowed.
    """
    try:
        config = read_object(path)
        check_model_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def check_model_config(config: Mapping[str, Any]) -> None:
    """That `config` could be of a model: kinds and sizes of its values, TTT aside. Keys may be unknown.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    for key, value in config.items():
        if value is not None:
            _check_value(key, value)
    _check_lists(config)
    _check_sizes(config)


def check_mimi_config(config: Mapping[str, Any]) -> None:
    """That `config` could be of a Mimi, of a size that is built in seconds.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    for section in ("seanet", "transformer", "quantizer"):
        _require(isinstance(config.get(section), dict), section, config.get(section), "an object")
        for key, value in config[section].items():
            high = MIMI_WHOLE_NUMBERS.get(key)
            fits = high is None or (_is_whole(value) and 0 <= value <= high)
            _require(fits, f"{section}.{key}", value, f"a whole number from 0 to {high}")
    ratios = config["seanet"].get("ratios", [])
    fits = isinstance(ratios, list) and len(ratios) <= 16 and all(_is_whole(one) and 1 <= one <= 64 for one in ratios)
    _require(fits, "seanet.ratios", ratios, "a list of at most 16 whole numbers from 1 to 64")
    for number in _numbers(dict(config)):
        fits = abs(number) <= LARGEST if isinstance(number, int) else math.isfinite(number)
        _require(fits, "a number", number, f"finite and at most {LARGEST}")
    for key in ("sample_rate", "frame_rate", "channels"):
        _require(_is_number(config.get(key)) and config[key] > 0, key, config.get(key), "a positive number")


def _check_value(key: str, value: Any) -> None:
    if key in WHOLE_NUMBERS:
        low, high = WHOLE_NUMBERS[key]
        _require(_is_whole(value) and low <= value <= high, key, value, f"a whole number from {low} to {high}")
    elif key in NUMBERS:
        high = NUMBERS[key]
        allowed = "a positive number" if high == math.inf else f"a positive number up to {high}"
        _require(_is_number(value) and 0 < value <= high, key, value, allowed)
    elif key in WORDS:
        _require(isinstance(value, str) and 0 < len(value) < 4096, key, value, "a text")
    elif key in SWITCHES:
        _require(isinstance(value, bool), key, value, "true or false")
    elif key in OBJECTS:
        _require(isinstance(value, dict), key, value, "an object")
    for number in _numbers(value):
        fits = abs(number) <= LARGEST if isinstance(number, int) else math.isfinite(number)
        _require(fits, key, value, f"no number that is not finite or beyond {LARGEST}")


def _check_lists(config: Mapping[str, Any]) -> None:
    dep_q = config.get("dep_q") or 0
    feedforward = config.get("depformer_dim_feedforward")
    for key, low, high in (("delays", 0, 1 << 10), ("depformer_weights_per_step_schedule", 0, max(dep_q - 1, 0))):
        value = config.get(key)
        fits = value is None or (
            isinstance(value, list) and all(_is_whole(one) and low <= one <= high for one in value)
        )
        _require(fits, key, value, f"a list of whole numbers from {low} to {high}")
    widths = feedforward if isinstance(feedforward, list) else [] if feedforward is None else [feedforward]
    fits = all(_is_whole(one) and 1 <= one <= 1 << 20 for one in widths)
    _require(fits, "depformer_dim_feedforward", feedforward, f"one or more whole numbers from 1 to {1 << 20}")
    for name, one in (config.get("conditioners") or {}).items():
        fits = isinstance(one, dict) and isinstance(one.get("type"), str) and isinstance(one.get(one["type"], {}), dict)
        _require(fits, f"conditioners.{name}", one, "an object with its type and that type's settings")


def _check_sizes(config: Mapping[str, Any]) -> None:
    """moshi makes some linear layers in memory before any weight is read."""

    def at(key: str, otherwise: int) -> int:
        value = config.get(key)
        return otherwise if value is None else value

    text, heads = at("text_card_out", at("text_card", 32000)), at("extra_heads_num_heads", 0) * at("extra_heads_dim", 6)
    depformer = at("dep_q", 8) * at("depformer_dim", 256)
    elements = at("dim", 128) * (text + heads + depformer) + depformer * at("card", 1024)
    if elements > LARGEST:
        raise ValueError(f"dim={at('dim', 128)!r}, text_card={text!r}, ...: {elements} weights in its heads alone.")


def _numbers(value: Any) -> Iterable[int | float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _require(holds: bool, key: str, value: Any, allowed: str) -> None:
    if not holds:
        text = repr(value)
        raise ValueError(f"{key}={text if len(text) <= 60 else f'{text[:60]}...'}: must be {allowed}.")
