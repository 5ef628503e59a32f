"""A bundle: the directory that an export writes and a device reads. docs/bundle.md has every field.

    manifest.json                          what is in it, and the sha256 of every other file
    tokenizer.json
    weights/*.safetensors                  the only copy of the weights
    graphs/<dialect>/*.onnx                thin graphs whose initialisers lie in weights/
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vila_edge import fsio
from vila_edge.config import VilaConfig, from_plain
from vila_edge.errors import BundleError, ConfigError, InputError

FORMAT = "vila-edge bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "weights"
GRAPHS = "graphs"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_EXPORT_AGAIN = "copy the whole bundle again, or export it again: vila-edge export CHECKPOINT -o BUNDLE"


class Bundle:
    """An opened bundle. All of its files are there, and are what the manifest says."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        """For internal use: `open` checks first."""
        self.path = path
        self.manifest = manifest
        self.config = from_plain(VilaConfig, manifest["config"], f"{path / MANIFEST}: config")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Raises BundleError that names the file if anything is missing, added or changed."""
        folder = Path(path)
        manifest = _read_manifest(folder)
        _check_files(folder, manifest["files"])
        try:
            return cls(folder, manifest)
        except ConfigError as error:
            raise BundleError(error.message, "the bundle was made by another version: export it again") from None

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def digest(self) -> str:
        """sha256 that stands for the whole bundle, as hex."""
        return str(self.manifest["digest"])

    @property
    def quantization(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.manifest["quantization"]
        return found

    def file(self, name: str) -> Path:
        """Path of a file of the manifest. Raises BundleError if there is none of that name."""
        if name not in self.manifest["files"]:
            raise BundleError(f"{self.path}: the bundle has no file {name!r}", _EXPORT_AGAIN)
        return self.path / name

    def tokenizer_json(self) -> str:
        return fsio.read_bytes(self.file(TOKENIZER), 64 << 20).decode()


def write_manifest(
    folder: Path,
    name: str,
    config: VilaConfig,
    quantization: Mapping[str, Any],
    provenance: Mapping[str, Any],
    license_note: str,
    parity: Mapping[str, Any],
) -> None:
    """Seal a folder: the manifest lists all that is in it. A manifest already there is replaced."""
    files = {
        name: {"sha256": fsio.sha256(folder / name), "size": (folder / name).stat().st_size}
        for name in sorted(_walk(folder))
        if name != MANIFEST
    }
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": name,
        "config": dataclasses.asdict(config),
        "quantization": quantization,
        "provenance": provenance,
        "license": license_note,
        "parity": parity,
        "files": files,
    }
    fsio.replace_bytes(folder / MANIFEST, fsio.json_bytes({**manifest, "digest": _digest(manifest)}))


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(fsio.json_bytes(rest)).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: no such directory, expected a bundle", "make one: vila-edge export CHECKPOINT -o BUNDLE"
        )
    if not path.is_file():
        if (folder / "config.json").is_file():
            raise BundleError(
                f"{folder} is a checkpoint, expected a bundle", f"export it first: vila-edge export {folder} -o BUNDLE"
            )
        raise BundleError(f"{folder} has no {MANIFEST}: not a bundle, or only a part of one", _EXPORT_AGAIN)
    try:
        manifest = fsio.read_json(path)
    except InputError as error:
        raise BundleError(error.message, _EXPORT_AGAIN) from None
    if manifest.get("format") != FORMAT:
        raise BundleError(f"{path}: 'format' is {manifest.get('format')!r}, expected {FORMAT!r}", _EXPORT_AGAIN)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path}: 'format_version' is {manifest.get('format_version')!r}, this version reads {FORMAT_VERSION}",
            "export the checkpoint again with this version of vila-edge",
        )
    # The digest covers the file byte by byte: it has exactly one way to be written.
    if manifest.get("digest") != _digest(manifest) or path.read_bytes() != fsio.json_bytes(manifest):
        raise BundleError(f"{path}: changed since the export (its digest does not match)", _EXPORT_AGAIN)
    return manifest


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Names, kinds and sizes of all files first, then their content."""
    for name, entry in files.items():
        path = folder / name
        if not _NAME.fullmatch(name) or not _HEX_DIGEST.fullmatch(str(entry.get("sha256"))):
            raise BundleError(f"{folder / MANIFEST}: {name!r} is not an entry of a bundle", _EXPORT_AGAIN)
        if path.is_symlink() or any(parent.is_symlink() for parent in list(path.parents)[: name.count("/")]):
            raise BundleError(f"{path}: a link, expected a file of the bundle itself", _EXPORT_AGAIN)
        if not path.is_file():
            raise BundleError(f"{path}: missing from the bundle", _EXPORT_AGAIN)
        if path.stat().st_size != entry.get("size"):
            raise BundleError(
                f"{path}: {path.stat().st_size:,} bytes, the manifest says {entry.get('size'):,}", _EXPORT_AGAIN
            )
    for name in _walk(folder):
        if name not in files and name != MANIFEST:
            raise BundleError(f"{folder / name}: not listed in the manifest", "remove it, or copy the bundle again")
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(files, pool.map(lambda name: fsio.sha256(folder / name), files), strict=True):
            if digest != files[name]["sha256"]:
                raise BundleError(f"{folder / name}: changed since the export (sha256 differs)", _EXPORT_AGAIN)


def _walk(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
