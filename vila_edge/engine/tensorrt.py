"""The engine on TensorRT, or TensorRT-RTX: engines that were built for this GPU, found in the cache of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from vila_edge.bindings import GraphBindings
from vila_edge.bundle import Bundle
from vila_edge.engine.cuda import open_device
from vila_edge.engine.cuda.batches import Batches
from vila_edge.engine.cuda.device import Arena, Device, Stream
from vila_edge.engine.cuda.device_engine import DeviceEngine
from vila_edge.engine.cuda.kernels import Find, Kernels
from vila_edge.engine.cuda.projector import KernelProjector
from vila_edge.engine.engine_cache import EngineCache, EngineKey, Flag, build_flags, engine_key
from vila_edge.engine.tensorrt_decoder import Decoder, TensorrtCache
from vila_edge.engine.tensorrt_options import (
    COMPONENTS,
    MAX_KEPT,
    BuildOptions,
    KVForm,
    ProjectorChoice,
    ProjectorForm,
    RuntimeChoice,
    graph_bindings,
    load_tensorrt,
)
from vila_edge.engine.tensorrt_plugin import PluginHome
from vila_edge.engine.tensorrt_session import LoadedEngine, TensorrtRuntime
from vila_edge.errors import BackendError
from vila_edge.kernels import store

FloatArray = NDArray[np.float32]


class TensorrtEngine(DeviceEngine):
    """Runs a bundle's model with float16 activations on a GPU. `close` gives the GPU's memory back."""

    def __init__(
        self,
        bundle: Bundle,
        runtime: RuntimeChoice = "auto",
        device: Device | None = None,
        cache: EngineCache | None = None,
        options: BuildOptions | None = None,
        context: int = 0,
        projector: ProjectorChoice = "engine",
        find_kernels: Find = store.find,
    ) -> None:
        """Engines built with `options`, or else the newest, for at least `context` positions.

        `projector`: an engine, or our kernels by themselves, which need no engine of it; `find_kernels`: their code.
        Raises BackendError if TensorRT, the GPU, its memory or an engine is missing, or an engine is not of this bundle.
        """
        self.cfg = bundle.config
        with contextlib.ExitStack() as resources:  # given back in reverse order, and at once if something fails here
            trt, device = _open(runtime, device, resources)
            engines = cache or EngineCache()
            components = [name for name in COMPONENTS if (name, projector) != ("mm_projector", "kernel")]
            keys = find_engines(bundle, trt, device, engines, options, context, components)
            self.options = built_options(keys)
            self._runtime = TensorrtRuntime(trt, device)
            resources.callback(self._runtime.close)
            self._plugins = None
            if self.options.projector == "plugin":
                self._plugins = PluginHome(trt, device, self._runtime.errors)
                resources.callback(self._plugins.free)
            layouts = {component: graph_bindings(self.cfg, component, self.options) for component in components}
            loaded = dict[str, LoadedEngine]()
            for component, layout in layouts.items():
                plan = engines.read(keys[component], bundle.path)
                with self._plugins.serving() if self._plugins else contextlib.nullcontext():
                    loaded[component] = self._runtime.load(plan, component, layout, _limits(self.options))
                resources.callback(loaded[component].close)
                del plan  # as large as the weights
            stream = device.stream()
            resources.callback(stream.free)
            # One run at a time, all on one stream: all contexts can work in the same memory.
            scratch = Arena(device, {"scratch": max(engine.scratch_bytes for engine in loaded.values())})
            resources.callback(scratch.free)
            images, at = self.options.images, scratch["scratch"]
            self._vision_tower, *projectors = (
                Component(loaded[name], layouts[name], images, stream, at, resources)
                for name in components
                if name != "decoder"
            )
            self._mm_projector: Component | KernelProjector
            if projector == "kernel":
                kernels = Kernels(device, find_kernels)
                resources.callback(kernels.free)
                self._mm_projector = KernelProjector(bundle, device, stream, kernels, images)
                resources.callback(self._mm_projector.free)
            else:
                (self._mm_projector,) = projectors
            with device.current():
                self._decoder = Decoder(
                    loaded["decoder"], layouts["decoder"], self.options, stream, scratch["scratch"], resources
                )
            self._own(bundle, device, stream, resources)

    @property
    def backend(self) -> str:
        major, minor = self._device.compute_capability
        decode = "in a CUDA graph" if self._decoder.captured else "without a CUDA graph"
        version = f"{self._runtime.version}, {self._device.name} sm_{major}{minor}, decode {decode}"
        if isinstance(self._mm_projector, KernelProjector):
            return f"{version}, projector in our kernels ({self._mm_projector.origin})"
        return f"{version}, projector in our kernels (a plugin)" if self._plugins else version

    @property
    def max_context(self) -> int:
        return self.options.context

    @property
    def prefill_chunk(self) -> int:
        return self.options.chunk

    @property
    def not_captured(self) -> str:
        """Why decode is no CUDA graph; "" if it is one, or may still become one."""
        return self._decoder.not_captured

    def encode_images(self, pixel_values: FloatArray) -> FloatArray:
        with self._at_work():
            return self._vision_tower(pixel_values)

    def project(self, image_features: FloatArray) -> FloatArray:
        with self._at_work():
            return self._mm_projector(image_features)

    def new_cache(self, capacity: int) -> TensorrtCache:
        """Raises UsageError if the engine was built for fewer positions, BackendError if the GPU has no more memory."""
        with self._at_work():
            return self._decoder.new_cache(capacity)

    def forward(
        self, inputs_embeds: FloatArray, cache: TensorrtCache, logits_to_keep: Sequence[int] = (-1,)
    ) -> FloatArray:
        """Raises ContextError if the cache has no room for the new positions."""
        with self._at_work():
            return self._decoder.forward(inputs_embeds, cache, logits_to_keep)


class Component:
    """A graph of one input and one output, run over a batch of any size."""

    def __init__(
        self,
        engine: LoadedEngine,
        layout: GraphBindings,
        batch: int,
        stream: Stream,
        scratch: int,
        resources: contextlib.ExitStack,
    ) -> None:
        self._batches = Batches(engine.runtime.device, layout, batch, stream, self._compute)
        resources.callback(self._batches.free)
        self._session = engine.session(0, stream, scratch)
        resources.callback(self._session.close)

    def __call__(self, values: FloatArray) -> FloatArray:
        """[N, ...] to [N, ...], float32, as many at once as the engine was built for."""
        return self._batches(values)

    def _compute(self, images: int) -> None:
        batches, (x, out) = self._batches, self._batches.addresses
        self._session.bind(batches.input.name, x, batches.input.sized(images=images))
        self._session.bind(batches.output.name, out)
        self._session.run()


def _open(runtime: RuntimeChoice, device: Device | None, resources: contextlib.ExitStack) -> tuple[ModuleType, Device]:
    """TensorRT and the GPU. Both are tried, so that one BackendError names all that is missing."""
    trt, missing = None, list[BackendError]()
    try:
        trt = load_tensorrt(runtime)
    except BackendError as error:
        missing.append(error)
    if device is None:
        try:
            device = open_device()
            resources.callback(device.close)
        except BackendError as error:
            missing.append(error)
    if trt is None or device is None:
        raise BackendError("; ".join(e.message for e in missing), "; ".join(e.hint for e in missing if e.hint))
    return trt, device


def find_engines(
    bundle: Bundle,
    trt: ModuleType,
    device: Device,
    cache: EngineCache,
    options: BuildOptions | None,
    context: int,
    components: Sequence[str] = COMPONENTS,
) -> dict[str, EngineKey]:
    """Component -> key of the engine to use. Raises BackendError if there is none, with the command that builds it."""
    major, minor = device.compute_capability
    keys = {}
    for component in components:
        flags: Mapping[str, Flag] = {"context": context, "kept": MAX_KEPT} if component == "decoder" else {}
        if options is not None:
            flags = build_flags(component, options)
        key = engine_key(bundle.manifest.digest, component, trt, 10 * major + minor, flags)
        keys[component] = key if options is not None else cache.pick(key, bundle.path)
    return keys


def built_options(keys: Mapping[str, EngineKey]) -> BuildOptions:
    """What the engines were built for."""
    decoder = keys["decoder"].flags
    images = min(int(key.flags["images"] or 1) for component, key in keys.items() if component != "decoder")
    plugin = "mm_projector" in keys and keys["mm_projector"].flags.get("projector") == "plugin"
    form: KVForm = "append" if decoder["form"] == "append" else "scatter"
    projector: ProjectorForm = "plugin" if plugin else "graph"
    return BuildOptions(int(decoder["context"] or 0), int(decoder["chunk"] or 0), images, form, projector=projector)


def _limits(options: BuildOptions) -> dict[str, int]:
    """The largest that each varying dimension of a graph must be able to be."""
    return {"images": options.images, "sequence": options.chunk, "past": options.context, "kept": MAX_KEPT}
