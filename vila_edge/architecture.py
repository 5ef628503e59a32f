"""VILA, written once: a vision tower, a projector and a decoder over named parameters.

Every function takes `ops`, an interpreter of a dozen tensor verbs, and runs under all of them: numpy
(the oracle), torch (calibration and reference), ONNX (the graphs) and shapes (names and sizes of the
parameters). New behaviour overrides a verb; it adds neither a flag nor a second model.

A parameter is named by the folder of the VILA1.5 layout and its name inside: `llm.model.norm.weight` is
`model.norm.weight` in `llm/`.

Shapes: N images, P patches, T tokens per image, B batch, S sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vila_edge.config import Activation, Heads, LlmConfig, RopeConfig, TokenOrder, VilaConfig, VisionConfig

T = TypeVar("T")

VISION_TOWER = "vision_tower.vision_model"
MM_PROJECTOR = "mm_projector.layers"
LLM = "llm.model"
EMBED_TOKENS = f"{LLM}.embed_tokens"
PROJECTOR_EPS = 1e-5  # torch's default, which the original projector uses


class Ops(Protocol[T]):
    """The verbs an interpreter supplies. `name` is a parameter's name without `.weight` or `.bias`."""

    def linear(self, x: T, name: str, out: int, bias: bool = True) -> T: ...
    def embedding(self, ids: T, name: str, rows: int, width: int) -> T: ...
    def patch_embedding(self, pixel_values: T, name: str, patch: int, width: int, bias: bool) -> T: ...
    def class_embedding(self, x: T, name: str) -> T: ...
    def position_embedding(self, x: T, name: str) -> T: ...
    def layer_norm(self, x: T, name: str, eps: float) -> T: ...
    def rms_norm(self, x: T, name: str, eps: float) -> T: ...
    def drop_first(self, x: T) -> T: ...
    def gelu(self, x: T, approximate: Literal["none", "tanh"]) -> T: ...
    def quick_gelu(self, x: T) -> T: ...
    def silu(self, x: T) -> T: ...
    def add(self, a: T, b: T) -> T: ...
    def mul(self, a: T, b: T) -> T: ...
    def space_to_depth(self, x: T, grid: int, block: int, order: TokenOrder) -> T: ...
    def attention(self, q: T, k: T, v: T, heads: Heads) -> T: ...
    def cached_attention(self, q: T, k: T, v: T, heads: Heads, rope: RopeConfig, layer: int) -> T: ...


def vision_tower(ops: Ops[T], pixel_values: T, cfg: VisionConfig) -> T:
    """pixel_values [N, 3, H, W] to image_features [N, P, D]: the selected hidden states, without the final norm."""
    embeddings = f"{VISION_TOWER}.embeddings"
    has_class = cfg.has_class_token
    x = ops.patch_embedding(
        pixel_values, f"{embeddings}.patch_embedding", cfg.patch_size, cfg.hidden_size, bias=not has_class
    )
    if has_class:
        x = ops.class_embedding(x, f"{embeddings}.class_embedding")
    x = ops.position_embedding(x, f"{embeddings}.position_embedding")
    if has_class:
        x = ops.layer_norm(x, f"{VISION_TOWER}.pre_layrnorm", cfg.layer_norm_eps)
    for layer in range(cfg.num_layers_run):
        x = encoder_layer(ops, x, layer, cfg)
    return ops.drop_first(x) if has_class and cfg.select_feature == "patch" else x


def encoder_layer(ops: Ops[T], x: T, layer: int, cfg: VisionConfig) -> T:
    """One pre-norm block with bidirectional attention: [N, P, D] to [N, P, D]."""
    p = f"{VISION_TOWER}.encoder.layers.{layer}"
    h = ops.layer_norm(x, f"{p}.layer_norm1", cfg.layer_norm_eps)
    q, k, v = (ops.linear(h, f"{p}.self_attn.{part}_proj", cfg.hidden_size) for part in "qkv")
    h = ops.linear(ops.attention(q, k, v, cfg.heads), f"{p}.self_attn.out_proj", cfg.hidden_size)
    x = ops.add(x, h)
    h = ops.layer_norm(x, f"{p}.layer_norm2", cfg.layer_norm_eps)
    h = activation(ops, ops.linear(h, f"{p}.mlp.fc1", cfg.intermediate_size), cfg.hidden_act)
    return ops.add(x, ops.linear(h, f"{p}.mlp.fc2", cfg.hidden_size))


def activation(ops: Ops[T], x: T, hidden_act: Activation) -> T:
    """The activation by its name in a config.json."""
    if hidden_act == "quick_gelu":
        return ops.quick_gelu(x)
    return ops.gelu(x, "tanh" if hidden_act == "gelu_pytorch_tanh" else "none")


def mm_projector(ops: Ops[T], image_features: T, cfg: VilaConfig) -> T:
    """image_features [N, P, D_vision] to image_embeds [N, T, D]."""
    hidden_size = cfg.llm.hidden_size
    if cfg.mm_projector.downsample > 1:
        return _downsampling_projector(ops, image_features, cfg)
    if cfg.mm_projector.mm_projector_type == "linear":
        return ops.linear(image_features, MM_PROJECTOR, hidden_size)
    x = ops.linear(image_features, f"{MM_PROJECTOR}.0", hidden_size)
    for depth in range(1, cfg.mm_projector.mlp_depth):
        x = ops.linear(ops.gelu(x, "none"), f"{MM_PROJECTOR}.{2 * depth}", hidden_size)
    return x


def _downsampling_projector(ops: Ops[T], image_features: T, cfg: VilaConfig) -> T:
    """Fold neighbouring patches, then norm, linear and GELU for each hidden width, then a last linear.

    The names count the modules of the original: 0 folds, a GELU takes a number too.
    """
    projector, hidden_size = cfg.mm_projector, cfg.llm.hidden_size
    order = cfg.profile.token_order if projector.mm_projector_type == "mlp_downsample" else "row_major"
    x = ops.space_to_depth(image_features, cfg.vision_tower.grid_size, projector.downsample, order)
    index = 1
    for width in projector.hidden_widths(cfg.mm_hidden_size, hidden_size):
        x = ops.layer_norm(x, f"{MM_PROJECTOR}.{index}", PROJECTOR_EPS)
        x = ops.gelu(ops.linear(x, f"{MM_PROJECTOR}.{index + 1}", width), "none")
        index += 3
    return ops.linear(x, f"{MM_PROJECTOR}.{index}", hidden_size)


def embed_tokens(ops: Ops[T], input_ids: T, cfg: LlmConfig) -> T:
    """input_ids [B, S] to inputs_embeds [B, S, D]."""
    return ops.embedding(input_ids, EMBED_TOKENS, cfg.vocab_size, cfg.hidden_size)


def decoder(ops: Ops[T], inputs_embeds: T, cfg: LlmConfig) -> T:
    """inputs_embeds [B, S, D] to the last hidden states [B, S, D], after the final norm."""
    x = inputs_embeds
    for layer in range(cfg.num_hidden_layers):
        x = decoder_layer(ops, x, layer, cfg)
    return ops.rms_norm(x, f"{LLM}.norm", cfg.rms_norm_eps)


def decoder_layer(ops: Ops[T], x: T, layer: int, cfg: LlmConfig) -> T:
    """One block with causal attention over the kv_cache: [B, S, D] to [B, S, D]."""
    p = f"{LLM}.layers.{layer}"
    x = ops.add(x, self_attention(ops, ops.rms_norm(x, f"{p}.input_layernorm", cfg.rms_norm_eps), layer, cfg))
    return ops.add(x, mlp(ops, ops.rms_norm(x, f"{p}.post_attention_layernorm", cfg.rms_norm_eps), layer, cfg))


def self_attention(ops: Ops[T], h: T, layer: int, cfg: LlmConfig) -> T:
    """The attention branch of a block, from its normalised input: [B, S, D] to [B, S, D]."""
    p, heads = f"{LLM}.layers.{layer}.self_attn", cfg.heads
    q = ops.linear(h, f"{p}.q_proj", heads.query * heads.dim, cfg.qkv_bias)
    k, v = (ops.linear(h, f"{p}.{part}_proj", heads.key_value * heads.dim, cfg.qkv_bias) for part in "kv")
    h = ops.cached_attention(q, k, v, heads, cfg.rope, layer)
    return ops.linear(h, f"{p}.o_proj", cfg.hidden_size, bias=False)


def mlp(ops: Ops[T], h: T, layer: int, cfg: LlmConfig) -> T:
    """The SwiGLU branch of a block, from its normalised input: [B, S, D] to [B, S, D]."""
    p = f"{LLM}.layers.{layer}.mlp"
    gate = ops.silu(ops.linear(h, f"{p}.gate_proj", cfg.intermediate_size, bias=False))
    up = ops.linear(h, f"{p}.up_proj", cfg.intermediate_size, bias=False)
    return ops.linear(ops.mul(gate, up), f"{p}.down_proj", cfg.hidden_size, bias=False)


def lm_head(ops: Ops[T], hidden_states: T, cfg: LlmConfig) -> T:
    """Hidden states [B, S, D] to logits [B, S, V]. Tied embeddings: the embedding table is the head."""
    name = EMBED_TOKENS if cfg.tie_word_embeddings else "llm.lm_head"
    return ops.linear(hidden_states, name, cfg.vocab_size, bias=False)


def rope_table(start: int, stop: int, dim: int, rope: RopeConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines [stop - start, dim / 2] of the rotary embedding, positions start..stop-1.

    Angles are float32 products of float32 factors, as in the original: at position 4096 a more exact
    angle is visibly another one.
    """
    frequencies = (rope.rope_theta ** -(np.arange(dim // 2) / (dim // 2))).astype(np.float32)
    positions = np.arange(start, stop, dtype=np.float32)
    if rope.rope_type == "linear":
        positions = positions / np.float32(rope.factor)
    elif rope.rope_type == "llama3":
        frequencies = _llama3_frequencies(frequencies, rope)
    angles = positions[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def _llama3_frequencies(frequencies: NDArray[np.float32], rope: RopeConfig) -> NDArray[np.float32]:
    """Llama 3.1's rule: a wave that fits into the original context often enough keeps its frequency."""
    waves = rope.original_max_position_embeddings * frequencies / np.float32(2 * np.pi)  # per original context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((waves - low) / (high - low), 0, 1)  # 1: as it is, 0: divided by the factor
    return (frequencies * kept + frequencies / rope.factor * (1 - kept)).astype(np.float32)
