"""Decoders that are measured: the models of `bench kernels`, with what a whole decoder needs beyond its products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vila_edge.bench.kernels import shapes
from vila_edge.bench.kernels.shapes import Model, Projection
from vila_edge.config import LlmConfig, RopeConfig


@dataclass(frozen=True)
class DecoderModel:
    """A decoder, and the projector before it: the first that `bench kernels` has of the model."""

    name: str
    llm: LlmConfig
    projection: Projection


def _llm(
    model: Model,
    model_type: Literal["llama", "qwen2"],
    context_length: int,
    rope_theta: float,
    **more: Any,
) -> LlmConfig:
    return LlmConfig(
        model_type=model_type,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads.query,
        num_key_value_heads=model.heads.key_value,
        head_dim=model.heads.dim,
        vocab_size=model.vocab_size,
        context_length=context_length,
        rms_norm_eps=1e-6 if model_type == "qwen2" else 1e-5,
        rope=RopeConfig(rope_theta),
        **{"tie_word_embeddings": False, **more},
    )


def _models() -> tuple[DecoderModel, ...]:
    known = {model.name: model for model in shapes.MODELS}
    decoders = {
        "NVILA-2B": _llm(known["NVILA-2B"], "qwen2", 8192, 1e6, tie_word_embeddings=True),
        "VILA1.5-3B": _llm(known["VILA1.5-3B"], "llama", 4096, 1e4),
        "VILA1.5-8B": _llm(known["VILA1.5-8B"], "llama", 8192, 5e5),
        "NVILA-8B": _llm(known["NVILA-8B"], "qwen2", 8192, 1e6),
    }
    projections = {projection.model: projection for projection in reversed(shapes.PROJECTIONS)}
    return tuple(DecoderModel(name, llm, projections[name]) for name, llm in decoders.items())


MODELS = _models()


def chosen(names: Sequence[str], models: Sequence[DecoderModel] = MODELS) -> list[DecoderModel]:
    """Those of these names, all if there are none. Raises ValueError for one that is not there."""
    known = {model.name: model for model in models}
    for name in names:
        if name not in known:
            raise ValueError(f"no model {name!r}: expected one of {', '.join(known)}")
    return [model for model in models if not names or model.name in names]
