"""What is kept between replies: image embeddings by content, and the kv_cache of a conversation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.errors import ContextError

PREFILL_CHUNK = 256  # positions per call of a long prefill on a CPU: more take more memory, and are no faster

FloatArray = NDArray[np.float32]


class ImageCache:
    """Image digest -> image_embeds [T, D], the least recently used given up first."""

    def __init__(self, budget: int = 64 << 20) -> None:
        """`budget` in bytes; one image is kept whatever its size."""
        self.budget = budget
        self._entries: OrderedDict[str, FloatArray] = OrderedDict()

    def get(self, digest: str) -> FloatArray | None:
        if digest in self._entries:
            self._entries.move_to_end(digest)
        return self._entries.get(digest)

    def put(self, digest: str, image_embeds: FloatArray) -> None:
        self._entries[digest] = image_embeds
        while len(self._entries) > 1 and sum(e.nbytes for e in self._entries.values()) > self.budget:
            self._entries.popitem(last=False)


class Prefix:
    """The kv_cache of one conversation, and what stands at each of its positions.

    A key is a token id, or (image digest, place within the image). A new prompt that starts the same needs
    only its rest computed.
    """

    def __init__(self, cache: Any) -> None:
        """`cache` is an empty KVCache of the engine that will use it."""
        self.cache = cache
        self.keys: list[Hashable] = []

    def reuse(self, keys: Sequence[Hashable]) -> int:
        """Keep what the cache has in common with `keys`, and say how many positions that is.

        At least the last position is left to compute: its logits are wanted.
        """
        known = min(len(self.keys), self.cache.length, len(keys) - 1)
        common = next((i for i in range(known) if self.keys[i] != keys[i]), known)
        self.cache.truncate(common)
        del self.keys[common:]
        return common


def check_room(length: int, new: int, capacity: int) -> int:
    """How many positions a kv_cache has in use once `new` ones are behind its `length`. Raises ContextError."""
    total = length + new
    if total > capacity:
        raise ContextError(f"{total} positions do not fit into a kv_cache of {capacity}")
    return total
