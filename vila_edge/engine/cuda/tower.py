"""The vision tower beside our own kernels: in a TensorRT engine, or in onnxruntime."""

from __future__ import annotations

import contextlib
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from vila_edge import bindings
from vila_edge.bundle import Bundle
from vila_edge.cores import usable_cores
from vila_edge.engine.cuda.device import Arena, Device, Stream
from vila_edge.engine.engine_cache import EngineCache
from vila_edge.engine.onnxruntime_session import CUDA_PROVIDER, giving_back, load_graph
from vila_edge.engine.onnxruntime_session import Device as Place
from vila_edge.engine.tensorrt import Component, find_engines
from vila_edge.engine.tensorrt_options import TowerChoice, load_tensorrt
from vila_edge.engine.tensorrt_session import TensorrtRuntime
from vila_edge.errors import BackendError

FloatArray = NDArray[np.float32]

VISION_TOWER = "vision_tower"


class Tower(Protocol):
    """pixel_values [N, 3, H, W] to image_features [N, P, D_vision], float32."""

    @property
    def name(self) -> str:
        """What runs it and, if that was chosen here, why."""
        ...

    def __call__(self, pixel_values: FloatArray) -> FloatArray: ...


def open_tower(
    bundle: Bundle,
    choice: TowerChoice,
    threads: int | None,
    device: Device,
    stream: Stream,
    resources: contextlib.ExitStack,
) -> Tower:
    """`auto`: TensorRT if an engine of this bundle is there, else onnxruntime, on CUDA if it can.

    Raises BackendError if what was asked for by name cannot run here.
    """
    if choice == "onnxruntime":
        return OnnxruntimeTower(bundle, threads)
    try:
        return TensorrtTower(bundle, device, stream, resources)
    except BackendError as error:
        if choice == "tensorrt":
            raise
        return OnnxruntimeTower(bundle, threads, f", as {error.message}")


class OnnxruntimeTower:
    def __init__(self, bundle: Bundle, threads: int | None, why: str = "") -> None:
        threads = threads or usable_cores()
        place: Place = "cuda" if CUDA_PROVIDER in ort.get_available_providers() else "cpu"
        self._session, self._giving_back = load_graph(bundle, VISION_TOWER, threads, place), giving_back(place)
        where = "CUDA" if place == "cuda" else f"CPU, {threads} thread{'' if threads == 1 else 's'}"
        self.name = f"onnxruntime {ort.__version__} ({where}{why})"

    def __call__(self, pixel_values: FloatArray) -> FloatArray:
        found: FloatArray
        (found,) = self._session.run(None, {bindings.PIXEL_VALUES: pixel_values}, self._giving_back)
        return found


class TensorrtTower:
    def __init__(self, bundle: Bundle, device: Device, stream: Stream, resources: contextlib.ExitStack) -> None:
        """The newest engine of the bundle's tower. Raises BackendError if there is none, or no TensorRT."""
        trt, cache = load_tensorrt(), EngineCache()
        key = find_engines(bundle, trt, device, cache, None, 0, (VISION_TOWER,))[VISION_TOWER]
        images = int(key.flags["images"] or 1)
        with contextlib.ExitStack() as taken:
            runtime = TensorrtRuntime(trt, device)
            taken.callback(runtime.close)
            layout = bindings.vision_tower(bundle.config, "float16")
            loaded = runtime.load(cache.read(key, bundle.path), VISION_TOWER, layout, {"images": images})
            taken.callback(loaded.close)
            scratch = Arena(device, {"scratch": loaded.scratch_bytes})
            taken.callback(scratch.free)
            with device.current():
                self._component = Component(loaded, layout, images, stream, scratch["scratch"], taken)
            self.name = runtime.version
            resources.callback(taken.pop_all().close)

    def __call__(self, pixel_values: FloatArray) -> FloatArray:
        return self._component(pixel_values)
