"""A decoder's graph in parts: each is a graph of its own, and together they are the whole."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import onnx
import pytest

from tests.tiny import TINY
from vila_edge.engine.graph_parts import split_decoder
from vila_edge.errors import BundleError

LAYERS = TINY.llm.num_hidden_layers


@pytest.fixture(params=["decoder", "decoder_int8"])
def path(request: pytest.FixtureRequest, tiny_bundle: Path) -> Path:
    return tiny_bundle / "graphs" / "onnxruntime" / f"{request.param}.onnx"


def names(values: object) -> list[str]:
    return [value.name for value in values]  # type: ignore[attr-defined]


def test_every_part_is_a_graph_and_each_node_is_in_one_of_them(path: Path) -> None:
    whole = onnx.load_from_string(path.read_bytes())
    parts = [onnx.load_from_string(part) for part in split_decoder(path.read_bytes(), LAYERS, LAYERS, path)]
    assert len(parts) == LAYERS == 2
    for part in parts:
        made = {output for node in part.graph.node for output in node.output}
        known = made | {*names(part.graph.input), *names(part.graph.initializer), ""}
        assert all(value in known for node in part.graph.node for value in node.input)
        assert {*names(part.graph.output)} <= made
        assert part.opset_import == whole.opset_import
        assert part.ir_version == whole.ir_version
    nodes = Counter(node.name for part in parts for node in part.graph.node)
    assert nodes.keys() == {*names(whole.graph.node)}
    assert all(name.startswith("llm.rope.") or count == 1 for name, count in nodes.items())  # a table that all need
    assert sum(len(part.graph.node) for part in parts) < 1.1 * len(whole.graph.node)


def test_hidden_states_go_from_one_part_to_the_next(path: Path) -> None:
    first, last = (onnx.load_from_string(part) for part in split_decoder(path.read_bytes(), LAYERS, 2, path))
    (hidden,) = {*names(first.graph.output)} & {*names(last.graph.input)}
    whole = onnx.load_from_string(path.read_bytes()).graph
    embeds = next(value for value in whole.input if value.name == "inputs_embeds")
    for value in (*first.graph.output, *last.graph.input):
        if value.name == hidden:
            assert value.type == embeds.type
    assert {*names(first.graph.output)} == {hidden, "present_key_0", "present_value_0"}
    assert {*names(last.graph.output)} == {"logits", "present_key_1", "present_value_1"}
    assert {*names(first.graph.input)} | {*names(last.graph.input)} == {*names(whole.input), hidden}
    assert "inputs_embeds" not in names(last.graph.input)
    assert "logits_to_keep" not in names(first.graph.input)


@pytest.mark.parametrize("parts", [1, LAYERS + 1])
def test_what_is_not_to_be_cut_comes_back_whole(parts: int, path: Path) -> None:
    (whole,) = split_decoder(path.read_bytes(), LAYERS, parts, path)
    again, model = onnx.load_from_string(whole), onnx.load_from_string(path.read_bytes())
    assert [*again.graph.node] == [*model.graph.node]
    assert {*names(again.graph.initializer)} == {*names(model.graph.initializer)}
    assert {*names(again.graph.input)} == {*names(model.graph.input)}
    assert {*names(again.graph.output)} == {*names(model.graph.output)}


def test_a_graph_of_other_names_is_not_cut(path: Path) -> None:
    model = onnx.load_from_string(path.read_bytes())
    for node in model.graph.node:
        node.name = ""
    assert len(split_decoder(model.SerializeToString(), LAYERS, 2, path)) == 1


def test_damaged_graphs_are_refused_and_never_crash(path: Path) -> None:
    rng, whole = random.Random(0), path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            split_decoder(bytes(data[: rng.randint(0, len(data))]), LAYERS, 2, path)
        except BundleError as error:
            assert str(path) in error.message
