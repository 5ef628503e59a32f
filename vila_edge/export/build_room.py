"""Whether a build has room: on the disk for its files, and in memory for TensorRT at work."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from vila_edge import architecture
from vila_edge.bundle import WEIGHTS, Bundle
from vila_edge.engine.plan import available_memory
from vila_edge.errors import BackendError
from vila_edge.parameters import component as component_of
from vila_edge.parameters import parameter_shapes

HALF = 2  # bytes
# Memory of a build in sizes of the weights as the engine holds them, measured with TensorRT-RTX 1.7.1: docs/engines.md.
BUILD_MEMORY = {"vision_tower": 4, "mm_projector": 4, "decoder": 5}


def check_disk(root: Path, bundle: Bundle, components: Sequence[str]) -> None:
    """Raises BackendError unless the converted weights and the engines will fit on the disk, roughly."""
    sizes = [_weight_bytes(bundle, component) for component in components]
    need = sum(sizes) + max(sizes, default=0)  # the weights of one at a time
    free = shutil.disk_usage(root).free
    if need > free:
        raise BackendError(
            f"{root}: engines of {', '.join(components)} and their weights while they are built take about "
            f"{_mib(need)} MiB, {_mib(free)} are free",
            f"free {_mib(need - free)} MiB, or set XDG_CACHE_HOME to a folder on another disk",
        )


def check_memory(bundle: Bundle, components: Sequence[str]) -> None:
    """Raises BackendError if a build would take more memory than there is: the system would end it after minutes."""
    available = available_memory()
    for component in components:
        need = build_memory(bundle, component)
        if available is not None and need > available:
            raise BackendError(
                f"{component}: its build takes about {_mib(need)} MiB of memory, {_mib(available)} are available",
                "end other programs; or, with swap space for the rest: --no-memory-check",
            )


def build_memory(bundle: Bundle, component: str) -> int:
    """Bytes that TensorRT takes while it builds, roughly. 4 and 8 bits stay as they are in the decoder alone."""
    part = "llm" if component == "decoder" else component
    shapes = {name: shape for name, shape in parameter_shapes(bundle.config).items() if component_of(name) == part}
    if not bundle.config.llm.tie_word_embeddings:
        shapes.pop(f"{architecture.EMBED_TOKENS}.weight", None)
    size = HALF * sum(map(math.prod, shapes.values()))
    if component == "decoder":
        size = min(size, _weight_bytes(bundle, component))
    return BUILD_MEMORY[component] * size


def _weight_bytes(bundle: Bundle, component: str) -> int:
    """What the weights of a component take in the bundle."""
    tied = bundle.config.llm.tie_word_embeddings  # the table is the head then
    parts = (("llm", "embed_tokens") if tied else ("llm",)) if component == "decoder" else (component,)
    starts = tuple(f"{WEIGHTS}/{part}." for part in parts)
    return sum(entry.size for name, entry in bundle.manifest.files.items() if name.startswith(starts))


def _mib(size: int) -> str:
    return f"{-(-size >> 20):,}"
