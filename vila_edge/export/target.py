"""Where an export is to appear: asked before hours are spent, and before anything that is there goes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from vila_edge import fsio
from vila_edge.bundle import FORMAT, MANIFEST
from vila_edge.errors import InputError, UsageError
from vila_edge.export.autoawq_folder import INDEX, MADE_BY
from vila_edge.export.layouts import PARTS
from vila_edge.export.recipe import Recipe
from vila_edge.export.steps import folder_beside

_ELSEWHERE = "choose another place"


def check_target(target: Path, replace: bool, checkpoint: Path, recipe: Recipe) -> None:
    """Raises UsageError if an export may not appear as `target`. `replace` is for an export, not for any folder."""
    read = [checkpoint, *(checkpoint / part for part in PARTS), recipe.calibration, recipe.choices.vision_tower]
    for place in (target, folder_beside(target)):
        for path in filter(None, read):
            if _holds(place, path):
                raise UsageError(f"{target}: {path} lies there, which the export reads", _ELSEWHERE)
    if not os.path.lexists(target):
        return
    problem = _cannot_be_moved(target) if replace or os.path.ismount(target) else ""
    if problem:
        raise UsageError(f"{target} cannot be replaced: {problem}", f"name a folder in it: {target / 'BUNDLE'}")
    fsio.check_absent(target, replace)
    if not _is_export(target):
        raise UsageError(f"{target} is neither empty nor an export, and --force replaces nothing else", _ELSEWHERE)


def _holds(folder: Path, path: Path) -> bool:
    """Whether a path is a folder or lies in it, whatever names lead there."""
    try:
        resolved = path.resolve()
        return any(above.samefile(folder) for above in (resolved, *resolved.parents) if above.exists())
    except OSError:
        return False


def _cannot_be_moved(target: Path) -> str:
    """Why a folder could not make room at the end; "" if it can. A mounted one cannot be renamed."""
    if not target.is_dir() or target.is_symlink():
        return ""
    try:  # removes a folder that is empty alone, and says of any other whether it could be
        target.rmdir()
        target.mkdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            return "something is mounted there" if error.errno == errno.EBUSY else error.strerror or str(error)
    return ""


def _is_export(target: Path) -> bool:
    """An empty folder, a bundle of any version, or what `--to autoawq` wrote."""
    if not target.is_dir():
        return False
    try:
        if (target / MANIFEST).is_file():
            return bool(fsio.read_json(target / MANIFEST).get("format") == FORMAT)
        if (target / INDEX).is_file():
            metadata = fsio.read_json(target / INDEX).get("metadata")
            return isinstance(metadata, dict) and MADE_BY in metadata
        return not os.listdir(target)
    except (InputError, OSError):
        return False
