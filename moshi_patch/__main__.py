"""`python -m moshi_patch MODULE [ARGS...]`: runs one of moshi's programs with the patch installed.

    python -m moshi_patch moshi.server --hf-repo kyutai/moshiko-pytorch-bf16
    python -m moshi_patch moshi.run_inference --device cpu --hf-repo ./my_model in.wav out.wav

Two things the stock programs refuse work here: a machine without CUDA, and a local folder in place of a Hub repository.
`moshi.server` also gets a status at `/api/ttt`, a busy answer, `--memory PATH`, `--idle-timeout SECONDS` and
`--allow-origin ORIGIN`.
"""

import argparse
import contextlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Iterator, Sequence

from .arguments import value_of, wrong_path
from .cpu import fitted_threads, without_compiling_before_import
from .serving.stock.options import server_options, server_parser

SERVER = "moshi.server"
ENVIRONMENT = """environment, on a CPU:
  OMP_NUM_THREADS       threads (default: 1 for a small model, else one for each core)
  NO_TORCH_COMPILE      not empty: nothing is compiled (default: 1; set it to nothing to compile)
"""


def main(argv: Sequence[str] | None = None, prog: str = "python -m moshi_patch") -> None:
    """Install the patch and run a module as `__main__`, with `argv[1:]` (or the command line's) as its arguments.

    Args:
        prog: how this program was called, for its messages.

    Raises:
        SystemExit: with code 2 for a missing or unknown module; and whatever the module itself raises.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run MODULE with In-Place TTT installed, as `python -m MODULE` would.\n"
        "Moshi's own programs also run without CUDA, and take a local folder as --hf-repo.",
        epilog=f"{server_parser().format_help()}\n{ENVIRONMENT}\nMODULE --help shows the options of MODULE.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("module", metavar="MODULE", help="for example moshi.server or moshi.run_inference")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="of the module").required = False
    options = parser.parse_args(argv)
    if options.module.partition(".")[0] == "moshi":
        problem = wrong_path(options.args)
        if problem:
            parser.exit(2, f"{parser.prog}: error: {problem}\n")
        if value_of("--device", options.args) == "cpu":
            without_compiling_before_import()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else a line for each time that the Hub is tried again
    from .patch import install  # with torch and moshi, which take their time
    from .repository import LocalEntryNotFoundError, RepositoryError, local_repositories
    from .tokenizer import fitting_tokenizers

    install()
    if not is_runnable(options.module):
        parser.exit(2, f"{parser.prog}: error: no module named {options.module!r} that can be run\n")
    additions: contextlib.AbstractContextManager = contextlib.nullcontext()
    arguments = options.args
    if options.module == SERVER:
        from .serving.stock.stock_server import add_conversations, split_options

        chosen, arguments = split_options(arguments)
        additions = add_conversations(chosen)
    elif options.module.partition(".")[0] == "moshi":
        for option in server_options().intersection(argument.partition("=")[0] for argument in arguments):
            parser.exit(2, f"{parser.prog}: error: {option} is an option of {SERVER}, not of {options.module}\n")
    sys.argv = [options.module, *arguments]
    try:
        with without_cuda(), local_repositories(), fitting_tokenizers(parser.prog), fitted_threads(), additions:
            runpy.run_module(options.module, run_name="__main__", alter_sys=True)
    except (RepositoryError, LocalEntryNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def is_runnable(module: str) -> bool:
    """Whether `python -m module` would find something to run. Imports the packages it lies in.

    Raises:
        Exception: whatever importing those packages raises, as that is not the absence of `module`.
    """
    if not module or module.startswith(".") or module == "__main__":
        return False
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        return False
    return spec is not None and spec.origin not in ("built-in", "frozen")


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Where CUDA is not available, `torch.cuda.synchronize` does nothing inside; elsewhere it stays as it is.

    `moshi.server` calls it after its warm-up on every device, so `--device cpu` could not start without CUDA. There is
    nothing to wait for then: operations on the CPU are done when they return.
    """
    import torch

    if torch.cuda.is_available():
        yield
        return
    stock = torch.cuda.synchronize
    torch.cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        torch.cuda.synchronize = stock


if __name__ == "__main__":
    main()
