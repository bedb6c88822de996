"""Checks the alignments and the text conditions beside an audio file, word by word."""

from pathlib import Path

from .audio_check import Add
from .conditions import Prepare, known_conditions
from .manifest import Alignment, Entry, in_short, scan_transcript, shown, transcript_path
from .text_row import MAIN_SPEAKER


def check_transcript(
    entry: Entry, seconds: float | None, conditions: tuple[tuple[str, ...], Prepare | None], add: Add
) -> list[Alignment] | None:
    """The words of a file, without malformed ones; None when it cannot be read.

    Args:
        seconds: length of the audio, if it is known.
        conditions: as `conditions_of` returns them.
    """
    path = transcript_path(entry.path)
    try:
        alignments, malformed, found = scan_transcript(path)
    except FileNotFoundError:
        add("no alignments", f"{path}: no such file (alignments)")
        return None
    except (OSError, ValueError) as error:
        add("malformed alignments", f"{path}: malformed alignments: {error}")
        return None
    problems = [(index, "malformed alignment", f"malformed alignment: {text}") for index, text in malformed.items()]
    problems += _check_times(alignments, seconds)
    for _, kind, message in sorted(problems, key=lambda problem: problem[0]):
        add(kind, f"{path}: {message}")
    said = _check_speakers(alignments, path, add)
    if alignments and MAIN_SPEAKER not in said:
        others = shown(sorted({speaker for _, _, speaker in alignments.values()} - {MAIN_SPEAKER}))
        named = f" (speakers: {others})" if others else ""
        add("no word by Moshi", f"{path}: no word by {MAIN_SPEAKER}: Moshi would learn to say nothing{named}")
    try:
        known_conditions(found, *conditions)
    except ValueError as error:
        add("unknown text condition", f"{path}: {error}")
    return list(alignments.values())


def _check_speakers(alignments: dict[int, Alignment], path: Path, add: Add) -> list[str]:
    """Who says each word that is not dropped; notes those that are."""
    said = []
    for index, word in alignments.items():
        if word[1][1] > word[1][0]:
            said.append(word[2])
            continue
        message = f"{path}: alignments[{index}]={in_short(list(word))}: dropped in training, as it has no duration"
        add("words without a duration", message, note=True)
    return said


def _check_times(alignments: dict[int, Alignment], seconds: float | None) -> list[tuple[int, str, str]]:
    """Index, kind and message of every word that no segment will hold as it was meant."""
    found, before = [], None
    for index, alignment in alignments.items():
        start, _ = alignment[1]
        for wrong, kind, what in (
            (start < 0, "words before the start", "malformed alignment: starts before 0"),
            (
                seconds is not None and start > seconds,
                "words after the end",
                "starts after the end of the audio; times are in seconds",
            ),
            (before is not None and start < before, "unsorted words", "unsorted: starts before the one before it"),
        ):
            if wrong:
                found.append((index, kind, f"alignments[{index}]={in_short(list(alignment))}: {what}"))
        before = start
    return found
