"""Building TensorRT engines from a bundle: graph, weights, profiles, builder. One path for both TensorRTs.

`tensorrt` builds for the GPU at hand; `tensorrt_rtx` also for others, ahead of time and without any GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vila_edge import fsio
from vila_edge.bundle import Bundle
from vila_edge.config import VilaConfig
from vila_edge.engine.tensorrt_options import MAX_KEPT, BuildOptions, KVForm, graph_bindings, runtime_of
from vila_edge.errors import BackendError, InputError, UsageError
from vila_edge.export.graphs import write_graph
from vila_edge.export.tensorrt_append_ops import AppendOps
from vila_edge.export.tensorrt_ops import ScatterOps, TensorrtOps
from vila_edge.export.tensorrt_projector import plugin_graph
from vila_edge.export.tensorrt_weights import stage_weights
from vila_edge.parameters import parameter_shapes

DIALECTS: dict[KVForm, type[TensorrtOps]] = {"scatter": ScatterOps, "append": AppendOps}
TIMING_CACHE_LIMIT = 256 << 20  # bytes of a file that is read as one

Progress = Callable[[str, int, int], None]  # phase, step, number of steps
Range = tuple[int, int, int]  # smallest, most likely, largest


def build_engine(
    trt: Any,
    bundle: Bundle,
    component: str,
    options: BuildOptions,
    *,
    compute_capability: tuple[int, int] | None,
    timing_cache: Path | None,
    progress: Progress | None,
    folder: Path,
) -> memoryview:
    """The serialised engine of a component. Takes minutes for a decoder, and several times its size in memory.

    `trt` is the module tensorrt or tensorrt_rtx. `compute_capability`: of the GPU it is for, None for the one
    here. `timing_cache`: a file of what earlier builds measured, read and written; tensorrt_rtx measures nothing
    and leaves it alone. `progress` is called from TensorRT's threads. `folder`: an empty one for graph and
    weights, which the caller removes.

    Raises BackendError with TensorRT's own message if it cannot build, UsageError if the model has fewer
    positions than `options.context`, VilaEdgeError if the folder cannot be written.
    """
    if component == "decoder" and options.context > bundle.config.llm.context_length:
        raise UsageError(
            f"a context of {options.context:,} positions: the model was made for {bundle.config.llm.context_length:,}",
            "build with a smaller context",
        )
    with contextlib.ExitStack() as resources:
        if component == "mm_projector" and options.projector == "plugin":
            graph = resources.enter_context(plugin_graph(trt, bundle, options, compute_capability, folder))
        else:
            graph = write_files(bundle, component, options, folder)
        return build_graph(
            trt,
            graph,
            component,
            profiles(bundle.config, component, options),
            compute_capability=compute_capability,
            workspace=options.workspace,
            timing_cache=timing_cache,
            progress=progress,
        )


def write_files(bundle: Bundle, component: str, options: BuildOptions, folder: Path) -> Path:
    """Graph and weights of a component in `folder`; returns the graph's path."""
    weights = stage_weights(bundle, component, folder)
    cfg = bundle.config
    ops = DIALECTS[options.form](weights, graph_bindings(cfg, component, options), parameter_shapes(cfg))
    path = folder / f"{component}.onnx"
    fsio.replace_bytes(path, write_graph(component, cfg, ops))
    return path


def profiles(cfg: VilaConfig, component: str, options: BuildOptions) -> list[dict[str, tuple[tuple[int, ...], ...]]]:
    """Of each optimisation profile: input -> its smallest, most likely and largest shape.

    The decoder has two: 0 for prefill, 1 for decode, whose sequence is always 1.
    """
    kept, past = (1, 1, MAX_KEPT), (0, options.context // 2, options.context)
    ranges: list[dict[str, Range]] = [{"images": (1, options.images, options.images)}]
    if component == "decoder":
        sequences = ((1, options.chunk, options.chunk), (1, 1, 1))
        ranges = [{"sequence": sequence, "kept": kept, "past": past} for sequence in sequences]
    inputs = graph_bindings(cfg, component, options).inputs
    return [
        {
            binding.name: tuple(binding.sized(**{name: sizes[i] for name, sizes in sized.items()}) for i in range(3))
            for binding in inputs
        }
        for sized in ranges
    ]


def build_graph(
    trt: Any,
    graph: Path,
    component: str,
    shapes: list[dict[str, tuple[tuple[int, ...], ...]]],
    *,
    compute_capability: tuple[int, int] | None = None,
    workspace: int | None = None,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> memoryview:
    """The serialised engine of an ONNX file whose weights lie beside it. Raises BackendError."""
    watch = _Watch(trt, progress)
    builder = _made(trt, trt.Builder, component, watch, watch.logger)
    network, _parser = parse_graph(trt, builder, graph, component, watch)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if (own_memory := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        config.set_flag(own_memory)  # TensorRT-RTX: without it no CUDA graph of a run can be made
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if compute_capability is not None:
        _set_target(trt, config, compute_capability)
    for ranges in shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, likely, largest) in ranges.items():
            profile.set_shape(name, smallest, likely, largest)
        config.add_optimization_profile(profile)
    cache = load_timing_cache(config, timing_cache) if runtime_of(trt) == "tensorrt" else None
    config.progress_monitor = watch.monitor
    plan = builder.build_serialized_network(network, config)
    if watch.interruption is not None:
        raise watch.interruption
    if plan is None:
        raise _failure(trt, component, "cannot build its engine", watch.errors, workspace)
    if timing_cache is not None and cache is not None:
        fsio.make_folder(timing_cache.parent)
        fsio.replace_bytes(timing_cache, bytes(cache.serialize()))
    return memoryview(plan)


def parse_graph(trt: Any, builder: Any, graph: Path, component: str, watch: _Watch) -> tuple[Any, Any]:
    """The network of an ONNX file, and the parser, which owns its weights. Raises BackendError."""
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, watch.logger)
    if not parser.parse_from_file(str(graph)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = [
            f"{error.desc()} (node {error.node_name()})" if error.node_name() else error.desc() for error in found
        ]
        raise _failure(trt, component, "cannot read its graph", reasons or watch.errors)
    return network, parser


class _Watch:
    """What TensorRT says while it works: errors are kept, progress is passed on, Ctrl-C stops it.

    Its base classes belong to a module that is known only now, so its two listeners are classes made here.
    """

    def __init__(self, trt: Any, progress: Progress | None) -> None:
        self.errors: list[str] = []
        self.interruption: BaseException | None = None
        self._progress = progress
        self._steps = dict[str, int]()
        self._serious = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
        self.logger = type("Logger", (trt.ILogger,), {"log": lambda _, *args: self._guard(self._log, *args)})()
        calls = {
            "phase_start": lambda _, *args: self._guard(self._start, *args),
            "step_complete": lambda _, *args: self._guard(self._step, *args),
            "phase_finish": lambda _, *args: self._guard(self._finish, *args),
        }
        self.monitor = type("Monitor", (trt.IProgressMonitor,), calls)()

    def _guard(self, listen: Callable[..., None], *args: Any) -> bool:
        """No exception passes through TensorRT: it is kept, and the next step that asks is told to stop."""
        try:
            listen(*args)
        except BaseException as error:  # KeyboardInterrupt most of all
            self.interruption = self.interruption or error
        return self.interruption is None

    def _log(self, severity: Any, message: str) -> None:
        if severity in self._serious:
            self.errors.append(message)

    def _start(self, phase: str, parent: str | None, steps: int) -> None:
        self._steps[phase] = steps
        self._report(phase, 0)

    def _step(self, phase: str, step: int) -> None:
        self._report(phase, step + 1)

    def _finish(self, phase: str) -> None:
        self._report(phase, self._steps.get(phase, 0))

    def _report(self, phase: str, step: int) -> None:
        if self._progress is not None:
            self._progress(phase, step, self._steps.get(phase, 0))


def _made(trt: Any, make: Callable[..., Any], component: str, watch: _Watch, *args: Any) -> Any:
    """An object of TensorRT's; where there is no driver, its constructor fails."""
    try:
        return make(*args)
    except (RuntimeError, TypeError) as error:  # TypeError: pybind found a null pointer
        raise _failure(trt, component, "does not start", [*watch.errors, str(error)]) from None


def _set_target(trt: Any, config: Any, compute_capability: tuple[int, int]) -> None:
    """Build for another GPU than the one at hand. Raises BackendError if this TensorRT cannot."""
    major, minor = compute_capability
    wanted = f"SM{major}{minor}"
    offered = [name for name in getattr(getattr(trt, "ComputeCapability", None), "__members__", ()) if name[:2] == "SM"]
    if not hasattr(config, "set_compute_capability") or not offered:
        raise BackendError(
            f"{_runtime(trt)} builds for the GPU of this machine alone, not ahead of time for {wanted}",
            "build on the device itself, without a target",
        )
    if wanted not in offered:
        raise BackendError(
            f"{_runtime(trt)} cannot build for {wanted}, it offers {', '.join(offered)}",
            "build on the device itself, without a target",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.__members__[wanted], 0)


def load_timing_cache(config: Any, path: Path | None) -> Any:
    """What earlier builds measured; a file that does not fit this TensorRT is as good as none."""
    if path is None:
        return None
    known = b""
    with contextlib.suppress(InputError):  # the first build finds no file
        known = fsio.read_bytes(path, TIMING_CACHE_LIMIT)
    for content in (known, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def _failure(trt: Any, component: str, what: str, reasons: list[str], workspace: int | None = None) -> BackendError:
    useful = [" ".join(reason.split()) for reason in reasons if reason.strip()]
    hint = "the same bundle runs on the CPU: --backend onnxruntime"
    if workspace is not None and any("workspace" in reason.lower() for reason in useful):
        hint = f"{workspace >> 20:,} MiB are too few: take a larger --workspace-mib, or leave it out, TensorRT chooses then"
    return BackendError(f"{component}: {_runtime(trt)} {what}: {useful[0] if useful else 'it does not say why'}", hint)


def _runtime(trt: Any) -> str:
    return f"{trt.__name__} {trt.__version__}"
