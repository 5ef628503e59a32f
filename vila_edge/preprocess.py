"""RGB images to pixel_values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vila_edge.config import PreprocessConfig
from vila_edge.media.image import RgbImage


def preprocess(images: Sequence[RgbImage], cfg: PreprocessConfig) -> NDArray[np.float32]:
    """Images of any size to pixel_values [N, 3, S, S]: bicubic to a square, rescaled, normalised (spec 2.2)."""
    size = (cfg.image_size, cfg.image_size)
    pixel_values = np.empty((len(images), 3, *size), np.float32)
    mean, std = np.array(cfg.image_mean, np.float32), np.array(cfg.image_std, np.float32)
    for row, image in zip(pixel_values, images, strict=True):
        resized = Image.fromarray(image.pixels).resize(size, Image.Resampling.BICUBIC)
        scaled = np.asarray(resized, np.float32) * np.float32(cfg.rescale_factor)
        row[:] = ((scaled - mean) / std).transpose(2, 0, 1)
    return pixel_values
