"""Weights and graphs of a bundle, written to a folder. No torch is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vila_edge import architecture, fsio
from vila_edge.bundle import GRAPHS, TOKENIZER, WEIGHTS, Bundle, write_manifest
from vila_edge.config import VilaConfig
from vila_edge.engine.onnxruntime import DIALECT
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.graph_ops import GraphOps, StoredTensor
from vila_edge.export.graphs import write_graphs
from vila_edge.export.onnxruntime_ops import ROPE_COS, ROPE_SIN, OnnxruntimeOps
from vila_edge.parameters import component
from vila_edge.tensorfile import TensorFile, write_tensors

Tensors = dict[str, NDArray[Any]]


def write_model(
    folder: Path, cfg: VilaConfig, tensors: Tensors, tokenizer_json: str, dialect: type[GraphOps] = OnnxruntimeOps
) -> None:
    """Everything of a bundle but its manifest. `tensors`: all parameters, in the form in which they are stored."""
    cos, sin = architecture.rope_table(0, cfg.llm.context_length, cfg.llm.head_dim, cfg.llm.rope)
    stored = write_weights(folder, tensors | {ROPE_COS: cos, ROPE_SIN: sin})
    for name, graph in write_graphs(cfg, stored, dialect).items():
        path = folder / GRAPHS / DIALECT / f"{name}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        fsio.write_bytes(path, graph)
    fsio.write_bytes(folder / TOKENIZER, tokenizer_json.encode())


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


def write_weights(folder: Path, tensors: Tensors) -> dict[str, StoredTensor]:
    """One file for each component, one for the embedding table; where each tensor came to lie."""
    files: dict[str, Tensors] = {}
    for name, values in tensors.items():
        part = "embed_tokens" if name.startswith(architecture.EMBED_TOKENS) else component(name)
        files.setdefault(f"{part}.safetensors", {})[name] = values
    (folder / WEIGHTS).mkdir(parents=True)
    stored: dict[str, StoredTensor] = {}
    for file_name, content in files.items():
        write_tensors(folder / WEIGHTS / file_name, content)
        entries = TensorFile(folder / WEIGHTS / file_name).entries
        stored |= {name: StoredTensor(file_name, entry) for name, entry in entries.items()}
    return stored
