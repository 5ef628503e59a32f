"""Images and videos of a prompt: how each is looked at, and what stands for it in the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vila_edge import scales
from vila_edge.config import VilaConfig
from vila_edge.engine.protocol import Embedder, Encoder
from vila_edge.errors import PromptError
from vila_edge.media.image import RgbImage
from vila_edge.media.video import Video
from vila_edge.preprocess import preprocess, preprocess_tiles
from vila_edge.prompt import IMAGE_MARK, VIDEO_MARK, Chunk, ImageSlot, Shown
from vila_edge.tiles import WHOLE, Layout, layout
from vila_edge.timing import Timings

FloatArray = NDArray[np.float32]
Medium = RgbImage | Video

TOWER_BATCH = 16  # tiles at a time: bounds memory


@dataclass(frozen=True)
class Visual:
    """One image or video, and the positions of each slot that it takes in the prompt."""

    medium: Medium
    layout: Layout
    slot_lengths: tuple[int, ...]
    expansion: str  # what its mark becomes in the text, with one mark for each slot

    @property
    def frames(self) -> tuple[RgbImage, ...]:
        return self.medium.frames if isinstance(self.medium, Video) else (self.medium,)

    @property
    def mark(self) -> str:
        return VIDEO_MARK if isinstance(self.medium, Video) else IMAGE_MARK

    @property
    def shown(self) -> Shown:
        return Shown(self.mark, self.expansion)

    @property
    def tokens(self) -> int:
        return sum(self.slot_lengths)

    @cached_property
    def key(self) -> str:
        """Equal exactly if the same is seen of the same pixels."""
        return f"{self.mark} {self.layout} {self.medium.sha256}"


@dataclass(frozen=True)
class Looked:
    """What each step made of a visual. T: tokens of one block, C: width of the tower."""

    pixel_values: FloatArray  # [N, 3, S, S]
    tower_features: FloatArray  # [N', P, C]
    image_features: FloatArray  # [blocks, P, C * scales]: what the projector sees
    image_embeds: FloatArray  # [blocks, T, D]


def plan(media: Sequence[Medium], cfg: VilaConfig, end_length: int) -> list[Visual]:
    """How each image and video of one prompt is looked at. `end_length`: tokens of the profile's `image_end`.

    Raises PromptError for a video whose frames do not fill the pools of the model.
    """
    images = sum(isinstance(medium, RgbImage) for medium in media)
    return [_plan(medium, cfg, images, end_length) for medium in media]


def _plan(medium: Medium, cfg: VilaConfig, images: int, end_length: int) -> Visual:
    profile, tokens = cfg.profile, cfg.tokens_per_image
    if isinstance(medium, Video):
        frames = len(medium.frames)
        if profile.video_as == "frames":
            return Visual(medium, WHOLE, (tokens + end_length,) * frames, profile.image_lead * frames)
        if cfg.video.max_tiles > 1 and cfg.preprocess.image_aspect_ratio in ("dynamic", "dynamic_s2"):
            raise PromptError(
                f"this model cuts video frames into up to {cfg.video.max_tiles} tiles, which this version does not do",
                "show single frames as images",
            )
        lengths = [_pooled_length(frames, pool, cfg, end_length) for pool in cfg.video.pool_sizes]
        return Visual(medium, WHOLE, (sum(lengths) or frames * (tokens + end_length),), VIDEO_MARK)
    chosen = layout(*medium.size, cfg, images)
    tiles = chosen.rows * chosen.columns
    if chosen.kind == "tiles":
        tiles += chosen.thumbnail
        return Visual(medium, chosen, (tokens + end_length,) * tiles, (IMAGE_MARK + profile.tile_end) * tiles)
    rows, columns = scales.block_shape(chosen, cfg)
    return Visual(medium, chosen, (rows * columns * tokens + end_length,), IMAGE_MARK)


def _pooled_length(frames: int, pool: tuple[int, int, int], cfg: VilaConfig, end_length: int) -> int:
    t, h, w = pool
    grid = cfg.projector_grid
    if frames % t or grid % h or grid % w:
        raise PromptError(
            f"{frames} frames of {grid} x {grid} tokens do not fill this model's pools of {t} x {h} x {w}",
            f"use a multiple of {t} frames (--frames)",
        )
    return frames // t * ((grid // h) * (grid // w) + end_length)


def look(visual: Visual, engine: Encoder, cfg: VilaConfig, timings: Timings | None = None) -> Looked:
    """A visual through preprocessing, tower and projector."""
    timings = timings or Timings()
    with timings.measure("preprocess_ms"):
        if visual.layout.kind == "whole":
            pixel_values = preprocess(visual.frames, cfg.preprocess)
        else:
            pixel_values = preprocess_tiles(visual.frames[0], cfg.preprocess, visual.layout, cfg.scales)
        tiles = scales.tower_input(pixel_values, cfg)
    with timings.measure("vision_ms"):
        batches = [engine.encode_images(tiles[i : i + TOWER_BATCH]) for i in range(0, len(tiles), TOWER_BATCH)]
        features = np.concatenate(batches)
    with timings.measure("projector_ms"):
        image_features = scales.merge_features(features, visual.layout, cfg)
        blocks = [
            engine.project(image_features[i : i + TOWER_BATCH]) for i in range(0, len(image_features), TOWER_BATCH)
        ]
    return Looked(pixel_values, features, image_features, np.concatenate(blocks))


def slot_embeds(visual: Visual, image_embeds: FloatArray, cfg: VilaConfig, image_end: FloatArray) -> list[FloatArray]:
    """What stands in each slot of a visual [slot length, D]. `image_end` [E, D] ends every image, tile and frame."""
    width = image_embeds.shape[-1]

    def ended(blocks: FloatArray) -> FloatArray:
        ends = np.broadcast_to(image_end, (len(blocks), *image_end.shape))
        return np.concatenate([blocks, ends], 1)

    if isinstance(visual.medium, Video) and cfg.profile.video_as == "video":
        pooled = [scales.pool_video(image_embeds, pool) for pool in cfg.video.pool_sizes] or [image_embeds]
        return [np.concatenate([ended(part).reshape(-1, width) for part in pooled])]
    if visual.layout.kind == "scales":
        image_embeds = scales.stitch(image_embeds, *scales.block_shape(visual.layout, cfg)).reshape(1, -1, width)
    return list(ended(image_embeds))


def splice(chunks: Sequence[Chunk], slots: Sequence[FloatArray], engine: Embedder) -> FloatArray:
    """The whole sequence [S, D]: embeddings of the text, and what was seen in the slots."""
    return np.concatenate(
        [slots[chunk.index] if isinstance(chunk, ImageSlot) else engine.embed_tokens(chunk.ids) for chunk in chunks]
    )
