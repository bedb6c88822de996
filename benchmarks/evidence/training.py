"""Trains the model of a run: learning rates by group, stages, evaluations on the way, and a cache of the result."""

import functools
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel

import moshi_patch
from benchmarks.measure import PeakMemory

from .forms import set_progress
from .model import EVAL_SEED, Diverged, make, start, token_losses
from .probe import probe
from .settings import Settings

MEASURED = 64
"""Held-out sequences of an evaluation on the way."""

WITH_TARGETS = ("conv", "W_target", "w_down", "memory", "form")
"""Groups that train while `Settings.targets_first` lasts."""


def make_optimizer(model: LMModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW without weight decay, one group per learning rate: `stock`, `text`, `conv`, `W_target`, `w_down`,
    `memory` for what the kind mlp adds and `form` for what a form trains, at the rate of the target generators."""
    targets = moshi_patch.ttt_parameters(model)
    groups: dict[str, list] = {name: [] for name in ("stock", "text", *WITH_TARGETS)}
    w_down = {id(p) for gating in moshi_patch.ttt_gatings(model).values() for p in gating.linear_out.parameters()}
    text = {id(parameter) for parameter in model.text_emb.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".form_weights." in name:
            group = "form"
        elif name in targets:
            group = "memory" if settings.kind == "mlp" else "conv" if "conv1d" in name else "W_target"
        else:
            group = "w_down" if id(parameter) in w_down else "text" if id(parameter) in text else "stock"
        groups[group].append(parameter)
    rates = dict.fromkeys(groups, settings.lr)
    rates["stock"] = settings.lr * settings.stock_rate
    rates |= dict.fromkeys(("W_target", "memory", "form"), settings.target_lr)
    rates["conv"] = settings.target_lr if settings.conv_lr is None else settings.conv_lr
    rates["text"] = rates["stock"] if settings.text_lr is None else settings.text_lr
    entries = [{"name": name, "params": found, "lr": rates[name]} for name, found in groups.items() if found]
    return torch.optim.AdamW(entries, betas=(0.9, settings.beta2), weight_decay=0)


def make_schedule(optimizer: torch.optim.Optimizer, settings: Settings) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate of each group over the steps: `settings.schedule`, and the stages of `targets_first`."""

    def factor(name: str, step: int) -> float:
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / settings.steps)  # from 1 to 0.1
        base = cosine if settings.schedule == "cosine" else 1.0
        if step < settings.targets_first:
            return base if name in WITH_TARGETS else 0.0
        return base * (settings.then_rate if settings.targets_first else 1.0)

    names = [group["name"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [functools.partial(factor, name) for name in names])


@torch.enable_grad()
def train(model: LMModel, settings: Settings) -> dict[str, Any]:
    """Train for `settings.steps`, or until an evaluation on the way is below `settings.stop_below`.

    Returns:
        `seconds`, `cpu_seconds`, `peak_bytes` (tensors alive in one training step beside the model's own), `curve`
        (mean loss of each twentieth of the training). With `measure_every`, `measured`: what `measure_recall` returned
        by `step`, `stopped`: the step of the evaluation that ended the training, or None, and, with `probe_every`,
        `probes`: what `probe` returned by `step`.

    Raises:
        Diverged: at the first loss that is not finite, with the step in its message.
    """
    if not settings.steps:
        return {"seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": 0, "curve": []}
    optimizer = make_optimizer(model, settings)
    schedule = make_schedule(optimizer, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    peak_bytes = _peak_bytes(model, settings)
    optimizer.zero_grad()
    losses: list[float] = []
    way = _OnTheWay(model, settings)
    seconds = cpu_seconds = 0.0
    for step in range(settings.steps):
        if way.stops_at(step):
            break
        clock, cpu_clock = time.perf_counter(), time.process_time()
        set_progress(model, step)
        codes = training_codes(settings, step, generator)
        loss = token_losses(model, codes, settings.task == "speech")[0].mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise Diverged(f"loss {losses[-1]} at step {step} of {settings.steps}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - clock
        cpu_seconds += time.process_time() - cpu_clock
    else:
        way.stops_at(settings.steps)
    set_progress(model, math.inf)
    every = max(1, settings.steps // 20)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_bytes": peak_bytes,
        "curve": [round(sum(losses[i : i + every]) / every, 4) for i in range(0, len(losses) - every + 1, every)],
    } | way.found


def training_codes(settings: Settings, step: int, generator: torch.Generator) -> torch.Tensor:
    """`[B, R, T]`: the sequences of a training step, `settings.units` of them in a row from `units_from` on."""
    units = settings.units if step >= settings.units_from else 1
    return torch.cat([make(settings, settings.batch // units, generator).codes for _ in range(units)], 2)


class _OnTheWay:
    """The evaluations during a training, and whether one of them ends it."""

    def __init__(self, model: LMModel, settings: Settings):
        self.model, self.settings = model, settings
        self.found: dict[str, Any] = {"measured": [], "stopped": None} if settings.measure_every else {}
        if settings.probe_every and settings.model == "ttt":
            self.found["probes"] = []

    def stops_at(self, step: int) -> bool:
        """Evaluates, if that is due before training step `step`; True when the result ends the training."""
        settings = self.settings
        if not settings.measure_every or (step % settings.measure_every and step != settings.steps):
            return False
        point = measure_recall(self.model, settings)
        self.found["measured"].append({"step": step, **point})
        if "probes" in self.found and step % settings.probe_every == 0:
            self.found["probes"].append({"step": step, **probe(self.model, settings)})
        if point["none" if settings.model == "none" else "on"]["beyond"] < settings.stop_below:
            self.found["stopped"] = step
        return self.found["stopped"] is not None


def _peak_bytes(model: LMModel, settings: Settings) -> int:
    """Bytes of the tensors alive in one training step on the longest sequence, beside the model's own."""
    longest = {"gap": settings.gap_max} if settings.task in ("recall", "speech") else {}
    longest |= {"pairs": max(settings.pairs)} if settings.task == "assoc" else {}
    codes = make(settings, settings.batch // settings.units, torch.Generator().manual_seed(EVAL_SEED), **longest).codes
    codes = codes.repeat(1, 1, settings.units)
    with PeakMemory(torch.device("cpu")) as memory:
        token_losses(model, codes, settings.task == "speech")[0].mean().backward()
    return memory.bytes


@torch.no_grad()
def measure_recall(model: LMModel, settings: Settings) -> dict[str, Any]:
    """Nats on held-out sequences with a gap of `eval_gap`: per condition the marks `first` and `beyond`.

    With TTT also `gain`, by how much updates lower the loss `beyond` the window (nats, the same weights), and
    `gain_error`, its standard error over sequences.
    """
    generator = torch.Generator().manual_seed(EVAL_SEED + settings.eval_gap)
    codes, marks = make(settings, MEASURED, generator, gap=settings.eval_gap)
    found: dict[str, Any] = {}
    beyond: dict[str, torch.Tensor] = {}
    for name in ("none",) if settings.model == "none" else ("on", "off"):
        with moshi_patch.ttt_updates(model) if name == "off" else nullcontext():
            losses = token_losses(model, codes, False)[0]
        beyond[name] = losses[marks["beyond"][:, 1:]].view(MEASURED, -1).mean(1)
        first = losses[marks["first"][:, 1:]].mean().item()
        found[name] = {"first": round(first, 5), "beyond": round(beyond[name].mean().item(), 5)}
    if settings.model == "ttt":
        gain = beyond["off"] - beyond["on"]
        error = gain.std() / len(gain) ** 0.5
        found |= {name: float(f"{value:.5g}") for name, value in (("gain", gain.mean()), ("gain_error", error))}
    return found


@functools.lru_cache(maxsize=4)
def trained_model(settings: Settings, cache: Path | None) -> LMModel:
    """The model of `trained`, kept in memory for the runs that share it. To be read, not changed."""
    return trained(settings, cache)[0]


def trained(settings: Settings, cache: Path | None) -> tuple[LMModel, dict[str, Any]]:
    """The trained model of `settings.training()` and what `train` returned; from a file in `cache` if it is there."""
    settings = settings.training()
    base = settings.base()
    model = start(settings, trained_model(base, cache) if base else None)
    file = cache / f"{settings.id}.pt" if cache else None
    if file and file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        return model, saved["training"]
    training = train(model, settings)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "training": training}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return model, training
