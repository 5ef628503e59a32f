"""What a test needs of a place where kernels run: the CPU (host.py) or a GPU (on_device.py)."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import DTypeLike, NDArray

from tests.kernels.host import Stats
from vila_edge.kernels.launch import Launch


class Array(Protocol):
    """Memory that launches read and write."""

    address: int

    def numpy(self) -> NDArray[Any]: ...


class Runner(Protocol):
    def put(self, values: NDArray[Any]) -> Array: ...

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An array of NaN."""
        ...

    def run(self, launch: Launch) -> Stats | None:
        """Run it to its end; a GPU counts nothing."""
        ...
