"""A build: the engines of a bundle for one GPU and one TensorRT, each taken from the cache or made now."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from vila_edge import fsio
from vila_edge.bundle import Bundle
from vila_edge.config import VilaConfig
from vila_edge.engine.engine_cache import EngineCache, EngineKey, build_flags, engine_key
from vila_edge.engine.plan import tiles_at_once
from vila_edge.engine.tensorrt_options import (
    SCATTER_SINCE,
    BuildOptions,
    KVForm,
    ProjectorForm,
    default_form,
    runtime_of,
)
from vila_edge.errors import BackendError, UsageError
from vila_edge.export.build_room import check_disk, check_memory
from vila_edge.export.ctrl_c import CtrlC
from vila_edge.visual import TOWER_BATCH

CONTEXT = 4096  # positions, unless the model has fewer: the kv_cache is taken whole, and an edge device is small
CHUNK = 512

Progress = Callable[[str, str, int, int], None]  # component, what is being done, steps done, steps
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """What is built for."""

    trt: ModuleType
    sm: int  # compute capability: 87 for 8.7
    ahead_of_time: bool  # for a GPU that need not be here

    @property
    def compute_capability(self) -> tuple[int, int]:
        return divmod(self.sm, 10)


@dataclass(frozen=True)
class Built:
    """An engine that is in the cache now."""

    component: str
    path: Path
    size: int  # bytes
    seconds: float  # that the build took; 0 if it was there
    cached: bool


def find_target(trt: ModuleType, sm: int | None = None) -> Target:
    """The GPU at hand, or the one that is said, as far as this TensorRT builds for it.

    Raises BackendError if there is no GPU and none is said, UsageError if it cannot be built for.
    """
    name, offered = runtime_of(trt), _offered(trt)
    if sm is None:
        try:
            return Target(trt, _sm_here(), ahead_of_time=False)
        except BackendError as error:
            ahead = f"or build ahead of time, with --sm: {name} has {_listed(offered)}" if offered else ""
            hint = "; ".join(part for part in (error.hint, ahead) if part)
            raise BackendError(f"no GPU to build for: {error.message}", hint) from None
    if sm in offered:
        return Target(trt, sm, ahead_of_time=True)
    with contextlib.suppress(BackendError):
        if _sm_here() == sm:
            return Target(trt, sm, ahead_of_time=False)
    if offered:
        raise UsageError(f"--sm {sm}: {name} {trt.__version__} builds ahead of time for {_listed(offered)}")
    raise UsageError(
        f"--sm {sm}: {name} {trt.__version__} builds for the GPU that it runs on alone",
        "leave --sm out on that machine",
    )


def choose_options(
    cfg: VilaConfig,
    trt: ModuleType,
    *,
    context: int | None = None,
    chunk: int | None = None,
    images: int | None = None,
    form: KVForm | None = None,
    workspace: int | None = None,
    projector: ProjectorForm = "graph",
) -> BuildOptions:
    """What a build is made with where nothing is said. Raises UsageError for what does not fit the model."""
    longest = cfg.llm.context_length
    context = min(CONTEXT, longest) if context is None else context
    if not 1 <= context <= longest:
        raise UsageError(f"--context {context}: this model has 1 to {longest:,}")
    if chunk is not None and not 1 <= chunk <= context:
        raise UsageError(f"--chunk {chunk}: expected 1 to {context:,}, the context")
    if images is not None and not 1 <= images <= TOWER_BATCH:
        raise UsageError(f"--images {images:,}: expected 1 to {TOWER_BATCH}, as many as are looked at at a time")
    if form == "scatter" and default_form(trt) != "scatter":
        since = ".".join(map(str, SCATTER_SINCE))
        raise UsageError(f"--kv-form scatter: {trt.__name__} {trt.__version__}, it needs {since}", "use append")
    return BuildOptions(
        context=context,
        chunk=chunk or min(CHUNK, context),
        images=images or tiles_at_once(cfg, TOWER_BATCH),
        form=form or default_form(trt),
        workspace=workspace,
        projector=projector,
    )


def build_engines(
    bundle: Bundle,
    target: Target,
    options: BuildOptions,
    components: Sequence[str],
    cache: EngineCache,
    *,
    force: bool = False,
    memory_check: bool = True,
    progress: Progress = lambda component, phase, done, total: None,
    say: Say = lambda message: None,
    done: Callable[[Built], None] = lambda built: None,
) -> list[Built]:
    """Build what the cache does not have, or all of it with `force`. What is finished stays if a later one fails.

    `say` is told why an engine that is there is built again. Raises BackendError if TensorRT refuses, the cache cannot
    be used, or disk or memory are too small (`memory_check`), UsageError if a package is missing or another process
    builds.
    """
    build_engine = _load_builder()
    cache.prepare()
    with _alone(cache.root):
        keys = {
            component: engine_key(
                bundle.manifest.digest, component, target.trt, target.sm, build_flags(component, options)
            )
            for component in components
        }
        there = {} if force else {component: _usable(cache, key, say) for component, key in keys.items()}
        missing = [component for component in components if there.get(component) is None]
        check_disk(cache.root, bundle, missing)
        if memory_check:
            check_memory(bundle, missing)
        made = []
        for component, key in keys.items():
            built = there.get(component)
            if built is None:
                built = _build(build_engine, bundle, target, options, key, cache, progress)
            made.append(built)
            done(built)
        return made


def _build(
    build_engine: Callable[..., bytes | memoryview],
    bundle: Bundle,
    target: Target,
    options: BuildOptions,
    key: EngineKey,
    cache: EngineCache,
    progress: Progress,
) -> Built:
    component, began = key.component, time.perf_counter()
    # On the disk of the cache: where /tmp is memory, the weights would be there twice.
    with (
        tempfile.TemporaryDirectory(dir=cache.root, prefix=".build.", suffix=fsio.PARTIAL) as folder,
        CtrlC() as ctrl_c,
    ):

        def report(phase: str, done: int, total: int) -> None:
            ctrl_c.inside = True
            ctrl_c.check()
            progress(component, phase, done, total)

        plan = build_engine(
            target.trt,
            bundle,
            component,
            options,
            compute_capability=target.compute_capability if target.ahead_of_time else None,
            timing_cache=cache.root / f"timing-{key.runtime}-{key.version}-sm{key.sm}.cache",
            progress=report,
            folder=Path(folder),
        )
    path = cache.store(key, plan)
    return Built(component, path, memoryview(plan).nbytes, time.perf_counter() - began, cached=False)


def _usable(cache: EngineCache, key: EngineKey, say: Say) -> Built | None:
    """The engine that is there, if it is what was stored."""
    path = cache.find(key)
    if path is None:
        return None
    try:
        return Built(key.component, path, cache.verify(key), 0.0, cached=True)
    except BackendError as error:
        say(f"{key.component} is built again: {error.message}")
        return None


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One build at a time; what a killed one left is removed. Raises UsageError if another process builds."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another process builds engines in {root}", "wait for it to end, or stop it") from None
        for left_over in [*root.glob(f".build.*{fsio.PARTIAL}"), *root.glob(f".*.engine.*{fsio.PARTIAL}")]:
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        yield
    finally:
        os.close(descriptor)


def _load_builder() -> Callable[..., Any]:
    """Writing graphs needs onnx, which nothing else of a device does. Raises UsageError."""
    try:
        from vila_edge.export.engines import build_engine
    except ModuleNotFoundError as error:
        raise UsageError(
            f"build needs the package {error.name!r}, which is not installed", "pip install 'vila-edge[build]'"
        ) from None
    return build_engine


def _offered(trt: ModuleType) -> list[int]:
    """The compute capabilities that a builder can be told; none if it builds for its own GPU alone."""
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return sorted(int(name[2:]) for name in members if name.startswith("SM") and name[2:].isdigit())


def _sm_here() -> int:
    """Raises BackendError if there is no GPU."""
    from vila_edge.engine.cuda import open_device

    with open_device() as device:
        major, minor = device.compute_capability
    return 10 * major + minor


def _listed(offered: Sequence[int]) -> str:
    return ", ".join(map(str, offered))
