"""Torch beside our kernels: what it is timed at computes the same, here on the CPU with a clock that tells what it ran."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import gpu_kernels
from benchmarks.gpu_peers import torch_gpu
from benchmarks.gpu_peers.torch_clock import Work
from benchmarks.gpu_peers.torch_gpu import Weights, dequantise, matmul_rate, measure, measure_products
from tests.kernels.test_bench_kernels import TINY
from vila_edge.bench.kernels import report
from vila_edge.bench.kernels.targets import torch_product, torch_projector

L2 = 1 << 12


class Clock:
    """Every piece of work takes 100 us, eagerly 300."""

    def __init__(self) -> None:
        self.results: list[Tensor] = []  # of the first of each turn
        self.turns: list[int] = []

    def graph(self, works: Sequence[Work]) -> float:
        self.results.append(works[0]())
        self.turns.append(len(works))
        return 100.0

    def eager(self, works: Sequence[Work]) -> float:
        return 3 * self.graph(works)


def as_numpy(weights: Weights) -> Any:
    """The first set [n, k] in float64, taken apart by numpy."""
    packed = weights.packed[0].numpy()
    q = np.empty((weights.n, weights.k))
    q[:, ::2], q[:, 1::2] = packed & 15, packed >> 4
    scales, zeros = (np.repeat(part.double().numpy(), 128, 1) for part in (weights.scales, weights.zeros))
    return (q - zeros) * scales


def test_the_products_are_those_of_the_same_weight() -> None:
    weights, clock = Weights(48, 256, L2, "cpu"), Clock()
    found = measure_products(weights, [3], clock, dequantise)
    assert found["48x256x3"]["matmul_us"] == found["48x256x3"]["dequantise_us"] == 100.0
    matmul, dequantised = clock.results
    assert torch.equal(matmul, dequantised)
    dense = weights.dense()
    np.testing.assert_allclose(dense[0].double(), as_numpy(weights), rtol=2e-3, atol=1e-6)
    assert clock.turns == [len(dense), len(weights.packed)] == [2, 6], "8 times L2 of each kind of weight"


def test_a_shape_that_torch_does_not_take_is_said() -> None:
    """On the CPU none is."""
    found = measure_products(Weights(16, 128, L2, "cpu"), [1], Clock(), dequantise)["16x128x1"]
    assert found["int4_us"] is None and "_convert_weight_to_int4pack" in found["int4_refused"]


def test_int4_of_torch_is_given_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operation for the CPU has the same scales and zeros, and takes integers one by one."""
    aten = torch.ops.aten

    def convert(swapped: Tensor, tiles: int) -> Tensor:
        integers = torch.stack([swapped >> 4, swapped & 15], -1).reshape(len(swapped), -1).int()
        return torch.Tensor(aten._convert_weight_to_int4pack_for_cpu(integers, tiles))

    weights = Weights(48, 256, L2, "cpu")
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", convert)
    (packed, *_), scales = weights.int4()
    x = torch.randn(3, 256).bfloat16()
    found = aten._weight_int4pack_mm_for_cpu(x, packed, 128, scales)
    expected = x.double().numpy() @ as_numpy(weights).T
    assert np.linalg.norm(found.double().numpy() - expected) < 0.02 * np.linalg.norm(expected)


def test_every_case_of_ours_finds_its_peer() -> None:
    found = measure(TINY, Clock(), dequantise, L2, "cpu")
    for part, n, k in (("qkv", 256, 128), ("o", 128, 128), ("gate+up", 256, 128), ("down", 128, 128)):
        for rows in (*TINY.batches, *TINY.tokens):
            assert torch_product(found, {"name": part, "n": n, "k": k, "rows": rows})["dequantise_us"] == 100.0
    (projection,) = TINY.projections
    for images in TINY.images:
        peer = torch_projector(found, {"name": projection.name, "rows": images})
        assert peer == {"eager_us": 300.0, "graph_us": 100.0}
    assert torch_product(found, {"name": "lm_head", "n": 40, "k": 128, "rows": 1}) == {}


def test_the_rate_of_the_library() -> None:
    assert matmul_rate(Clock(), "cpu", 64) == pytest.approx(2 * 64**3 / 100e-6)


def test_without_a_gpu_torch_is_absent_and_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    absent = gpu_kernels.beside(sys.executable, [], 1)
    assert absent == {"absent": f"torch {torch.__version__} finds no GPU"}
    assert gpu_kernels.beside(str(tmp_path / "python"), [], 1)["absent"].startswith("[Errno 2] No such file")
    failing = tmp_path / "failing"
    failing.write_text(
        "#!/bin/sh\necho Traceback >&2\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n"
    )
    failing.chmod(0o755)
    reason = gpu_kernels.beside(str(failing), [], 1)
    assert reason == {"absent": "ModuleNotFoundError: No module named 'torch'"}
    found = {"gpu": {"name": "G", "compute_capability": "9.0"}, "driver": {"version": None, "cuda": "12.6"}}
    found |= {"date": "2026", "toolkit": {"nvrtc": "12.6"}, "commit": None, "torch": reason}
    assert report.headline(found).endswith("no torch: ModuleNotFoundError: No module named 'torch'")


def test_what_ours_fails_with_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit) as left:
        gpu_kernels.ours([], 1)
    assert left.value.code == 1


def test_the_merged_result_has_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_kernels, "ours", lambda models, repeat: {"models": models, "repeat": repeat})
    monkeypatch.setattr(gpu_kernels, "beside", lambda python, models, repeat: {"version": "2", "of": models})
    for name in ("markdown", "headline"):
        monkeypatch.setattr(gpu_kernels, name, lambda found: f"{found}")
    monkeypatch.setattr(gpu_kernels, "sheets", lambda found: [])
    gpu_kernels.main(["VILA1.5-3B"], 3, "python", None, tmp_path / "k.md")
    both = "{'models': ['VILA1.5-3B'], 'repeat': 3, 'torch': {'version': '2', 'of': ['VILA1.5-3B']}}"
    assert (tmp_path / "k.md").read_text() == both and both in capsys.readouterr().out


def test_torch_is_told_what_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` on a machine with a GPU, as far as that can be seen without one."""
    asked = list[Any]()

    def note(*arguments: Any) -> dict[str, Any]:
        asked.extend(arguments)
        return {"products": {}}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)  # it is changed, and has to be there
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=60))
    monkeypatch.setattr(torch_gpu, "compiled_dequantise", lambda device: (dequantise, "torch.compile"))
    monkeypatch.setattr(torch_gpu, "matmul_rate", lambda clock, device: 7e14)
    monkeypatch.setattr(torch_gpu, "measure", note)
    found = torch_gpu.main({"models": ["NVILA-2B"], "repeat": 5})
    shapes, clock, _, l2_bytes, device = asked
    assert [model.name for model in shapes.models] == ["NVILA-2B"]
    assert (clock.repeat, l2_bytes, device) == (5, 60, "cuda")
    assert torch._dynamo.config.recompile_limit == 256
    assert found["gpu"] == "H200" and found["matmul_flops_per_s"] == 7e14 and found["products"] == {}
