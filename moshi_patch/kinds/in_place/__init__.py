"""In-Place TTT (arXiv 2604.06169): the down projection of a gated MLP is the fast weight."""

from .gating import TTTGating, one_pass_delta_norm
from .target import TARGET_KEYS

__all__ = ["TARGET_KEYS", "TTTGating", "one_pass_delta_norm"]
