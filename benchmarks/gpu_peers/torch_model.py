"""A decoder of plain torch modules, as it is run eagerly: what a VILA's LLM is without any of our kernels.

Its parameters have the names of a bundle's behind `llm.`. Products are linears in 16 bits (`nn.Linear`), or in 4 bits
that are taken apart to 16 before each product (`Dequantised`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vila_edge import architecture
from vila_edge.config import LlmConfig

GROUP = 128
Dequantise = Callable[[Tensor, Tensor, Tensor], Tensor]
Linear = Callable[[int, int, bool], nn.Module]  # inputs, outputs, whether there is a bias


def dense(inputs: int, outputs: int, bias: bool) -> nn.Module:
    return nn.Linear(inputs, outputs, bias)


class Dequantised(nn.Module):
    """A linear of 4 bits in groups of 128: the library's product behind a dequantisation."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, dequantise: Dequantise, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self._dequantise = dequantise
        packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", torch.full((outputs, inputs // GROUP), 0.2 / inputs**0.5))
        self.register_buffer("zeros", torch.randint(7, 9, (outputs, inputs // GROUP)).float())
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._dequantise(self.packed, self.scales, self.zeros), self.bias)


class Cache:
    """Keys and values [B, H_kv, capacity, dim] of each layer, there from the beginning."""

    def __init__(self, llm: LlmConfig, batch: int, capacity: int, like: Tensor) -> None:
        shape = (2, batch, llm.num_key_value_heads, capacity, llm.head_dim)
        self.layers = [torch.randn(shape, dtype=like.dtype, device=like.device) for _ in range(llm.num_hidden_layers)]
        self.length = 0


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self._eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self._eps)


class Attention(nn.Module):
    def __init__(self, llm: LlmConfig, linear: Linear) -> None:
        super().__init__()
        self._heads = llm.heads
        query, key_value, dim = llm.heads
        self.q_proj = linear(llm.hidden_size, query * dim, llm.qkv_bias)
        self.k_proj = linear(llm.hidden_size, key_value * dim, llm.qkv_bias)
        self.v_proj = linear(llm.hidden_size, key_value * dim, llm.qkv_bias)
        self.o_proj = linear(query * dim, llm.hidden_size, False)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor, cached: Tensor, length: int) -> Tensor:
        batch, new, _ = x.shape
        q, k, v = (
            product(x).view(batch, new, -1, self._heads.dim).transpose(1, 2)
            for product in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotated(q, cosines, sines), _rotated(k, cosines, sines)
        cached[0, :, :, length : length + new], cached[1, :, :, length : length + new] = k, v
        keys, values = cached[:, :, :, : length + new]
        attend = nn.functional.scaled_dot_product_attention
        grouped = self._heads.query != self._heads.key_value
        if new == 1:
            attended = attend(q, keys, values, enable_gqa=grouped)
        elif not length:
            attended = attend(q, keys, values, is_causal=True, enable_gqa=grouped)
        else:
            mask = torch.ones(new, length + new, dtype=torch.bool, device=x.device).tril(length)
            attended = attend(q, keys, values, mask, enable_gqa=grouped)
        projected: Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, new, -1))
        return projected


class Mlp(nn.Module):
    def __init__(self, llm: LlmConfig, linear: Linear) -> None:
        super().__init__()
        self.gate_proj = linear(llm.hidden_size, llm.intermediate_size, False)
        self.up_proj = linear(llm.hidden_size, llm.intermediate_size, False)
        self.down_proj = linear(llm.intermediate_size, llm.hidden_size, False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class Block(nn.Module):
    def __init__(self, llm: LlmConfig, linear: Linear) -> None:
        super().__init__()
        self.input_layernorm = Norm(llm.hidden_size, llm.rms_norm_eps)
        self.self_attn = Attention(llm, linear)
        self.post_attention_layernorm = Norm(llm.hidden_size, llm.rms_norm_eps)
        self.mlp = Mlp(llm, linear)


class Model(nn.Module):
    def __init__(self, llm: LlmConfig, linear: Linear) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(llm.vocab_size, llm.hidden_size)
        self.layers = nn.ModuleList(Block(llm, linear) for _ in range(llm.num_hidden_layers))
        self.norm = Norm(llm.hidden_size, llm.rms_norm_eps)


class TorchDecoder(nn.Module):
    """Random weights, or those of `load_state_dict`. lm_head has a weight of its own, also where it could be tied."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, llm: LlmConfig, linear: Linear = dense) -> None:
        super().__init__()
        self.llm = llm
        self.model = Model(llm, linear)
        self.lm_head = nn.Linear(llm.hidden_size, llm.vocab_size, bias=False)
        tables = architecture.rope_table(0, llm.context_length, llm.head_dim, llm.rope)
        for name, table in zip(("cosines", "sines"), tables, strict=True):
            self.register_buffer(name, torch.from_numpy(table).repeat(1, 2), persistent=False)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return Cache(self.llm, batch, capacity, self.lm_head.weight)

    def forward(self, inputs_embeds: Tensor, cache: Cache) -> Tensor:
        """inputs_embeds [B, S, D] behind what the cache holds; logits [B, V] of the last position."""
        start, stop = cache.length, cache.length + inputs_embeds.shape[1]
        cosines, sines = self.cosines[start:stop], self.sines[start:stop]
        x = inputs_embeds
        for block, cached in zip(self.model.layers, cache.layers, strict=True):
            assert isinstance(block, Block)
            x = x + block.self_attn(block.input_layernorm(x), cosines, sines, cached, start)
            x = x + block.mlp(block.post_attention_layernorm(x))
        cache.length = stop
        logits: Tensor = self.lm_head(self.model.norm(x[:, -1]))
        return logits

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """The most likely tokens [B] behind `ids` [B]."""
        return self(self.model.embed_tokens(ids)[:, None], cache).argmax(-1)


def make(llm: LlmConfig, device: str, dequantise: Dequantise | None = None) -> TorchDecoder:
    """In 16 bits on a GPU, on a CPU in 32; with weights of 4 bits if there is something to take them apart."""
    linear = partial(Dequantised, dequantise) if dequantise else dense
    with torch.device(device):
        kept = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if device == "cpu" else torch.float16)
        try:
            return TorchDecoder(llm, linear).eval()
        finally:
            torch.set_default_dtype(kept)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines
