"""One pass over many steps: one mini-batch after the other, no weight per step, outer gradients by autograd.

Shapes: `B` rows, `h` heads, `T` steps, `d` head width, `C` mini-batch size.

Backward needs the fast weights at the start of each mini-batch, and products over its steps. Both are computed again
for a group of mini-batches at a time; between groups the fast weights alone are kept.
"""

import torch
from torch.utils.checkpoint import checkpoint

from .mini_batch import Layers, MLPDelta, MLPWeights, Norm, layers_of, learnt, mini_batch, norm_of, wide

GROUP_SIZE = 8
"""Mini-batches that backward computes again at a time."""


def dual(
    weights: MLPWeights,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    eta: torch.Tensor,
    mini_batch_size: int,
    *,
    group_size: int | None = GROUP_SIZE,
) -> tuple[torch.Tensor, MLPDelta]:
    """The function that :func:`naive` specifies, for training, evaluation and scoring.

    Args:
        weights, q, k, v, eta, mini_batch_size: as of :func:`naive`, in any dtypes.
        group_size: mini-batches that backward computes again at a time; None: nothing is computed twice.
    Returns:
        `[B, h, T, d]` and what was learnt in all, in the dtype of `q`, float32 at least, as which all is computed.
    """
    dtype = wide(q)
    norm, beginning = norm_of(weights, dtype), layers_of(weights, dtype)
    inputs = [part.to(dtype) for part in (q, k, v, eta)]
    steps = q.shape[2]
    group = steps if group_size is None else group_size * mini_batch_size
    again = group_size is not None and torch.is_grad_enabled()
    layers = Layers(*(layer.expand(len(q), -1, -1, -1) for layer in beginning))
    outputs = []
    for start in range(0, steps, group):
        arguments = layers, norm, *(part[:, :, start : start + group] for part in inputs), mini_batch_size
        if again:
            out, layers = checkpoint(_group, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            out, layers = _group(*arguments)
        outputs.append(out)
    change = Layers(*(now - before for now, before in zip(layers, beginning, strict=True)))
    return torch.cat(outputs, 2), change.split()


def _group(
    layers: Layers,
    norm: Norm,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    eta: torch.Tensor,
    mini_batch_size: int,
) -> tuple[torch.Tensor, Layers]:
    outputs = []
    for start in range(0, q.shape[2], mini_batch_size):
        out, entries = mini_batch(
            layers, norm, *(part[:, :, start : start + mini_batch_size] for part in (q, k, v, eta))
        )
        layers = learnt(layers, entries)
        outputs.append(out)
    return torch.cat(outputs, 2), layers
