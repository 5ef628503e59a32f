"""How much memory a bundle takes, by backend and context: what is known exactly, and what was measured.

Known: the parameters as an engine holds them, and the kv_cache. Measured, with onnxruntime 1.32 on x86-64 and glibc,
on bundles of random weights (docs/bundle.md has the figures): what onnxruntime makes of the weights when it loads
them, and what it needs for activations. For another processor or C library those terms are of the right size, and no
more than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from vila_edge import architecture, bindings
from vila_edge.config import VilaConfig
from vila_edge.inventory import Part
from vila_edge.parameters import component

Backend = Literal["onnxruntime", "onnxruntime, int8", "numpy", "tensorrt", "onnxruntime-cuda", "cuda", "cuda, int8"]

FLOAT = 4  # bytes
PROGRAM = 100_000_000  # bytes: Python, numpy, onnxruntime and the command, with a model of next to no size

# onnxruntime keeps 4- and 8-bit weights packed anew; for each group a scale is kept twice, and a sum once.
GROUP_BYTES = 3 * FLOAT
# Other weights are widened to float32, transposed, and packed: copies are left over until the graph is loaded.
# As a part of the weights; matrices of less than 32 MiB come from glibc's heap, larger ones straight from the system.
LEFT_OVER, LEFT_OVER_FP32 = 1.2, 0.25  # the latter for small weights that are stored in float32
HEAP_LIMIT = 32 << 20  # bytes, M_MMAP_THRESHOLD's maximum
# Prefill, a position: numbers for each of the hidden and the intermediate width. Fits 8 sizes within 12 %.
PREFILL_HIDDEN, PREFILL_INTERMEDIATE, PREFILL_BASE = 21.0, 3.3, 14_000_000
# Before 1.29 (measured on 1.23, 1.24 and 1.27) attention also keeps scores, here so many for a head and new position:
SCORES_BEFORE = (1, 29)
SCORES_PER_POSITION, SCORES_AT_MOST = 1.2, 1680  # of the context, and of a second block
# Images: over what is counted for a tile, and once. Fits 12 forms of a model, with 1 and 4 tiles, within 10 %.
IMAGE_BESIDE, IMAGE_BASE = 1.2, 30_000_000


@dataclass(frozen=True)
class Memory:
    """What is needed, in bytes. `total` is the peak; the parts do not add up to it where they are not needed at once."""

    backend: Backend
    context: int
    weights: int
    loading: int  # above the weights, while a graph is loaded: copies of them
    kv_cache: int
    prefill: int
    images: int
    total: int
    measured: bool = field(default=True, kw_only=True)  # whether its terms were compared with a process


def tiles_at_once(cfg: VilaConfig, batch: int) -> int:
    """Tiles of one image that go through the tower together, at most `batch`."""
    if cfg.preprocess.image_aspect_ratio == "dynamic":
        tiles = cfg.preprocess.max_tiles + 1  # the thumbnail
    elif cfg.scales and cfg.scales.dynamic:
        tiles = sum(split**2 for split in cfg.scales.splits[:-1]) + cfg.preprocess.max_tiles
    else:
        tiles = sum(split**2 for split in cfg.scales.splits) if cfg.scales else 1
    return min(tiles, batch)


def kv_cache_bytes(cfg: VilaConfig, context: int, cache_type: bindings.CacheType = "float32") -> int:
    """Keys and values of every layer, for `context` positions."""
    number = {"float32": FLOAT, "float16": 2, "int8": 1}[cache_type]
    return sum(math.prod(binding.sized(capacity=context)) * number for binding in bindings.kv_cache(cfg))


def plan(
    cfg: VilaConfig,
    parts: Mapping[str, Part],
    backend: Backend,
    context: int,
    chunk: int,
    tiles: int,
    onnxruntime: tuple[int, int] | None = None,
) -> Memory:
    """The memory of a process that loads a bundle and answers on the CPU; on a GPU: `gpu_plan`.

    `backend` may end with the type of its kv_cache. `context`: positions that there is room for; `chunk`: positions of a prefill at a time; `tiles`: of an image, at a
    time, 0 for text alone; `onnxruntime`: its version, by default the one that is installed.
    """
    chunk = min(chunk, context)
    if backend == "numpy":
        return _numpy(cfg, parts, context, chunk, tiles)
    return _onnxruntime(cfg, parts, backend, context, chunk, tiles, onnxruntime or _installed())


def _installed() -> tuple[int, int]:
    major, minor = version("onnxruntime").split(".")[:2]
    return int(major), int(minor)


def _onnxruntime(
    cfg: VilaConfig,
    parts: Mapping[str, Part],
    backend: Backend,
    context: int,
    chunk: int,
    tiles: int,
    installed: tuple[int, int],
) -> Memory:
    llm, tower = cfg.llm, cfg.vision_tower
    weights = peak = 0.0
    for graph in ("vision_tower", "mm_projector", "llm"):  # in the order of loading
        mine = [part for part in parts.values() if component(part.name) == graph and _in_a_graph(part, cfg)]
        weights += sum(map(_packed_bytes, mine))
        peak = max(peak, weights + _left_over(mine))
    weights += llm.context_length * llm.head_dim * FLOAT  # the rotary tables, cosines and sines
    kv_cache = kv_cache_bytes(cfg, context, "float32" if backend == "onnxruntime" else "int8")
    hidden, intermediate = PREFILL_HIDDEN * llm.hidden_size, PREFILL_INTERMEDIATE * llm.intermediate_size
    prefill = chunk * (hidden + intermediate) * FLOAT + PREFILL_BASE
    if installed < SCORES_BEFORE:
        scores = SCORES_PER_POSITION * context + min(context, SCORES_AT_MOST)
        prefill += chunk * llm.num_attention_heads * scores * FLOAT
    seen = 2 * tower.num_attention_heads * tower.num_features**2  # scores of attention
    widths = tower.num_features * (4 * tower.hidden_size + 3 * tower.intermediate_size)
    images = IMAGE_BESIDE * tiles * (seen + widths) * FLOAT + (IMAGE_BASE if tiles else 0)
    loading = max(0.0, peak - weights)
    total = PROGRAM + weights + max(loading, kv_cache + max(prefill, images))
    return _memory(backend, context, weights, loading, kv_cache, prefill, images, total)


def _numpy(cfg: VilaConfig, parts: Mapping[str, Part], context: int, chunk: int, tiles: int) -> Memory:
    """Everything in float32. What is computed is freed at once, so the largest step counts."""
    llm, tower = cfg.llm, cfg.vision_tower
    sizes = [part.numbers * FLOAT for part in parts.values()]
    weights, loading = sum(sizes), 1.3 * max(sizes, default=0)  # the largest, while it is made
    kv_cache = kv_cache_bytes(cfg, context)
    repeated = 2 * llm.num_attention_heads * context * llm.head_dim  # keys and values, for every query head
    attention = 4 * llm.num_attention_heads * chunk * context + repeated  # scores, masked, exponentials, weights
    prefill = FLOAT * (max(attention, 4 * chunk * llm.intermediate_size) + 6 * chunk * llm.hidden_size)
    patches = tower.num_features
    step = max(4 * tower.num_attention_heads * patches**2, 5 * patches * tower.intermediate_size)
    images = FLOAT * tiles * (step + 4 * patches * tower.hidden_size)
    total = PROGRAM + weights + max(loading, kv_cache + max(prefill, images))
    return _memory("numpy", context, weights, loading, kv_cache, prefill, images, total)


def _in_a_graph(part: Part, cfg: VilaConfig) -> bool:
    """The embedding table stays mapped, and its pages can be given up at any time, unless it is the head as well."""
    return part.name != f"{architecture.EMBED_TOKENS}.weight" or cfg.llm.tie_word_embeddings


def _packed_bytes(part: Part) -> float:
    """A parameter as onnxruntime holds it."""
    if not part.group_size:
        return part.numbers * FLOAT
    rows, columns = part.shape
    groups = rows * -(-columns // part.group_size)
    bits = 8 if part.form == "int8" else 4
    zeros = 0 if part.symmetric else groups / 2
    return groups * part.group_size * bits / 8 + groups * GROUP_BYTES + zeros


def _left_over(parts: Iterable[Part]) -> float:
    """Copies of a graph's matrices of floats, which are there until it is loaded."""
    copies = mapped = 0.0
    for part in parts:
        size = part.numbers * FLOAT
        if part.group_size or len(part.shape) < 2:
            continue
        if part.form == "fp32" and size >= HEAP_LIMIT:  # the file itself is mapped, so there is a copy of one at a time
            mapped = max(mapped, LEFT_OVER * size)
        else:
            copies += (LEFT_OVER_FP32 if part.form == "fp32" else LEFT_OVER) * size
    return copies + mapped


def _memory(backend: Backend, context: int, *sizes: float) -> Memory:
    return Memory(backend, context, *(round(size) for size in sizes))


def largest_context(available: int, plans: Iterable[Memory]) -> int:
    """The longest of the planned contexts that fits into so many bytes; 0 if none does."""
    return max((memory.context for memory in plans if memory.total <= available), default=0)


def available_memory(source: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that a new program can have without others being swapped out; None where the system does not tell."""
    try:
        for line in source.read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
