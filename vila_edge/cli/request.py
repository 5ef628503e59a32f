"""What is asked, from options of the command line and from a JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_edge import fsio
from vila_edge.errors import InputError, UsageError
from vila_edge.pipeline import Shot

KEYS = ("prompt", "images", "videos", "shots")


@dataclass(frozen=True)
class Request:
    """A prompt with its images, its videos behind them, and answered examples in front."""

    prompt: str | None
    images: Sequence[str]
    videos: Sequence[str]
    shots: Sequence[Shot]

    def with_file(self, path: Path) -> Request:
        """What `path` says, then what was said before. Paths in the file are meant from its folder.

        {"prompt": "...", "images": ["a.png"], "videos": [], "shots": [{"image": "b.png", "answer": "dax"}]}

        Raises InputError that names the field.
        """
        data = fsio.read_json(path)
        unknown = sorted(set(data) - set(KEYS))
        if unknown:
            raise InputError(f"{path}: unknown field {unknown[0]!r}", f"known fields: {', '.join(KEYS)}")
        prompt = data.get("prompt")
        if prompt is not None and not isinstance(prompt, str):
            raise InputError(f"{path}: 'prompt' is {prompt!r}, expected text")
        shots = data.get("shots", [])
        if not isinstance(shots, list):
            raise InputError(f"{path}: 'shots' is {shots!r}, expected a list of objects")
        return Request(
            prompt if self.prompt is None else self.prompt,
            [*_paths(data, "images", path), *self.images],
            [*_paths(data, "videos", path), *self.videos],
            [*(_shot(shot, path) for shot in shots), *self.shots],
        )


def parse_shot(text: str) -> Shot:
    """IMAGE=ANSWER. The first `=` behind an existing file divides, otherwise the first of all. Raises UsageError."""
    places = [i for i, character in enumerate(text) if character == "="]
    if not places or places == [0]:
        raise UsageError(f"--shot {text}: expected IMAGE=ANSWER")
    place = next((i for i in places if Path(text[:i]).is_file()), places[0])
    return Shot(text[:place], text[place + 1 :])


def _paths(data: dict[str, Any], key: str, path: Path) -> list[str]:
    values = data.get(key, [])
    if not isinstance(values, list) or any(not isinstance(value, str) for value in values):
        raise InputError(f"{path}: {key!r} is {values!r}, expected a list of paths")
    return [str(path.parent / value) for value in values]


def _shot(value: object, path: Path) -> Shot:
    if (
        not isinstance(value, dict)
        or set(value) != {"image", "answer"}
        or any(type(v) is not str for v in value.values())
    ):
        raise InputError(f'{path}: a shot is {value!r}, expected {{"image": PATH, "answer": TEXT}}')
    return Shot(str(path.parent / value["image"]), value["answer"])
