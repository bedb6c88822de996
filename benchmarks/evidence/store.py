"""Stores one JSON line per run as soon as the run is over, so that a stopped suite goes on where it was."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from finetune.common.files import parse_object, write_whole

logger = logging.getLogger(__name__)

DONE = ("ok", "diverged")
"""A run with one of these is not repeated; one that ended in an error is."""


class Store:
    """The runs in a JSONL file; the last line of an id counts.

    A line that is no JSON (a file cut while it was written) is named in a warning and kept aside, in a file of the same
    name with `.broken` added; its run is repeated.

    Args:
        path: of the file, which need not exist.
        fresh: keep the old file aside as `.old` and begin anew.
    """

    def __init__(self, path: Path, fresh: bool = False):
        self.path = path
        self.runs: dict[str, dict[str, Any]] = {}
        if fresh and path.exists():
            path.replace(path.with_name(path.name + ".old"))
        if path.exists():
            self._read()

    def _read(self) -> None:
        good, broken = [], []
        text = self.path.read_text(errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            run = parse_object(line)
            if run is not None and "id" in run:
                self.runs[run["id"]] = run
                good.append(line)
            else:
                broken.append(line)
                logger.warning("%s, line %d: no complete run; kept aside, its run is repeated", self.path, number)
        if broken:
            with self.path.with_name(self.path.name + ".broken").open("a") as aside:
                aside.writelines(line + "\n" for line in broken)
        if broken or (text and not text.endswith("\n")):
            write_whole(self.path, "".join(line + "\n" for line in good))

    def is_done(self, run_id: str) -> bool:
        """Whether the run needs no repetition."""
        return run_id in self.runs and self.runs[run_id]["status"] in DONE

    def add(self, run: dict[str, Any]) -> None:
        """Append one run, safe on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.runs[run["id"]] = run
