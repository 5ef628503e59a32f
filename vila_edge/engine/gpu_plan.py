"""How much memory a bundle takes on a GPU, by backend and context. Nothing of it was measured on a GPU.

Known: the parameters in the form that a backend's graphs have them, and the kv_cache, in float16. Estimated: what is
between them at once in a prefill and for images, and a copy of the weights while they are loaded. Not counted: what
CUDA, cuBLAS and TensorRT take for themselves. On a Jetson all of it is the one memory that there is.
"""

from __future__ import annotations

from collections.abc import Mapping

from vila_edge import architecture
from vila_edge.config import VilaConfig
from vila_edge.engine.plan import FLOAT, PROGRAM, Backend, Memory, kv_cache_bytes
from vila_edge.engine.tensorrt_options import COMPONENTS, MAX_KEPT, BuildOptions
from vila_edge.inventory import Part
from vila_edge.parameters import component

HALF = 2  # bytes

# Over its weights; of the one engine that was built, ahead of time, for VILA1.5-3B's decoder (docs/engines.md).
ENGINE_BESIDE = 1.03


def gpu_plan(
    cfg: VilaConfig, parts: Mapping[str, Part], backend: Backend, context: int, chunk: int, tiles: int
) -> Memory:
    """The memory of a process with what it has on a GPU. Arguments are those of `plan`; TensorRT has its own `chunk`."""
    if backend == "tensorrt":
        chunk = BuildOptions.chunk
        sizes = {graph: tensorrt_weights(cfg, parts, graph) for graph in COMPONENTS}
        loading = ENGINE_BESIDE * max(sizes.values())  # an engine is in the CPU's memory until it is loaded
        weights = ENGINE_BESIDE * sum(sizes.values())
        tower = HALF
    else:
        sizes = {graph: onnxruntime_weights(cfg, parts, graph) for graph in COMPONENTS}
        loading, weights = max(sizes.values()), sum(sizes.values())
        tower = FLOAT
    chunk = min(chunk, context)
    kv_cache = kv_cache_bytes(cfg, context, "float16")
    prefill = _prefill(cfg, context, chunk)
    if backend != "tensorrt":  # products of many positions are with a weight in 16 bits, made for each
        prefill += HALF * max((part.numbers for part in parts.values() if part.group_size), default=0)
    images = tiles * tile_bytes(cfg, tower)
    total = PROGRAM + weights + max(loading, kv_cache + max(prefill, images))
    terms = {"weights": weights, "loading": loading, "kv_cache": kv_cache, "prefill": prefill, "images": images}
    whole = {name: round(size) for name, size in (terms | {"total": total}).items()}
    return Memory(backend, context, **whole, measured=False)


def tensorrt_weights(cfg: VilaConfig, parts: Mapping[str, Part], graph: str) -> int:
    """Bytes of the weights of a `tensorrt` graph, as `export/tensorrt_weights.py` makes them."""
    tables = _rope_tables(cfg, FLOAT) if graph == "decoder" else 0
    return tables + sum(_tensorrt_bytes(part, graph) for part in _of_graph(cfg, parts, graph))


def onnxruntime_weights(cfg: VilaConfig, parts: Mapping[str, Part], graph: str) -> int:
    """Bytes of the weights of an `onnxruntime` graph for CUDA: floats as wide as its activations, others as stored."""
    number = HALF if graph == "decoder" else FLOAT
    tables = _rope_tables(cfg, number) if graph == "decoder" else 0
    return tables + sum(
        part.size + _groups(part) * (number - HALF) if part.group_size else part.numbers * number
        for part in _of_graph(cfg, parts, graph)
    )


def _of_graph(cfg: VilaConfig, parts: Mapping[str, Part], graph: str) -> list[Part]:
    """The parameters that a graph reads: the embedding table only where it is the head, too."""
    table = "" if cfg.llm.tie_word_embeddings else f"{architecture.EMBED_TOKENS}.weight"
    wanted = "llm" if graph == "decoder" else graph
    return [part for part in parts.values() if component(part.name) == wanted and part.name != table]


def _tensorrt_bytes(part: Part, graph: str) -> int:
    if not part.group_size or (part.form == "int8" and graph != "decoder"):
        return part.numbers * HALF
    scales = _groups(part) * HALF
    packed = _groups(part) * part.group_size // 2
    if part.form == "int8":  # two weights of 4 bits, and their zero terms
        return 2 * (packed + scales) + scales
    return packed + scales + (0 if part.symmetric else scales)


def _groups(part: Part) -> int:
    return part.shape[0] * -(-part.shape[1] // part.group_size)


def _rope_tables(cfg: VilaConfig, number: int) -> int:
    return cfg.llm.context_length * cfg.llm.head_dim * number


def _prefill(cfg: VilaConfig, context: int, chunk: int) -> int:
    """Of one block: scores twice, as if no kernel kept them to itself, or the MLP; hidden states; logits."""
    llm = cfg.llm
    scores = 2 * llm.num_attention_heads * context
    between = max(scores, 3 * llm.intermediate_size)
    return HALF * chunk * (between + 6 * llm.hidden_size) + FLOAT * MAX_KEPT * llm.vocab_size


def tile_bytes(cfg: VilaConfig, number: int) -> int:
    """Of one block of the tower: scores twice, or the MLP; hidden states."""
    tower = cfg.vision_tower
    between = max(2 * tower.num_attention_heads * tower.num_features, 2 * tower.intermediate_size)
    return number * tower.num_features * (between + 6 * tower.hidden_size)
