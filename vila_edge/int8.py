"""The 8-bit layout: groups of a weight's inputs share a scale around zero.

A weight [N, K] becomes integers q in 0..255 with one `scale` per row and group of `GROUP_SIZE` inputs, and
`w = scale * (q - 128)`. Rows are filled up with zeros to whole groups. Stored as
    qweight_int8 [N, ceil(K/G) * G] uint8
    scales       [N, ceil(K/G)] float16
which is also how onnxruntime's `MatMulNBits` reads its constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.tensorfile import Spec

GROUP_SIZE = 128
MIDDLE = 128  # what stands for zero
MIN_SCALE = 2.0**-24  # the smallest that 16 bits hold


@dataclass(frozen=True)
class Int8:
    """A quantised weight: q [N, ceil(K/G) * G] in 0..255, scales [N, ceil(K/G)] float16."""

    q: NDArray[np.uint8]
    scales: NDArray[np.float16]

    def dequantize(self, columns: int) -> NDArray[np.float32]:
        """The weight [N, K = columns] that the integers stand for."""
        rows, groups = self.scales.shape
        q = self.q.reshape(rows, groups, GROUP_SIZE).astype(np.float32) - MIDDLE
        return (q * self.scales.astype(np.float32)[..., None]).reshape(self.q.shape)[:, :columns]


def quantize(weight: NDArray[Any]) -> Int8:
    """Round a weight [N, K] to nearest, the largest value of each group to 127 steps."""
    rows, columns = weight.shape
    padded = np.zeros((rows, _padded(columns)), np.float32)
    padded[:, :columns] = weight
    groups = padded.reshape(rows, -1, GROUP_SIZE)
    scales = np.maximum(np.abs(groups).max(-1) / (MIDDLE - 1), MIN_SCALE).astype(np.float16)
    q = np.clip(np.round(groups / scales.astype(np.float32)[..., None]) + MIDDLE, 0, 2 * MIDDLE - 1)
    return Int8(q.astype(np.uint8).reshape(rows, -1), scales)


def part_names(name: str) -> tuple[str, str]:
    """The tensors that a bundle stores in place of `{name}.weight`."""
    return f"{name}.qweight_int8", f"{name}.scales"


def part_specs(name: str, shape: tuple[int, int]) -> dict[str, Spec]:
    """Type and shape of each of those tensors, for a weight of `shape` [N, K]."""
    rows, columns = shape
    padded = _padded(columns)
    return dict(zip(part_names(name), (("U8", (rows, padded)), ("F16", (rows, padded // GROUP_SIZE))), strict=True))


def from_tensors(name: str, tensors: Mapping[str, NDArray[Any]]) -> Int8:
    """What is stored for the linear `name`."""
    q, scales = (tensors[part] for part in part_names(name))
    return Int8(q, scales)


def _padded(columns: int) -> int:
    return -(-columns // GROUP_SIZE) * GROUP_SIZE
