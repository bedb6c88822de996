"""TTT-MLP as pure functions of tensors: `naive` (the specification), `dual` (one pass), `step_` and `segment_`
(streaming)."""

from .dual import dual
from .mini_batch import MLPDelta, MLPWeights
from .naive import naive
from .segment import segment_
from .state import MLPFastWeight
from .step import step_

__all__ = [
    "MLPDelta",
    "MLPFastWeight",
    "MLPWeights",
    "dual",
    "naive",
    "segment_",
    "step_",
]
