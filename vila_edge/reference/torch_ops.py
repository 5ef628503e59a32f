"""The torch interpreter: the reference of calibration and parity, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_edge.architecture import rope_table
from vila_edge.config import Heads, RopeConfig, TokenOrder


class TorchOps:
    """Computes in the precision and on the device of `params`. Differentiable.

    Keys and values of earlier calls are kept in `kv_cache` (layer -> two tensors [B, H_kv, past, dim]).
    """

    def __init__(self, params: Mapping[str, Tensor], kv_cache: dict[int, tuple[Tensor, Tensor]] | None = None) -> None:
        self.params = params
        self.kv_cache = {} if kv_cache is None else kv_cache

    def linear(self, x: Tensor, name: str, out: int, bias: bool = True) -> Tensor:
        return F.linear(x, self.params[f"{name}.weight"], self.params[f"{name}.bias"] if bias else None)

    def embedding(self, ids: Tensor, name: str, rows: int, width: int) -> Tensor:
        return F.embedding(ids, self.params[f"{name}.weight"])

    def patch_embedding(self, pixel_values: Tensor, name: str, patch: int, width: int, bias: bool) -> Tensor:
        weight, added = self.params[f"{name}.weight"], self.params[f"{name}.bias"] if bias else None
        return F.conv2d(pixel_values, weight, added, stride=patch).flatten(2).transpose(1, 2)

    def class_embedding(self, x: Tensor, name: str) -> Tensor:
        return torch.cat([self.params[name].expand(len(x), 1, -1), x], 1)

    def position_embedding(self, x: Tensor, name: str) -> Tensor:
        return x + self.params[f"{name}.weight"]

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.params[f"{name}.weight"], self.params[f"{name}.bias"], eps)

    def rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.params[f"{name}.weight"], eps)

    def gelu(self, x: Tensor, approximate: Literal["none", "tanh"]) -> Tensor:
        return F.gelu(x, approximate=approximate)

    def quick_gelu(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

    def drop_first(self, x: Tensor) -> Tensor:
        return x[:, 1:]

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def space_to_depth(self, x: Tensor, grid: int, block: int, order: TokenOrder) -> Tensor:
        n, _, width = x.shape
        side = -(-grid // block)
        missing = side * block - grid
        x = F.pad(x.reshape(n, grid, grid, width), (0, 0, 0, missing, 0, missing))
        x = x.reshape(n, side, block, side, block, width)
        x = x.permute(0, 1, 3, 2, 4, 5) if order == "row_major" else x.permute(0, 3, 1, 2, 4, 5)
        return x.reshape(n, side * side, block * block * width)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
        q, k, v = _split(q, heads.query), _split(k, heads.key_value), _split(v, heads.key_value)
        return _merge(self.mix(q, k, v))

    def cached_attention(self, q: Tensor, k: Tensor, v: Tensor, heads: Heads, rope: RopeConfig, layer: int) -> Tensor:
        q, k, v = _split(q, heads.query), _split(k, heads.key_value), _split(v, heads.key_value)
        past = self.kv_cache[layer][0].shape[2] if layer in self.kv_cache else 0
        total = past + q.shape[2]
        cos, sin = (torch.from_numpy(t).to(q) for t in rope_table(past, total, heads.dim, rope))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if past:
            past_k, past_v = self.kv_cache[layer]
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        self.kv_cache[layer] = (k, v)
        positions = torch.arange(total, device=q.device)
        visible = positions[past:, None] >= positions
        return _merge(self.mix(q, k, v, visible))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
        """Values [B, H_kv, S, dim] as far as queries [B, H, S, dim] attend to them, in all positions or where `visible`."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=visible is not None)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of LLaMA: the two halves of a head's width are the pairs."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
