"""PyCUDA on a machine without CUDA: built once, from its own source package, against a driver of ours.

PyCUDA comes as source alone, and its setup wants a toolkit, cuRAND and a driver's library to link with. Headers come
from NVIDIA's wheels, cuRAND is left out, and the library to link with holds one symbol, so that it is needed. What then runs in the place of
the driver is fake_driver/, completed with a stub for every other symbol that PyCUDA needs.

    python -m tests.kernels.pycuda_on_host        builds it, in a minute or two, and says where it is
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = "2026.1"
HEADERS = ("nvidia-cuda-runtime-cu12==12.6.77", "nvidia-cuda-profiler-api-cu12==12.6.77")
FAKE = Path(__file__).parent / "fake_driver"
DRIVER = "libcuda.so.1"
_FINISHED = "finished"  # a file that is made last


@dataclass(frozen=True)
class Host:
    """Folders of a PyCUDA and of the driver that it is to find."""

    site: Path
    driver: Path

    def environment(self) -> dict[str, str]:
        """Of a process in which `import pycuda.driver` works."""
        paths = os.pathsep.join(filter(None, [str(self.site), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, "PYTHONPATH": paths, "LD_LIBRARY_PATH": str(self.driver)}


def pycuda_on_host(drivers: Path) -> Host:
    """PyCUDA out of the folder build/, made if it is not there, and a fake driver compiled into `drivers`.

    Raises AssertionError with what pip or the compiler said.
    """
    folder = ROOT / "build" / f"pycuda-{VERSION}-{sys.implementation.cache_tag}"
    if not (folder / _FINISHED).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _build(folder)
        (folder / _FINISHED).touch()
    host = Host(folder / "site", drivers)
    _compile_driver(host)
    return host


def _build(folder: Path) -> None:
    """pip builds PyCUDA, which reads `.aksetup-defaults.py` in the home of whoever calls it: that is how it is told."""
    _pip("--target", folder / "headers", "--no-deps", *HEADERS)
    home, linked = folder / "home", folder / "linked"
    home.mkdir()
    linked.mkdir()
    _gcc('extern "C" int cuInit(unsigned) { return 0; }', linked / "libcuda.so")
    includes = [str(path) for path in (folder / "headers" / "nvidia").glob("*/include")]
    settings = {
        "CUDA_ROOT": str(folder / "headers" / "nvidia" / "cuda_runtime"),
        "CUDA_INC_DIR": includes,
        "CUDADRV_LIB_DIR": [str(linked)],
        "CUDA_ENABLE_CURAND": False,
        "CXXFLAGS": ["-O0", "-g0", "-w"],  # half the time, and nothing is measured on it
    }
    (home / ".aksetup-defaults.py").write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    environment = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home),  # pip's own cache may hold a PyCUDA for a real driver
        "XDG_CONFIG_HOME": os.environ.get("XDG_CONFIG_HOME", str(Path.home() / ".config")),
    }
    _pip("--target", folder / "site", "--no-binary", "pycuda", f"pycuda=={VERSION}", environment=environment)
    for remains in (folder / "headers", home, linked):
        shutil.rmtree(remains)


def _pip(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *map(str, arguments)]
    _run(command, env={**os.environ, **(environment or {})})


def _compile_driver(host: Host) -> None:
    """The fake driver, with a stub that says "not supported" for what PyCUDA needs and the fake has not."""
    (extension,) = (host.site / "pycuda").glob("_driver.*.so")
    source = '#include "fake_cuda.cpp"\n'
    has = set(_symbols(_gcc(source, host.driver / DRIVER), "--defined-only"))
    stubs = [name for name in _symbols(extension, "--undefined-only") if name.startswith("cu") and name not in has]
    text = "".join(f'extern "C" int {name}() {{ return not_supported("{name}"); }}\n' for name in stubs)
    _gcc(source + text, host.driver / DRIVER)


def _gcc(source: str, target: Path) -> Path:
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", f"-Wl,-soname,{DRIVER}", f"-I{FAKE}"]
    _run(["g++", *flags, "-x", "c++", "-", "-o", str(target)], input=source)
    return target


def _symbols(library: Path, which: str) -> list[str]:
    lines = _run(["nm", "-D", which, str(library)]).splitlines()
    return [line.split()[-1].partition("@")[0] for line in lines]


def _run(command: list[str], env: Mapping[str, str] | None = None, input: str | None = None) -> str:
    done = subprocess.run(command, env=env, input=input, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


if __name__ == "__main__":
    made = pycuda_on_host(ROOT / "build")
    sys.stdout.write(f"PYTHONPATH={made.site} LD_LIBRARY_PATH={made.driver}\n")
