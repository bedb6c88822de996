"""Checks the audio of a line: can it be read to its end, is it stereo, and as long as the list and its header say?"""

from collections.abc import Callable

from ..common.files import is_file
from .audio import AudioFile
from .manifest import Entry
from .resample import is_enough
from .sound import SoundMeter

DURATION_TOLERANCE = 0.08
"""Seconds by which a list's duration may differ from the file's: one step."""

MIMI_RATE = 24_000
"""Samples per second that Mimi hears."""

Add = Callable[..., None]
"""Takes the kind of a problem and its message; `note=True` when it does no harm."""


def check_audio(entry: Entry, add: Add) -> tuple[SoundMeter, float] | None:
    """What was measured of all samples of a file, and how many seconds it has or, when it was cut off, should have.

    None when its samples cannot be read, or not to their end.
    """
    path = entry.path
    if not is_file(path):
        add("no audio file", f"{path}: no such file (audio)")
        return None
    try:
        audio = AudioFile(path)
    except (OSError, ValueError) as error:
        add("unreadable audio", f"{path}: cannot be read as audio: {error}")
        return None
    if audio.channels != 2:
        kind = "mono" if audio.channels == 1 else f"{audio.channels} channels"
        add("not stereo", f"{path}: {kind}; must be stereo, Moshi left and the user right")
    if not audio.can_seek():
        add("codec without seeking", f"{path}: {audio.why_nothing(0)}")
        return None
    meter = SoundMeter(audio.rate)
    try:
        for pcm in audio.blocks():
            meter.add(pcm)
    except ValueError as error:
        add("damaged samples", f"{path}: {error}")
        return None
    _check_length(entry, audio, meter, add)
    return meter, audio.duration if audio.is_cut_off(meter.seconds) else meter.seconds


def has_audio(meter: SoundMeter, step: int, steps_per_second: float) -> bool:
    """Whether Mimi hears something of a file from `step` on."""
    return is_enough(meter.samples - int(step / steps_per_second * meter.rate), meter.rate, MIMI_RATE)


def _check_length(entry: Entry, audio: AudioFile, meter: SoundMeter, add: Add) -> None:
    path, seconds = entry.path, meter.seconds
    if audio.is_cut_off(seconds):
        add("cut off", f"{path}: ends before the {audio.duration:.3f} seconds of its header; copy it anew")
        return
    if audio.doubt is not None and audio.doubt.hides:
        add("header that hides audio", f"{path}: {audio.doubt.reason}; {audio.remedy}")
    elif audio.doubt is not None:
        add("header without a length", f"{path}: {audio.doubt.reason}; it plays {seconds:.3f} seconds", note=True)
    if not is_enough(meter.samples, audio.rate, MIMI_RATE):
        add("no audio", f"{path}: no audio, {meter.samples} samples")
    elif abs(seconds - entry.duration) > DURATION_TOLERANCE:
        add("another duration", f"{path}: duration={entry.duration:g}: the file has {seconds:.3f} seconds")
