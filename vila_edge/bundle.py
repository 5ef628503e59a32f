"""A bundle: the directory that an export writes and a device reads. docs/bundle.md has every field.

manifest.json                          what is in it, and the sha256 of every other file
tokenizer.json
weights/*.safetensors                  the only copy of the weights
graphs/<dialect>/*.onnx                thin graphs whose initialisers lie in weights/
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_edge import fsio
from vila_edge.config import VilaConfig
from vila_edge.errors import BundleError, ConfigError, InputError
from vila_edge.plain import from_plain
from vila_edge.remembered import Remembered

FORMAT = "vila-edge bundle"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "weights"
GRAPHS = "graphs"
EMBED_TOKENS_FILE = f"{WEIGHTS}/embed_tokens.safetensors"  # looked up outside of the graphs
KV_SCALES_FILE = f"{WEIGHTS}/kv_scales.safetensors"  # what a kv_cache in 8 bits needs

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")
_EXPORT_AGAIN = "export the checkpoint again with this version of vila-edge"
_COPY_AGAIN = "copy the whole bundle again, or export it again: vila-edge export CHECKPOINT -o BUNDLE"


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """The fields of manifest.json, as docs/bundle.md explains them."""

    name: str
    config: VilaConfig
    quantization: dict[str, Any]
    provenance: dict[str, Any]
    license: str
    parity: dict[str, Any]
    files: dict[str, FileEntry]
    digest: str  # sha256 that stands for the whole bundle
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. All of its files are there, and are what the manifest says."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Raises BundleError that names the file if anything is missing, added or changed."""
        folder = Path(path)
        manifest = read_manifest(folder)
        for _, problem in file_problems(folder, manifest.files):
            raise problem
        return cls(folder, manifest)

    @classmethod
    @contextlib.contextmanager
    def checked_meanwhile(cls, path: str | os.PathLike[str]) -> Iterator[Bundle]:
        """The bundle, while the bytes of its weights are still being compared with the manifest.

        Everything else is checked before the block begins. When it ends, the weights are what the manifest says, or
        BundleError is raised as by `open`, whatever the block raised. Nothing may be made of them for a user before.
        Weights that nothing touched since they were compared last are not read again.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        weights = {name: entry for name, entry in manifest.files.items() if name.startswith(f"{WEIGHTS}/")}
        for _, problem in file_problems(folder, manifest.files, contents=False):
            raise problem
        for _, problem in _changed(folder, {name: e for name, e in manifest.files.items() if name not in weights}):
            raise problem
        remembered = Remembered(folder)
        weights = {name: entry for name, entry in weights.items() if remembered.digest(name) != entry.sha256}
        before = remembered.states(weights)
        with ThreadPoolExecutor(1) as pool:
            check = pool.submit(lambda: [problem for _, problem in _changed(folder, weights)])
            try:
                yield cls(folder, manifest)
            finally:
                for problem in check.result():
                    raise problem
                remembered.keep({name: entry.sha256 for name, entry in weights.items()}, before)

    @property
    def config(self) -> VilaConfig:
        return self.manifest.config

    def file(self, name: str) -> Path:
        """Path of a file of the manifest. Raises BundleError if there is none of that name."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the bundle has no file {name!r}", _COPY_AGAIN)
        return self.path / name

    def tokenizer_json(self) -> str:
        return fsio.read_text(self.file(TOKENIZER))


def write_manifest(
    folder: Path,
    *,
    name: str,
    config: VilaConfig,
    quantization: dict[str, Any],
    provenance: dict[str, Any],
    license_note: str,
    parity: dict[str, Any],
) -> None:
    """Seal a folder: the manifest lists all that is in it. A manifest already there is replaced."""
    files = {
        file: FileEntry(fsio.sha256(folder / file), (folder / file).stat().st_size)
        for file in _walk(folder)
        if file != MANIFEST
    }
    manifest = Manifest(name, config, quantization, provenance, license_note, parity, files, digest="")
    plain = dataclasses.asdict(manifest)
    fsio.replace_bytes(folder / MANIFEST, fsio.json_bytes(plain | {"digest": _digest(plain)}))


def _digest(plain: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in plain.items() if key != "digest"}
    return hashlib.sha256(fsio.json_bytes(rest)).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """What a bundle says of itself; its files are not looked at. Raises BundleError."""
    try:
        return _read_manifest(folder, folder / MANIFEST)
    except OSError as error:
        raise _cannot_read(folder, error) from None


def _read_manifest(folder: Path, path: Path) -> Manifest:
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: no such directory, expected a bundle", "make one: vila-edge export CHECKPOINT -o BUNDLE"
        )
    if not path.is_file():
        if (folder / "config.json").is_file():
            raise BundleError(
                f"{folder} is a checkpoint, expected a bundle", f"export it first: vila-edge export {folder} -o BUNDLE"
            )
        raise BundleError(f"{folder} has no {MANIFEST}: not a bundle, or only a part of one", _COPY_AGAIN)
    try:
        plain = fsio.read_json(path)
    except InputError as error:
        raise BundleError(error.message, _COPY_AGAIN) from None
    if plain.get("format") != FORMAT:
        raise BundleError(f"{path}: 'format' is {plain.get('format')!r}, expected {FORMAT!r}", _COPY_AGAIN)
    if plain.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path}: 'format_version' is {plain.get('format_version')!r}, this version reads {FORMAT_VERSION}",
            _EXPORT_AGAIN,
        )
    # The digest covers the file byte by byte: its content has exactly one way to be written.
    if plain.get("digest") != _digest(plain) or path.read_bytes() != fsio.json_bytes(plain):
        raise BundleError(f"{path}: changed since the export (its digest does not match)", _COPY_AGAIN)
    try:
        return from_plain(Manifest, plain, str(path))
    except ConfigError as error:
        raise BundleError(error.message, _EXPORT_AGAIN) from None


def file_problems(
    folder: Path, entries: Mapping[str, FileEntry], contents: bool = True
) -> Iterator[tuple[str, BundleError]]:
    """Each file that is not what the manifest says, by name: names, kinds and sizes of all first, then `contents`."""
    sound = dict[str, FileEntry]()
    for name, entry in entries.items():
        problem = _kind_problem(folder, name, entry)
        if problem:
            yield name, problem
        else:
            sound[name] = entry
    for name in _walk(folder):
        if name not in entries and name != MANIFEST:
            yield (
                name,
                BundleError(f"{folder / name}: not listed in the manifest", "remove it, or copy the bundle again"),
            )
    if contents:
        yield from _changed(folder, sound)


def _changed(folder: Path, entries: Mapping[str, FileEntry]) -> Iterator[tuple[str, BundleError]]:
    """Files whose bytes are not those of the manifest."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _sha256(folder / name), entries)
        for (name, entry), digest in zip(entries.items(), digests, strict=True):
            if isinstance(digest, BundleError):
                yield name, digest
            elif digest != entry.sha256:
                yield name, BundleError(f"{folder / name}: changed since the export (sha256 differs)", _COPY_AGAIN)


def _cannot_read(path: Path, error: OSError) -> BundleError:
    return BundleError(f"{path}: {error.strerror or error}", "make it readable: chmod -R u+rX BUNDLE")


def _kind_problem(folder: Path, name: str, entry: FileEntry) -> BundleError | None:
    """What is wrong with a file before it is read."""
    try:
        return _wrong_kind(folder, name, entry)
    except OSError as error:
        return _cannot_read(folder / name, error)


def _wrong_kind(folder: Path, name: str, entry: FileEntry) -> BundleError | None:
    path = folder / name
    if not _NAME.fullmatch(name):
        return BundleError(f"{folder / MANIFEST}: {name!r} is not the name of a bundle's file", _EXPORT_AGAIN)
    if path.is_symlink() or any(parent.is_symlink() for parent in list(path.parents)[: name.count("/")]):
        return BundleError(f"{path}: a link, expected a file of the bundle itself", _COPY_AGAIN)
    if not path.is_file():
        return BundleError(f"{path}: missing from the bundle", _COPY_AGAIN)
    size = path.stat().st_size
    if size != entry.size:
        return BundleError(f"{path}: {size:,} bytes, the manifest says {entry.size:,}", _COPY_AGAIN)
    return None


def _sha256(path: Path) -> str | BundleError:
    try:
        return fsio.sha256(path)
    except OSError as error:
        return _cannot_read(path, error)


def _walk(folder: Path) -> list[str]:
    """All that is in a folder but folders; nothing of those that may not be read."""
    found = list[Path]()
    for above, folders, files in os.walk(folder):
        links = [name for name in folders if Path(above, name).is_symlink()]
        found += [Path(above, name) for name in (*files, *links)]
    return sorted(path.relative_to(folder).as_posix() for path in found)
