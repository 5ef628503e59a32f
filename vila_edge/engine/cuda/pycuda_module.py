"""Code on a PyCUDA device, and launches of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vila_edge.engine.cuda.device import Stream
from vila_edge.engine.cuda.pycuda_owned import Owned, first_line
from vila_edge.engine.cuda.pycuda_stream import raw_stream
from vila_edge.errors import BackendError

if TYPE_CHECKING:
    from vila_edge.engine.cuda.pycuda_device import PycudaDevice

STATIC_SHARED_MEMORY = 48 << 10  # bytes that a block has without being asked for


class PycudaModule(Owned):
    """A `Module`."""

    def __init__(self, device: PycudaDevice, raw: Any) -> None:
        super().__init__(device, self._drop)
        self._raw, self._functions = raw, list[PycudaKernel]()

    def kernel(self, name: str, block: tuple[int, int, int], shared_memory: int = 0) -> PycudaKernel:
        assert self._raw is not None, "the module was freed"
        with self.device.call(f"cannot use kernel {name}"):
            function = self._raw.get_function(name)
            if shared_memory > STATIC_SHARED_MEMORY:
                function.set_attribute(self.device.drv.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_memory)
        kernel = PycudaKernel(name, function, block, shared_memory, self.device.drv.Error)
        self._functions.append(kernel)
        return kernel

    def _drop(self) -> None:
        """PyCUDA unloads a module with the last object that needs it."""
        for kernel in self._functions:
            kernel.function = None
        self._raw = None


class PycudaKernel:
    """A `Kernel`."""

    def __init__(self, name: str, function: Any, block: tuple[int, int, int], shared_memory: int, error: Any) -> None:
        """`error`: what PyCUDA raises."""
        self.name, self.function, self.block = name, function, block
        self.shared_memory, self.error = shared_memory, error

    def prepare(self, grid: tuple[int, int, int], arguments: bytes) -> PycudaLaunch:
        return PycudaLaunch(self, grid, arguments)


class PycudaLaunch:
    """A `PreparedLaunch`: the least that Python has to do for one, about a microsecond."""

    __slots__ = ("_arguments", "_grid", "_kernel")

    def __init__(self, kernel: PycudaKernel, grid: tuple[int, int, int], arguments: bytes) -> None:
        self._kernel, self._grid, self._arguments = kernel, grid, arguments

    def launch(self, stream: Stream) -> None:
        kernel = self._kernel
        assert kernel.function is not None, "the module was freed"
        try:
            kernel.function._launch_kernel(
                self._grid, kernel.block, self._arguments, kernel.shared_memory, raw_stream(stream)
            )
        except kernel.error as error:
            raise BackendError(f"cannot launch {kernel.name} on a grid {self._grid}: {first_line(error)}") from None
