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
from vila_edge.tensorfile import TensorFile, write_tensors

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


def test_linears_of_one_input_are_one_product_where_their_weights_lie_together(tmp_path: Path) -> None:
    handmade_bundle(TINY, int4_tensors(PARAMS, 32)[0], tmp_path / "together")
    handmade_bundle(TINY, int4_tensors(PARAMS, 32)[0], tmp_path / "apart")
    layers = sorted((tmp_path / "apart" / WEIGHTS).glob("llm.layers.*"))
    for path in layers:  # as an earlier version wrote them
        stored = TensorFile(path)
        tensors = {name: stored.array(name).copy() for name in stored.entries}
        path.unlink()
        write_tensors(path, tensors)

    def products(folder: Path) -> list[str]:
        files = [(file.name, TensorFile(file).entries) for file in (folder / WEIGHTS).iterdir()]
        places = {name: StoredTensor(file, entry) for file, entries in files for name, entry in entries.items()}
        nodes = onnx.load_from_string(write_graphs(TINY, places, ExactOps)["decoder"]).graph.node
        prefix = "llm.model.layers.0."
        return [n.name[len(prefix) :] for n in nodes if n.op_type == "MatMulNBits" and n.name.startswith(prefix)]

    both = ["self_attn.o_proj/MatMulNBits", "mlp.down_proj/MatMulNBits"]
    assert products(tmp_path / "together") == [
        "self_attn.qkv_proj/MatMulNBits",
        both[0],
        "mlp.gate_up_proj/MatMulNBits",
        both[1],
    ]
    alone = products(tmp_path / "apart")
    assert len(alone) == 7
    assert set(both) < set(alone)
