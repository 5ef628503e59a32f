"""Bundles made by hand for tests: any parameters, any dialect, no checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vila_edge import int4
from vila_edge.bundle import Bundle, write_manifest
from vila_edge.config import VilaConfig
from vila_edge.engine.onnxruntime import OnnxruntimeEngine
from vila_edge.export.onnxruntime_ops import ACCURACY_FLOAT32, OnnxruntimeOps
from vila_edge.export.weights import write_model
from vila_edge.parameters import is_quantised


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


def handmade_bundle(cfg: VilaConfig, tensors: dict[str, NDArray[Any]], folder: Path) -> Bundle:
    write_model(folder, cfg, tensors, "{}", ExactOps)
    write_manifest(folder, name="handmade", config=cfg, quantization={}, provenance={}, license_note="", parity={})
    return Bundle.open(folder)


def graph_engine(cfg: VilaConfig, tensors: dict[str, NDArray[Any]], folder: Path) -> OnnxruntimeEngine:
    return OnnxruntimeEngine(handmade_bundle(cfg, tensors, folder), threads=1)
