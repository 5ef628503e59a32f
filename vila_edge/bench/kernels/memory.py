"""Memory for measurements: the same arrays several times over, so that none is found in a cache when its turn comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.engine.cuda.device import Arena, Device, Stream

CACHES = 8  # times the L2 that all sets together are as large as
MAX_SETS = 512
_NUMBERS = 1 << 18  # of a random content: what is larger repeats it


@dataclass(frozen=True)
class Piece:
    """An array: its size, and what is in it, again and again until it is full."""

    nbytes: int
    content: NDArray[Any]


Pieces = Mapping[str, Piece]


def integers(high: int, dtype: str) -> NDArray[Any]:
    """Numbers from 0 up to below `high`."""
    return np.random.default_rng(0).integers(0, high, _NUMBERS).astype(dtype)


def normal(scale: float) -> NDArray[np.float16]:
    return (np.random.default_rng(1).standard_normal(_NUMBERS) * scale).astype(np.float16)


def halves(size: int, scale: float = 1.0) -> Piece:
    """`size` random numbers in 16 bits."""
    return Piece(2 * size, normal(scale))


def constant(size: int, value: float, dtype: str = "float32") -> Piece:
    return Piece(size * np.dtype(dtype).itemsize, np.full(min(size, _NUMBERS), value, dtype))


def sets_for(nbytes: int, l2_bytes: int) -> int:
    """How many sets of so many bytes leave nothing of the first in L2 when the last was read."""
    return max(1, min(MAX_SETS, -(-CACHES * l2_bytes // nbytes)))


class Sets:
    """Arrays on a device: `rotated` once for each set, `shared` once for all."""

    def __init__(self, device: Device, rotated: Pieces, shared: Pieces, count: int, stream: Stream) -> None:
        """Raises BackendError if the device has not as much memory."""
        pieces = {f"{index} {name}": piece for index in range(count) for name, piece in rotated.items()}
        pieces |= shared
        self._arena = Arena(device, {name: piece.nbytes for name, piece in pieces.items()})
        try:
            for name in {**rotated, **shared}:
                at = [self._arena[name]] if name in shared else [self._arena[f"{i} {name}"] for i in range(count)]
                _fill(device, at, {**rotated, **shared}[name], stream)
        except BaseException:
            self.free()
            raise
        common = {name: self._arena[name] for name in shared}
        self.addresses: list[dict[str, int]] = [
            common | {name: self._arena[f"{index} {name}"] for name in rotated} for index in range(count)
        ]

    def free(self) -> None:
        self._arena.free()


def _fill(device: Device, addresses: list[int], piece: Piece, stream: Stream) -> None:
    content = np.ascontiguousarray(piece.content).reshape(-1).view(np.uint8)[: piece.nbytes]
    staged = device.pinned(content.shape, np.uint8)
    staged[:] = content
    for address in addresses:
        for start in range(0, piece.nbytes, staged.nbytes):
            device.copy_to_device_async(address + start, staged[: piece.nbytes - start], stream)
    stream.synchronize()
    device.unpin(staged)
