"""RGB images to pixel_values (spec section 2.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vila_edge.config import PreprocessConfig, ScalesConfig
from vila_edge.media.image import RgbImage
from vila_edge.tiles import Layout

RESAMPLE = Image.Resampling.BICUBIC  # as a number, `resample` of a preprocessor_config.json


def preprocess(images: Sequence[RgbImage], cfg: PreprocessConfig) -> NDArray[np.float32]:
    """Images of any size, each looked at whole, to pixel_values [N, 3, S, S]."""
    return _pixel_values([_to_square(Image.fromarray(image.pixels), cfg) for image in images], cfg)


def preprocess_tiles(
    image: RgbImage, cfg: PreprocessConfig, layout: Layout, scales: ScalesConfig | None
) -> NDArray[np.float32]:
    """One image to the pixel_values [tiles, 3, S, S] of its layout, row by row."""
    picture, size = Image.fromarray(image.pixels), cfg.image_size
    if layout.kind == "whole":
        return preprocess([image], cfg)
    tiles: list[Image.Image] = []
    if layout.kind == "scales":
        assert scales is not None
        for split in scales.splits[:-1]:
            tiles += _cut(picture, split, split, size)
    tiles += _cut(picture, layout.rows, layout.columns, size)
    if layout.thumbnail:
        tiles.append(resize(picture, size, size))
    return _pixel_values(tiles, cfg)


def _to_square(image: Image.Image, cfg: PreprocessConfig) -> Image.Image:
    size = cfg.image_size
    if cfg.image_aspect_ratio == "resize":
        return resize(image, size, size)
    if cfg.image_aspect_ratio == "pad":
        image = _pad(image, tuple(int(mean * 255) for mean in cfg.image_mean))
    if cfg.shortest_edge is None:
        return resize(image, size, size)
    return _centre(image, cfg.shortest_edge, size)


def _pad(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of its longer side."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _centre(image: Image.Image, shortest_edge: int, size: int) -> Image.Image:
    """The middle of the image, resized so that its shorter side has `shortest_edge` pixels."""
    short = min(image.size)
    width, height = (shortest_edge if side == short else int(shortest_edge * side / short) for side in image.size)
    image = resize(image, width, height)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _cut(image: Image.Image, rows: int, columns: int, size: int) -> Iterator[Image.Image]:
    resized = resize(image, columns * size, rows * size)
    for top in range(0, rows * size, size):
        for left in range(0, columns * size, size):
            yield resized.crop((left, top, left + size, top + size))


def _pixel_values(squares: Sequence[Image.Image], cfg: PreprocessConfig) -> NDArray[np.float32]:
    """Rescaled in double precision and rounded once, as the original's processors do."""
    pixel_values = np.empty((len(squares), 3, cfg.image_size, cfg.image_size), np.float32)
    mean, std = np.array(cfg.image_mean, np.float32), np.array(cfg.image_std, np.float32)
    for row, square in zip(pixel_values, squares, strict=True):
        scaled = (np.asarray(square) * cfg.rescale_factor).astype(np.float32)
        row[:] = ((scaled - mean) / std).transpose(2, 0, 1)
    return pixel_values


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic, the same pixels with every Pillow.

    A resize is two passes with rounding in between. Pillow 13 runs the vertical one first where the height
    shrinks by more than twice what the width does, older ones never: up to 6 of 255 levels, in a noisy image.
    """
    if image.height - height > max(0, 2 * (image.width - width)):
        image = image.resize((image.width, height), RESAMPLE)
    return image.resize((width, height), RESAMPLE)
