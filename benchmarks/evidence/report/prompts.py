"""The tables of docs/evidence_speech.md, from `benchmarks/results/prompts.json`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pages import fill

from ..results import plain
from .blocks import made_with, table

ROOT = Path(__file__).parents[3]
DATA = ROOT / "benchmarks" / "results" / "prompts.json"
PAGE = ROOT / "docs" / "evidence_speech.md"


def _by_model(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in data["lines"]:
        found.setdefault(line["model"], []).append(line)
    return found


def returned(data: dict[str, Any]) -> str:
    """A passage that returns, of voices that trained and of others."""
    rows = []
    for variation, name in (("", "new voices"), ("trained on", "training voices")):
        for model, lines in _by_model(data).items():
            marks = [plain([line["final"][variation][mark]["nats"] for line in lines]) for mark in ("first", "beyond")]
            hits = plain([100 * line["final"][variation]["beyond"]["hits"] for line in lines], 0)
            rows.append([name, model, *marks, hits, len(lines)])
    return table(["evaluated on", "model", "nats, first pass", "nats, returned", "right, returned, %", "seeds"], rows)


def new(data: dict[str, Any]) -> str:
    """Speech of a new voice in which nothing returns."""
    rows = []
    for model, lines in _by_model(data).items():
        early, late = ([line["new"][part] for line in lines] for part in ("early", "late"))
        gain = [b - a for a, b in zip(early, late, strict=True)]
        rows.append([model, plain(early), plain(late), plain(gain), len(lines)])
    return table(["model", "nats, first 2.5 s", "nats, after 10 s", "difference", "seeds"], rows)


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "prompts_returned": returned,
    "prompts_new": new,
    "prompts_measured": made_with,
}


def filled(page: str) -> str:
    """The page with its tables made anew from the committed results."""
    data = json.loads(DATA.read_text())
    return fill(page, {name: lambda part=part: part(data) for name, part in PARTS.items()})


def report() -> None:
    """Fills docs/evidence_speech.md."""
    PAGE.write_text(filled(PAGE.read_text()))
