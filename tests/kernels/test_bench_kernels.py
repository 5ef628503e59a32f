"""`vila-edge bench kernels`: what it launches computes, its numbers are those of the clock, its weights come from memory."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fake_cuda import FakeDevice, FakeLaunch
from tests.kernels.host import Compiled
from tests.kernels.on_device import host_find
from tests.test_cli import Done, in_process
from vila_edge.bench.kernels import report, run
from vila_edge.bench.kernels.cases import workloads
from vila_edge.bench.kernels.clock import Clock
from vila_edge.bench.kernels.memory import Piece, Sets, sets_for
from vila_edge.bench.kernels.run import Options, bench_kernels
from vila_edge.bench.kernels.shapes import MODELS, Model, Projection, Shapes
from vila_edge.bench.kernels.targets import judge
from vila_edge.config import Heads
from vila_edge.engine.cuda.kernels import Kernels
from vila_edge.errors import BackendError
from vila_edge.kernels.manifest import manifest

__all__ = ["in_process"]

TINY = Shapes(
    models=[Model("Tiny", 128, Heads(4, 2, 32), 128, 40)],
    projections=[Projection("Tiny", "mlp_downsample", 3, 16, 128)],
    batches=(1, 8),
    tokens=(4, 33),
    images=(1, 2),
)
OPTIONS = Options(repeat=3, least_us=0, bandwidth_bytes=1 << 16)
TIMES = {"ve_stream_read": 2.0, "ve_stream_copy": 5.0, "ve_gemv_w8a16_rms_r1": 20.0, "ve_gemv_w4a16_r2": 8.0}


def takes(launch: FakeLaunch) -> float:
    """Microseconds: a batch of 8 as long as one of 1, and whatever TIMES does not say 10."""
    return TIMES.get(launch.kernel.name, 10.0)


@pytest.fixture(scope="module")
def device() -> FakeDevice:
    device = FakeDevice()
    device.takes, device.copy_takes = takes, 4.0
    return device


@pytest.fixture(scope="module")
def found(device: FakeDevice, compiled: Compiled) -> dict[str, Any]:
    """One whole run."""
    return bench_kernels(device, TINY, OPTIONS, find=host_find(compiled))


def rows(found: dict[str, Any], group: str, name: str, count: int) -> list[dict[str, Any]]:
    return [r for r in found["kernels"] if (r["group"], r["name"], r["rows"]) == (group, name, count)]


def test_the_bandwidth_is_that_of_the_best_way(found: dict[str, Any]) -> None:
    size = 1 << 16
    assert found["bandwidth"]["read"] == pytest.approx(size / 2e-6)
    assert found["bandwidth"]["copy"] == pytest.approx(2 * size / 4e-6), "the driver's, which is faster than ours"
    assert len(found["bandwidth"]["before"]) == 9 and found["bandwidth"]["after"] == found["bandwidth"]["before"]


def test_a_product_is_measured_against_the_bandwidth(found: dict[str, Any]) -> None:
    one, two = rows(found, "decode", "Tiny o", 8)
    nbytes = 128 * 128 // 2 + 128 * (2 + 1)
    assert (one["launches"], two["launches"]) == (["ve_gemv_w4a16_r1"], ["ve_gemv_w4a16_r2"])
    assert (one["default"], two["default"]) == (True, False)
    assert one["bytes"] == nbytes and one["flops"] == 2 * 128 * 128 * 8
    assert (one["p50_us"], one["p95_us"], two["p50_us"]) == pytest.approx((10, 10, 8))
    assert one["of_copy_bandwidth"] == pytest.approx(nbytes / 10 / (2 * (1 << 16) / 4))
    assert one["of_read_bandwidth"] == pytest.approx(nbytes / 10 / ((1 << 16) / 2))
    assert one["flops_per_s"] == pytest.approx(2 * 128 * 128 * 8 / 10e-6)


def test_every_product_of_a_decoder_is_there_as_a_decoder_launches_it(found: dict[str, Any]) -> None:
    launched = {r["name"]: r["launches"] for r in found["kernels"] if r["group"] == "decode" and r["default"]}
    assert launched == {
        "Tiny qkv": ["ve_gemv_w4a16_rms_r1"],
        "Tiny o": ["ve_gemv_w4a16_r1"],
        "Tiny gate+up": ["ve_gemv_w4a16_rms_r1"],
        "Tiny down": ["ve_gemv_w4a16_r1"],
        "Tiny lm_head, 8 bits": ["ve_gemv_w8a16_rms_r1"],
    }
    tiles = [(r["rows"], *r["launches"]) for r in found["kernels"] if r["name"] == "Tiny down" and r["default"]]
    assert tiles[2:] == [(4, "ve_gemm_w4a16_128x32"), (33, "ve_gemm_w4a16_128x64")]
    (projector,) = rows(found, "projector", "Tiny mlp_downsample 3x3x16 -> 128", 2)
    assert [name[:17] for name in projector["launches"]] == ["ve_project_f16_no", "ve_project_f16_64"]
    assert projector["p50_us"] == pytest.approx(20), "both launches"
    others = {r["name"] for r in found["kernels"] if r["group"] == "other"}
    assert others == {"Tiny RMSNorm + residual", "Tiny embedding", "Tiny image to patches"}


def test_decode_ends_each_product_as_a_decoder_does() -> None:
    ends = dict[str, set[str]]()
    for workload in workloads(dataclasses.replace(TINY, projections=[Projection("T", "linear", 1, 8, 8)]), 4):
        at = {name: 1 << 8 for name in {**workload.rotated, **workload.shared}}
        for case in workload.cases:
            (launch, *_) = case.launches(at)
            if case.group in ("decode", "prefill"):
                names = [argument.name for argument in manifest()[launch.kernel].parameters]
                given = {name for name, value in zip(names, launch.arguments, strict=True) if value}
                ends[f"{workload.name} {case.group}"] = given & {"gamma", "swiglu", "residual", "rotated_tiles"}
    assert {name: end for name, end in ends.items() if end} == {
        "Tiny qkv decode": {"gamma", "rotated_tiles"},
        "Tiny o decode": {"residual"},
        "Tiny gate+up decode": {"gamma", "swiglu"},
        "Tiny down decode": {"residual"},
        "Tiny lm_head, 8 bits decode": {"gamma"},
    }


def test_nothing_is_left_on_the_device(found: dict[str, Any], device: FakeDevice) -> None:
    assert not device.buffers and not device.pins and not device.streams and not device.events and not device.modules


def test_each_launch_of_a_turn_reads_a_weight_of_its_own(compiled: Compiled) -> None:
    device, read = FakeDevice(), defaultdict[str, list[int]](list)

    def note(launch: FakeLaunch) -> float:
        read[launch.kernel.name].append(int.from_bytes(launch.arguments[:8], "little"))
        return 1.0

    device.takes = note
    shapes = dataclasses.replace(TINY, projections=[], batches=(1,), tokens=(4,))
    found = bench_kernels(device, shapes, OPTIONS, find=host_find(compiled))
    (lm_head, _) = rows(found, "decode", "Tiny lm_head, 8 bits", 1)
    sets, addresses = lm_head["sets"], read["ve_gemv_w8a16_rms_r1"]
    assert sets * 64 * 128 > 7 * device.l2_bytes and sets > 2
    assert len(set(addresses[:sets])) == sets, "no two launches of a turn share a weight"
    assert addresses == addresses[:sets] * (len(addresses) // sets), "and the turns are the same"


def test_what_is_measured_computes(compiled: Compiled) -> None:
    """Every result of every case is there and finite: nothing was skipped, and no array holds numbers of another."""
    device = FakeDevice()
    kernels, stream = Kernels(device, host_find(compiled)), device.stream()
    for workload in workloads(TINY, device.multiprocessors):
        memory = Sets(device, workload.rotated, workload.shared, 1, stream)
        (at,) = memory.addresses
        pieces = {**workload.rotated, **workload.shared}
        (name,) = {"y", "embeds", "out", "patches"} & set(pieces)
        dtype = np.float32 if "lm_head" in workload.name else np.float16
        for case in workload.cases:
            result = device.view(at[name], pieces[name].nbytes)
            result.fill(0xFF)
            kernels.run(case.launches(at), stream)
            stream.synchronize()
            values = result.view(dtype)
            wanted = values.size * case.rows // max(c.rows for c in workload.cases)
            written = np.isfinite(values.astype(np.float64)).sum()
            halved = 2 if "gate+up" in workload.name and case.group == "decode" else 1
            assert written * halved == wanted, (workload.name, case)
            assert (values[np.isfinite(values)] != 0).mean() > 0.5, (workload.name, case)
        memory.free()


def test_a_graph_lasts_and_its_samples_are_means_of_one() -> None:
    device = FakeDevice()
    device.copy_takes = 3.0
    stream, buffer = device.stream(), device.alloc(64)
    clock = Clock(device, repeat=4, least_us=100)
    work = [lambda on: device.copy_on_device_async(buffer.address, buffer.address + 32, 32, on)] * 5
    assert clock.measure(work).samples_us == (3.0,) * 4
    # once and 4 times behind one that is not timed: of 5 pieces in a turn, then of 7 turns, the first to last 100 us
    assert device.now_us == 3.0 * (2 * 5 + 5 * 35) and device.calls["capture"] == 2
    stream.free()


def test_sets_are_filled_and_apart() -> None:
    device = FakeDevice()
    content = np.arange(5, dtype=np.uint8)
    stream = device.stream()
    memory = Sets(device, {"a": Piece(12, content)}, {"b": Piece(3, content)}, 2, stream)
    one, two = memory.addresses
    assert one["b"] == two["b"] and one["a"] != two["a"]
    for at in (one["a"], two["a"]):
        assert device.view(at, 12).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert device.view(one["b"], 3).tolist() == [0, 1, 2]
    memory.free()
    assert not device.buffers and not device.pins


@pytest.mark.parametrize(("nbytes", "sets"), [(1, 512), (100, 80), (999, 9), (8000, 1), (10**9, 1)])
def test_sets_are_as_many_as_leave_nothing_in_l2(nbytes: int, sets: int) -> None:
    assert sets_for(nbytes, 1000) == sets


def test_the_weights_are_as_large_as_the_study_says() -> None:
    """MB of 4 bits, a scale of 16 bits and a zero point of 8 for 128 weights."""
    shapes = Shapes(models=MODELS[:2], projections=[], tokens=(256,))
    sizes = {w.name: round(w.nbytes / 1e6, 1) for w in workloads(shapes, 16) if "qweight" in w.rotated}
    assert sizes == {
        "VILA1.5-3B qkv": 10.3,
        "VILA1.5-3B o": 3.4,
        "VILA1.5-3B gate+up": 18.5,
        "VILA1.5-3B down": 9.3,
        "VILA1.5-3B lm_head, 8 bits": 83.2,
        "VILA1.5-8B qkv": 13.2,
        "VILA1.5-8B o": 8.8,
        "VILA1.5-8B gate+up": 61.5,
        "VILA1.5-8B down": 30.7,
        "VILA1.5-8B lm_head, 8 bits": 533.7,
    }


# what is said of it


def row(group: str, rows: int, us: float, **more: Any) -> dict[str, Any]:
    times = {"p50_us": us, "p95_us": us, "of_copy_bandwidth": 0.5, "of_read_bandwidth": 0.4, "flops_per_s": 2e12}
    sizes = {"name": "W", "n": 3, "k": 5, "bytes": 1e6, "launches": ["a", "b"], "default": True}
    return {"group": group, "rows": rows, **times, **sizes, **more}


TORCH = {
    "version": "2.13.0",
    "cuda": "12.6",
    "matmul_flops_per_s": 8e12,
    "products": {"3x5x1024": {"matmul_us": 90.0, "dequantise_us": 200.0, "int4_us": None}},
    "projectors": {"P, 1 images": {"eager_us": 80.0, "graph_us": 39.0}},
}
ROWS = [
    row("decode", 1, 10, bytes=61e6, of_copy_bandwidth=0.81),
    row("decode", 1, 10, bytes=70e6, of_copy_bandwidth=0.79, name="V"),
    row("decode", 1, 9, bytes=70e6, of_copy_bandwidth=0.99, name="V", default=False),
    row("decode", 8, 13, name="V"),
    row("decode", 1, 10, bytes=9.3e6, of_copy_bandwidth=0.45, name="U"),
    row("decode", 1, 10, bytes=8e6, of_copy_bandwidth=0.1, name="T"),
    row("prefill", 1024, 210),
    row("prefill", 1024, 105, default=False),
    row("prefill", 196, 900),
    row("projector", 1, 30, name="P"),
]


def test_targets_are_judged_by_the_worst_of_what_is_the_default() -> None:
    judged = judge({"kernels": ROWS, "torch": TORCH})
    assert [(j.found, j.verdict, j.where) for j in judged] == [
        (0.79, "missed", "V"),
        (0.45, "met", "U"),
        (1.3, "missed", "V"),
        (1.05, "missed", "W, 1024 tokens"),
        (1.3, "met", "P, 1 images"),
    ]


def test_what_was_not_measured_is_said() -> None:
    for torch in (None, {"absent": "torch is not installed"}):
        judged = judge({"kernels": [row("prefill", 2048, 1), row("projector", 1, 1)], "torch": torch})
        assert [j.verdict for j in judged] == ["not measured"] * 5


def test_the_tables_hold_what_was_measured(found: dict[str, Any]) -> None:
    tables = {sheet.title: sheet.rows for sheet in report.sheets(found | {"kernels": ROWS, "torch": TORCH})}
    decode = tables["Decode: GEMV"]
    assert decode[1] == ("V 3x5", "1", "70.00", "10", "10", "79%", "40%", "1.00", "0.90", "-", "-")
    assert decode[2][:8] == ("V 3x5", "8", "1.00", "13", "13", "50%", "40%", "1.30")
    assert tables["Prefill: GEMM"][0] == ("W 3x5", "1,024", "210", "210", "2.0", "25%", "0.50", "90", "200", "-")
    assert tables["Prefill: GEMM"][1][-3:] == ("-", "-", "-")
    projector = ("P", "1", "2", "30", "30", "50%", "2.0", "25%", "80", "39", "1.30")
    assert tables["Projector"] == [projector]
    assert tables["Targets, the worst of each"][0] == (
        "GEMV of 60 MB or more, batch 1, of the copy bandwidth (V)",
        "at least 0.80",
        "0.79",
        "missed",
    )


def test_the_document_names_gpu_driver_toolkit_and_commit(found: dict[str, Any]) -> None:
    text = report.markdown(found | {"commit": "abc", "driver": {"version": "570.1", "cuda": "12.6"}})
    assert text.startswith("# Kernels on Fake Orin\n")
    assert (
        "(compute capability 8.7), driver 570.1 for CUDA 12.6, NVRTC 12.6, commit abc; no torch: not asked for" in text
    )
    assert "* `gemv_w4a16.cu`: built for the CPU" in text
    assert all(len(sheet.columns) == len(line) for sheet in report.sheets(found) for line in sheet.rows)


# the command


def test_the_command_writes_what_it_shows(
    in_process: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: dict[str, Any]
) -> None:
    asked: list[Any] = []

    def measured(device: Any, shapes: Shapes, options: Options, progress: Any) -> dict[str, Any]:
        asked.extend([shapes.models, options.repeat])
        return found

    class Opened(FakeDevice):
        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

    monkeypatch.setattr("vila_edge.engine.cuda.open_device", lambda index: Opened())
    monkeypatch.setattr(run, "bench_kernels", measured)
    files = ["--json", tmp_path / "k.json", "--markdown", tmp_path / "k.md"]
    done = in_process("bench", "kernels", "-m", "NVILA-2B", "-r", "7", *files)
    assert (done.returncode, asked) == (0, [[MODELS[2]], 7])
    assert "Decode: GEMV" in done.stdout and "Tiny o 128x128" in done.stdout and "not measured" in done.stdout
    assert json.loads((tmp_path / "k.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "k.md").read_text() == report.markdown(found)


@pytest.mark.parametrize("command", ["kernels", "decoder"])
def test_without_a_gpu_it_says_what_is_missing(
    command: str, in_process: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(index: int) -> None:
        raise BackendError("there is no NVIDIA driver: libcuda.so.1", "install NVIDIA's driver")

    monkeypatch.setattr("vila_edge.engine.cuda.open_device", fail)
    done = in_process("bench", command)
    assert (done.returncode, done.stdout) == (5, "")
    assert "there is no NVIDIA driver" in done.stderr and "install NVIDIA's driver" in done.stderr


def test_bad_calls_are_refused(in_process: Callable[..., Done]) -> None:
    done = in_process("bench", "kernels", "--model", "VILA-9B")
    assert done.returncode == 2 and "no model 'VILA-9B': expected one of NVILA-2B, NVILA-8B, VILA-7B" in done.stderr
    assert in_process("bench", "kernels", "--json", "nowhere/x.json").returncode == 2


def test_a_bundle_is_still_benched(in_process: Callable[..., Done], tmp_path: Path) -> None:
    """`bench kernels` is a command of its own; a folder of that name is reached as ./kernels."""
    assert "BUNDLE" in in_process("bench", "--help").stdout.upper()
    assert in_process("bench", tmp_path / "kernels").returncode == 3
    assert in_process("bench").returncode == 2
