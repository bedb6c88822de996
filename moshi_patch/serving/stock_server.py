"""Running `moshi.server` with more than it has: a status, a busy answer, an end for silent clients, a memory.

Nothing of the stock server is replaced: its application is caught on the way to `aiohttp.web.run_app`.
"""

import argparse
import contextlib
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import moshi
from aiohttp import web
from torch import nn

from .conversations import STATUS_PATH, Conversations

logger = logging.getLogger(__name__)

CHAT_PATH = "/api/chat"


class Options(NamedTuple):
    """Arguments of the server that `moshi.server` does not know.

    Attributes:
        memory: file of the fast weights that every conversation goes on with; None: each starts fresh.
        idle_timeout: seconds without a step after which a client loses its place; 0: never.
    """

    memory: Path | None = None
    idle_timeout: float = 30.0


def split_options(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The options among `arguments`, and the arguments without them.

    Raises:
        SystemExit: with code 2 and a reason, when one is missing or makes no sense.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moshi_patch moshi.server", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False
    )
    parser.add_argument("--memory", type=Path, metavar="PATH", help="go on with the fast weights in this file")
    parser.add_argument(
        "--idle-timeout", type=float, metavar="SECONDS", default=30.0, help="hang up without speech, 30; 0: never"
    )
    known, rest = parser.parse_known_args(arguments)
    if not 0 <= known.idle_timeout < float("inf"):
        parser.error(f"--idle-timeout {known.idle_timeout}: must be seconds, 0 or more")
    folder = known.memory and known.memory.resolve().parent
    if folder and (known.memory.is_dir() or not os.access(folder, os.W_OK)):
        parser.error(f"--memory {known.memory}: must be a file in a folder that exists and can be written to")
    if {"-h", "--help"} & set(rest):
        parser.print_help()  # and the stock server prints its own
    return Options(known.memory, known.idle_timeout), rest


@contextlib.contextmanager
def add_conversations(options: Options) -> Iterator[None]:
    """Inside, an application that `aiohttp.web.run_app` is given is served with what this module adds.

    An application that is not as moshi's is served as it is, with a warning that says what is missing.
    """
    stock = web.run_app

    def run_app(app: web.Application, *args: Any, **kwargs: Any) -> None:
        missing = missing_parts(app)
        if missing:
            problem = f"moshi {moshi.__version__} at {moshi.__path__[0]} has no {', no '.join(missing)}"
            if options.memory:
                sys.exit(f"--memory {options.memory}: {problem}.")
            logger.warning("%s. It is served as it is, without %s and the rest.", problem, STATUS_PATH)
        else:
            try:
                Conversations(find_chat_handler(app), *options).attach(app)
            except (ValueError, OSError) as error:
                sys.exit(f"--memory {options.memory}: {error}")
        stock(app, *args, **kwargs)

    web.run_app = run_app
    try:
        yield
    finally:
        web.run_app = stock


def find_chat_handler(app: web.Application) -> Any:
    """What answers `GET /api/chat` in `app`, or None."""
    routes = (route for route in app.router.routes() if route.method == "GET" and route.resource is not None)
    return next((route.handler for route in routes if route.resource.canonical == CHAT_PATH), None)


def missing_parts(app: web.Application) -> list[str]:
    """Which of the things that :class:`Conversations` builds on `app` lacks; in moshi 0.2.13 none."""
    server = getattr(find_chat_handler(app), "__self__", None)
    lm_gen = getattr(server, "lm_gen", None)
    needs = {
        f"method that answers GET {CHAT_PATH}": server is not None,
        "coroutine method decode_and_send of the server": inspect.iscoroutinefunction(
            getattr(server, "decode_and_send", None)
        ),
        "method lm_gen.step of the server": callable(getattr(lm_gen, "step", None)),
        "method lm_gen.reset_streaming of the server": callable(getattr(lm_gen, "reset_streaming", None)),
        "model in lm_gen.lm_model of the server": isinstance(getattr(lm_gen, "lm_model", None), nn.Module),
        f"free address {STATUS_PATH}": STATUS_PATH not in [resource.canonical for resource in app.router.resources()],
    }
    return [name for name, there in needs.items() if not there]
