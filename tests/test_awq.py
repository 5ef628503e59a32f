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
from vila_edge.reference.torch_ops import TorchOps

GROUP = 32
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


def hidden_states(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 40, 64, generator=generator), torch.randn(3, 200, 64, generator=generator)]


def run_decoder(params: dict[str, Tensor], x: Tensor, cfg: LlmConfig) -> Tensor:
    return architecture.decoder(TorchOps(params), x, cfg)


@pytest.mark.parametrize("cfg", [model.llm for model in MODELS.values()], ids=list(MODELS))
def test_scaling_alone_changes_nothing(cfg: LlmConfig) -> None:
    params = outlier_parameters(cfg)
    block = {name: value for name, value in params.items() if name.startswith("llm.model.layers.0.")}
    scaled = dict(block)
    groups = awq._scale_groups(0, cfg)
    assert len(groups) == (3 if cfg is TINY.llm else 4)
    for group in groups:
        width = scaled[f"{group.linears[0]}.weight"].shape[1]
        awq._apply_scales(group, torch.linspace(0.2, 5, width), scaled)
    assert not torch.equal(scaled[f"{groups[0].linears[0]}.weight"], block[f"{groups[0].linears[0]}.weight"])
    x = hidden_states(0)[0]
    want, got = (architecture.decoder_layer(TorchOps(p), x, 0, cfg) for p in (block, scaled))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cfg", [TINY.llm, MHA.llm], ids=["grouped queries", "multi-head"])
@torch.inference_mode()
def test_the_search_beats_rounding_on_unseen_activations(cfg: LlmConfig) -> None:
    params = outlier_parameters(cfg)
    searched, rounded = dict(params), dict(params)
    for block in awq.quantise_blocks(params, hidden_states(0), cfg, GROUP):
        searched |= {name: torch.from_numpy(value) for name, value in block.floats.items()}
        for name, linear in block.linears.items():
            searched[f"{name}.weight"] = torch.from_numpy(linear.dequantize())
            plain = int4.quantize(params[f"{name}.weight"].numpy(), GROUP)
            rounded[f"{name}.weight"] = torch.from_numpy(plain.dequantize())
    x = hidden_states(1)[1]
    want = run_decoder(params, x, cfg)
    awq_error, rtn_error = ((run_decoder(p, x, cfg) - want).square().mean().item() for p in (searched, rounded))
    assert awq_error < 0.6 * rtn_error


@torch.inference_mode()
def test_clipping_never_makes_the_groups_outputs_worse() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(40, 64, generator=generator) ** 3
    x = torch.randn(600, 64, generator=generator)
    clipped = awq._clip(weight, [x], GROUP)
    assert (clipped.abs() <= weight.abs() + 1e-6).all()
    assert not torch.equal(clipped, weight)

    def error(candidate: Tensor) -> Tensor:
        """Of each row and group, summed over tokens."""
        wrong = (awq.fake_quantise(candidate, GROUP) - weight).unflatten(-1, (-1, GROUP))
        return torch.einsum("tgk,rgk->trg", x[:512].unflatten(-1, (-1, GROUP)), wrong).square().sum(0)

    assert (error(clipped) <= error(weight) * (1 + 1e-5)).all()


@torch.inference_mode()
def test_what_is_clipped_sees_the_activations_of_its_scaled_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys are left whole (their product must not lose its peaks); scales cancel in the others."""
    cfg, params = TINY.llm, outlier_parameters(TINY.llm)
    block = {name: value for name, value in params.items() if name.startswith("llm.model.layers.0.")}
    recorded = awq._record(block, hidden_states(0), 0, cfg)
    outputs: list[Tensor] = []

    def no_clip(weight: Tensor, inputs: Sequence[Tensor], group_size: int) -> Tensor:
        outputs.append(inputs[0] @ weight.T)
        return weight

    monkeypatch.setattr(awq, "_clip", no_clip)
    next(awq.quantise_blocks(params, hidden_states(0), cfg, GROUP))
    names = [name.removesuffix(".weight") for name in block if name.endswith("_proj.weight")]
    clipped = [name for name in names if not name.endswith(("q_proj", "k_proj"))]
    assert len(outputs) == len(clipped) == 5
    for name, got in zip(clipped, outputs, strict=True):
        want = recorded[name][0] @ block[f"{name}.weight"].T
        produces = next((group for group in awq._scale_groups(0, cfg) if group.producer == f"{name}.weight"), None)
        if produces is None:
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
        else:  # its rows are divided by what its reader's columns are multiplied with
            ratio = want.flatten(0, -2).norm(dim=0) / got.flatten(0, -2).norm(dim=0)
            torch.testing.assert_close(got * ratio, want, atol=1e-3, rtol=1e-4)


def test_integers_use_the_whole_range() -> None:
    params = outlier_parameters(TINY.llm)
    with torch.inference_mode():
        block = next(awq.quantise_blocks(params, hidden_states(0), TINY.llm, GROUP))
    q = block.linears["llm.model.layers.0.mlp.up_proj"].q
    assert (q.min(), q.max()) == (0, 15)
    assert set(block.linears) == {
        f"llm.model.layers.0.{name}_proj"
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert np.isfinite(block.floats["llm.model.layers.0.input_layernorm.weight"]).all()
