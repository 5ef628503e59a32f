"""TensorRT for RTX under the name by which its parser of graphs looks for it, which not every machine has.

When a graph has a plugin, the parser of TensorRT-RTX 1.7.1 opens libtensorrt_rtx.so, and ends the process if it is not
found; the wheel from PyPI brings libtensorrt_rtx.so.1 alone. The loader takes a library that is loaded under the name
it gives itself. So one is loaded that is nothing but that name, and whose symbols are those of the real one.
"""

from __future__ import annotations

import ctypes
import platform
import re
import struct
import tempfile
from pathlib import Path

from vila_edge.errors import BackendError

ALIAS = "libtensorrt_rtx.so"
_MACHINES = {"x86_64": 62, "aarch64": 183}  # of an ELF header
_MAPS = Path("/proc/self/maps")
_PAGE = 0x1000
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551  # types of segments
_READ_WRITE = 6
_END, _NEEDED, _STRINGS, _SYMBOLS, _STRINGS_SIZE, _SYMBOL_SIZE, _SONAME = 0, 1, 5, 6, 10, 11, 14  # tags


def name_for_parser() -> None:
    """See to it that the parser finds the TensorRT for RTX that is loaded. Raises BackendError if that does not work."""
    if _is_found():
        return
    real = next(iter(re.findall(rf"/({re.escape(ALIAS)}\.\d+)$", _MAPS.read_text(), re.MULTILINE)), f"{ALIAS}.1")
    try:
        load_alias(ALIAS, real)
        if not _is_found():
            raise OSError("the loader does not take the name")
    except (OSError, KeyError) as error:
        raise BackendError(
            f"TensorRT for RTX reads no graph with a plugin: there is no {ALIAS} ({error})",
            f"make it, a link to {real} beside that file; or vila-edge build BUNDLE --projector graph",
        ) from None


def load_alias(name: str, real: str) -> None:
    """Load a library called `name` that is nothing but another one. Raises OSError, KeyError for an unknown machine."""
    content = library(name, real, _MACHINES[platform.machine()])
    with tempfile.TemporaryDirectory() as folder:  # what is loaded stays when its file is gone
        path = Path(folder) / name
        path.write_bytes(content)
        ctypes.CDLL(str(path))


def _is_found() -> bool:
    try:
        ctypes.CDLL(ALIAS)
    except OSError:
        return False
    return True


def library(name: str, needs: str, machine: int) -> bytes:
    """A shared library called `name` with nothing in it, which needs another one: 64 bits, little-endian."""
    strings = b"\0" + b"\0".join(text.encode() for text in (name, needs)) + b"\0"
    header_end = 64 + 3 * 56
    symbols = header_end  # one, which every table begins with: zeros
    text = symbols + 24
    dynamic = -(-(text + len(strings)) // 16) * 16
    tags = [
        (_SONAME, 1),
        (_NEEDED, 2 + len(name)),
        (_STRINGS, text),
        (_STRINGS_SIZE, len(strings)),
        (_SYMBOLS, symbols),
        (_SYMBOL_SIZE, 24),
        (_END, 0),
    ]
    size = dynamic + 16 * len(tags)
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    segments = [
        (_LOAD, _READ_WRITE, 0, 0, 0, size, size, _PAGE << 4),  # pages of 64 KiB, as some of aarch64 are
        (_DYNAMIC, _READ_WRITE, dynamic, dynamic, dynamic, 16 * len(tags), 16 * len(tags), 8),
        (_STACK, _READ_WRITE, 0, 0, 0, 0, 0, 16),  # or else the stack were made executable
    ]
    header += b"".join(struct.pack("<IIQQQQQQ", *segment) for segment in segments)
    body = bytes(24) + strings
    return header + body.ljust(dynamic - header_end, b"\0") + b"".join(struct.pack("<QQ", *tag) for tag in tags)
