"""Launches of attention over a kv_cache that lies on the device: kernels/include/ve_attention.cuh says how.

A layer of a sequence is one piece of memory, keys [H_kv, capacity, dim] and behind them values of the same shape.
`qkv` is float16 [rows, (H + 2 H_kv) dim], all queries, then all keys, then all values of a row, rotated already;
`positions` int32 [rows] is each row's place in its sequence; `out` float16 [rows, H dim]. All are addresses, and
multiples of 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vila_edge.config import Heads
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.manifest import manifest

KvCache = Literal["float16", "int8"]
SPLIT = 128  # positions of a block of attention_decode.cu: a result depends neither on the batch nor on a bucket
MAX_GROUP = 8  # queries that share a key
DIMS = (16, 32, 64, 128)
_TYPES: dict[KvCache, tuple[str, int]] = {"float16": ("f16", 2), "int8": ("i8", 1)}  # in names; bytes of a number


@dataclass(frozen=True)
class AttentionShape:
    """What the kernels are built for. Raises ValueError for anything else."""

    heads: Heads
    kv_cache: KvCache

    def __post_init__(self) -> None:
        query, key_value, dim = self.heads
        if key_value < 1 or query % key_value or not 1 <= query // key_value <= MAX_GROUP:
            raise ValueError(
                f"{query} query heads with {key_value} key_value heads: expected 1 to {MAX_GROUP} queries for each"
            )
        if dim not in DIMS:
            raise ValueError(f"head_dim {dim}: expected one of {', '.join(map(str, DIMS))}")
        if self.kv_cache not in _TYPES:
            raise ValueError(f"a kv_cache of {self.kv_cache}: expected {' or '.join(_TYPES)}")

    def layer_bytes(self, capacity: int) -> int:
        """Of keys and values of one layer of a sequence."""
        return 2 * self.heads.key_value * capacity * self.heads.dim * _TYPES[self.kv_cache][1]

    def kernel(self, operation: str) -> str:
        return f"ve_attention_{operation}_{_TYPES[self.kv_cache][0]}_{self.heads.dim}"

    @property
    def scale(self) -> float:
        """Of scores, whose exponential has base 2."""
        return math.log2(math.e) / math.sqrt(self.heads.dim)


@dataclass(frozen=True)
class Caches:
    """Addresses of tables on the device, so that a graph of launches serves any sequences."""

    layers_at: int  # int64 [batch, layers]: where each layer of each sequence lies
    capacities: int  # int32 [batch], in positions
    layers: int
    key_scales: int = 0  # float32 [layers, H_kv, dim], both for int8 alone
    value_scales: int = 0

    def pointers(self, shape: AttentionShape, layer: int) -> tuple[int, ...]:
        """Raises ValueError if there are no such scales or no such layer."""
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer {layer} of {self.layers}")
        if any(bool(scales) != (shape.kv_cache == "int8") for scales in (self.key_scales, self.value_scales)):
            raise ValueError(f"a kv_cache of {shape.kv_cache}: scales are for int8, and it needs both")
        return self.layers_at, self.capacities, self.key_scales, self.value_scales


def splits(context: int) -> int:
    """Blocks that a head needs for `context` positions, the row's own one counted. Raises ValueError."""
    if context < 1:
        raise ValueError(f"a context of {context}: expected at least one position")
    return -(-context // SPLIT)


def write_kv(
    shape: AttentionShape, caches: Caches, layer: int, qkv: int, positions: int, rows: int, sequence: int
) -> Launch:
    """Keys and values of rows of a sequence, which is an index into the tables, into its cache.

    A row whose position is below 0 or not within the capacity is left out. Raises ValueError.
    """
    heads = shape.heads
    _check_rows(rows, sequence)
    pointers = (*caches.pointers(shape, layer), qkv, positions)
    numbers = (layer, caches.layers, heads.query, heads.key_value, heads.dim, sequence)
    return Launch(f"ve_kv_write_{_TYPES[shape.kv_cache][0]}", (rows, 1, 1), pointers + numbers)


def prefill(
    shape: AttentionShape, caches: Caches, layer: int, qkv: int, positions: int, out: int, rows: int, sequence: int
) -> Launch:
    """Causal attention of rows at positions[0], positions[0] + 1, ... of a sequence, behind `write_kv`.

    Only the queries of `qkv` are read. Raises ValueError.
    """
    heads = shape.heads
    _check_rows(rows, sequence)
    kernel = manifest()[shape.kernel("prefill")]
    grid = (-(-rows * heads.query // heads.key_value // kernel.tile["rows"]), heads.key_value, 1)
    pointers = (*caches.pointers(shape, layer), qkv, positions, out)
    numbers = (layer, caches.layers, heads.query, heads.key_value, rows, sequence, shape.scale)
    return Launch(kernel.name, grid, pointers + numbers)


def decode(
    shape: AttentionShape,
    caches: Caches,
    layer: int,
    qkv: int,
    positions: int,
    out: int,
    batch: int,
    splits: int,
    scratch: int,
) -> list[Launch]:
    """One row of each sequence: its key and value go into the cache, and it attends over all up to itself.

    `splits` is at least that of the longest sequence, position + 1; a result does not depend on it. A row becomes
    zeros, and its cache is left alone, if its position is below 0, not within the capacity or beyond the splits.
    `scratch` has `decode_scratch_bytes`, or may be 0 if that is 0. Raises ValueError.
    """
    heads = shape.heads
    if batch < 1 or splits < 1:
        raise ValueError(f"a batch of {batch} in {splits} splits: expected at least 1")
    if splits > 1 and not scratch:
        raise ValueError(f"{splits} splits need scratch memory")
    pointers = (*caches.pointers(shape, layer), qkv, positions, out, scratch)
    numbers = (layer, caches.layers, heads.query, heads.key_value, shape.scale)
    launches = [Launch(shape.kernel("decode"), (splits, heads.key_value, batch), pointers + numbers)]
    if splits > 1:
        arguments = (positions, caches.capacities, scratch, out, batch, heads.query, splits, heads.dim)
        launches.append(Launch("ve_attention_combine_f16", (batch * heads.query, 1, 1), arguments))
    return launches


def decode_scratch_bytes(shape: AttentionShape, batch: int, splits: int) -> int:
    """What splits leave to be combined: for each query float32 [dim], its largest score and its sum of weights."""
    return 0 if splits == 1 else batch * shape.heads.query * splits * (shape.heads.dim + 2) * 4


def _check_rows(rows: int, sequence: int) -> None:
    if rows < 1 or sequence < 0:
        raise ValueError(f"{rows} rows of sequence {sequence}: expected at least one, of an index")
