"""The graphs of the `tensorrt` dialect run in onnxruntime on the CPU, with the kv_cache kept as an engine would."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from vila_edge import bindings
from vila_edge.bundle import Bundle
from vila_edge.engine.onnxruntime_session import session
from vila_edge.engine.tensorrt_options import COMPONENTS, BuildOptions, graph_bindings
from vila_edge.errors import BackendError
from vila_edge.export.engines import write_files
from vila_edge.export.tensorrt_ops import ScatterOps

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
FloatArray = NDArray[np.float32]


@functools.cache
def has_tensor_scatter() -> bool:
    """Whether this onnxruntime runs graphs of opset 24; 1.23, the last for Python 3.10, does not."""
    tensors = [make_tensor_value_info(name, FLOAT, [1, 1, size, 2]) for name, size in (("past", 4), ("new", 1))]
    index, present = make_tensor_value_info("index", INT64, [1]), make_tensor_value_info("present", FLOAT, [1, 1, 4, 2])
    node = make_node("TensorScatter", ["past", "new", "index"], ["present"], axis=2)
    graph = make_graph([node], "probe", [*tensors, index], [present])
    model = make_model(graph, opset_imports=[make_opsetid("", ScatterOps.opset)], ir_version=ScatterOps.ir_version)
    try:
        session(model.SerializeToString(), Path(), Path("probe"), threads=1)
    except BackendError:
        return False
    return True


class GraphRunner:
    """A sequence at a time; the new positions go behind those that came before."""

    def __init__(self, bundle: Bundle, options: BuildOptions, folder: Path) -> None:
        self.cfg, self.options = bundle.config, options
        self.graphs: dict[str, Path] = {}
        for component in COMPONENTS:
            (folder / component).mkdir(parents=True)
            self.graphs[component] = write_files(bundle, component, options, folder / component)
            for link in filter(Path.is_symlink, list((folder / component).iterdir())):
                target = link.resolve()  # TensorRT follows links, onnxruntime leaves no folder
                link.unlink()
                shutil.copy(target, link)
        self._sessions = {
            name: session(graph.read_bytes(), graph.parent, graph, threads=1) for name, graph in self.graphs.items()
        }
        self.reset()

    def reset(self) -> None:
        self.length = 0
        heads, dim, capacity = self.cfg.llm.num_key_value_heads, self.cfg.llm.head_dim, self.options.context
        shape = (1, heads, capacity, dim) if self.options.form == "scatter" else (1, capacity, heads, dim)
        inputs = graph_bindings(self.cfg, "decoder", self.options).inputs
        # What lies behind the filled part must not be seen, whatever it is.
        self.cache = {b.name: np.full(shape, 9, np.float16) for b in inputs if b.name.startswith("past_")}

    def encode_images(self, pixel_values: FloatArray) -> FloatArray:
        return self._run("vision_tower", {bindings.PIXEL_VALUES: pixel_values})[0].astype(np.float32)

    def project(self, features: FloatArray) -> FloatArray:
        inputs = {bindings.IMAGE_FEATURES: features.astype(np.float16)}
        return self._run("mm_projector", inputs)[0].astype(np.float32)

    def forward(self, inputs_embeds: FloatArray, logits_to_keep: Sequence[int]) -> FloatArray:
        start, stop = self.length, self.length + len(inputs_embeds)
        scatter = self.options.form == "scatter"
        inputs = {
            bindings.INPUTS_EMBEDS: inputs_embeds[None].astype(np.float16),
            bindings.POSITION_IDS: np.arange(start, stop, dtype=np.int64)[None],
            bindings.LOGITS_TO_KEEP: np.asarray(logits_to_keep, np.int64),
        }
        inputs |= {name: buffer if scatter else buffer[:, :start] for name, buffer in self.cache.items()}
        logits, *new = self._run("decoder", inputs)
        for name, values in zip(self.cache, new, strict=True):
            if scatter:
                self.cache[name] = values
            else:
                self.cache[name][:, start:stop] = values
        self.length = stop
        assert logits.dtype == np.float32
        return logits[0]

    def _run(self, component: str, inputs: dict[str, Any]) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = self._sessions[component].run(None, inputs)
        return found
