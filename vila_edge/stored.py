"""A bundle's parameters, in whichever form each is stored: floats, 8 bits or 4 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vila_edge import int4, int8
from vila_edge.parameters import Shape
from vila_edge.tensorfile import Spec, TensorFile

Form = Literal["fp32", "fp16", "int8", "int4"]
FLOATS = {"fp32": "F32", "fp16": "F16"}  # forms that are one tensor of that type

Rows = slice | NDArray[np.int64]
_ALL = slice(None)


def specs(name: str, shape: Shape, form: Form, group_size: int, symmetric: bool) -> dict[str, Spec]:
    """The tensors that hold the parameter `name` in a form. The last two arguments are those of int4."""
    if form in FLOATS:
        return {name: (FLOATS[form], shape)}
    linear, (rows, columns) = name.removesuffix(".weight"), shape
    if form == "int8":
        return int8.part_specs(linear, (rows, columns))
    return int4.part_specs(linear, (rows, columns), group_size, symmetric)


class StoredParameters:
    """The parameters of some files, by the checkpoint's names. Files stay mapped; what is asked for is read."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        self._files: dict[str, TensorFile] = {}
        for file in files:
            self._files |= dict.fromkeys(file.entries, file)

    def float32(self, name: str, shape: Shape, rows: Rows = _ALL) -> NDArray[np.float32]:
        """The values of a parameter of `shape`, or of its rows. Raises KeyError if it is in no file."""
        if name in self._files:
            return self._files[name].float32(name, rows)
        linear = name.removesuffix(".weight")
        if f"{linear}.qweight_int8" in self._files:
            return int8.from_tensors(linear, self._parts(linear, rows)).dequantize(shape[1])
        return self.int4(linear, rows).dequantize()

    def int4(self, linear: str, rows: Rows = _ALL) -> int4.Int4:
        """The integers of a weight in 4 bits, or of its rows. Raises KeyError if it is not stored so."""
        return int4.from_tensors(linear, self._parts(linear, rows))

    def int8(self, linear: str, rows: Rows = _ALL) -> int8.Int8:
        """The integers of a weight in 8 bits, or of its rows. Raises KeyError if it is not stored so."""
        return int8.from_tensors(linear, self._parts(linear, rows))

    def _parts(self, linear: str, rows: Rows) -> dict[str, NDArray[Any]]:
        names = {*int4.part_names(linear), *int8.part_names(linear)} & self._files.keys()
        return {name: np.asarray(self._files[name].array(name)[rows]) for name in names}
