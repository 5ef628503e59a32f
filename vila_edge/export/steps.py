"""Long work that can be interrupted: what is finished stays on the disk, and is not done again.

A step leaves files and a result. Its record holds their digests, under a digest of everything that decides what
the step makes: the key of the work and all steps before it. A record that does not fit is as good as none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vila_edge import fsio
from vila_edge.errors import InputError, UsageError
from vila_edge.export.workers import release_memory

Result = dict[str, Any]
KEY = "key"  # a file: what the work is made from
RECORDS = "steps"  # a folder: what is finished


class Steps:
    """Steps of one piece of work, in a folder of their own."""

    def __init__(self, folder: Path, key: str) -> None:
        """`folder`: what `working_folder` made. `key`: stands for all that goes into the work."""
        self.folder = folder
        self._key = self._digest = key
        self._records = folder / RECORDS
        fsio.make_folder(self._records)
        self.made_here = False  # whether the last step was made now, and not found

    def run(
        self,
        name: str,
        work: Callable[[], Result],
        files: Sequence[Path] = (),
        carried: Path | None = None,
        apart: bool = False,
    ) -> Result:
        """The result of `work`, or what it was when it was done last.

        `files` are what the step makes for good. `carried` is what it makes for the next step alone, which may
        delete it when it is done. A step that is `apart` depends on no step before it, and none behind it on it.
        """
        digest = hashlib.sha256(f"{self._key if apart else self._digest}\n{name}".encode()).hexdigest()
        path = self._records / f"{name}.json"
        known = None if self.made_here and not apart else self._known(path, files, digest)
        if not apart:
            self._digest = digest
        if known is not None:
            return known
        result = work()
        release_memory()
        self.made_here |= not apart  # whatever comes after was made from something else
        made = {file.name: _described(file) for file in (*files, *([carried] if carried else ()))}
        fsio.replace_bytes(path, fsio.json_bytes({"inputs": digest, "files": made, "result": result}))
        return result

    def has_carried(self, name: str, path: Path) -> bool:
        """Whether what the step `name` made for the next one is there and as it was left."""
        try:
            record = fsio.read_json(self._records / f"{name}.json")
            return bool(record["files"][path.name] == _described(path))
        except (InputError, OSError, KeyError):
            return False

    def _known(self, path: Path, files: Sequence[Path], digest: str) -> Result | None:
        if not path.is_file():
            return None
        try:
            record = fsio.read_json(path)
            same = record["inputs"] == digest
            if same and all(record["files"][file.name] == _described(file) for file in files):
                result: Result = record["result"]
                return result
        except (InputError, OSError, KeyError, TypeError):
            pass
        return None


@contextlib.contextmanager
def working_folder(
    target: Path, key: str, warn: Callable[[str], None] = lambda message: None
) -> Iterator[tuple[Path, bool]]:
    """The folder beside `target` in which it is made, and whether finished work of the same `key` is in it.

    It outlives an interruption. `warn` is told before work of another key goes. Raises UsageError if another process
    works in it.
    """
    folder = folder_beside(target)
    fsio.make_folder(folder)
    with _lock(folder, target):
        fsio.bring_back(folder / fsio.RETIRED, target)  # from a process that was killed in between
        mark = folder / KEY
        resumed = mark.is_file() and mark.read_text() == key
        if not resumed:
            if any((folder / RECORDS).glob("*.json")):
                warn(f"what is finished in {folder} was made of other weights, samples, options or versions: it goes")
            empty(folder)
            fsio.replace_bytes(mark, key.encode())
        for left_over in list(folder.rglob(f"*{fsio.PARTIAL}")):  # by a process that was killed
            fsio.remove(left_over)
        yield folder, resumed


def folder_beside(target: Path) -> Path:
    """The working folder of a target. Raises UsageError for a target that has no name of its own."""
    if target.name in ("", ".."):
        raise UsageError(f"-o {target}: no name of a folder to make", "give it one, as in -o BUNDLE")
    return target.with_name(f".{target.name}.work")


def discard(folder: Path) -> None:
    """Remove a working folder."""
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path, target: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UsageError(
            f"{target} is being made by another process, which works in {folder}",
            "wait for it to end, or stop it, or choose another place",
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def empty(folder: Path) -> None:
    """Remove what is in a working folder, but for its key."""
    for path in folder.iterdir():
        if path.name == KEY:
            continue
        fsio.remove(path)


def _described(path: Path) -> list[Any]:
    return [path.stat().st_size, fsio.sha256(path)]


class StartOver(Exception):
    """What a step was to go on from is gone or damaged: the work has to begin again."""


class Relay:
    """Steps in a row, each of which hands a file to the next. A file goes when its taker is done."""

    def __init__(self, steps: Steps, stem: str) -> None:
        self._steps, self._stem = steps, stem
        self._last: tuple[str, Path] | None = None

    def run(
        self,
        name: str,
        work: Callable[[Path | None, Path | None], Result],
        files: Sequence[Path] = (),
        last: bool = False,
    ) -> Result:
        """Like `Steps.run`. `work` is given the file to read (none at first) and the one to write (none if `last`).

        Raises StartOver if the file to read is not as the step before left it.
        """
        before = self._last
        after = None if last else self._steps.folder / f"{self._stem}.{name}.safetensors"

        def checked() -> Result:
            if before and not self._steps.made_here and not self._steps.has_carried(*before):
                raise StartOver
            return work(before[1] if before else None, after)

        result = self._steps.run(name, checked, files, after)
        if before:
            before[1].unlink(missing_ok=True)
        self._last = (name, after) if after else None
        return result
