"""`vila-edge bench BUNDLE --backend cuda` on a fake GPU: tokens as an answer takes them, against that GPU's memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.cuda_engines import bundle_of, open_fake
from tests.fake_cuda import FakeDevice, FakeLaunch
from tests.kernels.host import Compiled
from tests.kernels.on_device import host_find
from tests.test_bench_decoder import Opened
from vila_edge.bench import agreement, gpu, run, stages
from vila_edge.bench.report import markdown
from vila_edge.bench.workload import Options, Workload
from vila_edge.bundle import Bundle
from vila_edge.kernels import store
from vila_edge.pipeline import Pipeline
from vila_edge.tokenizer import Tokenizer

IDS = np.random.default_rng(6).integers(0, 256, 100).tolist()  # as many as make a good sample of keys and values
SIZE = 1 << 16  # bytes that the bandwidth is measured with
OPTIONS = Options("cuda", 1, prompt_tokens=6, contexts=(4,), new_tokens=3, repeat=2, images=0, warmup=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of("qwen2", tmp_path_factory.mktemp("bundle"), IDS)


@pytest.fixture
def load(bundle: Bundle, compiled: Compiled, tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Pipeline]:
    """`pipeline.load` on a fake GPU."""

    def load(path: Path, backend: str, threads: int | None, kv_cache: Any = "float32", **_: Any) -> Pipeline:
        assert backend == "cuda"
        engine = open_fake(bundle, compiled, tmp_path, "int8" if kv_cache == "int8" else "float16")
        return Pipeline("tiny", bundle.config, tokenizer, engine, 40)

    return load


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, compiled: Compiled) -> FakeDevice:
    """The GPU whose memory is measured."""

    def takes(launch: FakeLaunch) -> float:
        return {"ve_stream_read": 500.0, "ve_stream_copy": 900.0}[launch.kernel.name]

    device = Opened()
    device.takes, device.copy_takes = takes, 800.0
    monkeypatch.setattr("vila_edge.engine.cuda.open_device", lambda: device)
    monkeypatch.setattr(store, "find", host_find(compiled))
    return device


def test_the_gpus_memory_is_what_counts(opened: FakeDevice) -> None:
    assert gpu.gpu_read_bandwidth(SIZE) == pytest.approx([SIZE / 500e-6] * 4)
    assert opened.closed


@pytest.mark.parametrize("kv_cache", ["float32", "int8"])
def test_a_bundle_is_measured_on_the_gpu(
    kv_cache: str,
    bundle: Bundle,
    load: Callable[..., Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, loaded = dataclasses.replace(OPTIONS, kv_cache=kv_cache), list[str]()
    cold = {"load_ms": 1.0, "first_token_ms": 2.0, "positions": 6, "memory": None}

    def wider(path: Path, options: Options) -> agreement.Answer:
        assert not loaded, "there may be room for one alone"
        pipeline = load(path, options.backend, 1)
        found = agreement.Answer(*agreement.answer(pipeline, 0))
        pipeline.engine.close()  # type: ignore[attr-defined]
        return found

    def load_once(path: Path, backend: str, threads: int, **more: Any) -> Pipeline:
        loaded.append(backend)
        return load(path, backend, threads, **more)

    def bandwidth() -> list[float]:
        assert not loaded, "there may be no room beside a model"
        return [3e9, 4e9]

    monkeypatch.setattr(agreement, "POSITIONS", 12)
    monkeypatch.setattr(run, "plan_workload", lambda *_: Workload(6, (4,), 3, 2, 1, 0, 0))  # it has no tokenizer
    monkeypatch.setattr(run, "cold_start", lambda *_: cold)
    monkeypatch.setattr(run, "wider_answer", wider)
    monkeypatch.setattr(run, "load", load_once)
    monkeypatch.setattr(run, "gpu_read_bandwidth", bandwidth)
    found = run.bench(bundle.path, options)
    assert found["read_bandwidth"] == {"of": "GPU", "bytes_per_s": 4e9, "threads": None, "samples": [3e9, 4e9]}
    (row,) = found["decode"]
    numbers = 2 * 2 * 64 * (4 + 2)  # of keys and values of six positions, in two layers of one head
    assert row["kv_cache_bytes"] == numbers * (1 if kv_cache == "int8" else 2)
    assert row["fraction_of_read_bandwidth"] == pytest.approx(row["bytes_per_s"] / 4e9)
    assert len(row["samples_ms"]) == 2 * 3
    if kv_cache == "float32":
        assert found["agreement"] is None
        return
    assert found["agreement"]["against"] == "float16" and found["agreement"]["positions"] == 12
    assert found["agreement"]["top1_agreement"] > 0.5 and 0 < found["agreement"]["mean_kl"] < 0.1
    assert "## kv_cache in int8 against float16, 12 positions of an answer" in markdown(found)


def test_tokens_come_as_in_an_answer(load: Callable[..., Pipeline], bundle: Bundle) -> None:
    pipeline = load(bundle.path, "cuda", 1)
    engine: Any = pipeline.engine
    asked = list[tuple[Any, ...]]()

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def generate(self, token: int, cache: Any, *rest: Any, **more: Any) -> Any:
            asked.append((token, cache.length))
            return engine.generate(token, cache, *rest, **more)

        def forward(self, inputs_embeds: Any, cache: Any, *rest: Any) -> Any:
            assert len(inputs_embeds) > 1, "no step waits for its logits"
            return engine.forward(inputs_embeds, cache, *rest)

    pipeline.engine = Recorder()
    samples = stages.measure(pipeline, Workload(6, (4, 7), new_tokens=3, repeat=2, warmup=1, images=0, image_tokens=0))
    assert [length for _, length in asked] == [4, 4, 4, 7, 7, 7]
    assert {context: len(times) for context, times in samples.decode.items()} == {4: 6, 7: 6}
    engine.close()


def test_the_wider_answer_is_the_same_backends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = list[dict[str, Any]]()

    def note(command: list[str], **_: Any) -> Any:
        asked.append(json.loads(command[3]))
        np.savez(command[4], ids=np.asarray(IDS), logits=np.zeros((100, 7), np.float32))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", note)
    for backend in ("cuda", "auto", "onnxruntime"):
        found = agreement.wider_answer(tmp_path, Options(backend, 3, kv_cache="int8"))
        assert found.ids == IDS and found.logits.shape == (100, 7)
    assert [request["backend"] for request in asked] == ["cuda", "onnxruntime", "onnxruntime"]
    assert asked[0] == {"bundle": str(tmp_path), "backend": "cuda", "threads": 3, "images": 1}
