"""What decode reads from memory for one token: bytes, from the headers of the weights."""

from __future__ import annotations

from collections.abc import Mapping

from vila_edge.architecture import EMBED_TOKENS
from vila_edge.bundle import WEIGHTS, Bundle
from vila_edge.config import VilaConfig
from vila_edge.inventory import Part, component, take_inventory
from vila_edge.tensorfile import TensorFile

KV_BYTES = {"float32": 4, "float16": 2, "int8": 1}  # of a number in the kv_cache


def parts_of(bundle: Bundle) -> dict[str, Part]:
    """Every parameter of a bundle as it is stored."""
    names = [name for name in bundle.manifest.files if name.startswith(f"{WEIGHTS}/")]
    return take_inventory(bundle.config, {name: TensorFile(bundle.path / name) for name in names}).parts


def weight_bytes(cfg: VilaConfig, parts: Mapping[str, Part]) -> int:
    """Bytes of the weights that one token touches, as they are stored, with their scales and zero points.

    All of the decoder blocks and of the lm_head, and one row of the embeddings (with tied embeddings, the table is the
    head). An engine that keeps a weight in a wider form reads more than this.
    """
    table = parts[f"{EMBED_TOKENS}.weight"]
    size = sum(part.size for part in parts.values() if component(part.name) in ("decoder blocks", "lm_head"))
    return size + (table.size if cfg.llm.tie_word_embeddings else table.size // table.shape[0])


def kv_cache_bytes(cfg: VilaConfig, positions: float, kv_cache: str) -> int:
    """Bytes of the keys and values of so many positions, in every layer."""
    llm = cfg.llm
    numbers = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim
    return round(numbers * positions * KV_BYTES[kv_cache])
