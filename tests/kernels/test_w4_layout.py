"""The layout of packed weights, against the words that kernels/include/ve_pack.cuh describes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.oracle import random_int4
from vila_edge import int8
from vila_edge.int4 import Int4
from vila_edge.kernels import w4_layout, w8_layout
from vila_edge.kernels.w4_layout import Order, pack, plain_order, rope_order, swiglu_order, unpack

ORDERS = {"plain": (plain_order(70), 70), "swiglu": (swiglu_order(36), 72), "rope": (rope_order(3, 48, 200), 200)}


@pytest.mark.parametrize(("order", "rows"), ORDERS.values(), ids=ORDERS)
def test_unpacking_gives_back_what_was_packed(order: Order, rows: int) -> None:
    weight = random_int4(np.random.default_rng(0), rows, 256)
    again = unpack(pack(weight, order), order)
    assert np.array_equal(again.q, weight.q)
    assert np.array_equal(again.scales, weight.scales) and np.array_equal(again.zeros, weight.zeros)


def test_an_integer_is_where_the_kernel_looks() -> None:
    weight = random_int4(np.random.default_rng(1), 64, 256)
    packed = pack(weight, plain_order(64))
    for row, k in np.random.default_rng(2).integers(0, (64, 256), (100, 2)):
        tile, half, g = row // 16, row % 16 // 8, row % 8
        chunk, run, t, step_of_run, number = k // 64, k % 64 // 32, k % 32 // 8, k % 8 // 4, k % 4
        word = packed.qweight[tile, chunk, 4 * g + t, 2 * run + step_of_run]
        assert word >> (8 * (number // 2) + 16 * (number % 2) + 4 * half) & 0xF == weight.q[row, k]
        assert packed.scales[tile, k // 128, g, half] == weight.scales[row, k // 128]


def test_an_8_bit_integer_is_where_the_kernel_looks() -> None:
    weight = int8.quantize(np.random.default_rng(3).standard_normal((40, 200)))
    words = w8_layout.pack(weight).qweight
    for row, k in np.random.default_rng(4).integers(0, (40, 256), (100, 2)):
        tile, half, g = row // 16, row % 16 // 8, row % 8
        chunk, run, t, step_of_run, number = k // 64, k % 64 // 32, k % 32 // 8, k % 8 // 4, k % 4
        word = words[tile, chunk, run, 4 * g + t, 2 * step_of_run + number // 2]
        assert word >> (16 * half + 8 * (number % 2)) & 0xFF == weight.q[row, k]


def test_unpacking_gives_back_8_bits() -> None:
    weight = int8.quantize(np.random.default_rng(5).standard_normal((70, 200)))
    again = w8_layout.unpack(w8_layout.pack(weight), 70)
    assert np.array_equal(again.q, weight.q) and np.array_equal(again.scales, weight.scales)


@pytest.mark.parametrize("name", ["swiglu", "rope"])
def test_rows_that_meet_are_eight_apart_in_a_tile(name: str) -> None:
    order, rows = ORDERS[name]
    distance = rows // 2 if name == "swiglu" else 24
    tiles = order.reshape(-1, 2, 8)[: 36 // 8 if name == "swiglu" else 3 * 48 // 16]
    assert (tiles[:, 1] - tiles[:, 0] == distance).all()


def test_rows_that_fill_up_are_zero() -> None:
    weight = random_int4(np.random.default_rng(6), 33, 128)
    packed = pack(weight, plain_order(33))
    assert packed.rows == 64 and w4_layout.unpack_groups(packed.scales)[33:].max() == 0


@pytest.mark.parametrize(("rows", "columns"), [(2560, 6912), (3584, 18944)])
def test_a_weight_takes_four_bits_and_three_bytes_a_group(rows: int, columns: int) -> None:
    groups = columns // 128
    weight = Int4(
        np.zeros((32, columns), np.uint8), np.zeros((32, groups), np.float16), np.zeros((32, groups), np.uint8)
    )
    assert pack(weight, plain_order(32)).nbytes * rows // 32 == rows * (columns // 2 + 3 * groups)


def test_other_groups_are_refused() -> None:
    weight = Int4(np.zeros((32, 128), np.uint8), np.zeros((32, 4), np.float16), np.zeros((32, 4), np.uint8))
    with pytest.raises(ValueError, match="4 groups of 128 inputs: the kernels take groups of 128"):
        pack(weight, plain_order(32))


def test_an_order_that_misses_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="32 packed rows does not hold each of 40 rows once"):
        pack(random_int4(np.random.default_rng(7), 40, 128), plain_order(32))


def test_heads_that_are_no_whole_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="2 heads of 40"):
        rope_order(2, 40, 80)
