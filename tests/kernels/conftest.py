"""Kernels compiled for the CPU once a session, and memory of its own for every test."""

from __future__ import annotations

import pytest

from tests.kernels.host import ORDERS, Compiled, HostKernels


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=ORDERS)
def kernels(request: pytest.FixtureRequest, compiled: Compiled) -> HostKernels:
    """Runs a test three times, with the threads of a block in three orders."""
    return HostKernels(compiled, request.param)


@pytest.fixture
def shuffled(compiled: Compiled) -> HostKernels:
    """Runs a test once: for shapes that are large."""
    return HostKernels(compiled, "shuffled")
