"""The model of a checkpoint, loaded as a server would: does it load, and do its fast weights change what it answers?"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from moshi.models import LMModel, loaders

import moshi_patch

from ..checkpoint.contradictions import patched
from ..checkpoint.saved import SavedCheckpoint, find_adapter_base, load_language_model, model_paths
from ..model.conditions import absent_conditions, fused_conditions
from ..settings.schema import RATES
from .finding import FAILED, OK, WARNING, Finding, in_units
from .machine import available_memory

LONGEST_TRIED = 1 << 13
"""Steps, 11 minutes: a longer chunk is not tried."""

STEPS_AFTER_QUIET = 32
"""Steps after the first chunk, the first that its update can change; where there are no chunks, all that are tried."""

NOTICEABLE_CHANGE = 1e-4
"""A largest change of a logit that no one would notice."""


def check_answers(saved: SavedCheckpoint, base: str | None, device: torch.device) -> Iterator[Finding]:
    """Loads the model and compares its answers with updates on and off."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        yield Finding("model", FAILED, f"not loaded: there is no {device} here", "leave out --device, for the CPU")
        return
    try:
        weights = _base_weights(saved, base)
    except (OSError, ValueError) as error:  # a ConfigError is a ValueError
        yield Finding(
            "base model",
            FAILED,
            f"not found: {error}",
            "give it with --base: a Hub repository, a folder like one, or its .safetensors file",
        )
        return
    needed = sum(path.stat().st_size for path in (weights, saved.weights) if path is not None)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free is not None and free < needed:
        text = f"not loaded: it takes {in_units(needed)}, and {in_units(free)} are free"
        yield Finding("model", WARNING, text, "check it on a larger machine, or with --device cuda")
        return
    with patched(), moshi_patch.without_compiling(device):
        try:
            model = load_language_model(saved, weights, device, saved.dtype)
        except Exception as error:  # whatever moshi and torch raise for weights that do not fit
            remedy = "give the base model that these adapters were trained on, with --base" if weights else ""
            yield Finding("model", FAILED, f"does not load: {type(error).__name__}: {error}", remedy)
            return
        moshi_patch.fit_threads(model)
        count = sum(parameter.numel() for parameter in model.parameters())
        over = f" over {weights}" if weights is not None else ""
        yield Finding("model", OK, f"loads{over}: {count:,} parameters", details={"parameters": count})
        if moshi_patch.ttt_memories(model):
            yield _active(model)


def _base_weights(saved: SavedCheckpoint, base: str | None) -> Path | None:
    """The weights that adapters need; None for a whole model."""
    if not saved.needs_base:
        return None
    paths = model_paths(saved, base)
    weights = (
        find_adapter_base(saved, paths).moshi_weights if paths.moshi_path is None else loaders.hf_get(paths.moshi_path)
    )
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file")
    return weights


@torch.no_grad()
def _active(model: LMModel) -> Finding:
    """Random codes, long enough for one update to be heard in the answer."""
    memories = moshi_patch.ttt_memories(model).values()
    quiet = max(memory.quiet_steps for memory in memories)
    steps = quiet + STEPS_AFTER_QUIET
    if steps > LONGEST_TRIED:
        return Finding("TTT active", WARNING, f"not tried: ttt_chunk_size={quiet} is longer than {LONGEST_TRIED} steps")
    generator = torch.Generator().manual_seed(0)
    cards = [model.text_card, *[model.card] * model.num_audio_codebooks]
    codes = torch.stack([torch.randint(card, (1, steps), generator=generator) for card in cards], 1).to(model.device)
    on = _text_logits(model, codes)
    with moshi_patch.ttt_updates(model, enabled=False):
        off = _text_logits(model, codes)
    change, nats = _difference(on, off, quiet)
    text = f"updates change the text logits of {steps} random steps by up to {change:.3g}, {nats:.3g} nats on average"
    details = {"steps": steps, "largest_logit_change": change, "nats": nats}
    if any(memory.answers_untaught for memory in memories):
        with moshi_patch.ttt_bypassed(model):
            closed = _text_logits(model, codes)
        whole, nats = _difference(on, closed, quiet)
        text += f"; the memories as a whole, gates closed, by up to {whole:.3g}, {nats:.3g} nats"
        details |= {"largest_logit_change_gates_closed": whole, "nats_gates_closed": nats}
    if not math.isfinite(change):
        return Finding("TTT active", FAILED, "the answers are not finite", "take an earlier checkpoint", details)
    if change == 0:
        remedy = "it never learnt: train longer, raise ttt.optim_lr, or check that the trainer logged no warning"
        return Finding("TTT active", FAILED, f"no: {text}", remedy, details)
    if change < NOTICEABLE_CHANGE:
        remedy = f"raise ttt.{RATES[model.ttt_config.kind]} or ttt.optim_lr, or train longer"
        return Finding("TTT active", WARNING, f"hardly: {text}", remedy, details)
    return Finding("TTT active", OK, text, details=details)


def _difference(on: torch.Tensor, other: torch.Tensor, quiet: int) -> tuple[float, float]:
    """The largest change of a logit, and the mean KL divergence in nats of the steps after the first `quiet`."""
    change = (on - other).abs().max().item()
    on, other = on.log_softmax(-1)[:, quiet:], other.log_softmax(-1)[:, quiet:]
    return change, (on.exp() * (on - other)).sum(-1).mean().item()


def _text_logits(model: LMModel, codes: torch.Tensor) -> torch.Tensor:
    """`[1, T, card]` float32, of a model that may take conditions; they are left empty."""
    fused = fused_conditions(model, absent_conditions(model, 1))
    return model.forward_text(codes, *fused)[1][:, 0].float()
