"""In which form every parameter of a bundle is stored, and in which file: decided before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vila_edge import architecture, kv_scales, stored
from vila_edge.bundle import EMBED_TOKENS_FILE, KV_SCALES_FILE, WEIGHTS
from vila_edge.config import VilaConfig
from vila_edge.export.graph_ops import StoredTensor
from vila_edge.export.onnxruntime_ops import ROPE_COS, ROPE_SIN
from vila_edge.parameters import component, is_quantised, linears, parameter_shapes, storage_order
from vila_edge.stored import Form
from vila_edge.tensorfile import Spec, layout


@dataclass(frozen=True)
class Storage:
    """The forms of the parts of a model. `other`: norms, biases, embeddings and the linears that are named nowhere."""

    decoder: Form = "int4"  # the linears of the decoder blocks
    lm_head: Form = "fp16"  # with tied embeddings, the table
    vision: Form = "fp16"  # the linears of vision_tower and mm_projector
    other: Form = "fp16"
    group_size: int = 128
    symmetric: bool = False


class StoragePlan:
    """Every tensor of the weights of a bundle: its type, its shape, its file and its place there."""

    def __init__(self, cfg: VilaConfig, storage: Storage) -> None:
        self.cfg, self.storage = cfg, storage
        self.shapes = parameter_shapes(cfg)
        self._linears = linears(cfg)
        self.files: dict[str, dict[str, Spec]] = {}
        self.parameters: dict[str, list[str]] = {}  # of each file
        for name, shape in self.shapes.items():
            file = file_of(name)
            specs = stored.specs(name, shape, self.form(name), storage.group_size, storage.symmetric)
            self.files.setdefault(file, {}).update(specs)
            self.parameters.setdefault(file, []).append(name)
        table = ("F32", (cfg.llm.context_length, cfg.llm.head_dim // 2))
        self.files[LLM_FILE] |= {ROPE_COS: table, ROPE_SIN: table}
        self.files[KV_SCALES_FILE] = kv_scales.specs(cfg.llm)
        self.files = {
            file: {name: specs[name] for name in sorted(specs, key=storage_order)} for file, specs in self.files.items()
        }

    def form(self, name: str) -> Form:
        """How a parameter is stored."""
        if is_quantised(name):
            return self.storage.decoder
        head = f"{architecture.EMBED_TOKENS}.weight" if self.cfg.llm.tie_word_embeddings else "llm.lm_head.weight"
        if name == head:
            return self.storage.lm_head
        if component(name) in ("vision_tower", "mm_projector") and self._is_linear_weight(name):
            return self.storage.vision
        return self.storage.other

    def places(self) -> dict[str, StoredTensor]:
        """Where each tensor will lie."""
        return {
            name: StoredTensor(Path(file).name, entry)
            for file, specs in self.files.items()
            for name, entry in layout(specs)[1].items()
        }

    def parameter_bytes(self) -> int:
        """What the parameters take in their forms, with scales and zero points, and nothing else."""
        others = {ROPE_COS, ROPE_SIN, *self.files[KV_SCALES_FILE]}
        tensors = (pair for file in self.files.values() for pair in layout(file)[1].items())
        return sum(entry.length for name, entry in tensors if name not in others)

    def _is_linear_weight(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self._linears


LLM_FILE = f"{WEIGHTS}/llm.safetensors"  # what belongs to no block: the last norm, lm_head, the rope tables


def layer_file(layer: int) -> str:
    """The file of a decoder block's weights."""
    return f"{WEIGHTS}/llm.layers.{layer:03}.safetensors"


def file_of(name: str) -> str:
    """The file of the bundle that holds a parameter, or a tensor beside them."""
    if name.startswith(architecture.EMBED_TOKENS):
        return EMBED_TOKENS_FILE
    if name.startswith(kv_scales.PREFIX):
        return KV_SCALES_FILE
    if name.startswith(f"{architecture.LLM}.layers."):
        return layer_file(int(name.removeprefix(f"{architecture.LLM}.layers.").partition(".")[0]))
    return LLM_FILE if component(name) == "llm" else f"{WEIGHTS}/{component(name)}.safetensors"
