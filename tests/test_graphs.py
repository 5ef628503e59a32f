"""Graphs in onnxruntime against the numpy oracle: prefill, decode, chunks, 4 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.graphs import ExactOps, graph_engine, handmade_bundle, int4_tensors
from tests.tiny import TINY, random_parameters
from vila_edge import bindings
from vila_edge.bundle import WEIGHTS
from vila_edge.engine.onnxruntime import OnnxruntimeEngine
from vila_edge.errors import ContextError
from vila_edge.export.graph_ops import IR_VERSION, OPSET, StoredTensor
from vila_edge.export.graphs import write_graphs
from vila_edge.reference.engine import ReferenceEngine, bundle_parameters, numpy_engine
from vila_edge.tensorfile import TensorFile

PARAMS = random_parameters(TINY)
RNG = np.random.default_rng(3)
PIXELS = RNG.standard_normal((2, 3, 46, 46)).astype(np.float32)
IDS = RNG.integers(0, TINY.llm.vocab_size, 21).tolist()

Pair = tuple[OnnxruntimeEngine, ReferenceEngine]


@pytest.fixture(scope="module", params=["fp32", "int4"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """An engine, and the oracle with the weights that it was given."""
    tensors, meant = int4_tensors(PARAMS, 32) if request.param == "int4" else (PARAMS, PARAMS)
    return graph_engine(TINY, tensors, tmp_path_factory.mktemp("graphs")), numpy_engine(TINY, meant)


def test_images(pair: Pair) -> None:
    engine, oracle = pair
    features = engine.encode_images(PIXELS)
    np.testing.assert_allclose(features, oracle.encode_images(PIXELS), atol=1e-4)
    np.testing.assert_allclose(engine.project(features), oracle.project(features), atol=1e-4)


def test_prefill_in_chunks_then_decode(pair: Pair) -> None:
    engine, oracle = pair
    embeds = oracle.embed_tokens(IDS)
    np.testing.assert_array_equal(engine.embed_tokens(IDS), embeds)
    want = oracle.forward(embeds, oracle.new_cache(21), range(21))
    cache = engine.new_cache(21)
    parts = [(0, 7), (7, 13), *((i, i + 1) for i in range(13, 21))]
    got = [engine.forward(embeds[start:stop], cache, range(stop - start)) for start, stop in parts]
    np.testing.assert_allclose(np.concatenate(got), want, atol=1e-4)


def test_only_the_wanted_logits_come_back(pair: Pair) -> None:
    engine, oracle = pair
    embeds = oracle.embed_tokens(IDS)
    want = oracle.forward(embeds, oracle.new_cache(21), range(21))
    last = engine.forward(embeds, engine.new_cache(21))
    assert last.shape == (1, TINY.llm.vocab_size)
    np.testing.assert_allclose(last, want[-1:], atol=1e-4)
    np.testing.assert_allclose(engine.forward(embeds, engine.new_cache(21), [3, -2]), want[[3, 19]], atol=1e-4)


def test_a_truncated_cache_goes_on_from_there(pair: Pair) -> None:
    engine, oracle = pair
    embeds = oracle.embed_tokens(IDS)
    cache = engine.new_cache(40)
    engine.forward(np.concatenate([embeds[:5], embeds[::-1]]), cache)
    cache.truncate(5)
    want = oracle.forward(embeds, oracle.new_cache(21))
    np.testing.assert_allclose(engine.forward(embeds[5:], cache), want, atol=1e-4)


def test_a_full_cache_is_an_error(pair: Pair) -> None:
    engine, _ = pair
    cache = engine.new_cache(4)
    engine.forward(engine.embed_tokens([1, 2, 3]), cache)
    with pytest.raises(ContextError, match="5 positions do not fit into a kv_cache of 4"):
        engine.forward(engine.embed_tokens([4, 5]), cache)


def test_four_bits_are_read_back_as_they_were_meant(tmp_path: Path) -> None:
    tensors, meant = int4_tensors(PARAMS, 32)
    read = bundle_parameters(handmade_bundle(TINY, tensors, tmp_path))
    assert read.keys() == meant.keys()
    for name, value in meant.items():
        np.testing.assert_array_equal(read[name], value)


def test_graphs_are_thin_valid_and_always_the_same(tmp_path: Path) -> None:
    handmade_bundle(TINY, int4_tensors(PARAMS, 32)[0], tmp_path)
    weights = tmp_path / WEIGHTS
    stored = {
        name: StoredTensor(file.name, entry)
        for file in sorted(weights.iterdir())
        for name, entry in TensorFile(file).entries.items()
    }
    graphs, again = (write_graphs(TINY, stored, ExactOps) for _ in range(2))
    assert graphs == again
    layouts = {
        "vision_tower": bindings.vision_tower,
        "mm_projector": bindings.mm_projector,
        "decoder": bindings.decoder,
    }
    for name, data in graphs.items():
        assert len(data) < 64_000
        (weights / name).write_bytes(data)
        onnx.checker.check_model(str(weights / name))
        model = onnx.load_from_string(data)
        assert (model.ir_version, model.opset_import[0].version) == (IR_VERSION, OPSET) == (10, 21)
        layout = layouts[name](TINY)
        assert [i.name for i in model.graph.input] == [b.name for b in layout.inputs]
        assert [o.name for o in model.graph.output] == [b.name for b in layout.outputs]
