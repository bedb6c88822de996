"""The model card of an exported checkpoint: what it is, how it is served, and what was measured of it."""

from collections.abc import Mapping
from typing import Any

import yaml

from ..checkpoint.saved import SavedCheckpoint
from ..common.tables import markdown
from ..evaluation.loss_tables import difference, head, number
from ..evaluation.old_results import with_todays_names
from ..evaluation.published.benchmark_tables import benchmark_verdict, notes, table
from ..evaluation.verdict import verdict

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
        "With `moshi_patch` (Test-Time Training for Moshi) installed, and this repository or a copy of it in "
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
    if config.get("ttt_kind") == "mlp":
        return (
            " In front of the MLP of some of its layers, a small MLP for each head keeps learning from the "
            "conversation while it runs, and forgets at its end ([TTT-MLP](https://arxiv.org/abs/2407.04620))."
        )
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
    results = with_todays_names(results or {})
    standard, paper = (results.get(name) for name in ("standard", "paper"))
    parts = []
    if isinstance(standard, Mapping) and isinstance(standard.get("overall"), Mapping):
        parts.append(_losses(standard))
    if isinstance(paper, Mapping) and paper:
        said = f"Benchmarks. {' '.join(benchmark_verdict(paper))}".rstrip()
        parts += [said, " ".join(notes(paper)), markdown(*table(paper))]
    if parts and (replaced := _replaced(results, config)):
        parts.insert(0, replaced)
    return "\n\n".join(parts) or NOT_MEASURED


def _losses(standard: Mapping[str, Any]) -> str:
    """Who won; then the losses of each condition, and their differences with 95 % intervals."""
    names = [key for key in LOSSES if all(key in row for row in standard["overall"].values())]
    rows = [[name, *(number(row[key]) for key in names)] for name, row in standard["overall"].items()]
    for name, row in standard.get("differences", {}).items():
        rows.append([name, *(difference(row[key]) if isinstance(row.get(key), Mapping) else "" for key in names)])
    said = " ".join([*verdict(standard), *standard.get("notes", [])])
    table_of_losses = markdown(["nats per step", *(key.replace("_", " ") for key in names)], rows)
    return "\n\n".join([said, " ".join(head(standard).splitlines()), table_of_losses])


def _replaced(results: Mapping, config: dict[str, Any]) -> str:
    """Settings of TTT that the command line of the evaluation replaced."""
    rows = results.get("settings", {}).items()
    ttt = {key: row["value"] for key, row in rows if key.startswith("ttt.") and row["source"] == "command line"}
    other = [f"`{key}={value!r}`" for key, value in ttt.items() if config.get(key.replace(".", "_", 1)) != value]
    return f"Measured with {', '.join(other)} in place of the setting above." if other else ""
