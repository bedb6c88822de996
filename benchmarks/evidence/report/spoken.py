"""The table about spoken words that return: what `make demo` measured, with three seeds."""

import json
from pathlib import Path

from ..results import Results, spread
from .blocks import block, table

DEMO = Path(__file__).parents[2] / "results" / "demo.json"
"""What `python -m example.demo --seeds 0 1 2` wrote."""

NAMES = {"control": "trained without TTT", "off": "with TTT, updates off", "on": "with TTT"}


@block
def spoken_words(results: Results) -> str:
    """Nats per word that Moshi says, the first time and again. Not from `results`: the demo runs the trainer itself."""
    runs = json.loads(DEMO.read_text())["runs"]
    rows = [
        [name, *(spread([run[when][condition] for run in runs]) for when in ("first", "again")), str(len(runs))]
        for condition, name in NAMES.items()
    ]
    return table(["nats per word", "said first", "said again", "seeds"], rows)
