"""The model card of an exported checkpoint: what it is, how it is served, and what was measured of it."""

import math
from collections.abc import Mapping
from typing import Any

import yaml

from ..checkpoint.saved import SavedCheckpoint
from ..common.tables import markdown
from ..evaluation.published.benchmark_tables import notes, table

TAGS = ["moshi", "test-time-training", "speech-to-speech"]
LOSSES = ("loss", "text_loss", "audio_loss", "perplexity")
"""Columns of the table of results, as `eval.json` names them."""

NOT_MEASURED = "Not measured. `eval_from_checkpoint.py` measures, and an export after it shows its results here."


def model_card(name: str, saved: SavedCheckpoint, *, adapters: bool, base: str | None, results: Mapping | None) -> str:
    """Markdown with the Hub's YAML heading.

    Args:
        adapters: whether the folder holds adapters, and not a whole model.
        base: the Hub repository of the base model; None when it is not from the Hub.
        results: content of an `eval.json`; None when nothing was measured.
    """
    heading: dict[str, Any] = {"library_name": "moshi", "pipeline_tag": "audio-to-audio", "tags": TAGS}
    if base is not None:
        heading |= {"base_model": base, "base_model_relation": "adapter" if adapters else "finetune"}
    front = yaml.safe_dump(heading, sort_keys=False) + "# license: say which; that of the base model goes with it\n"
    of = f"[{base}](https://huggingface.co/{base})" if base else "a base model that is not on the Hub"
    what = "Adapters (LoRA) for" if adapters else "A model fine-tuned from"
    config = saved.config
    lines = [
        f"---\n{front}---",
        f"# {name}",
        f"{what} {of}, a speech model of Kyutai's Moshi family." + _memory(config),
        "## Use",
        "With `moshi_patch` (In-Place Test-Time Training for Moshi) installed, and this repository or a copy of it in "
        "place of `THIS`:",
        "```bash\n"
        "python -m moshi_patch moshi.server --hf-repo THIS\n"
        "python -m moshi_patch moshi.run_inference --hf-repo THIS --batch-size 1 in.wav out.wav\n"
        "```",
        "Everything else, the settings below included, comes from its `config.json`.",
        "## Settings",
        markdown(["setting", "value"], [[f"`{key}`", f"`{value!r}`"] for key, value in _settings(config).items()]),
        "## Training",
        _training(saved),
        "## Results",
        _results(results, config),
    ]
    return "\n\n".join(lines) + "\n"


def _memory(config: dict[str, Any]) -> str:
    if not config.get("ttt_enabled"):
        return ""
    return (
        " The down projections of some of its layers keep learning from the conversation while it runs, and forget at "
        "its end ([In-Place Test-Time Training](https://arxiv.org/abs/2604.06169))."
    )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    shown = ("dim", "num_layers", "context", "lora", "lora_rank", "lora_scaling")
    return {key: config[key] for key in (*shown, *sorted(config)) if key in config and (key in shown or "ttt_" in key)}


def _training(saved: SavedCheckpoint) -> str:
    """Without names of files and folders, which belong to the machine it was done on."""
    if saved.training is None:
        return "Not recorded."
    settings, versions = saved.train_args, saved.training.get("versions", {})
    batch = settings.batch_size * settings.num_microbatches * saved.training.get("world_size", 1)
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{saved.step} steps of {batch} segments of {settings.duration_sec} s, in {settings.param_dtype}; "
        f"learning rate {settings.optim.lr}. Made with {made}."
    )


def _results(results: Mapping | None, config: dict[str, Any]) -> str:
    """What was measured, of the standard evaluation and of the benchmarks; one after the other if it was both.

    Args:
        config: of the checkpoint; what the evaluation replaced of it is said.
    """
    standard, paper = ((results or {}).get(name) for name in ("standard", "paper"))
    parts = []
    if isinstance(standard, Mapping) and isinstance(standard.get("overall"), Mapping):
        parts.append(_losses(standard))
    if isinstance(paper, Mapping) and paper:
        heading, rows = table(paper)
        parts.append("Benchmarks. " + " ".join(notes(paper)) + "\n\n" + markdown(heading, rows))
    if parts and (replaced := _replaced(results, config)):
        parts.insert(0, replaced)
    return "\n\n".join(parts) or NOT_MEASURED


def _losses(standard: Mapping) -> str:
    """The losses of each condition, and their differences with 95 % intervals."""
    columns = [key for key in LOSSES if all(key in row for row in standard["overall"].values())]
    rows = [[name, *(_number(row[key]) for key in columns)] for name, row in standard["overall"].items()]
    for name, row in standard.get("differences", {}).items():
        rows.append([name, *(_interval(row[key]) if key in row else "" for key in columns)])
    number, minutes = standard.get("streams"), standard.get("seconds", math.nan) / 60
    head = f"{number} recording{'s' * (number != 1)}, {minutes:.1f} minutes; losses in nats per step"
    intervals = "; in brackets 95 % intervals over recordings" if "[" in "".join(map("".join, rows)) else ""
    return f"{head}{intervals}.\n\n" + markdown(["", *(key.replace("_", " ") for key in columns)], rows)


def _replaced(results: Mapping, config: dict[str, Any]) -> str:
    """Settings of TTT that the command line of the evaluation replaced."""
    rows = results.get("settings", {}).items()
    ttt = {key: row["value"] for key, row in rows if key.startswith("ttt.") and row["source"] == "command line"}
    other = [f"`{key}={value!r}`" for key, value in ttt.items() if config.get(key.replace(".", "_", 1)) != value]
    return f"Measured with {', '.join(other)} in place of the setting above." if other else ""


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "not finite"


def _interval(found: Any) -> str:
    if not isinstance(found, Mapping) or not isinstance(found.get("value"), (int, float)):
        return ""
    low, high = found.get("low"), found.get("high")
    return f"{found['value']:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if low is not None and high is not None else "")
