"""A launch as data: what it is made from lies beside the packers, what runs it in engine/cuda and in the tests."""

from __future__ import annotations

from dataclasses import dataclass

from vila_edge.kernels.manifest import manifest


@dataclass(frozen=True)
class Launch:
    """One launch: block and shared memory come from the manifest."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[int | float, ...]  # device addresses, ints, floats, as the manifest's arguments

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown kernel, arguments that do not fit, or a grid that no GPU takes."""
        limits = (2**31 - 1, 65535, 65535)
        if not all(1 <= size <= limit for size, limit in zip(self.grid, limits, strict=True)):
            raise ValueError(f"{self.kernel}: grid {self.grid}, expected 1 to {limits}")
        self.packed()

    def packed(self) -> bytes:
        """The arguments as the driver takes them."""
        return manifest()[self.kernel].pack(self.arguments)
