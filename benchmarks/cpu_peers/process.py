"""Run a program and watch it from outside, the same for every engine."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INTERVAL = 0.02  # seconds between two looks at the memory
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Watched:
    """What a program printed, and what it took."""

    lines: list[str]
    first_line_s: float  # from its start to its first line of output
    seconds: float
    peak_bytes: int  # VmHWM: pages of mapped files count as well
    busy: float  # share of the cores that went to other programs meanwhile


def watch(command: Sequence[str], env: Mapping[str, str] | None = None) -> Watched:
    """Run it to its end. Raises SystemExit with what it said if it fails."""
    lines, first, peak = list[str](), 0.0, [0]
    others, own, start = _busy_seconds(), _children_seconds(), time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | (env or {}), stdout=subprocess.PIPE, stderr=said, text=True
        ) as process,
    ):
        watcher = threading.Thread(target=_watch_memory, args=(process, peak), daemon=True)
        watcher.start()
        assert process.stdout is not None
        for line in process.stdout:
            first = first or time.perf_counter() - start
            lines.append(line)
        process.wait()
        watcher.join()
        seconds = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{said.read()[-2000:]}")
    own = _children_seconds() - own
    others = max(0.0, _busy_seconds() - others - own)
    return Watched(lines, first, seconds, peak[0], others / seconds / (os.cpu_count() or 1))


def _watch_memory(process: subprocess.Popen[str], peak: list[int]) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with contextlib.suppress(OSError):
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peak[0] = max(peak[0], int(line.split()[1]) * 1024)
        time.sleep(INTERVAL)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _busy_seconds() -> float:
    """Of all cores together, since the machine started."""
    user, nice, system, _idle, _waiting, *interrupts = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return sum(map(int, (user, nice, system, *interrupts))) / TICKS
