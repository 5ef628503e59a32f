"""Small projectors and single products of them, with what they are in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels import runner
from tests.kernels.host import Stats
from tests.kernels.runner import Runner
from tests.tiny import TINY
from vila_edge import architecture
from vila_edge.config import ProjectorConfig, TokenOrder, VilaConfig
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.projector import Gather, Norm, Product, Projector, fold
from vila_edge.parameters import parameter_shapes
from vila_edge.reference.numpy_ops import NumpyOps

Array = NDArray[Any]
ROUNDING = 2.0**-11  # of a float16, relative
EPS = 1e-5


def config(kind: str, grid: int = 5, width: int = 24, hidden: int = 72, order: TokenOrder = "row_major") -> VilaConfig:
    """A model with a projector of a type: features [grid * grid, width], embeddings of `hidden` numbers."""
    size = grid * TINY.vision_tower.patch_size
    return dataclasses.replace(
        TINY,
        vision_tower=dataclasses.replace(TINY.vision_tower, hidden_size=width, image_size=size),
        mm_projector=ProjectorConfig(kind),
        llm=dataclasses.replace(TINY.llm, hidden_size=hidden),
        preprocess=dataclasses.replace(TINY.preprocess, image_size=size),
        profile=dataclasses.replace(TINY.profile, token_order=order),
    )


def projector_parameters(cfg: VilaConfig) -> dict[str, Array]:
    """As a checkpoint has them, in float16: a norm's weights around 1, a linear's so that its outputs are of order 1."""
    shapes = {name: shape for name, shape in parameter_shapes(cfg).items() if name.startswith("mm_projector")}
    return {name: value.astype(np.float16) for name, value in random_weights(shapes).items()}


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    rng, found = np.random.default_rng(0), dict[str, Array]()
    for name, shape in shapes.items():
        is_gamma = len(shape) == 1 and name.endswith("weight")
        found[name] = rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.3) + is_gamma
    return found


def image_features(cfg: VilaConfig, images: int) -> Array:
    rng = np.random.default_rng(1)
    shape = (images, cfg.vision_tower.num_features, cfg.mm_hidden_size)
    return (rng.standard_normal(shape) * 2 + 0.3).astype(np.float16)


def image_embeds(cfg: VilaConfig, parameters: Mapping[str, Array], features: Array) -> Array:
    """[images, T, D] in float64, by the architecture."""
    ops = NumpyOps({name: value.astype(np.float64) for name, value in parameters.items()})
    return architecture.mm_projector(ops, features.astype(np.float64), cfg)


def project(kernels: Runner, projector: Projector, features: Array) -> Array:
    """image_embeds [images, T, D] float16, by the kernels."""
    images = len(features)
    at = put_all(kernels, projector.arrays)
    scratch = kernels.empty((projector.scratch_bytes(images),), np.uint8).address
    out = kernels.empty((images, projector.tokens, projector.hidden_size), np.float16)
    for launch in projector.launches(at, kernels.put(features).address, scratch, out.address, images):
        kernels.run(launch)
    return out.numpy()


def put_all(kernels: Runner, arrays: Mapping[str, Array]) -> dict[str, int]:
    """Their addresses on the device."""
    return {name: kernels.put(array).address for name, array in arrays.items()}


def error(found: Array, expected: Array) -> float:
    """Relative, in the 2-norm. One element in ten thousand that is off by 5 % is more than a rounding."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


@dataclasses.dataclass(frozen=True)
class Case:
    """gelu(norm(x) w^T + b), the norm if it is wanted."""

    x: Array  # [images, grid * grid, C] float16
    gather: Gather
    outputs: int
    norm: bool

    @property
    def parameters(self) -> dict[str, Array]:
        depth = self.gather.block**2 * self.x.shape[-1]
        shapes = {"linear.weight": (self.outputs, depth), "linear.bias": (self.outputs,)}
        return random_weights(shapes | {"norm.weight": (depth,), "norm.bias": (depth,)})

    @property
    def tokens(self) -> int:
        return int(-(-self.gather.grid // self.gather.block)) ** 2

    def rows(self) -> Array:
        """[images, T, K]: what is multiplied, in float64."""
        g, ops = self.gather, NumpyOps(self.parameters)
        x = ops.space_to_depth(self.x.astype(np.float64), g.grid, g.block, g.order)
        return ops.layer_norm(x, "norm", EPS) if self.norm else x

    def expected(self) -> Array:
        """[images, T, outputs] in float64."""
        ops = NumpyOps(self.parameters)
        return ops.gelu(ops.linear(self.rows(), "linear", self.outputs), "none")

    def product(self) -> Product:
        p = self.parameters
        norm = Norm(p["norm.weight"], p["norm.bias"], EPS) if self.norm else None
        return dataclasses.replace(fold("linear", p["linear.weight"], p["linear.bias"], self.gather, norm), gelu=True)

    def launch(self, kernels: Runner, tile: str) -> tuple[Launch, runner.Array]:
        """And where its output will be."""
        product, images = self.product(), len(self.x)
        out = kernels.empty((images, self.tokens, product.outputs), np.float16)
        at, x = put_all(kernels, product.arrays), kernels.put(self.x).address
        return product.launch(at, x, out.address, images, self.tokens, product.outputs, tile=tile), out

    def run(self, kernels: Runner, tile: str) -> tuple[Array, Stats | None]:
        """[images, T, outputs] float16, and what the launch did."""
        launch, out = self.launch(kernels, tile)
        stats = kernels.run(launch)
        return out.numpy()[..., : self.outputs], stats

    def check(self, kernels: Runner, tile: str) -> None:
        """Raises AssertionError unless the output is right to a rounding and no bank of shared memory is met twice."""
        found, stats = self.run(kernels, tile)
        assert error(found, self.expected()) < ROUNDING
        assert stats is None or (stats.shared_reads > 0, stats.bank_conflicts) == (True, 0)


def random_case(images: int, grid: int, block: int, channels: int, outputs: int, norm: bool = True) -> Case:
    x = np.random.default_rng(grid).standard_normal((images, grid * grid, channels)) * 2 + 0.3
    return Case(x.astype(np.float16), Gather(channels, grid, block), outputs, norm)
