"""The clock of vila_edge/bench/kernels for torch: the same work on other memory in turn, timed by events."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

Work = Callable[[], Any]

LEAST_US = 1000.0  # of a sample
MAX_PASSES = 512


class CudaClock:
    """On the current CUDA device and stream."""

    def __init__(self, repeat: int) -> None:
        self.repeat = repeat

    def graph(self, works: Sequence[Work]) -> float:
        """Median microseconds of one of `works`, back to back from a CUDA graph."""
        (once,) = self._times(self._captured(works), 1)
        passes = _passes(once)
        return statistics.median(self._times(self._captured(list(works) * passes), self.repeat)) / passes / len(works)

    def eager(self, works: Sequence[Work]) -> float:
        """The same, launched one by one from Python."""
        _all(works)
        (once,) = self._times(lambda: _all(works), 1)
        passes = _passes(once)
        turns = list(works) * passes
        return statistics.median(self._times(lambda: _all(turns), self.repeat)) / passes / len(works)

    def _captured(self, works: Sequence[Work]) -> Work:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what torch sets up at a first call must not be captured
            works[0]()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _all(works)
        return graph.replay

    def _times(self, work: Work, count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        work()
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        torch.cuda.synchronize()
        return [1000 * first.elapsed_time(second) for first, second in itertools.pairwise(events)]


def _passes(once_us: float) -> int:
    return min(MAX_PASSES, max(1, math.ceil(LEAST_US / max(once_us, 1))))


def _all(works: Sequence[Work]) -> None:
    for work in works:
        work()
