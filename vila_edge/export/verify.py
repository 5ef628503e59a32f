"""Parity: what a bundle computes on its engine, against the checkpoint on the torch reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_edge import architecture
from vila_edge.config import VilaConfig
from vila_edge.engine.protocol import Engine
from vila_edge.errors import ParityError
from vila_edge.export.calibration import Sample
from vila_edge.media.image import load_image
from vila_edge.preprocess import preprocess
from vila_edge.prompt import ImageSlot
from vila_edge.reference.torch_ops import TorchOps
from vila_edge.tokenizer import Tokenizer

MIN_COSINE = 0.999  # of image_features and image_embeds: 16-bit weights are far above, a wrong graph far below
REPORT_DIGITS = 4

Array = NDArray[np.float32]


def parity_report(
    samples: Sequence[Sample], cfg: VilaConfig, tokenizer: Tokenizer, params: Mapping[str, Tensor], engine: Engine
) -> dict[str, Any]:
    """Differences on held-out `samples`, per component; each component sees the reference's input.

    Raises ParityError that names the component if one is not finite, or if vision is not what it should be.
    """
    vision, projector, llm = _Difference(), _Difference(), _LogitDifference()
    for sample in samples:
        ops = TorchOps(params)
        image_embeds = torch.empty(0)
        if sample.images:
            pixel_values = preprocess([load_image(image) for image in sample.images], cfg.preprocess)
            features = architecture.vision_tower(ops, torch.from_numpy(pixel_values), cfg.vision_tower)
            image_embeds = architecture.mm_projector(ops, features, cfg)
            vision.add(features.numpy(), engine.encode_images(pixel_values))
            projector.add(image_embeds.numpy(), engine.project(features.numpy()))
        embeds = torch.cat(
            [
                image_embeds[chunk.index]
                if isinstance(chunk, ImageSlot)
                else architecture.embed_tokens(ops, torch.tensor(chunk.ids), cfg.llm)
                for chunk in sample.chunks(tokenizer, cfg)
            ]
        )[: cfg.llm.context_length]
        logits = architecture.lm_head(ops, architecture.decoder(ops, embeds[None], cfg.llm), cfg.llm)[0]
        positions = range(len(embeds))
        llm.add(logits.numpy(), engine.forward(embeds.numpy(), engine.new_cache(len(embeds)), positions))
    report: dict[str, Any] = {"reference": "torch, float32", "backend": engine.backend, "prompts": len(samples)}
    if vision.count:
        report["vision_tower"] = vision.report("vision_tower", MIN_COSINE)
        report["mm_projector"] = projector.report("mm_projector", MIN_COSINE)
    report["llm"] = llm.report("llm", -1.0)
    return report


class _Difference:
    """Largest difference and least cosine between rows of vectors."""

    def __init__(self) -> None:
        self.count, self.max_error, self.cosine = 0, 0.0, 1.0

    def add(self, want: Array, got: Array) -> None:
        want, got = (a.reshape(-1, a.shape[-1]).astype(np.float64) for a in (want, got))
        lengths = np.linalg.norm(want, axis=-1) * np.linalg.norm(got, axis=-1)
        self.count += len(want)
        self.max_error = max(self.max_error, float(np.abs(want - got).max()))
        self.cosine = min(self.cosine, float(((want * got).sum(-1) / np.maximum(lengths, 1e-12)).min()))

    def report(self, component: str, min_cosine: float) -> dict[str, float | int]:
        """Raises ParityError that names the component."""
        if not np.isfinite(self.max_error):
            raise ParityError(f"{component}: the exported graph's output is not finite", _REMEDY)
        if self.cosine < min_cosine:
            raise ParityError(
                f"{component}: cosine {self.cosine:.4f} to the checkpoint's output, expected {min_cosine}", _REMEDY
            )
        return {"max_error": _round(self.max_error), "min_cosine": _round(self.cosine), "vectors": self.count}


class _LogitDifference(_Difference):
    """Also: how often the same token is the most likely one, and the mean KL divergence in nats."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.kl = 0, 0.0

    def add(self, want: Array, got: Array) -> None:
        super().add(want, got)
        p, q = _log_softmax(want), _log_softmax(got)
        self.same += int((want.argmax(-1) == got.argmax(-1)).sum())
        self.kl += float((np.exp(p) * (p - q)).sum())

    def report(self, component: str, min_cosine: float) -> dict[str, float | int]:
        report = super().report(component, min_cosine)
        return report | {"top1_agreement": _round(self.same / self.count), "mean_kl": _round(self.kl / self.count)}


_REMEDY = "this is a fault of the export; please report it with the checkpoint's config.json"


def _log_softmax(logits: Array) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _round(value: float) -> float:
    """To a few digits: the rest is noise of one machine."""
    return float(f"{value:.{REPORT_DIGITS}g}")
