"""Arrays of the host to a device, of any size, through a little pinned memory."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.engine.cuda.device import Device, Stream

PIECE = 4 << 20  # bytes of pinned memory


class Upload:
    """Pinned memory for the time of a `with` block."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream

    def __enter__(self) -> Upload:
        self._staged = self._device.pinned((PIECE,), np.uint8)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._device.unpin(self._staged)

    def __call__(self, address: int, array: NDArray[Any]) -> None:
        """An array to an address; it is there when this returns. Raises BackendError."""
        if not array.flags.c_contiguous and array.nbytes > PIECE and len(array) > 1:  # not copied as a whole
            first, second = array[: len(array) // 2], array[len(array) // 2 :]
            self(address, first)
            self(address + first.nbytes, second)
            return
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, content.nbytes, PIECE):
            piece = content[start : start + PIECE]
            self._staged[: len(piece)] = piece
            self._device.copy_to_device_async(address + start, self._staged[: len(piece)], self._stream)
            self._stream.synchronize()
