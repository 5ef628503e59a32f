"""What is said of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def times(samples_ms: Sequence[float]) -> dict[str, Any]:
    """Percentiles, between samples where they fall there, and the samples."""
    p50, p95 = np.percentile(samples_ms, (50, 95))
    return {"p50_ms": float(p50), "p95_ms": float(p95), "samples_ms": [round(sample, 4) for sample in samples_ms]}
