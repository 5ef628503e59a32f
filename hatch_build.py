"""Puts the kernels into the wheel: their sources and, where NVRTC is there to build them, code for every architecture."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLACE = "vila_edge/_kernels"  # in the wheel
NO_COMPILER = 3  # what kernels/build.py exits with then
NO_CODE = "VILA_EDGE_WHEEL_WITHOUT_CODE"  # set to 1 in the environment, it saves the half minute


class Kernels(BuildHookInterface):  # type: ignore[type-arg]
    """An editable install finds its kernels in the checkout, and builds them when it needs them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        kernels = Path(self.root) / "kernels"
        for part in ("manifest.toml", "include", "src"):
            build_data["force_include"][str(kernels / part)] = f"{PLACE}/{part}"
        if os.environ.get(NO_CODE) == "1":
            return self._without(f"{NO_CODE}=1")
        self._folder = tempfile.mkdtemp()
        code = Path(self._folder) / "cubin"
        command = [sys.executable, str(kernels / "build.py"), "-o", str(code)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == NO_COMPILER:
            return self._without(done.stderr.strip())
        if done.returncode:
            raise RuntimeError(f"the kernels do not build:\n{done.stderr}")
        build_data["force_include"][str(code)] = f"{PLACE}/cubin"
        self.app.display_info(done.stdout.strip())

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if folder := getattr(self, "_folder", None):
            shutil.rmtree(folder)

    def _without(self, why: str) -> None:
        self.app.display_warning(f"this wheel has the sources of the kernels, but no code of them: {why}")
