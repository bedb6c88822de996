"""How fast a run goes: what is logged of a step beside its loss, and the line for where there is no bar."""

import resource
import sys
import time
from datetime import datetime, timedelta

import torch

from ..checkpoint.training_state import TrainState
from ..common.distributed import Context
from ..settings.schema import STEPS_PER_SECOND, TrainArgs
from .update import StepResult


class Progress:
    """Measures the steps between two that are logged."""

    def __init__(self, args: TrainArgs, ctx: Context):
        self._device = ctx.device
        self._items = args.batch_size * args.num_microbatches * ctx.world_size
        self._time, self._step = time.monotonic(), 0

    def start(self, step: int) -> None:
        """The clock runs from here, after `step`."""
        self._time, self._step = time.monotonic(), step

    def values(self, state: TrainState, result: StepResult) -> dict[str, float]:
        """The metrics of the step that was just done; the rates are means since the last call."""
        rate = (state.step - self._step) / max(time.monotonic() - self._time, 1e-9)
        self.start(state.step)
        steps = state.loader.tokenizer.steps
        return {
            "loss": result.loss,
            "text_loss": result.text,
            "audio_loss": result.audio,
            "grad_norm": result.grad_norm,
            "skipped": float(not result.applied),
            **{f"lr/{name}": lr for name, lr in result.rates.items()},
            "steps_per_second": rate,
            "tokens_per_second": rate * self._items * steps * (1 + state.model.n_q),
            "audio_seconds_per_second": rate * self._items * steps / STEPS_PER_SECOND,
            "peak_memory_gib": peak_memory(self._device) / 2**30,
        }


def progress_line(step: int, last: int, values: dict[str, float]) -> str:
    """`Progress.values` of `step` of `last`, in one line, as moshi-finetune prints it."""
    remaining = (last - step) / max(values["steps_per_second"], 1e-9)
    rates = [rate for name, rate in values.items() if name.startswith("lr/")]
    parts = {
        "step": f"{step:06d}",
        "done (%)": f"{100 * step / last:.1f}",
        "loss": f"{values['loss']:.3f}",
        "lr": f"{rates[-1]:.1e}" if rates else "none",
        "grad_norm": f"{values['grad_norm']:.3g}",
        "peak_memory (GiB)": f"{values['peak_memory_gib']:.1f}",
        "steps_per_second": f"{values['steps_per_second']:.3g}",
        "ETA": f">{datetime.now() + timedelta(seconds=min(remaining, 1e9)):%Y-%m-%d %H:%M:%S}",
    }
    return " - ".join(f"{name}: {value}" for name, value in parts.items())


def peak_memory(device: torch.device) -> int:
    """Bytes: what tensors took at most on a GPU, what the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
