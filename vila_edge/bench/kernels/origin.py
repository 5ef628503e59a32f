"""Which code, which GPU and which driver a measurement is of."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from vila_edge.bench.machine import machine, versions
from vila_edge.engine.cuda.device import Device
from vila_edge.engine.cuda.kernels import Kernels
from vila_edge.kernels.manifest import manifest

ROOT = Path(__file__).parents[3]
DRIVER = Path("/proc/driver/nvidia/version")


def origin(device: Device, kernels: Kernels) -> dict[str, Any]:
    """What a result begins with. `kernels`: those that ran, so that it is known where their code was from."""
    return {
        "commit": commit(),
        "gpu": {
            "name": device.name,
            "compute_capability": ".".join(map(str, device.compute_capability)),
            "multiprocessors": device.multiprocessors,
            "l2_bytes": device.l2_bytes,
            "memory_bytes": device.memory()[1],
        },
        "driver": {"version": driver_version(), "cuda": ".".join(map(str, device.driver))},
        "toolkit": {
            "nvrtc": manifest().toolchain.nvrtc,
            "code": {file: image.why for file, image in sorted(kernels.images.items())},
        },
        "machine": machine(),
        "versions": versions(),
    }


def commit(root: Path = ROOT) -> str | None:
    """Of the checkout that this code is in, "+changes" if files differ from it; None outside of one."""
    if not (root / ".git").exists():
        return None
    head, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return head and head + ("+changes" if changes else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout.strip()


def driver_version(path: Path = DRIVER) -> str | None:
    """Of NVIDIA's driver, as 570.124.06; None where the system does not tell."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text())
    except OSError:
        return None
    return found and found[1]
