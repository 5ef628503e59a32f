"""The files of a plan become a folder: real files, all of them and as the hub lists them, or no folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import hf_hub_download

from vila_edge import fsio
from vila_edge.errors import InputError, UsageError, VilaEdgeError
from vila_edge.export.hub import Plan, RemoteFile, hub_errors
from vila_edge.export.layouts import PULLED_FROM

_RECORDS = ".cache"  # where huggingface_hub notes what it has fetched into a folder


def fetch(plan: Plan, target: Path, replace: bool, started: Callable[[int, RemoteFile], None]) -> None:
    """Fill a folder beside `target`, which becomes `target` when all is there.

    If this is interrupted, the folder stays, and the same call goes on with the files that are not complete.
    Raises VilaEdgeError.
    """
    check_target(target, replace)
    staging = staging_folder(target)
    with _alone(staging):
        with hub_errors(plan.repo, plan.commit):
            try:
                _check_space(plan, staging)
                # One at a time: Ctrl-C then stops at once, and no more than one file is lost by it.
                for number, file in enumerate(plan.files, 1):
                    started(number, file)
                    _get(plan, file, staging)
            finally:
                if not any((staging / file.path).exists() for file in plan.files):
                    shutil.rmtree(staging, ignore_errors=True)
            _tidy(plan, staging)
        source = {"repo": plan.repo, "revision": plan.commit, "license": plan.license}
        fsio.write_bytes(staging / PULLED_FROM, fsio.json_bytes(source))
        with fsio.new_folder(target, replace) as empty:
            staging.rename(empty)


def check_target(target: Path, replace: bool) -> None:
    """Raises UsageError if a pull may not appear as `target`. `replace` is for a checkpoint, not for any folder."""
    fsio.check_absent(target, replace)
    known = any((target / name).is_file() for name in (PULLED_FROM, "config.json"))
    if os.path.lexists(target) and not known and not (target.is_dir() and not os.listdir(target)):
        raise UsageError(f"{target} is not a checkpoint, and --force replaces nothing else", "choose another place")


def staging_folder(target: Path) -> Path:
    """Where a pull that has not ended keeps its files."""
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def _alone(staging: Path) -> Iterator[None]:
    """The folder exists, and no other pull fills it meanwhile."""
    fsio.make_folder(staging)
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{staging}: another pull is filling it", "wait until that one ends") from None
        yield
    finally:
        os.close(descriptor)


def _check_space(plan: Plan, staging: Path) -> None:
    # A killed process leaves files that no later one reads: their names hold eight random letters.
    for path in (staging / _RECORDS).rglob("*.????????.incomplete"):
        path.unlink()
    need = sum(file.size for file in plan.files if not _has_size(staging / file.path, file))
    have = shutil.disk_usage(staging).free
    if need > have:
        raise VilaEdgeError(
            f"{staging.parent}: {need / 1e9:,.2f} GB to fetch, {have / 1e9:,.2f} GB free",
            "free some space, or choose a place on another disk with -o",
        )


def _get(plan: Plan, file: RemoteFile, staging: Path) -> None:
    """Fetch a file unless it is there. Raises InputError if what came is not what the hub lists."""
    place = staging / file.path
    if file.digest and _is_whole(place, file):
        return
    if plan.cached:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        shutil.copyfile(plan.cached / file.path, place)
    else:
        if not _has_size(place, file):
            place.unlink(missing_ok=True)
        hf_hub_download(plan.repo, file.path, revision=plan.commit, local_dir=staging, library_name="vila-edge")
    if not _is_whole(place, file):
        place.unlink(missing_ok=True)
        raise InputError(
            f"{plan.repo}: {file.path} came with other content than the hub lists", "run the same command again"
        )


def _has_size(place: Path, file: RemoteFile) -> bool:
    return place.is_file() and not place.is_symlink() and place.stat().st_size == file.size


def _is_whole(place: Path, file: RemoteFile) -> bool:
    """Whether a file is there with the size and the digest of the list; if so, it is on the disk too."""
    if not _has_size(place, file):
        return False
    digest = hashlib.sha1(usedforsecurity=False) if len(file.digest) == 40 else hashlib.sha256()
    if len(file.digest) == 40:
        digest.update(b"blob %d\0" % file.size)  # as git names a file
    with place.open("rb", buffering=0) as content:
        if file.digest:
            buffer = bytearray(1 << 20)
            while size := content.readinto(buffer):
                digest.update(memoryview(buffer)[:size])
        os.fsync(content.fileno())
    return not file.digest or digest.hexdigest() == file.digest


def _tidy(plan: Plan, staging: Path) -> None:
    """Leave the plan's files alone: no records, nothing of a pull of another revision."""
    shutil.rmtree(staging / _RECORDS, ignore_errors=True)
    planned = {staging / file.path for file in plan.files}
    for path in sorted(staging.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in planned:
            path.unlink()
