"""AWQ: activation-aware scales and clipping before weights are rounded to 4 bits (arXiv 2306.00978).

Input channels that carry large activations are scaled up before rounding, and what feeds them is scaled down,
so the layer computes the same while its salient weights lose less. Scales are found by grid search on the
output of the part of the block that they belong to; then each group's largest weight is clipped where that
helps. One decoder block at a time, on calibration activations of the unquantised model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vila_edge import architecture, int4
from vila_edge.config import LlmConfig
from vila_edge.export.grid import CHUNK_ROWS, Grid
from vila_edge.export.states import IN_MEMORY, Fetch, Kept, KeptStates, States, Store
from vila_edge.export.workers import Workers
from vila_edge.reference.torch_ops import TorchOps

# The published search (spec section 5, AWQ recipe).
RATIOS = [step / 20 for step in range(20)]
MIN_CHANNEL_SCALE = 1e-4
CLIP_STEPS = [1 - step / 20 for step in range(10)]

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class QuantisedBlock:
    """A decoder block after AWQ: its norms and biases, rescaled, and its linears in integers."""

    floats: dict[str, NDArray[np.float32]]
    linears: dict[str, int4.Int4]
    scales: dict[str, NDArray[np.float32]]  # linear -> what its input channels [K] were multiplied with, if they were


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that share their input, what produces that input, and the part of the block that is compared."""

    linears: tuple[str, ...]
    producer: str  # a norm's weight [D], or a linear's weight [D, *] whose rows are divided
    run: Callable[[Params, Tensor], Tensor]  # input of the linears [S, K] -> output of the part [S, D]


@dataclass(frozen=True)
class Activations:
    """What a block was seen to compute on the calibration set, one tensor [S, *] for each sequence."""

    inputs: dict[str, Kept]  # linear -> what it was given; those of one input share the tensors
    states: Kept  # what the block gave to the next


def quantise_block(
    block: dict[str, Tensor],
    states: Sequence[States],
    layer: int,
    cfg: LlmConfig,
    grid: Grid,
    pool: Workers,
    search_dtype: torch.dtype = torch.float32,
    scratch: Path | None = None,
) -> tuple[QuantisedBlock, Sequence[States]]:
    """A decoder block after AWQ, and the unquantised block's outputs.

    block: its parameters in float32, on the device to compute on; it is used up, so that there is no second one in
    memory. states: the calibration set as the block sees it, sequences [S, D]. search_dtype: of the products by which
    scales are compared; the original's has 16 bits. scratch: a folder for activations that are too many for memory.
    Raises ValueError if a linear's inputs are no whole number of groups.
    """
    seen = observe(block, states, layer, cfg, pool, scratch)
    scales = dict[str, NDArray[np.float32]]()
    for group in scale_groups(layer, cfg):
        x = seen.inputs[group.linears[0]]
        scale = search_scales(group, block, x, grid, pool, search_dtype, scratch)
        apply_scales(group, scale, block)  # no later group is searched with what this changes
        scales |= dict.fromkeys(group.linears, scale.cpu().numpy())
        seen.inputs.update(dict.fromkeys(group.linears, x.scaled(scale.reciprocal())))
    linears: dict[str, int4.Int4] = {}
    for name in [name.removesuffix(".weight") for name in block if name.endswith("_proj.weight")]:
        weight = block.pop(f"{name}.weight")
        if not name.endswith(("q_proj", "k_proj")):
            weight = clip(weight, seen.inputs[name], grid, pool)
        linears[name] = grid.quantize(weight, pool)
    floats = {name: value.cpu().numpy() for name, value in block.items()}
    block.clear()
    return QuantisedBlock(floats, linears, scales), KeptStates(seen.states)


def observe(
    block: Params,
    states: Sequence[States],
    layer: int,
    cfg: LlmConfig,
    pool: Workers,
    scratch: Path | None = None,
) -> Activations:
    """Run a block on the calibration set, once, and keep what its linears were given."""

    device = next(iter(block.values())).device

    def run(x: States) -> tuple[dict[str, Tensor], Tensor]:
        ops = _RecordingOps(block)
        y = architecture.decoder_layer(ops, torch.from_numpy(np.array(x)).to(device)[None], layer, cfg)
        return ops.inputs, y[0].cpu()

    shared = {name: group.linears[0] for group in scale_groups(layer, cfg) for name in group.linears[1:]}
    store, inputs, after = Store(scratch), dict[str, list[Fetch]](), list[Fetch]()
    for seen, y in pool.map(run, states):
        after.append(store.put(y))
        for name in [name for name in seen if name not in shared]:
            inputs.setdefault(name, []).append(store.put(seen[name]))
    kept = {name: Kept(fetch) for name, fetch in inputs.items()}
    return Activations(kept | {name: kept[first] for name, first in shared.items()}, Kept(after))


def scale_groups(layer: int, cfg: LlmConfig) -> list[ScaleGroup]:
    """The groups of the paper. Grouped queries: v_proj has fewer outputs than o_proj inputs, so o_proj has no scale."""
    p = f"{architecture.LLM}.layers.{layer}"
    attention, mlp = f"{p}.self_attn", f"{p}.mlp"

    def run_attention(params: Params, x: Tensor) -> Tensor:
        return architecture.self_attention(_SearchOps(params), x[None], layer, cfg)[0]

    def run_mlp(params: Params, x: Tensor) -> Tensor:
        return architecture.mlp(_SearchOps(params), x, layer, cfg)

    def run_linear(name: str) -> Callable[[Params, Tensor], Tensor]:
        return lambda params, x: _SearchOps(params).linear(x, name, cfg.hidden_size, bias=False)

    qkv = tuple(f"{attention}.{part}_proj" for part in "qkv")
    groups = [ScaleGroup(qkv, f"{p}.input_layernorm.weight", run_attention)]
    if cfg.num_key_value_heads == cfg.num_attention_heads:
        o_proj = f"{attention}.o_proj"
        groups.append(ScaleGroup((o_proj,), f"{attention}.v_proj.weight", run_linear(o_proj)))
    gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    groups.append(ScaleGroup(gate_up, f"{p}.post_attention_layernorm.weight", run_mlp))
    down = f"{mlp}.down_proj"
    groups.append(ScaleGroup((down,), f"{mlp}.up_proj.weight", run_linear(down)))
    return groups


def search_scales(
    group: ScaleGroup,
    block: Params,
    x: Sequence[Tensor],
    grid: Grid,
    pool: Workers,
    dtype: torch.dtype = torch.float32,
    scratch: Path | None = None,
) -> Tensor:
    """Scales [K] of the shared input: mean |x| to the power that leaves the least squared error."""
    tokens = sum(len(sequence) for sequence in x)
    magnitude = torch.stack(list(pool.map(lambda sequence: sequence.abs().sum(0), x))).sum(0) / tokens
    part = {name: value.to(dtype) if name.endswith("_proj.weight") else value for name, value in block.items()}
    want = Store(scratch, IN_MEMORY // 4).keep(pool.map(lambda sequence: group.run(part, sequence), x))
    rounded = part | {f"{name}.weight": torch.empty_like(part[f"{name}.weight"]) for name in group.linears}
    best, best_error = torch.ones_like(magnitude), float("inf")
    for ratio in RATIOS:
        scale = magnitude.pow(ratio).clamp(min=MIN_CHANNEL_SCALE)
        scale = scale / (scale.max() * scale.min()).sqrt()
        for name in group.linears:
            _round_scaled(block[f"{name}.weight"], scale, grid, rounded[f"{name}.weight"], pool)
        errors = pool.map(lambda pair: _squared_error(group.run(rounded, pair[0]), pair[1]), zip(x, want, strict=True))
        error = 0.0
        with closing(errors):
            for of_sequence in errors:
                error += of_sequence
                if error >= best_error:  # whatever the other sequences say
                    break
        if error < best_error:
            best, best_error = scale, error
    return best


def apply_scales(group: ScaleGroup, scale: Tensor, block: dict[str, Tensor]) -> None:
    """Scale the linears' columns up and their producer's outputs down: the block computes the same."""
    producer = block[group.producer]
    block[group.producer] = producer / (scale if producer.ndim == 1 else scale[:, None])
    bias = group.producer.removesuffix(".weight") + ".bias"
    if bias in block:
        block[bias] = block[bias] / scale
    for name in group.linears:
        block[f"{name}.weight"] = block[f"{name}.weight"] * scale


def clip(weight: Tensor, inputs: Sequence[Tensor], grid: Grid, pool: Workers) -> Tensor:
    """The weight [N, K] with each group limited to the share of its largest value that leaves the least error.

    The squared error of a group's part of the outputs is a quadratic form of the change of its weights, whose
    matrix is the same for all rows.
    """
    covariance = sum(pool.map(lambda x: _group_products(x, grid.group_size), inputs))
    assert isinstance(covariance, Tensor)
    return torch.cat(list(pool.map(lambda rows: _clip_rows(rows, covariance, grid), weight.split(CHUNK_ROWS))))


def _group_products(x: Tensor, group_size: int) -> Tensor:
    """x [S, K] to the sums of products of inputs [K / G, G, G] within each group."""
    groups = x.unflatten(-1, (-1, group_size)).transpose(0, 1)
    return groups.transpose(1, 2) @ groups


def _clip_rows(rows: Tensor, covariance: Tensor, grid: Grid) -> Tensor:
    groups = rows.unflatten(-1, (-1, grid.group_size))  # [rows, groups, G]
    limit = groups.abs().amax(-1, keepdim=True)
    best, best_error = limit.clone(), torch.full_like(limit[..., 0], float("inf"))
    for step in CLIP_STEPS:
        clipped = groups.clamp(-limit * step, limit * step)
        change = (grid.round(clipped.flatten(-2)).unflatten(-1, (-1, grid.group_size)) - groups).transpose(0, 1)
        error = ((change @ covariance) * change).sum(-1).T
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better[..., None], limit * step, best)
    return groups.clamp(-best, best).flatten(-2)


def _round_scaled(weight: Tensor, scale: Tensor, grid: Grid, out: Tensor, pool: Workers) -> None:
    """What a weight is after it was scaled, rounded and scaled back, into `out`."""

    def rows(start: int) -> None:
        chunk = slice(start, start + CHUNK_ROWS)
        out[chunk] = grid.round(weight[chunk] * scale).div_(scale)

    pool.each(rows, range(0, len(weight), CHUNK_ROWS))


def _squared_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).square_().sum())


class _SearchOps(TorchOps):
    """Products in the weights' type; in float32 by oneDNN, which is faster on CPUs that MKL does not favour."""

    def linear(self, x: Tensor, name: str, out: int, bias: bool = True) -> Tensor:
        weight, added = self.params[f"{name}.weight"], self.params[f"{name}.bias"] if bias else None
        if weight.dtype != x.dtype:
            product = F.linear(x.to(weight.dtype), weight).to(x.dtype)
            return product if added is None else product + added
        if _ONEDNN_LINEAR is None or x.device.type != "cpu":
            return F.linear(x, weight, added)
        product = _ONEDNN_LINEAR(x, weight, added, "none", [], "")
        return product


_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class _RecordingOps(TorchOps):
    """Remembers what every linear is given."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.inputs: dict[str, Tensor] = {}

    def linear(self, x: Tensor, name: str, out: int, bias: bool = True) -> Tensor:
        self.inputs[name] = x[0]
        return super().linear(x, name, out, bias)
