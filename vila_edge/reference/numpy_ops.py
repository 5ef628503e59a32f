"""The numpy interpreter: the oracle. It needs neither torch nor onnx, so it also runs on a device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vila_edge.architecture import rope_table
from vila_edge.config import Heads, RopeConfig, TokenOrder

Array = NDArray[Any]


class NumpyOps:
    """Computes in the precision of `params`: float32 arrays, or float64 for an oracle beyond doubt.

    Keys and values of earlier calls are kept in `kv_cache` (layer -> two arrays [B, H_kv, past, dim]),
    so a second call goes on where the first one stopped.
    """

    def __init__(self, params: Mapping[str, Array], kv_cache: dict[int, tuple[Array, Array]] | None = None) -> None:
        self.params = params
        self.kv_cache = {} if kv_cache is None else kv_cache

    def linear(self, x: Array, name: str, out: int, bias: bool = True) -> Array:
        y: Array = x @ self.params[f"{name}.weight"].T
        return y + self.params[f"{name}.bias"] if bias else y

    def embedding(self, ids: Array, name: str, rows: int, width: int) -> Array:
        found: Array = self.params[f"{name}.weight"][ids]
        return found

    def patch_embedding(self, pixel_values: Array, name: str, patch: int, width: int, bias: bool) -> Array:
        n, channels, height, wide = pixel_values.shape
        rows, columns = height // patch, wide // patch
        x = pixel_values[:, :, : rows * patch, : columns * patch]
        x = x.reshape(n, channels, rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5)
        weight = self.params[f"{name}.weight"].reshape(width, -1)
        y: Array = x.reshape(n, rows * columns, -1) @ weight.T
        return y + self.params[f"{name}.bias"] if bias else y

    def class_embedding(self, x: Array, name: str) -> Array:
        first = np.broadcast_to(self.params[name].astype(x.dtype), (len(x), 1, x.shape[-1]))
        return np.concatenate([first, x], 1)

    def position_embedding(self, x: Array, name: str) -> Array:
        return x + self.params[f"{name}.weight"]

    def layer_norm(self, x: Array, name: str, eps: float) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return x * self.params[f"{name}.weight"] + self.params[f"{name}.bias"]

    def rms_norm(self, x: Array, name: str, eps: float) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.params[f"{name}.weight"]

    def gelu(self, x: Array, approximate: Literal["none", "tanh"]) -> Array:
        if approximate == "tanh":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)).astype(x.dtype))

    def quick_gelu(self, x: Array) -> Array:
        return x / (1 + np.exp(-1.702 * x))

    def drop_first(self, x: Array) -> Array:
        return x[:, 1:]

    def silu(self, x: Array) -> Array:
        return x / (1 + np.exp(-x))

    def add(self, a: Array, b: Array) -> Array:
        return a + b

    def mul(self, a: Array, b: Array) -> Array:
        return a * b

    def space_to_depth(self, x: Array, grid: int, block: int, order: TokenOrder) -> Array:
        n, _, width = x.shape
        side = -(-grid // block)
        padded = np.zeros((n, side * block, side * block, width), x.dtype)  # zeros below and to the right
        padded[:, :grid, :grid] = x.reshape(n, grid, grid, width)
        tokens = padded.reshape(n, side, block, side, block, width)
        axes = (0, 1, 3, 2, 4, 5) if order == "row_major" else (0, 3, 1, 2, 4, 5)
        return tokens.transpose(axes).reshape(n, side * side, block * block * width)

    def attention(self, q: Array, k: Array, v: Array, heads: Heads) -> Array:
        return _merge(_attend(_split(q, heads.query), _split(k, heads.key_value), _split(v, heads.key_value)))

    def cached_attention(self, q: Array, k: Array, v: Array, heads: Heads, rope: RopeConfig, layer: int) -> Array:
        q, k, v = _split(q, heads.query), _split(k, heads.key_value), _split(v, heads.key_value)
        past = self.kv_cache[layer][0].shape[2] if layer in self.kv_cache else 0
        total = past + q.shape[2]
        cos, sin = rope_table(past, total, heads.dim, rope)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = self.cached(k, v, layer)
        visible = np.arange(past, total)[:, None] >= np.arange(total)
        return _merge(_attend(q, k, v, visible))

    def cached(self, k: Array, v: Array, layer: int) -> tuple[Array, Array]:
        """All keys and values of a layer, once the new ones are put behind the earlier ones."""
        if layer in self.kv_cache:
            past_k, past_v = self.kv_cache[layer]
            k, v = np.concatenate([past_k, k], 2), np.concatenate([past_v, v], 2)
        self.kv_cache[layer] = (k, v)
        return k, v


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _split(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _merge(x: Array) -> Array:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def _attend(q: Array, k: Array, v: Array, visible: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(dim)) v over [B, H, S, dim]; query heads share key/value heads in order."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = (weights / weights.sum(-1, keepdims=True)).astype(v.dtype) @ v
    return result


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary position embedding of LLaMA: the two halves of a head's width are the pairs."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
