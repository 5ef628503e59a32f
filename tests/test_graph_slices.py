"""Weights that are larger than one constant may be: several products, each of some rows of the same stored tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from benchmarks.cpu_peers import random_bundle
from benchmarks.cpu_peers.shape import Shape
from tests.graphs import handmade_bundle
from tests.test_tensorrt_graphs import stored_as
from tests.test_verify import external, problems, rewrite_graph
from tests.tiny import TINY
from vila_edge.bundle import WEIGHTS, Bundle
from vila_edge.engine.onnxruntime import OnnxruntimeEngine
from vila_edge.export.graph_ops import GraphOps
from vila_edge.inspection import inspect

SHAPE = Shape(2, 256, 512, 4, 2, 64, 1000, 64)


def logits(bundle: Bundle, parts: int | None = None) -> NDArray[np.float32]:
    engine = OnnxruntimeEngine(bundle, threads=1, parts=parts)
    return engine.forward(engine.embed_tokens(range(3, 12)), engine.new_cache(9), range(9))


def head(bundle: Bundle, graph: str = "decoder") -> list[onnx.NodeProto]:
    path = bundle.path / "graphs" / "onnxruntime" / f"{graph}.onnx"
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    return [node for node in nodes if node.name.startswith("llm.lm_head/MatMul")]


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int4", "int8"])
def test_a_head_in_slices_says_the_same(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = stored_as(TINY, storage)
    whole = handmade_bundle(TINY, tensors, tmp_path / "whole")
    rows = TINY.llm.vocab_size
    monkeypatch.setattr(GraphOps, "max_initializer", rows * 128 // 3 if storage == "int8" else rows * 64 * 4 // 3)
    cut = handmade_bundle(TINY, tensors, tmp_path / "cut")
    for graph in ("decoder", "decoder_float16"):
        assert (len(head(whole, graph)), len(head(cut, graph)) > 1) == (1, True)
    np.testing.assert_allclose(logits(cut), logits(whole), rtol=0, atol=1e-5)


def test_a_bundle_whose_weights_are_cut_is_the_same_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 4 and 8 bits, alone and joined; the files stay as they are, and every check passes."""
    random_bundle.write(SHAPE, tmp_path / "whole")
    monkeypatch.setattr(GraphOps, "max_initializer", 100_000)
    random_bundle.write(SHAPE, tmp_path / "cut")
    whole, cut = (Bundle.open(tmp_path / name) for name in ("whole", "cut"))
    files = [
        {name: entry for name, entry in bundle.manifest.files.items() if name.startswith(WEIGHTS)}
        for bundle in (whole, cut)
    ]
    assert files[0] == files[1]
    assert len(head(cut)) == 3
    assert inspect(cut.path).passed
    for parts in (1, 2):
        np.testing.assert_allclose(logits(cut, parts), logits(whole), rtol=0, atol=1e-5)


def test_slices_that_do_not_lie_behind_each_other_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphOps, "max_initializer", 100_000)
    random_bundle.write(SHAPE, tmp_path / "bundle")

    def move(model: onnx.ModelProto) -> None:
        length = external(model, "llm.lm_head.qweight_int8/rows.334")["length"]
        length.value = str(int(length.value) - 256)

    rewrite_graph(tmp_path / "bundle", move)
    found = problems(tmp_path / "bundle")
    assert list(found) == ["graphs"]
    assert all("are no tensor" in message for message in found["graphs"])
