"""Calibration samples: text and images together, and what the LLM sees of them.

A folder of samples holds `samples.jsonl`, one object a line:
    {"prompt": "<image>\\nWhat is this?", "answer": "a cat", "images": ["cat.png"]}
`images` are files of the folder. Without "answer" the prompt is what calibrates; with "text" in the place of
both, plain text is read without a template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vila_edge import fsio
from vila_edge.config import VilaConfig
from vila_edge.engine.protocol import Embedder, Encoder
from vila_edge.errors import InputError
from vila_edge.media.image import ImageSource, load_image
from vila_edge.prompt import (
    IMAGE_MARK,
    Chunk,
    TextChunk,
    Turn,
    assemble,
    check_text,
    document,
    expand_marks,
    place_media,
)
from vila_edge.tokenizer import Tokenizer
from vila_edge.visual import Visual, look, plan, slot_embeds, splice

SAMPLES = "samples.jsonl"
SAMPLES_LIMIT = 64 << 20
HELD_OUT = 4  # every fourth sample of a kind is kept back, to measure the export with
MEASURED = 8  # of those, at most
ENOUGH = 512  # positions to search with
SAMPLE_TOKENS = 1024  # positions of a sample that are calibrated on


@dataclass(frozen=True)
class Sample:
    """A document (no turns), or a conversation; one image for each mark."""

    text: str = ""
    turns: tuple[Turn, ...] = ()
    images: tuple[ImageSource, ...] = ()

    def read(self, tokenizer: Tokenizer, cfg: VilaConfig) -> tuple[list[Chunk], list[Visual]]:
        """What the model reads and sees of it. Raises PromptError unless there is one image for each mark."""
        profile = cfg.profile
        image_end = tokenizer.encode(profile.image_end) if profile.image_end else ()
        visuals = plan([load_image(image) for image in self.images], cfg, len(image_end))
        first, *rest = self.turns or (Turn("user", self.text),)
        first = Turn("user", place_media(first.text, [IMAGE_MARK] * len(self.images), profile))
        turns = expand_marks([first, *rest], [visual.shown for visual in visuals], profile)
        if self.turns:
            return assemble(turns, tokenizer, profile), visuals
        return document(turns[0].text, tokenizer, profile), visuals

    def positions(self, tokenizer: Tokenizer, cfg: VilaConfig) -> int:
        """How many positions of a sequence `embed` makes of it."""
        chunks, visuals = self.read(tokenizer, cfg)
        texts = sum(len(chunk.ids) for chunk in chunks if isinstance(chunk, TextChunk))
        return min(texts + sum(visual.tokens for visual in visuals), max_positions(visuals, cfg))


@dataclass(frozen=True)
class CalibrationSet:
    """Samples to search with, samples to measure with, and what they are."""

    search: Sequence[Sample]
    held_out: Sequence[Sample]
    description: str
    sha256: str = ""  # of a user's samples and images


def split(samples: Sequence[Sample], description: str, sha256: str = "") -> CalibrationSet:
    """Of texts and of samples with images every fourth is kept back, of fewer the last, of one none.

    Raises InputError if there are too few samples to keep any back.
    """
    if len(samples) < HELD_OUT:
        raise InputError(f"{description}: {len(samples)} samples, expected at least {HELD_OUT}")
    texts, seen = ([i for i, sample in enumerate(samples) if bool(sample.images) == kind] for kind in (False, True))
    kept = [kind[HELD_OUT - 1 :: HELD_OUT] or kind[1:][-1:] for kind in (texts, seen)]
    half = MEASURED // 2
    measured = [kind[: max(half, MEASURED - len(other))] for kind, other in (kept, kept[::-1])]
    held_out = [samples[i] for i in sorted(i for kind in measured for i in kind)]
    search = [sample for i, sample in enumerate(samples) if not any(i in kind for kind in kept)]
    return CalibrationSet(search, held_out, description, sha256)


def read_samples(folder: Path) -> CalibrationSet:
    """A user's samples. Raises InputError that names file and line."""
    path = folder / SAMPLES
    # Not splitlines: a text may hold what Unicode calls an end of a line.
    lines = fsio.read_text(path, SAMPLES_LIMIT).split("\n")
    samples = [_sample(line, folder, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if len(samples) < HELD_OUT:
        raise InputError(f"{path}: {len(samples)} samples, expected at least {HELD_OUT}")
    digest = hashlib.sha256(_sha256(path).encode())
    for image in sorted({Path(image) for sample in samples for image in sample.images if isinstance(image, Path)}):
        load_image(image)  # raises before anything is computed
        digest.update(f"{image.name} {_sha256(image)}\n".encode())
    images = sum(len(sample.images) for sample in samples)
    sha256 = digest.hexdigest()  # and not the folder's name: it may be read from any place
    return split(samples, f"{len(samples)} samples with {images} images, {sha256[:12]}", sha256)


def write_samples(folder: Path, samples: Sequence[tuple[str, str, Sequence[Image.Image]]]) -> None:
    """A folder that `read_samples` reads: prompt, answer and images of each sample."""
    lines = []
    for i, (prompt, answer, images) in enumerate(samples):
        names = [f"{i:04}_{j}.png" for j in range(len(images))]
        for name, image in zip(names, images, strict=True):
            image.save(folder / name)
        lines.append(json.dumps({"prompt": prompt, "answer": answer, "images": names}, ensure_ascii=False))
    fsio.write_bytes(folder / SAMPLES, "".join(f"{line}\n" for line in lines).encode())


def choose(samples: Sequence[Sample], cfg: VilaConfig, tokenizer: Tokenizer, max_tokens: int) -> list[Sample]:
    """As many of the samples as `max_tokens` positions hold, a mixture; a text and one with images in any case."""
    lengths = [sample.positions(tokenizer, cfg) for sample in samples]
    if sum(lengths) <= max_tokens:
        return [*samples]
    order = [int(i) for i in np.random.default_rng(0).permutation(len(samples))]
    chosen = {*{bool(samples[i].images): i for i in reversed(order)}.values()}  # the first of each kind
    total = sum(lengths[i] for i in chosen)
    for i in order:
        if i not in chosen and total + lengths[i] <= max_tokens:
            chosen.add(i)
            total += lengths[i]
    return [samples[i] for i in sorted(chosen)]


def embed(sample: Sample, cfg: VilaConfig, tokenizer: Tokenizer, encoder: Encoder) -> NDArray[np.float32]:
    """What the decoder sees of one sample [S, D]; of a long one, its beginning."""
    chunks, visuals = sample.read(tokenizer, cfg)
    image_embeds = [look(visual, encoder, cfg).image_embeds for visual in visuals]
    return join(chunks, visuals, image_embeds, cfg, tokenizer, encoder)


def join(
    chunks: Sequence[Chunk],
    visuals: Sequence[Visual],
    image_embeds: Sequence[NDArray[np.float32]],
    cfg: VilaConfig,
    tokenizer: Tokenizer,
    embedder: Embedder,
) -> NDArray[np.float32]:
    """The same, of a sample that was read and whose images were looked at."""
    end = embedder.embed_tokens(tokenizer.encode(cfg.profile.image_end) if cfg.profile.image_end else ())
    slots = [slot for pair in zip(visuals, image_embeds, strict=True) for slot in slot_embeds(*pair, cfg, end)]
    return splice(chunks, slots, embedder)[: max_positions(visuals, cfg)]


def max_positions(visuals: Sequence[Visual], cfg: VilaConfig) -> int:
    """How much of a sample is read. A first image of many tiles is read whole, with some text behind it."""
    first = visuals[0].tokens if visuals else 0
    return min(max(SAMPLE_TOKENS, first + SAMPLE_TOKENS // 4), cfg.llm.context_length)


def too_few(samples: Sequence[Sample], cfg: VilaConfig, tokenizer: Tokenizer) -> str:
    """What to say of samples that have fewer positions than they should; "" if there are enough."""
    positions = sum(sample.positions(tokenizer, cfg) for sample in samples)
    if positions >= ENOUGH:
        return ""
    return (
        f"only {positions} positions of {len(samples)} samples to search with, expected {ENOUGH}: "
        "neither the search nor the parity gate can say much with so few"
    )


def _sample(line: str, folder: Path, where: str) -> Sample:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict) or not ("text" in value) ^ ("prompt" in value):
        raise InputError(f"{where}: expected an object with either 'prompt' or 'text'")
    for key in value.keys() & {"text", "prompt", "answer"}:
        _check_content(key, value[key], where)
    names = value.get("images", [])
    if not isinstance(names, list) or any(not isinstance(n, str) or Path(n).name != n for n in names):
        raise InputError(f"{where}: 'images' is {names!r}, expected a list of file names in {folder}")
    images = tuple(folder / name for name in names)
    text = value["text"] if "text" in value else value["prompt"]
    try:
        check_text(text, [IMAGE_MARK] * len(images))
    except InputError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from None
    if "text" in value:
        return Sample(text=text, images=images)
    turns = [Turn("user", text)]
    if "answer" in value:
        turns.append(Turn("assistant", value["answer"]))
    return Sample(turns=tuple(turns), images=images)


def _check_content(key: str, value: object, where: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key!r} is {json.dumps(value)[:60]}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {key!r} has half a character, {value[error.start]!r}, expected text") from None


def _sha256(path: Path) -> str:
    try:
        return fsio.sha256(path.resolve())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
