"""vila-edge's own search: scales and clipping. What observing and the search for scales took is noted apart.

A tool that searches scales alone (llm-compressor) is to be compared with that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.awq_peers.common import LINEARS, NORMS, Job, Measured, finish, measure, read_job
from vila_edge import architecture
from vila_edge.config import LlmConfig, RopeConfig
from vila_edge.export import awq
from vila_edge.export.grid import Grid
from vila_edge.export.workers import workers

LAYER = f"{architecture.LLM}.layers.0"


def main() -> None:
    job, measured = read_job(), Measured()
    cfg = llm_config(job)
    params = {f"llm.{name}": value for name, value in load_file(job.folder / "model.safetensors").items()}
    with torch.inference_mode():
        hidden_states = params[f"{architecture.EMBED_TOKENS}.weight"][torch.tensor(job.ids)]
        for name in ("observe", "search_scales"):
            setattr(awq, name, timed(getattr(awq, name), measured.notes))
        with measure(measured):
            block = quantise(params, hidden_states, cfg, job)
    finish(job, block, measured, ["vila-edge"])


def timed(work: Callable[..., Any], notes: dict[str, float]) -> Callable[..., Any]:
    """The same, with its seconds added to the notes."""

    def run(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = work(*arguments)
        notes["scales_alone_seconds"] = notes.get("scales_alone_seconds", 0.0) + time.perf_counter() - start
        return result

    return run


def quantise(params: Mapping[str, Tensor], hidden_states: Tensor, cfg: LlmConfig, job: Job) -> dict[str, Tensor]:
    """The block's weights after the search: name inside the layer -> floats."""
    layer = {name: value for name, value in params.items() if name.startswith(f"{LAYER}.")}
    with workers(job.threads) as pool:
        block, _ = awq.quantise_block(
            layer, list(hidden_states.numpy()), 0, cfg, Grid(job.group_size), pool, job.torch_dtype
        )
    weights = {f"{name}.weight": torch.from_numpy(block.floats[f"{LAYER}.{name}.weight"]) for name in NORMS}
    linears = {f"{name}.weight": torch.from_numpy(block.linears[f"{LAYER}.{name}"].dequantize()) for name in LINEARS}
    return weights | linears


def llm_config(job: Job) -> LlmConfig:
    values = json.loads((job.folder / "config.json").read_text())
    return LlmConfig(
        model_type="llama",
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=1,
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=values["hidden_size"] // values["num_attention_heads"],
        vocab_size=values["vocab_size"],
        context_length=values["max_position_embeddings"],
        rms_norm_eps=values["rms_norm_eps"],
        rope=RopeConfig(values["rope_theta"]),
        tie_word_embeddings=True,
    )


if __name__ == "__main__":
    main()
