#!/usr/bin/env python3
"""Build every kernel for every architecture of the manifest: python kernels/build.py -o DIR

Needs a libnvrtc of the manifest's version, CUDA's headers and cuobjdump, which the dev extra installs, but neither a
GPU nor a toolkit, and of Python the standard library alone: building the wheel calls it.
"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
NO_COMPILER = 3  # exit code, for hatch_build.py


def _bare_package() -> None:
    """vila_edge without its __init__.py, which imports what a build environment does not have."""
    package = types.ModuleType("vila_edge")
    package.__path__ = [str(ROOT / "vila_edge")]
    sys.modules["vila_edge"] = package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a folder to make")
    arguments = parser.parse_args()
    _bare_package()
    from vila_edge.errors import VilaEdgeError
    from vila_edge.kernels.ahead import build_ahead, shipping_nvrtc
    from vila_edge.kernels.cuobjdump import find_cuobjdump
    from vila_edge.kernels.manifest import read_manifest

    manifest = read_manifest(ROOT / "kernels")
    try:
        nvrtc = shipping_nvrtc(manifest)
        find_cuobjdump()
    except VilaEdgeError as error:
        _fail(error, NO_COMPILER)
    try:
        index = build_ahead(manifest, nvrtc, arguments.output)
    except VilaEdgeError as error:
        _fail(error, 1)
    size = sum(path.stat().st_size for path in arguments.output.iterdir())
    sys.stdout.write(f"{arguments.output}: {len(index.files)} files by NVRTC {index.nvrtc}, {size:,} bytes\n")


def _fail(error: Any, code: int) -> NoReturn:
    sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
