"""Test-Time Training for Kyutai's Moshi: In-Place TTT (arXiv 2604.06169), and TTT-MLP (arXiv 2407.04620) beside it.

`install()`, then `LMModel(ttt_enabled=True, ...)`, or any checkpoint whose config says so.

Importing changes nothing, and imports neither torch nor moshi before one of them is needed.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.version_info[:2] < (3, 10):  # noqa: UP036 one line instead of a syntax error further on
    message = f"moshi_patch: needs Python 3.10 or newer; this is Python {sys.version.split()[0]}."
    raise SystemExit(message) if sys.argv[:1] == ["-m"] else ImportError(message)

from .config import TTTConfig

if TYPE_CHECKING:
    from .arguments import BASE_KEY, wrong_file, wrong_repository
    from .cpu import fit_threads, without_compiling
    from .json_object import parse_json, parse_object, read_object
    from .kinds.in_place import TARGET_KEYS, TTTGating, one_pass_delta_norm
    from .kinds.memory import TTTMemory
    from .kinds.mlp import TTTMLP
    from .loading import memory_key, target_key
    from .locks import FileLock
    from .memory import fingerprint, load_memory, save_memory
    from .model import (
        finite_rows,
        stock_name,
        ttt_bypassed,
        ttt_gatings,
        ttt_memories,
        ttt_parameters,
        ttt_row_updates,
        ttt_stats,
        ttt_updates,
    )
    from .model_config import FILE_KEYS, LORA_KEYS, NOT_ARGUMENTS, check_mimi_config, read_model_config
    from .patch import install, is_installed, uninstall
    from .repository import DEFAULT_NAMES, HUB, RepositoryError, load_checkpoint_info, named_file
    from .tokenizer import load_text_tokenizer

__version__ = "0.1.0"

_MODULES = {
    "arguments": ("BASE_KEY", "wrong_file", "wrong_repository"),
    "cpu": ("fit_threads", "without_compiling"),
    "kinds.in_place": ("TARGET_KEYS", "TTTGating", "one_pass_delta_norm"),
    "kinds.memory": ("TTTMemory",),
    "kinds.mlp": ("TTTMLP",),
    "loading": ("memory_key", "target_key"),
    "locks": ("FileLock",),
    "memory": ("fingerprint", "load_memory", "save_memory"),
    "json_object": ("parse_json", "parse_object", "read_object"),
    "model": (
        "finite_rows",
        "stock_name",
        "ttt_bypassed",
        "ttt_gatings",
        "ttt_memories",
        "ttt_parameters",
        "ttt_row_updates",
        "ttt_stats",
        "ttt_updates",
    ),
    "model_config": ("FILE_KEYS", "LORA_KEYS", "NOT_ARGUMENTS", "check_mimi_config", "read_model_config"),
    "patch": ("install", "is_installed", "uninstall"),
    "repository": ("DEFAULT_NAMES", "HUB", "RepositoryError", "load_checkpoint_info", "named_file"),
    "tokenizer": ("load_text_tokenizer",),
}

__all__ = [
    "BASE_KEY",
    "DEFAULT_NAMES",
    "FILE_KEYS",
    "HUB",
    "LORA_KEYS",
    "NOT_ARGUMENTS",
    "TARGET_KEYS",
    "TTTMLP",
    "FileLock",
    "RepositoryError",
    "TTTConfig",
    "TTTGating",
    "TTTMemory",
    "check_mimi_config",
    "fingerprint",
    "finite_rows",
    "fit_threads",
    "install",
    "is_installed",
    "load_checkpoint_info",
    "load_memory",
    "load_text_tokenizer",
    "memory_key",
    "named_file",
    "one_pass_delta_norm",
    "parse_json",
    "parse_object",
    "read_model_config",
    "read_object",
    "save_memory",
    "stock_name",
    "target_key",
    "ttt_bypassed",
    "ttt_gatings",
    "ttt_memories",
    "ttt_parameters",
    "ttt_row_updates",
    "ttt_stats",
    "ttt_updates",
    "uninstall",
    "without_compiling",
    "wrong_file",
    "wrong_repository",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
