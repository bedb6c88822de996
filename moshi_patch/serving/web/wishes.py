"""What somebody asks for in the address of `/api/chat`: the names of moshi's own page, and what is refused.

What nobody asks for is as the checkpoint says, and where it says nothing as moshi has it.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import in_one_line
from ..engine.sampler import Sampling

NUMBERS = {
    "text_temperature": ("temperature_text", float),
    "audio_temperature": ("temperature", float),
    "text_topk": ("top_k_text", int),
    "audio_topk": ("top_k", int),
}
"""Names in an address, and those of :class:`Sampling`."""

SEEDS = ("text_seed", "audio_seed")
ONE_SEED = "seed"
"""Of PersonaPlex, in place of the two."""

OF_CHECKPOINT = {"temp": "temperature", "temp_text": "temperature_text", "top_k": "top_k", "top_k_text": "top_k_text"}
"""Arguments of `LMGen`, and the names of :class:`Sampling`."""

WITHOUT_MEANING = ("check", "support_out_of_sync")
"""Arguments of `LMGen` that change nothing here: a check of its own code, and what rows always have."""

REFUSED = ("voice_prompt", "text_prompt")
"""Of PersonaPlex; this server has nothing that they could change yet."""


@dataclass(frozen=True)
class Wishes:
    """What somebody asks for.

    Attributes:
        metadata: messages about their own memory and place.
    """

    sampling: Sampling
    metadata: bool = False


def default_sampling(lm_gen_config: Mapping[str, Any]) -> Sampling:
    """How somebody's tokens are drawn who asks for nothing, as `lm_gen_config` in a model's `config.json` says.

    Args:
        lm_gen_config: arguments of `LMGen`; moshi's own server passes them on to it.

    Raises:
        ValueError: in one line, naming the key, its value and what is allowed.
    """
    if not isinstance(lm_gen_config, Mapping):
        raise ValueError(f"lm_gen_config={in_one_line(lm_gen_config)}: must be an object")
    settings = dict(lm_gen_config)
    draws = settings.pop("use_sampling", True)
    if not isinstance(draws, bool):
        raise ValueError(f"lm_gen_config: use_sampling={draws!r}: must be true or false")
    for key in WITHOUT_MEANING:
        settings.pop(key, None)
    if unknown := sorted(settings.keys() - OF_CHECKPOINT.keys()):
        allowed = ", ".join(("use_sampling", *OF_CHECKPOINT))
        raise ValueError(f"lm_gen_config: {in_one_line(unknown[0])}: this server does not know it; it knows {allowed}")
    try:
        sampling = Sampling(**{OF_CHECKPOINT[key]: value for key, value in settings.items()})
    except ValueError as error:
        raise ValueError(f"lm_gen_config: {_renamed(error, OF_CHECKPOINT)}") from None
    return sampling if draws else replace(sampling, temperature=0, temperature_text=0)


def read_wishes(query: Mapping[str, str], default: Sampling) -> Wishes:
    """What a query asks for, and `default` where it says nothing.

    What is not named here is passed over, as stock's server passes over all of it.
    Two seeds make one: the same two, the same draws. Without any, nobody knows the seed.

    Raises:
        ValueError: in one line, naming the key, its value and what is allowed.
    """
    for key in REFUSED:
        if query.get(key):
            raise ValueError(f"{key}: this server has no prompts; leave it out")
    chosen = {}
    for key, (name, kind) in NUMBERS.items():
        if key in query:
            chosen[name] = _number(key, query[key], kind)
    try:
        sampling = replace(default, seed=_seed(query), **chosen)
    except ValueError as error:
        raise ValueError(_renamed(error, {key: name for key, (name, _) in NUMBERS.items()})) from None
    metadata = query.get("metadata", "0")
    if metadata not in ("0", "1"):
        raise ValueError(f"metadata={metadata[:20]!r}: must be 0 or 1")
    return Wishes(sampling, metadata == "1")


def _renamed(error: ValueError, names: Mapping[str, str]) -> str:
    """What :class:`Sampling` refused, by the key that stands for its `names`."""
    keys = {name: key for key, name in names.items()}
    name, _, rest = str(error).partition("=")
    return f"{keys.get(name, name)}={rest}"


def _seed(query: Mapping[str, str]) -> int:
    given = [key for key in SEEDS if key in query]
    if ONE_SEED in query:
        if given:
            raise ValueError(f"{ONE_SEED}: leave it out, or {given[0]}: they say the same in two ways")
        return int(_number(ONE_SEED, query[ONE_SEED], int)) % (1 << 64)
    if not given:
        return secrets.randbits(64)
    text, audio = (int(_number(key, query.get(key, "0"), int)) % (1 << 64) for key in SEEDS)
    return (text * (1 << 32) + audio) % (1 << 64)


def _number(key: str, text: str, kind: type) -> float:
    try:
        return kind(text)
    except ValueError:
        told = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key}={text[:20]!r}: must be {told}") from None
