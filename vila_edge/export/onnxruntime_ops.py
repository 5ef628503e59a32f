"""The `onnxruntime` dialect: 4-bit products and attention on a kv_cache by its contrib operators.

`MatMulNBits` and `GroupQueryAttention` are the forms that its CPU runs fastest; both load in onnxruntime 1.23 but for
a kv_cache in 8 bits, which it takes since 1.27.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vila_edge import bindings, kv_scales
from vila_edge.bindings import GraphBindings
from vila_edge.config import Heads, RopeConfig
from vila_edge.export.graph_ops import GraphOps, StoredTensor, row_slices
from vila_edge.parameters import Shape, fused
from vila_edge.tensorfile import TensorEntry

CONTRIB = "com.microsoft"
ROPE_COS, ROPE_SIN = "llm.rope.cos", "llm.rope.sin"  # tables [context, dim / 2] in the weights

KINDS = {"qweight": 4, "qweight_int8": 8}  # what a weight is stored as -> its bits

# How MatMulNBits may round its activations: 1 keeps float32, 4 allows int8 (four times as fast on a CPU).
ACCURACY_FLOAT32, ACCURACY_INT8 = 1, 4


class OnnxruntimeOps(GraphOps):
    """Linears whose weight is stored in 4 or 8 bits use it as it is; the kv_cache is a buffer updated in place.

    Linears of one input whose weights lie behind each other are one product: what a token costs beside its reading of
    the weights is less then.
    """

    contrib_opsets = ((CONTRIB, 1),)
    accuracy_level = ACCURACY_INT8

    def __init__(
        self, weights: Mapping[str, StoredTensor], bindings: GraphBindings, shapes: Mapping[str, Shape]
    ) -> None:
        super().__init__(weights, bindings, shapes)
        self._parts: dict[tuple[str, str], str] = {}  # (input, linear) -> its part of a fused product
        self._products: dict[tuple[str, str], str] = {}  # (input, first linear) -> the product
        self._linears: dict[str, tuple[str, str, bool]] = {}  # what a part became -> its input, linear, and bias

    def linear(self, x: str, name: str, out: int, bias: bool = True) -> str:
        if (x, name) not in self._parts:
            self._fuse(x, name)
        if (x, name) in self._parts:
            y = self._add_bias(self._parts[x, name], name, bias)
            self._linears[y] = x, name, bias
            return y
        for kind in KINDS:
            if f"{name}.{kind}" in self.weights:
                return self._add_bias(self._quantised_product(x, name, kind), name, bias)
        return super().linear(x, name, out, bias)

    def _fuse(self, x: str, name: str) -> None:
        """One product for a linear and those of the same input, if they are stored for it."""
        whole, parts = fused(name)
        for kind in KINDS:
            tensors = [what for what in (kind, "scales", "qzeros") if f"{name}.{what}" in self.weights]
            joined = {what: _joined([self.weights.get(f"{part}.{what}") for part in parts]) for what in tensors}
            if kind not in joined or not all(joined.values()):
                continue
            rows = [self.shapes[f"{part}.weight"][0] for part in parts]
            self.shapes = {**self.shapes, f"{whole}.weight": (sum(rows), self.shapes[f"{name}.weight"][1])}
            self.weights = {**self.weights, **{f"{whole}.{what}": tensor for what, tensor in joined.items() if tensor}}
            y = self._quantised_product(x, whole, kind)
            cut = [f"{part}/Split" for part in parts]
            self.multi_output_node("Split", [y, self.constant(rows)], cut, f"{whole}/Split", "", axis=-1)
            self._parts |= {(x, part): value for part, value in zip(parts, cut, strict=True)}
            self._products[x, parts[0]] = y

    def _quantised_product(self, x: str, name: str, kind: str) -> str:
        rows, row_bytes = self.weights[f"{name}.{kind}"].entry.shape
        slices = row_slices(rows, row_bytes, self.max_initializer)
        return self._side_by_side([self._product_of_rows(x, name, kind, part) for part in slices], name)

    def _product_of_rows(self, x: str, name: str, kind: str, part: slice) -> str:
        qweight, bits = f"{name}.{kind}", KINDS[kind]
        rows, columns = self.shapes[f"{name}.weight"]
        row_bytes = self.weights[qweight].entry.shape[1]
        groups = self.weights[f"{name}.scales"].entry.shape[1]
        inputs = [x, self.stored_rows(qweight, part, rows, (groups, row_bytes // groups))]
        inputs.append(self.parameter_rows(f"{name}.scales", part, rows))
        if f"{name}.qzeros" in self.weights:  # without them zero lies in the middle
            inputs.append(self.stored_rows(f"{name}.qzeros", part, rows))
        return self.node(
            "MatMulNBits",
            *inputs,
            name=name,
            domain=CONTRIB,
            N=part.stop - part.start,
            K=columns,
            bits=bits,
            block_size=row_bytes // groups * 8 // bits,
            accuracy_level=self.accuracy_level,
        )

    def cached_attention(self, q: str, k: str, v: str, heads: Heads, rope: RopeConfig, layer: int) -> str:
        name = f"attention_{layer}"
        if packed := self._packed(q, k, v):
            q, k, v = packed, "", ""
        present_key, present_value = f"present_key_{layer}", f"present_value_{layer}"
        inputs = [q, k, v, f"past_key_{layer}", f"past_value_{layer}"]
        inputs += [bindings.LAST_POSITION, bindings.TOTAL_LENGTH, self.parameter(ROPE_COS), self.parameter(ROPE_SIN)]
        more_inputs, attributes = self._cache_form(layer)
        return self.multi_output_node(
            "GroupQueryAttention",
            [*inputs, *more_inputs],
            [f"{name}/output", present_key, present_value],
            name=name,
            domain=CONTRIB,
            num_heads=heads.query,
            kv_num_heads=heads.key_value,
            do_rotary=1,
            **attributes,
        )

    def rms_norm(self, x: str, name: str, eps: float) -> str:
        """With the sum before it as one operator, but not between layers: there a graph can be cut at one value."""
        if not name.endswith(".post_attention_layernorm") or x not in self.nodes[-1].output:
            return super().rms_norm(x, name, eps)
        last = self.nodes[-1]
        if last.op_type != "Add":
            return super().rms_norm(x, name, eps)
        self.nodes.pop()
        inputs, op_type = [*last.input, self.parameter(f"{name}.weight")], "SkipSimplifiedLayerNormalization"
        y = f"{name}/{op_type}"
        return self.multi_output_node(op_type, inputs, [y, "", "", x], name=y, domain=CONTRIB, epsilon=eps)

    def _packed(self, q: str, k: str, v: str) -> str:
        """The product of which they are the parts, with its bias, or "": attention need not have them apart."""
        found = [self._linears.get(value) for value in (q, k, v)]
        if None in found:
            return ""
        inputs, names, biases = zip(*(one for one in found if one), strict=True)
        y = self._products.get((inputs[0], names[0]))
        if y is None or len({*inputs}) > 1 or len({*biases}) > 1 or [*names] != [*fused(names[0])[1]]:
            return ""
        if not biases[0]:
            return y
        whole = fused(names[0])[0]
        bias = self.node("Concat", *(self.parameter(f"{name}.bias") for name in names), name=f"{whole}.bias", axis=0)
        return self.node("Add", y, bias, name=whole)

    def _cache_form(self, layer: int) -> tuple[list[str], dict[str, Any]]:
        """Further inputs and attributes of GroupQueryAttention where the cache is in 8 bits."""
        cache = next(binding for binding in self.bindings.inputs if binding.name == f"past_key_{layer}")
        if cache.dtype != "int8":
            return [], {}
        unused = ["", "", ""]  # position_ids, attention_bias, head_sink
        scales = [self.stored(kv_scales.name(part, layer)) for part in ("key", "value")]
        quantised = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        return [*unused, *scales], quantised


def _joined(tensors: Sequence[StoredTensor | None]) -> StoredTensor | None:
    """Matrices as one whose rows are all of theirs, or None if they do not lie behind each other."""
    if not tensors or None in tensors:
        return None
    found = [tensor for tensor in tensors if tensor]
    first, ends = found[0], [tensor.entry.offset + tensor.entry.length for tensor in found]
    if any(tensor.location != first.location for tensor in found):
        return None
    if [tensor.entry.offset for tensor in found[1:]] != ends[:-1]:
        return None
    shape = (sum(tensor.entry.shape[0] for tensor in found), *first.entry.shape[1:])
    entry = TensorEntry(first.entry.dtype, shape, first.entry.offset, ends[-1] - first.entry.offset)
    return StoredTensor(first.location, entry)


class OnnxruntimeHalfOps(OnnxruntimeOps):
    """Activations and kv_cache in float16, norms in float32: the only form whose attention its CUDA provider has."""

    activations = "float16"
    accuracy_level = ACCURACY_FLOAT32  # no less than float16; CUDA does not ask

    def rms_norm(self, x: str, name: str, eps: float) -> str:
        return self.in_float32(super().rms_norm, x, name, eps)
