"""The driver's own calls: for CUDA graphs, which PyCUDA does not have, and to give a context back, which it does by half."""

from __future__ import annotations

import ctypes
from typing import Any

from vila_edge.errors import BackendError

LIBCUDA = "libcuda.so.1"
DRIVER_HINT = "install NVIDIA's driver, or choose another backend: --backend onnxruntime"
CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do is no concern of a capture

Handle = ctypes.c_void_p


class Libcuda:
    """Its functions by name. Each raises BackendError that names the call."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBCUDA)
        except OSError as error:
            raise BackendError(f"there is no NVIDIA driver: {error}", DRIVER_HINT) from None

    def __call__(self, name: str, *arguments: Any) -> None:
        result = getattr(self._library, name)(*arguments)
        if result:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(result, ctypes.byref(text))
            raise BackendError(f"{name} failed: {(text.value or b'no reason given').decode()} ({result})")

    def pop_context(self) -> None:
        self("cuCtxPopCurrent_v2", ctypes.byref(Handle()))

    def release_primary_context(self, index: int) -> None:
        self("cuDevicePrimaryCtxRelease_v2", ctypes.c_int(index))

    def begin_capture(self, stream: int) -> None:
        self("cuStreamBeginCapture_v2", Handle(stream), ctypes.c_int(CAPTURE_THREAD_LOCAL))

    def end_capture(self, stream: int) -> Handle:
        template = Handle()
        self("cuStreamEndCapture", Handle(stream), ctypes.byref(template))
        return template

    def instantiate(self, template: Handle) -> Handle:
        executable = Handle()
        self("cuGraphInstantiateWithFlags", ctypes.byref(executable), template, ctypes.c_ulonglong(0))
        return executable
