"""Code of a file of kernels for one GPU: shipped, made by the driver, kept from before, or built now.

In this order. What was taken, and why nothing better, is in the result and, unless it is what ships, on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vila_edge.errors import BackendError
from vila_edge.kernels.cache import KernelCache
from vila_edge.kernels.manifest import Manifest
from vila_edge.kernels.nvrtc import INSTALL, Nvrtc, dotted, find_nvrtc
from vila_edge.kernels.shipped import Sources, read_code, read_index, source_digest

Origin = Literal["shipped", "driver", "cache", "built", "engine"]
Version = tuple[int, int]
Say = Callable[[str], object]

_FIRST_PTX = (8, 0)  # kernels use mma.m16n8k16 and cp.async: no GPU older than Ampere runs them


@dataclass(frozen=True)
class Image:
    """Code as the driver loads it, where it is from, and in a sentence why."""

    code: bytes
    origin: Origin
    why: str


def find(
    manifest: Manifest,
    file: str,
    compute_capability: Version,
    driver: Version,
    say: Say = lambda text: sys.stderr.write(f"vila-edge: {text}\n"),
) -> Image:
    """Code of a file of src/ for a GPU like (8, 7), under a driver that is made for CUDA `driver`.

    `say` is told of all but what ships. Raises BackendError that lists what was tried, with the remedy.
    """
    architecture = "sm_{}{}".format(*compute_capability)
    if compute_capability < _FIRST_PTX:
        raise BackendError(
            f"kernels need a GPU of compute capability {dotted(_FIRST_PTX)} or newer, this is {dotted(compute_capability)}",
            "use a backend without them: --backend onnxruntime",
        )
    tried = list[str]()
    image = _shipped(manifest, file, architecture, driver, tried) or _built(manifest, file, architecture, driver, tried)
    if image is None:
        raise _none(file, architecture, driver, tried)
    if image.origin != "shipped":
        say(f"{file} for {architecture}: {image.why}")
    return image


def _shipped(manifest: Manifest, file: str, architecture: str, driver: Version, tried: list[str]) -> Image | None:
    """From the wheel; else adds to `tried` why not."""
    sources, made_by = _matching(manifest, file, tried)
    if sources is None:
        return None
    if exact := sources.images.get(architecture):
        if driver[0] >= made_by[0]:
            return Image(read_code(manifest, exact), "shipped", f"shipped for {architecture}")
        tried.append(f"the shipped code needs a driver for CUDA {made_by[0]}")
        return None
    tried.append(f"none is shipped for {architecture}")
    if ptx := sources.images.get(manifest.toolchain.ptx):
        if driver >= made_by:
            why = f"the driver builds it from {manifest.toolchain.ptx}, as {tried[-1]}"
            return Image(read_code(manifest, ptx), "driver", why)
        tried.append(f"the shipped PTX needs a driver for CUDA {dotted(made_by)}")
    return None


def _matching(manifest: Manifest, file: str, tried: list[str]) -> tuple[Sources | None, Version]:
    """What was shipped of a file, if it is of these sources, and the CUDA that made it."""
    index = read_index(manifest)
    if index is None:
        tried.append("this vila-edge came without built kernels")
        return None, (0, 0)
    sources = index.files.get(file)
    if sources is None or sources.digest != source_digest(manifest, file):
        tried.append("the shipped code is of other sources")
        return None, (0, 0)
    major, _, minor = index.nvrtc.partition(".")
    return sources, (int(major), int(minor))


def _built(manifest: Manifest, file: str, architecture: str, driver: Version, tried: list[str]) -> Image | None:
    """From the cache or, into it, by NVRTC; else adds to `tried` why not."""
    try:
        nvrtc = find_nvrtc(
            lambda version: version[0] <= driver[0], f"one of CUDA {driver[0]} or older, as the driver is"
        )
    except BackendError as error:
        tried.append(error.message)
        return None
    because = "; ".join(tried)
    cache, key = KernelCache(), _key(manifest, file, architecture, nvrtc)
    kept = cache.read(key)
    if kept is not None:
        return Image(kept, "cache", f"built before, {cache.path(key)}, as {because}")
    code = nvrtc.compile(manifest.source(file), manifest.include, architecture)
    try:
        cache.store(key, code)
    except BackendError as error:  # it works without, only slower the next time
        because = f"{because}. It is not kept for next time: {error}"
    return Image(code, "built", f"built with {nvrtc}, as {because}")


def _key(manifest: Manifest, file: str, architecture: str, nvrtc: Nvrtc) -> dict[str, str]:
    digest = source_digest(manifest, file)
    return {"file": file, "sources": digest, "architecture": architecture, "nvrtc": dotted(nvrtc.version)}


def _none(file: str, architecture: str, driver: Version, tried: list[str]) -> BackendError:
    remedy = INSTALL
    if any("needs a driver" in reason for reason in tried):
        remedy = f"update the driver, on Jetson JetPack; or build them here: {INSTALL}"
    return BackendError(f"no code of {file} for {architecture} and CUDA {dotted(driver)}: {'; '.join(tried)}", remedy)
