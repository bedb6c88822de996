"""A held-out dialogue that the model continues, to listen to and to read: what a loss does not tell.

The first seconds of Moshi's channel are the recording's, the rest is what the model says most probably; the user's
channel is the recording throughout. TTT learns along the way, as it does when the model is served.

Shapes: `K` = 1 + n_q rows of codes, `T` steps of 80 ms; `P` steps are the prompt.
"""

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.models import LMGen, LMModel
from moshi.utils.compile import no_cuda_graph

from ..common.disk import writing
from ..data.loader import EvalLoader
from ..data.tokenize import Item, SpeechTokenizer
from ..model.conditions import condition_tensors

SAMPLES_FOLDER = "samples"
"""In a run's folder."""

PROMPT_STEPS, SPOKEN_STEPS = 25, 38
"""Two seconds that are given and three that the model speaks, or half of a shorter dialogue."""


@dataclass(frozen=True)
class Sample:
    """What the model made of a prompt.

    Args:
        pcm: `[2, samples]` float32, Moshi and the user, the prompt first.
        rate: samples per second.
        prompt_seconds: how much of it is the recording's.
        prompt, said, recorded: the words of the prompt, of the model, and of the recording in its place.
    """

    pcm: np.ndarray
    rate: int
    prompt_seconds: float
    prompt: str
    said: str
    recorded: str

    def in_words(self) -> str:
        return (
            f"prompt ({self.prompt_seconds:.1f} s): {self.prompt or '(no words)'}\n"
            f"the model: {self.said or '(no words)'}\n"
            f"the recording: {self.recorded or '(no words)'}\n"
        )


def make_sample(model: LMModel, loader: EvalLoader) -> Sample | None:
    """The first held-out dialogue that can be read, continued; None when all are shorter than a quarter second.

    No random number is drawn, and the model is as before afterwards.

    Args:
        model: not wrapped by FSDP: it streams, where parts that are spread over processes cannot be gathered.
    """
    tokenizer = loader.tokenizer
    for batch in loader:
        for row, codes in enumerate(batch.codes.split(1)):
            conditions = batch.condition_attributes
            steps = int((codes[0, 0] != tokenizer.zero_id).sum())
            spoken = min(SPOKEN_STEPS, steps // 2 - max(model.delays))
            if spoken > 0:
                item = Item(codes[:, :, :steps], conditions and conditions[row])
                return _continue(model, tokenizer, item, min(PROMPT_STEPS, steps // 2), spoken)
    return None


def write_sample(run_dir: Path, step: int, sample: Sample) -> Path:
    """Writes `samples/step_000100.wav`, Moshi left and the user right, and `.txt` beside it. Returns the first.

    Raises:
        DiskError: when they cannot be written.
    """
    path = run_dir / SAMPLES_FOLDER / f"step_{step:06d}.wav"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(sample.rate)
            file.writeframes((sample.pcm.T.clip(-1, 1) * 32767).astype("<i2").tobytes())
        path.with_suffix(".txt").write_text(sample.in_words(), encoding="utf-8")
    return path


def _continue(model: LMModel, tokenizer: SpeechTokenizer, item: Item, prompt: int, spoken: int) -> Sample:
    codes = item.codes.to(model.device)
    training, end = model.training, prompt + spoken
    model.eval()
    try:
        with torch.no_grad(), no_cuda_graph():
            generated = _generate(model, codes, None if item.conditions is None else [item.conditions], prompt, end)
    finally:
        model.set_streaming_detached(False)  # which LMGen sets
        model.train(training)
    first_of_user = 1 + model.dep_q
    channels = (generated[:, 1:], codes[:, first_of_user:, :end])
    pcm = [tokenizer.mimi.decode(channel)[0, 0].float().cpu().numpy() for channel in channels]
    words = (codes[0, 0, :prompt], generated[0, 0, prompt:], codes[0, 0, prompt:end])
    seconds = prompt / tokenizer.frame_rate
    return Sample(np.stack(pcm), int(tokenizer.mimi.sample_rate), seconds, *(_text(tokenizer, row) for row in words))


def _generate(model: LMModel, codes: torch.Tensor, conditions: Any, prompt: int, end: int) -> torch.Tensor:
    """`[1, 1 + dep_q, end]`: the first `prompt` steps of `codes`, then what the model makes most probable.

    In step s the model hears the user's code of step s - 1 and says the text of step s; a codebook that is delayed by d
    is then at step s - d.
    """
    generated = codes[:, : 1 + model.dep_q, :end].clone()
    delays, now = model.delays[: 1 + model.dep_q], 0

    def follow(row: int, token: torch.Tensor) -> None:
        """Keeps what was said, or replaces it by what was given."""
        place = now - delays[row]
        if 0 <= place < prompt:
            token.copy_(generated[:, row, place])
        elif prompt <= place < end:
            generated[:, row, place] = token

    def follow_audio(tokens: torch.Tensor) -> None:
        for row in range(1, 1 + model.dep_q):
            follow(row, tokens[:, row - 1])

    speaker = LMGen(
        model,
        use_sampling=False,
        condition_tensors=condition_tensors(model, conditions),
        on_text_hook=lambda token: follow(0, token),
        on_audio_hook=follow_audio,
    )
    with speaker.streaming(1):
        for now in range(end + max(delays)):
            speaker.step(codes[:, 1 + model.dep_q :, max(now - 1, 0)][..., None])
    return generated


def _text(tokenizer: SpeechTokenizer, tokens: torch.Tensor) -> str:
    silent = (tokenizer.padding_id, tokenizer.end_padding_id, tokenizer.zero_id)
    known = tokenizer.text_tokenizer.get_piece_size()
    return tokenizer.text_tokenizer.decode(
        [token for token in tokens.tolist() if token not in silent and token < known]
    )
