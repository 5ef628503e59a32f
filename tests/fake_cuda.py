"""A device on host memory, strict where a GPU is merely undefined.

Work given to a stream is done when somebody waits for it, so what reads too early or overwrites too soon is seen.
Fresh and freed memory is full of NaN, copies are checked against what is allocated.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tests.kernels.host import IMAGE, call
from vila_edge.engine.cuda.device import ALIGNMENT, Capture, Event, Stream
from vila_edge.errors import BackendError

POISON = 0xFF  # a NaN in every type of float
Work = Callable[[], None]


class FakeDevice:
    """`calls` counts what was asked of it, by name. It refuses to hold more than `total` bytes.

    Its time is what `takes` says of each launch and `copy_takes`, in microseconds; nothing else takes any.
    """

    name = "Fake Orin"
    multiprocessors = 4
    l2_bytes = 1 << 12

    def __init__(self, total: int = 1 << 30, compute_capability: tuple[int, int] = (8, 7)) -> None:
        self.total, self.compute_capability = total, compute_capability
        self.driver = (12, 6)
        self.calls: Counter[str] = Counter()
        self.buffers: dict[int, FakeBuffer] = {}
        self.pins: dict[int, NDArray[np.uint8]] = {}
        self.streams: dict[int, FakeStream] = {}
        self.modules: list[FakeModule] = []
        self.reserved = 0  # bytes that a runtime took for itself
        self.depth = 0  # of `current`
        self.capturing = False
        self.capture_fails = ""
        self.closed = False
        self.now_us = 0.0
        self.takes: Callable[[FakeLaunch], float] = lambda launch: 1.0
        self.copy_takes = 1.0  # of a copy from device to device
        self.events: set[FakeEvent] = set()
        self._graveyard: list[NDArray[np.uint8]] = []  # freed memory stays poisoned and is not given out again
        self._handles = itertools.count(1)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        assert not self.closed, "the device is closed"
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    @property
    def used(self) -> int:
        return self.reserved + sum(buffer.nbytes for buffer in self.buffers.values())

    def memory(self) -> tuple[int, int]:
        return self.total - self.used, self.total

    def alloc(self, nbytes: int) -> FakeBuffer:
        assert nbytes > 0 and not self.capturing, "a capture allows no allocation"
        self.calls["alloc"] += 1
        if nbytes > self.total - self.used:
            raise BackendError(f"the GPU has no room for {nbytes:,} bytes: {self.total - self.used:,} are free")
        buffer = FakeBuffer(self, _aligned(nbytes))
        self.buffers[buffer.address] = buffer
        return buffer

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        assert not self.capturing, "a capture allows no allocation"
        self.calls["pinned"] += 1
        array = np.full(shape, 0, dtype)
        self.pins[array.ctypes.data] = array.reshape(-1).view(np.uint8)
        return array

    def unpin(self, array: NDArray[Any]) -> None:
        self.pins.pop(array.ctypes.data, None)

    def stream(self) -> FakeStream:
        stream = FakeStream(self, next(self._handles))
        self.streams[stream.handle] = stream
        return stream

    @contextlib.contextmanager
    def foreign(self, handle: int) -> Iterator[FakeStream]:
        yield self.streams[handle]

    def event(self) -> FakeEvent:
        event = FakeEvent(self)
        self.events.add(event)
        return event

    def view(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes at an address, all within one allocation."""
        for buffer in self.buffers.values():
            start = address - buffer.address
            if start >= 0 and start + nbytes <= buffer.nbytes:
                return buffer.content[start : start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not within one allocation")

    def host_view(self, array: NDArray[Any]) -> NDArray[np.uint8]:
        """The bytes of a host array, which must be pinned now."""
        assert array.flags.c_contiguous, "a copy needs contiguous memory"
        address, nbytes = array.ctypes.data, array.nbytes
        for start, pin in self.pins.items():
            if start <= address and address + nbytes <= start + pin.nbytes:
                return pin[address - start : address - start + nbytes]
        raise AssertionError("the host array is not pinned")

    def copy_to_device_async(self, address: int, array: NDArray[Any], stream: Stream) -> None:
        source = self.host_view(array)
        self.enqueue(stream.handle, lambda: np.copyto(self.view(address, source.nbytes), source))

    def copy_to_host_async(self, array: NDArray[Any], address: int, stream: Stream) -> None:
        target = self.host_view(array)
        self.enqueue(stream.handle, lambda: np.copyto(target, self.view(address, target.nbytes)))

    def copy_on_device_async(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self.view(target, nbytes), self.view(source, nbytes)

        def work() -> None:
            np.copyto(self.view(target, nbytes), self.view(source, nbytes))
            self.now_us += self.copy_takes

        self.enqueue(stream.handle, work)

    def memset(self, address: int, value: int, nbytes: int, stream: Stream) -> None:
        self.view(address, nbytes)
        self.enqueue(stream.handle, lambda: self.view(address, nbytes).fill(value))

    def load_module(self, code: bytes) -> FakeModule:
        assert not self.capturing, "a capture loads no code"
        if not code.startswith(IMAGE):
            raise BackendError("the driver does not take the kernels: no kernel image is available for the device")
        self.calls["load_module"] += 1
        module = FakeModule(self, ctypes.CDLL(code[len(IMAGE) :].rstrip(b"\0").decode()))
        self.modules.append(module)
        return module

    def enqueue(self, handle: int, work: Work) -> None:
        stream = self.streams[handle]
        (stream.queue if stream.captured is None else stream.captured).append(work)

    def close(self) -> None:
        for buffer in list(self.buffers.values()):
            buffer.free()
        self.pins.clear()
        self.streams.clear()
        self.events.clear()
        for module in list(self.modules):
            module.free()
        self.closed = True


class FakeBuffer:
    def __init__(self, device: FakeDevice, content: NDArray[np.uint8]) -> None:
        self._device, self.content = device, content
        self.address, self.nbytes = content.ctypes.data, content.nbytes

    def free(self) -> None:
        if self._device.buffers.pop(self.address, None):
            self._device.calls["free"] += 1
            self.content.fill(POISON)
            self._device._graveyard.append(self.content)


class FakeStream:
    def __init__(self, device: FakeDevice, handle: int) -> None:
        self._device, self.handle = device, handle
        self.queue: list[Work] = []
        self.captured: list[Work] | None = None

    def synchronize(self) -> None:
        assert self.captured is None, "a stream that is captured cannot be waited for"
        self._device.calls["synchronize"] += 1
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def done(self) -> bool:
        """Time passes from one look to the next: one piece of work is done."""
        assert self.captured is None, "a stream that is captured cannot be asked"
        self._device.calls["done"] += 1
        if self.queue:
            self.queue.pop(0)()
        return not self.queue

    @contextlib.contextmanager
    def capture(self) -> Iterator[Capture]:
        capture, self.captured = Capture(), []
        self._device.capturing = True
        self._device.calls["capture"] += 1
        try:
            yield capture
            if self._device.capture_fails:
                raise BackendError(self._device.capture_fails)
            capture.graph = FakeGraph(self._device, self.captured)
        finally:
            self.captured, self._device.capturing = None, False

    def free(self) -> None:
        assert not self.queue, "work was left on the stream"
        self._device.streams.pop(self.handle, None)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.passed: float | None = None

    def record(self, stream: Stream) -> None:
        assert self in self._device.events, "the event was freed"
        self.passed = None
        self._device.enqueue(stream.handle, lambda: setattr(self, "passed", self._device.now_us))

    def since_us(self, earlier: Event) -> float:
        assert isinstance(earlier, FakeEvent)
        assert self.passed is not None and earlier.passed is not None, "an event was not passed yet"
        return self.passed - earlier.passed

    def free(self) -> None:
        self._device.events.discard(self)


class FakeGraph:
    def __init__(self, device: FakeDevice, work: list[Work]) -> None:
        self._device, self._work = device, work
        self.freed = False

    def launch(self, stream: Stream) -> None:
        assert not self.freed, "the graph was freed"
        self._device.calls["launch"] += 1
        for work in self._work:
            self._device.enqueue(stream.handle, work)

    def free(self) -> None:
        self.freed = True
        self._work = []


class FakeModule:
    """Kernels that were compiled for the CPU: see tests/kernels/host.py."""

    def __init__(self, device: FakeDevice, library: ctypes.CDLL) -> None:
        self.device, self.library = device, library

    def kernel(self, name: str, block: tuple[int, int, int], shared_memory: int = 0) -> FakeKernel:
        if not hasattr(self.library, f"ve_host_{name}"):
            raise BackendError(f"cannot use kernel {name}: named symbol not found")
        return FakeKernel(self, name, block, shared_memory)

    def free(self) -> None:
        if self in self.device.modules:
            self.device.modules.remove(self)


@dataclass(frozen=True)
class FakeKernel:
    module: FakeModule
    name: str
    block: tuple[int, int, int]
    shared_memory: int

    def prepare(self, grid: tuple[int, int, int], arguments: bytes) -> FakeLaunch:
        return FakeLaunch(self, grid, arguments)


@dataclass(frozen=True)
class FakeLaunch:
    kernel: FakeKernel
    grid: tuple[int, int, int]
    arguments: bytes

    def launch(self, stream: Stream) -> None:
        device = self.kernel.module.device
        assert device.depth, "a launch needs the device to be current"
        device.calls["kernel"] += 1
        device.enqueue(stream.handle, self._run)

    def _run(self) -> None:
        kernel = self.kernel
        assert kernel.module in kernel.module.device.modules, "the module was freed"
        call(kernel.module.library, kernel.name, self.grid, kernel.block, kernel.shared_memory, self.arguments)
        kernel.module.device.now_us += kernel.module.device.takes(self)


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    """Host memory at a multiple of ALIGNMENT that is no multiple of twice that: a GPU promises no more."""
    memory = np.full(nbytes + 4 * ALIGNMENT, POISON, np.uint8)
    start = -memory.ctypes.data % (2 * ALIGNMENT) + ALIGNMENT
    return memory[start : start + nbytes]


def as_array(content: NDArray[np.uint8], dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Bytes seen as an array of a type and shape."""
    return content.view(np.dtype(dtype)).reshape(shape)
