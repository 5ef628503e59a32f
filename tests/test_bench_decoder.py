"""`vila-edge bench decoder`: weights are packed as a bundle's, what is launched computes, numbers are the clock's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cuda_engines import MODELS as TINY_LLMS
from tests.cuda_engines import bundle_of
from tests.fake_cuda import FakeDevice, FakeLaunch
from tests.kernels.host import Compiled
from tests.kernels.on_device import host_find
from tests.test_cli import Done, in_process
from vila_edge.bench.decoder import report, run
from vila_edge.bench.decoder.options import Options
from vila_edge.bench.decoder.run import bench_decoder
from vila_edge.bench.decoder.shapes import MODELS, DecoderModel
from vila_edge.bench.decoder.targets import judge
from vila_edge.bench.decoder.weights import RandomWeights, step_bytes
from vila_edge.bench.kernels.shapes import Model, Projection
from vila_edge.bench.token_cost import Decode, decode_cost
from vila_edge.engine.cuda.packed_weights import PackedWeights
from vila_edge.engine.cuda.upload import PIECE, Upload
from vila_edge.errors import UsageError

__all__ = ["in_process"]

TINY = DecoderModel(
    "Tiny",
    dataclasses.replace(TINY_LLMS["qwen2"], intermediate_size=128, vocab_size=40),
    Projection("Tiny", "mlp_downsample", 3, 16, 128),
)
OPTIONS = Options(
    contexts=(20, 8),
    batches=(2,),
    prompt_tokens=12,
    warm=4,
    new_tokens=3,
    repeat=1,
    kernels_repeat=1,
    least_us=0,
    bandwidth_bytes=1 << 16,
)
LAYERS = TINY.llm.num_hidden_layers
STEP = 1 + 5 * LAYERS + 1 + 2  # launches: embedding, blocks, lm_head, the choice of a token


def takes(launch: FakeLaunch) -> float:
    """Microseconds."""
    return {"ve_stream_read": 2.0, "ve_stream_copy": 5.0}.get(launch.kernel.name, 10.0)


def fake(total: int = 1 << 30) -> FakeDevice:
    device = FakeDevice(total)
    device.takes, device.copy_takes = takes, 4.0
    return device


@pytest.fixture(scope="module")
def device() -> FakeDevice:
    return fake()


@pytest.fixture(scope="module")
def found(device: FakeDevice, compiled: Compiled) -> dict[str, Any]:
    """One whole run, by the device's clock alone."""
    return bench_decoder(device, [TINY], OPTIONS, find=host_find(compiled), now=lambda: device.now_us / 1e6)


# weights


@pytest.mark.parametrize("model", TINY_LLMS)
def test_random_weights_have_the_arrays_of_a_bundles(model: str, tmp_path: Path) -> None:
    bundle = bundle_of(model, tmp_path, [1, 2, 3, 4])
    want = {
        part: {n: (a.shape, a.dtype) for n, a in arrays.items()} for part, arrays in PackedWeights(bundle, tmp_path)
    }
    weights = RandomWeights(bundle.config.llm)
    got = {part: {n: (a.shape, a.dtype) for n, a in arrays.items()} for part, arrays in weights}
    assert got == want and weights.layout == PackedWeights(bundle, tmp_path).layout


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_released_models_are_made_in_little_memory(model: DecoderModel) -> None:
    """As much as its windows span, which is a hundredth of them; rows differ."""
    weights = RandomWeights(model.llm)
    arrays = weights.block() | weights.rest()
    spans = {n: sum((s - 1) * t for s, t in zip(a.shape, a.strides, strict=True)) for n, a in arrays.items()}
    assert sum(spans.values()) < 5e7 < sum(array.nbytes for array in arrays.values()) / 4
    for name, array in arrays.items():
        if name.endswith(("weight", "qzeros", "scales")) and array.ndim > 1 and "kv_cache" not in name:
            assert not np.array_equal(array[0], array[1]) and not np.array_equal(array[0], array[-1]), name


def test_a_steps_bytes_are_those_of_what_it_reads() -> None:
    """MB: about half a byte for each parameter of the blocks, and one for those of lm_head."""
    sizes = {model.name: round(step_bytes(RandomWeights(model.llm), 1) / 1e6) for model in MODELS}
    assert sizes == {"NVILA-2B": 923, "VILA1.5-3B": 1412, "VILA1.5-8B": 4187, "NVILA-8B": 3969}
    weights = RandomWeights(TINY.llm)
    assert step_bytes(weights, 8) - step_bytes(weights, 1) == 7 * 2 * TINY.llm.hidden_size
    packed = sum(array.nbytes for _, arrays in weights for name, array in arrays.items() if name.endswith("zeros"))
    assert packed == LAYERS * (256 + 128 + 256 + 128)  # each group of 128 has one


@pytest.mark.parametrize("batch", [1, 8])
def test_a_steps_bytes_are_those_that_a_prediction_counts(batch: int) -> None:
    """But for biases, which it leaves out."""
    for model in MODELS:
        counted = decode_cost(Model.of(model.name, model.llm), Decode(batch=batch)).bytes
        weights = sum(size for part, size in counted.items() if part.endswith(("weights", "norms")))
        biases = 4 * model.llm.qkv_bias * Model.of(model.name, model.llm).products[0].n * model.llm.num_hidden_layers
        assert step_bytes(RandomWeights(model.llm), batch) == weights + biases


def test_a_window_is_uploaded_as_it_is(device: FakeDevice) -> None:
    page = np.arange(PIECE // 4 + 3000, dtype=np.int32)
    window = np.lib.stride_tricks.as_strided(page, (3000, PIECE // 2000), (4, 4))
    stream, buffer = device.stream(), device.alloc(window.nbytes)
    assert window.nbytes > PIECE
    with Upload(device, stream) as upload:
        upload(buffer.address, window)
    assert np.array_equal(device.view(buffer.address, window.nbytes).view(np.int32), window.reshape(-1))
    buffer.free()
    stream.free()


# what is measured


def steps_of(found: dict[str, Any], kv_cache: str) -> dict[tuple[int, int], dict[str, Any]]:
    (row,) = (row for row in found["models"] if row["kv_cache"] == kv_cache)
    return {(step["batch"], step["context"]): step for step in row["decode"]}


def test_a_step_takes_what_its_launches_take(found: dict[str, Any]) -> None:
    for kv_cache in ("float16", "int8"):
        steps = steps_of(found, kv_cache)
        assert list(steps) == [(2, 8), (2, 20)]
        for (batch, _), step in steps.items():
            assert step["launches_per_token"] == STEP
            assert step["gpu"]["p50_ms"] == pytest.approx(STEP * 10e-3)
            assert step["p50_ms"] == pytest.approx(STEP * 10e-3, rel=0.3)  # a token is seen while the next step runs
            assert step["tokens_per_s"] == pytest.approx(batch / step["p50_ms"] * 1e3)
            assert len(step["samples_ms"]) == len(step["gpu"]["samples_ms"]) == OPTIONS.repeat


def test_a_step_is_held_against_the_memory_of_the_same_run(found: dict[str, Any]) -> None:
    copy, read = 2 * (1 << 16) / 4e-6, (1 << 16) / 2e-6
    assert (found["bandwidth"]["copy"], found["bandwidth"]["read"]) == pytest.approx((copy, read))
    for kv_cache, size in (("float16", 2), ("int8", 1)):
        for (batch, context), step in steps_of(found, kv_cache).items():
            positions = context + OPTIONS.warm + (1 + 2 + 3) / 3  # of each of the three steps that are timed
            assert step["kv_cache_bytes"] == batch * LAYERS * 2 * positions * 64 * size
            assert step["weight_bytes"] == step_bytes(RandomWeights(TINY.llm), batch)
            assert step["bytes_per_step"] == step["weight_bytes"] + step["kv_cache_bytes"]
            rate = step["bytes_per_step"] / step["p50_ms"] * 1e3
            assert step["of_copy_bandwidth"] == pytest.approx(rate / copy)
            assert step["of_read_bandwidth"] == pytest.approx(rate / read)


def test_a_prefill_is_timed_with_the_step_behind_it(found: dict[str, Any]) -> None:
    for row in found["models"]:
        assert [prefill["tokens"] for prefill in row["prefill"]] == [4, 12], "those of an image, and the prompt"
        for prefill, launches in zip(row["prefill"], (6, 8), strict=True):
            assert prefill["p50_ms"] == pytest.approx((launches * LAYERS * 10 + 4 + 10) / 1e3), "a copy, and lm_head"
            assert prefill["tokens_per_s"] == pytest.approx(prefill["tokens"] / prefill["p50_ms"] * 1e3)
            assert prefill["first_step"]["p50_ms"] == pytest.approx(STEP * 10e-3)
        assert row["projector"]["p50"] == pytest.approx(20e-3) and row["projector"]["tokens"] == 4
        assert row["memory_bytes"] > step_bytes(RandomWeights(TINY.llm), 1)


def test_every_position_that_is_read_was_written(found: dict[str, Any], compiled: Compiled) -> None:
    """Fresh memory of the fake device is NaN: were any of it read, the sampler would refuse its logits."""
    assert all(step["absent"] is None for row in found["models"] for step in row["decode"])


def test_nothing_is_left_on_the_device(found: dict[str, Any], device: FakeDevice) -> None:
    assert not device.buffers and not device.pins and not device.streams and not device.events and not device.modules


def test_a_model_without_room_is_told_and_the_others_go_on(found: dict[str, Any], compiled: Compiled) -> None:
    wide = dataclasses.replace(TINY, name="Wide", llm=dataclasses.replace(TINY.llm, num_hidden_layers=9))
    device = fake(found["models"][0]["memory_bytes"] + 300_000)
    options = dataclasses.replace(OPTIONS, contexts=(8,), batches=(1,), kv_caches=("float16",))
    both = bench_decoder(device, [wide, TINY], options, find=host_find(compiled))
    first, second = both["models"]
    assert "the GPU has no room for" in first["absent"] and first["decode"] == [] and second["absent"] is None
    tables = {sheet.title: sheet.rows for sheet in report.sheets(both)}
    assert tables["Does not fit"] == [("Wide, float16", first["absent"])]
    assert [line[0] for line in tables["Decode, a step"]] == ["Tiny, float16"]
    assert not device.buffers and not device.pins and not device.streams


@pytest.mark.slow
def test_caches_without_room_are_told_and_the_others_go_on(found: dict[str, Any], compiled: Compiled) -> None:
    room = 2 * LAYERS * 2 * 64 * 300  # for caches of 300 positions, and no more
    device = fake(found["models"][0]["memory_bytes"] + room)
    options = dataclasses.replace(OPTIONS, contexts=(80,), batches=(1, 8), kv_caches=("float16",))
    (row,) = bench_decoder(device, [TINY], options, find=host_find(compiled))["models"]  # by the host's own clock
    one, eight = row["decode"]
    assert one["absent"] is None and one["tokens_per_s"] == pytest.approx(1e3 / one["p50_ms"])
    assert "the GPU has no room for" in eight["absent"]
    assert "of_copy_bandwidth" not in eight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": (8, 117)}, "--context 117: with 12 positions behind it, Tiny has 2 to 116"),
        ({"contexts": (1,)}, "--context 1"),
        ({"batches": (9,)}, "--batch 9: expected 1 to 8"),
        ({"prompt_tokens": 117}, "a prompt of 117: Tiny has 2 to 116"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(change: dict[str, Any], message: str) -> None:
    device = FakeDevice()
    with pytest.raises(UsageError) as raised:
        bench_decoder(device, [TINY], dataclasses.replace(OPTIONS, **change))
    assert message in raised.value.message and not device.calls


# what is said of it


def decoded(model: str, context: int = 256, batch: int = 1, **more: Any) -> dict[str, Any]:
    step = {"batch": batch, "context": context, "absent": None, "tokens_per_s": 100.0, "of_copy_bandwidth": 0.6, **more}
    return {"model": model, "kv_cache": "float16", "absent": None, "decode": [step], "prefill": []}


TORCH = {
    "version": "2.13.0",
    "cuda": "12.6",
    "models": {
        "NVILA-8B": {"decode": {"1x256": 40.0, "1x1024": 1.0}, "prefill": {"1024": {"dequantise_ms": 90.0}}},
        "VILA1.5-8B": {"decode": {"1x256": 20.0}, "absent": "CUDA out of memory"},
        "NVILA-2B": {"decode": {"1x256": 40.0}},
    },
}


def test_targets_are_judged_by_the_worst() -> None:
    rows = [decoded("NVILA-8B", of_copy_bandwidth=0.54), decoded("NVILA-8B", 1024, of_copy_bandwidth=0.1)]
    rows += [decoded("VILA1.5-8B"), decoded("VILA1.5-8B", batch=8), decoded("NVILA-2B", of_copy_bandwidth=0.2)]
    rows[0]["prefill"] = [{"tokens": 196, "p50_ms": 900.0}, {"tokens": 1024, "p50_ms": 100.0}]
    judged = judge({"models": rows, "torch": TORCH})
    assert [(j.found, j.verdict, j.where) for j in judged] == [
        (0.54, "missed", "NVILA-8B, float16"),
        (2.5, "missed", "NVILA-8B, float16"),
        (2.5, "met", "NVILA-2B, float16"),
        (0.9, "met", "NVILA-8B, float16"),
    ]


def test_what_was_not_measured_is_said() -> None:
    absent = {"model": "NVILA-8B", "kv_cache": "int8", "absent": "no room", "decode": [], "prefill": []}
    for torch in (None, {"absent": "torch is not installed"}):
        for rows in ([absent], [decoded("VILA1.5-3B")], [decoded("NVILA-8B", absent="no room")]):
            assert [j.verdict for j in judge({"models": rows, "torch": torch})] == ["not measured"] * 4


def test_the_tables_hold_what_was_measured(found: dict[str, Any]) -> None:
    theirs = {"decode": {"2x8": 1000.0}, "prefill": {"12": {"library_ms": 0.1, "dequantise_ms": 1.0}}, "absent": "out"}
    beside = found | {"torch": {"version": "2.13.0", "cuda": "12.6", "models": {"Tiny": theirs}}}
    tables = {sheet.title.partition(",")[0]: sheet for sheet in report.sheets(beside)}
    for sheet in tables.values():
        assert {len(row) for row in sheet.rows} == {len(sheet.columns)}
    step, rate = tables["Decode"].rows[0], steps_of(found, "float16")[2, 8]["tokens_per_s"]
    assert step[:4] == ("Tiny, float16", "8", "2", f"{rate:,.1f}") and step[-2:] == ("1,000.0", f"{rate / 1000:.2f}")
    first = tables["Load"].rows[0]
    assert first[3:] == ("0.02", "0.174", "0.14", "0.334") and "the vision tower is not in it" in tables["Load"].title
    assert tables["Prefill"].rows[1][-3:] == ("0.1", "1", f"{1 / 0.174:.2f}")
    assert tables["Does not fit"].rows == [("Tiny, torch", "out")]
    alone = {sheet.title: sheet for sheet in report.sheets(found)}
    assert "torch" not in str(alone["Decode, a step"].columns) and "Does not fit" not in alone


def test_the_document_names_gpu_driver_toolkit_and_commit(found: dict[str, Any]) -> None:
    text = report.markdown(found | {"commit": "abc", "driver": {"version": "570.1", "cuda": "12.6"}})
    assert text.startswith("# Decoders on Fake Orin, random weights\n")
    assert "driver 570.1 for CUDA 12.6, NVRTC 12.6, commit abc; no torch: not asked for" in text
    assert "* `gemv_w4a16.cu`: built for the CPU" in text and "not measured" in text
    assert json.dumps(found, allow_nan=False)


# the command


class Opened(FakeDevice):
    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_the_command_writes_what_it_shows(
    in_process: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: dict[str, Any]
) -> None:
    asked: list[Any] = []

    def measured(device: Any, models: Any, options: Options, progress: Any) -> dict[str, Any]:
        asked.extend([[model.name for model in models], options])
        return found

    monkeypatch.setattr("vila_edge.engine.cuda.open_device", lambda index: Opened())
    monkeypatch.setattr(run, "bench_decoder", measured)
    files = ["--json", tmp_path / "d.json", "--markdown", tmp_path / "d.md"]
    chosen = ["-m", "NVILA-2B", "-r", "7", "-c", "300", "-c", "100", "-b", "4", "--kv-cache", "int8"]
    done = in_process("bench", "decoder", *chosen, *files)
    assert (done.returncode, asked) == (0, [["NVILA-2B"], Options((300, 100), (4,), ("int8",), repeat=7)])
    assert "Decode, a step" in done.stdout and "Tiny, int8" in done.stdout and "not measured" in done.stdout
    assert json.loads((tmp_path / "d.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "d.md").read_text() == report.markdown(found)
    assert in_process("bench", "decoder").returncode == 0
    assert asked[2:] == [[model.name for model in MODELS], Options()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "VILA-9B"], "no model 'VILA-9B': expected one of NVILA-2B, VILA1.5-3B, VILA1.5-8B, NVILA-8B"),
        (["--kv-cache", "int4"], "--kv-cache int4: not known"),
        (["--context", "5000"], "--context 5000: with 77 positions behind it, VILA1.5-3B has 2 to 4,019"),
        (["--batch", "16"], "--batch 16: expected 1 to 8"),
        (["--json", "nowhere/x.json"], "expected a file in a directory that exists"),
    ],
)
def test_bad_calls_are_refused(in_process: Callable[..., Done], options: list[str], message: str) -> None:
    done = in_process("bench", "decoder", *options)
    assert done.returncode == 2 and message in " ".join(done.stderr.split())
