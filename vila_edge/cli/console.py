"""What goes to the terminal beside answers: everything here is written to stderr."""

from __future__ import annotations

import os

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

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


class PhaseDisplay:
    """Phases as progress bars on a terminal, as one line each when they end elsewhere."""

    def __init__(self) -> None:
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=30),
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

    def finish(self, name: str, seconds: float, note: str) -> None:
        self._progress.update(self._tasks[name], completed=1, total=1, note=note)
        self._progress.stop_task(self._tasks[name])
        if not console.is_terminal:
            console.print(f"{name:<34}{seconds:7.1f} s   {note}", markup=False)
