"""AutoAWQ's and llm-awq's packed linears: the bits are those that the originals wrote, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vila_edge import int4
from vila_edge.errors import CheckpointError
from vila_edge.export.awq_formats import (
    Packing,
    dequantize,
    dequantize_v2,
    pack_gemm,
    pack_v2,
    unpack,
    unpack_gemm,
    unpack_v2,
    zero_points,
)
from vila_edge.export.torch_file import TorchFile
from vila_edge.int4 import Int4

GOLDEN = Path(__file__).parent / "golden"
LLAMA = GOLDEN / "awq_llama_w4g128"
RNG = np.random.default_rng(5)

Tensors = dict[str, NDArray[Any]]


def same(found: Int4, want: Int4) -> bool:
    return same_bits(vars(found), vars(want))


def same_bits(found: Tensors, want: Tensors) -> bool:
    return found.keys() == want.keys() and all(
        found[name].dtype == want[name].dtype and found[name].tobytes() == want[name].tobytes() for name in want
    )


def weight(rows: int, columns: int, group_size: int) -> Int4:
    """Random integers, with groups of every zero point."""
    groups = columns // group_size
    scales = (RNG.random((rows, groups)) * 0.02 + 1e-3).astype(np.float16)
    q = RNG.integers(0, 16, (rows, columns), dtype=np.uint8)
    return Int4(q, scales, RNG.integers(0, 16, (rows, groups), dtype=np.uint8))


@pytest.fixture(scope="module")
def autoawq() -> tuple[Int4, Tensors, NDArray[np.float16]]:
    """A linear, what AutoAWQ's WQLinear_GEMM.from_linear made of it, and what its dequantize_gemm says [K, N]."""
    stored = np.load(GOLDEN / "autoawq_gemm.npz")
    tensors = {name: stored[name] for name in ("X.qweight", "X.scales", "X.qzeros")}
    return Int4(stored["q"], stored["scales"], stored["zeros"]), tensors, stored["dequantised"]


@pytest.fixture(scope="module")
def llm_awq() -> dict[str, tuple[Int4, Tensors]]:
    """The first block of a model: its integers before packing, and what llm-awq stored."""
    file, ints = TorchFile(LLAMA / "tiny-w4-g128-awq-v2.pt"), np.load(LLAMA / "ints.npz")
    found = {}
    for name in (key.removesuffix(".intweight") for key in ints if key.endswith(".intweight")):
        tensors = {f"{name}.{part}": file.array(f"{name}.{part}") for part in ("qweight", "scales", "scaled_zeros")}
        parts = (ints[f"{name}.{part}"] for part in ("intweight", "scales_nk", "zeros_nk"))
        found[name] = (Int4(*parts), tensors)
    assert len(found) == 7
    return found


def test_the_bits_of_autoawq(autoawq: tuple[Int4, Tensors, NDArray[np.float16]]) -> None:
    integers, tensors, dequantised = autoawq
    assert same(unpack_gemm("X", tensors), integers)
    assert same_bits(pack_gemm("X", integers), tensors)
    found = dequantize(Packing("autoawq-gemm", 32), "X", tensors)
    np.testing.assert_allclose(found, dequantised.T, atol=2e-4)  # computed in 16 bits there
    np.testing.assert_array_equal(zero_points(Packing("autoawq-gemm", 32), "X", tensors), integers.zeros)


def test_the_bits_of_llm_awq(llm_awq: dict[str, tuple[Int4, Tensors]]) -> None:
    for name, (integers, tensors) in llm_awq.items():
        assert same(unpack_v2(name, tensors), integers), name
        assert same_bits(pack_v2(name, integers), tensors), name
        np.testing.assert_array_equal(zero_points(Packing("llm-awq-v2", 128), name, tensors), integers.zeros)


def test_a_word_of_autoawq_by_hand() -> None:
    """Output n of the eight lies in the nibble that the order 0 2 4 6 1 3 5 7 gives it."""
    q = np.zeros((8, 16), np.uint8)
    q[:, 3] = range(1, 9)
    tensors = pack_gemm("X", Int4(q, np.ones((8, 1), np.float16), np.full((8, 1), 8, np.uint8)))
    assert tensors["X.qweight"].view(np.uint32).ravel().tolist() == [0, 0, 0, 0x86427531, *[0] * 12]
    assert tensors["X.qzeros"].view(np.uint32).tolist() == [[0x88888888]]


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(8, 16, 16), (24, 112, 16), (16, 256, 128), (40, 96, 96)])
def test_autoawq_there_and_back(rows: int, columns: int, group_size: int) -> None:
    integers = weight(rows, columns, group_size)
    assert same(unpack_gemm("X", pack_gemm("X", integers)), integers)


@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "padded"),
    [(4, 128, 128, 8), (12, 1152, 128, 16), (8, 64, 64, 16), (8, 2048, 32, 64), (8, 64, 16, 64), (4, 256, 256, 8)],
)
def test_llm_awq_there_and_back(rows: int, columns: int, group_size: int, padded: int) -> None:
    integers = weight(rows, columns, group_size)
    tensors = pack_v2("X", integers)
    assert tensors["X.scales"].shape == tensors["X.scaled_zeros"].shape == (padded, rows)
    assert not tensors["X.scales"][columns // group_size :].any()
    assert same(unpack_v2("X", tensors, group_size), integers)


def test_padding_to_a_multiple_of_eight_is_read_for_small_groups_too() -> None:
    integers = weight(8, 64, 32)
    tensors = pack_v2("X", integers)
    tensors |= {part: tensors[part][:8] for part in ("X.scales", "X.scaled_zeros")}
    assert same(unpack_v2("X", tensors, 32), integers)


def test_llm_awq_s_own_weights_are_a_rounding_off_the_integers() -> None:
    integers = weight(64, 256, 64)
    tensors = pack_v2("X", integers)
    own, ours = dequantize_v2("X", tensors, 64), integers.dequantize()
    groups = tensors["X.scaled_zeros"][:4].T.astype(np.float32)
    want = integers.q * np.repeat(integers.scales.astype(np.float32), 64, 1) + np.repeat(groups, 64, 1)
    np.testing.assert_array_equal(own, want)
    step = np.repeat(integers.scales.astype(np.float32), 64, 1)
    assert 0 < np.abs((own - ours) / step).max() < 15 * 2**-11 + 1e-4
    np.testing.assert_array_equal(dequantize(Packing("llm-awq-v2", 64), "X", tensors), own)


@pytest.mark.parametrize("scale", [0.0, 2**-24, 1e-7, 6.6e-7, 6.1e-5])
def test_groups_of_hardly_any_scale(scale: float) -> None:
    """A group of nothing has no zero point to be found, and no need of one."""
    integers = weight(8, 128, 64)
    integers.scales[:, 0] = scale
    found = unpack_v2("X", pack_v2("X", integers), 64)
    np.testing.assert_array_equal(found.dequantize()[:, 64:], integers.dequantize()[:, 64:])
    np.testing.assert_allclose(found.dequantize(), integers.dequantize(), atol=2**-24)
    if scale == 0:
        assert not found.zeros[:, 0].any()
        assert not found.dequantize()[:, :64].any()
    assert same(unpack_gemm("X", pack_gemm("X", integers)), integers)


def test_zero_points_that_a_config_denies() -> None:
    denies, tensors = Packing("autoawq-gemm", 32, zero_point=False), pack_gemm("X", weight(8, 64, 32))
    with pytest.raises(CheckpointError, match="tensor 'X.qzeros' has zero points that are not 8, but the config says"):
        unpack(denies, "X", tensors)
    symmetric = int4.quantize(RNG.standard_normal((8, 64)), 32, symmetric=True)
    assert same(unpack(denies, "X", pack_gemm("X", symmetric)), symmetric)


def test_what_cannot_be_packed_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="12 outputs, expected a multiple of 8"):
        pack_gemm("X", weight(12, 64, 32))
    for rows, columns in ((6, 64), (8, 96)):
        with pytest.raises(ValueError, match="expected outputs by 4 and inputs by 64"):
            pack_v2("X", weight(rows, columns, 32))


def changed(tensors: Tensors, part: str, value: Any, at: Any = ...) -> Tensors:
    array = tensors[f"X.{part}"].copy()
    array[at] = value
    return tensors | {f"X.{part}": array}


V2 = pack_v2("X", weight(8, 128, 64))
GEMM = pack_gemm("X", weight(8, 128, 64))
SCALE = float(V2["X.scales"][0, 5])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({name: V2[name] for name in V2 if name != "X.scales"}, "no tensor 'X.scales'"),
        (V2 | {"X.scales": V2["X.scales"][0]}, r"tensor 'X.scales' has shape \[8\], expected two dimensions"),
        (V2 | {"X.scales": V2["X.scales"][:9]}, r"tensor 'X.scales' is F16 \[9, 8\], expected F16 \[16, 8\]"),
        (V2 | {"X.scales": V2["X.scales"].T.copy()}, r"tensor 'X.scales' is F16 \[8, 16\], expected F16 \[16, 8\]"),
        (V2 | {"X.scaled_zeros": V2["X.scaled_zeros"][:, :4]}, r"'X.scaled_zeros' is F16 \[16, 4\]"),
        (V2 | {"X.scales": V2["X.scales"].astype(np.float32)}, r"tensor 'X.scales' is F32 .*expected F16"),
        (V2 | {"X.qweight": V2["X.qweight"].astype(np.int32)}, r"'X.qweight' is I32 .*only v2 is read"),
        (V2 | {"X.qweight": V2["X.qweight"][:, :100]}, r"X: a weight \[8, 100\] in groups of 64 cannot be llm-awq-v2"),
        (changed(V2, "scales", np.inf, (0, 5)), "tensor 'X.scales' is not finite"),
        (changed(V2, "scaled_zeros", np.nan, (1, 5)), "tensor 'X.scaled_zeros' is not finite"),
        (changed(V2, "scales", 1.0, (2, 5)), "'X.scales' is not zero behind its 2 groups of 64 inputs.*group size"),
        (changed(V2, "scales", 0, 1), "'X.scales' is zero before the end of its 2 groups of 64 inputs.*group size"),
        (changed(V2, "scaled_zeros", 1.0, (7, 0)), "'X.scaled_zeros' is not zero behind its 2 groups"),
        (changed(V2, "scaled_zeros", -3.5 * SCALE, (0, 5)), r"'X.scaled_zeros' has .* at \[0, 5\] .* whole number"),
        (changed(V2, "scaled_zeros", -3.03 * SCALE, (0, 5)), "whole number from 0 to 15"),
        (changed(V2, "scaled_zeros", -16 * SCALE, (0, 5)), "whole number from 0 to 15"),
        (changed(V2, "scaled_zeros", SCALE, (0, 5)), "whole number from 0 to 15"),
        (changed(changed(V2, "scales", 0, (1, 5)), "scaled_zeros", -0.01, (1, 5)), "for the scale 0, .* whole number"),
    ],
)
def test_a_wrong_v2_tensor_is_named(tensors: Tensors, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        unpack_v2("X", tensors, 64)
    if "whole number" not in message:  # which the original's own arithmetic does not ask for
        with pytest.raises(CheckpointError, match=message):
            dequantize_v2("X", tensors, 64)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({name: GEMM[name] for name in GEMM if name != "X.qzeros"}, "no tensor 'X.qzeros'"),
        (GEMM | {"X.qweight": GEMM["X.qweight"].view(np.float32)}, "tensor 'X.qweight' is F32 .*expected I32"),
        (GEMM | {"X.qzeros": GEMM["X.qzeros"][:1]}, r"tensor 'X.qzeros' is I32 \[1, 1\], expected I32 \[2, 1\]"),
        (GEMM | {"X.scales": GEMM["X.scales"][:, :4]}, r"tensor 'X.scales' is F16 \[2, 4\], expected F16 \[2, 8\]"),
        (GEMM | {"X.scales": GEMM["X.scales"].astype(np.float64)}, "tensor 'X.scales' is F64"),
        (GEMM | {"X.scales": np.ones((3, 8), np.float16)}, "tensor 'X.scales' has 3 rows, which do not divide 128"),
        (GEMM | {"X.qweight": GEMM["X.qweight"].ravel()}, r"'X.qweight' has shape \[128\], expected two dimensions"),
        (changed(GEMM, "scales", np.nan, (1, 1)), "tensor 'X.scales' is not finite"),
    ],
)
def test_a_wrong_tensor_of_autoawq_is_named(tensors: Tensors, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        unpack_gemm("X", tensors)
