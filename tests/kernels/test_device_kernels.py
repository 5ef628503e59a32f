"""Launches on a device, which here is host memory: what is loaded, when, and what a graph of launches computes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.fake_cuda import FakeDevice
from tests.kernels.host import Compiled
from tests.kernels.on_device import DeviceKernels, host_find
from tests.kernels.oracle import dequantize, halves, product, random_int4
from vila_edge.engine.cuda.device import Device
from vila_edge.engine.cuda.kernels import Kernels
from vila_edge.errors import BackendError
from vila_edge.kernels import w4
from vila_edge.kernels.epilogue import Epilogue
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.manifest import Manifest
from vila_edge.kernels.store import Image, Version
from vila_edge.kernels.w4_layout import pack, plain_order

N, K = 32, 256


class Sums:
    """y [1, N] += x [1, K] weight^T, on a device."""

    def __init__(self, kernels: DeviceKernels) -> None:
        rng = np.random.default_rng(0)
        weight = random_int4(rng, N, K)
        packed = pack(weight, plain_order(N))
        qweight, scales, qzeros = (kernels.put(a).address for a in (packed.qweight, packed.scales, packed.qzeros))
        self.weight, self.exact = w4.Weight(qweight, scales, qzeros, packed.rows, packed.columns), dequantize(weight)
        self.xs = [halves(rng, 1, K), halves(rng, 1, K)]
        self.x, self.y = kernels.put(self.xs[0]), kernels.put(np.zeros((1, N), np.float16))

    def launch(self, tiles: int = 1) -> Launch:
        end = Epilogue(N, residual=self.y.address)
        return w4.gemv(self.weight, self.x.address, self.y.address, 1, end, tiles=tiles)

    def check_once(self) -> None:
        product(self.exact, self.xs[0]).check(self.y.numpy())

    def check_both(self) -> None:
        """After a launch with each of `xs`."""
        first = product(self.exact, self.xs[0]).value.astype(np.float16)
        (product(self.exact, self.xs[1]) + first).check(self.y.numpy())


def on_host(device: Device, compiled: Compiled) -> DeviceKernels:
    """Kernels that were compiled for the CPU, in place of those for a GPU."""
    return DeviceKernels(device, host_find(compiled))


def compute_in_a_graph(kernels: DeviceKernels) -> None:
    """Capture a copy and a launch, and launch the graph twice with other values on the host."""
    sums, device, stream = Sums(kernels), kernels.device, kernels.stream
    staged, ready = device.pinned((1, K), np.float16), kernels.loaded.prepare(sums.launch())
    with stream.capture() as capture:
        device.copy_to_device_async(sums.x.address, staged, stream)
        with device.current():
            ready.launch(stream)
    assert capture.graph is not None and not sums.y.numpy().any(), "a capture does nothing yet"
    for x in sums.xs:
        staged[...] = x
        capture.graph.launch(stream)
        stream.synchronize()
    sums.check_both()
    capture.graph.free()


@pytest.fixture
def kernels(compiled: Compiled) -> DeviceKernels:
    return on_host(FakeDevice(), compiled)


def test_a_file_is_loaded_once_when_it_is_first_needed(kernels: DeviceKernels) -> None:
    device, sums = kernels.device, Sums(kernels)
    assert isinstance(device, FakeDevice) and device.calls["load_module"] == 0
    kernels.run(sums.launch())
    sums.check_once()
    sums.x.set(sums.xs[1])
    kernels.run(sums.launch(tiles=2))  # another kernel of the file
    sums.check_both()
    assert (device.calls["load_module"], device.calls["kernel"]) == (1, 2)
    assert [*kernels.loaded.images] == ["gemv_w4a16.cu"]
    assert kernels.loaded.images["gemv_w4a16.cu"].why == "built for the CPU"


def test_a_graph_computes_with_what_it_finds_at_each_launch(kernels: DeviceKernels) -> None:
    compute_in_a_graph(kernels)


def test_a_launch_is_prepared_outside_of_a_capture_on_a_current_device(kernels: DeviceKernels) -> None:
    sums = Sums(kernels)
    with pytest.raises(AssertionError, match="a capture loads no code"), kernels.stream.capture():
        kernels.loaded.prepare(sums.launch())
    ready = kernels.loaded.prepare(sums.launch())
    with pytest.raises(AssertionError, match="needs the device to be current"):
        ready.launch(kernels.stream)


def test_what_was_freed_is_not_run(kernels: DeviceKernels) -> None:
    kernels.loaded.run([Sums(kernels).launch()], kernels.stream)
    kernels.loaded.free()
    with pytest.raises(AssertionError, match="the module was freed"):
        kernels.stream.synchronize()


def test_code_for_a_gpu_is_none_for_the_host() -> None:
    def find(manifest: Manifest, file: str, compute_capability: Version, driver: Version) -> Image:
        return Image(b"\x7fELF", "shipped", "")

    launch = w4.gemv(w4.Weight(0, 0, 0, N, K), 0, 0, 1, Epilogue(N))
    with pytest.raises(BackendError, match="no kernel image"):
        Kernels(FakeDevice(), find).prepare(launch)
