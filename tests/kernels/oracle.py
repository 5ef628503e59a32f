"""Products in float64, and how far a kernel may be from them.

A kernel sums in fp32 and rounds its result once. Along any path through its sums an fp32 addition happens at most
`DEPTH` + K / 128 times (128 in a group, one for each group of a warp, one for each warp), and each is off by 2^-23 of what
is summed at most, a tensor core's truncation included. So |error| <= 2^-11 |y| + depth 2^-23 sum |w x|, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.int4 import Int4

Float = NDArray[np.float64]
HALF, SINGLE = 2.0**-11, 2.0**-23
DEPTH = 128 + 8
SUBNORMAL = 2.0**-25  # half the distance of float16 near 0


@dataclass(frozen=True)
class Exact:
    """A result [m, n] and what it may be off by before it is rounded."""

    value: Float
    slack: Float

    def check(self, found: NDArray[Any]) -> None:
        """Raises AssertionError unless every element of `found` is right to its last rounding."""
        rounding = (
            np.maximum(HALF * np.abs(self.value), SUBNORMAL) if found.dtype == np.float16 else SINGLE * abs(self.value)
        )
        off = np.abs(found.astype(np.float64) - self.value) / (self.slack + (1 + HALF) * rounding)
        assert (off <= 1).all(), f"{np.max(off):.3g} times what rounding explains"

    def times_rounding(self, found: NDArray[Any]) -> float:
        """The error of `found` in all, as a multiple of what rounding the exact result leaves."""
        rounded = self.value.astype(found.dtype).astype(np.float64)
        error = np.linalg.norm(found.astype(np.float64) - self.value)
        return float(error / np.linalg.norm(rounded - self.value))

    def __mul__(self, factor: Float) -> Exact:
        return Exact(self.value * factor, self.slack * np.abs(factor) + 4 * SINGLE * np.abs(self.value * factor))

    def __add__(self, other: NDArray[Any]) -> Exact:
        value = self.value + other
        return Exact(value, self.slack + SINGLE * np.abs(value))

    def __getitem__(self, columns: Any) -> Exact:
        return Exact(self.value[:, columns], self.slack[:, columns])


def random_int4(rng: np.random.Generator, rows: int, columns: int) -> Int4:
    """A weight whose integers, scales and zero points all vary."""
    groups = columns // 128
    return Int4(
        rng.integers(0, 16, (rows, columns), np.uint8),
        rng.uniform(0.002, 0.022, (rows, groups)).astype(np.float16),
        rng.integers(0, 16, (rows, groups), np.uint8),
    )


def dequantize(weight: Int4) -> Float:
    """In float64, and written apart from `Int4.dequantize`."""
    scales, zeros = (np.repeat(a.astype(np.float64), 128, 1) for a in (weight.scales, weight.zeros))
    return (weight.q.astype(np.float64) - zeros) * scales


def halves(rng: np.random.Generator, *shape: int) -> NDArray[np.float16]:
    return rng.standard_normal(shape).astype(np.float16)


def product(weight: Float, x: NDArray[Any]) -> Exact:
    """x [m, k] times the transpose of `weight` [n, k]."""
    x = x.astype(np.float64)
    depth = DEPTH + weight.shape[1] // 128
    return Exact(x @ weight.T, depth * SINGLE * (np.abs(x) @ np.abs(weight).T))


def rms_product(weight: Float, x: NDArray[Any], gamma: NDArray[np.float16], scale: float, eps: float) -> Exact:
    """The product of RMSNorm(x), where gamma times x is rounded to float16 and the rest is exact."""
    inverse = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + eps)
    return product(weight, (x.astype(np.float64) * gamma).astype(np.float16)) * (scale * inverse)


def swiglu(gate: Exact, up: Exact) -> Exact:
    """silu(gate) * up. No slope of silu is above 1.1; its exponential is good to a few units of fp32 for each of |gate|."""
    silu = gate.value / (1 + np.exp(-gate.value))
    value = silu * up.value
    exponential = (8 + np.abs(gate.value)) * SINGLE * np.abs(value)
    return Exact(value, 1.1 * gate.slack * (np.abs(up.value) + up.slack) + np.abs(silu) * up.slack + exponential)


def rotate(heads: Exact, cosines: Float, sines: Float) -> Exact:
    """One head [m, D] turned by angles whose cosines and sines [m, D / 2] are given."""
    half = heads.value.shape[1] // 2
    a, b = heads.value[:, :half], heads.value[:, half:]
    slack = heads.slack[:, :half] + heads.slack[:, half:] + 2 * SINGLE * (np.abs(a) + np.abs(b))
    return Exact(
        np.concatenate([a * cosines - b * sines, b * cosines + a * sines], 1), np.concatenate([slack, slack], 1)
    )


def beside(parts: list[Exact]) -> Exact:
    """Columns one after another."""
    return Exact(np.concatenate([p.value for p in parts], 1), np.concatenate([p.slack for p in parts], 1))
