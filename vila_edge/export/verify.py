"""Parity: what a bundle computes on its engine, against the checkpoint on the torch reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vila_edge.config import VilaConfig
from vila_edge.engine.protocol import Engine
from vila_edge.errors import ParityError
from vila_edge.export.calibration import Sample, embed
from vila_edge.reference.torch_engine import torch_engine
from vila_edge.scales import tower_input
from vila_edge.tokenizer import Tokenizer
from vila_edge.visual import look

# Mean cosine below which an export is refused. Weights of 16 bits are far above the first, weights of 4 bits
# above the second; a wrong graph or a wrong packing is far below both.
MIN_COSINE, MIN_COSINE_INT4 = 0.999, 0.9
REPORT_DIGITS = 4

Array = NDArray[np.float32]


def parity_report(
    samples: Sequence[Sample],
    cfg: VilaConfig,
    tokenizer: Tokenizer,
    params: Mapping[str, Tensor],
    engine: Engine,
    llm_min_cosine: float,
) -> dict[str, Any]:
    """Differences on held-out `samples`, per component; each component sees the reference's input.

    Raises ParityError that names the component if its output is not finite, or not what it should be.
    """
    vision, projector, llm = _Difference(), _Difference(), _LogitDifference()
    reference = torch_engine(cfg, params)
    for sample in samples:
        for visual in sample.read(tokenizer, cfg)[1]:
            seen = look(visual, reference, cfg)
            vision.add(seen.tower_features, engine.encode_images(tower_input(seen.pixel_values, cfg)))
            projector.add(seen.image_embeds, engine.project(seen.image_features))
        embeds = embed(sample, cfg, tokenizer, reference)
        positions = range(len(embeds))
        logits = reference.forward(embeds, reference.new_cache(len(embeds)), positions)
        llm.add(logits, engine.forward(embeds, engine.new_cache(len(embeds)), positions))
    report: dict[str, Any] = {"reference": "torch, float32", "backend": engine.backend, "prompts": len(samples)}
    if vision.count:
        report["vision_tower"] = vision.report("vision_tower", MIN_COSINE)
        report["mm_projector"] = projector.report("mm_projector", MIN_COSINE)
    report["llm"] = llm.report("llm", llm_min_cosine)
    return report


class _Difference:
    """Largest difference and cosine between rows of vectors. A value that is not finite stays in both."""

    def __init__(self) -> None:
        self.count, self.max_error, self.min_cosine, self.cosines = 0, 0.0, 1.0, 0.0

    def add(self, want: Array, got: Array) -> None:
        a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (want, got))
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        self.count += len(a)
        self.max_error = float(np.maximum(self.max_error, np.abs(a - b).max()))
        cosines = (a * b).sum(-1) / np.maximum(lengths, 1e-12)
        self.min_cosine = float(np.minimum(self.min_cosine, cosines.min()))
        self.cosines += float(cosines.sum())

    def report(self, component: str, min_cosine: float) -> dict[str, float | int]:
        """Raises ParityError that names the component if the mean cosine is below `min_cosine`."""
        if not np.isfinite(self.max_error):
            raise ParityError(f"{component}: the exported graph's output is not finite", _REMEDY)
        cosine = self.cosines / self.count
        if cosine < min_cosine:
            raise ParityError(
                f"{component}: mean cosine {cosine:.4f} to the checkpoint's output, expected {min_cosine}", _REMEDY
            )
        return {
            "max_error": _round(self.max_error),
            "mean_cosine": _round(cosine),
            "min_cosine": _round(self.min_cosine),
            "vectors": self.count,
        }


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
