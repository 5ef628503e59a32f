"""A projector as a row of products for kernels/src/projector.cu: its weights folded once, its launches made from addresses.

The products are found by running the architecture: a norm goes into the linear behind it, a GELU into the one before
it, and the folding of patches into how the first one reads its input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vila_edge import architecture
from vila_edge.config import TokenOrder, VilaConfig
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.manifest import manifest
from vila_edge.parameters import Shape, ShapeOps

FILE = "projector.cu"  # the kernels, in kernels/src
VECTOR = 8  # halves that the kernel reads and writes at once: 16 bytes
K_STEP = 64  # numbers of a row that a tile holds
OUTPUTS_STEP = 128  # a multiple of every tile's outputs
TILES = ("64x64", "64x128", "112x64", "112x128")  # tokens x outputs
ORIN_MULTIPROCESSORS = 16  # of the largest one
ALIGNMENT = 256  # bytes, of each piece of scratch memory


@dataclass(frozen=True)
class Gather:
    """How a row is made of an image's vectors: `block` x `block` neighbours of a square, zeros beyond its edge."""

    channels: int  # numbers of a vector, as they are stored
    grid: int = 1
    block: int = 1
    order: TokenOrder = "row_major"


@dataclass(frozen=True)
class Norm:
    """A LayerNorm: gamma and beta [K]."""

    weight: NDArray[Any]
    bias: NDArray[Any]
    eps: float


@dataclass(frozen=True)
class ProductShape:
    """One launch, gelu(norm(x) w^T + b), without its weights: all that a launch is made from, beside addresses."""

    name: str  # of the linear
    gather: Gather
    outputs: int  # columns that are written: a multiple of VECTOR
    depth: int  # numbers of a row, those beyond its end not counted
    eps: float | None = None  # of the norm, if there is one
    gelu: bool = False

    @property
    def weights(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> shape and dtype of what the device needs, in the order in which a launch takes it."""
        steps, width = -(-self.depth // K_STEP), _whole(self.outputs, OUTPUTS_STEP)
        shapes = {"weight": ((steps, width, K_STEP), "float16")}
        vectors = {part: ((width,), "float32") for part in ("bias", "weight_sum")}
        return {f"{self.name}.{part}": what for part, what in (shapes | vectors).items()}

    def launch(
        self,
        arrays: Mapping[str, int],
        x: int,
        out: int,
        images: int,
        tokens: int,
        stride: int,
        first_rows: int = 0,
        tile: str = "",
        multiprocessors: int = ORIN_MULTIPROCESSORS,
    ) -> Launch:
        """Input at `x` to `tokens` rows per image at `out`, `stride` numbers apart. Raises ValueError.

        `arrays`: the addresses of the product's own. `first_rows`: of int32 [images], the row of `out` where each
        image begins; 0: they lie one behind the other. `tile`: one of TILES, or the best for `multiprocessors`.
        """
        rows, g = images * tokens, self.gather
        if stride % VECTOR or stride < self.outputs or x % 16 or out % 16:
            raise ValueError(
                f"{self.name}: rows of {stride} from {out:#x}, input at {x:#x}: expected a stride from {self.outputs} "
                f"on, a multiple of {VECTOR}, and addresses that are multiples of 16"
            )
        if images * max(tokens, g.grid**2) * g.channels // VECTOR >= 2**31:
            raise ValueError(f"{self.name}: {images} images are too many for one launch")
        kind = "" if self.eps is None else "norm_"
        kernel = f"ve_project_f16_{kind}{tile or best_tile(rows, self.outputs, multiprocessors)}"
        size = manifest()[kernel].tile
        parts = (arrays[name] for name in self.weights)
        numbers = (rows, self.outputs, self.depth, -(-self.depth // K_STEP), g.channels, g.grid, g.block)
        more = (int(g.order == "column_major"), tokens, stride, int(self.gelu), self.eps or 0.0)
        grid = (-(-rows // size["m"]), -(-self.outputs // size["n"]), 1)
        return Launch(kernel, grid, (x, *parts, first_rows, out, *numbers, *more))


@dataclass(frozen=True, kw_only=True)
class Product(ProductShape):
    """With its weights, the norm folded into w and b. Whole tiles, filled up with zeros.

    weight [K'/64, N', 64] float16, so that a tile lies in one piece. bias [N'] float32. weight_sum [N'] float32, over
    each output's weights as they are rounded.
    """

    weight: NDArray[np.float16]
    bias: NDArray[np.float32]
    weight_sum: NDArray[np.float32]

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the device needs, by name."""
        return dict(zip(self.weights, (self.weight, self.bias, self.weight_sum), strict=True))


def best_tile(rows: int, outputs: int, multiprocessors: int) -> str:
    """The tile that leaves the busiest multiprocessor the least to compute; the largest of several.

    196 tokens are 1.75 tiles of 112 but 3.1 of 64: on Orin that counts as much as the fused norm does.
    """

    def work(tile: str) -> tuple[int, int]:
        m, n = map(int, tile.split("x"))
        blocks = -(-rows // m) * -(-outputs // n)
        return -(-blocks // multiprocessors) * m * n, -m * n

    return min(TILES, key=work)


def fold(
    name: str, weight: NDArray[Any], bias: NDArray[Any], gather: Gather | None = None, norm: Norm | None = None
) -> Product:
    """The product of a linear [N, K] float and of the norm before it.

    Raises ValueError if the input has no whole vectors, or if a folded weight is beyond 16 bits.
    """
    outputs, depth = weight.shape
    gather = gather or Gather(_whole(depth, VECTOR))
    if gather.channels % VECTOR:
        raise ValueError(f"{name} reads vectors of {gather.channels} numbers, expected a multiple of {VECTOR}")
    shape = _whole(outputs, OUTPUTS_STEP), _whole(depth, K_STEP)
    folded, offsets = weight.astype(np.float32), bias.astype(np.float32)
    if norm:
        offsets = offsets + folded @ norm.bias.astype(np.float32)
        folded = folded * norm.weight.astype(np.float32)
    if np.abs(folded).max() > np.finfo(np.float16).max:
        raise ValueError(f"{name} with the norm before it has weights beyond 16 bits")
    packed, offset = np.zeros(shape, np.float16), np.zeros(shape[0], np.float32)
    packed[:outputs, :depth], offset[:outputs] = folded, offsets
    sums = packed.sum(1, dtype=np.float64).astype(np.float32)  # as rounded: what the product with the mean really was
    eps = norm.eps if norm else None
    tiles = np.ascontiguousarray(packed.reshape(shape[0], -1, K_STEP).swapaxes(0, 1))
    width = _whole(outputs, VECTOR)
    return Product(name, gather, width, depth, eps, weight=tiles, bias=offset, weight_sum=sums)


@dataclass(frozen=True)
class ProjectorShape:
    """The products of a projector without their weights, and the size of its output."""

    products: tuple[ProductShape, ...]
    tokens: int  # image_embeds of an image
    hidden_size: int

    @property
    def weights(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> shape and dtype of what the device needs."""
        return {name: what for product in self.products for name, what in product.weights.items()}

    def scratch_bytes(self, images: int) -> int:
        """Memory for what the products hand on to each other."""
        return min(2, len(self.products) - 1) * self._piece(images)

    def _piece(self, images: int) -> int:
        widest = max((product.outputs for product in self.products[:-1]), default=0)
        return _whole(images * self.tokens * widest * 2, ALIGNMENT)

    def launches(
        self,
        arrays: Mapping[str, int],
        image_features: int,
        scratch: int,
        out: int,
        images: int,
        stride: int = 0,
        first_rows: int = 0,
        multiprocessors: int = ORIN_MULTIPROCESSORS,
    ) -> list[Launch]:
        """image_features [images, P, D_vision] float16 to image_embeds in the rows of `out`. Raises ValueError.

        All are addresses: `arrays` of what `self.weights` names, `scratch` of `scratch_bytes`. Rows of `out` are
        `stride` numbers apart, hidden_size if 0. `first_rows`: see `Product.launch`.
        """
        made, x = list[Launch](), image_features
        for index, product in enumerate(self.products[:-1]):
            y = scratch + index % 2 * self._piece(images)
            made.append(
                product.launch(
                    arrays, x, y, images, self.tokens, stride=product.outputs, multiprocessors=multiprocessors
                )
            )
            x = y
        last, width = self.products[-1], stride or self.hidden_size
        return [
            *made,
            last.launch(arrays, x, out, images, self.tokens, width, first_rows, multiprocessors=multiprocessors),
        ]


@dataclass(frozen=True)
class Projector(ProjectorShape):
    """With the weights."""

    products: tuple[Product, ...]

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the device needs, by name."""
        return {name: array for product in self.products for name, array in product.arrays.items()}

    @property
    def shape(self) -> ProjectorShape:
        """Without them."""
        names = [field.name for field in dataclasses.fields(ProductShape)]
        products = (ProductShape(**{name: getattr(product, name) for name in names}) for product in self.products)
        return ProjectorShape(tuple(products), self.tokens, self.hidden_size)


def fold_projector(cfg: VilaConfig, parameters: Mapping[str, NDArray[Any]]) -> Projector:
    """The projector of a model; names as in `architecture`. Raises ValueError for widths that the kernel cannot read."""
    if cfg.llm.hidden_size % VECTOR or cfg.mm_hidden_size % VECTOR:
        raise ValueError(
            f"features of {cfg.mm_hidden_size} and embeddings of {cfg.llm.hidden_size} numbers: "
            f"expected multiples of {VECTOR}"
        )
    ops = FoldOps(parameters)
    architecture.mm_projector(ops, (1, cfg.vision_tower.num_features, cfg.mm_hidden_size), cfg)
    return Projector(tuple(ops.products), cfg.tokens_per_image, cfg.llm.hidden_size)


class FoldOps(ShapeOps):
    """The interpreter that makes a product of each linear and of what stands around it."""

    def __init__(self, parameters: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        self.parameters, self.products = parameters, list[Product]()
        self._gather: Gather | None = None
        self._norm: Norm | None = None

    def space_to_depth(self, x: Shape, grid: int, block: int, order: TokenOrder) -> Shape:
        self._gather = Gather(x[-1], grid, block, order)
        return super().space_to_depth(x, grid, block, order)

    def layer_norm(self, x: Shape, name: str, eps: float) -> Shape:
        self._norm = Norm(self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"], eps)
        return super().layer_norm(x, name, eps)

    def linear(self, x: Shape, name: str, out: int, bias: bool = True) -> Shape:
        weight, offset = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        self.products.append(fold(name, weight, offset, self._gather, self._norm))
        self._gather = self._norm = None
        return super().linear(x, name, out, bias)

    def gelu(self, x: Shape, approximate: Literal["none", "tanh"]) -> Shape:
        assert approximate == "none", "the kernel has the exact GELU"
        self.products[-1] = dataclasses.replace(self.products[-1], gelu=True)
        return x


def _whole(size: int, step: int) -> int:
    return -(-size // step) * step
