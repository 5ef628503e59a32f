"""kernels/manifest.toml: all that the Python side knows of the device code."""

from __future__ import annotations

import functools
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_edge import fsio
from vila_edge.errors import ConfigError
from vila_edge.plain import from_plain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MANIFEST = "manifest.toml"
PREFIX = "ve_"  # begins the name of every kernel
_TYPES = {"f16": "e", "f32": "f", "u8": "B", "i8": "b", "u16": "H", "u32": "I", "i32": "i", "i64": "q"}
_ARGUMENT = re.compile(rf"(?P<name>\w+): (?P<const>const )?(?P<type>{'|'.join(_TYPES)})(?P<pointer>\*)?")
_DEFAULTS: dict[str, Any] = {
    "shared_memory": 0,
    "min_blocks": 1,
    "must": [],
    "must_not": ["LDL", "STL", "ATOM.", "ATOMG", "RED.E", "REDG"],  # local memory, atomics between blocks
    "tile": {},
    "shape": [],
    "shapes": [],
}

# Where device code lies: in an installed package, and in a checkout.
_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "_kernels", _PACKAGE.parent / "kernels")


@dataclass(frozen=True)
class Argument:
    """A parameter of a kernel: an address of `type`, or a number of it."""

    name: str
    type: str
    pointer: bool
    const: bool

    @classmethod
    def parse(cls, text: str) -> Argument:
        """Of "qweight: const u32*". Raises ConfigError."""
        found = _ARGUMENT.fullmatch(text)
        if not found:
            raise ConfigError(
                f"argument {text!r}: expected 'name: [const ]TYPE[*]' with TYPE one of {', '.join(_TYPES)}"
            )
        return cls(found["name"], found["type"], bool(found["pointer"]), bool(found["const"]))

    @property
    def code(self) -> str:
        """As `struct` writes it."""
        return "Q" if self.pointer else _TYPES[self.type]


@dataclass(frozen=True)
class Kernel:
    """A table of the manifest. Sizes of memory are in bytes."""

    name: str
    file: str
    arguments: tuple[str, ...]
    block: tuple[int, int, int]
    shared_memory: int  # dynamic
    min_blocks: int  # per multiprocessor, as in __launch_bounds__
    max_registers: int
    must: tuple[str, ...]  # parts of SASS instructions
    must_not: tuple[str, ...]
    tile: dict[str, int]  # what a block computes: the grid derives from it
    shape: tuple[str, ...]  # names of the sizes in `shapes`
    shapes: tuple[tuple[int, ...], ...]  # what the tests run it at

    def __post_init__(self) -> None:
        _ = self.parameters
        threads = self.block[0] * self.block[1] * self.block[2]
        if min(self.block) < 1 or threads > 1024:
            raise ConfigError(f"block {list(self.block)}: expected 1 to 1024 threads")
        if self.shared_memory < 0 or not 1 <= self.max_registers <= 255 or self.min_blocks < 1:
            raise ConfigError("shared_memory, max_registers or min_blocks is out of range")
        if any(len(sizes) != len(self.shape) for sizes in self.shapes):
            raise ConfigError(f"shapes: expected {len(self.shape)} numbers in each, for {', '.join(self.shape)}")

    @functools.cached_property
    def parameters(self) -> tuple[Argument, ...]:
        return tuple(Argument.parse(text) for text in self.arguments)

    @functools.cached_property
    def _packing(self) -> struct.Struct:
        return struct.Struct("@" + "".join(argument.code for argument in self.parameters))

    def pack(self, values: Sequence[int | float]) -> bytes:
        """Arguments as the driver takes them, each at a multiple of its own size. Raises ValueError if they do not fit."""
        if len(values) != len(self.parameters):
            raise ValueError(f"{self.name} takes {len(self.parameters)} arguments, found {len(values)}")
        try:
            return self._packing.pack(*values)
        except (struct.error, OverflowError) as error:
            wanted = ", ".join(self.arguments)
            raise ValueError(f"{self.name} takes ({wanted}), found {list(values)}: {error}") from None


@dataclass(frozen=True)
class Toolchain:
    """What builds the kernels that ship."""

    nvrtc: str  # version of the compiler
    architectures: tuple[str, ...]  # sm_87 ...: a cubin for each
    ptx: str  # compute_80: what the driver makes code of where there is no cubin

    def __post_init__(self) -> None:
        bad = [name for name in self.architectures if not re.fullmatch(r"sm_\d+", name)]
        if bad or not re.fullmatch(r"compute_\d+", self.ptx) or not re.fullmatch(r"\d+\.\d+", self.nvrtc):
            raise ConfigError('expected nvrtc like "12.6", architectures like "sm_87", ptx like "compute_80"')


@dataclass(frozen=True)
class Manifest:
    """The kernels by name, and the folder that holds src/ and include/."""

    root: Path
    toolchain: Toolchain
    kernels: Mapping[str, Kernel]

    def __getitem__(self, name: str) -> Kernel:
        """Raises ValueError for a kernel that is not there."""
        try:
            return self.kernels[name]
        except KeyError:
            raise ValueError(f"no kernel {name!r} in {self.root / MANIFEST}") from None

    @property
    def files(self) -> tuple[str, ...]:
        """Names in src/, sorted."""
        return tuple(sorted({kernel.file for kernel in self.kernels.values()}))

    def source(self, file: str) -> Path:
        return self.root / "src" / file

    @property
    def include(self) -> Path:
        return self.root / "include"


def read_manifest(root: Path) -> Manifest:
    """The manifest of a folder. Raises InputError if it is missing, ConfigError that names what is wrong in it."""
    path = root / MANIFEST
    try:
        tables = tomllib.loads(fsio.read_text(path, 1 << 20))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    if "toolchain" not in tables:
        raise ConfigError(f"{path}: table [toolchain] is missing")
    toolchain = from_plain(Toolchain, tables.pop("toolchain"), f"{path}: toolchain")
    foreign = [name for name in tables if not name.startswith(PREFIX)]
    if foreign:
        raise ConfigError(f"{path}: [{foreign[0]}] is no table of a kernel, whose names begin with {PREFIX!r}")
    kernels = {name: _kernel(name, table, f"{path}: {name}") for name, table in tables.items()}
    return Manifest(root, toolchain, kernels)


def _kernel(name: str, table: object, source: str) -> Kernel:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{source}: expected a table, found {table!r}")
    return from_plain(Kernel, {**_DEFAULTS, **table, "name": name}, source)


@functools.cache
def manifest() -> Manifest:
    """The one that belongs to this vila-edge. Raises as `read_manifest` does."""
    root = next((folder for folder in _FOLDERS if (folder / MANIFEST).is_file()), _FOLDERS[0])
    return read_manifest(root)
