"""Time that a GPU takes for work that is done again and again, back to back, from a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vila_edge.engine.cuda.device import Device, Graph, Stream

Work = Callable[[Stream], object]  # gives work to a stream

LEAST_US = 1000.0  # that a graph takes: the host launches the next one meanwhile
MAX_NODES = 4096  # pieces of work in a graph


@dataclass(frozen=True)
class Timing:
    """Microseconds of one piece of work: means over a graph, one for each launch of it."""

    samples_us: tuple[float, ...]

    @property
    def p50_us(self) -> float:
        return float(np.percentile(self.samples_us, 50))

    @property
    def p95_us(self) -> float:
        return float(np.percentile(self.samples_us, 95))


class Clock:
    """Measures on a stream of its own."""

    def __init__(self, device: Device, repeat: int = 20, least_us: float = LEAST_US) -> None:
        """`repeat`: samples of each measurement. Raises BackendError."""
        self._device, self._least_us = device, least_us
        self.stream = device.stream()
        self._events = [device.event() for _ in range(repeat + 1)]

    def measure(self, works: Sequence[Work]) -> Timing:
        """Of one of `works`, which are the same work on memory of their own each. Raises BackendError.

        A graph holds all of them in turn, as often as it takes to last `least_us`. It runs once before it is timed.
        """
        graph = self._graph(works)
        (once,) = self._times(graph, 1)
        graph.free()
        wanted = math.ceil(self._least_us / max(once, 1))
        passes = max(1, min(wanted, MAX_NODES // len(works)))
        graph = self._graph(list(works) * passes)
        times = self._times(graph, len(self._events) - 1)
        graph.free()
        return Timing(tuple(time / (passes * len(works)) for time in times))

    def _graph(self, works: Sequence[Work]) -> Graph:
        with self._device.current(), self.stream.capture() as capture:
            for work in works:
                work(self.stream)
        assert capture.graph is not None
        return capture.graph

    def _times(self, graph: Graph, count: int) -> list[float]:
        """Microseconds of each of `count` launches behind one that is not timed."""
        graph.launch(self.stream)
        self._events[0].record(self.stream)
        for event in self._events[1 : count + 1]:
            graph.launch(self.stream)
            event.record(self.stream)
        self.stream.synchronize()
        return [self._events[i + 1].since_us(self._events[i]) for i in range(count)]

    def free(self) -> None:
        for event in self._events:
            event.free()
        self.stream.free()
