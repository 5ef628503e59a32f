"""The lm_head in 8 bits: logits in fp32, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.oracle import halves, product, rms_product
from tests.kernels.products import EPS, put_rms
from tests.kernels.runner import Runner
from vila_edge import int8
from vila_edge.int8 import Int8
from vila_edge.kernels import w8, w8_layout
from vila_edge.kernels.epilogue import Rms, fold_gamma
from vila_edge.kernels.manifest import manifest

TILES = pytest.mark.parametrize("tiles", [1, 2])


def logits(
    kernels: Runner, weight: Int8, x: NDArray[np.float16], n: int, tiles: int, rms: Rms | None = None
) -> NDArray[np.float32]:
    packed = w8_layout.pack(weight)
    qweight, scales = kernels.put(packed.qweight).address, kernels.put(packed.scales).address
    y = kernels.empty((len(x), n), np.float32)
    at = w8.Weight(qweight, scales, packed.rows, packed.columns)
    kernels.run(w8.gemv(at, kernels.put(x).address, y.address, n, x.shape[1], len(x), rms, tiles))
    return y.numpy()


def dequantize(weight: Int8, columns: int) -> NDArray[np.float64]:
    scales = np.repeat(weight.scales.astype(np.float64), 128, 1)
    return ((weight.q.astype(np.float64) - 128) * scales)[:, :columns]


@TILES
@pytest.mark.parametrize(("n", "k", "m"), manifest()["ve_gemv_w8a16_r1"].shapes)
def test_logits_are_right_to_their_last_rounding(shuffled: Runner, tiles: int, n: int, k: int, m: int) -> None:
    rng = np.random.default_rng(n + k + m)
    weight, x = int8.quantize(rng.standard_normal((n, k))), halves(rng, m, k)
    product(dequantize(weight, k), x).check(logits(shuffled, weight, x, n, tiles))


@TILES
def test_the_last_norm_can_be_on_the_way(kernels: Runner, tiles: int) -> None:
    rng = np.random.default_rng(1)
    weight, x, gamma = int8.quantize(rng.standard_normal((40, 200))), halves(rng, 3, 200), rng.uniform(0.5, 3, 200)
    found = logits(kernels, weight, x, 40, tiles, put_rms(kernels, gamma))
    rms_product(dequantize(weight, 200), x, *fold_gamma(gamma), EPS).check(found)


@TILES
def test_a_row_of_a_batch_is_a_batch_of_one(shuffled: Runner, tiles: int) -> None:
    rng = np.random.default_rng(2)
    weight, x = int8.quantize(rng.standard_normal((32, 640))), halves(rng, 8, 640)
    alone = [logits(shuffled, weight, row[None], 32, tiles) for row in x]
    assert np.array_equal(logits(shuffled, weight, x, 32, tiles), np.concatenate(alone))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="k must be a multiple of 8"):
        w8.gemv(w8.Weight(16, 16, 64, 256), 16, 16, 64, 196, 1)
