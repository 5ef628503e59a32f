"""Inputs and outputs of each graph: names, types and shapes, written once for writer and engine.

A dimension that is a string varies from call to call: `images` N, `sequence` S, `capacity` of the kv_cache,
`kept` positions whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vila_edge.config import VilaConfig

Dimension = int | str


@dataclass(frozen=True)
class Binding:
    """One named input or output."""

    name: str
    dtype: Literal["float32", "int32", "int64"]
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
LOGITS_TO_KEEP = "logits_to_keep"
LOGITS = "logits"


def vision_tower(cfg: VilaConfig) -> GraphBindings:
    tower = cfg.vision_tower
    pixels = Binding(PIXEL_VALUES, "float32", ("images", 3, tower.image_size, tower.image_size))
    features = Binding(IMAGE_FEATURES, "float32", ("images", tower.num_features, tower.hidden_size))
    return GraphBindings((pixels,), (features,))


def mm_projector(cfg: VilaConfig) -> GraphBindings:
    features = Binding(IMAGE_FEATURES, "float32", ("images", cfg.vision_tower.num_features, cfg.mm_hidden_size))
    embeds = Binding(IMAGE_EMBEDS, "float32", ("images", cfg.tokens_per_image, cfg.llm.hidden_size))
    return GraphBindings((features,), (embeds,))


def decoder(cfg: VilaConfig) -> GraphBindings:
    """One graph for prefill and decode: S new positions go behind those already in the kv_cache.

    `total_length` counts all positions after this call, `last_position` [1] is one less (two forms of one fact,
    as GroupQueryAttention wants it). Logits [kept, V] are those of the new positions `logits_to_keep`.
    """
    hidden, vocabulary = cfg.llm.hidden_size, cfg.llm.vocab_size
    cache = kv_cache(cfg)
    return GraphBindings(
        (
            Binding(INPUTS_EMBEDS, "float32", (1, "sequence", hidden)),
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


def kv_cache(cfg: VilaConfig) -> tuple[Binding, ...]:
    """Keys and values of each layer; `past_` and `present_` of one name are the same buffer."""
    shape = (1, cfg.llm.num_key_value_heads, "capacity", cfg.llm.head_dim)
    names = (f"{part}_{layer}" for layer in range(cfg.llm.num_hidden_layers) for part in ("key", "value"))
    return tuple(Binding(name, "float32", shape) for name in names)
