"""Images to pixel_values against straight PIL and numpy, written from the rules of spec section 2.2."""

from __future__ import annotations

import dataclasses

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image

from vila_edge.config import AspectRatio, PreprocessConfig, ScalesConfig
from vila_edge.media.image import RgbImage
from vila_edge.preprocess import preprocess, preprocess_tiles
from vila_edge.tiles import WHOLE, Layout

SIGLIP = PreprocessConfig("square", 24, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = PreprocessConfig(
    "square",
    24,
    1 / 255,
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
    shortest_edge=24,
)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
# Older Pillows run the two passes of a resize in another order, which rounds differently (see `preprocess.resize`).
ATOL = 1e-5 if int(PIL.__version__.split(".")[0]) >= 13 else 6 / 255 / 0.26
# Width and height: wide, tall, a remainder of the long edge above and below a half, square, small, one pixel wide.
SIZES = [(47, 31), (31, 47), (101, 33), (33, 101), (45, 31), (31, 45), (24, 24), (25, 25), (5, 3), (1, 9), (9, 1)]
SIZES += [(1, 1), (48, 24), (23, 300)]

Values = NDArray[np.float64]


def picture(width: int, height: int) -> RgbImage:
    """A slope of colours with noise on it: edges of tiles and resampling filters show."""
    rng = np.random.default_rng(1000 * width + height)
    y, x = np.mgrid[:height, :width]
    slope = np.stack([255 * x / width, 255 * y / height, 127 + 0 * x], -1)
    return RgbImage((slope / 2 + rng.integers(0, 128, slope.shape)).astype(np.uint8), "test")


def pil(image: RgbImage | NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image.pixels if isinstance(image, RgbImage) else image)


def values(image: Image.Image, cfg: PreprocessConfig) -> Values:
    """Rescaled, normalised, channels first."""
    rows = np.asarray(image, np.float64) * (1 / 255)
    return np.stack([(rows[..., c] - cfg.image_mean[c]) / cfg.image_std[c] for c in range(3)])


def siglip_processor(image: Image.Image, size: int, resample: Image.Resampling = BICUBIC) -> Image.Image:
    return image.resize((size, size), resample)


def clip_processor(image: Image.Image, size: int, resample: Image.Resampling = BICUBIC) -> Image.Image:
    """Shortest edge to `size`, the long edge cut off to a whole number, then the centre."""
    width, height = image.size
    if width <= height:
        resized = image.resize((size, int(size * height / width)), resample)
    else:
        resized = image.resize((int(size * width / height), size), resample)
    pixels = np.asarray(resized)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pil(np.ascontiguousarray(pixels[top : top + size, left : left + size]))


def padded(image: RgbImage, mean: tuple[float, float, float]) -> Image.Image:
    """In the middle of a square of the mean colour."""
    width, height = image.size
    side = max(width, height)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = [int(channel * 255) for channel in mean]
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = image.pixels
    return pil(canvas)


def cut_into_tiles(image: RgbImage, rows: int, columns: int, size: int) -> list[Image.Image]:
    pixels = np.asarray(pil(image).resize((columns * size, rows * size), BICUBIC))
    return [
        pil(np.ascontiguousarray(pixels[r * size : (r + 1) * size, c * size : (c + 1) * size]))
        for r in range(rows)
        for c in range(columns)
    ]


def looked_at_whole(image: RgbImage, aspect: AspectRatio, cfg: PreprocessConfig) -> NDArray[np.float32]:
    pixel_values = preprocess([image], dataclasses.replace(cfg, image_aspect_ratio=aspect))
    assert pixel_values.shape == (1, 3, cfg.image_size, cfg.image_size)
    assert pixel_values.dtype == np.float32
    return pixel_values[0]


@pytest.mark.parametrize("size", SIZES)
def test_siglip_squashes_to_a_square(size: tuple[int, int]) -> None:
    want = values(siglip_processor(pil(picture(*size)), 24), SIGLIP)
    np.testing.assert_allclose(looked_at_whole(picture(*size), "square", SIGLIP), want, atol=ATOL)


@pytest.mark.parametrize("size", SIZES)
def test_clip_resizes_the_shortest_edge_and_takes_the_centre(size: tuple[int, int]) -> None:
    want = values(clip_processor(pil(picture(*size)), 24), CLIP)
    np.testing.assert_allclose(looked_at_whole(picture(*size), "square", CLIP), want, atol=ATOL)


def test_the_long_edge_is_cut_off_to_a_whole_number_not_rounded() -> None:
    """31 x 44 to 24 x 34.06, and 31 x 45 to 24 x 34.84: both have a long edge of 34."""
    for height in (44, 45):
        resized = np.asarray(pil(picture(31, height)).resize((24, 34), BICUBIC))
        want = values(pil(np.ascontiguousarray(resized[5:29])), CLIP)
        np.testing.assert_allclose(looked_at_whole(picture(31, height), "square", CLIP), want, atol=ATOL)


def test_the_centre_is_cut_from_a_shortest_edge_that_is_larger() -> None:
    """30 pixels and a crop of 24: three rows and columns go on each side, and more on the long one."""
    cfg = dataclasses.replace(CLIP, shortest_edge=30)
    resized = np.asarray(pil(picture(47, 31)).resize((45, 30), BICUBIC))
    want = values(pil(np.ascontiguousarray(resized[3:27, 10:34])), CLIP)
    np.testing.assert_allclose(looked_at_whole(picture(47, 31), "square", cfg), want, atol=ATOL)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cfg", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_pad_puts_the_image_in_the_middle_of_the_mean_colour(cfg: PreprocessConfig, size: tuple[int, int]) -> None:
    want = values(siglip_processor(padded(picture(*size), cfg.image_mean), 24), cfg)
    np.testing.assert_allclose(looked_at_whole(picture(*size), "pad", cfg), want, atol=ATOL)


def test_the_mean_colour_is_cut_off_to_whole_levels() -> None:
    """int(0.48145466 * 255) = 122, 116 and 104: a black line of 1 x 24 pixels leaves the corners to the padding."""
    line = RgbImage(np.zeros((24, 1, 3), np.uint8), "test")
    corner = looked_at_whole(line, "pad", CLIP)[:, 0, 0]
    want = [(v / 255 - m) / s for v, m, s in zip((122, 116, 104), CLIP.image_mean, CLIP.image_std, strict=True)]
    np.testing.assert_allclose(corner, want, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cfg", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_resize_squashes_for_every_processor(cfg: PreprocessConfig, size: tuple[int, int]) -> None:
    want = values(siglip_processor(pil(picture(*size)), 24), cfg)
    np.testing.assert_allclose(looked_at_whole(picture(*size), "resize", cfg), want, atol=ATOL)


@pytest.mark.parametrize("aspect", ["dynamic", "dynamic_s2"])
@pytest.mark.parametrize("size", [(47, 31), (31, 101), (1, 9)])
def test_an_image_that_is_not_cut_is_squashed(size: tuple[int, int], aspect: AspectRatio) -> None:
    """What a prompt of several images does with each of them, in one batch."""
    cfg = dataclasses.replace(SIGLIP, image_aspect_ratio=aspect)
    images = [picture(*size), picture(40, 20)]
    want = np.stack([values(siglip_processor(pil(image), 24), SIGLIP) for image in images])
    np.testing.assert_allclose(preprocess(images, cfg), want, atol=ATOL)
    np.testing.assert_array_equal(preprocess_tiles(images[0], cfg, WHOLE, None), preprocess(images[:1], cfg))


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [((47, 31), 2, 3), ((31, 47), 3, 2), ((300, 23), 1, 12), ((1, 9), 9, 1), ((25, 24), 1, 1), ((101, 99), 3, 3)],
)
def test_dynamic_tiles_come_row_by_row_with_the_whole_image_last(
    size: tuple[int, int], rows: int, columns: int
) -> None:
    """A single tile is the whole image already: it gets no thumbnail."""
    cfg = dataclasses.replace(SIGLIP, image_aspect_ratio="dynamic")
    image = picture(*size)
    tiles = cut_into_tiles(image, rows, columns, 24)
    if len(tiles) > 1:
        tiles.append(siglip_processor(pil(image), 24))
    got = preprocess_tiles(image, cfg, Layout("tiles", rows, columns), None)
    assert got.shape == (rows * columns + (rows * columns > 1), 3, 24, 24)
    np.testing.assert_allclose(got, np.stack([values(tile, SIGLIP) for tile in tiles]), atol=ATOL)


@pytest.mark.parametrize(
    ("size", "rows", "columns"), [((47, 31), 3, 4), ((31, 101), 6, 2), ((300, 23), 1, 11), ((1, 9), 9, 1)]
)
@pytest.mark.parametrize("splits", [(1, 2, 3), (1, 3), (1, 2)])
def test_dynamic_s2_has_the_squares_of_all_scales_first_and_no_thumbnail(
    splits: tuple[int, ...], size: tuple[int, int], rows: int, columns: int
) -> None:
    """Every scale but the last is a square of tiles; the last has the shape of the layout."""
    cfg = dataclasses.replace(SIGLIP, image_aspect_ratio="dynamic_s2")
    image = picture(*size)
    tiles = [tile for split in splits[:-1] for tile in cut_into_tiles(image, split, split, 24)]
    tiles += cut_into_tiles(image, rows, columns, 24)
    scales = ScalesConfig(True, tuple(24 * split for split in splits), len(splits) - 1)
    got = preprocess_tiles(image, cfg, Layout("scales", rows, columns), scales)
    assert len(got) == sum(split**2 for split in splits[:-1]) + rows * columns
    np.testing.assert_allclose(got, np.stack([values(tile, SIGLIP) for tile in tiles]), atol=ATOL)


@pytest.mark.parametrize("cfg", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_plain_colours_come_out_by_the_constants_red_first(cfg: PreprocessConfig) -> None:
    for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255), (12, 34, 56)]:
        plain = RgbImage(np.full((37, 25, 3), colour, np.uint8), "test")
        got = preprocess([plain], cfg)[0]
        for channel in range(3):
            want = (colour[channel] / 255 - cfg.image_mean[channel]) / cfg.image_std[channel]
            np.testing.assert_allclose(got[channel], want, atol=1e-5)


def test_black_and_white_are_minus_one_and_one_for_siglip() -> None:
    for level, want in {0: -1.0, 255: 1.0}.items():
        plain = RgbImage(np.full((5, 7, 3), level, np.uint8), "test")
        np.testing.assert_array_equal(preprocess([plain], SIGLIP), np.full((1, 3, 24, 24), want, np.float32))


@pytest.mark.parametrize("size", [(47, 31), (31, 101), (5, 3)])
def test_another_filter_would_be_noticed(size: tuple[int, int]) -> None:
    """The same rules with a bilinear resize are far outside of the tolerance of the tests above."""
    image = picture(*size)
    for aspect, cfg, processor in [
        ("square", SIGLIP, siglip_processor),
        ("square", CLIP, clip_processor),
        ("resize", SIGLIP, siglip_processor),
    ]:
        got = looked_at_whole(image, aspect, cfg)  # type: ignore[arg-type]
        other = values(processor(pil(image), 24, BILINEAR), cfg)
        assert np.abs(got - other).max() > 2 * ATOL + 0.05
    padding = looked_at_whole(image, "pad", CLIP)
    other = values(siglip_processor(padded(image, CLIP.image_mean), 24, BILINEAR), CLIP)
    assert np.abs(padding - other).max() > 2 * ATOL + 0.05
