"""What to run with an export, in words that run on this machine as they are printed."""

import shlex
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

WEB_PAGE = ("kyutai/moshi-artifacts", "dist.tgz")
"""The web page of `moshi.server`: repository and file."""


def serve_command(out: Path) -> str:
    """The shell command that serves the export in `out`; without a web page unless that was fetched before."""
    words = [_python(), "-m", "moshi_patch", "moshi.server", "--hf-repo", str(out)]
    if not torch.cuda.is_available():
        words += ["--device", "cpu"]
    if not isinstance(try_to_load_from_cache(*WEB_PAGE), str):
        words += ["--static", "none"]
    return shlex.join(words)


def upload_command(out: Path) -> str:
    """The shell command that uploads the export in `out`, once OWNER/NAME is filled in."""
    return shlex.join(["hf", "upload", "OWNER/NAME", str(out)])


def _python() -> str:
    """`python` where that is this interpreter, else its path."""
    found = shutil.which("python")
    return (
        "python" if found is not None and Path(found).absolute() == Path(sys.executable).absolute() else sys.executable
    )
