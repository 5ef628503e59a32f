"""Bundles made by hand for tests: any parameters, any dialect, no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from vila_edge import int4, kv_scales
from vila_edge.bindings import CacheType
from vila_edge.bundle import Bundle, write_manifest
from vila_edge.config import VilaConfig
from vila_edge.engine.onnxruntime import OnnxruntimeEngine
from vila_edge.engine.onnxruntime_session import OLDEST_INT8_CACHE
from vila_edge.export.onnxruntime_ops import ACCURACY_FLOAT32, OnnxruntimeOps
from vila_edge.export.weights import write_model
from vila_edge.parameters import is_quantised
from vila_edge.reference.engine import ReferenceEngine, numpy_engine
from vila_edge.reference.numpy_ops import NumpyOps

INSTALLED = tuple(map(int, ort.__version__.split(".")[:2]))
INT8_CACHE_RUNS = INSTALLED >= OLDEST_INT8_CACHE
TOO_OLD = "this onnxruntime is too old for a kv_cache in 8 bits"


class ExactOps(OnnxruntimeOps):
    """4-bit products with float32 activations: what a float32 oracle can be compared with."""

    accuracy_level = ACCURACY_FLOAT32


def int4_tensors(params: dict[str, NDArray[Any]], group_size: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Round to nearest: the tensors of a 4-bit bundle, and the float parameters that they stand for."""
    tensors, meant = dict(params), dict(params)
    for name in filter(is_quantised, params):
        weight = int4.quantize(params[name], group_size)
        del tensors[name]
        tensors |= int4.to_tensors(name.removesuffix(".weight"), weight)
        meant[name] = weight.dequantize()
    return tensors, meant


def handmade_bundle(
    cfg: VilaConfig, tensors: dict[str, NDArray[Any]], folder: Path, dialect: type[OnnxruntimeOps] = ExactOps
) -> Bundle:
    write_model(folder, cfg, tensors, "{}", dialect)
    write_manifest(folder, name="handmade", config=cfg, quantization={}, provenance={}, license_note="", parity={})
    return Bundle.open(folder)


def graph_engine(
    cfg: VilaConfig,
    tensors: dict[str, NDArray[Any]],
    folder: Path,
    kv_cache: CacheType = "float32",
    parts: int | None = None,
) -> OnnxruntimeEngine:
    return OnnxruntimeEngine(handmade_bundle(cfg, tensors, folder), threads=1, kv_cache=kv_cache, parts=parts)


class Int8CacheOps(NumpyOps):
    """The oracle with a kv_cache in 8 bits: what is new is rounded before it is looked at."""

    def __init__(
        self, params: Mapping[str, NDArray[Any]], scales: Mapping[str, NDArray[Any]], cache: dict[int, Any]
    ) -> None:
        super().__init__(params, cache)
        self.scales = scales

    def cached(self, k: NDArray[Any], v: NDArray[Any], layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        key, value = (self.scales[kv_scales.name(part, layer)] for part in ("key", "value"))
        return super().cached(kv_scales.rounded(k, key), kv_scales.rounded(v, value), layer)


def int8_cache_oracle(
    cfg: VilaConfig, params: dict[str, NDArray[Any]], scales: dict[str, NDArray[Any]]
) -> ReferenceEngine:
    return ReferenceEngine(cfg, "numpy, int8 kv_cache", lambda cache: Int8CacheOps(params, scales, cache))


def scales_for(cfg: VilaConfig, params: dict[str, NDArray[Any]], ids: list[int]) -> dict[str, NDArray[Any]]:
    """Scales of a kv_cache as an export would find them, with this one prompt."""
    engine = numpy_engine(cfg, params)
    cache = engine.new_cache(len(ids))
    engine.forward(engine.embed_tokens(ids), cache)
    return {
        kv_scales.name(part, layer): kv_scales.from_largest(np.abs(x[0]).max(1))
        for layer, both in cache.layers.items()
        for part, x in zip(("key", "value"), both, strict=True)
    }
