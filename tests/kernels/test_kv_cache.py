"""Rows of the prefill go into a kv_cache: as they are, or rounded as vila_edge/kv_scales.py rounds them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.attention_cases import LAYER, LAYERS, Case, quantise, same
from tests.kernels.runner import Runner
from vila_edge import kv_scales
from vila_edge.config import Heads
from vila_edge.kernels.attention import AttentionShape, Caches, KvCache, write_kv
from vila_edge.kernels.manifest import manifest

TYPES = pytest.mark.parametrize("kv_cache", ["float16", "int8"])


@TYPES
@pytest.mark.parametrize(("query", "key_value", "dim", "rows"), manifest()["ve_kv_write_f16"].shapes)
def test_rows_go_to_their_positions_and_nowhere_else(
    kernels: Runner, kv_cache: KvCache, query: int, key_value: int, dim: int, rows: int
) -> None:
    case = Case(kv_cache, Heads(query, key_value, dim), past=[2, 7], new=rows)
    held, caches = case.on(kernels)
    qkv, positions = kernels.put(case.rows[1]), kernels.put(case.positions(1))
    kernels.run(write_kv(case.shape, caches, LAYER, qkv.address, positions.address, rows, sequence=1))
    assert same(held[0].numpy(), case.cache(0, with_new=False))
    assert same(held[1].numpy(), case.cache(1, with_new=True))


@TYPES
def test_a_row_without_a_place_is_left_out(shuffled: Runner, kv_cache: KvCache) -> None:
    case = Case(kv_cache, Heads(2, 1, 32), past=[4], new=4)
    (held, caches), expected = case.on(shuffled), case.cache(0, with_new=False)
    capacity = expected.shape[2]
    positions = np.array([-1, capacity, 5, 1 << 30], np.int32)
    expected[:, :, 5] = case.cache(0, with_new=True)[:, :, 4 + 2]
    qkv, at = shuffled.put(case.rows[0]), shuffled.put(positions)
    shuffled.run(write_kv(case.shape, caches, LAYER, qkv.address, at.address, 4, sequence=0))
    assert same(held[0].numpy(), expected)


def test_eight_bits_are_rounded_as_everywhere(shuffled: Runner) -> None:
    """Halves go to the even step, what is too large to the last one."""
    scales = np.full((LAYERS, 1, 16), 0.5, np.float32)
    scales[LAYER, 0, 8:] = 0.03
    x = np.linspace(-70, 70, 8 * 16).astype(np.float16).reshape(8, 16)
    x[:, :8] = np.arange(-32, 32).reshape(8, 8) * 0.25
    x[3, 8], x[4, 9] = np.inf, -np.inf
    qkv = shuffled.put(np.concatenate([np.zeros_like(x), x, x], 1))
    held = shuffled.put(np.zeros((2, 1, 8, 16), np.int8))
    tables = [shuffled.put(np.array([[0, held.address, 0]])), shuffled.put(np.array([8], np.int32))]
    caches = Caches(tables[0].address, tables[1].address, LAYERS, *[shuffled.put(scales).address] * 2)
    shape = AttentionShape(Heads(1, 1, 16), "int8")
    positions = shuffled.put(np.arange(8, dtype=np.int32))
    shuffled.run(write_kv(shape, caches, LAYER, qkv.address, positions.address, 8, sequence=0))
    found = held.numpy()
    assert same(found[0, 0], quantise(x[None], scales[LAYER])[0]) and same(found[0], found[1])
    there = kv_scales.rounded(x[None, None].astype(np.float32), scales[LAYER][None, :, None])
    assert np.array_equal(found[0, 0] * scales[LAYER], there[0, 0])


@pytest.mark.parametrize(
    ("heads", "kv_cache", "message"),
    [
        (Heads(9, 1, 64), "int8", "9 query heads with 1 key_value heads: expected 1 to 8"),
        (Heads(4, 3, 64), "int8", "4 query heads with 3"),
        (Heads(4, 0, 64), "int8", "4 query heads with 0"),
        (Heads(4, 2, 80), "int8", "head_dim 80: expected one of 16, 32, 64, 128"),
        (Heads(4, 2, 64), "float32", "a kv_cache of float32: expected float16 or int8"),
    ],
)
def test_shapes_that_no_kernel_takes_are_refused(heads: Heads, kv_cache: KvCache, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionShape(heads, kv_cache)


def test_what_does_not_fit_is_refused() -> None:
    wide, narrow = (AttentionShape(Heads(4, 2, 64), kind) for kind in ("float16", "int8"))
    with pytest.raises(ValueError, match="scales are for int8"):
        write_kv(wide, Caches(16, 16, 2, 16, 16), 0, 16, 16, 1, 0)
    with pytest.raises(ValueError, match="it needs both"):
        write_kv(narrow, Caches(16, 16, 2, 16), 0, 16, 16, 1, 0)
    with pytest.raises(ValueError, match="layer 2 of 2"):
        write_kv(wide, Caches(16, 16, 2), 2, 16, 16, 1, 0)
    for rows, sequence in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match=f"{rows} rows of sequence {sequence}"):
            write_kv(wide, Caches(16, 16, 2), 0, 16, 16, rows, sequence)
    assert (wide.layer_bytes(10), narrow.layer_bytes(10)) == (5120, 2560)
