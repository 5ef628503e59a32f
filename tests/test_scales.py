"""Several scales of one image: pixels and features against torch's own interpolation, and plain loops."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tests.tiny import TINY
from vila_edge import scales
from vila_edge.config import ScalesConfig, VilaConfig
from vila_edge.tiles import WHOLE, Layout

RNG = np.random.default_rng(7)
Shapes = list[tuple[int, int]]


def scaled(*sizes: int, patch: int, dynamic: bool = False, index: int = 0) -> VilaConfig:
    """TINY with these scales. `index` counts from the end where it is negative, as in a config.json."""
    seen = sizes[0] if dynamic else sizes[-1]
    return dataclasses.replace(
        TINY,
        vision_tower=dataclasses.replace(TINY.vision_tower, image_size=sizes[0], patch_size=patch),
        preprocess=dataclasses.replace(
            TINY.preprocess, image_size=seen, image_aspect_ratio="dynamic_s2" if dynamic else "resize"
        ),
        scales=ScalesConfig(dynamic, sizes, index % len(sizes)),
    )


def noise(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def laid_out(blocks: Tensor, rows: int, columns: int, grid: int) -> Tensor:
    """[C, rows * grid, columns * grid]: every block copied to its place, one by one."""
    feature_map = torch.zeros(blocks.shape[-1], rows * grid, columns * grid)
    for index, (row, column) in enumerate(itertools.product(range(rows), range(columns))):
        block = blocks[index].reshape(grid, grid, -1).permute(2, 0, 1)
        feature_map[:, row * grid : (row + 1) * grid, column * grid : (column + 1) * grid] = block
    return feature_map


def merged_by_torch(features: NDArray[np.float32], shapes: Shapes, target: int, grid: int) -> NDArray[np.float32]:
    """The features of one image [tiles, P, C] to blocks [rows * columns, P, C * scales] of the target's shape."""
    rows, columns = shapes[target]
    resized, start = [], 0
    for r, c in shapes:
        feature_map = laid_out(torch.from_numpy(features[start : start + r * c]), r, c, grid)
        resized.append(F.interpolate(feature_map[None], size=(rows * grid, columns * grid), mode="area")[0])
        start += r * c
    assert start == len(features)
    merged = torch.cat(resized)
    blocks = [
        merged[:, row * grid : (row + 1) * grid, column * grid : (column + 1) * grid].flatten(1).T
        for row, column in itertools.product(range(rows), range(columns))
    ]
    return torch.stack(blocks).numpy()


@pytest.mark.parametrize(
    ("sizes", "patch"), [((7, 14), 2), ((9, 27), 3), ((7, 14, 21), 3), ((5, 15, 20), 2), ((384, 768), 14)]
)
def test_a_scale_is_torchs_bicubic_image_cut_row_by_row(sizes: tuple[int, ...], patch: int) -> None:
    """All tiles of the first image, smallest scale first, then those of the second."""
    first, last = sizes[0], sizes[-1]
    pixel_values = noise(2, 3, last, last)
    want = []
    for image in torch.from_numpy(pixel_values):
        for scale in sizes:
            resized = F.interpolate(image[None], size=(scale, scale), mode="bicubic", align_corners=False)[0]
            for top, left in itertools.product(range(0, scale, first), repeat=2):
                want.append(resized[:, top : top + first, left : left + first])
    got = scales.tower_input(pixel_values, scaled(*sizes, patch=patch))
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got, torch.stack(want).numpy(), atol=1e-5)


@pytest.mark.parametrize("cfg", [TINY, scaled(14, 28, patch=3, dynamic=True)], ids=["one scale", "dynamic"])
def test_the_tower_sees_the_pixels_as_they_are_without_fixed_scales(cfg: VilaConfig) -> None:
    pixel_values = noise(3, 3, 14, 14)
    np.testing.assert_array_equal(scales.tower_input(pixel_values, cfg), pixel_values)


@pytest.mark.parametrize(
    ("sizes", "patch", "images"), [((14, 28), 4, 1), ((14, 28), 2, 3), ((10, 20, 30), 2, 2), ((9, 27), 2, 1)]
)
def test_features_of_fixed_scales_are_averaged_to_the_first_grid(
    sizes: tuple[int, ...], patch: int, images: int
) -> None:
    cfg = scaled(*sizes, patch=patch)
    grid = sizes[0] // patch
    shapes = [(size // sizes[0],) * 2 for size in sizes]
    per_image = sum(r * c for r, c in shapes)
    features = noise(images * per_image, grid**2, 5)
    got = scales.merge_features(features, WHOLE, cfg)
    assert got.shape == (images, grid**2, 5 * len(sizes))
    for i in range(images):
        want = merged_by_torch(features[i * per_image : (i + 1) * per_image], shapes, 0, grid)
        np.testing.assert_allclose(got[i : i + 1], want, atol=1e-6)


@pytest.mark.parametrize("index", [-1, 0, 1])
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (3, 4), (2, 6), (9, 1), (1, 11)])
@pytest.mark.parametrize("grid", [4, 5])
def test_features_of_dynamic_scales_are_averaged_to_the_chosen_grid(
    grid: int, rows: int, columns: int, index: int
) -> None:
    cfg, layout = (
        scaled(2 * grid, 4 * grid, 6 * grid, patch=2, dynamic=True, index=index),
        Layout("scales", rows, columns),
    )
    shapes = [(1, 1), (2, 2), (rows, columns)]
    features = noise(1 + 4 + rows * columns, grid**2, 3)
    got = scales.merge_features(features, layout, cfg)
    np.testing.assert_allclose(got, merged_by_torch(features, shapes, index, grid), atol=1e-6)
    assert scales.block_shape(layout, cfg) == shapes[index]
    assert len(got) == np.prod(shapes[index])


@pytest.mark.parametrize("index", [-1, 0, 1])
def test_an_image_looked_at_whole_has_its_features_once_for_each_dynamic_scale(index: int) -> None:
    cfg = scaled(14, 28, 42, patch=3, dynamic=True, index=index)
    features = noise(2, 16, 5)
    got = scales.merge_features(features, WHOLE, cfg)
    for scale in range(3):
        np.testing.assert_array_equal(got[..., 5 * scale : 5 * scale + 5], features)
    assert got.shape == (2, 16, 15)
    assert scales.block_shape(WHOLE, cfg) == (1, 1)


def test_one_scale_merges_nothing() -> None:
    features = noise(4, 25, 5)
    np.testing.assert_array_equal(scales.merge_features(features, Layout("tiles", 3, 1), TINY), features)


def test_blocks_are_single_without_dynamic_scales() -> None:
    assert scales.block_shape(Layout("tiles", 2, 3), TINY) == (1, 1)
    assert scales.block_shape(WHOLE, scaled(14, 28, patch=3)) == (1, 1)


def test_blocks_of_the_largest_scale_follow_the_layout_and_others_are_squares() -> None:
    shapes = [
        scales.block_shape(Layout("scales", 5, 2), scaled(14, 28, 56, patch=3, dynamic=True, index=index))
        for index in (0, 1, 2, -1)
    ]
    assert shapes == [(1, 1), (2, 2), (5, 2), (5, 2)]


def test_stitching_puts_blocks_row_by_row() -> None:
    """Six blocks of 2 x 2, numbered: the map shows the numbers as one reads."""
    blocks = np.repeat(np.arange(6, dtype=np.float32), 4).reshape(6, 4, 1) + np.array([0.0, 0.1, 0.2, 0.3])[:, None]
    stitched = scales.stitch(blocks.astype(np.float32), 2, 3)[..., 0]
    assert np.floor(stitched).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    np.testing.assert_allclose(stitched[2:, 4:], [[5.0, 5.1], [5.2, 5.3]], atol=1e-6)


@pytest.mark.parametrize(("rows", "columns", "grid"), [(1, 1, 5), (2, 3, 4), (3, 2, 3), (1, 12, 2), (11, 1, 1)])
def test_cutting_undoes_stitching(rows: int, columns: int, grid: int) -> None:
    blocks = noise(rows * columns, grid**2, 3)
    stitched = scales.stitch(blocks, rows, columns)
    np.testing.assert_array_equal(stitched, laid_out(torch.from_numpy(blocks), rows, columns, grid).permute(1, 2, 0))
    np.testing.assert_array_equal(scales.cut(stitched, rows, columns), blocks)


@pytest.mark.parametrize("pool", [(1, 1, 1), (2, 1, 1), (1, 2, 3), (1, 3, 2), (2, 2, 2), (4, 3, 2), (4, 6, 6)])
def test_pooled_video_tokens_are_means_over_frames_rows_and_columns(pool: tuple[int, int, int]) -> None:
    t, h, w = pool
    frames = noise(4, 36, 3)
    want = []
    for frame in range(0, 4, t):
        tokens = []
        for row, column in itertools.product(range(0, 6, h), range(0, 6, w)):
            cell = [
                frames[frame + k, 6 * (row + i) + column + j]
                for k, i, j in itertools.product(range(t), range(h), range(w))
            ]
            tokens.append(sum(cell) / len(cell))
        want.append(tokens)
    np.testing.assert_allclose(scales.pool_video(frames, pool), want, atol=1e-6)


SIZES = [(27, 27), (54, 27), (81, 54), (27, 54), (54, 81), (32, 96), (7, 3), (3, 7), (13, 5), (1, 5), (5, 1), (1, 1)]


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_area_weights_are_torchs_means(source: int, target: int) -> None:
    """Coarser, finer and neither's multiple: what torch makes of each unit vector."""
    want = F.interpolate(torch.eye(source)[None], size=target, mode="area")[0].T
    np.testing.assert_allclose(scales._area_weights(source, target), want.numpy(), atol=1e-6)


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_cubic_weights_are_torchs_interpolation(source: int, target: int) -> None:
    """Coarser (without antialiasing) and finer, with few pixels to look at beyond the edge."""
    unit = torch.eye(source)[None, None]
    want = F.interpolate(unit, size=(target, source), mode="bicubic", align_corners=False)[0, 0]
    np.testing.assert_allclose(scales._cubic_weights(source, target), want.numpy(), atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 27, 768])
def test_an_equal_size_leaves_everything_as_it_is(size: int) -> None:
    for weights in (scales._area_weights(size, size), scales._cubic_weights(size, size)):
        np.testing.assert_array_equal(weights, np.eye(size, dtype=np.float32))
