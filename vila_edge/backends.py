"""Which engine runs a bundle: chosen by name, made here, and never another one in its place."""

from __future__ import annotations

from vila_edge.bindings import CacheType
from vila_edge.bundle import Bundle
from vila_edge.cores import usable_cores
from vila_edge.engine.protocol import Engine
from vila_edge.engine.tensorrt_options import PROJECTOR_CHOICES, RUNTIMES, TOWER_CHOICES, RuntimeChoice
from vila_edge.errors import UsageError
from vila_edge.kernels.attention import KvCache
from vila_edge.reference.engine import bundle_parameters, numpy_engine

CUDA = "cuda"  # our own kernels
BACKENDS = ("auto", "onnxruntime", "onnxruntime-cuda", *RUNTIMES, CUDA, "numpy")
THREADS_PER_CORE = 8  # at most: onnxruntime starts as many as it is told, and waits busily in each
KV_CACHES: tuple[CacheType, ...] = ("float32", "int8")  # that a user may ask for; float32 is float16 on a GPU


def open_engine(
    bundle: Bundle,
    backend: str = "auto",
    threads: int | None = None,
    kv_cache: str = "float32",
    context: int = 0,
    projector: str = "engine",
    tower: str = "auto",
) -> Engine:
    """The engine of that name. `auto` takes onnxruntime on the CPU, `tensorrt` whichever of the two TensorRTs is there.

    `threads` of the CPU, by default as many as the process may use; `kv_cache`: what onnxruntime, or our own kernels,
    keep it in; `context`: positions that a TensorRT engine must have been built for, by default as many as the last one,
    or that a kv_cache of our own kernels has at most, by default all of the model's;
    `projector`: beside TensorRT our own kernels can compute it, as `kernel`, in place of its engine; `tower`: who runs the
    vision tower beside our own kernels, tensorrt or onnxruntime; auto: the first of them that can.
    Raises UsageError, BackendError if the backend is not there or cannot run here, BundleError.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}", f"known backends: {', '.join(BACKENDS)}")
    if kv_cache not in KV_CACHES:
        raise UsageError(f"unknown type of kv_cache {kv_cache!r}", f"known types: {', '.join(KV_CACHES)}")
    if kv_cache != "float32" and backend not in ("auto", "onnxruntime", CUDA):
        remedy = f"take --backend {CUDA if backend in ('onnxruntime-cuda', *RUNTIMES) else 'onnxruntime'} for it"
        raise UsageError(f"a kv_cache in {kv_cache} is not there on {backend}", remedy)
    _check_threads(threads)
    if projector not in PROJECTOR_CHOICES:
        raise UsageError(f"unknown projector {projector!r}", f"known are: {', '.join(PROJECTOR_CHOICES)}")
    if projector != "engine" and backend not in (*RUNTIMES, CUDA):  # the projector of `cuda` is a kernel anyway
        raise UsageError(
            f"--projector {projector} is not there on --backend {backend}", "take --backend tensorrt for it"
        )
    if tower not in TOWER_CHOICES:
        raise UsageError(f"unknown tower {tower!r}", f"known are: {', '.join(TOWER_CHOICES)}")
    if tower != "auto" and backend != CUDA:
        raise UsageError(f"--tower {tower} is not there on --backend {backend}", f"take --backend {CUDA} for it")
    if backend == "numpy":
        return numpy_engine(bundle.config, bundle_parameters(bundle))
    if backend in RUNTIMES:
        from vila_edge.engine.tensorrt import TensorrtEngine

        chosen = PROJECTOR_CHOICES[PROJECTOR_CHOICES.index(projector)]
        runtime: RuntimeChoice = "auto" if backend == "tensorrt" else "tensorrt_rtx"
        return TensorrtEngine(bundle, runtime, context=context, projector=chosen)
    if backend == CUDA:
        from vila_edge.engine.cuda.engine import CudaEngine

        kept: KvCache = "int8" if kv_cache == "int8" else "float16"
        return CudaEngine(bundle, kept, context, TOWER_CHOICES[TOWER_CHOICES.index(tower)], threads)
    from vila_edge.engine.onnxruntime import OnnxruntimeEngine

    if backend == "onnxruntime-cuda":
        return OnnxruntimeEngine(bundle, threads, "float16", "cuda")
    return OnnxruntimeEngine(bundle, threads, KV_CACHES[KV_CACHES.index(kv_cache)])


def _check_threads(threads: int | None) -> None:
    """Raises UsageError if there are none, or far more than cores."""
    cores = usable_cores()
    if threads is not None and not 1 <= threads <= THREADS_PER_CORE * cores:
        raise UsageError(
            f"{threads:,} threads: expected 1 to {THREADS_PER_CORE * cores}, this process may use {cores} cores",
            f"take --threads {cores}, or leave it out",
        )


def reason(backend: str) -> str:
    """Why an engine was taken, for people."""
    if backend != "auto":
        return "as asked for"
    return "auto: the others were not run on a GPU yet, and are taken when --backend names them"
