"""The facade over the real PyCUDA and fake_driver/. test_pycuda.py runs this file, in a process of its own."""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cuda_engines import bundle_of, open_gpu
from tests.kernels.host import Compiled
from tests.kernels.on_device import DeviceKernels, host_find
from tests.kernels.test_bench_kernels import OPTIONS, TINY
from tests.kernels.test_device_kernels import N, Sums, compute_in_a_graph, on_host
from tests.test_bench_decoder import OPTIONS as SMALL
from tests.test_bench_decoder import TINY as DECODER
from vila_edge.bench.decoder.run import bench_decoder
from vila_edge.bench.kernels import run
from vila_edge.engine.cuda import open_device
from vila_edge.engine.cuda.kernels import Kernels
from vila_edge.engine.cuda.pycuda_device import PycudaDevice
from vila_edge.errors import BackendError
from vila_edge.kernels import w4
from vila_edge.kernels.epilogue import Epilogue
from vila_edge.sampler import Sampling

FAKE = ctypes.CDLL("libcuda.so.1")
HELD = ("memory", "pinned", "streams", "events", "modules", "graphs", "contexts")


def held() -> dict[str, int]:
    """What the driver has handed out and not got back."""
    return {kind: FAKE.ve_fake_count(kind.encode()) for kind in HELD}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert held() == dict.fromkeys(HELD, 0)


@pytest.fixture
def device() -> Iterator[PycudaDevice]:
    with open_device() as device:
        yield device


@pytest.fixture
def kernels(device: PycudaDevice, compiled: Compiled) -> DeviceKernels:
    return on_host(device, compiled)


def test_a_launch_computes(kernels: DeviceKernels) -> None:
    sums = Sums(kernels)
    kernels.run(sums.launch())
    sums.check_once()


def test_a_graph_computes_with_what_it_finds_at_each_launch(kernels: DeviceKernels) -> None:
    compute_in_a_graph(kernels)


def test_shared_memory_above_48_kib_is_asked_for(kernels: DeviceKernels) -> None:
    sums = Sums(kernels)
    wide = w4.gemm(sums.weight, sums.x.address, sums.y.address, 1, Epilogue(N), tokens=128)
    assert kernels.loaded._manifest[wide.kernel].shared_memory > 48 << 10
    kernels.run(wide)
    sums.check_once()
    with pytest.raises(BackendError, match="cannot use kernel ve_gemm_w4a16_128x128: .*invalid argument"):
        kernels.loaded._modules["gemm_w4a16.cu"].kernel(wide.kernel, (256, 1, 1), 200 << 10)


def test_closing_gives_everything_back(kernels: DeviceKernels, device: PycudaDevice) -> None:
    sums, stream = Sums(kernels), kernels.stream
    ready, *_ = kernels.loaded.prepare(sums.launch()), device.pinned((8,), np.int64), device.event()
    with stream.capture() as capture:
        ready.launch(stream)
    before = held()
    assert all(before.values()), before
    device.close()
    assert held() == dict.fromkeys(HELD, 0)
    for use in (lambda: device.alloc(1), device.stream, lambda: kernels.run(sums.launch())):
        with pytest.raises(AssertionError, match="the device is closed"):
            use()
    assert capture.graph is not None
    with pytest.raises(AssertionError, match="the device is closed"):
        capture.graph.launch(stream)


def test_another_thread_may_close_the_device() -> None:
    device = open_device()
    device.alloc(64), device.stream()
    thread = threading.Thread(target=device.close)
    thread.start()
    thread.join()
    assert held() == dict.fromkeys(HELD, 0)


def test_kernels_that_were_freed_are_unloaded_and_not_launched(kernels: DeviceKernels, device: PycudaDevice) -> None:
    ready = kernels.loaded.prepare(Sums(kernels).launch())
    assert held()["modules"] == 1
    kernels.loaded.free()
    kernels.loaded.free()
    assert held()["modules"] == 0
    with device.current(), pytest.raises(AssertionError, match="the module was freed"):
        ready.launch(kernels.stream)


def test_a_launch_that_the_driver_refuses_is_told(kernels: DeviceKernels, device: PycudaDevice) -> None:
    sums = Sums(kernels)
    ready = kernels.loaded.prepare(sums.launch())
    with pytest.raises(
        BackendError, match=r"cannot launch ve_gemv_w4a16_r1 on a grid \(2, 1, 1\): .*invalid device context"
    ):
        ready.launch(kernels.stream)
    kernel = kernels.loaded._kernels["ve_gemv_w4a16_r1"]
    with device.current(), pytest.raises(BackendError, match="invalid argument"):
        kernel.prepare((1, 1, 1), b"too few").launch(kernels.stream)
    kernels.run(sums.launch())
    sums.check_once()


def test_what_fails_on_the_gpu_is_told_to_whoever_waits(kernels: DeviceKernels, device: PycudaDevice) -> None:
    sums = Sums(kernels)
    nowhere = w4.gemv(sums.weight, 4096, sums.y.address, 1, Epilogue(N))
    kernels.loaded.run([nowhere], kernels.stream)
    with pytest.raises(BackendError, match="the GPU failed: cuStreamSynchronize failed: unspecified launch failure"):
        kernels.stream.synchronize()


def test_code_is_not_loaded_within_a_capture(kernels: DeviceKernels) -> None:
    sums = Sums(kernels)
    with pytest.raises(BackendError, match="does not take the kernels: .*capturing"), kernels.stream.capture():
        kernels.loaded.prepare(sums.launch())
    kernels.run(sums.launch())  # the stream is as it was
    sums.check_once()


@pytest.mark.parametrize(
    ("code", "message"),
    [(b"\x7fELF of another GPU\0", "no kernel image is available"), (b".version 99\0", "invalid image")],
)
def test_code_that_the_driver_does_not_take_is_told(device: PycudaDevice, code: bytes, message: str) -> None:
    with pytest.raises(BackendError, match=f"the driver does not take the kernels: .*{message}") as caught:
        device.load_module(code)
    assert "vila-edge[kernels]" in caught.value.hint and "update the driver" in caught.value.hint


def test_copies_beyond_memory_are_refused(device: PycudaDevice) -> None:
    stream, buffer, host = device.stream(), device.alloc(64), device.pinned((65,), np.uint8)
    with pytest.raises(BackendError, match="cannot copy to the GPU"):
        device.copy_to_device_async(buffer.address, host, stream)
    with pytest.raises(BackendError, match="cannot copy from the GPU"):
        device.copy_to_host_async(host, buffer.address, stream)
    with pytest.raises(BackendError, match="cannot fill"):
        device.memset(buffer.address, 0, 65, stream)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("version", 11020, "made for CUDA 11.2, expected 11.4 or newer"),
        ("devices", 0, "there is no GPU 0: CUDA finds 0"),
    ],
)
def test_a_driver_that_does_not_do_is_told(setting: str, value: int, message: str) -> None:
    usual = FAKE.ve_fake_count(setting.encode())
    FAKE.ve_fake_set(setting.encode(), ctypes.c_longlong(value))
    try:
        with pytest.raises(BackendError, match=message):
            open_device()
    finally:
        FAKE.ve_fake_set(setting.encode(), ctypes.c_longlong(usual))


def test_a_module_without_the_kernel_is_told(kernels: DeviceKernels) -> None:
    sums = Sums(kernels)
    kernels.run(sums.launch())
    with pytest.raises(BackendError, match="cannot use kernel ve_nothing: .*named symbol not found"):
        kernels.loaded._modules["gemv_w4a16.cu"].kernel("ve_nothing", (32, 1, 1))


class Foreign:
    """A stream that PyCUDA knows nothing of."""

    def __init__(self) -> None:
        self.stream = ctypes.c_void_p()
        assert FAKE.cuStreamCreate(ctypes.byref(self.stream), 0) == 0

    def add(self, address: int, value: int, nbytes: int) -> None:
        assert FAKE.cuMemsetD8Async(ctypes.c_ulonglong(address), value, ctypes.c_size_t(nbytes), self.stream) == 0

    def close(self) -> None:
        assert FAKE.cuStreamDestroy_v2(self.stream) == 0


@pytest.mark.parametrize("times", [1, 2])  # the stand-in and its events are there already the second time
@pytest.mark.parametrize("at_once", [True, False])
def test_work_keeps_its_place_on_a_stream_of_another_library(
    kernels: DeviceKernels, device: PycudaDevice, times: int, at_once: bool
) -> None:
    sums, loaded, kept = Sums(kernels), kernels.loaded, device.alloc(2 * N)
    with device.current():
        foreign = Foreign()
        handle = int(foreign.stream.value or 0)
        for _ in range(times):
            foreign.add(kept.address, 0xFF, 2 * N)
            foreign.add(sums.y.address, 0, 2 * N)
            with device.foreign(handle) as stream:
                assert stream.handle != handle
                loaded.run([sums.launch()], stream)
                device.copy_on_device_async(kept.address, sums.y.address, 2 * N, stream)
                if at_once:
                    stream.synchronize()
            foreign.add(sums.y.address, 0xFF, 2 * N)
        assert FAKE.cuStreamSynchronize(foreign.stream) == 0
        foreign.close()
    assert np.isnan(sums.y.numpy().astype(np.float32)).all()
    device.copy_on_device_async(sums.y.address, kept.address, 2 * N, kernels.stream)
    sums.check_once()


def test_a_stream_of_the_device_stands_for_itself(device: PycudaDevice) -> None:
    stream = device.stream()
    with device.foreign(stream.handle) as found:
        assert found is stream
    assert held()["events"] == 0


def test_events_tell_how_long_work_took(kernels: DeviceKernels, device: PycudaDevice) -> None:
    sums, stream, events = Sums(kernels), kernels.stream, [device.event() for _ in range(3)]
    events[0].record(stream)
    kernels.loaded.run([sums.launch()] * 4, stream)
    events[1].record(stream)
    events[2].record(stream)
    with pytest.raises(BackendError, match="the GPU tells no time: .*not ready"):
        events[1].since_us(events[0])
    stream.synchronize()
    assert events[1].since_us(events[0]) > 10 * events[2].since_us(events[1]) >= 0
    events[0].free()
    events[0].free()
    assert held()["events"] == 2


def test_kernels_are_measured(device: PycudaDevice, compiled: Compiled) -> None:
    """All of `vila-edge bench kernels` on small models: what it needs of PyCUDA and of the driver is there."""
    assert (device.multiprocessors, device.l2_bytes) == (16, 4 << 20)
    shapes = dataclasses.replace(TINY, batches=(1,), tokens=(33,), images=(1,))
    before = held()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "sets_for", lambda nbytes, l2_bytes: 2)
        found = run.bench_kernels(device, shapes, dataclasses.replace(OPTIONS, repeat=1), find=host_find(compiled))
    assert held() == before
    assert {row["group"] for row in found["kernels"]} == {"decode", "prefill", "projector", "other"}
    assert all(row["p50_us"] > 0 and row["of_copy_bandwidth"] > 0 for row in found["kernels"])


def test_a_decoder_is_measured(device: PycudaDevice, compiled: Compiled) -> None:
    """All of `vila-edge bench decoder` on a small model."""
    case = dataclasses.replace(SMALL, contexts=(8,), batches=(2,), kv_caches=("int8",))
    before = held()
    found = bench_decoder(device, [DECODER], case, find=host_find(compiled))
    assert held() == before
    (row,) = found["models"]
    (step,) = row["decode"]
    assert min(step["p50_ms"], step["gpu"]["p50_ms"], step["of_copy_bandwidth"], row["prefill"][0]["p50_ms"]) > 0


def test_two_sets_of_kernels_on_one_device(device: PycudaDevice, kernels: DeviceKernels) -> None:
    sums, other = Sums(kernels), Kernels(device, kernels.loaded._find)
    other.prepare(sums.launch())
    other.free()
    kernels.run(sums.launch())
    sums.check_once()


def test_a_token_of_the_cuda_engine_asks_the_driver_for_one_launch(compiled: Compiled, tmp_path: Path) -> None:
    """It allocates nothing and waits for nothing: all it does else is to ask whether the stream is done."""
    bundle = bundle_of("llama", tmp_path)
    with open_gpu(bundle, compiled, tmp_path) as engine:
        cache = engine.new_cache(40)
        engine.forward(engine.embed_tokens([5, 6, 7]), cache)
        tokens = engine.generate(3, cache, Sampling(), 1)
        next(tokens)
        counters = ("graph launches", "waits", "allocations")
        before = {name: FAKE.ve_fake_count(name.encode()) for name in counters}
        for _ in range(20):
            next(tokens)
        spent = {name: FAKE.ve_fake_count(name.encode()) - count for name, count in before.items()}
    assert spent == {"graph launches": 20, "waits": 0, "allocations": 0}
