"""How fast this GPU reads and copies its memory, by the best of several ways: what kernels are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vila_edge.bench.kernels.clock import Clock, Work
from vila_edge.bench.kernels.memory import CACHES, Piece, Sets
from vila_edge.engine.cuda.device import Device
from vila_edge.engine.cuda.kernels import Kernels
from vila_edge.kernels import stream

LEAST = 256 << 20  # bytes of an array
BLOCKS = (2, 4, 8, 16)  # for each multiprocessor

Bandwidth = list[dict[str, Any]]


def measure_bandwidth(device: Device, kernels: Kernels, clock: Clock, least: int = LEAST) -> Bandwidth:
    """`kind` read or copy, `by`, `bytes_per_s` and the timing of every way. A copied byte counts twice.

    Raises BackendError.
    """
    nbytes = max(least, CACHES * device.l2_bytes)
    most = max(BLOCKS) * device.multiprocessors
    arrays = {name: Piece(nbytes, np.arange(1 << 16, dtype=np.uint32)) for name in ("source", "target")}
    memory = Sets(device, {}, arrays | {"sums": Piece(4 * most, np.zeros(1, np.uint32))}, 1, clock.stream)
    (at,) = memory.addresses
    try:
        ways = {("copy", "the driver"): _driver_copy(device, at, nbytes)}
        for count in BLOCKS:
            blocks = count * device.multiprocessors
            reading = stream.read(at["source"], nbytes, at["sums"], blocks)
            copying = stream.copy(at["source"], at["target"], nbytes, blocks)
            ways["read", f"{reading.kernel}, {blocks} blocks"] = kernels.prepare(reading).launch
            ways["copy", f"{copying.kernel}, {blocks} blocks"] = kernels.prepare(copying).launch
        return [_row(kind, by, nbytes, clock, work) for (kind, by), work in ways.items()]
    finally:
        memory.free()


def best(found: Bandwidth, kind: str) -> float:
    """Bytes a second."""
    return max(row["bytes_per_s"] for row in found if row["kind"] == kind)


def _driver_copy(device: Device, at: Mapping[str, int], nbytes: int) -> Work:
    return lambda on: device.copy_on_device_async(at["target"], at["source"], nbytes, on)


def _row(kind: str, by: str, nbytes: int, clock: Clock, work: Work) -> dict[str, Any]:
    timing = clock.measure([work])
    moved = nbytes * (2 if kind == "copy" else 1)
    rate = moved / timing.p50_us * 1e6
    return {"kind": kind, "by": by, "bytes": moved, "bytes_per_s": rate, "samples_us": list(timing.samples_us)}
