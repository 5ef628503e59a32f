"""The model that is trained: transformers' own tower and LLM around our projector.

These modules are the ecosystem's, so its tools (accelerate, PEFT, fast attention) work on them, and they are
an oracle for our architecture that is not ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from vila_edge import architecture
from vila_edge.config import LlmConfig, VilaConfig, VisionConfig
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
                self.layers[index].register_parameter(leaf, nn.Parameter(torch.empty(shape)))

    def forward(self, image_features: Tensor) -> Tensor:
        """image_features [N, P, D_vision] to image_embeds [N, T, D]."""
        params = {f"mm_projector.{name}": parameter for name, parameter in self.named_parameters()}
        return architecture.mm_projector(TorchOps(params), image_features, self.cfg)


class Vila(nn.Module):
    """vision_tower, mm_projector and llm; `state_dict` names map to the checkpoint's by `checkpoint`."""

    def __init__(self, cfg: VilaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.vision_tower = SiglipVisionModel(vision_config(cfg.vision_tower))
        self.mm_projector = MultimodalProjector(cfg)
        self.llm = LlamaForCausalLM(llm_config(cfg.llm))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [N, 3, H, W] to image_features [N, P, D_vision]."""
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        features: Tensor = states[self.cfg.vision_tower.select_layer]
        return features

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


def vision_config(cfg: VisionConfig) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        layer_norm_eps=cfg.layer_norm_eps,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )


def llm_config(cfg: LlmConfig) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        vocab_size=cfg.vocab_size,
        max_position_embeddings=cfg.context_length,
        rms_norm_eps=cfg.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        tie_word_embeddings=cfg.tie_word_embeddings,
        bos_token_id=1,
        eos_token_id=2,
    )
