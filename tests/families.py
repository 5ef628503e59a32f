"""The released families: their real configs, and tiny checkpoints of the same structure.

The figures are those of the released config files. `shrink` makes any of them small, by one rule.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.tiny import random_parameters
from vila_edge.config import TokenizerConfig, VilaConfig
from vila_edge.export.checkpoint_config import read_config
from vila_edge.export.fields import Fields
from vila_edge.export.layouts import Files
from vila_edge.parameters import component
from vila_edge.profiles import ERAS

GOLDEN = Path(__file__).parent / "golden"
TOKENIZERS = {
    "llama": GOLDEN / "v15_siglip_mlp_downsample_resize" / "checkpoint" / "llm",
    "llama_3": GOLDEN / "v15_llama3_gqa" / "checkpoint" / "llm",
    "qwen2": GOLDEN / "nvila_lite_3x3_dynamic" / "checkpoint" / "llm",
}

Json = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """The config files of one released model."""

    era: str
    root: Json
    llm: Json
    vision_tower: Json
    projector: str
    tokenizer: str
    tokens: int  # of an image looked at whole, the "\n" behind it not counted (spec sections 1.3, 2.4)
    preprocessor: Json = field(default_factory=dict)


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv: int = 0, **more: Any) -> Json:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "transformers_version": "4.36.2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen2(hidden: int, ffn: int, layers: int, heads: int, kv: int, **more: Any) -> Json:
    found = _llama(hidden, ffn, layers, heads, kv, vocab_size=151648, max_position_embeddings=32768)
    return found | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "transformers_version": "4.46.0",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "model_max_length": 8192,
        "use_sliding_window": False,
        "sliding_window": 32768,
        **more,
    }


def _siglip(size: int) -> Json:
    return {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": size,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
    }


CLIP = {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
}


def _v10(llm: Json) -> Family:
    root = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 1024,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 4096,
        "use_mm_proj": True,
    }
    return Family("v1.0", root, llm, CLIP, "mlp2x_gelu", "llama", 576)


def _v15(llm: Json, tokenizer: str = "llama", **root: Any) -> Family:
    root = {"mm_vision_select_feature": "cls_patch", "image_aspect_ratio": "resize"} | root
    return Family("vila1.5", root, llm, _siglip(384), "mlp_downsample", tokenizer, 196)


def _nvila(llm: Json, projector: str, tokens: int, **root: Any) -> Family:
    root = {"mm_vision_select_feature": "cls_patch", "num_video_frames": 8, "fps": 0.0} | root
    return Family("nvila", root, llm, _siglip(448), projector, "qwen2", tokens)


_DYNAMIC = {"image_aspect_ratio": "dynamic", "min_tiles": 1, "max_tiles": 12, "video_max_tiles": 1}
_DYNAMIC_S2 = {
    "image_aspect_ratio": "dynamic_s2",
    "dynamic_s2": True,
    "s2_scales": "448,896,1344",
    "s2_max_split_size": 448,
    "s2_resize_output_to_scale_idx": -1,
    "max_tiles": 12,
}
_TSP = json.dumps({"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]})
_LLAMA_3 = {
    "vocab_size": 128257,
    "rope_theta": 5e5,
    "max_position_embeddings": 8192,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}

FAMILIES = {
    "VILA-2.7b": _v10(_llama(2560, 6912, 32, 20)),
    "VILA-7b": _v10(_llama(4096, 11008, 32, 32)),
    "VILA-13b": _v10(_llama(5120, 13824, 40, 40)),
    "VILA1.5-3b": _v15(_llama(2560, 6912, 32, 20)),
    "VILA1.5-3b-s2": _v15(_llama(2560, 6912, 32, 20), s2=True, s2_scales="384,768", s2_max_split_size=384),
    "Llama-3-VILA1.5-8B": _v15(_llama(4096, 14336, 32, 32, 8, **_LLAMA_3), "llama_3"),
    "VILA1.5-13b": _v15(_llama(5120, 13824, 40, 40)),
    "NVILA-8B": _nvila(_qwen2(3584, 18944, 28, 28, 4), "mlp_downsample", 256, **_DYNAMIC_S2),
    "NVILA-Lite-8B": _nvila(_qwen2(3584, 18944, 28, 28, 4), "mlp_downsample_3x3_fix", 121, **_DYNAMIC),
    "NVILA-Lite-15B": _nvila(_qwen2(5120, 13824, 48, 40, 8), "mlp_downsample_3x3_fix", 121, **_DYNAMIC),
    "NVILA-Lite-2B": _nvila(
        _qwen2(1536, 8960, 28, 12, 2, tie_word_embeddings=True), "mlp_downsample_3x3_fix", 121, **_DYNAMIC
    ),
    "NVILA-8B-Video": _nvila(
        _qwen2(3584, 18944, 28, 28, 4, model_max_length=16384),
        "mlp_downsample_2x2_fix",
        256,
        image_aspect_ratio="resize",
        num_video_frames=256,
        video_encoder=_TSP,
    ),
}


def preprocessor(tower: Json) -> Json:
    """preprocessor_config.json of a tower."""
    size, common = tower["image_size"], {"do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
    if tower["model_type"] == "clip_vision_model":
        return common | {
            "do_center_crop": True,
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
    return common | {"size": {"height": size, "width": size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def shrink(family: Family) -> Family:
    """The same structure, small: ratios of heads, remainders of grids and everything that is a choice stay."""
    llm, tower, root = (copy.deepcopy(part) for part in (family.llm, family.vision_tower, family.root))
    group = llm["num_attention_heads"] // llm["num_key_value_heads"]
    kv = 4 if group == 1 else 1
    golden = json.loads((TOKENIZERS[family.tokenizer] / "config.json").read_text())
    llm |= {key: golden[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    llm |= {
        "num_attention_heads": group * kv,
        "num_key_value_heads": kv,
        "hidden_size": 16 * group * kv,
        "intermediate_size": 32 * group * kv,
        "num_hidden_layers": 2,
    }
    grid = 5 if tower["image_size"] // 14 % 2 else 4
    size = 14 * grid + tower["image_size"] % 14
    if "s2_scales" in root:
        scales = [int(scale) // tower["image_size"] * size for scale in root["s2_scales"].split(",")]
        root |= {"s2_scales": ",".join(map(str, scales)), "s2_max_split_size": size}
    if root.get("num_video_frames"):
        root["num_video_frames"] = 8
    tower |= {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    folded = {"mlp2x_gelu": grid**2, "mlp_downsample_3x3_fix": (-(-grid // 3)) ** 2}
    tokens = folded.get(family.projector, (-(-grid // 2)) ** 2)
    return Family(family.era, root, llm, tower | {"image_size": size}, family.projector, family.tokenizer, tokens)


def config_of(family: Family, folder: Path) -> VilaConfig:
    """The configuration that export reads of the family's config files; `folder` is scratch."""
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(preprocessor(family.vision_tower)))
    configs = {
        "": Fields(family.root, "config.json"),
        "llm": Fields(family.llm, "llm/config.json"),
        "vision_tower": Fields(family.vision_tower, "vision_tower/config.json"),
        "mm_projector": Fields({"mm_projector_type": family.projector}, "mm_projector/config.json"),
    }
    files = Files(folder, family.era == "v1.0", configs, folder, path, {})
    return read_config(files, ERAS[family.era], TokenizerConfig())


def write_checkpoint(family: Family, folder: Path) -> Path:
    """A checkpoint with random weights in the family's own layout; returns its folder."""
    checkpoint = folder / "checkpoint"
    llm, tower = checkpoint / "llm", checkpoint / "vision_tower"
    if family.era == "v1.0":
        llm, tower = checkpoint, folder / "clip-vit-large-patch14-336"
    llm.mkdir(parents=True)
    tower.mkdir()
    cfg = config_of(family, folder)
    parameters: dict[str, dict[str, NDArray[Any]]] = {"llm": {}, "vision_tower": {}, "mm_projector": {}}
    for name, value in random_parameters(cfg).items():
        parameters[component(name)][name.partition(".")[2]] = value.astype(np.float16)
    root = {"model_type": "llava_llama", "mm_vision_select_layer": -2} | family.root
    if family.era == "v1.0":
        projector = parameters.pop("mm_projector")
        parameters["llm"] |= {name.replace("layers.", "model.mm_projector.", 1): v for name, v in projector.items()}
        root = family.llm | root
    else:
        _write_json(llm / "config.json", family.llm)
        _write_json(checkpoint / "mm_projector" / "config.json", {"mm_projector_type": family.projector})
        save_file(parameters["mm_projector"], checkpoint / "mm_projector" / "model.safetensors")
    _write_json(checkpoint / "config.json", root)
    _write_json(tower / "config.json", family.vision_tower)
    _write_json(tower / "preprocessor_config.json", preprocessor(family.vision_tower))
    save_file(parameters["llm"], llm / "model.safetensors")
    save_file(parameters["vision_tower"], tower / "model.safetensors")
    for path in TOKENIZERS[family.tokenizer].iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "generation")):
            shutil.copy(path, llm / path.name)
    return checkpoint


def _write_json(path: Path, value: Json) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
