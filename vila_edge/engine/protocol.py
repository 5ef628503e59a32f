"""What an engine can do. The pipeline, the session and the tests know no more than this."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vila_edge.sampler import Sampling

FloatArray = NDArray[np.float32]


class KVCache(Protocol):
    """Keys and values of the positions that a sequence has so far."""

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        ...

    @property
    def length(self) -> int:
        """Positions that are in use, `past_len` of the next call."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. Raises UsageError below 0."""
        ...


class Embedder(Protocol):
    """The part of an engine that looks tokens up."""

    def embed_tokens(self, input_ids: Sequence[int]) -> FloatArray:
        """input_ids [S] to inputs_embeds [S, D]. Raises UsageError for an id that the model does not have."""
        ...


class Encoder(Embedder, Protocol):
    """The part of an engine that turns images and tokens into positions of a sequence. Arrays are float32."""

    def encode_images(self, pixel_values: FloatArray) -> FloatArray:
        """pixel_values [N, 3, H, W] to image_features [N, P, D_vision]."""
        ...

    def project(self, image_features: FloatArray) -> FloatArray:
        """image_features [N, P, D_vision] to image_embeds [N, T, D]."""
        ...


class Engine(Encoder, Protocol):
    """Runs one model; one sequence at a time."""

    @property
    def backend(self) -> str:
        """What runs, for people: name, version, device and threads."""
        ...

    @property
    def max_context(self) -> int:
        """Positions of the longest kv_cache that it can make."""
        ...

    @property
    def prefill_chunk(self) -> int:
        """Positions of a long prefill that belong into one call: more would gain nothing, and may be cut up inside."""
        ...

    def new_cache(self, capacity: int) -> Any:
        """An empty KVCache of this engine's own kind. Raises UsageError below 1 or above `max_context`."""
        ...

    def forward(self, inputs_embeds: FloatArray, cache: Any, logits_to_keep: Sequence[int] = (-1,)) -> FloatArray:
        """Put inputs_embeds [S, D] behind what `cache` holds; logits [kept, V] of the positions asked for.

        Prefill and decode are this one call with S > 1 and S = 1. `logits_to_keep` counts within the new
        positions, negative from their end. Raises ContextError if the cache has no room for the new positions,
        UsageError if there are none, or if logits of another are asked for.
        """
        ...


@runtime_checkable
class Generating(Protocol):
    """What an engine can do that samples by itself: tokens come without their logits, and without waiting for the host."""

    def generate(
        self, token: int, cache: Any, sampling: Sampling, seed: int, stops: Sequence[int] = ()
    ) -> Generator[int, None, None]:
        """Put `token` behind what `cache` holds and yield the next one, again and again.

        It ends behind one of `stops`, or when the cache is full; whoever wants less takes no more. Whenever it yields,
        the cache holds all tokens but the one that was yielded. At temperature 0 tokens are those that `forward` and a
        `Sampler` give; else they are drawn by a generator of the engine's own, from `seed` and the position.
        Raises VilaEdgeError if the logits are not finite.
        """
        ...
