"""Random weights in place of a bundle's, packed as `kernels.decoder_weights` packs them.

An array is a window that moves over a page of random numbers, a step for each of its rows: made in a moment, different
from row to row, and no larger than a row and the steps. All blocks share their pages on the host; on the GPU each has
memory of its own. Scales are such that a product of numbers around 1 gives numbers around 1, so logits stay finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vila_edge import architecture
from vila_edge.config import LlmConfig
from vila_edge.engine.cuda.packed_weights import REST
from vila_edge.kernels import decoder_weights, w4_layout, w8_layout
from vila_edge.kernels.decoder_weights import (
    COSINES,
    EMBED_TOKENS,
    KEY_SCALES,
    LM_HEAD,
    NORM,
    NORMS,
    SINES,
    VALUE_SCALES,
    Arrays,
    DecoderLayout,
)

LARGEST_CACHED = 8.0  # of a key or value that a kv_cache in int8 holds: several times what comes
_SPREAD_4 = math.sqrt(np.arange(16).var())  # of random integers of 4 bits around their zero point
_SPREAD_8 = math.sqrt(np.arange(256).var())
_ALIGNED = 64  # numbers of a step of the window, at most

Draw = Callable[[np.random.Generator, int], NDArray[Any]]


class RandomWeights:
    """A stand-in for `PackedWeights`."""

    origin = "random weights, made on the spot"

    def __init__(self, llm: LlmConfig) -> None:
        """Raises BackendError if the kernels cannot compute such a decoder."""
        decoder_weights.check_sizes(llm)
        self.layout = DecoderLayout(llm)

    def __iter__(self) -> Iterator[tuple[str, Arrays]]:
        """Each part with its arrays, which nobody may write to."""
        block = self.block()
        for layer in range(self.layout.llm.num_hidden_layers):
            yield f"layers.{layer}", block
        yield REST, self.rest()

    def block(self) -> Arrays:
        """The arrays of any block."""
        llm, arrays = self.layout.llm, Arrays()
        for product in self.layout.products.values():
            shapes = w4_layout.shapes(product.packed_rows, product.inputs)
            drawn = _int4(product.inputs)
            arrays |= {f"{product.name}.{part}": _random(shape, *drawn[part]) for part, shape in shapes.items()}
        if llm.qkv_bias:
            arrays["qkv_proj.bias"] = np.zeros(self.layout.products["qkv_proj"].packed_rows, np.float32)
        for name in NORMS:
            arrays |= _norm(name, llm.hidden_size)
        return arrays

    def rest(self) -> Arrays:
        """What belongs to no block, with scales for a kv_cache in int8."""
        layout, llm = self.layout, self.layout.llm
        shapes, drawn = w8_layout.shapes(layout.head_rows, layout.head_columns), _int8(llm.hidden_size)
        arrays = {EMBED_TOKENS: _random((llm.vocab_size, llm.hidden_size), _normal, "float16")}
        arrays |= {f"{LM_HEAD}.{part}": _random(shape, *drawn[part]) for part, shape in shapes.items()}
        arrays |= _norm(NORM, llm.hidden_size)
        tables = architecture.rope_table(0, llm.context_length, llm.head_dim, llm.rope)
        for name, table in zip((COSINES, SINES), tables, strict=True):
            arrays[name] = np.concatenate([table[:1], table])
        scales = (llm.num_hidden_layers, llm.num_key_value_heads, llm.head_dim)
        return arrays | {name: np.full(scales, LARGEST_CACHED / 127, np.float32) for name in (KEY_SCALES, VALUE_SCALES)}


def step_bytes(weights: RandomWeights, batch: int) -> int:
    """Bytes of the weights that a step of decode reads: each once, and a row of the embeddings for each sequence."""
    block, rest = weights.block(), weights.rest()
    head = sum(array.nbytes for name, array in rest.items() if name.startswith((f"{LM_HEAD}.", f"{NORM}.gamma")))
    # `weight` of a norm is for prefill, `scale` is an argument
    read = sum(array.nbytes for name, array in block.items() if not name.endswith((".weight", ".scale")))
    table = rest[EMBED_TOKENS]
    return weights.layout.llm.num_hidden_layers * read + head + batch * table.nbytes // len(table)


def _int4(inputs: int) -> dict[str, tuple[Draw, DTypeLike]]:
    return {
        "qweight": (_words, "int32"),
        "scales": (_scales(_SPREAD_4, inputs), "float16"),
        "qzeros": (lambda rng, count: rng.integers(7, 9, count), "uint8"),
    }


def _int8(inputs: int) -> dict[str, tuple[Draw, DTypeLike]]:
    return {"qweight": (_words, "int32"), "scales": (_scales(_SPREAD_8, inputs), "float16")}


def _words(rng: np.random.Generator, count: int) -> NDArray[Any]:
    return rng.integers(-(2**31), 2**31, count)


def _normal(rng: np.random.Generator, count: int) -> NDArray[Any]:
    return rng.standard_normal(count, np.float32)


def _scales(spread: float, inputs: int) -> Draw:
    return lambda rng, count: rng.uniform(0.8, 1.2, count) / (spread * math.sqrt(inputs))


def _norm(name: str, width: int) -> Arrays:
    ones = np.ones(width, np.float16)
    return {f"{name}.weight": ones, f"{name}.gamma": ones, f"{name}.scale": np.ones(1, np.float32)}


def _random(shape: tuple[int, ...], draw: Draw, dtype: DTypeLike) -> NDArray[Any]:
    """A window over a page, which moves on by a step from each entry of the first axis to the next."""
    row = math.prod(shape[1:])
    step = min(row, _ALIGNED)
    page = draw(np.random.default_rng(0), row + step * (shape[0] - 1)).astype(dtype)
    inner = np.zeros(shape[1:], dtype).strides
    return np.lib.stride_tricks.as_strided(page, shape, (step * page.itemsize, *inner), writeable=False)
