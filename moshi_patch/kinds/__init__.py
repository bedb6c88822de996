"""The kinds of memory, a folder each, with one class of `TTTMemory` each. What stands here holds for all."""

from .in_place import TTTGating
from .mlp import TTTMLP

CLASSES = {"in_place": TTTGating, "mlp": TTTMLP}
"""By `ttt_kind`."""
