"""`TTTConfig`: the `ttt_*` keyword arguments, without their prefix, checked before anything is built."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "ttt_"
TARGETS = ("token_embeddings", "hidden_states")
UPDATES = ("hebbian", "residual")
RESIDUAL_RANGE = (1e-12, 1e12)
"""Of η and g in the residual update, far inside what float32 holds together with its products."""


@dataclass(frozen=True)
class TTTConfig:
    """Settings of In-Place Test-Time Training. `ttt_chunk_size=64` as a keyword of `LMModel` is `chunk_size=64` here.

    Args:
        enabled: off means stock classes.
        layer_frequency, start_layer: layers i >= start with (i - start) % frequency == 0.
        layers: overrides the two: a list of indices, `"1,5,10"`, `"all"`, or `"middle"` (n//4 up to, not including,
            3n//4).
        chunk_size: C, in steps of 80 ms. Keep it well below the attention's context.
        learning_rate: η. The update sums over the chunk, so η and C are coupled.
        conv_kernel_size: K, this step and the next K - 1.
        conv_depthwise: one filter per channel; otherwise a full D×D×K convolution.
        target: `"token_embeddings"`, the input of the transformer stack, or `"hidden_states"`, the MLP's own input.
        delta_clip: largest Frobenius norm of one chunk's update, η included. None: no clip.
        decay: γ in (0, 1], multiplies the accumulated delta before each chunk's update is added.
        update: `"hebbian"`, the paper's sum of outer products, or `"residual"`, which writes only what the fast weight
            does not answer yet; it takes no `delta_clip`, as it is bounded by its targets.
        target_gain: g, multiplies the targets.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    enabled: bool = False
    layer_frequency: int = 6
    start_layer: int = 5
    layers: list[int] | str | None = None
    chunk_size: int = 256
    learning_rate: float = 1e-3
    conv_kernel_size: int = 2
    conv_depthwise: bool = True
    target: str = "token_embeddings"
    delta_clip: float | None = None
    decay: float = 1.0
    update: str = "hebbian"
    target_gain: float = 1.0

    def __post_init__(self):
        for name in ("enabled", "conv_depthwise"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        for name in ("layer_frequency", "chunk_size", "conv_kernel_size"):
            value = getattr(self, name)
            self._require(name, _is_int(value) and value > 0, "a positive whole number")
        self._require(
            "start_layer", _is_int(self.start_layer) and self.start_layer >= 0, "a whole number that is not negative"
        )
        for name in ("learning_rate", "target_gain"):
            value = getattr(self, name)
            self._require(name, _is_number(value) and value > 0, "a positive finite number")
        self._require(
            "delta_clip",
            self.delta_clip is None or (_is_number(self.delta_clip) and self.delta_clip > 0),
            "a positive finite number, or None for no clip",
        )
        self._require("decay", _is_number(self.decay) and 0 < self.decay <= 1, "a number in (0, 1]")
        for name, choices in (("target", TARGETS), ("update", UPDATES)):
            self._require(name, getattr(self, name) in choices, " or ".join(map(repr, choices)))
        if self.update == "residual":
            self._require_residual()
        self._parse_layers()
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", list(self.layers))  # not the caller's own, who may change it

    def _require_residual(self) -> None:
        """The residual update is computed in float32, with 1/η, and bounds itself."""
        self._require(
            "delta_clip", self.delta_clip is None, f'None with {PREFIX}update="residual", which needs no clip'
        )
        for name in ("learning_rate", "target_gain"):
            low, high = RESIDUAL_RANGE
            in_range = low <= getattr(self, name) <= high
            self._require(name, in_range, f'a number from {low:g} to {high:g} with {PREFIX}update="residual"')

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
            ValueError: for an unknown key or a bad value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key, value in kwargs.items():
            if key.removeprefix(PREFIX) not in names or not key.startswith(PREFIX):
                allowed = ", ".join(PREFIX + name for name in names)
                raise ValueError(f"{key}={value!r}: unknown argument; allowed are {allowed}.")
        return cls(**{key.removeprefix(PREFIX): value for key, value in kwargs.items()})

    def to_kwargs(self) -> dict[str, Any]:
        """All settings with their prefix, as `LMModel` takes them and `config.json` keeps them."""
        return {PREFIX + field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max and not math.isnan(value)
