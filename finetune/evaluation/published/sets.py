"""Reads which audio files are to be compared: the data sets' own published layouts, and a plain list of pairs."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common.errors import ConfigError
from ...common.files import parse_json

FOLDERS_OF_PAIRS = {"swuggy": "lexical", "sblimp": "syntactic", "sstorycloze": "sSC", "tstorycloze": "tSC"}
"""Data sets of pairs, and the folder in which each is published."""

AUDIO = (".wav", ".flac", ".ogg", ".mp3")
"""Names of audio files, in this order of preference where a list names them without."""

STORY = re.compile(r"(?P<number>\d+_)?(?P<story>.+)_(?P<side>correct|incorrect)")
"""Of a StoryCloze file's name: the archives number the files, so that the two of a story have different numbers."""

BANDS = ((1, "oov"), (5, "1-4"), (20, "5-19"), (100, "20-99"))
"""Of sWUGGY: frequency of the word in LibriSpeech, below the number; in the edges of the ZeroSpeech 2021 evaluation."""


@dataclass(frozen=True)
class Pair:
    """Two audio files, of which a model should find `correct` likelier.

    Args:
        id: unique in its set.
        item: what is said. Pairs that say the same in other voices share it and count together as one.
        groups: breakdowns that the pair belongs to, such as `{"type": "binding", "subtype": "principle_A"}`.
    """

    id: str
    item: str
    correct: Path
    incorrect: Path
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSet:
    """What was found of a data set: `pairs` in the order of their list, and what of it cannot be used, and why."""

    pairs: list[Pair]
    problems: list[str]


def load_pairs(name: str, path: str | Path, split: str = "dev") -> PairSet:
    """Reads a set from a list (`.jsonl`) or from a folder in its published layout, which is found out by its files.

    Args:
        name: key of `FOLDERS_OF_PAIRS`; only says where to look below the folder of a whole data set.
        split: of ZeroSpeech 2021, `dev` or `test`; for the same.

    Raises:
        ConfigError: when nothing is there that is understood, a list is not readable, or no pair is left.
    """
    key, path = f"paper.{name}={str(path)!r}", Path(path)
    if path.is_file():
        found = _from_list(path, key)
    else:
        below = (path, path / split, path / FOLDERS_OF_PAIRS[name], path / FOLDERS_OF_PAIRS[name] / split)
        gold = next((folder / "gold.csv" for folder in below if (folder / "gold.csv").is_file()), None)
        stories = next((folder for folder in below if any(_stories(folder))), None)
        if gold is None and stories is None:
            raise ConfigError(
                f"{key}: must be a .jsonl list of pairs, or a folder with a gold.csv (in it, or in "
                f"{FOLDERS_OF_PAIRS[name]}/{split} below it) or with ..._correct.wav and ..._incorrect.wav files."
            )
        found = _from_stories(stories, key) if gold is None else _from_gold(gold, key)
    if not found.pairs:
        raise ConfigError(f"{key}: not one pair in it. {' '.join(found.problems[:3])}".rstrip())
    return found


def load_files(path: str | Path) -> list[Path]:
    """The audio files of a long-form set: a `.jsonl` list of `{"path": ...}`, or all files below a folder, sorted.

    Libri-Light's `SPEAKER/BOOK/FILE.flac` is such a folder. A path in a list is relative to the folder of the list.

    Raises:
        ConfigError: when there is none, or a line is not understood.
    """
    key, path = f"paper.longform={str(path)!r}", Path(path)
    if path.is_file():
        files = []
        for number, line in _lines(path, key):
            content, problem = _read_line(line, ("path",))
            if problem:
                raise ConfigError(f"{key}, line {number}: {problem}")
            files.append(path.parent / content["path"])
    else:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO)
    if not files:
        raise ConfigError(f"{key}: no audio files; must be a folder of them, or a .jsonl list of paths.")
    return files


def _from_list(path: Path, key: str) -> PairSet:
    """`{"id": ..., "correct": "a.wav", "incorrect": "b.wav", "group": "optional", "item": "optional"}` per line."""
    pairs, problems, seen = [], [], {}
    for number, line in _lines(path, key):
        content, problem = _read_line(line, ("id", "correct", "incorrect"), ("group", "item"))
        if not problem and content["id"] in seen:
            problem = f"id={content['id']!r}: stands in line {seen[content['id']]} too."
        if problem:
            problems.append(f"{path}:{number}: {problem}")
            continue
        seen[content["id"]] = number
        groups = {"group": content["group"]} if "group" in content else {}
        sides = (path.parent / content[side] for side in ("correct", "incorrect"))
        pairs.append(Pair(content["id"], content.get("item", content["id"]), *sides, groups))
    return PairSet(pairs, problems)


def _from_gold(path: Path, key: str) -> PairSet:
    """ZeroSpeech 2021: a row per file; the two of a pair share `id`, `voice` and, where there are any, the types."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{key}: {path}: not a table of comma-separated values ({error}).") from error
    missing = {"id", "filename", "voice", "correct"} - set(rows[0] if rows else ())
    if missing:
        raise ConfigError(f"{key}: {path}: no columns {', '.join(sorted(missing))}.")
    sides: dict[tuple[str, ...], dict[str, list[tuple[int, dict]]]] = defaultdict(lambda: {"1": [], "0": []})
    problems = []
    for number, row in enumerate(rows, start=2):
        if row["correct"] not in ("0", "1") or not row["filename"] or not row["id"]:
            problems.append(f"{path}:{number}: needs an id, a filename, and 0 or 1 as correct: {dict(row)}")
            continue
        said = tuple(row[name] for name in ("type", "subtype", "id") if row.get(name))
        sides[(*said, row["voice"] or "")][row["correct"]].append((number, row))
    pairs = []
    for (*said, voice), both in sides.items():
        if len(both["1"]) != len(both["0"]):
            numbers = ", ".join(str(number) for number, _ in both["1"] + both["0"])
            problems.append(f"{path}: lines {numbers}: not as many correct as incorrect files of one id and voice")
            continue
        # As in the benchmark's own evaluation, several pairs of one id and voice are matched by their order.
        for index, ((_, good), (_, bad)) in enumerate(zip(both["1"], both["0"], strict=True)):
            name = "/".join([*said, voice, *([str(index)] if index else [])])
            files = (_audio_file(path.parent, row["filename"]) for row in (good, bad))
            pairs.append(Pair(name, "/".join(said), *files, _groups(good)))
    return PairSet(pairs, problems)


def _groups(row: dict[str, Any]) -> dict[str, str]:
    """Breakdowns of a row of gold.csv: sBLIMP's types, or whether sWUGGY's word is in LibriSpeech and how often."""
    groups = {name: row[name] for name in ("type", "subtype") if row.get(name)}
    if "frequency" in row:
        try:
            frequency = float(row["frequency"] or 0)
        except ValueError:  # written as "oov"
            frequency = 0.0
        band = next((name for edge, name in BANDS if frequency < edge), "100+")
        groups |= {"vocabulary": "oov" if band == "oov" else "in vocabulary", "frequency": band}
    if row.get("length"):
        groups["phones"] = row["length"]
    return groups


def _audio_file(folder: Path, name: str) -> Path:
    """The file of a name that is published without its ending."""
    if Path(name).suffix.lower() in AUDIO:
        return folder / name
    return next((file for end in AUDIO if (file := folder / f"{name}{end}").is_file()), folder / f"{name}.wav")


def _stories(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return iter(())
    files = (file for file in folder.iterdir() if file.suffix.lower() in AUDIO)
    return (file for file in files if STORY.fullmatch(file.stem))


def _from_stories(folder: Path, key: str) -> PairSet:
    """Spoken StoryCloze: `STORY_correct.wav` and `STORY_incorrect.wav`, perhaps with a number before it."""
    sides: dict[str, dict[str, list[Path]]] = defaultdict(lambda: {"correct": [], "incorrect": []})
    for whole in (True, False):  # numbers are a part of the name if the names pair up with them
        sides.clear()
        for file in sorted(_stories(folder)):
            match = STORY.fullmatch(file.stem)
            story = match["story"] if not whole else (match["number"] or "") + match["story"]
            sides[story][match["side"]].append(file)
        if all(len(both["correct"]) == len(both["incorrect"]) == 1 for both in sides.values()):
            break
    pairs, problems = [], []
    for story, both in sides.items():
        if len(both["correct"]) == len(both["incorrect"]) == 1:
            pairs.append(Pair(story, story, both["correct"][0], both["incorrect"][0]))
        else:
            names = ", ".join(file.name for file in both["correct"] + both["incorrect"])
            problems.append(f"{folder}: {names}: must be one correct and one incorrect file of a story")
    return PairSet(pairs, problems)


def _lines(path: Path, key: str) -> Iterable[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: not a .jsonl list in UTF-8 ({error}).") from error
    return [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _read_line(line: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> tuple[dict[str, str], str]:
    """The texts of a line by name, and what is wrong with it, or nothing. Ids may be numbers."""
    try:
        content = parse_json(line)
    except ValueError as error:
        return {}, f"not valid JSON ({error})"
    if not isinstance(content, dict):
        return {}, f"must be an object with {', '.join(needed)}"
    texts = {}
    for name in (*needed, *optional):
        value = content.get(name)
        if name in ("id", "item", "group") and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is None and name in optional:
            continue
        if not isinstance(value, str) or not value:
            return {}, f"{name}={value!r}: must be text that is not empty"
        texts[name] = value
    return texts, ""
