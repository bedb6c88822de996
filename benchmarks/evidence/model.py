"""Builds the small `LMModel` of a run and measures what it remembers, updates on and off.

Shapes: `B` rows, `R` predicted rows (the text row, or all audio rows for speech), `T` steps.
"""

import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora

import moshi_patch
from finetune.model.initial_targets import start_targets

from .dialogue import dialogue
from .forms import give_form
from .settings import Settings
from .speech import CODES, SPEECH_VARIATIONS, speech
from .tasks import MAKE, Batch, variations

EVAL_SEED = 10**6
DEPFORMER = {
    "depformer_dim": 32,
    "depformer_dim_feedforward": 128,
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "depformer_multi_linear": True,
}


class Diverged(ArithmeticError):
    """The loss or a gradient was no finite number."""


def make(settings: Settings, batch: int, generator: torch.Generator, **fixed) -> Batch:
    """Draws sequences of the run's task."""
    tasks = MAKE | {"speech": speech, "dialogue": dialogue}
    return tasks[settings.task](settings, batch, generator, **fixed)


def build_model(settings: Settings) -> LMModel:
    """The small `LMModel` with random weights; its stock weights do not depend on the TTT settings."""
    torch.manual_seed(settings.seed)
    spoken = settings.task == "speech"
    model = LMModel(
        n_q=settings.audio_rows,
        dep_q=settings.audio_rows if spoken else 0,
        delays=[0] * (settings.audio_rows + 1),
        card=CODES if spoken else settings.card,
        text_card=settings.card,
        dim=settings.width,
        num_heads=settings.heads,
        num_layers=settings.layers,
        context=settings.context,
        causal=True,
        gating="silu",
        norm="rms_norm",
        positional_embedding="rope",
        **(DEPFORMER if spoken else {}),
        **ttt_arguments(settings),
    )
    give_form(model, dict(settings.form))
    return model


def ttt_arguments(settings: Settings) -> dict[str, Any]:
    """The `ttt_*` keyword arguments of a run."""
    common = {"ttt_enabled": settings.model == "ttt", "ttt_layers": settings.ttt_layers}
    further = {f"ttt_{name}": value for name, value in settings.ttt}
    if settings.kind == "mlp":
        return common | further
    return {
        **common,
        "ttt_chunk_size": settings.chunk,
        "ttt_learning_rate": settings.rate,
        "ttt_conv_kernel_size": settings.kernel,
        "ttt_conv_depthwise": settings.depthwise,
        "ttt_target": settings.target,
        "ttt_delta_clip": settings.clip,
        "ttt_decay": settings.decay,
        **further,
    }


def start(settings: Settings, base: LMModel | None = None) -> LMModel:
    """The model a run trains: random or with the weights of `base`, a stock model; with adapters if it has any."""
    model = build_model(settings)
    if base is not None:
        model.load_state_dict(base.state_dict(), strict=True)
    start_targets(model, settings.init_target)
    if settings.trained == "lora":
        targets = {id(parameter) for parameter in moshi_patch.ttt_parameters(model).values()}
        replace_all_linear_with_lora(model, settings.rank, 2.0)
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in targets)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_A.requires_grad_(True)
                module.lora_B.requires_grad_(True)
                torch.nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5))
                torch.nn.init.zeros_(module.lora_B.weight)
    return model


def predict(model: LMModel, codes: torch.Tensor, spoken: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[B, R, T - 1, card]` for the steps of `codes` from 1 on, and the tokens `[B, R, T - 1]` that follow."""
    if spoken:
        return model(codes).logits[:, :, 1:], codes[:, 1:, 1:]
    return model.forward_text(codes[:, :, :-1])[1], codes[:, :1, 1:]


def token_losses(model: LMModel, codes: torch.Tensor, spoken: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats and hits `[B, T - 1]` for the steps of `codes` from 1 on, means over the predicted rows."""
    logits, tokens = predict(model, codes, spoken)
    losses = F.cross_entropy(logits.permute(0, 3, 1, 2), tokens, reduction="none")
    return losses.mean(1), (logits.argmax(-1) == tokens).float().mean(1)


@torch.no_grad()
def evaluate(model: LMModel, settings: Settings, updates: bool = True) -> dict[str, dict[str, Any]]:
    """Evaluates held-out sequences of every variation: per mark the mean `nats` and the share of `hits`."""
    found = {}
    settings = dataclasses.replace(settings, quiet=0.0)  # every recall is measured on the same sequences
    fixed_by_name = variations(settings)
    if settings.task == "speech":
        fixed_by_name = {name: fixed | SPEECH_VARIATIONS[""] for name, fixed in fixed_by_name.items()}
        fixed_by_name |= {n: {"gap": settings.eval_gap} | v for n, v in SPEECH_VARIATIONS.items()}
    for name, fixed in fixed_by_name.items():
        codes, marks = make(settings, settings.eval_batch, torch.Generator().manual_seed(EVAL_SEED + 1), **fixed)
        with nullcontext() if updates else moshi_patch.ttt_updates(model):
            losses, hits = token_losses(model, codes, settings.task == "speech")
        if not losses.isfinite().all():
            raise Diverged(f"a held-out loss is not finite ({name or 'headline'})")
        found[name] = {
            mark: {"nats": round(losses[at[:, 1:]].mean().item(), 4), "hits": round(hits[at[:, 1:]].mean().item(), 4)}
            for mark, at in marks.items()
            if at[:, 1:].any()
        }
    return found
