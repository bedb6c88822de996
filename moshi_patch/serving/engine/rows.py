"""Many people and one model: a fixed number of rows over one Mimi and one language model, each person in one of them.

Shapes: `R` rows, `F` samples of a step of 80 ms, `K` codebooks.

People join, stall and leave at any step. What a row says is, bit for bit, the same whatever the other rows do: shapes
never change, no operation mixes rows, and each draws with noise of its own. All states are allocated once.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from moshi.models import LMModel, MimiModel

from ...healing import forget_on_reset
from ...memory import check_memory, copy_memory, fast_weight_tensors, restore_memory
from ...model import ttt_memories, ttt_row_updates
from .nearest import same_codes_in_every_row
from .sampler import RowLMGen, Sampling


@dataclass(frozen=True)
class Answer:
    """What a row says in one step.

    Attributes:
        finite: whether the row's numbers still are; if not, end it: what it says means nothing, now and later.
        text: token of the text, and `pcm`, `[F]` float32: its sound. None for as many steps from the beginning as the
            codebooks are delayed.
    """

    finite: bool
    text: int | None = None
    pcm: np.ndarray | None = None


class Rows:
    """Steps of `count` rows. Use it from one thread: moshi's compilation and graphs have global switches.

    Args:
        mimi, lm: of one checkpoint, in eval mode and not streaming; they stream from here on, as long as this lives.
        count: how many people can talk at the same time.
        condition_tensors, cfg_coef: as those of `LMGen`, the conditions for all rows.

    Attributes:
        learns: whether the model has fast weights.
    """

    def __init__(self, mimi: MimiModel, lm: LMModel, count: int, condition_tensors: Any = None, cfg_coef: float = 1.0):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count={count!r}: must be a positive whole number of rows.")
        self.mimi, self.lm_gen, self.count = mimi, RowLMGen(lm, count, condition_tensors, cfg_coef), count
        self.learns = bool(ttt_memories(lm))
        self._device = lm.device
        for model in (mimi, lm):
            forget_on_reset(model)
        same_codes_in_every_row(mimi)
        with torch.no_grad():  # not in inference mode, as all else here: others may write to a state
            mimi.streaming_forever(count)
            self.lm_gen.streaming_forever(count)
        self._steps: list[int | None] = [None] * count  # that a row has made since it was joined; None: it is free
        self._stale: set[int] = set()  # rows that still hold what somebody said
        self._memories: dict[int, Mapping[str, torch.Tensor]] = {}  # to be given to rows that are reset next
        self._masked: dict[MimiModel | RowLMGen, frozenset[int]] = {}  # rows that each was last told to run

    @property
    def free(self) -> list[int]:
        """Rows that nobody has, the lowest first."""
        return [row for row in range(self.count) if self._steps[row] is None]

    def join(self, row: int, sampling: Sampling, memory: Mapping[str, torch.Tensor] | None = None) -> None:
        """Gives a free row to somebody, who begins with the next step that has a frame of theirs.

        Args:
            memory: fast weights that this person goes on with, as of :meth:`copy_memory`; None: fresh ones. Not to be
                changed before the next step.

        Raises:
            ValueError: when somebody has the row, or when the memory does not fit.
        """
        if self._steps[row] is not None:
            raise ValueError(f"row={row}: somebody has it; free are {self.free}.")
        if memory is not None:
            check_memory(self.lm_gen.lm_model, memory, self._rows_of_the_model(row))
            self._memories[row] = memory
        self.lm_gen.sampling.assign(row, sampling)
        self._steps[row] = 0
        self._stale.add(row)

    def copy_memory(self, row: int) -> dict[str, torch.Tensor]:
        """What the fast weights of a row hold now, copied on the device; for :func:`write_memory` or another row.

        Raises:
            ValueError: when nobody has the row, or the model has no TTT layer.
        """
        if self._steps[row] is None:
            raise ValueError(f"row={row}: nobody has it.")
        self.forget()  # else it might still be what the person before has learnt
        return copy_memory(self.lm_gen.lm_model, self._rows_of_the_model(row))

    def give_memory(self, row: int, memory: Mapping[str, torch.Tensor]) -> Iterator[str]:
        """Gives the fast weights of :meth:`copy_memory` to a row that has not spoken, a layer each time it is asked.

        Yields:
            The name of each layer that has them now.

        Raises:
            ValueError: when nobody has the row, or the memory does not fit; before anything is changed.
        """
        if self._steps[row] is None:
            raise ValueError(f"row={row}: nobody has it.")
        places = self._rows_of_the_model(row)
        check_memory(self.lm_gen.lm_model, memory, places)
        return self._give_layers(places, memory)

    def _give_layers(self, places: list[int], memory: Mapping[str, torch.Tensor]) -> Iterator[str]:
        layers: dict[str, list[str]] = {}
        for key in memory:
            layers.setdefault(key.rpartition(".")[0], []).append(key)
        for layer, keys in layers.items():
            with torch.inference_mode():
                self.forget()  # a row that changed hands is reset before, not after
                live = fast_weight_tensors(self.lm_gen.lm_model)
                for key in keys:
                    for place, saved in zip(places, memory[key], strict=True):
                        live[key][place].copy_(saved, non_blocking=True)
            yield layer

    @torch.inference_mode()
    def set_updates(self, row: int, enabled: bool) -> None:
        """Whether what a row hears from now on is learnt, until it changes hands.

        Raises:
            ValueError: when nobody has the row, or the model has no TTT layer.
        """
        if self._steps[row] is None:
            raise ValueError(f"row={row}: nobody has it.")
        self.forget()  # a reset switches them on
        ttt_row_updates(self.lm_gen.lm_model, self._rows_of_the_model(row), enabled)

    def _rows_of_the_model(self, row: int) -> list[int]:
        """With classifier-free guidance each row has a second one, without conditions."""
        return [row] if self.lm_gen.cfg_coef == 1.0 else [row, self.count + row]

    def leave(self, row: int) -> None:
        """Takes a row back. What was said in it is gone from every state after the next step, or after :meth:`forget`.

        Raises:
            ValueError: when nobody has it.
        """
        if self._steps[row] is None:
            raise ValueError(f"row={row}: nobody has it.")
        self._steps[row] = None
        self._memories.pop(row, None)
        self._stale.add(row)

    @torch.inference_mode()
    def forget(self) -> None:
        """Makes every row that changed hands bitwise a fresh one, or one with the memory it was given and no more.

        Each step does so first; one reset serves all.
        """
        if not self._stale:
            return
        mask = self._mask(self._stale)
        self._masked.clear()  # a reset switches its rows on
        self.mimi.reset_streaming(mask)
        self.lm_gen.reset_streaming(mask)
        state = self.lm_gen._streaming_state  # its reset leaves the tokens that were said
        state.cache.masked_fill_(mask[:, None, None], self.lm_gen.lm_model.ungenerated_token_id)
        self.lm_gen.finite.logical_or_(mask)
        for row, memory in self._memories.items():
            restore_memory(self.lm_gen.lm_model, memory, self._rows_of_the_model(row))
        self._memories.clear()
        self._stale.clear()

    @torch.inference_mode()
    def step(self, frames: Mapping[int, np.ndarray]) -> dict[int, Answer]:
        """One step of the rows that have a frame; all others stall, and remain as they are.

        Args:
            frames: `[F]` float32 in [-1, 1], by row.

        Returns:
            What each of these rows says.

        Raises:
            ValueError: for a row that nobody has, or a frame of another size. Nothing has changed then.
        """
        sound = np.zeros((self.count, 1, self.mimi.frame_size), np.float32)
        for row, frame in frames.items():
            if not 0 <= row < self.count or self._steps[row] is None:
                raise ValueError(f"row={row}: nobody has it.")
            if frame.shape != sound.shape[2:]:
                raise ValueError(f"row={row}: a frame is of {sound.shape[2]} samples, not of shape {frame.shape}.")
            sound[row, 0] = frame
        self.forget()  # first, as a reset switches the masks of its rows on
        self._run_only(self.mimi, frames)
        self._run_only(self.lm_gen, frames)
        dtype = next(self.mimi.parameters()).dtype
        codes = self.mimi.encode(torch.from_numpy(sound).to(self._device, dtype, non_blocking=True))
        first = [row for row in frames if self._steps[row] == 0]
        if first:  # stock's server encodes the first frame as what was before the conversation, and begins anew
            self._masked.pop(self.mimi)
            self.mimi.reset_streaming(self._mask(first))
        tokens = self.lm_gen.step(codes)
        for row in frames:
            self._steps[row] += 1
        speaking = [row for row in frames if self._steps[row] > self.lm_gen.max_delay]
        self._run_only(self.mimi, speaking)  # the decoder begins later than the encoder
        pcm = self.mimi.decode(tokens[:, 1:].clamp(min=0))
        return self._answers(frames, speaking, tokens[:, 0, 0], pcm[:, 0])

    def _answers(
        self, frames: Mapping[int, np.ndarray], speaking: list[int], text: torch.Tensor, pcm: torch.Tensor
    ) -> dict[int, Answer]:
        """Fetches all that a step made with one copy from the device; a token fits a float32 exactly."""
        parts = text[:, None], self.lm_gen.finite[:, None], pcm
        together = torch.cat([part.float() for part in parts], 1).cpu().numpy()
        answers = {}
        for row in frames:
            finite = bool(together[row, 1])
            spoken = (int(together[row, 0]), together[row, 2:].copy()) if row in speaking else ()
            answers[row] = Answer(finite, *spoken)
        return answers

    def _run_only(self, model: MimiModel | RowLMGen, rows: Iterable[int]) -> None:
        """Has all other rows stall. Each of some hundred states has a mask of its own, so not when nothing changes."""
        rows = frozenset(rows)
        if self._masked.get(model) != rows:
            model.set_exec_mask(self._mask(rows))
            self._masked[model] = rows

    def _mask(self, rows: Iterable[int]) -> torch.Tensor:
        """`[R]` bool on the device, without waiting for it: nothing but the answers ends what the host runs ahead."""
        mask = np.zeros(self.count, bool)
        mask[list(rows)] = True
        return torch.from_numpy(mask).to(self._device, non_blocking=True)
