"""NVIDIA's compute-sanitizer over every test of a kernel or the cuda engine on a GPU: memory, races in shared memory.

    python benchmarks/gpu_sanitizer.py [--tool memcheck --tool racecheck] [PYTEST_ARGUMENT ...]

It needs a GPU, PyCUDA and compute-sanitizer: from a CUDA toolkit, or `pip install nvidia-cuda-sanitizer-api-cu12`
(`nvidia-cuda-sanitizer-api` for a driver of CUDA 13). Without arguments the tests are `TESTS`; any others go to pytest
as they are: `tests/kernels -k gemv`. The exit code is 0 if no tool found anything and all tests passed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "compute-sanitizer"
TESTS = ["tests/kernels", "tests/test_engine_conformance.py", "tests/test_cuda_engine.py"]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TOOLKIT = "/usr/local/cuda"  # where one is usually installed
FOUND = 99  # exit code of the sanitizer when it found something
INSTALL = "pip install nvidia-cuda-sanitizer-api-cu12, or a CUDA toolkit whose bin is in PATH"


def main(
    arguments: Annotated[list[str] | None, typer.Argument(help="For pytest, after --.")] = None,
    tool: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TOOLS)}; the first two.")] = None,
) -> None:
    tools = tool or list(TOOLS[:2])
    for name in tools:
        if name not in TOOLS:
            raise SystemExit(f"--tool {name}: expected one of {', '.join(TOOLS)}")
    sanitizer = find_sanitizer()
    if sanitizer is None:
        raise SystemExit(f"there is no {PROGRAM}: {INSTALL}")
    done = {name: run(sanitizer, name, arguments or TESTS) for name in tools}
    for name, code in done.items():
        print(f"{name}: {verdict(code)}")
    raise SystemExit(any(done.values()))


def find_sanitizer() -> list[str] | None:
    """How the program is called: out of PATH, of a toolkit, or of one of NVIDIA's wheels; None if there is none."""
    return next(_candidates(), None)


def _candidates() -> Iterator[list[str]]:
    if found := shutil.which(PROGRAM):
        yield [found]
    for toolkit in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT)):
        if (path := Path(toolkit) / "bin" / PROGRAM).is_file():
            yield [str(path)]
    for folder in map(Path, filter(None, sys.path)):
        for path in sorted(folder.glob(f"nvidia/*/bin/{PROGRAM}")):
            libraries = path.parents[1] / "lib"  # of CUDA 12's wheel, whose program does not look there by itself
            given = (libraries / "libsanitizer-collection.so").is_file()
            yield [str(path), *(["--injection-path", str(libraries)] if given else [])]


def run(sanitizer: Sequence[str], tool: str, arguments: Sequence[str]) -> int:
    """The exit code. A run that never reached the GPU is one that failed: the sanitizer wants CUDA to be used."""
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *arguments]
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--require-cuda-init", "yes"]
    return subprocess.run([*sanitizer, *options, *pytest], cwd=ROOT).returncode


def verdict(code: int) -> str:
    if code == 0:
        return "nothing found"
    return "found something, see above" if code == FOUND else f"did not go through (exit code {code})"


if __name__ == "__main__":
    typer.run(main)
