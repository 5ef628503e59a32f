"""What the weights of a bundle hold: every parameter once, in a form that is known, and nothing else.

Only the headers of the files are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vila_edge import int4, int8, kv_scales, stored
from vila_edge.architecture import EMBED_TOKENS
from vila_edge.bundle import EMBED_TOKENS_FILE
from vila_edge.config import VilaConfig
from vila_edge.parameters import Shape, is_quantised, linears, parameter_shapes
from vila_edge.stored import Form
from vila_edge.tensorfile import Spec, TensorEntry, TensorFile

ROPE_TABLES = ("llm.rope.cos", "llm.rope.sin")  # [context, dim / 2], for graphs: no parameters
COMPONENTS = ("vision_tower", "mm_projector", "embed_tokens", "decoder blocks", "lm_head")
MIN_GROUP_SIZE = 16  # inputs, a power of two: what MatMulNBits of onnxruntime takes

Files = Mapping[str, TensorFile]  # by their names in the bundle


@dataclass(frozen=True)
class Part:
    """One parameter as it is stored. `group_size` is that of a quantised form, 0 otherwise."""

    name: str
    shape: Shape
    form: Form
    file: str
    tensors: Mapping[str, TensorEntry]
    group_size: int = 0

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes, with scales and zero points."""
        return sum(entry.length for entry in self.tensors.values())

    @property
    def symmetric(self) -> bool:
        return not any(tensor.endswith(".qzeros") for tensor in self.tensors)


@dataclass
class Inventory:
    """The parameters by name, and what is wrong: pairs of a file's name ("" for none) and what is found there."""

    parts: dict[str, Part] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def parameter_bytes(self) -> int:
        return sum(part.size for part in self.parts.values())


def take_inventory(cfg: VilaConfig, files: Files) -> Inventory:
    """Look every parameter of the architecture up in the headers of the weights."""
    found, shapes = Inventory(), parameter_shapes(cfg)
    places: dict[str, tuple[str, TensorEntry]] = {}
    for file, content in files.items():
        for tensor, entry in content.entries.items():
            if tensor in places:
                found.problems.append((file, f"tensor {tensor!r} is in {places[tensor][0]} too"))
            places.setdefault(tensor, (file, entry))
    quantisable = {f"{name}.weight" for name in linears(cfg)}
    unused = places.keys() - _other_tensors(cfg).keys()
    for name, shape in shapes.items():
        candidates = _candidates(name, name in quantisable) & places.keys()
        if not candidates:
            found.missing.append(name)
            continue
        if len(candidates) > 1:
            found.problems.append(
                (places[min(candidates)][0], f"{name} is stored as {' and as '.join(sorted(candidates))}")
            )
        part, problem = _part(name, shape, min(candidates), places)
        unused -= candidates.union(*map(_parts_of, candidates))
        if problem:
            found.problems.append((part.file, problem))
        else:
            found.parts[name] = part
    found.problems += ((places[tensor][0], f"tensor {tensor!r}: no parameter needs it") for tensor in sorted(unused))
    found.problems += _other_problems(cfg, places)
    table = found.parts.get(f"{EMBED_TOKENS}.weight")
    if table and table.file != EMBED_TOKENS_FILE:
        found.problems.append(
            (table.file, f"{table.name}: expected in {EMBED_TOKENS_FILE}, where tokens are looked up")
        )
    return found


def component(name: str, tied: bool = False) -> str:
    """Which of `COMPONENTS` a parameter is counted to. `tied`: the embedding table is the head."""
    if name.startswith(EMBED_TOKENS):
        return "embed_tokens"
    if name.startswith("llm."):
        return "lm_head" if name.startswith("llm.lm_head") else "decoder blocks"
    return name.partition(".")[0]


def said_otherwise(found: Inventory, cfg: VilaConfig, quantization: Mapping[str, object]) -> Iterator[str]:
    """Fields of the manifest's `quantization` that are not what is stored."""
    blocks = [part for name, part in found.parts.items() if is_quantised(name)]
    tied, table = cfg.llm.tie_word_embeddings, f"{EMBED_TOKENS}.weight"
    head = found.parts.get(table if tied else "llm.lm_head.weight")
    towers = [
        found.parts[f"{name}.weight"].form
        for name in linears(cfg)
        if name.startswith(("vision_tower.", "mm_projector.")) and f"{name}.weight" in found.parts
    ]
    facts: dict[str, set[object]] = {
        "bits": {{"int4": 4, "int8": 8, "fp16": 16, "fp32": 32}[part.form] for part in blocks},
        "group_size": {part.group_size for part in blocks},
        "symmetric": {part.symmetric for part in blocks},
        "lm_head": {head.form} if head else set(),
        "vision": set(towers),
    }
    for key, values in facts.items():
        others = values - {quantization.get(key)}
        if key in quantization and others:
            yield f"quantization.{key} is {quantization[key]!r}, but {sorted(map(str, others))[0]} is stored"


def _candidates(name: str, quantisable: bool) -> set[str]:
    """Tensors of which each would be this parameter, in another form."""
    linear = name.removesuffix(".weight")
    return {name, f"{linear}.qweight", f"{linear}.qweight_int8"} if quantisable else {name}


def _parts_of(tensor: str) -> tuple[str, ...]:
    """The tensors that belong to a parameter whose main tensor this is."""
    linear, _, kind = tensor.rpartition(".")
    return {"qweight": int4.part_names(linear), "qweight_int8": int8.part_names(linear)}.get(kind, (tensor,))


def _part(name: str, shape: Shape, tensor: str, places: Mapping[str, tuple[str, TensorEntry]]) -> tuple[Part, str]:
    """A parameter whose main tensor is `tensor`, and what is wrong with it."""
    file, entry = places[tensor]
    linear, problem, group_size, symmetric = name.removesuffix(".weight"), "", 0, True
    form: Form = "fp16" if entry.dtype == "F16" else "fp32"
    if tensor != name:
        form = "int4" if tensor.endswith(".qweight") else "int8"
        scales = places.get(f"{linear}.scales")
        groups = scales[1].shape[-1] if scales and scales[1].shape else 0
        symmetric = form == "int8" or f"{linear}.qzeros" not in places
        group_size = _group_size(form, shape[1], groups)
        if not group_size:
            problem = f"{linear}.scales: {groups} groups do not divide {shape[1]} inputs" if scales else ""
            problem = problem or f"{linear}.scales: missing"
    expected = {} if problem else stored.specs(name, shape, form, group_size, symmetric)
    tensors = {part: places[part][1] for part in expected or (tensor,) if part in places}
    for part, (dtype, want) in expected.items():
        problem = problem or _tensor_problem(part, (dtype, want), file, places)
    return Part(name, shape, form, file, tensors, group_size), problem


def _group_size(form: Form, columns: int, groups: int) -> int:
    """Inputs that share a scale, or 0 if there is no such number."""
    if form == "int8":
        return int8.GROUP_SIZE
    size = columns // groups if groups and columns % groups == 0 else 0
    return size if size >= MIN_GROUP_SIZE and not size & (size - 1) else 0


def _tensor_problem(tensor: str, spec: Spec, file: str, places: Mapping[str, tuple[str, TensorEntry]]) -> str:
    if tensor not in places:
        return f"{tensor}: missing"
    (dtype, shape), (place, entry) = spec, places[tensor]
    if (entry.dtype, entry.shape) != (dtype, shape):
        return f"{tensor} is {entry.dtype} {list(entry.shape)}, expected {dtype} {list(shape)}"
    return "" if place == file else f"{tensor} is in {place}, expected beside the rest of the parameter"


def _other_tensors(cfg: VilaConfig) -> dict[str, Spec]:
    """What graphs need beside the parameters, and may be there or not."""
    table = ("F32", (cfg.llm.context_length, cfg.llm.head_dim // 2))
    return dict.fromkeys(ROPE_TABLES, table) | kv_scales.specs(cfg.llm)


def _other_problems(cfg: VilaConfig, places: Mapping[str, tuple[str, TensorEntry]]) -> Iterator[tuple[str, str]]:
    for tensor, spec in _other_tensors(cfg).items():
        if tensor in places and (problem := _tensor_problem(tensor, spec, places[tensor][0], places)):
            yield places[tensor][0], problem
