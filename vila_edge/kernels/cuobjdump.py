"""What NVIDIA's cuobjdump says of a cubin. It comes from pip, and is needed where kernels are built or checked."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vila_edge.errors import BackendError

INSTALL = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
_RESOURCES = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_FUNCTION = re.compile(r"^\s*Function : (\w+)$", re.M)


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a GPU: registers of a thread, and bytes of memory."""

    registers: int
    stack: int
    shared: int  # static
    local: int


def resources(cubin: Path) -> dict[str, Resources]:
    """By kernel. Raises BackendError if cuobjdump is not there, or does not understand the file."""
    found = _RESOURCES.findall(_cuobjdump("--dump-resource-usage", cubin))
    return {name: Resources(*map(int, numbers)) for name, *numbers in found}


def instructions(cubin: Path) -> dict[str, str]:
    """The SASS of each kernel. Raises BackendError as `resources` does."""
    _, *parts = _FUNCTION.split(_cuobjdump("-sass", cubin))
    return dict(zip(parts[::2], parts[1::2], strict=True))


def find_cuobjdump() -> str:
    """The program. Raises BackendError if it is not there."""
    program = shutil.which("cuobjdump", path=_path())
    if program is None:
        raise BackendError("there is no cuobjdump to look into cubins with", INSTALL)
    return program


def _cuobjdump(option: str, cubin: Path) -> str:
    environment = {**os.environ, "PATH": _path()}  # it calls nvdisasm
    done = subprocess.run([find_cuobjdump(), option, cubin], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise BackendError(f"cuobjdump {option} {cubin}: {(done.stderr or done.stdout).strip()}", INSTALL)
    return done.stdout


def _path() -> str:
    """pip's folders of programs, then the usual ones."""
    spec = importlib.util.find_spec("nvidia")
    roots = (spec.submodule_search_locations or []) if spec else []
    folders = [str(path) for root in roots for path in sorted(Path(root).glob("*/bin"))]
    return os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)])
