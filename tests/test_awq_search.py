"""The search of AWQ against the same in plain words: every candidate rounded whole, compared on all tokens at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.test_awq import GRID, GROUP, MHA, block_of, hidden_states, outlier_parameters
from tests.tiny import TINY
from vila_edge import architecture, int4
from vila_edge.config import LlmConfig
from vila_edge.errors import VilaEdgeError
from vila_edge.export import awq, states
from vila_edge.export.states import Kept, States, Store
from vila_edge.export.workers import workers
from vila_edge.reference.torch_ops import TorchOps

LAYER = "llm.model.layers.0"
Part = Callable[[dict[str, Tensor], Tensor], Tensor]  # block, one sequence of inputs -> what is compared


def test_the_grid_is_the_published_one() -> None:
    twentieths = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
    assert pytest.approx([*twentieths, 0.95]) == awq.RATIOS
    assert pytest.approx([1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]) == awq.CLIP_STEPS
    assert awq.MIN_CHANNEL_SCALE == 1e-4


def attention(block: dict[str, Tensor], x: Tensor) -> Tensor:
    return architecture.self_attention(TorchOps(block), x[None], 0, MHA.llm)[0]


def feed_forward(block: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up, down = (block[f"{LAYER}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def product(name: str) -> Part:
    return lambda block, x: x @ block[f"{LAYER}.{name}.weight"].T


PARTS: list[tuple[tuple[str, ...], Part]] = [
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attention),
    (("self_attn.o_proj",), product("self_attn.o_proj")),
    (("mlp.gate_proj", "mlp.up_proj"), feed_forward),
    (("mlp.down_proj",), product("mlp.down_proj")),
]


def brute_force(block: dict[str, Tensor], linears: tuple[str, ...], part: Part, inputs: list[Tensor]) -> Tensor:
    """The scales [K] that leave the least squared error, summed over all tokens of all sequences."""
    magnitude = torch.cat(inputs).abs().mean(0)
    found: list[tuple[float, Tensor]] = []
    for step in range(20):
        scale = magnitude.pow(step * 0.05).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        candidate = dict(block)
        for name in linears:
            weight = block[f"{LAYER}.{name}.weight"]
            stored = int4.quantize((weight * scale).numpy(), GROUP).dequantize()
            candidate[f"{LAYER}.{name}.weight"] = torch.from_numpy(stored) / scale
        error = sum(float((part(candidate, x) - part(block, x)).double().square().sum()) for x in inputs)
        found.append((error, scale))
    return min(found, key=lambda pair: pair[0])[1]


def prepared(zero_channel: bool) -> tuple[dict[str, Tensor], list[States]]:
    """A block with outliers, and many short sequences unlike a long one: one mean for each would count them for more."""
    block, rng = block_of(outlier_parameters(MHA.llm), 0), np.random.default_rng(0)
    if zero_channel:  # its mean is 0, and so would its scale be
        block[f"{LAYER}.input_layernorm.weight"][5] = 0
        block[f"{LAYER}.post_attention_layernorm.weight"][40] = 0
    channels, sequences = rng.permutation(64)[:8], [rng.standard_normal((1, 64)).astype(np.float32) for _ in range(80)]
    for x in sequences:
        x[:, channels] *= 10
    return block, [*sequences, rng.standard_normal((400, 64)).astype(np.float32)]


@pytest.mark.parametrize("zero_channel", [False, True])
@pytest.mark.parametrize("part", range(len(PARTS)), ids=[linears[0] for linears, _ in PARTS])
@torch.inference_mode()
def test_the_scales_are_those_of_a_brute_force_search(part: int, zero_channel: bool) -> None:
    block, sequences = prepared(zero_channel)
    linears, compared = PARTS[part]
    group = awq.scale_groups(0, MHA.llm)[part]
    assert group.linears == tuple(f"{LAYER}.{name}" for name in linears)
    with workers(2) as pool:
        seen = awq.observe(block, sequences, 0, MHA.llm, pool)
        inputs = list(seen.inputs[group.linears[0]])
        got = awq.search_scales(group, block, inputs, GRID, pool)
    want = brute_force(block, linears, compared, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    assert got.isfinite().all() and (got > 0).all()


@torch.inference_mode()
def test_every_group_is_searched_on_the_block_as_it_was() -> None:
    """Though it is used up on the way, so that there is no second one in memory."""
    block, sequences = prepared(zero_channel=False)
    untouched = {name: value.clone() for name, value in block.items()}
    with workers(2) as pool:
        seen = awq.observe(block, sequences, 0, MHA.llm, pool)
        quantised, _ = awq.quantise_block(block, sequences, 0, MHA.llm, GRID, pool)
    assert block == {}
    for linears, compared in PARTS:
        want = brute_force(untouched, linears, compared, list(seen.inputs[f"{LAYER}.{linears[0]}"]))
        for name in linears:
            np.testing.assert_allclose(quantised.scales[f"{LAYER}.{name}"], want.numpy(), rtol=1e-4)


@pytest.mark.parametrize("cfg", [TINY.llm, MHA.llm], ids=["grouped queries", "multi-head"])
@torch.inference_mode()
def test_activations_on_the_disk_change_no_bit(cfg: LlmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, found = outlier_parameters(cfg), []
    for limit in (states.IN_MEMORY, 100_000, 0):
        monkeypatch.setattr(awq, "Store", lambda folder, _=0, limit=limit: Store(folder, limit))
        with workers(2) as pool:
            block = block_of(params, 0)
            found.append(awq.quantise_block(block, hidden_states(0), 0, cfg, GRID, pool, torch.float32, tmp_path))
    for quantised, after in found[1:]:
        for name, linear in quantised.linears.items():
            np.testing.assert_array_equal(linear.q, found[0][0].linears[name].q)
            np.testing.assert_array_equal(linear.scales, found[0][0].linears[name].scales)
        for got, want in zip(after, found[0][1], strict=True):
            np.testing.assert_array_equal(got, want)
    assert not [*tmp_path.iterdir()]  # no name leads to the file, so nothing is left of it


def test_what_is_past_the_limit_takes_no_memory(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=1000)
    tensors = [torch.arange(100, dtype=torch.float32) + i for i in range(5)]
    kept = store.keep(tensors)
    assert [a is b for a, b in zip(kept, tensors, strict=True)] == [True, True, False, False, False]
    for got, want in zip(kept.scaled(torch.tensor(2.0))[1:], tensors[1:], strict=True):
        torch.testing.assert_close(got, 2 * want, rtol=0, atol=0)
    assert isinstance(kept[2:], Kept) and len(kept[2:]) == 3


def test_a_full_disk_behind_the_limit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(VilaEdgeError, match=r"cannot write to .*: No space left on device") as error:
        Store(tmp_path, limit=0).put(torch.zeros(3))
    assert "--calibration-tokens" in error.value.hint


def test_what_is_scaled_twice_is_scaled_by_both() -> None:
    kept = Store().keep([torch.ones(2, 3)])
    found = kept.scaled(torch.tensor([1.0, 2.0, 3.0])).scaled(torch.tensor([5.0, 5.0, 7.0]))
    assert found[0].tolist() == [[5, 10, 21]] * 2
