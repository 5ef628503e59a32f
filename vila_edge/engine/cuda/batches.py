"""What has one input and one output on a device, run over a batch of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.bindings import GraphBindings
from vila_edge.engine.cuda.device import Device, Staging, Stream

FloatArray = NDArray[np.float32]


class Batches:
    """Host arrays through pinned memory to a device and back, as many rows at once as there is room for."""

    def __init__(
        self, device: Device, layout: GraphBindings, batch: int, stream: Stream, compute: Callable[[int], None]
    ) -> None:
        """`layout` has one input and one output, [N, ...]; `compute` puts a run over so many N on the stream.

        Raises BackendError if there is no memory.
        """
        (self.input,), (self.output,) = layout.inputs, layout.outputs
        self._batch, self._stream, self._compute = batch, stream, compute
        self._staging = Staging(device, {b.name: (b.sized(images=batch), b.dtype) for b in (self.input, self.output)})
        self.free = self._staging.free

    @property
    def addresses(self) -> tuple[int, int]:
        """Where a run finds its input, and leaves its output."""
        return self._staging.memory[self.input.name], self._staging.memory[self.output.name]

    def __call__(self, values: FloatArray) -> FloatArray:
        """[N, ...] to [N, ...], float32. Raises what `compute` raises, BackendError if the device fails."""
        found = np.empty(self.output.sized(images=len(values)), np.float32)
        for start in range(0, len(values), self._batch):
            part = values[start : start + self._batch]
            found[start : start + self._batch] = self._run(part)
        return found

    def _run(self, values: FloatArray) -> NDArray[Any]:
        """One run, waited for. The result is where the next one will be."""
        staging, images = self._staging, len(values)
        staging.host[self.input.name][:images] = values
        staging.to_device(self.input.name, self.input.sized(images=images), self._stream)
        self._compute(images)
        staging.to_host(self.output.name, self.output.sized(images=images), self._stream)
        self._stream.synchronize()
        return staging.host[self.output.name][:images]
