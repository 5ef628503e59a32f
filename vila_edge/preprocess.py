"""RGB images to pixel_values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vila_edge.config import PreprocessConfig
from vila_edge.media.image import RgbImage

RESAMPLE = Image.Resampling.BICUBIC  # as a number, `resample` of a preprocessor_config.json


def preprocess(images: Sequence[RgbImage], cfg: PreprocessConfig) -> NDArray[np.float32]:
    """Images of any size to pixel_values [N, 3, S, S]: bicubic to a square, rescaled, normalised (spec 2.2)."""
    pixel_values = np.empty((len(images), 3, cfg.image_size, cfg.image_size), np.float32)
    mean, std = np.array(cfg.image_mean, np.float32), np.array(cfg.image_std, np.float32)
    for row, image in zip(pixel_values, images, strict=True):
        resized = resize(Image.fromarray(image.pixels), cfg.image_size, cfg.image_size)
        scaled = np.asarray(resized, np.float32) * np.float32(cfg.rescale_factor)
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
