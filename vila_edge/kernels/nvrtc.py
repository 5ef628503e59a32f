"""NVRTC, the compiler of device code, which needs neither a GPU nor a toolkit: a library from pip or from CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_edge import fsio
from vila_edge.errors import BackendError

INSTALL = "pip install 'vila-edge[kernels]'"
OPTIONS = ("--std=c++17",)
SOURCE_LIMIT = 1 << 20  # bytes of a source file
_SONAMES = ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so.11.2")
_HEADER = "cuda_fp16.h"
_LOG_LINES = 12  # of a failed build, in its error


@dataclass(frozen=True)
class Found:
    """A libnvrtc and CUDA's headers. `path` may be a bare name, which the loader looks up."""

    path: str
    headers: Path | None
    where: str


class Nvrtc:
    """A libnvrtc that is loaded."""

    def __init__(self, found: Found) -> None:
        """Raises OSError if the library does not load."""
        self._library = ctypes.CDLL(found.path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        self.path, self.headers, self.where = found.path, found.headers, found.where

    def __str__(self) -> str:
        return f"NVRTC {dotted(self.version)} ({self.where})"

    def compile(self, source: Path, include: Path, architecture: str) -> bytes:
        """A cubin for "sm_87", PTX for "compute_80". Raises BackendError with the first lines that NVRTC said."""
        assert self.headers is not None, "find_nvrtc gives none without"
        program, text = ctypes.c_void_p(), fsio.read_bytes(source, SOURCE_LIMIT)
        options = [f"--gpu-architecture={architecture}", f"-I{include}", f"-I{self.headers}", *OPTIONS]
        given = (ctypes.c_char_p * len(options))(*map(os.fsencode, options))
        self._call("nvrtcCreateProgram", ctypes.byref(program), text, source.name.encode(), 0, None, None)
        try:
            if self._library.nvrtcCompileProgram(program, len(options), given):
                raise BackendError(
                    f"{source.name} does not build for {architecture} with {self}:\n{self._log(program)}",
                    "the sources were changed, or this NVRTC is too old for them: " + INSTALL,
                )
            return self._get(program, "PTX" if architecture.startswith("compute_") else "CUBIN")
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, data)
        return data.raw

    def _log(self, program: ctypes.c_void_p) -> str:
        lines = self._get(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip().splitlines()
        return "\n".join(lines[:_LOG_LINES])

    def _call(self, name: str, *arguments: Any) -> None:
        if result := getattr(self._library, name)(*arguments):
            raise BackendError(f"{name} failed: {self._library.nvrtcGetErrorString(result).decode()}", INSTALL)


def find_nvrtc(fits: Callable[[tuple[int, int]], bool] = lambda version: True, wanted: str = "any version") -> Nvrtc:
    """The first libnvrtc whose version `fits`: of pip, of CUDA_HOME, of the loader.

    Raises BackendError that names what was found instead of what is `wanted`.
    """
    unfit = list[str]()
    for found in _candidates():
        try:
            nvrtc = _load(found)
        except (OSError, BackendError) as error:
            unfit.append(f"{found.path} does not load ({error})")
            continue
        if fits(nvrtc.version) and nvrtc.headers:
            return nvrtc
        unfit.append(str(nvrtc) if nvrtc.headers else f"{nvrtc} has no {_HEADER} beside it")
    found_instead = "; ".join(unfit) or "none is installed"
    raise BackendError(f"no NVRTC to build kernels with, expected {wanted}: {found_instead}", INSTALL)


def dotted(version: tuple[int, int]) -> str:
    """(12, 6) -> 12.6."""
    return f"{version[0]}.{version[1]}"


@functools.cache
def _load(found: Found) -> Nvrtc:
    return Nvrtc(found)


def _candidates() -> Iterator[Found]:
    for root in _pip_folders():
        for library, include in (("cuda_nvrtc/lib", "cuda_runtime/include"), ("cu13/lib", "cu13/include")):
            yield from _in_folder(root / library, [root / include], "from pip")
    for variable, home in _cuda_homes():
        headers = [home / "include", *sorted(home.glob("targets/*-linux/include"))]
        for folder in (home / "lib64", *sorted(home.glob("targets/*-linux/lib"))):
            yield from _in_folder(folder, headers, f"in {variable}")
    headers = [home / "include" for _, home in _cuda_homes()] + [Path("/usr/include")]
    for name in _SONAMES:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            yield Found(name, _with_header(headers), "where the loader finds it")


def _pip_folders() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def _cuda_homes() -> list[tuple[str, Path]]:
    named = [(name, os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes = [*named, ("/usr/local/cuda", "/usr/local/cuda")]
    return [(name, Path(home)) for name, home in homes if Path(home).is_dir()]


def _in_folder(folder: Path, headers: list[Path], where: str) -> Iterator[Found]:
    """Every libnvrtc.so.N there, not the ones with a different ABI (.alt) nor those of its parts."""
    for path in sorted(folder.glob("libnvrtc.so.*")):
        if re.fullmatch(r"libnvrtc\.so\.(\d+|11\.\d+)", path.name):
            yield Found(str(path), _with_header(headers), where)


def _with_header(folders: list[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / _HEADER).is_file()), None)
