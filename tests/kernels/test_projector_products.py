"""One product of a projector with what is fused into it, against float64: every kernel, and hard inputs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.kernels.projections import ROUNDING, error, put_all, random_case
from tests.kernels.runner import Runner
from vila_edge.kernels.manifest import manifest
from vila_edge.kernels.projector import TILES, Norm, fold
from vila_edge.reference.numpy_ops import NumpyOps

KERNELS = [(k.name, shape) for k in manifest().kernels.values() if k.file == "projector.cu" for shape in k.shapes]


@pytest.mark.parametrize(("kernel", "shape"), KERNELS)
def test_every_kernel_is_right_to_a_rounding(
    kernels: Runner, kernel: str, shape: tuple[int, int, int, int, int]
) -> None:
    random_case(*shape, norm="norm" in kernel).check(kernels, tile=kernel.rpartition("_")[2])


def test_rows_of_10368_numbers(shuffled: Runner) -> None:
    case = random_case(images=1, grid=5, block=3, channels=1152, outputs=64)
    assert case.rows().shape == (1, 4, 10368)
    case.check(shuffled, "64x64")


@pytest.mark.parametrize("norm", [False, True])
def test_every_tile_and_batch_gives_the_same_bits(shuffled: Runner, norm: bool) -> None:
    case = random_case(images=3, grid=13, block=2, channels=40, outputs=136, norm=norm)
    whole, _ = case.run(shuffled, TILES[0])
    for tile in TILES[1:]:
        assert np.array_equal(case.run(shuffled, tile)[0], whole)
    alone = dataclasses.replace(case, x=case.x[1:2])
    assert np.array_equal(alone.run(shuffled, "112x64")[0], whole[1:2])


@pytest.mark.parametrize("mean", [0, 10, 60])
@pytest.mark.parametrize("outlier", [1, 1000])
def test_a_norm_behind_the_product_bears_a_large_mean_and_an_outlier(shuffled: Runner, mean: int, outlier: int) -> None:
    """It is as good as a norm before the product, whose output is rounded to 16 bits, as long as that is not exact."""
    case = random_case(images=1, grid=9, block=2, channels=128, outputs=64)
    x = np.random.default_rng(7).standard_normal(case.x.shape) + mean
    x[..., 3] *= outlier
    case = dataclasses.replace(case, x=x.astype(np.float16))
    p = case.parameters
    halves = {"w.weight": p["linear.weight"].astype(np.float16).astype(np.float64), "w.bias": p["linear.bias"]}
    ops, normed = NumpyOps(halves), case.rows().astype(np.float16).astype(np.float64)
    unfused = ops.gelu(ops.linear(normed, "w", case.outputs), "none").astype(np.float16)
    limit = max(1.1 * error(unfused, case.expected()), ROUNDING)
    assert error(case.run(shuffled, "64x64")[0], case.expected()) < limit


def test_a_row_of_equal_numbers_is_normed_to_beta(shuffled: Runner) -> None:
    """No variance: rstd is 1 / sqrt(eps), and next to nothing may be left for it to multiply."""
    case = random_case(images=1, grid=4, block=2, channels=64, outputs=64)
    case = dataclasses.replace(case, x=np.full_like(case.x, 0.75))
    assert error(case.run(shuffled, "64x64")[0], case.expected()) < 4 * ROUNDING


def test_gelu_is_the_exact_one(shuffled: Runner) -> None:
    """The approximation by tanh is off by 4e-4, which shows where GELU is small."""
    bias = np.linspace(-6, 6, 128)
    product = dataclasses.replace(fold("w", np.zeros((128, 8)), bias), gelu=True)
    x, out = shuffled.put(np.zeros((1, 8), np.float16)).address, shuffled.empty((1, 128), np.float16)
    shuffled.run(product.launch(put_all(shuffled, product.arrays), x, out.address, images=1, tokens=1, stride=128))
    expected = NumpyOps({}).gelu(bias, "none")
    np.testing.assert_allclose(out.numpy()[0], expected, rtol=1.01 * ROUNDING, atol=4e-7)


def test_weights_beyond_16_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="w with the norm before it has weights beyond 16 bits"):
        fold("w", np.ones((8, 8)), np.ones(8), norm=Norm(np.full(8, 1e5), np.zeros(8), 1e-5))


def test_launches_that_do_not_fit_are_refused() -> None:
    product = fold("w", np.ones((8, 8)), np.ones(8))
    at = dict.fromkeys(product.arrays, 16)
    with pytest.raises(ValueError, match="a multiple of 8"):
        product.launch(at, 16, 32, images=1, tokens=1, stride=12)
    with pytest.raises(ValueError, match="addresses that are multiples of 16"):
        product.launch(at, 16, 40, images=1, tokens=1, stride=8)
    with pytest.raises(ValueError, match="too many"):
        product.launch(at, 16, 32, images=2**31, tokens=1, stride=8)
