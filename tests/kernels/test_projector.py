"""Whole projectors against the architecture in float64, for every type there is."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.projections import (
    ROUNDING,
    config,
    error,
    image_embeds,
    image_features,
    project,
    projector_parameters,
    put_all,
)
from tests.kernels.runner import Runner
from vila_edge.config import TokenOrder
from vila_edge.kernels.projector import fold_projector
from vila_edge.parameters import parameter_shapes

TYPES = (
    "linear",
    "mlp1x_gelu",
    "mlp2x_gelu",
    "mlp3x_gelu",
    "mlp_downsample",
    "mlp_downsample_2x2_fix",
    "mlp_downsample_3x3_fix",
    "mlp_downsample_3x3_s2",
    "mlp_downsample_3x3_s2_new",
)
LAUNCHES = dict(zip(TYPES, (1, 1, 2, 3, 2, 2, 3, 5, 6), strict=True))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_what_the_architecture_computes(kernels: Runner, kind: str) -> None:
    cfg = config(kind)
    parameters, features = projector_parameters(cfg), image_features(cfg, images=2)
    projector = fold_projector(cfg, parameters)
    assert len(projector.products) == LAUNCHES[kind]
    found = project(kernels, projector, features)
    # Each product rounds its weights and its output.
    assert error(found, image_embeds(cfg, parameters, features)) < ROUNDING * LAUNCHES[kind]


@pytest.mark.parametrize("width", [16, 40])
def test_hidden_widths_that_are_no_whole_vectors(shuffled: Runner, width: int) -> None:
    cfg = config("mlp_downsample_3x3_s2", width=width)
    assert width // 3 % 8 and width // 3 in cfg.mm_projector.hidden_widths(width, 72)
    parameters, features = projector_parameters(cfg), image_features(cfg, images=1)
    found = project(shuffled, fold_projector(cfg, parameters), features)
    assert error(found, image_embeds(cfg, parameters, features)) < 5 * ROUNDING


@pytest.mark.parametrize("order", ["row_major", "column_major"])
def test_tokens_lie_in_either_order(shuffled: Runner, order: TokenOrder) -> None:
    cfg = config("mlp_downsample", order=order)
    parameters, features = projector_parameters(cfg), image_features(cfg, images=1)
    found = project(shuffled, fold_projector(cfg, parameters), features)
    assert error(found, image_embeds(cfg, parameters, features)) < 2 * ROUNDING


@pytest.mark.parametrize(("kind", "grid", "width"), [("mlp_downsample", 27, 1152), ("linear", 24, 1024)])
def test_features_of_released_towers(shuffled: Runner, kind: str, grid: int, width: int) -> None:
    cfg = config(kind, grid, width, hidden=64)
    parameters, features = projector_parameters(cfg), image_features(cfg, images=1)
    found = project(shuffled, fold_projector(cfg, parameters), features)
    assert found.shape == (1, cfg.tokens_per_image, 64)
    assert error(found, image_embeds(cfg, parameters, features)) < 2 * ROUNDING


def test_the_last_product_writes_into_rows_of_a_larger_array(shuffled: Runner) -> None:
    cfg = config("mlp2x_gelu", grid=3)
    parameters, features = projector_parameters(cfg), image_features(cfg, images=2)
    projector = fold_projector(cfg, parameters)
    scratch = shuffled.empty((projector.scratch_bytes(2),), np.uint8).address
    rows = shuffled.put(np.full((40, 80), 7, np.float16))
    first, x = shuffled.put(np.array([25, 4], np.int32)).address, shuffled.put(features).address
    at = put_all(shuffled, projector.arrays)
    for launch in projector.launches(at, x, scratch, rows.address, images=2, stride=80, first_rows=first):
        shuffled.run(launch)

    expected = np.full((40, 80), 7.0)
    expected[25:34, :72], expected[4:13, :72] = image_embeds(cfg, parameters, features)
    assert error(rows.numpy(), expected) < ROUNDING
    assert np.array_equal(rows.numpy() == 7, expected == 7)


def test_vila_1_5_3b_is_two_launches_of_tiles_of_112_tokens() -> None:
    cfg = config("mlp_downsample", grid=27, width=1152, hidden=2560)
    shapes = {name: shape for name, shape in parameter_shapes(cfg).items() if name.startswith("mm_projector")}
    projector = fold_projector(cfg, {name: np.zeros(shape, np.float16) for name, shape in shapes.items()})
    first, second = projector.launches(dict.fromkeys(projector.arrays, 16), 16, 32, 48, images=1)
    assert (first.kernel, first.grid) == ("ve_project_f16_norm_112x64", (2, 40, 1))
    assert (second.kernel, second.grid) == ("ve_project_f16_112x64", (2, 40, 1))
    assert projector.scratch_bytes(1) == 196 * 2560 * 2


def test_widths_that_the_kernel_cannot_read_are_refused() -> None:
    with pytest.raises(ValueError, match="features of 12 and embeddings of 72 numbers: expected multiples of 8"):
        fold_projector(config("linear", width=12), {})
