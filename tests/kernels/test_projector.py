"""The fused projector against the architecture in float64, for every type of projector and every tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.host import HostKernels
from tests.tiny import TINY, random_parameters
from vila_edge import architecture
from vila_edge.config import ProjectorConfig, TokenOrder, VilaConfig
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.manifest import manifest
from vila_edge.kernels.projector import TILES, Gather, Norm, Projector, fold, fold_projector
from vila_edge.reference.numpy_ops import NumpyOps

Array = NDArray[Any]

ROUNDING = 2.0**-11  # of a float16, relative
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


def config(kind: str, grid: int = 5, width: int = 24, hidden: int = 72, order: TokenOrder = "row_major") -> VilaConfig:
    """A model with a small projector of a type: features [grid * grid, width], embeddings of `hidden` numbers."""
    size = grid * TINY.vision_tower.patch_size
    return dataclasses.replace(
        TINY,
        vision_tower=dataclasses.replace(TINY.vision_tower, hidden_size=width, image_size=size),
        mm_projector=ProjectorConfig(kind),
        llm=dataclasses.replace(TINY.llm, hidden_size=hidden),
        preprocess=dataclasses.replace(TINY.preprocess, image_size=size),
        profile=dataclasses.replace(TINY.profile, token_order=order),
    )


def projector_parameters(cfg: VilaConfig, seed: int = 0) -> dict[str, Array]:
    """As a checkpoint has them, in float16; a norm's weights around 1, a linear's so that its output is of order 1."""
    rng, found = np.random.default_rng(seed), dict[str, Array]()
    for name, value in random_parameters(cfg).items():
        if name.startswith("mm_projector"):
            scale = value.shape[-1] ** -0.5 if value.ndim == 2 else 0.3
            is_gamma = value.ndim == 1 and name.endswith("weight")
            found[name] = (rng.standard_normal(value.shape) * scale + is_gamma).astype(np.float16)
    return found


def image_features(cfg: VilaConfig, images: int, seed: int = 1) -> Array:
    rng = np.random.default_rng(seed)
    shape = (images, cfg.vision_tower.num_features, cfg.mm_hidden_size)
    return (rng.standard_normal(shape) * 2 + 0.3).astype(np.float16)


def image_embeds(cfg: VilaConfig, parameters: Mapping[str, Array], features: Array) -> Array:
    """[images, T, D] in float64, by the architecture."""
    ops = NumpyOps({name: value.astype(np.float64) for name, value in parameters.items()})
    return architecture.mm_projector(ops, features.astype(np.float64), cfg)


def run(kernels: HostKernels, projector: Projector, features: Array) -> Array:
    """image_embeds [images, T, D] float16, by the kernels. No read of shared memory may meet another in a bank."""
    images = len(features)
    at = {name: kernels.put(array).address for name, array in projector.arrays.items()}
    scratch = kernels.empty((projector.scratch_bytes(images) // 2,), np.float16)
    out = kernels.empty((images, projector.tokens, projector.hidden_size), np.float16)
    x = kernels.put(features)
    for launch in projector.launches(at, x.address, scratch.address, out.address, images):
        stats = kernels.run(launch)
        assert (stats.shared_reads > 0, stats.bank_conflicts) == (True, 0)
    return out.numpy()


def error(found: Array, expected: Array) -> float:
    """Relative, in the 2-norm."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_what_the_architecture_computes(kernels: HostKernels, kind: str) -> None:
    cfg = config(kind)
    parameters, features = projector_parameters(cfg), image_features(cfg, images=2)
    projector = fold_projector(cfg, parameters)
    found = run(kernels, projector, features)
    # Each product rounds its weights and its output.
    assert error(found, image_embeds(cfg, parameters, features)) < ROUNDING * len(projector.products)


@pytest.mark.parametrize("order", ["row_major", "column_major"])
def test_tokens_lie_in_either_order(shuffled: HostKernels, order: TokenOrder) -> None:
    cfg = config("mlp_downsample", order=order)
    parameters, features = projector_parameters(cfg), image_features(cfg, images=1)
    found = run(shuffled, fold_projector(cfg, parameters), features)
    assert error(found, image_embeds(cfg, parameters, features)) < 2 * ROUNDING


def test_27_x_27_patches_of_siglip(shuffled: HostKernels) -> None:
    cfg = config("mlp_downsample", grid=27, width=1152, hidden=64)
    parameters, features = projector_parameters(cfg), image_features(cfg, images=1)
    found = run(shuffled, fold_projector(cfg, parameters), features)
    assert found.shape == (1, 196, 64)
    assert error(found, image_embeds(cfg, parameters, features)) < 2 * ROUNDING


@dataclasses.dataclass(frozen=True)
class Case:
    """A single product in float64, with norm and GELU."""

    x: Array  # [images, grid * grid, C] float16
    gather: Gather
    outputs: int
    seed: int = 0

    @property
    def parameters(self) -> dict[str, Array]:
        rng, depth = np.random.default_rng(self.seed), self.gather.block**2 * self.x.shape[-1]
        shapes = {
            "linear.weight": (self.outputs, depth),
            "linear.bias": (self.outputs,),
            "norm.weight": (depth,),
            "norm.bias": (depth,),
        }
        values = {name: rng.standard_normal(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
        values["norm.weight"] = 1 + rng.standard_normal(depth) * 0.3
        return values

    def rows(self, norm: bool) -> Array:
        """[images, T, K]: what is multiplied, in float64."""
        g, ops = self.gather, NumpyOps(self.parameters)
        x = ops.space_to_depth(self.x.astype(np.float64), g.grid, g.block, g.order)
        return ops.layer_norm(x, "norm", 1e-5) if norm else x

    def expected(self, norm: bool = True) -> Array:
        ops = NumpyOps(self.parameters)
        return ops.gelu(ops.linear(self.rows(norm), "linear", self.outputs), "none")

    def run(self, kernels: HostKernels, tile: str, norm: bool = True, images: slice = slice(None)) -> Array:
        p, x = self.parameters, self.x[images]
        folded = Norm(p["norm.weight"], p["norm.bias"], 1e-5) if norm else None
        product = fold("linear", p["linear.weight"], p["linear.bias"], self.gather, folded)
        product = dataclasses.replace(product, gelu=True)
        tokens = (-(-self.gather.grid // self.gather.block)) ** 2
        at = {name: kernels.put(array).address for name, array in product.arrays.items()}
        out = kernels.empty((len(x), tokens, product.outputs), np.float16)
        address = kernels.put(x).address
        stats = kernels.run(product.launch(at, address, out.address, len(x), tokens, product.outputs, tile=tile))
        assert (stats.shared_reads > 0, stats.bank_conflicts) == (True, 0)
        return out.numpy()[..., : self.outputs]


def case(images: int, grid: int, block: int, channels: int, outputs: int) -> Case:
    x = np.random.default_rng(grid).standard_normal((images, grid * grid, channels)) * 2 + 0.3
    return Case(x.astype(np.float16), Gather(channels, grid, block), outputs)


KERNELS = [(k.name, shape) for k in manifest().kernels.values() if k.file == "projector.cu" for shape in k.shapes]


@pytest.mark.parametrize(("kernel", "shape"), KERNELS)
def test_every_kernel_is_exact_to_a_rounding(kernels: HostKernels, kernel: str, shape: tuple[int, ...]) -> None:
    made, norm = case(*shape), "norm" in kernel
    assert error(made.run(kernels, kernel.rpartition("_")[2], norm), made.expected(norm)) < ROUNDING


def test_rows_of_10368_numbers(shuffled: HostKernels) -> None:
    made = case(images=1, grid=5, block=3, channels=1152, outputs=64)
    assert made.rows(norm=False).shape == (1, 4, 10368)
    assert error(made.run(shuffled, "64x64"), made.expected()) < ROUNDING


def test_every_tile_and_batch_gives_the_same_bits(shuffled: HostKernels) -> None:
    made = case(images=3, grid=13, block=2, channels=40, outputs=136)
    whole = made.run(shuffled, TILES[0])
    assert all(np.array_equal(made.run(shuffled, tile), whole) for tile in TILES[1:])
    assert np.array_equal(made.run(shuffled, "112x64", images=slice(1, 2)), whole[1:2])


@pytest.mark.parametrize("mean", [0, 10, 60])
@pytest.mark.parametrize("outlier", [1, 1000])
def test_a_norm_behind_the_product_bears_a_large_mean_and_an_outlier(
    shuffled: HostKernels, mean: int, outlier: int
) -> None:
    """Not worse than a norm before it, whose output is rounded to 16 bits as an unfused pipeline does."""
    made = case(images=1, grid=9, block=2, channels=128, outputs=64)
    x = np.random.default_rng(7).standard_normal(made.x.shape) + mean
    x[..., 3] *= outlier
    made = dataclasses.replace(made, x=x.astype(np.float16))
    p = made.parameters
    ops = NumpyOps({"w.weight": p["linear.weight"].astype(np.float16).astype(np.float64), "w.bias": p["linear.bias"]})
    rounded = made.rows(norm=True).astype(np.float16).astype(np.float64)
    unfused = ops.gelu(ops.linear(rounded, "w", made.outputs), "none").astype(np.float16)
    fused = error(made.run(shuffled, "64x64"), made.expected())
    assert fused < max(1.5 * error(unfused, made.expected()), ROUNDING)


def test_the_last_product_writes_into_rows_of_a_larger_array(shuffled: HostKernels) -> None:
    cfg = config("mlp2x_gelu", grid=3)
    parameters, features = projector_parameters(cfg), image_features(cfg, images=2)
    projector = fold_projector(cfg, parameters)
    at = {name: shuffled.put(array).address for name, array in projector.arrays.items()}
    scratch = shuffled.empty((projector.scratch_bytes(2),), np.uint8).address
    rows = shuffled.put(np.full((40, 80), 7, np.float16))
    first = shuffled.put(np.array([25, 4], np.int32)).address
    x = shuffled.put(features).address
    for launch in projector.launches(at, x, scratch, rows.address, 2, stride=80, first_rows=first):
        shuffled.run(launch)
    expected = np.full((40, 80), 7.0)
    expected[25:34, :72], expected[4:13, :72] = image_embeds(cfg, parameters, features)
    assert error(rows.numpy(), expected) < ROUNDING
    assert (rows.numpy() == 7).sum() == (expected == 7).sum()


def test_a_tile_of_112_tokens_is_for_196() -> None:
    cfg = config("mlp_downsample", grid=27, width=1152, hidden=2560)
    zeros = {
        name: np.zeros(value.shape, np.float16) for name, value in random_parameters(cfg).items() if "mm_p" in name
    }
    projector = fold_projector(cfg, zeros)
    first, second = projector.launches(dict.fromkeys(projector.arrays, 16), 16, 32, 48, images=1)
    assert (first.kernel, first.grid) == ("ve_project_f16_norm_112x64", (2, 40, 1))
    assert (second.kernel, second.grid) == ("ve_project_f16_112x64", (2, 40, 1))


def test_what_the_kernel_cannot_read_is_refused() -> None:
    with pytest.raises(ValueError, match="expected multiples of 8"):
        fold_projector(config("linear", width=12), {})
    with pytest.raises(ValueError, match="beyond 16 bits"):
        fold("w", np.ones((8, 8)), np.ones(8), norm=Norm(np.full(8, 1e5), np.zeros(8), 1e-5))
    product = fold("w", np.ones((8, 8)), np.ones(8))
    with pytest.raises(ValueError, match="a multiple of 8"):
        launch(product.arrays, stride=12)
    with pytest.raises(ValueError, match="too many"):
        launch(product.arrays, images=2**31)


def launch(arrays: Mapping[str, Array], images: int = 1, stride: int = 8) -> Launch:
    product = fold("w", np.ones((8, 8)), np.ones(8))
    return product.launch(dict.fromkeys(arrays, 16), 16, 32, images, 1, stride)
