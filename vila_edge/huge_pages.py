"""Weights in large pages of memory: a token reads all of them, and small pages cost it an eighth of its time.

Where Linux gives large pages to who asks (`madvise`, the usual setting), glibc asks for what it allocates if its
tunable says so, which it reads when a process starts. So a command starts itself again, once, with the tunable set;
from Python, set `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` before the interpreter starts. Whoever sets the variable to
anything keeps what it says.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OLDEST_GLIBC = (2, 35)  # the first with the tunable


def environment(env: Mapping[str, str], setting: Path = SETTING, libc: tuple[str, str] | None = None) -> dict[str, str]:
    """What to add to the environment of a process so that it gets large pages; {} where nothing is gained."""
    name, version = libc or platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if VARIABLE in env or name != "glibc" or numbers < OLDEST_GLIBC:
        return {}
    try:
        chosen = setting.read_text()
    except OSError:
        return {}
    return {VARIABLE: TUNABLE} if "[madvise]" in chosen else {}


def restart() -> None:
    """Start this very command again with large pages, unless it has them, or cannot get them."""
    if more := environment(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **more})
