"""Samples to batches: rows of like length, about so many tokens a batch, one sample a row."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vila_edge.train.model import IGNORE_INDEX
from vila_edge.train.samples import TrainingSample

POOL = 1200  # samples that are sorted by length at a time
Batch = dict[str, Tensor]


class Batches:
    """`steps` batches from an endless source of samples; the same seed gives the same batches."""

    def __init__(
        self,
        draw: Callable[[random.Random], TrainingSample],
        image_features: Callable[[Sequence[int]], Tensor],
        steps: int,
        tokens: int,
        seed: int,
    ) -> None:
        """`draw` makes a sample; `image_features` [N, P, D_vision] resolves the references in samples."""
        self.draw, self.image_features = draw, image_features
        self.steps, self.tokens, self.seed = steps, tokens, seed

    def of_process(self, index: int) -> Iterator[Batch]:
        """The batches of one process: where several train together, each draws its own."""
        rng = random.Random(self.seed + 1_000_003 * index)
        pool: list[list[TrainingSample]] = []
        for _ in range(self.steps):
            if not pool:
                pool = list(bucket([self.draw(rng) for _ in range(POOL)], self.tokens, rng))
                rng.shuffle(pool)
            yield collate(pool.pop(), self.image_features)


def bucket(samples: list[TrainingSample], tokens: int, rng: random.Random) -> Iterator[list[TrainingSample]]:
    """Samples of like length together, as many as fit into `tokens` with the padding."""
    rows: list[TrainingSample] = []
    for sample in sorted(samples, key=lambda sample: (len(sample), rng.random())):
        if rows and (len(rows) + 1) * len(sample) > tokens:
            yield rows
            rows = []
        rows.append(sample)
    yield rows


def collate(samples: Sequence[TrainingSample], image_features: Callable[[Sequence[int]], Tensor]) -> Batch:
    """The arguments of `Vila.forward`. Padding goes on the right, where no token of the row sees it."""
    length = max(map(len, samples))
    input_ids = torch.zeros(len(samples), length, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample)] = torch.tensor(sample.input_ids)
        labels[row, : len(sample)] = torch.tensor(sample.labels)
    images = [image for sample in samples for image in sample.images]
    return {"input_ids": input_ids, "labels": labels, "image_features": image_features(images)}
