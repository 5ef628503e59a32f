"""Inputs and outputs of each graph: names, types and shapes, written once for writer and engine.

A dimension that is a string varies from call to call: `images` N, `sequence` S, `capacity` of the kv_cache,
`past` positions that are in it, `kept` positions whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vila_edge.config import VilaConfig

Dimension = int | str
CacheType = Literal["float32", "float16", "int8"]  # of onnxruntime's kv_cache
Activations = Literal["float32", "float16"]  # what a graph computes in

# Bytes of one constant of a graph, and of one piece of a GPU's memory, at most: near its limit a device has no larger gap.
MAX_ALLOCATION = 512 << 20


@dataclass(frozen=True)
class Binding:
    """One named input or output."""

    name: str
    dtype: Literal["float32", "float16", "int8", "int32", "int64"]
    shape: tuple[Dimension, ...]

    def sized(self, **dimensions: int) -> tuple[int, ...]:
        """The shape with a number for each dimension that varies."""
        return tuple(dimensions[d] if isinstance(d, str) else d for d in self.shape)


@dataclass(frozen=True)
class GraphBindings:
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]


PIXEL_VALUES = "pixel_values"
IMAGE_FEATURES = "image_features"
IMAGE_EMBEDS = "image_embeds"
INPUTS_EMBEDS = "inputs_embeds"
LAST_POSITION = "last_position"
TOTAL_LENGTH = "total_length"
POSITION_IDS = "position_ids"
LOGITS_TO_KEEP = "logits_to_keep"
LOGITS = "logits"


def vision_tower(cfg: VilaConfig, activations: Activations = "float32") -> GraphBindings:
    """Pixels are float32 in every dialect, features what the graph computes in."""
    tower = cfg.vision_tower
    pixels = Binding(PIXEL_VALUES, "float32", ("images", 3, tower.image_size, tower.image_size))
    features = Binding(IMAGE_FEATURES, activations, ("images", tower.num_features, tower.hidden_size))
    return GraphBindings((pixels,), (features,))


def mm_projector(cfg: VilaConfig, activations: Activations = "float32") -> GraphBindings:
    features = Binding(IMAGE_FEATURES, activations, ("images", cfg.vision_tower.num_features, cfg.mm_hidden_size))
    embeds = Binding(IMAGE_EMBEDS, activations, ("images", cfg.tokens_per_image, cfg.llm.hidden_size))
    return GraphBindings((features,), (embeds,))


def decoder(cfg: VilaConfig, cache_type: CacheType = "float32") -> GraphBindings:
    """One graph for prefill and decode: S new positions go behind those already in the kv_cache.

    `total_length` counts all positions after this call, `last_position` [1] is one less (two forms of one fact,
    as GroupQueryAttention wants it). Logits [kept, V] are those of the new positions `logits_to_keep`. With a
    kv_cache in float16 activations are float16 as well, for a GPU.
    """
    activations: Activations = "float16" if cache_type == "float16" else "float32"
    hidden, vocabulary = cfg.llm.hidden_size, cfg.llm.vocab_size
    cache = kv_cache(cfg, cache_type)
    return GraphBindings(
        (
            Binding(INPUTS_EMBEDS, activations, (1, "sequence", hidden)),
            Binding(LAST_POSITION, "int32", (1,)),
            Binding(TOTAL_LENGTH, "int32", ()),
            Binding(LOGITS_TO_KEEP, "int64", ("kept",)),
            *(Binding(f"past_{b.name}", b.dtype, b.shape) for b in cache),
        ),
        (
            Binding(LOGITS, "float32", (1, "kept", vocabulary)),
            *(Binding(f"present_{b.name}", b.dtype, b.shape) for b in cache),
        ),
    )


def decoder_scatter(cfg: VilaConfig, capacity: int) -> GraphBindings:
    """TensorRT's decoder that writes into a kv_cache of a fixed `capacity` (form `scatter`).

    `position_ids` are those of the new positions, in sequence; the first says where they go in the cache.
    `present_` and `past_` of one name are the same memory.
    """
    shape = (1, cfg.llm.num_key_value_heads, capacity, cfg.llm.head_dim)
    names = _layer_tensors(cfg)
    return GraphBindings(
        (*_decoder_inputs(cfg), *(Binding(f"past_{name}", "float16", shape) for name in names)),
        (_logits(cfg), *(Binding(f"present_{name}", "float16", shape) for name in names)),
    )


def decoder_append(cfg: VilaConfig) -> GraphBindings:
    """TensorRT's decoder that reads the filled part of a kv_cache and returns what is new (form `append`).

    Keys and values are [1, positions, H_kv, dim]: the filled part of a buffer is one piece of memory, and the
    outputs `new_` belong right behind it. `past` may be 0. `position_ids` are those of the new positions.
    """
    heads, dim = cfg.llm.num_key_value_heads, cfg.llm.head_dim
    names = _layer_tensors(cfg)
    return GraphBindings(
        (*_decoder_inputs(cfg), *(Binding(f"past_{name}", "float16", (1, "past", heads, dim)) for name in names)),
        (_logits(cfg), *(Binding(f"new_{name}", "float16", (1, "sequence", heads, dim)) for name in names)),
    )


def kv_cache(cfg: VilaConfig, cache_type: CacheType = "float32") -> tuple[Binding, ...]:
    """Keys and values of each layer; `past_` and `present_` of one name are the same buffer."""
    shape = (1, cfg.llm.num_key_value_heads, "capacity", cfg.llm.head_dim)
    return tuple(Binding(name, cache_type, shape) for name in _layer_tensors(cfg))


def _layer_tensors(cfg: VilaConfig) -> list[str]:
    return [f"{part}_{layer}" for layer in range(cfg.llm.num_hidden_layers) for part in ("key", "value")]


def _decoder_inputs(cfg: VilaConfig) -> tuple[Binding, ...]:
    return (
        Binding(INPUTS_EMBEDS, "float16", (1, "sequence", cfg.llm.hidden_size)),
        Binding(POSITION_IDS, "int64", (1, "sequence")),
        Binding(LOGITS_TO_KEEP, "int64", ("kept",)),
    )


def _logits(cfg: VilaConfig) -> Binding:
    return Binding(LOGITS, "float32", (1, "kept", cfg.llm.vocab_size))
