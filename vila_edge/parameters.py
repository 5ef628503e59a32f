"""Names and shapes of every parameter, found by running the architecture on shapes alone."""

from __future__ import annotations

import math
import re
from typing import Literal

from vila_edge import architecture
from vila_edge.config import Heads, RopeConfig, TokenOrder, VilaConfig

Shape = tuple[int, ...]

# Linears of one input, which a runtime can compute as one product if their rows lie behind each other.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def parameter_shapes(cfg: VilaConfig) -> dict[str, Shape]:
    """Name -> shape of every parameter that the architecture reads, in the order it reads them."""
    return _run(cfg).shapes


def linears(cfg: VilaConfig) -> set[str]:
    """Names, without `.weight`, of the parameters that are read as a linear's."""
    return _run(cfg).linears


def _run(cfg: VilaConfig) -> ShapeOps:
    ops = ShapeOps()
    size = cfg.vision_tower.image_size
    _, patches, _ = architecture.vision_tower(ops, (1, 3, size, size), cfg.vision_tower)
    architecture.mm_projector(ops, (1, patches, cfg.mm_hidden_size), cfg)
    inputs_embeds = architecture.embed_tokens(ops, (1, 1), cfg.llm)
    architecture.lm_head(ops, architecture.decoder(ops, inputs_embeds, cfg.llm), cfg.llm)
    return ops


def component(name: str) -> str:
    """The part of the model, and the folder of the checkpoint, that a parameter belongs to."""
    return name.partition(".")[0]


def is_quantised(name: str) -> bool:
    """Whether a weight is carried in 4 bits: the linears of the decoder blocks, as AWQ has it."""
    return re.fullmatch(rf"{re.escape(architecture.LLM)}\.layers\.\d+\..*_proj\.weight", name) is not None


def fused(linear: str) -> tuple[str, tuple[str, ...]]:
    """The product that a linear can be a part of, and all its parts; ("", ()) if it stands alone."""
    parent, _, own = linear.rpartition(".")
    for name, parts in FUSED.items():
        if own in parts:
            return f"{parent}.{name}", tuple(f"{parent}.{part}" for part in parts)
    return "", ()


def storage_order(tensor: str) -> tuple[str, str, int]:
    """Sorted by this, the tensors of one kind of linears that can be fused lie behind each other in a file."""
    linear, _, kind = tensor.rpartition(".")
    name, parts = fused(linear)
    return (name, kind, parts.index(linear)) if parts else (linear, kind, 0)


def count_parameters(cfg: VilaConfig) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(cfg).values())


class ShapeOps:
    """The interpreter whose values are shapes. It checks the wiring and remembers the parameters."""

    def __init__(self) -> None:
        self.shapes: dict[str, Shape] = {}
        self.linears: set[str] = set()

    def linear(self, x: Shape, name: str, out: int, bias: bool = True) -> Shape:
        self.linears.add(name)
        self._parameter(f"{name}.weight", (out, x[-1]))
        if bias:
            self._parameter(f"{name}.bias", (out,))
        return (*x[:-1], out)

    def embedding(self, ids: Shape, name: str, rows: int, width: int) -> Shape:
        self._parameter(f"{name}.weight", (rows, width))
        return (*ids, width)

    def patch_embedding(self, pixel_values: Shape, name: str, patch: int, width: int, bias: bool) -> Shape:
        n, channels, height, wide = pixel_values
        self._parameter(f"{name}.weight", (width, channels, patch, patch))
        if bias:
            self._parameter(f"{name}.bias", (width,))
        return (n, (height // patch) * (wide // patch), width)

    def class_embedding(self, x: Shape, name: str) -> Shape:
        self._parameter(name, x[-1:])
        return (x[0], x[1] + 1, x[2])

    def position_embedding(self, x: Shape, name: str) -> Shape:
        self._parameter(f"{name}.weight", x[1:])
        return x

    def layer_norm(self, x: Shape, name: str, eps: float) -> Shape:
        self._parameter(f"{name}.bias", x[-1:])
        return self.rms_norm(x, name, eps)

    def rms_norm(self, x: Shape, name: str, eps: float) -> Shape:
        self._parameter(f"{name}.weight", x[-1:])
        return x

    def gelu(self, x: Shape, approximate: Literal["none", "tanh"]) -> Shape:
        return x

    def quick_gelu(self, x: Shape) -> Shape:
        return x

    def silu(self, x: Shape) -> Shape:
        return x

    def drop_first(self, x: Shape) -> Shape:
        return (x[0], x[1] - 1, x[2])

    def add(self, a: Shape, b: Shape) -> Shape:
        assert a == b, (a, b)
        return a

    def mul(self, a: Shape, b: Shape) -> Shape:
        return self.add(a, b)

    def space_to_depth(self, x: Shape, grid: int, block: int, order: TokenOrder) -> Shape:
        n, patches, width = x
        assert patches == grid * grid, (x, grid)
        return (n, (-(-grid // block)) ** 2, block * block * width)

    def attention(self, q: Shape, k: Shape, v: Shape, heads: Heads) -> Shape:
        assert q[-1] == heads.query * heads.dim, (q, heads)
        assert k[-1] == v[-1] == heads.key_value * heads.dim, (k, v, heads)
        return q

    def cached_attention(self, q: Shape, k: Shape, v: Shape, heads: Heads, rope: RopeConfig, layer: int) -> Shape:
        return self.attention(q, k, v, heads)

    def _parameter(self, name: str, shape: Shape) -> None:
        assert self.shapes.setdefault(name, shape) == shape, (name, shape)
