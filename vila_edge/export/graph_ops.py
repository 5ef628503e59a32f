"""The ONNX interpreter: running the architecture writes a graph. Neither torch nor weights are needed.

A value is the name of a tensor in the graph. Nodes are named by the parameter they consume, or by their
order; initialisers carry the checkpoint's names and point into the weights on the disk. This is the part
that all dialects share, standard operators of opset 21; a dialect overrides verbs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vila_edge.bindings import MAX_ALLOCATION, Activations, Binding, GraphBindings
from vila_edge.config import Heads, RopeConfig, TokenOrder
from vila_edge.parameters import Shape
from vila_edge.tensorfile import TensorEntry
from vila_edge.version import __version__

OPSET = 21  # onnxruntime 1.23, the last for Python 3.10, reads these
IR_VERSION = 10

ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}
_STORED_TYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "U8": TensorProto.UINT8}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on the disk: `entry` of the file `location`, which stands beside the others in weights/."""

    location: str
    entry: TensorEntry


def row_slices(rows: int, row_bytes: float, limit: int) -> list[slice]:
    """Cut the rows of a weight into as few slices, nearly equal, as keep each of them within `limit` bytes."""
    parts = max(1, math.ceil(rows * row_bytes / limit))
    size = math.ceil(rows / parts)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class GraphOps:
    """Writes one graph. Weights are cast to the type of the activations where they are stored in another."""

    opset, ir_version = OPSET, IR_VERSION
    contrib_opsets: tuple[tuple[str, int], ...] = ()
    activations: Activations = "float32"
    max_initializer = MAX_ALLOCATION  # a larger weight is several products, each of some of its rows

    def __init__(
        self, weights: Mapping[str, StoredTensor], bindings: GraphBindings, shapes: Mapping[str, Shape]
    ) -> None:
        """`weights` says where each stored tensor lies, `shapes` what each parameter is."""
        self.weights, self.bindings, self.shapes = weights, bindings, shapes
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.produced: set[str] = set()

    # the graph

    def model(self, name: str) -> bytes:
        """The graph, serialised, without what nothing reads. Every output of the bindings must have been set."""
        missing = {b.name for b in self.bindings.outputs} - self.produced
        assert not missing, missing
        nodes, read = list[onnx.NodeProto](), {b.name for b in self.bindings.outputs}
        for node in reversed(self.nodes):
            if read.intersection(node.output):
                nodes.append(node)
                read.update(node.input)
        graph = helper.make_graph(
            nodes[::-1],
            name,
            [_value_info(b) for b in self.bindings.inputs],
            [_value_info(b) for b in self.bindings.outputs],
            [tensor for key, tensor in self.initializers.items() if key in read],
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in (("", self.opset), *self.contrib_opsets)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version, producer_name="vila-edge")
        model.producer_version = __version__
        return bytes(model.SerializeToString(deterministic=True))

    def output(self, value: str, name: str) -> None:
        """Make a value an output of the graph, in the type of its binding."""
        (binding,) = (b for b in self.bindings.outputs if b.name == name)
        if binding.dtype != self.activations:
            value = self.cast(value, binding.dtype)
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"output/{name}"))
        self.produced.add(name)

    def node(self, op_type: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Append a node of one output; returns the name of the value.

        A name that is taken gets the node's number, as in `llm.model.norm/Add.7`.
        """
        path = f"{name}/{op_type}" if name else f"{op_type}.{len(self.nodes)}"
        path = path if path not in self.produced else f"{path}.{len(self.nodes)}"
        return self.multi_output_node(op_type, inputs, [path], path, domain, **attributes)

    def multi_output_node(
        self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], name: str, domain: str, **attributes: Any
    ) -> str:
        """Append a node whose outputs are named; returns the first of them."""
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attributes))
        self.produced.update(outputs)
        return outputs[0]

    def constant(self, value: object, dtype: type = np.int64) -> str:
        """A small constant, written into the graph once."""
        array: NDArray[Any] = np.asarray(value, dtype)
        name = f"constant/{array.dtype}/{array.tolist()}"
        self.initializers.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def number(self, value: float) -> str:
        """A constant of the type of the activations."""
        return self.constant(value, np.dtype(self.activations).type)

    def stored(self, name: str, shape: tuple[int, ...] | None = None) -> str:
        """A tensor of the weights as it is stored, seen with another shape of as many bytes if one is given."""
        tensor = self.weights[name]
        return self.external(name, tensor, _STORED_TYPES[tensor.entry.dtype], shape or tensor.entry.shape)

    def external(self, name: str, tensor: StoredTensor, data_type: int, shape: Sequence[int]) -> str:
        """An initialiser whose bytes lie on the disk, read as `data_type` and `shape`."""
        proto = TensorProto(name=name, data_type=data_type)
        proto.dims.extend(shape)
        proto.data_location = TensorProto.EXTERNAL
        place = {"location": tensor.location, "offset": tensor.entry.offset, "length": tensor.entry.length}
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self.initializers.setdefault(name, proto)
        return name

    def parameter(self, name: str, shape: tuple[int, ...] | None = None) -> str:
        """A tensor of the weights in the type of the activations."""
        return self._in_activations(self.stored(name, shape), self.weights[name].entry.dtype)

    def stored_rows(
        self, name: str, part: slice, rows: int, row: Sequence[int] = (), data_type: int | None = None
    ) -> str:
        """Some of the `rows` of a stored tensor, each read as the shape `row` of a type; by default as it is stored."""
        tensor, count = self.weights[name], part.stop - part.start
        row_bytes = tensor.entry.length // rows
        place = {"offset": tensor.entry.offset + part.start * row_bytes, "length": count * row_bytes}
        piece = StoredTensor(tensor.location, dataclasses.replace(tensor.entry, **place))
        label = name if count == rows else f"{name}/rows.{part.start}"
        shape = (count, *(row or tensor.entry.shape[1:]))
        return self.external(label, piece, data_type or _STORED_TYPES[tensor.entry.dtype], shape)

    def parameter_rows(self, name: str, part: slice, rows: int) -> str:
        """The same in the type of the activations."""
        return self._in_activations(self.stored_rows(name, part, rows), self.weights[name].entry.dtype)

    def _in_activations(self, stored: str, dtype: str) -> str:
        wanted = ONNX_TYPES[self.activations]
        if _STORED_TYPES[dtype] == wanted:
            return stored
        cast = f"{stored}/Cast"
        if cast not in self.produced:
            self.node("Cast", stored, name=stored, to=wanted)
        return cast

    def cast(self, x: str, dtype: str) -> str:
        return self.node("Cast", x, to=ONNX_TYPES[dtype])

    def in_float32(self, norm: Callable[[str, str, float], str], x: str, name: str, eps: float) -> str:
        """A norm whose sums, constants and weights are float32, whatever goes in and comes out."""
        self.activations = "float32"
        y = norm(self.cast(x, "float32"), name, eps)
        del self.activations  # back to what the class says
        return self.cast(y, self.activations)

    # the verbs

    def linear(self, x: str, name: str, out: int, bias: bool = True) -> str:
        stored = f"{name}.weight"
        row_bytes = self.weights[stored].entry.shape[1] * np.dtype(self.activations).itemsize
        parts = []
        for part in row_slices(out, row_bytes, self.max_initializer):
            weight = self.node("Transpose", self.parameter_rows(stored, part, out), name=name, perm=[1, 0])
            parts.append(self.node("MatMul", x, weight, name=name))
        return self._add_bias(self._side_by_side(parts, name), name, bias)

    def embedding(self, ids: str, name: str, rows: int, width: int) -> str:
        return self.node("Gather", self.parameter(f"{name}.weight"), ids, name=name)

    def patch_embedding(self, pixel_values: str, name: str, patch: int, width: int, bias: bool) -> str:
        inputs = [pixel_values, self.parameter(f"{name}.weight")]
        inputs += [self.parameter(f"{name}.bias")] if bias else []
        x = self.node("Conv", *inputs, name=name, strides=[patch, patch])
        return self.node("Transpose", self._reshape(x, 0, width, -1), name=name, perm=[0, 2, 1])

    def class_embedding(self, x: str, name: str) -> str:
        (width,) = self.weights[name].entry.shape
        images = self.node("Shape", x, name=name, start=0, end=1)
        shape = self.node("Concat", images, self.constant([1, width]), name=name, axis=0)
        first = self.node("Expand", self.parameter(name), shape, name=name)
        return self.node("Concat", first, x, name=name, axis=1)

    def position_embedding(self, x: str, name: str) -> str:
        return self.node("Add", x, self.parameter(f"{name}.weight"), name=name)

    def layer_norm(self, x: str, name: str, eps: float) -> str:
        weight, bias = self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")
        return self.node("LayerNormalization", x, weight, bias, name=name, epsilon=eps)

    def rms_norm(self, x: str, name: str, eps: float) -> str:
        square = self.node("Pow", x, self.number(2), name=name)
        mean = self.node("ReduceMean", square, self.constant([-1]), name=name)
        root = self.node("Sqrt", self.node("Add", mean, self.number(eps), name=name), name=name)
        return self.node("Mul", self.node("Div", x, root, name=name), self.parameter(f"{name}.weight"), name=name)

    def gelu(self, x: str, approximate: Literal["none", "tanh"]) -> str:
        return self.node("Gelu", x, approximate=approximate)

    def quick_gelu(self, x: str) -> str:
        return self.node("Mul", x, self.node("Sigmoid", self.node("Mul", x, self.number(1.702))))

    def drop_first(self, x: str) -> str:
        last = np.iinfo(np.int64).max  # Slice: to the end, however far that is
        return self.node("Slice", x, self.constant([1]), self.constant([last]), self.constant([1]))

    def silu(self, x: str) -> str:
        return self.node("Mul", x, self.node("Sigmoid", x))

    def add(self, a: str, b: str) -> str:
        return self.node("Add", a, b)

    def mul(self, a: str, b: str) -> str:
        return self.node("Mul", a, b)

    def space_to_depth(self, x: str, grid: int, block: int, order: TokenOrder) -> str:
        width = self.bindings.inputs[0].shape[-1]
        assert isinstance(width, int)
        side = -(-grid // block)
        missing = side * block - grid
        x = self._reshape(x, -1, grid, grid, width)
        if missing:
            x = self.node("Pad", x, self.constant([0, 0, 0, 0, 0, missing, missing, 0]))
        x = self._reshape(x, -1, side, block, side, block, width)
        x = self.node("Transpose", x, perm=[0, 1, 3, 2, 4, 5] if order == "row_major" else [0, 3, 1, 2, 4, 5])
        return self._reshape(x, -1, side * side, block * block * width)

    def attention(self, q: str, k: str, v: str, heads: Heads) -> str:
        assert heads.query == heads.key_value, heads
        q, k, v = (self._split(x, heads.query, heads.dim, perm) for x, perm in ((q, 1), (k, 3), (v, 1)))
        scores = self.node("Mul", self.node("MatMul", q, k), self.number(1 / math.sqrt(heads.dim)))
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), v)
        return self._reshape(self.node("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, heads.query * heads.dim)

    def cached_attention(self, q: str, k: str, v: str, heads: Heads, rope: RopeConfig, layer: int) -> str:
        raise TypeError("how a kv_cache is kept is a dialect's own: use one of its subclasses")

    # pieces of verbs

    def _side_by_side(self, parts: Sequence[str], name: str) -> str:
        """The products of the slices of a weight as one."""
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, name=name, axis=-1)

    def _add_bias(self, x: str, name: str, bias: bool) -> str:
        return self.node("Add", x, self.parameter(f"{name}.bias"), name=name) if bias else x

    def _reshape(self, x: str, *shape: int) -> str:
        return self.node("Reshape", x, self.constant(shape))

    def _split(self, x: str, heads: int, dim: int, width_axis: int) -> str:
        """[N, P, H * dim] to [N, H, P, dim], or to [N, H, dim, P] for keys."""
        perm = [0, 2, 1, 3] if width_axis == 1 else [0, 2, 3, 1]
        return self.node("Transpose", self._reshape(x, 0, 0, heads, dim), perm=perm)


def _value_info(binding: Binding) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(binding.name, ONNX_TYPES[binding.dtype], list(binding.shape))
