"""Real handwritten digits: scikit-learn's 1,797 scans of 8x8 pixels, in three splits."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIDE = 112  # pixels of a picture: the 8x8 scan, enlarged so that people can look at it
VALIDATION_SIZE, TEST_SIZE = 200, 400
SPLIT_SEED = 0  # the splits do not depend on a run's seed


@dataclass(frozen=True)
class Digits:
    """Scans [N, 8, 8] uint8 (0 background .. 255 ink) and their labels [N], 0..9."""

    scans: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
        """The scan as a grey image of SIDE x SIDE, light ink on a dark ground."""
        return Image.fromarray(self.scans[index]).resize((SIDE, SIDE), resample)

    def by_label(self) -> list[list[int]]:
        """For each digit 0..9 the indices of its scans."""
        return [np.flatnonzero(self.labels == digit).tolist() for digit in range(10)]


@dataclass(frozen=True)
class Splits:
    """Stratified. Recipes are chosen on `validation`; `test` is only ever reported."""

    train: Digits
    validation: Digits
    test: Digits


def load_splits() -> Splits:
    data: Any = load_digits()
    scans = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    rest, test = train_test_split(np.arange(len(labels)), test_size=TEST_SIZE, stratify=labels, random_state=SPLIT_SEED)
    train, validation = train_test_split(
        rest, test_size=VALIDATION_SIZE, stratify=labels[rest], random_state=SPLIT_SEED
    )
    return Splits(*(Digits(scans[index], labels[index]) for index in (train, validation, test)))


def augment(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Turned by up to 10 degrees, moved by up to 8 %, scaled by up to 10 %."""
    side = picture.width
    angle, scale = rng.uniform(-10, 10), rng.uniform(0.9, 1.1)
    shift = (round(rng.uniform(-0.08, 0.08) * side), round(rng.uniform(-0.08, 0.08) * side))
    turned = picture.rotate(angle, Image.Resampling.BILINEAR, translate=shift)
    margin = side * (1 - 1 / scale) / 2
    box = (margin, margin, side - margin, side - margin)
    return turned.transform((side, side), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
