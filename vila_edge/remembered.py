"""Digests of files that were read once, for as long as nothing touches the files.

To read all weights of a bundle takes as long as to load them, so a start that finds a file as the last one left it
believes what that one computed. A change of the content changes `ctime`, which no program can set back; what a failing
disk does to it is found by `vila-edge verify`, which reads every byte.

$XDG_CACHE_HOME/vila-edge/digests/<sha256 of the folder's path>.json
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from vila_edge import fsio
from vila_edge.errors import InputError, VilaEdgeError

SETTLED_NS = 2_000_000_000  # a file that changed just now may change again without a new time, which clocks round

State = list[int]  # device, inode, size, mtime, ctime: what tells that a file was touched


class Remembered:
    """The digests of a folder's files. What cannot be read or written here is not remembered, and that is all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        with contextlib.suppress(OSError, RuntimeError):  # no home
            name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
            self._path = fsio.user_cache() / "digests" / f"{name}.json"
        self._entries = self._read()

    def digest(self, name: str) -> str | None:
        """sha256 of a file that was not touched since it was computed."""
        entry = self._entries.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] != self._state(name):
            return None
        return entry[1] if isinstance(entry[1], str) else None

    def states(self, names: Iterable[str]) -> dict[str, State]:
        """To be taken before the files are read."""
        found = {name: self._state(name) for name in names}
        return {name: state for name, state in found.items() if state}

    def keep(self, digests: Mapping[str, str], before: Mapping[str, State]) -> None:
        """Remember the digests of files that had these states before they were read, and have them still."""
        settled = time.time_ns() - SETTLED_NS
        kept = {
            name: [state, digests[name]]
            for name, state in before.items()
            if name in digests and state == self._state(name) and max(state[-2:]) < settled
        }
        if kept and self._path:
            self._entries |= kept
            with contextlib.suppress(OSError, VilaEdgeError):
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                fsio.replace_bytes(self._path, fsio.json_bytes(self._entries))

    def _state(self, name: str) -> State | None:
        try:
            found = os.lstat(self._folder / name)
        except OSError:
            return None
        return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]

    def _read(self) -> dict[str, object]:
        """What is there, unless others could have written it."""
        if self._path is None:
            return {}
        try:
            with fsio.open_regular(self._path) as descriptor:
                found = os.fstat(descriptor)
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
                return {}
            return fsio.read_json(self._path)
        except (OSError, InputError):
            return {}
