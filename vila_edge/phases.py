"""Long work in phases: how far each one is, how long it took and what memory it needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import psutil

SAMPLE_INTERVAL = 0.05  # seconds between two looks at the memory


class Display(Protocol):
    """Shows phases to people."""

    def start(self, name: str) -> None: ...
    def advance(self, name: str, done: int, total: int) -> None: ...
    def finish(self, name: str, seconds: float, note: str) -> None: ...


@dataclass
class Phase:
    """What a phase took. Memory is what was resident of this process, at its highest."""

    name: str
    seconds: float = 0.0
    peak_memory_mib: float = 0.0


@dataclass
class Phases:
    """Runs phases one after the other and remembers them."""

    display: Display
    done: list[Phase] = field(default_factory=list)

    @contextmanager
    def run(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Measure a block. It is given a function to report its steps with: done, total."""
        phase, stop = Phase(name), threading.Event()
        watch = threading.Thread(target=_watch_memory, args=(phase, stop), daemon=True)
        start = time.perf_counter()
        self.display.start(name)
        watch.start()
        try:
            yield lambda done, total: self.display.advance(name, done, total)
        finally:
            stop.set()
            watch.join()
            phase.seconds = time.perf_counter() - start
        self.done.append(phase)
        self.display.finish(name, phase.seconds, f"{phase.peak_memory_mib:.0f} MiB")

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.done)

    @property
    def peak_memory_mib(self) -> float:
        return max((phase.peak_memory_mib for phase in self.done), default=0.0)

    def as_dicts(self) -> list[dict[str, str | float]]:
        return [
            {"name": p.name, "seconds": round(p.seconds, 2), "peak_memory_mib": round(p.peak_memory_mib, 1)}
            for p in self.done
        ]


def _watch_memory(phase: Phase, stop: threading.Event) -> None:
    process = psutil.Process()
    while True:
        phase.peak_memory_mib = max(phase.peak_memory_mib, process.memory_info().rss / 2**20)
        if stop.wait(SAMPLE_INTERVAL):
            return
