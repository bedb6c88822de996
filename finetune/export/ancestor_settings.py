"""The settings of an ancestor's TTT layers: in its training_config.json, or in the YAML file of its training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moshi_patch

from ..common.errors import ConfigError, shown
from ..common.files import read_json
from ..settings.parsing import read_yaml

DEFAULTS = {"mini_batch_size": 16, "base_lr": 1.0, "initial_gating_alpha": 0.1}
"""What ancestors took for a key that a file does not have."""

READ = {*DEFAULTS, "layers", "enable", "enabled", "persistent_states"}

MAY_BE_ADAPTED = (
    "W1, b1, W2 and b2 may be what one stream had adapted to, not weights that were learnt to begin from: ancestors "
    "with persistent_states write them in every forward pass"
)
NOT_ADAPTED = "W1, b1, W2 and b2 are what training left: this ancestor had persistent_states off."


@dataclass(frozen=True)
class AncestorSettings:
    """What of an ancestor's settings is kept.

    Attributes:
        source: the file that they are from.
        about_states: what W1, b1, W2 and b2 are, in a sentence.
        left_out: keys of its `ttt` section that mean nothing here.
    """

    mini_batch_size: int
    base_lr: float
    initial_gating_alpha: float
    source: str
    about_states: str
    left_out: list[str] = field(default_factory=list)


def read_settings(weights: Path, config: str | None, layers: list[int], num_layers: int) -> AncestorSettings:
    """The settings beside `weights`, or else in the YAML file `config`.

    Args:
        layers: those with TTT in the file of weights, of `num_layers`.

    Raises:
        ConfigError: when neither has a `ttt` section, or it contradicts the weights.
    """
    path = weights.with_name("training_config.json")
    section = _section(read_json(path)) if path.is_file() else None
    if section is None and config is not None:
        path = Path(config)
        section = _section(read_yaml(path))
    if section is None:
        where = f"{path}: has no section ttt" if path.is_file() else f"{path}: no such file"
        raise ConfigError(
            f"{where}, so mini_batch_size and base_lr are unknown; give the YAML file of its training with --config."
        )
    _check_enabled(path, section)
    _check_layers(path, section, layers, num_layers)
    values = {name: _number(path, section, name) for name in DEFAULTS}
    states = section.get("persistent_states")
    said = "persistent_states is true there" if states is True else "whether this one had them is not recorded"
    about = NOT_ADAPTED if states is False else f"{MAY_BE_ADAPTED} ({said})."
    left_out = [name if name.isprintable() else repr(name) for name in section if name not in READ]
    return AncestorSettings(**values, source=str(path), about_states=about, left_out=left_out)


def _section(content: Any) -> Mapping[str, Any] | None:
    """The `ttt` section of a file, or of its `training`; None when it has none."""
    if not isinstance(content, Mapping):
        return None
    section = content.get("ttt")
    return section if isinstance(section, Mapping) else _section(content.get("training"))


def _check_enabled(path: Path, section: Mapping[str, Any]) -> None:
    for key in ("enable", "enabled"):
        if section.get(key, True) is not True:
            raise ConfigError(
                f"{path}: ttt.{key}={shown(section[key])}: contradicts the weights, which hold TTT layers."
            )


def _check_layers(path: Path, section: Mapping[str, Any], layers: list[int], num_layers: int) -> None:
    given = section.get("layers")
    if given is None:
        return
    try:
        wanted = moshi_patch.TTTConfig(layers=given).layer_indices(num_layers)
    except ValueError as error:
        raise ConfigError(f"{path}: ttt.layers={shown(given)}: {error}") from error
    if wanted != layers:
        raise ConfigError(
            f"{path}: ttt.layers={shown(given)}: means layers {wanted}, and the weights have TTT in layers {layers}."
        )


def _number(path: Path, section: Mapping[str, Any], name: str) -> Any:
    value, default = section.get(name), DEFAULTS[name]
    if value is None:
        return default
    whole = isinstance(default, int)
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    limits = {"mini_batch_size": (1, 1_000_000), "base_lr": (1e-12, 1e6), "initial_gating_alpha": (-1e3, 1e3)}[name]
    if not fits or not limits[0] <= value <= limits[1]:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{path}: ttt.{name}={shown(value)}: must be {kind} from {limits[0]:g} to {limits[1]:g}.")
    return value if whole else float(value)
