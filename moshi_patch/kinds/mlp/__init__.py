"""TTT-MLP (arXiv 2407.04620): a small MLP per head, between attention and MLP, is the fast weight."""

from .layer import TTTMLP

__all__ = ["TTTMLP"]
