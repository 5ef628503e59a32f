"""Calibration samples that need no download: plain English, and drawn images with questions about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vila_edge.export.calibration import CalibrationSet, Sample, read_samples, split
from vila_edge.media.image import ImageSource
from vila_edge.prompt import Turn


def calibration_set(folder: Path | None) -> CalibrationSet:
    """A user's samples, or the built-in ones. What is measured has images in any case: tower and projector are measured."""
    if not folder:
        return built_in()
    samples = read_samples(folder)
    if any(sample.images for sample in samples.held_out):
        return samples
    drawn = [sample for sample in built_in().held_out if sample.images]
    return dataclasses.replace(samples, held_out=[*samples.held_out, *drawn])


def built_in() -> CalibrationSet:
    """Passages and drawings by turns."""
    samples: list[Sample] = []
    for i, passage in enumerate(_PASSAGES):
        samples.append(Sample(text=passage))
        question, answer, images = _drawn(i)
        samples.append(Sample(turns=(Turn("user", question), Turn("assistant", answer)), images=images))
    return split(samples, f"built-in: {len(samples)} samples of text and drawn images")


def _drawn(seed: int) -> tuple[str, str, tuple[ImageSource, ...]]:
    """One or two images of coloured shapes on a shaded ground, a question and its answer."""
    rng = np.random.default_rng(seed)
    shapes, images = [], []
    for _ in range(1 + seed // 4 % 2):
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
