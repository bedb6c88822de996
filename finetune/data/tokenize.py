"""From a stretch of a stereo file to the codes that the language model trains on.

Shapes: `K` = 1 + n_q rows, `T` steps of a segment, `S` samples.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from moshi.conditioners import ConditionAttributes
from moshi.models.loaders import CheckpointInfo

from ..common.disk import reading
from .audio import AudioFile
from .broken import BrokenItem
from .conditions import Prepare, known_conditions
from .encode import check_codebooks, encode_channels
from .manifest import Transcript, read_transcript, transcript_path
from .resample import is_enough, resample
from .segments import Cutter, Segment
from .text_row import MAIN_SPEAKER, TextTokenizer, text_row
from .text_tokenizer import load_text_tokenizer


@dataclass(frozen=True)
class Item:
    """Codes `[1, K, T]` int64 on the CPU, and the conditions of the file if the model takes any."""

    codes: torch.Tensor
    conditions: ConditionAttributes | None


class SpeechTokenizer(Cutter):
    """Turns segments into items: the text row, then Mimi's codes of Moshi's channel, then those of the user's.

    Args:
        mimi: a `MimiModel` with at least as many codebooks as either channel needs.
        text_tokenizer: a sentencepiece processor.
        n_q, dep_q: as in the language model: `dep_q` codebooks are Moshi's, the other `n_q - dep_q` the user's.
        duration_sec: of a segment, as in `Cutter`; Mimi has the frame rate.
        conditions: names of the text conditions that the model takes; a file's others are left out, absent ones None.
        prepare: what the model does first with a list of conditions; it raises for a value that it does not know.
        cache_items: how many items to keep in memory, so that a small dataset is encoded only once.

    Raises:
        ValueError: for a model that is not a dialogue of two channels, or a Mimi with too few codebooks.
    """

    def __init__(
        self,
        mimi: Any,
        text_tokenizer: TextTokenizer,
        *,
        n_q: int,
        dep_q: int,
        duration_sec: float,
        padding_id: int = 3,
        end_padding_id: int = 0,
        zero_id: int = -1,
        main_speaker: str = MAIN_SPEAKER,
        conditions: Sequence[str] = (),
        prepare: Prepare | None = None,
        cache_items: int = 512,
    ):
        if not 0 < dep_q < n_q:
            raise ValueError(f"dep_q={dep_q}, n_q={n_q}: a dialogue needs codebooks of both channels, 0 < dep_q < n_q.")
        check_codebooks(mimi, n_q, dep_q)
        super().__init__(duration_sec, mimi.frame_rate)
        self.mimi, self.text_tokenizer = mimi, text_tokenizer
        self.n_q, self.dep_q, self.zero_id = n_q, dep_q, zero_id
        self.padding_id, self.end_padding_id, self.main_speaker = padding_id, end_padding_id, main_speaker
        self.conditions, self._prepare = tuple(conditions), prepare
        self._cache_items = cache_items
        self._cache: OrderedDict[Segment, Item] = OrderedDict()

    @property
    def padding_ids(self) -> tuple[int, int]:
        """The ids of padding and of its end."""
        return self.padding_id, self.end_padding_id

    @classmethod
    def for_model(cls, model: Any, mimi: Any, text_tokenizer: TextTokenizer, duration_sec: float) -> "SpeechTokenizer":
        """With the codebooks, the special tokens and the conditions of an `LMModel`."""
        provider = model.condition_provider
        return cls(
            mimi,
            text_tokenizer,
            n_q=model.n_q,
            dep_q=model.dep_q,
            duration_sec=duration_sec,
            padding_id=model.text_padding_token_id,
            end_padding_id=model.end_of_text_padding_id,
            zero_id=model.zero_token_id,
            conditions=() if provider is None else provider.text_conditions,
            prepare=None if provider is None else provider.prepare,
        )

    def __call__(self, segment: Segment) -> Item:
        """The item of `segment`; what the file is too short for is the zero token, which carries no loss.

        Raises:
            BrokenItem: for audio or alignments that are missing or cannot be used.
        """
        if segment in self._cache:
            self._cache.move_to_end(segment)
        else:
            self._cache[segment] = self._make(segment)
            if len(self._cache) > self._cache_items:
                self._cache.popitem(last=False)
        item = self._cache[segment]
        return Item(item.codes.long(), item.conditions)

    def blank(self) -> Item:
        """An item of zero tokens alone: it fills up a batch and carries no loss."""
        codes = torch.full((1, 1 + self.n_q, self.steps), self.zero_id)
        return Item(codes, known_conditions(None, self.conditions, None))

    def _make(self, segment: Segment) -> Item:
        pcm, transcript = self._read(segment)
        try:
            conditions = known_conditions(transcript.text_conditions, self.conditions, self._prepare)
        except ValueError as error:
            raise BrokenItem(f"{segment}: {error}") from error
        audio = encode_channels(self.mimi, pcm, self.n_q, self.dep_q)[:, : self.steps]
        text = text_row(
            transcript.alignments,
            self.text_tokenizer,
            audio.shape[-1],
            first_step=segment.first_step,
            frame_rate=self.frame_rate,
            padding_id=self.padding_id,
            end_padding_id=self.end_padding_id,
            main_speaker=self.main_speaker,
        )
        codes = self.blank().codes.int()  # half of the memory in the cache
        codes[0, :, : audio.shape[-1]] = torch.cat([text, audio])
        return Item(codes, conditions)

    def _read(self, segment: Segment) -> tuple[np.ndarray, Transcript]:
        try:
            audio = AudioFile(segment.path)
            samples = audio.read(segment.first_step / self.frame_rate, self.steps / self.frame_rate)
            transcript = read_transcript(transcript_path(segment.path))
        except (OSError, ValueError) as error:
            raise BrokenItem(f"{segment}: {error}") from error
        if samples.shape[0] != 2:
            raise BrokenItem(f"{segment}: {samples.shape[0]} channel(s); left must be Moshi, right the user.")
        if not is_enough(samples.shape[1], audio.rate, self.mimi.sample_rate):
            raise BrokenItem(f"{segment}: {audio.why_nothing(segment.first_step / self.frame_rate)}")
        return resample(samples, audio.rate, self.mimi.sample_rate), transcript


def load_speech_tokenizer(
    model: Any, info: CheckpointInfo, duration_sec: float, device: torch.device
) -> SpeechTokenizer:
    """What turns speech into codes for `model`, an `LMModel`: Mimi, on `device` and frozen, and the text tokenizer.

    Raises:
        ConfigError: when one of the two is damaged, or does not fit the model; names the file.
    """
    described = (info.raw_config or {}).get("mimi_config_name", "moshi's own configuration")
    with reading(f"moshi_paths.mimi_path={str(info.mimi_weights)!r}: cannot be loaded into the Mimi of {described}"):
        mimi = info.get_mimi(device=device).requires_grad_(False)
    text_tokenizer = load_text_tokenizer(info.tokenizer, info.lm_config)
    with reading("moshi_paths: cannot be trained on dialogues"):
        return SpeechTokenizer.for_model(model, mimi, text_tokenizer, duration_sec=duration_sec)
