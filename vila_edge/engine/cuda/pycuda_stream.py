"""Streams and events of PyCUDA, and graphs captured on streams through libcuda."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vila_edge.engine.cuda.device import Capture, Event, Stream
from vila_edge.engine.cuda.libcuda import Handle, Libcuda
from vila_edge.engine.cuda.pycuda_owned import Owned
from vila_edge.errors import BackendError

if TYPE_CHECKING:
    from vila_edge.engine.cuda.pycuda_device import PycudaDevice


class PycudaStream(Owned):
    """A `Stream`."""

    def __init__(self, device: PycudaDevice, libcuda: Libcuda, raw: Any) -> None:
        super().__init__(device, lambda: setattr(self, "raw", None))  # PyCUDA destroys a stream with its object
        self.raw, self.handle, self._libcuda = raw, int(raw.handle), libcuda

    def synchronize(self) -> None:
        with self.device.call("the GPU failed"):
            self.raw.synchronize()

    def done(self) -> bool:
        with self.device.call("the GPU failed"):
            return bool(self.raw.is_done())

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


class PycudaGraph(Owned):
    """A `Graph`."""

    def __init__(self, device: PycudaDevice, libcuda: Libcuda, executable: Handle) -> None:
        super().__init__(device, lambda: libcuda("cuGraphExecDestroy", executable))
        self._libcuda, self._executable = libcuda, executable

    def launch(self, stream: Stream) -> None:
        with self.device.current():
            self._libcuda("cuGraphLaunch", self._executable, Handle(stream.handle))


class PycudaEvent(Owned):
    """An `Event`."""

    def __init__(self, device: PycudaDevice, raw: Any) -> None:
        super().__init__(device, lambda: setattr(self, "raw", None))  # PyCUDA destroys an event with its object
        self.raw = raw

    def record(self, stream: Stream) -> None:
        with self.device.call("cannot record an event"):
            self.raw.record(raw_stream(stream))

    def since_us(self, earlier: Event) -> float:
        assert isinstance(earlier, PycudaEvent), earlier
        with self.device.call("the GPU tells no time"):
            return 1000 * float(self.raw.time_since(earlier.raw))


def raw_stream(stream: Stream) -> Any:
    assert isinstance(stream, PycudaStream), stream
    return stream.raw
