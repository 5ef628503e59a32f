"""Kernels compiled for the CPU, and memory of its own for every test; or a GPU, with `-m gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.host import ORDERS, Compiled, HostKernels
from tests.kernels.on_device import DeviceKernels, find_on
from tests.kernels.runner import Runner
from vila_edge.engine.cuda import open_device

GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=[*ORDERS, GPU])
def kernels(request: pytest.FixtureRequest, compiled: Compiled) -> Iterator[Runner]:
    """Runs a test three times on the CPU, with the threads of a block in three orders, and once on a GPU."""
    yield from _runner(request.param, compiled)


@pytest.fixture(params=["shuffled", GPU])
def shuffled(request: pytest.FixtureRequest, compiled: Compiled) -> Iterator[Runner]:
    """Runs a test once on the CPU, for shapes that are large, and once on a GPU."""
    yield from _runner(request.param, compiled)


def _runner(place: str, compiled: Compiled) -> Iterator[Runner]:
    if place != "gpu":
        yield HostKernels(compiled, place)  # type: ignore[arg-type]
        return
    with open_device() as device:
        yield DeviceKernels(device, find_on(compiled))
