"""Causal attention of rows of one sequence over its kv_cache, against float64 over the cache as it was rounded."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.attention_cases import KINDS, Case, decode_rows, prefill_rows, same, shapes
from tests.kernels.oracle import HALF, SUBNORMAL
from tests.kernels.runner import Runner
from vila_edge.config import Heads
from vila_edge.kernels.attention import AttentionShape, Caches, KvCache, prefill

TYPES = pytest.mark.parametrize("kv_cache", KINDS)
SHAPES = [(kind, heads, *sizes) for kind, heads, sizes in shapes("prefill")]
TILE = 64  # packed rows of a block, and positions of a stage


@pytest.mark.parametrize(("kv_cache", "heads", "rows", "past"), SHAPES)
def test_rows_are_right_to_their_last_rounding(
    kernels: Runner, kv_cache: KvCache, heads: Heads, rows: int, past: int
) -> None:
    case = Case(kv_cache, heads, past=[past], new=rows, seed=rows)
    exact, found = case.expected(0), prefill_rows(kernels, case)
    exact.check(found)
    assert exact.times_rounding(found) < 1.6


@TYPES
@pytest.mark.parametrize("group", [1, 2, 4, 6, 7, 8])
def test_groups_of_any_size(shuffled: Runner, kv_cache: KvCache, group: int) -> None:
    case = Case(kv_cache, Heads(2 * group, 2, 16), past=[5], new=13, seed=group)
    case.expected(0).check(prefill_rows(shuffled, case))


@TYPES
@pytest.mark.parametrize("rows", [1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE + 3])
@pytest.mark.parametrize("past", [0, 1, TILE - 1, TILE, 100])
def test_rows_and_pasts_around_the_borders_of_tiles(shuffled: Runner, kv_cache: KvCache, rows: int, past: int) -> None:
    case = Case(kv_cache, Heads(1, 1, 16), [past], new=rows, seed=rows + past)
    case.expected(0).check(prefill_rows(shuffled, case))


@TYPES
def test_one_sequence_of_several(shuffled: Runner, kv_cache: KvCache) -> None:
    case = Case(kv_cache, Heads(4, 2, 32), [11, 4, 0], new=9)
    case.expected(1).check(prefill_rows(shuffled, case, sequence=1))


@TYPES
def test_chunks_give_what_all_rows_at_once_give(shuffled: Runner, kv_cache: KvCache) -> None:
    """Bit by bit: a row sees the same stages of positions, and a stage that it does not see weighs nothing."""
    case = Case(kv_cache, Heads(2, 1, 32), [3], new=70)
    whole = prefill_rows(shuffled, case)
    for chunk in (1, 13, 64):
        assert same(prefill_rows(shuffled, case, chunk=chunk), whole)


@TYPES
def test_a_row_of_decode_is_a_row_of_prefill(shuffled: Runner, kv_cache: KvCache) -> None:
    case = Case(kv_cache, Heads(6, 1, 64), [150], new=1)
    exact, found = case.expected(0), [decode_rows(shuffled, case), prefill_rows(shuffled, case)]
    apart = np.abs(found[0].astype(np.float64) - found[1].astype(np.float64))
    assert (apart <= 2 * (exact.slack + HALF * np.abs(exact.value) + SUBNORMAL)).all()


@TYPES
def test_large_scores_do_not_overflow(kernels: Runner, kv_cache: KvCache) -> None:
    case = Case(kv_cache, Heads(2, 1, 64), [90], new=40, sharp=20)
    case.expected(0).check(prefill_rows(kernels, case))


def test_a_sequence_that_has_no_rows_becomes_zeros(shuffled: Runner) -> None:
    case = Case("float16", Heads(2, 1, 16), [-1], new=3)
    found = prefill_rows(shuffled, case)
    assert same(found, np.zeros_like(found))


def test_what_does_not_fit_is_refused() -> None:
    shape, caches = AttentionShape(Heads(4, 2, 64), "float16"), Caches(16, 16, 1)
    for rows, sequence in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match=f"{rows} rows of sequence {sequence}"):
            prefill(shape, caches, 0, 16, 16, 16, rows, sequence)
    assert prefill(shape, caches, 0, 16, 16, 16, 100, 0).grid == (4, 2, 1)
