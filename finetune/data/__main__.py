"""Checks a dataset before training: `python -m finetune.data check FILE.jsonl [--json]`.

Exits with 1 if anything was found, with 2 if a list cannot be read.
"""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import sphn
from tqdm import tqdm

from .interleave import MAIN_SPEAKER
from .manifest import Alignment, Entry, Problem, parse_sources, read_entries, read_transcript, transcript_path

DURATION_TOLERANCE = 0.08
"""Seconds by which a list's duration may differ from the file's: one step."""


@dataclass
class Report:
    """What a check found. `words` are those of all speakers, `main_words` those that Moshi learns to say."""

    problems: list[Problem] = dataclasses.field(default_factory=list)
    lines: int = 0
    hours: float = 0.0
    words: int = 0
    main_words: int = 0

    def summary(self) -> str:
        return (
            f"{self.lines} lines, {self.hours:.3f} hours of audio, {self.words} words, "
            f"{self.main_words} of them by {MAIN_SPEAKER}; {len(self.problems)} problems."
        )

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        return json.dumps(content | {"ok": not self.problems}, default=str, indent=2)


def check(files: list[Path]) -> Report:
    """Looks at every line of the lists, and at the audio and the alignments that it names."""
    report = Report()
    for file in files:
        entries, problems = read_entries(file)
        report.lines += len(entries) + len(problems)
        for entry in tqdm(entries, desc=file.name, unit="file", disable=None):
            problems += [Problem(file, entry.line, message) for message in _check_entry(entry, report)]
        report.problems += sorted(problems, key=lambda problem: problem.line)
    return report


def _check_entry(entry: Entry, report: Report) -> list[str]:
    """Messages about one line; adds its audio and its words to `report`."""
    messages, duration = _check_audio(entry)
    report.hours += (duration or 0.0) / 3600
    path = transcript_path(entry.path)
    try:
        alignments = read_transcript(path).alignments
    except FileNotFoundError:
        return [*messages, f"{path}: no such file (alignments)"]
    except (OSError, ValueError) as error:
        return [*messages, f"{path}: malformed alignments: {error}"]
    report.words += len(alignments)
    report.main_words += sum(speaker == MAIN_SPEAKER for _, _, speaker in alignments)
    return messages + [f"{path}: {message}" for message in _check_alignments(alignments, duration)]


def _check_audio(entry: Entry) -> tuple[list[str], float | None]:
    """Messages about the audio file, and its duration in seconds if it can be read."""
    if not entry.path.is_file():
        return [f"{entry.path}: no such file (audio)"], None
    try:
        reader = sphn.FileReader(str(entry.path))
        channels, duration = reader.channels, reader.duration_sec
    except (OSError, ValueError) as error:
        return [f"{entry.path}: cannot be read as audio: {error}"], None
    messages = []
    if channels != 2:
        kind = "mono" if channels == 1 else f"{channels} channels"
        messages.append(f"{entry.path}: {kind}; must be stereo, Moshi left and the user right")
    if abs(duration - entry.duration) > DURATION_TOLERANCE:
        messages.append(f"{entry.path}: duration={entry.duration:g}: the file has {duration:.3f} seconds")
    return messages, duration


def _check_alignments(alignments: list[Alignment], duration: float | None) -> list[str]:
    """Messages about words that no segment will hold as they were meant; one of each kind, the first."""
    messages = []
    times = [time for _, time, _ in alignments]
    backwards = [i for i, (start, end) in enumerate(times) if end < start or start < 0]
    late = [i for i, (start, _) in enumerate(times) if duration is not None and start > duration]
    unsorted = [i for i, (one, two) in enumerate(pairwise(times), start=1) if two[0] < one[0]]
    for found, what in (
        (backwards, "malformed alignment: ends before it starts, or starts before 0"),
        (late, "starts after the end of the audio"),
        (unsorted, "unsorted: starts before the one before it"),
    ):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            messages.append(f"alignments[{found[0]}]={list(alignments[found[0]])!r} {what}{more}")
    if alignments and not any(speaker == MAIN_SPEAKER for _, _, speaker in alignments):
        messages.append(f"no word by {MAIN_SPEAKER}: Moshi would learn to say nothing")
    return messages


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune.data", description="Tools for datasets.")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="report everything that training would stumble over")
    checking.add_argument("data", nargs="+", metavar="FILE.jsonl", help="lists, or folders of lists")
    checking.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    try:
        files = [file for spec in args.data for source in parse_sources(spec) for file in source.files]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    report = check(files)
    lines = [report.to_json()] if args.json else [*map(str, report.problems), report.summary()]
    print("\n".join(lines))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
