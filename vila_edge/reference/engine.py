"""An engine on a reference interpreter: slow, exact, and the same protocol as the fast ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge import architecture
from vila_edge.bundle import WEIGHTS, Bundle
from vila_edge.caches import PREFILL_CHUNK, check_capacity, check_ids, check_room, kept_length, kept_positions
from vila_edge.config import VilaConfig
from vila_edge.parameters import parameter_shapes
from vila_edge.reference.numpy_ops import NumpyOps
from vila_edge.stored import StoredParameters
from vila_edge.tensorfile import TensorFile

FloatArray = NDArray[np.float32]


class ReferenceCache:
    """Layer -> keys and values [1, H_kv, length, dim], as the interpreters keep them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.layers: dict[int, tuple[Any, Any]] = {}

    @property
    def length(self) -> int:
        return int(self.layers[0][0].shape[2]) if self.layers else 0

    def truncate(self, length: int) -> None:
        length = kept_length(length, self.length)
        if length == 0:
            self.layers.clear()
        for layer, (k, v) in self.layers.items():
            self.layers[layer] = (k[:, :, :length], v[:, :, :length])


class ReferenceEngine:
    """Runs the architecture itself. `make_ops` binds parameters and a cache to an interpreter."""

    prefill_chunk = PREFILL_CHUNK

    def __init__(
        self,
        cfg: VilaConfig,
        backend: str,
        make_ops: Callable[[dict[int, Any]], Any],
        from_numpy: Callable[[NDArray[Any]], Any] = lambda array: array,
        to_numpy: Callable[[Any], FloatArray] = lambda array: array,
    ) -> None:
        self.cfg, self.backend = cfg, backend
        self._make_ops, self._from, self._to = make_ops, from_numpy, to_numpy

    @property
    def max_context(self) -> int:
        return self.cfg.llm.context_length

    def encode_images(self, pixel_values: FloatArray) -> FloatArray:
        ops = self._make_ops({})
        return self._to(architecture.vision_tower(ops, self._from(pixel_values), self.cfg.vision_tower))

    def project(self, image_features: FloatArray) -> FloatArray:
        return self._to(architecture.mm_projector(self._make_ops({}), self._from(image_features), self.cfg))

    def embed_tokens(self, input_ids: Sequence[int]) -> FloatArray:
        ids = self._from(check_ids(input_ids, self.cfg.llm.vocab_size)[None])
        return self._to(architecture.embed_tokens(self._make_ops({}), ids, self.cfg.llm))[0]

    def new_cache(self, capacity: int) -> ReferenceCache:
        """Raises UsageError if the model has fewer positions."""
        return ReferenceCache(check_capacity(capacity, self.max_context))

    def forward(
        self, inputs_embeds: FloatArray, cache: ReferenceCache, logits_to_keep: Sequence[int] = (-1,)
    ) -> FloatArray:
        """Raises ContextError if the cache has no room for the new positions, UsageError for logits of no position."""
        wanted = kept_positions(logits_to_keep, len(inputs_embeds))
        check_room(cache.length, len(inputs_embeds), cache.capacity)
        ops = self._make_ops(cache.layers)
        hidden_states = architecture.decoder(ops, self._from(inputs_embeds[None]), self.cfg.llm)
        kept = hidden_states[:, wanted]
        return self._to(architecture.lm_head(ops, kept, self.cfg.llm))[0]


def numpy_engine(cfg: VilaConfig, params: Mapping[str, NDArray[Any]]) -> ReferenceEngine:
    return ReferenceEngine(cfg, "numpy (reference)", lambda cache: NumpyOps(params, cache))


def bundle_parameters(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """Every parameter of a bundle as the float32 array that it stands for."""
    stored = StoredParameters(
        TensorFile(bundle.file(name)) for name in bundle.manifest.files if name.startswith(f"{WEIGHTS}/")
    )
    return {name: stored.float32(name, shape) for name, shape in parameter_shapes(bundle.config).items()}
