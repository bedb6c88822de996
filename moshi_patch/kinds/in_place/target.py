"""The target generator: what the fast weight learns to answer, a look-ahead convolution and a projection.

Shapes: `B` rows, `T` steps, `D` model width, `C` chunk size, `K` conv kernel.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..weights import NewWeights

TARGET_KEYS = ("conv1d.conv.weight", "W_target.weight")
"""Names of the two weights of a :class:`TargetGenerator`, below its own."""


class Taps(NewWeights):
    """The K filters of the convolution: `weight [D, 1, K]`, one per channel, or `[D, D, K]`, initially zero."""

    def __init__(self, dim: int, kernel_size: int, depthwise: bool, device=None, dtype=None):
        super().__init__()
        self.shape = (dim, 1 if depthwise else dim, kernel_size)
        self.add_weights(("weight",), device, dtype)

    def initial(self, name: str, device, dtype) -> torch.Tensor:
        """Zeros of the weight's shape."""
        return torch.zeros(self.shape, device=device, dtype=dtype)

    def tap(self, x: torch.Tensor, k: int) -> torch.Tensor:
        """`w_k x`, for `x [..., D]`."""
        x, weight = x.to(self.weight.dtype), self.weight[:, :, k]
        return x * weight[:, 0] if self.weight.shape[1] == 1 else F.linear(x, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`Σ_k w_k x_{t+k}` for `x [N, C, D]`, zero beyond the end of dimension 1."""
        x = x.to(self.weight.dtype)
        if self.weight.shape[1] == 1:
            return _DepthwiseLookahead.apply(x, self.weight)
        out = self.tap(x, 0)
        for k in range(1, min(self.weight.shape[2], x.shape[1])):
            out = out + F.pad(self.tap(x[:, k:], k), (0, 0, 0, k))
        return out


class _DepthwiseLookahead(torch.autograd.Function):
    """The depthwise case of `Taps.forward` with one pass over memory per tap and one allocation in all.

    Composed of plain operations it took as long as a tenth of the whole MLP at Moshi's size on a CPU.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        taps = weight[:, 0].T.contiguous()
        out = x * taps[0]
        for k in range(1, min(len(taps), x.shape[1])):
            out[:, :-k].addcmul_(x[:, k:], taps[k])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        taps = weight[:, 0].T.contiguous()
        reach = min(len(taps), x.shape[1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * taps[0]
            for k in range(1, reach):
                grad_x[:, k:].addcmul_(grad[:, :-k], taps[k])
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            for k in range(reach):
                grad_weight[:, 0, k] = (grad[:, : x.shape[1] - k] * x[:, k:]).sum((0, 1))
        return grad_x, grad_weight


class ChunkConv1d(nn.Module):
    """A convolution over this step and the K - 1 next ones that never looks beyond the end of a step's chunk."""

    def __init__(self, dim: int, kernel_size: int, depthwise: bool, device=None, dtype=None):
        super().__init__()
        self.conv = Taps(dim, kernel_size, depthwise, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, chunk_size: int) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`; step 0 starts a chunk."""
        batch, steps, dim = x.shape
        missing = -steps % chunk_size
        chunks = F.pad(x, (0, 0, 0, missing)).reshape(-1, chunk_size, dim)
        return self.conv(chunks).view(batch, steps + missing, dim)[:, :steps]


class Projection(NewWeights):
    """W_target: `weight [D, D]`, initially the identity."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.dim = dim
        self.add_weights(("weight",), device, dtype)

    def initial(self, name: str, device, dtype) -> torch.Tensor:
        """The identity."""
        return torch.eye(self.dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight)


class TargetGenerator(nn.Module):
    """Targets `v = W_target · conv(x0)` of In-Place TTT (arXiv 2604.06169), exactly zero until the filters are trained.

    Zero filters and an identity projection keep a pretrained model as it is, and still give the filters a gradient in
    the first step. Both zero would never train; both random would wreck the model.

    Args:
        dim: D.
        kernel_size: K, this step and the next K - 1.
        depthwise: one filter per channel; otherwise a full D×D×K convolution.
        device, dtype: of the two weights.
    """

    def __init__(self, dim: int, kernel_size: int, depthwise: bool, device=None, dtype=None):
        super().__init__()
        self.conv1d = ChunkConv1d(dim, kernel_size, depthwise, device=device, dtype=dtype)
        self.W_target = Projection(dim, device=device, dtype=dtype)

    def forward(self, x0: torch.Tensor, chunk_size: int) -> torch.Tensor:
        """Targets `[B, T, D]` of the target source `x0 [B, T, D]`, whose first step starts a chunk."""
        return self.W_target(self.conv1d(x0, chunk_size))

    def taps(self, x0: torch.Tensor) -> torch.Tensor:
        """`[B, K, D]`: what the single step `x0 [B, D]` adds to the targets of itself and of the K - 1 steps before."""
        conv = self.conv1d.conv
        return self.W_target(torch.stack([conv.tap(x0, k) for k in range(conv.weight.shape[2])], 1))
