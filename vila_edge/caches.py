"""What is kept between replies: image embeddings by content, and the kv_cache of a conversation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.errors import ContextError, UsageError

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


def check_capacity(capacity: int, max_context: int) -> int:
    """The capacity of a kv_cache that is to be made. Raises UsageError if the engine has none of that size."""
    if not 1 <= capacity <= max_context:
        raise UsageError(f"a kv_cache of {capacity:,} positions: this engine has 1 to {max_context:,}")
    return capacity


def check_room(length: int, new: int, capacity: int) -> int:
    """How many positions a kv_cache has in use once `new` ones are behind its `length`. Raises ContextError."""
    total = length + new
    if total > capacity:
        raise ContextError(f"{total} positions do not fit into a kv_cache of {capacity}")
    return total


def kept_length(length: int, in_use: int) -> int:
    """Positions that a kv_cache has in use once it forgot those from `length` on. Raises UsageError below 0."""
    if length < 0:
        raise UsageError(f"a kv_cache cannot be cut to {length} positions: expected 0 or more")
    return min(length, in_use)


def kept_positions(logits_to_keep: Sequence[int], new: int) -> list[int]:
    """`logits_to_keep` counted from the first of `new` positions. Raises UsageError for one that is not there."""
    if new < 1:
        raise UsageError("there are no positions to compute: expected inputs_embeds [S, D] with S of 1 or more")
    for position in logits_to_keep:
        if not -new <= position < new:
            raise UsageError(
                f"logits of position {position}: there are {new} new ones, so expected {-new} to {new - 1}"
            )
    return [int(position) % new for position in logits_to_keep]


def check_ids(input_ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    """Token ids as an array. Raises UsageError that names the first one that the embedding table has no row for."""
    ids = np.asarray(input_ids, np.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise UsageError(f"token id {outside[0]}: this model has 0 to {vocab_size - 1:,}")
    return ids
