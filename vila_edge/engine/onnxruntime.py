"""The engine on onnxruntime: the default wherever there is no GPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from vila_edge import architecture, bindings, fsio
from vila_edge.bundle import EMBED_TOKENS_FILE, GRAPHS, WEIGHTS, Bundle
from vila_edge.caches import check_room
from vila_edge.engine.onnx_file import check_external_data
from vila_edge.errors import BackendError, BundleError
from vila_edge.stored import StoredParameters
from vila_edge.tensorfile import TensorFile

DIALECT = "onnxruntime"
GRAPH_SIZE_LIMIT = 64 << 20  # a graph is thin: its weights lie elsewhere

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"

FloatArray = NDArray[np.float32]
Device = Literal["cpu", "cuda"]


class OnnxruntimeCache:
    """One buffer [1, H_kv, capacity, dim] for the keys and one for the values of each layer, used in place."""

    def __init__(self, layout: Sequence[bindings.Binding], capacity: int, device: Device) -> None:
        self.capacity = capacity
        self.length = 0
        self.buffers = {
            binding.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros(binding.sized(capacity=capacity), binding.dtype), device
            )
            for binding in layout
        }

    def truncate(self, length: int) -> None:
        self.length = min(length, self.length)


class OnnxruntimeEngine:
    """Runs the `onnxruntime` graphs of a bundle, on the CPU or on an NVIDIA GPU."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        kv_cache: bindings.CacheType = "float32",
        device: Device = "cpu",
    ) -> None:
        """`kv_cache`: float32 or int8 on the CPU, float16 (with the decoder's activations) on the GPU.

        Raises BundleError if a graph is missing or would read outside of the bundle, BackendError if one does not
        load, or if this onnxruntime has no CUDA.
        """
        self.cfg, self.kv_cache, self.device = bundle.config, kv_cache, device
        self.threads = threads or usable_cores()
        if device == "cuda":
            check_cuda()
        decoder = "decoder" if kv_cache == "float32" else f"decoder_{kv_cache}"
        if f"{GRAPHS}/{DIALECT}/{decoder}.onnx" not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.path} has no graph of a decoder with a kv_cache in {kv_cache}",
                "export the checkpoint again with this version of vila-edge, or take --backend onnxruntime as it is",
            )
        self._vision_tower = _session(bundle, "vision_tower", self.threads, device)
        self._mm_projector = _session(bundle, "mm_projector", self.threads, device)
        self._decoder = _session(bundle, decoder, self.threads, device)
        self._activations = next(b.dtype for b in bindings.decoder(self.cfg, kv_cache).inputs)
        self._embed_tokens = StoredParameters([TensorFile(bundle.file(EMBED_TOKENS_FILE))])

    @property
    def backend(self) -> str:
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        place = f"CPU, {threads}" if self.device == "cpu" else "CUDA"
        return f"onnxruntime {ort.__version__}, {place}" + (", int8 kv_cache" if self.kv_cache == "int8" else "")

    @property
    def max_context(self) -> int:
        return self.cfg.llm.context_length

    def encode_images(self, pixel_values: FloatArray) -> FloatArray:
        found: FloatArray = self._vision_tower.run(None, {bindings.PIXEL_VALUES: pixel_values})[0]
        return found

    def project(self, image_features: FloatArray) -> FloatArray:
        found: FloatArray = self._mm_projector.run(None, {bindings.IMAGE_FEATURES: image_features})[0]
        return found

    def embed_tokens(self, input_ids: Sequence[int]) -> FloatArray:
        table = (self.cfg.llm.vocab_size, self.cfg.llm.hidden_size)
        return self._embed_tokens.float32(f"{architecture.EMBED_TOKENS}.weight", table, np.asarray(input_ids, np.int64))

    def new_cache(self, capacity: int) -> OnnxruntimeCache:
        return OnnxruntimeCache(bindings.kv_cache(self.cfg, self.kv_cache), capacity, self.device)

    def forward(
        self, inputs_embeds: FloatArray, cache: OnnxruntimeCache, logits_to_keep: Sequence[int] = (-1,)
    ) -> FloatArray:
        """Raises ContextError if the cache has no room for the new positions."""
        new = len(inputs_embeds)
        total = check_room(cache.length, new, cache.capacity)
        kept = np.asarray([position % new for position in logits_to_keep], np.int64)
        binding = self._decoder.io_binding()
        binding.bind_cpu_input(bindings.INPUTS_EMBEDS, np.ascontiguousarray(inputs_embeds[None], self._activations))
        binding.bind_cpu_input(bindings.LAST_POSITION, np.asarray([total - 1], np.int32))
        binding.bind_cpu_input(bindings.TOTAL_LENGTH, np.asarray(total, np.int32))
        binding.bind_cpu_input(bindings.LOGITS_TO_KEEP, kept)
        binding.bind_output(bindings.LOGITS)
        for name, buffer in cache.buffers.items():  # the new keys and values go into the buffer they came from
            binding.bind_ortvalue_input(f"past_{name}", buffer)
            binding.bind_ortvalue_output(f"present_{name}", buffer)
        self._decoder.run_with_iobinding(binding)
        cache.length = total
        logits: FloatArray = binding.get_outputs()[0].numpy()[0]
        return logits


def usable_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_cuda() -> None:
    """Raises BackendError if this onnxruntime was built without its CUDA provider."""
    found = ort.get_available_providers()
    if CUDA_PROVIDER not in found:
        raise BackendError(
            f"onnxruntime {ort.__version__} has no {CUDA_PROVIDER}, only {', '.join(found)}",
            "pip uninstall onnxruntime && pip install onnxruntime-gpu (on a Jetson, NVIDIA's own wheel of it), or take "
            "--backend onnxruntime for the CPU",
        )


def _session(bundle: Bundle, graph: str, threads: int, device: Device) -> Any:
    """One graph of a bundle, after a look at what it would read."""
    path = bundle.file(f"{GRAPHS}/{DIALECT}/{graph}.onnx")
    data = fsio.read_bytes(path, GRAPH_SIZE_LIMIT)
    weights = (bundle.path / WEIGHTS).resolve()
    check_external_data(data, weights, path)
    return session(data, weights, path, threads, device=device)


def session(graph: bytes, weights: Path, source: Path, threads: int, arena: bool = True, device: Device = "cpu") -> Any:
    """A serialised graph, loaded: onnxruntime is told the folder of the weights and opens no other path.

    Without an `arena` it gives back what it does not need, and is slower.
    Raises BackendError that names `source` if it does not load, or not on the `device`.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = arena
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    try:
        loaded = ort.InferenceSession(graph, options, providers=[CUDA_PROVIDER] if device == "cuda" else [CPU_PROVIDER])
    except Exception as error:  # onnxruntime's own exceptions have no common base but this
        reason = str(error).replace(str(Path.cwd()), ".").strip().splitlines()[0]
        raise BackendError(
            f"onnxruntime {ort.__version__} cannot load {source}: {reason}", "vila-edge needs onnxruntime 1.23 or newer"
        ) from None
    if device == "cuda" and CUDA_PROVIDER not in loaded.get_providers():  # onnxruntime goes on without it
        raise BackendError(
            f"onnxruntime {ort.__version__} cannot start its {CUDA_PROVIDER} for {source}",
            "its CUDA and cuDNN must be installed: pip install 'onnxruntime-gpu[cuda,cudnn]'; or take --backend onnxruntime",
        )
    _trim_heap()
    return loaded


def _trim_heap() -> None:
    """Give the copies that loading made back to the system: glibc alone keeps what was allocated in small pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # another C library keeps less
        trim(0)
