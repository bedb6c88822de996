"""Streaming many steps at once through stock attention that has a sliding window, exactly.

While streaming, stock attention keeps exactly `context` keys in a ring: a segment longer than one step overwrites keys
that its own first steps still have to see. Here the ring also has room for the segment. Which of its keys a step sees,
moshi's own mask of distances decides.
"""

from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import RingKVCache


class FullWindow:
    """The key caches of a module that has begun to stream and has heard nothing yet.

    Args:
        module: inside `module.streaming(...)`.
        prefix: of the names of those submodules whose attention is meant; all by default.
    """

    def __init__(self, module: StreamingModule, prefix: str = ""):
        states = module.get_streaming_state().items()
        caches = [getattr(state, "kv_cache", None) for name, state in states if name.startswith(prefix)]
        self._caches: list[RingKVCache] = [cache for cache in caches if cache is not None]
        self._contexts = [cache.capacity for cache in self._caches]
        self._heard = 0

    def make_room(self, end: int) -> None:
        """Before a segment up to step `end`: what its first step sees stays until its last step is done.

        Only the first segments enlarge a cache, before it has turned round; segments must not grow afterwards.
        """
        for cache, context in zip(self._caches, self._contexts, strict=True):
            capacity = min(end, context - 1 + end - self._heard)
            if self._heard == 0 or capacity > cache.capacity:
                kept = cache.cache[:, :, :, : self._heard]
                cache.cache = kept.new_zeros(*kept.shape[:3], capacity, kept.shape[4])
                cache.cache[:, :, :, : self._heard] = kept
                cache.capacity = capacity
        self._heard = end
