"""What the objects of a PyCUDA device share: whose they are, and that they are given back once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vila_edge.engine.cuda.pycuda_device import PycudaDevice


class Owned:
    """Something of a device that is given back once, by whoever has it or by the device when it closes."""

    def __init__(self, device: PycudaDevice, release: Callable[[], object]) -> None:
        self.device, self._release = device, release
        device.owned[self] = None

    def free(self) -> None:
        if self in self.device.owned:
            del self.device.owned[self]
            with self.device.call("cannot give memory of the GPU back"):
                self._release()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
