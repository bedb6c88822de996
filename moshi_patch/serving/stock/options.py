"""The options that this project adds to `moshi.server`; imports neither torch nor moshi, so that help comes at once."""

import argparse
from pathlib import Path

IDLE_TIMEOUT = 30.0
"""Seconds."""


def server_parser() -> argparse.ArgumentParser:
    """Takes them out of the server's arguments: the stock server refuses what it does not know."""
    parser = argparse.ArgumentParser(
        prog="python -m moshi_patch moshi.server", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False
    )
    group = parser.add_argument_group("added to moshi.server")
    group.add_argument(
        "--memory", type=Path, metavar="PATH", help="go on with the fast weights in this file (default: none)"
    )
    group.add_argument(
        "--idle-timeout",
        type=float,
        metavar="SECONDS",
        default=IDLE_TIMEOUT,
        help=f"hang up after so many seconds without audio; 0: never (default: {IDLE_TIMEOUT:g})",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this site use the server, such as https://example.org; may be repeated (default: none)",
    )
    return parser


def server_options() -> set[str]:
    """Their names, such as `--memory`."""
    return {name for action in server_parser()._actions for name in action.option_strings}
