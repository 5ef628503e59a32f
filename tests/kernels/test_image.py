"""Patches made on the device against the preprocessing on the CPU: the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.runner import Runner
from tests.tiny import TINY
from vila_edge.config import PreprocessConfig
from vila_edge.kernels import image
from vila_edge.kernels.manifest import manifest
from vila_edge.kernels.projector import fold
from vila_edge.media.image import RgbImage
from vila_edge.preprocess import preprocess
from vila_edge.reference.numpy_ops import NumpyOps

Array = NDArray[Any]


def photos(images: int, height: int, width: int) -> Array:
    return np.random.default_rng(3).integers(0, 256, (images, height, width, 3), np.uint8)


def patches(kernels: Runner, pixels: Array, cfg: PreprocessConfig, patch: int) -> Array:
    images, height, width, _ = pixels.shape
    count, stride = (height // patch) * (width // patch), image.patch_width(patch)
    out = kernels.empty((images, count, stride), np.float16)
    addresses = kernels.put(pixels).address, kernels.put(image.levels(cfg)).address, out.address
    kernels.run(image.patchify(*addresses, images, height, width, patch))
    return out.numpy()


@pytest.mark.parametrize("shape", manifest()["ve_patchify_u8_f16"].shapes)
def test_a_patch_is_rescaled_and_normalised(kernels: Runner, shape: tuple[int, int, int, int]) -> None:
    *size, patch = shape
    pixels, cfg = photos(*size), TINY.preprocess
    rows, columns, width = size[1] // patch, size[2] // patch, 3 * patch * patch
    used = pixels[:, : rows * patch, : columns * patch].astype(np.float64)
    normal = (used / 255 - np.array(cfg.image_mean)) / np.array(cfg.image_std)
    expected = normal.reshape(size[0], rows, patch, columns, patch, 3).transpose(0, 1, 3, 5, 2, 4)

    found = patches(kernels, pixels, cfg, patch)
    np.testing.assert_allclose(found[..., :width], expected.reshape(size[0], -1, width), rtol=6e-4, atol=1e-6)
    assert not found[..., width:].any()


def test_the_bits_are_those_of_the_preprocessing(shuffled: Runner) -> None:
    pixels, cfg, patch = photos(2, 46, 46), TINY.preprocess, 9
    values = preprocess([RgbImage(photo, "noise") for photo in pixels], cfg).astype(np.float16)
    tiles = values[:, :, :45, :45].reshape(2, 3, 5, patch, 5, patch).transpose(0, 2, 4, 1, 3, 5).reshape(2, 25, -1)
    assert np.array_equal(patches(shuffled, pixels, cfg, patch)[..., : 3 * patch**2], tiles)


def test_patches_are_what_the_patch_embedding_multiplies(shuffled: Runner) -> None:
    """With the projector's kernel as its product: both pad a patch in the same way."""
    pixels, cfg, patch = photos(1, 46, 46), TINY.preprocess, 9
    rng = np.random.default_rng(4)
    weight, bias = rng.standard_normal((32, 3, patch, patch)) / 15, rng.standard_normal(32)
    values = preprocess([RgbImage(photo, "noise") for photo in pixels], cfg).astype(np.float64)
    expected = NumpyOps({"e.weight": weight, "e.bias": bias}).patch_embedding(values, "e", patch, 32, bias=True)

    product = fold("e", weight.reshape(32, -1), bias)
    at = {name: shuffled.put(array).address for name, array in product.arrays.items()}
    out = shuffled.empty((25, 32), np.float16)
    x = shuffled.put(patches(shuffled, pixels, cfg, patch)).address
    shuffled.run(product.launch(at, x, out.address, images=1, tokens=25, stride=32))
    np.testing.assert_allclose(out.numpy(), expected[0], rtol=2e-3, atol=2e-3)


def test_every_level_of_a_released_model_has_its_own_number() -> None:
    cfg = dataclasses.replace(TINY.preprocess, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    table = image.levels(cfg)
    assert (table[:, 0] == -1).all() and (table[:, 255] == 1).all()
    assert (np.diff(table.astype(np.float32)) > 0).all()


def test_an_image_without_a_whole_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="expected from 1 patch"):
        image.patchify(16, 32, 48, 1, 8, 90, 9)
