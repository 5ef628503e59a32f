"""Hidden states and other activations of the calibration set: on the disk, so that their number costs no memory."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_edge.errors import VilaEdgeError
from vila_edge.tensorfile import TensorFile, write_stream

IN_MEMORY = 256 << 20  # bytes of a block's activations; what is more goes to the disk

States = NDArray[np.float32]  # one sequence of hidden states [S, D]
Fetch = Callable[[], Tensor]


def write_states(path: Path, states: Iterable[States], lengths: Sequence[int], width: int) -> None:
    """Sequences [S, D = width] in order, each written as it comes; `lengths` are their S."""
    specs = {f"{i:06}": ("F32", (length, width)) for i, length in enumerate(lengths)}
    rest = iter(states)
    write_stream(path, specs, lambda name: [next(rest)])


def read_states(path: Path) -> StoredStates:
    """The sequences, each mapped from the file while it is used."""
    file = TensorFile(path)
    return StoredStates(file, sorted(file.entries))


class StoredStates(Sequence[States]):
    """Sequences of a file. None is kept: what was read of a mapped file counts as memory of the process."""

    def __init__(self, file: TensorFile, names: Sequence[str]) -> None:
        self._file, self._names = file, names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> States: ...

    @overload
    def __getitem__(self, index: slice) -> StoredStates: ...

    def __getitem__(self, index: int | slice) -> States | StoredStates:
        if isinstance(index, slice):
            return StoredStates(self._file, self._names[index])
        return self._file.array(self._names[index])


class Kept(Sequence[Tensor]):
    """Tensors that are fetched when they are used, from wherever a `Store` put them."""

    def __init__(self, fetch: Sequence[Fetch], factor: Tensor | None = None) -> None:
        self._fetch, self._factor = fetch, factor

    def __len__(self) -> int:
        return len(self._fetch)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Kept: ...

    def __getitem__(self, index: int | slice) -> Tensor | Kept:
        if isinstance(index, slice):
            return Kept(self._fetch[index], self._factor)
        x = self._fetch[index]()
        return x if self._factor is None else x * self._factor

    def scaled(self, factor: Tensor) -> Kept:
        """The same, multiplied with a factor [K] for each channel."""
        return Kept(self._fetch, factor if self._factor is None else self._factor * factor)


class KeptStates(Sequence[States]):
    """The same as arrays of the CPU."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> States: ...

    @overload
    def __getitem__(self, index: slice) -> KeptStates: ...

    def __getitem__(self, index: int | slice) -> States | KeptStates:
        return KeptStates(self._kept[index]) if isinstance(index, slice) else self._kept[index].numpy()


class Store:
    """Keeps tensors in memory up to a limit, and behind it in a file of `folder` that goes with the process."""

    def __init__(self, folder: Path | None = None, limit: int = IN_MEMORY) -> None:
        self._folder, self._left, self._end = folder, limit, 0
        self._file: IO[bytes] | None = None

    def put(self, x: Tensor) -> Fetch:
        """What gives the tensor back. Raises VilaEdgeError if the disk is full."""
        if self._folder is None or x.nbytes <= self._left:
            self._left -= x.nbytes
            return lambda: x
        data, start = np.ascontiguousarray(x.cpu().numpy()), self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
                weakref.finalize(self, self._file.close)  # when nothing is fetched from it any more
            written = os.pwrite(self._file.fileno(), data.data.cast("B"), start)
        except OSError as error:
            raise VilaEdgeError(f"cannot write to {self._folder}: {error.strerror}", _HINT) from None
        if written != data.nbytes:
            raise VilaEdgeError(f"cannot write to {self._folder}: the disk is full", _HINT)
        self._end += data.nbytes
        return partial(self._read, start, data.shape, data.dtype, x.device)

    def keep(self, tensors: Iterable[Tensor]) -> Kept:
        """All of them, in order."""
        return Kept([self.put(x) for x in tensors])

    def _read(self, start: int, shape: tuple[int, ...], dtype: np.dtype[np.float32], device: torch.device) -> Tensor:
        assert self._file is not None
        data = np.empty(shape, dtype)
        read = os.preadv(self._file.fileno(), [data.data.cast("B")], start)
        assert read == data.nbytes, (read, data.nbytes)
        return torch.from_numpy(data).to(device)


_HINT = "free some space and run the same command again, or take fewer --calibration-tokens"
