"""Forms of the update that were tried and are no part of the method: each is one change behind `Settings.form`.

Shapes: `B` rows, `T` steps, `D` model width, `H` hidden width, `C` chunk size.

The fast weight is held as it is, `S [B, D, H]`, and chunks are done one after the other: slow at a real width, and
plain enough to be changed at one place. All rows of a stream are at the same step here.
"""

import math
from typing import Any

import torch
from moshi.models.lm import LMModel
from torch import nn

import moshi_patch
from moshi_patch.kinds.in_place.gating import TTTGating, TTTState

FORMS = {
    "gate": "True: what is read is multiplied by sigmoid(c + b log(|read| / |out|) + a cos(read, out)), per step",
    "strength": "True: each step has a learning rate of its own, η exp(w · x0), with w zero at the start",
    "unit_keys": "True: keys and queries have length 1",
    "ramp": "so many training steps in which the gain of the targets rises from 0 to `target_gain`",
    "full": "the delta never grows beyond so many times the norm of W_down: beyond that it is scaled down",
}
"""What `Settings.form` may hold, and what each does."""


def check_form(form: dict[str, Any], trained_layers: bool) -> None:
    """Refuse a form that there is not.

    Raises:
        ValueError: naming it and what is allowed.
    """
    for name, value in form.items():
        if name not in FORMS:
            raise ValueError(f"form: {name!r}: no form of the update; allowed are {sorted(FORMS)}.")
        switch = name in ("gate", "strength", "unit_keys")
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        if value is not True if switch else not number:
            raise ValueError(f"form: {name}={value!r}: must be {'True' if switch else 'a number above 0'}.")
    if form and not trained_layers:
        raise ValueError(f"form: {sorted(form)}: a model without TTT has none.")


class FormWeights(nn.Module):
    """The few weights that a form trains; a checkpoint without them leaves them as they are."""

    def __init__(self, form: dict[str, Any], dim: int):
        super().__init__()
        if "gate" in form:
            self.gate = nn.Parameter(torch.tensor([0.0, 1.0, 0.0]))
        if "strength" in form:
            self.strength = nn.Parameter(torch.zeros(dim))
        self._register_load_state_dict_pre_hook(self._keep_own)

    def _keep_own(self, state_dict: dict, prefix: str, *_) -> None:
        for name, parameter in self._parameters.items():
            state_dict.setdefault(prefix + name, parameter.data)


class FormGating(TTTGating):
    """A `TTTGating` whose memory has one of `FORMS`."""

    form: dict[str, Any]
    form_weights: FormWeights
    progress: float
    """Training steps done; infinite once the model is trained."""

    def _one_pass(self, out: torch.Tensor, z: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        size, reads, memory = self.config.chunk_size, [], None
        for start in range(0, z.shape[1], size):
            keys = self._keys(z[:, start : start + size])
            reads.append(torch.zeros_like(out[:, start : start + size]) if memory is None else keys @ memory.mT)
            if start + size < z.shape[1]:
                memory = self._written(memory, keys, x0[:, start : start + size], reads[-1])
        return out + self._gated(torch.cat(reads, 1), out)

    @torch.no_grad()
    def _stream(self, state: TTTState, out: torch.Tensor, z: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        held = state.__dict__.setdefault("form", {"memory": None, "heard": []})
        outs = []
        for t in range(z.shape[1]):
            keys = self._keys(z[:, t : t + 1])
            memory = held["memory"]
            read = torch.zeros_like(out[:, t : t + 1]) if memory is None else keys @ memory.mT
            outs.append(out[:, t : t + 1] + self._gated(read, out[:, t : t + 1]))
            held["heard"] += [(keys, x0[:, t : t + 1], read)] if self.updates_enabled else []
            if len(held["heard"]) == self.config.chunk_size:
                held["memory"] = self._written(
                    memory, *(torch.cat(part, 1) for part in zip(*held["heard"], strict=True))
                )
                held["heard"] = []
        return torch.cat(outs, 1)

    def _keys(self, z: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(z, dim=-1) if "unit_keys" in self.form else z

    def _gated(self, read: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if "gate" not in self.form:
            return read
        c, b, a = self.form_weights.gate
        own, stock = (x.square().sum(-1, keepdim=True) + 1e-12 for x in (read, out))
        cosine = (read * out).sum(-1, keepdim=True) / (own * stock).sqrt()
        return read * torch.sigmoid(c + b * 0.5 * (own.log() - stock.log()) + a * cosine)

    def _written(self, memory: torch.Tensor | None, keys: torch.Tensor, x0: torch.Tensor, read: torch.Tensor):
        """The memory `[B, D, H]` after the chunk of `keys [B, C, H]`, which answered `read [B, C, D]`."""
        config = self.config
        gain = config.target_gain * min(
            1.0, self.progress / self.form.get("ramp", math.inf) if "ramp" in self.form else 1
        )
        targets = gain * self.target_generator(x0, config.chunk_size)
        rate = torch.full(keys.shape[:2], config.learning_rate, dtype=keys.dtype)
        if "strength" in self.form:
            rate = rate * (x0 @ self.form_weights.strength).clamp(-10, 5).exp()
        if config.update == "residual":
            gram = keys @ keys.mT + torch.diag_embed(1 / rate)
            values = torch.linalg.solve(gram, targets - config.decay * read)
        else:
            values = rate[..., None] * targets
        change = values.mT @ keys
        memory = change if memory is None else config.decay * memory + change
        if "full" in self.form:
            most = self.form["full"] * self.linear_out.weight.detach().norm()
            memory = memory * (most / (memory.flatten(1).norm(dim=1) + 1e-12)).clamp(max=1)[:, None, None]
        return memory

    def delta(self) -> torch.Tensor:
        """`[B, D, H]`: what all rows that stream have learnt."""
        state = self._streaming_state
        memory = state.__dict__.get("form", {}).get("memory")
        return torch.zeros(state.batch_size, self.dim, self.hidden) if memory is None else memory


def give_form(model: LMModel, form: dict[str, Any]) -> None:
    """Turn every TTT layer of `model` into a `FormGating`; nothing for no form."""
    for gating in moshi_patch.ttt_gatings(model).values() if form else ():
        gating.__class__ = FormGating
        gating.form, gating.progress = form, math.inf
        gating.form_weights = FormWeights(form, gating.dim)


def set_progress(model: LMModel, steps: float) -> None:
    """Tell the forms how many training steps are done."""
    for gating in moshi_patch.ttt_gatings(model).values():
        if isinstance(gating, FormGating):
            gating.progress = steps
