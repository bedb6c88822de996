"""`TTTMemory`: what the memory of a TTT layer is to the rest of the house, whatever its kind; `TTTState`, its stream.

Shapes: `B` rows, `T` steps, `D` model width.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..call import LayerCall
from ..config import TTTConfig

SEGMENT_STEPS = 16
"""Steps, or C / 4 if that is more, from which a streamed segment is worth its matrix products over whole chunks."""


class Fast(Protocol):
    """The fast weights of `B` rows: a dataclass of tensors `[B, ...]`, which a memory file holds field by field."""

    position: torch.Tensor
    """`[B]` int64, steps since the row's last reset"""
    updates: torch.Tensor
    """`[B]` int64, updates made since the row's last reset"""

    def reset(self, reset_mask: torch.Tensor) -> None:
        """Make the rows where `reset_mask [B]` is true bitwise those of a fresh stream, in place."""


@dataclass
class TTTState(State):
    """State of one TTT layer while streaming; a `moshi.modules.streaming.State` like that of the KV cache.

    It is no part of the module's `state_dict` and untouched by `Module.to()`: what was learnt stays float32.

    Attributes:
        fast: the fast weights of `batch_size` rows.
        finite: `[B]` bool, whether all that the transformer answered since a row's reset was finite. Kept by the last
            TTT layer of a transformer.
        learning: `[B]` bool, whether a row writes what it hears; set by :meth:`set_learning` alone.
        muted_rows: those where `learning` is false, known without waiting for the device.
    """

    fast: Any
    finite: torch.Tensor
    learning: torch.Tensor = field(init=False)
    muted_rows: frozenset[int] = field(init=False, default=frozenset())

    def __post_init__(self):
        super().__post_init__()
        with torch.inference_mode(False):  # rows may be muted outside of the mode that the stream began in
            self.learning = torch.ones(self.batch_size, dtype=torch.bool, device=self.device)

    def reset(self, reset_mask: torch.Tensor) -> None:
        """Rows where `reset_mask [B]` is true become, bit for bit, those of a fresh stream."""
        super().reset(reset_mask)
        self.fast.reset(reset_mask)
        self.finite |= reset_mask
        self.learning |= reset_mask
        if self.muted_rows:  # else this would wait for the device at every reset
            self.muted_rows -= frozenset(reset_mask.nonzero()[:, 0].tolist())

    def set_learning(self, rows: Sequence[int], learning: bool) -> None:
        """Whether these rows write what they hear from now on. Reaches replayed CUDA graphs too."""
        for row in rows:
            self.learning[row] = learning
        self.muted_rows = self.muted_rows - set(rows) if learning else self.muted_rows | set(rows)

    def note_finite(self, answer: torch.Tensor) -> None:
        """Remember which executed rows of `answer [B, T, D]` are not finite. Does not wait for the device."""
        self.finite &= answer.isfinite().flatten(1).all(1) | ~self.exec_mask


class TTTMemory(StreamingModule[TTTState]):
    """The memory of one TTT layer: weights, and what each row that streams has learnt.

    Args:
        config: the TTT settings.

    Attributes:
        updates_enabled: whether what is heard is written; see :meth:`set_updates`.
        bypassed: whether nothing is read; see :meth:`set_bypassed`.
    """

    _fsdp_final = True  # as the stock gating: kept whole by moshi's own FSDP wrapping
    place: str
    """Name of the module in its layer."""

    weight_keys: tuple[str, ...]
    """Names of all new weights, below the module's own name in a checkpoint."""
    undecayed_keys: tuple[str, ...] = ()
    """Those of them that weight decay would pull away from where they do nothing: gates, gains and biases."""
    answers_untaught = False
    """Whether it answers from what rows begin with too, so that without updates the model is not what it was before."""

    def __init__(self, config: TTTConfig):
        super().__init__()
        self.config = config
        self.updates_enabled = True
        self.bypassed = False
        self._enabled: torch.Tensor | None = None
        self._answering: torch.Tensor | None = None

    @property
    @abc.abstractmethod
    def update_steps(self) -> int:
        """C, the steps of an update."""

    @property
    @abc.abstractmethod
    def quiet_steps(self) -> int:
        """Steps at the beginning of a stream that are answered before anything that it taught is read."""

    @classmethod
    @abc.abstractmethod
    def needs_x0(cls, config: TTTConfig) -> bool:
        """Whether the layer call must bring the input of the transformer stack."""

    @classmethod
    @abc.abstractmethod
    def check_model(cls, config: TTTConfig, arguments: Mapping[str, Any]) -> None:
        """That a model can have this memory, before anything is built.

        Args:
            arguments: of `LMModel`, those with a default included.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """

    @classmethod
    @abc.abstractmethod
    def add_to(cls, layer: StreamingTransformerLayer, config: TTTConfig, device=None, dtype=None) -> "TTTMemory":
        """Makes the memory of a finished stock layer, with weights of this dtype, and puts it there."""

    @abc.abstractmethod
    def new_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that a stock model has not, by their names below this module's."""

    @abc.abstractmethod
    def is_closed(self) -> bool:
        """Whether the weights that let anything through are still zero, so that the model is as without it."""

    @abc.abstractmethod
    def delta_norm(self) -> torch.Tensor:
        """`[B]`: how far all that rows have learnt is from the weights they began with. For reports."""

    @abc.abstractmethod
    def initial_norm(self) -> torch.Tensor:
        """`[]`: the norm of the weights that rows begin with, of which `delta_norm` is a part. For reports."""

    def known(self) -> list[float | None] | None:
        """Share of its last full chunk's targets that each row knew already; None for a kind without the number."""
        return None

    @abc.abstractmethod
    def stats(self) -> dict[str, Any]:
        """What :func:`moshi_patch.ttt_stats` says of this kind alone."""

    @abc.abstractmethod
    def reported_weights(self) -> dict[str, list[nn.Parameter]]:
        """Weights by what their norm is called in the metrics of a training; under FSDP, this rank's share of them.

        Always there: `initial_norm`, of those that rows begin with, without adapters.
        """

    @abc.abstractmethod
    def watch_one_pass(self, keep: Callable[[torch.Tensor], None]) -> list[RemovableHandle]:
        """Gives `keep` the norm `[]` of what each pass teaches its first row, until the handles are removed.

        A pass that teaches nothing may leave it out.
        """

    @abc.abstractmethod
    def _fresh(self, batch_size: int, device: torch.device) -> Fast:
        """The fast weights of `batch_size` fresh rows."""

    def _init_streaming_state(self, batch_size: int) -> TTTState:
        device = next(iter(self.new_parameters().values())).device
        if self._enabled is None or self._enabled.device != device:
            with torch.inference_mode(False):  # they outlive this stream and must stay writable
                self._enabled = torch.tensor(self.updates_enabled, device=device)
                self._answering = torch.tensor(not self.bypassed, device=device)
        finite = torch.ones(batch_size, dtype=torch.bool, device=device)
        return TTTState(batch_size, device, self._fresh(batch_size, device), finite)

    def set_updates(self, enabled: bool) -> None:
        """Whether what is heard from now on is written. Reaches replayed CUDA graphs too."""
        self.updates_enabled = enabled
        if self._enabled is not None:
            self._enabled.fill_(enabled)

    def set_bypassed(self, bypassed: bool) -> None:
        """Whether nothing that was learnt is read from now on. Reaches replayed CUDA graphs too."""
        self.bypassed = bypassed
        if self._answering is not None:
            self._answering.fill_(not bypassed)

    def _muted(self, call: LayerCall | None) -> bool:
        """Whether this pass makes no update. A layer that is computed again must know what held the first time."""
        return id(self) in call.muted if call else not self.updates_enabled

    def _bypassed(self, call: LayerCall | None) -> bool:
        return id(self) in call.bypassed if call else self.bypassed

    def _worth_a_segment(self, steps: int) -> bool:
        return steps >= max(SEGMENT_STEPS, self.update_steps // 4)

    def _rows_enabled(self, state: TTTState) -> torch.Tensor:
        """`[B]` bool: which rows write what they hear. A tensor, as a replayed CUDA graph reads it."""
        return self._enabled & state.learning
