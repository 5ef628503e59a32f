"""A bundle's weights as the `tensorrt` dialect wants them: most lie where they are, some are converted.

In place: float16 tensors, the scales of 4-bit weights, the rotary tables. Converted into one file, rows at a time:

- 4 bits: TensorRT takes signed nibbles around zero alone. q - 8 is q with its highest bit turned, so a byte is
  xored with 0x88; zero points become a second, small product: w = s (q - 8) + s (8 - zero), and the last part is
  the same for all inputs of a group.
- 8 bits in the decoder: q - 128 = 16 (h - 8) + (l - 8) + 8 for the digits h and l of q, which are two weights of
  4 bits and zero terms of 8 s. As one INT8 weight with a scale for each group it would stay 8 bits wide in the
  engine, but TensorRT-RTX 1.7.1 plans to widen all of it to float16 in memory before each product.
- 8 bits elsewhere, and float32: float16. Images are many rows at once, where products and not weights take the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge import architecture, int4, int8
from vila_edge.bundle import WEIGHTS, Bundle
from vila_edge.config import VilaConfig
from vila_edge.errors import BackendError
from vila_edge.export.graph_ops import StoredTensor
from vila_edge.export.onnxruntime_ops import ROPE_COS, ROPE_SIN
from vila_edge.export.tensorrt_ops import DIGITS, ZERO_TERMS
from vila_edge.parameters import Shape, parameter_shapes
from vila_edge.parameters import component as component_of
from vila_edge.tensorfile import Spec, TensorFile, layout, write_stream

CONVERTED = "converted.safetensors"
PIECE = 32 << 20  # bytes of stored weights that are converted at a time

Parts = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Converted:
    """A tensor to write: `convert` makes rows of it of the same rows of the tensors `sources`."""

    spec: Spec
    sources: tuple[str, ...]
    convert: Callable[[Parts], NDArray[Any]]


def stage_weights(bundle: Bundle, component: str, folder: Path) -> dict[str, StoredTensor]:
    """Make `folder` hold what a graph of `component` refers to; returns where each tensor lies.

    That is links to the bundle's files and `converted.safetensors`. Raises BackendError for a weight that
    16 bits cannot hold, VilaEdgeError if the folder cannot be written.
    """
    files = [TensorFile(bundle.file(name)) for name in bundle.manifest.files if name.startswith(f"{WEIGHTS}/")]
    stored = {name: file for file in files for name in file.entries}
    shapes = graph_parameters(bundle.config, component)
    converted = conversions(shapes, stored, component)
    places = dict[str, StoredTensor]()
    for name, file in stored.items():
        if _belongs(name, shapes) and name not in converted:
            places[name] = StoredTensor(file.path.name, file.entries[name])
    for path in {file.path for name, file in stored.items() if name in places}:
        (folder / path.name).symlink_to(path.resolve())
    specs = {name: tensor.spec for name, tensor in converted.items()}
    if specs:
        write_stream(folder / CONVERTED, specs, lambda name: _pieces(name, converted[name], stored))
    return places | {name: StoredTensor(CONVERTED, entry) for name, entry in layout(specs)[1].items()}


def graph_parameters(cfg: VilaConfig, component: str) -> dict[str, Shape]:
    """Name -> shape of the parameters that a graph reads: the embedding table only where it is the head, too."""
    part = "llm" if component == "decoder" else component
    shapes = {name: shape for name, shape in parameter_shapes(cfg).items() if component_of(name) == part}
    if not cfg.llm.tie_word_embeddings:
        shapes.pop(f"{architecture.EMBED_TOKENS}.weight", None)
    return shapes


def conversions(shapes: Mapping[str, Shape], stored: Mapping[str, TensorFile], component: str) -> dict[str, Converted]:
    """The tensors that cannot be used as they are stored, and how each is made."""
    found = dict[str, Converted]()
    for name, shape in shapes.items():
        linear = name.removesuffix(".weight")
        if name in stored:
            if stored[name].entries[name].dtype != "F16":
                found[name] = Converted(("F16", shape), (name,), partial(_scaled, name, 1))
        elif f"{linear}.qweight" in stored:
            found |= _from_4_bits(linear, stored)
        elif component == "decoder":
            found |= _from_8_bits(linear, stored)
        else:
            found[name] = Converted(("F16", shape), int8.part_names(linear), partial(_dequantized, linear, shape[1]))
    return found


def _from_4_bits(linear: str, stored: Mapping[str, TensorFile]) -> dict[str, Converted]:
    qweight, scales, qzeros = int4.part_names(linear)
    entries = stored[qweight].entries
    found = {qweight: Converted(("U8", entries[qweight].shape), (qweight,), lambda parts: parts[qweight] ^ 0x88)}
    if qzeros in stored:
        spec = ("F16", entries[scales].shape)
        found[f"{linear}.{ZERO_TERMS}"] = Converted(spec, (scales, qzeros), partial(_zero_terms, scales, qzeros))
    return found


def _from_8_bits(linear: str, stored: Mapping[str, TensorFile]) -> dict[str, Converted]:
    qweight, scales = int8.part_names(linear)
    entries = stored[qweight].entries
    (rows, columns), groups = entries[qweight].shape, entries[scales].shape
    found = {f"{linear}.{ZERO_TERMS}": Converted(("F16", groups), (scales,), partial(_scaled, scales, 8))}
    for digit, shift in zip(DIGITS, (4, 0), strict=True):
        digits = Converted(("U8", (rows, columns // 2)), (qweight,), partial(_digits, qweight, shift))
        found[f"{linear}{digit}.qweight"] = digits
        found[f"{linear}{digit}.scales"] = Converted(("F16", groups), (scales,), partial(_scaled, scales, 1 << shift))
    return found


def _zero_terms(scales: str, qzeros: str, parts: Parts) -> NDArray[np.float16]:
    zeros = int4.unpack(parts[qzeros], parts[scales].shape[1]).astype(np.float32)
    return _half(scales, parts[scales].astype(np.float32) * (int4.MIDDLE - zeros))


def _digits(qweight: str, shift: int, parts: Parts) -> NDArray[np.uint8]:
    return int4.pack(((parts[qweight] >> shift & 0xF) ^ 8).astype(np.uint8))


def _scaled(name: str, factor: int, parts: Parts) -> NDArray[np.float16]:
    return _half(name, parts[name].astype(np.float32) * factor)


def _dequantized(linear: str, columns: int, parts: Parts) -> NDArray[np.float16]:
    return _half(linear, int8.from_tensors(linear, parts).dequantize(columns))


def _half(name: str, values: NDArray[Any]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise BackendError(
            f"{name}: its largest value {np.abs(values.astype(np.float64)).max():.4g} does not fit into "
            "16 bits (65504), and TensorRT engines compute in those",
            "run this bundle on the CPU: --backend onnxruntime",
        )
    return half


def _pieces(name: str, tensor: Converted, stored: Mapping[str, TensorFile]) -> Iterator[NDArray[Any]]:
    """A converted tensor, some rows in memory at a time."""
    arrays = {source: stored[source].array(source) for source in tensor.sources}
    shape = tensor.spec[1]
    if len(shape) < 2:
        yield tensor.convert({source: np.asarray(array) for source, array in arrays.items()})
        return
    row_bytes = sum(array.nbytes for array in arrays.values()) // shape[0]
    step = max(1, PIECE // max(1, row_bytes))
    for start in range(0, shape[0], step):
        yield tensor.convert({source: np.asarray(array[start : start + step]) for source, array in arrays.items()})


def _belongs(tensor: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a stored tensor is a parameter of the graph, part of one, or a rotary table."""
    whole = tensor in (ROPE_COS, ROPE_SIN) and any(component_of(name) == "llm" for name in shapes)
    return whole or tensor in shapes or f"{tensor.rpartition('.')[0]}.weight" in shapes
