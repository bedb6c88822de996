"""In-Place Test-Time Training (arXiv 2604.06169) for Kyutai's Moshi.

`install()`, then `LMModel(ttt_enabled=True, ...)`, or any checkpoint whose config says so.

Importing changes nothing.
"""

from .config import TTTConfig
from .gating import TTTGating
from .memory import fingerprint, load_memory, save_memory
from .patch import install, is_installed, uninstall
from .state_dict import ttt_gatings, ttt_parameters
from .stats import ttt_stats, ttt_updates

__version__ = "0.1.0"

__all__ = [
    "TTTConfig",
    "TTTGating",
    "fingerprint",
    "install",
    "is_installed",
    "load_memory",
    "save_memory",
    "ttt_gatings",
    "ttt_parameters",
    "ttt_stats",
    "ttt_updates",
    "uninstall",
]
