"""Kernels built ahead of time, into what the wheel ships."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vila_edge import fsio
from vila_edge.kernels.cuobjdump import Resources, resources
from vila_edge.kernels.manifest import Manifest
from vila_edge.kernels.nvrtc import Nvrtc, dotted, find_nvrtc
from vila_edge.kernels.shipped import INDEX, Index, Shipped, Sources, code_name, source_digest


def shipping_nvrtc(manifest: Manifest) -> Nvrtc:
    """The compiler that the manifest names: another one may need more registers. Raises BackendError."""
    wanted = manifest.toolchain.nvrtc
    return find_nvrtc(lambda version: dotted(version) == wanted, wanted)


def compile_all(manifest: Manifest, nvrtc: Nvrtc, architectures: Iterable[str]) -> Iterator[tuple[str, str, bytes]]:
    """File of src/, architecture, code. Raises BackendError for what does not build."""
    tasks = [(file, architecture) for file in manifest.files for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC lets other threads run
        codes = pool.map(lambda task: nvrtc.compile(manifest.source(task[0]), manifest.include, task[1]), tasks)
        for (file, architecture), code in zip(tasks, codes, strict=True):
            yield file, architecture, code


def build_ahead(manifest: Manifest, nvrtc: Nvrtc, target: Path) -> Index:
    """Every file for every architecture, and for those to come, into a folder that this makes. Raises VilaEdgeError."""
    toolchain = manifest.toolchain
    files = {file: Sources(source_digest(manifest, file), {}) for file in manifest.files}
    taken: dict[str, dict[str, Resources]] = {architecture: {} for architecture in toolchain.architectures}
    with fsio.new_folder(target, replace=True) as folder:
        for file, architecture, code in compile_all(manifest, nvrtc, (*toolchain.architectures, toolchain.ptx)):
            path = folder / code_name(file, architecture)
            fsio.write_bytes(path, code)
            files[file].images[architecture] = Shipped(path.name, hashlib.sha256(code).hexdigest())
            if architecture in taken:
                taken[architecture] |= resources(path)
        index = Index(dotted(nvrtc.version), files, taken)
        fsio.write_bytes(folder / INDEX, fsio.json_bytes(dataclasses.asdict(index)))
    return index
