"""The task `speech`: a passage of a recorded dialogue, other speech, and the passage again, as codes of Mimi.

The codes come from the Mimi architecture of `example/tiny_repo.py`: its convolutions are random, its codebooks are
fitted by k-means to the example's three dialogues, so that different sounds get different codes. Both channels of each
dialogue are used; one dialogue is held out (of the training, not of the codebooks). Less than a minute of training
speech would be learnt by heart; therefore every training sequence renames the codes of each codebook at random.

Shapes: `B` rows, `R` rows of codes (text, then audio), `T` steps of 80 ms.
"""

import functools
import json
import tempfile
from collections.abc import Callable

import sphn
import torch
from moshi.models import loaders

from example.tiny_repo import DATA, make_tiny_repo

from .settings import Settings
from .tasks import Batch

CODES = 64
"""Codes per codebook of the tiny Mimi."""

PADDING = 3
"""The text row says nothing: moshi's text padding token."""


@functools.cache
@torch.no_grad()
def dialogues(held_out: bool) -> tuple[torch.Tensor, ...]:
    """Codes `[8, T]` of every channel of the training dialogues, or of the held-out one."""
    manifest = DATA / ("eval.jsonl" if held_out else "train.jsonl")
    names = [json.loads(line)["path"] for line in manifest.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        repo = make_tiny_repo(folder, card=CODES)
        config = json.loads((repo / "mimi_config.json").read_text())
        mimi = loaders.get_mimi(repo / "mimi.safetensors", config, num_codebooks=8)
    speech = [torch.from_numpy(sphn.read(str(DATA / name))[0])[:, None] for name in names]
    return tuple(codes for pcm in speech for codes in mimi.encode(pcm))


SOURCES: dict[str, Callable[[bool], tuple[torch.Tensor, ...]]] = {"dialogues": dialogues}
"""Codes of the recordings by `Settings.recordings`; `prompts` adds its own once they are fetched."""


def cut(settings: Settings, length: int, held_out: bool, generator: torch.Generator) -> torch.Tensor:
    """Codes `[R, length]` from anywhere in the recordings.

    Raises:
        ValueError: for recordings that were not fetched.
    """
    if settings.recordings not in SOURCES:
        raise ValueError(f"recordings={settings.recordings!r}: fetch them by python -m benchmarks.evidence.prompts.")
    channels = SOURCES[settings.recordings](held_out)
    codes = channels[int(torch.randint(len(channels), (), generator=generator))]
    start = int(torch.randint(codes.shape[1] - length + 1, (), generator=generator))
    return codes[: settings.audio_rows, start : start + length]


def speech(
    settings: Settings,
    batch: int,
    generator: torch.Generator,
    gap: int | None = None,
    held_out: bool = False,
    renamed: bool = True,
) -> Batch:
    """A passage, other speech of the same dialogues, and the passage again; marks as in `tasks`, without `within`.

    Args:
        gap: steps of other speech; None draws them for the batch.
        held_out: from the dialogue that is not trained on.
        renamed: every sequence has its own names for the codes of a codebook.
    """
    if gap is None:
        gap = int(torch.randint(settings.gap_max - settings.gap_min + 1, (), generator=generator)) + settings.gap_min
    audio = []
    for _ in range(batch):
        passage, other = (cut(settings, n, held_out, generator) for n in (settings.part, gap))
        audio.append(torch.cat([passage, other, passage], 1))
    codes = torch.stack(audio)
    if renamed:
        names = torch.rand(batch, settings.audio_rows, CODES, generator=generator).argsort(2)
        codes = names.gather(2, codes)
    codes = torch.cat([torch.full_like(codes[:, :1], PADDING), codes], 1)
    steps = torch.arange(codes.shape[2]).expand(batch, -1)
    returned = settings.part + gap
    marks = {"first": (steps > 0) & (steps < settings.part), "beyond": steps > returned}
    return Batch(codes, marks)


SPEECH_VARIATIONS = {
    "": {"held_out": True, "renamed": False},
    "held out, renamed": {"held_out": True},
    "trained on": {"renamed": False},
}
"""What a speech run is evaluated on; `""` is the headline."""
