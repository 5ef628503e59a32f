"""A module like `tensorrt` whose engines are ONNX files, run by onnxruntime in the memory of a FakeDevice.

It refuses what the real one refuses or must not be asked: shapes out of the profile, tensors without an address,
addresses that are not aligned, no scratch memory, no current device, a first run in a capture.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.fake_cuda import POISON, FakeDevice, as_array
from vila_edge.engine.cuda.device import ALIGNMENT

Ranges = dict[str, tuple[tuple[int, ...], ...]]  # input -> smallest, most likely and largest shape
MAGIC = b"fake engine "


class DataType(Enum):
    FLOAT, HALF, INT32, INT64 = range(4)


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING = range(3)


class ILogger:
    Severity = Severity

    def log(self, severity: Enum, message: str) -> None:
        raise NotImplementedError


_TYPES = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int64)": DataType.INT64}
_NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT64: np.int64}


def plan(graph: Path, profiles: Sequence[Ranges], scratch: int = 4096, weights: int = 1000) -> bytes:
    """A serialised engine of an ONNX file, whose weights lie beside it."""
    said = {"graph": str(graph), "profiles": list(profiles), "scratch": scratch, "weights": weights}
    return MAGIC + json.dumps(said).encode()


def make_module(
    device: FakeDevice,
    version: str = "10.16.0",
    name: str = "tensorrt",
    capturable: Callable[[], bool] | None = None,
) -> ModuleType:
    """The module; its runtime lives on `device`. `capturable`: what contexts say, which those of TensorRT do not."""
    module = ModuleType(name)
    module.__dict__.update(
        __version__=version,
        ILogger=ILogger,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        DynamicShapesKernelSpecializationStrategy=DynamicShapesKernelSpecializationStrategy,
        Runtime=lambda logger: Runtime(logger, device, capturable),
    )
    return module


class Runtime:
    def __init__(self, logger: ILogger, device: FakeDevice, capturable: Callable[[], bool] | None) -> None:
        assert device.depth, "no device is current"
        self.logger, self.device, self.capturable = logger, device, capturable

    def error(self, message: str) -> None:
        self.logger.log(Severity.ERROR, message)

    def deserialize_cuda_engine(self, serialized: bytes) -> Engine | None:
        assert self.device.depth, "no device is current"
        if not serialized.startswith(MAGIC):
            self.error("Error Code 1: Serialization (Magic tag does not match)")
            return None
        said = json.loads(serialized[len(MAGIC) :])
        if said["weights"] > self.device.memory()[0]:
            self.error("Error Code 2: OutOfMemory (Requested size was too large)")
            return None
        return Engine(self, said)


class Engine:
    """Its weights are on the device as long as the object lives."""

    def __init__(self, runtime: Runtime, said: dict[str, Any]) -> None:
        self.runtime, self._weights = runtime, int(said["weights"])
        runtime.device.reserved += self._weights
        path = Path(said["graph"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        self.session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        self.profiles = [{n: [tuple(s) for s in r] for n, r in ranges.items()} for ranges in said["profiles"]]
        self.device_memory_size_v2 = int(said["scratch"])
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.tensors = {node.name: node for node in (*inputs, *outputs)}
        self.inputs = {node.name for node in inputs}
        self.num_io_tensors = len(self.tensors)

    def __del__(self) -> None:
        self.runtime.device.reserved -= self._weights

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self.tensors[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self.tensors[name].shape)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return self.profiles[profile][name]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: ExecutionContextAllocationStrategy | RuntimeConfig) -> Context:
        assert self.runtime.device.depth, "no device is current"
        strategy = how.strategy if isinstance(how, RuntimeConfig) else how
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.runtime.device.calls["context"] += 1
        self.runtime.device.calls["eager context"] += isinstance(how, RuntimeConfig) and how.is_eager
        return Context(self)


class RuntimeConfig:
    """TensorRT-RTX's choices for a context."""

    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    @property
    def is_eager(self) -> bool:
        return self.dynamic_shapes_kernel_specialization_strategy is DynamicShapesKernelSpecializationStrategy.EAGER

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> bool:
        return True


@dataclasses.dataclass
class Tensor:
    """What one run reads or writes."""

    dtype: Any
    shape: tuple[int, ...]
    address: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def overlaps(self, other: Tensor) -> bool:
        return self.address < other.address + other.nbytes and other.address < self.address + self.nbytes


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.device = engine, engine.runtime.device
        self.profile, self.scratch = 0, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.warm: set[str] = set()  # shapes that were run before
        if (capturable := engine.runtime.capturable) is not None:
            self.is_stream_capturable = lambda stream: stream in self.device.streams and capturable()

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream in self.device.streams and self.device.depth
        self.profile = profile
        return profile < len(self.engine.profiles)

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % ALIGNMENT == 0 and size >= self.engine.device_memory_size_v2
        self.device.view(address, size)
        self.scratch = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.profiles[self.profile][name]
        within = len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )
        if not within:
            return self._refuse(f"Error Code 3: {name} {shape} is not in {smallest}..{largest}")
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address == 0 or address % ALIGNMENT:
            return self._refuse(f"Error Code 3: {name} at {address:#x} is not aligned to {ALIGNMENT} bytes")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.device.depth, "no device is current"
        if not self.scratch and self.engine.device_memory_size_v2:
            return self._refuse("Error Code 3: no device memory was set")
        for name, node in self.engine.tensors.items():
            if name not in self.addresses:
                return self._refuse(f"Error Code 3: {name} has no address")
            if name in self.engine.inputs and name not in self.shapes:
                if not all(isinstance(d, int) for d in node.shape):
                    return self._refuse(f"Error Code 3: {name} has no shape")
                self.shapes[name] = tuple(node.shape)
        if self.device.capturing and str(self.shapes) not in self.warm:
            return self._refuse("Error Code 1: shapes that were not run before cannot be captured")
        self.warm.add(str(self.shapes))
        self.device.calls["execute"] += 1
        tensors = self._tensors()
        self._check_places(tensors)
        self.device.enqueue(stream, lambda: self._run(tensors))
        return True

    def _tensors(self) -> dict[str, Tensor]:
        """Shapes of outputs follow from those of inputs."""
        sizes = dict[str, int]()
        for name in self.engine.inputs:
            for dimension, size in zip(self.engine.tensors[name].shape, self.shapes[name], strict=True):
                if isinstance(dimension, str):
                    assert sizes.setdefault(dimension, size) == size, (name, dimension)
        found = {}
        for name, node in self.engine.tensors.items():
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in node.shape)
            found[name] = Tensor(_NUMPY[_TYPES[node.type]], shape, self.addresses[name])
        return found

    def _check_places(self, tensors: dict[str, Tensor]) -> None:
        """All within allocations; an output that is an input's new state is in its place, no other touches one."""
        for name, tensor in tensors.items():
            self.device.view(tensor.address, tensor.nbytes)
            if name in self.engine.inputs:
                continue
            for other, place in tensors.items():
                if name == other.replace("past_", "present_") and name != other:
                    assert tensor.address == place.address, f"{name} is not in the place of {other}"
                elif name != other:
                    assert not tensor.overlaps(place), f"{name} overlaps {other}"

    def _run(self, tensors: dict[str, Tensor]) -> None:
        arrays = {n: as_array(self.device.view(t.address, t.nbytes), t.dtype, t.shape) for n, t in tensors.items()}
        outputs = [name for name in tensors if name not in self.engine.inputs]
        found = self.engine.session.run(outputs, {name: arrays[name].copy() for name in self.engine.inputs})
        if self.scratch:
            self.device.view(self.scratch, self.engine.device_memory_size_v2).fill(POISON)
        for name, values in zip(outputs, found, strict=True):
            assert values.shape == tensors[name].shape and values.dtype == tensors[name].dtype, name
            arrays[name][...] = values

    def _refuse(self, message: str) -> bool:
        self.engine.runtime.error(message)
        return False
