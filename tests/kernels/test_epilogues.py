"""What a product does with its result, in every kernel that multiplies with 4 bits."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.oracle import beside, dequantize, halves, product, random_int4, rms_product, rotate, swiglu
from tests.kernels.products import EPS, PRODUCTS, make_launch, multiply, put_rms, put_weight
from tests.kernels.runner import Runner
from vila_edge.architecture import rope_table
from vila_edge.config import RopeConfig
from vila_edge.kernels.epilogue import Epilogue, Rope, fold_gamma
from vila_edge.kernels.w4_layout import join, pack_bias, plain_order, rope_order, swiglu_order

M = 5


@pytest.mark.parametrize("kind", PRODUCTS)
def test_bias_and_residual_are_added_before_rounding(kernels: Runner, kind: str) -> None:
    rng = np.random.default_rng(0)
    weight, x, order = random_int4(rng, 70, 256), halves(rng, M, 256), plain_order(70)
    bias, residual = rng.standard_normal(70).astype(np.float32), halves(rng, M, 70)
    y = kernels.put(residual)  # where the sum goes too
    end = Epilogue(70, bias=kernels.put(pack_bias(bias, order)).address, residual=y.address)
    kernels.run(make_launch(kind, put_weight(kernels, weight, order), kernels.put(x).address, y.address, M, end))
    (product(dequantize(weight), x) + bias + residual.astype(np.float64)).check(y.numpy())


@pytest.mark.parametrize("kind", PRODUCTS)
def test_gates_open_what_meets_them(kernels: Runner, kind: str) -> None:
    rng = np.random.default_rng(1)
    gate, up, x = random_int4(rng, 36, 256), random_int4(rng, 36, 256), halves(rng, M, 256)
    packed = put_weight(kernels, join(gate, up), swiglu_order(36))
    y, _ = multiply(kernels, kind, packed, x, Epilogue(36, swiglu=True))
    swiglu(product(dequantize(gate), x), product(dequantize(up), x)).check(y)


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("head_dim", [32, 48])
def test_queries_and_keys_turn_and_values_do_not(kernels: Runner, kind: str, head_dim: int) -> None:
    rng = np.random.default_rng(2)
    heads, n = 3, 4 * head_dim  # two of queries, one of keys, one of values
    weight, x, order = random_int4(rng, n, 256), halves(rng, M, 256), rope_order(heads, head_dim, n)
    bias = rng.standard_normal(n).astype(np.float32)
    positions = np.array([0, 7, 7, 99, 3], np.int32)
    cosines, sines = rope_table(0, 100, head_dim, RopeConfig(rope_theta=10000.0))
    at_cosines, at_sines, at_positions = (kernels.put(a).address for a in (cosines, sines, positions))
    rope = Rope(at_cosines, at_sines, at_positions, head_dim, heads)
    end = Epilogue(n, bias=kernels.put(pack_bias(bias, order)).address, rope=rope)
    y, _ = multiply(kernels, kind, put_weight(kernels, weight, order), x, end)

    plain = product(dequantize(weight), x) + bias
    angles = cosines[positions].astype(np.float64), sines[positions].astype(np.float64)
    turned = [rotate(plain[head * head_dim : (head + 1) * head_dim], *angles) for head in range(heads)]
    beside([*turned, plain[heads * head_dim :]]).check(y)


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_whole_gate_of_a_decoder_in_one_launch(shuffled: Runner, tiles: int) -> None:
    rng = np.random.default_rng(3)
    gate, up, x = random_int4(rng, 48, 1536), random_int4(rng, 48, 1536), halves(rng, 8, 1536)
    gamma = rng.uniform(0.5, 3, 1536)
    packed, rms = put_weight(shuffled, join(gate, up), swiglu_order(48)), put_rms(shuffled, gamma)
    y, _ = multiply(shuffled, f"gemv_r{tiles}", packed, x, Epilogue(48, swiglu=True), rms)
    norm = (*fold_gamma(gamma), EPS)
    swiglu(rms_product(dequantize(gate), x, *norm), rms_product(dequantize(up), x, *norm)).check(y)


def test_gamma_is_divided_by_a_power_of_two_if_it_is_large() -> None:
    gamma = np.array([0.5, -5.0, 1.25])
    folded, scale = fold_gamma(gamma)
    assert scale == 8 and np.array_equal(folded.astype(np.float64) * scale, gamma)
    assert fold_gamma(np.array([0.3, 1.0]))[1] == 1


def test_epilogues_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="SwiGLU and RoPE at once"):
        Epilogue(64, swiglu=True, rope=Rope(16, 16, 16, 32, 1)).check(128)
    with pytest.raises(ValueError, match="3 heads of 32 in 64 columns"):
        Epilogue(64, rope=Rope(16, 16, 16, 32, 3)).check(64)
