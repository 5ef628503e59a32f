"""A folder that may not be entered: modes alone would stop no test that runs as root."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest


def close_folder(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Whoever asks for something in the folder is told that permission is denied."""
    stat = os.stat

    def denied(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and folder in Path(os.fsdecode(path)).parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    patch.setattr(os, "stat", denied)
