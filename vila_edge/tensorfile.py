"""A safetensors file whose tensors stay on the disk: names, shapes, places, and arrays mapped on demand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vila_edge import fsio
from vila_edge.errors import InputError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16: the upper half of a float32
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
ALIGNMENT = 64  # bytes: what vector units and page mappings like

Spec = tuple[str, tuple[int, ...]]  # type and shape of a tensor that is to be stored


_ALL = slice(None)


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file: `length` bytes from byte `offset`."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class TensorFile:
    """The tensors of one file, by name."""

    _mapped: dict[str, NDArray[Any]] | None = None  # what stays mapped

    def __init__(self, path: Path, keep_mapped: bool = False) -> None:
        """Raises InputError if the file is missing, damaged or holds a type that is not understood.

        `keep_mapped`: a tensor is mapped once, and not for each use, for one of which some rows are read every token.
        """
        self.path = path
        if keep_mapped:
            self._mapped = {}
        try:
            with path.open("rb") as file:
                with safe_open(path, framework="numpy"):  # the library checks the header against the file
                    pass
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except PermissionError as error:  # for which the library has no word of its own
            raise InputError(f"{path}: {error.strerror}", f"chmod u+r {path}") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a whole safetensors file: {error}") from None
        header.pop("__metadata__", None)
        self.entries: dict[str, TensorEntry] = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise InputError(f"{path}: tensor {name!r} is of type {entry['dtype']}, which is not understood")
            begin, end = entry["data_offsets"]
            self.entries[name] = TensorEntry(entry["dtype"], tuple(entry["shape"]), 8 + size + begin, end - begin)

    def array(self, name: str) -> NDArray[Any]:
        """A tensor as it is stored, mapped and not read; bfloat16 as the bits of uint16."""
        if self._mapped and name in self._mapped:
            return self._mapped[name]
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if not entry.length:
            return np.zeros(entry.shape, dtype)
        found = np.memmap(self.path, dtype, "r", entry.offset, entry.shape)
        if self._mapped is not None:
            self._mapped[name] = found
        return found

    def float32(self, name: str, rows: slice | NDArray[np.int64] = _ALL) -> NDArray[np.float32]:
        """A tensor of floats, or those of its rows, read and widened to float32."""
        stored = self.array(name)
        stored = stored[rows] if stored.ndim else stored
        if self.entries[name].dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)


def layout(
    specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The head of a safetensors file of these tensors, and where each of them will lie in it.

    Wide types come first, otherwise the order is that of `specs`; the data begins at a multiple of `ALIGNMENT` bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    entries, position = dict[str, TensorEntry](), 0
    for name in sorted(specs, key=lambda name: -DTYPES[specs[name][0]].itemsize):
        dtype, shape = specs[name]
        length = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + length]}
        entries[name] = TensorEntry(dtype, shape, position, length)
        position += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    moved = {name: dataclasses.replace(entry, offset=start + entry.offset) for name, entry in entries.items()}
    return len(text).to_bytes(8, "little") + text, moved


def write_stream(
    path: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], Iterable[NDArray[Any]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file, tensor by tensor: `read(name)` gives each in pieces."""
    head, entries = layout(specs, metadata)
    with fsio.new_file(path) as file:
        file.write(head)
        for name, entry in entries.items():
            for piece in read(name):
                assert piece.dtype == DTYPES[entry.dtype], (name, piece.dtype, entry.dtype)
                file.write(np.ascontiguousarray(piece).data)
            assert file.tell() == entry.offset + entry.length, (name, file.tell(), entry)


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]], order: Callable[[str], Any] = str) -> None:
    """A safetensors file of arrays, sorted by name or by another `order`. The same tensors give the same bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    specs = {name: (names[tensors[name].dtype], tensors[name].shape) for name in sorted(tensors, key=order)}
    write_stream(path, specs, lambda name: [tensors[name]])
