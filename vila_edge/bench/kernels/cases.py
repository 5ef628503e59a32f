"""Launches that are measured, with the arrays they need and the bytes and operations they are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vila_edge.bench.kernels.memory import Piece, Pieces, constant, halves, integers
from vila_edge.bench.kernels.shapes import Model, Product, Projection, Shapes
from vila_edge.config import Heads
from vila_edge.kernels import elementwise, image, w4, w4_layout, w8
from vila_edge.kernels.epilogue import Epilogue, Rms, Rope
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.projector import fold_projector
from vila_edge.parameters import component, parameter_shapes

Group = Literal["decode", "prefill", "projector", "other"]
Addresses = Mapping[str, int]

EPS = 1e-5
GROUP = w4_layout.GROUP


@dataclass(frozen=True)
class Case:
    """Launches on one set of arrays. `rows`: the batch, the tokens or the images."""

    group: Group
    rows: int
    launches: Callable[[Addresses], list[Launch]]
    nbytes: int  # that have to come from memory or go there: of a product, its weight alone
    flops: int = 0
    default: bool = True  # what is launched unless somebody asks for another tile


@dataclass(frozen=True)
class Workload:
    """Cases on the same arrays. Of `rotated` there are so many sets that each comes from memory."""

    name: str
    sizes: Mapping[str, int]
    rotated: Pieces
    shared: Pieces
    cases: tuple[Case, ...]

    @property
    def nbytes(self) -> int:
        """Of a set."""
        return sum(piece.nbytes for piece in self.rotated.values())


def workloads(shapes: Shapes, multiprocessors: int) -> Iterator[Workload]:
    """All that is to be measured, made one by one."""
    for model in shapes.models:
        for product in model.products:
            yield _lm_head(model, product, shapes) if product.part == "lm_head" else _product(model, product, shapes)
    for projection in shapes.projections:
        yield _projector(projection, shapes, multiprocessors)
    for model in shapes.models:
        yield from (_rmsnorm(model, rows) for rows in (1, max(shapes.tokens)))
        yield _embed(model, shapes)
    for projection in shapes.projections[:1]:
        yield _patchify(projection, shapes)


def _product(model: Model, product: Product, shapes: Shapes) -> Workload:
    """Decode as a decoder ends each product; prefill without an end, as what it is compared with has none."""
    n, k = product.n, product.k
    rows = len(_order(model, product))
    groups = rows * k // GROUP
    weight = {
        "qweight": Piece(rows * k // 2, integers(1 << 32, "uint32")),
        "scales": Piece(2 * groups, np.full(1 << 16, 0.01, np.float16)),
        "qzeros": Piece(groups, integers(16, "uint8")),
    }
    nbytes = sum(piece.nbytes for piece in weight.values())
    most = max((*shapes.batches, *shapes.tokens))
    shared = {"x": halves(most * k), "y": halves(most * n), "residual": halves(max(shapes.batches) * n)}
    shared |= {"gamma": constant(k, 0.5, "float16"), "angles": constant(model.heads.dim // 2, 0.7)}
    shared |= {"positions": constant(max(shapes.batches), 0, "int32")}

    def packed(at: Addresses) -> w4.Weight:
        return w4.Weight(at["qweight"], at["scales"], at["qzeros"], rows, k)

    def decode(m: int, tiles: int) -> Case:
        def launches(at: Addresses) -> list[Launch]:
            rms = Rms(at["gamma"], 1.0, EPS) if product.part in ("qkv", "gate+up") else None
            end = _epilogue(model.heads, product, at)
            return [w4.gemv(packed(at), at["x"], at["y"], m, end, rms, tiles)]

        return Case("decode", m, launches, nbytes, 2 * n * k * m, default=tiles == 1)

    def prefill(m: int, tokens: int) -> Case:
        def launches(at: Addresses) -> list[Launch]:
            return [w4.gemm(packed(at), at["x"], at["y"], m, Epilogue(n), tokens)]

        chosen = w4.gemm(w4.Weight(16, 16, 16, rows, k), 16, 16, m, Epilogue(n))
        default = chosen == w4.gemm(w4.Weight(16, 16, 16, rows, k), 16, 16, m, Epilogue(n), tokens)
        return Case("prefill", m, launches, nbytes, 2 * n * k * m, default)

    cases = [decode(m, tiles) for m in shapes.batches for tiles in (1, 2)]
    cases += [prefill(m, tokens) for m in shapes.tokens for tokens in w4.TOKEN_COSTS]
    return Workload(f"{model.name} {product.part}", {"n": n, "k": k}, weight, shared, tuple(cases))


def _order(model: Model, product: Product) -> w4_layout.Order:
    if product.part == "gate+up":
        return w4_layout.swiglu_order(model.intermediate_size)
    if product.part == "qkv":
        heads = model.heads
        return w4_layout.rope_order(heads.query + heads.key_value, heads.dim, product.n)
    return w4_layout.plain_order(product.n)


def _epilogue(heads: Heads, product: Product, at: Addresses) -> Epilogue:
    if product.part == "qkv":
        rope = Rope(at["angles"], at["angles"], at["positions"], heads.dim, heads.query + heads.key_value)
        return Epilogue(product.n, rope=rope)
    if product.part == "gate+up":
        return Epilogue(product.n // 2, swiglu=True)
    return Epilogue(product.n, residual=at["residual"])


def _lm_head(model: Model, product: Product, shapes: Shapes) -> Workload:
    """In 8 bits, with the last norm on the way. A prefill asks for one token's logits, so there is no more than decode."""
    n, k = product.n, product.k
    rows, columns = len(w4_layout.plain_order(n)), -(-k // GROUP) * GROUP
    weight = {
        "qweight": Piece(rows * columns, integers(1 << 32, "uint32")),
        "scales": Piece(2 * rows * columns // GROUP, np.full(1 << 16, 0.001, np.float16)),
    }
    most, nbytes = max(shapes.batches), sum(piece.nbytes for piece in weight.values())
    shared = {"x": halves(most * k), "gamma": constant(k, 0.5, "float16"), "y": constant(most * n, 0)}

    def decode(m: int, tiles: int) -> Case:
        def launches(at: Addresses) -> list[Launch]:
            packed = w8.Weight(at["qweight"], at["scales"], rows, columns)
            return [w8.gemv(packed, at["x"], at["y"], n, k, m, Rms(at["gamma"], 1.0, EPS), tiles)]

        return Case("decode", m, launches, nbytes, 2 * n * k * m, default=tiles == 1)

    cases = tuple(decode(m, tiles) for m in shapes.batches for tiles in (1, 2))
    return Workload(f"{model.name} lm_head, 8 bits", {"n": n, "k": k}, weight, shared, cases)


def _projector(projection: Projection, shapes: Shapes, multiprocessors: int) -> Workload:
    cfg = projection.config
    parameters = {
        name: np.zeros(shape, np.float16)
        for name, shape in parameter_shapes(cfg).items()
        if component(name) == "mm_projector"
    }
    projector = fold_projector(cfg, parameters)
    rotated = {
        name: halves(array.size, 0.02) if array.dtype == np.float16 else constant(array.size, 0)
        for name, array in projector.arrays.items()
    }
    most, tokens = max(shapes.images), cfg.tokens_per_image
    shared = {
        "features": halves(most * projection.grid**2 * projection.width),
        "scratch": constant(max(1, projector.scratch_bytes(most)), 0, "uint8"),
        "embeds": halves(most * tokens * projection.hidden_size),
    }
    nbytes = sum(piece.nbytes for piece in rotated.values())
    operations = sum(2 * tokens * product.outputs * product.depth for product in projector.products)

    def case(images: int) -> Case:
        def launches(at: Addresses) -> list[Launch]:
            return projector.launches(
                at, at["features"], at["scratch"], at["embeds"], images, multiprocessors=multiprocessors
            )

        return Case("projector", images, launches, nbytes, images * operations)

    cases = tuple(map(case, shapes.images))
    return Workload(projection.name, {"tokens": tokens}, rotated, shared, cases)


def _rmsnorm(model: Model, rows: int) -> Workload:
    width = model.hidden_size
    arrays = {"x": constant(rows * width, 0, "float16"), "y": halves(rows * width), "residual": halves(rows * width)}

    def launches(at: Addresses) -> list[Launch]:
        return [elementwise.rmsnorm(at["x"], at["gamma"], at["y"], rows, width, EPS, at["residual"])]

    case = Case("other", rows, launches, 2 * 4 * rows * width)
    gamma = {"gamma": constant(width, 1, "float16")}
    return Workload(f"{model.name} RMSNorm + residual", {"width": width}, arrays, gamma, (case,))


def _embed(model: Model, shapes: Shapes) -> Workload:
    width, table, count = model.hidden_size, min(model.vocab_size, 32000), max(shapes.tokens)
    rotated = {"ids": Piece(4 * count, integers(table, "int32")), "out": halves(count * width)}

    def launches(at: Addresses) -> list[Launch]:
        return [elementwise.embed(at["ids"], at["table"], at["out"], count, table, width)]

    case = Case("other", count, launches, 2 * 2 * count * width)
    return Workload(f"{model.name} embedding", {"width": width}, rotated, {"table": halves(table * width)}, (case,))


def _patchify(projection: Projection, shapes: Shapes) -> Workload:
    cfg = projection.config.preprocess
    size, patch, most = cfg.image_size, projection.config.vision_tower.patch_size, max(shapes.images)
    pixels, patches = 3 * size * size, 2 * (size // patch) ** 2 * image.patch_width(patch)
    rotated = {
        "pixels": Piece(most * pixels, integers(256, "uint8")),
        "patches": constant(most * patches, 0, "uint8"),
    }

    def launches(at: Addresses) -> list[Launch]:
        return [image.patchify(at["pixels"], at["levels"], at["patches"], most, size, size, patch)]

    case = Case("other", most, launches, most * (pixels + patches))
    levels = image.levels(cfg)
    shared = {"levels": Piece(levels.nbytes, levels)}
    return Workload(f"{projection.model} image to patches", {"size": size}, rotated, shared, (case,))
