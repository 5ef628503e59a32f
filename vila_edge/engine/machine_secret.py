"""A secret of this machine and user: 32 random bytes in a file that nobody else can read."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from vila_edge import fsio
from vila_edge.errors import BackendError

SECRET_BYTES = 32


def make_secret(path: Path) -> None:
    """Write a new one, unless there is one.

    It is written beside and linked: of two processes one wins, and none sees half of it. Raises OSError.
    """
    if os.path.lexists(path):
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}{fsio.PARTIAL}")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(os.urandom(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(beside, path)
    finally:
        beside.unlink()
    fsio.sync_folder(path.parent)


def read_secret(path: Path) -> bytes:
    """The 32 bytes. Raises BackendError unless they are there, ours, and readable by nobody else."""
    remedy = f"remove {path}, and build the engines again: vila-edge build BUNDLE --force"
    try:
        with fsio.open_regular(path) as descriptor:
            found = os.fstat(descriptor)
            data = os.read(descriptor, SECRET_BYTES + 1)
    except FileNotFoundError:
        raise BackendError(f"{path} is missing: engines here cannot be told from foreign ones", remedy) from None
    except OSError as error:
        raise BackendError(f"cannot read {path}: {error.strerror or error}", remedy) from None
    if found.st_uid != os.geteuid():
        raise BackendError(f"{path} belongs to user {found.st_uid}, expected {os.geteuid()}", remedy)
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise BackendError(f"{path} is open to others: its mode is {mode:04o}, expected 0600", remedy)
    if len(data) != SECRET_BYTES:
        raise BackendError(f"{path} is damaged: expected {SECRET_BYTES} bytes", remedy)
    return data
