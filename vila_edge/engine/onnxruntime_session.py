"""Sessions of onnxruntime: a graph of a bundle with its weights, ready to run."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort

from vila_edge import bindings, fsio
from vila_edge.bundle import GRAPHS, WEIGHTS, Bundle
from vila_edge.engine.graph_parts import split_decoder
from vila_edge.engine.onnx_file import check_external_data, external_data
from vila_edge.errors import BackendError, BundleError

DIALECT = "onnxruntime"
GRAPH_SIZE_LIMIT = 64 << 20  # a graph is thin: its weights lie elsewhere

# Loading packs the weights anew, on one core for each session: a decoder is loaded in parts, as large as this at least.
MOST_PARTS, PART_BYTES = 4, 256 << 20

OLDEST_INT8_CACHE = (1, 27)  # measured: 1.23 does not load such a graph, 1.25 and 1.26 load it and fail in a run

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"

PAST = "past_"

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class DecoderPart:
    """Some layers of a decoder. `hidden_in` and `hidden_out` name the hidden states that go in and come out.

    The first takes `inputs_embeds`, the last gives `logits`.
    """

    session: Any
    inputs: frozenset[str]
    caches: tuple[str, ...]  # `bindings.kv_cache`'s names of its own layers
    hidden_in: str
    hidden_out: str


def check_cuda() -> None:
    """Raises BackendError if this onnxruntime was built without its CUDA provider."""
    found = ort.get_available_providers()
    if CUDA_PROVIDER not in found:
        raise BackendError(
            f"onnxruntime {ort.__version__} has no {CUDA_PROVIDER}, only {', '.join(found)}",
            "pip uninstall onnxruntime && pip install onnxruntime-gpu (on a Jetson, NVIDIA's own wheel of it), or take "
            "--backend onnxruntime for the CPU",
        )


def check_int8_cache() -> None:
    """Raises BackendError if this onnxruntime is too old for a kv_cache in 8 bits."""
    if tuple(map(int, ort.__version__.split(".")[:2])) < OLDEST_INT8_CACHE:
        oldest = ".".join(map(str, OLDEST_INT8_CACHE))
        raise BackendError(
            f"a kv_cache in int8 needs onnxruntime {oldest} or newer, this is {ort.__version__}",
            "take --kv-cache float32, or pip install --upgrade onnxruntime (which needs Python 3.11 or newer)",
        )


def load_graph(bundle: Bundle, graph: str, threads: int, device: Device = "cpu") -> Any:
    """The session of one graph of a bundle, after a look at what it would read. Raises BundleError, BackendError."""
    data, weights, path = _read(bundle, graph)
    loaded = session(data, weights, path, threads, device=device)
    trim_heap()
    return loaded


def load_decoder(
    bundle: Bundle,
    graph: str,
    threads: int,
    device: Device = "cpu",
    parts: int | None = None,
    profile: Path | None = None,
) -> list[DecoderPart]:
    """A decoder of a bundle, in `parts` that are loaded side by side: by default as many as help.

    `profile`: a folder for onnxruntime's profile of each part. Raises BundleError, BackendError.
    """
    data, weights, path = _read(bundle, graph)
    if parts is None:
        size = sum(place.length for place in external_data(data, path))
        parts = max(1, min(threads, MOST_PARTS, size // PART_BYTES)) if device == "cpu" else 1
    graphs = split_decoder(data, bundle.config.llm.num_hidden_layers, parts, path)
    with ThreadPoolExecutor(threads) as pool:
        shared = len(graphs) > 1
        start = partial(
            session, weights=weights, source=path, threads=threads, device=device, shared=shared, profile=profile
        )
        loads = [pool.submit(start, part) for part in graphs]
    loaded = [load.result() for load in loads]
    trim_heap()
    return _chained(loaded, path)


def _chained(sessions: list[Any], source: Path) -> list[DecoderPart]:
    """Sessions in the order of the layers; what one gives out and the next takes are hidden states.

    Raises BundleError if they do not fit together, up to `logits`.
    """
    found, hidden = list[DecoderPart](), bindings.INPUTS_EMBEDS
    for index, loaded in enumerate(sessions):
        inputs, outputs = (frozenset(v.name for v in values) for values in (loaded.get_inputs(), loaded.get_outputs()))
        following = (
            {v.name for v in sessions[index + 1].get_inputs()} if index + 1 < len(sessions) else {bindings.LOGITS}
        )
        if len(outputs & following) != 1 or hidden not in inputs:
            raise BundleError(f"{source}: no decoder, which makes logits of inputs_embeds")
        (out,) = outputs & following
        caches = tuple(sorted(name.removeprefix(PAST) for name in inputs if name.startswith(PAST)))
        found.append(DecoderPart(loaded, inputs, caches, hidden, out))
        hidden = out
    return found


def _read(bundle: Bundle, graph: str) -> tuple[bytes, Path, Path]:
    """A graph that reads nothing outside of the bundle's weights, their folder, and its own path."""
    path = bundle.file(f"{GRAPHS}/{DIALECT}/{graph}.onnx")
    data = fsio.read_bytes(path, GRAPH_SIZE_LIMIT)
    weights = (bundle.path / WEIGHTS).resolve()
    check_external_data(data, weights, path)
    return data, weights, path


def session(
    graph: bytes,
    weights: Path,
    source: Path,
    threads: int,
    arena: bool = True,
    device: Device = "cpu",
    shared: bool = False,
    profile: Path | None = None,
) -> Any:
    """A serialised graph, loaded: onnxruntime is told the folder of the weights and opens no other path.

    Without an `arena` it gives back what it does not need, and is slower. `shared`: other sessions run right behind it
    on the same cores, so that its threads must not wait there for more. `profile`: a folder for a file that tells
    when each operator ran.
    Raises BackendError that names `source` if it does not load, or not on the `device`.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = arena
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile / "profile")
    options.add_session_config_entry("session.force_spinning_stop", "1" if shared else "0")
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
    return loaded


def giving_back(device: Device) -> Any:
    """Options of a run over many positions at once, whose memory goes back to the system behind it.

    A session keeps it otherwise, each for itself, while decode needs next to none.
    """
    options = ort.RunOptions()
    if device == "cpu":
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def trim_heap() -> None:
    """Give the copies that loading made back to the system: glibc alone keeps what was allocated in small pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # another C library keeps less
        trim(0)
