"""What TensorRT has for plugins, for a fake module of it; and engines of the fake one that are one plugin.

As strict as the real one: every base has to be initialised, a name is registered once, attributes of a node come with
a zero behind them, and an engine has nothing of a plugin but what that serialised.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from tests.fake_cuda import POISON, FakeBuffer, FakeDevice
from tests.fake_tensorrt import Context, DataType, Engine, Runtime
from vila_edge.engine.tensorrt_plugin import NAMESPACE, VERSION

MAGIC = b"fake plugin "
_ONNX = {1: "tensor(float)", 10: "tensor(float16)"}


class TensorFormat(Enum):
    LINEAR, HWC = range(2)


class PluginFieldType(Enum):
    CHAR, INT32 = range(2)


class PluginField:
    def __init__(self, name: str, data: NDArray[Any], kind: PluginFieldType) -> None:
        self.name, self.data, self.type = name, data, kind


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        assert creator.initialised == 1 and creator.plugin_namespace == namespace
        return self.creators.setdefault((creator.name, creator.plugin_version, namespace), creator) is creator


def _base(name: str) -> type:
    """A class of TensorRT's that has to be initialised."""

    def init(self: Any) -> None:
        self.initialised = getattr(self, "initialised", 0) + 1

    return type(name, (), {"__init__": init})


def add_plugins(module: ModuleType, device: FakeDevice) -> ModuleType:
    """Make a fake TensorRT know plugins."""
    registry = Registry()
    bases = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One")
    module.__dict__.update({name: _base(name) for name in bases})
    module.__dict__.update(
        PluginField=PluginField,
        PluginFieldCollection=list,
        PluginFieldType=PluginFieldType,
        TensorFormat=TensorFormat,
        DimsExprs=lambda size: [None] * size,
        get_plugin_registry=lambda: registry,
        Runtime=lambda logger: PluginRuntime(logger, device, registry),
    )
    return module


def plugin_plan(trt: ModuleType, graph: Path, images: int) -> bytes:
    """Read a graph that is one plugin, ask the plugin all that a builder asks, and serialise it."""
    model = onnx.load(graph)
    plugin = _made(trt.get_plugin_registry(), model, {a.name: a.s + b"\0" for a in _node(model).attribute}).clone()
    assert plugin.initialised == 4 and plugin.num_outputs == 1
    weights, (x,), (out,) = _weights(model), model.graph.input, model.graph.output
    types = [DataType.HALF, *(_type(w) for w in weights), DataType.HALF]
    assert plugin.get_output_data_types(types[:-1]) == [DataType.HALF]
    shape = ("images", *_dims(x)[1:])
    expressions = SimpleNamespace(constant=lambda size: size)
    (found,) = plugin.get_output_shapes([shape, *(w.shape for w in weights)], [], expressions)
    assert tuple(found) == _dims(out)
    for position, wanted in enumerate(types):
        for kind in (DataType.HALF, DataType.FLOAT):
            for layout in TensorFormat:
                tensors = [SimpleNamespace(desc=SimpleNamespace(type=kind, format=layout)) for _ in types]
                takes = plugin.supports_format_combination(position, tensors, len(types) - 1)
                assert takes == (kind is wanted and layout is TensorFormat.LINEAR)
    largest = SimpleNamespace(max=(images, *shape[1:]))
    scratch = plugin.get_workspace_size([largest], [])
    fields = {field.name: field.data.tobytes().hex() for field in plugin.get_fields_to_serialize()}
    return MAGIC + json.dumps({"graph": str(graph), "images": images, "scratch": scratch, "fields": fields}).encode()


class PluginRuntime(Runtime):
    def __init__(self, logger: Any, device: FakeDevice, registry: Registry) -> None:
        super().__init__(logger, device, None)
        self.registry = registry

    def deserialize_cuda_engine(self, serialized: bytes) -> Engine | None:
        if not serialized.startswith(MAGIC):
            return super().deserialize_cuda_engine(serialized)
        try:
            return PluginEngine(self, json.loads(serialized[len(MAGIC) :]))
        except Exception as error:  # TensorRT says no more than that
            self.error(f"Error Code 4: the plugin was not created ({type(error).__name__})")
            return None


class PluginEngine(Engine):
    def __init__(self, runtime: PluginRuntime, said: dict[str, Any]) -> None:
        self.runtime, self._weights, self.weights = runtime, 0, list[FakeBuffer]()
        model = onnx.load(said["graph"])
        fields = {name: bytes.fromhex(value) for name, value in said["fields"].items()}
        self.plugin = _made(runtime.registry, model, fields)
        self.weights = [runtime.device.alloc(array.nbytes) for array in _weights(model)]
        for buffer, array in zip(self.weights, _weights(model), strict=True):
            buffer.content[...] = array.reshape(-1).view(np.uint8)
        nodes = (*model.graph.input, *model.graph.output)
        self.tensors = {
            node.name: SimpleNamespace(shape=list(_dims(node)), type=_ONNX[node.type.tensor_type.elem_type])
            for node in nodes
        }
        self.inputs, self.num_io_tensors = {node.name for node in model.graph.input}, len(nodes)
        shapes = [_dims(node)[1:] for node in model.graph.input]
        self.profiles = [
            {name: [(n, *shape) for n in (1, said["images"], said["images"])]}
            for name, shape in zip(self.inputs, shapes, strict=True)
        ]
        self.device_memory_size_v2 = said["scratch"]

    def __del__(self) -> None:
        for buffer in self.weights:
            buffer.free()

    def create_execution_context(self, how: Any) -> Context:
        return PluginContext(self, self.plugin.attach_to_context(None))


class PluginContext(Context):
    def __init__(self, engine: PluginEngine, plugin: Any) -> None:
        super().__init__(engine)
        self.plugin, self.weights = plugin, [buffer.address for buffer in engine.weights]

    def execute_async_v3(self, stream: int) -> bool:
        x, out = self._tensors().values()
        if self.scratch:
            self.device.view(self.scratch, self.engine.device_memory_size_v2).fill(POISON)
        described = [SimpleNamespace(dims=x.shape)]
        try:
            self.plugin.enqueue(described, [], [x.address, *self.weights], [out.address], self.scratch, stream)
        except Exception:
            return self._refuse("Error Code 2: enqueue of a plugin failed")
        return True


def _made(registry: Registry, model: onnx.ModelProto, fields: dict[str, bytes]) -> Any:
    creator = registry.creators[_node(model).op_type, VERSION, NAMESPACE]
    given = [PluginField(n, np.frombuffer(v, np.int8), PluginFieldType.CHAR) for n, v in fields.items()]
    return creator.create_plugin("a name", given, None)


def _node(model: onnx.ModelProto) -> onnx.NodeProto:
    (node,) = (node for node in model.graph.node if node.domain == NAMESPACE)
    return node


def _weights(model: onnx.ModelProto) -> Sequence[NDArray[Any]]:
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return [stored[name] for name in _node(model).input[1:]]


def _type(array: NDArray[Any]) -> DataType:
    return DataType.HALF if array.dtype == np.float16 else DataType.FLOAT


def _dims(node: onnx.ValueInfoProto) -> tuple[Any, ...]:
    return tuple(d.dim_param or d.dim_value for d in node.type.tensor_type.shape.dim)
