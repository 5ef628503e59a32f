"""Real PyCUDA on a fake driver: what CI can know of the path to a GPU without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.pycuda_on_host import ROOT, pycuda_on_host


@pytest.mark.slow
def test_the_facade_over_pycuda(tmp_path: Path) -> None:
    """The tests of on_fake_driver.py, and those of the facade that else need a GPU."""
    environment = pycuda_on_host(tmp_path).environment() | {"VILA_EDGE_FAKE_DRIVER": "1"}
    files = ["tests/kernels/on_fake_driver.py", "tests/test_cuda_device.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout
