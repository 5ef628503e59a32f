"""Products with a 4-bit weight, against float64: decode and prefill from the same packed arrays."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.host import ORDERS, Compiled, HostKernels
from tests.kernels.oracle import dequantize, halves, product, random_int4, rms_product
from tests.kernels.products import EPS, PRODUCTS, multiply, put_rms, put_weight
from tests.kernels.runner import Runner
from vila_edge.kernels import w4
from vila_edge.kernels.epilogue import Epilogue, fold_gamma
from vila_edge.kernels.manifest import manifest
from vila_edge.kernels.w4_layout import plain_order

SHAPES = [
    (kind, *shape)
    for kind in PRODUCTS
    for shape in manifest()[f"ve_{kind.replace('_', '_w4a16_' + '128x' * kind.startswith('gemm'))}"].shapes
]


@pytest.mark.parametrize(("kind", "n", "k", "m"), SHAPES)
def test_a_product_is_right_to_its_last_rounding(shuffled: Runner, kind: str, n: int, k: int, m: int) -> None:
    rng = np.random.default_rng(n + k + m)
    weight, x = random_int4(rng, n, k), halves(rng, m, k)
    y, stats = multiply(shuffled, kind, put_weight(shuffled, weight, plain_order(n)), x, Epilogue(n))
    exact = product(dequantize(weight), x)
    exact.check(y)
    assert exact.times_rounding(y) < 1.02 and (stats is None or stats.bank_conflicts == 0)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_the_order_of_threads_changes_no_bit(compiled: Compiled, kind: str) -> None:
    rng = np.random.default_rng(1)
    weight, x = random_int4(rng, 70, 512), halves(rng, 7, 512)
    results = []
    for order in ORDERS:
        kernels = HostKernels(compiled, order)
        results.append(multiply(kernels, kind, put_weight(kernels, weight, plain_order(70)), x, Epilogue(70))[0])
    product(dequantize(weight), x).check(results[0])
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@pytest.mark.parametrize("kind", ["gemv_r1", "gemv_r2"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "rms"])
def test_a_row_of_a_batch_is_a_batch_of_one(shuffled: Runner, kind: str, norm: bool) -> None:
    rng = np.random.default_rng(2)
    x, weight = halves(rng, 8, 1280), put_weight(shuffled, random_int4(rng, 32, 1280), plain_order(32))
    rms = put_rms(shuffled, rng.uniform(0.5, 1.5, 1280)) if norm else None
    alone = np.concatenate([multiply(shuffled, kind, weight, row[None], Epilogue(32), rms)[0] for row in x])
    for m in range(2, 9):
        assert np.array_equal(multiply(shuffled, kind, weight, x[:m], Epilogue(32), rms)[0], alone[:m])


@pytest.mark.parametrize("kind", ["gemm_32", "gemm_64", "gemm_128"])
def test_a_token_does_not_depend_on_the_others(shuffled: Runner, kind: str) -> None:
    rng = np.random.default_rng(3)
    x, weight = halves(rng, 50, 256), put_weight(shuffled, random_int4(rng, 64, 256), plain_order(64))
    whole, _ = multiply(shuffled, kind, weight, x, Epilogue(64))
    assert np.array_equal(multiply(shuffled, kind, weight, x[13:30], Epilogue(64))[0], whole[13:30])


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize(("n", "k", "m"), manifest()["ve_gemv_w4a16_rms_r1"].shapes)
def test_a_norm_on_the_way_rounds_once(shuffled: Runner, tiles: int, n: int, k: int, m: int) -> None:
    rng = np.random.default_rng(4)
    weight, x, gamma = random_int4(rng, n, k), halves(rng, m, k), rng.uniform(0.1, 9, k)
    packed, rms = put_weight(shuffled, weight, plain_order(n)), put_rms(shuffled, gamma)
    y, _ = multiply(shuffled, f"gemv_r{tiles}", packed, x, Epilogue(n), rms)
    rms_product(dequantize(weight), x, *fold_gamma(gamma), EPS).check(y)


def test_a_norm_on_the_way_is_as_good_as_a_norm_before(shuffled: Runner) -> None:
    """Even with inputs near the largest float16, as some decoders have, and a large gamma for them."""
    rng = np.random.default_rng(5)
    weight, gamma = random_int4(rng, 64, 1536), rng.uniform(0.2, 2, 1536)
    x = (halves(rng, 4, 1536) * 30).astype(np.float16)
    x[:, 7], gamma[7] = 40000, 8
    exact = x.astype(np.float64) * gamma / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + EPS)
    dense = dequantize(weight)
    before = (exact.astype(np.float16).astype(np.float64) @ dense.T).astype(np.float16) - exact @ dense.T
    packed, rms = put_weight(shuffled, weight, plain_order(64)), put_rms(shuffled, gamma)
    on_the_way = multiply(shuffled, "gemv_r1", packed, x, Epilogue(64), rms)[0] - exact @ dense.T
    assert np.linalg.norm(on_the_way) <= 1.1 * np.linalg.norm(before)


@pytest.mark.parametrize(("m", "tokens"), [(1, 32), (33, 64), (100, 128), (196, 128), (1024, 128)])
def test_a_prefill_takes_the_block_that_wastes_least(m: int, tokens: int) -> None:
    launch = w4.gemm(w4.Weight(16, 16, 16, 7680, 2560), 16, 16, m, Epilogue(7680))
    assert launch.kernel == f"ve_gemm_w4a16_128x{tokens}" and launch.grid == (-(-m // tokens), 60, 1)


def test_sizes_that_do_not_fit_are_refused() -> None:
    weight = w4.Weight(16, 16, 16, 64, 256)
    with pytest.raises(ValueError, match="a batch of 9"):
        w4.gemv(weight, 16, 16, 9, Epilogue(64))
    with pytest.raises(ValueError, match="65 columns of a result from 64 packed rows"):
        w4.gemv(weight, 16, 16, 1, Epilogue(65))
    with pytest.raises(ValueError, match="multiples of 32 and 128"):
        w4.Weight(16, 16, 16, 64, 192)
