"""Calibration samples: text and images together, and what the LLM sees of them.

A folder of samples holds `samples.jsonl`, one object a line:
    {"prompt": "<image>\\nWhat is this?", "answer": "a cat", "images": ["cat.png"]}
`images` are files of the folder. Without "answer" the prompt is what calibrates; with "text" in the place of
both, plain text is read without a template.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from vila_edge import fsio
from vila_edge.config import VilaConfig
from vila_edge.engine.protocol import Engine
from vila_edge.errors import InputError
from vila_edge.media.image import ImageSource, load_image
from vila_edge.prompt import IMAGE_MARK, Chunk, Turn, assemble, check_text, document, expand_marks, place_media
from vila_edge.reference.torch_engine import torch_engine
from vila_edge.tokenizer import Tokenizer
from vila_edge.visual import Visual, look, plan, slot_embeds, splice

SAMPLES = "samples.jsonl"
SAMPLES_LIMIT = 64 << 20
HELD_OUT = 4  # every fourth sample is kept back, to measure the export with


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


@dataclass(frozen=True)
class CalibrationSet:
    """Samples to search with, samples to measure with, and what they are."""

    search: Sequence[Sample]
    held_out: Sequence[Sample]
    description: str


def split(samples: Sequence[Sample], description: str) -> CalibrationSet:
    """Raises InputError if there are too few samples to keep any back."""
    if len(samples) < HELD_OUT:
        raise InputError(f"{description}: {len(samples)} samples, expected at least {HELD_OUT}")
    held_out = samples[HELD_OUT - 1 :: HELD_OUT]
    search = [sample for i, sample in enumerate(samples) if i % HELD_OUT != HELD_OUT - 1]
    return CalibrationSet(search, held_out, description)


def read_samples(folder: Path) -> CalibrationSet:
    """A user's samples. Raises InputError that names file and line."""
    path = folder / SAMPLES
    lines = fsio.read_bytes(path, SAMPLES_LIMIT).decode(errors="replace").splitlines()
    samples = [_sample(line, folder, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    return split(samples, f"{len(samples)} samples of {folder.name}, {fsio.sha256(path)[:12]}")


def write_samples(folder: Path, samples: Sequence[tuple[str, str, Sequence[Image.Image]]]) -> None:
    """A folder that `read_samples` reads: prompt, answer and images of each sample."""
    lines = []
    for i, (prompt, answer, images) in enumerate(samples):
        names = [f"{i:04}_{j}.png" for j in range(len(images))]
        for name, image in zip(names, images, strict=True):
            image.save(folder / name)
        lines.append(json.dumps({"prompt": prompt, "answer": answer, "images": names}, ensure_ascii=False))
    fsio.write_bytes(folder / SAMPLES, "".join(f"{line}\n" for line in lines).encode())


def built_in() -> CalibrationSet:
    """Samples that need no download: plain English, and drawn images with questions about them."""
    samples: list[Sample] = []
    for i, passage in enumerate(_PASSAGES):
        samples.append(Sample(text=passage))
        question, answer, images = _drawn(i)
        samples.append(Sample(turns=(Turn("user", question), Turn("assistant", answer)), images=images))
    return split(samples, f"built-in: {len(samples)} samples of text and drawn images")


def inputs_embeds(
    samples: Sequence[Sample], cfg: VilaConfig, tokenizer: Tokenizer, params: dict[str, Tensor]
) -> list[Tensor]:
    """What the decoder sees of each sample: [1, S, D], cut to the model's context."""
    engine = torch_engine(cfg, params)
    return [torch.from_numpy(embed(sample, cfg, tokenizer, engine)[None]) for sample in samples]


def embed(sample: Sample, cfg: VilaConfig, tokenizer: Tokenizer, engine: Engine) -> NDArray[np.float32]:
    """What the decoder sees of one sample [S, D], cut to the model's context."""
    chunks, visuals = sample.read(tokenizer, cfg)
    end = engine.embed_tokens(tokenizer.encode(cfg.profile.image_end) if cfg.profile.image_end else ())
    slots = [slot for v in visuals for slot in slot_embeds(v, look(v, engine, cfg).image_embeds, cfg, end)]
    return splice(chunks, slots, engine)[: cfg.llm.context_length]


def batches(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Sequences [1, S, D] joined to [B, S, D] where they are of equal length, in order of length."""
    by_length = defaultdict(list)
    for sequence in sequences:
        by_length[sequence.shape[1]].append(sequence)
    return [torch.cat(by_length[length]) for length in sorted(by_length)]


def _sample(line: str, folder: Path, where: str) -> Sample:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict) or not ("text" in value) ^ ("prompt" in value):
        raise InputError(f"{where}: expected an object with either 'prompt' or 'text'")
    names = value.get("images", [])
    if not isinstance(names, list) or any(not isinstance(n, str) or Path(n).name != n for n in names):
        raise InputError(f"{where}: 'images' is {names!r}, expected a list of file names in {folder}")
    images = tuple(folder / name for name in names)
    check_text(str(value.get("text", value.get("prompt"))), [IMAGE_MARK] * len(images))
    if "text" in value:
        return Sample(text=str(value["text"]), images=images)
    turns = [Turn("user", str(value["prompt"]))]
    if "answer" in value:
        turns.append(Turn("assistant", str(value["answer"])))
    return Sample(turns=tuple(turns), images=images)


def _drawn(seed: int) -> tuple[str, str, tuple[ImageSource, ...]]:
    """One or two images of coloured shapes on a shaded ground, a question and its answer."""
    rng = np.random.default_rng(seed)
    shapes, images = [], []
    for _ in range(1 + seed // 2 % 2):
        shade = np.linspace(rng.integers(0, 128), rng.integers(128, 256), 224).astype(np.uint8)
        canvas = Image.fromarray(np.repeat(np.tile(shade, (224, 1))[..., None], 3, 2))
        colour, shape = rng.choice(list(_COLOURS)), rng.choice(["circle", "square", "triangle"])
        x, y, r = (int(v) for v in (rng.integers(60, 164), rng.integers(60, 164), rng.integers(20, 60)))
        draw = ImageDraw.Draw(canvas)
        if shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=_COLOURS[colour])
        elif shape == "square":
            draw.rectangle((x - r, y - r, x + r, y + r), fill=_COLOURS[colour])
        else:
            draw.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=_COLOURS[colour])
        shapes.append(f"a {colour} {shape}")
        images.append(canvas)
    if len(images) == 1:
        return "What is in the image?", f"The image shows {shapes[0]}.", tuple(images)
    return "What differs between the images?", f"The first shows {shapes[0]}, the second {shapes[1]}.", tuple(images)


_COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "yellow": (230, 210, 50)}

_PASSAGES = (
    "The bridge was built of stone in the summer of a dry year, when the river could be crossed on foot. "
    "Carts had used the ford before; after the first flood nobody would trust it again.",
    "To bake a plain loaf, mix flour, water, salt and a little yeast, and leave the dough alone overnight. "
    "In the morning fold it twice, let it rise in a basket, and bake it in a very hot oven.",
    "A lens bends light because light is slower in glass than in air. The thicker the glass, the longer the "
    "delay, and a curved surface turns that delay into a change of direction.",
    "She counted the steps from the gate to the door: forty in spring, when the path was clear, and more than "
    "sixty in winter, when every step had to be tried before it was taken.",
    "In mathematics a prime number has exactly two divisors. There are infinitely many of them: multiply any "
    "finite list of primes, add one, and no prime of the list divides the result.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    "
    "return total / len(values)\n",
    "The train leaves at 7:45 and arrives at 10:20, so the journey takes two hours and thirty-five minutes. "
    "A return ticket costs 38 euros; children under six travel free.",
    "Question: Why is the sky blue? Answer: Air scatters short waves of light more than long ones, so blue "
    "light reaches the eye from everywhere, and red light mostly from the direction of the sun.",
    "Dear colleagues, the meeting on Thursday is moved to room 214. Please bring the figures of the last "
    "quarter, and send me your questions by Wednesday noon. Kind regards, M.",
    "Owls hunt by hearing. Their ears sit at different heights, so that a sound arrives at one of them "
    "slightly earlier, and from that difference the bird knows how high its prey is.",
    "The old map showed a lake where there is now a town. When the dam broke, the water left in one night; "
    "the people who came for the fish stayed for the soil.",
    "First loosen the screws on the back, then lift the cover. The battery is held by a strip of glue: warm "
    "it gently, pull slowly, and never use a metal tool near the connector.",
)
