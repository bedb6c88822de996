"""In-Place TTT as pure functions of tensors: `naive` (the specification), `dual` (one pass), `step_` and `segment_`
(streaming)."""

from .dual import dual
from .naive import naive, naive_target
from .rows import fill_rows_
from .segment import segment_
from .step import FastWeight, step_

__all__ = ["FastWeight", "dual", "fill_rows_", "naive", "naive_target", "segment_", "step_"]
