"""Checks a dataset before training: all that training or an evaluation refuses, skips, or learns nonsense from.

Every file is read to its end. Notes are no problems: what they name is left out as it is meant to be, or does no harm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..common.disk import reading
from ..settings.schema import STEPS_PER_SECOND
from .audio_check import Add, check_audio, has_audio
from .conditions import conditions_of
from .findings import EMPTY_LIST, LOST_WORDS, Report, Segments
from .manifest import Entry, read_entries
from .segments import Cutter
from .sound import SoundMeter
from .text_row import MAIN_SPEAKER
from .text_tokenizer import load_text_tokenizer, padding_ids
from .transcript_check import check_transcript
from .word_count import WordCount


@dataclass(frozen=True)
class Options:
    """What else is known of the training.

    Args:
        tokenizer: a sentencepiece model: whether it knows the words.
        config: content of the model's `config.json`: the tokenizer that it takes, and its text conditions.
        duration: seconds of a segment: how files are cut, and which segments have no audio.
        keep_all: keep every message, for JSON.
    """

    tokenizer: Path | None = None
    config: Mapping[str, Any] | None = None
    duration: float | None = None
    keep_all: bool = False


def check(files: list[Path], options: Options = Options()) -> Report:
    """Looks at every line of the lists, and at all of the audio and the alignments that it names.

    Raises:
        UnfitTokenizer: when there is no such tokenizer, or it is not the model's.
        OSError: when a list cannot be read.
    """
    report = Report(options.keep_all)
    checker = _Checker(options, report)
    for file in files:
        entries, problems = read_entries(file)
        report.lines += len(entries) + len(problems)
        for problem in problems:
            report.add(file, problem.line, "not a valid line", problem.message)
        if not entries and not problems:
            must = 'an empty list; must hold lines {"path": ..., "duration": seconds}'
            report.add(file, 1, EMPTY_LIST, must)
        words = checker.new_count()
        for entry in tqdm(entries, desc=file.name, unit="file", disable=None):
            checker.check(entry, words)
        checker.judge(words, file)
    return report


class _Checker:
    """Checks one line after the other, and adds what it finds to `report`."""

    def __init__(self, options: Options, report: Report):
        self._report, self._config = report, options.config or {}
        self._tokenizer = None
        if options.tokenizer is not None:
            self._tokenizer = load_text_tokenizer(options.tokenizer, self._config, "--tokenizer")
        with reading("config: its text conditions cannot be used"):
            self._conditions = conditions_of(self._config)
        self._cutter = None if options.duration is None else Cutter(options.duration, STEPS_PER_SECOND)
        report.segments = None if options.duration is None else Segments(options.duration)

    def new_count(self) -> WordCount:
        """Words are counted list by list."""
        return WordCount(self._tokenizer, STEPS_PER_SECOND, padding_ids(self._config))

    def judge(self, words: WordCount, file: Path) -> None:
        """What became of the words of a list."""
        if not words.transcripts:
            return
        if self._tokenizer is not None:
            self._report.text[str(file)] = words.summary()
        message = words.refusal() or words.warning()
        if message is not None:
            self._report.add(file, 1, LOST_WORDS, message)

    def check(self, entry: Entry, words: WordCount) -> None:
        """One line, with the files that it names."""
        add = partial(self._report.add, entry.file, entry.line)
        meter, seconds = check_audio(entry, add) or (None, None)
        if meter is not None:
            self._report.hours += meter.seconds / 3600
            self._check_segments(entry, meter, add)
        alignments = check_transcript(entry, seconds, self._conditions, add)
        if alignments is None:
            return
        for kind, message in {} if meter is None else meter.faults(alignments).items():
            add(kind, f"{entry.path}: {message}")
        words.add(alignments, entry.duration if seconds is None else seconds)
        said = [speaker for _, (start, end), speaker in alignments if start < end]
        self._report.words += len(said)
        self._report.main_words += said.count(MAIN_SPEAKER)

    def _check_segments(self, entry: Entry, meter: SoundMeter, add: Add) -> None:
        """How a file is cut; a segment without audio is refused."""
        if self._cutter is None:
            return
        length = self._cutter.steps / STEPS_PER_SECOND
        starts = self._cutter.starts(entry)
        for number, step in enumerate(starts):
            left = meter.seconds - step / STEPS_PER_SECOND
            if not has_audio(meter, step, STEPS_PER_SECOND):
                without = f"no audio in {len(starts) - number} of {len(starts)} segments, those from step {step} on"
                add("segments without audio", f"{entry.path}: {without}")
                return
            if left > length - 1e-3:
                self._report.segments.whole += 1
            else:
                self._report.segments.remainders.append(left)
