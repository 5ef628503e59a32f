"""The only door to the disk for what is made to last: whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vila_edge.errors import InputError, UsageError, VilaEdgeError

PARTIAL = ".partial"  # ends the name of what is not whole yet
RETIRED = "retired"  # in a working folder: what was at its target, while the new takes that place


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk. Raises VilaEdgeError if it cannot be written."""
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from None


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to fill, beside `path`; it takes that place when the block ends well, whole and on the disk.

    Readers see the old one or the new one. Raises VilaEdgeError if it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file beside `path` and put it in its place: readers see the old one or the new one."""
    with new_file(path) as file:
        file.write(data)


def json_bytes(value: Any) -> bytes:
    """The one way a JSON file is written here: sorted keys, two blanks, a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def new_folder(target: Path, replace: bool = False, within: Path | None = None) -> Iterator[Path]:
    """A folder to fill, which appears as `target` when the block ends well and never exists half made.

    It is made beside `target`, or `within` a folder on the same disk. Raises UsageError if `target` exists, unless
    `replace`: then the old one stays until the new is whole.
    """
    check_absent(target, replace)
    name = f".{target.name}.{os.getpid()}"
    staging = (within or target.parent) / f"{name}{PARTIAL}"
    retired = within / RETIRED if within else target.with_name(f"{name}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise _cannot_write(target, error) from None
    try:
        yield staging
        for folder, _, _ in os.walk(staging):
            sync_folder(Path(folder))
        place_folder(staging, target, retired)
    except OSError as error:
        raise _cannot_write(target, error) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def user_cache() -> Path:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/vila-edge`, or below ~/.cache. RuntimeError without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the specification says to ignore others
        base = str(Path.home() / ".cache")
    return Path(base) / "vila-edge"


def make_folder(path: Path) -> None:
    """A folder and those above it, unless they exist. Raises VilaEdgeError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from None


def check_absent(target: Path, replace: bool) -> None:
    """Raises UsageError if `target` exists and is not to be replaced."""
    if os.path.lexists(target) and not replace:
        raise UsageError(f"{target} exists already", "choose another place, or say --force to replace it")


def read_bytes(path: Path, limit: int, follow_links: bool = False) -> bytes:
    """A regular file's content. Raises InputError if it is missing, not regular or over `limit` bytes.

    Links are followed in a checkpoint alone: download caches are made of them.
    """
    try:
        with (
            open_regular(path.resolve() if follow_links else path) as descriptor,
            open(descriptor, "rb", closefd=False) as file,
        ):
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if len(data) > limit:
        raise InputError(f"{path}: larger than {limit:,} bytes, which is more than such a file has")
    return data


def read_text(path: Path, limit: int = 64 << 20, follow_links: bool = False) -> str:
    """A text file. Raises InputError, as `read_bytes` does, also if it is not UTF-8."""
    try:
        return read_bytes(path, limit, follow_links).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start:,}") from None


def read_json(path: Path, limit: int = 8 << 20, follow_links: bool = False) -> dict[str, Any]:
    """A JSON object. Raises InputError if the file is not one."""
    try:
        value = json.loads(read_bytes(path, limit, follow_links))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A descriptor of a regular file; never a link, a device or a pipe. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a regular file's content. Raises OSError."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    with open_regular(path) as descriptor, open(descriptor, "rb", closefd=False, buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def place_folder(staging: Path, target: Path, retired: Path) -> None:
    """Rename a finished folder; what is at `target` is `retired` first, and goes when the new one is there.

    Raises VilaEdgeError if that cannot be: then everything is where it was.
    """
    try:
        if os.path.lexists(target):
            target.rename(retired)
        try:
            staging.rename(target)
        except BaseException:
            bring_back(retired, target)
            raise
        sync_folder(target.parent)
    except OSError as error:
        raise _cannot_write(target, error) from None
    remove(retired)


def bring_back(retired: Path, target: Path) -> None:
    """What became of a folder that was `retired`: it is at `target` again if nothing is there, else it is removed."""
    if os.path.lexists(target):
        remove(retired)
    elif os.path.lexists(retired):
        retired.rename(target)


def remove(path: Path) -> None:
    """A file, a link or a whole folder goes, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Wait until what was named in a folder is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> VilaEdgeError:
    free = ""
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(path.parent).free >> 20:,} MiB are free there"
    return VilaEdgeError(f"cannot write {path}: {error.strerror or error}", free)
