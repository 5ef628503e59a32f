"""Decode without the host: steps are launched ahead, tokens come back through a ring in pinned memory.

A step samples, feeds its token to the next step and moves on by itself. So the host launches one graph for each token,
a few ahead, and looks at the ring; it neither copies nor waits for the GPU to be idle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vila_edge.engine.cuda.decoder import Decoder, Step
from vila_edge.engine.cuda.device import Device, Stream
from vila_edge.engine.cuda.kv_cache import CudaCache
from vila_edge.errors import BackendError, UsageError, VilaEdgeError
from vila_edge.kernels import sampling
from vila_edge.kernels.sampling import RING
from vila_edge.kernels.w4 import MAX_BATCH
from vila_edge.sampler import NOT_FINITE, Sampling

AHEAD = 4  # steps: a GPU always has one to go on with, and little is computed for nothing behind an answer's end
LOOK_S = 1e-4  # between two looks at the ring


@dataclass
class Running:
    """A sequence that is decoded: `cache` holds all before `token`, which was chosen and is not in it yet."""

    cache: CudaCache
    token: int
    sampling: Sampling
    seed: int
    stops: Sequence[int] = ()  # tokens that end it
    ended: bool = False


class DecodeLoop:
    """Decodes up to 8 sequences together until each is at its end."""

    def __init__(self, decoder: Decoder, device: Device, stream: Stream, sequences: Sequence[Running]) -> None:
        """Raises UsageError if there are none, or too many."""
        if not 1 <= len(sequences) <= MAX_BATCH:
            raise UsageError(f"{len(sequences)} sequences at once: expected 1 to {MAX_BATCH}")
        self._decoder, self._device, self._stream, self._sequences = decoder, device, stream, sequences
        greedy = all(sequence.sampling.temperature == 0 for sequence in sequences)
        self._kind: Step = "greedy" if greedy else "sample"
        self._launched = self._taken = 0  # steps since the device was told of the sequences

    def __iter__(self) -> Iterator[list[int | None]]:
        """The next token of each sequence, None for one that is at its end: behind a stop token, or a full kv_cache.

        A sequence's `cache` and `token` are up to date whenever this yields. Raises VilaEdgeError if the logits are
        not finite, BackendError if the GPU fails.
        """
        while not all(sequence.ended or _full(sequence) for sequence in self._sequences):
            with self._device.current():
                self._launch_ahead()
                tokens = [self._wait(place) for place in range(len(self._sequences))]
            self._taken += 1
            yield [self._took(sequence, token) for sequence, token in zip(self._sequences, tokens, strict=True)]

    def _launch_ahead(self) -> None:
        if self._decoder.owner is not self:
            self._begin()
        while self._launched < self._taken + AHEAD:
            new = self._launched - self._taken + 1
            longest = max(min(s.cache.length + new, s.cache.capacity) for s in self._sequences)
            self._decoder.graph(len(self._sequences), longest, self._kind).launch(self._stream)
            self._launched += 1

    def _begin(self) -> None:
        """Tell the device of the sequences as they are now; also when somebody else used it in between."""
        decoder, host = self._decoder, self._decoder.staging.host
        decoder.place([sequence.cache for sequence in self._sequences], self)
        batch = len(self._sequences)
        for place, sequence in enumerate(self._sequences):
            host["ids"][place] = sequence.token
            idle = sequence.ended or _full(sequence)
            host["sequence_positions"][place] = -1 if idle else sequence.cache.length
            stops = sequence.stops[: sampling.MAX_STOPS]  # saves the GPU work; `_took` knows all of them
            record = sampling.settings(sequence.sampling, sequence.seed, stops, sequence.cache.capacity)
            host["settings"][place] = record.view(np.uint8)
        host["step"][:] = 0
        host["ring"][:] = 0
        self._launched = self._taken = 0
        for name in ("ids", "sequence_positions", "step"):
            decoder.staging.to_device(name, (batch,), self._stream)
        decoder.staging.to_device("settings", host["settings"][:batch].shape, self._stream)
        decoder.staging.to_device("ring", (RING * batch,), self._stream)

    def _wait(self, place: int) -> int:
        """The token of the step that is to be taken. The GPU is asked now and then whether it still runs."""
        ring: NDArray[np.int64] = self._decoder.staging.host["ring"][: RING * len(self._sequences)]
        ring = ring.reshape(RING, -1)
        while True:
            done = self._stream.done()
            token = sampling.read_ring(ring, self._taken, place)
            if token is not None:
                return token
            if done:
                raise BackendError(
                    "the GPU is done, and gave no token",
                    "update vila-edge; benchmarks/gpu_sanitizer.py finds what a kernel does wrong here",
                )
            time.sleep(LOOK_S)

    def _took(self, sequence: Running, token: int) -> int | None:
        if sequence.ended or token == sampling.INACTIVE:
            sequence.ended = True
            return None
        if token == sampling.REFUSED:
            sequence.ended = True
            raise VilaEdgeError(*NOT_FINITE)
        sequence.cache.length += 1
        sequence.token = token
        sequence.ended = token in sequence.stops
        return token


def _full(sequence: Running) -> bool:
    return sequence.cache.length >= sequence.cache.capacity
