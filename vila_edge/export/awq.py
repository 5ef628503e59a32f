"""AWQ: activation-aware scales and clipping before weights are rounded to 4 bits (arXiv 2306.00978).

Input channels that carry large activations are scaled up before rounding, and what feeds them is scaled down,
so the layer computes the same while its salient weights lose less. Scales are found by grid search on the
output of the part of the block that they belong to; then each group's largest weight is clipped where that
helps. One decoder block at a time, on calibration activations of the unquantised model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vila_edge import architecture, int4
from vila_edge.config import LlmConfig
from vila_edge.reference.torch_ops import TorchOps

# The published search (spec section 5, AWQ recipe).
RATIOS = [step / 20 for step in range(20)]
MIN_CHANNEL_SCALE = 1e-4
CLIP_STEPS = [1 - step / 20 for step in range(10)]
CLIP_TOKENS = 512
CLIP_ROWS = 64  # rows of a weight that are clipped at a time: bounds memory

Params = Mapping[str, Tensor]
Batches = Sequence[Tensor]


@dataclass(frozen=True)
class QuantisedBlock:
    """A decoder block after AWQ: its norms, rescaled, and its linears in integers."""

    floats: dict[str, NDArray[np.float32]]
    linears: dict[str, int4.Int4]


@dataclass(frozen=True)
class _ScaleGroup:
    """Linears that share their input, what produces that input, and what the search compares."""

    linears: tuple[str, ...]
    producer: str  # a norm's weight [D], or a linear's weight [D, *] whose rows are divided
    run: Callable[[Params, Tensor], Tensor]  # input of the linears -> output of the part


def quantise_blocks(
    params: Params, hidden_states: Batches, cfg: LlmConfig, group_size: int
) -> Iterator[QuantisedBlock]:
    """Each decoder block in turn. `hidden_states` [B, S, D] are what the first block sees.

    Raises ValueError if a linear's inputs are no whole number of groups.
    """
    for layer in range(cfg.num_hidden_layers):
        yield _quantise_block(params, hidden_states, layer, cfg, group_size)
        hidden_states = [architecture.decoder_layer(TorchOps(params), x, layer, cfg) for x in hidden_states]


def fake_quantise(weight: Tensor, group_size: int) -> Tensor:
    """The weight [N, K] that `int4.quantize` would store, in torch and differentiable in nothing."""
    groups = weight.unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = ((high - low).clamp(min=int4.MIN_SCALE) / int4.MAX_INT).half().float()
    zeros = (-low / scales).round().clamp(0, int4.MAX_INT)
    q = ((groups / scales).round() + zeros).clamp(0, int4.MAX_INT)
    return ((q - zeros) * scales).flatten(-2)


def _quantise_block(
    params: Params, hidden_states: Batches, layer: int, cfg: LlmConfig, group_size: int
) -> QuantisedBlock:
    prefix = f"{architecture.LLM}.layers.{layer}."
    block = {name: value for name, value in params.items() if name.startswith(prefix)}
    inputs = _record(block, hidden_states, layer, cfg)
    scales = {group: _search_scales(group, block, inputs, group_size) for group in _scale_groups(layer, cfg)}
    for group, scale in scales.items():
        _apply_scales(group, scale, block)
        for name in group.linears:
            inputs[name] = [x / scale for x in inputs[name]]
    linears = [name.removesuffix(".weight") for name in block if name.endswith("_proj.weight")]
    for name in linears:
        if not name.endswith(("q_proj", "k_proj")):
            block[f"{name}.weight"] = _clip(block[f"{name}.weight"], inputs[name], group_size)
    return QuantisedBlock(
        {name: value.numpy() for name, value in block.items() if not name.endswith("_proj.weight")},
        {name: int4.quantize(block[f"{name}.weight"].numpy(), group_size) for name in linears},
    )


def _scale_groups(layer: int, cfg: LlmConfig) -> list[_ScaleGroup]:
    p = f"{architecture.LLM}.layers.{layer}"
    attention, mlp = f"{p}.self_attn", f"{p}.mlp"

    def run_attention(params: Params, x: Tensor) -> Tensor:
        return architecture.self_attention(TorchOps(params), x, layer, cfg)

    def run_mlp(params: Params, x: Tensor) -> Tensor:
        return architecture.mlp(TorchOps(params), x, layer, cfg)

    def run_linear(name: str) -> Callable[[Params, Tensor], Tensor]:
        return lambda params, x: F.linear(x, params[f"{name}.weight"])

    qkv = tuple(f"{attention}.{part}_proj" for part in "qkv")
    groups = [_ScaleGroup(qkv, f"{p}.input_layernorm.weight", run_attention)]
    if cfg.num_key_value_heads == cfg.num_attention_heads:  # grouped values have no scale of their own per output
        o_proj = f"{attention}.o_proj"
        groups.append(_ScaleGroup((o_proj,), f"{attention}.v_proj.weight", run_linear(o_proj)))
    gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    groups.append(_ScaleGroup(gate_up, f"{p}.post_attention_layernorm.weight", run_mlp))
    down = f"{mlp}.down_proj"
    groups.append(_ScaleGroup((down,), f"{mlp}.up_proj.weight", run_linear(down)))
    return groups


def _search_scales(group: _ScaleGroup, block: Params, inputs: Mapping[str, Batches], group_size: int) -> Tensor:
    """Scales [K] of the shared input: mean |x| to the power that leaves the least squared error."""
    x = inputs[group.linears[0]]
    magnitude = torch.cat([batch.flatten(0, -2) for batch in x]).abs().mean(0)
    want = [group.run(block, batch) for batch in x]
    best, best_error = torch.ones_like(magnitude), float("inf")
    for ratio in RATIOS:
        scale = magnitude.pow(ratio).clamp(min=MIN_CHANNEL_SCALE)
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = dict(block)
        for name in group.linears:
            rounded[f"{name}.weight"] = fake_quantise(block[f"{name}.weight"] * scale, group_size) / scale
        got = (group.run(rounded, batch) for batch in x)
        error = sum(float((g - w).square().sum()) for g, w in zip(got, want, strict=True))
        if error < best_error:
            best, best_error = scale, error
    return best


def _apply_scales(group: _ScaleGroup, scale: Tensor, block: dict[str, Tensor]) -> None:
    """Scale the linears' columns up and their producer's outputs down: the block computes the same."""
    producer = block[group.producer]
    block[group.producer] = producer / (scale if producer.ndim == 1 else scale[:, None])
    bias = group.producer.removesuffix(".weight") + ".bias"
    if bias in block:
        block[bias] = block[bias] / scale
    for name in group.linears:
        block[f"{name}.weight"] = block[f"{name}.weight"] * scale


def _clip(weight: Tensor, inputs: Batches, group_size: int) -> Tensor:
    """The weight with each group limited to the share of its largest value that leaves the least error."""
    x = torch.cat([batch.flatten(0, -2) for batch in inputs])
    x = x[:: max(1, len(x) // CLIP_TOKENS)][:CLIP_TOKENS].unflatten(-1, (-1, group_size))  # [tokens, groups, G]
    return torch.cat([_clip_rows(rows, x, group_size) for rows in weight.split(CLIP_ROWS)])


def _clip_rows(rows: Tensor, x: Tensor, group_size: int) -> Tensor:
    groups = rows.unflatten(-1, (-1, group_size))  # [rows, groups, G]
    want = torch.einsum("tgk,rgk->trg", x, groups)
    limit = groups.abs().amax(-1, keepdim=True)
    best, best_error = limit.clone(), torch.full_like(limit[..., 0], float("inf"))
    for step in CLIP_STEPS:
        clipped = groups.clamp(-limit * step, limit * step)
        rounded = fake_quantise(clipped.flatten(-2), group_size).unflatten(-1, (-1, group_size))
        error = (torch.einsum("tgk,rgk->trg", x, rounded) - want).square().mean(0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better[..., None], limit * step, best)
    return groups.clamp(-best, best).flatten(-2)


class _RecordingOps(TorchOps):
    """Remembers what every linear is given."""

    def __init__(self, params: Params, inputs: dict[str, list[Tensor]]) -> None:
        super().__init__(params)
        self.inputs = inputs

    def linear(self, x: Tensor, name: str, out: int, bias: bool = True) -> Tensor:
        self.inputs.setdefault(name, []).append(x)
        return super().linear(x, name, out, bias)


def _record(block: Params, hidden_states: Batches, layer: int, cfg: LlmConfig) -> dict[str, Any]:
    inputs: dict[str, list[Tensor]] = {}
    for x in hidden_states:
        architecture.decoder_layer(_RecordingOps(block, inputs), x, layer, cfg)
    return inputs
