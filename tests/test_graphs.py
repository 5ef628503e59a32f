"""The graphs that a bundle holds: thin, valid, always the same, and of the forms that old runtimes take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from tests.graphs import ExactOps, handmade_bundle, int4_tensors, scales_for
from tests.tiny import TINY, random_parameters
from vila_edge import bindings
from vila_edge.bundle import WEIGHTS
from vila_edge.export.graph_ops import IR_VERSION, OPSET, StoredTensor
from vila_edge.export.graphs import write_graphs
from vila_edge.reference.engine import bundle_parameters
from vila_edge.tensorfile import TensorFile

PARAMS = random_parameters(TINY)


def test_four_bits_are_read_back_as_they_were_meant(tmp_path: Path) -> None:
    tensors, meant = int4_tensors(PARAMS, 32)
    read = bundle_parameters(handmade_bundle(TINY, tensors, tmp_path))
    assert read.keys() == meant.keys()
    for name, value in meant.items():
        np.testing.assert_array_equal(read[name], value)


def test_graphs_are_thin_valid_and_always_the_same(tmp_path: Path) -> None:
    tensors = int4_tensors(PARAMS, 32)[0] | scales_for(TINY, PARAMS, [1, 2, 3])
    handmade_bundle(TINY, tensors, tmp_path)
    weights = tmp_path / WEIGHTS
    stored = {
        name: StoredTensor(file.name, entry)
        for file in sorted(weights.iterdir())
        for name, entry in TensorFile(file).entries.items()
    }
    graphs, again = (write_graphs(TINY, stored, ExactOps) for _ in range(2))
    assert graphs == again
    layouts = {
        "vision_tower": bindings.vision_tower(TINY),
        "mm_projector": bindings.mm_projector(TINY),
        "decoder": bindings.decoder(TINY),
        "decoder_float16": bindings.decoder(TINY, "float16"),
        "decoder_int8": bindings.decoder(TINY, "int8"),
    }
    assert graphs.keys() == layouts.keys()
    for name, data in graphs.items():
        assert len(data) < 64_000
        (weights / name).write_bytes(data)
        onnx.checker.check_model(str(weights / name))
        model = onnx.load_from_string(data)
        assert (model.ir_version, model.opset_import[0].version) == (IR_VERSION, OPSET) == (10, 21)
        layout = layouts[name]
        assert [i.name for i in model.graph.input] == [b.name for b in layout.inputs]
        assert [o.name for o in model.graph.output] == [b.name for b in layout.outputs]
