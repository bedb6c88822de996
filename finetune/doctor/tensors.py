"""What the weights of a checkpoint are: how large, and how far each TTT layer has come."""

import math
import re
from collections.abc import Iterator

import moshi_patch

from ..checkpoint.contradictions import listed
from ..checkpoint.saved import SavedCheckpoint
from ..model.tensor_file import Size, Stored, read_header
from .finding import FAILED, OK, WARNING, Finding, in_units

OPENS = {"in_place": (moshi_patch.TARGET_KEYS[0], "the convolution"), "mlp": ("gating_alpha", "the gate")}
"""By kind of memory the weight that begins at zero, and keeps everything else from having any effect; and its name."""

SHOWN = {"mlp": ("W1", "W2", "gating_alpha", "wo.weight")}
"""By kind, those of many tensors that tell how far a layer has come."""


def describe_tensors(saved: SavedCheckpoint, header: dict[str, Stored], sizes: dict[str, Size]) -> Iterator[Finding]:
    """One finding for each TTT layer, and the size of the file."""
    yield from _layers(header, sizes)
    yield _size(saved, sizes)


def expected_layers(saved: SavedCheckpoint, expected: str | None) -> Iterator[Finding]:
    """Whether the weights have TTT in the layers that somebody expects, `"5,11,17"`, or in so many, `"3"`."""
    if expected is None:
        return
    there = sorted({found.layer for name in read_header(saved.weights) if (found := moshi_patch.memory_key(name))})
    wanted = sorted({int(number) for number in re.findall(r"\d+", expected)})
    if expected.strip().isdecimal():
        good, what = len(there) == wanted[0], f"{wanted[0]} layer{'s' * (wanted[0] != 1)} expected"
    else:
        good, what = there == wanted, f"{listed(wanted)} expected"
    text = f"{what}, TTT in {listed(there)}"
    remedy = "" if good else "take the checkpoint that was meant, or correct --expect-layers"
    yield Finding("expected layers", OK if good else FAILED, text, remedy, {"layers": there})


def _layers(header: dict[str, Stored], sizes: dict[str, Size]) -> Iterator[Finding]:
    """Shapes, dtypes and norms of what TTT added to each layer."""
    layers: dict[int, dict[str, str]] = {}
    kinds: dict[int, str] = {}
    for name in header:
        if found := moshi_patch.memory_key(name):
            layers.setdefault(found.layer, {})[found.key.removeprefix("target_generator.")] = name
            kinds[found.layer] = found.kind
    if not layers:
        yield Finding("TTT", OK, "off: the model has no TTT layer")
    for layer, keys in sorted(layers.items()):
        yield _layer(layer, kinds[layer], keys, header, sizes)


def _layer(layer: int, kind: str, keys: dict[str, str], header: dict[str, Stored], sizes: dict[str, Size]) -> Finding:
    if kind == "in_place":
        keys["W_down"] = _w_down(layer)
    tensors = {
        key: {"shape": header[name].shape, "dtype": header[name].dtype, "norm": sizes[name].norm}
        for key, name in sorted(keys.items())
        if name in header
    }
    count = sum(math.prod(one["shape"]) for key, one in tensors.items() if key != "W_down")
    shown = SHOWN.get(kind, tuple(tensors))
    text = "; ".join(
        f"{key} {list(one['shape'])} {one['dtype']} norm {one['norm']:.4g}"
        for key, one in tensors.items()
        if key in shown
    )
    key, what = OPENS[kind]
    idle = tensors.get(key, {}).get("norm") == 0
    remedy = f"{what} is zero: it never learnt; train longer, or raise ttt.optim_lr" if idle else ""
    details = {"layer": layer, "kind": kind, "parameters": count, "tensors": tensors}
    return Finding(f"TTT layer {layer}", WARNING if idle else OK, f"{count:,} parameters: {text}", remedy, details)


def _size(saved: SavedCheckpoint, sizes: dict[str, Size]) -> Finding:
    """Adapters without TTT would not have the full W_down of TTT layers either."""
    targets = {name: found for name in sizes if (found := moshi_patch.memory_key(name))}
    trained = [found.layer for found in targets.values() if found.kind == "in_place" and saved.needs_base]
    w_down = set(map(_w_down, trained))
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
