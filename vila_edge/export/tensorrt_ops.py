"""The `tensorrt` dialect: float16 activations, strongly typed, 4-bit products, and a kv_cache updated in place.

Norms, softmax and rotary embeddings are computed in float32. How weights must be stored is what
`tensorrt_weights` makes of a bundle's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from onnx import TensorProto, numpy_helper

from vila_edge import bindings
from vila_edge.bindings import Activations, GraphBindings
from vila_edge.config import Heads, RopeConfig
from vila_edge.export.graph_ops import GraphOps, StoredTensor, row_slices
from vila_edge.export.onnxruntime_ops import ROPE_COS, ROPE_SIN
from vila_edge.parameters import Shape

# A weight of 8 bits is the sum of two of 4 bits, its high and its low digit; these end the names of their linears.
DIGITS = (".high", ".low")
ZERO_TERMS = "zero_terms"  # [N, K/G]: what a block of inputs adds to each output for each unit of its sum


class TensorrtOps(GraphOps):
    """All verbs but the attention of the decoder, which is where the two forms of the kv_cache differ.

    TensorRT-RTX 1.7.1 joins the slices of a large weight again in the engine, because they are multiplied with the
    same input; what the parser and the layers handle stays small.
    """

    activations: Activations = "float16"

    def __init__(
        self, weights: Mapping[str, StoredTensor], bindings: GraphBindings, shapes: Mapping[str, Shape]
    ) -> None:
        super().__init__(weights, bindings, shapes)
        self._made: dict[str, str] = {}

    # the verbs

    def linear(self, x: str, name: str, out: int, bias: bool = True) -> str:
        rows, columns = self.shapes[f"{name}.weight"]
        digits = [f"{name}{digit}" for digit in ("", *DIGITS) if f"{name}{digit}.qweight" in self.weights]
        row_bytes = columns / 2 if digits else columns * np.dtype(self.activations).itemsize
        parts = []
        for part in row_slices(rows, row_bytes, self.max_initializer):
            if digits:
                parts.append(self._quantised_product(x, name, digits, part))
            else:
                weight = self.stored_rows(f"{name}.weight", part, rows)
                parts.append(self._product(x, weight, name))
        return self._add_bias(self._side_by_side(parts, name), name, bias)

    def patch_embedding(self, pixel_values: str, name: str, patch: int, width: int, bias: bool) -> str:
        return super().patch_embedding(self.cast(pixel_values, self.activations), name, patch, width, bias)

    def layer_norm(self, x: str, name: str, eps: float) -> str:
        return self.in_float32(super().layer_norm, x, name, eps)

    def rms_norm(self, x: str, name: str, eps: float) -> str:
        return self.in_float32(super().rms_norm, x, name, eps)

    def attention(self, q: str, k: str, v: str, heads: Heads) -> str:
        assert heads.query == heads.key_value, heads
        q = self.node("Mul", q, self.number(1 / math.sqrt(heads.dim)))  # before the product, which it keeps small
        q, k, v = (self._split(x, heads.query, heads.dim, perm) for x, perm in ((q, 1), (k, 3), (v, 1)))
        mixed = self.node("MatMul", self._softmax(self.node("MatMul", q, k)), v)
        return self._merge(mixed, heads)

    # pieces of verbs

    def _softmax(self, scores: str, visible: str = "") -> str:
        """Softmax of float16 scores over the last axis, where `visible` allows, computed in float32."""
        scores = self.cast(scores, "float32")
        if visible:
            scores = self.node("Where", visible, scores, self.constant(np.finfo(np.float16).min, np.float32))
        return self.cast(self.node("Softmax", scores, axis=-1), self.activations)

    def _merge(self, x: str, heads: Heads) -> str:
        """[B, H, S, dim] to [B, S, H * dim]."""
        return self._reshape(self.node("Transpose", x, perm=[0, 2, 1, 3]), 0, 0, heads.query * heads.dim)

    def _product(self, x: str, weight: str, name: str) -> str:
        """x [..., K] by a weight [N, K]."""
        return self.node("MatMul", x, self.node("Transpose", weight, name=name, perm=[1, 0]), name=name)

    def _quantised_product(self, x: str, name: str, digits: Sequence[str], part: slice) -> str:
        """x by some rows of a weight of 4 bits around zero, or by the sum of two of them, and the zero points' share."""
        rows, columns = self.shapes[f"{name}.weight"]
        qweight, scales = (self.weights[f"{digits[0]}.{what}"].entry for what in ("qweight", "scales"))
        width, groups = 2 * qweight.shape[1], scales.shape[1]
        x = self._filled_up(x, width - columns)
        terms = []
        for digit in digits:
            weight = self.node(
                "DequantizeLinear",
                self.stored_rows(f"{digit}.qweight", part, rows, (width,), TensorProto.INT4),
                self.stored_rows(f"{digit}.scales", part, rows),
                name=digit,
                axis=1,
                block_size=width // groups,
            )
            terms.append(self._product(x, weight, digit))
        if f"{name}.{ZERO_TERMS}" in self.weights:
            zero_terms = self.stored_rows(f"{name}.{ZERO_TERMS}", part, rows)
            terms.append(
                self._product(self._block_sums(x, groups, width // groups), zero_terms, f"{name}.{ZERO_TERMS}")
            )
        y = terms[0]
        for term in terms[1:]:
            y = self.node("Add", y, term, name=name)
        return y

    def _filled_up(self, x: str, missing: int) -> str:
        """Zeros behind the last axis of x [B, S, K], for a weight that is stored in whole groups."""
        if not missing:
            return x
        return self._once(
            f"filled up/{x}", lambda: self.node("Pad", x, self.constant([0, 0, 0, 0, 0, missing]), self.number(0))
        )

    def _block_sums(self, x: str, blocks: int, size: int) -> str:
        """x [B, S, K] to the sums of its blocks [B, S, K/G], added up in float32; one node for all linears of x."""

        def sums() -> str:
            wide = self.cast(self._reshape(x, 0, 0, blocks, size), "float32")
            return self.cast(self.node("ReduceSum", wide, self.constant([-1]), keepdims=0), self.activations)

        return self._once(f"block sums/{x}/{blocks}", sums)

    def _once(self, key: str, make: Callable[[], str]) -> str:
        """A value that several verbs share."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _rotated(self, x: str, heads: int, dim: int) -> str:
        """[1, S, H * dim] to [1, S, H, dim] with rotary embeddings, which are computed in float32."""
        cos, sin = (self._once(table, partial(self._positions_of, table)) for table in (ROPE_COS, ROPE_SIN))
        wide = self.cast(self._reshape(x, 0, 0, heads, dim), "float32")
        a, b = (
            self.node("Slice", wide, *(self.constant([at]) for at in (start, start + dim // 2, 3)))
            for start in (0, dim // 2)
        )
        first = self.node("Sub", self.node("Mul", a, cos), self.node("Mul", b, sin))
        second = self.node("Add", self.node("Mul", b, cos), self.node("Mul", a, sin))
        return self.cast(self.node("Concat", first, second, axis=-1), self.activations)

    def _positions_of(self, table: str) -> str:
        """The rows of a rotary table at the new positions, [1, S, 1, dim / 2]."""
        rows = self.node("Gather", self.stored(table), bindings.POSITION_IDS, name=table)
        return self.node("Unsqueeze", rows, self.constant([2]), name=table)


class ScatterOps(TensorrtOps):
    """The form `scatter`: TensorScatter writes into a kv_cache of fixed capacity, Attention looks at all of it.

    The mask says what may be seen: runtimes differ in what they take causal to mean beside a cache. The softmax
    is Attention's own: TensorRT-RTX 1.7.1 refuses to be told its precision.
    """

    opset, ir_version = 24, 11

    def cached_attention(self, q: str, k: str, v: str, heads: Heads, rope: RopeConfig, layer: int) -> str:
        q = self._heads_first(self._rotated(q, heads.query, heads.dim))
        key = self._scatter(self._rotated(k, heads.key_value, heads.dim), f"key_{layer}")
        value = self._scatter(self._reshape(v, 0, 0, heads.key_value, heads.dim), f"value_{layer}")
        mixed = self.node(
            "Attention",
            q,
            key,
            value,
            self._once("visible", self._visible),
            name=f"attention_{layer}",
            scale=1 / math.sqrt(heads.dim),
        )
        return self._merge(mixed, heads)

    def _heads_first(self, x: str) -> str:
        return self.node("Transpose", x, perm=[0, 2, 1, 3])

    def _scatter(self, new: str, name: str) -> str:
        """Put the new positions [1, S, H_kv, dim] into the cache; returns the whole of it."""
        index = self._once("write index", lambda: self._reshape(self._first_position(), 1))
        inputs = [f"past_{name}", self._heads_first(new), index]
        return self.multi_output_node("TensorScatter", inputs, [f"present_{name}"], f"scatter_{name}", "", axis=2)

    def _first_position(self) -> str:
        return self.node("Slice", bindings.POSITION_IDS, *(self.constant([at]) for at in (0, 1, 1)))

    def _visible(self) -> str:
        """Which positions of the cache each new one sees, bool [1, 1, S, capacity]."""
        capacity = next(b.shape[2] for b in self.bindings.outputs if b.name == "present_key_0")
        assert isinstance(capacity, int), capacity
        positions = numpy_helper.from_array(np.arange(capacity, dtype=np.int64), "cache_positions")
        self.initializers[positions.name] = positions
        return self.node("GreaterOrEqual", self._reshape(bindings.POSITION_IDS, 1, 1, -1, 1), positions.name)
