"""What every program does around its own work: the version of Python, logging, one line and an exit code for errors.

This file and every `__main__.py` stay readable for Python 3.7, which can then say that it is too old.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence

from .errors import UserError, in_one_line

PYTHON = (3, 10)
"""The first version that can run this project."""

OURS = ("finetune", "moshi_patch")
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory")
"""What torch says on a GPU, and on a CPU."""


def program(prog: str, level: int = logging.INFO) -> Callable[[Callable], Callable[..., int]]:
    """Decorates the `main(argv, prog)` of a program, which gets its arguments and returns its exit code or None.

    The decorated `main(argv=None, prog=prog)` returns the exit code: 0, that of main, or that of a `UserError`, of
    which one line is printed. Without `argv` the arguments are those of the command line. `main` imports what it
    needs inside, so that its help is shown at once.

    Args:
        prog: how the program is called, for its messages.
        level: of what is logged on rank 0; the other ranks log warnings.
    """

    def decorate(main: Callable) -> Callable[..., int]:
        @functools.wraps(main)
        def wrapped(argv: Sequence[str] | None = None, prog: str = prog) -> int:
            return _run(main, sys.argv[1:] if argv is None else list(argv), prog, level)

        return wrapped

    return decorate


def _run(main: Callable, argv: list[str], prog: str, level: int) -> int:
    if sys.version_info[:2] < PYTHON:
        needed, here = (".".join(map(str, version)) for version in (PYTHON, sys.version_info[:3]))
        return _say(prog, f"needs Python {needed} or newer; this is Python {here}.", 2)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a name
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # FSDP's end alone warns hundreds of times; torch reads it
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a log would hold each of their refreshes
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else a line for each time that the Hub is tried again
    level = level if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return main(argv, prog) or 0
    except SystemExit as end:  # after a help
        if not isinstance(end.code, (int, type(None))):
            raise
        return end.code or 0
    except UserError as error:
        return _say(prog, error, error.exit_code)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in OURS:
            raise
        return _say(
            prog, f"needs the package {error.name!r}; `pip install .` in this project installs all it needs.", 1
        )
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        remedy = "take less at a time: batch_size, duration_sec, eval_batch_size, segment_steps."
        return _say(prog, f"out of memory ({in_one_line(error) or type(error).__name__}); {remedy}", 1)
    except OSError as error:  # of a disk or a network; it names its file
        return _say(prog, in_one_line(error), 1)
    except KeyboardInterrupt:
        return _say(prog, "interrupted.", 130)


def _say(prog: str, message: object, exit_code: int) -> int:
    print(f"{prog}: {message}".replace("\n", " "), file=sys.stderr)
    return exit_code
