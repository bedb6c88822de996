"""The tables and the figure about the two updates: what was to be reached, the harm, and every form that was tried."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..results import Line, Results, mean, nats, plain, values
from ..settings import RESIDUAL, Settings
from .blocks import block, table
from .streams import HEARD

TAUGHT_ON = {"base_steps": 300, "steps": 1200}
FIRST = TAUGHT_ON | {"targets_first": 300}
QUARTER, TRAINER = FIRST | {"then_rate": 0.25}, FIRST | {"stock_rate": 0.25}
"""Afterwards everything at a quarter of its rate; or, as `ttt.stock_lr`, the stock weights alone."""
ROWS = {"units": 4}
ROWS_LATE = ROWS | {"units_from": 600}
LONGER = TRAINER | ROWS | {"steps": 3600, "units_from": 1800}


@dataclass(frozen=True)
class Model:
    """A model of the tables: its name there, and the settings that train it."""

    name: str
    settings: dict[str, Any]

    def final(self, results: Results) -> list[Line]:
        """Its runs, whatever they did after the training."""
        asked = ({"sweep": True, "stream": "fresh"}, {"stream": "fresh"}, {"sweep": True}, {})
        return self._first(results, asked)

    def stream(self, results: Results, heard: str) -> list[Line]:
        """Its runs that streamed without decay."""
        asked = ({"sweep": True, "stream": heard}, {"stream": heard}, {"stream": heard, "stream_decay": 1.0})
        return self._first(results, asked)

    def _first(self, results: Results, asked: tuple[dict[str, Any], ...]) -> list[Line]:
        found = [results.same(Settings(**self.settings | after)) for after in asked]
        return max(found, key=len)  # the first of those with most seeds

    @property
    def condition(self) -> str:
        return "none" if self.settings.get("model") == "none" else "on"


def streamed(model: Model, results: Results, heard: str, read: Callable[[list[Line]], float], condition: str = ""):
    """What `read` makes of the points of each seed's stream."""
    lines = model.stream(results, heard)
    return values(lines, lambda line: read(line["stream"][condition or model.condition]))


def first_unit(points: list[Line]) -> float:
    return points[0]["beyond"]


def last_unit(points: list[Line]) -> float:
    return points[-1]["beyond"]


def drift(points: list[Line]) -> float:
    """How much more is lost in the last unit than in the first."""
    return points[-1]["beyond"] - points[0]["beyond"]


def new_text(points: list[Line]) -> float:
    """The first pass of the last unit: nobody can know it, so chance is the best."""
    return points[-1]["first"]


def lowest_entropy(points: list[Line]) -> float:
    return min(point["entropy"] for point in points)


SCRATCH = (
    Model("from scratch: the paper's, η 1", {}),
    *(
        Model(f"from scratch: residual, g {g:g}, η {rate:g}", {"rate": rate, "ttt": residual})
        for rate in (0.1, 1.0)
        for g, residual in (
            (16, {"update": "residual", "target_gain": 16.0}),
            (4, {"update": "residual", "target_gain": 4.0}),
            (1, {"update": "residual"}),
        )
    ),
    Model("from scratch, rows of four: the paper's, η 1", ROWS),
    Model("from scratch, rows of four: the paper's, η 0.1", ROWS | {"rate": 0.1}),
    Model("from scratch, rows of four: residual, g 16, η 0.1", ROWS | RESIDUAL),
)
CONTINUED = (
    Model("the stock model itself", {"base_steps": 300, "steps": 0, "model": "none"}),
    Model("full rates: no TTT", TAUGHT_ON | {"model": "none"}),
    Model("full rates: the paper's, η 1", TAUGHT_ON),
    Model("full rates: the paper's, η 0.01", TAUGHT_ON | {"rate": 0.01}),
    Model("gently: no TTT", QUARTER | {"model": "none"}),
    Model("gently: the paper's, η 0.1", TRAINER | {"rate": 0.1}),
    Model("gently: the paper's, η 0.01", TRAINER | {"rate": 0.01}),
    Model("gently: residual", TRAINER | RESIDUAL),
    Model("gently, all at a quarter: the paper's, η 0.1", QUARTER | {"rate": 0.1}),
    Model("gently, all at a quarter: the paper's, η 1", QUARTER),
    Model("gently, all at a quarter: residual", QUARTER | RESIDUAL),
    Model(
        "gently, all at half, rows of four from step 600: residual", FIRST | {"then_rate": 0.5} | ROWS_LATE | RESIDUAL
    ),
    Model("gently, all at a quarter, rows of four: no TTT", QUARTER | ROWS | {"model": "none"}),
    Model("gently, all at a quarter, rows of four: residual", QUARTER | ROWS | RESIDUAL),
    Model("gently, then rows of four: the paper's, η 0.1", TRAINER | ROWS_LATE | {"rate": 0.1}),
    Model("gently, then rows of four: residual", TRAINER | ROWS_LATE | RESIDUAL),
    Model("gently, then rows of four, 3600 steps: no TTT", LONGER | {"model": "none"}),
    Model("gently, then rows of four, 3600 steps: residual", LONGER | RESIDUAL),
)
NO_TTT = CONTINUED[4]
"""The control of everything taught gently: with a quarter of the stock rate there is nothing else that could differ."""
CONTROLS = {NO_TTT.settings["steps"]: NO_TTT, LONGER["steps"]: CONTINUED[-2]}  # by training steps
FORMS = (
    Model("from scratch: residual, g 16, η 0.01", RESIDUAL | {"rate": 0.01}),
    Model("from scratch, the second half in rows of four: residual", RESIDUAL | ROWS | {"units_from": 150}),
    *(
        Model(f"from scratch: residual, {words}", RESIDUAL | {"form": form})
        for words, form in (
            ("read gate", {"gate": True}),
            ("write strength", {"strength": True}),
            ("unit-norm keys", {"unit_keys": True}),
            ("gain rises for 150 steps", {"ramp": 150}),
            ("delta at most 2 × W_down", {"full": 2.0}),
        )
    ),
)


def _streams(model: Model, results: Results) -> list[str]:
    """First and last unit of each stream, new text, and the lowest entropy."""
    row = []
    for heard in HEARD:
        ends = [plain(streamed(model, results, heard, read)) for read in (first_unit, last_unit)]
        row.append(" → ".join(ends) if ends[0] != "–" else "–")
    return [
        *row,
        plain(streamed(model, results, "fresh", new_text)),
        plain(streamed(model, results, "own", lowest_entropy)),
    ]


@block
def updates_tried(results: Results) -> str:
    """Every model of both updates, with all that was asked of it."""
    rows = []
    for model in (*SCRATCH, *CONTINUED, *FORMS):
        lines, condition = model.final(results), model.condition
        if not lines:
            continue
        numbers = [
            plain(values(lines, nats(condition, "within"))),
            plain(values(lines, nats(condition))),
            *(plain(values(lines, nats(condition, variation=f"gap {gap}"))) for gap in (4, 8, 16)),
        ]
        rows.append([model.name, *numbers, *_streams(model, results), str(len(lines))])
    header = ["nats", "within", "beyond", "gap 4", "gap 8", "gap 16"]
    header += [f"52 windows, {heard}" for heard in HEARD]
    return table([*header, "new text then", "lowest entropy", "seeds"], rows)


HARM = (
    "the stock model itself", "full rates: no TTT", "full rates: the paper's, η 1", "full rates: the paper's, η 0.01",
    "gently: no TTT", "gently: the paper's, η 0.1", "gently: the paper's, η 0.01", "gently: residual",
    "gently, then rows of four: the paper's, η 0.1", "gently, then rows of four: residual",
    "gently, then rows of four, 3600 steps: no TTT", "gently, then rows of four, 3600 steps: residual",
)  # fmt: skip


@block
def harm(results: Results) -> str:
    """Base, taught on without TTT, updates off and on, for both updates."""
    named = {model.name: model for model in CONTINUED}
    rows = []
    for name in HARM:
        model = named[name]
        conditions = ("none",) if model.condition == "none" else ("off", "on")
        for condition in conditions:
            lines = model.final(results)
            if not lines:
                continue
            numbers = [
                plain(values(lines, nats(condition, "within"))),
                plain(values(lines, nats(condition, "first"))),
                plain(streamed(model, results, "fresh", new_text, condition)),
                plain(streamed(model, results, "own", lowest_entropy, condition)),
                plain(values(lines, nats(condition))),
            ]
            suffix = "" if condition == "none" else f", updates {condition}"
            rows.append([name + suffix, *numbers, str(len(lines))])
    header = ["nats", "within the window", "new text", "new text after 52 windows", "entropy of own samples, lowest"]
    return table([*header, "beyond the window", "seeds"], rows)


REACHED = (
    ("the paper's update, from scratch", "from scratch: the paper's, η 1"),
    ("residual, from scratch", "from scratch: residual, g 16, η 0.1"),
    ("the paper's, taught on gently", "gently: the paper's, η 0.1"),
    ("residual, taught on gently", "gently: residual"),
    ("residual, taught on gently, then in rows of four", "gently, then rows of four: residual"),
    ("the same, three times the steps", "gently, then rows of four, 3600 steps: residual"),
)
"""Columns of the table below, and the model of each."""


@block
def reached(results: Results) -> str:
    """What was to be reached, as it was registered, and what came out."""
    models = [{model.name: model for model in (*SCRATCH, *CONTINUED)}[name] for _, name in REACHED]
    asked: list[tuple[str, str, Callable[[Model], list[float]]]] = [
        *(
            (f"a. {heard}: {words}", goal, lambda m, h=heard, r=read: streamed(m, results, h, r))
            for words, goal, read in (("last unit less the first", "≤ 0.1", drift), ("last unit", "≤ 1.0", last_unit))
            for heard in HEARD
        ),
        ("b. recall", "≤ 0.7", lambda m: values(m.final(results), nats("on"))),
        ("b. recall, gap 4 windows", "≤ 0.7", lambda m: values(m.final(results), nats("on", variation="gap 4"))),
        ("c. recall, gap 16 windows", "≤ 1.5", lambda m: values(m.final(results), nats("on", variation="gap 16"))),
        ("d. beyond the window", "≤ 0.4", lambda m: values(_taught(m, results), nats("on"))),
        ("e. within the window, more than without TTT", "≤ 0.1", lambda m: _more_within(m, results)),
        ("h. new text, more than without TTT", "≤ 0.2", lambda m: _more_new(m, results)),
        ("i. entropy of own samples, lowest", "≥ 3.0", lambda m: streamed(m, results, "own", lowest_entropy)),
    ]
    rows = [[name, goal, *(plain(read(model)) for model in models)] for name, goal, read in asked]
    rows.append(["seeds", "", *(str(len(model.final(results))) for model in models)])
    return table(["nats", "to reach", *(heading for heading, _ in REACHED)], rows)


def _taught(model: Model, results: Results) -> list[Line]:
    """The runs of a model that was taught on; none of one from scratch."""
    return model.final(results) if model.settings.get("base_steps") else []


def _control(model: Model) -> Model:
    return CONTROLS.get(model.settings.get("steps"), NO_TTT)


def _more_within(model: Model, results: Results) -> list[float]:
    """Seed by seed, how much more is lost within the window than by the model taught on without TTT."""
    stock = {line["settings"]["seed"]: nats("none", "within")(line) for line in _control(model).final(results)}
    lines = [line for line in _taught(model, results) if line["settings"]["seed"] in stock]
    return [nats("on", "within")(line) - stock[line["settings"]["seed"]] for line in lines]


def _more_new(model: Model, results: Results) -> list[float]:
    chance = streamed(_control(model), results, "fresh", new_text)
    return [found - mean(chance) for found in streamed(model, results, "fresh", new_text) if chance]


CURVES = {
    "from scratch: the paper's, η 1": ("#d95f02", ":"),
    "from scratch: residual, g 16, η 0.1": ("#1f77b4", ":"),
    "gently: the paper's, η 0.1": ("#d95f02", "--"),
    "gently: residual": ("#1f77b4", "--"),
    "gently, then rows of four: the paper's, η 0.1": ("#d95f02", "-"),
    "gently, then rows of four: residual": ("#1f77b4", "-"),
}
"""Models of the figure: colour by update, line by how it was taught."""


def draw_updates(results: Results) -> plt.Figure | None:
    """Long streams of both updates: what is still recalled, how sure new text is met, how varied own samples are."""
    named = {model.name: model for model in (*SCRATCH, *CONTINUED)}
    if not any(named[name].stream(results, "fresh") for name in CURVES):
        return None
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained", sharex=True)
    panels = [(f"recall; between the parts: {heard}", heard, "beyond") for heard in HEARD]
    panels.append(("its own samples: entropy", "own", "entropy"))
    for axis, (title, heard, key) in zip(axes, panels, strict=True):
        for name, (colour, style) in CURVES.items():
            lines = named[name].stream(results, heard)
            for number, line in enumerate(lines):
                points = line["stream"]["on"]
                x, y = [point["windows"] for point in points], [point[key] for point in points]
                axis.plot(x, y, style, color=colour, alpha=0.8, label=None if number else name)
        axis.axhline(math.log(Settings().card), color="black", linestyle=":", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("windows streamed")
        axis.set_ylim(0, 4.4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("nats")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
