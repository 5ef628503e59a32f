"""Real PyCUDA on a fake driver: what CI can know of the path to a GPU without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.pycuda_on_host import ROOT, pycuda_on_host


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        ["tests/kernels/on_fake_driver.py", "tests/test_cuda_device.py"],
        ["-m", "gpu", "tests/kernels"],
        ["-m", "gpu", "tests/test_engine_conformance.py", "tests/test_cuda_engine.py"],
    ],
    ids=["facade", "kernels", "engine"],
)
def test_real_pycuda_passes_on_a_fake_driver(chosen: list[str], tmp_path: Path) -> None:
    """What is made for this driver, what else needs a GPU, and with `-m gpu` every test of a kernel and of the engine."""
    environment = pycuda_on_host(tmp_path).environment() | {"VILA_EDGE_FAKE_DRIVER": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout
