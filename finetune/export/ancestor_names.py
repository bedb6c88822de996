"""What tensors are called in a checkpoint of an ancestor, an older hybrid of Moshi and TTT-MLP, and what here.

An ancestor wraps a layer of the transformer: the stock layer's tensors, and TTT's beside them, have longer names:

    transformer.layers.{i}.original_layer.NAME                          stock; each a second time, equal, under
    transformer.layers.{i}.seq_modeling_block.original_layer.NAME
    transformer.layers.{i}.LAYOUT.W1, ...                               TTT's; LAYOUT is one of `LAYOUTS`
    transformer.layers.{i}.seq_modeling_block.forward_ssm_gating.gating_alpha        its gate
    transformer.layers.{i}.seq_modeling_block.backward_ssm_gating.gating_alpha       a gate that nothing calls

Here they are `transformer.layers.{i}.NAME` and `transformer.layers.{i}.ttt.W1`, ..., 19 in a layer.

Shapes: `h` heads of the transformer, `D` its width, `d = D / h`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from moshi_patch import stock_name

from ..model.tensor_file import some

GATE = "gating_alpha"
LAYOUTS = ("seq_modeling_block", "ttt_layer", "ttt_layer.ttt", "seq_modeling_block.ttt_layer")
LAYOUTS += ("seq_modeling_block.ttt_layer.ttt",)
"""What stands between a layer and its TTT tensors: in the plans, in their revisions, and in what was saved at last."""

LAYER = re.compile(r"transformer\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")
STOCK = re.compile(r"(?:seq_modeling_block\.)?original_layer\.(.+)")
GATES = re.compile(rf"(?:seq_modeling_block\.)?(forward|backward)_ssm_gating\.{GATE}")
MARKS = re.compile(r"(?:^|\.)(?:original_layer|seq_modeling_block|ttt_layer|(?:forward|backward)_ssm_gating)\.")
DEEPER = re.compile(r"(?:weights|biases)\.\d+")
"""An ancestor's inner network of any number of layers."""


def tensor_shapes(dim: int, heads: int) -> dict[str, tuple[int, ...]]:
    """The 19 tensors of a layer by their names after `transformer.layers.{i}.ttt.`, with their shapes."""
    width = dim // heads
    shapes = {
        "W1": (heads, width, 4 * width),
        "b1": (heads, 1, 4 * width),
        "W2": (heads, 4 * width, width),
        "b2": (heads, 1, width),
        "ttt_norm_weight": (heads, width),
        "ttt_norm_bias": (heads, width),
        "learnable_ttt_lr_weight": (heads, 1, dim),
        "learnable_ttt_lr_bias": (heads, 1),
    }
    for name in ("wq", "wk", "wv", "wo"):
        shapes |= {f"{name}.weight": (dim, dim), f"{name}.bias": (dim,)}
    return shapes | {"post_norm.weight": (dim,), "post_norm.bias": (dim,), GATE: (dim,)}


TENSORS = tuple(tensor_shapes(1, 1))


@dataclass
class AncestorNames:
    """What the tensors of a file are.

    Attributes:
        sources: each tensor's name here -> its names in the file; two where it was registered twice.
        layers: those with TTT, ascending.
        layouts: which of `LAYOUTS` were found.
        dropped: names in the file of backward gates.
        problems: what is wrong, one sentence each; empty is good.
    """

    sources: dict[str, list[str]] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def twice(self) -> list[str]:
        """Names here of the tensors that stand more than once in the file."""
        return [name for name, sources in self.sources.items() if len(sources) > 1]

    def ttt(self, layer: int) -> dict[str, str]:
        """The TTT tensors of a layer: name after `ttt.` -> name here."""
        names = {name: f"transformer.layers.{layer}.ttt.{name}" for name in TENSORS}
        return {name: ours for name, ours in names.items() if ours in self.sources}


def read_names(names: Iterable[str]) -> AncestorNames:
    """Finds out what each of `names` is; names that FSDP or compiling wrapped are those inside."""
    found, wrapped, plain = AncestorNames(), set(), set()
    for name in names:
        match = LAYER.fullmatch(stock_name(name))
        layer, rest = (int(match[1]), match[2]) if match else (None, stock_name(name))
        if layer is None or not MARKS.search(rest):
            found.sources.setdefault(stock_name(name), []).append(name)
            plain.add(layer)
            if MARKS.search(rest) or rest.startswith("ttt."):
                found.problems.append(_unknown(name, rest))
            continue
        wrapped.add(layer)
        ours = _ours(found, name, rest)
        if ours is not None:
            found.sources.setdefault(f"transformer.layers.{layer}.{ours}", []).append(name)
    found.layers = sorted(wrapped)
    mixed = sorted(wrapped & plain)
    if mixed:
        found.problems.append(
            f"layers {mixed} have stock tensors under original_layer and beside it, two layouts mixed."
        )
    if len(found.layouts) > 1:
        found.problems.append(f"two layouts mixed: TTT tensors under {' and '.join(found.layouts)}.")
    for layer in found.layers:
        missing = [name for name in TENSORS if name not in found.ttt(layer)]
        if missing:
            found.problems.append(f"layer {layer} lacks {len(missing)} of {len(TENSORS)} TTT tensors: {some(missing)}.")
    return found


def _ours(found: AncestorNames, name: str, rest: str) -> str | None:
    """What `rest`, below a wrapped layer, is called here; None for what is dropped, or a problem."""
    stock, gate = STOCK.fullmatch(rest), GATES.fullmatch(rest)
    if stock and not MARKS.search(stock[1]):
        return stock[1]
    if gate and gate[1] == "backward":
        found.dropped.append(name)
        return None
    if gate:
        return f"ttt.{GATE}"
    for layout in LAYOUTS:
        inside = rest.removeprefix(f"{layout}.")
        if inside in TENSORS and inside != rest:
            if layout not in found.layouts:
                found.layouts.append(layout)
            return f"ttt.{inside}"
    found.problems.append(_unknown(name, rest))
    return None


def _unknown(name: str, rest: str) -> str:
    if rest.startswith("ttt."):
        return f"{name}: is a name of this project; this is no ancestor's checkpoint."
    if DEEPER.search(rest):
        return f"{name}: an inner network of another number of layers than two; there is no such kind here."
    return f"{name}: is no tensor of a known layout ({', '.join(LAYOUTS)})."
