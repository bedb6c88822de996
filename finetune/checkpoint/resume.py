"""May this run go on from that checkpoint? Its files are whole, and the settings are those of the same model."""

import logging
from pathlib import Path
from typing import Any

from moshi_patch import TTTConfig

from ..common.differences import differences, differing_keys
from ..common.errors import ConfigError
from ..settings.modes import mode_of
from ..settings.parsing import flat
from ..settings.record import to_dict, with_absolute_paths
from ..settings.schema import TrainArgs
from .saved import NOT_ARCHITECTURE, SavedCheckpoint, open_checkpoint
from .state_files import has_state_checksums, state_problems
from .verify import refuse_broken

logger = logging.getLogger(__name__)

FIXED_SETTINGS = (
    "training_mode",
    "full_finetuning",
    "lora.enable",
    "lora.ft_embed",
    "ttt.train_w_down",
    "ttt.as_control",
    "param_dtype",
)
"""Keys of the YAML that decide what is trained and in which precision; the architecture is compared in config.json."""

SCHEDULE_SETTINGS = (
    "max_steps",
    "optim.lr",
    "optim.weight_decay",
    "optim.pct_start",
    "ttt.optim_lr",
    "ttt.text_emb_lr",
    "ttt.stock_lr",
    "ttt.first_steps",
)
NOT_LOGGED = ("run_dir", "overwrite_run_dir", "checkpoint.", "wandb.", "lora.", "ttt.", "init_from", "training_mode")
"""Settings that are compared otherwise, or do not matter."""

REMEDY = "Resume another step with --resume STEP, or begin a new run from other weights with init_from."


def open_resumable(checkpoint: Path) -> SavedCheckpoint:
    """The checkpoint that a run goes on from, when its weights and its training state are as they were saved.

    Raises:
        ConfigError: when a file is damaged or missing, or belongs to another step.
    """
    try:
        saved = open_checkpoint(checkpoint, "checkpoint.resume")
        refuse_broken(saved, "checkpoint.resume")
        if saved.training is None or saved.train_args is None or "lm_config" not in saved.training:
            raise ConfigError(f"{saved.folder / 'training_config.json'}: has no sections training and lm_config.")
        if problems := state_problems(checkpoint):
            raise ConfigError(f"checkpoint.resume: {' '.join(problems)}")
    except ConfigError as error:
        raise ConfigError(f"{error} It cannot be resumed. {REMEDY}") from error
    if not has_state_checksums(checkpoint):
        logger.warning("%s: has no checksums of its training state; a flipped bit would not be seen.", checkpoint)
    return saved


def refuse_other_model(saved: SavedCheckpoint, args: TrainArgs, lm_config: dict[str, Any]) -> None:
    """Raises a ConfigError when another model was trained in `saved` than that of `args` and `lm_config`."""
    before, now = flat(to_dict(saved.train_args)), flat(to_dict(args))
    before["training_mode"], now["training_mode"] = mode_of(saved.train_args), mode_of(args)
    there, here = _with_defaults(saved.training["lm_config"]), _with_defaults(lm_config)
    for settings, keys in ((there, before), (here, now)):
        settings |= {key: keys.get(key) for key in FIXED_SETTINGS}
        settings["ttt.text_emb_lr is set"] = keys["ttt.text_emb_lr"] is not None  # its value may change
    keys = (there.keys() | here.keys()) - NOT_ARCHITECTURE
    if changes := differences(here, there, "{key}={one!r}, was {other!r}", keys):
        raise ConfigError(
            f"{saved.folder.parent}: another model was trained there: {'; '.join(changes)}. Restore these settings to "
            "resume, or start a new run with init_from."
        )


def log_changes(saved: SavedCheckpoint, args: TrainArgs) -> bool:
    """Logs every setting that differs from the checkpoint's; True when the optimizer's schedule does."""
    before, now = (flat(with_absolute_paths(to_dict(one))) for one in (saved.train_args, args))
    rescheduled = differing_keys(now, before, SCHEDULE_SETTINGS)
    for text in differences(now, before, "{key} is {one!r}, was {other!r}: a new schedule from here.", rescheduled):
        logger.warning("%s", text)
    rest = [key for key in now if key not in SCHEDULE_SETTINGS and not key.startswith(NOT_LOGGED)]
    for text in differences(now, before, "{key} is {one!r}, was {other!r} in the checkpoint.", rest):
        logger.info("%s", text)
    return bool(rescheduled)


def _with_defaults(lm_config: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of settings of TTT that came after it was saved."""
    return TTTConfig().to_kwargs() | lm_config
