"""Where W_target begins: the identity, or a map made from the model's own embeddings that leaves less to be learnt.

Shapes: `D` model width, `N` text tokens.

The filters of a new target generator are zero, so the model is exactly its base whatever W_target is. But with the
identity a target is the sum of all codebooks' embeddings, the text one part in many, and nothing makes the target that
a token leaves raise that token's own logit: both are to be found by chance before anything can be remembered.
`docs/evidence_plateau.md` has what it costs.
"""

import logging

import torch
from moshi.modules.lora import LoRALinear
from torch import nn

import moshi_patch

logger = logging.getLogger(__name__)

RIDGE = 1e-2
"""Of the target source's mean variance, added to every direction before the inverse."""


def readout_projection(embedding: torch.Tensor, readout: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The linear map that best turns a target source into the output direction of the text token in it.

    With token n drawn uniformly and `x0 = embedding_n + noise`, all centred, it is the least-squares solution of
    `W x0 = readout_n`, which is `W = E[readout embeddingᵀ] E[x0 x0ᵀ]⁻¹`.

    Args:
        embedding: `[N, D]`, the text tokens' embeddings.
        readout: `[N, D]`, for each token the direction that raises its logit.
        noise: `[D, D]`, the covariance of all else in the target source.

    Returns:
        `[D, D]`, in float32, of the identity's Frobenius norm √D.
    """
    cross = _centred(readout).T @ _centred(embedding) / len(embedding)
    inputs = covariance(embedding) + noise
    inputs.diagonal().add_(RIDGE * inputs.diagonal().mean())
    found = torch.linalg.solve(inputs, cross, left=False)
    return found * (len(found) ** 0.5 / found.norm())


def covariance(rows: torch.Tensor) -> torch.Tensor:
    """`[D, D]` of `rows [N, D]`, in float32."""
    rows = _centred(rows)
    return rows.T @ rows / len(rows)


def _centred(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.float()
    return rows - rows.mean(0)


@torch.no_grad()
def start_targets(model: nn.Module, kind: str) -> None:
    """Gives W_target of each new target generator its first value; one that has been trained keeps what it has.

    Args:
        model: with its weights, and not yet wrapped. Nothing is done on ranks that have none yet (meta device).
        kind: one of `settings.schema.INITIAL_TARGETS`.
    """
    if kind == "identity" or any(parameter.is_meta for parameter in model.parameters()):
        return
    new = _new_generators(model)
    if not new:
        return
    device = new[0].W_target.weight.device
    readout = _readout(model)
    number = min(model.text_card, len(readout))
    audio = sum(covariance(embedding(torch.arange(model.card, device=device))) for embedding in model.emb)
    embedding = model.text_emb(torch.arange(number, device=device))
    found = readout_projection(embedding, readout[:number], audio)
    for generator in new:
        generator.W_target.weight.copy_(found)
    logger.info("W_target of %d TTT layers starts as the readout of the text.", len(new))


def new_targets(model: nn.Module) -> int:
    """How many TTT layers have weights that were never trained and do nothing; `model` has its weights."""
    return sum(memory.is_closed() for memory in moshi_patch.ttt_memories(model).values())


def _new_generators(model: nn.Module) -> list[nn.Module]:
    return [gating.target_generator for gating in moshi_patch.ttt_gatings(model).values() if gating.is_closed()]


def _readout(model: nn.Module) -> torch.Tensor:
    """`[N, D]`: the rows of the text head, through the gain of the norm before it."""
    head = model.text_linear
    weight = (head.merge_weight() if isinstance(head, LoRALinear) else head.weight).float()
    gain = next((p for name, p in model.out_norm.named_parameters() if name in ("alpha", "weight")), None)
    return weight if gain is None else weight * gain.float().flatten()
