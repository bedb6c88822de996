"""The plateau before memory sets in: how many training steps it takes, what it is made of, and what shortens it.

`python -m benchmarks.evidence.plateau [--rows R ...] [--variant NAME ...] [--seed S ...] [--out FILE.jsonl]`

The task is `recall.py`'s with R random audio rows beside the text row, which is what x0, the source of the targets, is
made of: R = 0 is text alone, moshi has 8 or 16. The loss on what returns stays at chance, ln 44 = 3.78 nats, then
drops within some dozens of steps. A run ends when it has dropped below `ESCAPED`, and reports the step of that
evaluation. The learning rate is constant, so that the number of steps does not depend on the length that was planned.

Every evaluation also records what could tell a plateau from a dead run, and every fifth a `probe`: per TTT layer, what
targets and keys are made of. One JSON line per run; runs that are in FILE already are not repeated.

Shapes: `B` rows, `T` steps, `D` model width, `H` hidden width.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel

import moshi_patch
from benchmarks.measure import machine
from finetune.model.initial_targets import start_targets

from . import recall
from .recall import Settings

ESCAPED = 2.5
"""Nats on the repeat, clearly below chance and above what is reached in the end."""

EVERY = 20
"""Training steps between evaluations."""

PROBED = 64
"""Held-out sequences of an evaluation."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the shipped defaults.

    Args:
        init: of W_target, see `finetune.model.initial_targets`.
        multiple: the target generators' learning rate over the others'.
        conv_multiple: the same for the filters alone; None: as `multiple`.
        text_multiple: the text embedding's learning rate over the others'.
        layers: TTT layers.
        clip: largest Frobenius norm of a chunk's update.
        frozen: target generators do not train: a dead run.
        updates: False: trained with the updates off, the control.
        returns: False: what should return is drawn anew, and there is nothing to learn: a dead run, too.
        settings: other fields of `recall.Settings`.
    """

    init: str = "identity"
    multiple: float = 5.0
    conv_multiple: float | None = None
    text_multiple: float = 1.0
    layers: str = "all"
    clip: float | None = None
    frozen: bool = False
    updates: bool = True
    returns: bool = True
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


VARIANTS = {
    "default": Variant(),
    "readout": Variant(init="readout"),
    "rate_20": Variant(multiple=20),
    "conv_rate_50": Variant(conv_multiple=50),
    "middle": Variant(layers="1"),
    "eta_0.1": Variant(settings={"rate": 0.1}),
    "eta_0.01": Variant(settings={"rate": 0.01}),
    "readout_eta_0.1": Variant(init="readout", settings={"rate": 0.1}),
    "readout_eta_0.01": Variant(init="readout", settings={"rate": 0.01}),
    "readout_first_0.01": Variant(init="readout", layers="0", settings={"rate": 0.01}),
    "readout_text_5_0.01": Variant(init="readout", text_multiple=5, settings={"rate": 0.01}),
    "readout_text_5_0.1": Variant(init="readout", text_multiple=5, settings={"rate": 0.1}),
    "readout_text_5": Variant(init="readout", text_multiple=5),
    "text_5_0.1": Variant(text_multiple=5, settings={"rate": 0.1}),
    "text_5_rate_1_0.1": Variant(multiple=1, text_multiple=5, settings={"rate": 0.1}),
    "slow_base_0.1": Variant(multiple=20, settings={"rate": 0.1, "lr": 5e-4}),
    "nothing_returns": Variant(returns=False),
    "nothing_returns_readout_text_5_0.1": Variant(
        init="readout", text_multiple=5, returns=False, settings={"rate": 0.1}
    ),
    "clip_1": Variant(clip=1.0),
    "batch_64": Variant(settings={"batch": 64}),
    "short_gap_first": Variant(settings={"gap_min": 16, "gap_max": 16}),
    "no_updates": Variant(updates=False),
    "dead_frozen": Variant(frozen=True),
    "dead_eta": Variant(settings={"rate": 1e-9}),
    "dead_target_lr": Variant(multiple=5e-5),
}
"""Those named in docs/evidence_plateau.md were run; the number at the end of a name is η."""


def build(settings: Settings, variant: Variant) -> LMModel:
    """The recall model with the variant's TTT layers and initial targets."""
    model = recall.build_model(settings, variant.updates, ttt_layers=variant.layers, ttt_delta_clip=variant.clip)
    start_targets(model, variant.init)
    return model


def make_optimizer(model: LMModel, settings: Settings, variant: Variant) -> torch.optim.AdamW:
    """`recall`'s optimizer with the variant's rates, a group for the filters and one for W_target."""
    targets = moshi_patch.ttt_parameters(model)
    conv = [parameter for name, parameter in targets.items() if "conv1d" in name]
    projections = [parameter for name, parameter in targets.items() if "conv1d" not in name]
    text = list(model.text_emb.parameters())
    ids = {id(parameter) for parameter in [*targets.values(), *text]}
    multiple = variant.multiple
    conv_multiple = multiple if variant.conv_multiple is None else variant.conv_multiple
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in ids], "lr": settings.lr},
        {"params": text, "lr": variant.text_multiple * settings.lr},
        {"params": conv, "lr": 0.0 if variant.frozen else conv_multiple * settings.lr},
        {"params": projections, "lr": 0.0 if variant.frozen else multiple * settings.lr},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(0.9, settings.beta2), weight_decay=0)


def make_batch(settings: Settings, variant: Variant, batch: int, gap: int, generator: torch.Generator) -> torch.Tensor:
    """As `recall.make_batch`; without a return, the last part is another one."""
    codes = recall.make_batch(settings, batch, gap, generator)
    if not variant.returns:
        codes[:, 0, -settings.part :] = torch.randint(settings.card, (batch, settings.part), generator=generator)
    return codes


@torch.no_grad()
def gain(model: LMModel, settings: Settings, variant: Variant) -> dict[str, float]:
    """Nats on the repeat, updates on and off, and what updates gain on it, with its standard error over sequences."""
    generator = torch.Generator().manual_seed(recall.EVAL_SEED + settings.eval_gap)
    codes = make_batch(settings, variant, PROBED, settings.eval_gap, generator)
    on = recall.token_losses(model, codes)[:, settings.part + settings.eval_gap :].mean(1)
    if not moshi_patch.ttt_gatings(model):
        return {"on": on.mean().item()}
    with moshi_patch.ttt_updates(model):
        off = recall.token_losses(model, codes)[:, settings.part + settings.eval_gap :].mean(1)
    won = off - on
    error = won.std() / len(won) ** 0.5
    return {"on": on.mean().item(), "off": off.mean().item(), "gain": won.mean().item(), "gain_error": error.item()}


@torch.no_grad()
def probe(model: LMModel, settings: Settings) -> dict[str, dict[str, float]]:
    """Per TTT layer, what its targets and keys are made of.

    - `text_in_x0`, `text_in_v`: the share of the text token in the variance of x0, and of v;
    - `mean_in_z`: ‖mean z‖² / mean ‖z‖²: what all keys have in common;
    - `contrast`: z_j·z_t of a returning step and the step it repeats, less the mean over other pairs, in their
      standard deviations;
    - `delta_to_out`: rms of what the fast weight adds, over the rms of W_down z, where the part returns;
    - `readout`: cosine of W_target diag(w_1), the map from the next step's x0 to the target, and E[readout embeddingᵀ],
      the map from tokens to what raises their logits; 1/D is chance;
    - `conv`, `moved`: norms of the filters and of W_target's way from its identity.
    """
    generator = torch.Generator().manual_seed(recall.EVAL_SEED)
    codes = recall.make_batch(settings, 16, settings.eval_gap, generator)
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
    text = model.text_emb(codes[:, 0])
    number = len(model.text_linear.weight)
    tokens = model.text_emb.weight[:number] - model.text_emb.weight[:number].mean(0)
    wanted = (model.text_linear.weight - model.text_linear.weight.mean(0)).T @ tokens
    found = {}
    for name, gating in moshi_patch.ttt_gatings(model).items():
        z, base = seen[name]
        generator_, chunk = gating.target_generator, settings.chunk
        conv, projection = generator_.conv1d.conv.weight[:, 0], generator_.W_target.weight
        v, v_text = generator_(seen["x0"], chunk), generator_(text, chunk)
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
    return found


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    return (part / whole).item() if whole > 0 else None


def _variance(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).var(0).sum()


def _contrast(z: torch.Tensor, settings: Settings) -> float:
    """Of the right key among all keys that were written before, as `probe` says."""
    start = settings.part + settings.eval_gap
    queries, keys = z[:, start + 1 : -1], z[:, : settings.part + settings.eval_gap]
    scores = torch.einsum("bth,bjh->btj", queries, keys)
    right = torch.zeros_like(scores, dtype=torch.bool)
    place = torch.arange(queries.shape[1])
    right[:, place, place + 1] = True
    return ((scores[right].mean() - scores[~right].mean()) / scores[~right].std()).item()


def escape(rows: int, name: str, seed: int, max_steps: int) -> dict[str, Any]:
    """Train one variant until its loss on the repeat is below `ESCAPED`.

    Returns:
        `rows`, `variant`, `seed`, `escaped` (a step, or None after `max_steps`), `settings`, `seconds`, `curve` (a list
        of what `gain` returned, with `step`) and `probes` (of what `probe` returned).
    """
    variant = VARIANTS[name]
    settings = Settings(
        case="hard" if rows else "easy", audio_rows=max(1, rows), seed=seed, steps=max_steps, **variant.settings
    )
    moshi_patch.install()
    model = build(settings, variant)
    optimizer = make_optimizer(model, settings, variant)
    generator = torch.Generator().manual_seed(seed)
    curve, probes, escaped, start = [], [], None, time.perf_counter()
    for step in range(max_steps + 1):
        if step % EVERY == 0:
            curve.append({"step": step, **gain(model, settings, variant)})
            if variant.updates and step % (5 * EVERY) == 0:
                probes.append({"step": step, **probe(model, settings)})
            print(rows, name, seed, curve[-1], file=sys.stderr, flush=True)
            if curve[-1]["on"] < ESCAPED:
                escaped = step
                break
        gap = int(torch.randint(settings.gap_min, settings.gap_max + 1, (), generator=generator))
        loss = recall.token_losses(model, make_batch(settings, variant, settings.batch, gap, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {
        "rows": rows,
        "variant": name,
        "seed": seed,
        "escaped": escaped,
        "max_steps": max_steps,
        "seconds": round(time.perf_counter() - start, 1),
        "options": dataclasses.asdict(variant),
        "settings": dataclasses.asdict(settings),
        "curve": curve,
        "probes": probes,
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8], help="random audio rows; 0: text alone in x0")
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=["default"])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--max-steps", type=int, default=2500)
    parser.add_argument("--out", type=Path, default=Path("plateau.jsonl"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    done = set()
    if args.out.exists():
        lines = (json.loads(line) for line in args.out.read_text().splitlines())
        done = {(run["rows"], run["variant"], run["seed"]) for run in lines}
    for key in [(rows, name, seed) for seed in args.seed for name in args.variant for rows in args.rows]:
        if key in done:
            continue
        run = escape(*key, args.max_steps)
        with args.out.open("a") as file:
            file.write(json.dumps({**run, "machine": machine(torch.device("cpu"))}) + "\n")
        print(*key, "escaped:", run["escaped"], f"{run['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
