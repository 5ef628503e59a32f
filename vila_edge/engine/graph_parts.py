"""A decoder's graph in parts of some layers each: a runtime that loads a graph on one core loads parts on several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vila_edge.architecture import LLM
from vila_edge.bindings import INPUTS_EMBEDS
from vila_edge.engine.protobuf import field, fields, pieces
from vila_edge.errors import BundleError

# Field numbers of onnx.proto3.
_GRAPH = 7  # of a ModelProto
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12  # of a GraphProto
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME = 1, 2, 3
_TENSOR_NAME, _VALUE_NAME = 8, 1


@dataclass(frozen=True)
class _Node:
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    raw: memoryview


def split_decoder(model: bytes, layers: int, parts: int, source: Path) -> list[bytes]:
    """Graphs of `layers / parts` layers each, to be run in turn: what one gives out under a new name the next takes.

    Every further input and output of the whole is one of the part that uses it. The whole comes back alone if there
    are fewer layers than parts, or if it has no place to be cut at. Raises BundleError if it is no graph.
    """
    try:
        return _Graph(memoryview(model)).split(layers, parts)
    except (IndexError, ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{source}: not an ONNX graph: {error}") from None


class _Graph:
    """What a ModelProto says, as far as cutting it takes."""

    def __init__(self, model: memoryview) -> None:
        self.around = [raw for number, _, raw in pieces(model) if number != _GRAPH]
        (graph,) = (content for number, content in fields(model) if number == _GRAPH)
        self.nodes = list[_Node]()
        self.values = dict[int, dict[str, memoryview]]({_INITIALIZER: {}, _INPUT: {}, _OUTPUT: {}})
        self.rest = list[memoryview]()
        for number, content, raw in pieces(graph):
            if number == _NODE and content is not None:
                self.nodes.append(_node(content, raw))
            elif number in self.values and content is not None:
                name = _TENSOR_NAME if number == _INITIALIZER else _VALUE_NAME
                self.values[number][_texts(content, name)[0]] = raw
            else:
                self.rest.append(raw)
        self.makers = {output: index for index, node in enumerate(self.nodes) for output in node.outputs if output}

    def split(self, layers: int, parts: int) -> list[bytes]:
        seams = [self._entrance(layers * part // parts) for part in range(1, parts)] if parts <= layers else []
        ends = [self.makers[seam] for seam in seams if seam in self.makers]
        if not seams or len(ends) < len(seams) or ends != sorted(set(ends)) or INPUTS_EMBEDS not in self.values[_INPUT]:
            return [self._part({*self.values[_OUTPUT]}, "", "")]
        found, begin = list[bytes](), ""
        for part, end in enumerate([*ends, len(self.nodes)]):  # nodes come after those whose outputs they take
            first = ends[part - 1] + 1 if part else 0
            outputs = {name for name in self.values[_OUTPUT] if first <= self.makers.get(name, -1) <= end}
            seam = seams[part] if part < len(seams) else ""
            found.append(self._part(outputs, begin, seam))
            begin = seam
        return found

    def _entrance(self, layer: int) -> str:
        """The hidden states that a layer takes: what feeds its first norm."""
        norm = f"{LLM}.layers.{layer}.input_layernorm/"
        return next((node.inputs[0] for node in self.nodes if node.name.startswith(norm)), "")

    def _part(self, outputs: set[str], begin: str, end: str) -> bytes:
        """What makes the `outputs` and the hidden states `end` out of the hidden states `begin`."""
        needed, wanted, nodes = {begin}, [*outputs, *([end] if end else [])], set[int]()
        while wanted:
            name = wanted.pop()
            if name not in needed:
                needed.add(name)
                if name in self.makers:
                    nodes.add(self.makers[name])
                    wanted += [value for value in self.nodes[self.makers[name]].inputs if value]
        inside = [self.nodes[index].raw for index in sorted(nodes)]
        inside += [raw for name, raw in self.values[_INITIALIZER].items() if name in needed]
        inside += [raw for name, raw in self.values[_INPUT].items() if name in needed]
        inside += [self._hidden(_INPUT, begin)] if begin else []
        inside += [self._hidden(_OUTPUT, end)] if end else []
        inside += [raw for name, raw in self.values[_OUTPUT].items() if name in outputs]
        return b"".join([*self.around, field(_GRAPH, b"".join([*self.rest, *inside]))])

    def _hidden(self, number: int, name: str) -> memoryview:
        """Hidden states as an input or output: of the type and shape of `inputs_embeds`."""
        (like,) = (content for _, content in fields(self.values[_INPUT][INPUTS_EMBEDS]))
        others = [raw for part, _, raw in pieces(like) if part != _VALUE_NAME]
        return memoryview(field(number, b"".join([field(_VALUE_NAME, name.encode()), *others])))


def _node(content: memoryview, raw: memoryview) -> _Node:
    name = _texts(content, _NODE_NAME) or [""]
    return _Node(name[0], tuple(_texts(content, _NODE_INPUT)), tuple(_texts(content, _NODE_OUTPUT)), raw)


def _texts(message: memoryview, number: int) -> list[str]:
    return [bytes(content).decode() for found, content in fields(message) if found == number]
