"""Launches of what stands between the products of a decoder: RMSNorm with its residual, and the embedding of ids."""

from __future__ import annotations

from vila_edge.kernels.launch import Launch

VECTOR = 8  # halves that a thread reads at once
MAX_WIDTH = 8192  # of a row that rmsnorm.cu holds in registers


def rmsnorm(x: int, weight: int, y: int, rows: int, width: int, eps: float, residual: int = 0) -> Launch:
    """y = norm(x) * weight, or residual += x and y = norm(residual) * weight. Raises ValueError for a width.

    Addresses of x, y, residual [rows, width] and weight [width], float16. y may be x. The residual is rounded before
    it is normed, so that the next block sees the number that this one saw.
    """
    if not 0 < width <= MAX_WIDTH or width % VECTOR:
        raise ValueError(f"rmsnorm of {width} numbers: expected a multiple of {VECTOR} up to {MAX_WIDTH}")
    if residual:
        return Launch("ve_rmsnorm_f16_residual", (rows, 1, 1), (x, weight, residual, y, width, eps))
    return Launch("ve_rmsnorm_f16", (rows, 1, 1), (x, weight, y, width, eps))


def embed(ids: int, table: int, out: int, count: int, rows: int, width: int, stride: int = 0) -> Launch:
    """Rows of a table [rows, width] float16 to `count` rows of `out`, `stride` numbers apart. Raises ValueError.

    `ids` int32 [count] on the device. Below 0: the row of `out` stays as it is, for an image's embeddings. From `rows`
    on: the row becomes NaN, so that a wrong id is seen.
    """
    stride = stride or width
    if width % VECTOR or stride % VECTOR or stride < width:
        raise ValueError(
            f"embeddings of {width} numbers, {stride} apart: expected multiples of {VECTOR}, apart by at least their width"
        )
    return Launch("ve_embed_f16", (count, 1, 1), (ids, table, out, rows, width, stride))
