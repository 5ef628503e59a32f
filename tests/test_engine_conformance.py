"""What every engine does, whatever it runs on: the same as the numpy oracle."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests import cuda_engines
from tests.fake_cuda import FakeDevice
from tests.fake_tensorrt import make_module
from tests.graphs import (
    INSTALLED,
    INT8_CACHE_RUNS,
    TOO_OLD,
    ExactOps,
    graph_engine,
    handmade_bundle,
    int4_tensors,
    int8_cache_oracle,
    scales_for,
)
from tests.kernels.host import Compiled
from tests.tensorrt_engines import CONTEXT, KINDS, build_fakes
from tests.test_tensorrt_graphs import stored_as
from tests.tiny import TINY, random_parameters
from vila_edge.engine.onnxruntime import OnnxruntimeEngine
from vila_edge.engine.protocol import Engine
from vila_edge.engine.tensorrt import TensorrtEngine
from vila_edge.errors import ContextError, UsageError
from vila_edge.export.onnxruntime_ops import OnnxruntimeOps
from vila_edge.kernels.attention import KvCache
from vila_edge.reference.engine import ReferenceEngine, bundle_parameters, numpy_engine
from vila_edge.reference.torch_engine import numpy_parameters_engine

PARAMS = random_parameters(TINY)
RNG = np.random.default_rng(3)
PIXELS = RNG.standard_normal((2, 3, 46, 46)).astype(np.float32)
IDS = RNG.integers(0, TINY.llm.vocab_size, 21).tolist()


HALVES = 8e-3  # of the logits' standard deviation: all that passes between kernels has 16 bits
FLIPPED = 0.1  # the same where a key between two steps of 8 bits may have been rounded to the other one
ROUNDED = 0.08  # where products round their activations to 8 bits; logits have a standard deviation of 0.8


@dataclass(frozen=True)
class Pair:
    """An engine, the oracle with the weights that it was given, and how near it comes."""

    engine: Engine
    oracle: ReferenceEngine
    atol: float = 1e-4

    def close(self, got: Any, want: Any) -> None:
        np.testing.assert_allclose(got, want, atol=self.atol, rtol=0)


BACKENDS = (
    "torch",
    "onnxruntime, fp32",
    "onnxruntime, int4",
    "onnxruntime, int4, in parts",
    "onnxruntime, int4, int8 kv_cache",
    "onnxruntime, int4, int8 kv_cache, in parts",
    "onnxruntime, int4, float16",
    "onnxruntime, int4, int8 head",
    "onnxruntime, int4, int8 head, as shipped",
    *(f"tensorrt, {kind}" for kind in KINDS),
    *(f"cuda; {model}; float16" for model in cuda_engines.MODELS),
    "cuda; llama, grouped queries; int8",
    *(pytest.param(f"cuda; {model}; int8", marks=pytest.mark.slow) for model in ("llama", "qwen2")),
    *(
        pytest.param(f"cuda on a GPU; {model}; {kv_cache}", marks=pytest.mark.gpu)
        for model in cuda_engines.MODELS
        for kv_cache in ("float16", "int8")
    ),
)


@pytest.fixture(scope="module", params=BACKENDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, compiled: Compiled) -> Pair:
    folder = tmp_path_factory.mktemp("engine")
    if request.param.startswith("cuda"):  # kernels and engine are the real ones, the GPU is not
        place, model, kv_cache = request.param.split("; ")
        kv: KvCache = "int8" if kv_cache == "int8" else "float16"
        own = cuda_engines.bundle_of(model, folder, IDS)
        opened = cuda_engines.open_gpu if place == "cuda on a GPU" else cuda_engines.open_fake
        cuda = opened(own, compiled, folder, kv)
        request.addfinalizer(cuda.close)
        oracle = cuda_engines.oracle_of(own, kv, IDS)
        spread = float(oracle.forward(oracle.embed_tokens(IDS), oracle.new_cache(len(IDS))).std())
        return Pair(cuda, oracle, atol=spread * (FLIPPED if kv == "int8" else HALVES))
    if request.param.startswith("tensorrt"):  # graphs and engine are the real ones, TensorRT and the GPU are not
        built, device = build_fakes(request.param.removeprefix("tensorrt, "), folder), FakeDevice()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "tensorrt", make_module(device))
            engine = TensorrtEngine(built.bundle, "tensorrt", device, built.cache)
        request.addfinalizer(engine.close)
        return Pair(engine, built.oracle, atol=0.01)
    if request.param == "torch":
        return Pair(numpy_parameters_engine(TINY, PARAMS), numpy_engine(TINY, PARAMS))
    if "int8 head" in request.param:  # and an int8 tower
        shipped = "as shipped" in request.param
        bundle = handmade_bundle(TINY, stored_as(TINY, "int8"), folder, OnnxruntimeOps if shipped else ExactOps)
        oracle = numpy_engine(TINY, bundle_parameters(bundle))
        return Pair(OnnxruntimeEngine(bundle, threads=1), oracle, atol=ROUNDED if shipped else 1e-4)
    if "int8 kv_cache" in request.param and not INT8_CACHE_RUNS:
        pytest.skip(TOO_OLD)
    tensors, meant = int4_tensors(PARAMS, 32) if "int4" in request.param else (PARAMS, PARAMS)
    parts = 2 if "in parts" in request.param else None
    if "float16" in request.param:  # the graph for a GPU, here on the CPU
        if INSTALLED < (1, 24):
            pytest.skip("on a CPU, onnxruntime 1.23 makes NaN of float16 where there are more than 8 new positions")
        return Pair(graph_engine(TINY, tensors, folder, "float16"), numpy_engine(TINY, meant), atol=0.01)
    if "int8" not in request.param:
        return Pair(graph_engine(TINY, tensors, folder, parts=parts), numpy_engine(TINY, meant))
    scales = scales_for(TINY, meant, IDS)
    return Pair(graph_engine(TINY, tensors | scales, folder, "int8", parts), int8_cache_oracle(TINY, meant, scales))


def test_images(pair: Pair) -> None:
    engine, oracle = pair.engine, pair.oracle
    features = engine.encode_images(PIXELS)
    pair.close(features, oracle.encode_images(PIXELS))
    pair.close(engine.project(features), oracle.project(features))


def test_prefill_in_chunks_then_decode(pair: Pair) -> None:
    engine, oracle = pair.engine, pair.oracle
    embeds = oracle.embed_tokens(IDS)
    np.testing.assert_array_equal(engine.embed_tokens(IDS), embeds)
    want = oracle.forward(embeds, oracle.new_cache(21), range(21))
    cache = engine.new_cache(21)
    parts = [(0, 7), (7, 13), *((i, i + 1) for i in range(13, 21))]
    got = [engine.forward(embeds[start:stop], cache, range(stop - start)) for start, stop in parts]
    pair.close(np.concatenate(got), want)


def test_only_the_wanted_logits_come_back(pair: Pair) -> None:
    engine, oracle = pair.engine, pair.oracle
    embeds = oracle.embed_tokens(IDS)
    want = oracle.forward(embeds, oracle.new_cache(21), range(21))
    last = engine.forward(embeds, engine.new_cache(21))
    assert last.shape == (1, TINY.llm.vocab_size)
    pair.close(last, want[-1:])
    pair.close(engine.forward(embeds, engine.new_cache(21), [3, -2]), want[[3, 19]])


def test_a_truncated_cache_goes_on_from_there(pair: Pair) -> None:
    engine, oracle = pair.engine, pair.oracle
    embeds = oracle.embed_tokens(IDS)
    cache = engine.new_cache(40)
    engine.forward(np.concatenate([embeds[:5], embeds[::-1]]), cache)
    cache.truncate(5)
    want = oracle.forward(embeds, oracle.new_cache(21))
    pair.close(engine.forward(embeds[5:], cache), want)


def test_a_full_cache_is_an_error(pair: Pair) -> None:
    engine = pair.engine
    cache = engine.new_cache(4)
    engine.forward(engine.embed_tokens([1, 2, 3]), cache)
    with pytest.raises(ContextError, match="5 positions do not fit into a kv_cache of 4"):
        engine.forward(engine.embed_tokens([4, 5]), cache)


def test_the_longest_context_is_filled_at_once_or_in_chunks(pair: Pair) -> None:
    engine, oracle = pair.engine, pair.oracle
    longest, chunk = engine.max_context, engine.prefill_chunk
    assert longest in (TINY.llm.context_length, CONTEXT) and chunk >= 1
    embeds = oracle.embed_tokens((IDS * 7)[:longest])
    want = oracle.forward(embeds, oracle.new_cache(longest))
    whole, cut = engine.new_cache(longest), engine.new_cache(longest)
    pair.close(engine.forward(embeds, whole), want)
    logits = [engine.forward(embeds[start : start + chunk], cut) for start in range(0, longest, chunk)]
    pair.close(logits[-1], want)
    for cache in (whole, cut):
        assert cache.length == longest
        with pytest.raises(ContextError, match=f"{longest + 1} positions do not fit"):
            engine.forward(embeds[:1], cache)


def test_a_cache_is_as_long_as_the_model_at_most(pair: Pair) -> None:
    longest = pair.engine.max_context
    assert pair.engine.new_cache(longest).capacity == longest
    for capacity in (0, longest + 1):
        with pytest.raises(UsageError, match=f"{capacity:,} positions"):
            pair.engine.new_cache(capacity)


@pytest.mark.parametrize("position", [3, -4])
def test_logits_of_a_position_that_is_not_new_are_refused(pair: Pair, position: int) -> None:
    cache = pair.engine.new_cache(8)
    with pytest.raises(UsageError, match=f"position {position}: there are 3 new ones"):
        pair.engine.forward(pair.engine.embed_tokens([1, 2, 3]), cache, [position])
    assert cache.length == 0


def test_a_call_needs_a_position(pair: Pair) -> None:
    with pytest.raises(UsageError, match="no positions"):
        pair.engine.forward(np.zeros((0, pair.oracle.cfg.llm.hidden_size), np.float32), pair.engine.new_cache(8))


def test_a_cache_is_not_cut_below_nothing(pair: Pair) -> None:
    cache = pair.engine.new_cache(8)
    pair.engine.forward(pair.engine.embed_tokens([1, 2, 3]), cache)
    with pytest.raises(UsageError, match="-1 positions"):
        cache.truncate(-1)
    cache.truncate(7)
    assert cache.length == 3


@pytest.mark.parametrize("token", [-1, TINY.llm.vocab_size])
def test_a_token_that_the_model_does_not_have_is_refused(pair: Pair, token: int) -> None:
    with pytest.raises(UsageError, match=f"token id {token}"):
        pair.engine.embed_tokens([0, token])
