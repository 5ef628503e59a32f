"""Launches of the lm_head with a packed 8-bit weight: logits y [m, n] float32 of x [m, k] float16."""

from __future__ import annotations

from dataclasses import dataclass

from vila_edge.kernels.epilogue import Rms
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.w4 import MAX_BATCH
from vila_edge.kernels.w4_layout import GROUP, ROWS, TILE


@dataclass(frozen=True)
class Weight:
    """Addresses and sizes of a `w8_layout.PackedW8` on a device."""

    qweight: int
    scales: int
    rows: int  # packed
    columns: int  # packed

    def __post_init__(self) -> None:
        if self.rows % ROWS or self.columns % GROUP or self.rows < 1 or self.columns < 1:
            raise ValueError(f"a packed weight [{self.rows}, {self.columns}]: expected multiples of {ROWS} and {GROUP}")


def gemv(weight: Weight, x: int, y: int, n: int, k: int, m: int, rms: Rms | None = None, tiles: int = 1) -> Launch:
    """For a batch of 1 to 8; n and k are the weight's rows and columns before they were filled up.

    `tiles`, 1 or 2, is how many of 16 rows a block computes. Raises ValueError for sizes that do not fit.
    """
    if not 1 <= m <= MAX_BATCH or tiles not in (1, 2):
        raise ValueError(f"a batch of {m}, {tiles} tiles a block: expected 1 to {MAX_BATCH}, and 1 or 2")
    if not 0 < n <= weight.rows or k % 8 or -(-k // GROUP) * GROUP != weight.columns:
        raise ValueError(f"[{n}, {k}] of a packed weight [{weight.rows}, {weight.columns}]: k must be a multiple of 8")
    pointers = (weight.qweight, weight.scales, x, *((rms.gamma,) if rms else ()), y)
    numbers = (n, k, m, *((rms.eps, rms.scale) if rms else ()))
    name = f"ve_gemv_w8a16{'_rms' if rms else ''}_r{tiles}"
    return Launch(name, (weight.rows // TILE // tiles, 1, 1), pointers + numbers)
