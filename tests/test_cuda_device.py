"""The CUDA facade: its errors without a GPU, the rules of the fake device, and on a GPU the real one."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.fake_cuda import POISON, FakeDevice
from vila_edge.engine.cuda import open_device, pycuda_device
from vila_edge.engine.cuda.device import ALIGNMENT, Arena, Device, Staging, nbytes
from vila_edge.engine.cuda.pycuda_device import PycudaDevice
from vila_edge.errors import BackendError

# without a GPU


class FakeDriver:
    """As much of `pycuda.driver` as it takes to fail."""

    class Error(Exception):
        pass

    def __init__(self, devices: int = 1, version: int = 12060, init: str = "", free: int = 1000) -> None:
        self.version, self.init_error, self.free = version, init, free
        self.pushed = 0
        context = SimpleNamespace(push=self._push, detach=lambda: None)
        device = SimpleNamespace(
            name=lambda: "Orin", compute_capability=lambda: (8, 7), retain_primary_context=lambda: context
        )
        self.Device: Any = type("Device", (), {"__new__": lambda _, index: device, "count": lambda: devices})
        self.Context = SimpleNamespace(pop=self._pop)

    def _push(self) -> None:
        self.pushed += 1

    def _pop(self) -> None:
        self.pushed -= 1

    def init(self) -> None:
        if self.init_error:
            raise self.Error(self.init_error)

    def get_driver_version(self) -> int:
        return self.version

    def mem_get_info(self) -> tuple[int, int]:
        assert self.pushed
        return self.free, 2 * self.free

    def mem_alloc(self, nbytes: int) -> Any:
        assert self.pushed
        if nbytes > self.free:
            raise self.Error("cuMemAlloc failed: out of memory")
        self.free -= nbytes
        return Allocation(self, nbytes)


class Allocation:
    def __init__(self, driver: FakeDriver, nbytes: int) -> None:
        self.driver, self.nbytes = driver, nbytes

    def __int__(self) -> int:
        return 512

    def free(self) -> None:
        assert self.driver.pushed
        self.driver.free += self.nbytes


@contextlib.contextmanager
def driver(monkeypatch: pytest.MonkeyPatch, fake: Any) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=fake))
        patch.setitem(sys.modules, "pycuda.driver", fake)
        patch.setattr(pycuda_device, "Libcuda", lambda: SimpleNamespace(pop_context=lambda: None))
        yield


@pytest.mark.parametrize(
    ("fake", "message", "remedy"),
    [
        (None, "the package pycuda is not installed", "pip install pycuda"),
        (FakeDriver(init="cuInit failed: no device"), "CUDA does not start: cuInit failed: no device", "onnxruntime"),
        (FakeDriver(devices=0), "there is no GPU 0: CUDA finds 0", "nvidia-smi"),
        (FakeDriver(version=11020), "made for CUDA 11.2, expected 11.4 or newer", "update the driver"),
    ],
)
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, fake: Any, message: str, remedy: str) -> None:
    with driver(monkeypatch, fake), pytest.raises(BackendError, match=message) as caught:
        open_device()
    assert remedy in caught.value.hint


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("libcuda.so.1: cannot open shared object file", "there is no NVIDIA driver: libcuda.so.1: cannot open"),
        ("libboost.so: undefined symbol: x", "PyCUDA does not load: libboost.so"),
    ],
)
def test_a_pycuda_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch, reason: str, message: str) -> None:
    def fail(name: str) -> None:
        raise ImportError(reason)

    monkeypatch.setattr("vila_edge.engine.cuda.pycuda_device.importlib.import_module", fail)
    with pytest.raises(BackendError, match=message):
        open_device()


def test_too_little_memory_says_how_much_was_asked_and_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver(free=1_000_000)
    with driver(monkeypatch, fake), open_device() as device:
        with pytest.raises(BackendError, match="no room for 2,000,000 bytes: 1,000,000 of 2,000,000 are free"):
            device.alloc(2_000_000)
        assert fake.pushed == 0
        assert (device.name, device.compute_capability) == ("Orin", (8, 7))


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("cuModuleLoadDataEx failed: out of memory", "end other programs that use the GPU"),
        ("cuModuleLoadDataEx failed: no kernel image is available for execution on the device", "update the driver"),
        ("cuModuleLoadDataEx failed: the provided PTX was compiled with an unsupported toolchain", "update the driver"),
    ],
)
def test_kernels_that_do_not_load_are_told(monkeypatch: pytest.MonkeyPatch, reason: str, remedy: str) -> None:
    class Refusing(FakeDriver):
        def module_from_buffer(self, code: bytes) -> None:
            raise self.Error(reason)

    with driver(monkeypatch, Refusing()), open_device() as device:
        with pytest.raises(BackendError, match=f"the driver does not take the kernels: {reason}") as caught:
            device.load_module(b"code")
        assert remedy in caught.value.hint and device.owned == {}


def test_memory_is_freed_once_by_its_owner_or_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver()
    with driver(monkeypatch, fake):
        device = open_device()
        first, _ = device.alloc(100), device.alloc(200)
        first.free()
        first.free()
        assert fake.free == 800
        device.close()
        device.close()
    assert (fake.free, fake.pushed) == (1000, 0)


# what is built on a device


def test_an_arena_is_one_allocation_with_aligned_pieces() -> None:
    device: Device = FakeDevice()
    assert isinstance(device, FakeDevice)
    arena = Arena(device, {"a": 1, "b": 0, "c": 300, "d": 4})
    assert device.calls["alloc"] == 1
    assert [arena[name] - arena["a"] for name in "abcd"] == [0, 256, 512, 1024]
    assert device.used == 1280 and arena["a"] % ALIGNMENT == 0
    arena.free()
    assert device.used == 0


def test_an_arena_is_several_allocations_where_one_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arena, "limit", 768)
    device = FakeDevice(total=3000)
    stream = device.stream()
    arena = Arena(device, {"a": 512, "b": 256, "c": 512, "d": 1000, "e": 256})
    assert [buffer.nbytes for buffer in device.buffers.values()] == [768, 512, 1024, 256]
    arena.clear(stream)
    stream.synchronize()
    for name, size in {"a": 512, "b": 256, "c": 512, "d": 1000, "e": 256}.items():
        assert (device.view(arena[name], size) == 0).all()
    arena.free()
    with pytest.raises(BackendError, match="no room for"):
        Arena(device, dict.fromkeys("abcd", 768))
    assert device.used == 0


def test_staging_copies_what_a_shape_has_and_no_more() -> None:
    device = FakeDevice()
    stream = device.stream()
    staging = Staging(device, {"x": ((1, 4, 2), "float16")})
    staging.host["x"][:] = 7
    staging.to_device("x", (1, 3, 2), stream)
    assert (device.view(staging.memory["x"], 16) == POISON).all(), "nothing is done before somebody waits"
    stream.synchronize()
    assert device.view(staging.memory["x"], 16).view(np.float16)[:6].tolist() == [7] * 6
    staging.host["x"][:] = 0
    staging.to_host("x", (1, 2, 2), stream)
    stream.synchronize()
    assert staging.host["x"].reshape(-1).tolist() == [7, 7, 7, 7, 0, 0, 0, 0]
    staging.free()
    with pytest.raises(AssertionError, match="not pinned"):
        staging.to_device("x", (1, 3, 2), stream)


def test_sizes() -> None:
    assert nbytes((2, 3, 4), "float16") == 48
    assert nbytes((), "int64") == 8
    assert nbytes((100_000, 100_000), np.float32) == 40_000_000_000


# on a GPU


@pytest.fixture
def gpu() -> Iterator[PycudaDevice]:
    pytest.importorskip("pycuda", reason="PyCUDA is not installed")
    with open_device() as device:
        yield device


@pytest.mark.gpu
def test_memory_goes_there_and_back(gpu: PycudaDevice) -> None:
    free, total = gpu.memory()
    assert 0 < free <= total and gpu.name and gpu.compute_capability >= (5, 0)
    stream, buffer = gpu.stream(), gpu.alloc(4096)
    assert buffer.address % ALIGNMENT == 0
    there, back = gpu.pinned((16, 8), np.float16), gpu.pinned((16, 8), np.float16)
    there[:] = np.arange(128).reshape(16, 8)
    gpu.copy_to_device_async(buffer.address, there, stream)
    gpu.copy_on_device_async(buffer.address + 1024, buffer.address, there.nbytes, stream)
    gpu.copy_to_host_async(back, buffer.address + 1024, stream)
    stream.synchronize()
    np.testing.assert_array_equal(back, there)
    gpu.memset(buffer.address, 0, 128, stream)
    gpu.copy_to_host_async(back, buffer.address, stream)
    stream.synchronize()
    np.testing.assert_array_equal(back, np.where(np.arange(128).reshape(16, 8) < 64, 0, there))
    buffer.free()
    gpu.unpin(there)


@pytest.mark.gpu
def test_a_captured_graph_reads_the_host_when_it_is_launched(gpu: PycudaDevice) -> None:
    stream, buffer = gpu.stream(), gpu.alloc(1024)
    there, back = gpu.pinned((8,), np.int64), gpu.pinned((8,), np.int64)
    there[:], back[:] = 1, 0
    with stream.capture() as capture:
        gpu.memset(buffer.address, 0, 64, stream)
        gpu.copy_to_device_async(buffer.address, there[:4], stream)
        gpu.copy_to_host_async(back, buffer.address, stream)
    stream.synchronize()
    assert capture.graph is not None and back.tolist() == [0] * 8, "a capture does nothing yet"
    for value in (2, 3):
        there[:], back[:] = value, -1
        capture.graph.launch(stream)
        stream.synchronize()
        assert back.tolist() == [value] * 4 + [0] * 4
    capture.graph.free()


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_stream_usable(gpu: PycudaDevice) -> None:
    stream, buffer, back = gpu.stream(), gpu.alloc(64), gpu.pinned((64,), np.uint8)
    with pytest.raises(KeyError), stream.capture():
        raise KeyError
    gpu.memset(buffer.address, 5, 64, stream)
    gpu.copy_to_host_async(back, buffer.address, stream)
    stream.synchronize()
    assert (back == 5).all()


@pytest.mark.gpu
def test_any_thread_may_use_the_device(gpu: PycudaDevice) -> None:
    stream, back = gpu.stream(), gpu.pinned((64,), np.uint8)

    def work() -> None:
        buffer = gpu.alloc(64)
        gpu.memset(buffer.address, 9, 64, stream)
        gpu.copy_to_host_async(back, buffer.address, stream)
        stream.synchronize()
        buffer.free()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (back == 9).all()


@pytest.mark.gpu
def test_more_than_the_gpu_has_is_refused(gpu: PycudaDevice) -> None:
    _, total = gpu.memory()
    with pytest.raises(BackendError, match=f"the GPU has no room for {2 * total:,} bytes"):
        gpu.alloc(2 * total)
