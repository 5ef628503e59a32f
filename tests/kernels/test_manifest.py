"""The manifest, its errors, and arguments as a driver takes them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from vila_edge.errors import ConfigError, InputError
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.manifest import Argument, Kernel, manifest, read_manifest

TOOLCHAIN = '[toolchain]\nnvrtc = "12.6"\narchitectures = ["sm_87"]\nptx = "compute_80"\n'
TABLE = '[ve_a]\nfile = "a.cu"\narguments = ["x: const f16*", "n: i32"]\nblock = [32, 1, 1]\nmax_registers = 40\n'


def write(folder: Path, text: str) -> Path:
    (folder / "manifest.toml").write_text(text)
    return folder


def test_a_table_is_read(tmp_path: Path) -> None:
    kernel = read_manifest(write(tmp_path, TOOLCHAIN + TABLE + "tile = { m = 8 }\nshape = ['n']\nshapes = [[3]]\n"))[
        "ve_a"
    ]
    assert kernel.parameters == (Argument("x", "f16", True, True), Argument("n", "i32", False, False))
    assert (kernel.tile, kernel.shapes, kernel.shared_memory) == ({"m": 8}, ((3,),), 0)
    no_spill, no_atomic = ("LDL", "STL"), ("ATOM.", "ATOMG", "RED.E", "REDG")
    assert kernel.must_not == no_spill + no_atomic, "no kernel spills, or is not deterministic, unless it says so"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE, r"table \[toolchain\] is missing"),
        (TOOLCHAIN + "[other]\n", r"\[other\] is no table of a kernel"),
        (TOOLCHAIN + TABLE.replace("f16*", "half*"), "ve_a: argument 'x: const half\\*': expected 'name"),
        (
            TOOLCHAIN + TABLE.replace("[32, 1, 1]", "[32, 64, 1]"),
            r"ve_a: block \[32, 64, 1\]: expected 1 to 1024 threads",
        ),
        (TOOLCHAIN + TABLE.replace("block", "blok"), "ve_a: unknown field 'blok'"),
        (TOOLCHAIN + TABLE.replace("max_registers = 40", ""), "ve_a: field 'max_registers' is missing"),
        (
            TOOLCHAIN + TABLE.replace("= 40", "= 256"),
            "ve_a: shared_memory, max_registers or min_blocks is out of range",
        ),
        (
            TOOLCHAIN + TABLE + "shape = ['n', 'k']\nshapes = [[1]]\n",
            "ve_a: shapes: expected 2 numbers in each, for n, k",
        ),
        (TOOLCHAIN.replace("sm_87", "87"), "toolchain: expected nvrtc like"),
        ("[", "manifest.toml: "),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_manifest(write(tmp_path, text))


def test_a_manifest_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="manifest.toml: No such file"):
        read_manifest(tmp_path)


def test_arguments_lie_as_a_struct_of_c_has_them() -> None:
    names = {
        "f32": ctypes.c_float,
        "u8": ctypes.c_uint8,
        "u16": ctypes.c_uint16,
        "i32": ctypes.c_int32,
        "i64": ctypes.c_int64,
    }
    arguments = ("a: u8", "p: const f16*", "b: u16", "f: f32", "c: u8", "n: i64", "m: i32")
    kernel = Kernel("ve_a", "a.cu", arguments, (1, 1, 1), 0, 1, 32, (), (), {}, (), ())
    fields = [(a.name, ctypes.c_void_p if a.pointer else names[a.type]) for a in kernel.parameters]
    expected = type("Arguments", (ctypes.Structure,), {"_fields_": fields})(200, 1 << 40, 60000, 0.3, 7, -5, -6)
    assert kernel.pack((200, 1 << 40, 60000, 0.3, 7, -5, -6)) == bytes(expected)[: expected.__class__.m.offset + 4]


@pytest.mark.parametrize("values", [(1,), (1, 2, 3), (1, 2**31), (-1, 2), (1, 2.5)])
def test_arguments_that_do_not_fit_are_refused(values: tuple[int, ...], tmp_path: Path) -> None:
    kernel = read_manifest(write(tmp_path, TOOLCHAIN + TABLE))["ve_a"]
    with pytest.raises(ValueError, match="ve_a takes"):
        kernel.pack(values)


def test_a_launch_that_no_gpu_takes_is_refused() -> None:
    name, kernel = next(iter(manifest().kernels.items()))
    arguments = tuple(0 for _ in kernel.parameters)
    for grid in ((0, 1, 1), (1, 65536, 1), (2**31, 1, 1)):
        with pytest.raises(ValueError, match=f"{name}: grid"):
            Launch(name, grid, arguments)
    with pytest.raises(ValueError, match="no kernel 've_none'"):
        Launch("ve_none", (1, 1, 1), ())


def test_every_kernel_has_its_source_and_every_source_its_kernels() -> None:
    found = manifest()
    assert {path.name for path in (found.root / "src").glob("*.cu")} == set(found.files)
    for kernel in found.kernels.values():
        assert kernel.name in found.source(kernel.file).read_text() or "##" in found.source(kernel.file).read_text()
        assert kernel.shapes, f"{kernel.name} is tested at no shape"
