"""The graph of a projector that is one node: our plugin, with the kernels' code in it and the folded weights beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from vila_edge import bindings, fsio
from vila_edge.bundle import Bundle
from vila_edge.engine.cuda import open_device
from vila_edge.engine.cuda.projector import bundle_projector
from vila_edge.engine.tensorrt_options import BuildOptions, graph_bindings, runtime_of
from vila_edge.engine.tensorrt_plugin import NAME, NAMESPACE, Carried, PluginHome, carried
from vila_edge.errors import BackendError
from vila_edge.export.graph_ops import ONNX_TYPES, StoredTensor
from vila_edge.export.tensorrt_alias import name_for_parser
from vila_edge.export.tensorrt_append_ops import AppendOps
from vila_edge.kernels import store
from vila_edge.kernels.manifest import manifest
from vila_edge.kernels.projector import FILE
from vila_edge.kernels.store import Version
from vila_edge.tensorfile import TensorFile, write_tensors

WEIGHTS = "folded.safetensors"


class PluginOps(AppendOps):
    """The plugin's node is none of the architecture's verbs: it is all of them."""

    contrib_opsets = ((NAMESPACE, 1),)


def kernels_code(compute_capability: Version, driver: Version | None = None) -> bytes:
    """Code of the projector's kernels for a GPU. Raises BackendError if there is none.

    `driver`: of that GPU; None if it need not be here, and then it has to take what the compiler that ships makes.
    """
    if driver is None:
        major, _, minor = manifest().toolchain.nvrtc.partition(".")
        driver = int(major), int(minor)
    try:
        return store.find(manifest(), FILE, compute_capability, driver).code
    except BackendError as error:
        hint = f"{error.hint}; or build the projector without them: --projector graph"
        raise BackendError(error.message, hint) from None


def write_plugin(bundle: Bundle, options: BuildOptions, code: bytes, folder: Path) -> Path:
    """Graph and weights of the projector in `folder`; returns the graph's path.

    Raises BackendError if the kernels cannot compute this projector, VilaEdgeError if the folder cannot be written.
    """
    projector = bundle_projector(bundle)
    write_tensors(folder / WEIGHTS, projector.arrays)
    places = {name: StoredTensor(WEIGHTS, entry) for name, entry in TensorFile(folder / WEIGHTS).entries.items()}
    path = folder / "mm_projector.onnx"
    fsio.replace_bytes(path, _graph(bundle, options, carried(projector.shape, code), places))
    return path


@contextlib.contextmanager
def plugin_graph(
    trt: ModuleType, bundle: Bundle, options: BuildOptions, compute_capability: Version | None, folder: Path
) -> Iterator[Path]:
    """The graph, which TensorRT can build within the block: the plugin is registered, and runs if there is its GPU.

    `compute_capability`: of the GPU it is for, None for the one here. Raises BackendError.
    """
    with contextlib.ExitStack() as resources:
        device, errors = None, list[str]()
        if compute_capability is None:
            device = resources.enter_context(open_device())
            code = kernels_code(device.compute_capability, device.driver)
        else:
            code = kernels_code(compute_capability)
        home = PluginHome(trt, device, errors)
        resources.callback(home.free)
        if runtime_of(trt) == "tensorrt_rtx":
            name_for_parser()
        graph = write_plugin(bundle, options, code, folder)
        resources.enter_context(home.serving())
        try:
            yield graph
        except BackendError as error:
            raise BackendError("; ".join([error.message, *dict.fromkeys(errors)]), error.hint) from None


def _graph(bundle: Bundle, options: BuildOptions, plugin: Carried, places: dict[str, StoredTensor]) -> bytes:
    ops = PluginOps(places, graph_bindings(bundle.config, "mm_projector", options), {})
    weights = [
        ops.external(name, places[name], ONNX_TYPES[dtype], shape)
        for name, (shape, dtype) in plugin.about.projector.weights.items()
    ]
    embeds = ops.node(NAME, bindings.IMAGE_FEATURES, *weights, name="mm_projector", domain=NAMESPACE, **plugin.fields)
    ops.output(embeds, bindings.IMAGE_EMBEDS)
    return ops.model("mm_projector")
