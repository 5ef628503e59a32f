"""Code that travels in the wheel: the layout of `_kernels/cubin`, and what decides whether it fits the sources.

index.json                what was built, by which compiler, from which sources, and what each kernel takes of a GPU
<file>.<sm_87>.cubin      code for one GPU
<file>.<compute_80>.ptx   what the driver makes code of for any newer one
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from vila_edge import fsio
from vila_edge.errors import BackendError
from vila_edge.kernels.cuobjdump import Resources
from vila_edge.kernels.manifest import Manifest
from vila_edge.kernels.nvrtc import OPTIONS, SOURCE_LIMIT
from vila_edge.plain import from_plain

FOLDER = "cubin"  # in the folder of the manifest
INDEX = "index.json"
_LIMIT = 64 << 20  # bytes of a file of code


@dataclass(frozen=True)
class Shipped:
    """A file of `FOLDER`."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Sources:
    """What was built of a file of src/: `digest` of all that the compiler read, and the code by architecture."""

    digest: str
    images: dict[str, Shipped]


@dataclass(frozen=True)
class Index:
    nvrtc: str
    files: dict[str, Sources]
    resources: dict[str, dict[str, Resources]]  # architecture -> kernel -> ...


def code_name(file: str, architecture: str) -> str:
    """gemv.cu, sm_87 -> gemv.sm_87.cubin."""
    return f"{Path(file).stem}.{architecture}.{'ptx' if architecture.startswith('compute_') else 'cubin'}"


def source_digest(manifest: Manifest, file: str) -> str:
    """sha256 of a source, of every header it may include, and of the compiler's options. Raises InputError."""
    digest = hashlib.sha256(" ".join(OPTIONS).encode())
    for path in [manifest.source(file), *sorted(manifest.include.glob("*"))]:
        content = fsio.read_bytes(path, SOURCE_LIMIT, follow_links=True)
        digest.update(f"\n{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def read_index(manifest: Manifest) -> Index | None:
    """What this vila-edge came with; None if it came without, as a checkout does. Raises InputError."""
    path = manifest.root / FOLDER / INDEX
    if not path.is_file():
        return None
    return from_plain(Index, fsio.read_json(path), str(path))


def read_code(manifest: Manifest, shipped: Shipped) -> bytes:
    """A file of code. Raises BackendError if it is not the one of the index."""
    path = manifest.root / FOLDER / shipped.name
    code = fsio.read_bytes(path, _LIMIT, follow_links=True)
    if hashlib.sha256(code).hexdigest() != shipped.sha256:
        raise BackendError(f"{path} was changed since it was built", "pip install --force-reinstall vila-edge")
    return code
