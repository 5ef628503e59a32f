"""The parity gate: how far a bundle may be from its checkpoint, and the differences that are held against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.errors import ParityError
from vila_edge.stored import Form

KL = "KL(bundle || checkpoint)"  # how `mean_kl` is called where people read it
REPORT_DIGITS = 4
ROWS_AT_ONCE = 64  # that are widened to float64

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Gate:
    """Limits. Cosines are means over vectors, at least; the others are at most, but for top1_agreement.

    The defaults refuse what is broken, and nothing that is merely small: weights of 16 bits are far above
    their limit, blocks of 4 bits on random weights above theirs. A recipe for a known model can ask for more.
    """

    vision_tower: float = 0.999
    mm_projector: float = 0.999
    block: float = 0.999  # a decoder block of 16 or 32 bits
    block_int4: float = 0.95
    lm_head: float = 0.999
    lm_head_int4: float = 0.95
    llm: float = 0.999  # logits of the whole LLM, on the bundle's own activations
    llm_int4: float = 0.9
    llm_int8_cache: float = 0.9  # the same with a kv_cache in 8 bits
    top1_agreement: float = 0.0
    mean_kl: float = 1.0  # nats, of the bundle's probabilities from the checkpoint's
    max_activation: float = 65504.0  # what 16 bits hold: engines on a GPU compute in them


class GateError(ParityError):
    """A component that is out of its limits."""

    def __init__(self, component: str, message: str, hint: str) -> None:
        super().__init__(f"{component}: {message}", hint)
        self.component = component


class OverflowGateError(GateError):
    """A component whose activations are too large: no other form of its weights mends that."""


def checked(component: str, found: dict[str, Any], min_cosine: float, gate: Gate) -> dict[str, Any]:
    """A difference's report, for the manifest. Raises GateError if it is out of the limits."""
    largest = found.get("max_activation", 0.0)
    if largest > gate.max_activation:
        raise OverflowGateError(
            component,
            f"activations reach {largest:.4g}, above {gate.max_activation:.6g}: "
            "an engine that computes in 16 bits would overflow",
            "if the bundle is for a CPU alone, allow it: --gate max_activation=inf",
        )
    if not found["finite"]:
        raise GateError(component, "the bundle's output is not finite", _REMEDY)
    if found["mean_cosine"] < min_cosine:
        raise GateError(
            component,
            f"mean cosine {found['mean_cosine']:.4f} to the checkpoint's output, expected {min_cosine}",
            _REMEDY,
        )
    return {key: value for key, value in found.items() if key != "finite"}


def check_answers(component: str, report: dict[str, Any], gate: Gate, lm_head: Form) -> None:
    """Raises GateError if the most likely tokens or their probabilities are too often others."""
    remedy = _CALIBRATE + (_LARGER_HEAD if lm_head in ("int8", "int4") else _SMALLER_GROUPS)
    if report["top1_agreement"] < gate.top1_agreement:
        raise GateError(
            component,
            f"the same most likely token in {report['top1_agreement']:.1%} of positions, "
            f"expected {gate.top1_agreement:.1%}",
            remedy,
        )
    if not report["mean_kl"] <= gate.mean_kl:
        message = f"mean {KL} {report['mean_kl']:.3g} nats, expected {gate.mean_kl}"
        raise GateError(component, message, remedy)


class Difference:
    """Largest difference and cosine between rows of vectors. A value that is not finite stays in all of them."""

    def __init__(self) -> None:
        self.count, self.max_error, self.min_cosine, self.cosines = 0, 0.0, 1.0, 0.0

    def add(self, want: Array, got: Array) -> None:
        """Rows [..., D] of both."""
        width = want.shape[-1]
        a, b = want.reshape(-1, width), got.reshape(-1, width)
        for start in range(0, len(a), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            with np.errstate(invalid="ignore"):  # what is not finite is told by the report
                self._add_rows(a[rows].astype(np.float64), b[rows].astype(np.float64))

    def _add_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        self.count += len(a)
        self.max_error = float(np.maximum(self.max_error, np.abs(a - b).max()))
        cosines = (a * b).sum(-1) / np.maximum(lengths, 1e-12)
        self.min_cosine = float(np.minimum(self.min_cosine, cosines.min()))
        self.cosines += float(cosines.sum())

    def report(self) -> dict[str, Any]:
        return {
            "finite": bool(np.isfinite(self.max_error)),
            "max_error": rounded(self.max_error),
            "mean_cosine": rounded(self.cosines / self.count),
            "min_cosine": rounded(self.min_cosine),
            "vectors": self.count,
        }


class LogitDifference(Difference):
    """Also: how often the same token is the most likely one, and the mean KL(bundle || checkpoint) in nats."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.kl = 0, 0.0

    def _add_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
        super()._add_rows(a, b)
        checkpoint, bundle = _log_softmax(a), _log_softmax(b)
        self.same += int((a.argmax(-1) == b.argmax(-1)).sum())
        self.kl += float((np.exp(bundle) * (bundle - checkpoint)).sum())

    def report(self) -> dict[str, Any]:
        answers = {"top1_agreement": rounded(self.same / self.count), "mean_kl": rounded(self.kl / self.count)}
        return super().report() | answers


def rounded(value: float) -> float:
    """To a few digits: the rest is noise of one machine. What is not finite becomes a number that no limit allows."""
    return float(f"{value:.{REPORT_DIGITS}g}") if np.isfinite(value) else float(np.finfo(np.float64).max)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


_REMEDY = "if the checkpoint itself is sound, this is a fault of the export: report it with its config.json"
_CALIBRATE = "calibrate on samples like those that the model will see (--calibration), or take "
_LARGER_HEAD, _SMALLER_GROUPS = "--lm-head fp16", "smaller groups, as in -g 64"
