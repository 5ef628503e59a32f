"""What goes to the terminal beside answers: everything here is written to stderr."""

from __future__ import annotations

import os
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

console = Console(stderr=True, highlight=False)

PROGRAM = os.environ.get("VILA_EDGE_PROGRAM", "vila-edge")  # how the user started this, for hints to copy


def print_error(message: str, hint: str = "") -> None:
    """An error, and what to do about it."""
    console.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    if hint:
        console.print(f"hint: {hint}", markup=False, soft_wrap=True)


def print_warning(message: str) -> None:
    console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def print_note(message: str) -> None:
    console.print(message, style="dim", markup=False, soft_wrap=True)


QUIET_SECONDS = 30  # between two lines about a phase where there is no terminal


class PhaseDisplay:
    """Phases as progress bars on a terminal, as one line each when they end elsewhere."""

    def __init__(self) -> None:
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}  # when, and how many steps were done then
        self._told = 0.0
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> PhaseDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, name: str) -> None:
        self._tasks[name] = self._progress.add_task(name, total=None, note="")

    def advance(self, name: str, done: int, total: int) -> None:
        self._progress.update(self._tasks[name], completed=done, total=total)

    def progress(self, name: str, done: int, total: int) -> None:
        """`start` and `advance` in one, with what is left and the memory that is used."""
        now = time.monotonic()
        if name not in self._tasks:
            self.start(name)
            self._started[name] = (now, done)
        began, first = self._started[name]
        note = ""
        if total > 1:
            left = (now - began) / (done - first) * (total - done) if done > first else None
            note = " ".join(part for part in (_duration(left), _memory()) if part)
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)
        if not console.is_terminal and total > 1 and (done == total or now - self._told > QUIET_SECONDS):
            self._told = now
            console.print(f"{name:<12}{done:>4}/{total}  {now - began:7.1f} s  {note}", markup=False)

    def finish(self, name: str, seconds: float, note: str) -> None:
        self._progress.update(self._tasks[name], completed=1, total=1, note=note)
        self._progress.stop_task(self._tasks[name])
        if not console.is_terminal:
            console.print(f"{name:<34}{seconds:7.1f} s   {note}", markup=False)


def _duration(seconds: float | None) -> str:
    """What is left of a phase."""
    if not seconds:
        return ""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min left" if minutes >= 60 else f"{max(minutes, 1)} min left"


def _memory() -> str:
    """What this process holds now, where the system tells."""
    try:
        with open("/proc/self/statm") as file:
            return f"{int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') >> 20:,} MiB"
    except (OSError, ValueError, IndexError):
        return ""
