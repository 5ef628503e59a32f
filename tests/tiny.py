"""The tiny VILA of the tests, and random weights for any VILA."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.config import (
    LlmConfig,
    PreprocessConfig,
    ProjectorConfig,
    RopeConfig,
    TokenizerConfig,
    VilaConfig,
    VisionConfig,
)
from vila_edge.micro.tokens import BOS, VOCAB_SIZE
from vila_edge.parameters import parameter_shapes
from vila_edge.profiles import VILA_1_5

# An odd grid (5 x 5 patches, 45 pixels of 9) so that padding shows, and grouped queries (4 heads on 2).
TINY = VilaConfig(
    vision_tower=VisionConfig(
        model_type="siglip_vision_model",
        hidden_act="gelu_pytorch_tanh",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=46,
        patch_size=9,
        layer_norm_eps=1e-6,
        select_layer=-2,
        select_feature="cls_patch",
    ),
    mm_projector=ProjectorConfig("mlp_downsample"),
    llm=LlmConfig(
        model_type="llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCAB_SIZE,
        context_length=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(rope_theta=10_000.0),
        tie_word_embeddings=False,
    ),
    preprocess=PreprocessConfig(
        image_aspect_ratio="resize",
        image_size=46,
        rescale_factor=1 / 255,
        image_mean=(0.5, 0.4, 0.3),
        image_std=(0.5, 0.6, 0.7),
    ),
    profile=dataclasses.replace(VILA_1_5, template="vicuna_v1_nosys"),
    tokenizer=TokenizerConfig(bos_token=BOS),
)


def random_parameters(cfg: VilaConfig, seed: int = 0, dtype: Any = np.float32) -> dict[str, NDArray[Any]]:
    """Noise of 0.1 around 1 for the norms' weights and around 0 for the rest; embeddings of 0.5."""
    rng = np.random.default_rng(seed)
    parameters = {}
    for name, shape in parameter_shapes(cfg).items():
        noise = rng.standard_normal(shape) * (0.5 if "embed_tokens" in name else 0.1)
        is_norm = "norm" in name and name.endswith("weight")
        parameters[name] = (noise + is_norm).astype(dtype)
    return parameters
