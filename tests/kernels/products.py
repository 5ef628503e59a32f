"""Packed weights on a device, and the launches that multiply with them, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.host import Stats
from tests.kernels.runner import Runner
from vila_edge.int4 import Int4
from vila_edge.kernels import w4
from vila_edge.kernels.epilogue import Epilogue, Rms, fold_gamma
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.w4_layout import Order, pack

# Every kernel that multiplies with 4 bits: tiles a block of the GEMV, tokens a block of the GEMM.
PRODUCTS = ("gemv_r1", "gemv_r2", "gemm_32", "gemm_64", "gemm_128")
EPS = 1e-6


def put_weight(kernels: Runner, weight: Int4, order: Order) -> w4.Weight:
    packed = pack(weight, order)
    qweight, scales, qzeros = (kernels.put(a).address for a in (packed.qweight, packed.scales, packed.qzeros))
    return w4.Weight(qweight, scales, qzeros, packed.rows, packed.columns)


def put_rms(kernels: Runner, gamma: NDArray[Any]) -> Rms:
    folded, scale = fold_gamma(gamma)
    return Rms(kernels.put(folded).address, scale, EPS)


def make_launch(kind: str, weight: w4.Weight, x: int, y: int, m: int, end: Epilogue, rms: Rms | None = None) -> Launch:
    if kind.startswith("gemv_r"):
        return w4.gemv(weight, x, y, m, end, rms, tiles=int(kind[6:]))
    assert rms is None
    return w4.gemm(weight, x, y, m, end, tokens=int(kind[5:]))


def multiply(
    kernels: Runner,
    kind: str,
    weight: w4.Weight,
    x: NDArray[Any],
    end: Epilogue,
    rms: Rms | None = None,
) -> tuple[NDArray[np.float16], Stats | None]:
    """y [m, n] of x [m, k], and what the launch did."""
    y = kernels.empty((len(x), end.n), np.float16)
    stats = kernels.run(make_launch(kind, weight, kernels.put(x).address, y.address, len(x), end, rms))
    return y.numpy(), stats
