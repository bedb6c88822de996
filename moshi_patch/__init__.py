"""In-Place Test-Time Training (arXiv 2604.06169) for Kyutai's Moshi.

`install()`, then `LMModel(ttt_enabled=True, ...)`, or any checkpoint whose config says so.

Importing changes nothing, and imports neither torch nor moshi before one of them is needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .config import TTTConfig

if TYPE_CHECKING:
    from .gating import TTTGating
    from .memory import fingerprint, load_memory, save_memory
    from .model import finite_rows, stock_name, ttt_gatings, ttt_parameters, ttt_stats, ttt_updates
    from .patch import install, is_installed, uninstall
    from .repository import load_checkpoint_info

__version__ = "0.1.0"

_MODULES = {
    "gating": ("TTTGating",),
    "memory": ("fingerprint", "load_memory", "save_memory"),
    "model": ("finite_rows", "stock_name", "ttt_gatings", "ttt_parameters", "ttt_stats", "ttt_updates"),
    "patch": ("install", "is_installed", "uninstall"),
    "repository": ("load_checkpoint_info",),
}

__all__ = [
    "TTTConfig",
    "TTTGating",
    "fingerprint",
    "finite_rows",
    "install",
    "is_installed",
    "load_checkpoint_info",
    "load_memory",
    "save_memory",
    "stock_name",
    "ttt_gatings",
    "ttt_parameters",
    "ttt_stats",
    "ttt_updates",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
