"""Lists what was run: how many runs, on which machines, how long, and what is missing."""

from typing import Any

from ..results import Results
from .blocks import block


@block
def bookkeeping(results: Results) -> str:
    """How many runs, on which machines, how long; what diverged, failed or was left out."""
    lines = list(results.lines.values())
    if not lines:
        return "No run yet."
    machines: dict[str, Any] = {}
    for line in lines:
        used = line["machine"]
        text = f"{used['cpu']}, {used['cores']} cores, {used['threads']} thread(s), torch {used['torch']}, "
        text += f"moshi {used['moshi']}, {used['date']}"
        machines[text] = machines.get(text, 0) + 1
    told = [f"{len(lines)} runs, {sum(line['seconds'] for line in lines) / 60:.0f} minutes."]
    told += [f"{count} on {text}." for text, count in machines.items()]
    for line in results.not_ok():
        told.append(f"Cell `{line['cell']}`, seed {line['settings']['seed']}: {line['status']}, {line['message']}.")
    missing = results.missing()
    told.append(
        "Left out, runs of a cell: " + ", ".join(f"`{cell}` {count}" for cell, count in missing.items()) + "."
        if missing
        else "Every run of the grid is there."
    )
    return "\n".join(f"- {entry}" for entry in told)
