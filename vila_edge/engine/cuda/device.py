"""What the engines need of a GPU. PyCUDA gives it to them, the tests have it on host memory.

Addresses are integers. Whatever takes a stream only puts work there and returns: the host's array must stay as it is
until `synchronize`, or, in a captured graph, hold what the graph is to find there when it is launched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vila_edge.bindings import MAX_ALLOCATION

ALIGNMENT = 256  # bytes: TensorRT takes tensors and scratch memory only at multiples of it


class Buffer(Protocol):
    """Memory of the device."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def free(self) -> None:
        """Give it back. Once is enough, more often does no harm."""
        ...


class Graph(Protocol):
    """Captured work that is launched as one."""

    def launch(self, stream: Stream) -> None: ...

    def free(self) -> None: ...


@dataclass
class Capture:
    """What `Stream.capture` is about to find: `graph` is there when its block ends."""

    graph: Graph | None = None


class Stream(Protocol):
    """A queue of work."""

    @property
    def handle(self) -> int:
        """The CUstream, as TensorRT takes it."""
        ...

    def synchronize(self) -> None:
        """Wait until all work is done. Raises BackendError if some of it failed."""
        ...

    def done(self) -> bool:
        """Whether all work is done, without waiting for it. Raises BackendError if some of it failed."""
        ...

    def capture(self) -> AbstractContextManager[Capture]:
        """Work that the block gives to the stream is not done, but becomes a graph. Raises BackendError."""
        ...

    def free(self) -> None: ...


class Event(Protocol):
    """A place in a stream's work."""

    def record(self, stream: Stream) -> None:
        """Put it behind all that the stream has been given."""
        ...

    def since_us(self, earlier: Event) -> float:
        """Microseconds that the GPU took from an earlier event to this one, when both were passed. Raises BackendError."""
        ...

    def free(self) -> None: ...


class PreparedLaunch(Protocol):
    """A kernel with its grid and its arguments, ready to be put on streams again and again."""

    def launch(self, stream: Stream) -> None:
        """Put it there. A token takes hundreds, so the device has to be `current` already, not made so by each.

        Raises BackendError if the driver refuses it; what fails while it runs is told by `synchronize`.
        """
        ...


class Kernel(Protocol):
    """A function of a module."""

    def prepare(self, grid: tuple[int, int, int], arguments: bytes) -> PreparedLaunch:
        """`arguments` lie as the function's parameters do: each at a multiple of its own size."""
        ...


class Module(Protocol):
    """Code that is loaded on the device."""

    def kernel(self, name: str, block: tuple[int, int, int], shared_memory: int = 0) -> Kernel:
        """A function by its name, with the threads of a block and the bytes of its dynamic shared memory.

        Raises BackendError if the module has no such function or the GPU not as much memory.
        """
        ...

    def free(self) -> None: ...


class Device(Protocol):
    """One GPU. Every method may be called from any thread; all of them raise BackendError."""

    @property
    def name(self) -> str: ...

    @property
    def compute_capability(self) -> tuple[int, int]: ...

    @property
    def driver(self) -> tuple[int, int]:
        """The newest CUDA that the driver knows, as (12, 6)."""
        ...

    @property
    def multiprocessors(self) -> int: ...

    @property
    def l2_bytes(self) -> int:
        """Of the cache that all multiprocessors share."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """Make this the device that other libraries find in the thread, as long as the block lasts."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and bytes in all."""
        ...

    def alloc(self, nbytes: int) -> Buffer:
        """Memory at a multiple of `ALIGNMENT`, whatever it holds. Raises BackendError if there is not as much."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A host array that the device reads and writes by itself. It is gone after `unpin` or `close`."""
        ...

    def unpin(self, array: NDArray[Any]) -> None: ...

    def stream(self) -> Stream: ...

    def foreign(self, handle: int) -> AbstractContextManager[Stream]:
        """A stream for work that belongs on the CUstream `handle`, which another library may have made.

        The work keeps its place there. Until the block ends, the other library must put nothing on it.
        """
        ...

    def event(self) -> Event: ...

    def copy_to_device_async(self, address: int, array: NDArray[Any], stream: Stream) -> None:
        """A contiguous, pinned array to the device."""
        ...

    def copy_to_host_async(self, array: NDArray[Any], address: int, stream: Stream) -> None:
        """As many bytes as a contiguous, pinned array has, from the device."""
        ...

    def copy_on_device_async(self, target: int, source: int, nbytes: int, stream: Stream) -> None: ...

    def memset(self, address: int, value: int, nbytes: int, stream: Stream) -> None:
        """Set every byte to `value`."""
        ...

    def load_module(self, code: bytes) -> Module:
        """Code for this GPU, a cubin or PTX. Raises BackendError if the driver does not take it."""
        ...

    def close(self) -> None:
        """Give everything back that this device handed out. Once is enough, more often does no harm."""
        ...


class Arena:
    """Named pieces that are aligned for TensorRT, in as few allocations as keep each within `limit`.

    A piece that is larger has one of its own.
    """

    limit = MAX_ALLOCATION

    def __init__(self, device: Device, sizes: Mapping[str, int]) -> None:
        """`sizes` in bytes. Raises BackendError if the device has not as much memory."""
        self._device, self._buffers, self._addresses = device, list[Buffer](), dict[str, int]()
        groups: list[dict[str, int]] = [{}]
        for name, size in sizes.items():
            aligned = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
            if groups[-1] and sum(groups[-1].values()) + aligned > self.limit:
                groups.append({})
            groups[-1][name] = aligned
        try:
            for group in groups:
                self._buffers.append(device.alloc(sum(group.values())))
                starts = itertools.accumulate(group.values(), initial=self._buffers[-1].address)
                self._addresses.update(zip(group, starts, strict=False))
        except BaseException:
            self.free()
            raise

    def __getitem__(self, name: str) -> int:
        """The address of a piece."""
        return self._addresses[name]

    def clear(self, stream: Stream) -> None:
        """Set every byte to 0."""
        for buffer in self._buffers:
            self._device.memset(buffer.address, 0, buffer.nbytes, stream)

    def free(self) -> None:
        for buffer in self._buffers:
            buffer.free()


class Staging:
    """Tensors on their way between host and device: pinned on one side, and with a place on the other."""

    def __init__(self, device: Device, layout: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """`layout`: name -> largest shape, and dtype. Raises BackendError."""
        self._device = device
        self.memory = Arena(device, {name: nbytes(*tensor) for name, tensor in layout.items()})
        self.host = {name: device.pinned(*tensor) for name, tensor in layout.items()}

    def to_device(self, name: str, shape: tuple[int, ...], stream: Stream) -> None:
        """As many of the tensor's first numbers as this shape has."""
        self._device.copy_to_device_async(self.memory[name], self._part(name, shape), stream)

    def to_host(self, name: str, shape: tuple[int, ...], stream: Stream) -> None:
        """The same, in the other direction."""
        self._device.copy_to_host_async(self._part(name, shape), self.memory[name], stream)

    def _part(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        return self.host[name].reshape(-1)[: math.prod(shape)]

    def free(self) -> None:
        for array in self.host.values():
            self._device.unpin(array)
        self.memory.free()


def nbytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Bytes of an array of a shape."""
    return math.prod(shape) * np.dtype(dtype).itemsize
