"""The grid of 4 bits in torch: what the search rounds with. `int4.quantize` does the same for good, in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vila_edge import int4
from vila_edge.export.workers import Workers

CHUNK_ROWS = 64  # of a weight that are rounded at a time: fits into a cache, whatever the number of threads


@dataclass(frozen=True)
class Grid:
    """Groups of inputs that share a scale, and whether zero lies in the middle of it."""

    group_size: int = 128
    symmetric: bool = False

    def round(self, weight: Tensor) -> Tensor:
        """The weight [N, K] that `int4.quantize` would store, as floats."""
        groups = weight.unflatten(-1, (-1, self.group_size))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        span = (-low).maximum(high) / (int4.MIDDLE - 1) if self.symmetric else (high - low) / int4.MAX_INT
        scales = span.clamp_(min=int4.MIN_SCALE / int4.MAX_INT).half().float()
        q = (groups / scales).round_()
        if self.symmetric:
            q.clamp_(-int4.MIDDLE, int4.MAX_INT - int4.MIDDLE)
        else:
            zeros = (-low / scales).round_().clamp_(0, int4.MAX_INT)
            q.add_(zeros).clamp_(0, int4.MAX_INT).sub_(zeros)
        return q.mul_(scales).flatten(-2)

    def quantize(self, weight: Tensor, pool: Workers) -> int4.Int4:
        """The integers of a weight [N, K]."""
        parts = list(pool.map(self._quantize_rows, weight.split(CHUNK_ROWS)))
        q, scales, zeros = zip(*((part.q, part.scales, part.zeros) for part in parts), strict=True)
        return int4.Int4(np.concatenate(q), np.concatenate(scales), np.concatenate(zeros))

    def _quantize_rows(self, rows: Tensor) -> int4.Int4:
        return int4.quantize(rows.cpu().numpy(), self.group_size, self.symmetric)
