"""RMSNorm and the embedding of ids against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.runner import Runner
from vila_edge.kernels import elementwise
from vila_edge.kernels.manifest import manifest
from vila_edge.reference.numpy_ops import NumpyOps

EPS = 1e-5
ROUNDING = 2.0**-11  # of a float16, relative


@pytest.mark.parametrize("shape", manifest()["ve_rmsnorm_f16"].shapes)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rmsnorm_is_exact_to_a_rounding(kernels: Runner, shape: tuple[int, int], with_residual: bool) -> None:
    rng = np.random.default_rng(0)
    x, residual = (rng.standard_normal(shape).astype(np.float16) * 4 for _ in range(2))
    weight = rng.standard_normal(shape[1]).astype(np.float16)
    normed = residual + x if with_residual else x  # float16: rounded as it is stored
    expected = NumpyOps({"n.weight": weight.astype(np.float64)}).rms_norm(normed.astype(np.float64), "n", EPS)

    y, stored = kernels.empty(shape, np.float16), kernels.put(residual)
    kernels.run(
        elementwise.rmsnorm(
            kernels.put(x).address,
            kernels.put(weight).address,
            y.address,
            *shape,
            EPS,
            residual=stored.address if with_residual else 0,
        )
    )
    assert np.array_equal(stored.numpy(), normed if with_residual else residual)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1.01 * ROUNDING, atol=1e-7)


def test_rmsnorm_may_write_over_its_input(shuffled: Runner) -> None:
    values = np.random.default_rng(1).standard_normal((2, 2056)).astype(np.float16)
    weight = shuffled.put(np.ones(2056, np.float16)).address
    x, y = shuffled.put(values), shuffled.empty(values.shape, np.float16)
    shuffled.run(elementwise.rmsnorm(x.address, weight, y.address, 2, 2056, EPS))
    shuffled.run(elementwise.rmsnorm(x.address, weight, x.address, 2, 2056, EPS))
    assert np.array_equal(x.numpy(), y.numpy())


@pytest.mark.parametrize("shape", manifest()["ve_embed_f16"].shapes)
def test_embed_copies_the_rows_that_ids_name(kernels: Runner, shape: tuple[int, int, int]) -> None:
    count, rows, width = shape
    rng = np.random.default_rng(2)
    table = rng.standard_normal((rows, width)).astype(np.float16)
    ids = rng.integers(0, rows, count).astype(np.int32)
    ids[:2] = 0, rows - 1
    out = kernels.empty((count, width + 8), np.float16)
    addresses = kernels.put(ids).address, kernels.put(table).address, out.address
    kernels.run(elementwise.embed(*addresses, *shape, stride=width + 8))
    assert np.array_equal(out.numpy()[:, :width], table[ids])
    assert np.isnan(out.numpy()[:, width:]).all()  # what lies between the rows is left alone


def test_a_negative_id_leaves_its_row_and_one_too_large_makes_it_nan(shuffled: Runner) -> None:
    ids = np.array([-1, 3, 1], np.int32)
    out = shuffled.put(np.full((3, 8), 5, np.float16))
    table = shuffled.put(np.ones((3, 8), np.float16)).address
    shuffled.run(elementwise.embed(shuffled.put(ids).address, table, out.address, 3, 3, 8))
    np.testing.assert_array_equal(out.numpy()[:, 0], [5, np.nan, 1])


def test_widths_that_the_kernels_cannot_read_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8 up to 8192"):
        elementwise.rmsnorm(16, 32, 48, 1, 8200, EPS)
    with pytest.raises(ValueError, match="multiples of 8"):
        elementwise.embed(16, 32, 48, 1, 1, 12)
