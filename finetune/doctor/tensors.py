"""What the weights of a checkpoint are, one tensor at a time: finite, how large, how far each TTT layer has come."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open
from tqdm import tqdm

from ..checkpoint.saved import SavedCheckpoint
from ..checkpoint.verify import CONV, TARGET, Stored
from .finding import FAILED, OK, WARNING, Finding, in_units

HUGE = 1e6
"""No trained weight is as large; one flipped bit of an exponent makes it so (1e-2 becomes 1e36)."""

VALUES_AT_A_TIME = 1 << 20
"""Values that are looked at at a time."""


@dataclass(frozen=True)
class Values:
    """Of one tensor: Frobenius norm, largest absolute value, and size in bytes."""

    norm: float
    largest: float
    bytes: int


def check_tensors(saved: SavedCheckpoint, header: dict[str, Stored]) -> Iterator[Finding]:
    """Reads every weight once; the memory taken is that of the largest tensor."""
    found = {}
    with safe_open(saved.weights, framework="pt") as file:
        for name in tqdm(header, desc="weights", unit="tensor", leave=False, disable=None):
            found[name] = _measure(file.get_tensor(name))
    yield from _finite(found)
    yield from _layers(saved, header, found)
    yield _size(saved, found)


@torch.no_grad()
def _measure(tensor: torch.Tensor) -> Values:
    squares, largest = 0.0, 0.0
    for part in tensor.flatten().split(VALUES_AT_A_TIME) if tensor.numel() else ():
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        low, high = wide.aminmax()
        top = max(-low.item(), high.item())  # NaN if any value is
        if not math.isfinite(top):
            return Values(math.nan, math.nan, tensor.nbytes)
        largest = max(largest, top)
        # of large values the squares would not fit into float32
        squares += (wide.double() if top > HUGE else wide).norm().item() ** 2
    return Values(math.sqrt(squares), largest, tensor.nbytes)


def _finite(found: dict[str, Values]) -> Iterator[Finding]:
    broken = [name for name, one in found.items() if not math.isfinite(one.norm)]
    huge = [name for name, one in found.items() if math.isfinite(one.norm) and one.largest > HUGE]
    remedy = "take an earlier checkpoint: its training diverged, or its file was damaged"
    for what, names in (("NaN or infinity", broken), (f"values above {HUGE:g}", huge)):
        if names:
            yield Finding("finite", FAILED, f"{what} in {', '.join(names)}", remedy, {"tensors": names})
    if not broken and not huge:
        yield Finding("finite", OK, f"all values of {len(found)} tensors are finite and below {HUGE:g}")


def _layers(saved: SavedCheckpoint, header: dict[str, Stored], found: dict[str, Values]) -> Iterator[Finding]:
    """One line per TTT layer: the shapes, dtypes and norms of its target generator."""
    layers: dict[int, dict[str, str]] = {}
    for name in header:
        if match := TARGET.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = name
    if not layers:
        yield Finding("TTT", OK, "off: the model has no TTT layer")
    for layer, keys in sorted(layers.items()):
        keys["W_down"] = f"transformer.layers.{layer}.gating.linear_out.weight"
        tensors = {
            key: {"shape": header[name].shape, "dtype": header[name].dtype, "norm": found[name].norm}
            for key, name in sorted(keys.items())
            if name in header
        }
        count = sum(math.prod(one["shape"]) for key, one in tensors.items() if key != "W_down")
        text = "; ".join(
            f"{key} {list(one['shape'])} {one['dtype']} norm {one['norm']:.4g}" for key, one in tensors.items()
        )
        idle = tensors.get(CONV, {}).get("norm") == 0
        remedy = "the convolution is zero: it never learnt; train longer, or raise ttt.optim_lr" if idle else ""
        details = {"layer": layer, "parameters": count, "tensors": tensors}
        yield Finding(f"TTT layer {layer}", WARNING if idle else OK, f"{count:,} parameters: {text}", remedy, details)


def _size(saved: SavedCheckpoint, found: dict[str, Values]) -> Finding:
    """Adapters without TTT would not have the full W_down of TTT layers either."""
    layers = {match[1] for name in found if (match := TARGET.fullmatch(name))}
    w_down = {f"transformer.layers.{layer}.gating.linear_out.weight" for layer in layers if saved.adapters}
    ttt = sum(one.bytes for name, one in found.items() if TARGET.fullmatch(name) or name in w_down)
    total = saved.weights.stat().st_size
    return Finding(
        "size",
        OK,
        f"{in_units(total)}; without TTT {in_units(total - ttt)}",
        details={"bytes": total, "bytes_without_ttt": total - ttt},
    )
