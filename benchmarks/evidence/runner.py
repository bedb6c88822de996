"""Runs what is missing of a grid, by priority, until the budget of time is spent."""

import functools
import logging
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure import machine

from .grid import Cell, Run, more_seeds, ordered_runs
from .model import Diverged, evaluate
from .settings import Settings
from .store import Store
from .stream import run_stream
from .training import trained

logger = logging.getLogger(__name__)


def measure(settings: Settings, cache: Path | None = None) -> dict[str, Any]:
    """Train and evaluate one run. The patch must be installed.

    Returns:
        `final`: per condition (`none`; or `on` and `off`, the same weights without updates) what `evaluate` returns;
        `training`: what `train` returns; `stream`, if the settings ask for one, per condition what `run_stream`
        returns.

    Raises:
        Diverged: when a loss is not finite.
    """
    model, training = trained(settings, cache)
    conditions = {"none": True} if settings.model == "none" else {"on": True, "off": False}
    result = {
        "final": {name: evaluate(model, settings, updates) for name, updates in conditions.items()},
        "training": training,
    }
    if settings.stream:
        result["stream"] = {name: run_stream(settings, updates, cache) for name, updates in conditions.items()}
    return result


def execute(run: Run, cache: Path | None = None) -> dict[str, Any]:
    """Executes one run and catches its failure; returns one line of the results.

    Returns:
        `id`, `cell`, `status` (`ok`, `diverged` or `error`), `settings`, what `measure` returns, `seconds` of all of
        it, `machine` with versions and date; with another status than `ok` a `message` instead of results.
    """
    clock = time.perf_counter()
    line: dict[str, Any] = {"id": run.settings.id, "cell": run.cell, "status": "ok", "settings": run.settings.as_dict()}
    try:
        line |= measure(run.settings, cache)
    except Diverged as error:
        logger.warning("cell %s, seed %d diverged: %s", run.cell, run.settings.seed, error)
        line |= {"status": "diverged", "message": str(error)}
    except Exception as error:  # whatever one run does, the others go on
        logger.error("cell %s, seed %d: %s", run.cell, run.settings.seed, traceback.format_exc())
        line |= {"status": "error", "message": f"{type(error).__name__}: {error}"}
    return line | {"seconds": round(time.perf_counter() - clock, 2), "machine": machine(torch.device("cpu"))}


def run_all(
    cells: list[Cell], store: Store, budget: float | None = None, cache: Path | None = None
) -> dict[str, list[Run]]:
    """Executes what `store` does not hold, until `budget` seconds are spent; None: the whole grid, once.

    A run is left out when what it is expected to take no longer fits. With a budget that outlasts the grid, every cell
    gets one further seed after the other.

    Returns:
        `executed` and `left_out`.
    """
    clock = time.perf_counter()
    executed: list[Run] = []
    left_out: list[Run] = []
    round_number = 0
    runs = ordered_runs(cells)
    while True:
        due = [run for run in runs if not store.is_done(run.settings.id)]
        before = len(executed)
        for run in tqdm(due, desc="runs" if not round_number else f"further seeds, round {round_number}"):
            left = float("inf") if budget is None else budget - (time.perf_counter() - clock)
            # What a run will take is only asked while something is left: asking takes part of a second.
            if left <= 0 or (budget and expected_seconds(run.settings, store.runs.values()) > left):
                if not round_number:
                    left_out.append(run)
                continue
            store.add(execute(run, cache))
            executed.append(run)
        if budget is None or left_out or (due and len(executed) == before):
            return {"executed": executed, "left_out": left_out}
        round_number += 1
        runs = more_seeds(cells, round_number)


def expected_seconds(settings: Settings, done: Iterable[dict[str, Any]]) -> float:
    """Estimates the seconds of a run: those of the same run with another seed, or a few steps counted up."""
    key = replace(settings, seed=0).as_dict()
    same = [run["seconds"] for run in done if run["settings"] | {"seed": 0} == key]
    if same:
        return max(same)
    return probed_seconds(replace(settings, seed=0))


@functools.cache
def probed_seconds(settings: Settings) -> float:
    """Estimates the seconds of a run from three training steps; a stream counts 3 ms per step and condition."""
    few = replace(settings.training(), steps=min(3, settings.steps), trained="full", base_steps=0)
    few = replace(few, measure_every=0, probe_every=0, stop_below=0.0)
    per_step = trained(few, None)[1]["seconds"] / max(1, few.steps)
    stream_steps = 2 * settings.stream_windows * settings.window if settings.stream else 0
    return 1.3 * per_step * (settings.steps + settings.base_steps) + 3e-3 * stream_steps + 2
