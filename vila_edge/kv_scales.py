"""A kv_cache in 8 bits: keys and values are rounded to steps that are fixed when a bundle is made.

Each channel of each key_value head has a step of its own, `scale`, and a key or value is stored as
`clip(round(x / scale), -128, 127)`. Scales [1, H_kv, 1, dim] float32 are stored as `kv_cache.key_scale_0`,
`kv_cache.value_scale_0`, ... of each layer, which is also how onnxruntime's `GroupQueryAttention` reads them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vila_edge.config import LlmConfig
from vila_edge.tensorfile import Spec

PREFIX = "kv_cache."
HEADROOM = 1.25  # a conversation's keys may be larger than the largest that an export saw
MAX_INT = 127
MIN_SCALE = 1e-6  # of a channel that was always zero


def name(part: str, layer: int) -> str:
    """The tensor with the scales of a layer's keys or values. `part`: "key" or "value"."""
    return f"{PREFIX}{part}_scale_{layer}"


def specs(cfg: LlmConfig) -> dict[str, Spec]:
    """Every tensor of scales: its type and shape."""
    shape = (1, cfg.num_key_value_heads, 1, cfg.head_dim)
    return {name(part, layer): ("F32", shape) for layer in range(cfg.num_hidden_layers) for part in ("key", "value")}


def from_largest(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales [1, H_kv, 1, dim] for channels whose largest magnitudes [H_kv, dim] were seen."""
    found: NDArray[np.float32] = np.maximum(largest * (HEADROOM / MAX_INT), MIN_SCALE).astype(np.float32)
    return found[None, :, None]


def rounded(x: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keys or values [1, H_kv, S, dim] as a cache in 8 bits gives them back."""
    found: NDArray[np.float32] = np.clip(np.round(x / scales), -MAX_INT - 1, MAX_INT) * scales
    return found
