"""The config.json files of a checkpoint, read strictly: a key that might change the maths is understood or refused."""

from __future__ import annotations

import re
from typing import Any

from vila_edge.config import (
    AspectRatio,
    LlmConfig,
    PreprocessConfig,
    Profile,
    ProjectorConfig,
    RopeConfig,
    ScalesConfig,
    TokenizerConfig,
    VideoConfig,
    VilaConfig,
    VisionConfig,
)
from vila_edge.errors import ConfigError
from vila_edge.export.encoders import video_config
from vila_edge.export.fields import Fields
from vila_edge.export.layouts import Files, read_json
from vila_edge.plain import build
from vila_edge.preprocess import RESAMPLE


def read_config(files: Files, profile: Profile, tokenizer: TokenizerConfig) -> VilaConfig:
    """The whole configuration of a checkpoint. Raises ConfigError that names file and field."""
    root = files.configs[""]
    root.fixed(mm_use_im_start_end=False, mm_use_im_patch_token=False, vision_resolution=-1)
    root.fixed(high_res_pos_embed=False, ps3=False, look_close_mode=None, num_time_tokens=None, time_token_format=None)
    tower = _vision_config(files.configs["vision_tower"], root)
    scales = _scales_config(root)
    video = VideoConfig(root.integer("num_video_frames", 8))
    if profile.video_as == "video":
        video = video_config(root)
    return build(
        VilaConfig,
        root.source,
        {
            "vision_tower": tower,
            "mm_projector": _projector_config(files.configs["mm_projector"]),
            "llm": _llm_config(files.configs["llm"]),
            "preprocess": _preprocess_config(
                Fields(read_json(files.preprocessor), str(files.preprocessor)), root, tower.image_size, scales
            ),
            "profile": profile,
            "scales": scales,
            "video": video,
            "tokenizer": tokenizer,
        },
    )


def _vision_config(fields: Fields, root: Fields) -> VisionConfig:
    kind = fields.data.get("model_type")
    if kind in ("intern_vit_6b", "internvit", "radio"):
        raise ConfigError(
            f"{fields.source}: 'model_type' is {kind!r}, a tower that this version does not compute",
            "the towers CLIP and SigLIP are supported: every released VILA but VILA1.5-40b",
        )
    kind = fields.choice("model_type", "siglip_vision_model", "clip_vision_model")
    clip = kind == "clip_vision_model"
    fields.fixed(num_channels=3)
    # The pooling head and the projection are behind the layer that is selected.
    fields.ignore("attention_dropout", "dropout", "vision_use_head", "projection_dim", "projector_hidden_act", *_INERT)
    fields.ignore("num_image_tokens", "num_positions")
    act = fields.choice(
        "hidden_act",
        *(("quick_gelu", "gelu") if clip else ("gelu_pytorch_tanh",)),
        default="quick_gelu" if clip else "gelu_pytorch_tanh",
    )
    return fields.build(
        VisionConfig,
        model_type=kind,
        hidden_act=act,
        hidden_size=fields.integer("hidden_size", 768),
        intermediate_size=fields.integer("intermediate_size", 3072),
        num_hidden_layers=fields.integer("num_hidden_layers", 12),
        num_attention_heads=fields.integer("num_attention_heads", 12),
        image_size=fields.integer("image_size", 224),
        patch_size=fields.integer("patch_size", 32 if clip else 16),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-5 if clip else 1e-6),
        select_layer=root.whole("mm_vision_select_layer", -2),
        select_feature=root.choice(
            "mm_vision_select_feature", "patch", "cls_patch", default="patch" if clip else "cls_patch"
        ),
    )


def _projector_config(fields: Fields) -> ProjectorConfig:
    fields.ignore("model_type", *_INERT)
    return fields.build(ProjectorConfig, mm_projector_type=fields.text("mm_projector_type"))


def _llm_config(fields: Fields) -> LlmConfig:
    kind = fields.choice("model_type", "llama", "qwen2")
    fields.fixed(hidden_act="silu", pretraining_tp=1, use_sliding_window=False)
    if kind == "llama":
        fields.fixed(attention_bias=False, mlp_bias=False)
    fields.ignore("attention_dropout", "tokenizer_padding_side", "use_cache", "max_window_layers", "sliding_window")
    fields.ignore("layer_types", *_INERT)
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    limits = ["max_position_embeddings", "model_max_length", "tokenizer_model_max_length"]
    return fields.build(
        LlmConfig,
        model_type=kind,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden_size // heads),
        vocab_size=fields.integer("vocab_size"),
        context_length=min(fields.integer(key) for key in limits if fields.data.get(key) or key == limits[0]),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope_config(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _rope_config(fields: Fields) -> RopeConfig:
    parameters = fields.section("rope_parameters")  # how transformers 5 writes theta and scaling
    scaling = fields.section("rope_scaling")
    theta = fields.number("rope_theta", 10_000.0)
    theta = parameters.number("rope_theta", theta)
    rope = scaling if scaling.data else parameters
    known = ("default", "linear", "llama3")
    kind = rope.choice("type", *known, default="default") if "type" in rope.data else None
    kind = rope.choice("rope_type", *((kind,) if kind else known), default=kind or "default")
    values: dict[str, Any] = {}
    if kind != "default":
        values["factor"] = rope.number("factor")
    if kind == "llama3":
        values |= {key: rope.number(key) for key in ("low_freq_factor", "high_freq_factor")}
        values["original_max_position_embeddings"] = rope.integer("original_max_position_embeddings")
    scaling.done()
    parameters.done()
    return build(RopeConfig, rope.source, {"rope_theta": theta, "rope_type": kind, **values})


def _scales_config(root: Fields) -> ScalesConfig | None:
    fixed, dynamic = root.flag("s2", False), root.flag("dynamic_s2", False)
    if not fixed and not dynamic:
        return None
    if fixed and dynamic:
        raise root.error("dynamic_s2", "false, because s2 is true")
    text = root.text("s2_scales")
    if not re.fullmatch(r"\s*\d{1,5}\s*(,\s*\d{1,5}\s*)*", text):
        raise root.error("s2_scales", "numbers with commas between them")
    scales = tuple(sorted(int(scale) for scale in text.split(",")))
    index = root.whole("s2_resize_output_to_scale_idx", 0) if dynamic else 0
    split = root.integer("s2_max_split_size", scales[-1]) if fixed else scales[0]
    if split != scales[0]:
        raise root.error("s2_max_split_size", f"{scales[0]}, the smallest of s2_scales")
    if not -len(scales) <= index < len(scales):
        raise root.error("s2_resize_output_to_scale_idx", f"an index into {list(scales)}")
    return build(
        ScalesConfig,
        root.source,
        {"dynamic": dynamic, "s2_scales": scales, "resize_output_to": index % len(scales)},
    )


def _preprocess_config(fields: Fields, root: Fields, tower_size: int, scales: ScalesConfig | None) -> PreprocessConfig:
    fields.fixed(do_normalize=True, do_rescale=True, do_resize=True, resample=int(RESAMPLE))
    fields.ignore("image_processor_type", "feature_extractor_type", "processor_class", "data_format")
    fields.ignore("do_convert_rgb")  # RGB it is, always
    size = fields.data.get("size")
    shortest_edge = None
    if fields.flag("do_center_crop", False):
        edge = {"shortest_edge": size} if type(size) is int else size if isinstance(size, dict) else {}
        shortest_edge = Fields(edge, f"{fields.source}: size").integer("shortest_edge")
        fields.ignore("size", "crop_size")
        crop = fields.data.get("crop_size", tower_size)
        found = (crop, crop) if not isinstance(crop, dict) else (crop.get("height"), crop.get("width"))
        if found != (tower_size, tower_size):
            raise fields.error("crop_size", f"height and width {tower_size}, the tower's image_size")
    else:
        fields.ignore("crop_size")
        square = fields.section("size")
        if (square.integer("height"), square.integer("width")) != (tower_size, tower_size):
            raise fields.error("size", f"height and width {tower_size}, the tower's image_size")
    # With fixed scales the original's processor makes images of the largest.
    image_size = scales.s2_scales[-1] if scales and not scales.dynamic else tower_size
    aspect: AspectRatio = root.choice(
        "image_aspect_ratio", "square", "resize", "pad", "dynamic", "dynamic_s2", None, default="square"
    )
    return fields.build(
        PreprocessConfig,
        image_aspect_ratio=aspect or "square",
        image_size=image_size,
        rescale_factor=fields.number("rescale_factor", 1 / 255),
        image_mean=fields.triple("image_mean"),
        image_std=fields.triple("image_std"),
        shortest_edge=shortest_edge and (image_size if image_size != tower_size else shortest_edge),
        min_tiles=root.integer("min_tiles", 1),
        max_tiles=root.integer("max_tiles", 12),
    )


# Keys of the ecosystem's configs that say nothing about what is computed in inference. Most are defaults that old
# versions of transformers wrote into every config.
_INERT = tuple(
    [
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "_from_model_config",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_dtype",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "resume_path",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
    ]
)
