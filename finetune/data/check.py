"""Checks a dataset before training: `python -m finetune.data check FILE.jsonl [--json]`.

Exits with 1 if a problem was found, with 2 if a list cannot be read. Notes do not count: what they name is left out of
training as it is meant to be.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..common.files import is_file
from .audio import AudioFile
from .interleave import MAIN_SPEAKER
from .manifest import Alignment, Entry, Problem, read_entries, scan_transcript, transcript_path

DURATION_TOLERANCE = 0.08
"""Seconds by which a list's duration may differ from the file's: one step."""


@dataclass
class Report:
    """What a check found. `words` are those of all speakers, `main_words` those that Moshi learns to say.

    Notes name words without a duration, which training drops; they are in no count of words.
    """

    problems: list[Problem] = dataclasses.field(default_factory=list)
    notes: list[Problem] = dataclasses.field(default_factory=list)
    lines: int = 0
    hours: float = 0.0
    words: int = 0
    main_words: int = 0

    def summary(self) -> str:
        return (
            f"{self.lines} lines, {self.hours:.3f} hours of audio, {self.words} words, "
            f"{self.main_words} of them by {MAIN_SPEAKER}; {len(self.problems)} problems, {len(self.notes)} notes."
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
        if not entries and not problems:
            problems.append(Problem(file, 1, 'an empty list; must hold lines {"path": ..., "duration": seconds}'))
        for entry in tqdm(entries, desc=file.name, unit="file", disable=None):
            problems += [Problem(file, entry.line, message) for message in _check_entry(entry, report)]
        report.problems += sorted(problems, key=lambda problem: problem.line)
    return report


def _check_entry(entry: Entry, report: Report) -> list[str]:
    """Messages about one line; adds its audio, its words and its notes to `report`."""
    messages, duration = _check_audio(entry)
    report.hours += (duration or 0.0) / 3600
    path = transcript_path(entry.path)
    try:
        alignments, malformed, _ = scan_transcript(path)
    except FileNotFoundError:
        return [*messages, f"{path}: no such file (alignments)"]
    except (OSError, ValueError) as error:
        return [*messages, f"{path}: malformed alignments: {error}"]
    dropped = {index: word for index, word in alignments.items() if word[1][1] <= word[1][0]}
    for index, word in dropped.items():
        message = f"note: {path}: alignments[{index}]={list(word)!r}: dropped in training, as it has no duration"
        report.notes.append(Problem(entry.file, entry.line, message))
    said = [speaker for index, (_, _, speaker) in alignments.items() if index not in dropped]
    report.words += len(said)
    report.main_words += said.count(MAIN_SPEAKER)
    found = [(index, f"malformed alignment: {message}") for index, message in malformed.items()]
    found += _check_times(alignments, duration)
    messages += [f"{path}: {message}" for _, message in sorted(found, key=lambda pair: pair[0])]
    if alignments and MAIN_SPEAKER not in said:
        messages.append(f"{path}: no word by {MAIN_SPEAKER}: Moshi would learn to say nothing")
    return messages


def _check_audio(entry: Entry) -> tuple[list[str], float | None]:
    """Messages about the audio file, and its duration in seconds if it can be read."""
    if not is_file(entry.path):
        return [f"{entry.path}: no such file (audio)"], None
    try:
        audio = AudioFile(entry.path)
    except (OSError, ValueError) as error:
        return [f"{entry.path}: cannot be read as audio: {error}"], None
    messages, channels, duration = [], audio.channels, audio.duration
    if channels != 2:
        kind = "mono" if channels == 1 else f"{channels} channels"
        messages.append(f"{entry.path}: {kind}; must be stereo, Moshi left and the user right")
    if abs(duration - entry.duration) > DURATION_TOLERANCE:
        messages.append(f"{entry.path}: duration={entry.duration:g}: the file has {duration:.3f} seconds")
    if audio.ends_early():
        messages.append(f"{entry.path}: ends before the {duration:.3f} seconds of its header; copy it anew")
    return messages, duration


def _check_times(alignments: dict[int, Alignment], duration: float | None) -> list[tuple[int, str]]:
    """Index and message of every word that no segment will hold as it was meant."""
    found, before = [], None
    for index, alignment in alignments.items():
        start, _ = alignment[1]
        for wrong, what in (
            (start < 0, "malformed alignment: starts before 0"),
            (duration is not None and start > duration, "starts after the end of the audio"),
            (before is not None and start < before, "unsorted: starts before the one before it"),
        ):
            if wrong:
                found.append((index, f"alignments[{index}]={list(alignment)!r}: {what}"))
        before = start
    return found
