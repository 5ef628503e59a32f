"""Work on a stream that another library made. PyCUDA takes its own alone, so one of them stands in, held in order by events."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vila_edge.engine.cuda.libcuda import Handle, Libcuda
from vila_edge.engine.cuda.pycuda_owned import Owned
from vila_edge.engine.cuda.pycuda_stream import PycudaStream

if TYPE_CHECKING:
    from vila_edge.engine.cuda.pycuda_device import PycudaDevice

_WITHOUT_TIME = 2  # CU_EVENT_DISABLE_TIMING


class StandIn:
    """A stream of a device, for those that are not."""

    def __init__(self, device: PycudaDevice, libcuda: Libcuda) -> None:
        self._libcuda, self.stream = libcuda, device.stream()
        self._before, self._after = (RawEvent(device, libcuda) for _ in range(2))

    @contextlib.contextmanager
    def instead_of(self, handle: int) -> Iterator[PycudaStream]:
        """What the block puts there comes behind what the other stream has, and before what that is given next."""
        self._order(handle, self._before, self.stream.handle)
        yield self.stream
        self._order(self.stream.handle, self._after, handle)

    def _order(self, first: int, event: RawEvent, second: int) -> None:
        self._libcuda("cuEventRecord", event.handle, Handle(first))
        self._libcuda("cuStreamWaitEvent", Handle(second), event.handle, ctypes.c_uint(0))


class RawEvent(Owned):
    """An event for streams of any library."""

    def __init__(self, device: PycudaDevice, libcuda: Libcuda) -> None:
        super().__init__(device, lambda: libcuda("cuEventDestroy_v2", self.handle))
        self.handle = Handle()
        with device.current():
            libcuda("cuEventCreate", ctypes.byref(self.handle), ctypes.c_uint(_WITHOUT_TIME))
