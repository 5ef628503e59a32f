"""Attention of one row of each sequence over its kv_cache, against float64 over the cache as it was rounded."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.attention_cases import KINDS, SPARE, Case, decode_rows, same, shapes, stack
from tests.kernels.runner import Runner
from vila_edge.config import Heads
from vila_edge.kernels.attention import SPLIT, AttentionShape, Caches, KvCache, decode, decode_scratch_bytes, splits
from vila_edge.kernels.manifest import manifest

TYPES = pytest.mark.parametrize("kv_cache", KINDS)
SHAPES = [(kind, heads, *sizes) for kind, heads, sizes in shapes("decode")]


@pytest.mark.parametrize(("kv_cache", "heads", "length"), SHAPES)
def test_a_row_is_right_to_its_last_rounding(kernels: Runner, kv_cache: KvCache, heads: Heads, length: int) -> None:
    case = Case(kv_cache, heads, past=[length - 1], new=1, seed=length)
    exact, found = case.expected(0), decode_rows(kernels, case)
    exact.check(found)
    assert length == 1 or exact.times_rounding(found) < 1.6


@TYPES
@pytest.mark.parametrize("group", [1, 2, 4, 6, 7, 8])
def test_groups_of_any_size(shuffled: Runner, kv_cache: KvCache, group: int) -> None:
    case = Case(kv_cache, Heads(2 * group, 2, 32), past=[SPLIT + 9], new=1, seed=group)
    case.expected(0).check(decode_rows(shuffled, case))


@TYPES
@pytest.mark.parametrize(
    "length", [1, 2, 16, 17, 65, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT, 5 * SPLIT + 3, 33 * SPLIT + 1]
)
def test_lengths_around_the_borders_of_tiles_and_splits(shuffled: Runner, kv_cache: KvCache, length: int) -> None:
    case = Case(kv_cache, Heads(2, 1, 16), past=[length - 1], new=1, seed=length)
    case.expected(0).check(decode_rows(shuffled, case))


RAGGED = [2 * SPLIT + 5, -1, 0, SPLIT - 1, SPLIT, 30, -1, 3 * SPLIT - 1]


@TYPES
def test_a_ragged_batch_has_the_bits_of_its_rows_alone(shuffled: Runner, kv_cache: KvCache) -> None:
    case = Case(kv_cache, Heads(4, 2, 32), RAGGED, new=1)
    found = decode_rows(shuffled, case)
    stack([case.expected(i) for i in range(len(RAGGED))]).check(found[:, None])
    for i, past in enumerate(RAGGED):
        assert same(decode_rows(shuffled, case.only(i))[0], found[i])
        if past < 0:
            assert same(found[i], np.zeros_like(found[i]))


@TYPES
@pytest.mark.parametrize("past", [20, SPLIT - 1, 2 * SPLIT - 1])
def test_more_splits_than_needed_change_nothing(kernels: Runner, kv_cache: KvCache, past: int) -> None:
    case = Case(kv_cache, Heads(3, 1, 64), [past], new=1)
    enough = splits(past + 1)
    found = [decode_rows(kernels, case, blocks=blocks) for blocks in (enough, enough + 1, enough + 4)]
    assert same(found[0], found[1]) and same(found[0], found[2])


@TYPES
@pytest.mark.parametrize("blocks", [1, 2])
def test_rows_that_the_host_must_not_ask_for_are_zeros(shuffled: Runner, kv_cache: KvCache, blocks: int) -> None:
    """Below 0, at the capacity, beyond it, beyond the splits: no cache is written."""
    case = Case(kv_cache, Heads(4, 2, 16), [3, 3, 3, 2 * SPLIT], new=1)
    positions = np.array([-7, 3 + 1 + SPARE, 1 << 30, 2 * SPLIT], np.int32)
    found = decode_rows(shuffled, case, blocks=blocks, positions=positions)
    assert same(found, np.zeros_like(found))


@TYPES
def test_large_scores_do_not_overflow(kernels: Runner, kv_cache: KvCache) -> None:
    """Scores up to 60 and beyond, the largest of a split anywhere in it."""
    case = Case(kv_cache, Heads(8, 1, 64), [2 * SPLIT + 40], new=1, sharp=20)
    case.expected(0).check(decode_rows(kernels, case))
    q, keys = case.split_rows(0)[0].astype(np.float64), case.old[0][0].astype(np.float64)
    assert np.abs(np.einsum("rhd,knd->hn", q, keys)).max() / 8 > 60


def test_what_does_not_fit_is_refused() -> None:
    shape, caches = AttentionShape(Heads(4, 2, 64), "float16"), Caches(16, 16, 1)
    with pytest.raises(ValueError, match="a batch of 0 in 1 splits"):
        decode(shape, caches, 0, 16, 16, 16, 0, 1, 16)
    with pytest.raises(ValueError, match="a batch of 1 in 0 splits"):
        decode(shape, caches, 0, 16, 16, 16, 1, 0, 16)
    with pytest.raises(ValueError, match="2 splits need scratch"):
        decode(shape, caches, 0, 16, 16, 16, 1, 2, 0)
    with pytest.raises(ValueError, match="a context of 0"):
        splits(0)
    assert (splits(1), splits(SPLIT), splits(SPLIT + 1)) == (1, 1, 2)
    assert manifest()[shape.kernel("decode")].tile["positions"] == SPLIT
    assert (decode_scratch_bytes(shape, 8, 1), decode_scratch_bytes(shape, 2, 3)) == (0, 2 * 4 * 3 * 66 * 4)
