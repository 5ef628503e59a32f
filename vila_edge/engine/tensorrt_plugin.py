"""The projector's kernels as a plugin: a node of TensorRT's whose engine carries their code, for the GPU it is built for.

TensorRT asks a registry, one for the process, for whoever makes plugins of a name: when it reads a graph, and again when
it reads an engine. So the maker has to be there before, and `PluginHome.serving` says what its plugins run on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from vila_edge.engine.cuda.device import Device
from vila_edge.engine.cuda.kernels import Kernels
from vila_edge.errors import BackendError, ConfigError
from vila_edge.kernels.manifest import Manifest, manifest
from vila_edge.kernels.projector import FILE, ProjectorShape
from vila_edge.kernels.shipped import source_digest
from vila_edge.kernels.store import Image, Version
from vila_edge.plain import from_plain

NAME, VERSION, NAMESPACE = "MmProjector", "1", "vila_edge"  # of the plugin; the last is the domain of its node, too
CODE, ABOUT = "code", "about"  # attributes of the node, and fields of the plugin
_WITHOUT = "build the projector without it: vila-edge build BUNDLE --projector graph"
_AGAIN = "build it again: vila-edge build BUNDLE --projector plugin"


@dataclass(frozen=True)
class About:
    """What the code is of, and what it is run with."""

    sources: str  # digest: a launch of these sources fits this code, and no other
    code_bytes: int
    projector: ProjectorShape


@dataclass(frozen=True)
class Carried:
    """What a plugin takes along in its engine. Its weights are inputs of the node, constants of the network."""

    about: About
    code: bytes

    @property
    def fields(self) -> dict[str, bytes]:
        return {ABOUT: json.dumps(dataclasses.asdict(self.about), sort_keys=True).encode(), CODE: self.code}


def carried(projector: ProjectorShape, code: bytes) -> Carried:
    """A projector, and code of `FILE` as it is here."""
    return Carried(About(source_digest(manifest(), FILE), len(code), projector), code)


def read_fields(fields: Mapping[str, bytes]) -> Carried:
    """The inverse of `Carried.fields`; a parser of graphs ends each with a zero. Raises BackendError."""
    try:
        about = from_plain(About, json.loads(fields[ABOUT].rstrip(b"\0")), ABOUT)
        code = fields[CODE][: about.code_bytes]
    except (KeyError, ValueError, ConfigError) as error:
        raise BackendError(f"the plugin {NAME} of another version of vila-edge: {error}", _AGAIN) from None
    if about.sources != source_digest(manifest(), FILE):
        raise BackendError(f"the plugin {NAME} carries kernels of other sources than these", _AGAIN)
    return Carried(about, code)


class PluginHome:
    """Where the plugins of a graph or an engine live: the device that runs them, with the code that they brought."""

    def __init__(self, trt: ModuleType, device: Device | None, errors: MutableSequence[str]) -> None:
        """`device` None: nothing is to run. `errors` is told what went wrong in a plugin.

        Raises BackendError if this TensorRT has no plugins in Python.
        """
        self.device, self.errors = device, errors
        self._maker = _maker(trt)
        self._kernels: dict[bytes, Kernels] = {}

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """What is read in the block has its plugins here."""
        before, self._maker.home = self._maker.home, self
        try:
            yield
        finally:
            self._maker.home = before

    def kernels(self, code: bytes) -> Kernels:
        """Of an engine's own code, loaded once for all of its contexts."""

        def find(manifest: Manifest, file: str, compute_capability: Version, driver: Version) -> Image:
            return Image(code, "engine", "the engine carries it")

        assert self.device is not None, "an engine that is built for another GPU does not run"
        if code not in self._kernels:
            self._kernels[code] = Kernels(self.device, find)
        return self._kernels[code]

    def free(self) -> None:
        """Unload the code. Once is enough, more often does no harm."""
        for kernels in self._kernels.values():
            kernels.free()
        self._kernels.clear()


class Plugin:
    """What the plugin does. Its other bases, which are TensorRT's, are known only when that is imported: `_maker`."""

    trt: Any
    bases: tuple[Any, ...]
    num_outputs: int  # no value here: it would hide TensorRT's own attribute

    def __init__(self, carried: Carried, home: PluginHome) -> None:
        for base in self.bases:
            base.__init__(self)  # TensorRT wants each of them
        self.plugin_name, self.plugin_version, self.plugin_namespace, self.num_outputs = NAME, VERSION, NAMESPACE, 1
        self.carried, self.home, self.shape = carried, home, carried.about.projector
        # What TensorRT is given to serialise has to be there as long as the plugin.
        self._fields = {name: np.frombuffer(value, np.uint8) for name, value in carried.fields.items()}

    def get_capability_interface(self, kind: Any) -> Plugin:
        return self

    def clone(self) -> Plugin:
        return type(self)(self.carried, self.home)

    def attach_to_context(self, context: Any) -> Plugin:
        return self.clone()

    def get_fields_to_serialize(self) -> Any:
        trt = self.trt
        kind = trt.PluginFieldType.CHAR
        return trt.PluginFieldCollection([trt.PluginField(name, array, kind) for name, array in self._fields.items()])

    # how it is built

    def get_output_data_types(self, inputs: Sequence[Any]) -> list[Any]:
        return [self.trt.DataType.HALF]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expressions: Any) -> list[Any]:
        dims = self.trt.DimsExprs(3)
        dims[0] = inputs[0][0]
        dims[1], dims[2] = (expressions.constant(size) for size in (self.shape.tokens, self.shape.hidden_size))
        return [dims]

    def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
        """Features, the weights in their order, and embeddings behind them: each in its one type, and plain."""
        types = ["float16", *(dtype for _, dtype in self.shape.weights.values()), "float16"]
        wanted = self.trt.DataType.HALF if types[position] == "float16" else self.trt.DataType.FLOAT
        found = tensors[position].desc
        return bool(found.type == wanted and found.format == self.trt.TensorFormat.LINEAR)

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        pass

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        return self.shape.scratch_bytes(next(iter(inputs[0].max)))

    # how it runs

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        pass

    def set_tactic(self, tactic: int) -> None:
        pass

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Put the launches on TensorRT's stream. What is raised here, TensorRT takes as a run that failed."""
        home = self.home
        try:
            kernels, device = home.kernels(self.carried.code), home.device
            assert device is not None
            (images, *_), (x, *weights), (out,) = tuple(input_desc[0].dims), inputs, outputs
            places = dict(zip(self.shape.weights, weights, strict=True))
            launches = self.shape.launches(places, x, workspace, out, images, multiprocessors=device.multiprocessors)
            with device.foreign(stream) as ours:
                kernels.run(launches, ours)
        except BaseException as error:
            home.errors.append(f"{NAME}: {error}")
            raise


class Maker:
    """What the registry has, in its own words a creator. `home` is that of the plugins that are made now."""

    trt: Any
    base: Any
    plugin: type[Plugin]

    def __init__(self) -> None:
        trt = self.trt
        self.base.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
        none = np.array([])
        fields = [trt.PluginField(name, none, trt.PluginFieldType.CHAR) for name in (ABOUT, CODE)]
        self.field_names = trt.PluginFieldCollection(fields)
        self.home: PluginHome | None = None

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Plugin:
        """What is raised here, TensorRT takes as a plugin that could not be made."""
        assert self.home is not None, "an engine or a graph with the plugin is read within PluginHome.serving"
        try:
            return self.plugin(read_fields({field.name: bytes(field.data.tobytes()) for field in fields}), self.home)
        except BaseException as error:
            self.home.errors.append(str(error))
            raise


@functools.cache
def _maker(trt: ModuleType) -> Maker:
    """The one of a TensorRT, registered. Raises BackendError if that has no plugins in Python, or somebody else's."""
    try:
        bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
        base = trt.IPluginCreatorV3One
    except AttributeError as error:
        raise BackendError(f"{trt.__name__} {trt.__version__} has no plugins in Python: {error}", _WITHOUT) from None
    plugin = type(NAME, (Plugin, *bases), {"trt": trt, "bases": bases})
    maker: Maker = type(f"{NAME}Maker", (Maker, base), {"trt": trt, "base": base, "plugin": plugin})()
    if not trt.get_plugin_registry().register_creator(maker, NAMESPACE):
        raise BackendError(f"{trt.__name__} has another plugin {NAMESPACE}::{NAME} already", _WITHOUT)
    return maker
