"""From a YAML file and a command line to `TrainArgs`, and from there to a file and back."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError
from .parsing import build, override, read_options, read_yaml
from .schema import TrainArgs


def load_args(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainArgs:
    """Reads a YAML file, with dotted overrides such as `["--optim.lr", "1e-5", "--do_eval", "--ttt.layers=1,3"]`.

    Raises:
        ConfigError: for an unknown key at any depth, a wrong type, or no such file. `validate()` is the caller's.
    """
    content = read_yaml(Path(path))
    for name, value in read_options(overrides, "overrides look like `--optim.lr 1e-5`"):
        override(TrainArgs, content, name, value)
    return build(TrainArgs, content)


def parse_command_line(argv: list[str]) -> TrainArgs:
    """`FILE` or `--config FILE`, `--resume [STEP]`, and dotted overrides, in any order (without the program's name).

    Raises:
        ConfigError: as `load_args`, or without exactly one FILE.
    """
    files, overrides, waiting = [], [], list(argv)
    while waiting:
        token = waiting.pop(0)
        name, equals, value = token.partition("=")
        if name == "--config":
            if not equals and not waiting:
                raise ConfigError("config: needs a value, as in `--config FILE.yaml`.")
            files.append(value if equals else waiting.pop(0))
        elif name == "--resume":
            if not equals and waiting and re.fullmatch(r"-?\d+", waiting[0]):
                value = waiting.pop(0)
            overrides += ["--checkpoint.resume=true", f"--checkpoint.resume_step={value or -1}"]
        elif token.startswith("--"):
            overrides.append(token)
            if not equals and waiting and not waiting[0].startswith("--"):
                overrides.append(waiting.pop(0))
        else:
            files.append(token)
    if len(files) != 1:
        raise ConfigError(f"config={files!r}: exactly one YAML file is needed, as FILE or as `--config FILE`.")
    return load_args(files[0], overrides)


def to_dict(args: TrainArgs) -> dict[str, Any]:
    """Nested dictionaries for `training_config.json`. The key of Weights & Biases is a secret and left out (null)."""
    content = dataclasses.asdict(args)
    content["wandb"]["key"] = None
    return content


def from_dict(content: dict[str, Any]) -> TrainArgs:
    """The inverse of `to_dict`, as strict as `load_args`."""
    return build(TrainArgs, copy.deepcopy(content))
