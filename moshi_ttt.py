"""`moshi-ttt COMMAND ARGUMENTS`: every program of this project, also outside its checkout."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": ("finetune.training.__main__", "train Moshi with In-Place TTT"),
    "evaluate": ("finetune.evaluation.__main__", "measure a checkpoint with updates on, off, and beside its base"),
    "export": ("finetune.export.__main__", "make a folder that is served by its path"),
    "doctor": ("finetune.doctor.__main__", "check this machine, and a checkpoint"),
    "data": ("finetune.data.__main__", "check a dataset"),
    "serve": ("moshi_patch.server", "talk with many people at once"),
    "memory": ("moshi_patch.memory_store", "list, show, export and forget what people taught the model"),
    "run": ("moshi_patch.__main__", "run one of moshi's programs with TTT, such as moshi.server"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the program that `argv` (or the command line) begins with; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    if not words or words[0] not in COMMANDS:
        allowed = f"must be one of {', '.join(COMMANDS)}."
        print(f"moshi-ttt: {words[0]!r}: unknown command; {allowed}" if words else usage(), file=sys.stderr)
        return 2
    module = COMMANDS[words[0]][0]
    if module.startswith("finetune.") and not _finetune_is_ours():
        return 2
    return importlib.import_module(module).main(words[1:], f"moshi-ttt {words[0]}") or 0


def usage() -> str:
    lines = [f"  {name:<10}{meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(["usage: moshi-ttt COMMAND [ARGUMENTS]", "", *lines, "", "`moshi-ttt COMMAND --help` says more."])


def _finetune_is_ours() -> bool:
    """False, with one line on stderr, when `finetune` is the package of another project, such as moshi-finetune."""
    try:
        import finetune

        ours, place = getattr(finetune, "PROJECT", None) == "moshi-ttt", list(finetune.__path__)
    except Exception as error:  # whatever the other one raises
        ours, place = False, [f"{type(error).__name__}: {error}"]
    if not ours:
        print(
            f"moshi-ttt: the package `finetune` that Python finds is not this project's ({', '.join(place)}). "
            "moshi-finetune's has the same name: install the two into environments of their own.",
            file=sys.stderr,
        )
    return ours


if __name__ == "__main__":
    sys.exit(main())
