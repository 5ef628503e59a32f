"""Where the AWQ search runs."""

from __future__ import annotations

from typing import Literal

import torch

from vila_edge.errors import UsageError

Device = Literal["cpu", "cuda"]


def pick_device(name: str) -> tuple[Device, str]:
    """The device for "cpu", "cuda" or "auto", and which it is and why, for people. Raises UsageError."""
    if name not in ("cpu", "cuda", "auto"):
        raise UsageError(f"--device {name}: expected cpu, cuda or auto")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError(
            "--device cuda: torch sees no CUDA device",
            f"this is torch {torch.__version__}; check nvidia-smi, or say --device cpu",
        )
    if name == "cpu" or not available:
        return "cpu", "AWQ searches on the CPU" + ("" if name == "cpu" else ": torch sees no CUDA device")
    return "cuda", f"AWQ searches on {torch.cuda.get_device_name()}"
