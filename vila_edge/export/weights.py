"""Weights and graphs of a bundle, written to a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge import architecture, fsio, int4, int8
from vila_edge.bundle import GRAPHS, TOKENIZER, WEIGHTS, Bundle, write_manifest
from vila_edge.config import LlmConfig, VilaConfig
from vila_edge.engine.onnxruntime_session import DIALECT
from vila_edge.errors import ParityError
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.graph_ops import GraphOps, StoredTensor
from vila_edge.export.graphs import write_graphs
from vila_edge.export.onnxruntime_ops import ROPE_COS, ROPE_SIN, OnnxruntimeOps
from vila_edge.export.source import Source
from vila_edge.export.storage import StoragePlan, file_of
from vila_edge.parameters import storage_order
from vila_edge.tensorfile import TensorFile, write_stream, write_tensors

Tensors = dict[str, NDArray[Any]]


def write_converted(folder: Path, plan: StoragePlan, file: str, source: Source) -> None:
    """One file of the weights, each parameter rounded to its form, some rows in memory at a time.

    Raises ParityError that names a parameter which 16 bits cannot hold.
    """
    tables = rope_tables(plan.cfg.llm)

    def read(tensor: str) -> Iterator[NDArray[Any]]:
        if tensor in tables:
            return iter([tables[tensor]])
        if tensor in plan.shapes:
            return (as_floats(tensor, rows, plan) for rows in source.pieces(tensor))
        return _quantised_pieces(tensor, plan, source)

    (folder / WEIGHTS).mkdir(exist_ok=True)
    write_stream(folder / file, plan.files[file], read)


def write_layer(
    folder: Path,
    plan: StoragePlan,
    file: str,
    floats: Mapping[str, NDArray[np.float32]],
    linears: Mapping[str, int4.Int4],
) -> None:
    """A decoder block's file, its linears in 4 bits."""
    tensors: Tensors = {name: as_floats(name, values, plan) for name, values in floats.items()}
    for name, linear in linears.items():
        tensors |= int4.to_tensors(name, linear, plan.storage.symmetric)
    (folder / WEIGHTS).mkdir(exist_ok=True)
    write_stream(folder / file, plan.files[file], lambda name: [tensors[name]])


def as_floats(name: str, values: NDArray[np.float32], plan: StoragePlan) -> NDArray[Any]:
    """A parameter that is stored as floats, in the width of its form. Raises ParityError if it does not fit."""
    if plan.form(name) == "fp32":
        return values
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ParityError(
            f"{name}: its largest value {np.abs(values).max():.4g} does not fit into 16 bits (65504)",
            "export with --quant fp32",
        )
    return half


def _quantised_pieces(tensor: str, plan: StoragePlan, source: Source) -> Iterator[NDArray[Any]]:
    """A part of a weight that is rounded to nearest as it is read."""
    linear = tensor.rpartition(".")[0]
    name = f"{linear}.weight"
    for rows in source.pieces(name):
        parts: Tensors
        if plan.form(name) == "int8":
            weight = int8.quantize(rows)
            parts = dict(zip(int8.part_names(linear), (weight.q, weight.scales), strict=True))
        else:
            symmetric = plan.storage.symmetric
            parts = int4.to_tensors(linear, int4.quantize(rows, plan.storage.group_size, symmetric), symmetric)
        if parts[tensor].dtype == np.float16 and not np.isfinite(parts[tensor]).all():
            raise ParityError(f"{name}: too large for scales of 16 bits", "export with --quant fp32")
        yield parts[tensor]


def rope_tables(cfg: LlmConfig) -> Tensors:
    """The tables that the decoder graph looks positions up in."""
    cos, sin = architecture.rope_table(0, cfg.context_length, cfg.head_dim, cfg.rope)
    return {ROPE_COS: cos, ROPE_SIN: sin}


def write_graph_files(
    folder: Path, cfg: VilaConfig, places: Mapping[str, StoredTensor], dialect: type[GraphOps] = OnnxruntimeOps
) -> None:
    """All graphs. `places`: where the tensors lie that they refer to."""
    for name, graph in write_graphs(cfg, places, dialect).items():
        path = folder / GRAPHS / DIALECT / f"{name}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        fsio.replace_bytes(path, graph)


def write_model(
    folder: Path, cfg: VilaConfig, tensors: Tensors, tokenizer_json: str, dialect: type[GraphOps] = OnnxruntimeOps
) -> None:
    """Everything of a bundle but its manifest. `tensors`: all parameters, in the form in which they are stored."""
    files: dict[str, Tensors] = {}
    for name, values in (tensors | rope_tables(cfg.llm)).items():
        files.setdefault(file_of(name), {})[name] = values
    (folder / WEIGHTS).mkdir(parents=True)
    places: dict[str, StoredTensor] = {}
    for file, content in files.items():
        write_tensors(folder / file, content, storage_order)
        entries = TensorFile(folder / file).entries
        places |= {name: StoredTensor(Path(file).name, entry) for name, entry in entries.items()}
    write_graph_files(folder, cfg, places, dialect)
    fsio.replace_bytes(folder / TOKENIZER, tokenizer_json.encode())


def exact_bundle(checkpoint: Checkpoint, folder: Path) -> Bundle:
    """A bundle of the checkpoint's parameters in float32, as they are: to compare an engine, not to give away."""
    write_model(folder, checkpoint.config, dict(checkpoint.parameters()), checkpoint.tokenizer_json)
    write_manifest(
        folder,
        name=checkpoint.path.resolve().name,
        config=checkpoint.config,
        quantization={"method": "none", "dtype": "float32"},
        provenance={},
        license_note="",
        parity={},
    )
    return Bundle.open(folder)
