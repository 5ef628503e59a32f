"""The TensorRT engine on a fake device and a fake TensorRT that run the real graphs: against the numpy oracle."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests import fake_tensorrt
from tests.fake_cuda import FakeDevice
from tests.fake_tensorrt import make_module, plan
from tests.tensorrt_engines import CHUNK, CONTEXT, KINDS, Built, build_fakes
from tests.tensorrt_graphs import GraphRunner
from tests.tiny import TINY
from vila_edge.engine.cuda.device import Arena
from vila_edge.engine.engine_cache import EngineCache
from vila_edge.engine.protocol import Engine
from vila_edge.engine.tensorrt import TensorrtEngine
from vila_edge.engine.tensorrt_decoder import runs
from vila_edge.engine.tensorrt_options import MAX_KEPT, BuildOptions
from vila_edge.errors import BackendError, ContextError, UsageError
from vila_edge.export.engines import profiles

RNG = np.random.default_rng(3)
PIXELS = RNG.standard_normal((3, 3, 46, 46)).astype(np.float32)
IDS = RNG.integers(0, TINY.llm.vocab_size, 21).tolist()
ATOL = 0.01  # float16 all the way, on logits of up to 4

Open = Callable[..., TensorrtEngine]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    made: dict[str, Built] = {}

    def make(kind: str) -> Built:
        if kind not in made:
            made[kind] = build_fakes(kind, tmp_path_factory.mktemp("engines"))
        return made[kind]

    return make


@pytest.fixture(params=list(KINDS))
def built(request: pytest.FixtureRequest, build: Callable[[str], Built]) -> Built:
    return build(request.param)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> Iterator[Open]:
    """Opens engines on the fake device; closes them after the test."""
    opened: list[TensorrtEngine] = []

    def open_engine(built: Built, trt: ModuleType | None = None, **arguments: Any) -> TensorrtEngine:
        trt = trt or make_module(device)
        monkeypatch.setitem(sys.modules, trt.__name__, trt)
        engine = TensorrtEngine(built.bundle, trt.__name__, device, built.cache, **arguments)  # type: ignore[arg-type]
        opened.append(engine)
        return engine

    yield open_engine
    for engine in opened:
        engine.close()


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, atol=ATOL, rtol=0)


def test_it_is_an_engine(use: Open, build: Callable[[str], Built]) -> None:
    engine: Engine = use(build("scatter"))
    assert engine.backend == "tensorrt 10.16, Fake Orin sm_87, decode in a CUDA graph"


def test_images_in_batches_as_large_as_the_engine_takes(use: Open, build: Callable[[str], Built]) -> None:
    built = build("scatter")
    engine, oracle = use(built), built.oracle
    features = engine.encode_images(PIXELS)
    assert features.dtype == np.float32
    close(features, oracle.encode_images(PIXELS))
    close(engine.project(features), oracle.project(features))
    np.testing.assert_array_equal(engine.embed_tokens(IDS), oracle.embed_tokens(IDS))


def test_only_the_wanted_logits_come_back_in_their_order(use: Open, built: Built) -> None:
    engine, oracle = use(built), built.oracle
    embeds = oracle.embed_tokens(IDS)
    want = oracle.forward(embeds, oracle.new_cache(21), range(21))
    close(engine.forward(embeds, engine.new_cache(21)), want[-1:])
    close(engine.forward(embeds, engine.new_cache(21), [19, 3, -2, 3]), want[[19, 3, 19, 3]])
    assert engine.forward(embeds, engine.new_cache(21), []).shape == (0, TINY.llm.vocab_size)


def test_runs_are_as_long_as_the_engine_allows() -> None:
    assert list(runs(5, [4], 8)) == [(0, 5, [4])]
    assert list(runs(20, [3, 8, 19], 8)) == [(0, 8, [3]), (8, 16, [8]), (16, 20, [19])]
    found = list(runs(40, range(40), 40))
    assert [(start, stop) for start, stop, _ in found] == [(0, 16), (16, 32), (32, 40)]
    assert all(wanted == list(range(start, stop)) and len(wanted) <= MAX_KEPT for start, stop, wanted in found)


def test_sequences_in_turn_do_not_see_each_other(use: Open, built: Built) -> None:
    engine, oracle = use(built), built.oracle
    embeds = oracle.embed_tokens(IDS)
    sequences = (embeds, embeds[::-1].copy())
    caches = [engine.new_cache(21) for _ in sequences]
    got: list[list[Any]] = [[], []]
    for start, stop in [(0, 7), *((i, i + 1) for i in range(7, 21))]:
        for logits, sequence, cache in zip(got, sequences, caches, strict=True):
            logits.append(engine.forward(sequence[start:stop], cache, range(stop - start)))
    for logits, sequence in zip(got, sequences, strict=True):
        close(np.concatenate(logits), oracle.forward(sequence, oracle.new_cache(21), range(21)))


def test_a_full_cache_is_an_error_and_stays_usable(use: Open, built: Built) -> None:
    engine, oracle = use(built), built.oracle
    embeds = oracle.embed_tokens(IDS)
    cache = engine.new_cache(4)
    engine.forward(embeds[:3], cache)
    with pytest.raises(ContextError, match="5 positions do not fit into a kv_cache of 4"):
        engine.forward(embeds[3:5], cache)
    close(engine.forward(embeds[3:4], cache), oracle.forward(embeds[:4], oracle.new_cache(4)))
    with pytest.raises(UsageError, match="a context of 97 positions: the engine was built for 96"):
        engine.new_cache(CONTEXT + 1)


def test_the_whole_context_can_be_filled(use: Open, built: Built) -> None:
    engine, oracle = use(built), built.oracle
    embeds = oracle.embed_tokens((IDS * 5)[:CONTEXT])
    cache = engine.new_cache(CONTEXT)
    engine.forward(embeds[:-1], cache)
    close(engine.forward(embeds[-1:], cache), oracle.forward(embeds, oracle.new_cache(CONTEXT)))


# memory and launches


def test_nothing_is_allocated_for_a_token(use: Open, built: Built, device: FakeDevice) -> None:
    engine = use(built)
    embeds = built.oracle.embed_tokens(IDS)
    cache = engine.new_cache(CONTEXT)
    engine.forward(embeds, cache)
    before = device.calls.copy()
    for _ in range(50):
        engine.forward(embeds[:1], cache)
    spent = device.calls - before
    assert {name: spent[name] for name in ("alloc", "pinned", "context", "capture", "free")} == dict.fromkeys(
        ("alloc", "pinned", "context", "capture", "free"), 0
    )
    assert spent["synchronize"] == 50
    launches = (50, 0) if built.options.form == "scatter" else (0, 50)
    assert (spent["launch"], spent["execute"]) == launches


def test_a_new_cache_takes_the_memory_of_one_that_is_gone(use: Open, built: Built, device: FakeDevice) -> None:
    engine, oracle = use(built), built.oracle
    embeds = oracle.embed_tokens(IDS)
    used, calls = device.used, device.calls["alloc"]
    for _ in range(3):
        cache = engine.new_cache(30)
        engine.forward(embeds[::-1].copy(), cache)
        del cache
    assert (device.used, device.calls["alloc"]) == (used, calls)
    first, second = engine.new_cache(30), engine.new_cache(30)
    assert device.used > used
    for cache in (second, first):
        close(engine.forward(embeds, cache), oracle.forward(embeds, oracle.new_cache(21)))


def test_no_allocation_of_a_kv_cache_passes_the_limit(
    use: Open, built: Built, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 MiB for a real one: the cache of VILA1.5-3B has 1.34 GB at 4096 positions."""
    engine, oracle = use(built), built.oracle
    before = set(device.buffers)
    llm = built.bundle.config.llm
    two_pieces = 2 * CONTEXT * llm.num_key_value_heads * llm.head_dim * 2
    monkeypatch.setattr(Arena, "limit", two_pieces)
    caches = [engine.new_cache(CONTEXT) for _ in range(2)]  # the first takes the slot that is there
    sizes = [buffer.nbytes for address, buffer in device.buffers.items() if address not in before]
    assert sizes == [two_pieces] * llm.num_hidden_layers
    embeds = oracle.embed_tokens(IDS)
    close(engine.forward(embeds, caches[1]), oracle.forward(embeds, oracle.new_cache(21)))


def test_closing_gives_all_memory_back(use: Open, built: Built, device: FakeDevice) -> None:
    engine = use(built)
    cache = engine.new_cache(CONTEXT)
    engine.forward(built.oracle.embed_tokens(IDS[:1]), cache)
    another = engine.new_cache(CONTEXT)
    engine.close()
    engine.close()
    del another
    gc.collect()
    assert (device.used, device.pins, device.streams, device.depth) == (0, {}, {}, 0)
    assert not device.closed, "a device that was handed in is not the engine's to close"


def test_an_engine_that_is_dropped_gives_all_memory_back(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[str], Built], device: FakeDevice
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(device))
    monkeypatch.setattr("vila_edge.engine.tensorrt.open_device", lambda: device)
    built = build("scatter")
    with TensorrtEngine(built.bundle, cache=built.cache) as engine:
        assert not device.closed
    del engine
    gc.collect()
    assert device.closed and device.used == 0


@pytest.mark.parametrize("total", [1500, 6_000, 20_000, 40_000, 60_000, 90_000, 110_000])
def test_a_gpu_that_is_too_small_is_an_error_at_load(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[str], Built], total: int
) -> None:
    device = FakeDevice(total)
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(device))
    built = build("append beside")
    with pytest.raises(BackendError, match="no room for|cannot load the engine of .*OutOfMemory"):
        TensorrtEngine(built.bundle, "tensorrt", device, built.cache)
    gc.collect()
    assert (device.used, device.pins, device.streams) == (0, {}, {})


# CUDA graphs


def test_a_failed_capture_leaves_plain_decode(use: Open, build: Callable[[str], Built], device: FakeDevice) -> None:
    built = build("scatter")
    device.capture_fails = "cuStreamEndCapture failed: operation not permitted (900)"
    engine = use(built)
    assert engine.backend.endswith("decode without a CUDA graph")
    assert engine.not_captured == device.capture_fails
    embeds, cache = built.oracle.embed_tokens(IDS), engine.new_cache(21)
    got = [engine.forward(embeds[i : i + 1], cache)[0] for i in range(21)]
    close(got, built.oracle.forward(embeds, built.oracle.new_cache(21), range(21)))
    assert device.calls["capture"] == 1


def test_the_append_form_is_not_captured(use: Open, build: Callable[[str], Built], device: FakeDevice) -> None:
    engine = use(build("append beside"))
    assert engine.backend.endswith("decode without a CUDA graph")
    assert "shapes" in engine.not_captured and device.calls["capture"] == 0


def test_tensorrt_rtx_is_captured_once_it_allows_it(
    use: Open, build: Callable[[str], Built], device: FakeDevice
) -> None:
    built, compiled = build("scatter"), False
    trt = make_module(device, "1.7.1.116", "tensorrt_rtx", lambda: compiled)
    built.store(trt)
    engine = use(built, trt)
    assert engine.backend == "tensorrt_rtx 1.7, Fake Orin sm_87, decode without a CUDA graph"
    embeds, cache = built.oracle.embed_tokens(IDS), engine.new_cache(21)
    got = []
    for i in range(21):
        compiled = i >= 4
        got.append(engine.forward(embeds[i : i + 1], cache)[0])
    assert (device.calls["capture"], device.calls["launch"]) == (1, 16)
    assert device.calls["eager context"] == 1, "decode alone has always the same shapes"
    assert engine.backend.endswith("decode in a CUDA graph")
    close(got, built.oracle.forward(embeds, built.oracle.new_cache(21), range(21)))


# engines


def test_the_limits_come_from_the_newest_engine_that_reaches(use: Open, built: Built) -> None:
    assert use(built).options == built.options
    assert use(built, options=built.options).options == built.options
    engine = use(built, context=CONTEXT)
    assert (engine.max_context, engine.prefill_chunk) == (CONTEXT, CHUNK)
    with pytest.raises(BackendError, match=f"no engine of decoder to use: .*context {CONTEXT}, wanted: {CONTEXT + 1}"):
        use(built, context=CONTEXT + 1)


def test_a_missing_engine_says_how_to_build_it(use: Open, build: Callable[[str], Built], tmp_path: Path) -> None:
    built = dataclasses.replace(build("scatter"), cache=EngineCache(tmp_path / "none"))
    for arguments in ({}, {"options": built.options}):
        with pytest.raises(BackendError, match="no engine of vision_tower .*vila-edge build"):
            use(built, **arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decoder": "mm_projector"}, "the engine of decoder has no tensor 'inputs_embeds'"),
        ({"vision_tower": "mm_projector"}, "the engine of vision_tower has no tensor 'pixel_values'"),
    ],
)
def test_an_engine_of_something_else_is_refused(
    use: Open, build: Callable[[str], Built], device: FakeDevice, tmp_path: Path, wrong: dict[str, str], message: str
) -> None:
    built = dataclasses.replace(build("scatter"), cache=EngineCache(tmp_path))
    built.store(make_module(device), **{name: built.plans[other] for name, other in wrong.items()})
    with pytest.raises(BackendError, match=message):
        use(built)
    gc.collect()
    assert device.used == 0


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("append beside", "has no tensor 'present_key_0'"),
        ("shorter", "tensor 'past_key_0' has shape .*1, 2, 48, 16.*, expected .*1, 2, 96, 16"),
        ("smaller chunk", r"tensor 'inputs_embeds' is at most \(1, 4, 64\), expected 8 in axis 1"),
        ("damaged", "cannot load the engine of decoder .*Magic tag does not match"),
    ],
)
def test_a_decoder_of_other_options_is_refused(
    use: Open, build: Callable[[str], Built], device: FakeDevice, tmp_path: Path, kind: str, message: str
) -> None:
    built = dataclasses.replace(build("scatter"), cache=EngineCache(tmp_path / "cache"))
    if kind == "append beside":
        decoder = build(kind).plans["decoder"]
    elif kind == "damaged":
        decoder = b"not an engine"
    else:
        shorter, smaller = dataclasses.replace(built.options, context=CONTEXT // 2), BuildOptions(CONTEXT, CHUNK // 2)
        options = shorter if kind == "shorter" else smaller
        graphs = GraphRunner(built.bundle, options, tmp_path / "graphs").graphs
        decoder = plan(graphs["decoder"], profiles(TINY, "decoder", options))
    built.store(make_module(device), decoder=decoder)
    with pytest.raises(BackendError, match=message):
        use(built)


def test_outputs_whose_shape_is_known_only_later_are_taken(
    use: Open, build: Callable[[str], Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = fake_tensorrt.Engine.get_tensor_shape

    def vague(engine: fake_tensorrt.Engine, name: str) -> tuple[int, ...]:
        return shape(engine, name) if name in engine.inputs else (-1,) * len(shape(engine, name))

    monkeypatch.setattr(fake_tensorrt.Engine, "get_tensor_shape", vague)
    use(build("scatter"))


def test_tensors_of_another_type_or_place_are_refused(
    use: Open, build: Callable[[str], Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fake_tensorrt.Engine, "get_tensor_dtype", lambda engine, name: fake_tensorrt.DataType.FLOAT)
        with pytest.raises(BackendError, match="tensor 'image_features' has type float32, expected float16"):
            use(build("scatter"))
    monkeypatch.setattr(
        fake_tensorrt.Engine, "get_tensor_location", lambda engine, name: fake_tensorrt.TensorLocation.HOST
    )
    with pytest.raises(BackendError, match="tensor 'pixel_values' lies in memory of HOST, expected DEVICE"):
        use(build("scatter"))


def test_tensorrt_s_own_words_are_in_the_error(use: Open, build: Callable[[str], Built], device: FakeDevice) -> None:
    """A run that TensorRT refuses, here because it has no address, is an error; nothing of it stays under way."""
    built = build("append beside")
    engine = use(built)
    cache = engine.new_cache(20)
    cache.slot.decode._context.addresses.clear()
    with pytest.raises(BackendError, match="the engine of decoder does not run: Error Code 3: .* has no address"):
        engine.forward(built.oracle.embed_tokens(IDS[:1]), cache)
    assert cache.length == 0
    assert all(not stream.queue for stream in device.streams.values())


def test_shapes_that_tensorrt_refuses_are_an_error(use: Open, build: Callable[[str], Built]) -> None:
    engine = use(build("scatter"))
    with pytest.raises(BackendError, match=r"does not take 'pixel_values' of shape \(3, 3, 46, 46\): Error Code 3"):
        engine._vision_tower._session.bind("pixel_values", 256, (3, 3, 46, 46))


# the real module


def test_the_real_tensorrt_has_what_is_used() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    used = {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: [
            *(name for name in vars(fake_tensorrt.Engine) if not name.startswith("_")),
            *("device_memory_size_v2", "num_io_tensors"),
        ],
        trt.IExecutionContext: [
            *("set_optimization_profile_async", "set_device_memory", "set_input_shape"),
            *("set_tensor_address", "execute_async_v3", "is_stream_capturable"),
        ],
        trt.IRuntimeConfig: [
            *("set_execution_context_allocation_strategy", "create_runtime_cache", "set_runtime_cache"),
            "dynamic_shapes_kernel_specialization_strategy",
        ],
        trt.ILogger.Severity: ["ERROR", "INTERNAL_ERROR"],
        trt.DataType: ["FLOAT", "HALF", "INT64"],
        trt.TensorLocation: ["DEVICE"],
        trt.TensorIOMode: ["INPUT", "OUTPUT"],
        trt.ExecutionContextAllocationStrategy: ["USER_MANAGED"],
        trt.DynamicShapesKernelSpecializationStrategy: ["EAGER"],
    }
    assert [(kind, name) for kind, names in used.items() for name in names if not hasattr(kind, name)] == []
    assert trt.DataType.HALF.name == "HALF"
