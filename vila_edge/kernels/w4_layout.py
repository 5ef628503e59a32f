"""How a 4-bit weight lies in a GPU's memory: once, for decode and for prefill.

A tile is 16 rows, a chunk 64 inputs, a group 128. In a chunk of a tile each of 32 lanes owns 16 bytes, one word for
each of four steps; kernels/include/ve_pack.cuh says which integers are in a word, kernels/README.md draws it.
    qweight [tiles, chunks, 32, 4] uint32
    scales  [tiles, groups, 8, 2] float16     rows g and g + 8 of the tile side by side
    qzeros  [tiles, groups, 8, 2] uint8
Rows g and g + 8 are in one lane, so an order of rows can bring together what an epilogue needs together. An order is
an array: the row of the weight for each packed row, -1 for one of zeros that fills up.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.int4 import Int4

TILE = 16  # rows
CHUNK = 64  # inputs
GROUP = 128  # inputs
ROWS = 32  # packed rows are a multiple of it: a block of the GEMV takes up to two tiles
_SHIFTS = ((0, 16, 8, 24), (4, 20, 12, 28))  # of an integer in its word, by row g or g + 8, and by input

Order = NDArray[np.intp]


@dataclass(frozen=True)
class Packed:
    """Integers [tiles, chunks, ...] and scales [tiles, groups, 8, 2] of a packed weight."""

    qweight: NDArray[np.uint32]
    scales: NDArray[np.float16]

    @property
    def rows(self) -> int:
        """With those that fill up."""
        return self.qweight.shape[0] * TILE

    @property
    def columns(self) -> int:
        return self.qweight.shape[1] * CHUNK

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, part.name).nbytes for part in fields(self))


@dataclass(frozen=True)
class PackedW4(Packed):
    """The three arrays of a packed weight."""

    qzeros: NDArray[np.uint8]


def shapes(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Of the arrays of a weight of so many packed rows and columns."""
    tiles, groups = rows // TILE, (rows // TILE, columns // GROUP, TILE // 2, 2)
    return {"qweight": (tiles, columns // CHUNK, 32, 4), "scales": groups, "qzeros": groups}


def plain_order(rows: int) -> Order:
    """Rows as they are."""
    return _filled(np.arange(rows))


def swiglu_order(intermediate_size: int) -> Order:
    """For gate rows followed by as many up rows: eight gates, then the eight they open, in every tile."""
    pairs = np.stack([_filled(np.arange(intermediate_size), TILE)] * 2, -1)
    pairs[:, 1] += np.where(pairs[:, 1] < 0, 0, intermediate_size)
    return np.ascontiguousarray(pairs.reshape(-1, TILE // 2, 2).swapaxes(1, 2)).reshape(-1)


def rope_order(heads: int, head_dim: int, rows: int) -> Order:
    """For `heads` heads that are rotated, then other rows: dimensions i and i + head_dim / 2 meet.

    Raises ValueError if head_dim is no multiple of 16, or there are fewer rows than the heads have.
    """
    if head_dim % TILE or heads * head_dim > rows:
        raise ValueError(f"{heads} heads of {head_dim} in {rows} rows: expected a multiple of {TILE} that fits")
    rotated = np.arange(heads * head_dim).reshape(heads, 2, head_dim // TILE, TILE // 2).swapaxes(1, 2)
    return _filled(np.concatenate([rotated.reshape(-1), np.arange(heads * head_dim, rows)]))


def _filled(rows: NDArray[Any], multiple: int = ROWS) -> Order:
    return np.pad(rows, (0, -len(rows) % multiple), constant_values=-1).astype(np.intp)


def join(*weights: Int4) -> Int4:
    """Weights of the same inputs as one, their rows one after another."""
    return Int4(
        np.concatenate([weight.q for weight in weights]),
        np.concatenate([weight.scales for weight in weights]),
        np.concatenate([weight.zeros for weight in weights]),
    )


def pack(weight: Int4, order: Order) -> PackedW4:
    """A weight [N, K] of groups of 128. Raises ValueError for other groups, or an order that misses a row."""
    rows, columns = weight.q.shape
    if weight.scales.shape[1] * GROUP != columns:
        raise ValueError(f"{weight.scales.shape[1]} groups of {columns} inputs: the kernels take groups of {GROUP}")
    check_order(order, rows)
    chunks = columns // CHUNK
    # tile, row half, g, chunk, run, t, step of the run, input of the step
    q = take_rows(weight.q, order).reshape(-1, 2, 8, chunks, 2, 4, 2, 4)
    words = np.zeros((len(q), chunks, 8, 4, 2, 2), np.uint32)
    for half, shifts in enumerate(_SHIFTS):
        for number, shift in enumerate(shifts):
            words |= q[:, half, ..., number].transpose(0, 2, 1, 4, 3, 5).astype(np.uint32) << np.uint32(shift)
    qweight = words.reshape(len(q), chunks, 32, 4)
    return PackedW4(qweight, pack_groups(weight.scales, order), pack_groups(weight.zeros, order))


def unpack(packed: PackedW4, order: Order) -> Int4:
    """The inverse of `pack`."""
    tiles, chunks = packed.qweight.shape[:2]
    words = packed.qweight.reshape(tiles, chunks, 8, 4, 2, 2)
    q = np.empty((tiles, 2, 8, chunks, 2, 4, 2, 4), np.uint8)
    for half, shifts in enumerate(_SHIFTS):
        for number, shift in enumerate(shifts):
            q[:, half, ..., number] = (words >> np.uint32(shift) & 0xF).transpose(0, 2, 1, 4, 3, 5)
    back = np.argsort(order)[np.count_nonzero(order < 0) :]
    return Int4(
        q.reshape(packed.rows, packed.columns)[back],
        unpack_groups(packed.scales)[back],
        unpack_groups(packed.qzeros)[back],
    )


def check_order(order: Order, rows: int) -> None:
    """Raises ValueError unless every row is there once, among a whole number of pairs of tiles."""
    if len(order) % ROWS or not np.array_equal(np.sort(order[order >= 0]), np.arange(rows)):
        raise ValueError(f"an order of {len(order)} packed rows does not hold each of {rows} rows once")


def take_rows(values: NDArray[Any], order: Order) -> NDArray[Any]:
    """Rows in a packed order, zeros where there is none."""
    taken = values[order]
    taken[order < 0] = 0
    return taken


def pack_groups(values: NDArray[Any], order: Order) -> NDArray[Any]:
    """What is by row and group [N, K/128] to [tiles, groups, 8, 2]."""
    by_tile = take_rows(values, order).reshape(-1, 2, TILE // 2, values.shape[1])
    return np.ascontiguousarray(by_tile.transpose(0, 3, 2, 1))


def unpack_groups(packed: NDArray[Any]) -> NDArray[Any]:
    """The inverse of `pack_groups`, in packed order."""
    return np.ascontiguousarray(packed.transpose(0, 3, 2, 1)).reshape(-1, packed.shape[1])


def pack_bias(bias: NDArray[Any], order: Order) -> NDArray[np.float32]:
    """A bias [N] in the order of the packed rows."""
    return take_rows(bias, order).astype(np.float32)
