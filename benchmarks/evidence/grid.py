"""Reads a grid in YAML into runs, and puts them in the order in which they are run.

settings: {steps: 300}            # of every cell, where it says nothing else
cells:
  - name: headline                # the report asks for cells by name
    priority: 1                   # 1 runs first
    seeds: [0, 1, 2]
    settings: {task: recall}
    vary: {model: [none, ttt]}    # every combination of the values is a run per seed
  - name: two stages
    priority: 2
    seeds: [0]
    settings: {base_steps: 300, steps: 1200, targets_first: 300, then_rate: 0.25, ttt: {NAME: VALUE}}

A variant is a set of fields of `Settings`; `ttt` holds `ttt_*` arguments that have no field of their own there.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.common.errors import ConfigError, in_one_line

from .settings import Settings

FIELDS = tuple(field.name for field in dataclasses.fields(Settings) if field.name != "seed")


@dataclass(frozen=True)
class Run:
    """One run of a grid: the cell it belongs to, how early it is due, and its settings."""

    cell: str
    priority: int
    settings: Settings


@dataclass(frozen=True)
class Cell:
    """One entry of `cells`. See the module."""

    name: str
    priority: int
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    vary: dict[str, list]

    def runs(self, seed: int) -> list[Run]:
        """The runs of one seed.

        Raises:
            ValueError: naming the cell, for settings that do not go together.
        """
        found = []
        for values in itertools.product(*self.vary.values()):
            chosen = self.settings | dict(zip(self.vary, values, strict=True))
            try:
                found.append(Run(self.name, self.priority, Settings(**chosen, seed=seed)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"cell {self.name!r}: {error}") from error
        return found


def read_grid(path: Path) -> list[Cell]:
    """The cells of a grid.

    Raises:
        ConfigError: for what is no YAML, an unknown key at any depth, a missing one, a name used twice or a value of
            the wrong kind, naming the file, the cell and the key. Nothing has run then.
    """
    try:
        content = yaml.safe_load(path.read_text())
        _check_keys(content, {"settings", "cells"}, {"cells"}, "the grid")
        common = content.get("settings") or {}
        _check_keys(common, set(FIELDS), set(), "settings")
        if not isinstance(content["cells"], list):
            raise ValueError(f"cells: must be a list, not {content['cells']!r}.")
        cells = [_cell(entry, common, number) for number, entry in enumerate(content["cells"], 1)]
        names = [cell.name for cell in cells]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"cell {name!r}: the name is used {names.count(name)} times.")
        for cell in cells:
            cell.runs(cell.seeds[0])
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {in_one_line(error, 2000)}") from error
    return cells


def _check_keys(mapping: Any, allowed: set[str], required: set[str], place: str) -> None:
    if not isinstance(mapping, dict):
        raise ValueError(f"{place}: must be a mapping of {', '.join(sorted(allowed))}, not {mapping!r}.")
    for key in mapping:
        if key not in allowed:
            raise ValueError(f"{place}: unknown key {key!r}; allowed are {', '.join(sorted(allowed))}.")
    for key in sorted(required - set(mapping)):
        raise ValueError(f"{place}: {key!r} is missing.")


def _cell(entry: Any, common: dict[str, Any], number: int) -> Cell:
    place = f"cell {number}"
    _check_keys(entry, {"name", "priority", "seeds", "settings", "vary"}, {"name", "priority", "seeds"}, place)
    place = f"cell {entry['name']!r}"
    settings, vary = entry.get("settings") or {}, entry.get("vary") or {}
    _check_keys(settings, set(FIELDS), set(), f"{place}, settings")
    _check_keys(vary, set(FIELDS), set(), f"{place}, vary")
    for key, values in vary.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{place}, vary, {key}: must be a list of values, not {values!r}.")
    seeds = entry["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{place}, seeds: must be a list of whole numbers, not {seeds!r}.")
    if type(entry["priority"]) is not int:
        raise ValueError(f"{place}, priority: must be a whole number, not {entry['priority']!r}.")
    return Cell(entry["name"], entry["priority"], tuple(seeds), common | settings, vary)


def ordered_runs(cells: list[Cell]) -> list[Run]:
    """Every run once: by priority, then the first seed of all cells before the second of any.

    A run that two cells share belongs to the one that is due first.
    """
    due = [
        (cell.priority, place, number, run)
        for number, cell in enumerate(cells)
        for place, seed in enumerate(cell.seeds)
        for run in cell.runs(seed)
    ]
    due.sort(key=lambda entry: entry[:3])
    unique: dict[str, Run] = {}
    for *_, run in due:
        unique.setdefault(run.settings.id, run)
    return list(unique.values())


def more_seeds(cells: list[Cell], round_number: int) -> list[Run]:
    """One further seed of every cell, for a budget that outlasts the grid. Rounds are counted from 1."""
    return ordered_runs([dataclasses.replace(cell, seeds=(max(cell.seeds) + round_number,)) for cell in cells])
