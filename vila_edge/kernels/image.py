"""RGB bytes to the patches that a patch embedding multiplies, normalised on the device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vila_edge.config import PreprocessConfig
from vila_edge.kernels.launch import Launch

CHANNELS = 3
VECTOR = 8  # halves that a thread writes at once
THREADS = 256


def levels(cfg: PreprocessConfig) -> NDArray[np.float16]:
    """What each byte becomes in each channel, [3, 256]: rescaled and rounded as `preprocess` does, then to 16 bits."""
    mean, std = np.array(cfg.image_mean, np.float32), np.array(cfg.image_std, np.float32)
    scaled = (np.arange(256) * cfg.rescale_factor).astype(np.float32)
    return ((scaled - mean[:, None]) / std[:, None]).astype(np.float16)


def patch_width(patch: int) -> int:
    """Numbers of a patch as they are stored: zeros fill it up to whole vectors."""
    return -(-CHANNELS * patch * patch // VECTOR) * VECTOR


def patchify(pixels: int, table: int, patches: int, images: int, height: int, width: int, patch: int) -> Launch:
    """pixels uint8 [N, height, width, 3] to patches [N, rows * columns, patch_width] float16. Raises ValueError.

    Addresses; `table` of `levels`. A patch has the order of the embedding's weight, (channel, y, x). Pixels that fill
    no patch are not looked at.
    """
    count = images * (height // patch) * (width // patch)
    threads = count * patch_width(patch) // VECTOR
    if not 0 < threads < 2**31 - THREADS:
        raise ValueError(
            f"{images} images of {height} x {width} pixels in patches of {patch}: expected from 1 patch to 2^31 threads"
        )
    numbers = (images, height, width, patch, patch_width(patch))
    return Launch("ve_patchify_u8_f16", (-(-threads // THREADS), 1, 1), (pixels, table, patches, *numbers))
