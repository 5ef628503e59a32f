"""Where code of kernels comes from, in which order, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernels.test_manifest import TABLE, TOOLCHAIN
from vila_edge.errors import BackendError
from vila_edge.kernels import nvrtc, store
from vila_edge.kernels.ahead import build_ahead, shipping_nvrtc
from vila_edge.kernels.manifest import Manifest, read_manifest
from vila_edge.kernels.nvrtc import Nvrtc
from vila_edge.kernels.store import Image, Version, find

SOURCE = (
    '#include <cuda_fp16.h>\n#include "one.cuh"\nextern "C" __global__ void ve_a(const __half* x, int n) { ONE; }\n'
)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A folder of one kernel that nothing is built of, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in ("src", "include"):
        (tmp_path / folder).mkdir()
    (tmp_path / "src" / "a.cu").write_text(SOURCE)
    (tmp_path / "include" / "one.cuh").write_text("#define ONE\n")
    (tmp_path / "manifest.toml").write_text(TOOLCHAIN + TABLE)
    return read_manifest(tmp_path)


@pytest.fixture
def shipped(bare: Manifest) -> Manifest:
    build_ahead(bare, shipping_nvrtc(bare), bare.root / "cubin")
    return bare


@pytest.fixture
def no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(()))


def found(manifest: Manifest, capability: Version = (8, 7), driver: Version = (12, 6)) -> tuple[Image, list[str]]:
    said = list[str]()
    return find(manifest, "a.cu", capability, driver, said.append), said


def test_what_ships_is_taken_in_silence(shipped: Manifest, no_nvrtc: None) -> None:
    image, said = found(shipped)
    assert (image.origin, said) == ("shipped", [])
    assert image.code == (shipped.root / "cubin" / "a.sm_87.cubin").read_bytes()
    assert b"ve_a" in image.code and image.code.startswith(b"\x7fELF")


def test_the_driver_builds_for_a_gpu_that_nothing_ships_for(shipped: Manifest, no_nvrtc: None) -> None:
    image, said = found(shipped, (12, 0), (12, 8))
    assert image.origin == "driver" and image.code.endswith(b"\0") and b".target sm_80" in image.code
    assert said == ["a.cu for sm_120: the driver builds it from compute_80, as none is shipped for sm_120"]


def test_a_checkout_builds_once_and_keeps_it(bare: Manifest) -> None:
    first, said = found(bare)
    assert first.origin == "built" and first.code.startswith(b"\x7fELF")
    assert re.fullmatch(
        "a.cu for sm_87: built with NVRTC 12.6 .*, as this vila-edge came without built kernels", said[0]
    )
    again, said = found(bare)
    assert (again.origin, again.code) == ("cache", first.code)
    assert "built before" in said[0]
    assert found(bare, (8, 6))[0].origin == "built", "another GPU takes other code"


@pytest.mark.parametrize("file", ["src/a.cu", "include/one.cuh"])
def test_code_of_other_sources_is_not_taken(shipped: Manifest, file: str) -> None:
    with (shipped.root / file).open("a") as source:
        source.write("// changed\n")
    image, said = found(shipped)
    assert image.origin == "built" and "the shipped code is of other sources" in said[0]
    with (shipped.root / file).open("a") as source:
        source.write("// again\n")
    assert found(shipped)[0].origin == "built", "nor out of the cache"


def test_shipped_code_that_was_changed_is_refused(shipped: Manifest) -> None:
    path = shipped.root / "cubin" / "a.sm_87.cubin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BackendError, match=r"a.sm_87.cubin was changed since it was built"):
        found(shipped)


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def another_key(path: Path) -> None:
    line, code = path.read_bytes().split(b"\n", 1)
    header = json.loads(line)
    header["key"]["architecture"] = "sm_90"
    path.write_bytes(json.dumps(header).encode() + b"\n" + code)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "not built by this user on this machine, or changed since: its HMAC does not match"),
        (cut, "truncated, added to or renamed"),
        (another_key, "truncated, added to or renamed"),
        (lambda path: path.write_bytes(b""), "does not begin like a kernel of this version"),
        (lambda path: (path.parent / "secret").write_bytes(bytes(32)), "HMAC does not match"),
        (lambda path: (path.parent / "secret").unlink(), "missing: kernels here cannot be told from foreign ones"),
    ],
)
def test_the_cache_is_trusted_only_with_its_seal(bare: Manifest, damage: Callable[[Path], None], message: str) -> None:
    found(bare)
    (path,) = (bare.root / "cache" / "vila-edge" / "kernels").glob("*.kernel")
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    damage(path)
    with pytest.raises(BackendError, match=message) as caught:
        found(bare)
    assert f"{path.parent}" in caught.value.hint


def test_a_cache_that_cannot_be_written_is_said_and_done_without(bare: Manifest) -> None:
    (bare.root / "cache").write_text("a file in its place")
    image, said = found(bare)
    assert image.origin == "built" and "It is not kept for next time: cannot use the cache of kernels" in said[0]


def test_without_code_and_compiler_the_remedy_is_said(bare: Manifest, no_nvrtc: None) -> None:
    with pytest.raises(BackendError) as caught:
        found(bare)
    assert caught.value.message == (
        "no code of a.cu for sm_87 and CUDA 12.6: this vila-edge came without built kernels; "
        "no NVRTC to build kernels with, expected one of CUDA 12 or older, as the driver is: none is installed"
    )
    assert caught.value.hint == "pip install 'vila-edge[kernels]'"


@pytest.mark.parametrize(
    ("capability", "driver", "message"),
    [
        ((8, 7), (11, 4), "the shipped code needs a driver for CUDA 12"),
        ((12, 0), (12, 4), "none is shipped for sm_120; the shipped PTX needs a driver for CUDA 12.6"),
    ],
)
def test_a_driver_that_is_too_old_is_said(
    shipped: Manifest, no_nvrtc: None, capability: Version, driver: Version, message: str
) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        found(shipped, capability, driver)
    assert caught.value.hint.startswith("update the driver, on Jetson JetPack")


def test_a_compiler_newer_than_the_driver_is_not_used(bare: Manifest) -> None:
    with pytest.raises(BackendError, match=r"expected one of CUDA 11 or older, as the driver is: NVRTC 12\.6"):
        found(bare, (8, 7), (11, 4))


def test_a_gpu_that_is_too_old_is_said(shipped: Manifest) -> None:
    with pytest.raises(BackendError, match="compute capability 8.0 or newer, this is 7.2"):
        found(shipped, (7, 2))


def test_what_is_taken_goes_to_stderr(bare: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    store.find(bare, "a.cu", (8, 7), (12, 6))
    assert capsys.readouterr().err.startswith("vila-edge: a.cu for sm_87: built with NVRTC 12.6")


# the compiler


def test_what_does_not_build_is_shown(bare: Manifest) -> None:
    bare.source("a.cu").write_text("extern void f() { nonsense; }")
    with pytest.raises(
        BackendError, match=r'a.cu does not build for sm_87 with NVRTC 12.6(.|\n)*"nonsense" is undefined'
    ):
        found(bare)


def test_a_compiler_without_headers_or_that_does_not_load_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = next(iter(nvrtc._candidates()))
    (tmp_path / "libnvrtc.so.12").write_text("not a library")
    bad = [
        dataclasses.replace(good, headers=None, where="bare"),
        dataclasses.replace(good, path=str(tmp_path / "libnvrtc.so.12")),
    ]
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter([*bad, good]))
    assert nvrtc.find_nvrtc().where == good.where
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(bad))
    with pytest.raises(BackendError, match=r"\(bare\) has no cuda_fp16.h beside it; .*libnvrtc.so.12 does not load"):
        nvrtc.find_nvrtc()


def test_a_toolkit_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = Nvrtc(next(iter(nvrtc._candidates())))
    for folder in ("lib64", "include"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lib64" / "libnvrtc.so.12").symlink_to(real.path)
    (tmp_path / "include" / "cuda_fp16.h").write_text("")
    monkeypatch.setattr(nvrtc, "_pip_folders", list)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert str(nvrtc.find_nvrtc()) == "NVRTC 12.6 (in CUDA_HOME)"
    assert nvrtc.find_nvrtc().headers == tmp_path / "include"
