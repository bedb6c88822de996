"""Looks into the TTT layers of a recall model: what its targets and keys are made of (docs/evidence_plateau.md).

Shapes: `B` rows, `T` steps, `D` model width, `H` hidden width.
"""

import dataclasses
from typing import Any

import torch
from moshi.models.lm import LMModel

import moshi_patch

from .model import EVAL_SEED, make
from .settings import Settings

ROWS = 16
"""Held-out sequences that are looked at."""


@torch.no_grad()
def probe(model: LMModel, settings: Settings) -> dict[str, dict[str, float | None]]:
    """Per TTT layer, by its name, what its targets and keys are made of; None where something is zero.

    - `text_in_x0`, `text_in_v`: the share of the text token in the variance of x0, and of v;
    - `mean_in_z`: ‖mean z‖² / mean ‖z‖²: what all keys have in common;
    - `contrast`: z_j·z_t of a returning step and the step it repeats, less the mean over other pairs, in their
      standard deviations;
    - `delta_to_out`: rms of what the fast weight adds, over the rms of W_down z, where the part returns;
    - `readout`: cosine of W_target diag(w_1), the map from the next step's x0 to the target, and E[readout embeddingᵀ],
      the map from tokens to what raises their logits; 1/D is chance;
    - `conv`, `moved`: norms of the filters and of W_target's way from the identity.
    """
    settings = dataclasses.replace(settings, returns=True)
    codes = make(settings, ROWS, torch.Generator().manual_seed(EVAL_SEED), gap=settings.eval_gap).codes
    seen = _activations(model, codes)
    text = model.text_emb(codes[:, 0])
    number = len(model.text_linear.weight)
    tokens = model.text_emb.weight[:number] - model.text_emb.weight[:number].mean(0)
    wanted = (model.text_linear.weight - model.text_linear.weight.mean(0)).T @ tokens
    found = {}
    for name, gating in moshi_patch.ttt_gatings(model).items():
        z, base = seen[name]
        generator, chunk = gating.target_generator, settings.chunk
        conv, projection = generator.conv1d.conv.weight[:, 0], generator.W_target.weight
        v, v_text = generator(seen["x0"], chunk), generator(text, chunk)
        linear = projection * conv[:, 1]
        added, returns = seen[name + ".out"] - base, slice(settings.part + settings.eval_gap, None)
        found[name] = {
            "text_in_x0": _ratio(_variance(text), _variance(seen["x0"])),
            "text_in_v": _ratio(_variance(v_text), _variance(v)),
            "mean_in_z": _ratio(z.mean((0, 1)).square().sum(), z.square().sum(-1).mean()),
            "contrast": _contrast(z, settings),
            "delta_to_out": _ratio(added[:, returns].square().mean().sqrt(), base[:, returns].square().mean().sqrt()),
            "readout": _ratio((linear * wanted).sum(), linear.norm() * wanted.norm()),
            "conv": conv.norm().item(),
            "moved": (projection - torch.eye(len(projection))).norm().item(),
        }
    return {name: {key: _rounded(value) for key, value in values.items()} for name, values in found.items()}


def _activations(model: LMModel, codes: torch.Tensor) -> dict[str, Any]:
    """`x0`; by the name of a TTT layer (z, W_down z); by `NAME.out` the output of its MLP."""
    seen: dict[str, Any] = {}
    handles = [model.transformer.register_forward_pre_hook(lambda m, inputs: seen.__setitem__("x0", inputs[0]))]
    for name, gating in moshi_patch.ttt_gatings(model).items():
        keep = lambda m, inputs, output, name=name: seen.__setitem__(name, (inputs[0], output))  # noqa: E731
        handles.append(gating.linear_out.register_forward_hook(keep))
        after = lambda m, inputs, output, name=name: seen.__setitem__(name + ".out", output)  # noqa: E731
        handles.append(gating.register_forward_hook(after))
    model.forward_text(codes)
    for handle in handles:
        handle.remove()
    return seen


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    return (part / whole).item() if whole > 0 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _variance(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).var(0).sum()


def _contrast(z: torch.Tensor, settings: Settings) -> float:
    """How far the right key stands out among all keys that were written before; see `probe`."""
    start = settings.part + settings.eval_gap
    queries, keys = z[:, start + 1 : -1], z[:, :start]
    scores = torch.einsum("bth,bjh->btj", queries, keys)
    right = torch.zeros_like(scores, dtype=torch.bool)
    place = torch.arange(queries.shape[1])
    right[:, place, place + 1] = True
    return ((scores[right].mean() - scores[~right].mean()) / scores[~right].std()).item()
