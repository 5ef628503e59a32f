"""The architecture against modules that are not ours: transformers' SigLIP, CLIP, LLaMA and Qwen2."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.graphs import graph_engine
from tests.tiny import TINY, random_parameters
from vila_edge.config import ProjectorConfig, RopeConfig, VilaConfig
from vila_edge.engine.protocol import Engine
from vila_edge.reference.engine import numpy_engine
from vila_edge.reference.torch_engine import numpy_parameters_engine as torch_engine
from vila_edge.train.checkpoint import checkpoint_parameters
from vila_edge.train.model import IMAGE_TOKEN_INDEX, Vila

RNG = np.random.default_rng(2)
PIXELS = RNG.standard_normal((2, 3, 46, 46)).astype(np.float32)
IDS = RNG.integers(0, TINY.llm.vocab_size, 30).tolist()
ATOL = 1e-4  # of values around 1; onnxruntime orders its sums in its own way

Parameters = dict[str, NDArray[Any]]
FloatArray = NDArray[np.float32]

ENGINES: dict[str, Callable[[VilaConfig, Parameters, Path], Engine]] = {
    "numpy": lambda cfg, params, folder: numpy_engine(cfg, params),
    "torch": lambda cfg, params, folder: torch_engine(cfg, params),
    "graph": graph_engine,
}
every_engine = pytest.mark.parametrize("engine", ENGINES)

# Without a projector that folds, so that a class token may stay.
SIGLIP = dataclasses.replace(TINY, mm_projector=ProjectorConfig("mlp2x_gelu"))
CLIP = dataclasses.replace(
    SIGLIP,
    vision_tower=dataclasses.replace(
        TINY.vision_tower,
        model_type="clip_vision_model",
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        select_feature="patch",
    ),
)


def random_vila() -> Vila:
    torch.manual_seed(0)
    model = Vila(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.05, 0.1)
    return model


@torch.inference_mode()
def test_the_modules_of_transformers_compute_the_same() -> None:
    model = random_vila()
    assert isinstance(model.vision_tower, SiglipVisionModel)
    assert isinstance(model.llm, LlamaForCausalLM)
    engine = numpy_engine(TINY, {name: value.numpy() for name, value in checkpoint_parameters(model).items()})

    pixel_values = RNG.standard_normal((2, 3, 46, 46)).astype(np.float32)
    features = model.image_features(torch.from_numpy(pixel_values))
    np.testing.assert_allclose(engine.encode_images(pixel_values), features.numpy(), atol=1e-5)

    image_embeds = model.mm_projector(features)
    np.testing.assert_allclose(engine.project(features.numpy()), image_embeds.numpy(), atol=1e-5)

    slots = [IMAGE_TOKEN_INDEX] * 9
    input_ids = torch.tensor([[1, 5, *slots, 7, 8, *slots, 9, 10, 11]])
    embeds = model.inputs_embeds(input_ids, image_embeds)
    assert torch.equal(embeds[0, 2:11], image_embeds[0])
    assert torch.equal(embeds[0, 13:22], image_embeds[1])
    logits = model.llm(inputs_embeds=embeds).logits[0]
    got = engine.forward(embeds[0].numpy(), engine.new_cache(99), range(embeds.shape[1]))
    np.testing.assert_allclose(got, logits.numpy(), atol=1e-5)


def test_random_parameters_fill_the_training_model_exactly() -> None:
    """Every parameter that the architecture reads exists in the modules, with its shape."""
    found = {name: tuple(value.shape) for name, value in checkpoint_parameters(random_vila()).items()}
    assert found == {name: value.shape for name, value in random_parameters(TINY).items()}


def with_tower(cfg: VilaConfig, **changes: Any) -> VilaConfig:
    return dataclasses.replace(cfg, vision_tower=dataclasses.replace(cfg.vision_tower, **changes))


def with_llm(**changes: Any) -> VilaConfig:
    return dataclasses.replace(TINY, llm=dataclasses.replace(TINY.llm, **changes))


def load(model: torch.nn.Module, params: Parameters, prefix: str) -> tuple[list[str], list[str]]:
    """Put the parameters behind `prefix` into the model; the names that it misses and that it does not know."""
    state = {name.removeprefix(prefix): torch.from_numpy(v) for name, v in params.items() if name.startswith(prefix)}
    found = model.load_state_dict(state, strict=False)
    return found.missing_keys, found.unexpected_keys


@torch.inference_mode()
def tower_states(cfg: VilaConfig, params: Parameters, pixels: FloatArray, **changes: Any) -> list[FloatArray]:
    """All hidden states of transformers' tower, class token and all; `changes` to its config."""
    tower = cfg.vision_tower
    kinds: dict[str, Any] = {
        "clip_vision_model": (CLIPVisionModel, CLIPVisionConfig),
        "siglip_vision_model": (SiglipVisionModel, SiglipVisionConfig),
    }
    make, config = kinds[tower.model_type]
    names = ["hidden_act", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["image_size", "patch_size", "layer_norm_eps"]
    torch.manual_seed(0)
    model = make(config(**({name: getattr(tower, name) for name in names} | changes)))
    missing, unknown = load(model, params, "vision_tower.vision_model.")
    unused = tuple(f"encoder.layers.{layer}." for layer in range(tower.num_layers_run, tower.num_hidden_layers))
    assert not unknown
    assert all(name.startswith((*unused, "post_layernorm.", "head.")) for name in missing)
    states = model(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
    assert len(states) == tower.num_hidden_layers + 1
    return [state.numpy() for state in states]


@torch.inference_mode()
def llm_logits(cfg: VilaConfig, params: Parameters, **changes: Any) -> FloatArray:
    """Logits of transformers' LLM for IDS, `changes` to its config."""
    llm = cfg.llm
    kinds: dict[str, Any] = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
    make, config = kinds[llm.model_type]
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["head_dim", "vocab_size", "rms_norm_eps", "tie_word_embeddings"]
    rope = {"rope_type": "default", "rope_theta": llm.rope.rope_theta}
    values = {name: getattr(llm, name) for name in names} | {"rope_parameters": rope} | changes
    model = make(config(max_position_embeddings=llm.context_length, **values))
    missing, unknown = load(model, params, "llm.")
    assert not unknown
    assert missing == (["lm_head.weight"] if llm.tie_word_embeddings else [])
    return model(torch.tensor([IDS])).logits[0].numpy()


def engine_logits(engine: Engine) -> FloatArray:
    """The same by one of ours: a prompt, more of it, a token."""
    embeds, cache = engine.embed_tokens(IDS), engine.new_cache(len(IDS))
    parts = [(0, 17), (17, 29), (29, 30)]
    return np.concatenate([engine.forward(embeds[i:j], cache, range(j - i)) for i, j in parts])


@every_engine
@pytest.mark.parametrize("select_feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("select_layer", [-2, -1])
def test_clip_is_that_of_transformers_with_and_without_its_class_token(
    select_layer: int, select_feature: str, engine: str, tmp_path: Path
) -> None:
    """No norm behind the last block, and the class token in front of the patches or dropped."""
    cfg = with_tower(CLIP, select_layer=select_layer, select_feature=select_feature)
    params = random_parameters(cfg)
    state = tower_states(cfg, params, PIXELS)[select_layer]
    assert state.shape == (2, 26, 32)
    want = state[:, 1:] if select_feature == "patch" else state
    np.testing.assert_allclose(ENGINES[engine](cfg, params, tmp_path).encode_images(PIXELS), want, atol=ATOL)


@every_engine
@pytest.mark.parametrize("select_layer", [-3, -2, -1])
def test_siglip_gives_the_hidden_states_that_were_selected(select_layer: int, engine: str, tmp_path: Path) -> None:
    cfg = with_tower(SIGLIP, select_layer=select_layer)
    params = random_parameters(with_tower(SIGLIP, select_layer=-1))  # the last block is there to be left out
    if engine == "graph":
        params = {name: params[name] for name in random_parameters(cfg)}
    states = tower_states(cfg, params, PIXELS)
    got = ENGINES[engine](cfg, params, tmp_path).encode_images(PIXELS)
    np.testing.assert_allclose(got, states[select_layer], atol=ATOL)
    others = [state for index, state in enumerate(states) if index != len(states) + select_layer]
    assert min(np.abs(got - state).max() for state in others) > 0.1


@every_engine
@pytest.mark.parametrize(
    ("cfg", "others"),
    [(SIGLIP, ("gelu", "quick_gelu")), (CLIP, ("gelu", "gelu_pytorch_tanh"))],
    ids=["siglip", "clip"],
)
def test_the_activation_of_a_tower_is_its_own(
    cfg: VilaConfig, others: tuple[str, ...], engine: str, tmp_path: Path
) -> None:
    """Activations of 2 to 3, where GELU and its tanh form differ most, and weights that make it show."""
    params = random_parameters(cfg)
    for name in params:
        if name.endswith(("mlp.fc1.weight", "mlp.fc2.weight")):
            params[name] *= 5
    want = tower_states(cfg, params, PIXELS)[-2][:, cfg is CLIP :]
    np.testing.assert_allclose(ENGINES[engine](cfg, params, tmp_path).encode_images(PIXELS), want, atol=ATOL)
    for hidden_act in others:
        other = tower_states(cfg, params, PIXELS, hidden_act=hidden_act)[-2][:, cfg is CLIP :]
        assert np.abs(want - other).max() > 10 * ATOL


@every_engine
@pytest.mark.parametrize(("cfg", "other_eps"), [(SIGLIP, 1e-5), (CLIP, 1e-6)], ids=["siglip", "clip"])
def test_the_epsilon_of_a_towers_norms_counts(cfg: VilaConfig, other_eps: float, engine: str, tmp_path: Path) -> None:
    """All that goes into a norm is of the size of its epsilon, but for what CLIP's first norm has made large."""
    params = random_parameters(cfg)
    for name in params:
        if ".embeddings." in name or "pre_layrnorm" in name or ".out_proj." in name or ".fc2." in name:
            params[name] *= 2e-3
    want = tower_states(cfg, params, PIXELS)[-2][:, cfg is CLIP :]
    got = ENGINES[engine](cfg, params, tmp_path).encode_images(PIXELS)
    size = np.abs(want).max()
    np.testing.assert_allclose(got / size, want / size, atol=ATOL)
    other = tower_states(cfg, params, PIXELS, layer_norm_eps=other_eps)[-2][:, cfg is CLIP :]
    assert np.abs(want - other).max() / size > 100 * ATOL


@every_engine
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_grouped_queries_are_those_of_transformers(
    model_type: Literal["llama", "qwen2"], key_value_heads: int, tied: bool, engine: str, tmp_path: Path
) -> None:
    """Qwen2 has biases on q, k and v, large enough here to be missed; LLaMA has none."""
    cfg = with_llm(
        model_type=model_type,
        num_key_value_heads=key_value_heads,
        rope=RopeConfig(1e6 if model_type == "qwen2" else 1e4),
        tie_word_embeddings=tied,
    )
    params = random_parameters(cfg)
    biases = [name for name in params if name.startswith("llm.") and name.endswith(".bias")]
    assert len(biases) == (3 * 2 if model_type == "qwen2" else 0)
    for name in biases:
        params[name] *= 5
    got = engine_logits(ENGINES[engine](cfg, params, tmp_path))
    np.testing.assert_allclose(got, llm_logits(cfg, params), atol=ATOL)


@every_engine
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_epsilon_of_the_llms_norms_counts(
    model_type: Literal["llama", "qwen2"], engine: str, tmp_path: Path
) -> None:
    """Embeddings and what the blocks add to them have mean squares of the size of epsilon, in front of every norm."""
    cfg = with_llm(model_type=model_type, rms_norm_eps=1e-5)
    params = random_parameters(cfg)
    for name in params:
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            params[name] *= 5e-3
    want = llm_logits(cfg, params)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(engine_logits(ENGINES[engine](cfg, params, tmp_path)), want, atol=ATOL)
    assert np.abs(want - llm_logits(cfg, params, rms_norm_eps=1e-6)).max() > 100 * ATOL
