"""A checkpoint with random weights and the dimensions of VILA1.5-3B, to measure exports with.

    python benchmarks/random_checkpoint.py DIR [--layers 32]

Nothing is downloaded; what it answers is noise. With 32 layers it takes 6.3 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from vila_edge import fsio
from vila_edge.config import (
    LlmConfig,
    PreprocessConfig,
    ProjectorConfig,
    RopeConfig,
    TokenizerConfig,
    VilaConfig,
    VisionConfig,
)
from vila_edge.micro.tokens import TOKENIZER_CONFIG, make_tokenizer
from vila_edge.parameters import component, parameter_shapes
from vila_edge.profiles import VILA_1_5
from vila_edge.tensorfile import write_stream
from vila_edge.train.checkpoint import write_configs

PIECE = 1 << 22  # numbers that are drawn at a time


def vila_3b(layers: int) -> VilaConfig:
    """VILA1.5-3B, of any depth."""
    return VilaConfig(
        VisionConfig(
            model_type="siglip_vision_model",
            hidden_act="gelu_pytorch_tanh",
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            layer_norm_eps=1e-6,
            select_layer=-2,
            select_feature="cls_patch",
        ),
        ProjectorConfig("mlp_downsample"),
        LlmConfig(
            model_type="llama",
            hidden_size=2560,
            intermediate_size=6912,
            num_hidden_layers=layers,
            num_attention_heads=20,
            num_key_value_heads=20,
            head_dim=128,
            vocab_size=32000,
            context_length=4096,
            rms_norm_eps=1e-5,
            rope=RopeConfig(rope_theta=10_000.0),
            tie_word_embeddings=False,
        ),
        PreprocessConfig("resize", 384, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        VILA_1_5,
        tokenizer=TokenizerConfig(),
    )


def write(cfg: VilaConfig, target: Path) -> None:
    """The checkpoint, in bfloat16."""
    with fsio.new_folder(target) as folder:
        write_configs(cfg, make_tokenizer(), folder, TOKENIZER_CONFIG)
        shapes = parameter_shapes(cfg)
        for part in ("llm", "vision_tower", "mm_projector"):
            specs = {
                name.partition(".")[2]: ("BF16", shape) for name, shape in shapes.items() if component(name) == part
            }
            write_stream(
                folder / part / "model.safetensors",
                specs,
                lambda name, specs=specs: _random(name, specs[name][1]),  # type: ignore[misc]
            )


def _random(name: str, shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    """Numbers of the size that an untrained model has: a norm's are near one."""
    rng = np.random.default_rng(abs(int.from_bytes(name.encode(), "little")) % (1 << 64))
    mean, spread = (1.0, 0.1) if name.endswith("norm.weight") or "layer_norm" in name else (0.0, 0.02)
    left = int(np.prod(shape))
    while left:
        values = rng.standard_normal(min(PIECE, left), np.float32) * np.float32(spread) + np.float32(mean)
        yield (values.view(np.uint32) >> 16).astype(np.uint16)
        left -= len(values)


def main(
    folder: Annotated[Path, typer.Argument()],
    layers: Annotated[int, typer.Option(help="Decoder blocks.")] = 32,
) -> None:
    write(vila_3b(layers), folder)


if __name__ == "__main__":
    typer.run(main)
