"""How an image is cut into tiles of the tower's size (spec section 2.2). Sizes only, no pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vila_edge.config import VilaConfig


@dataclass(frozen=True)
class Layout:
    """What the tower sees of one image.

    whole: the image alone. tiles: `rows` x `columns` tiles, and a thumbnail behind them if they are several.
    scales: a square of tiles for each scale but the last, then `rows` x `columns` tiles for that.
    """

    kind: Literal["whole", "tiles", "scales"]
    rows: int = 1
    columns: int = 1

    @property
    def thumbnail(self) -> bool:
        return self.kind == "tiles" and self.rows * self.columns > 1


WHOLE = Layout("whole")


def layout(width: int, height: int, cfg: VilaConfig, images_in_prompt: int) -> Layout:
    """The layout of an image. Only the one image of a prompt is cut into tiles (spec section 2.2)."""
    preprocess = cfg.preprocess
    if images_in_prompt != 1 or preprocess.image_aspect_ratio not in ("dynamic", "dynamic_s2"):
        return WHOLE
    if preprocess.image_aspect_ratio == "dynamic":
        rows, columns = closest_grid(width, height, preprocess.image_size, preprocess.min_tiles, preprocess.max_tiles)
        return Layout("tiles", rows, columns)
    assert cfg.scales is not None
    rows, columns = closest_grid(width, height, preprocess.image_size, cfg.scales.splits[-1] ** 2, preprocess.max_tiles)
    return Layout("scales", rows, columns)


def closest_grid(width: int, height: int, tile: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns of the grid, of min_tiles to max_tiles, whose aspect ratio is closest to the image's.

    Of grids that are equally close, a larger one wins if the image has more than half of its pixels.
    """
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _grids(min_tiles, max_tiles):
        difference = abs(width / height - columns / rows)
        enough_pixels = width * height > 0.5 * tile * tile * columns * rows
        if difference < best_difference or (difference == best_difference and enough_pixels):
            best, best_difference = (rows, columns), difference
    return best


def _grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    """(columns, rows) of every grid, in order of their number of tiles."""
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
