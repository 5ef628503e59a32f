"""Image paths in a line of chat: typed, pasted or dragged in, quoted or escaped."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from vila_edge.prompt import IMAGE_MARK

_EXTENSIONS = r"\.(?:jpe?g|png|webp|bmp|gif|tiff?)"
_PATH = re.compile(
    rf"""(?P<double>"[^"]+{_EXTENSIONS}") | (?P<single>'[^']+{_EXTENSIONS}') | (?P<bare>(?:\\.|[^\s"'\\])+?{_EXTENSIONS})
         (?=$|[\s.,;:!?)\]])""",
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Line:
    """A line with an `<image>` in the place of each path, the files, and paths that are no files."""

    text: str
    images: tuple[Path, ...]
    missing: tuple[str, ...]


def find_images(line: str) -> Line:
    """A path that leads to a file becomes an image; one that does not stays text."""
    images: list[Path] = []
    missing: list[str] = []

    def replace(match: re.Match[str]) -> str:
        path = _to_path(match)
        if not path.is_file():
            missing.append(match[0])
            return match[0]
        images.append(path)
        return IMAGE_MARK

    return Line(_PATH.sub(replace, line), tuple(images), tuple(missing))


def _to_path(match: re.Match[str]) -> Path:
    text = match[0]
    text = re.sub(r"\\(.)", r"\1", text) if match["bare"] else text[1:-1]
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://"))
    return Path(text).expanduser()
