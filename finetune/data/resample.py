"""Changes the rate of samples without moving them in time.

Shapes: `C` channels, `S` samples.
"""

import functools
import math

import numpy as np
import sphn


def is_enough(samples: int, rate: int, target_rate: int) -> bool:
    """Whether something is left of so many samples at `target_rate`.

    One is none: it is what is read from the end of a file on, the start being rounded down to the last sample.
    """
    return samples > 1 and round(samples * target_rate / rate) > 0


def resample(pcm: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """`[C, S]` at `rate` as `[C, S * target_rate / rate]`, in time with the original.

    `sphn.resample` answers late, by 32 ms from 16 to 24 kHz; here the delay is cut off and the tail kept.
    """
    if rate == target_rate:
        return pcm
    delay = _resampling_delay(rate, target_rate)
    tail = np.zeros((pcm.shape[0], math.ceil(delay * rate / target_rate) + 1), dtype=pcm.dtype)
    late = sphn.resample(np.concatenate([pcm, tail], axis=1), rate, target_rate)
    return np.ascontiguousarray(late[:, delay : delay + round(pcm.shape[1] * target_rate / rate)])


@functools.lru_cache
def _resampling_delay(rate: int, target_rate: int) -> int:
    """Samples by which `sphn.resample` delays an impulse."""
    impulse = np.zeros((1, 2 * rate), dtype=np.float32)
    impulse[0, rate] = 1
    return int(np.abs(sphn.resample(impulse, rate, target_rate)[0]).argmax()) - target_rate
