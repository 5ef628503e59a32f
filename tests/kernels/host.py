"""Runs launches of kernels on the CPU, through kernels/host, between guarded pages.

A read or write beyond an array, a write to a const one, a barrier that some threads miss, a misaligned vector: each
raises HostError. An array that was never written holds NaN.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vila_edge.kernels.launch import Launch
from vila_edge.kernels.manifest import Kernel, Manifest, manifest

Order = Literal["forward", "reverse", "shuffled"]
ORDERS: tuple[Order, ...] = get_args(Order)
POISON = 0xFF  # NaN as float16 and float32
ALIGNMENT = 16  # of every array, which a vector access needs
FLAGS = ("-std=c++17", "-O2", "-march=native", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off")
WARNINGS = ("-Wall", "-Werror", "-Wno-unknown-pragmas")
IMAGE = b"VEHOSTSO:"  # begins what fake devices load; fake_driver/ says the same
_libc = ctypes.CDLL(None, use_errno=True)


class HostError(Exception):
    """What a kernel did that it must not do; says in which block and thread."""


@dataclass(frozen=True)
class Stats:
    """Of one launch. A shared read is one of 128 bytes by eight lanes; in a conflict they meet in a bank."""

    switches: int
    shared_reads: int
    bank_conflicts: int


class Buffer:
    """An array up against a guarded page; between it and the page below there is poison."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.bytes = int(np.prod(shape)) * self.dtype.itemsize
        page = mmap.PAGESIZE
        taken = -(-self.bytes // ALIGNMENT) * ALIGNMENT
        self._inside = max(1, -(-taken // page)) * page
        self._map = mmap.mmap(-1, self._inside + 2 * page)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + page
        _protect(self._base - page, page, 0)
        _protect(self._base + self._inside, page, 0)
        self._skipped = self._inside - taken
        self._all = np.frombuffer(self._map, np.uint8, self._inside, page)
        self._all[:] = POISON
        self.address = self._base + self._skipped

    def numpy(self) -> NDArray[Any]:
        """The array itself, not a copy."""
        return self._all[self._skipped :][: self.bytes].view(self.dtype).reshape(self.shape)

    def holds(self, address: int) -> bool:
        return self._base <= address <= self._base + self._inside

    def make_const(self, const: bool) -> None:
        _protect(self._base, self._inside, mmap.PROT_READ | (0 if const else mmap.PROT_WRITE))

    def check(self) -> None:
        """Raises HostError if somebody wrote beside the array."""
        beside = np.concatenate([self._all[: self._skipped], self._all[self._skipped + self.bytes :]])
        if (beside != POISON).any():
            raise HostError(f"a write beside an array {self.shape} of {self.dtype}")


def _protect(address: int, size: int, protection: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


class Compiled:
    """The sources of a folder of kernels, compiled for the CPU when first asked for."""

    def __init__(self, target: Path, source: Manifest | None = None) -> None:
        self.target, self.manifest = target, source or manifest()
        self._libraries: dict[str, ctypes.CDLL] = {}
        self._pending: dict[str, Future[None]] = {}

    def library(self, file: str) -> Path:
        """The .so of a file of src/, compiled. Raises HostError with what the compiler says."""
        path = self.target / Path(file).with_suffix(".so")
        if (pending := self._pending.pop(file, None)) and not pending.cancel():
            pending.result()
        if not path.exists():
            self._compile(file, path)
        return path

    def _compile(self, file: str, path: Path) -> None:
        compiler = shutil.which("g++") or "g++"
        includes = [f"-I{self.manifest.include}", f"-I{self.manifest.root / 'host'}"]
        source = ["-x", "c++", str(self.manifest.source(file)), "-o", str(path)]
        done = subprocess.run([compiler, *FLAGS, *WARNINGS, *includes, *source], capture_output=True, text=True)
        if done.returncode:
            raise HostError(done.stderr)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Compile every file on another core while the block lasts, the last ones first."""
        with ThreadPoolExecutor(1) as pool:
            for file in reversed(self.manifest.files):
                path = self.target / Path(file).with_suffix(".so")
                self._pending[file] = pool.submit(self._compile, file, path)
            try:
                yield
            finally:
                pool.shutdown(cancel_futures=True)

    def image(self, file: str) -> bytes:
        """As a device on the host loads it: `IMAGE` and the path of the .so."""
        return IMAGE + str(self.library(file)).encode() + b"\0"

    def load(self, file: str) -> ctypes.CDLL:
        if file not in self._libraries:
            self._libraries[file] = ctypes.CDLL(str(self.library(file)))
        return self._libraries[file]


class HostKernels:
    """A stand-in for a device: memory, and launches in one order of threads."""

    def __init__(self, compiled: Compiled, order: Order = "forward") -> None:
        self.compiled, self.order = compiled, order
        self._buffers: list[Buffer] = []

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """An array of poison."""
        self._buffers.append(Buffer(shape, dtype))
        return self._buffers[-1]

    def put(self, values: NDArray[Any]) -> Buffer:
        """A copy of an array."""
        buffer = self.empty(values.shape, values.dtype)
        buffer.numpy()[...] = values
        return buffer

    def run(self, launch: Launch) -> Stats:
        """Run it to its end. Raises HostError for anything that a GPU would fault, hang or be silently wrong at."""
        kernel = self.compiled.manifest[launch.kernel]
        library = self.compiled.load(kernel.file)
        constants = self._constants(kernel, launch)
        for buffer in constants:
            buffer.make_const(True)
        try:
            packed = kernel.pack(launch.arguments)
            call(library, kernel.name, launch.grid, kernel.block, kernel.shared_memory, packed, self.order)
        finally:
            for buffer in constants:
                buffer.make_const(False)
        for buffer in self._buffers:
            buffer.check()
        counted = (ctypes.c_ulonglong * 3)()
        library.ve_host_stats(counted)
        return Stats(*counted)

    def _constants(self, kernel: Kernel, launch: Launch) -> list[Buffer]:
        """The arrays that the launch may only read. Raises HostError for an address of none."""
        read: set[Buffer] = set()
        written: set[Buffer] = set()
        for argument, value in zip(kernel.parameters, launch.arguments, strict=True):
            if not argument.pointer or value == 0:
                continue
            buffer = next((b for b in self._buffers if b.holds(int(value))), None)
            if buffer is None:
                raise HostError(f"{launch.kernel}: {argument.name} is the address of no array")
            (read if argument.const else written).add(buffer)
        return sorted(read - written, key=lambda buffer: buffer.address)


def call(
    library: ctypes.CDLL,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    shared_memory: int,
    packed: bytes,
    order: Order = "forward",
) -> None:
    """Call a kernel's host twin with its arguments where a packed launch has them. Raises HostError."""
    offsets = (ctypes.c_uint * 64)()
    count = getattr(library, f"ve_args_{name}")(offsets)
    if offsets[count] != len(packed):
        raise HostError(f"{name}: the source takes {count} arguments in {offsets[count]} bytes, not {len(packed)}")
    held = ctypes.create_string_buffer(packed)
    pointers = (ctypes.c_void_p * count)(*[ctypes.addressof(held) + offset for offset in offsets[:count]])
    sizes = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)
    function = getattr(library, f"ve_host_{name}")
    if function(*sizes, ctypes.c_size_t(shared_memory), pointers, ctypes.c_int(ORDERS.index(order))):
        library.ve_host_message.restype = ctypes.c_char_p
        raise HostError(f"{name}: {library.ve_host_message().decode()}")
