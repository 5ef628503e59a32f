"""A bundle of noise: a decoder in 4 bits with groups of 128 and zero points, lm_head in 8 bits, a tiny vision tower.

    python -m benchmarks.cpu_peers.random_bundle DIR SHAPE       SHAPE as JSON, see shape.py

No checkpoint is made and nothing is searched for: integers are drawn as they are stored. They are as large as those
of a model that keeps the size of its activations, so that nothing overflows and nothing is zero.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cpu_peers.shape import Shape
from vila_edge import fsio
from vila_edge.bundle import TOKENIZER, WEIGHTS, write_manifest
from vila_edge.config import (
    LlmConfig,
    PreprocessConfig,
    ProjectorConfig,
    RopeConfig,
    TokenizerConfig,
    VilaConfig,
    VisionConfig,
)
from vila_edge.export.storage import Storage, StoragePlan
from vila_edge.export.weights import rope_tables, write_graph_files
from vila_edge.micro.tokens import BOS, make_tokenizer
from vila_edge.profiles import VILA_1_5
from vila_edge.tensorfile import Spec, write_stream

PIECE = 1 << 24  # bytes that are drawn at a time
SPREAD = {"int4": 4.6, "int8": 73.9}  # standard deviation of integers of which each is as likely
ZERO_POINTS = (0x77, 0x78, 0x87, 0x88)  # two in a byte, in the middle of the integers
KV_SCALE = 0.05  # of a kv_cache in 8 bits: keys and values are about 1


def config(shape: Shape) -> VilaConfig:
    """VILA1.5 around the decoder. Its eyes are as small as they can be: they are not what is measured."""
    vision = VisionConfig(
        model_type="siglip_vision_model",
        hidden_act="gelu_pytorch_tanh",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        layer_norm_eps=1e-6,
        select_layer=-2,
        select_feature="cls_patch",
    )
    llm = LlmConfig(
        model_type="llama",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        context_length=shape.context,
        rms_norm_eps=shape.rms_norm_eps,
        rope=RopeConfig(shape.rope_theta),
        tie_word_embeddings=False,
    )
    preprocess = PreprocessConfig("resize", 56, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    projector, tokenizer = ProjectorConfig("mlp_downsample"), TokenizerConfig(bos_token=BOS)
    return VilaConfig(vision, projector, llm, preprocess, VILA_1_5, tokenizer=tokenizer)


def write(shape: Shape, target: Path) -> None:
    """The bundle. The same shape gives the same bytes."""
    cfg, storage = config(shape), Storage(lm_head="int8")
    places, tables = StoragePlan(cfg, storage), rope_tables(cfg.llm)
    with fsio.new_folder(target) as folder:
        (folder / WEIGHTS).mkdir()
        for file, specs in places.files.items():

            def read(name: str, specs: dict[str, Spec] = specs) -> Iterator[NDArray[Any]]:
                return iter([tables[name]]) if name in tables else _noise(name, specs)

            write_stream(folder / file, specs, read)
        write_graph_files(folder, cfg, places.places())
        fsio.write_bytes(folder / TOKENIZER, make_tokenizer().encode())
        quantization = {
            "method": "noise",
            "bits": 4,
            "group_size": storage.group_size,
            "symmetric": False,
            "lm_head": "int8",
            "vision": "fp16",
            "parameter_bytes": places.parameter_bytes(),
        }
        write_manifest(
            folder,
            name=f"noise-{shape.name}",
            config=cfg,
            quantization=quantization,
            provenance={},
            license_note="",
            parity={},
        )


def _noise(name: str, specs: dict[str, Spec]) -> Iterator[NDArray[Any]]:
    """One tensor, in pieces."""
    dtype, shape = specs[name]
    rng, count = np.random.default_rng(zlib.crc32(name.encode())), math.prod(shape)
    if name.startswith("kv_cache."):
        yield np.full(shape, KV_SCALE, np.float32)
    elif name.endswith(".scales"):
        linear = name.removesuffix(".scales")
        packed = specs.get(f"{linear}.qweight")
        columns = 2 * packed[1][1] if packed else specs[f"{linear}.qweight_int8"][1][1]
        size = 1 / (SPREAD["int4" if packed else "int8"] * math.sqrt(columns))
        yield rng.uniform(0.8 * size, 1.2 * size, shape).astype(np.float16)
    elif name.endswith(".qzeros"):
        yield rng.choice(np.array(ZERO_POINTS, np.uint8), shape)
    elif dtype == "U8":
        for start in range(0, count, PIECE):
            yield np.frombuffer(rng.bytes(min(PIECE, count - start)), np.uint8)
    else:
        mean, spread = (1.0, 0.1) if name.endswith("norm.weight") or "layer_norm" in name else (0.0, 0.05)
        kind = np.float16 if dtype == "F16" else np.float32
        for start in range(0, count, PIECE):
            values = rng.standard_normal(min(PIECE, count - start), np.float32)
            yield (values * np.float32(spread) + np.float32(mean)).astype(kind)


if __name__ == "__main__":
    write(Shape.from_json(sys.argv[2]), Path(sys.argv[1]))
