"""What is measured: the products and projectors of released models. Sizes are those of their config files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vila_edge.config import (
    Heads,
    LlmConfig,
    PreprocessConfig,
    Profile,
    ProjectorConfig,
    RopeConfig,
    VilaConfig,
    VisionConfig,
)
from vila_edge.profiles import NVILA, VILA_1_0, VILA_1_5

Part = Literal["qkv", "o", "gate+up", "down", "lm_head"]

BATCHES = (1, 2, 4, 8)
TOKENS = (196, 256, 1024, 2048)
IMAGES = (1, 4)
PATCH = 14


@dataclass(frozen=True)
class Product:
    """A weight [n, k] of a decoder."""

    part: Part
    n: int
    k: int


@dataclass(frozen=True)
class Model:
    """A decoder, as far as its products go."""

    name: str
    hidden_size: int
    heads: Heads
    intermediate_size: int
    vocab_size: int
    layers: int = 1

    @classmethod
    def of(cls, name: str, llm: LlmConfig) -> Model:
        return cls(name, llm.hidden_size, llm.heads, llm.intermediate_size, llm.vocab_size, llm.num_hidden_layers)

    @property
    def products(self) -> tuple[Product, ...]:
        """In the order in which a token meets them."""
        hidden, heads = self.hidden_size, self.heads
        return (
            Product("qkv", (heads.query + 2 * heads.key_value) * heads.dim, hidden),
            Product("o", hidden, heads.query * heads.dim),
            Product("gate+up", 2 * self.intermediate_size, hidden),
            Product("down", hidden, self.intermediate_size),
            Product("lm_head", self.vocab_size, hidden),
        )


@dataclass(frozen=True)
class Projection:
    """A projector: features [grid * grid, width] of an image to embeddings of `hidden_size` numbers."""

    model: str
    type: str
    grid: int
    width: int
    hidden_size: int
    profile: Profile = NVILA

    @property
    def name(self) -> str:
        return f"{self.model} {self.type} {self.grid}x{self.grid}x{self.width} -> {self.hidden_size}"

    @property
    def config(self) -> VilaConfig:
        """A VILA with this projector, all else as small as it can be."""
        size = self.grid * PATCH
        vision = VisionConfig(
            model_type="siglip_vision_model",
            hidden_act="gelu_pytorch_tanh",
            hidden_size=self.width,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=size,
            patch_size=PATCH,
            layer_norm_eps=1e-6,
            select_layer=-2,
            select_feature="cls_patch",
        )
        llm = LlmConfig(
            model_type="llama",
            hidden_size=self.hidden_size,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
            vocab_size=8,
            context_length=8,
            rms_norm_eps=1e-5,
            rope=RopeConfig(10_000.0),
            tie_word_embeddings=False,
        )
        preprocess = PreprocessConfig("resize", size, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return VilaConfig(vision, ProjectorConfig(self.type), llm, preprocess, self.profile)


MODELS = (
    Model("VILA1.5-3B", 2560, Heads(20, 20, 128), 6912, 32000, 32),
    Model("VILA1.5-8B", 4096, Heads(32, 8, 128), 14336, 128257, 32),
    Model("NVILA-2B", 1536, Heads(12, 2, 128), 8960, 151648, 28),
    Model("NVILA-8B", 3584, Heads(28, 4, 128), 18944, 151648, 28),
)
PROJECTIONS = (
    Projection("VILA1.5-3B", "mlp_downsample", 27, 1152, 2560, VILA_1_5),
    Projection("VILA1.5-8B", "mlp_downsample", 27, 1152, 4096, VILA_1_5),
    Projection("NVILA-2B", "mlp_downsample_3x3_fix", 32, 1152, 1536),
    Projection("NVILA-8B", "mlp_downsample", 32, 3 * 1152, 3584),  # three scales side by side
    Projection("NVILA-8B", "mlp_downsample_2x2_fix", 32, 1152, 3584),
    Projection("NVILA-8B", "mlp_downsample_3x3_fix", 32, 1152, 3584),
    Projection("VILA-7B", "mlp2x_gelu", 24, 1024, 4096, VILA_1_0),
    Projection("VILA-7B", "linear", 24, 1024, 4096, VILA_1_0),
)


@dataclass(frozen=True)
class Shapes:
    """All that a run measures."""

    models: Sequence[Model] = MODELS
    projections: Sequence[Projection] = PROJECTIONS
    batches: Sequence[int] = BATCHES  # of decode
    tokens: Sequence[int] = TOKENS  # of a prefill
    images: Sequence[int] = IMAGES  # of a projector

    def of(self, names: Sequence[str]) -> Shapes:
        """Of some models alone; of all if there are no names. Raises ValueError for one that is not there."""
        known = {model.name for model in self.models} | {projection.model for projection in self.projections}
        for name in names:
            if name not in known:
                raise ValueError(f"no model {name!r}: expected one of {', '.join(sorted(known))}")
        if not names:
            return self
        models = [model for model in self.models if model.name in names]
        projections = [projection for projection in self.projections if projection.model in names]
        return Shapes(models, projections, self.batches, self.tokens, self.images)
