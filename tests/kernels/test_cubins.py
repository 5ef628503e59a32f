"""The gate: what the compiler that ships makes of every kernel. Registers, no spill, and the instructions that matter."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernels.test_manifest import TABLE, TOOLCHAIN
from vila_edge.kernels.ahead import compile_all, shipping_nvrtc
from vila_edge.kernels.cuobjdump import Resources, instructions, resources
from vila_edge.kernels.manifest import Kernel, Manifest, manifest, read_manifest

ARCHITECTURES = ("sm_87", "sm_90")


@dataclasses.dataclass(frozen=True)
class Built:
    """A kernel as it was built for one architecture."""

    resources: Resources
    sass: str


def build(source: Manifest, folder: Path) -> dict[tuple[str, str], Built]:
    """By kernel and architecture."""

    def look(file: str, architecture: str, code: bytes) -> dict[tuple[str, str], Built]:
        path = folder / f"{Path(file).stem}.{architecture}.cubin"
        path.write_bytes(code)
        taken, sass = resources(path), instructions(path)
        return {(name, architecture): Built(taken[name], sass[name]) for name in taken}

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each look is two processes
        looks = [pool.submit(look, *built) for built in compile_all(source, shipping_nvrtc(source), ARCHITECTURES)]
        return {key: built for taken in looks for key, built in taken.result().items()}


def faults(kernel: Kernel, built: Built) -> list[str]:
    """What the manifest does not allow."""
    taken = built.resources
    found = [f"{taken.registers} registers"] if taken.registers > kernel.max_registers else []
    found += [f"{taken.stack} bytes of stack"] if taken.stack else []
    found += [f"{taken.local} bytes of local memory"] if taken.local else []
    found += [f"no {part}" for part in kernel.must if part not in built.sass]
    return found + [part for part in kernel.must_not if part in built.sass]


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Built]:
    return build(manifest(), tmp_path_factory.mktemp("cubins"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", manifest().kernels)
def test_a_kernel_is_built_as_the_manifest_says(
    cubins: dict[tuple[str, str], Built], name: str, architecture: str
) -> None:
    assert faults(manifest()[name], cubins[name, architecture]) == []


def test_every_function_is_in_the_manifest(cubins: dict[tuple[str, str], Built]) -> None:
    assert {name for name, _ in cubins} == set(manifest().kernels)


PLANTED = {
    "good": "int sum = 0; for (int i = 0; i < n; ++i) sum += x[i]; y[threadIdx.x] = sum;",
    "spill": "int v[96];\n#pragma unroll\nfor (int i = 0; i < 96; ++i) v[i] = x[i * 256 + threadIdx.x];\n"
    "__syncthreads();\n#pragma unroll\nfor (int i = 0; i < 96; ++i) y[i * 256 + threadIdx.x] = v[i] * v[(i * 37 + 11) % 96];",
    "atomic": "atomicAdd(y, x[threadIdx.x]);",
    "atomic_back": "y[threadIdx.x] = atomicAdd(y, x[threadIdx.x]);",
    "indexed": "int v[64] = {}; for (int i = 0; i < 64; ++i) v[x[i] & 63] = i; y[threadIdx.x] = v[n & 63];",
}


def test_the_gate_sees_what_it_is_there_for(tmp_path: Path) -> None:
    """Planted: a spill, an array in local memory, atomics between blocks, a missing instruction, too many registers."""
    (tmp_path / "src").mkdir()
    (tmp_path / "include").mkdir()
    source = "".join(
        f'extern "C" __global__ void __launch_bounds__(256, 6) ve_{name}(const int* x, int* y, int n) {{ {body} }}\n'
        for name, body in PLANTED.items()
    )
    (tmp_path / "src" / "a.cu").write_text(source)
    arguments = (
        TABLE.replace('["x: const f16*", "n: i32"]', '["x: const i32*", "y: i32*", "n: i32"]') + 'must = ["STG.E"]\n'
    )
    (tmp_path / "manifest.toml").write_text(TOOLCHAIN + "".join(arguments.replace("ve_a", f"ve_{n}") for n in PLANTED))
    planted = read_manifest(tmp_path)
    built = build(planted, tmp_path)
    good = planted["ve_good"]
    for architecture in ARCHITECTURES:
        fine = built["ve_good", architecture]
        assert faults(good, fine) == []
        assert faults(dataclasses.replace(good, must=("HMMA",)), fine) == ["no HMMA"]
        assert faults(dataclasses.replace(good, must_not=("STG.E",)), fine) == ["STG.E"]
        few = dataclasses.replace(good, max_registers=fine.resources.registers - 1)
        assert faults(few, fine) == [f"{fine.resources.registers} registers"]
        assert {"RED.E", "REDG"} & {*faults(planted["ve_atomic"], built["ve_atomic", architecture])}
        assert "ATOMG" in faults(planted["ve_atomic_back"], built["ve_atomic_back", architecture])
        for name in ("ve_spill", "ve_indexed"):
            seen = faults(planted[name], built[name, architecture])
            assert any("bytes of stack" in fault for fault in seen) and "STL" in seen, (name, architecture, seen)
