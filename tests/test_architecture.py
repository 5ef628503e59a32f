"""One model, several interpreters: they agree with each other and, token by token, with themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.families import FAMILIES, config_of
from tests.tiny import TINY, random_parameters
from vila_edge import architecture
from vila_edge.parameters import count_parameters, is_quantised, parameter_shapes
from vila_edge.reference.engine import ReferenceEngine, numpy_engine
from vila_edge.reference.torch_engine import numpy_parameters_engine as torch_engine
from vila_edge.reference.torch_ops import TorchOps

PARAMS = random_parameters(TINY)
RNG = np.random.default_rng(1)
PIXELS = RNG.standard_normal((2, 3, 46, 46)).astype(np.float32)
IDS = RNG.integers(0, TINY.llm.vocab_size, 21).tolist()


ENGINES: dict[str, Callable[..., ReferenceEngine]] = {"numpy": numpy_engine, "torch": torch_engine}


def all_logits(engine: ReferenceEngine, *chunks: list[int]) -> NDArray[np.float32]:
    cache = engine.new_cache(len(IDS))
    return np.concatenate([engine.forward(engine.embed_tokens(ids), cache, range(len(ids))) for ids in chunks])


def test_numpy_and_torch_agree_on_images() -> None:
    one, other = numpy_engine(TINY, PARAMS), torch_engine(TINY, PARAMS)
    features = one.encode_images(PIXELS)
    assert features.shape == (2, 25, 32)
    np.testing.assert_allclose(features, other.encode_images(PIXELS), atol=1e-5)
    assert one.project(features).shape == (2, 9, 64)
    np.testing.assert_allclose(one.project(features), other.project(features), atol=1e-5)


def test_numpy_and_torch_agree_on_text() -> None:
    np.testing.assert_allclose(
        all_logits(numpy_engine(TINY, PARAMS), IDS), all_logits(torch_engine(TINY, PARAMS), IDS), atol=1e-5
    )


def test_float32_is_close_to_float64() -> None:
    exact = numpy_engine(TINY, {name: value.astype(np.float64) for name, value in PARAMS.items()})
    np.testing.assert_allclose(all_logits(numpy_engine(TINY, PARAMS), IDS), all_logits(exact, IDS), atol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_decoding_token_by_token_equals_one_pass(name: str) -> None:
    engine = ENGINES[name](TINY, PARAMS)
    steps = all_logits(engine, IDS[:7], IDS[7:12], *([token] for token in IDS[12:]))
    np.testing.assert_allclose(steps, all_logits(engine, IDS), atol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_a_truncated_cache_forgets_what_came_after(name: str) -> None:
    engine = ENGINES[name](TINY, PARAMS)
    want = all_logits(engine, IDS)
    cache = engine.new_cache(64)
    engine.forward(engine.embed_tokens([*IDS[:5], 3, 1, 4, 1, 5]), cache)
    cache.truncate(5)
    assert cache.length == 5
    np.testing.assert_allclose(engine.forward(engine.embed_tokens(IDS[5:]), cache), want[-1:], atol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_token_order_is_a_transposed_grid(name: str) -> None:
    """Row-major and column-major tokens are the same tokens, the grid of them turned over its diagonal."""
    features = RNG.standard_normal((1, 25, 32)).astype(np.float32)
    row_major = dataclasses.replace(TINY, profile=dataclasses.replace(TINY.profile, token_order="row_major"))
    rows = ENGINES[name](row_major, PARAMS).project(features)
    columns = ENGINES[name](TINY, PARAMS).project(features)
    assert np.abs(rows - columns).max() > 0.01
    np.testing.assert_allclose(rows.reshape(3, 3, -1).swapaxes(0, 1).reshape(9, -1), columns[0], atol=1e-6)


def test_folding_takes_the_four_neighbours_and_zeros_beyond_the_edge() -> None:
    """mlp_downsample's channels: top left, top right, bottom left, bottom right (spec 2.4)."""
    patches = np.arange(1.0, 10).reshape(1, 9, 1).astype(np.float32)  # a 3 x 3 grid of one channel
    folded = TorchOps({}).space_to_depth(torch.from_numpy(patches), 3, 2, "row_major")[0].tolist()
    assert folded == [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]


@pytest.mark.parametrize("name", ENGINES)
@torch.inference_mode()
def test_the_projector_is_torchs_own_layers_also_where_epsilon_counts(name: str) -> None:
    """Norm, linear, exact GELU, linear of torch with its defaults, on features as small as the norm's epsilon."""
    features = 1e-3 * RNG.standard_normal((2, 25, 32)).astype(np.float32)
    folded = TorchOps({}).space_to_depth(torch.from_numpy(features), 5, 2, "column_major")
    layers = {"1": torch.nn.LayerNorm(128), "2": torch.nn.Linear(128, 64), "4": torch.nn.Linear(64, 64)}
    for index, layer in layers.items():
        layer.load_state_dict(
            {leaf: torch.from_numpy(PARAMS[f"mm_projector.layers.{index}.{leaf}"]) for leaf in ("weight", "bias")}
        )
    want = layers["4"](torch.nn.GELU()(layers["2"](layers["1"](folded))))
    np.testing.assert_allclose(ENGINES[name](TINY, PARAMS).project(features), want.numpy(), atol=1e-5)


def test_tied_embeddings_have_no_head_of_their_own() -> None:
    tied = dataclasses.replace(TINY, llm=dataclasses.replace(TINY.llm, tie_word_embeddings=True))
    assert "llm.lm_head.weight" not in parameter_shapes(tied)
    engine = numpy_engine(tied, PARAMS)
    hidden = architecture.decoder(engine._make_ops({}), engine.embed_tokens(IDS)[None], tied.llm)
    want = hidden[0] @ PARAMS["llm.model.embed_tokens.weight"].T
    np.testing.assert_allclose(all_logits(engine, IDS), want, atol=1e-5)


def test_the_last_block_and_norm_of_the_tower_are_not_parameters() -> None:
    names = [name for name in parameter_shapes(TINY) if name.startswith("vision_tower.")]
    assert not any(".layers.2." in name or "post_layernorm" in name for name in names)
    assert len(names) == 3 + 2 * 16


def test_parameters_of_vila_1_5_3b_are_as_many_as_published(tmp_path: Path) -> None:
    """Sizes of spec section 1.3: a tower of 428 M without its last block and head, an LLM of 2.7 G."""
    big = config_of(FAMILIES["VILA1.5-3b"], tmp_path)
    assert big.tokens_per_image == 196
    shapes = parameter_shapes(big)
    assert shapes["mm_projector.layers.2.weight"] == (2560, 4608)
    assert sum(is_quantised(name) for name in shapes) == 32 * 7
    assert count_parameters(big) == pytest.approx(2.70e9 + 0.40e9 + 0.018e9, rel=0.01)
