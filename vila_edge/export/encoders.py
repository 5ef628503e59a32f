"""NVILA's `image_encoder` and `video_encoder`: objects, or JSON in a string, that name a class and its settings."""

from __future__ import annotations

import json

from vila_edge.config import VideoConfig
from vila_edge.export.fields import Fields

_BASIC, _TSP = "BasicVideoEncoder", "TSPVideoEncoder"
IMAGE_END = "\n"


def image_end(root: Fields) -> str:
    """The text whose embedding ends the tokens of an image. Raises ConfigError for what is not understood."""
    return _encoder(root, "image_encoder", "BasicImageEncoder")[1]


def video_config(root: Fields) -> VideoConfig:
    """Frames and pooling. Raises ConfigError for what is not understood."""
    name, end, fields = _encoder_fields(root, "video_encoder", _BASIC, _TSP)
    if end != image_end(root):
        raise fields.error("end_tokens", f"{image_end(root)!r}, as of image_encoder")
    fields.fixed(sep_tokens=None)
    pools: tuple[tuple[int, int, int], ...] = ()
    if name == _TSP:
        pools = tuple(_pool(pool, fields) for pool in fields.sequence("pool_sizes"))
    fields.done()
    return VideoConfig(
        num_video_frames=root.integer("num_video_frames", 8),
        fps=root.from_zero("fps", 0.0),
        pool_sizes=pools,
        max_tiles=root.integer("video_max_tiles", 1),
    )


def _encoder(root: Fields, key: str, *known: str) -> tuple[str, str]:
    name, end, fields = _encoder_fields(root, key, *known)
    fields.done()
    return name, end


def _encoder_fields(root: Fields, key: str, *known: str) -> tuple[str, str, Fields]:
    value = root.data.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise root.error(key, "JSON") from None
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise root.error(key, "an object")
    fields = Fields(value, f"{root.source}: {key}")
    name = str(fields.optional("_target_", known[0])).rpartition(".")[2]
    if name not in known:
        raise fields.error("_target_", " or ".join(known))
    fields.fixed(start_tokens=None)
    end = fields.optional("end_tokens", IMAGE_END)
    if end is not None and not isinstance(end, str):
        raise fields.error("end_tokens", "text")
    return name, end or "", fields


def _pool(pool: object, fields: Fields) -> tuple[int, int, int]:
    if not isinstance(pool, list) or len(pool) != 3 or any(type(size) is not int or size < 1 for size in pool):
        raise fields.error("pool_sizes", "triples of whole numbers")
    return (pool[0], pool[1], pool[2])
