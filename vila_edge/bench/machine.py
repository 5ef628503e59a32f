"""What measurements are worth nothing without: the machine, the versions, and the memory of this process."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from vila_edge.version import __version__

CPUINFO = Path("/proc/cpuinfo")
BOARD = Path("/proc/device-tree/model")  # a Jetson says here what it is
STATUS = Path("/proc/self/status")
PACKAGES = ("numpy", "onnxruntime", "tensorrt", "tensorrt-rtx")


def machine() -> dict[str, str | int]:
    """Model of the CPU, cores, system."""
    found: dict[str, str | int] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if BOARD.is_file():
        found["board"] = BOARD.read_text().strip("\0\n ")
    return found


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The name that the CPU gives itself."""
    try:
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()  # ARM gives numbers instead of a name


def versions() -> dict[str, str]:
    """Of Python, of vila-edge and of what computes, where it is installed."""
    found = {"python": platform.python_version(), "vila-edge": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def process_memory(status: Path = STATUS) -> dict[str, int] | None:
    """Bytes of this process: `peak` (VmHWM) and `resident` now (VmRSS). None where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        peak, resident = (int(lines[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return {"peak": peak, "resident": resident}
