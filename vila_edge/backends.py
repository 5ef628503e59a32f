"""Which engine runs a bundle: chosen by name, made here, and never another one in its place."""

from __future__ import annotations

from vila_edge.bindings import CacheType
from vila_edge.bundle import Bundle
from vila_edge.cores import usable_cores
from vila_edge.engine.protocol import Engine
from vila_edge.engine.tensorrt_options import PROJECTOR_CHOICES, RUNTIMES, RuntimeChoice
from vila_edge.errors import UsageError
from vila_edge.reference.engine import bundle_parameters, numpy_engine

BACKENDS = ("auto", "onnxruntime", "onnxruntime-cuda", *RUNTIMES, "numpy")
THREADS_PER_CORE = 8  # at most: onnxruntime starts as many as it is told, and waits busily in each
KV_CACHES: tuple[CacheType, ...] = ("float32", "int8")  # that a user may ask for


def open_engine(
    bundle: Bundle,
    backend: str = "auto",
    threads: int | None = None,
    kv_cache: str = "float32",
    context: int = 0,
    projector: str = "engine",
) -> Engine:
    """The engine of that name. `auto` takes onnxruntime on the CPU, `tensorrt` whichever of the two TensorRTs is there.

    `threads` of the CPU, by default as many as the process may use; `kv_cache`: what onnxruntime keeps it in;
    `context`: positions that a TensorRT engine must have been built for, by default as many as the last one;
    `projector`: beside TensorRT our own kernels can compute it, as `kernel`, in place of its engine.
    Raises UsageError, BackendError if the backend is not there or cannot run here, BundleError.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}", f"known backends: {', '.join(BACKENDS)}")
    if kv_cache not in KV_CACHES:
        raise UsageError(f"unknown type of kv_cache {kv_cache!r}", f"known types: {', '.join(KV_CACHES)}")
    if kv_cache != "float32" and backend not in ("auto", "onnxruntime"):
        raise UsageError(f"a kv_cache in {kv_cache} is not there on {backend}", "take --backend onnxruntime for it")
    _check_threads(threads)
    if projector not in PROJECTOR_CHOICES:
        raise UsageError(f"unknown projector {projector!r}", f"known are: {', '.join(PROJECTOR_CHOICES)}")
    if projector != "engine" and backend not in RUNTIMES:
        raise UsageError(
            f"--projector {projector} is not there on --backend {backend}", "take --backend tensorrt for it"
        )
    if backend == "numpy":
        return numpy_engine(bundle.config, bundle_parameters(bundle))
    if backend in RUNTIMES:
        from vila_edge.engine.tensorrt import TensorrtEngine

        chosen = PROJECTOR_CHOICES[PROJECTOR_CHOICES.index(projector)]
        runtime: RuntimeChoice = "auto" if backend == "tensorrt" else "tensorrt_rtx"
        return TensorrtEngine(bundle, runtime, context=context, projector=chosen)
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
