"""Golden cases: what an original implementation computed for a few prompts, against what an engine computes.

A case is a folder with `checkpoint/`, `images/*.png`, and for each prompt `<p>.json` (what was asked, and the token
ids) and `<p>.npz` (pixel_values, vision_features, projected, inputs_embeds, logits, as far as they were kept).
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from vila_edge import fsio
from vila_edge.config import Profile, VilaConfig
from vila_edge.engine.protocol import Engine
from vila_edge.errors import InputError
from vila_edge.media.image import RgbImage, load_image
from vila_edge.media.video import Video
from vila_edge.prompt import (
    IMAGE_MARK,
    VIDEO_MARK,
    Chunk,
    ImageSlot,
    Turn,
    expand_marks,
    place_media,
    prompt_text,
    render,
    tokenize,
)
from vila_edge.templates import GENERATIONS, get_template
from vila_edge.tokenizer import Tokenizer
from vila_edge.visual import Looked, Medium, Visual, look, plan, slot_embeds, splice

PIXEL_TOLERANCE, TOLERANCE = 1e-6, 1e-4
STAGES = ("pixel_values", "features", "embeds", "inputs_embeds", "logits")
_STORED = {"features": "vision_features", "embeds": "projected"}  # stage -> its name in an npz

IMAGE_INDEX = -200  # marks an image in the token ids of v1.0 and VILA1.5
_ORIGINAL_MARKS = {IMAGE_MARK: "<image>", VIDEO_MARK: "<vila/video>"}  # as NVILA writes them

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class PromptParity:
    """How far one prompt is off. A stage that the case did not keep is None; another shape is infinite."""

    prompt: str
    text_equal: bool | None
    ids_equal: bool | None
    differences: dict[str, float | None]

    def passed(self, tolerance: float) -> bool:
        """Whether text and ids are equal, and no stage is further off than it may be."""
        limits = {stage: PIXEL_TOLERANCE if stage == "pixel_values" else tolerance for stage in STAGES}
        near = all(value is None or value <= limits[stage] for stage, value in self.differences.items())
        return near and self.text_equal is not False and self.ids_equal is not False


@dataclass(frozen=True)
class _Asked:
    """What a case's JSON says, in our terms."""

    text: str  # of the one turn, with marks
    media: list[Medium]
    templates: tuple[str, ...]  # that go by the name that was said; none: the model's own
    prompt: str | None  # the whole prompt as the original wrote it
    input_ids: list[int] | None
    mark_ids: dict[str, int]


def case_prompts(case: Path) -> list[str]:
    """Names of a case's prompts. Raises InputError if there are none."""
    names = sorted(path.stem for path in case.glob("*.json"))
    if not names:
        raise InputError(f"{case}: no prompts, expected files <prompt>.json and <prompt>.npz")
    return names


def measure(case: Path, prompt: str, cfg: VilaConfig, tokenizer: Tokenizer, engine: Engine) -> PromptParity:
    """One prompt through an engine, every stage compared. Raises InputError for a case that cannot be read."""
    asked = _read(case, prompt, cfg.profile)
    stored = _arrays(case / f"{prompt}.npz")
    image_end = tokenizer.encode(cfg.profile.image_end) if cfg.profile.image_end else ()
    visuals = plan(asked.media, cfg, len(image_end))
    pieces, profile = _pieces(asked, visuals, cfg.profile)
    chunks = tokenize(pieces, tokenizer, profile)
    marks = [visual.mark for visual in visuals for _ in visual.slot_lengths]
    text = prompt_text(pieces, [_ORIGINAL_MARKS[mark] for mark in marks])
    ids = [i for chunk in chunks for i in _ids(chunk, marks, asked.mark_ids)]

    looked = [look(visual, engine, cfg) for visual in visuals]
    end = engine.embed_tokens(image_end)
    slots = [
        slot
        for visual, seen in zip(visuals, looked, strict=True)
        for slot in slot_embeds(visual, seen.image_embeds, cfg, end)
    ]
    embeds = splice(chunks, slots, engine)
    if cfg.profile.tokenization == "per_chunk":  # the original cuts what is too long (spec section 3.3)
        embeds = embeds[: cfg.llm.context_length]
    got = _seen(visuals, looked, cfg) | {"inputs_embeds": [embeds]}
    if "logits" in stored:
        got["logits"] = [engine.forward(embeds, engine.new_cache(len(embeds)), range(len(embeds)))]
    return PromptParity(
        prompt,
        None if asked.prompt is None else text == asked.prompt,
        None if asked.input_ids is None else ids == asked.input_ids,
        {stage: _difference(stored.get(_STORED.get(stage, stage)), got.get(stage, [])) for stage in STAGES},
    )


def _pieces(asked: _Asked, visuals: Sequence[Visual], profile: Profile) -> tuple[list[Any], Profile]:
    """The rendered prompt; of the generations of a template, the one that gives the prompt of the case."""
    names = asked.templates or (profile.template,)
    for name in sorted(names, key=lambda name: name != profile.template):  # the model's own first
        chosen = dataclasses.replace(profile, template=name)
        turns = expand_marks([Turn("user", asked.text)], [visual.shown for visual in visuals], chosen)
        pieces = list(render(turns, get_template(name)))
        if asked.prompt is None or prompt_text(pieces) == asked.prompt:
            break
    return pieces, chosen


def _seen(visuals: Sequence[Visual], looked: Sequence[Looked], cfg: VilaConfig) -> dict[str, list[FloatArray]]:
    """Stage -> the forms in which an original may have kept it. Frames of a video count where there is no image."""
    images = [pair for pair in zip(visuals, looked, strict=True) if isinstance(pair[0].medium, RgbImage)]
    pairs = images or list(zip(visuals, looked, strict=True))
    if not pairs:
        return {}
    nothing = np.zeros((0, cfg.llm.hidden_size), np.float32)
    slots = [slot for visual, seen in pairs for slot in slot_embeds(visual, seen.image_embeds, cfg, nothing)]
    return {
        "pixel_values": [np.concatenate([seen.pixel_values for _, seen in pairs])],
        "features": [
            np.concatenate([seen.tower_features for _, seen in pairs]),
            np.concatenate([seen.image_features for _, seen in pairs]),
        ],
        "embeds": [np.concatenate(slots), np.concatenate([seen.image_embeds for _, seen in pairs])],
    }


def _difference(want: FloatArray | None, forms: Sequence[FloatArray]) -> float | None:
    """Largest absolute difference to the form of as many numbers; infinite if there is none, or a value is not finite."""
    if want is None:
        return None
    for got in forms:
        if got.size == want.size and got.shape[-1] == want.shape[-1]:
            worst = np.abs(got.reshape(-1) - want.reshape(-1)).max(initial=0)
            return float(worst) if np.isfinite(worst) else float("inf")
    return float("inf")


def _ids(chunk: Chunk, marks: Sequence[str], mark_ids: dict[str, int]) -> Iterator[int]:
    if isinstance(chunk, ImageSlot):
        yield mark_ids[marks[chunk.index]]
    else:
        yield from chunk.ids


def _read(case: Path, prompt: str, profile: Profile) -> _Asked:
    path = case / f"{prompt}.json"
    data = fsio.read_json(path)
    ids = data.get("input_ids")
    if "parts" in data:
        text, media = _parts(data, case, path)
        known = data.get("media_token_ids", {})
        mark_ids = {IMAGE_MARK: known.get("image", IMAGE_INDEX), VIDEO_MARK: known.get("video", IMAGE_INDEX)}
        return _Asked(text, media, (), data.get("chat_text"), ids, mark_ids)
    if "query" not in data:
        raise InputError(f"{path}: neither 'query' nor 'parts', expected a prompt of a golden case")
    media = [_image(case, name, path) for name in data.get("images", [])]
    text = place_media(str(data["query"]), [IMAGE_MARK] * len(media), profile)
    name = data.get("conv_mode")
    templates = GENERATIONS.get(name, (name,)) if name else ()
    for template in templates:
        get_template(template)
    return _Asked(text, media, templates, data.get("prompt"), ids, dict.fromkeys((IMAGE_MARK, VIDEO_MARK), IMAGE_INDEX))


def _parts(data: dict[str, Any], case: Path, path: Path) -> tuple[str, list[Medium]]:
    """NVILA's list of texts, images (@name) and videos (lists of names)."""
    text, media = "", list[Medium]()
    for part in data["parts"]:
        if isinstance(part, list):
            frames = tuple(_image(case, name, path) for name in part)
            as_images = data.get("video_as") == "image"
            media += frames if as_images else [Video(frames, "video")]
            text += IMAGE_MARK * len(frames) if as_images else VIDEO_MARK
        elif isinstance(part, str) and part.startswith("@"):
            media.append(_image(case, part[1:], path))
            text += IMAGE_MARK
        else:
            text += _without_marks(str(part))
    return text, media


def _without_marks(text: str) -> str:
    """Marks in a user's text are taken out, and what is left is stripped, as in the original (spec section 3.4)."""
    for mark in ("<image>", "<vila/video>"):
        if mark in text:
            text = text.replace(mark, "").strip()
    return text


def _image(case: Path, name: object, path: Path) -> RgbImage:
    if not isinstance(name, str) or Path(name).name != name:
        raise InputError(f"{path}: {name!r} is not the name of an image in {case / 'images'}")
    return load_image(case / "images" / (name if Path(name).suffix else f"{name}.png"))


def _arrays(path: Path) -> dict[str, FloatArray]:
    if not path.is_file():
        return {}
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as opened, NpzFile(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not an npz file: {error}") from None
