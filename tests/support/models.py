"""Small models and comparisons for the tests: 16 wide, a few layers, made in milliseconds."""

import torch
from moshi.models.lm import LMModel

import moshi_patch

TINY = {
    "dim": 16,
    "num_heads": 2,
    "num_layers": 4,
    "hidden_scale": 4.125,
    "n_q": 4,
    "dep_q": 2,
    "card": 20,
    "text_card": 30,
    "delays": [0, 0, 1, 0, 1],
    "context": 9,
    "causal": True,
    "gating": "silu",
    "norm": "rms_norm",
    "positional_embedding": "rope",
    "depformer_dim": 8,
    "depformer_dim_feedforward": 32,
    "depformer_num_heads": 2,
    "depformer_num_layers": 2,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "depformer_multi_linear": True,
}
"""Keyword arguments of a scaled-down Moshi."""

TTT = {"ttt_enabled": True, "ttt_layers": [1, 3], "ttt_chunk_size": 5, "ttt_learning_rate": 0.2}
TTT_MLP = {"ttt_enabled": True, "ttt_kind": "mlp", "ttt_layers": [1, 3], "ttt_mini_batch_size": 5, "ttt_base_lr": 20.0}
BY_KIND = {"in_place": TTT, "mlp": TTT_MLP}
"""Settings with which each kind of memory learns something, every five steps."""


def ttt_settings(**overrides) -> dict:
    """Those of the kind in `overrides`, with these."""
    return {**BY_KIND[overrides.get("ttt_kind", "in_place")], **overrides}


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, **overrides) -> LMModel:
    """A model of `TINY` in eval mode; the stock weights depend on `seed` alone, not on the TTT settings."""
    torch.manual_seed(seed)
    return LMModel(dtype=dtype, **{**TINY, **overrides}).eval()


def randomise_targets(model: LMModel, std: float = 0.3, seed: int = 1) -> LMModel:
    """Give all weights that TTT added random values, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moshi_patch.ttt_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def random_codes(model: LMModel, batch: int, steps: int, seed: int = 2) -> torch.Tensor:
    """`[B, K, T]` codes that any position of `model` may see."""
    generator = torch.Generator().manual_seed(seed)
    card = min(model.card, model.text_card)
    return torch.randint(0, card, (batch, model.num_codebooks, steps), generator=generator)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative root mean square difference; 0 for two zeros."""
    difference, scale = (value - reference).double().norm(), reference.double().norm()
    return (difference / scale).item() if scale > 0 else difference.item()
