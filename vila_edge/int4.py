"""The 4-bit layout: groups of a weight's inputs share a scale and a zero point.

A weight [N, K] becomes integers q in 0..15 with one `scale` and one `zero` per row and group of
`group_size` inputs, and `w = scale * (q - zero)`. Stored as
    qweight [N, K/2] uint8     two integers a byte, the even input in the low nibble
    scales  [N, K/G] float16
    qzeros  [N, ceil(K/G/2)] uint8, packed like qweight; symmetric weights have none, every zero is 8
which is also how onnxruntime's `MatMulNBits` reads its constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.tensorfile import Spec

MAX_INT = 15  # of an unsigned integer of 4 bits
MIDDLE = 8  # the zero point of a symmetric weight
MIN_SCALE = 1e-5  # spec section 5, AWQ recipe


@dataclass(frozen=True)
class Int4:
    """A quantised weight, not packed: q [N, K] and zeros [N, K/G] in 0..15, scales [N, K/G] float16."""

    q: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.uint8]

    def dequantize(self) -> NDArray[np.float32]:
        """The weight [N, K] that the integers stand for."""
        rows, groups = self.scales.shape
        q = self.q.reshape(rows, groups, self.q.shape[1] // groups).astype(np.float32) - self.zeros[..., None]
        return (q * self.scales.astype(np.float32)[..., None]).reshape(self.q.shape)


def quantize(weight: NDArray[Any], group_size: int, symmetric: bool = False) -> Int4:
    """Round to nearest: between each group's smallest and largest value, or, if symmetric, around 0.

    `weight` [N, K] float. Integers are chosen for the scale as it is stored, in 16 bits. Raises ValueError
    if K is not a multiple of `group_size`.
    """
    rows, columns = weight.shape
    if columns % group_size:
        raise ValueError(f"a row of {columns} inputs has no whole number of groups of {group_size}")
    groups = weight.astype(np.float32).reshape(rows, columns // group_size, group_size)
    low, high = groups.min(-1), groups.max(-1)
    span = np.maximum(-low, high) / (MIDDLE - 1) if symmetric else (high - low) / MAX_INT
    scales = np.maximum(span, MIN_SCALE / MAX_INT).astype(np.float16)
    exact = scales.astype(np.float32)
    zeros = np.full_like(low, MIDDLE) if symmetric else np.clip(np.round(-low / exact), 0, MAX_INT)
    q = np.clip(np.round(groups / exact[..., None]) + zeros[..., None], 0, MAX_INT)
    return Int4(q.astype(np.uint8).reshape(rows, columns), scales, zeros.astype(np.uint8))


def pack(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Integers [N, M] in 0..15 to bytes [N, ceil(M/2)], the first of a pair in the low nibble."""
    rows, columns = values.shape
    padded = np.zeros((rows, columns + columns % 2), np.uint8)
    padded[:, :columns] = values
    return padded[:, 0::2] | padded[:, 1::2] << 4


def unpack(packed: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """The inverse of `pack`: bytes [N, ceil(M/2)] to integers [N, M = columns]."""
    values = np.stack([packed & 0xF, packed >> 4], -1)
    return values.reshape(len(packed), 2 * packed.shape[1])[:, :columns]


def part_names(name: str, symmetric: bool = False) -> tuple[str, ...]:
    """The tensors that a bundle stores in place of `{name}.weight`."""
    return tuple(f"{name}.{part}" for part in ("qweight", "scales", "qzeros")[: 2 if symmetric else 3])


def part_specs(name: str, shape: tuple[int, int], group_size: int, symmetric: bool) -> dict[str, Spec]:
    """Type and shape of each of those tensors, for a weight of `shape` [N, K]."""
    rows, columns = shape
    groups = columns // group_size
    specs = (("U8", (rows, columns // 2)), ("F16", (rows, groups)), ("U8", (rows, -(-groups // 2))))
    return dict(zip(part_names(name, symmetric), specs, strict=False))


def to_tensors(name: str, weight: Int4, symmetric: bool = False) -> dict[str, NDArray[Any]]:
    """What a bundle stores for the linear `name`."""
    parts = (pack(weight.q), weight.scales, pack(weight.zeros))
    return dict(zip(part_names(name, symmetric), parts, strict=False))


def from_tensors(name: str, tensors: Mapping[str, NDArray[Any]]) -> Int4:
    """The inverse of `to_tensors`; without qzeros every zero is 8."""
    qweight, scales = (tensors[part] for part in part_names(name, symmetric=True))
    qzeros = tensors.get(f"{name}.qzeros")
    zeros = np.full(scales.shape, MIDDLE, np.uint8) if qzeros is None else unpack(qzeros, scales.shape[1])
    return Int4(unpack(qweight, 2 * qweight.shape[1]), scales, zeros)
