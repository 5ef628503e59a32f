"""The graphs that a bundle holds: thin, valid, always the same, and of the forms that old runtimes take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest

from tests.graphs import ExactOps, graph_engine, handmade_bundle, int4_tensors, scales_for
from tests.tiny import TINY, random_parameters
from vila_edge import bindings
from vila_edge.bundle import WEIGHTS
from vila_edge.config import VilaConfig
from vila_edge.export.graph_ops import IR_VERSION, OPSET, StoredTensor
from vila_edge.export.graphs import write_graphs
from vila_edge.reference.engine import bundle_parameters, numpy_engine
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
    _store_apart(tmp_path / "apart")

    def products(folder: Path) -> list[str]:
        nodes, prefix = decoder(TINY, folder).node, "llm.model.layers.0."
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


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_attention_takes_the_product_whole_where_there_is_one(
    model_type: Literal["llama", "qwen2"], tmp_path: Path
) -> None:
    """With biases too, which qwen2 has; and it computes what the parameters say."""
    cfg = dataclasses.replace(TINY, llm=dataclasses.replace(TINY.llm, model_type=model_type))
    tensors, meant = int4_tensors(random_parameters(cfg), 32)
    assert (model_type == "qwen2") == ("llm.model.layers.0.self_attn.q_proj.bias" in meant)
    handmade_bundle(cfg, tensors, tmp_path / "apart")
    _store_apart(tmp_path / "apart")
    engine = graph_engine(cfg, tensors, tmp_path / "together")
    inputs = [n.input for n in decoder(cfg, tmp_path / "together").node if n.op_type == "GroupQueryAttention"]
    assert [[*three[1:3]] for three in inputs] == [["", ""]] * 2
    inputs = [n.input for n in decoder(cfg, tmp_path / "apart").node if n.op_type == "GroupQueryAttention"]
    assert all(all(three[:3]) for three in inputs)
    oracle = numpy_engine(cfg, meant)
    x = oracle.embed_tokens([1, 5, 9, 2, 7])
    want = oracle.forward(x, oracle.new_cache(8), range(5))
    np.testing.assert_allclose(engine.forward(x, engine.new_cache(8), range(5)), want, atol=1e-4)


def test_logits_are_computed_of_the_wanted_positions_alone(tiny_bundle: Path) -> None:
    """The head takes what was chosen: of a long prefill, one row of many."""
    for name in ("decoder", "decoder_float16", "decoder_int8"):
        graph = onnx.load(str(tiny_bundle / f"graphs/onnxruntime/{name}.onnx"), load_external_data=False).graph
        (chosen,) = [node for node in graph.node if bindings.LOGITS_TO_KEEP in node.input]
        heads = [node for node in graph.node if node.name.startswith("llm.lm_head/MatMul")]
        assert chosen.op_type == "Gather" and heads
        (state,) = {head.input[0] for head in heads}
        makers = {output: node for node in graph.node for output in node.output}
        while state not in chosen.output:  # a norm at most lies between
            state = makers[state].input[0]


def test_products_round_their_activations_as_is_meant(tiny_bundle: Path) -> None:
    """To 8 bits on a CPU, which is four times as fast; not in the form for a GPU."""
    for name, level in (("decoder", 4), ("decoder_int8", 4), ("decoder_float16", 1)):
        graph = onnx.load(str(tiny_bundle / f"graphs/onnxruntime/{name}.onnx"), load_external_data=False).graph
        found = {
            onnx.helper.get_node_attr_value(node, "accuracy_level")
            for node in graph.node
            if node.op_type == "MatMulNBits"
        }
        assert found == {level}


def test_nothing_is_in_a_graph_that_nothing_reads(tiny_bundle: Path) -> None:
    for path in (tiny_bundle / "graphs" / "onnxruntime").iterdir():
        graph = onnx.load(str(path), load_external_data=False).graph
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        assert all(read.intersection(node.output) for node in graph.node)
        assert {tensor.name for tensor in graph.initializer} <= read


def test_between_layers_one_value_goes_on(tiny_bundle: Path) -> None:
    """Else a graph could not be cut there: sums and norms are one operator inside of a layer alone."""
    graph = onnx.load(str(tiny_bundle / "graphs/onnxruntime/decoder.onnx"), load_external_data=False).graph
    fused = [n.name for n in graph.node if n.op_type == "SkipSimplifiedLayerNormalization"]
    assert [name.split("/")[0] for name in fused] == [
        f"llm.model.layers.{layer}.post_attention_layernorm" for layer in range(TINY.llm.num_hidden_layers)
    ]


def decoder(cfg: VilaConfig, folder: Path) -> onnx.GraphProto:
    """The graph that is written for the weights as they lie in a folder."""
    files = [(file.name, TensorFile(file).entries) for file in (folder / WEIGHTS).iterdir()]
    places = {name: StoredTensor(file, entry) for file, entries in files for name, entry in entries.items()}
    return onnx.load_from_string(write_graphs(cfg, places, ExactOps)["decoder"]).graph


def _store_apart(folder: Path) -> None:
    """Weights of one input lie apart, as an earlier version wrote them."""
    for path in sorted((folder / WEIGHTS).glob("llm.layers.*")):
        stored = TensorFile(path)
        tensors = {name: stored.array(name).copy() for name in stored.entries}
        path.unlink()
        write_tensors(path, tensors)
