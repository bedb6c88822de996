"""The program behind `python -m moshi_patch.server`: loads the model, and serves it until it is told to stop."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from aiohttp import web
from moshi.models import loaders
from moshi.run_inference import get_condition_tensors

from ..errors import in_one_line
from ..patch import install
from ..repository import LocalEntryNotFoundError, RepositoryError, local_repositories
from ..tokenizer import fitting_tokenizers
from .engine.codec import Codecs
from .engine.policy import Policy
from .engine.rows import Rows
from .engine.sampler import Sampling
from .engine.tick import Engine
from .memories.remember import Memories
from .memories.store import MemoryStore
from .memories.store_types import StoreError
from .memories.writer import Writer
from .web.access import Access, parse_origin
from .web.drain import Drain
from .web.front import CHAT_PATH, Front
from .web.limits import Limits
from .web.listening import address_problem, allow_many_connections, open_host_problem, ssl_context
from .web.operators import add_operator_routes
from .web.request_log import show_log
from .web.tickets import TICKET_PATH, Tickets, add_ticket_routes
from .web.web_page import add_page
from .web.wishes import default_sampling

PER_PERSON = 2
"""Conversations of one name: the second one waits until the first is over, as when a page is reloaded."""

DRAIN_S = 60.0
DRAIN = web.AppKey("drain", Drain)
"""Where an application has its end."""


class ServerError(Exception):
    """Why the server cannot start, in one line."""


class Model(NamedTuple):
    """What a checkpoint holds, on its device."""

    info: loaders.CheckpointInfo
    mimi: Any
    lm: Any
    tokenizer: Any
    sampling: Sampling


def serve(options: argparse.Namespace, prog: str) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        ServerError: why it cannot.
    """
    show_log()
    allow_many_connections()
    problem = open_host_problem(options.host, bool(options.token_file)) or address_problem(options.host, options.port)
    if problem:
        raise ServerError(problem)
    for origin in options.allow_origin:
        if parse_origin(origin) is None:
            raise ServerError(f"--allow-origin {origin}: must be an origin such as https://example.org, without a path")
    with ending_in_one_line():
        context = ssl_context(options.ssl)
    app = load_app(options, prog)
    app[DRAIN].listen(app)
    print(f"Serving {options.rows} rows at http{'s' * bool(context)}://{options.host}:{options.port}", flush=True)
    with ending_in_one_line(f"--host {options.host} --port {options.port}: "):
        web.run_app(app, host=options.host, port=options.port, ssl_context=context, print=None, access_log=None)


@contextlib.contextmanager
def ending_in_one_line(prefix: str = "") -> Iterator[None]:
    """What the system, a file or the store refuses inside is a :class:`ServerError` with its reason."""
    try:
        yield
    except (OSError, ValueError, StoreError) as error:
        raise ServerError(f"{prefix}{error}") from error


def load_app(options: argparse.Namespace, prog: str) -> web.Application:
    """The application that is served, with the model loaded.

    Raises:
        ServerError: why it cannot be.
    """
    with ending_in_one_line("--token-file "):
        tickets = Tickets(options.token_file) if options.token_file else None
    if options.memory_dir:
        with ending_in_one_line("--memory-dir "):
            MemoryStore(options.memory_dir, None, options.memory_key_file).check()
    install()
    model = load_model(options, prog)
    memories = None
    if options.memory_dir:
        with ending_in_one_line("--memory-dir "):
            store = MemoryStore(options.memory_dir, model.lm, options.memory_key_file, options.memory_dtype)
        memories = Memories(Writer(store, most=2 * options.rows))
    conditions = get_condition_tensors(model.info.model_type, model.lm, options.rows, options.cfg_coef)
    rows = Rows(model.mimi, model.lm, options.rows, conditions, options.cfg_coef)
    policy = Policy(queue=options.queue, idle_s=options.idle_timeout, write_s=60 * options.memory_every)
    per_address = options.per_address or (8 if tickets else options.rows + options.queue)
    limits = Limits(PER_PERSON, per_address, trusted_proxies=options.trusted_proxies)
    access = Access(options.host, options.allow_origin)
    engine = Engine(rows, policy, memories)
    text = text_of(model.tokenizer)
    return make_app(engine, text, access, tickets, limits, options.drain_timeout, model.sampling)


def make_app(
    engine: Engine,
    text_of: Callable[[int], str],
    access: Access | None = None,
    tickets: Tickets | None = None,
    limits: Limits | None = None,
    drain_s: float = DRAIN_S,
    sampling: Sampling | None = None,
) -> web.Application:
    """An application that serves `engine`, which begins and ends with it, the page, and what operators look at.

    Args:
        text_of: the text of a token.
        access: which pages may use it; None: all.
        tickets: of people who have names; None: nobody has one, and all memory is one person's.
        limits: how much one person or address may have; None: everything.
        drain_s: seconds that those who talk may go on when the server is to end.
        sampling: of who asks for nothing else; None: moshi's.
    """
    app = web.Application()
    if access:
        access.attach(app)
    if tickets:
        add_ticket_routes(app, tickets, limits)
    front = Front(engine, Codecs(engine.rows.count), text_of, tickets, limits, sampling)
    front.attach(app)
    app[DRAIN] = Drain(front, drain_s, (CHAT_PATH, TICKET_PATH))
    app[DRAIN].attach(app)
    add_page(app)
    add_operator_routes(app, engine.stats)
    return app


def load_model(options: argparse.Namespace, prog: str) -> Model:
    """Loads what the options name, as `moshi.server` does.

    Raises:
        ServerError: when there is no such model or device.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ServerError(f"--device {device}: {in_one_line(error)}") from error
    try:
        with local_repositories(), fitting_tokenizers(prog):
            info = loaders.CheckpointInfo.from_hf_repo(
                options.hf_repo,
                options.moshi_weight,
                options.mimi_weight,
                options.tokenizer,
                lora_weights=options.lora_weight,
                config_path=options.config_path,
            )
            with ending_in_one_line(f"{options.hf_repo}: "):
                sampling = default_sampling(info.lm_gen_config)
            mimi = info.get_mimi(device=device)
            dtype = torch.float16 if options.half else torch.float32 if options.float32 else torch.bfloat16
            lm = info.get_moshi(device=device, dtype=dtype, fuse_lora=options.fuse_lora)
    except (RepositoryError, LocalEntryNotFoundError) as error:
        raise ServerError(str(error)) from error
    return Model(info, mimi, lm, info.get_text_tokenizer(), sampling)


def text_of(tokenizer: Any) -> Any:
    """From a token to its text, as moshi's server has it."""
    return lambda token: tokenizer.id_to_piece(token).replace("▁", " ")
