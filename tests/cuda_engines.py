"""The cuda engine without a GPU: tiny models whose sizes the kernels take, kernels compiled for the CPU, a fake device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.fake_cuda import FakeDevice
from tests.graphs import handmade_bundle, int8_cache_oracle, scales_for
from tests.kernels.host import Compiled
from tests.kernels.on_device import find_on, host_find
from tests.tiny import TINY, random_parameters
from vila_edge import int4, int8
from vila_edge.bundle import Bundle
from vila_edge.config import LlmConfig, VilaConfig
from vila_edge.engine.cuda.engine import CudaEngine
from vila_edge.engine.cuda.kernels import Find
from vila_edge.kernels.attention import SPLIT, KvCache
from vila_edge.parameters import is_quantised
from vila_edge.reference.engine import ReferenceEngine, bundle_parameters, numpy_engine

GROUP = 128


def _llm(model_type: Any, heads: int, key_value: int, hidden: int = 128, **more: Any) -> LlmConfig:
    changes: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": 256,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value,
        "head_dim": 128 // heads,
    }
    return dataclasses.replace(TINY.llm, **changes | more)


# One of each family that the kernels tell apart. A product takes multiples of 128 inputs.
MODELS = {
    "llama": _llm("llama", 4, 4),
    "llama, grouped queries": _llm("llama", 4, 2, 256),
    "qwen2": _llm("qwen2", 2, 1, tie_word_embeddings=True),
}
# Its contexts need two of attention's splits.
LONG = _llm("llama", 4, 1, context_length=SPLIT + 20, num_hidden_layers=1)


def config(model: str) -> VilaConfig:
    return dataclasses.replace(TINY, llm=LONG if model == "long" else MODELS[model])


def stored(cfg: VilaConfig, group_size: int = GROUP, head: str = "int8") -> dict[str, NDArray[Any]]:
    """Random weights as an export stores them: linears of the blocks in 4 bits, lm_head in `head`, the rest in 16."""
    tensors: dict[str, NDArray[Any]] = {}
    heads = ("llm.model.embed_tokens.weight",) if cfg.llm.tie_word_embeddings else ("llm.lm_head.weight",)
    for name, value in random_parameters(cfg, dtype=np.float16).items():
        linear = name.removesuffix(".weight")
        if is_quantised(name) or (name in heads and head == "int4"):
            tensors |= int4.to_tensors(linear, int4.quantize(value, group_size))
        elif name in heads and head == "int8":
            weight = int8.quantize(value)
            tensors |= dict(zip(int8.part_names(linear), (weight.q, weight.scales), strict=True))
        else:
            tensors[name] = value
    return tensors


def bundle_of(model: str, folder: Path, ids: list[int] | None = None, **how: Any) -> Bundle:
    """A bundle of a model; with scales for a kv_cache in 8 bits, as found with a prompt of `ids`."""
    cfg = config(model)
    tensors = stored(cfg, **how)
    bundle = handmade_bundle(cfg, tensors, folder / "float")
    if ids is None:
        return bundle
    return handmade_bundle(cfg, tensors | scales_for(cfg, bundle_parameters(bundle), ids), folder / "scales")


def oracle_of(bundle: Bundle, kv_cache: KvCache = "float16", ids: list[int] | None = None) -> ReferenceEngine:
    """numpy on the bundle's own 4-bit weights, and rounding keys and values as the engine does."""
    params = bundle_parameters(bundle)
    if kv_cache == "float16":
        return numpy_engine(bundle.config, params)
    assert ids is not None
    return int8_cache_oracle(bundle.config, params, scales_for(bundle.config, params, ids))


def open_fake(
    bundle: Bundle, compiled: Compiled, folder: Path, kv_cache: KvCache = "float16", device: FakeDevice | None = None
) -> CudaEngine:
    """On a device of host memory, with the tower in onnxruntime. Packed weights are kept in `folder`."""
    return _open(bundle, folder, kv_cache, device or FakeDevice(), host_find(compiled))


def open_gpu(bundle: Bundle, compiled: Compiled, folder: Path, kv_cache: KvCache = "float16") -> CudaEngine:
    """The same on a GPU, or a fake driver."""
    return _open(bundle, folder, kv_cache, None, find_on(compiled))


def _open(bundle: Bundle, folder: Path, kv_cache: KvCache, device: FakeDevice | None, find: Find) -> CudaEngine:
    return CudaEngine(
        bundle,
        kv_cache,
        tower="onnxruntime",
        threads=1,
        device=device,
        find_kernels=find,
        packed=folder / "packed",
    )
