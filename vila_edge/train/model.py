"""The model that is trained: transformers' own tower and LLM around our projector.

These modules are the ecosystem's, so its tools (accelerate, PEFT, fast attention) work on them, and they are
an oracle for our architecture that is not ours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from vila_edge import architecture
from vila_edge.config import LlmConfig, VilaConfig, VisionConfig
from vila_edge.errors import ConfigError
from vila_edge.parameters import component, parameter_shapes
from vila_edge.reference.torch_ops import TorchOps

IMAGE_TOKEN_INDEX = -200  # marks the positions of an image in input_ids
IGNORE_INDEX = -100  # marks positions without loss in labels


class MultimodalProjector(nn.Module):
    """Owns the projector's parameters and runs the architecture over them."""

    def __init__(self, cfg: VilaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.layers = nn.ModuleDict()
        for name, shape in parameter_shapes(cfg).items():
            if component(name) == "mm_projector":
                index, leaf = name.rsplit(".", 2)[1:]
                if index not in self.layers:
                    self.layers[index] = nn.Module()
                self.layers[index].register_parameter(leaf, nn.Parameter(_initial(shape, leaf)))

    def forward(self, image_features: Tensor) -> Tensor:
        """image_features [N, P, D_vision] to image_embeds [N, T, D]."""
        params = {f"mm_projector.{name}": parameter for name, parameter in self.named_parameters()}
        return architecture.mm_projector(TorchOps(params), image_features, self.cfg)


class Vila(nn.Module):
    """vision_tower, mm_projector and llm, with the parameters of a VilaConfig."""

    def __init__(self, cfg: VilaConfig) -> None:
        """Raises ConfigError for a tower or an LLM that is not trained here."""
        super().__init__()
        if cfg.vision_tower.model_type != "siglip_vision_model" or cfg.llm.model_type != "llama":
            raise ConfigError(
                f"training takes a SigLIP and a LLaMA, found {cfg.vision_tower.model_type} and {cfg.llm.model_type}"
            )
        if cfg.llm.rope.rope_type != "default" or cfg.scales:
            raise ConfigError("training takes neither scaled rotary embeddings nor several image scales")
        self.cfg = cfg
        self.vision_tower = SiglipVisionModel(SiglipVisionConfig(**vision_config(cfg.vision_tower)))
        self.mm_projector = MultimodalProjector(cfg)
        self.llm = LlamaForCausalLM(LlamaConfig(**llm_config(cfg.llm)))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [N, 3, H, W] to image_features [N, P, D_vision]."""
        return select_features(self.vision_tower, pixel_values, self.cfg.vision_tower)

    def inputs_embeds(self, input_ids: Tensor, image_embeds: Tensor) -> Tensor:
        """input_ids [B, S] with IMAGE_TOKEN_INDEX, image_embeds [N, T, D] in order: [B, S, D]."""
        is_image = input_ids == IMAGE_TOKEN_INDEX
        embeds: Tensor = self.llm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        return embeds.masked_scatter(is_image[..., None], image_embeds.to(embeds.dtype))

    def forward(self, input_ids: Tensor, labels: Tensor, image_features: Tensor) -> Tensor:
        """Mean next-token loss over the positions whose label is not IGNORE_INDEX.

        input_ids, labels [B, S] (padded on the right), image_features [N, P, D_vision].
        """
        embeds = self.inputs_embeds(input_ids, self.mm_projector(image_features))
        hidden = self.llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        learnt = targets != IGNORE_INDEX
        return F.cross_entropy(self.llm.lm_head(hidden[learnt]).float(), targets[learnt])


def _initial(shape: tuple[int, ...], leaf: str) -> Tensor:
    """A matrix keeps the variance of its input; a norm starts as the identity, a bias at 0."""
    if len(shape) == 2:
        return torch.randn(shape) * shape[1] ** -0.5
    return torch.ones(shape) if leaf == "weight" else torch.zeros(shape)


def select_features(tower: nn.Module, pixel_values: Tensor, cfg: VisionConfig) -> Tensor:
    """pixel_values [N, 3, H, W] to the hidden states [N, P, D_vision] that a VILA looks at."""
    features: Tensor = tower(pixel_values, output_hidden_states=True).hidden_states[cfg.select_layer]
    return features


def vision_config(cfg: VisionConfig) -> dict[str, Any]:
    """The tower's config.json."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": cfg.hidden_size,
        "image_size": cfg.image_size,
        "intermediate_size": cfg.intermediate_size,
        "layer_norm_eps": cfg.layer_norm_eps,
        "num_attention_heads": cfg.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": cfg.num_hidden_layers,
        "patch_size": cfg.patch_size,
        "vision_use_head": False,
    }


def llm_config(cfg: LlmConfig) -> dict[str, Any]:
    """The LLM's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.context_length,
        "num_attention_heads": cfg.num_attention_heads,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_key_value_heads": cfg.num_key_value_heads,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope.rope_theta,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "vocab_size": cfg.vocab_size,
    }
