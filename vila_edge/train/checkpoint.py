"""A trained model to a checkpoint in the VILA1.5 layout, which `export` reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from vila_edge import fsio
from vila_edge.config import VilaConfig
from vila_edge.parameters import component, parameter_shapes
from vila_edge.preprocess import RESAMPLE
from vila_edge.profiles import PROFILE_KEY
from vila_edge.train.model import Vila, llm_config, vision_config

TOWER_PREFIX = "vision_model."  # what the layout's names have and transformers 5 leaves out


def save_checkpoint(model: Vila, tokenizer_json: str, folder: Path, tokenizer_config: dict[str, Any]) -> None:
    """Fill an empty `folder`: config.json, and llm/, vision_tower/ and mm_projector/ with float32 weights."""
    parameters: dict[str, dict[str, Tensor]] = {"llm": {}, "vision_tower": {}, "mm_projector": {}}
    for name, value in checkpoint_parameters(model).items():
        part, _, stored = name.partition(".")
        parameters[part][stored] = value.detach().contiguous().cpu()
    write_configs(model.cfg, tokenizer_json, folder, tokenizer_config)
    for part, tensors in parameters.items():
        fsio.write_bytes(folder / part / "model.safetensors", save(tensors, metadata={"format": "pt"}))


def write_configs(cfg: VilaConfig, tokenizer_json: str, folder: Path, tokenizer_config: dict[str, Any]) -> None:
    """All files of a checkpoint but the weights, in an empty `folder`."""
    configs: dict[str, dict[str, Any]] = {
        "llm": llm_config(cfg.llm),
        "vision_tower": vision_config(cfg.vision_tower),
        "mm_projector": {"model_type": "v2l_projector", "mm_projector_type": cfg.mm_projector.mm_projector_type},
    }
    for part, config in configs.items():
        (folder / part).mkdir()
        fsio.write_bytes(folder / part / "config.json", fsio.json_bytes(config))
    fsio.write_bytes(folder / "llm" / "tokenizer.json", tokenizer_json.encode())
    fsio.write_bytes(folder / "llm" / "tokenizer_config.json", fsio.json_bytes(tokenizer_config))
    fsio.write_bytes(
        folder / "vision_tower" / "preprocessor_config.json",
        fsio.json_bytes(
            {
                "image_processor_type": "SiglipImageProcessor",
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": cfg.preprocess.image_mean,
                "image_std": cfg.preprocess.image_std,
                "resample": int(RESAMPLE),
                "rescale_factor": cfg.preprocess.rescale_factor,
                "size": {"height": cfg.preprocess.image_size, "width": cfg.preprocess.image_size},
            }
        ),
    )
    fsio.write_bytes(
        folder / "config.json",
        fsio.json_bytes(
            {
                "architectures": ["LlavaLlamaModel"],
                "model_type": "llava_llama",
                "hidden_size": cfg.llm.hidden_size,
                "mm_hidden_size": cfg.vision_tower.hidden_size,
                "image_aspect_ratio": cfg.preprocess.image_aspect_ratio,
                "mm_vision_select_layer": cfg.vision_tower.select_layer,
                "mm_vision_select_feature": cfg.vision_tower.select_feature,
                "llm_cfg": configs["llm"],
                "vision_tower_cfg": configs["vision_tower"],
                "mm_projector_cfg": configs["mm_projector"],
                PROFILE_KEY: dataclasses.asdict(cfg.profile),
            }
        ),
    )


def checkpoint_parameters(model: Vila) -> dict[str, Tensor]:
    """The model's parameters under the architecture's names: those that inference reads."""
    state = model.state_dict()
    found = {}
    for name in parameter_shapes(model.cfg):
        found[name] = state[name.replace(TOWER_PREFIX, "", 1) if component(name) == "vision_tower" else name]
    return found
