"""Writing to whole rows of a batch without waiting for the device."""

import torch


def fill_rows_(tensor: torch.Tensor, mask: torch.Tensor, value: float, dim: int = 0) -> None:
    """Set the rows of `tensor` along `dim` where `mask [B]` is true to `value`, in place; the others stay untouched.

    A CPU writes those rows alone. Elsewhere their numbers are not known without waiting, so all rows pass by.
    """
    if mask.device.type != "cpu":
        _fill_masked_(tensor, mask, value, dim)
        return
    for row in mask.nonzero()[:, 0].tolist():
        tensor.select(dim, row).fill_(value)


def _fill_masked_(tensor: torch.Tensor, mask: torch.Tensor, value: float, dim: int) -> None:
    tensor.masked_fill_(mask.view([-1 if axis == dim else 1 for axis in range(tensor.dim())]), value)
