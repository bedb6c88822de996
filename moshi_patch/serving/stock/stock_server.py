"""Running `moshi.server` with more than it has: see :mod:`.conversations`, :mod:`..web.access` and the options below.

Nothing of the stock server is replaced: its application is caught on the way to `aiohttp.web.run_app`.
"""

import argparse
import contextlib
import functools
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import moshi
from aiohttp import web
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import HfHubHTTPError
from moshi.models import loaders
from torch import nn

from ...errors import in_one_line
from ..web.access import Access, parse_origin
from ..web.listening import address_problem
from ..web.request_log import show_log
from .conversations import STATUS_PATH, Conversations
from .kept_memory import KeptMemory
from .options import IDLE_TIMEOUT, server_parser

logger = logging.getLogger(__name__)

CHAT_PATH = "/api/chat"


class Options(NamedTuple):
    """Arguments of the server: first those that `moshi.server` does not know, then some that it does.

    Attributes:
        memory: file of the fast weights that every conversation goes on with; None: each starts fresh.
        idle_timeout: seconds without a step after which a client loses its place; 0: never.
        allow_origin: origins of pages of other sites that may use the server.
        host, port: what it listens on.
        gradio_tunnel: whether it is reached through a tunnel too.
        static: folder of the page, or `none`; None: moshi's own page.
    """

    memory: Path | None = None
    idle_timeout: float = IDLE_TIMEOUT
    allow_origin: tuple[str, ...] = ()
    host: str = "localhost"
    port: int = 8998
    gradio_tunnel: bool = False
    static: str | None = None


def split_options(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The options among `arguments`, and the arguments for the stock server.

    Raises:
        SystemExit: with code 2 and a reason, when one is missing or makes no sense, or the port is taken.
    """
    parser = server_parser()
    known, rest = parser.parse_known_args(arguments)
    if not 0 <= known.idle_timeout < float("inf"):
        parser.error(f"--idle-timeout {known.idle_timeout}: must be seconds, 0 or more")
    for origin in known.allow_origin:
        if parse_origin(origin) is None:
            parser.error(f"--allow-origin {origin}: must be an origin such as https://example.org, without a path")
    folder = known.memory and known.memory.resolve().parent
    if folder and (known.memory.is_dir() or not os.access(folder, os.W_OK)):
        parser.error(f"--memory {known.memory}: must be a file in a folder that exists and can be written to")
    stock = stock_options(rest)
    if {"-h", "--help"} & set(rest):
        parser.print_help()  # and the stock server prints its own
    else:
        problem = address_problem(stock.host, stock.port)
        if problem:
            parser.error(problem)
    return Options(known.memory, known.idle_timeout, tuple(known.allow_origin), **vars(stock)), rest


def stock_options(arguments: Sequence[str]) -> argparse.Namespace:
    """What the stock server will make of the arguments that say where it is reached, and with which page."""
    parser = argparse.ArgumentParser(prog="python -m moshi_patch moshi.server", usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument("--host", default=Options._field_defaults["host"])
    parser.add_argument("--port", default=Options._field_defaults["port"], type=int)
    parser.add_argument("--gradio-tunnel", action="store_true")
    parser.add_argument("--static")
    return parser.parse_known_args(arguments)[0]


def page_problem() -> str | None:
    """Why moshi's own page, which is on the Hub, cannot be served; None once it is on this machine."""
    try:
        hf_hub_download("kyutai/moshi-artifacts", "dist.tgz")
    except (OSError, HfHubHTTPError) as error:
        reason = in_one_line(error)
        return f"moshi's page cannot be fetched from the Hub ({reason}): --static none serves without it"
    return None


@contextlib.contextmanager
def add_conversations(options: Options) -> Iterator[None]:
    """Inside, an application that `aiohttp.web.run_app` is given is served with what this package adds.

    An application that is not as moshi's is served as it is, but for :class:`Access`, with a warning that says what is
    missing. The memory is held by this process alone.

    Raises:
        SystemExit: with a reason, when the memory or the address cannot be used.
    """
    show_log()
    memory = options.memory and KeptMemory(options.memory)
    stock, stock_find = web.run_app, loaders.CheckpointInfo.from_hf_repo

    def run_app(app: web.Application, *args: Any, **kwargs: Any) -> None:
        Access(options.host, options.allow_origin, options.gradio_tunnel).attach(app)
        missing = missing_parts(app)
        if missing:
            problem = f"moshi {moshi.__version__} at {moshi.__path__[0]} has no {', no '.join(missing)}"
            if memory:
                sys.exit(f"--memory {options.memory}: {problem}.")
            logger.warning("%s. It is served as it is, without %s and the rest.", problem, STATUS_PATH)
        else:
            with ending_in_one_line():
                Conversations(find_chat_handler(app), memory, options.idle_timeout).attach(app)
        with ending_in_one_line(f"--host {options.host} --port {options.port}: "):
            stock(app, *args, **kwargs)

    @functools.wraps(stock_find)
    def find_checkpoint(*args: Any, **kwargs: Any) -> loaders.CheckpointInfo:
        info = stock_find(*args, **kwargs)
        problem = None if options.static else page_problem()
        return sys.exit(problem) if problem else info  # before any weights are read

    with contextlib.ExitStack() as stack:
        if memory:
            with ending_in_one_line():
                stack.enter_context(memory.held())
        web.run_app, loaders.CheckpointInfo.from_hf_repo = run_app, staticmethod(find_checkpoint)
        try:
            yield
        finally:
            web.run_app, loaders.CheckpointInfo.from_hf_repo = stock, staticmethod(stock_find)


@contextlib.contextmanager
def ending_in_one_line(prefix: str = "") -> Iterator[None]:
    """What the system or a file refuses inside ends the program with its reason alone."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"{prefix}{error}")


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
