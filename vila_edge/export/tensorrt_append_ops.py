"""The `append` form of the `tensorrt` dialect: operators of opset 21 alone, for TensorRT 10.3 of JetPack 6.

The kv_cache is one buffer [1, capacity, H_kv, dim] for each layer's keys and one for its values. The graph
reads its filled part, `past_`, and returns the new positions, `new_`, which belong behind it.
"""

from __future__ import annotations

import math

from vila_edge import bindings
from vila_edge.config import Heads, RopeConfig
from vila_edge.export.tensorrt_ops import TensorrtOps


class AppendOps(TensorrtOps):
    """Attention written out. Queries of one group are stacked as rows, so keys and values are read once for all."""

    def cached_attention(self, q: str, k: str, v: str, heads: Heads, rope: RopeConfig, layer: int) -> str:
        group = heads.query // heads.key_value
        q = self._rotated(self.node("Mul", q, self.number(1 / math.sqrt(heads.dim))), heads.query, heads.dim)
        q = self.node("Transpose", q, perm=[0, 2, 1, 3])  # [1, H, S, dim]
        q = self._reshape(q, 0, heads.key_value, -1, heads.dim)  # [1, H_kv, group * S, dim]
        keys = self._appended(self._rotated(k, heads.key_value, heads.dim), f"key_{layer}")
        values = self._appended(self._reshape(v, 0, 0, heads.key_value, heads.dim), f"value_{layer}")
        keys, values = (
            self.node("Transpose", x, perm=perm) for x, perm in ((keys, [0, 2, 3, 1]), (values, [0, 2, 1, 3]))
        )
        visible = self._once("visible", lambda: self._visible(group))
        mixed = self.node("MatMul", self._softmax(self.node("MatMul", q, keys), visible), values)
        if group > 1:
            return self._merge(self._reshape(mixed, 0, heads.query, -1, heads.dim), heads)
        # The same with an axis of 1 more: else TensorRT-RTX 1.7.1 widens the whole weight of o_proj in memory first.
        mixed = self.node("Transpose", self._reshape(mixed, 0, heads.query, 1, -1, heads.dim), perm=[0, 3, 1, 2, 4])
        return self._reshape(mixed, 0, 0, heads.query * heads.dim)

    def _appended(self, new: str, name: str) -> str:
        """Past and new positions [1, T, H_kv, dim]; the new ones are an output."""
        self.output(new, f"new_{name}")
        return self.node("Concat", f"past_{name}", new, axis=1)

    def _visible(self, group: int) -> str:
        """Which positions each new one sees, for each query head of a group: bool [group * S, T]."""
        past = self.node("Shape", "past_key_0", start=1, end=2)
        new = self.node("Shape", bindings.POSITION_IDS, start=1, end=2)
        total = self._reshape(self.node("Add", past, new))
        positions = self.node("Range", self.constant(0), total, self.constant(1))
        own = self._reshape(bindings.POSITION_IDS, -1)
        own = self._reshape(self.node("Concat", *[own] * group, axis=0) if group > 1 else own, -1, 1)
        return self.node("GreaterOrEqual", own, positions)
