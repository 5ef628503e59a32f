"""What stands around measurements on a GPU: the memory's speed before and after them, and where they are from."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from vila_edge.bench.kernels.bandwidth import LEAST, best, measure_bandwidth
from vila_edge.bench.kernels.clock import LEAST_US, Clock
from vila_edge.bench.kernels.origin import origin
from vila_edge.engine.cuda.device import Device
from vila_edge.engine.cuda.kernels import Find, Kernels

Row = dict[str, Any]
Progress = Callable[[str], None]


def framed(
    device: Device,
    find: Find,
    progress: Progress,
    work: Callable[[Kernels, Clock], list[Row]],
    repeat: int,
    least_us: float = LEAST_US,
    bandwidth_bytes: int = LEAST,
) -> tuple[dict[str, Any], list[Row]]:
    """What `work` found, and around it: date, GPU, driver, code, and `bandwidth` in bytes a second.

    The bandwidth is measured before and after, and the best of it counts. `repeat` and `least_us` are those of the
    clock. Raises BackendError.
    """
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    kernels, clock = Kernels(device, find), Clock(device, repeat, least_us)
    try:
        progress("bandwidth")
        before = measure_bandwidth(device, kernels, clock, bandwidth_bytes)
        rows = work(kernels, clock)
        progress("bandwidth, again")
        after = measure_bandwidth(device, kernels, clock, bandwidth_bytes)
        found_on = origin(device, kernels)
    finally:
        clock.free()
        kernels.free()
    speeds = {kind: best(before + after, kind) for kind in ("copy", "read")}
    return {"date": date, **found_on, "bandwidth": speeds | {"before": before, "after": after}}, rows
