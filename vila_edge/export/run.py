"""An export, step by step: checkpoint, calibration, AWQ, weights, graphs, parity, manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from vila_edge import fsio, int4
from vila_edge.bundle import Bundle, write_manifest
from vila_edge.config import VilaConfig
from vila_edge.engine.onnxruntime import OnnxruntimeEngine
from vila_edge.errors import ParityError, UsageError
from vila_edge.export.awq import quantise_blocks
from vila_edge.export.calibration import CalibrationSet, batches, built_in, inputs_embeds, read_samples
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.eras import Choices
from vila_edge.export.verify import MIN_COSINE, MIN_COSINE_INT4, parity_report
from vila_edge.export.weights import Tensors, write_model
from vila_edge.parameters import is_quantised
from vila_edge.tokenizer import Tokenizer
from vila_edge.version import __version__

Quantization = Literal["int4", "fp16", "fp32"]
QUANTIZATIONS: tuple[Quantization, ...] = ("int4", "fp16", "fp32")

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all


@dataclass(frozen=True)
class Recipe:
    """What to export, and how.

    int4: AWQ for the linears of the decoder blocks, 16 bits for the rest. fp16 and fp32 store all weights so.
    """

    quantization: Quantization = "int4"
    group_size: int = 128
    calibration: Path | None = None  # a folder of samples; None takes the built-in ones
    name: str = ""  # of the model; by default the checkpoint's folder
    license_note: str = ""
    choices: Choices = field(default_factory=Choices)


def export_bundle(
    checkpoint_path: Path,
    bundle_path: Path,
    recipe: Recipe,
    progress: Progress,
    replace: bool = False,
    warn: Callable[[str], None] = lambda message: None,
) -> Bundle:
    """Write a bundle, whole or not at all, and open it. `warn` is told what the files of the checkpoint leave open.

    Raises CheckpointError, ConfigError or InputError for what cannot be read, UsageError for a recipe that does
    not fit the model, ParityError if the result does not compute what the checkpoint does.
    """
    fsio.check_absent(bundle_path, replace)
    progress("read", 0, 1)
    checkpoint = Checkpoint(checkpoint_path, recipe.choices)
    for warning in checkpoint.warnings:
        warn(warning)
    cfg = checkpoint.config
    _check_recipe(recipe, cfg)
    tokenizer = checkpoint.tokenizer()
    tokenizer.check_rows(cfg.llm.vocab_size)
    samples = read_samples(recipe.calibration) if recipe.calibration else built_in()
    params = checkpoint.parameters()
    progress("read", 1, 1)
    with fsio.new_folder(bundle_path, replace) as folder, torch.inference_mode():
        torch_params = {name: torch.from_numpy(value) for name, value in params.items()}
        tensors = _quantise(torch_params, cfg, tokenizer, samples, recipe, progress)
        progress("write", 0, 1)
        write_model(folder, cfg, tensors, checkpoint.tokenizer_json)
        progress("write", 1, 1)

        def seal(parity: dict[str, Any]) -> None:
            write_manifest(
                folder,
                name=recipe.name or checkpoint_path.resolve().name,
                config=cfg,
                quantization=_quantization(recipe),
                provenance=_provenance(checkpoint, samples),
                license_note=recipe.license_note,
                parity=parity,
            )

        progress("verify", 0, 1)
        seal({})
        engine = OnnxruntimeEngine(Bundle.open(folder))
        llm_min_cosine = MIN_COSINE_INT4 if recipe.quantization == "int4" else MIN_COSINE
        seal(parity_report(samples.held_out, cfg, tokenizer, torch_params, engine, llm_min_cosine))
        progress("verify", 1, 1)
    return Bundle.open(bundle_path)


def _check_recipe(recipe: Recipe, cfg: VilaConfig) -> None:
    widths = {cfg.llm.hidden_size, cfg.llm.intermediate_size, cfg.llm.num_attention_heads * cfg.llm.head_dim}
    size = recipe.group_size
    if recipe.quantization == "int4" and (size < 16 or size & (size - 1) or any(width % size for width in widths)):
        raise UsageError(
            f"group_size {size}: expected a power of two from 16 on that divides {', '.join(map(str, sorted(widths)))}",
            "these are the numbers of inputs that the LLM's linears have; 128, 64 and 32 are usual",
        )


def _quantise(
    params: dict[str, torch.Tensor],
    cfg: VilaConfig,
    tokenizer: Tokenizer,
    samples: CalibrationSet,
    recipe: Recipe,
    progress: Progress,
) -> Tensors:
    """All tensors as the bundle stores them."""
    floats: dict[str, NDArray[np.float32]] = {name: value.numpy() for name, value in params.items()}
    tensors: Tensors = {}
    if recipe.quantization == "int4":
        embeds = batches(inputs_embeds(samples.search, cfg, tokenizer, params))
        layers = cfg.llm.num_hidden_layers
        progress("quantise", 0, layers)
        for done, block in enumerate(quantise_blocks(params, embeds, cfg.llm, recipe.group_size), 1):
            floats |= block.floats
            for name, linear in block.linears.items():
                del floats[f"{name}.weight"]
                tensors |= int4.to_tensors(name, linear)
            progress("quantise", done, layers)
        assert not any(is_quantised(name) for name in floats)
    if recipe.quantization == "fp32":
        tensors |= floats
    else:
        tensors |= {name: _half(name, value) for name, value in floats.items()}
    return tensors


def _half(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ParityError(
            f"{name}: its largest value {np.abs(values).max():.4g} does not fit into 16 bits (65504)",
            "export with --quant fp32",
        )
    return half


def _quantization(recipe: Recipe) -> dict[str, Any]:
    if recipe.quantization != "int4":
        return {"method": "none", "dtype": "float16" if recipe.quantization == "fp16" else "float32"}
    return {
        "method": "awq",
        "bits": 4,
        "group_size": recipe.group_size,
        "symmetric": False,
        "linears": "decoder blocks",
        "other_weights": "float16",
    }


def _provenance(checkpoint: Checkpoint, samples: CalibrationSet) -> dict[str, Any]:
    return {
        "checkpoint_sha256": checkpoint.sha256(),
        "calibration": samples.description,
        "vila_edge": __version__,
        "onnx": onnx.__version__,
        "torch": torch.__version__,
    }
