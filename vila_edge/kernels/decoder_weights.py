"""A bundle's decoder as the kernels read it: which linears are one product, in which order their rows lie, and the rest.

A block has four products. Arrays are named by it: `layers.0.qkv_proj.qweight`, `layers.0.input_layernorm.gamma`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge import architecture, int8, kv_scales
from vila_edge.config import LlmConfig
from vila_edge.errors import BackendError
from vila_edge.int4 import Int4
from vila_edge.int8 import Int8
from vila_edge.kernels import w8_layout
from vila_edge.kernels.elementwise import MAX_WIDTH
from vila_edge.kernels.epilogue import fold_gamma
from vila_edge.kernels.w4_layout import (
    GROUP,
    TILE,
    Order,
    Packed,
    join,
    pack,
    pack_bias,
    plain_order,
    rope_order,
    swiglu_order,
)
from vila_edge.stored import StoredParameters

Arrays = dict[str, NDArray[Any]]

LAYOUT = 1  # of the arrays below: another number for another layout, so that arrays kept on a disk are made again
EMBED_TOKENS, LM_HEAD, NORM = "embed_tokens", "lm_head", "norm"
COSINES, SINES = "rope.cosines", "rope.sines"
KEY_SCALES, VALUE_SCALES = "kv_cache.key_scales", "kv_cache.value_scales"
NORMS = ("input_layernorm", "post_attention_layernorm")  # of a block
_EXPORT = "export the checkpoint again: vila-edge export CHECKPOINT -o BUNDLE"


@dataclass(frozen=True, eq=False)
class Product:
    """Linears of one input that are computed as one."""

    name: str
    linears: tuple[str, ...]  # names within a block, their rows one behind the other
    rows: int  # of all of them
    inputs: int
    order: Order
    outputs: int  # of the epilogue

    @property
    def packed_rows(self) -> int:
        return len(self.order)


@dataclass(frozen=True)
class DecoderLayout:
    """What the kernels make of a decoder's sizes."""

    llm: LlmConfig

    @cached_property
    def products(self) -> dict[str, Product]:
        """Of a block, by name, in the order in which a token meets them."""
        llm, heads = self.llm, self.llm.heads
        hidden, intermediate = llm.hidden_size, llm.intermediate_size
        attended, qkv = heads.query * heads.dim, (heads.query + 2 * heads.key_value) * heads.dim
        rotated = rope_order(self.rotated_heads, heads.dim, qkv)
        gated = swiglu_order(intermediate)
        found = (
            Product("qkv_proj", tuple(f"self_attn.{part}_proj" for part in "qkv"), qkv, hidden, rotated, qkv),
            Product("o_proj", ("self_attn.o_proj",), hidden, attended, plain_order(hidden), hidden),
            Product("gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), 2 * intermediate, hidden, gated, intermediate),
            Product("down_proj", ("mlp.down_proj",), hidden, intermediate, plain_order(hidden), hidden),
        )
        return {product.name: product for product in found}

    @property
    def rotated_heads(self) -> int:
        """Those of queries and keys, which come first in a row of q, k and v."""
        return self.llm.heads.query + self.llm.heads.key_value

    @property
    def head_rows(self) -> int:
        """Packed rows of lm_head."""
        return len(plain_order(self.llm.vocab_size))

    @property
    def head_columns(self) -> int:
        """Packed columns of lm_head."""
        return -(-self.llm.hidden_size // GROUP) * GROUP


def check_sizes(llm: LlmConfig) -> None:
    """Raises BackendError that names a size which the kernels cannot compute."""
    heads = llm.heads
    wanted = {
        "hidden_size": (llm.hidden_size, llm.hidden_size % GROUP == 0 and llm.hidden_size <= MAX_WIDTH),
        "num_attention_heads * head_dim": (heads.query * heads.dim, heads.query * heads.dim % GROUP == 0),
        "intermediate_size": (llm.intermediate_size, llm.intermediate_size % GROUP == 0),
    }
    for name, (value, fits) in wanted.items():
        if not fits:
            limit = f" up to {MAX_WIDTH:,}" if name == "hidden_size" else ""
            raise BackendError(
                f"the cuda engine cannot compute {name} {value:,}: its products take multiples of {GROUP}{limit}",
                "take another --backend",
            )
    if heads.dim % TILE:
        raise BackendError(
            f"the cuda engine cannot rotate a head_dim of {heads.dim}: expected a multiple of {TILE}",
            "take another --backend",
        )


def block(stored: StoredParameters, layout: DecoderLayout, layer: int) -> Arrays:
    """The arrays of one block, without its number. Raises BackendError if its linears are not in 4 bits, groups of 128."""
    llm, prefix = layout.llm, f"{architecture.LLM}.layers.{layer}"
    arrays: Arrays = {}
    for product in layout.products.values():
        weights = [_int4(stored, f"{prefix}.{linear}") for linear in product.linears]
        packed = pack(join(*weights), product.order)
        arrays |= _parts(product.name, packed)
    if llm.qkv_bias:
        heads = llm.heads
        sizes = (heads.query * heads.dim, heads.key_value * heads.dim, heads.key_value * heads.dim)
        qkv = layout.products["qkv_proj"]
        biases = [
            stored.float32(f"{prefix}.{linear}.bias", (size,)) for linear, size in zip(qkv.linears, sizes, strict=True)
        ]
        arrays["qkv_proj.bias"] = pack_bias(np.concatenate(biases), qkv.order)
    for name in NORMS:
        arrays |= _norm(stored, f"{prefix}.{name}", name, llm.hidden_size)
    return arrays


def rest(stored: StoredParameters, layout: DecoderLayout, scales: Mapping[str, NDArray[Any]]) -> Arrays:
    """What belongs to no block: the embedding table, the last norm, lm_head, the rope tables, a kv_cache's scales.

    `scales` are those of `kv_scales`, or none. Raises BackendError if lm_head is in 16 bits.
    """
    llm = layout.llm
    embeddings = stored.float32(f"{architecture.EMBED_TOKENS}.weight", (llm.vocab_size, llm.hidden_size))
    arrays: Arrays = {EMBED_TOKENS: embeddings.astype(np.float16)}
    head = w8_layout.pack(_head(stored, architecture.EMBED_TOKENS if llm.tie_word_embeddings else "llm.lm_head"))
    arrays |= _parts(LM_HEAD, head)
    arrays |= _norm(stored, f"{architecture.LLM}.norm", NORM, llm.hidden_size)
    tables = architecture.rope_table(0, llm.context_length, llm.head_dim, llm.rope)
    for name, table in zip((COSINES, SINES), tables, strict=True):
        arrays[name] = np.concatenate([table[:1], table])  # the row before the first is that of idle sequences, at -1
    if scales:
        for name, part in ((KEY_SCALES, "key"), (VALUE_SCALES, "value")):
            layers = [scales[kv_scales.name(part, layer)][0, :, 0] for layer in range(llm.num_hidden_layers)]
            arrays[name] = np.stack(layers).astype(np.float32)
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


def _parts(name: str, packed: Packed) -> Arrays:
    """The arrays of a packed weight, words as int32: files of tensors have no uint32."""
    return {
        f"{name}.{part}": value.view("<i4" if value.dtype == np.uint32 else value.dtype)
        for part, value in vars(packed).items()
    }


def _norm(stored: StoredParameters, parameter: str, name: str, width: int) -> Arrays:
    """As the RMSNorm kernel takes it (`weight`), and as the products do (`gamma`, to be multiplied by `scale`)."""
    weight = stored.float32(f"{parameter}.weight", (width,))
    gamma, scale = fold_gamma(weight)
    return {
        f"{name}.weight": weight.astype(np.float16),
        f"{name}.gamma": gamma,
        f"{name}.scale": np.asarray([scale], np.float32),
    }


def _int4(stored: StoredParameters, linear: str, remedy: str = "--quant int4", forms: str = "4 bits") -> Int4:
    try:
        weight = stored.int4(linear)
    except KeyError:
        raise BackendError(
            f"{linear} is stored in floats: the cuda engine takes {forms}", f"{_EXPORT} {remedy}"
        ) from None
    group_size = weight.q.shape[1] // weight.scales.shape[1]
    if group_size != GROUP:
        raise BackendError(
            f"{linear} has a group_size of {group_size}: the cuda engine takes {GROUP}", f"{_EXPORT} -g {GROUP}"
        )
    return weight


def _head(stored: StoredParameters, linear: str) -> Int8:
    """lm_head in 8 bits. One in 4 bits is the same numbers in 8, since q - zero is within -15 and 15."""
    try:
        return stored.int8(linear)
    except KeyError:
        weight = _int4(stored, linear, "--lm-head int8", "8 or 4 bits")
    zeros = np.repeat(weight.zeros, GROUP, 1).astype(np.int16)
    return Int8((weight.q - zeros + int8.MIDDLE).astype(np.uint8), weight.scales)
