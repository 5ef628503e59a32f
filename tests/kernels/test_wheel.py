"""The wheel and its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vila_edge.kernels import nvrtc
from vila_edge.kernels.manifest import manifest, read_manifest
from vila_edge.kernels.store import find

ROOT = Path(__file__).parents[2]
ROOM = 4 << 20  # bytes that kernels may take of the wheel
IN_WHEEL = "vila_edge/_kernels/"


def build_wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel, and what its build said."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stderr


def test_a_wheel_without_a_compiler_is_made_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").write_text("")  # found before the one with NVRTC
    nothing = str(tmp_path / "nothing")
    wheel, said = build_wheel(tmp_path, PYTHONPATH=str(tmp_path), CUDA_HOME=nothing, CUDA_PATH=nothing)
    assert (
        "this wheel has the sources of the kernels, but no code of them: error: no NVRTC to build kernels with" in said
    )
    names = zipfile.ZipFile(wheel).namelist()
    assert IN_WHEEL + "manifest.toml" in names and not any("cubin" in name for name in names)


@pytest.mark.slow
def test_a_wheel_has_code_for_every_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, _ = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        kernels = [entry for entry in archive.infolist() if entry.filename.startswith(IN_WHEEL)]
        assert sum(entry.compress_size for entry in kernels) < ROOM
        for entry in kernels:
            archive.extract(entry, tmp_path)
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(()))
    shipped = read_manifest(tmp_path / IN_WHEEL)
    assert shipped.kernels == manifest().kernels
    for architecture in shipped.toolchain.architectures:
        capability = divmod(int(architecture.removeprefix("sm_")), 10)
        for file in shipped.files:
            assert find(shipped, file, capability, (12, 6)).origin == "shipped"
            assert find(shipped, file, (12, 0), (13, 0)).origin == "driver"
