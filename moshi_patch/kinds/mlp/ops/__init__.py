"""TTT-MLP as pure functions of tensors: `naive` (the specification), `dual` (one pass), `step_` and `segment_`
(streaming)."""

from .dual import GROUP_SIZE, dual, dual_with_delta
from .mini_batch import MLPDelta, MLPWeights
from .naive import naive
from .segment import segment_
from .state import MLPFastWeight
from .step import step_

__all__ = [
    "GROUP_SIZE",
    "MLPDelta",
    "MLPFastWeight",
    "MLPWeights",
    "dual",
    "dual_with_delta",
    "naive",
    "segment_",
    "step_",
]
