"""The folder of a run: refused where it would do harm, made, continued, or moved aside; never deleted."""

import logging
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import yaml

from ..checkpoint.folders import relocate_adapters
from ..common.disk import writing
from ..common.errors import ConfigError
from ..settings.record import to_dict
from ..settings.schema import TrainArgs
from ..settings.sources import parse_sources

logger = logging.getLogger(__name__)


def check_run_dir(args: TrainArgs) -> Path:
    """`args.run_dir`, on which `open_run_dir` may do its work; changes nothing.

    Raises:
        ConfigError: when it exists, and neither to continue it nor to move it aside was asked for; when it cannot be a
            folder; when moving it aside would take away the working directory or what this run reads.
    """
    run_dir = Path(args.run_dir)
    if os.path.islink(run_dir) and not os.path.exists(run_dir):
        raise ConfigError(f"run_dir={args.run_dir!r}: a link to {os.readlink(run_dir)}, which is not there; make it.")
    parent = next(folder for folder in (run_dir, *run_dir.absolute().parents) if os.path.exists(folder))
    if not parent.is_dir():
        raise ConfigError(f"run_dir={args.run_dir!r}: {parent} is a file; choose a folder.")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"run_dir={args.run_dir!r}: {parent} cannot be written to; choose another folder.")
    if args.checkpoint.resume or not os.path.exists(run_dir) or not any(run_dir.iterdir()):
        return run_dir
    if not args.overwrite_run_dir:
        raise ConfigError(
            f"run_dir={args.run_dir!r}: exists already; continue it with --resume, choose another, or set "
            "overwrite_run_dir=true, which moves it aside."
        )
    for name, path in _in_use(args):
        if path.resolve().is_relative_to(run_dir.resolve()):
            raise ConfigError(
                f"run_dir={args.run_dir!r}: overwrite_run_dir=true would move aside {name} ({path}), which lies in it; "
                "choose another run_dir."
            )
    return run_dir


def open_run_dir(args: TrainArgs) -> Path:
    """Makes `args.run_dir`, after moving aside what was there if that was asked for.

    Raises:
        ConfigError: as `check_run_dir`.
    """
    run_dir = check_run_dir(args)
    if os.path.exists(run_dir) and any(run_dir.iterdir()) and not args.checkpoint.resume:
        plain = Path(os.path.abspath(run_dir))  # `runs/a/../b` has a name only then
        aside = plain.with_name(f"{plain.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
        try:
            plain.rename(aside)
        except OSError as error:
            raise ConfigError(
                f"run_dir={args.run_dir!r}: cannot be moved to {aside} ({error.strerror}); choose another run_dir."
            ) from error
        relocate_adapters(aside)
        logger.warning("The previous run is now in %s.", aside)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir={args.run_dir!r}: cannot be made ({error.strerror}); choose another.") from error
    return run_dir


def start_run_dir(args: TrainArgs) -> Path:
    """`open_run_dir`, and in it the settings of the run, `args.yaml`.

    Raises:
        ConfigError: as `open_run_dir`.
        DiskError: when nothing can be written there.
    """
    path = open_run_dir(args) / "args.yaml"
    with writing(path):
        path.write_text(yaml.safe_dump(to_dict(args), sort_keys=False), encoding="utf-8")
    return path.parent


def _in_use(args: TrainArgs) -> Iterator[tuple[str, Path]]:
    """What must stay where it is while `args` runs, and how to call it."""
    yield "the working directory", Path.cwd()
    for key in ("train_data", "eval_data"):
        spec = getattr(args.data, key)
        for source in parse_sources(spec) if key == "train_data" or args.do_eval else ():
            for path in (Path(source.name), *source.files):
                yield f"data.{key}", path
    if args.init_from is not None:
        yield "init_from", Path(args.init_from)
    for key, value in vars(args.moshi_paths).items():
        path = Path((value or "").removeprefix("file://"))
        if value and path.exists():
            yield f"moshi_paths.{key}", path
