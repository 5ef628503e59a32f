"""The sizes and choices that make one VILA: read once, checked once, derived from everywhere.

Field names are those of the checkpoint's own `config.json` files, wherever those have one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vila_edge.errors import ConfigError

TokenOrder = Literal["row_major", "column_major"]
Tokenization = Literal["per_chunk", "whole"]
Activation = Literal["gelu", "gelu_pytorch_tanh", "quick_gelu"]
AspectRatio = Literal["square", "resize", "pad", "dynamic", "dynamic_s2"]
FrameRule = Literal["before_last", "rounded"]

MAX_LAYERS = 1024  # several times what any published model has; every layer costs time before anything is read
MAX_PROJECTOR_DEPTH = 16


class Heads(NamedTuple):
    """How attention divides its width. Fewer `key_value` than `query` heads: grouped queries."""

    query: int
    key_value: int
    dim: int


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP or CLIP vision tower. Features are the hidden states after some of its blocks."""

    model_type: Literal["siglip_vision_model", "clip_vision_model"]
    hidden_act: Activation
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    select_layer: int  # index into the hidden states: -2 leaves the last block out
    select_feature: Literal["patch", "cls_patch"]  # patch leaves the class token out, where there is one

    def __post_init__(self) -> None:
        _check_numbers(self, all_but=("select_layer",))
        _check_divides(self, "num_attention_heads", "hidden_size")
        if not 1 <= -self.select_layer <= self.num_hidden_layers:
            raise ConfigError(f"select_layer {self.select_layer}: expected from -{self.num_hidden_layers} to -1")
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        if self.select_feature == "patch" and not self.has_class_token:
            raise ConfigError("select_feature 'patch' would drop the first patch of a tower without a class token")

    @property
    def has_class_token(self) -> bool:
        """CLIP puts a learned class token in front of its patches, and a norm behind the embeddings."""
        return self.model_type == "clip_vision_model"

    @property
    def grid_size(self) -> int:
        """Patches per side. Pixels that do not fill a patch are not looked at."""
        return self.image_size // self.patch_size

    @property
    def num_features(self) -> int:
        """Vectors that come out for one tile."""
        return self.grid_size**2 + (self.has_class_token and self.select_feature == "cls_patch")

    @property
    def num_layers_run(self) -> int:
        """Blocks that the selected hidden state has passed through."""
        return self.num_hidden_layers + 1 + self.select_layer

    @property
    def heads(self) -> Heads:
        n = self.num_attention_heads
        return Heads(n, n, self.hidden_size // n)


# mm_projector_type -> patches per side folded into one token, and the widths between its linears
# as functions of C, the width of a patch, and H, the width of the LLM (spec section 2.4).
_DOWNSAMPLING: dict[str, tuple[int, Callable[[int, int], tuple[int, ...]]]] = {
    "mlp_downsample": (2, lambda c, h: (h,)),
    "mlp_downsample_2x2_fix": (2, lambda c, h: (h,)),
    "mlp_downsample_3x3_fix": (3, lambda c, h: (3 * c, h)),
    "mlp_downsample_3x3_s2": (3, lambda c, h: (3 * c, c, c // 3, h)),
    "mlp_downsample_3x3_s2_new": (3, lambda c, h: (4 * c, 2 * c, c, c // 3, h)),
}
PROJECTOR_TYPES = ("linear", "mlp2x_gelu", *_DOWNSAMPLING)  # mlpNx_gelu stands for any depth


@dataclass(frozen=True)
class ProjectorConfig:
    """The step from image_features to image_embeds."""

    mm_projector_type: str

    def __post_init__(self) -> None:
        name = self.mm_projector_type
        if name != "linear" and name not in _DOWNSAMPLING and not 1 <= self.mlp_depth <= MAX_PROJECTOR_DEPTH:
            raise ConfigError(f"mm_projector_type {name!r}: expected one of {', '.join(PROJECTOR_TYPES)}")

    @property
    def downsample(self) -> int:
        """Patches per side that are folded into one token."""
        return _DOWNSAMPLING.get(self.mm_projector_type, (1, None))[0]

    @property
    def mlp_depth(self) -> int:
        """Linears of a `mlpNx_gelu`; 0 for the other types."""
        match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", self.mm_projector_type)
        return int(match[1]) if match else 0

    def hidden_widths(self, mm_hidden_size: int, hidden_size: int) -> tuple[int, ...]:
        """Widths between the linears of a downsampling projector."""
        return _DOWNSAMPLING[self.mm_projector_type][1](mm_hidden_size, hidden_size)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base, and how positions beyond the first training are squeezed.

    linear: positions / factor. llama3: slow waves / factor, fast ones as they are, a blend between (the two
    frequency factors bound it, in waves per original context).
    """

    rope_theta: float
    rope_type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(f"high_freq_factor {self.high_freq_factor}: expected above {self.low_freq_factor}")


@dataclass(frozen=True)
class LlmConfig:
    """A LLaMA or Qwen2 decoder. They differ in the biases of q, k and v."""

    model_type: Literal["llama", "qwen2"]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # positions it was made for, all limits of the checkpoint considered
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_divides(self, "num_key_value_heads", "num_attention_heads")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim}: expected an even number, for rotary embeddings")

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def heads(self) -> Heads:
        return Heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)


@dataclass(frozen=True)
class PreprocessConfig:
    """From an RGB image to pixel_values: bicubic resizes, `* rescale_factor`, `(x - mean) / std` (spec 2.2).

    `image_aspect_ratio` says what is done with an image before the tower's own processor sees it. That one
    squashes to a square, or, if there is a `shortest_edge`, resizes to that and takes the centre.
    """

    image_aspect_ratio: AspectRatio
    image_size: int
    rescale_factor: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    shortest_edge: int | None = None
    min_tiles: int = 1
    max_tiles: int = 12

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not all(map(math.isfinite, self.image_mean)):
            raise ConfigError(f"image_mean {list(self.image_mean)}: expected finite numbers")
        if not all(0 < std < math.inf for std in self.image_std):
            raise ConfigError(f"image_std {list(self.image_std)}: expected positive numbers")
        if self.shortest_edge is not None and self.shortest_edge < self.image_size:
            raise ConfigError(f"shortest_edge {self.shortest_edge}: expected at least image_size {self.image_size}")
        if self.shortest_edge not in (None, self.image_size) and self.image_aspect_ratio not in ("square", "pad"):
            raise ConfigError(
                f"shortest_edge {self.shortest_edge}: expected image_size {self.image_size}, because "
                f"image_aspect_ratio is {self.image_aspect_ratio!r}"
            )
        if self.min_tiles > self.max_tiles:
            raise ConfigError(f"min_tiles {self.min_tiles} is more than max_tiles {self.max_tiles}")


@dataclass(frozen=True)
class ScalesConfig:
    """An image looked at in several sizes, whose features are laid side by side (spec 2.3).

    With `dynamic` the largest size follows the image's aspect ratio; otherwise all are squares.
    """

    dynamic: bool
    s2_scales: tuple[int, ...]  # pixels per side, ascending; tiles of the tower's size cut each
    resize_output_to: int  # index of the scale whose grid the features get

    def __post_init__(self) -> None:
        scales = self.s2_scales
        if not scales or min(scales) < 1 or list(scales) != sorted(set(scales)):
            raise ConfigError(f"s2_scales {list(scales)}: expected sizes in ascending order")
        if any(scale % scales[0] for scale in scales):
            raise ConfigError(f"s2_scales {list(scales)}: expected multiples of the smallest")
        if not 0 <= self.resize_output_to < len(scales):
            raise ConfigError(f"resize_output_to {self.resize_output_to}: expected an index into {list(scales)}")

    @property
    def splits(self) -> tuple[int, ...]:
        """Tiles per side of each scale, as far as it is a square."""
        return tuple(scale // self.s2_scales[0] for scale in self.s2_scales)


@dataclass(frozen=True)
class VideoConfig:
    """Which frames of a video are looked at, and how their tokens are pooled: (frames, rows, columns) at a time."""

    num_video_frames: int = 8
    fps: float = 0.0  # 0: as many frames as above, whatever the length
    pool_sizes: tuple[tuple[int, int, int], ...] = ()
    max_tiles: int = 1  # above 1 the original cuts the frames of a dynamic model into tiles

    def __post_init__(self) -> None:
        _check_numbers(self, all_but=("fps",))
        if not 0 <= self.fps < math.inf:
            raise ConfigError(f"fps {self.fps}: expected a number from 0 on")
        if any(size < 1 for pool in self.pool_sizes for size in pool):
            raise ConfigError(f"pool_sizes {[list(pool) for pool in self.pool_sizes]}: expected positive numbers")


@dataclass(frozen=True)
class TokenizerConfig:
    """What `tokenizer.json` does not say.

    A slow LLaMA tokenizer puts `prefix` before a text once, however many control tokens follow; but not
    where the text begins with one of `special_tokens`.
    """

    bos_token: str | None = None
    prefix: str = ""
    special_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile:
    """What an era of VILA does beyond the sizes. Code asks the profile, never a model's name (spec section 0)."""

    era: str
    token_order: TokenOrder  # of the tokens that `mlp_downsample` emits: silent if wrong
    tokenization: Tokenization  # per_chunk: the text between two images is tokenised alone
    template: str
    stop_tokens: tuple[str, ...]
    image_lead: str = "<image>\n"  # what goes before the text for an image without a mark
    image_end: str = ""  # text whose embedding follows the tokens of each tile or frame
    tile_end: str = ""  # text behind the mark of each tile
    strip_turns: bool = False
    video_as: Literal["frames", "video"] = "frames"  # frames: each is an image of its own
    frame_rule: FrameRule = "before_last"
    few_shot: str = "<image>\n{answer}\n"  # one example


@dataclass(frozen=True)
class VilaConfig:
    """One VILA."""

    vision_tower: VisionConfig
    mm_projector: ProjectorConfig
    llm: LlmConfig
    preprocess: PreprocessConfig
    profile: Profile
    scales: ScalesConfig | None = None
    video: VideoConfig = dataclasses.field(default_factory=VideoConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        tower, aspect = self.vision_tower, self.preprocess.image_aspect_ratio
        if self.mm_projector.downsample > 1 and tower.num_features != tower.grid_size**2:
            raise ConfigError(f"{self.mm_projector.mm_projector_type} needs patches alone, not a class token")
        if (aspect == "dynamic_s2") != (self.scales is not None and self.scales.dynamic):
            raise ConfigError(f"image_aspect_ratio {aspect!r} does not go with scales {self.scales}")
        if self.scales and self.scales.s2_scales[0] != tower.image_size:
            raise ConfigError(f"s2_scales {list(self.scales.s2_scales)}: expected to start with {tower.image_size}")
        if self.scales and tower.num_features != tower.grid_size**2:
            raise ConfigError("s2_scales need patches alone, not a class token")
        seen = self.scales.s2_scales[-1] if self.scales and not self.scales.dynamic else tower.image_size
        if self.preprocess.image_size != seen:
            raise ConfigError(f"the processor makes images of {self.preprocess.image_size} pixels, not {seen}")
        if self.mm_projector.downsample > 1 and 0 in self.mm_projector.hidden_widths(self.mm_hidden_size, 1):
            raise ConfigError(f"{self.mm_projector.mm_projector_type} needs features of at least 3 numbers")

    @property
    def mm_hidden_size(self) -> int:
        """Width of the features that the projector sees."""
        return self.vision_tower.hidden_size * (len(self.scales.s2_scales) if self.scales else 1)

    @property
    def projector_grid(self) -> int:
        """Tokens per side that the projector makes of one tile; for a projector that does not fold, patches."""
        return -(-self.vision_tower.grid_size // self.mm_projector.downsample)  # rounds up

    @property
    def tokens_per_image(self) -> int:
        """image_embeds that the projector makes of an image looked at whole, or of one tile."""
        if self.mm_projector.downsample == 1:
            return self.vision_tower.num_features
        return self.projector_grid**2


def _check_numbers(config: Any, all_but: tuple[str, ...] = ()) -> None:
    """Raises ConfigError unless sizes and constants are positive and finite, and the layers a sane number."""
    if getattr(config, "num_hidden_layers", 0) > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers {config.num_hidden_layers:,}: expected at most {MAX_LAYERS:,}")
    for name, value in vars(config).items():
        number = type(value) in (int, float) and name not in all_but
        if number and not 0 < value < math.inf:
            raise ConfigError(f"{name} {value}: expected a positive number")


def _check_divides(config: Any, part: str, whole: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ConfigError(f"{whole} {getattr(config, whole)} is not a multiple of {part} {getattr(config, part)}")
