"""A checkpoint's tower, projector and embedding table as the reference runs them, in the memory of a few layers."""

from __future__ import annotations

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
    """Remembers the largest magnitude that a linear or a sum came to."""

    largest = 0.0

    def linear(self, x: Tensor, name: str, out: int, bias: bool = True) -> Tensor:
        return self._watched(super().linear(x, name, out, bias))

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._watched(super().add(a, b))

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._watched(super().mul(a, b))

    def _watched(self, x: Tensor) -> Tensor:
        self.largest = float(np.maximum(self.largest, float(x.abs().max())))  # what is not a number stays
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
