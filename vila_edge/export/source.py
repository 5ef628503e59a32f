"""The parameters of a checkpoint as torch sees them, read when they are asked for and kept for a short while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_edge.errors import CheckpointError
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.parameters import parameter_shapes

KEPT_BYTES = 256 << 20  # some layers of a tower: threads that go through it together read each once
PIECE_ELEMENTS = 1 << 21  # of a tensor that is converted piece by piece


class Source(Mapping[str, Tensor]):
    """Name -> float32 tensor, of all parameters. Safe to use from several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.shapes = parameter_shapes(checkpoint.config)
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, name: str) -> Tensor:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
            tensor = torch.from_numpy(self.checkpoint.parameter(name))
            self._kept[name] = tensor
            while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def forget(self) -> None:
        """Let go of what is kept."""
        with self._lock:
            self._kept.clear()

    def layer(self, prefix: str) -> dict[str, Tensor]:
        """All parameters under a prefix."""
        names = [name for name in self.shapes if name.startswith(prefix)]
        return {name: torch.from_numpy(self.checkpoint.parameter(name)) for name in names}

    def rows(self, name: str, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of a parameter. Raises CheckpointError if they are not finite."""
        if self.is_packed(name):
            return self.checkpoint.parameter(name)[rows]
        stored = self.checkpoint.files.tensors[name]
        values = stored.file.float32(stored.name, rows)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{stored.file.path}: tensor {stored.name!r} is not finite")
        return values

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        """A parameter, some rows at a time."""
        count, *rest = self.shapes[name]
        if self.is_packed(name):  # unpacked whole
            yield self.checkpoint.parameter(name)
            return
        step = max(1, PIECE_ELEMENTS // int(np.prod(rest, dtype=np.int64)))
        for start in range(0, count, step):
            yield self.rows(name, slice(start, start + step))

    def is_packed(self, name: str) -> bool:
        """Whether the checkpoint has a parameter in 4 bits."""
        return self.checkpoint.stored_dtype(name) == "I4"
