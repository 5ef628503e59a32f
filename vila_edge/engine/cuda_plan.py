"""How much memory a bundle takes with our own kernels on a GPU. Nothing of it was measured on a GPU.

Known: the weights as the kernels read them, the kv_cache, and what goes from launch to launch. Estimated: the vision
tower, which another runtime has. Not counted: what CUDA and that runtime take for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

from vila_edge import architecture
from vila_edge.config import VilaConfig
from vila_edge.engine.gpu_plan import HALF, tensorrt_weights, tile_bytes
from vila_edge.engine.plan import FLOAT, PROGRAM, Backend, Memory
from vila_edge.errors import BackendError
from vila_edge.inventory import Part
from vila_edge.kernels import attention
from vila_edge.kernels.attention import AttentionShape, KvCache
from vila_edge.kernels.decoder import CHUNK
from vila_edge.kernels.decoder import Memory as Scratch
from vila_edge.kernels.decoder_weights import DecoderLayout, check_sizes
from vila_edge.kernels.w4_layout import GROUP
from vila_edge.parameters import component, is_quantised


def runs_on_kernels(cfg: VilaConfig, parts: Mapping[str, Part]) -> bool:
    """Whether the cuda engine takes a bundle: its sizes, and the forms of its weights."""
    head = f"{architecture.EMBED_TOKENS}.weight" if cfg.llm.tie_word_embeddings else "llm.lm_head.weight"
    try:
        check_sizes(cfg.llm)
        AttentionShape(cfg.llm.heads, "float16")
    except (BackendError, ValueError):
        return False
    blocks = (part for part in parts.values() if is_quantised(part.name))
    return parts[head].group_size == GROUP and all(part.form == "int4" and part.group_size == GROUP for part in blocks)


def cuda_plan(cfg: VilaConfig, parts: Mapping[str, Part], backend: Backend, context: int, tiles: int) -> Memory:
    """The memory of a process with what it has on a GPU. `backend`: cuda, or `cuda, int8` for that kv_cache."""
    kv: KvCache = "int8" if backend == "cuda, int8" else "float16"
    layout, shape = DecoderLayout(cfg.llm), AttentionShape(cfg.llm.heads, kv)
    projector = HALF * sum(part.numbers for part in parts.values() if component(part.name) == "mm_projector")
    weights = decoder_bytes(layout) + projector + tensorrt_weights(cfg, parts, "vision_tower")
    kv_cache = cfg.llm.num_hidden_layers * shape.layer_bytes(context)
    scratch = Scratch.sizes(layout, shape, min(CHUNK, context), attention.splits(context))
    images = tiles * tile_bytes(cfg, HALF)
    total = PROGRAM + weights + kv_cache + sum(scratch.values()) + images
    return Memory(backend, context, weights, 0, kv_cache, sum(scratch.values()), images, total, measured=False)


def decoder_bytes(layout: DecoderLayout) -> int:
    """Of the decoder's weights as they are packed, with the embedding table, without its norms and biases."""
    llm = layout.llm
    groups = sum(product.packed_rows * product.inputs // GROUP for product in layout.products.values())
    block = groups * (GROUP // 2 + HALF + 1)  # integers, a scale, a zero point
    head = layout.head_rows * layout.head_columns // GROUP * (GROUP + HALF)
    table, rope = HALF * llm.vocab_size * llm.hidden_size, FLOAT * (llm.context_length + 1) * llm.head_dim
    return llm.num_hidden_layers * block + head + table + rope
