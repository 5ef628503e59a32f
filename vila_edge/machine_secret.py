"""A secret of this machine and user: 32 random bytes in a file that nobody else can read."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from vila_edge import fsio
from vila_edge.errors import BackendError

SECRET = "secret"  # name of the file in a folder that it seals
SECRET_BYTES = 32
ELSEWHERE = "set XDG_CACHE_HOME to a folder of yours"
NO_ACCESS = f"if vila-edge ran with sudo before, make it yours with sudo chown -R; or {ELSEWHERE}"


def make_own_folder(root: Path, what: str) -> None:
    """A folder of ours alone with a secret in it, unless it is one already.

    `what`: "engine cache", for the error. Raises OSError, and BackendError if it cannot be used.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = os.stat(root)
    if not stat.S_ISDIR(found.st_mode):
        raise BackendError(f"{root} is not a folder, expected the {what}", ELSEWHERE)
    if found.st_uid != os.geteuid():
        raise BackendError(f"{root} belongs to user {found.st_uid}, not to {os.geteuid()}", NO_ACCESS)
    if found.st_mode & 0o077:
        root.chmod(0o700)
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise BackendError(f"{root}: no permission to read and write", NO_ACCESS)
    make_secret(root / SECRET)


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


def read_secret(path: Path, sealed: str = "engines", again: str = "vila-edge build BUNDLE --force") -> bytes:
    """The 32 bytes. Raises BackendError unless they are there, ours, and readable by nobody else.

    `sealed`: what it seals, and `again` how that is made once more, for the error.
    """
    remedy = f"remove {path}, and build the {sealed} again: {again}"
    try:
        with fsio.open_regular(path) as descriptor:
            found = os.fstat(descriptor)
            data = os.read(descriptor, SECRET_BYTES + 1)
    except FileNotFoundError:
        raise BackendError(f"{path} is missing: {sealed} here cannot be told from foreign ones", remedy) from None
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
