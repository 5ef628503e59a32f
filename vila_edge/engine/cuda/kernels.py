"""Launches of our own kernels on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vila_edge.engine.cuda.device import Device, Kernel, Module, PreparedLaunch, Stream
from vila_edge.kernels import store
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.manifest import Manifest, manifest
from vila_edge.kernels.store import Image, Version

Find = Callable[[Manifest, str, Version, Version], Image]


class Kernels:
    """The kernels of the manifest on one device. Each file is loaded when a kernel of it is first prepared."""

    def __init__(self, device: Device, find: Find = store.find) -> None:
        self.images: dict[str, Image] = {}  # by file: the code that was taken, and why
        self._device, self._find, self._manifest = device, find, manifest()
        self._modules: dict[str, Module] = {}
        self._kernels: dict[str, Kernel] = {}

    def prepare(self, launch: Launch) -> PreparedLaunch:
        """Ready to be put on streams. Not within a capture: it may load code. Raises BackendError."""
        if launch.kernel not in self._kernels:
            self._kernels[launch.kernel] = self._load(launch.kernel)
        return self._kernels[launch.kernel].prepare(launch.grid, launch.packed())

    def run(self, launches: Iterable[Launch], stream: Stream) -> None:
        """Put launches on a stream, in their order. Raises BackendError."""
        prepared = [self.prepare(launch) for launch in launches]
        with self._device.current():
            for ready in prepared:
                ready.launch(stream)

    def _load(self, name: str) -> Kernel:
        kernel = self._manifest[name]
        if kernel.file not in self._modules:
            device = self._device
            image = self._find(self._manifest, kernel.file, device.compute_capability, device.driver)
            self._modules[kernel.file] = device.load_module(image.code)
            self.images[kernel.file] = image
        return self._modules[kernel.file].kernel(name, kernel.block, kernel.shared_memory)

    def free(self) -> None:
        """Unload all code. What was prepared is of no more use. Once is enough, more often does no harm."""
        for module in self._modules.values():
            module.free()
        self._modules.clear()
        self._kernels.clear()
