"""`python -m finetune.data split SOURCE OUT`: lists to train on and to evaluate with, from a data set and its one list.

The layout is that of public data sets such as DailyTalkContiguous: a `.jsonl` list, and below its folder stereo WAV
files with their alignments beside them.

    SOURCE/dailytalk.jsonl          {"path": "data_stereo/0.wav", "duration": 31.4}
    SOURCE/data_stereo/0.wav        left Moshi, right the user
    SOURCE/data_stereo/0.json       {"alignments": [["word", [start_s, end_s], "SPEAKER_MAIN"], ...]}
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..common.disk import writing
from ..common.errors import ConfigError, shown
from ..common.files import whole_folder
from .broken import BrokenCount
from .check import check
from .manifest import Entry, read_entries

TRAIN, EVAL = "train.jsonl", "eval.jsonl"


@dataclass(frozen=True)
class Split:
    """What a data set was divided into.

    Attributes:
        train, held_out: the conversations of each list, in the order of the data set's.
        broken: a line for each that was left out: where it stands, and what is wrong with it.
        remarks: about the list as a whole.
    """

    train: list[Entry]
    held_out: list[Entry]
    broken: list[str]
    remarks: list[str]


def split(source: Path, out: Path, share: float, seed: int) -> Split:
    """Divides the conversations of a data set, and writes `OUT/train.jsonl` and `OUT/eval.jsonl`, both or none.

    A conversation is a file, and stands whole in one list. Which ones are held out depends on their paths and `seed`
    alone, not on the order of the list. Paths are relative to `out`, so that both folders can move together.

    Args:
        source: the data set's list, or the folder that holds it and no other list.
        out: the folder to make; must not exist.
        share: of the conversations that are held out; at least one is.

    Raises:
        ConfigError: when `out` exists, there is no such list, or there are fewer than two good conversations in it.
        BrokenData: when more than 5 % of its lines are broken: all that `check` calls a problem, paths that lead out of
            its folder, and files that are listed twice, also by a link.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"OUT={str(out)!r}: exists, and nothing is overwritten; choose another name.")
    manifest = find_list(source)
    good, broken, remarks = _good_entries(manifest)
    if len(good) < 2:
        raise ConfigError(f"SOURCE={str(source)!r}: {len(good)} good conversations; two lists need at least 2.")
    chosen = _held_out(good, share, seed)
    lists = {
        TRAIN: [entry for entry in good if entry not in chosen],
        EVAL: [entry for entry in good if entry in chosen],
    }
    with writing(out, "nothing is left of it."), whole_folder(out) as folder:
        for name, entries in lists.items():
            (folder / name).write_text("".join(_line(entry, out) for entry in entries), encoding="utf-8")
    return Split(lists[TRAIN], lists[EVAL], broken, remarks)


def find_list(source: Path) -> Path:
    """The list `source`, or the one list in the folder `source`.

    Raises:
        ConfigError: when there is none, or more than one.
    """
    if os.path.isfile(source):
        return source
    if not os.path.isdir(source):
        raise ConfigError(f"SOURCE={shown(str(source))}: no such file or folder.")
    found = sorted(path for path in source.iterdir() if path.suffix == ".jsonl")  # a glob finds no forbidden folder
    if len(found) != 1:
        named = ", ".join(path.name for path in found[:5])
        count = f"{len(found)} lists ({named})" if found else "no list"
        raise ConfigError(f"SOURCE={str(source)!r}: {count} in it; give the .jsonl of the data set.")
    return found[0]


def _good_entries(manifest: Path) -> tuple[list[Entry], list[str], list[str]]:
    """The entries that nothing is wrong with, a line for each other one, and remarks about the whole list."""
    report = check([manifest])
    entries, _ = read_entries(manifest)
    faults, seen = report.first_problems(), set()
    for entry in entries:
        inside, file = os.path.relpath(entry.path, manifest.parent), os.path.realpath(entry.path)
        if inside.split(os.sep)[0] == os.pardir or os.path.realpath(manifest.parent / inside) != file:
            faults.setdefault(entry.line, f"{entry.path}: leads out of the folder of {manifest.name}")
        elif file in seen:
            faults.setdefault(entry.line, f"{entry.path}: listed twice")
        seen.add(file)
    count = BrokenCount(
        str(manifest), "lines", report.lines, f"; see them all with `python -m finetune.data check {manifest}`"
    )
    for message in faults.values():
        count.add(message)
    count.refuse()
    broken = [f"{manifest}:{line}: {message}" for line, message in sorted(faults.items())]
    return [entry for entry in entries if entry.line not in faults], broken, report.remarks()


def _held_out(entries: list[Entry], share: float, seed: int) -> set[Entry]:
    """As many as `share` of them, at least one and not all, by lot."""
    number = min(max(1, round(share * len(entries))), len(entries) - 1)
    lots = {
        entry: hashlib.sha256(f"{seed} {os.path.relpath(entry.path, entry.file.parent)}".encode()).digest()
        for entry in entries
    }
    return set(sorted(entries, key=lots.__getitem__)[:number])


def _line(entry: Entry, out: Path) -> str:
    """The line of an entry in a list in `out`, as the disk sees it: a folder on the way may be a link."""
    home = os.path.relpath(os.path.realpath(entry.file.parent), Path(os.path.realpath(out.parent)) / out.name)
    path = os.path.join(home, os.path.relpath(entry.path, entry.file.parent))
    return json.dumps({"path": path, "duration": entry.duration}) + "\n"
