"""The probes of memory touch every byte once: what they measure is what they say."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.runner import Runner
from vila_edge.kernels import stream
from vila_edge.kernels.manifest import manifest

SHAPES = manifest()["ve_stream_read"].shapes


@pytest.mark.parametrize(("vectors", "blocks"), SHAPES)
def test_reading_sums_every_word(kernels: Runner, vectors: int, blocks: int) -> None:
    words = np.random.default_rng(5).integers(0, 2**32, vectors * 4, np.uint32)
    sums = kernels.empty((blocks,), np.uint32)
    kernels.run(stream.read(kernels.put(words).address, words.nbytes, sums.address, blocks))
    assert sums.numpy().sum(dtype=np.uint32) == words.sum(dtype=np.uint32)


@pytest.mark.parametrize(("vectors", "blocks"), SHAPES)
def test_copying_copies_every_word(kernels: Runner, vectors: int, blocks: int) -> None:
    words = np.random.default_rng(6).integers(0, 2**32, vectors * 4, np.uint32)
    target = kernels.empty(words.shape, np.uint32)
    kernels.run(stream.copy(kernels.put(words).address, target.address, words.nbytes, blocks))
    assert np.array_equal(target.numpy(), words)


def test_a_part_of_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="24 bytes: expected a multiple of 16"):
        stream.read(16, 24, 32, 1)
