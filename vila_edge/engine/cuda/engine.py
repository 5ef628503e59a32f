"""The engine on our own kernels: no TensorRT for the LLM, and no work of the host in a token."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vila_edge.bundle import Bundle
from vila_edge.engine.cuda import open_device
from vila_edge.engine.cuda.decode_loop import DecodeLoop, Running
from vila_edge.engine.cuda.decoder import Decoder
from vila_edge.engine.cuda.device import Device
from vila_edge.engine.cuda.device_engine import DeviceEngine, settled
from vila_edge.engine.cuda.kernels import Find, Kernels
from vila_edge.engine.cuda.kv_cache import CudaCache
from vila_edge.engine.cuda.packed_weights import PackedWeights
from vila_edge.engine.cuda.projector import KernelProjector
from vila_edge.engine.cuda.tower import Tower, open_tower
from vila_edge.engine.tensorrt_options import TowerChoice
from vila_edge.kernels import store
from vila_edge.kernels.attention import KvCache
from vila_edge.sampler import Sampling

FloatArray = NDArray[np.float32]

IMAGES = 16  # that the projector takes at once


class CudaEngine(DeviceEngine):
    """Runs a bundle's model with float16 activations on a GPU. `close` gives the GPU's memory back."""

    def __init__(
        self,
        bundle: Bundle,
        kv_cache: KvCache = "float16",
        context: int = 0,
        tower: TowerChoice = "auto",
        threads: int | None = None,
        device: Device | None = None,
        find_kernels: Find = store.find,
        packed: Path | None = None,
    ) -> None:
        """`context`: positions of the longest kv_cache, by default all that the model has; `tower`: who runs the
        vision tower, on `threads` if that is the CPU; `packed`: a folder for packed weights, by default in the user's cache.

        Raises BackendError if the GPU, PyCUDA, code or memory is missing, or the kernels cannot compute this bundle.
        """
        with contextlib.ExitStack() as resources:  # given back in reverse order, and at once if something fails here
            if device is None:
                device = open_device()
                resources.callback(device.close)
            stream = device.stream()
            resources.callback(stream.free)
            self._kernels = kernels = Kernels(device, find_kernels)
            resources.callback(kernels.free)
            self._weights = PackedWeights(bundle, packed)
            longest = context or bundle.config.llm.context_length
            with device.current(), settled(stream):
                self._decoder = Decoder(self._weights, device, stream, kernels, resources, longest, kv_cache)
            self._kv_cache = kv_cache
            self._mm_projector = KernelProjector(bundle, device, stream, kernels, IMAGES)
            resources.callback(self._mm_projector.free)
            self._tower: Tower = open_tower(bundle, tower, threads, device, stream, resources)
            self._own(bundle, device, stream, resources)

    @property
    def backend(self) -> str:
        major, minor = self._device.compute_capability
        origins = sorted({image.origin for image in self._kernels.images.values()})
        cache = "" if self._kv_cache == "float16" else f"{self._kv_cache} kv_cache, "
        return (
            f"our kernels ({' and '.join(origins)}), {self._device.name} sm_{major}{minor}, {cache}"
            f"vision tower in {self._tower.name}; {self._weights.origin}"
        )

    @property
    def max_context(self) -> int:
        return self._decoder.context

    @property
    def prefill_chunk(self) -> int:
        return self._decoder.chunk

    @property
    def launches_per_token(self) -> int:
        """Kernels in the CUDA graph of a step, as the last one was captured."""
        return self._decoder.launches_per_token

    def encode_images(self, pixel_values: FloatArray) -> FloatArray:
        with self._at_work():
            return self._tower(pixel_values)

    def project(self, image_features: FloatArray) -> FloatArray:
        with self._at_work():
            return self._mm_projector(image_features)

    def new_cache(self, capacity: int) -> CudaCache:
        """Raises UsageError if the engine has none of that size, BackendError if the GPU has no more memory."""
        with self._at_work():
            return self._decoder.new_cache(capacity)

    def forward(self, inputs_embeds: FloatArray, cache: CudaCache, logits_to_keep: Sequence[int] = (-1,)) -> FloatArray:
        """Raises ContextError if the cache has no room for the new positions, UsageError for logits of no position."""
        with self._at_work():
            return self._decoder.forward(inputs_embeds, cache, logits_to_keep)

    def generate(
        self, token: int, cache: CudaCache, sampling: Sampling, seed: int, stops: Sequence[int] = ()
    ) -> Generator[int, None, None]:
        """As in `protocol.Generating`: what comes behind `token`, sampled on the GPU."""
        sequence = Running(cache, token, sampling, seed, stops)
        for (found,) in self.generate_together([sequence]):
            if found is not None:
                yield found

    def generate_together(self, sequences: Sequence[Running]) -> Iterator[list[int | None]]:
        """Up to 8 sequences, a token of each at a time: see `DecodeLoop`."""
        steps = iter(DecodeLoop(self._decoder, self._device, self._stream, sequences))
        while True:
            with self._at_work():
                tokens = next(steps, None)
            if tokens is None:
                return
            yield tokens
