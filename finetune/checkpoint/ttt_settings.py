"""Where the `ttt_` settings of a checkpoint come from when its config.json has none."""

from collections.abc import Mapping
from typing import Any

from moshi_patch import TTTConfig

from ..settings.parsing import build
from ..settings.schema import TrainArgs, ttt_keyword


def has_ttt_settings(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` says anything of TTT."""
    return any(key.startswith("ttt_") for key in config)


def ttt_of_training(
    config: Mapping[str, Any], training: Mapping[str, Any] | None, args: TrainArgs | None
) -> dict[str, Any]:
    """The `ttt_` keys that `config` lacks, as the checkpoint was trained; empty when it has some, or had no TTT.

    Args:
        training: content of `training_config.json`, of which `args` are the settings.
    """
    if has_ttt_settings(config) or training is None:
        return {}
    recorded = {key: value for key, value in (training.get("lm_config") or {}).items() if key.startswith("ttt_")}
    if not recorded and args is not None:
        recorded = args.ttt.to_kwargs()
    return recorded if recorded.get("ttt_enabled") else {}


def ttt_from(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `ttt_` keys of settings by dotted key; empty unless they switch TTT on.

    Raises:
        ConfigError: for a value that TTT does not have.
    """
    named = {ttt_keyword(key): value for key, value in settings.items() if key.startswith("ttt.")}
    known = TTTConfig.__dataclass_fields__
    given = {name: value for key, value in named.items() if (name := key.removeprefix("ttt_")) in known}
    config = build(TTTConfig, given, "ttt")
    return config.to_kwargs() if config.enabled else {}
