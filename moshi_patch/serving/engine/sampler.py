"""Sampling for the rows of a batch: what a row draws depends on its own seed and position, whoever else talks.

Shapes: `B` rows, `V` tokens of the vocabulary, `K` candidates among them.

Moshi's sampler has one generator and one temperature for all rows, so what one person says changes what another hears.
Here the noise of each token is a hash of (seed, position, codebook, token): no generator, no state, nothing to wait
for, and a captured CUDA graph draws anew at every replay, as it reads the position from a tensor.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from moshi.models import LMGen, LMModel

INCREMENT = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Constants of splitmix64, whose finaliser mixes the bits (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
Generators, 2014)."""

UNIFORM_BITS = 40
"""Of a hash that become a number in (0, 1): it is never 0 or 1, so its logarithms are finite."""

TEXT = 0
"""Stands for the text in the place of a codebook's number; codebook n of the audio is n + 1."""

MAX_CANDIDATES, MAX_CANDIDATES_TEXT = 512, 256
"""The most that a row's top-k may be: a fixed number, as shapes do not follow the rows."""


@dataclass(frozen=True)
class Sampling:
    """How one row draws its tokens; the defaults are moshi's.

    Args:
        seed: any 64 bits; the same seed, the same draws from the same logits.
        temperature, temperature_text: of audio and text; 0: the most likely token, always.
        top_k, top_k_text: how many of the most likely tokens are candidates; 0: as many as the sampler looks at.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    seed: int = 0
    temperature: float = 0.8
    temperature_text: float = 0.7
    top_k: int = 250
    top_k_text: int = 25

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not -(1 << 63) <= self.seed < 1 << 64:
            raise ValueError(f"seed={self.seed!r}: must be a whole number of 64 bits.")
        for name in ("temperature", "temperature_text"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
                raise ValueError(f"{name}={value!r}: must be a number from 0 to 100.")
        for name in ("top_k", "top_k_text"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
                raise ValueError(f"{name}={value!r}: must be a whole number, 0 or more.")


@dataclass
class RowSampling:
    """The `Sampling` of every row, as tensors that stay where they are.

    Attributes:
        seed: `[B]` int64.
        temperature, temperature_text: `[B]` float64.
        top_k, top_k_text: `[B]` int64, at least 1.
    """

    seed: torch.Tensor
    temperature: torch.Tensor
    temperature_text: torch.Tensor
    top_k: torch.Tensor
    top_k_text: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, device: torch.device | str) -> "RowSampling":
        """The defaults in every row."""
        wide = {"temperature": torch.float64, "temperature_text": torch.float64}
        tensors = {
            field.name: torch.zeros(rows, dtype=wide.get(field.name, torch.int64), device=device)
            for field in fields(cls)
        }
        state = cls(**tensors)
        for row in range(rows):
            state.assign(row, Sampling())
        return state

    def assign(self, row: int, sampling: Sampling) -> None:
        """From the next step on, `row` draws as `sampling` says."""
        self.seed[row] = _signed(sampling.seed)
        self.temperature[row] = sampling.temperature
        self.temperature_text[row] = sampling.temperature_text
        self.top_k[row] = sampling.top_k or MAX_CANDIDATES
        self.top_k_text[row] = sampling.top_k_text or MAX_CANDIDATES_TEXT


def _signed(number: int) -> int:
    """The int64 with the lowest 64 bits of `number`."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def mix(bits: torch.Tensor) -> torch.Tensor:
    """Spreads every bit of int64 numbers over all 64; one to one."""
    bits = (bits ^ _shift(bits, 30)) * _signed(MULTIPLIERS[0])
    bits = (bits ^ _shift(bits, 27)) * _signed(MULTIPLIERS[1])
    return bits ^ _shift(bits, 31)


def _shift(bits: torch.Tensor, places: int) -> torch.Tensor:
    """To the right, filled with zeros: torch's int64 would copy its sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def place_bits(seed: torch.Tensor, position: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """A hash of each row's seed and position and of each codebook: `[B, N]` of `[B]`, `[B]` and `[N]`, all int64."""
    increment = _signed(INCREMENT)
    bits = mix(seed + increment)
    bits = mix(bits + position * increment)
    return mix(bits[:, None] + codebooks * increment)


def gumbel(place: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise `[B, K]`, float64, of the `tokens [B, K]` at the `place [B]` of :func:`place_bits`."""
    bits = mix(place[:, None] + tokens * _signed(INCREMENT))
    uniform = (_shift(bits, 64 - UNIFORM_BITS).double() + 0.5) * 2.0**-UNIFORM_BITS
    return -torch.log(-torch.log(uniform))


def sample(
    logits: torch.Tensor, place: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, most: int
) -> torch.Tensor:
    """One token per row, `[B]` int64, drawn from the softmax of `logits / temperature` over the row's top-k tokens.

    The largest sum of a logit and its Gumbel noise falls on a token with that token's probability. Does not wait for
    the device.

    Args:
        logits: `[B, V]`.
        place: `[B]` int64, one codebook of :func:`place_bits`; the same place and logits give the same token.
        temperature: `[B]` float64; a row with 0 takes its most likely token, as `argmax` does.
        top_k: `[B]` int64, from 1; more than `most` counts as `most`.
        most: candidates that are looked at.
    """
    likely, tokens = torch.topk(logits, min(most, logits.shape[-1]), dim=-1)
    rank = torch.arange(likely.shape[-1], device=logits.device)
    score = likely.double() / temperature.clamp(min=1e-9)[:, None] + gumbel(place, tokens)
    score = score.masked_fill(rank >= top_k[:, None], float("-inf"))
    drawn = tokens.gather(-1, score.argmax(-1, keepdim=True))[:, 0]
    return torch.where(temperature > 0, drawn, logits.argmax(-1))


class RowLMGen(LMGen):
    """An `LMGen` whose rows are out of step with each other and have a `Sampling` of their own.

    Attributes:
        sampling: of every row.
        finite: `[B]` bool, whether the row's latest text logits were. What is not finite in a row's state reaches them.

    Args:
        lm_model: in eval mode, not streaming.
        rows: how many it will stream.
        condition_tensors, cfg_coef: as those of `LMGen`, the conditions for all rows.
    """

    def __init__(self, lm_model: LMModel, rows: int, condition_tensors: Any = None, cfg_coef: float = 1.0):
        # Stock's own draw is the cheapest one, and is replaced. In step with each other, a reset of one row would cost
        # all others as many frames as the codebooks are delayed.
        super().__init__(
            lm_model,
            use_sampling=False,
            support_out_of_sync=True,
            condition_tensors=condition_tensors,
            cfg_coef=cfg_coef,
            on_text_logits_hook=self._see_text_logits,
            on_text_hook=self._draw_text,
        )
        self.sampling = RowSampling.allocate(rows, lm_model.device)
        self.finite = torch.ones(rows, dtype=torch.bool, device=lm_model.device)
        self._codebooks = torch.arange(1 + lm_model.dep_q, device=lm_model.device)
        # What a captured graph reads has to stay in its place.
        self._places = torch.zeros(rows, len(self._codebooks), dtype=torch.int64, device=lm_model.device)
        self._text_logits: torch.Tensor | None = None

    def _see_text_logits(self, logits: torch.Tensor) -> None:
        self._text_logits = logits[:, 0, 0]
        self.finite.copy_(self._text_logits.isfinite().all(-1))

    def _draw_text(self, token: torch.Tensor) -> None:
        """Replaces the text token `[B]` of this step, in place."""
        own = self.sampling
        self._places.copy_(place_bits(own.seed, self._streaming_state.offsets, self._codebooks))
        place = self._places[:, TEXT]
        token.copy_(sample(self._text_logits, place, own.temperature_text, own.top_k_text, MAX_CANDIDATES_TEXT))

    def depformer_step(self, text_token: torch.Tensor, transformer_out: torch.Tensor) -> torch.Tensor:
        """The audio tokens `[B, dep_q]` of a step, as stock's, but for how each is drawn."""
        own, guided = self.sampling, self.cfg_coef != 1.0
        token, tokens = text_token, []
        with self.lm_model.depformer.streaming(len(text_token) * (2 if guided else 1)):
            for codebook in range(self.lm_model.dep_q):
                given = token[:, None, None].repeat(2 if guided else 1, 1, 1)
                logits = self.lm_model.forward_depformer(codebook, given, transformer_out)[:, 0, 0]
                if guided:
                    with_conditions, without = logits.chunk(2)
                    logits = without + (with_conditions - without) * self.cfg_coef
                token = sample(logits, self._places[:, codebook + 1], own.temperature, own.top_k, MAX_CANDIDATES)
                tokens.append(token)
        return torch.stack(tokens, 1)
