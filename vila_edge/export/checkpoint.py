"""A trained VILA on the disk, in the VILA1.5 layout: one config, three folders of safetensors.

config.json   llm/   vision_tower/   mm_projector/
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge import fsio, profiles
from vila_edge.architecture import VISION_TOWER
from vila_edge.config import (
    Fields,
    LlmConfig,
    PreprocessConfig,
    ProjectorConfig,
    VilaConfig,
    VisionConfig,
)
from vila_edge.errors import CheckpointError, InputError
from vila_edge.parameters import component, parameter_shapes
from vila_edge.preprocess import RESAMPLE
from vila_edge.tensorfile import TensorFile

FOLDERS = ("llm", "vision_tower", "mm_projector")


class Checkpoint:
    """An opened checkpoint: its config, and its parameters by the architecture's names."""

    def __init__(self, path: str | Path) -> None:
        """Checks that every parameter is there and of the right shape; reads none of them.

        Raises CheckpointError or ConfigError that names the file.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such directory, expected a VILA checkpoint")
        for folder in FOLDERS:
            if not (self.path / folder).is_dir():
                if (self.path / "manifest.json").is_file():
                    raise CheckpointError(f"{self.path} is a bundle already, expected a checkpoint")
                raise CheckpointError(
                    f"{self.path}: no folder {folder}/, so this is not a checkpoint in the VILA1.5 layout",
                    f"expected config.json and the folders {', '.join(FOLDERS)}",
                )
        self.config = read_config(self.path)
        self._tensors = {name: file for folder in FOLDERS for name, file in _tensors(self.path / folder, folder)}
        for name, shape in parameter_shapes(self.config).items():
            self._check(name, shape)
        for name in sorted(set(self._tensors) - set(parameter_shapes(self.config))):
            if not _is_inert(name, self.config):
                raise CheckpointError(
                    f"{self._tensors[name].path}: holds {_stored_name(name)!r}, for which {name.partition('.')[0]}/"
                    "config.json has no use",
                    "a model without it would compute something else: check that config.json belongs to these weights",
                )

    def parameter(self, name: str) -> NDArray[np.float32]:
        """A parameter in float32, read from the disk. Raises CheckpointError if it is not finite."""
        values = self._tensors[name].float32(_stored_name(name))
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self._tensors[name].path}: tensor {_stored_name(name)!r} is not finite")
        return values

    def parameters(self) -> dict[str, NDArray[np.float32]]:
        """All parameters."""
        return {name: self.parameter(name) for name in parameter_shapes(self.config)}

    def tokenizer_json(self) -> str:
        path = self.path / "llm" / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing; this version needs a tokenizer in the form of the tokenizers library",
                "write it with transformers: AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)",
            )
        return fsio.read_text(path)

    def sha256(self) -> str:
        """Digest of what an export reads: configs, tokenizer and parameters."""
        digest = hashlib.sha256()
        files = {file.path for file in self._tensors.values()} | set(self.path.glob("*.json"))
        files |= {path for folder in FOLDERS for path in (self.path / folder).glob("*.json")}
        for path in sorted(files):
            digest.update(f"{path.relative_to(self.path).as_posix()} {fsio.sha256(path)}\n".encode())
        return digest.hexdigest()

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        stored = _stored_name(name)
        if name not in self._tensors:
            raise CheckpointError(f"{self.path / component(name)}: no tensor {stored!r}, expected shape {list(shape)}")
        found = self._tensors[name].entries[stored].shape
        if found != shape:
            raise CheckpointError(
                f"{self._tensors[name].path}: tensor {stored!r} has shape {list(found)}, expected {list(shape)} "
                "by config.json"
            )


def read_config(path: Path) -> VilaConfig:
    """The whole configuration of the checkpoint in `path`. Raises ConfigError that names file and field."""
    root = _json(path / "config.json")
    llm = _json(path / "llm" / "config.json")
    fields = _fields(path)
    select_layer = fields.choice("mm_vision_select_layer", -2, default=-2)
    fields.choice("mm_vision_select_feature", "cls_patch", default="cls_patch")
    fields.fixed(s2=False, mm_use_im_start_end=False, mm_use_im_patch_token=False, vision_resolution=-1)
    tower = _vision_config(_fields(path / "vision_tower"), select_layer)
    return VilaConfig(
        tower,
        _projector_config(_fields(path / "mm_projector")),
        _llm_config(_fields(path / "llm")),
        _preprocess_config(
            _fields(path / "vision_tower", "preprocessor_config.json"),
            fields.choice("image_aspect_ratio", "resize"),
            tower.image_size,
        ),
        profiles.detect(root, llm, str(path / "config.json")),
    )


def _vision_config(fields: Fields, select_layer: int) -> VisionConfig:
    fields.choice("model_type", "siglip_vision_model")
    fields.fixed(hidden_act="gelu_pytorch_tanh", num_channels=3)
    # The pooling head is behind the layer that is selected.
    fields.ignore("attention_dropout", "vision_use_head", "projection_dim", "projector_hidden_act", *_INERT)
    return fields.build(
        VisionConfig,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=fields.integer("num_attention_heads"),
        image_size=fields.integer("image_size"),
        patch_size=fields.integer("patch_size"),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-6),
        select_layer=select_layer,
    )


def _projector_config(fields: Fields) -> ProjectorConfig:
    fields.ignore("model_type", *_INERT)
    return fields.build(ProjectorConfig, mm_projector_type=fields.choice("mm_projector_type", "mlp_downsample"))


def _llm_config(fields: Fields) -> LlmConfig:
    fields.choice("model_type", "llama")
    fields.fixed(hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None, pretraining_tp=1)
    fields.ignore("attention_dropout", "tokenizer_padding_side", "use_cache", *_INERT)
    rope = fields.section("rope_parameters")  # how transformers 5 writes rope_theta
    rope.fixed(rope_type="default")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    rope.done()
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    limits = ["max_position_embeddings", "model_max_length", "tokenizer_model_max_length"]
    return fields.build(
        LlmConfig,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden_size // heads),
        vocab_size=fields.integer("vocab_size"),
        context_length=min(fields.integer(key) for key in limits if key in fields.data or key == limits[0]),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _preprocess_config(fields: Fields, aspect: Any, image_size: int) -> PreprocessConfig:
    fields.fixed(do_normalize=True, do_rescale=True, do_resize=True, resample=int(RESAMPLE))
    fields.ignore("image_processor_type", "processor_class", "data_format", "do_convert_rgb")  # RGB it is, always
    size = fields.section("size")
    if (size.integer("height"), size.integer("width")) != (image_size, image_size):
        raise fields.error("size", f"height and width {image_size}, the tower's image_size")
    return fields.build(
        PreprocessConfig,
        image_aspect_ratio=aspect,
        image_size=image_size,
        rescale_factor=fields.number("rescale_factor", 1 / 255),
        image_mean=fields.triple("image_mean"),
        image_std=fields.triple("image_std"),
    )


# Keys of the ecosystem's configs that say nothing about what is computed in inference.
_INERT = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_factor",
    "initializer_range",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing from the checkpoint")
    try:
        return fsio.read_json(path)
    except InputError as error:
        raise CheckpointError(error.message) from None


def _fields(folder: Path, name: str = "config.json") -> Fields:
    return Fields(_json(folder / name), str(folder / name))


def _tensors(folder: Path, prefix: str) -> list[tuple[str, TensorFile]]:
    """Every tensor of a folder under the architecture's name, with the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: no object 'weight_map'")
        names = sorted(set(map(str, weight_map.values())))
    else:
        names = ["model.safetensors"]
    found = []
    for name in names:
        path = folder / name
        if path.parent != folder or not path.is_file():
            named = f", which {index.name} names" if index.is_file() else ""
            raise CheckpointError(f"{path}: missing from the checkpoint{named}")
        try:
            file = TensorFile(path)
        except InputError as error:
            raise CheckpointError(error.message, "download or copy the file again") from None
        found += [(f"{prefix}.{tensor}", file) for tensor in file.entries]
    return found


def _is_inert(name: str, cfg: VilaConfig) -> bool:
    """Whether a stored tensor is known to have no part in inference."""
    if name.endswith((".rotary_emb.inv_freq", ".position_ids")):  # follow from the config
        return True
    if name == "llm.lm_head.weight":
        return cfg.llm.tie_word_embeddings
    behind = range(cfg.vision_tower.num_layers_run, cfg.vision_tower.num_hidden_layers)
    parts = ("head.", "post_layernorm.", *(f"encoder.layers.{layer}." for layer in behind))
    return name.startswith(tuple(f"{VISION_TOWER}.{part}" for part in parts))


def _stored_name(name: str) -> str:
    return name.partition(".")[2]
