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
        for start in _possible_starts(match):
            path = _to_path(match, start)
            if path.is_file():
                images.append(path)
                return match[0][:start] + IMAGE_MARK
        missing.append(match[0])
        return match[0]

    return Line(_PATH.sub(replace, line), tuple(images), tuple(missing))


def _possible_starts(match: re.Match[str]) -> list[int]:
    """Where the path may begin: at the front, or behind a separator, as in `a.png dax;b.png wug`."""
    behind = [found.end() for found in re.finditer(r"[;,:=(\[]", match[0])] if match["bare"] else []
    return [0, *behind]


def _to_path(match: re.Match[str], start: int) -> Path:
    text = match[0][start:]
    text = re.sub(r"\\(.)", r"\1", text) if match["bare"] else text[1:-1]
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://"))
    return Path(text).expanduser()
