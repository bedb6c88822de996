"""The command lines of all programs, and their help, made by simple-parsing from the dataclasses of the settings.

simple-parsing gives every setting its option with its dotted name and finds the text below its field. Values are read
by `parsing`, as those of a YAML file: `2e3`, `null`, `[1,3]`; what is unknown is refused with the nearest right name.
"""

import argparse
import dataclasses
import difflib
import functools
import logging
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import simple_parsing
from simple_parsing.wrappers.field_wrapper import ArgumentGenerationMode, DashVariant, FieldWrapper, NestedMode

from ..common.errors import ConfigError
from ..common.tables import columns
from .evaluation import EvalArgs
from .limits import allowed, check_limits
from .modes import with_mode_settled
from .parsing import build, flat, merge, read_text, read_yaml, unknown_key
from .plan_words import in_our_words, with_kind_settled
from .record import to_dict
from .schema import TrainArgs

T = TypeVar("T")

logger = logging.getLogger(__name__)

COMMAND_LINE, DEFAULT = "command line", "default"
"""Where a setting may come from, beside a file."""

SHOW_OPTIONS = ("--show-settings", "--show_settings")

ROOT = "args"
"""Where simple-parsing keeps the settings; not part of any name."""


def parse_command_line(argv: Sequence[str], prog: str = "train.py") -> TrainArgs:
    """The settings of a training: `FILE` or `--config FILE`, `--resume [STEP]`, and `--dotted.key value`, in any order.

    `validate()` is the caller's.

    Raises:
        ConfigError: as `load_args`, or without exactly one FILE.
        SystemExit: after the help, with code 0.
    """
    return parse_with_sources(argv, prog)[0]


def parse_with_sources(argv: Sequence[str], prog: str = "train.py") -> tuple[TrainArgs, dict[str, str]]:
    """As `parse_command_line`, and by dotted key where each setting comes from."""
    parser = SettingsParser(TrainArgs, prog, "FILE.yaml [--resume [STEP]] [--key value ...]")
    parser.add_argument(
        "FILE",
        nargs="*",
        default=argparse.SUPPRESS,
        help="YAML file of the run; any of its keys may be given as an option",
    )
    parser.add_argument("--config", metavar="FILE", help="the same as FILE")
    parser.add_argument(
        "--resume", metavar="STEP", nargs="?", const="-1", help="go on at STEP, or the newest checkpoint"
    )
    _add_show(parser)
    given = parser.given(argv)
    step = given.pop("resume", None)
    if step is not None:
        resumed = read_text("checkpoint.resume_step", step, int)
        given = {"checkpoint.resume": True, "checkpoint.resume_step": resumed} | given
    files = given.pop("FILE", []) + [given.pop(name) for name in ("config",) if name in given]
    if len(files) != 1:
        raise ConfigError(f"config={files!r}: exactly one YAML file is needed, as FILE or as `--config FILE`.")
    content, notes = in_our_words(read_yaml(Path(files[0])))
    of_run = _of_its_run(Path(files[0]), given)
    merged, told = with_kind_settled(merge(content, of_run | given))
    settled = with_mode_settled(merged)
    args = build(TrainArgs, settled)
    for note in notes + told:
        logger.info("%s", note)
    layers = [
        (COMMAND_LINE, given),
        ("the folder of the file", of_run),
        (str(files[0]), flat(content)),
        ("its other keys", flat(merged)),
        ("training_mode", flat(settled)),
    ]
    keys = flat(to_dict(args))
    return args, {key: next((source for source, layer in layers if key in layer), DEFAULT) for key in keys}


def wants_settings_shown(argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether `--show-settings` is among the words of a command line, and the others."""
    rest = [word for word in argv if word not in SHOW_OPTIONS]
    return len(rest) < len(argv), rest


def shown_settings(values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """A table of dotted keys: value and source of each."""
    rows = [(key, _in_yaml(values[key]), source) for key, source in sources.items()]
    return columns(["key", "value", "source"], rows)


def _add_show(parser: argparse.ArgumentParser) -> None:
    """For the help; `wants_settings_shown` takes it out before."""
    parser.add_argument(
        *SHOW_OPTIONS, action="store_true", help="print every setting with its value and source, and do nothing else"
    )


def _of_its_run(file: Path, given: dict[str, Any]) -> dict[str, Any]:
    """An `args.yaml` that is resumed belongs to the run in whose folder it lies, also after that was moved."""
    folder = Path(os.path.abspath(file)).parent
    resumed = file.name == "args.yaml" and given.get("checkpoint.resume") and (folder / "checkpoints").is_dir()
    return {"run_dir": str(folder)} if resumed else {}


def load_args(path: str | Path, overrides: Sequence[str] = ()) -> TrainArgs:
    """Reads a YAML file, with dotted overrides such as `["--optim.lr", "1e-5", "--do_eval", "--ttt.layers=1,3"]`.

    Raises:
        ConfigError: for an unknown key at any depth, a wrong type, or no such file.
    """
    return parse_command_line([*overrides, f"--config={path}"])


def evaluation_options(
    argv: Sequence[str], prog: str = "eval_from_checkpoint.py"
) -> tuple[dict[str, Any], Path | None]:
    """What the command line of an evaluation says, by dotted key, and the file of `--config`.

    Raises:
        ConfigError: for an unknown key or a wrong type, or without a checkpoint.
        SystemExit: after the help, with code 0.
    """
    parser = SettingsParser(EvalArgs, prog, "--checkpoint_dir PATH [--config FILE.yaml] [--key value ...]")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of a training, for what the checkpoint does not say"
    )
    _add_show(parser)
    parser.add_argument("--batch_size", metavar="N", help="the same as --eval_batch_size")
    given = parser.given(argv)
    config, batch = given.pop("config", None), given.pop("batch_size", None)
    if batch is not None:
        batch = read_text("batch_size", batch, int)
        if given.setdefault("eval_batch_size", batch) != batch:
            other = given["eval_batch_size"]
            raise ConfigError(f"batch_size={batch}: contradicts eval_batch_size={other}, which is the same; give one.")
    if not given.get("checkpoint_dir"):
        raise ConfigError("checkpoint_dir: is required, as in `--checkpoint_dir RUN/checkpoints/checkpoint_000500`.")
    return given, None if config is None else Path(config)


def parse(cls: type[T], argv: Sequence[str], prog: str, usage: str) -> T:
    """The settings of a program that has no file of them.

    Raises:
        ConfigError: for an unknown option, a wrong value or a missing argument.
        SystemExit: after the help, with code 0.
    """
    args = build(cls, SettingsParser(cls, prog, usage).given(argv))
    check_limits(args)
    return args


class SettingsParser(simple_parsing.ArgumentParser):
    """Options for all settings of a dataclass; only those that are given get a value.

    Args:
        cls: the dataclass. Fields with the metadata `positional` are arguments without a name; if there is one, an
            option for a boolean takes no value.
        usage: what follows the program's name.
    """

    def __init__(self, cls: type, prog: str, usage: str):
        self._command = any(field.metadata.get("positional") for field in dataclasses.fields(cls))
        super().__init__(
            prog=prog,
            argument_default=argparse.SUPPRESS,
            usage=f"{prog} {usage}",
            description=cls.__doc__,
            allow_abbrev=False,
            add_option_string_dash_variants=DashVariant.DASH if self._command else DashVariant.UNDERSCORE,
            argument_generation_mode=ArgumentGenerationMode.NESTED,
            nested_mode=NestedMode.WITHOUT_ROOT,
            formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=28, width=120),
        )
        self._cls = cls
        self.add_arguments(cls, ROOT)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """What `argv` says, by dotted key.

        Raises:
            ConfigError: for an unknown key, a section instead of a key, a wrong type, or a flag without its value.
            SystemExit: after the help, with code 0.
        """
        self._preprocessing()
        found = vars(self.parse_args(self._words(argv)))
        return {key.removeprefix(f"{ROOT}."): value for key, value in found.items()}

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}; usage: {self.usage}.")

    def _words(self, argv: Sequence[str]) -> list[str]:
        """`--name value` as `--name=value`, behind the arguments without a name: a value may begin with a dash."""
        arguments, options, waiting = [], [], list(argv)
        while waiting:
            word = waiting.pop(0)
            option, equals, value = word.partition("=")
            if not word.startswith("--") or word == "--":
                (options if word == "-h" else arguments).append(word)
                continue
            if not equals and self._takes(option, waiting[:1]):
                equals, value = "=", waiting.pop(0)
            action = self._option_string_actions.get(option)
            if action is None and self._command:
                near = difflib.get_close_matches(option, self._option_string_actions, n=1)
                question = f"did you mean {near[0]}? " if near else ""
                raise ConfigError(f"{option}: unknown option; {question}Usage: {self.usage}.")
            if action is None:
                raise unknown_key(option[2:], value if equals else None, (self._cls,))
            missing = not equals or (option == "--config" and not value)
            if (action.nargs is None and missing) or value == "--":  # which argparse would drop
                read_text(option[2:], None, str)  # which says that it needs a value
            options.append(f"{option}{equals}{value}")
        if arguments and not self._get_positional_actions():
            raise ConfigError(f"{arguments[0]!r}: not understood; usage: {self.usage}.")
        return [*options, "--", *arguments] if arguments else options

    def _takes(self, option: str, following: list[str]) -> bool:
        """Whether the word after an option is its value."""
        action = self._option_string_actions.get(option)
        if not following or following[0].startswith("--") or (action is not None and action.nargs == 0):
            return False
        return option != "--resume" or re.fullmatch(r"-?\d+", following[0]) is not None

    def _preprocessing(self, args: Sequence[str] = (), namespace: argparse.Namespace | None = None) -> None:
        """Replaces simple-parsing's way to read and describe a value by that of `parsing` and `limits`."""
        if self._preprocessing_done:
            return
        wrappers = [one for root in self._wrappers for one in (root, *root.descendants)]
        for field in (field for one in wrappers for field in one.fields):
            field._arg_options = _action(field.dest.removeprefix(f"{ROOT}."), field, flag=self._command)
        super()._preprocessing(args, namespace)
        groups = {group.title: group for group in self._action_groups}
        for one in wrappers:
            groups[one.title].title = f"{one.dest.removeprefix(f'{ROOT}.')}.*" if one.parent else "arguments"
            groups[one.title].description = None if one.parent is None else one.dataclass.__doc__

    def _postprocessing(self, parsed_args: argparse.Namespace) -> argparse.Namespace:
        return parsed_args  # nothing is built before files were merged with it

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        return arg_string if action.type is None else action.type(arg_string)


def _action(key: str, wrapper: FieldWrapper, flag: bool) -> dict[str, Any]:
    """The arguments of `add_argument` for one setting.

    Args:
        flag: that of a boolean takes no value.
    """
    field, hint = wrapper.field, wrapper.field.type
    described = {"default": argparse.SUPPRESS, "help": _help(wrapper).replace("%", "%%")}
    if field.metadata.get("positional"):
        several = hint == list[str]
        number = "+" if several else "?" if field.default is None else None
        reader = functools.partial(read_text, key, hint=str if several else hint)
        return described | {"type": reader, "metavar": key.upper(), "nargs": number}
    described["dest"] = wrapper.dest
    if flag and hint is bool:
        return described | {"action": "store_true"}
    described |= {"type": functools.partial(read_text, key, hint=hint), "metavar": _METAVARS.get(hint, "VALUE")}
    return described | ({"nargs": "?", "const": True} if hint is bool else {})


def _help(wrapper: FieldWrapper) -> str:
    """The text below the field, its default, and what it may be."""
    field = wrapper.field
    required = field.metadata.get("positional") or wrapper.default == ""
    notes = [] if required else [f"default: {_in_yaml(wrapper.default)}"]
    if "allowed" in field.metadata and field.type is not bool:
        notes.append(allowed(field))
    return (wrapper.help or "") + (f" ({'; '.join(notes)})" if notes else "")


def _in_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_METAVARS = {bool: "true|false", int: "N", float: "X"}
