"""Launches that measure the memory of a GPU: reading alone, and copying."""

from __future__ import annotations

from vila_edge.kernels.launch import Launch

VECTOR_BYTES = 16


def read(source: int, nbytes: int, sums: int, blocks: int) -> Launch:
    """Reads `nbytes` at an address once. `sums` uint32 [blocks] get the sums of all words, modulo 2^32.

    Raises ValueError unless `nbytes` is a multiple of 16.
    """
    return Launch("ve_stream_read", (blocks, 1, 1), (source, sums, _vectors(nbytes)))


def copy(source: int, target: int, nbytes: int, blocks: int) -> Launch:
    """Copies `nbytes` between addresses that do not overlap. Raises ValueError unless it is a multiple of 16."""
    return Launch("ve_stream_copy", (blocks, 1, 1), (source, target, _vectors(nbytes)))


def _vectors(nbytes: int) -> int:
    if nbytes <= 0 or nbytes % VECTOR_BYTES:
        raise ValueError(f"{nbytes} bytes: expected a multiple of {VECTOR_BYTES}")
    return nbytes // VECTOR_BYTES
