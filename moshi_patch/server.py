"""`python -m moshi_patch.server --hf-repo MODEL [--rows 8] [--device cpu] [--port 8998]`: talks with many at once."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from .arguments import OneLineParser, wrong_path
from .cpu import fitted_threads, without_compiling_before_import

DESCRIPTION = """Talk with as many people at once as there are rows, with one model on one device.

Moshi's own clients, its page and whatever speaks their protocol at /api/chat can be used."""


def server_parser(prog: str) -> OneLineParser:
    """All options of the server; imports neither torch nor moshi."""
    parser = OneLineParser(prog=prog, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hf-repo", required=True, metavar="MODEL", help="a folder as `moshi-ttt export` makes it, or OWNER/NAME")
    add("--rows", type=int, default=8, help="people who can talk at the same time (default: 8)")
    add("--device", help="cuda or cpu (default: cuda where there is one)")
    add("--host", default="localhost", help="address to listen on (default: localhost)")
    add("--port", type=int, default=8998, help="(default: 8998)")
    add("--queue", type=int, default=8, help="people who may wait for a row (default: 8)")
    add("--idle-timeout", type=float, default=30.0, metavar="SECONDS", help="hang up after silence; 0: never (30)")
    add("--drain-timeout", type=float, default=60.0, metavar="SECONDS", help="after SIGTERM, who talks may go on (60)")
    add("--allow-origin", action="append", default=[], metavar="ORIGIN", help="let pages of this site use the server")
    add("--ssl", metavar="FOLDER", help="serve https with the cert.pem and key.pem of this folder")
    people = parser.add_argument_group("who may come in, and what is kept of them")
    add = people.add_argument
    add("--token-file", metavar="FILE", help="a name and a token a line; without it only this machine may connect")
    add("--memory-dir", metavar="DIR", help="keep what each person teaches the model in this folder, or fsspec URL")
    add("--memory-key-file", metavar="FILE", help="32 bytes: what is kept is encrypted")
    add("--memory-dtype", choices=["float32", "bfloat16"], default="float32", help="(default: float32, exact)")
    add("--memory-every", type=float, default=5.0, metavar="MINUTES", help="write it so often, and at the end (5)")
    add("--per-address", type=int, metavar="N", help="conversations of one address (default: 8 with --token-file)")
    add("--trusted-proxies", type=int, default=0, metavar="N", help="proxies of one's own before this server (0)")
    files = parser.add_argument_group("the model, as moshi.server takes it")
    for name in ("--moshi-weight", "--mimi-weight", "--tokenizer", "--lora-weight", "--config-path"):
        files.add_argument(name, metavar="FILE")
    files.add_argument("--cfg-coef", type=float, default=1.0)
    dtypes = files.add_mutually_exclusive_group()
    dtypes.add_argument("--half", action="store_true", help="float16 instead of bfloat16")
    dtypes.add_argument("--float32", action="store_true", help="float32 instead of bfloat16")
    files.add_argument("--no_fuse_lora", action="store_false", dest="fuse_lora")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m moshi_patch.server") -> int:
    """Serves until SIGINT or SIGTERM.

    Raises:
        SystemExit: with code 2 and one line for what cannot work.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = server_parser(prog)
    options = parser.parse_args(words)
    problem = wrong_path(words) or wrong_numbers(options)
    if problem:
        parser.exit(2, f"{parser.prog}: error: {problem}\n")
    if options.device == "cpu":
        without_compiling_before_import()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from .serving.program import ServerError, serve

    try:
        with fitted_threads():
            serve(options, prog)
    except ServerError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


def wrong_numbers(options: argparse.Namespace) -> str | None:
    """Which number makes no sense, in words; None when all do."""
    if not 1 <= options.rows <= 1024:
        return f"--rows {options.rows}: must be from 1 to 1024"
    if not 0 <= options.queue <= 10_000:
        return f"--queue {options.queue}: must be from 0 to 10000"
    if not 0 < options.memory_every < float("inf"):
        return f"--memory-every {options.memory_every}: must be minutes, more than 0"
    if options.per_address is not None and options.per_address < 1:
        return f"--per-address {options.per_address}: must be 1 or more"
    if options.trusted_proxies < 0:
        return f"--trusted-proxies {options.trusted_proxies}: must be 0 or more"
    if options.memory_key_file and not options.memory_dir:
        return f"--memory-key-file {options.memory_key_file}: is of use with --memory-dir alone"
    if not 0 <= options.idle_timeout < float("inf"):
        return f"--idle-timeout {options.idle_timeout}: must be seconds, 0 or more"
    if not 0 <= options.drain_timeout < float("inf"):
        return f"--drain-timeout {options.drain_timeout}: must be seconds, 0 or more"
    if not 0 <= options.port <= 65_535:
        return f"--port {options.port}: must be a number from 0 to 65535"
    if not 0 < options.cfg_coef < float("inf"):
        return f"--cfg-coef {options.cfg_coef}: must be a number above 0"
    return None


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
