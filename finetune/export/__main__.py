"""`python -m finetune.export CHECKPOINT OUT`: a folder to serve; `--import-ancestor SOURCE --out DIR`: a checkpoint."""

from __future__ import annotations

import shlex
import sys

from ..common.program import program

IMPORT = "--import-ancestor"
IMPORT_USAGE = f"{IMPORT} SOURCE --out DIR [--config FILE.yaml]"


@program("python -m finetune.export")
def main(argv: list[str], prog: str) -> None:
    from ..settings.command_line import parse
    from ..settings.commands import ExportArgs

    if any(word.partition("=")[0] == IMPORT for word in argv):
        return _import(argv, prog)
    usage = "CHECKPOINT OUT [--best] [--merge | --with-base] [--base PATH] [--name NAME] [--eval FILE]"
    args = parse(ExportArgs, argv, prog, f"{usage}\n       {prog} {IMPORT_USAGE}")
    from .commands import serve_command, upload_command
    from .export import export

    out = export(args)
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size:>15,} {path}")
    command = serve_command(out)
    print(f"Serve it: {command}")
    if "--static" in command:
        print("  (without --static none it also fetches its web page from the Hub, once)")
    print(f"Share it: {upload_command(out)}")
    print("  (after you have read its README.md and chosen a license)")


def _import(argv: list[str], prog: str) -> None:
    from ..settings.command_line import parse
    from ..settings.commands import ImportArgs
    from .ancestor import import_ancestor

    words = [word.removeprefix(f"{IMPORT}=") for word in argv if word != IMPORT]  # its value is all that has no name
    args = parse(ImportArgs, words, prog, IMPORT_USAGE)
    for line in import_ancestor(args):
        print(line)
    print(f"Made {args.out}. Look at it: python -m finetune.doctor {shlex.quote(args.out)}")


if __name__ == "__main__":
    sys.exit(main())
