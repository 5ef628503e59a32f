"""A CUDA device through PyCUDA; CUDA graphs, which PyCUDA does not have, through libcuda itself."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vila_edge.engine.cuda.device import Capture, Stream
from vila_edge.errors import BackendError

OLDEST_DRIVER = 11040  # CUDA 11.4, the first with cuGraphInstantiateWithFlags
LIBCUDA = "libcuda.so.1"
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream, whose work would break a capture
CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do is no concern of a capture

_Handle = ctypes.c_void_p
_DRIVER_HINT = "install NVIDIA's driver, or choose another backend: --backend onnxruntime"


def open_device(index: int = 0) -> PycudaDevice:
    """The GPU of that number, on its primary context, which it shares with TensorRT.

    Raises BackendError if PyCUDA, the driver or the GPU is missing, or if the driver is too old.
    """
    drv = _pycuda()
    try:
        drv.init()
        count = drv.Device.count()
    except drv.Error as error:
        raise BackendError(f"CUDA does not start: {_first_line(error)}", _DRIVER_HINT) from None
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
            raise BackendError(f"there is no NVIDIA driver: {_first_line(error)}", _DRIVER_HINT) from None
        raise BackendError(
            f"PyCUDA does not load: {_first_line(error)}", "pip install --force-reinstall pycuda"
        ) from None


class PycudaDevice:
    """A `Device`."""

    def __init__(self, drv: Any, index: int) -> None:
        self._drv, self._libcuda = drv, Libcuda()
        with self._errors("cannot open the GPU"):
            device = drv.Device(index)
            self.name: str = device.name()
            major, minor = device.compute_capability()
            self.compute_capability: tuple[int, int] = (major, minor)
            self._context = device.retain_primary_context()
        self.owned: dict[_Owned, None] = {}  # what is handed out, in the order of its making
        self._pinned: dict[int, _Owned] = {}  # address of an array -> its memory
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
            self._drv.Context.pop()

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._drv.Error as error:
            raise BackendError(f"{what}: {_first_line(error)}") from None

    @contextlib.contextmanager
    def call(self, what: str) -> Iterator[None]:
        """On this device, with PyCUDA's errors as BackendError that begins with `what`."""
        with self._errors(what), self.current():
            yield

    def memory(self) -> tuple[int, int]:
        with self.call("the GPU does not tell its memory"):
            free, total = self._drv.mem_get_info()
        return int(free), int(total)

    def alloc(self, nbytes: int) -> PycudaBuffer:
        try:
            with self.call("cannot allocate memory of the GPU"):
                return PycudaBuffer(self, self._drv.mem_alloc(nbytes), nbytes)
        except BackendError as error:
            free, total = self.memory()
            raise BackendError(
                f"the GPU has no room for {nbytes:,} bytes: {free:,} of {total:,} are free ({error.message})",
                "end other programs that use the GPU, or build engines for a shorter context",
            ) from None

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        with self.call("cannot allocate pinned memory"):
            array: NDArray[Any] = self._drv.pagelocked_empty(shape, np.dtype(dtype))
        self._pinned[array.ctypes.data] = _Owned(self, array.base.free)  # type: ignore[union-attr]
        return array

    def unpin(self, array: NDArray[Any]) -> None:
        if memory := self._pinned.pop(array.ctypes.data, None):
            memory.free()

    def stream(self) -> PycudaStream:
        with self.call("cannot make a stream"):
            return PycudaStream(self, self._libcuda, self._drv.Stream(NON_BLOCKING))

    def copy_to_device_async(self, address: int, array: NDArray[Any], stream: Stream) -> None:
        with self.call("cannot copy to the GPU"):
            self._drv.memcpy_htod_async(address, array, _raw(stream))

    def copy_to_host_async(self, array: NDArray[Any], address: int, stream: Stream) -> None:
        with self.call("cannot copy from the GPU"):
            self._drv.memcpy_dtoh_async(array, address, _raw(stream))

    def copy_on_device_async(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        with self.call("cannot copy on the GPU"):
            self._drv.memcpy_dtod_async(target, source, nbytes, _raw(stream))

    def memset(self, address: int, value: int, nbytes: int, stream: Stream) -> None:
        with self.call("cannot fill memory of the GPU"):
            self._drv.memset_d8_async(address, value, nbytes, _raw(stream))

    def close(self) -> None:
        if not self._open:
            return
        for owned in reversed(list(self.owned)):  # graphs before the streams and the memory that they use
            owned.free()
        self._open = False
        with self._errors("cannot give the GPU back"):
            self._context.detach()


class _Owned:
    """Something of a device that is given back once, by whoever has it or by the device when it closes."""

    def __init__(self, device: PycudaDevice, release: Callable[[], object]) -> None:
        self.device, self._release = device, release
        device.owned[self] = None

    def free(self) -> None:
        if self in self.device.owned:
            del self.device.owned[self]
            with self.device.call("cannot give memory of the GPU back"):
                self._release()


class PycudaBuffer(_Owned):
    """A `Buffer`."""

    def __init__(self, device: PycudaDevice, allocation: Any, nbytes: int) -> None:
        super().__init__(device, allocation.free)
        self.address, self.nbytes = int(allocation), nbytes


class PycudaStream(_Owned):
    """A `Stream`."""

    def __init__(self, device: PycudaDevice, libcuda: Libcuda, raw: Any) -> None:
        super().__init__(device, lambda: setattr(self, "raw", None))  # PyCUDA destroys a stream with its object
        self.raw, self.handle, self._libcuda = raw, int(raw.handle), libcuda

    def synchronize(self) -> None:
        with self.device.call("the GPU failed"):
            self.raw.synchronize()

    @contextlib.contextmanager
    def capture(self) -> Iterator[Capture]:
        capture, libcuda = Capture(), self._libcuda
        with self.device.current():
            libcuda.begin_capture(self.handle)
            try:
                yield capture
            except BaseException:
                with contextlib.suppress(BackendError):  # a capture that failed has to be ended too
                    libcuda("cuGraphDestroy", libcuda.end_capture(self.handle))
                raise
            template = libcuda.end_capture(self.handle)
            try:
                capture.graph = PycudaGraph(self.device, libcuda, libcuda.instantiate(template))
            finally:
                libcuda("cuGraphDestroy", template)


class PycudaGraph(_Owned):
    """A `Graph`."""

    def __init__(self, device: PycudaDevice, libcuda: Libcuda, executable: _Handle) -> None:
        super().__init__(device, lambda: libcuda("cuGraphExecDestroy", executable))
        self._libcuda, self._executable = libcuda, executable

    def launch(self, stream: Stream) -> None:
        with self.device.current():
            self._libcuda("cuGraphLaunch", self._executable, _Handle(stream.handle))


class Libcuda:
    """The driver's own calls for graphs. Each raises BackendError that names the call."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBCUDA)
        except OSError as error:
            raise BackendError(f"there is no NVIDIA driver: {error}", _DRIVER_HINT) from None

    def __call__(self, name: str, *arguments: Any) -> None:
        result = getattr(self._library, name)(*arguments)
        if result:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(result, ctypes.byref(text))
            raise BackendError(f"{name} failed: {(text.value or b'no reason given').decode()} ({result})")

    def begin_capture(self, stream: int) -> None:
        self("cuStreamBeginCapture_v2", _Handle(stream), ctypes.c_int(CAPTURE_THREAD_LOCAL))

    def end_capture(self, stream: int) -> _Handle:
        template = _Handle()
        self("cuStreamEndCapture", _Handle(stream), ctypes.byref(template))
        return template

    def instantiate(self, template: _Handle) -> _Handle:
        executable = _Handle()
        self("cuGraphInstantiateWithFlags", ctypes.byref(executable), template, ctypes.c_ulonglong(0))
        return executable


def _raw(stream: Stream) -> Any:
    assert isinstance(stream, PycudaStream), stream
    return stream.raw


def _cuda(version: int) -> str:
    """12060 -> 12.6."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
