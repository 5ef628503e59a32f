"""A checkpoint's tower, projector and embedding table as the reference runs them, in the memory of a few layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_edge import architecture
from vila_edge.config import VilaConfig
from vila_edge.export.source import Source
from vila_edge.export.workers import Workers
from vila_edge.reference.torch_ops import TorchOps

FloatArray = NDArray[np.float32]


class WatchingOps(TorchOps):
    """Remembers the largest magnitude that an engine in 16 bits would have to hold.

    SiLU and GELU make nothing larger; what a norm computes inside is float32 in every engine.
    """

    largest = 0.0

    def linear(self, x: Tensor, name: str, out: int, bias: bool = True) -> Tensor:
        return self._watched(super().linear(x, name, out, bias))

    def patch_embedding(self, pixel_values: Tensor, name: str, patch: int, width: int, bias: bool) -> Tensor:
        return self._watched(super().patch_embedding(pixel_values, name, patch, width, bias))

    def position_embedding(self, x: Tensor, name: str) -> Tensor:
        return self._watched(super().position_embedding(x, name))

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return self._watched(super().layer_norm(x, name, eps))

    def rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return self._watched(super().rms_norm(x, name, eps))

    def quick_gelu(self, x: Tensor) -> Tensor:
        self._watched(1.702 * x)
        return super().quick_gelu(x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._watched(super().add(a, b))

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._watched(super().mul(a, b))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
        self._watched(k)  # rotated, as the kv_cache has them
        scaled = self._watched(q) / math.sqrt(q.shape[-1])  # engines scale before the product, or inside of it
        heads = q.shape[1] // k.shape[1]
        for head in range(q.shape[1]):  # one at a time: all scores of a long sequence are large
            scores = scaled[:, head] @ k[:, head // heads].mT
            self._watched(scores if visible is None else scores.where(visible, 0))
        return super().mix(q, k, v, visible)

    def _watched(self, x: Tensor) -> Tensor:
        largest = torch.stack(x.aminmax()).abs().max()  # no copy of x
        self.largest = float(np.maximum(self.largest, float(largest)))  # what is not a number stays
        return x

    def largest_cached(self, layer: int) -> NDArray[np.float32]:
        """Largest magnitudes of a layer's keys and values, as the kv_cache has them: [2, H_kv, dim]."""
        return torch.stack([x[0].abs().amax(1) for x in self.kv_cache[layer]]).numpy()


class CheckpointEncoder:
    """An `Encoder` on torch in float32; each image goes through alone, on a thread of its own."""

    def __init__(self, cfg: VilaConfig, source: Source, pool: Workers) -> None:
        self.cfg, self.source, self.pool = cfg, source, pool
        self.largest = {"vision_tower": 0.0, "mm_projector": 0.0}  # magnitudes that were seen

    def encode_images(self, pixel_values: FloatArray) -> FloatArray:
        def tower(ops: TorchOps, x: Tensor) -> Tensor:
            return architecture.vision_tower(ops, x, self.cfg.vision_tower)

        return self._each("vision_tower", tower, pixel_values)

    def project(self, image_features: FloatArray) -> FloatArray:
        def projector(ops: TorchOps, x: Tensor) -> Tensor:
            return architecture.mm_projector(ops, x, self.cfg)

        return self._each("mm_projector", projector, image_features)

    def embed_tokens(self, input_ids: Sequence[int]) -> FloatArray:
        return self.source.rows(f"{architecture.EMBED_TOKENS}.weight", np.asarray(input_ids, np.int64))

    def _each(self, component: str, part: Callable[[TorchOps, Tensor], Tensor], x: FloatArray) -> FloatArray:
        def run(row: FloatArray) -> tuple[FloatArray, float]:
            ops = WatchingOps(self.source)
            return part(ops, torch.from_numpy(row[None])).numpy(), ops.largest

        rows, largest = zip(*self.pool.map(run, x), strict=True)
        self.largest[component] = float(np.max([self.largest[component], *largest]))  # not a number stays
        return np.concatenate(rows)
