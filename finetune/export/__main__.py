"""`python -m finetune.export CHECKPOINT OUT`: makes a folder that is served by its path."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..common.program import program


@program("python -m finetune.export")
def main(argv: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run (its newest checkpoint) or a checkpoint of it")
    parser.add_argument("out", metavar="OUT", help="the folder to make; must not exist")
    parser.add_argument("--merge", action="store_true", help="merge adapters into the base model")
    parser.add_argument("--with-base", action="store_true", help="copy the base model of adapters into OUT")
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="the base model: a Hub repository, a folder like one, or its .safetensors file; "
        "by default as the checkpoint was trained",
    )
    parser.add_argument("--name", help="title of the model card; by default the name of OUT")
    parser.add_argument("--eval", metavar="EVAL_JSON", type=Path, help="results for the model card")
    args = parser.parse_args(argv)
    from .export import Options, export

    out = export(args.checkpoint, args.out, Options(args.merge, args.with_base, args.base, args.name, args.eval))
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size:>15,} {path}")
    print(f"Serve it: python -m moshi_patch moshi.server --hf-repo {out}")
    print(f"Share it: hf upload OWNER/NAME {out} (after you have read its README.md and chosen a license)")


if __name__ == "__main__":
    sys.exit(main())
