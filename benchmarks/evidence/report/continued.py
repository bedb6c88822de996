"""The tables about trained models that are taught on, and about recall with audio in the way."""

from typing import Any

from ..results import Results
from .blocks import block, gap_table, table, three_marks

CONTINUED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("all weights, no TTT", "continued", {"model": "none", "trained": "full"}),
    ("all weights, no TTT, attention of equal memory", "continued equal bytes", {"model": "none"}),
    ("LoRA, no TTT", "continued", {"model": "none", "trained": "lora"}),
    ("all weights and TTT, η 1", "continued", {"model": "ttt", "trained": "full"}),
    ("all weights and TTT, η 0.1", "continued rate", {"rate": 0.1}),
    ("all weights and TTT, η 0.01", "continued rate", {"rate": 0.01}),
    ("all weights and TTT, η 0.001", "continued rate", {"rate": 0.001}),
    ("all weights and TTT, η 1, clip 1", "continued clip", {}),
    ("LoRA and TTT, η 1", "continued", {"model": "ttt", "trained": "lora"}),
    ("LoRA and TTT, η 0.01", "continued adapters", {}),
    ("quarter learning rates: all weights, no TTT", "continued gently", {"model": "none"}),
    ("quarter learning rates: and TTT, η 1", "continued gently", {"model": "ttt"}),
    ("quarter learning rates: and TTT, η 0.1", "continued gently, small rate", {}),
    ("1200 steps: all weights, no TTT", "continued longer without", {"model": "none"}),
    ("1200 steps: all weights, no TTT, attention of equal memory", "continued longer equal bytes", {"model": "none"}),
    ("1200 steps: all weights and TTT, η 1", "continued longer", {"rate": 1.0}),
    ("1200 steps: all weights and TTT, η 0.01", "continued longer", {"rate": 0.01}),
    ("1200 steps: LoRA and TTT, η 0.01", "continued adapters longer", {}),
)
"""Rows of the table below: name, cell, and which of its runs."""


@block
def continued(results: Results) -> str:
    """A trained stock model that is taught on."""
    find = results.find
    found = [("the stock model itself, not taught on", find("base"), "none")]
    for name, cell, chosen in CONTINUED:
        lines = find(cell, **chosen)
        found.append((name, lines, "on" if chosen.get("model", "ttt") == "ttt" else "none"))
        if cell in ("continued", "continued longer") and chosen.get("model") != "none":
            found.append(("the same weights, updates off", lines, "off"))
    rows = [three_marks(name, lines, condition, ("first", "within", "beyond")) for name, lines, condition in found]
    return table(["nats per token", "first pass", "within window", "beyond window", "seeds"], rows)


@block
def continued_gaps(results: Results) -> str:
    """The longest taught-on models by the length of the gap."""
    ttt = results.find("continued longer by gap")
    found = {"no TTT, attention of equal memory": (results.find("continued longer equal bytes"), "none")}
    return gap_table(found | {"TTT, η 0.01": (ttt, "on"), "the same weights, updates off": (ttt, "off")})


@block
def audio(results: Results) -> str:
    """Recall of the text row while an audio row says something random."""
    rows = []
    for model, condition, name in (
        ("none", "none", "no TTT"),
        ("ttt", "on", "TTT"),
        ("ttt", "off", "the same weights, updates off"),
    ):
        rows.append(
            three_marks(name, results.find("random audio", model=model), condition, ("first", "within", "beyond"))
        )
    return table(["nats per token", "first pass", "within window", "beyond window", "seeds"], rows)
