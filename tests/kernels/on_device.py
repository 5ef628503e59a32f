"""The same as HostKernels, on a device: what a test does with kernels on the CPU, it can do through a driver."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tests.kernels.host import Compiled
from vila_edge.engine.cuda.device import Device
from vila_edge.engine.cuda.kernels import Find, Kernels
from vila_edge.kernels import store
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.manifest import Manifest
from vila_edge.kernels.store import Image, Version


class DeviceArray:
    """An array on a device."""

    def __init__(self, kernels: DeviceKernels, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.device, self.stream = kernels.device, kernels.stream
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.address = self.device.alloc(max(1, math.prod(shape) * self.dtype.itemsize)).address

    def set(self, values: NDArray[Any]) -> None:
        staged = self.device.pinned(self.shape, self.dtype)
        staged[...] = values
        self.device.copy_to_device_async(self.address, staged, self.stream)
        self.stream.synchronize()
        self.device.unpin(staged)

    def numpy(self) -> NDArray[Any]:
        """A copy, when all work is done."""
        staged = self.device.pinned(self.shape, self.dtype)
        self.device.copy_to_host_async(staged, self.address, self.stream)
        self.stream.synchronize()
        values = staged.copy()
        self.device.unpin(staged)
        return values


class DeviceKernels:
    """Memory of a device, and launches on one stream of it. All of it goes with the device."""

    def __init__(self, device: Device, find: Find = store.find) -> None:
        self.device, self.stream, self.loaded = device, device.stream(), Kernels(device, find)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """An array of NaN."""
        array = DeviceArray(self, shape, dtype)
        self.device.memset(array.address, 0xFF, max(1, math.prod(shape) * array.dtype.itemsize), self.stream)
        return array

    def put(self, values: NDArray[Any]) -> DeviceArray:
        array = DeviceArray(self, values.shape, values.dtype)
        array.set(values)
        return array

    def run(self, launch: Launch) -> None:
        self.loaded.run([launch], self.stream)
        self.stream.synchronize()


def find_on(compiled: Compiled) -> Find:
    """What finds kernels for the device that `open_device` gives: a GPU, or the CPU behind a fake driver."""
    return host_find(compiled) if os.environ.get("VILA_EDGE_FAKE_DRIVER") else store.find


def host_find(compiled: Compiled) -> Find:
    """What finds kernels that were compiled for the CPU, for the devices that are none."""

    def find(manifest: Manifest, file: str, compute_capability: Version, driver: Version) -> Image:
        assert (compute_capability, driver) == ((8, 7), (12, 6))
        return Image(compiled.image(file), "built", "built for the CPU")

    return find
