"""In-Place TTT as pure functions of tensors: `naive` (the specification), `dual` (one pass), `step_` and `segment_`
(streaming)."""

from .dual import dual
from .naive import naive, naive_target
from .norm import delta_norm
from .segment import segment_
from .state import FastWeight, ResidualFastWeight
from .step import step_

__all__ = [
    "FastWeight",
    "ResidualFastWeight",
    "delta_norm",
    "dual",
    "naive",
    "naive_target",
    "segment_",
    "step_",
]
