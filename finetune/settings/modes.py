"""`training_mode`: what a run trains, as one word, and the keys that it settles or contradicts."""

from collections.abc import Mapping
from typing import Any

from .limits import require
from .parsing import merge
from .schema import MODES, TrainArgs

FULL, LORA, TTT = "full_finetuning", "lora.enable", "ttt.enabled"
SETTLED: dict[str, dict[str, bool]] = {
    "full": {FULL: True, LORA: False},
    "lora": {FULL: False, LORA: True},
    "ttt": {FULL: False, LORA: False, TTT: True},
    "lora+ttt": {FULL: False, LORA: True, TTT: True},
    "frozen": {FULL: False, "control": False},
}
"""By mode, the keys that it settles and their values; `auto` settles none."""

WITHOUT_TTT = ("lora", "frozen")
"""Modes in which target generators and W_down stay as they are."""


def with_mode_settled(content: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings in which those keys that the mode settles, and nobody has set, have the mode's values.

    A key that was set otherwise stays as it is: `check_mode` refuses it.
    """
    mode = content.get("training_mode")
    settled = SETTLED.get(mode, {}) if isinstance(mode, str) else {}
    missing = {key: value for key, value in settled.items() if _given(content, key) is None}
    if _given(content, "ttt.as_control"):
        missing.pop(TTT, None)
    return merge(content, missing)


def _given(content: Any, key: str) -> Any:
    """The value of a dotted key in nested settings; None when there is none, or no section where one has to be."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def check_mode(args: TrainArgs) -> None:
    """That no key says something else than the mode.

    Raises:
        ConfigError: naming the key, its value and the mode.
    """
    mode = args.training_mode
    values = {FULL: args.full_finetuning, LORA: args.lora.enable, "control": args.control}
    values[TTT] = args.ttt.enabled or args.ttt.as_control
    for key, value in SETTLED.get(mode, {}).items():
        remedy = f"contradicts training_mode={mode!r}; set it to {str(value).lower()}, or training_mode to auto."
        require(values[key] == value, key, values[key], remedy)
    if mode in WITHOUT_TTT:
        remedy = f"contradicts training_mode={mode!r}, which does not train the text embedding; set it to null."
        require(args.ttt.text_emb_lr is None, "ttt.text_emb_lr", args.ttt.text_emb_lr, remedy)
        remedy = f"nothing would train in them with training_mode={mode!r}; set it to 0."
        require(args.ttt.first_steps == 0, "ttt.first_steps", args.ttt.first_steps, remedy)


def mode_of(args: TrainArgs) -> str:
    """The mode that `args` come to, one of `MODES` but `auto`; two runs of the same one train the same parameters.

    A control has the mode of the run that it is the control of.
    """
    if args.training_mode != MODES[0]:
        return args.training_mode
    if args.full_finetuning:
        return "full"
    with_ttt = args.ttt.enabled or args.ttt.as_control
    return "+".join(["lora"] * args.lora.enable + ["ttt"] * with_ttt) or "frozen"


def trains_ttt(args: TrainArgs) -> bool:
    """Whether target generators, W_down of the TTT layers and `ttt.text_emb_lr` count."""
    return args.training_mode not in WITHOUT_TTT


def saves(args: TrainArgs) -> bool:
    """Whether the run saves checkpoints: one that trains nothing never does."""
    return args.do_ckpt and args.training_mode != "frozen"


def saves_adapters(args: TrainArgs) -> bool:
    """Whether checkpoints hold adapters, and not the whole model."""
    return args.lora.enable and args.save_adapters and not args.full_finetuning


def saves_trained_alone(args: TrainArgs) -> bool:
    """Whether checkpoints hold what `training_mode: ttt` trains, and nothing of the base model."""
    return args.training_mode == "ttt" and args.save_adapters
