"""`TTTConfig`: the `ttt_*` keyword arguments, without their prefix, checked before anything is built."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "ttt_"
KINDS = ("in_place", "mlp")
TARGETS = ("token_embeddings", "hidden_states")
UPDATES = ("hebbian", "residual")
RESIDUAL_LEAST = 1e-12
"""The least η and g of the residual update, which computes with 1/η in float32."""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max and not math.isnan(value)


def _field(default: Any, allowed: str, holds: Callable[[Any], bool], kind: str | None) -> Any:
    """A field with what it may be, in words and as a function, and the kind that alone has it; None: every kind."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "holds": holds, "kind": kind})


def _flag(default: bool, kind: str | None = None) -> Any:
    return _field(default, "True or False", lambda value: isinstance(value, bool), kind)


def _one_of(choices: tuple[str, ...], kind: str | None = None) -> Any:
    """A field whose default is the first of `choices`."""
    return _field(choices[0], " or ".join(map(repr, choices)), lambda value: value in choices, kind)


def _whole(default: int, least: int, most: int, kind: str) -> Any:
    def holds(value: Any) -> bool:
        return _is_int(value) and least <= value <= most

    return _field(default, f"a whole number from {least} to {most}", holds, kind)


def _positive(default: float | None, most: float, kind: str) -> Any:
    def holds(value: Any) -> bool:
        return (value is None and default is None) or (_is_number(value) and 0 < value <= most)

    return _field(default, f"a positive number, at most {most:g}", holds, kind)


def _at_most(default: float, size: float, kind: str) -> Any:
    def holds(value: Any) -> bool:
        return _is_number(value) and abs(value) <= size

    return _field(default, f"a number from {-size:g} to {size:g}", holds, kind)


@dataclass(frozen=True)
class TTTConfig:
    """Settings of Test-Time Training. `ttt_chunk_size=64` as a keyword of `LMModel` is `chunk_size=64` here.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    enabled: bool = _flag(False)
    """learn from the stream while it runs; off: the stock model"""
    kind: str = _one_of(KINDS)
    """what learns: in_place, the down projection of a gated MLP, or mlp, an MLP per head in front of the stock MLP"""
    layer_frequency: int = _whole(6, 1, 10_000, "in_place")
    """every so many layers one has TTT: 5, 11, 17, 23, 29 of 32"""
    start_layer: int = _whole(5, 0, 10_000, "in_place")
    """the first layer with TTT, counted from 0"""
    layers: list[int] | str | None = None
    """overrides the two: a list of layers, "1,5,10", "all", or "middle" (n//4 up to, not including, 3n//4 of n)"""
    chunk_size: int = _whole(256, 1, 1_000_000, "in_place")
    """C, steps of 80 ms between two updates; keep it well below the attention's context"""
    learning_rate: float = _positive(1e-3, 1e6, "in_place")
    """η, of the fast weights, not of the optimizer; an update sums over a chunk: halve it for twice the chunk"""
    conv_kernel_size: int = _whole(2, 1, 1024, "in_place")
    """K, steps that a target is made from: this one and the next K - 1"""
    conv_depthwise: bool = _flag(True, "in_place")
    """one filter per channel; off: a full D x D x K convolution"""
    target: str = _one_of(TARGETS, "in_place")
    """what targets are made from: token_embeddings, the input of the transformer, or hidden_states, the MLP's own"""
    delta_clip: float | None = _positive(None, 1e9, "in_place")
    """largest Frobenius norm of one chunk's update, η and g included; null: no clip; not for the residual update"""
    decay: float = _field(1.0, "a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1, "in_place")
    """γ, factor of what was learnt before each update; 1: nothing is forgotten"""
    update: str = _one_of(UPDATES, "in_place")
    """hebbian, the paper's sum over a chunk, or residual, which writes only what is not answered yet"""
    target_gain: float = _positive(1.0, 1e6, "in_place")
    """g, factor of the targets"""
    base_lr: float = _positive(1.0, 1e6, "mlp")
    """kind mlp: the fast weights' learning rate, which each head scales by what it hears; not the optimizer's"""
    mini_batch_size: int = _whole(16, 1, 1_000_000, "mlp")
    """kind mlp: C, steps whose gradients are taken at the same weights; each reads its own update"""
    initial_gating_alpha: float = _at_most(0.0, 1000, "mlp")
    """kind mlp: where the gate tanh(alpha) of new layers begins; 0: exactly the base model"""
    scan_checkpoint_group_size: int = _whole(8, 0, 1_000_000, "mlp")
    """kind mlp: mini-batches that a backward pass computes again at a time, to need less memory; 0: none is"""

    def __post_init__(self):
        self._require_kind(field.name for field in dataclasses.fields(TTTConfig) if not self._has_default(field))
        for field in (field for field in dataclasses.fields(TTTConfig) if field.metadata):
            allowed = field.metadata["allowed"] + ", or None" * (field.default is None)
            self._require(field.name, field.metadata["holds"](getattr(self, field.name)), allowed)
        if self.update == "residual":
            self._require_residual()
        self._parse_layers()
        if self.layers is None and self.kind == "mlp":
            object.__setattr__(self, "layers", "middle")
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", list(self.layers))  # not the caller's own, who may change it

    def _has_default(self, field: dataclasses.Field) -> bool:
        value = getattr(self, field.name)
        return type(value) is type(field.default) and value == field.default

    def _require_kind(self, given: Iterable[str]) -> None:
        """That what was given belongs to this kind: a setting of the other would change nothing."""
        self._require("kind", self.kind in KINDS, " or ".join(map(repr, KINDS)))
        mine = self.names()
        for name in given:
            if name not in mine:
                raise ValueError(
                    f'{PREFIX}{name}={getattr(self, name)!r}: not with {PREFIX}kind="{self.kind}", which takes '
                    f"{', '.join(PREFIX + known for known in mine)}."
                )

    def names(self) -> list[str]:
        """The settings that this kind has."""
        return [f.name for f in dataclasses.fields(TTTConfig) if f.metadata.get("kind") in (None, self.kind)]

    def _require_residual(self) -> None:
        self._require(
            "delta_clip", self.delta_clip is None, f'None with {PREFIX}update="residual", which needs no clip'
        )
        for name in ("learning_rate", "target_gain"):
            large = getattr(self, name) >= RESIDUAL_LEAST
            self._require(name, large, f'at least {RESIDUAL_LEAST:g} with {PREFIX}update="residual"')

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{PREFIX}{name}={getattr(self, name)!r}: must be {allowed}.")

    def _parse_layers(self) -> list[int] | str | None:
        """`layers` as a sorted list of indices, or `"all"`, `"middle"`, None."""
        layers = self.layers
        if layers is None or (isinstance(layers, str) and layers in ("all", "middle")):
            return layers
        indices: list = []
        if isinstance(layers, str):
            parts = [part.strip() for part in layers.split(",")]
            indices = [int(part) if part.isdecimal() and len(part) < 10 else part for part in parts]
        elif isinstance(layers, (list, tuple)):
            indices = list(layers)
        valid = bool(indices) and all(_is_int(i) and i >= 0 for i in indices)
        self._require("layers", valid, 'a list of layer indices, a string such as "1,5,10", "all", "middle", or None')
        return sorted(set(indices))

    def layer_indices(self, num_layers: int) -> list[int]:
        """The TTT layers, ascending, of a transformer with `num_layers` layers.

        Raises:
            ValueError: for an index out of range, or when no layer is selected.
        """
        layers = self._parse_layers()
        if isinstance(layers, list):
            self._require("layers", layers[-1] < num_layers, f"indices from 0 to {num_layers - 1}")
            return layers
        if layers is None:
            selected = list(range(self.start_layer, num_layers, self.layer_frequency))
            self._require("start_layer", bool(selected), f"from 0 to {num_layers - 1}, else no layer is selected")
            return selected
        selected = list(range(num_layers) if layers == "all" else range(num_layers // 4, 3 * num_layers // 4))
        self._require("layers", bool(selected), f"something that selects at least one of {num_layers} layers")
        return selected

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> "TTTConfig":
        """From `{"ttt_enabled": True, ...}`; every key must carry the prefix.

        Raises:
            ValueError: for an unknown key, a key of the other kind, or a bad value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key, value in kwargs.items():
            if key.removeprefix(PREFIX) not in names or not key.startswith(PREFIX):
                allowed = ", ".join(PREFIX + name for name in names)
                raise ValueError(f"{key}={value!r}: unknown argument; allowed are {allowed}.")
        given = {key.removeprefix(PREFIX): value for key, value in kwargs.items()}
        config = cls(**given)
        config._require_kind(given)
        return config

    def to_kwargs(self) -> dict[str, Any]:
        """All settings of this kind with their prefix, as `LMModel` takes them and `config.json` keeps them.

        The first kind is not named: its settings are those of before there were two.
        """
        names = [name for name in self.names() if name != "kind" or self.kind != KINDS[0]]
        return {PREFIX + name: getattr(self, name) for name in names}
