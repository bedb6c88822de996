"""The tables of docs/evidence_hour.md and their figure, from `benchmarks/results/hour.json`."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.pages import fill

from ..dialogue import VALUES
from ..results import mean, plain
from ..settings import Settings
from .blocks import made_with, table

ROOT = Path(__file__).parents[3]
DATA = ROOT / "benchmarks" / "results" / "hour.json"
FIGURE = DATA.with_suffix(".png")
PAGE = ROOT / "docs" / "evidence_hour.md"
COLOURS = ("#2b6cb0", "#90cdf4", "#c05621", "#f6ad55", "#718096", "#2f855a")

Run = dict[str, Any]


def arms(data: dict[str, Any]) -> dict[str, list[Run]]:
    """The runs that went through, by the name of their arm, all seeds."""
    found: dict[str, list[Run]] = {}
    for run in data["runs"]:
        found.setdefault(run["arm"], []).extend([] if "diverged" in run else [run])
    return found


def ages(data: dict[str, Any]) -> list[int]:
    """Minutes after which something was asked."""
    return sorted({q["age"] for run in data["runs"] for q in run.get("questions", ())})


def recalled(run: Run, age: int, kind: str) -> float:
    """Mean `nats` or `hits` of the questions of that age."""
    return mean([q[kind] for q in run["questions"] if q["age"] == age])


def recall(data: dict[str, Any]) -> str:
    """Nats and hits by age."""
    rows = []
    for name, runs in arms(data).items():
        short = [run["held_out"]["beyond"]["nats"] for run in runs]
        row = [name, plain(short)]
        for age in ages(data):
            nats, hits = ([recalled(run, age, kind) for run in runs] for kind in ("nats", "hits"))
            row.append(f"{plain(nats)}, {plain([100 * h for h in hits], 0)} %" if runs else "diverged")
        rows.append([*row, len(runs)])
    heading = ["nats and share right of answers", "short dialogue", *(f"after {age} min" for age in ages(data))]
    return table([*heading, "seeds"], rows)


PARTS_OF_THE_HOUR = {"start": slice(1, 11), "middle": slice(24, 35), "end": slice(-10, None)}
"""The minutes 2 to 11, 25 to 35 and the last ten; the first one holds the start of the process."""


def part_of_the_hour(values: list[Any], part: str) -> float:
    """The median over minutes; of several layers their mean."""
    return median(mean(value) if isinstance(value, list) else value for value in values[PARTS_OF_THE_HOUR[part]])


def by_minute(run: Run, kind: str) -> list[Any]:
    """What was measured every minute; nothing where a minute had nothing to measure."""
    values = run["by_minute"][kind]
    return [] if None in values else values


FLAT = {"cpu_ms": ("ms of processor time a step", 2), "rss_mib": ("memory of the process, MiB", 1)} | {
    "relative_delta": ("delta / W_down", 2),
    "chat": ("nats, user's words", 2),
    "entropy": ("entropy of own samples", 2),
}


def flat(data: dict[str, Any]) -> str:
    """What was measured every minute, at the start, in the middle and at the end of the hour."""
    rows = []
    for name, runs in arms(data).items():
        row = [name]
        for kind, (_, digits) in FLAT.items():
            series = [values for run in runs if (values := by_minute(run, kind))]
            found = [mean([part_of_the_hour(one, part) for one in series]) for part in PARTS_OF_THE_HOUR if series]
            row.append(" → ".join(f"{value:.{digits}f}" for value in found) or "–")
        rows.append(row)
    return table(["minutes 2 to 11 → 25 to 35 → last ten", *(name for name, _ in FLAT.values())], rows)


def boundary(data: dict[str, Any]) -> str:
    """Facts whose value began a chunk, beside all others."""
    rows = []
    for name, runs in arms(data).items():
        questions = [question for run in runs for question in run["questions"]]
        first = [100 * q["hits"] for q in questions if q["told"] % Settings().chunk == 0]
        others = {age: [q for q in questions if q["age"] == age and q["told"] % Settings().chunk] for age in ages(data)}
        row = [name, f"{mean(first):.0f} ({len(first)})" if first else "–"]
        rows.append(row + [f"{mean([100 * q['hits'] for q in found]):.0f} ({len(found)})" for found in others.values()])
    heading = ["% right (questions)", "value begins a chunk, any age", *(f"others, {age} min" for age in ages(data))]
    return table(heading, rows)


def measured(data: dict[str, Any]) -> str:
    """Where and how the numbers were made."""
    questions = {age: sum(q["age"] == age for q in data["runs"][0]["questions"]) for age in ages(data)}
    counts = ", ".join(f"{count} of {age} min" for age, count in questions.items())
    return f"{made_with(data)} Questions by age, each in 16 rows: {counts}."


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "hour_recall": recall,
    "hour_flat": flat,
    "hour_boundary": boundary,
    "hour_measured": measured,
}


def filled(page: str) -> str:
    """The page with its tables made anew from the committed results."""
    data = json.loads(DATA.read_text())
    return fill(page, {name: lambda part=part: part(data) for name, part in PARTS.items()})


def draw(data: dict[str, Any]) -> plt.Figure:
    """Recall by age, and what was measured every minute."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.4), layout="constrained")
    panels = {"nats": axes[0, 0], "hits": axes[0, 1], "relative_delta": axes[0, 2]}
    panels |= {"cpu_ms": axes[1, 0], "rss_mib": axes[1, 1], "chat": axes[1, 2]}
    for colour, (name, runs) in zip(itertools.cycle(COLOURS), arms(data).items(), strict=False):
        for kind in ("nats", "hits") if runs else ():
            points = [mean([recalled(run, age, kind) for run in runs]) for age in ages(data)]
            panels[kind].plot(ages(data), points, "o-", color=colour, label=name)
        for kind in ("relative_delta", "cpu_ms", "rss_mib", "chat"):
            series = [values for run in runs if (values := by_minute(run, kind))]
            curve = [mean([mean(v) if isinstance(v, list) else v for v in at]) for at in zip(*series, strict=True)]
            panels[kind].plot(range(1, len(curve) + 1), curve, color=colour, linewidth=1.2)
    chance = {"nats": math.log(VALUES), "hits": 1 / VALUES}
    titles = {"nats": "nats of an answer", "hits": "share of answers right", "relative_delta": "delta / W_down"}
    titles |= {"cpu_ms": "ms of processor time a step", "rss_mib": "memory of the process, MiB"}
    for kind, panel in panels.items():
        panel.set_title(titles.get(kind, "nats of the user's words"), fontsize="medium")
        panel.set_xlabel("age of the fact, minutes" if kind in chance else "minute of the hour")
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=0)
        if kind in chance:
            panel.axhline(chance[kind], color="grey", linewidth=1, linestyle=":", label="chance")
            panel.set_xscale("log")
            panel.set_xticks(ages(data), [str(age) for age in ages(data)])
            panel.minorticks_off()
    panels["relative_delta"].set_yscale("symlog", linthresh=1)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    return figure


def report() -> None:
    """Fills docs/evidence_hour.md and draws the figure."""
    PAGE.write_text(filled(PAGE.read_text()))
    draw(json.loads(DATA.read_text())).savefig(FIGURE, dpi=110)
