"""Causal attention of rows of one sequence over its kv_cache, against float64 over the cache as it was rounded."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.attention_cases import LAYER, Case, same
from tests.kernels.runner import Runner
from vila_edge.config import Heads
from vila_edge.kernels.attention import (
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

KINDS = ("float16", "int8")
TYPES = pytest.mark.parametrize("kv_cache", KINDS)
SHAPES = [
    (kind, Heads(query, key_value, dim), rows, past)
    for kind in KINDS
    for dim in (16, 32, 64, 128)
    for query, key_value, rows, past in manifest()[
        f"ve_attention_prefill_{'i8' if kind == 'int8' else 'f16'}_{dim}"
    ].shapes
]
TILE = 64  # packed rows of a block, and positions of a stage


def attention(kernels: Runner, case: Case, sequence: int = 0, chunk: int = 0) -> NDArray[np.float16]:
    """[rows, H, dim] of a sequence, all rows at once or `chunk` by chunk. The other caches stay as they were."""
    heads, shape, placed = case.shape.heads, case.shape, case.on(kernels)
    found = []
    for first in range(0, case.new, chunk or case.new):
        new = slice(first, first + (chunk or case.new))
        qkv, positions = kernels.put(case.rows[sequence, new]), kernels.put(case.positions(sequence)[new])
        out = kernels.empty((len(case.rows[sequence, new]), heads.query, heads.dim), np.float16)
        rows = out.numpy().shape[0]
        kernels.run(write_kv(shape, placed.caches, LAYER, qkv.address, positions.address, rows, sequence))
        stats = kernels.run(
            prefill(shape, placed.caches, LAYER, qkv.address, positions.address, out.address, rows, sequence)
        )
        assert stats is None or stats.bank_conflicts == 0
        found.append(out.numpy())
    for i, held in enumerate(placed.held):
        assert same(held.numpy(), case.cache(i, with_new=i == sequence)), f"the cache of sequence {i}"
    return np.concatenate(found)


@pytest.mark.parametrize(("kv_cache", "heads", "rows", "past"), SHAPES)
def test_rows_are_right_to_their_last_rounding(
    kernels: Runner, kv_cache: KvCache, heads: Heads, rows: int, past: int
) -> None:
    case = Case(kv_cache, heads, past=[past], new=rows, seed=rows)
    exact, found = case.expected(0), attention(kernels, case)
    exact.check(found)
    assert exact.times_rounding(found) < 2


@TYPES
@pytest.mark.parametrize("group", [1, 2, 4, 6, 7, 8])
def test_groups_of_any_size(shuffled: Runner, kv_cache: KvCache, group: int) -> None:
    case = Case(kv_cache, Heads(2 * group, 2, 16), past=[5], new=13, seed=group)
    case.expected(0).check(attention(shuffled, case))


@TYPES
@pytest.mark.parametrize("rows", [1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE + 3])
@pytest.mark.parametrize("past", [0, 1, TILE - 1, TILE, 100])
def test_rows_and_pasts_around_the_borders_of_tiles(shuffled: Runner, kv_cache: KvCache, rows: int, past: int) -> None:
    case = Case(kv_cache, Heads(1, 1, 16), [past], new=rows, seed=rows + past)
    case.expected(0).check(attention(shuffled, case))


@TYPES
def test_one_sequence_of_several(shuffled: Runner, kv_cache: KvCache) -> None:
    case = Case(kv_cache, Heads(4, 2, 32), [11, 4, 0], new=9)
    case.expected(1).check(attention(shuffled, case, sequence=1))


@TYPES
def test_chunks_give_what_all_rows_at_once_give(shuffled: Runner, kv_cache: KvCache) -> None:
    """Bit by bit: a row sees the same stages of positions, and a stage that it does not see weighs nothing."""
    case = Case(kv_cache, Heads(2, 1, 32), [3], new=70)
    whole = attention(shuffled, case)
    for chunk in (1, 13, 64):
        assert same(attention(shuffled, case, chunk=chunk), whole)


@TYPES
def test_a_row_of_decode_is_a_row_of_prefill(shuffled: Runner, kv_cache: KvCache) -> None:
    case = Case(kv_cache, Heads(6, 1, 64), [150], new=1)
    exact, placed, shape = case.expected(0), case.on(shuffled), case.shape
    qkv, positions = shuffled.put(case.rows[0]), shuffled.put(case.positions(0))
    out, blocks = shuffled.empty((1, 6, 64), np.float16), splits(151)
    scratch = shuffled.empty((decode_scratch_bytes(shape, 1, blocks) // 4,), np.float32)
    addresses = qkv.address, positions.address, out.address
    for launch in decode(shape, placed.caches, LAYER, *addresses, 1, blocks, scratch.address):
        shuffled.run(launch)
    apart = np.abs(out.numpy().astype(np.float64) - attention(shuffled, case).astype(np.float64))
    assert (apart <= 2 * (exact.slack + 2.0**-11 * np.abs(exact.value) + 2.0**-24)).all()


@TYPES
def test_large_scores_do_not_overflow(kernels: Runner, kv_cache: KvCache) -> None:
    case = Case(kv_cache, Heads(2, 1, 64), [90], new=40, sharp=20)
    case.expected(0).check(attention(kernels, case))


def test_a_sequence_that_has_no_rows_becomes_zeros(shuffled: Runner) -> None:
    case = Case("float16", Heads(2, 1, 16), [-1], new=3)
    found = attention(shuffled, case)
    assert same(found, np.zeros_like(found))


def test_what_does_not_fit_is_refused() -> None:
    shape, caches = AttentionShape(Heads(4, 2, 64), "float16"), Caches(16, 16, 1)
    for rows, sequence in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match=f"{rows} rows of sequence {sequence}"):
            prefill(shape, caches, 0, 16, 16, 16, rows, sequence)
    assert prefill(shape, caches, 0, 16, 16, 16, 100, 0).grid == (4, 2, 1)
