"""AWQ: a block that is rescaled computes the same, and a search beats plain rounding where it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import TINY, random_parameters
from vila_edge import architecture, int4
from vila_edge.config import LlmConfig
from vila_edge.export import awq
from vila_edge.export.grid import Grid
from vila_edge.export.states import States
from vila_edge.export.workers import Workers, workers
from vila_edge.reference.torch_ops import TorchOps

GROUP = 32
GRID = Grid(GROUP)
MHA = dataclasses.replace(TINY, llm=dataclasses.replace(TINY.llm, num_key_value_heads=4))
BIASED = dataclasses.replace(MHA, llm=dataclasses.replace(MHA.llm, model_type="qwen2"))
MODELS = {"grouped queries": TINY, "multi-head": MHA, "multi-head with biases": BIASED}


def outlier_parameters(cfg: LlmConfig) -> dict[str, Tensor]:
    """Random weights, with a few input channels that carry activations twenty times as large."""
    full = next(model for model in MODELS.values() if model.llm is cfg)
    params = {name: torch.from_numpy(value) for name, value in random_parameters(full).items()}
    for layer in range(cfg.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            params[f"llm.model.layers.{layer}.{norm}.weight"][::13] *= 20
    return params


def hidden_states(seed: int) -> Sequence[States]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 64, generator=generator).numpy() for length in (40, 40, 200, 200, 200)]


def quantise_blocks(params: dict[str, Tensor], cfg: LlmConfig, grid: Grid = GRID) -> list[awq.QuantisedBlock]:
    """All blocks, each on what the ones before made of the calibration set."""
    states, blocks = hidden_states(0), list[awq.QuantisedBlock]()
    with workers(2) as pool:
        for layer in range(cfg.num_hidden_layers):
            block, states = awq.quantise_block(block_of(params, layer), states, layer, cfg, grid, pool)
            blocks.append(block)
    return blocks


def block_of(params: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {name: value for name, value in params.items() if name.startswith(f"llm.model.layers.{layer}.")}


def run_decoder(params: dict[str, Tensor], x: Tensor, cfg: LlmConfig) -> Tensor:
    return architecture.decoder(TorchOps(params), x, cfg)


@pytest.mark.parametrize("cfg", [model.llm for model in MODELS.values()], ids=list(MODELS))
def test_scaling_alone_changes_nothing(cfg: LlmConfig) -> None:
    params = outlier_parameters(cfg)
    block = block_of(params, 0)
    scaled = dict(block)
    groups = awq.scale_groups(0, cfg)
    assert len(groups) == (3 if cfg is TINY.llm else 4)
    for group in groups:
        width = scaled[f"{group.linears[0]}.weight"].shape[1]
        awq.apply_scales(group, torch.linspace(0.2, 5, width), scaled)
    assert not torch.equal(scaled[f"{groups[0].linears[0]}.weight"], block[f"{groups[0].linears[0]}.weight"])
    x = torch.from_numpy(hidden_states(0)[0])[None]
    want, got = (architecture.decoder_layer(TorchOps(p), x, 0, cfg) for p in (block, scaled))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cfg", [TINY.llm, MHA.llm], ids=["grouped queries", "multi-head"])
@torch.inference_mode()
def test_the_search_beats_rounding_on_unseen_activations(cfg: LlmConfig) -> None:
    params = outlier_parameters(cfg)
    searched, rounded = dict(params), dict(params)
    for block in quantise_blocks(params, cfg):
        searched |= {name: torch.from_numpy(value) for name, value in block.floats.items()}
        for name, linear in block.linears.items():
            searched[f"{name}.weight"] = torch.from_numpy(linear.dequantize())
            plain = int4.quantize(params[f"{name}.weight"].numpy(), GROUP)
            rounded[f"{name}.weight"] = torch.from_numpy(plain.dequantize())
    x = torch.from_numpy(hidden_states(1)[4])[None]
    want = run_decoder(params, x, cfg)
    awq_error, rtn_error = ((run_decoder(p, x, cfg) - want).square().mean().item() for p in (searched, rounded))
    assert awq_error < 0.6 * rtn_error


@torch.inference_mode()
def test_clipping_never_makes_the_groups_outputs_worse() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(40, 64, generator=generator) ** 3
    x = torch.randn(600, 64, generator=generator)
    with workers(2) as pool:
        clipped = awq.clip(weight, [x[:250], x[250:]], GRID, pool)
    assert (clipped.abs() <= weight.abs() + 1e-6).all()
    assert not torch.equal(clipped, weight)

    def error(candidate: Tensor) -> Tensor:
        """Of each row and group, summed over tokens."""
        wrong = (GRID.round(candidate) - weight).unflatten(-1, (-1, GROUP))
        return torch.einsum("tgk,rgk->trg", x.unflatten(-1, (-1, GROUP)), wrong).square().sum(0)

    assert (error(clipped) <= error(weight) * (1 + 1e-5)).all()


@torch.inference_mode()
def test_what_is_clipped_sees_the_activations_of_its_scaled_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys are left whole (their product must not lose its peaks); scales cancel in the others."""
    cfg, params = TINY.llm, outlier_parameters(TINY.llm)
    block, outputs = block_of(params, 0), list[Tensor]()
    with workers(1) as pool:
        recorded = awq.observe(block, hidden_states(0), 0, cfg, pool).inputs

    def no_clip(weight: Tensor, inputs: Sequence[Tensor], grid: Grid, pool: Workers) -> Tensor:
        outputs.append(inputs[0] @ weight.T)
        return weight

    monkeypatch.setattr(awq, "clip", no_clip)
    quantise_blocks(params, dataclasses.replace(cfg, num_hidden_layers=1))
    names = [name.removesuffix(".weight") for name in block if name.endswith("_proj.weight")]
    clipped = [name for name in names if not name.endswith(("q_proj", "k_proj"))]
    assert len(outputs) == len(clipped) == 5
    for name, got in zip(clipped, outputs, strict=True):
        want = recorded[name][0] @ block[f"{name}.weight"].T
        produces = next((group for group in awq.scale_groups(0, cfg) if group.producer == f"{name}.weight"), None)
        if produces is None:
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
        else:  # its rows are divided by what its reader's columns are multiplied with
            ratio = want.flatten(0, -2).norm(dim=0) / got.flatten(0, -2).norm(dim=0)
            torch.testing.assert_close(got * ratio, want, atol=1e-3, rtol=1e-4)


def test_integers_use_the_whole_range() -> None:
    params = outlier_parameters(TINY.llm)
    with torch.inference_mode():
        block = quantise_blocks(params, TINY.llm)[0]
    q = block.linears["llm.model.layers.0.mlp.up_proj"].q
    assert (q.min(), q.max()) == (0, 15)
    assert set(block.linears) == {
        f"llm.model.layers.0.{name}_proj"
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert np.isfinite(block.floats["llm.model.layers.0.input_layernorm.weight"]).all()


@torch.inference_mode()
def test_a_symmetric_grid_has_zero_in_its_middle_and_is_searched_too() -> None:
    params, x = outlier_parameters(TINY.llm), torch.from_numpy(hidden_states(1)[4])[None]
    searched, rounded = dict(params), dict(params)
    for block in quantise_blocks(params, TINY.llm, Grid(GROUP, symmetric=True)):
        searched |= {name: torch.from_numpy(value) for name, value in block.floats.items()}
        for name, linear in block.linears.items():
            assert (linear.zeros == int4.MIDDLE).all()
            searched[f"{name}.weight"] = torch.from_numpy(linear.dequantize())
            plain = int4.quantize(params[f"{name}.weight"].numpy(), GROUP, symmetric=True)
            rounded[f"{name}.weight"] = torch.from_numpy(plain.dequantize())
    want = run_decoder(params, x, TINY.llm)
    awq_error, rtn_error = ((run_decoder(p, x, TINY.llm) - want).square().mean().item() for p in (searched, rounded))
    assert awq_error < 0.6 * rtn_error


@torch.inference_mode()
def test_the_number_of_threads_changes_no_bit() -> None:
    params, found = outlier_parameters(MHA.llm), []
    for threads in (1, 2, 5):
        with workers(threads) as pool:
            found.append(awq.quantise_block(block_of(params, 0), hidden_states(0), 0, MHA.llm, GRID, pool))
    for block, states in found[1:]:
        for name, linear in block.linears.items():
            np.testing.assert_array_equal(linear.q, found[0][0].linears[name].q)
            np.testing.assert_array_equal(linear.scales, found[0][0].linears[name].scales)
        for got, want in zip(states, found[0][1], strict=True):
            np.testing.assert_array_equal(got, want)


@torch.inference_mode()
def test_states_that_go_on_are_those_of_the_unquantised_block() -> None:
    params = outlier_parameters(MHA.llm)
    with workers(2) as pool:
        _, states = awq.quantise_block(block_of(params, 0), hidden_states(0), 0, MHA.llm, GRID, pool)
    for before, after in zip(hidden_states(0), states, strict=True):
        want = architecture.decoder_layer(TorchOps(params), torch.from_numpy(before)[None], 0, MHA.llm)[0]
        np.testing.assert_array_equal(after, want.numpy())
