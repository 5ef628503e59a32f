"""Launches of products with a packed 4-bit weight: y [m, n] = epilogue(x [m, k] weight^T), x and y float16."""

from __future__ import annotations

from dataclasses import dataclass

from vila_edge.kernels.epilogue import Epilogue, Rms
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.manifest import manifest
from vila_edge.kernels.w4_layout import GROUP, ROWS, TILE

MAX_BATCH = 8  # of the GEMV
# What a token costs in a block of so many tokens, about: a wide block takes a weight apart for more of them.
TOKEN_COSTS = {128: 1.0, 64: 1.1, 32: 1.35}


@dataclass(frozen=True)
class Weight:
    """Addresses and sizes of a `w4_layout.PackedW4` on a device."""

    qweight: int
    scales: int
    qzeros: int
    rows: int  # packed
    columns: int

    def __post_init__(self) -> None:
        if self.rows % ROWS or self.columns % GROUP or self.rows < 1 or self.columns < 1:
            raise ValueError(f"a packed weight [{self.rows}, {self.columns}]: expected multiples of {ROWS} and {GROUP}")

    @property
    def pointers(self) -> tuple[int, int, int]:
        return self.qweight, self.scales, self.qzeros


def gemv(weight: Weight, x: int, y: int, m: int, epilogue: Epilogue, rms: Rms | None = None, tiles: int = 1) -> Launch:
    """For a batch of 1 to 8. `tiles`, 1 or 2, is how many of 16 rows a block computes: 2 reads x half as often.

    Raises ValueError for sizes that do not fit.
    """
    if not 1 <= m <= MAX_BATCH:
        raise ValueError(f"a batch of {m}: the GEMV takes 1 to {MAX_BATCH}, the GEMM takes the rest")
    if tiles not in (1, 2):
        raise ValueError(f"{tiles} tiles a block: expected 1 or 2")
    epilogue.check(weight.rows)
    pointers = (*weight.pointers, x, *((rms.gamma,) if rms else ()), *epilogue.pointers(), y)
    numbers = (epilogue.n, weight.columns, m, *epilogue.numbers(), *((rms.eps, rms.scale) if rms else ()))
    name = f"ve_gemv_w4a16{'_rms' if rms else ''}_r{tiles}"
    return Launch(name, (weight.rows // TILE // tiles, 1, 1), pointers + numbers)


def gemm(weight: Weight, x: int, y: int, m: int, epilogue: Epilogue, tokens: int | None = None) -> Launch:
    """For any number of tokens m; a norm is a launch of its own before it.

    `tokens` is how many a block computes, of `TOKEN_COSTS`; the cheapest if None. Raises ValueError for sizes that do
    not fit.
    """
    if m < 1:
        raise ValueError(f"{m} tokens: expected at least one")
    epilogue.check(weight.rows)
    tokens = tokens or min(TOKEN_COSTS, key=lambda size: -(-m // size) * size * TOKEN_COSTS[size])
    if tokens not in TOKEN_COSTS:
        raise ValueError(f"{tokens} tokens a block: expected one of {', '.join(map(str, TOKEN_COSTS))}")
    tile = manifest()[f"ve_gemm_w4a16_128x{tokens}"]
    rows = tile.tile["n"]
    tiles = weight.rows // TILE
    grid = (-(-m // tokens), -(-weight.rows // rows), 1)  # neighbours share weights: DRAM gives them once
    pointers = (*weight.pointers, x, *epilogue.pointers(), y)
    return Launch(tile.name, grid, (*pointers, epilogue.n, weight.columns, m, tiles, *epilogue.numbers()))
