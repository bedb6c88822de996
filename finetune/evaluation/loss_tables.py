"""What the terminal shows of an evaluation: the settings in force, and the losses with their differences."""

from typing import Any

from ..common.tables import columns
from .settings_in_force import Settings


def settings_table(settings: Settings) -> str:
    """Key, value and source of all settings in force."""
    table = settings.table()
    rows = [[key, _text(row["value"]), row["source"]] for key, row in table.items()]
    return columns(["setting", "value", "from"], rows)


def standard_table(result: dict[str, Any]) -> str:
    """Losses in nats of all of it, by codebook and by minutes, with differences and their 95 % intervals."""
    names = ["loss", "text_loss", "audio_loss", "perplexity", "text_perplexity", "audio_perplexity"]
    overall = [["nats per step", *(name.replace("_", " ") for name in names)]]
    overall += [[name, *(_number(row[key]) for key in names)] for name, row in result["overall"].items()]
    for name, row in result["differences"].items():
        overall.append([name, *(_interval(row[key]) for key in names[:3]), "", "", ""])
    codebooks = len(next(iter(result["overall"].values()))["per_codebook"]) - 1
    rows = [["by codebook", "text", *map(str, range(1, codebooks + 1))]]
    rows += [[name, *map(_number, row["per_codebook"])] for name, row in result["overall"].items()]
    stretches = result["by_position"]
    position = [["loss by minutes", *(stretch["minutes"] for stretch in stretches)]]
    position.append(["streams", *(str(stretch["streams"]) for stretch in stretches)])
    for name in result["overall"]:
        position.append([name, *(_number(stretch["conditions"][name]["loss"]) for stretch in stretches)])
    for name in result["differences"]:
        position.append([name, *(_interval(stretch["differences"][name]["loss"]) for stretch in stretches)])
    head = f"{result['streams']} stream{'s' * (result['streams'] != 1)}, {result['seconds'] / 60:.1f} minutes"
    if result["skipped"]:
        head += f"; {len(result['skipped'])} skipped"
    if result["streams"] == 1:
        head += "; one stream has no interval"
    return "\n\n".join([head, *(columns(table[0], table[1:]) for table in (overall, rows, position))])


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _interval(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['value']:+.4f}"
    return f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
