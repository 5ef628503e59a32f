"""Hidden states of the calibration set: on the disk between two blocks, so that their number costs no memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vila_edge.tensorfile import TensorFile, write_stream


def write_states(path: Path, states: Iterable[NDArray[np.float32]], lengths: Sequence[int], width: int) -> None:
    """Sequences [S, D = width] in order, each written as it comes; `lengths` are their S."""
    specs = {f"{i:06}": ("F32", (length, width)) for i, length in enumerate(lengths)}
    rest = iter(states)
    write_stream(path, specs, lambda name: [next(rest)])


def read_states(path: Path) -> list[NDArray[np.float32]]:
    """The sequences, mapped from the file."""
    file = TensorFile(path)
    return [file.array(name) for name in sorted(file.entries)]
