"""`python -m moshi_patch.memory_store COMMAND --memory-dir DIR`: who has a memory in a store; shows, exports, forgets.

    moshi-ttt memory list --memory-dir DIR
    moshi-ttt memory show --memory-dir DIR anna
    moshi-ttt memory export --memory-dir DIR anna anna.safetensors
    moshi-ttt memory forget --memory-dir DIR anna

No model is needed. DIR is the server's: a folder, or what fsspec knows, such as s3://BUCKET/FOLDER.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from .arguments import OneLineParser
from .errors import in_one_line
from .serving.memories.persons import check_person


def memory_parser(prog: str) -> OneLineParser:
    """All commands and options; imports neither torch nor moshi."""
    parser = OneLineParser(
        prog=prog, description=__doc__.partition("\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help_: str, keys: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")
        command.add_argument("--memory-dir", required=True, metavar="DIR", help="the store, as the server has it")
        if keys:
            command.add_argument(
                "--key-file", "--memory-key-file", metavar="FILE", help="the key that the store is encrypted with"
            )
        return command

    add("list", "who has a memory: generation, size, when it was written", keys=False).add_argument(
        "--json", action="store_true", help="as JSON"
    )
    show = add("show", "what the file of a person's memory says of itself")
    show.add_argument("--json", action="store_true", help="as JSON, with the shape of each tensor")
    export = add("export", "write a person's memory to a file that moshi_patch.load_memory reads")
    for command in (show, export):
        command.add_argument("person", metavar="NAME")
        command.add_argument("--generation", type=int, help="one of those that list shows (default: the newest)")
    export.add_argument("file", metavar="FILE", help="is replaced if it is there")
    forget = add("forget", "remove every generation of these people, and what unfinished writes left", keys=False)
    forget.add_argument("person", metavar="NAME", nargs="+")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m moshi_patch.memory_store") -> int:
    """Runs a command; returns 0, or 1 after one line on the standard error.

    Raises:
        SystemExit: with code 2, after one line, for arguments that make no sense.
    """
    parser = memory_parser(prog)
    options = parser.parse_args(argv)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a name
    from .serving.memories.store import MemoryStore  # with torch, which takes its time
    from .serving.memories.store_types import StoreError

    try:
        store = MemoryStore(options.memory_dir, None, getattr(options, "key_file", None))
        store.require()
        {"list": _list, "show": _show, "export": _export, "forget": _forget}[options.command](store, options)
    except (StoreError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # of a full disk, or of a pipe whose reader is gone
        print(f"{parser.prog}: what was found cannot be printed ({error.strerror}).", file=sys.stderr)
        return 1
    return 0


def _list(store: Any, options: argparse.Namespace) -> None:
    people = store.people()
    if options.json:
        keys = ("name", "generations", "size", "total_size", "saved")
        print(json.dumps([{key: getattr(person, key) for key in keys} for person in people], ensure_ascii=False))
        return
    for person in people:
        kept = ", ".join(map(str, person.generations))
        print(f"{person.name}\tgeneration {kept}\t{_mebibytes(person.total_size)}\t{_time(person.saved)}")
    total = sum(person.total_size for person in people)
    print(f"{len(people)} people, {_mebibytes(total)} in {store.name}")


def _show(store: Any, options: argparse.Namespace) -> None:
    from .memory_stream import is_delta

    found = store.show(options.person, options.generation)
    if options.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    settings = found["owner"].get("settings", {})
    rows = {shape[0] for _, shape in found["tensors"].values() if shape}
    narrow = any(dtype == "bfloat16" and is_delta(key) for key, (dtype, _) in found["tensors"].items())
    print(f"{options.person}, generation {found['generation']}, written {in_one_line(found['saved'])}")
    print(f"size      {_mebibytes(found['size'])} in {len(found['tensors'])} tensors of {max(rows, default=0)} row(s)")
    print(f"deltas    {'bfloat16' if narrow else 'as they were learnt'}")
    for key, value in settings.items() if isinstance(settings, dict) else ():
        print(f"{in_one_line(key):<25} {in_one_line(value)}")


def _export(store: Any, options: argparse.Namespace) -> None:
    store.export(options.person, options.file, options.generation)
    print(options.file)


def _forget(store: Any, options: argparse.Namespace) -> None:
    for person in options.person:
        check_person(person)  # all of them, before one is forgotten
    for person in options.person:
        count = store.forget(person)
        print(f"{person}: {count} generation{'s' * (count != 1)} removed" if count else f"{person}: nothing was there")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):  # a clock that was wrong by thousands of years
        return f"{seconds:.0f} s after 1970"


if __name__ == "__main__":
    sys.exit(main())
