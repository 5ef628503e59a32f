"""A graph as it ships, run a layer at a time: one layer of its weights is in memory, whatever the model's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from vila_edge import architecture, bindings, fsio
from vila_edge.bundle import GRAPHS, WEIGHTS
from vila_edge.config import VilaConfig
from vila_edge.engine.onnx_file import check_external_data
from vila_edge.engine.onnxruntime_session import DIALECT, GRAPH_SIZE_LIMIT, session
from vila_edge.errors import BundleError
from vila_edge.export.workers import release_memory

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Slice:
    """A part of a graph: what goes in and comes out of it, and the runtime's session."""

    session: Any
    input: str
    output: str

    def run(self, x: Array, others: Mapping[str, NDArray[Any]] | None = None) -> Array:
        """The output for one input. `others`: the graph's further inputs, of which it takes what it needs."""
        return self.run_all(x, others)[self.output]

    def run_all(self, x: Array, others: Mapping[str, NDArray[Any]] | None = None) -> dict[str, NDArray[Any]]:
        """The same with all that it gives out, by name."""
        wanted = {i.name for i in self.session.get_inputs()} - {self.input}
        feed = {name: value for name, value in (others or {}).items() if name in wanted}
        names = [output.name for output in self.session.get_outputs()]
        found = self.session.run(names, {self.input: np.ascontiguousarray(x)} | feed)
        return dict(zip(names, found, strict=True))


class SlicedGraph:
    """A graph of a bundle between the values `first`, those that feed the parameters `starts`, and `last`."""

    def __init__(self, folder: Path, graph: str, first: str, starts: Sequence[str], last: str) -> None:
        """Raises BundleError if the graph would read outside of the bundle."""
        self._path = folder / GRAPHS / DIALECT / f"{graph}.onnx"
        self._weights = (folder / WEIGHTS).resolve()
        data = fsio.read_bytes(self._path, GRAPH_SIZE_LIMIT)
        check_external_data(data, self._weights, self._path)
        self._model = onnx.load_model_from_string(data)
        self._values = [first, *(_fed_by(self._model.graph, start, self._path) for start in starts), last]

    def __len__(self) -> int:
        return len(self._values) - 1

    def load(self, index: int, others: Sequence[str] = ()) -> Slice:
        """One slice with its weights: let go of it before the next. `others`: further outputs that are wanted."""
        release_memory()
        begin, end = self._values[index : index + 2]
        part = _cut(self._model, begin, [end, *others])
        return Slice(session(part, self._weights, self._path, threads=1, arena=False), begin, end)


def vision_slices(folder: Path, cfg: VilaConfig) -> SlicedGraph:
    """The vision tower of a bundle: up to its first block, then block by block. pixel_values to image_features."""
    layers = range(cfg.vision_tower.num_layers_run)
    starts = [f"{architecture.VISION_TOWER}.encoder.layers.{layer}.layer_norm1" for layer in layers]
    return SlicedGraph(folder, "vision_tower", bindings.PIXEL_VALUES, starts, bindings.IMAGE_FEATURES)


def projector_slice(folder: Path) -> Slice:
    """The projector of a bundle, whole: image_features to image_embeds."""
    return SlicedGraph(folder, "mm_projector", bindings.IMAGE_FEATURES, [], bindings.IMAGE_EMBEDS).load(0)


def decoder_slices(folder: Path, cfg: VilaConfig, graph: str = "decoder") -> SlicedGraph:
    """The decoder of a bundle: its blocks, [1, S, D] to [1, S, D], then the last norm and lm_head to logits."""
    starts = [f"{architecture.LLM}.layers.{layer}.input_layernorm" for layer in range(1, cfg.llm.num_hidden_layers)]
    return SlicedGraph(folder, graph, bindings.INPUTS_EMBEDS, [*starts, f"{architecture.LLM}.norm"], bindings.LOGITS)


def run_layer(piece: Slice, x: Array, layer: int, cfg: VilaConfig) -> Array:
    """What a decoder block makes of a whole sequence [S, D]."""
    found: Array = piece.run(x[None], _positions(0, len(x)) | _empty_cache(len(x), layer, cfg, "float32"))[0]
    return found


def run_layer_in_two(piece: Slice, x: Array, layer: int, cfg: VilaConfig) -> Array:
    """The same with a kv_cache in 8 bits; the second half reads there what the first left."""
    cache, parts = _empty_cache(len(x), layer, cfg, "int8"), list[Array]()
    for start, stop in ((0, len(x) // 2), (len(x) // 2, len(x))):
        if start == stop:
            continue
        found = piece.run_all(x[None, start:stop], _positions(start, stop) | cache)
        parts.append(found[piece.output][0])
        cache = {f"past_{name}": found[f"present_{name}"] for name in cached(layer)}
    return np.concatenate(parts)


def run_head(piece: Slice, x: Array) -> Array:
    """Logits [S, V] of the last block's states [S, D]."""
    found: Array = piece.run(x[None], _positions(0, len(x)))[0]
    return found


def cached(layer: int) -> list[str]:
    """The names of a layer's keys and values in the kv_cache."""
    return [f"key_{layer}", f"value_{layer}"]


def _empty_cache(length: int, layer: int, cfg: VilaConfig, cache_type: bindings.CacheType) -> dict[str, NDArray[Any]]:
    """Of one layer alone: those of all would grow with the model."""
    return {
        f"past_{binding.name}": np.zeros(binding.sized(capacity=length), cache_type)
        for binding in bindings.kv_cache(cfg, cache_type)
        if binding.name in cached(layer)
    }


def _positions(start: int, stop: int) -> dict[str, NDArray[Any]]:
    """That positions from `start` are given, and all of their logits wanted."""
    return {
        bindings.LAST_POSITION: np.asarray([stop - 1], np.int32),
        bindings.TOTAL_LENGTH: np.asarray(stop, np.int32),
        bindings.LOGITS_TO_KEEP: np.arange(stop - start, dtype=np.int64),
    }


def _fed_by(graph: onnx.GraphProto, parameter: str, path: Path) -> str:
    """The value that the first node of a parameter takes."""
    for node in graph.node:
        if node.name.startswith(f"{parameter}/") and node.op_type not in ("Cast", "Transpose"):
            return str(node.input[0])
    raise BundleError(f"{path}: no node of {parameter!r}")


def _cut(model: onnx.ModelProto, begin: str, ends: Sequence[str]) -> bytes:
    """The part of a graph that makes the values `ends` out of `begin` and of the graph's own inputs."""
    makers = {output: node for node in model.graph.node for output in node.output}
    known = {value.name: value for value in (*model.graph.input, *model.graph.output)}
    needed, wanted, nodes = {begin}, [*ends], dict[str, onnx.NodeProto]()
    while wanted:
        name = wanted.pop()
        if name in needed:
            continue
        needed.add(name)
        if name in makers:
            nodes[makers[name].name] = makers[name]
            wanted += [i for i in makers[name].input if i]
    graph = helper.make_graph(
        [node for node in model.graph.node if node.name in nodes],
        model.graph.name,
        [_value(name, known) for name in sorted(needed & {*known, begin} - makers.keys() | {begin})],
        [_value(end, known) for end in ends],
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
    )
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return bytes(part.SerializeToString())


def _value(name: str, known: Mapping[str, onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    return known[name] if name in known else helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
