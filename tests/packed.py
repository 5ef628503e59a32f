"""Tiny checkpoints in 4 bits, as AutoAWQ and llm-awq leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from vila_edge import int4
from vila_edge.export.awq_formats import Format, pack_gemm, pack_v2
from vila_edge.int4 import Int4
from vila_edge.parameters import is_quantised

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def quantization_config(group_size: int, **changes: Any) -> dict[str, Any]:
    """What AutoAWQ writes into config.json; None removes a key."""
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def llm_folder(checkpoint: Path) -> Path:
    return checkpoint / "llm" if (checkpoint / "llm").is_dir() else checkpoint


def pack_checkpoint(checkpoint: Path, fmt: Format, group_size: int) -> dict[str, Int4]:
    """Quantise the LLM of a float checkpoint in its place; the integers by the names of the linears."""
    folder = llm_folder(checkpoint)
    tensors: dict[str, NDArray[Any]] = load_file(folder / WEIGHTS)
    linears: dict[str, Int4] = {}
    for name in [name for name in tensors if is_quantised(f"llm.{name}")]:
        linear = name.removesuffix(".weight")
        linears[f"llm.{linear}"] = weight = int4.quantize(tensors.pop(name), group_size)
        tensors |= (pack_gemm if fmt == "autoawq-gemm" else pack_v2)(linear, weight)
    assert linears
    if fmt == "autoawq-gemm":
        save_file(tensors, folder / WEIGHTS)
        edit(folder / "config.json", quantization_config=quantization_config(group_size))
    else:
        (folder / WEIGHTS).unlink()
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00004.safetensors"}}
        (folder / INDEX).write_text(json.dumps(index))
        kept = {name: torch.from_numpy(np.array(values)) for name, values in tensors.items()}
        torch.save(kept, folder / f"tiny-w4-g{group_size}-awq-v2.pt")
    return linears
