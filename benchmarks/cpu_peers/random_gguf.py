"""A GGUF file of noise for llama.cpp, of the same dimensions as the bundle. Needs the package gguf, and numpy.

    python -m benchmarks.cpu_peers.random_gguf FILE SHAPE TYPE      TYPE: Q4_0 (symmetric) or Q4_1 (with minima)

The linears of the blocks are of TYPE; output.weight is Q8_0, as lm_head has 8 bits in the bundle; token_embd.weight
is F16, as the bundle stores it; norms are F32. There is no tokenizer: llama-bench draws token ids. One tensor is in
memory at a time.
"""

from __future__ import annotations

import importlib
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cpu_peers.shape import Shape

BLOCK = 32  # numbers that share a scale, in each of these types
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "F16": 2 * BLOCK, "F32": 4 * BLOCK}  # of one block
SPREAD = {"Q4_0": 4.6, "Q4_1": 4.6, "Q8_0": 73.9}  # standard deviation of integers of which each is as likely


def tensors(shape: Shape, kind: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape [rows, columns] and type of every tensor, in the order in which they are written."""
    width, inner = shape.hidden_size, shape.intermediate_size
    query, shared = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found: dict[str, tuple[tuple[int, ...], str]] = {"token_embd.weight": ((shape.vocab_size, width), "F16")}
    for layer in range(shape.layers):
        block = {
            "attn_norm": ((width,), "F32"),
            "attn_q": ((query, width), kind),
            "attn_k": ((shared, width), kind),
            "attn_v": ((shared, width), kind),
            "attn_output": ((width, query), kind),
            "ffn_norm": ((width,), "F32"),
            "ffn_gate": ((inner, width), kind),
            "ffn_up": ((inner, width), kind),
            "ffn_down": ((width, inner), kind),
        }
        found |= {f"blk.{layer}.{name}.weight": spec for name, spec in block.items()}
    return found | {"output_norm.weight": ((width,), "F32"), "output.weight": ((shape.vocab_size, width), "Q8_0")}


def noise(name: str, shape: tuple[int, ...], kind: str) -> NDArray[Any]:
    """One tensor as it is stored: floats, or the bytes [rows, bytes of a row] of its blocks."""
    rng, count = np.random.default_rng(zlib.crc32(name.encode())), math.prod(shape)
    if kind in ("F16", "F32"):
        mean, spread = (1.0, 0.1) if "norm" in name else (0.0, 0.05)
        values = rng.standard_normal(count, np.float32) * np.float32(spread) + np.float32(mean)
        return values.astype(np.float16 if kind == "F16" else np.float32).reshape(shape)
    columns, size = shape[-1], BYTES[kind]
    blocks = np.frombuffer(rng.bytes(count // BLOCK * size), np.uint8).reshape(-1, size).copy()
    typical = 1 / (SPREAD[kind] * math.sqrt(columns))
    scales = rng.uniform(0.8 * typical, 1.2 * typical, (len(blocks), 1)).astype("<f2")
    blocks[:, :2] = scales.view(np.uint8)
    if kind == "Q4_1":  # minima, so that the middle of 0..15 stands for zero
        blocks[:, 2:4] = (-7.5 * scales).astype("<f2").view(np.uint8)
    return blocks.reshape(shape[0], columns // BLOCK * size)


def write(target: Path, shape: Shape, kind: str) -> None:
    """The file, which appears when it is whole."""
    gguf: Any = importlib.import_module("gguf")
    beside = target.with_name(f".{target.name}.partial")
    writer = gguf.GGUFWriter(beside, "llama")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    specs = tensors(shape, kind)
    for name, (dimensions, stored) in specs.items():
        size = math.prod(dimensions) // BLOCK * BYTES[stored]
        floats = np.dtype(np.float32)  # any but uint8, which would ask for the shape in bytes
        writer.add_tensor_info(name, dimensions, floats, size, getattr(gguf.GGMLQuantizationType, stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, spec in specs.items():
        writer.write_tensor_data(noise(name, *spec))
    writer.close()
    beside.replace(target)


if __name__ == "__main__":
    file, dimensions_json, kind_name = sys.argv[1:]
    try:
        write(Path(file), Shape.from_json(dimensions_json), kind_name)
    except ModuleNotFoundError as error:
        sys.exit(f"{sys.executable} has no {error.name}: pip install gguf, or name another with --gguf-python")
