"""What a TensorRT engine is built with, and which TensorRT is here: shared by those who build and those who run."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from vila_edge import bindings
from vila_edge.bindings import GraphBindings
from vila_edge.config import VilaConfig
from vila_edge.errors import BackendError

KVForm = Literal["scatter", "append"]
Runtime = Literal["tensorrt", "tensorrt_rtx"]
KVChoice = Literal["auto", "scatter", "append"]
RuntimeChoice = Literal["auto", "tensorrt", "tensorrt_rtx"]
ProjectorForm = Literal["graph", "plugin"]
ProjectorChoice = Literal["engine", "kernel"]
TowerChoice = Literal["auto", "tensorrt", "onnxruntime"]  # who runs it beside our own kernels

COMPONENTS = ("vision_tower", "mm_projector", "decoder")
MAX_KEPT = 16  # positions whose logits one call may ask for
SCATTER_SINCE = (10, 15)  # the first TensorRT that the scatter form builds with
RUNTIMES: tuple[Runtime, ...] = ("tensorrt", "tensorrt_rtx")  # the first that is installed is taken
RUNTIME_CHOICES: tuple[RuntimeChoice, ...] = ("auto", *RUNTIMES)
PROJECTOR_CHOICES: tuple[ProjectorChoice, ...] = ("engine", "kernel")
TOWER_CHOICES: tuple[TowerChoice, ...] = ("auto", "tensorrt", "onnxruntime")
PROJECTOR_FORMS: tuple[ProjectorForm, ...] = ("graph", "plugin")
KV_CHOICES: tuple[KVChoice, ...] = ("auto", "scatter", "append")

INSTALL = (
    "on Jetson it comes with JetPack: make the virtual environment with --system-site-packages; "
    "elsewhere: pip install tensorrt, or pip install tensorrt-rtx"
)


@dataclass(frozen=True)
class BuildOptions:
    """Limits that an engine is built for. Whoever asks it for more gets an error, not a slower answer."""

    context: int  # capacity of the kv_cache, positions
    chunk: int = 512  # largest number of new positions of a call (prefill)
    images: int = 1  # largest batch of the vision tower and the projector
    form: KVForm = "scatter"
    workspace: int | None = None  # bytes that TensorRT may use while it builds and runs; None: its own choice
    projector: ProjectorForm = "graph"  # of TensorRT's own layers, or our kernels as a plugin

    def __post_init__(self) -> None:
        for name in ("context", "chunk", "images", "workspace"):
            value = getattr(self, name)
            assert value is None or value > 0, f"{name} {value}: the caller checks what the user says"
        assert self.chunk <= self.context, f"chunk {self.chunk} is more than context {self.context}"


def graph_bindings(cfg: VilaConfig, component: str, options: BuildOptions) -> GraphBindings:
    """Inputs and outputs of a component's engine."""
    if component == "vision_tower":
        return bindings.vision_tower(cfg, "float16")
    if component == "mm_projector":
        return bindings.mm_projector(cfg, "float16")
    return bindings.decoder_append(cfg) if options.form == "append" else bindings.decoder_scatter(cfg, options.context)


def load_tensorrt(name: RuntimeChoice = "auto") -> ModuleType:
    """The module `tensorrt` or `tensorrt_rtx`; `auto` takes the first that is installed.

    Raises BackendError if there is none, or if its libraries do not load.
    """
    reasons = []
    for candidate in RUNTIMES if name == "auto" else (name,):
        try:
            return importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            reasons.append(f"{candidate}: the package {error.name} is not installed")
        except (ImportError, OSError, RuntimeError) as error:  # its libraries: libnvinfer, CUDA
            reasons.append(f"{candidate}: {error}")
    raise BackendError(f"TensorRT does not load: {'; '.join(reasons)}", INSTALL)


def runtime_of(trt: ModuleType) -> Runtime:
    """Which of the two a module is."""
    return "tensorrt_rtx" if trt.__name__ == "tensorrt_rtx" else "tensorrt"


def version_tuple(trt: ModuleType) -> tuple[int, ...]:
    """`10.15.1.29` -> (10, 15, 1, 29)."""
    return tuple(int(number) for number in re.findall(r"\d+", str(trt.__version__))[:4])


def default_form(trt: ModuleType) -> KVForm:
    """The form of the kv_cache that a TensorRT can build: `append` for one that does not know TensorScatter."""
    if runtime_of(trt) == "tensorrt_rtx" or version_tuple(trt) >= SCATTER_SINCE:
        return "scatter"
    return "append"
