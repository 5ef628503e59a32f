"""Engines that were built on this machine: one file each, sealed with a secret that never leaves the folder.

An engine is code for one GPU and one TensorRT, and whoever loads it runs it. So it is no part of a bundle, and what
is read here was written here: `read` checks an HMAC over the key and the engine before it hands anything out.

<sha256 of the key>.engine   a line of JSON (key, size, HMAC), then the engine as TensorRT serialised it
secret                       32 random bytes, readable by their owner alone
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from vila_edge import fsio
from vila_edge.engine.tensorrt_options import MAX_KEPT, BuildOptions, runtime_of
from vila_edge.errors import BackendError, VilaEdgeError
from vila_edge.kernels.manifest import manifest
from vila_edge.kernels.projector import FILE
from vila_edge.kernels.shipped import source_digest
from vila_edge.machine_secret import ELSEWHERE, NO_ACCESS, SECRET, make_own_folder, read_secret
from vila_edge.version import __version__

Flag = str | int | None

SUFFIX = ".engine"
FORMAT = "vila-edge engine 1"
_HEADER_LIMIT = 64 << 10  # bytes of the line in front of an engine
_PIECE = 4 << 20  # bytes read at a time


@dataclass(frozen=True)
class EngineKey:
    """All that decides what an engine is. Two engines with one key can stand for each other."""

    bundle_digest: str
    component: str
    runtime: str  # tensorrt or tensorrt_rtx
    version: str  # of the runtime
    sm: int  # compute capability of the GPU: 87 for 8.7
    flags: Mapping[str, Flag]  # limits and choices of the build, and the vila_edge that wrote the graph

    def plain(self) -> dict[str, Any]:
        return {**vars(self), "flags": dict(self.flags)}

    def json(self) -> bytes:
        """Its one way to be written."""
        return fsio.json_bytes(self.plain())

    @property
    def file_name(self) -> str:
        return hashlib.sha256(self.json()).hexdigest() + SUFFIX


def engine_key(
    bundle_digest: str, component: str, trt: ModuleType, sm: int, flags: Mapping[str, Flag] | None = None
) -> EngineKey:
    """The key of an engine for the TensorRT `trt`. `flags`: of `build_flags`, or the least that is asked of `pick`."""
    said = {"vila_edge": __version__, **(flags or {})}
    return EngineKey(bundle_digest, component, runtime_of(trt), str(trt.__version__), sm, said)


def build_flags(component: str, options: BuildOptions) -> dict[str, Flag]:
    """What of the options matters to a component: a new context does not make its vision tower another."""
    flags: dict[str, Flag] = {"workspace": options.workspace}
    if component == "decoder":
        return flags | {"context": options.context, "chunk": options.chunk, "form": options.form, "kept": MAX_KEPT}
    flags |= {"images": options.images}
    if component == "mm_projector" and options.projector == "plugin":
        flags |= {"projector": "plugin", "kernels": source_digest(manifest(), FILE)}
    return flags


def default_root() -> Path:
    """`$XDG_CACHE_HOME/vila-edge/engines`, or the same below ~/.cache. Raises BackendError if there is no home."""
    try:
        return fsio.user_cache() / "engines"
    except RuntimeError as error:
        raise BackendError(f"no place for engines: {error}", ELSEWHERE) from None


class EngineCache:
    """A folder of engines."""

    def __init__(self, root: Path | None = None) -> None:
        """`root` is made when something is stored. By default `default_root()`."""
        self.root = root or default_root()
        self.secret = self.root / SECRET

    def prepare(self) -> None:
        """Make the folder and its secret, unless they exist. Raises BackendError if they cannot be used."""
        with _access(self.root):
            make_own_folder(self.root, "engine cache")
        read_secret(self.secret)

    def find(self, key: EngineKey) -> Path | None:
        """The file of an engine, whose content is not checked yet. Raises BackendError without access to the folder."""
        path = self.root / key.file_name
        with _access(path), contextlib.suppress(FileNotFoundError):
            return path if stat.S_ISREG(os.lstat(path).st_mode) else None
        return None

    def known(self) -> list[EngineKey]:
        """What the engines say they are, the newest first; `read` finds out whether it is true."""
        with _access(self.root):
            try:
                names = [name for name in os.listdir(self.root) if name.endswith(SUFFIX)]
            except FileNotFoundError:
                return []
        found = list[tuple[int, EngineKey]]()
        for name in names:
            with contextlib.suppress(OSError, ValueError), _open(self.root / name) as file:
                key = _key_of(_header(file))
                if key.file_name == name:
                    found.append((os.fstat(file.fileno()).st_mtime_ns, key))
        return [key for _, key in sorted(found, key=lambda entry: entry[0], reverse=True)]

    def pick(self, wanted: EngineKey, bundle: str | os.PathLike[str] = "BUNDLE") -> EngineKey:
        """The newest engine that does what is wanted: a number among the flags is the least that it must be built for.

        `bundle`: the path, for the command in the error. Raises BackendError that says what there is instead.
        """
        known = self.known()
        for key in known:
            if _same_place(key, wanted) and not _lacks(key, wanted):
                return key
        raise self._absent(wanted, known, bundle)

    def store(self, key: EngineKey, plan: bytes | memoryview) -> Path:
        """Seal an engine and put it in its place, whole or not at all. Raises BackendError if it cannot be written."""
        self.prepare()
        path, sealed = self.root / key.file_name, self._digest(key)
        sealed.update(plan)
        header = {"format": FORMAT, "key": key.plain(), "size": memoryview(plan).nbytes, "hmac": sealed.hexdigest()}
        try:
            with fsio.new_file(path) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(json.dumps(header, sort_keys=True).encode() + b"\n")
                file.write(plan)
        except VilaEdgeError as error:
            raise BackendError(error.message, f"{error.hint}; make room, or {ELSEWHERE}".lstrip("; ")) from None
        return path

    def read(self, key: EngineKey, bundle: str | os.PathLike[str] = "BUNDLE") -> bytes:
        """The engine of a key, proven to be what `store` wrote on this machine.

        `bundle`: the path, for the command in the error. Raises BackendError if there is none, or if it is truncated,
        changed, renamed or from elsewhere.
        """
        with self._sealed(key, bundle) as (file, size, sealed, expected):
            plan = file.read(size)
            sealed.update(plan)
            self._compare(key, sealed, expected, bundle)
        return plan

    def verify(self, key: EngineKey, bundle: str | os.PathLike[str] = "BUNDLE") -> int:
        """`read` without keeping it: the size in bytes, or BackendError."""
        with self._sealed(key, bundle) as (file, size, sealed, expected):
            while piece := file.read(_PIECE):
                sealed.update(piece)
            self._compare(key, sealed, expected, bundle)
        return size

    @contextlib.contextmanager
    def _sealed(self, key: EngineKey, bundle: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int, hmac.HMAC, str]]:
        """An engine's file behind its header, the size, a digest to fill, and what it must come to."""
        path = self.root / key.file_name
        if self.find(key) is None:
            raise self._absent(key, self.known(), bundle)
        digest = self._digest(key)  # not possible: no engine can be told from a foreign one
        with _access(path), _open(path) as file:
            try:
                header = _header(file)
                found, size, expected = _key_of(header), header.get("size"), header.get("hmac")
                if type(size) is not int or not isinstance(expected, str) or not expected.isascii():
                    raise ValueError("its header is not understood")
                if found != key:
                    raise ValueError(f"it was renamed: its header says {_difference(found, key)}")
                left = os.fstat(file.fileno()).st_size - file.tell()
                if left != size:
                    raise ValueError(f"{left:,} bytes follow its header, expected {size:,}: truncated or added to")
            except ValueError as error:
                raise BackendError(f"{path}: {error}", _again(bundle)) from None
            yield file, size, digest, expected

    def _compare(self, key: EngineKey, sealed: hmac.HMAC, expected: str, bundle: str | os.PathLike[str]) -> None:
        if not hmac.compare_digest(sealed.hexdigest(), expected):
            raise BackendError(
                f"{self.root / key.file_name}: not built by this user on this machine, or changed since "
                "(its HMAC does not match); engines are never taken from elsewhere",
                _again(bundle),
            )

    def _absent(self, wanted: EngineKey, known: list[EngineKey], bundle: str | os.PathLike[str]) -> BackendError:
        """Why there is no engine to use: the engine that comes nearest tells."""
        reason, remedy = f"none is in {self.root}", _again(bundle, force=False)
        others = [k for k in known if (k.bundle_digest, k.component) == (wanted.bundle_digest, wanted.component)]
        for field, what in (("runtime", ""), ("sm", "SM "), ("version", f"{wanted.runtime} ")):
            same = [key for key in others if getattr(key, field) == getattr(wanted, field)]
            if others and not same:
                found = ", ".join(dict.fromkeys(f"{what}{getattr(key, field)}" for key in others))
                reason = f"it was built for {found}, this is {what}{getattr(wanted, field)}"
                remedy += f"; or take --backend {others[0].runtime}" if field == "runtime" else ""
            others = same
        if others:
            reason = f"it was built with {_lacks(others[0], wanted) or _difference(others[0], wanted)}"
        return BackendError(f"no engine of {wanted.component} to use: {reason}", remedy)

    def _digest(self, key: EngineKey) -> hmac.HMAC:
        digest = hmac.new(read_secret(self.secret), digestmod="sha256")
        digest.update(key.json())
        return digest


@contextlib.contextmanager
def _access(path: Path) -> Iterator[None]:
    """The operating system's refusals as BackendError. What is missing stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BackendError(f"cannot use the engine cache: {path}: {error.strerror or error}", NO_ACCESS) from None


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    with fsio.open_regular(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        yield file


def _header(file: BinaryIO) -> dict[str, Any]:
    """The first line. Raises ValueError that says what is wrong."""
    line = file.readline(_HEADER_LIMIT)
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not line.endswith(b"\n") or not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"it does not begin like an engine of this version, which is {FORMAT!r}")
    return header


def _key_of(header: Mapping[str, Any]) -> EngineKey:
    """The key that an engine says it has. Raises ValueError."""
    try:
        key = EngineKey(**header["key"])
        texts = (key.bundle_digest, key.component, key.runtime, key.version)
        if all(isinstance(text, str) for text in texts) and type(key.sm) is int and isinstance(key.flags, dict):
            return key
    except (KeyError, TypeError):
        pass
    raise ValueError("its header names no key")


def _same_place(key: EngineKey, wanted: EngineKey) -> bool:
    return {**vars(key), "flags": None} == {**vars(wanted), "flags": None}


def _lacks(key: EngineKey, wanted: EngineKey) -> str:
    """The first flag in which an engine is less than wanted, with both values; "" if it does all."""
    for name, value in wanted.flags.items():
        found = key.flags.get(name)
        enough = found >= value if isinstance(found, int) and isinstance(value, int) else found == value
        if not enough:
            return f"{name} {found}, wanted: {value}"
    return ""


def _difference(found: EngineKey, wanted: EngineKey) -> str:
    """The first field in which two keys differ."""
    left, right = ({**key.plain(), **key.flags} for key in (found, wanted))
    name = next(name for name in (*right, *left) if name != "flags" and left.get(name) != right.get(name))
    return f"{name} {left.get(name)}, wanted: {right.get(name)}"


def _again(bundle: str | os.PathLike[str], force: bool = True) -> str:
    return f"build it on this machine: vila-edge build {os.fspath(bundle)}{' --force' if force else ''}"
