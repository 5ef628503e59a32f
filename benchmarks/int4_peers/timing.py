"""Time a chain. numpy alone: a peer's interpreter reads this too."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.int4_peers.form import WIDTHS, Chain

SPREAD = 4.32  # standard deviation of 1..15, each as likely: around the zero point 8, so that no mean grows


def sample(run: Callable[[NDArray[np.float32]], Any], chain: Chain) -> dict[int, list[float]]:
    """Milliseconds of each repetition, by rows; one more run before them counts for nothing."""
    found = {}
    for rows in chain.rows:
        x = np.random.default_rng(rows).standard_normal((rows, WIDTHS[0])).astype(np.float32)
        run(x)
        found[rows] = [_timed(run, x) for _ in range(chain.repetitions)]
    return found


def _timed(run: Callable[[NDArray[np.float32]], Any], x: NDArray[np.float32]) -> float:
    start = time.perf_counter()
    y = run(x)
    milliseconds = (time.perf_counter() - start) * 1e3
    assert np.isfinite(y).all(), "the chain overflows"
    return milliseconds


def integers(count: int, seed: int, bits: int = 4) -> NDArray[np.uint8]:
    """Noise around the middle of so many bits, `count` integers, packed into bytes. Every weight has a seed of its own:
    onnxruntime keeps one packed copy of equal ones, which would fit into a cache."""
    drawn = np.random.default_rng(seed).integers(1, 2**bits, count, np.uint8)
    return drawn if bits == 8 else drawn[0::2] | drawn[1::2] << 4


def scale(columns: int, bits: int = 4) -> float:
    """Of integers, so that a product keeps the size of its input."""
    return 1 / (SPREAD * 2 ** (bits - 4) * columns**0.5)
