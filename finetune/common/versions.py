"""What is installed of all that numbers and weights depend on, for the files that record them."""

import platform

import moshi
import torch

import moshi_patch


def versions() -> dict[str, str]:
    """By name: Python, torch, moshi, and this project as `moshi_ttt`."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moshi": moshi.__version__,
        "moshi_ttt": moshi_patch.__version__,
    }
