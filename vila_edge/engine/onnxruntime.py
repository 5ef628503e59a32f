"""The engine on onnxruntime: the default wherever there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from vila_edge import architecture, bindings
from vila_edge.bundle import EMBED_TOKENS_FILE, GRAPHS, Bundle
from vila_edge.caches import PREFILL_CHUNK, check_capacity, check_ids, check_room, kept_length, kept_positions
from vila_edge.cores import usable_cores
from vila_edge.engine.onnxruntime_session import (
    DIALECT,
    DecoderPart,
    Device,
    check_cuda,
    check_int8_cache,
    giving_back,
    load_decoder,
    load_graph,
)
from vila_edge.errors import BundleError
from vila_edge.stored import StoredParameters
from vila_edge.tensorfile import TensorFile

FloatArray = NDArray[np.float32]


class OnnxruntimeCache:
    """One buffer [1, H_kv, capacity, dim] for the keys and one for the values of each layer, used in place."""

    def __init__(
        self, layout: Sequence[bindings.Binding], capacity: int, device: Device, decoder: Sequence[DecoderPart]
    ) -> None:
        self.capacity = capacity
        self.length = 0
        self.buffers = {
            binding.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros(binding.sized(capacity=capacity), binding.dtype), device
            )
            for binding in layout
        }
        # Bound once: of a small model's token that took longer than its products.
        self.bindings = [self._bound(part) for part in decoder]

    def _bound(self, part: DecoderPart) -> Any:
        """A binding in which new keys and values go into the buffer that the old ones came from."""
        binding = part.session.io_binding()
        for name in part.caches:
            binding.bind_ortvalue_input(f"past_{name}", self.buffers[name])
            binding.bind_ortvalue_output(f"present_{name}", self.buffers[name])
        return binding

    def truncate(self, length: int) -> None:
        self.length = kept_length(length, self.length)


class OnnxruntimeEngine:
    """Runs the `onnxruntime` graphs of a bundle, on the CPU or on an NVIDIA GPU."""

    prefill_chunk = PREFILL_CHUNK

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        kv_cache: bindings.CacheType = "float32",
        device: Device = "cpu",
        parts: int | None = None,
        profile: Path | None = None,
    ) -> None:
        """`kv_cache`: float32 or int8 on the CPU, float16 (with the decoder's activations) on the GPU.

        `parts` of the decoder that are loaded side by side, by default as many as help; `profile`: a folder for
        onnxruntime's profiles of them.

        Raises BundleError if a graph is missing or would read outside of the bundle, BackendError if one does not
        load, or if this onnxruntime has no CUDA.
        """
        self.cfg, self.kv_cache, self.device = bundle.config, kv_cache, device
        self.threads = threads or usable_cores()
        if device == "cuda":
            check_cuda()
        if kv_cache == "int8":
            check_int8_cache()
        decoder = "decoder" if kv_cache == "float32" else f"decoder_{kv_cache}"
        if f"{GRAPHS}/{DIALECT}/{decoder}.onnx" not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.path} has no graph of a decoder with a kv_cache in {kv_cache}",
                "export the checkpoint again with this version of vila-edge, or take --backend onnxruntime with a kv_cache "
                "in float32",
            )
        self._vision_tower = load_graph(bundle, "vision_tower", self.threads, device)
        self._mm_projector = load_graph(bundle, "mm_projector", self.threads, device)
        self._decoder = load_decoder(bundle, decoder, self.threads, device, parts, profile)
        self._activations = next(b.dtype for b in bindings.decoder(self.cfg, kv_cache).inputs)
        self._embed_tokens = StoredParameters([TensorFile(bundle.file(EMBED_TOKENS_FILE), keep_mapped=True)])
        self._giving_back = giving_back(device)

    def end_profiles(self) -> list[Path]:
        """The files of a decoder that was loaded with `profile`, complete from now on."""
        return [Path(part.session.end_profiling()) for part in self._decoder]

    @property
    def backend(self) -> str:
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        place = f"CPU, {threads}" if self.device == "cpu" else "CUDA"
        return f"onnxruntime {ort.__version__}, {place}" + (", int8 kv_cache" if self.kv_cache == "int8" else "")

    @property
    def max_context(self) -> int:
        return self.cfg.llm.context_length

    def encode_images(self, pixel_values: FloatArray) -> FloatArray:
        found: FloatArray
        (found,) = self._vision_tower.run(None, {bindings.PIXEL_VALUES: pixel_values}, self._giving_back)
        return found

    def project(self, image_features: FloatArray) -> FloatArray:
        found: FloatArray
        (found,) = self._mm_projector.run(None, {bindings.IMAGE_FEATURES: image_features}, self._giving_back)
        return found

    def embed_tokens(self, input_ids: Sequence[int]) -> FloatArray:
        table = (self.cfg.llm.vocab_size, self.cfg.llm.hidden_size)
        return self._embed_tokens.float32(f"{architecture.EMBED_TOKENS}.weight", table, check_ids(input_ids, table[0]))

    def new_cache(self, capacity: int) -> OnnxruntimeCache:
        """Raises UsageError if the model has fewer positions."""
        check_capacity(capacity, self.max_context)
        return OnnxruntimeCache(bindings.kv_cache(self.cfg, self.kv_cache), capacity, self.device, self._decoder)

    def forward(
        self, inputs_embeds: FloatArray, cache: OnnxruntimeCache, logits_to_keep: Sequence[int] = (-1,)
    ) -> FloatArray:
        """Raises ContextError if the cache has no room for the new positions, UsageError for logits of no position."""
        new = len(inputs_embeds)
        kept = kept_positions(logits_to_keep, new)
        total = check_room(cache.length, new, cache.capacity)
        numbers = {
            bindings.LAST_POSITION: np.asarray([total - 1], np.int32),
            bindings.TOTAL_LENGTH: np.asarray(total, np.int32),
            bindings.LOGITS_TO_KEEP: np.asarray(kept, np.int64),
        }
        hidden = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(inputs_embeds[None], self._activations))
        for part, binding in zip(self._decoder, cache.bindings, strict=True):
            binding.bind_ortvalue_input(part.hidden_in, hidden)
            for name in part.inputs & numbers.keys():
                binding.bind_cpu_input(name, numbers[name])
            if part is self._decoder[-1]:
                hidden = _empty((1, len(kept), self.cfg.llm.vocab_size), np.float32)
            else:
                hidden = _empty((1, new, self.cfg.llm.hidden_size), self._activations)
            binding.bind_ortvalue_output(part.hidden_out, hidden)
            part.session.run_with_iobinding(binding, self._giving_back if new > 1 else None)
        cache.length = total
        logits: FloatArray = hidden.numpy()[0]
        return logits


def _empty(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Room on the CPU for what a graph gives out."""
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(dtype).type)
