"""What the weights of a checkpoint are: how large, and how far each TTT layer has come."""

import math
from collections.abc import Iterator

import moshi_patch

from ..checkpoint.saved import SavedCheckpoint
from ..model.tensor_file import Size, Stored
from .finding import OK, WARNING, Finding, in_units

CONV = moshi_patch.TARGET_KEYS[0]


def describe_tensors(saved: SavedCheckpoint, header: dict[str, Stored], sizes: dict[str, Size]) -> Iterator[Finding]:
    """One finding for each TTT layer, and the size of the file."""
    yield from _layers(header, sizes)
    yield _size(saved, sizes)


def _layers(header: dict[str, Stored], sizes: dict[str, Size]) -> Iterator[Finding]:
    """Shapes, dtypes and norms of each target generator."""
    layers: dict[int, dict[str, str]] = {}
    for name in header:
        if found := moshi_patch.target_key(name):
            layers.setdefault(found[0], {})[found[1]] = name
    if not layers:
        yield Finding("TTT", OK, "off: the model has no TTT layer")
    for layer, keys in sorted(layers.items()):
        keys["W_down"] = _w_down(layer)
        tensors = {
            key: {"shape": header[name].shape, "dtype": header[name].dtype, "norm": sizes[name].norm}
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


def _size(saved: SavedCheckpoint, sizes: dict[str, Size]) -> Finding:
    """Adapters without TTT would not have the full W_down of TTT layers either."""
    targets = {name: found[0] for name in sizes if (found := moshi_patch.target_key(name))}
    w_down = {_w_down(layer) for layer in targets.values() if saved.needs_base}
    ttt = sum(one.bytes for name, one in sizes.items() if name in targets or name in w_down)
    total = saved.weights.stat().st_size
    return Finding(
        "size",
        OK,
        f"{in_units(total)}; without TTT {in_units(total - ttt)}",
        details={"bytes": total, "bytes_without_ttt": total - ttt},
    )


def _w_down(layer: int) -> str:
    return f"transformer.layers.{layer}.gating.linear_out.weight"
