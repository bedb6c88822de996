"""The settings of an ancestor's TTT layers: in its training_config.json, or in the YAML file of its training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moshi_patch

from ..common.errors import ConfigError, shown
from ..common.files import read_json
from ..settings.limits import require
from ..settings.parsing import read_text, read_yaml

DEFAULTS = {"mini_batch_size": 16, "base_lr": 1.0, "initial_gating_alpha": 0.1}
"""What ancestors took for a key that a file does not have."""

READ = {*DEFAULTS, "layers", "enable", "enabled", "kind", "persistent_states"}
IN_PLACE_ALONE = set(moshi_patch.TTTConfig().names()) - set(moshi_patch.TTTConfig(kind="mlp").names())

MAY_BE_ADAPTED = (
    "W1, b1, W2 and b2 may be what one stream had adapted to, not weights that were learnt to begin from: ancestors "
    "with persistent_states write them in every forward pass"
)
NOT_ADAPTED = "W1, b1, W2 and b2 are what training left: this ancestor had persistent_states off."


@dataclass(frozen=True)
class AncestorSettings:
    """What of an ancestor's settings is kept.

    Attributes:
        kept: as this project has them.
        source: the file that they are from.
        about_states: what W1, b1, W2 and b2 are, in a sentence.
        left_out: keys of its `ttt` section that mean nothing here.
    """

    kept: moshi_patch.TTTConfig
    source: str
    about_states: str
    left_out: list[str]


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
    for name, value in section.items():
        other = name in IN_PLACE_ALONE or (name == "kind" and value != "mlp")
        require(not other, f"{path}: ttt.{name}", value, "belongs to In-Place TTT, which no ancestor has.")
    given = {name: default if section.get(name) is None else section[name] for name, default in DEFAULTS.items()}
    values = {
        name: read_text(f"{path}: ttt.{name}", value, type(DEFAULTS[name])) if isinstance(value, str) else value
        for name, value in given.items()
    }
    try:
        kept = moshi_patch.TTTConfig(enabled=True, kind="mlp", layers=layers, **values)
    except ValueError as error:
        raise ConfigError(f"{path}: ttt.{str(error).removeprefix('ttt_')}") from error
    states = section.get("persistent_states")
    said = "persistent_states is true there" if states is True else "whether this one had them is not recorded"
    about = NOT_ADAPTED if states is False else f"{MAY_BE_ADAPTED} ({said})."
    left_out = [name if name.isprintable() else repr(name) for name in map(str, section) if name not in READ]
    return AncestorSettings(kept, str(path), about, left_out)


def _section(content: Any) -> Mapping[str, Any] | None:
    """The `ttt` section of a file, or of its `training`, or the keys `ttt_...` and `ttt....`; None when it has none."""
    if not isinstance(content, Mapping):
        return None
    section = content.get("ttt")
    if isinstance(section, Mapping):
        return section
    flat = {str(key)[len("ttt.") :]: value for key, value in content.items() if str(key).startswith(("ttt.", "ttt_"))}
    return flat or _section(content.get("training"))


def _check_enabled(path: Path, section: Mapping[str, Any]) -> None:
    for key in ("enable", "enabled"):
        if section.get(key) not in (None, True):
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
