"""The folder of a run: refused where it would do harm, locked, made, continued, or moved aside; never deleted."""

import logging
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import yaml

from ..checkpoint.folders import relocate_adapters
from ..common.disk import writing
from ..common.errors import ConfigError
from ..common.files import write_whole
from ..common.locks import FileLock
from ..settings.record import to_dict, with_absolute_paths
from ..settings.schema import TrainArgs
from ..settings.sources import parse_sources

logger = logging.getLogger(__name__)


LOCK = ".lock"
"""Name of the file that a running trainer holds in its run's folder."""


class RunDir:
    """The folder of one run, on rank 0: may it be used, is it in use, and what was there before.

    Call `check` before anything is loaded, `start` when nothing can refuse the run any more, and `close` at its end.
    """

    def __init__(self, args: TrainArgs):
        self.path, self._args = Path(args.run_dir), args
        remedy = "wait until it has ended, end it (kill PID), or choose another run_dir."
        self._lock = FileLock(self.path / LOCK, f"run_dir={args.run_dir!r}", remedy)

    def check(self) -> None:
        """Locks the folder if it is there already; changes nothing else.

        Raises:
            ConfigError: when another trainer runs in it; when it exists, and neither to continue it nor to move it
                aside was asked for; when it cannot be a folder; when moving it aside would take away the working
                directory or what this run reads.
        """
        path, args = self.path, self._args
        if os.path.islink(path) and not os.path.exists(path):
            raise ConfigError(f"run_dir={args.run_dir!r}: a link to {os.readlink(path)}, which is not there; make it.")
        parent = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
        if not parent.is_dir():
            raise ConfigError(f"run_dir={args.run_dir!r}: {parent} is a file; choose a folder.")
        if not os.access(parent, os.W_OK):
            raise ConfigError(f"run_dir={args.run_dir!r}: {parent} cannot be written to; choose another folder.")
        if not os.path.exists(path):
            return
        self._lock.acquire()
        if args.checkpoint.resume or self._is_empty():
            return
        if not args.overwrite_run_dir:
            raise ConfigError(
                f"run_dir={args.run_dir!r}: exists already; continue it with --resume, choose another, or set "
                "overwrite_run_dir=true, which moves it aside."
            )
        for name, used in _in_use(args):
            if used.resolve().is_relative_to(path.resolve()):
                raise ConfigError(
                    f"run_dir={args.run_dir!r}: overwrite_run_dir=true would move aside {name} ({used}), which lies in "
                    "it; choose another run_dir."
                )

    def start(self) -> Path:
        """Makes the folder, after moving aside what was there if that was asked for, and writes `args.yaml` into it.

        Raises:
            ConfigError: as `check`.
            DiskError: when nothing can be written there.
        """
        self.check()
        if os.path.exists(self.path) and not self._is_empty() and not self._args.checkpoint.resume:
            self._move_aside()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run_dir={self._args.run_dir!r}: cannot be made ({error.strerror}); choose another."
            ) from error
        self._lock.acquire()
        settings = self.path / "args.yaml"
        with writing(settings):
            write_whole(settings, yaml.safe_dump(with_absolute_paths(to_dict(self._args)), sort_keys=False))
        return self.path

    def close(self) -> None:
        """Lets others use the folder."""
        self._lock.release()

    def _is_empty(self) -> bool:
        return all(path.name == LOCK for path in self.path.iterdir())

    def _move_aside(self) -> None:
        plain = Path(os.path.abspath(self.path))  # `runs/a/../b` has a name only then
        aside = plain.with_name(f"{plain.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
        try:
            plain.rename(aside)
        except OSError as error:
            raise ConfigError(
                f"run_dir={self._args.run_dir!r}: cannot be moved to {aside} ({error.strerror}); choose another "
                "run_dir."
            ) from error
        self._lock.release(moved_to=aside / LOCK)
        relocate_adapters(aside)
        logger.warning("The previous run is now in %s.", aside)


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
