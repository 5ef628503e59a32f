"""Mistakes that are easily made in a kernel, planted into the shipped sources one by one: the usual checks see each."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.attention_cases import Case, decode_rows, prefill_rows
from tests.kernels.host import ORDERS, Compiled, HostError, HostKernels
from tests.kernels.oracle import dequantize, halves, product, random_int4
from tests.kernels.products import multiply, put_weight
from tests.kernels.projections import random_case
from tests.kernels.test_sampling import Step, records
from vila_edge.config import Heads
from vila_edge.kernels import stream
from vila_edge.kernels.epilogue import Epilogue
from vila_edge.kernels.manifest import Manifest, manifest
from vila_edge.kernels.w4_layout import plain_order
from vila_edge.sampler import Sampling

Check = Callable[[HostKernels], None]


def project(kernels: HostKernels) -> None:
    random_case(images=1, grid=9, block=2, channels=160, outputs=72).check(kernels, "64x64")


def multiply_w4(kind: str, kernels: HostKernels) -> None:
    rng = np.random.default_rng(0)
    weight, x = random_int4(rng, 80, 640), halves(rng, 5, 640)
    y, stats = multiply(kernels, kind, put_weight(kernels, weight, plain_order(80)), x, Epilogue(80))
    product(dequantize(weight), x).check(y)
    assert stats is not None and stats.bank_conflicts == 0


def read(kernels: HostKernels) -> None:
    words = np.arange(4 * 5000, dtype=np.uint32)
    sums = kernels.empty((2,), np.uint32)
    kernels.run(stream.read(kernels.put(words).address, words.nbytes, sums.address, 2))
    assert sums.numpy().sum(dtype=np.uint32) == words.sum(dtype=np.uint32)


def draw(kernels: HostKernels) -> None:
    ties = np.zeros(2500)
    ties[::3] = np.linspace(-3, 0, len(ties[::3]))
    mixed = np.random.default_rng(0).standard_normal(2500)
    mixed[::10] = 3.5  # their mass is a power of two, without a carry: half of all
    logits = np.stack([ties, mixed]).astype(np.float32)
    drawn = [Sampling(temperature=0.8, top_k=1500, top_p=0.95), Sampling(temperature=2.0)]
    step = Step(kernels, logits, records(drawn), np.array([4, 5]))
    for _ in range(10):
        expected = step.expected()
        assert step.run() == expected


def decode(kernels: HostKernels) -> None:
    case = Case("int8", Heads(6, 1, 64), past=[87], new=1)
    case.expected(0).check(decode_rows(kernels, case))


def prefill(kernels: HostKernels) -> None:
    case = Case("float16", Heads(3, 1, 64), past=[120], new=15)
    case.expected(0).check(prefill_rows(kernels, case))


@dataclasses.dataclass(frozen=True)
class Victim:
    """A kernel and the check of its own tests. Of its file, only what the check launches is built."""

    kernel: str
    check: Check
    beside: tuple[str, ...] = ()


PROJECTOR = Victim("ve_project_f16_norm_64x64", project)
GEMV = Victim("ve_gemv_w4a16_r1", functools.partial(multiply_w4, "gemv_r1"))
GEMM = Victim("ve_gemm_w4a16_128x32", functools.partial(multiply_w4, "gemm_32"))
READ = Victim("ve_stream_read", read)
DRAW = Victim("ve_sample_f32", draw, beside=("ve_sample_max_f32",))
DECODE = Victim("ve_attention_decode_i8_64", decode)
PREFILL = Victim("ve_attention_prefill_f16_64", prefill)
VICTIMS = (PROJECTOR, GEMV, GEMM, READ, DRAW, DECODE, PREFILL)


@dataclasses.dataclass(frozen=True)
class Bug:
    """Every `old` in a file becomes `new`."""

    victim: Victim
    file: str
    old: str
    new: str


LISTED = "__syncthreads();\n  if (threadIdx.x < found.part.count) {"
LOAD = "if (step + STAGES - 1 < a.steps) load(step + STAGES - 1);"
ARRIVED = "__syncthreads();  // the tile is there for all, and nobody reads the one that is loaded over"
GEMM_LOAD = "if (next < chunks) load(stages[next % STAGES], next);"
GEMM_ARRIVED = "__syncthreads();  // the chunk is there for all, and nobody reads the one before it any more"
WEIGH = "    __syncthreads();  // every warp's top is there: all of them weigh alike\n"
STAGE = "__syncthreads();  // the stage is there for all, and nobody reads the one before it any more"
REFILL = "if (first + POSITIONS < end) load(stages + (stage ^ 1) * 2 * SIDE, first + POSITIONS);"
BUGS = {
    "missing barrier, projector": Bug(PROJECTOR, "src/projector.cu", ARRIVED, ""),
    "missing barrier, gemv": Bug(
        GEMV,
        "include/ve_gemv.cuh",
        "  __syncthreads();\n\n  for (int i = threadIdx.x; i < R",
        "  for (int i = threadIdx.x; i < R",
    ),
    "missing barrier, gemm": Bug(
        GEMM, "src/gemm_w4a16.cu", "ve_cp_wait<0>();\n    __syncthreads();", "ve_cp_wait<0>();"
    ),
    "divergent barrier, projector": Bug(PROJECTOR, "src/projector.cu", ARRIVED, "if (warp != 3) __syncthreads();"),
    "divergent barrier, read": Bug(
        READ,
        "src/stream.cu",
        "= sum;\n  __syncthreads();\n  if (threadIdx.x) return;",
        "= sum;\n  if (threadIdx.x) return;\n  __syncthreads();",
    ),
    "wait_group off by one, projector": Bug(
        PROJECTOR, "src/projector.cu", "ve_cp_wait<STAGES - 2>", "ve_cp_wait<STAGES - 1>"
    ),
    "wait_group off by one, gemm": Bug(GEMM, "src/gemm_w4a16.cu", "ve_cp_wait<STAGES - 2>", "ve_cp_wait<STAGES - 1>"),
    "early refill, projector": Bug(PROJECTOR, "src/projector.cu", f"{ARRIVED}\n    {LOAD}", f"{LOAD}\n    {ARRIVED}"),
    "early refill, gemm": Bug(
        GEMM, "src/gemm_w4a16.cu", f"{GEMM_ARRIVED}\n        {GEMM_LOAD}", f"{GEMM_LOAD}\n        {GEMM_ARRIVED}"
    ),
    "wrong nibble mask, gemv": Bug(GEMV, "include/ve_pack.cuh", "0x00f000f0u", "0x00e000f0u"),
    "wrong nibble mask, gemm": Bug(GEMM, "include/ve_pack.cuh", "0x000f000fu", "0x001f000fu"),
    "no swizzle, projector": Bug(PROJECTOR, "src/projector.cu", "(chunk ^ (row & 7)) * 8", "chunk * 8"),
    "no swizzle, gemm": Bug(
        GEMM, "include/ve_pack.cuh", "return unit ^ ((row & 1) << 2 | (row >> 1 & 3));", "return unit;"
    ),
    "no swizzle for the reader, projector": Bug(
        PROJECTOR,
        "src/projector.cu",
        "w + swizzled(warp_n + n * 16 + lane % 16, k + lane / 16)",
        "w + (warp_n + n * 16 + lane % 16) * K_STEP + (k + lane / 16) * 8",
    ),
    "tail out of bounds, projector": Bug(PROJECTOR, "src/projector.cu", "&& first_row + token < a.rows;", ";"),
    "missing barrier, draw": Bug(DRAW, "src/sampling.cu", LISTED, LISTED.removeprefix("__syncthreads();")),
    "missing barrier, scan": Bug(
        DRAW, "src/sampling.cu", "shared.warps[warp] = sum;\n    __syncthreads();", "shared.warps[warp] = sum;"
    ),
    "a carry is lost, draw": Bug(DRAW, "src/sampling.cu", "(before > ~low_part)", "0 * before"),
    "ties by the last index, draw": Bug(
        DRAW, "src/sampling.cu", "other.order > mine.order", "other.order / 512 > mine.order / 512"
    ),
    "tail out of bounds, draw": Bug(DRAW, "src/sampling.cu", "token < vocab ? __ldg", "token <= vocab ? __ldg"),
    "missing barrier, decode": Bug(DECODE, "src/attention_decode.cu", WEIGH, ""),
    "the new key of the cache, decode": Bug(
        DECODE, "src/attention_decode.cu", "if (start + row + i != length - 1)\n", ""
    ),
    "early refill, prefill": Bug(PREFILL, "src/attention_prefill.cu", f"{STAGE}\n      {REFILL}", f"{REFILL}\n{STAGE}"),
    "shifted mask, prefill": Bug(PREFILL, "src/attention_prefill.cu", "e % 2 > last[e / 2]", "e % 2 > last[e / 2] + 1"),
    "no swizzle, prefill": Bug(PREFILL, "include/ve_attention.cuh", "(flips - 1)", "(flips - flips)"),
    "tail out of bounds, read": Bug(READ, "src/stream.cu", "for (; at < vectors;", "for (; at <= vectors;"),
}


def copy_kernels(folder: Path, victim: Victim, bug: Bug | None = None) -> Manifest:
    """The sources as they ship, but for other kernels of the file, and with the bug."""
    source = manifest()
    for part in ("src", "include", "host"):
        shutil.copytree(source.root / part, folder / part)
    file = folder / "src" / source[victim.kernel].file
    launched = "|".join((victim.kernel, *victim.beside))
    other = rf"^VE_\w+\((?!(?:{launched})[,)])ve_.*\n"
    file.write_text(re.sub(other, "", file.read_text(), flags=re.MULTILINE))
    if bug:
        path = folder / bug.file
        text = path.read_text()
        assert bug.old in text, f"{bug.file} has changed: write this bug anew"
        path.write_text(text.replace(bug.old, bug.new))
    return dataclasses.replace(source, root=folder)


def failures(compiled: Compiled, check: Check) -> list[str]:
    """The orders of threads in which the check fails."""
    found = list[str]()
    for order in ORDERS:
        try:
            check(HostKernels(compiled, order))
        except (HostError, AssertionError):
            found.append(order)
    return found


@pytest.mark.parametrize("victim", VICTIMS, ids=lambda victim: victim.kernel)
def test_the_sources_as_they_ship_pass(tmp_path: Path, victim: Victim) -> None:
    compiled = Compiled(tmp_path, copy_kernels(tmp_path / "kernels", victim))
    assert failures(compiled, victim.check) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_seen(tmp_path: Path, name: str) -> None:
    bug = BUGS[name]
    compiled = Compiled(tmp_path, copy_kernels(tmp_path / "kernels", bug.victim, bug))
    compiled.library(manifest()[bug.victim.kernel].file)  # it is no mistake that a compiler sees
    assert failures(compiled, bug.victim.check)
