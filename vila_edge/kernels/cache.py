"""Kernels that were built on this machine: one file each, sealed as engines are, with a secret of the folder.

<sha256 of the key>.kernel   a line of JSON (key, size, HMAC), then the code
secret                       32 random bytes, readable by their owner alone
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from vila_edge import fsio
from vila_edge.errors import BackendError, InputError, VilaEdgeError
from vila_edge.machine_secret import ELSEWHERE, NO_ACCESS, SECRET, make_own_folder, read_secret

SUFFIX = ".kernel"
FORMAT = "vila-edge kernel 1"
_LIMIT = 64 << 20  # bytes of a file

Key = Mapping[str, str]


class KernelCache:
    """A folder of code, by all that decides what it is: file, digest of the sources, architecture, compiler."""

    def __init__(self, root: Path | None = None) -> None:
        """By default `$XDG_CACHE_HOME/vila-edge/kernels`. Raises BackendError if there is no home."""
        try:
            self.root = root or fsio.user_cache() / "kernels"
        except RuntimeError as error:
            raise BackendError(f"no place for kernels: {error}", ELSEWHERE) from None

    def path(self, key: Key) -> Path:
        return self.root / (hashlib.sha256(fsio.json_bytes(dict(key))).hexdigest() + SUFFIX)

    def store(self, key: Key, code: bytes) -> None:
        """Seal code and put it in its place, whole or not at all. Raises BackendError if it cannot be written."""
        with self._errors():
            make_own_folder(self.root, "cache of kernels")
            header = {"format": FORMAT, "key": dict(key), "size": len(code), "hmac": self._seal(key, code)}
            with fsio.new_file(self.path(key)) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(json.dumps(header, sort_keys=True).encode() + b"\n" + code)

    def read(self, key: Key) -> bytes | None:
        """The code, proven to be what `store` wrote on this machine; None if there is none.

        Raises BackendError if it is truncated, changed, renamed or from elsewhere.
        """
        path = self.path(key)
        if not os.path.lexists(path):
            return None
        with self._errors():
            line, _, code = fsio.read_bytes(path, _LIMIT).partition(b"\n")
        try:
            header = json.loads(line)
            found = header["format"], header["key"], header["size"]
            seal = header["hmac"].encode("ascii")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._refused(path, "it does not begin like a kernel of this version") from None
        if found != (FORMAT, dict(key), len(code)):
            raise self._refused(path, "it was truncated, added to or renamed")
        if not hmac.compare_digest(self._seal(key, code).encode(), seal):
            raise self._refused(
                path, "not built by this user on this machine, or changed since: its HMAC does not match"
            )
        return code

    def _seal(self, key: Key, code: bytes) -> str:
        secret = read_secret(self.root / SECRET, "kernels", "they are built when they are used next")
        return hmac.new(secret, fsio.json_bytes(dict(key)) + code, "sha256").hexdigest()

    def _refused(self, path: Path, why: str) -> BackendError:
        return BackendError(f"{path}: {why}", f"remove it, and it is built again: rm {path}")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BackendError(
                f"cannot use the cache of kernels: {self.root}: {error.strerror or error}", NO_ACCESS
            ) from None
        except BackendError:
            raise
        except InputError as error:
            raise BackendError(error.message, f"remove what is there; or {ELSEWHERE}") from None
        except VilaEdgeError as error:
            raise BackendError(error.message, f"{error.hint}; make room, or {ELSEWHERE}".lstrip("; ")) from None
