"""How fast a GPU reads its memory, for a bundle that is measured on our own kernels."""

from __future__ import annotations

from vila_edge.bench.kernels.bandwidth import LEAST, measure_bandwidth
from vila_edge.bench.kernels.clock import Clock
from vila_edge.engine import cuda
from vila_edge.engine.cuda.kernels import Kernels
from vila_edge.kernels import store


def gpu_read_bandwidth(least: int = LEAST) -> list[float]:
    """Bytes a second, by several ways over at least so many bytes. The largest counts. Raises BackendError.

    It takes twice that memory, so it is measured while no model is loaded.
    """
    with cuda.open_device() as device:
        kernels, clock = Kernels(device, store.find), Clock(device)
        try:
            found = measure_bandwidth(device, kernels, clock, least)
        finally:
            clock.free()
            kernels.free()
    return [row["bytes_per_s"] for row in found if row["kind"] == "read"]
