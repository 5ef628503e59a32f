"""The `onnxruntime` dialect: 4-bit products and attention on a kv_cache by its contrib operators.

`MatMulNBits` and `GroupQueryAttention` are the forms that its CPU runs fastest; both load in onnxruntime 1.23.
"""

from __future__ import annotations

from vila_edge import bindings
from vila_edge.config import Heads, RopeConfig
from vila_edge.export.graph_ops import GraphOps

CONTRIB = "com.microsoft"
ROPE_COS, ROPE_SIN = "llm.rope.cos", "llm.rope.sin"  # tables [context, dim / 2] in the weights

# How MatMulNBits may round its activations: 1 keeps float32, 4 allows int8 (four times as fast on a CPU).
ACCURACY_FLOAT32, ACCURACY_INT8 = 1, 4


class OnnxruntimeOps(GraphOps):
    """Linears whose weight is stored in 4 bits use it as it is; the kv_cache is a buffer updated in place."""

    contrib_opsets = ((CONTRIB, 1),)
    accuracy_level = ACCURACY_INT8

    def linear(self, x: str, name: str, out: int, bias: bool = True) -> str:
        qweight = self.weights.get(f"{name}.qweight")
        if qweight is None:
            return super().linear(x, name, out, bias)
        rows, half_columns = qweight.entry.shape
        groups = self.weights[f"{name}.scales"].entry.shape[1]
        columns = 2 * half_columns
        y = self.node(
            "MatMulNBits",
            x,
            self.stored(f"{name}.qweight", (rows, groups, half_columns // groups)),
            self.parameter(f"{name}.scales"),
            self.stored(f"{name}.qzeros"),
            name=name,
            domain=CONTRIB,
            N=rows,
            K=columns,
            bits=4,
            block_size=columns // groups,
            accuracy_level=self.accuracy_level,
        )
        return self._add_bias(y, name, bias)

    def cached_attention(self, q: str, k: str, v: str, heads: Heads, rope: RopeConfig, layer: int) -> str:
        name = f"attention_{layer}"
        present_key, present_value = f"present_key_{layer}", f"present_value_{layer}"
        inputs = [q, k, v, f"past_key_{layer}", f"past_value_{layer}"]
        inputs += [bindings.LAST_POSITION, bindings.TOTAL_LENGTH, self.parameter(ROPE_COS), self.parameter(ROPE_SIN)]
        return self.multi_output_node(
            "GroupQueryAttention",
            inputs,
            [f"{name}/output", present_key, present_value],
            name=name,
            domain=CONTRIB,
            num_heads=heads.query,
            kv_num_heads=heads.key_value,
            do_rotary=1,
        )
