"""The 4-bit layout: what is packed comes back, and what is rounded stays near."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vila_edge import int4, int8
from vila_edge.export.grid import Grid
from vila_edge.export.workers import workers

RNG = np.random.default_rng(4)


def test_the_low_nibble_comes_first() -> None:
    packed = int4.pack(np.array([[1, 2, 3], [15, 0, 7]], np.uint8))
    assert packed.tolist() == [[0x21, 0x03], [0x0F, 0x07]]
    assert int4.unpack(packed, 3).tolist() == [[1, 2, 3], [15, 0, 7]]


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_stored_tensors_are_the_weight_that_was_quantised(groups: int) -> None:
    weight = int4.quantize(RNG.standard_normal((5, 32 * groups)), 32)
    tensors = int4.to_tensors("linear", weight)
    assert tensors["linear.qweight"].shape == (5, 16 * groups)
    assert tensors["linear.scales"].dtype == np.float16
    read = int4.from_tensors("linear", tensors)
    np.testing.assert_array_equal(read.dequantize(), weight.dequantize())


def test_no_rows_are_an_empty_weight() -> None:
    """As of an embedding table that is stored in integers, when no token is looked up."""
    tensors = {name: part[:0] for name, part in int4.to_tensors("linear", int4.quantize(np.ones((3, 64)), 32)).items()}
    assert int4.from_tensors("linear", tensors).dequantize().shape == (0, 64)
    wide = int8.quantize(np.ones((3, 200)))
    assert int8.Int8(wide.q[:0], wide.scales[:0]).dequantize(200).shape == (0, 200)


def test_rounding_is_within_half_a_step_of_each_group() -> None:
    weight = RNG.standard_normal((16, 128)).astype(np.float32)
    rounded = int4.quantize(weight, 64)
    step = np.repeat(rounded.scales.astype(np.float32), 64, 1)
    # Half a step for rounding, and another half where the zero point was rounded at the edge of the range.
    assert (np.abs(rounded.dequantize() - weight) <= step + 1e-6).all()
    assert np.abs(rounded.dequantize() - weight).mean() < 0.3 * step.mean()


def test_known_integers() -> None:
    """From -1.4 to 1.6 in 15 steps: scale 0.2, zero point 7."""
    weight = int4.quantize(np.array([[-1.4, -0.65, 0.0, 0.05, 0.78, 1.6, 0.25, -0.25] * 2]), 16)
    assert weight.scales.tolist() == [[np.float16(0.2)]]
    assert weight.zeros.tolist() == [[7]]
    assert weight.q[0, :8].tolist() == [0, 4, 7, 7, 11, 15, 8, 6]


def test_a_group_of_equal_weights_is_not_a_division_by_zero() -> None:
    assert np.isfinite(int4.quantize(np.full((2, 32), 0.25), 32).dequantize()).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_torch_searches_with_what_numpy_stores(symmetric: bool) -> None:
    weight = RNG.standard_normal((150, 96)).astype(np.float32) ** 3
    want, grid = int4.quantize(weight, 32, symmetric), Grid(32, symmetric)
    np.testing.assert_array_equal(grid.round(torch.from_numpy(weight)).numpy(), want.dequantize())
    with workers(2) as pool:
        got = grid.quantize(torch.from_numpy(weight), pool)
    np.testing.assert_array_equal(got.dequantize(), want.dequantize())


def test_a_symmetric_weight_stores_no_zero_points() -> None:
    """Known integers: the largest magnitude is 7 steps from zero, which is 8."""
    weight = int4.quantize(np.array([[-1.4, 0.0, 0.2, 0.6] * 4]), 16, symmetric=True)
    assert weight.scales.tolist() == [[np.float16(0.2)]]
    assert weight.q[0, :4].tolist() == [1, 8, 9, 11]
    tensors = int4.to_tensors("linear", weight, symmetric=True)
    assert set(tensors) == {"linear.qweight", "linear.scales"}
    np.testing.assert_array_equal(int4.from_tensors("linear", tensors).dequantize(), weight.dequantize())


def test_a_row_that_is_no_whole_number_of_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 48 inputs has no whole number of groups of 32"):
        int4.quantize(np.zeros((2, 48)), 32)
