"""In-Place TTT (arXiv 2604.06169): the down projection of a gated MLP is the fast weight."""

from .gating import TTTGating

__all__ = ["TTTGating"]
