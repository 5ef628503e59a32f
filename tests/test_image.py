"""Anything a user may hand in becomes RGB, or one clear error."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image

from vila_edge.config import PreprocessConfig
from vila_edge.errors import ImageError
from vila_edge.media.image import FORMATS, load_image
from vila_edge.preprocess import preprocess, resize

RNG = np.random.default_rng(6)
PIXELS = RNG.integers(0, 256, (7, 9, 3), np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and has one byte of pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + b"\0\0\0\0IEND\xaeB`\x82"


def test_all_sources_give_the_same_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encode(image), image, PIXELS, load_image(PIXELS)):
        loaded = load_image(source)
        np.testing.assert_array_equal(loaded.pixels, PIXELS)
        assert loaded.size == (9, 7)
        assert loaded.sha256 == load_image(PIXELS).sha256


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_promised(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    loaded = load_image(encode(Image.fromarray(PIXELS), kind, **options))
    assert loaded.pixels.shape == PIXELS.shape
    assert kind in ("JPEG", "GIF") or (loaded.pixels == PIXELS).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "I;16", "F", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new(mode, (5, 4)) if mode in ("I;16", "F", "PA") else Image.fromarray(PIXELS).convert(mode)
    loaded = load_image(image)
    assert loaded.pixels.dtype == np.uint8
    assert loaded.pixels.shape[2] == 3


def test_alpha_is_dropped_not_blended() -> None:
    rgba = np.dstack([PIXELS, np.zeros((7, 9), np.uint8)])
    np.testing.assert_array_equal(load_image(Image.fromarray(rgba)).pixels, PIXELS)


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    loaded = load_image(encode(image, exif=exif))
    np.testing.assert_array_equal(loaded.pixels, np.rot90(PIXELS, -1))


def test_the_digest_sees_shape_and_content() -> None:
    flat = PIXELS.reshape(9, 7, 3)
    changed = PIXELS.copy()
    changed[0, 0, 0] ^= 1
    assert len({load_image(p).sha256 for p in (PIXELS, flat, changed)}) == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"just text", "not an image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
        (png_header(0, 5), "damaged|not an image|0 x 5 pixels"),
        (png_header(20_000, 10_000), r"20000 x 10000 pixels \(200 megapixels\), the limit is 40|178 megapixels"),
        (png_header(9_000, 9_000), r"9000 x 9000 pixels \(81 megapixels\), the limit is 40"),
        (png_header(100_000, 2), "100000 x 2 pixels"),
        (png_header(50, 50), "damaged, it cannot be decoded"),
    ],
    ids=["empty", "text", "postscript", "no width", "200 megapixels", "81 megapixels", "long", "no pixels"],
)
def test_files_that_are_no_usable_image(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=message) as error:
        load_image(path)
    assert "bad.png" in error.value.message
    assert "0x" not in str(error.value)


def test_paths_that_lead_to_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in {"none.png": "no such file", "": "a directory", "pipe.png": "not a regular file"}.items():
        with pytest.raises(ImageError, match=message):
            load_image(tmp_path / name)
    with pytest.raises(ImageError):
        load_image("a\0b.png")


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_that_are_no_image(array: NDArray[Any]) -> None:
    with pytest.raises(ImageError, match="array"):
        load_image(array)


def test_damaged_files_never_crash() -> None:
    rng = random.Random(0)
    for kind in FORMATS:
        whole = encode(Image.fromarray(PIXELS), kind)
        for _ in range(150):
            data = bytearray(whole[: rng.randint(1, len(whole))])
            for _ in range(rng.randint(0, 5)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                assert load_image(bytes(data)).pixels.shape[2] == 3
            except ImageError as error:
                assert "0x" not in str(error)


@pytest.mark.parametrize("size", [(60, 131), (131, 60), (30, 40), (90, 100), (95, 100), (76, 300), (300, 76), (76, 76)])
def test_a_resize_does_not_depend_on_the_version_of_pillow(size: tuple[int, int]) -> None:
    """Pillow 13 is the reference: one call. Older ones are held to its order of passes."""
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), np.uint8))
    shrinks_more = size[1] - 76 > max(0, 2 * (size[0] - 76))
    between = (size[0], 76) if shrinks_more else (76, size[1])
    two_passes = image.resize(between, Image.Resampling.BICUBIC).resize((76, 76), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(resize(image, 76, 76)), np.asarray(two_passes))
    if int(PIL.__version__.split(".")[0]) >= 13:
        one_call = image.resize((76, 76), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(resize(image, 76, 76)), np.asarray(one_call))


def test_pixel_values_are_resized_rescaled_and_normalised() -> None:
    cfg = PreprocessConfig("resize", 6, 1 / 255, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    images = [load_image(PIXELS), load_image(np.full((1, 1, 3), 255, np.uint8))]
    pixel_values = preprocess(images, cfg)
    assert pixel_values.shape == (2, 3, 6, 6)
    assert pixel_values.dtype == np.float32
    resized = np.asarray(Image.fromarray(PIXELS).resize((6, 6), Image.Resampling.BICUBIC), np.float64) / 255
    for channel, (mean, std) in enumerate(zip(cfg.image_mean, cfg.image_std, strict=True)):
        np.testing.assert_allclose(pixel_values[0, channel], (resized[..., channel] - mean) / std, atol=1e-6)
    np.testing.assert_allclose(pixel_values[1, :, 0, 0], [1, 1, 1], atol=1e-6)
