"""Measure our kernels on a GPU, in one run. Every number is of this run alone, and what it is compared with as well."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vila_edge.bench.kernels.bandwidth import LEAST
from vila_edge.bench.kernels.cases import Case, Workload, workloads
from vila_edge.bench.kernels.clock import LEAST_US, Clock, Work
from vila_edge.bench.kernels.frame import Progress, Row, framed
from vila_edge.bench.kernels.memory import Sets, sets_for
from vila_edge.bench.kernels.shapes import Shapes
from vila_edge.engine.cuda.device import Device, PreparedLaunch, Stream
from vila_edge.engine.cuda.kernels import Find, Kernels
from vila_edge.kernels import store

FORMAT = 1


@dataclass(frozen=True)
class Options:
    """`repeat` samples, each of at least `least_us`; the bandwidth is measured on arrays of `bandwidth_bytes`."""

    repeat: int = 20
    least_us: float = LEAST_US
    bandwidth_bytes: int = LEAST


def bench_kernels(
    device: Device,
    shapes: Shapes,
    options: Options | None = None,
    progress: Progress = lambda step: None,
    find: Find = store.find,
) -> dict[str, Any]:
    """Everything about our kernels on a GPU. Times in microseconds, sizes in bytes; every sample is there.

    The bandwidth is measured before and after all else, and the best of it counts. Raises BackendError.
    """
    options = options or Options()

    def work(kernels: Kernels, clock: Clock) -> list[Row]:
        rows = list[Row]()
        for workload in workloads(shapes, device.multiprocessors):
            progress(workload.name)
            rows += measure(workload, device, kernels, clock)
        return rows

    frame, rows = framed(device, find, progress, work, options.repeat, options.least_us, options.bandwidth_bytes)
    copy, read = frame["bandwidth"]["copy"], frame["bandwidth"]["read"]
    for row in rows:
        row |= {"of_copy_bandwidth": row["bytes_per_s"] / copy, "of_read_bandwidth": row["bytes_per_s"] / read}
    return {
        "format": FORMAT,
        **frame,
        "options": asdict(options),
        "kernels": rows,
        "torch": None,  # what benchmarks/gpu_kernels.py adds
    }


def measure(workload: Workload, device: Device, kernels: Kernels, clock: Clock) -> list[dict[str, Any]]:
    """A row for each of its cases. Raises BackendError."""
    count = sets_for(workload.nbytes, device.l2_bytes)
    memory = Sets(device, workload.rotated, workload.shared, count, clock.stream)
    try:
        return [_row(workload, case, memory, kernels, clock) for case in workload.cases]
    finally:
        memory.free()


def _row(workload: Workload, case: Case, memory: Sets, kernels: Kernels, clock: Clock) -> dict[str, Any]:
    launches = [case.launches(at) for at in memory.addresses]
    timing = clock.measure([_together([kernels.prepare(launch) for launch in one]) for one in launches])
    seconds = timing.p50_us / 1e6
    return {
        "group": case.group,
        "name": workload.name,
        **workload.sizes,
        "rows": case.rows,
        "launches": [launch.kernel for launch in launches[0]],
        "default": case.default,
        "p50_us": timing.p50_us,
        "p95_us": timing.p95_us,
        "bytes": case.nbytes,
        "bytes_per_s": case.nbytes / seconds,
        "flops": case.flops,
        "flops_per_s": case.flops / seconds,
        "sets": len(launches),
        "samples_us": list(timing.samples_us),
    }


def _together(launches: list[PreparedLaunch]) -> Work:
    def work(stream: Stream) -> None:
        for launch in launches:
            launch.launch(stream)

    return work
