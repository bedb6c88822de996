"""Mimi's codes of recordings of any length, in bounded memory.

Shapes: `B` channels, `S` samples, `K` codebooks, `T` steps.
"""

from typing import Any

import numpy as np
import torch
from moshi.utils.compile import no_cuda_graph

from ..common.errors import ConfigError
from ..common.sliding_window import FullWindow

BLOCK_STEPS = 1250
"""Longer recordings are encoded in blocks of so many steps (100 s)."""


def check_codebooks(mimi: Any, n_q: int, dep_q: int) -> None:
    """That `mimi` has the `dep_q` codebooks of Moshi's channel and the `n_q - dep_q` of the user's.

    Raises:
        ConfigError: when it has not.
    """
    needed = max(dep_q, n_q - dep_q)
    if mimi.num_codebooks < needed:
        raise ConfigError(f"mimi.num_codebooks={mimi.num_codebooks}: at least {needed} are needed.")


def encode_channels(mimi: Any, pcm: np.ndarray, n_q: int, dep_q: int) -> torch.Tensor:
    """Codes `[n_q, T]` int64 on the CPU of `pcm [2, S]`: Moshi's first `dep_q` codebooks, then the user's others."""
    device = next(mimi.parameters()).device
    moshi, user = encode(mimi, torch.from_numpy(pcm).to(device)[:, None]).cpu()
    return torch.cat([moshi[:dep_q], user[: n_q - dep_q]])


@torch.no_grad()
def encode(mimi: Any, pcm: torch.Tensor, block_steps: int = BLOCK_STEPS) -> torch.Tensor:
    """Codes `[B, K, T]` of `pcm [B, 1, S]` on Mimi's device: those of one `mimi.encode(pcm)`, up to rounding.

    The encoder's first convolution works on single samples: a block at a time, half an hour does not take gigabytes.
    """
    block, samples = block_steps * mimi.frame_size, pcm.shape[-1]
    if samples <= block:
        return mimi.encode(pcm)
    pcm = torch.nn.functional.pad(pcm, (0, -samples % mimi.frame_size))
    rate = round(mimi.encoder_frame_rate / mimi.frame_rate)  # the encoder's attention works before the last stride
    codes, steps = [], 0
    with no_cuda_graph(), mimi.streaming(len(pcm)):
        window = FullWindow(mimi, "encoder_transformer")
        for part in pcm.split(block, -1):
            steps += part.shape[-1] // mimi.frame_size
            window.make_room(rate * steps)
            codes.append(mimi.encode(part))
    return torch.cat(codes, -1)
