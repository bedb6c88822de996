"""What somebody asks for in the address of `/api/chat`: the names of moshi's own page, and what is refused."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from .sampler import Sampling

NUMBERS = {
    "text_temperature": ("temperature_text", float),
    "audio_temperature": ("temperature", float),
    "text_topk": ("top_k_text", int),
    "audio_topk": ("top_k", int),
}
"""Names in an address, and those of :class:`Sampling`."""

SEEDS = ("text_seed", "audio_seed")

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


def read_wishes(query: Mapping[str, str]) -> Wishes:
    """What a query asks for. What is not named here is passed over, as stock's server passes over all of it.

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
        sampling = Sampling(_seed(query), **chosen)
    except ValueError as error:
        keys = {name: key for key, (name, _) in NUMBERS.items()}
        name, _, rest = str(error).partition("=")
        raise ValueError(f"{keys.get(name, name)}={rest}") from None
    metadata = query.get("metadata", "0")
    if metadata not in ("0", "1"):
        raise ValueError(f"metadata={metadata[:20]!r}: must be 0 or 1")
    return Wishes(sampling, metadata == "1")


def _seed(query: Mapping[str, str]) -> int:
    if not any(key in query for key in SEEDS):
        return secrets.randbits(64)
    text, audio = (int(_number(key, query.get(key, "0"), int)) % (1 << 64) for key in SEEDS)
    return (text * (1 << 32) + audio) % (1 << 64)


def _number(key: str, text: str, kind: type) -> float:
    try:
        return kind(text)
    except ValueError:
        told = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key}={text[:20]!r}: must be {told}") from None
