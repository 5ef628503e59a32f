"""Sequences with a kv_cache, what attention over them is in float64, and how far a kernel may be from that.

Scores are summed in fp32, which moves the logarithm of a weight by `drift` at most. A weight is rounded to a half, and
it is the rounded ones that are summed up: so |error| <= (2^-11 + 2 drift) sum p |v - y|, with p the weights and y the
result, but for weights below the smallest half, and for the fp32 sum of the values.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from tests.kernels.oracle import HALF, SINGLE, SUBNORMAL, Exact, halves
from tests.kernels.runner import Array, Runner
from vila_edge.config import Heads
from vila_edge.kernels.attention import (
    DIMS,
    AttentionShape,
    Caches,
    KvCache,
    decode,
    decode_scratch_bytes,
    prefill,
    splits,
    write_kv,
)
from vila_edge.kernels.manifest import manifest

LAYERS, LAYER = 3, 1  # of a cache; the one that is used, between two that lie nowhere
SPARE = 3  # positions of capacity behind the last one
KINDS: tuple[KvCache, ...] = get_args(KvCache)
POISON = -128  # in a cache of 8 bits, NaN in one of 16


def shapes(operation: str) -> list[tuple[KvCache, Heads, tuple[int, ...]]]:
    """What the manifest has for every kernel of "decode" or "prefill"; sizes behind the heads are as it names them."""
    found = list[tuple[KvCache, Heads, tuple[int, ...]]]()
    for kind in KINDS:
        for dim in DIMS:
            kernel = manifest()[AttentionShape(Heads(1, 1, dim), kind).kernel(operation)]
            found += [(kind, Heads(sizes[0], sizes[1], dim), sizes[2:]) for sizes in kernel.shapes]
    return found


def attend(q: NDArray[Any], keys: NDArray[Any], values: NDArray[Any]) -> Exact:
    """Of queries [H, dim] over keys and values [H_kv, n, dim]."""
    q, k, v = (a.astype(np.float64) for a in (q, keys, values))
    (heads, dim), (key_value, n, _) = q.shape, k.shape
    k, v = (np.repeat(a, heads // key_value, 0) for a in (k, v))
    scores = np.einsum("hd,hnd->hn", q, k) / np.sqrt(dim)
    largest = np.einsum("hd,hnd->hn", np.abs(q), np.abs(k)).max(1) / np.sqrt(dim)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    p = weights / weights.sum(1, keepdims=True)
    y = np.einsum("hn,hnd->hd", p, v)
    apart = np.abs(v - y[:, None])
    drift = (dim + 16) * SINGLE * (1 + largest)[:, None]
    slack = (HALF + 2 * drift) * np.einsum("hn,hnd->hd", p, apart) + n * SUBNORMAL * apart.max(1)
    return Exact(y, slack + n * SINGLE * np.einsum("hn,hnd->hd", p, np.abs(v)))


def stack(results: Sequence[Exact]) -> Exact:
    return Exact(np.stack([r.value for r in results]), np.stack([r.slack for r in results]))


def quantise(x: NDArray[Any], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """x [..., H_kv, n, dim] in steps of scales [H_kv, dim]."""
    return np.clip(np.rint(x.astype(np.float32) / scales[:, None]), -128, 127).astype(np.int8)


@dataclass
class Scales:
    """Of keys and values of every layer, float32 [2, layers, H_kv, dim]; None where a cache has 16 bits."""

    values: NDArray[np.float32] | None

    def store(self, part: int, x: NDArray[np.float16]) -> NDArray[Any]:
        """Keys (0) or values (1) [H_kv, n, dim] as the cache has them."""
        return x if self.values is None else quantise(x, self.values[part, LAYER])

    def load(self, part: int, stored: NDArray[Any]) -> NDArray[np.float64]:
        wide = stored.astype(np.float64)
        return wide if self.values is None else wide * self.values[part, LAYER][:, None].astype(np.float64)


class Case:
    """Sequences in which positions are in use already, and rows that come to one or each of them."""

    def __init__(
        self, kv_cache: KvCache, heads: Heads, past: Sequence[int], new: int, seed: int = 0, sharp: float = 1.0
    ) -> None:
        """`past` of each sequence, of which -1 has no row; `new` rows for each. Scores are `sharp` times normal."""
        self.shape, self.past = AttentionShape(heads, kv_cache), list(past)
        rng = np.random.default_rng(seed)
        size = (2, LAYERS, heads.key_value, heads.dim)  # steps of any size, and too short for the largest numbers
        self.scales = Scales(rng.uniform(0.01, 0.03, size).astype(np.float32) if kv_cache == "int8" else None)
        self.rows = halves(rng, len(self.past), new, heads.query + 2 * heads.key_value, heads.dim)
        self.rows[:, :, : heads.query] *= np.float16(sharp)
        self.old = [halves(rng, 2, heads.key_value, max(n, 0), heads.dim) for n in self.past]

    @property
    def new(self) -> int:
        return self.rows.shape[1]

    def only(self, sequence: int) -> Case:
        """One sequence of it."""
        found = copy.copy(self)
        chosen = slice(sequence, sequence + 1)
        found.past, found.old, found.rows = self.past[chosen], self.old[chosen], self.rows[chosen]
        return found

    def split_rows(self, sequence: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Queries [new, H, dim], and keys and values [2, H_kv, new, dim]."""
        heads, rows = self.shape.heads, self.rows[sequence]
        return rows[:, : heads.query], rows[:, heads.query :].reshape(
            self.new, 2, heads.key_value, heads.dim
        ).transpose(1, 2, 0, 3)

    def cache(self, sequence: int, *, with_new: bool) -> NDArray[Any]:
        """[2, H_kv, capacity, dim] as it lies in memory; poison where nothing is."""
        parts = [self.old[sequence]]
        if with_new and self.past[sequence] >= 0:
            parts.append(self.split_rows(sequence)[1])
        x = np.concatenate(parts, 2)
        heads, capacity = self.shape.heads, max(self.past[sequence], 0) + self.new + SPARE
        int8 = self.shape.kv_cache == "int8"
        size = (2, heads.key_value, capacity, heads.dim)
        found: NDArray[Any] = np.full(size, POISON, np.int8) if int8 else np.full(size, np.nan, np.float16)
        for part in range(2):
            found[part, :, : x.shape[2]] = self.scales.store(part, x[part])
        return found

    def expected(self, sequence: int) -> Exact:
        """[new, H, dim], with keys and values as the cache gives them back. Zeros if there is no row."""
        q, past = self.split_rows(sequence)[0], self.past[sequence]
        if past < 0:
            return Exact(np.zeros(q.shape), np.zeros(q.shape))
        stored = self.cache(sequence, with_new=True)
        keys, values = (self.scales.load(part, stored[part]) for part in range(2))
        return stack([attend(q[i], keys[:, : past + i + 1], values[:, : past + i + 1]) for i in range(self.new)])

    def positions(self, sequence: int) -> NDArray[np.int32]:
        past = self.past[sequence]
        return (past + np.arange(self.new) if past >= 0 else np.full(self.new, -1)).astype(np.int32)

    def on(self, kernels: Runner) -> tuple[list[Array], Caches]:
        """The cache of each sequence in memory, without what is new, and the tables."""
        arrays = [self.cache(i, with_new=False) for i in range(len(self.past))]
        held = [kernels.put(array) for array in arrays]
        layers_at = np.zeros((len(held), LAYERS), np.int64)
        layers_at[:, LAYER] = [array.address for array in held]
        capacities = np.array([array.shape[2] for array in arrays], np.int32)
        scales = self.scales.values
        tables = [kernels.put(layers_at), kernels.put(capacities)]
        tables += [kernels.put(scales[0]), kernels.put(scales[1])] if scales is not None else []
        addresses = [table.address for table in tables]
        return held, Caches(addresses[0], addresses[1], LAYERS, *addresses[2:])


def same(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Bit by bit, NaN included."""
    return found.tobytes() == np.ascontiguousarray(expected).tobytes()


def decode_rows(
    kernels: Runner, case: Case, blocks: int = 0, positions: NDArray[np.int32] | None = None
) -> NDArray[np.float16]:
    """[batch, H, dim] of all sequences. Their caches must be what is expected afterwards: as before, if `positions`."""
    batch = len(case.past)
    (held, caches), heads = case.on(kernels), case.shape.heads
    blocks = blocks or splits(max(0, *case.past) + 1)
    scratch = kernels.empty((max(4, decode_scratch_bytes(case.shape, batch, blocks)) // 4,), np.float32)
    at = kernels.put(np.concatenate([case.positions(i) for i in range(batch)]) if positions is None else positions)
    out, qkv = kernels.empty((batch, heads.query, heads.dim), np.float16), kernels.put(case.rows)
    for launch in decode(
        case.shape,
        caches,
        LAYER,
        qkv.address,
        at.address,
        out.address,
        batch,
        blocks,
        scratch.address if blocks > 1 else 0,
    ):
        stats = kernels.run(launch)
        assert stats is None or stats.bank_conflicts == 0
    for i, cache in enumerate(held):
        assert same(cache.numpy(), case.cache(i, with_new=positions is None)), f"the cache of row {i}"
    return out.numpy()


def prefill_rows(kernels: Runner, case: Case, sequence: int = 0, chunk: int = 0) -> NDArray[np.float16]:
    """[rows, H, dim] of a sequence, all rows at once or `chunk` by chunk. The other caches stay as they were."""
    (held, caches), heads, shape = case.on(kernels), case.shape.heads, case.shape
    found = []
    for first in range(0, case.new, chunk or case.new):
        new = slice(first, first + (chunk or case.new))
        rows = len(case.rows[sequence, new])
        qkv, positions = kernels.put(case.rows[sequence, new]), kernels.put(case.positions(sequence)[new])
        out = kernels.empty((rows, heads.query, heads.dim), np.float16)
        kernels.run(write_kv(shape, caches, LAYER, qkv.address, positions.address, rows, sequence))
        stats = kernels.run(prefill(shape, caches, LAYER, qkv.address, positions.address, out.address, rows, sequence))
        assert stats is None or stats.bank_conflicts == 0
        found.append(out.numpy())
    for i, cache in enumerate(held):
        assert same(cache.numpy(), case.cache(i, with_new=i == sequence)), f"the cache of sequence {i}"
    return np.concatenate(found)
