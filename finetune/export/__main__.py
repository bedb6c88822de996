"""`python -m finetune.export CHECKPOINT OUT`: makes a folder that is served by its path."""

from __future__ import annotations

import sys

from ..common.program import program


@program("python -m finetune.export")
def main(argv: list[str], prog: str) -> None:
    from ..settings.command_line import parse
    from ..settings.commands import ExportArgs

    args = parse(
        ExportArgs,
        argv,
        prog,
        "CHECKPOINT OUT [--best] [--merge | --with-base] [--base PATH] [--name NAME] [--eval FILE]",
    )
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


if __name__ == "__main__":
    sys.exit(main())
