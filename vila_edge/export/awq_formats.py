"""Linears in 4 bits as other programs store them: AutoAWQ's GEMM layout and llm-awq's v2, to the bit, both ways.

Both stand for a weight [N, K] of integers q in 0..15 in groups of G inputs. `X` is the linear's name:
    autoawq-gemm  X.qweight int32 [K, N/8], X.qzeros int32 [K/G, N/8], X.scales float16 [K/G, N];
                  w = scale * (q - zero)
    llm-awq-v2    X.qweight int16 [N/4, K], X.scales and X.scaled_zeros float16 [G', N], of which the first K/G rows
                  count and the others are zero; w = q * scale + scaled_zero
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vila_edge.errors import CheckpointError
from vila_edge.int4 import MAX_INT, MIDDLE, Int4
from vila_edge.tensorfile import DTYPES

Format = Literal["autoawq-gemm", "llm-awq-v2"]
Shape = tuple[int, ...]
Tensors = Mapping[str, NDArray[Any]]

_GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is column _GEMM_ORDER[i] of its eight
_V2_ROWS, _V2_COLUMNS = 4, 64  # the tile in which v2 interleaves rows
_GROUP_SIZE = "the group size is another one: it is read from the file's name, as in NAME-w4-g128-awq-v2.pt"
_ONLY_V2 = "of llm-awq's formats only v2 is read (*-awq-v2.pt): make the file again with a current llm-awq"


@dataclass(frozen=True)
class Packed:
    """How the 4-bit linears of a checkpoint are stored. symmetric: every zero point is 8."""

    format: Format
    group_size: int
    symmetric: bool


@dataclass(frozen=True)
class Packing:
    """What the files of a checkpoint say of its 4-bit linears. Without `zero_point`, every zero point is 8."""

    format: Format
    group_size: int
    zero_point: bool = True


def unpack(packing: Packing, name: str, tensors: Tensors) -> Int4:
    """The integers of the linear `name`. Raises CheckpointError that names the tensor that does not fit."""
    if packing.format == "llm-awq-v2":
        return unpack_v2(name, tensors, packing.group_size)
    weight = unpack_gemm(name, tensors)
    if not packing.zero_point and (weight.zeros != MIDDLE).any():
        raise CheckpointError(
            f"tensor '{name}.qzeros' has zero points that are not {MIDDLE}, but the config says that there are none",
            "if the weights are right, set 'zero_point' to true in quantization_config",
        )
    return weight


def dequantize(packing: Packing, name: str, tensors: Tensors) -> NDArray[np.float32]:
    """The weight [N, K] that the linear `name` stands for in its own format. Raises CheckpointError."""
    if packing.format == "llm-awq-v2":
        return dequantize_v2(name, tensors, packing.group_size)
    return unpack(packing, name, tensors).dequantize()


def zero_points(packing: Packing, name: str, tensors: Tensors) -> NDArray[np.uint8]:
    """Zero points [N, K/G] of the linear `name`, for which its integers are not read. Raises CheckpointError."""
    if packing.format == "llm-awq-v2":
        return _whole_zeros(name, *_v2_constants(name, tensors, packing.group_size))
    return _gemm_integers(tensors[f"{name}.qzeros"])


def packed_names(fmt: Format, name: str) -> tuple[str, str, str]:
    """The tensors that a checkpoint stores in place of `{name}.weight`: integers, scales, zero points."""
    return f"{name}.qweight", f"{name}.scales", f"{name}.{'qzeros' if fmt == 'autoawq-gemm' else 'scaled_zeros'}"


def check_parts(packing: Packing, name: str, found: Mapping[str, tuple[str, Shape]], shape: tuple[int, int]) -> None:
    """Whether the parts of the linear `name` are there for a weight of `shape` [N, K].

    `found`: dtype (as safetensors calls it) and shape by tensor name. Raises CheckpointError that names the tensor.
    """
    (rows, columns), size = shape, packing.group_size
    by_rows, by_columns = (8, 1) if packing.format == "autoawq-gemm" else (_V2_ROWS, _V2_COLUMNS)
    if columns % size or rows % by_rows or columns % by_columns:
        raise CheckpointError(
            f"{name}: a weight {list(shape)} in groups of {size} cannot be {packing.format}, which needs outputs by "
            f"{by_rows}, inputs by {by_columns} and whole groups",
            "check the group size",
        )
    for part, (dtype, shapes) in zip(packed_names(packing.format, name), _parts(packing, shape), strict=True):
        expected = f"{dtype} {list(shapes[0])} for a weight {list(shape)} in groups of {size}"
        if part not in found:
            raise CheckpointError(f"no tensor {part!r}, expected {expected}", "download or copy the file again")
        if found[part][0] != dtype or found[part][1] not in shapes:
            first = packing.format == "llm-awq-v2" and part.endswith(".qweight") and found[part][0] == "I32"
            raise CheckpointError(
                f"tensor {part!r} is {found[part][0]} {list(found[part][1])}, expected {expected}",
                _ONLY_V2 if first else "check the group size, and that config.json belongs to these weights",
            )


def _parts(packing: Packing, shape: tuple[int, int]) -> list[tuple[str, tuple[Shape, ...]]]:
    """Type and possible shapes of each part, in the order of `packed_names`."""
    (rows, columns), groups = shape, shape[1] // packing.group_size
    if packing.format == "autoawq-gemm":
        return [("I32", ((columns, rows // 8),)), ("F16", ((groups, rows),)), ("I32", ((groups, rows // 8),))]
    padded = tuple((count, rows) for count in _padded_groups(groups, packing.group_size))
    return [("I16", ((rows // _V2_ROWS, columns),)), ("F16", padded), ("F16", padded)]


def _padded_groups(groups: int, group_size: int) -> tuple[int, int]:
    """Rows of v2's scales. The original rounds up further for groups below 128; others round up to 8."""
    further = max(1, 128 // group_size) * 8
    return -(-groups // further) * further, -(-groups // 8) * 8


def pack_gemm(name: str, weight: Int4) -> dict[str, NDArray[Any]]:
    """The linear `name` as AutoAWQ stores it. Raises ValueError if N is not a multiple of 8."""
    qweight, scales, qzeros = packed_names("autoawq-gemm", name)
    return {
        qweight: _gemm_words(weight.q),
        scales: np.ascontiguousarray(weight.scales.T),
        qzeros: _gemm_words(weight.zeros),
    }


def unpack_gemm(name: str, tensors: Tensors) -> Int4:
    """The inverse of `pack_gemm`. Raises CheckpointError that names the tensor that does not fit."""
    qweight, scales, qzeros = _arrays("autoawq-gemm", name, tensors)
    columns, groups = len(qweight), max(len(scales), 1)
    if columns % groups:
        raise CheckpointError(f"tensor '{name}.scales' has {groups} rows, which do not divide {columns} inputs")
    _check_arrays(Packing("autoawq-gemm", columns // groups), name, tensors, (8 * qweight.shape[1], columns))
    _check_finite(name, "scales", scales)
    return Int4(_gemm_integers(qweight), np.array(scales.T, order="C"), _gemm_integers(qzeros))


def _gemm_words(values: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Integers [N, M] in 0..15 to words [M, N/8]."""
    if len(values) % 8:
        raise ValueError(f"{len(values)} outputs, expected a multiple of 8")
    columns = values.T.reshape(values.shape[1], -1, 8).astype(np.uint32)
    words = np.zeros(columns.shape[:2], np.uint32)
    for nibble, column in enumerate(_GEMM_ORDER):
        words |= columns[..., column] << np.uint32(4 * nibble)
    return words.view(np.int32)


def _gemm_integers(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The inverse of `_gemm_words`: words [M, N/8] to integers [N, M]."""
    unsigned = np.asarray(words).view(np.uint32)
    values = np.empty((words.shape[1], 8, len(words)), np.uint8)
    for nibble, column in enumerate(_GEMM_ORDER):
        values[:, column] = (unsigned >> np.uint32(4 * nibble) & MAX_INT).T
    return values.reshape(-1, len(words))


def pack_v2(name: str, weight: Int4) -> dict[str, NDArray[Any]]:
    """The linear `name` as llm-awq stores it. Raises ValueError unless N is a multiple of 4 and K of 64."""
    (rows, columns), groups = weight.q.shape, weight.scales.shape[1]
    if rows % _V2_ROWS or columns % _V2_COLUMNS:
        raise ValueError(f"a weight {[rows, columns]}, expected outputs by {_V2_ROWS} and inputs by {_V2_COLUMNS}")
    # Of 32 inputs, slot 4a + b holds input a + 8b; then tiles of 64 inputs of four rows lie side by side.
    slots = weight.q.reshape(rows, -1, 4, 8).swapaxes(2, 3)
    tiles = slots.reshape(-1, _V2_ROWS, columns // _V2_COLUMNS, _V2_COLUMNS).swapaxes(1, 2)
    nibbles = tiles.reshape(-1, columns, 4).astype(np.uint16)
    words = sum((nibbles[..., i] << np.uint16(4 * i) for i in range(4)), np.uint16(0))
    padded = np.zeros((2, _padded_groups(groups, columns // groups)[0], rows), np.float16)
    padded[0, :groups] = weight.scales.T
    padded[1, :groups] = -(weight.scales.astype(np.float32) * weight.zeros).T
    return dict(zip(packed_names("llm-awq-v2", name), (words.view(np.int16), *padded), strict=True))


def unpack_v2(name: str, tensors: Tensors, group_size: int = 128) -> Int4:
    """The inverse of `pack_v2`: integer zero points are found from `scaled_zeros`, which are rounded products.

    Raises CheckpointError that names the tensor that does not fit, or holds no such product.
    """
    scales, scaled_zeros = _v2_constants(name, tensors, group_size)
    zeros = _whole_zeros(name, scales, scaled_zeros)
    return Int4(_v2_integers(tensors[f"{name}.qweight"]), scales.astype(np.float16), zeros)


def dequantize_v2(name: str, tensors: Tensors, group_size: int = 128) -> NDArray[np.float32]:
    """The weight [N, K] as llm-awq itself computes it: `q * scale + scaled_zero`, in float32.

    `unpack_v2(...).dequantize()` is off from it by the rounding of scaled_zeros, 0.0073 of a step at most. Raises
    CheckpointError.
    """
    scales, scaled_zeros = _v2_constants(name, tensors, group_size)
    values = _v2_integers(tensors[f"{name}.qweight"]).astype(np.float32)
    grouped = values.reshape(len(values), -1, group_size)
    grouped *= scales[..., None]
    grouped += scaled_zeros[..., None]
    return values


def _whole_zeros(name: str, scales: NDArray[np.float32], scaled_zeros: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The whole numbers [N, K/G] of which `scaled_zeros` are products. Raises CheckpointError if there are none."""
    zeros = np.round(np.divide(-scaled_zeros, scales, out=np.zeros_like(scales), where=scales != 0))
    product = scales * zeros
    # Two roundings to 16 bits, of the scale and of the product; 2^-24 is the smallest number there.
    wrong = (zeros < 0) | (zeros > MAX_INT) | (np.abs(scaled_zeros + product) > 2**-10 * np.abs(product) + 2**-24)
    if wrong.any():
        row, group = np.argwhere(wrong)[0]
        raise CheckpointError(
            f"tensor '{name}.scaled_zeros' has {scaled_zeros[row, group]:.6g} at [{group}, {row}] for the scale "
            f"{scales[row, group]:.6g}, expected minus the scale times a whole number from 0 to {MAX_INT}",
            "this is not llm-awq's v2 format, or the file is damaged",
        )
    return zeros.astype(np.uint8)


def _v2_integers(words: NDArray[np.int16]) -> NDArray[np.uint8]:
    """qweight [N/4, K] to integers [N, K]: the steps of `pack_v2` backwards."""
    columns = words.shape[1]
    unsigned = np.asarray(words).view(np.uint16)
    nibbles = np.stack([(unsigned >> np.uint16(4 * i) & MAX_INT).astype(np.uint8) for i in range(4)], -1)
    tiles = nibbles.reshape(-1, columns // _V2_COLUMNS, _V2_ROWS, _V2_COLUMNS).swapaxes(1, 2)
    return tiles.reshape(-1, columns // 32, 8, 4).swapaxes(2, 3).reshape(-1, columns)


def _v2_constants(name: str, tensors: Tensors, group_size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and scaled zeros [N, K/G] without the padding, all parts checked."""
    qweight, scales, scaled_zeros = _arrays("llm-awq-v2", name, tensors)
    shape = (_V2_ROWS * len(qweight), qweight.shape[1])
    _check_arrays(Packing("llm-awq-v2", group_size), name, tensors, shape)
    groups = shape[1] // group_size
    said = f"its {groups} groups of {group_size} inputs"
    for part, values in (("scales", scales), ("scaled_zeros", scaled_zeros)):
        _check_finite(name, part, values)
        if values[groups:].any():
            raise CheckpointError(f"tensor '{name}.{part}' is not zero behind {said}", _GROUP_SIZE)
    if scales[:groups].any() and not scales[groups - 1].any():  # padding: llm-awq's own scales are above 0
        raise CheckpointError(f"tensor '{name}.scales' is zero before the end of {said}", _GROUP_SIZE)
    return np.array(scales[:groups].T, np.float32, order="C"), np.array(scaled_zeros[:groups].T, np.float32, order="C")


def _arrays(fmt: Format, name: str, tensors: Tensors) -> list[NDArray[Any]]:
    """The parts of a linear, all there and with two dimensions."""
    for part in packed_names(fmt, name):
        if part not in tensors:
            raise CheckpointError(f"no tensor {part!r}", "download or copy the whole file again")
        if tensors[part].ndim != 2:
            raise CheckpointError(f"tensor {part!r} has shape {list(tensors[part].shape)}, expected two dimensions")
    return [tensors[part] for part in packed_names(fmt, name)]


def _check_arrays(packing: Packing, name: str, tensors: Tensors, shape: tuple[int, int]) -> None:
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    arrays = {part: tensors[part] for part in packed_names(packing.format, name)}
    found = {part: (kinds.get(array.dtype, str(array.dtype)), array.shape) for part, array in arrays.items()}
    check_parts(packing, name, found, shape)


def _check_finite(name: str, part: str, values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise CheckpointError(f"tensor '{name}.{part}' is not finite")
