"""What a product does with its result: kernels/include/ve_epilogue.cuh, seen from the launching side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.kernels.w4_layout import TILE


@dataclass(frozen=True)
class Rope:
    """Rotate the first `heads` heads of every row. The weight is packed in `rope_order`."""

    cosines: int  # addresses; float32 [positions, head_dim / 2], of architecture.rope_table
    sines: int
    positions: int  # int32 [m]
    head_dim: int
    heads: int


@dataclass(frozen=True)
class Epilogue:
    """Addresses are 0 for what is not wanted."""

    n: int  # columns of the result
    bias: int = 0  # float32 [packed rows], of w4_layout.pack_bias
    residual: int = 0  # float16 [m, n]; may be the result's own
    swiglu: bool = False  # silu(gate) * up; the weight is packed in `swiglu_order`
    rope: Rope | None = None

    def pointers(self) -> tuple[int, ...]:
        """bias, residual, cosines, sines, positions."""
        rope = self.rope
        angles = (rope.cosines, rope.sines, rope.positions) if rope else (0, 0, 0)
        return (self.bias, self.residual, *angles)

    def numbers(self) -> tuple[int, ...]:
        """swiglu, head_dim, rotated_tiles."""
        rope = self.rope
        return (int(self.swiglu), *((rope.head_dim, rope.heads * rope.head_dim // TILE) if rope else (TILE, 0)))

    def check(self, rows: int) -> None:
        """Raises ValueError if a weight of `rows` packed rows cannot end so."""
        if self.swiglu and self.rope:
            raise ValueError("SwiGLU and RoPE at once")
        if not 0 < self.n <= (rows // 2 if self.swiglu else rows):
            raise ValueError(f"{self.n} columns of a result from {rows} packed rows")
        if self.rope and (self.rope.head_dim % TILE or self.rope.heads * self.rope.head_dim > self.n):
            heads = f"{self.rope.heads} heads of {self.rope.head_dim}"
            raise ValueError(f"{heads} in {self.n} columns: expected a multiple of {TILE} that fits")


@dataclass(frozen=True)
class Rms:
    """RMSNorm of the input, as `fold_gamma` prepares it."""

    gamma: int  # address; float16 [k]
    scale: float
    eps: float


def fold_gamma(gamma: NDArray[Any]) -> tuple[NDArray[np.float16], float]:
    """The gamma of an RMSNorm [K] divided by a power of two, and that power: 1 where nothing is larger than 1.

    A kernel multiplies x by it before it knows 1 / rms, and gives the power back with 1 / rms: so x cannot overflow.
    """
    largest = float(np.abs(gamma).max())
    scale = 2.0 ** max(0, math.ceil(math.log2(largest))) if largest > 0 else 1.0
    return (gamma.astype(np.float64) / scale).astype(np.float16), scale
