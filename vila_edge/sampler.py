"""Logits to a token: greedy, or temperature, top-k and top-p with a seed."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.errors import UsageError, VilaEdgeError

NOT_FINITE = ("the model's logits are not finite", "the bundle is broken: export the checkpoint again")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many there may be.

    temperature 0 takes the most likely token. `top_k` 0 and `top_p` 1 leave all tokens in. Without a `seed`
    one is drawn, and reported with the answer. Raises UsageError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature <= 100, "from 0 to 100")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more")
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "from 0 to 2**64 - 1")


class Sampler:
    """One sequence's choices: the same seed and the same logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def __call__(self, logits: NDArray[Any]) -> int:
        """A token id from logits [V]. Raises VilaEdgeError if they are not finite."""
        if not np.isfinite(logits).all():
            raise VilaEdgeError(*NOT_FINITE)
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        return int(self._random.choice(len(logits), p=self.probabilities(logits)))

    def probabilities(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Probabilities [V] after temperature, then top-k, then top-p."""
        scaled = logits.astype(np.float64) / self.sampling.temperature
        order = np.argsort(-scaled, kind="stable")
        if self.sampling.top_k:
            scaled[order[self.sampling.top_k :]] = -math.inf
        weights = np.exp(scaled - scaled[order[0]])
        probabilities = weights / weights.sum()
        if self.sampling.top_p < 1:
            before = np.cumsum(probabilities[order]) - probabilities[order]  # mass of the likelier tokens
            probabilities[order[before >= self.sampling.top_p]] = 0
            probabilities /= probabilities.sum()
        result: NDArray[np.float64] = probabilities
        return result


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}, expected {expected}")
