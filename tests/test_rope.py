"""Rotary position embeddings against those of transformers: the table, and logits with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.graphs import graph_engine
from tests.tiny import TINY, random_parameters
from vila_edge.architecture import rope_table
from vila_edge.config import LlmConfig, RopeConfig, VilaConfig
from vila_edge.reference.engine import numpy_engine
from vila_edge.reference.torch_engine import numpy_parameters_engine as torch_engine

PARAMS = random_parameters(TINY)
IDS = np.random.default_rng(8).integers(0, TINY.llm.vocab_size, 60).tolist()

ROPES = {
    "default": RopeConfig(10_000.0),
    "qwen2": RopeConfig(1_000_000.0),
    "linear 2": RopeConfig(10_000.0, "linear", 2.0),
    "linear 3": RopeConfig(10_000.0, "linear", 3.0),
    "llama 3.1": RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192),
    "llama 3.2": RopeConfig(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192),
}
# Squeezed so hard that it shows in a short prompt; llama3's waves are kept, blended and divided.
SHORT_ROPES = {
    "linear": RopeConfig(10_000.0, "linear", 3.0),
    "llama3": RopeConfig(10_000.0, "llama3", 8.0, 1.0, 4.0, 32),
}
ENGINES: dict[str, Callable[[VilaConfig, dict[str, NDArray[Any]], Path], Any]] = {
    "numpy": lambda cfg, params, folder: numpy_engine(cfg, params),
    "torch": lambda cfg, params, folder: torch_engine(cfg, params),
    "graph": graph_engine,
}


def llama_config(cfg: LlmConfig) -> LlamaConfig:
    rope = cfg.rope
    keys = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    parameters = {key: getattr(rope, key) for key in ("rope_type", "rope_theta", *keys[rope.rope_type])}
    if rope.rope_type == "llama3":
        parameters["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return LlamaConfig(
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        vocab_size=cfg.vocab_size,
        max_position_embeddings=131_072,
        rms_norm_eps=cfg.rms_norm_eps,
        rope_parameters=parameters,
    )


def with_rope(rope: RopeConfig, head_dim: int = TINY.llm.head_dim) -> VilaConfig:
    return dataclasses.replace(TINY, llm=dataclasses.replace(TINY.llm, rope=rope, head_dim=head_dim))


@torch.inference_mode()
def transformers_table(rope: RopeConfig, dim: int, stop: int) -> NDArray[np.float32]:
    """Cosines and sines [2, stop, dim / 2]; transformers has each twice, for the two halves of a head."""
    module = LlamaRotaryEmbedding(llama_config(with_rope(rope, dim).llm))
    table = torch.stack(module(torch.zeros(1), torch.arange(stop)[None]))[:, 0]
    assert torch.equal(table[..., : dim // 2], table[..., dim // 2 :])
    return table[..., : dim // 2].numpy()


@torch.inference_mode()
def transformers_logits(cfg: VilaConfig) -> NDArray[np.float32]:
    model = LlamaForCausalLM(llama_config(cfg.llm))
    state = {name.removeprefix("llm."): value for name, value in PARAMS.items() if name.startswith("llm.")}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("dim", [16, 80, 128])
@pytest.mark.parametrize("name", ROPES)
def test_the_table_is_that_of_transformers(name: str, dim: int) -> None:
    """Up to one step of float32 in a frequency, and half of one in the angle: 1e-5 at position 64, 1.5e-3 at 8192."""
    got = np.stack(rope_table(0, 8193, dim, ROPES[name]))
    error = np.abs(got - transformers_table(ROPES[name], dim, 8193))
    assert got.dtype == np.float32
    assert (error.max((0, 2)) <= 1.5 * 2**-23 * (1 + np.arange(8193))).all()


@pytest.mark.parametrize("name", ROPES)
def test_a_part_of_the_table_is_the_same_as_in_the_whole(name: str) -> None:
    whole, part = rope_table(0, 300, 16, ROPES[name]), rope_table(117, 300, 16, ROPES[name])
    for one, other in zip(whole, part, strict=True):
        np.testing.assert_array_equal(one[117:], other)


def test_linear_scaling_turns_as_far_in_as_many_times_the_positions() -> None:
    plain, scaled = rope_table(0, 100, 16, ROPES["default"]), rope_table(0, 300, 16, ROPES["linear 3"])
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(other[::3], one, atol=1e-6)


def test_llama3_keeps_fast_waves_divides_slow_ones_and_blends_between() -> None:
    """Llama 3.1: waves that fit four times into 8192 positions are kept, those that do not fit once are divided."""
    dim, rope = 128, ROPES["llama 3.1"]
    plain = 500_000.0 ** -(np.arange(0, dim, 2) / dim)
    got = np.arcsin(rope_table(1, 2, dim, rope)[1][0].astype(np.float64))
    lengths = 2 * np.pi / plain
    fast, slow = lengths < 8192 / 4, lengths > 8192
    np.testing.assert_allclose(got[fast], plain[fast], rtol=1e-6)
    np.testing.assert_allclose(got[slow], plain[slow] / 8, rtol=1e-6)
    between = ~fast & ~slow
    assert between.sum() > 3
    assert ((got[between] < plain[between]) & (got[between] > plain[between] / 8)).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SHORT_ROPES)
def test_scaled_logits_are_those_of_transformers(name: str, engine: str, tmp_path: Path) -> None:
    """The prompt in two parts and a token, so that positions go on where the kv_cache ends."""
    cfg = with_rope(SHORT_ROPES[name])
    run = ENGINES[engine](cfg, PARAMS, tmp_path)
    embeds, cache = run.embed_tokens(IDS), run.new_cache(len(IDS))
    parts = [(0, 37), (37, 59), (59, 60)]
    got = np.concatenate([run.forward(embeds[start:stop], cache, range(stop - start)) for start, stop in parts])
    want = transformers_logits(cfg)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(want - transformers_logits(TINY)).max() > 1e-2  # without the scaling
