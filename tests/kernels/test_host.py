"""The stand-in for a GPU finds what it says it finds: each kernel here does one thing wrong, when `wrong` is not 0."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.host import ORDERS, Compiled, HostError, HostKernels, Stats
from vila_edge.kernels import launch
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.manifest import manifest, read_manifest

BODIES = {
    "read": "if (i < n + wrong) y[i < n ? i : 0] = x[i];",
    "write": "if (i < n + wrong) y[i] = __float2half(1.f);",
    "const": "if (wrong) const_cast<__half*>(x)[0] = y[0];",
    "align": "y[i] = __float2half((float)ve_ld_shared(reinterpret_cast<const uint4*>(x) + (wrong ? 0 : 1)).x);",
    "branch": "if (wrong && i < 16) __syncthreads();\n  __syncthreads();",
    "leave": "if (i >= 32 - wrong) return;\n  __syncthreads();",
    "lanes": "if (wrong && i < 16) __syncwarp(); else __shfl_sync(0xffffffffu, i, 0);",
    "poison": "VE_SHARED(__half, s, 32); if (!wrong) s[i] = x[0];\n  __syncthreads(); y[i] = s[i];",
    "late": "VE_DYN_SMEM(s); ve_cp_async16(s + 16 * i, x, true); ve_cp_commit(); if (!wrong) ve_cp_wait<0>();\n"
    "  y[i] = reinterpret_cast<__half*>(s)[8 * i];",
    "atomic": "VE_SHARED(unsigned, s, 1); if (i == 0) s[0] = 0;\n  __syncthreads();\n"
    "  atomicAdd(wrong ? reinterpret_cast<unsigned*>(y) : s, (unsigned)i);\n  __syncthreads();\n"
    "  y[i] = __float2half((float)s[0]);",
    "dynamic": "VE_DYN_SMEM(s); atomicAdd(reinterpret_cast<unsigned*>(s + 4096 - (wrong ? 2 : 4)), 1u);",
    "up": "y[i] = __float2half((float)__shfl_up_sync(0xffffffffu, i, 3));",
    "source": "VE_DYN_SMEM(s); ve_cp_async16(s + 16 * i, y + 8 * i, true); ve_cp_commit(); y[8 * i] = x[0];\n"
    "  ve_cp_wait<0>(); y[8 * i + 1] = reinterpret_cast<__half*>(s)[8 * i];",
    "banks": "VE_DYN_SMEM(s); ve_ld_shared(s + (wrong ? 128 : 16) * i);",
    "matrices": "VE_DYN_SMEM(s); memcpy(s + 16 * i, x + 8 * i, 16); __syncwarp(); unsigned r[4];\n"
    "  if (wrong) ve_ldmatrix_x4_trans(r, s + 16 * i); else ve_ldmatrix_x4(r, s + 16 * i);\n"
    "  memcpy(y + 8 * i, r, 16);",
    "transpose": "unsigned r; memcpy(&r, x + 2 * i, 4); r = ve_transpose(r); memcpy(y + 2 * i, &r, 4);",
}
EXACT = 64  # halves


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A folder of kernels like the real one, with a file of all bodies."""
    root = tmp_path_factory.mktemp("toys")
    for folder in ("include", "host"):
        shutil.copytree(manifest().root / folder, root / folder)
    (root / "src").mkdir()
    tables = ['[toolchain]\nnvrtc = "12.6"\narchitectures = ["sm_87"]\nptx = "compute_80"']
    source = '#include "ve_ptx.cuh"\n'
    for name, body in BODIES.items():
        signature = f"ve_{name}(const __half* x, __half* y, int n, int wrong)"
        source += f'extern "C" __global__ void {signature} {{\n  const int i = threadIdx.x; (void)i;\n  {body}\n}}\n'
        source += f"VE_EXPORT(ve_{name})\n"
        tables.append(
            f'[ve_{name}]\nfile = "toys.cu"\nblock = [32, 1, 1]\nshared_memory = 4096\nmax_registers = 32\n'
            'arguments = ["x: const f16*", "y: f16*", "n: i32", "wrong: i32"]'
        )
    (root / "src" / "toys.cu").write_text(source)
    (root / "manifest.toml").write_text("\n".join(tables))
    return Compiled(tmp_path_factory.mktemp("compiled"), read_manifest(root))


@pytest.fixture(params=ORDERS)
def host(toys: Compiled, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HostKernels:
    monkeypatch.setattr(launch, "manifest", lambda: toys.manifest)
    return HostKernels(toys, request.param)


def run(host: HostKernels, name: str, wrong: int, size: int = EXACT, n: int = 32) -> tuple[NDArray[Any], Stats]:
    x, y = host.put(np.ones(size, np.float16)), host.empty((size,), np.float16)
    address = x.address + (2 if name == "align" and wrong else 0)
    return y.numpy(), host.run(Launch(f"ve_{name}", (1, 1, 1), (address, y.address, n, wrong)))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("read", 24, "out of bounds"),
        ("write", 24, "out of bounds"),
        ("write", 28, "a write beside an array"),
        ("const", EXACT, "a write to a const argument"),
        ("align", EXACT, "a vector access is not aligned"),
        ("branch", EXACT, "threads of a block meet at different barriers"),
        ("leave", EXACT, "__syncthreads waits for threads that never come"),
        ("lanes", EXACT, "lanes of a warp meet in different collectives"),
        ("atomic", EXACT, "an atomic outside shared memory"),
        ("dynamic", EXACT, "an atomic outside shared memory"),
    ],
)
def test_a_mistake_is_an_error(host: HostKernels, name: str, size: int, message: str) -> None:
    run(host, name, 0, size, n=size)
    with pytest.raises(HostError, match=f"ve_{name}: .*{message}.*thread" if "beside" not in message else message):
        run(host, name, 1, size, n=size)


def test_shared_memory_starts_as_poison(host: HostKernels) -> None:
    assert not np.isnan(run(host, "poison", 0)[0][:32]).any()
    assert np.isnan(run(host, "poison", 1)[0][:32]).all()


def test_atomics_in_shared_memory_add_up(host: HostKernels) -> None:
    assert (run(host, "atomic", 0)[0][:32] == sum(range(32))).all()


def test_lanes_get_what_lies_below_them_and_the_lowest_keep_theirs(host: HostKernels) -> None:
    assert run(host, "up", 0)[0][:32].tolist() == [0, 1, 2, *range(29)]


def test_a_copy_lands_when_it_is_waited_for_or_before(host: HostKernels) -> None:
    assert (run(host, "late", 0)[0][:32] == 1).all()
    assert np.isnan(run(host, "late", 1)[0][:32]).all() == (host.order != "reverse")


def test_a_copy_may_read_before_the_next_write(host: HostKernels) -> None:
    assert np.isnan(run(host, "source", 0, size=256)[0][1::8]).all() == (host.order != "forward")


def test_bank_conflicts_are_counted(host: HostKernels) -> None:
    assert run(host, "banks", 0)[1].bank_conflicts == 0
    assert run(host, "banks", 1)[1].bank_conflicts == run(host, "banks", 1)[1].shared_reads == 4


def test_matrices_are_given_to_lanes(host: HostKernels) -> None:
    """Lane i has elements 2 (i % 4), + 1 of row i / 4: of a matrix, or of what it is transposed."""
    four = np.arange(256, dtype=np.float16).reshape(4, 8, 8)
    x, y = host.put(four), host.empty((8, 4, 4, 2), np.float16)
    for wrong, matrices in ((0, four), (1, four.transpose(0, 2, 1))):
        stats = host.run(Launch("ve_matrices", (1, 1, 1), (x.address, y.address, 0, wrong)))
        assert np.array_equal(y.numpy(), matrices.reshape(4, 8, 4, 2).transpose(1, 2, 0, 3))
        assert (stats.shared_reads, stats.bank_conflicts) == (4, 0)
    y = host.empty((8, 8), np.float16)
    host.run(Launch("ve_transpose", (1, 1, 1), (x.address, y.address, 0, 0)))
    assert np.array_equal(y.numpy(), four[0].T)


def test_an_address_of_no_array_is_refused(host: HostKernels) -> None:
    with pytest.raises(HostError, match="ve_read: x is the address of no array"):
        host.run(Launch("ve_read", (1, 1, 1), (4096, 4096, 1, 0)))


def test_another_signature_than_the_manifests_is_refused(host: HostKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    read = host.compiled.manifest["ve_read"]
    other = replace(host.compiled.manifest, kernels={"ve_read": replace(read, arguments=read.arguments[:3])})
    monkeypatch.setattr(host.compiled, "manifest", other)
    monkeypatch.setattr(launch, "manifest", lambda: other)
    x = host.put(np.ones(EXACT, np.float16))
    with pytest.raises(HostError, match="the source takes 4 arguments in 24 bytes"):
        host.run(Launch("ve_read", (1, 1, 1), (x.address, x.address, 1)))
