"""The In-Place TTT layer as pure functions of tensors: `naive` (the specification), `dual` (one pass), `step` (streaming)."""

from .dual import dual
from .naive import naive, naive_target
from .step import FastWeight, step_

__all__ = ["FastWeight", "dual", "naive", "naive_target", "step_"]
