"""Which token a draw takes, in numpy: written apart from the kernels, but for the rounding of masses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK_32 = 2**32 - 1
OCTAVES = 44
# 2^-x for x from 0 to 1, as ve_sampling.cuh has it. Every step is rounded to float32.
POLYNOMIAL = (1, -0.693147063, 0.240224361, -0.0554907583, 0.00957917888, -0.00127474801, 0.00010902313)


def philox(key: int, counter: int) -> list[int]:
    """The four words of Philox4x32-10: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011)."""
    words = [counter >> 32 * i & MASK_32 for i in range(4)]
    keys = [key & MASK_32, key >> 32]
    for _ in range(10):
        (high0, low0), (high1, low1) = (
            divmod(m * w, 2**32) for m, w in ((0xD2511F53, words[0]), (0xCD9E8D57, words[2]))
        )
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B9) & MASK_32, (keys[1] + 0xBB67AE85) & MASK_32]
    return words


def masses(logits: NDArray[np.float32], rate: Any) -> NDArray[np.uint64]:
    """Integers in proportion to the probabilities of all tokens: 2^44 for the largest logit. `rate` of SETTINGS."""
    with np.errstate(over="ignore"):
        octaves = (logits.max() - logits) * rate
    octaves = np.minimum(octaves, np.float32(OCTAVES))
    whole = np.floor(octaves)
    part, value = octaves - whole, np.float32(POLYNOMIAL[-1])
    for coefficient in POLYNOMIAL[-2::-1]:
        value = value * part + np.float32(coefficient)
    assert value.dtype == np.float32
    scaled = (value * np.float32(2**30)).astype(np.uint64) << np.uint64(OCTAVES - 30)
    return np.where(octaves < OCTAVES, scaled >> whole.astype(np.uint64), np.uint64(0))


def kept(logits: NDArray[np.float32], record: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
    """The tokens that can be drawn, from the likeliest on, and their masses."""
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    mass = masses(logits, record["rate"])[order]
    if record["top_k"]:
        mass = mass[: record["top_k"]]
    if record["top_p"]:
        before = np.cumsum(mass) - mass
        mass = mass[[int(b) << 64 < int(mass.sum()) * int(record["top_p"]) for b in before]]
    return order[: len(mass)], mass


def choose(
    logits: NDArray[np.float32], record: NDArray[Any], position: int, allowed: NDArray[np.bool_] | None = None
) -> int:
    """The token at `position` from logits [V] under a record of SETTINGS."""
    tokens = np.arange(len(logits)) if allowed is None else np.flatnonzero(allowed)
    logits = logits[tokens]
    if record["rate"] == 0:
        return int(tokens[logits.argmax()])
    order, mass = kept(logits, record)
    first, second, *_ = philox(int(record["seed"]), position)
    target = int(mass.sum()) * (second << 32 | first) >> 64
    return int(tokens[order[np.searchsorted(np.cumsum(mass), np.uint64(target), side="right")]])
