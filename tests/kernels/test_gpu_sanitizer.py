"""benchmarks/gpu_sanitizer.py: where it finds the program, what it runs, and what its exit code says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_sanitizer
from benchmarks.gpu_sanitizer import FOUND, PROGRAM, ROOT, TESTS, find_sanitizer

SCRIPT = ROOT / "benchmarks" / "gpu_sanitizer.py"


def program(folder: Path, codes: str = "") -> Path:
    """A sanitizer that notes its arguments in `called` and ends with the code of its tool in `codes`, as a shell has it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PROGRAM
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/called\ncase "$2" in {codes} *) exit 0;; esac\n')
    path.chmod(0o755)
    return path


def sanitize(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")} | {"PATH": path}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)


def test_memory_and_races_are_looked_for_in_every_test_of_a_kernel(tmp_path: Path) -> None:
    program(tmp_path)
    done = sanitize(f"{tmp_path}:/usr/bin:/bin")
    assert (done.returncode, done.stdout) == (0, "memcheck: nothing found\nracecheck: nothing found\n")
    pytest_on_gpu = f"{sys.executable} -m pytest -m gpu -q -p no:cacheprovider {' '.join(TESTS)}"
    assert (tmp_path / "called").read_text().splitlines() == [
        f"--tool {tool} --error-exitcode {FOUND} --require-cuda-init yes {pytest_on_gpu}"
        for tool in ("memcheck", "racecheck")
    ]


def test_what_was_found_or_did_not_run_is_told(tmp_path: Path) -> None:
    program(tmp_path, codes=f"memcheck) exit {FOUND};; racecheck) exit 5;;")
    done = sanitize(f"{tmp_path}:/usr/bin:/bin", "--", "-k", "gemv")
    assert done.returncode == 1
    assert done.stdout == "memcheck: found something, see above\nracecheck: did not go through (exit code 5)\n"
    assert (tmp_path / "called").read_text().splitlines()[0].endswith("no:cacheprovider -k gemv")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without the program; its Python looks for packages in the folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(gpu_sanitizer, "TOOLKIT", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_a_wheel_of_nvidia_is_found_with_its_libraries(without: Path) -> None:
    newer = program(without / "nvidia" / "cu13" / "bin")
    assert find_sanitizer() == [str(newer)]
    newer.unlink()
    older = program(without / "nvidia" / "cuda_sanitizer_api" / "bin")
    libraries = without / "nvidia" / "cuda_sanitizer_api" / "lib"
    libraries.mkdir()
    (libraries / "libsanitizer-collection.so").touch()
    assert find_sanitizer() == [str(older), "--injection-path", str(libraries)]


def test_what_is_missing_is_told(without: Path) -> None:
    with pytest.raises(SystemExit, match="there is no compute-sanitizer: pip install nvidia-cuda-sanitizer-api"):
        gpu_sanitizer.main()
    with pytest.raises(SystemExit, match="--tool guess: expected one of memcheck"):
        gpu_sanitizer.main(tool=["guess"])
