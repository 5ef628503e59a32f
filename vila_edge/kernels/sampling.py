"""Launches that choose the next tokens on the device, and what they read and write there.

The chosen tokens are the next step's `ids`: a decode step can be one graph that the host launches ahead of what it has
read. `vila_edge.sampler.Sampler` says what temperature, top_k and top_p mean; the random numbers are others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.kernels.launch import Launch
from vila_edge.kernels.manifest import manifest
from vila_edge.sampler import Sampling

MAX_VOCAB = 1 << 18  # as many as the sum of their masses, and the order of a token, have bits for
MAX_BATCH = 8
MAX_STOPS = 8
RING = 64  # steps that the host may be behind
REFUSED = -1  # the token of logits that are not finite, or of a mask that allows nothing
INACTIVE = -2  # the token of a sequence that had ended before
SETTINGS = np.dtype(
    [
        ("rate", "<f4"),
        ("top_k", "<i4"),
        ("masked", "<i4"),
        ("limit", "<i4"),
        ("seed", "<u8"),
        ("top_p", "<u8"),
        ("stops", "<i4", (MAX_STOPS,)),
    ]
)
_MAX_RATE = 2.0**60  # what is as near as this to greedy has no other tokens left


def settings(sampling: Sampling, seed: int, stops: Sequence[int], limit: int, masked: bool = False) -> NDArray[Any]:
    """One sequence's record of SETTINGS [1], for `State.settings` on the device. Raises ValueError.

    `stops`: the tokens that end it, up to 8. `limit`: its cache's positions; whoever reaches it ends. `masked`: it has a mask.
    """
    if len(stops) > MAX_STOPS or any(not 0 <= token < MAX_VOCAB for token in stops):
        raise ValueError(f"stop tokens {list(stops)}: expected up to {MAX_STOPS}, each from 0 to {MAX_VOCAB - 1}")
    if not 0 < limit < 2**31 or not 0 <= seed < 2**64:
        raise ValueError(f"limit {limit}, seed {seed}: expected 1 to 2^31 - 1, and 0 to 2^64 - 1")
    record = np.zeros(1, SETTINGS)
    if sampling.temperature:
        record["rate"] = min(1 / (sampling.temperature * math.log(2)), _MAX_RATE)
    record["top_k"] = min(sampling.top_k, 2**31 - 1)
    record["top_p"] = 0 if sampling.top_p == 1 else max(1, int(sampling.top_p * 2.0**64))
    record["masked"], record["limit"], record["seed"] = masked, limit, seed
    record["stops"] = [*stops, *[-1] * (MAX_STOPS - len(stops))]
    return record


@dataclass(frozen=True)
class State:
    """Addresses on the device. What is written there belongs to the launches until the host has read the ring.

    A sequence is at position p if its next input, `ids`, has the position p; below 0 it is not active. It comes to be
    so by a stop token, its limit or a token that is REFUSED, and launches then change nothing of it but its step.
    """

    ids: int  # int32 [batch]
    positions: int  # int32 [batch]
    step: int  # int32 [batch]: launches so far, the same for all
    ring: int  # int64 [RING, batch], zeros at first; for `read_ring`
    settings: int  # SETTINGS [batch]
    scratch: int  # `scratch_bytes`
    masks: int = 0  # uint32 [batch, ceil(vocab / 32)], bit i % 32 of word i / 32: token i is allowed. 0: no masks


def scratch_bytes(vocab: int, batch: int) -> int:
    """Of `State.scratch`. Raises ValueError as the launches do."""
    return 8 * _slices(vocab, batch) * batch


def greedy(logits: int, state: State, vocab: int, batch: int) -> list[Launch]:
    """The largest logit of each sequence, the first of equals; its temperature is not looked at. Raises ValueError.

    `logits`: address of float32 [batch, vocab]. Batches of up to 8, and vocabularies of up to 2^18.
    """
    slices = _slices(vocab, batch)
    pointers = (state.scratch, state.settings, state.ids, state.positions, state.step, state.ring)
    return [_largest(logits, state, vocab, batch), Launch("ve_sample_greedy", (batch, 1, 1), (*pointers, slices))]


def sample(logits: int, state: State, vocab: int, batch: int) -> list[Launch]:
    """A token of each sequence as its settings say, greedy ones among them. Raises ValueError as `greedy` does.

    The draw is a function of the seed, the position that the token gets, and the logits: not of the batch or the GPU.
    """
    slices = _slices(vocab, batch)
    read = (logits, state.scratch, state.settings, state.masks)
    written = (state.ids, state.positions, state.step, state.ring)
    draw = Launch("ve_sample_f32", (batch, 1, 1), (*read, *written, vocab, slices))
    return [_largest(logits, state, vocab, batch), draw]


def read_ring(ring: NDArray[np.int64], step: int, sequence: int) -> int | None:
    """The token of a step, counted from 0, in the host's copy of the ring [RING, batch]; None if it is not there yet.

    Raises ValueError if a later step has overwritten it.
    """
    entry = int(ring[step % RING, sequence])
    found = (entry >> 32) - 1
    if found > step:
        raise ValueError(f"step {step} of the ring was overwritten by step {found}")
    if found < step:
        return None
    return (entry & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def _largest(logits: int, state: State, vocab: int, batch: int) -> Launch:
    pointers = (logits, state.settings, state.masks, state.positions, state.scratch)
    return Launch("ve_sample_max_f32", (_slices(vocab, batch), batch, 1), (*pointers, vocab))


def _slices(vocab: int, batch: int) -> int:
    if not 1 <= vocab <= MAX_VOCAB or not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"{vocab} logits, a batch of {batch}: expected 1 to {MAX_VOCAB}, and 1 to {MAX_BATCH}")
    return -(-vocab // manifest()["ve_sample_max_f32"].tile["vocab"])
