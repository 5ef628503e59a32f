"""Several scales of one image, as far as it is arithmetic: cutting pixels, stitching and pooling features (spec 2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vila_edge.config import VilaConfig
from vila_edge.tiles import Layout

FloatArray = NDArray[np.float32]

CUBIC = -0.75  # the constant of torch's bicubic interpolation


def tower_input(pixel_values: FloatArray, cfg: VilaConfig) -> FloatArray:
    """pixel_values [N, 3, S, S] to what the tower sees [N', 3, H, H]: with fixed scales, all tiles of all of them."""
    if cfg.scales is None or cfg.scales.dynamic:
        return pixel_values
    tiles: list[FloatArray] = []
    for scale, split in zip(cfg.scales.s2_scales, cfg.scales.splits, strict=True):
        weights = _cubic_weights(pixel_values.shape[-1], scale)
        resized = np.matmul(np.matmul(weights, pixel_values), weights.T)  # both axes of each image
        n, side = len(resized), scale // split
        cut = resized.reshape(n, 3, split, side, split, side).transpose(0, 2, 4, 1, 3, 5)
        tiles.append(cut.reshape(n, split * split, 3, side, side))
    return np.ascontiguousarray(np.concatenate(tiles, 1).reshape(-1, *tiles[0].shape[2:]))


def merge_features(features: FloatArray, layout: Layout, cfg: VilaConfig) -> FloatArray:
    """The tower's features [N', P, C] of one image to what the projector sees [blocks, P, C * scales].

    A block is as large as a tile. An image that a model of dynamic scales looks at whole has the same features
    in the place of each scale.
    """
    if cfg.scales is None:
        return features
    grid, splits = cfg.vision_tower.grid_size, cfg.scales.splits
    if cfg.scales.dynamic and layout.kind == "whole":
        return np.tile(features, (1, 1, len(splits)))
    shapes = [(split, split) for split in splits]
    if cfg.scales.dynamic:
        shapes[-1] = (layout.rows, layout.columns)
    rows, columns = shapes[cfg.scales.resize_output_to]
    per_image = sum(r * c for r, c in shapes)
    merged = []
    for image in features.reshape(-1, per_image, *features.shape[1:]):
        parts, start = [], 0
        for r, c in shapes:
            stitched = stitch(image[start : start + r * c], r, c)
            parts.append(_pool_area(stitched, rows * grid, columns * grid))
            start += r * c
        merged.append(cut(np.concatenate(parts, -1), rows, columns))
    return np.concatenate(merged)


def block_shape(layout: Layout, cfg: VilaConfig) -> tuple[int, int]:
    """Rows and columns of the blocks that `merge_features` makes of one image."""
    if cfg.scales is None or not cfg.scales.dynamic or layout.kind == "whole":
        return 1, 1
    if cfg.scales.resize_output_to == len(cfg.scales.s2_scales) - 1:
        return layout.rows, layout.columns
    split = cfg.scales.splits[cfg.scales.resize_output_to]
    return split, split


def stitch(blocks: FloatArray, rows: int, columns: int) -> FloatArray:
    """Blocks [rows * columns, g * g, C], row by row, to one map [rows * g, columns * g, C]."""
    grid = math.isqrt(blocks.shape[1])
    tiled = blocks.reshape(rows, columns, grid, grid, -1).transpose(0, 2, 1, 3, 4)
    return tiled.reshape(rows * grid, columns * grid, -1)


def cut(feature_map: FloatArray, rows: int, columns: int) -> FloatArray:
    """The inverse of `stitch`."""
    height, width, channels = feature_map.shape
    tiled = feature_map.reshape(rows, height // rows, columns, width // columns, channels).transpose(0, 2, 1, 3, 4)
    return tiled.reshape(rows * columns, -1, channels)


def pool_video(frames: FloatArray, pool: Sequence[int]) -> FloatArray:
    """Tokens of frames [F, g * g, D] averaged over pool = (frames, rows, columns) at a time: [F', T', D]."""
    t, h, w = pool
    grid = math.isqrt(frames.shape[1])
    cells = frames.reshape(len(frames) // t, t, grid // h, h, grid // w, w, -1)
    pooled: FloatArray = cells.mean(5).mean(3).mean(1)
    return pooled.reshape(len(pooled), -1, frames.shape[-1])


def _pool_area(feature_map: FloatArray, height: int, width: int) -> FloatArray:
    """Each output cell is the mean of the input cells that it touches, also where the output is the finer grid."""
    rows, columns = _area_weights(feature_map.shape[0], height), _area_weights(feature_map.shape[1], width)
    pooled: FloatArray = np.einsum("ih,hwc,jw->ijc", rows, feature_map, columns, optimize=True)
    return pooled


def _area_weights(source: int, target: int) -> FloatArray:
    """[target, source]: means over cells floor(i * source / target) to ceil((i + 1) * source / target)."""
    weights = np.zeros((target, source), np.float32)
    for i in range(target):
        start, stop = i * source // target, -(-(i + 1) * source // target)
        weights[i, start:stop] = 1 / (stop - start)
    return weights


def _cubic_weights(source: int, target: int) -> FloatArray:
    """[target, source]: bicubic interpolation without antialiasing; the edge goes on outside of the image."""
    places = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((target, source))
    for offset in range(-1, 3):
        distance = np.abs(places - (first + offset))
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
        columns = np.clip(first + offset, 0, source - 1)
        np.add.at(weights, (np.arange(target), columns), np.where(distance <= 1, near, far))
    return np.asarray(weights, np.float32)
