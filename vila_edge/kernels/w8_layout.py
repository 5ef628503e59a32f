"""How an 8-bit weight lies in a GPU's memory: tiles, chunks and groups as in `w4_layout`, twice the bytes.

    qweight [tiles, chunks, 2, 32, 4] uint32   two steps of every lane, then the other two
    scales  [tiles, groups, 8, 2] float16
Every zero point is 128. A word holds inputs k, k + 1 of row g, then of row g + 8.
"""

from __future__ import annotations

import numpy as np

from vila_edge.int8 import Int8
from vila_edge.kernels import w4_layout
from vila_edge.kernels.w4_layout import CHUNK, Packed


class PackedW8(Packed):
    """The two arrays of a packed weight. Its columns count those that fill up the last group."""


def shapes(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Of the arrays of a weight of so many packed rows and columns."""
    narrow = w4_layout.shapes(rows, columns)
    tiles, chunks, *_ = narrow["qweight"]
    return {"qweight": (tiles, chunks, 2, 32, 4), "scales": narrow["scales"]}


def pack(weight: Int8) -> PackedW8:
    """A weight as a bundle stores it; its rows stay in order."""
    order = w4_layout.plain_order(len(weight.q))
    chunks = weight.q.shape[1] // CHUNK
    # tile, row half, g, chunk, run, t, step of the run, pair, input of the pair
    q = w4_layout.take_rows(weight.q, order).reshape(-1, 2, 8, chunks, 2, 4, 2, 2, 2)
    lanes = np.ascontiguousarray(q.transpose(0, 3, 4, 2, 5, 6, 7, 1, 8)).reshape(len(q), chunks, 2, 32, 16)
    return PackedW8(lanes.view("<u4"), w4_layout.pack_groups(weight.scales, order))


def unpack(packed: PackedW8, rows: int) -> Int8:
    """The inverse of `pack`."""
    tiles, chunks = packed.qweight.shape[:2]
    q = packed.qweight.view(np.uint8).reshape(tiles, chunks, 2, 8, 4, 2, 2, 2, 2).transpose(0, 7, 3, 1, 2, 4, 5, 6, 8)
    scales = w4_layout.unpack_groups(packed.scales)
    return Int8(np.ascontiguousarray(q).reshape(packed.rows, packed.columns)[:rows], scales[:rows])
