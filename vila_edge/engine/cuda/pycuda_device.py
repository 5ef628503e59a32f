"""A CUDA device through PyCUDA; CUDA graphs, which PyCUDA does not have, through libcuda itself."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vila_edge.engine.cuda.device import Stream
from vila_edge.engine.cuda.libcuda import DRIVER_HINT, Libcuda
from vila_edge.engine.cuda.pycuda_foreign import StandIn
from vila_edge.engine.cuda.pycuda_module import PycudaModule
from vila_edge.engine.cuda.pycuda_owned import Owned, first_line
from vila_edge.engine.cuda.pycuda_stream import PycudaEvent, PycudaStream, raw_stream
from vila_edge.errors import BackendError

OLDEST_DRIVER = 11040  # CUDA 11.4, the first with cuGraphInstantiateWithFlags
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream, whose work would break a capture
_BUILD = "pip install 'vila-edge[kernels]', which builds kernels for this GPU and driver; or update the driver"


def open_device(index: int = 0) -> PycudaDevice:
    """The GPU of that number, on its primary context, which it shares with TensorRT.

    Raises BackendError if PyCUDA, the driver or the GPU is missing, or if the driver is too old.
    """
    drv = _pycuda()
    try:
        drv.init()
        count = drv.Device.count()
    except drv.Error as error:
        raise BackendError(f"CUDA does not start: {first_line(error)}", DRIVER_HINT) from None
    if not 0 <= index < count:
        raise BackendError(f"there is no GPU {index}: CUDA finds {count}", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    found = drv.get_driver_version()
    if found < OLDEST_DRIVER:
        raise BackendError(
            f"the NVIDIA driver is made for CUDA {_cuda(found)}, expected {_cuda(OLDEST_DRIVER)} or newer",
            "update the driver, on Jetson JetPack",
        )
    return PycudaDevice(drv, index)


def _pycuda() -> Any:
    try:
        return importlib.import_module("pycuda.driver")
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise BackendError(f"the package {missing} is not installed", "pip install pycuda") from None
    except ImportError as error:
        if "libcuda" in str(error):
            raise BackendError(f"there is no NVIDIA driver: {first_line(error)}", DRIVER_HINT) from None
        raise BackendError(
            f"PyCUDA does not load: {first_line(error)}", "pip install --force-reinstall pycuda"
        ) from None


class PycudaDevice:
    """A `Device`."""

    def __init__(self, drv: Any, index: int) -> None:
        self.drv, self._libcuda = drv, Libcuda()
        with self._errors("cannot open the GPU"):
            self._device = device = drv.Device(index)
            self.name: str = device.name()
            major, minor = device.compute_capability()
            self.compute_capability: tuple[int, int] = (major, minor)
            version = drv.get_driver_version()
            self.driver: tuple[int, int] = (version // 1000, version % 1000 // 10)
            self._context = device.retain_primary_context()
        self._index, self._thread = index, threading.get_ident()
        self.owned: dict[Owned, None] = {}  # what is handed out, in the order of its making
        self._pinned: dict[int, Owned] = {}  # address of an array -> its memory
        self._stand_in: StandIn | None = None
        self._open = True

    def __enter__(self) -> PycudaDevice:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Pushed and popped, so it may be nested, and each thread has it only while it needs it."""
        assert self._open, "the device is closed"
        self._context.push()
        try:
            yield
        finally:
            self.drv.Context.pop()

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except self.drv.Error as error:
            raise BackendError(f"{what}: {first_line(error)}") from None

    @contextlib.contextmanager
    def call(self, what: str) -> Iterator[None]:
        """On this device, with PyCUDA's errors as BackendError that begins with `what`."""
        with self._errors(what), self.current():
            yield

    @property
    def multiprocessors(self) -> int:
        return self._attribute("MULTIPROCESSOR_COUNT")

    @property
    def l2_bytes(self) -> int:
        return self._attribute("L2_CACHE_SIZE")

    def _attribute(self, name: str) -> int:
        with self._errors(f"the GPU does not tell its {name}"):
            return int(self._device.get_attribute(getattr(self.drv.device_attribute, name)))

    def memory(self) -> tuple[int, int]:
        with self.call("the GPU does not tell its memory"):
            free, total = self.drv.mem_get_info()
        return int(free), int(total)

    def alloc(self, nbytes: int) -> PycudaBuffer:
        try:
            with self.call("cannot allocate memory of the GPU"):
                return PycudaBuffer(self, self.drv.mem_alloc(nbytes), nbytes)
        except BackendError as error:
            free, total = self.memory()
            raise BackendError(
                f"the GPU has no room for {nbytes:,} bytes: {free:,} of {total:,} are free ({error.message})",
                "end other programs that use the GPU, or build engines for a shorter context",
            ) from None

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        with self.call("cannot allocate pinned memory"):
            array: NDArray[Any] = self.drv.pagelocked_empty(shape, np.dtype(dtype))
        self._pinned[array.ctypes.data] = Owned(self, array.base.free)  # type: ignore[union-attr]
        return array

    def unpin(self, array: NDArray[Any]) -> None:
        if memory := self._pinned.pop(array.ctypes.data, None):
            memory.free()

    def stream(self) -> PycudaStream:
        with self.call("cannot make a stream"):
            return PycudaStream(self, self._libcuda, self.drv.Stream(NON_BLOCKING))

    @contextlib.contextmanager
    def foreign(self, handle: int) -> Iterator[PycudaStream]:
        own = (owned for owned in self.owned if isinstance(owned, PycudaStream) and owned.handle == handle)
        if stream := next(own, None):
            yield stream
            return
        with self.current():
            self._stand_in = self._stand_in or StandIn(self, self._libcuda)
            with self._stand_in.instead_of(handle) as stream:
                yield stream

    def event(self) -> PycudaEvent:
        with self.call("cannot make an event"):
            return PycudaEvent(self, self.drv.Event())

    def copy_to_device_async(self, address: int, array: NDArray[Any], stream: Stream) -> None:
        with self.call("cannot copy to the GPU"):
            self.drv.memcpy_htod_async(address, array, raw_stream(stream))

    def copy_to_host_async(self, array: NDArray[Any], address: int, stream: Stream) -> None:
        with self.call("cannot copy from the GPU"):
            self.drv.memcpy_dtoh_async(array, address, raw_stream(stream))

    def copy_on_device_async(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        with self.call("cannot copy on the GPU"):
            self.drv.memcpy_dtod_async(target, source, nbytes, raw_stream(stream))

    def memset(self, address: int, value: int, nbytes: int, stream: Stream) -> None:
        with self.call("cannot fill memory of the GPU"):
            self.drv.memset_d8_async(address, value, nbytes, raw_stream(stream))

    def load_module(self, code: bytes) -> PycudaModule:
        try:
            with self.call("the driver does not take the kernels"):
                return PycudaModule(self, self.drv.module_from_buffer(code))
        except BackendError as error:
            remedy = "end other programs that use the GPU" if "out of memory" in error.message else _BUILD
            raise BackendError(error.message, remedy) from None

    def close(self) -> None:
        if not self._open:
            return
        for owned in reversed(list(self.owned)):  # graphs before the streams and the memory that they use
            owned.free()
        self._open = False
        with self._errors("cannot give the GPU back"):
            self._context.detach()
        # PyCUDA detaches a context in the thread that retained it alone, and leaves it current there.
        if threading.get_ident() == self._thread:
            self._libcuda.pop_context()
        else:
            self._libcuda.release_primary_context(self._index)


class PycudaBuffer(Owned):
    """A `Buffer`."""

    def __init__(self, device: PycudaDevice, allocation: Any, nbytes: int) -> None:
        super().__init__(device, allocation.free)
        self.address, self.nbytes = int(allocation), nbytes


def _cuda(version: int) -> str:
    """12060 -> 12.6."""
    return f"{version // 1000}.{version % 1000 // 10}"
